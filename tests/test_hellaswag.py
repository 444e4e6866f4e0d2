"""hellaswag.py: scores, the three accuracies, the file, and the script."""
import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import types

import pytest
import torch

import folio.tokenizer
import hellaswag
from conftest import run, shared
from folio import checkpoint, download
from folio.configurator import UserError
from folio.machine import Machine
from model import GPT, GPTConfig
from server import FileServer

# 50 characters, as many as the model fixture has tokens
CHARS = folio.tokenizer.CharTokenizer(' abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW')


def make_items(n=12, longest=9):
    """Return items of random letters, with up to `longest` in a text.

    The model fixture sees 17 tokens of a row: with 9 some rows are cut.
    """
    draw = random.Random(0)

    def text():
        return ''.join(draw.choices(CHARS.spec['chars'][1:], k=draw.randint(1, longest)))

    items = []
    for i in range(n):
        items.append({'ind': 100 + i, 'ctx': text() + ' ' * (i % 2) + text(),
                      'endings': [text() for _ in range(4)], 'label': draw.randrange(4)})
    return items


def to_jsonl(items):
    return ''.join(json.dumps(item) + '\n' for item in items)


def rank_of(rank, world_size):
    """Return a machine that is one of several processes and sums over itself only."""
    return types.SimpleNamespace(rank=rank, world_size=world_size, device='cpu',
                                 autocast=contextlib.nullcontext(),
                                 sum_tensor=lambda tensor: tensor, barrier=lambda: None)


def score(model, items, rank=0, world_size=1):
    rows = hellaswag.render(items, CHARS, model.config.block_size)
    return hellaswag.score(model, rows, rank_of(rank, world_size))


def evaluate(model, items, tokenizer=CHARS):
    """Return the accuracies of a model."""
    rows = hellaswag.render(items, tokenizer, model.config.block_size)
    return hellaswag.accuracies(items, *hellaswag.score(model, rows, rank_of(0, 1)))


@torch.no_grad()
def plain_score(model, ctx, ending):
    """Return (log-probability, tokens) of an ending, from all logits of its row alone."""
    ending = CHARS.encode(' ' + ending)
    ids = CHARS.encode(ctx) + ending
    row = torch.tensor(ids[-(model.config.block_size + 1):])
    logp_TV = model(row[None, :-1], all_logits=True)[0][0].log_softmax(dim=-1)
    logp_T = logp_TV.gather(1, row[1:, None])[:, 0]
    return logp_T[-len(ending):].sum().item(), min(len(ending), model.config.block_size)


def plain_scores(model, items):
    """Return plain_score of each ending of each item: sums and counts, both (n, 4)."""
    rows = [[plain_score(model, item['ctx'], ending) for ending in item['endings']]
            for item in items]
    return torch.tensor(rows, dtype=torch.float64).unbind(dim=2)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


# ---- Scores --------------------------------------------------------------------------------------
@pytest.mark.parametrize('n_items, longest', [(3, 4), (3, 9), (3, 24), (1, 9), (8, 9)])
def test_scores_do_not_depend_on_what_else_is_in_a_pass(model, longest, n_items, monkeypatch):
    """Whether all rows are short, some are cut, or some of their endings too."""
    monkeypatch.setattr(hellaswag, 'ITEMS_IN_A_PASS', n_items)
    items = make_items(longest=longest)
    sums, counts = score(model, items)
    expected_sums, expected_counts = plain_scores(model, items)
    assert_close(sums, expected_sums)
    assert torch.equal(counts, expected_counts)
    assert sums.std() > 1


def test_scores_in_a_window_are_those_of_one_row_at_a_time(model):
    items = make_items()
    without = score(model, items)[0]
    for block in model.transformer.h:
        block.attn.window = 5
    assert_close(score(model, items)[0], plain_scores(model, items)[0])
    assert not torch.allclose(score(model, items)[0], without)


def test_contexts_of_one_token_are_scored_among_others(model):
    items = [item | {'ctx': item['ctx'][:1]} for item in make_items()] + make_items()
    assert_close(score(model, items)[0], plain_scores(model, items)[0])


