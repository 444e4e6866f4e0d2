import contextlib
import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading
import types

import pytest
import torch

from folio import download
import hellaswag
import folio.tokenizer
import folio.checkpoint
from folio.configurator import UserError
from conftest import ROOT, run, shared
from folio.machine import Machine
from model import GPT, GPTConfig

CHARS = folio.tokenizer.CharTokenizer(' abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW')  # 50, as the model fixture has
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


def make_items(n=12, longest=9):
    """Items of random letters; with the longest ones a row has more than the 17 tokens that the model fixture sees."""
    draw = random.Random(0)
    text = lambda: ''.join(draw.choices(CHARS.spec['chars'][1:], k=draw.randint(1, longest)))
    return [{'ind': 100 + i, 'ctx': text() + ' ' * (i % 2) + text(), 'endings': [text() for _ in range(4)],
             'label': draw.randrange(4), 'where': f'item {i}'} for i in range(n)]


def write(path, items):
    path.write_text(''.join(json.dumps(item) + '\n' for item in items), encoding='utf-8')
    return path


def rank_of(rank, world_size):
    """A machine that is one of several processes and sums over itself only."""
    return types.SimpleNamespace(rank=rank, world_size=world_size, device='cpu', autocast=contextlib.nullcontext(),
                                 sum=lambda *numbers: numbers)


def score(model, items, batch_tokens=64, rank=0, world_size=1):
    return hellaswag.score(model, items, CHARS, rank_of(rank, world_size), batch_tokens)


@torch.no_grad()
def plain_score(model, ctx, ending):
    """One row by the whole of its logits."""
    ctx, ending = CHARS.encode(ctx), CHARS.encode(' ' + ending)
    row = torch.tensor((ctx + ending)[-(model.config.block_size + 1):])
    logp_TV = model(row[None, :-1], all_logits=True)[0][0].log_softmax(dim=-1)
    logp_T = logp_TV.gather(1, row[1:, None])[:, 0]
    return logp_T[-len(ending):].sum().item(), min(len(ending), model.config.block_size)


BODY = ''.join(json.dumps(item) + '\n' for item in make_items(30)).encode()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that answers as `script` says, one entry a request: 'ok', a status, 'cut', 'wrong'; and no waiting."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            how = self.server.script.pop(0) if self.server.script else 'ok'
            self.server.seen.append(self.headers.get('Range'))
            if isinstance(how, int):
                self.send_error(how)
                return
            body = BODY if how != 'wrong' else BODY.swapcase()
            start = int((self.headers.get('Range') or 'bytes=0-').removeprefix('bytes=').removesuffix('-'))
            self.send_response(206 if start else 200)
            if start:
                self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
            self.send_header('Content-Length', str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:start + 500] if how == 'cut' else body[start:])

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.script, server.seen = [], []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download.time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(hellaswag, 'url', f'http://127.0.0.1:{server.server_port}/hellaswag_val.jsonl')
    monkeypatch.setattr(hellaswag, 'sha256', hashlib.sha256(BODY).hexdigest())
    yield server
    server.shutdown()


# ---- Scores ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('batch_tokens', [1, 64, 10**6])
@pytest.mark.parametrize('longest', [4, 9, 24], ids=['short', 'some-cut', 'endings-cut-too'])
def test_scores_are_those_of_one_row_at_a_time_whatever_the_batch(model, longest, batch_tokens):
    items = make_items(longest=longest)
    sums, counts = score(model, items, batch_tokens)
    expected = torch.tensor([[plain_score(model, item['ctx'], ending) for ending in item['endings']]
                             for item in items], dtype=torch.float64)
    assert torch.allclose(sums, expected[..., 0], rtol=0, atol=1e-4) and torch.equal(counts, expected[..., 1])
    assert sums.std() > 1