def test_a_model_in_training_is_scored_without_dropout(model):
    model.train()
    model.config.dropout = 0.5
    first, again = [evaluate(model, make_items()) for _ in range(2)]
    assert first == again
    assert first['n'] == 12
    assert model.training


@pytest.mark.parametrize('n', [2, 100])
def test_the_shares_of_all_processes_are_the_whole(model, n):
    shares = [score(model, make_items(), rank=rank, world_size=n)[0] for rank in range(n)]
    assert_close(sum(shares), score(model, make_items())[0])
    assert all((share != 0).sum() < 48 for share in shares)


# ---- Accuracies ----------------------------------------------------------------------------------
class Unigram(GPT):
    """A model whose next character is a with probability 1/2, b 1/4, a space or c 1/8."""

    def forward(self, idx_BT, targets_BT=None, all_logits=False, cache=None):
        super().forward(idx_BT, all_logits=all_logits, cache=cache)  # fills the cache
        logits_V = torch.tensor([-3.0, -1.0, -2.0, -3.0]) * torch.tensor(2.0).log()
        return logits_V.expand(*idx_BT.shape, 4), None


@pytest.fixture
def by_hand():
    """A model, six items and their tokenizer, of which all can be computed by hand.

    In bits, with the space before it, an ending has -4, -7, -43 and -6. By characters, without the
    space, -4, -7/3, -43/20 and -6. By tokens, -2, -7/4, -43/21, -3.
    """
    items = [{'ctx': 'abc', 'endings': ['a', 'aab', 'b' * 20, 'c'], 'label': label}
             for label in (0, 0, 0, 1, 1, 2)]
    model = Unigram(GPTConfig(block_size=64, vocab_size=4, n_layer=1, n_head=1, n_embd=8))
    return model, items, folio.tokenizer.CharTokenizer(' abc')


def test_sums_and_counts_by_hand(by_hand):
    model, items, tokenizer = by_hand
    rows = hellaswag.render(items, tokenizer, model.config.block_size)
    sums, counts = hellaswag.score(model, rows, rank_of(0, 1))
    assert_close(sums[0] / torch.tensor(2.0).log(),
                 torch.tensor([-4, -7, -43, -6], dtype=torch.float64))
    assert counts[0].tolist() == [2, 4, 21, 2]


@pytest.mark.parametrize('name, p', [('acc', 3 / 6), ('acc_norm', 1 / 6), ('acc_mean', 2 / 6)])
def test_an_accuracy_and_its_error_by_hand(by_hand, name, p):
    """The likeliest ending is the first by its sum, the third by characters, second by tokens."""
    metrics = evaluate(*by_hand)
    assert metrics[name] == pytest.approx(p)
    assert metrics[f'{name}_stderr'] == pytest.approx((p * (1 - p) / 5)**0.5)


# ---- The script ----------------------------------------------------------------------------------
def save(path, model, spec):
    checkpoint.save(str(path), {'model': model.state_dict(), 'model_args': vars(model.config),
                                'tokenizer': spec})


@pytest.fixture
def scored(tmp_path):
    """A folder with a checkpoint, 30 items, and what the script printed and wrote of 27."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32))
    save(tmp_path / 'ckpt.pt', model, CHARS.spec)
    (tmp_path / 'items.jsonl').write_bytes(BODY)
    out, bar = run('hellaswag.py', '--out_dir=.', '--device=cpu', '--limit=27',
                   '--source=items.jsonl', '--scores=one.jsonl', cwd=tmp_path)
    return tmp_path, out, bar


def test_the_script_prints_a_line_to_read_and_one_of_json(scored):
    _, out, bar = scored
    figures = json.loads(out.splitlines()[-1])
    assert figures['n'] == 27
    assert out.startswith(f'27 items: acc {figures["acc"]:.4f}')
    assert 'HellaSwag: 100%' in bar


def test_the_script_writes_the_scores_of_each_item(scored):
    folder, out, _ = scored
    rows = [json.loads(line) for line in (folder / 'one.jsonl').read_text().splitlines()]
    assert [row['ind'] for row in rows] == list(range(100, 127))
    n_right = sum(max(row['scores']) == row['scores'][row['label']] for row in rows)
    assert n_right / 27 == json.loads(out.splitlines()[-1])['acc']


@pytest.mark.slow
def test_two_processes_give_the_line_of_one(scored):
    folder, out, _ = scored
    again, _ = run('hellaswag.py', '--out_dir=.', '--device=cpu', '--limit=27',
                   '--source=items.jsonl', '--scores=two.jsonl', cwd=folder, processes=2)
    assert again == out
    assert (folder / 'one.jsonl').read_text() == (folder / 'two.jsonl').read_text()
    assert not (folder / 'two.jsonl.tmp').exists()


@pytest.mark.parametrize('arg, says', [
    ('--init_from=no.pt', 'no checkpoint no.pt'),
    ('--source=no.jsonl', 'no.jsonl cannot be read'),
    ('--sauce=x', 'did you mean source?'),
    ('--limit=-1', 'limit is -1'),
    ('--init_from=other.pt', '(char) has 3'),
])
def test_a_mistake_is_one_line(tmp_path, arg, says):
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32))
    save(tmp_path / 'ckpt.pt', model, CHARS.spec)
    save(tmp_path / 'other.pt', model, {'kind': 'char', 'chars': 'abc'})
    (tmp_path / 'items.jsonl').write_text(to_jsonl(make_items(2)))
    _, err = run('hellaswag.py', '--out_dir=.', '--source=items.jsonl', '--device=cpu', arg,
                 cwd=tmp_path, status=2)
    assert err.startswith('error: ')
    assert says in err
    assert err.count('\n') == 1


# ---- Compared with lm-evaluation-harness ---------------------------------------------------------
TASK = """\
task: hellaswag_file
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: endings
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
N_BOTH = 80  # items that both score


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """A folder with our scores of a model, and theirs of its exported copy, on the same items.

    The context is short, so that many rows are cut.
    """
    for package in ('lm_eval', 'accelerate', 'transformers'):
        pytest.importorskip(package, reason=f'needs {package}: pip install {package}')
    source = shared('hellaswag-like/val.jsonl')
    shared('tiktoken')
    folder = tmp_path_factory.mktemp('both')
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    save(folder / 'ckpt.pt', model, {'kind': 'gpt2'})
    out, _ = run('hellaswag.py', '--init_from=ckpt.pt', f'--source={source}', f'--limit={N_BOTH}',
                 '--scores=scores.jsonl', '--device=cpu', '--dtype=float32', cwd=folder)
    (folder / 'ours.json').write_text(out.splitlines()[-1])
    run('extras/export.py', '--init_from=ckpt.pt', '--to=hf', cwd=folder)
    (folder / 'task.yaml').write_text(TASK.format(source), encoding='utf-8')
    done = subprocess.run(
        [sys.executable, '-m', 'lm_eval', '--model', 'hf', '--model_args',
         'pretrained=hf,dtype=float32', '--tasks', 'hellaswag_file', '--include_path', '.',
         '--limit', str(N_BOTH), '--device', 'cpu', '--batch_size', '16', '--log_samples',
         '--output_path', 'theirs'],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env=os.environ | {'HF_HOME': str(folder), 'HF_HUB_OFFLINE': '1'})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', ['acc', 'acc_norm', 'acc_stderr', 'acc_norm_stderr'])
def test_figures_are_those_of_lm_evaluation_harness(both, name):
    ours = json.loads((both / 'ours.json').read_text())
    theirs = json.loads(next(both.glob('theirs/*/results*')).read_text())
    assert ours[name] == pytest.approx(theirs['results']['hellaswag_file'][f'{name},none'])


@pytest.mark.slow
def test_scores_are_those_of_lm_evaluation_harness(both):
    samples = [json.loads(line)
               for line in next(both.glob('theirs/*/samples*')).read_text().splitlines()]
    samples.sort(key=lambda sample: sample['doc_id'])
    ours = [json.loads(line) for line in (both / 'scores.jsonl').read_text().splitlines()]
    assert len(ours) == len(samples) == N_BOTH
    for row, sample in zip(ours, samples):
        theirs = [float(score) for ((score, _),) in sample['resps']]
        assert row['scores'] == pytest.approx(theirs, abs=1e-3)