def test_a_window_and_contexts_of_one_token_are_scored_too(model):
    model.config.window = 5
    items = [item | {'ctx': item['ctx'][:1]} for item in make_items()] + make_items()
    expected = [[plain_score(model, item['ctx'], ending)[0] for ending in item['endings']] for item in items]
    assert torch.allclose(score(model, items)[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


def test_order_of_the_items_does_not_matter(model):
    items = make_items()
    order = random.Random(1).sample(range(len(items)), len(items))
    assert torch.allclose(score(model, [items[i] for i in order])[0], score(model, items)[0][order], rtol=0, atol=1e-4)


def test_a_context_that_is_too_long_keeps_its_end(model):
    item = make_items(1)[0] | {'ctx': 'that is the end of it', 'endings': ['abcdef', 'a', 'bc', 'd' * 30]}
    long, other = item | {'ctx': 'something before ' + item['ctx']}, item | {'ctx': item['ctx'] + 's'}
    assert torch.equal(score(model, [item])[0], score(model, [long])[0])
    assert not torch.allclose(score(model, [item])[0], score(model, [other])[0])
    assert [context + ending for context, ending in hellaswag.render(long, CHARS, 16)] == [
        CHARS.encode(f'{long["ctx"]} {ending}')[-17:] for ending in long['endings']]


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.config.dropout = 0.5
    before = {name: w.clone() for name, w in model.state_dict().items()}
    first, again = (hellaswag.evaluate(model, make_items(), CHARS, rank_of(0, 1), 64) for _ in range(2))
    assert model.training and first == again and first['n'] == 12
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize('world_size', [2, 3, 100])
def test_every_process_makes_the_same_number_of_forward_passes(model, world_size):
    """With sharded parameters a forward pass is one that all make together."""
    items, passes, plain = make_items(), [], model.forward
    model.forward = lambda *args, **options: passes.append(rank) or plain(*args, **options)
    rank, parts = 'alone', []
    whole = torch.stack(tuple(score(model, items)))
    for rank in range(world_size):
        parts.append(torch.stack(tuple(score(model, items, rank=rank, world_size=world_size))))
    each = {passes.count(rank) for rank in range(world_size)}
    assert len(each) == 1
    assert torch.equal(sum(parts), whole) and all((part[1] > 0).sum() < 48 for part in parts)


class Unigram:
    """A model to which the next character is a with probability 1/2, b with 1/4, a space or c with 1/8."""
    config, training = GPTConfig(vocab_size=4), False
    lm_head = torch.nn.Linear(1, 1)

    def forward(self, idx_BT, all_logits=False, cache=None):
        cache.kv = torch.zeros(1, 1, len(idx_BT), 1, 1, 1) if cache.kv is None else cache.kv
        return torch.tensor([-3, -1, -2, -3]).mul(torch.tensor(2.0).log()).expand(*idx_BT.shape, 4), None

    def train(self, mode=True):
        return self
    eval = train


def test_the_three_accuracies_by_hand():
    """In bits: sums -4, -7, -43, -6; a character, without the space, -4, -7/3, -43/20, -6; a token -2, -7/4, -43/21,
    -3."""
    items = [{'ctx': 'abc', 'endings': ['a', 'aab', 'b' * 20, 'c'], 'label': label, 'where': ''}
             for label in (0, 0, 0, 1, 1, 2)]
    tokenizer = folio.tokenizer.CharTokenizer(' abc')
    sums, counts = hellaswag.score(Unigram(), items, tokenizer, rank_of(0, 1), 64)
    assert torch.allclose(sums[0] / torch.tensor(2.0).log(), torch.tensor([-4., -7, -43, -6], dtype=torch.float64))
    assert counts[0].tolist() == [2, 4, 21, 2]
    expected = {'acc': 3 / 6, 'acc_stderr': (1 / 4 / 5)**0.5, 'acc_norm': 1 / 6, 'acc_norm_stderr': (5 / 36 / 5)**0.5,
                'acc_mean': 2 / 6, 'acc_mean_stderr': (2 / 9 / 5)**0.5, 'n': 6}
    assert hellaswag.evaluate(Unigram(), items, tokenizer, rank_of(0, 1), 64) == pytest.approx(expected)


# ---- The script ------------------------------------------------------------------------------------------------------
def save(path, model, spec):
    folio.checkpoint.save(str(path), {'model': model.state_dict(), 'model_args': vars(model.config), 'tokenizer': spec})


@pytest.mark.parametrize('model', ['gpt2'], indirect=True)
def test_two_processes_give_the_line_of_one_and_download_once(model, server, tmp_path):
    save(tmp_path / 'ckpt.pt', model, CHARS.spec)
    (tmp_path / 'items.jsonl').write_bytes(BODY)
    args = ['--out_dir=.', '--device=cpu', '--batch_tokens=100', '--limit=27', f'--url={hellaswag.url}',
            f'--sha256={hellaswag.sha256}']
    one, bar = run('hellaswag.py', *args, '--source=items.jsonl', '--scores=one.jsonl', cwd=tmp_path)
    two = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                          str(ROOT / 'hellaswag.py'), *args, '--scores=two.jsonl'], cwd=tmp_path, capture_output=True,
                         text=True, timeout=300, env=os.environ | {'OMP_NUM_THREADS': '1'}, check=True).stdout
    figures = json.loads(one.splitlines()[-1])
    assert one == two and figures['n'] == 27 and one.startswith(f'27 items: acc {figures["acc"]:.4f}')
    assert 'HellaSwag: 100%' in bar and server.seen == [None] and not (tmp_path / 'two.jsonl.tmp').exists()
    rows = [json.loads(line) for line in (tmp_path / 'one.jsonl').read_text().splitlines()]
    assert (tmp_path / 'one.jsonl').read_text() == (tmp_path / 'two.jsonl').read_text()
    assert [row['ind'] for row in rows] == list(range(100, 127))
    assert sum(max(row['scores']) == row['scores'][row['label']] for row in rows) / 27 == figures['acc']


def test_figures_and_scores_are_those_of_lm_evaluation_harness(tmp_path):
    """Of an exported copy, which the harness reads; the context is short, so that many rows are cut."""
    for package in ('lm_eval', 'accelerate', 'transformers'):
        pytest.importorskip(package, reason=f'needs {package}: pip install -r requirements-dev.txt')
    source, n = shared('hellaswag-like/val.jsonl'), 80
    shared('tiktoken')
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    save(tmp_path / 'ckpt.pt', model, {'kind': 'gpt2'})
    out, _ = run('hellaswag.py', '--init_from=ckpt.pt', f'--source={source}', f'--limit={n}', '--scores=scores.jsonl',
                 '--device=cpu', cwd=tmp_path)
    ours = json.loads(out.splitlines()[-1])
    run('extras/export.py', '--init_from=ckpt.pt', '--to=hf', cwd=tmp_path)
    (tmp_path / 'task.yaml').write_text(TASK.format(source), encoding='utf-8')
    done = subprocess.run([
        sys.executable, '-m', 'lm_eval', '--model', 'hf', '--model_args', 'pretrained=hf,dtype=float32', '--tasks',
        'hellaswag_file', '--include_path', '.', '--limit', str(n), '--device', 'cpu', '--batch_size', '16',
        '--log_samples', '--output_path', 'theirs'], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'})
    assert done.returncode == 0, done.stderr
    theirs = json.loads(next(tmp_path.glob('theirs/*/results*')).read_text())['results']['hellaswag_file']
    for name in ('acc', 'acc_norm', 'acc_stderr', 'acc_norm_stderr'):
        assert ours[name] == pytest.approx(theirs[f'{name},none'])
    samples = [json.loads(line) for line in next(tmp_path.glob('theirs/*/samples*')).read_text().splitlines()]
    scores = [json.loads(line)['scores'] for line in (tmp_path / 'scores.jsonl').read_text().splitlines()]
    assert len(scores) == len(samples) == n
    for four, sample in zip(scores, sorted(samples, key=lambda sample: sample['doc_id'])):
        assert four == pytest.approx([float(score) for ((score, _),) in sample['resps']], abs=1e-3)


# ---- The file --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('script, requests', [
    (['ok'], [None]),
    ([500, 429, 'ok'], [None, None, None]),
    (['cut', 500, 'cut', 'ok'], [None, 'bytes=500-', 'bytes=500-', 'bytes=1000-']),
    (['wrong', 'ok'], [None, None]),
    (['cut', 'wrong', 'ok'], [None, 'bytes=500-', None]),
], ids=['whole', 'retried', 'resumed', 'wrong-bytes', 'wrong-rest'])
def test_the_validation_split_is_downloaded_once_whole_and_checked(server, tmp_path, script, requests):
    server.script = list(script)
    for _ in range(2):
        assert [item['ind'] for item in hellaswag.load(machine=Machine('cpu', 'float32'))] == list(range(100, 130))
    assert server.seen == requests
    assert [path.name for path in (tmp_path / 'data' / 'downloads').iterdir()] == ['hellaswag_val.jsonl']


def test_a_copy_that_was_damaged_is_fetched_again(server, tmp_path):
    (tmp_path / 'data' / 'downloads').mkdir(parents=True)
    (tmp_path / 'data' / 'downloads' / 'hellaswag_val.jsonl').write_bytes(BODY[:1000])
    assert len(hellaswag.load()) == 30 and len(server.seen) == 1