# ---- The file ------------------------------------------------------------------------------------
BODY = to_jsonl(make_items(30)).encode()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that has the validation split. Nobody waits between two attempts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download.time, 'sleep', lambda seconds: None)
    server = FileServer(BODY)
    monkeypatch.setattr(hellaswag, 'URL', f'{server.url}/hellaswag_val.jsonl')
    monkeypatch.setattr(hellaswag, 'SHA256', hashlib.sha256(BODY).hexdigest())
    yield server
    server.server.shutdown()


def test_the_validation_split_is_downloaded_once_and_checked(server, tmp_path):
    server.script = ['cut', 500, 'wrong', 'ok']
    for _ in range(2):
        items = hellaswag.load('', machine=Machine('cpu', 'float32'))
        assert [item['ind'] for item in items] == list(range(100, 130))
    assert len(server.asked) == 4
    assert os.listdir(tmp_path / 'data' / 'downloads') == ['hellaswag_val.jsonl']


def test_only_the_first_process_downloads(server):
    with pytest.raises(UserError, match='cannot be read'):  # the first one has not been here
        hellaswag.load('', rank_of(1, 2))
    assert server.asked == []


def test_a_copy_that_was_damaged_is_fetched_again(server, tmp_path):
    (tmp_path / 'data' / 'downloads').mkdir(parents=True)
    (tmp_path / 'data' / 'downloads' / 'hellaswag_val.jsonl').write_bytes(BODY[:1000])
    assert len(hellaswag.load('', rank_of(0, 1))) == 30
    assert len(server.asked) == 1


@pytest.mark.parametrize('script, says', [
    ([500] * 4, 'HTTP 500'), (['cut'] * 4, 'ChunkedEncodingError'),
    (['wrong', 'cut', 500, 'wrong'], 'SHA-256')], ids=['500', 'cut', 'wrong'])
def test_a_download_that_fails_is_one_line_and_leaves_no_file(server, tmp_path, script, says):
    server.script = list(script)
    with pytest.raises(UserError, match=f'could not download .*{says}') as error:
        hellaswag.load('', rank_of(0, 1))
    assert '\n' not in str(error.value)
    assert len(server.asked) == 4
    assert os.listdir(tmp_path / 'data' / 'downloads') == []


GOOD = {'ctx': 'a', 'endings': ['a', 'b', 'c', 'd'], 'label': '3'}


def without(key):
    return json.dumps({name: value for name, value in GOOD.items() if name != key}).encode()


def changed(**changes):
    return json.dumps(GOOD | changes).encode()


@pytest.mark.parametrize('line, says', [
    (b'{"ctx": "a"', 'line 2: .*JSON'),
    (b'{"ctx": "\xff"}', 'line 2: .*Unicode'),
    (b'7', 'line 2: .*ctx'),
    (without('label'), "item 2: .*'label'"),
    (changed(endings=['a', 'b', 'c']), 'item 2: .*a text is missing'),
    (changed(endings=['a', 'b', 'c', '']), 'item 2: .*a text is missing'),
    (changed(ctx=''), 'item 2: .*a text is missing'),
    (changed(label=4), 'item 2: .*the label is 4'),
    (changed(label=''), "item 2: .*''"),
])
def test_a_broken_item_is_named(tmp_path, line, says):
    (tmp_path / 'items.jsonl').write_bytes(json.dumps(GOOD).encode() + b'\n' + line + b'\n\n')
    with pytest.raises(UserError, match=f'items.jsonl, {says}') as error:
        hellaswag.load(str(tmp_path / 'items.jsonl'), rank_of(0, 1))
    assert '\n' not in str(error.value)


def test_a_label_may_be_a_number_or_its_text(tmp_path):
    (tmp_path / 'items.jsonl').write_text(to_jsonl([GOOD, GOOD | {'label': 3}]))
    items = hellaswag.load(str(tmp_path / 'items.jsonl'), rank_of(0, 1))
    assert [item['label'] for item in items] == [3, 3]


def test_a_file_without_items_is_named(tmp_path):
    (tmp_path / 'empty.jsonl').write_text('\n')
    with pytest.raises(UserError, match='empty.jsonl is empty'):
        hellaswag.load(str(tmp_path / 'empty.jsonl'), rank_of(0, 1))