@pytest.mark.parametrize('script, says, left', [
    ([500] * 4, 'HTTP 500', 0), ([429] * 4, 'HTTP 429', 0), ([404], 'HTTP 404', 0), (['cut'] * 4, 'ConnectionError', 1),
    (['wrong'] * 4, 'SHA-256', 0), (['wrong', 'cut', 500, 'wrong'], 'SHA-256', 0),
], ids=['500', '429', '404', 'cut', 'wrong', 'mixed'])
def test_a_download_that_fails_is_one_line_and_leaves_no_half_file(server, tmp_path, script, says, left):
    server.script = list(script)
    with pytest.raises(UserError, match=f'could not download hellaswag_val.jsonl .*{says}') as caught:
        hellaswag.load()
    assert '\n' not in str(caught.value) and len(server.seen) == len(script)
    names = [path.name for path in (tmp_path / 'data' / 'downloads').iterdir()]
    assert len(names) == left and all(name.endswith('.part') for name in names)  # to go on from, the next time


@pytest.mark.parametrize('line, says', [
    (b'{"ctx": "a"', 'line 2: .*JSON'),
    (b'{"ctx": "\xff"}', 'line 2: .*Unicode'),
    (b'7', 'line 2: .*ctx'),
    (b'{"ctx": "a", "endings": ["a", "b", "c", "d"]}', "line 2: .*'label'"),
    (b'{"endings": ["a", "b", "c", "d"], "label": 0}', "line 2: .*'ctx'"),
    (b'{"ctx": "a", "label": 0}', "line 2: .*'endings'"),
    (b'{"ctx": "a", "endings": [], "label": 0}', 'line 2: .*missing or empty'),
    (b'{"ctx": "a", "endings": ["a", "b", "c"], "label": 0}', 'line 2: .*missing or empty'),
    (b'{"ctx": "a", "endings": ["a", "b", "c", ""], "label": 0}', 'line 2: .*missing or empty'),
    (b'{"ctx": "a", "endings": ["a", "b", "c", 4], "label": 0}', 'line 2: .*missing or empty'),
    (b'{"ctx": "", "endings": ["a", "b", "c", "d"], "label": 0}', 'line 2: .*missing or empty'),
    (b'{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 4}', "line 2: .*'4'"),
    (b'{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": ""}', "line 2: .*''"),
])
def test_a_line_that_is_no_item_is_named(tmp_path, line, says):
    good = {'ctx': 'a', 'endings': ['a', 'b', 'c', 'd'], 'label': '3'}
    path = write(tmp_path / 'items.jsonl', [good])
    assert hellaswag.load(str(path))[0]['label'] == 3
    path.write_bytes(path.read_bytes() + line + b'\n\n')
    with pytest.raises(UserError, match='items.jsonl, ' + says) as caught:
        hellaswag.load(str(path))
    assert '\n' not in str(caught.value)


def test_files_without_items_and_characters_without_ids_are_named(model, tmp_path):
    (tmp_path / 'empty.jsonl').write_text('\n')
    for says in ('empty.jsonl is empty', 'missing.jsonl cannot be read'):
        with pytest.raises(UserError, match=says):
            hellaswag.load(str(tmp_path / says.split()[0]))
    path = write(tmp_path / 'items.jsonl', [*make_items(2), make_items(1)[0] | {'ctx': 'Größe'}])
    with pytest.raises(UserError, match="items.jsonl, line 3: this model .*'ß' 'ö'"):
        hellaswag.evaluate(model, hellaswag.load(str(path)), CHARS, Machine('cpu', 'float32'), 64)


@pytest.mark.parametrize('model', ['gpt2'], indirect=True)
def test_what_the_script_cannot_use_is_one_line(model, tmp_path):
    save(tmp_path / 'ckpt.pt', model, CHARS.spec)
    save(tmp_path / 'other.pt', model, {'kind': 'char', 'chars': 'abc'})
    write(tmp_path / 'items.jsonl', make_items(2))
    for arg, says in {'--init_from=no.pt': 'no checkpoint no.pt', '--source=no.jsonl': 'no.jsonl cannot be read',
                      '--sauce=x': 'did you mean source?', '--init_from=other.pt': '(char) of 3'}.items():
        _, err = run('hellaswag.py', '--out_dir=.', '--source=items.jsonl', '--device=cpu', arg, cwd=tmp_path, status=2)
        assert err.startswith('error: ') and says in err and err.count('\n') == 1
