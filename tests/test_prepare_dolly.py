"""prepare/dolly/prepare.py: prompts and answers, their masks, and a model tuned on them."""
import json
import os

import pytest

import folio.tokenizer
from conftest import ROOT, log_of, run
from folio.data import Dataset
from hub import Hub

DOLLY = 'prepare/dolly/prepare.py'
TINY = ['--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=32',
        '--batch_size=4', '--seed=1', '--gradient_accumulation_steps=2']
YES = '{"instruction": "Go.", "response": "Yes."}\n'


def example(i):
    """Return a row: every second one has a context, later ones longer answers."""
    return {
        'instruction': f'Name the number {i}.\n',
        'context': f'It comes after {i - 1}.' if i % 2 else '',
        'category': 'qa',
        'response': f'  It is {i}, é <|endoftext|> ' + 'and so on ' * (i // 10),
    }


ROWS = [example(i) for i in range(40)]


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')


def pair_of(row):
    """Return what a row is to become, as the docstring of the script has it."""
    context = f'Context:\n{row["context"]}\n\n' if row['context'] else ''
    prompt = f'Instruction:\n{row["instruction"].strip()}\n\n{context}Response:\n'
    return prompt, row['response'].rstrip()


def documents_of(folder):
    """Return {split: [(text where the mask is 0, text where it is 1)]}, in order."""
    data = Dataset(str(folder))
    tokenizer = folio.tokenizer.load(data.spec)
    found = {}
    for split in data.splits():
        ids = data.tokens(split).tolist()
        mask = data.mask(split).tolist()
        starts = [i for i, token in enumerate(ids) if token == tokenizer.eot]
        assert starts[0] == 0
        assert all(mask[start] == 1 for start in starts)  # it ends the answer before
        found[split] = []
        for start, end in zip(starts, starts[1:] + [len(ids)]):
            first = mask.index(1, start + 1, end)  # the first token of the answer
            assert set(mask[start + 1:first]) == {0}
            assert set(mask[first:end]) == {1}
            prompt = tokenizer.decode(ids[start + 1:first])
            found[split].append((prompt, tokenizer.decode(ids[first:end])))
    return found


@pytest.mark.parametrize('args', [[], ['--tokenizer=bpe', '--vocab_size=300']], ids=['gpt2', 'bpe'])
def test_documents_and_masks_line_up_token_by_token(tmp_path, args):
    write(tmp_path / 'my.jsonl', ROWS)
    out, _ = run(DOLLY, '--source=my.jsonl', '--val_share=0.25', *args, cwd=tmp_path)
    found = documents_of(tmp_path / 'data' / 'dolly')
    assert len(found['train']) == 30
    assert len(found['val']) == 10
    assert '40 of 40 documents' in out
    assert sorted(found['train'] + found['val']) == sorted(map(pair_of, ROWS))


def test_a_split_is_that_of_its_seed(tmp_path):
    write(tmp_path / 'my.jsonl', ROWS)
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        run(DOLLY, '--source=my.jsonl', f'--dataset={name}', f'--seed={seed}', cwd=tmp_path)
    a, b, c = (documents_of(tmp_path / 'data' / name) for name in 'abc')
    assert a == b
    assert a['val'] != c['val']
    assert sorted(a['train'] + a['val']) == sorted(c['train'] + c['val'])


def test_what_is_too_long_or_empty_is_left_out_and_counted(tmp_path):
    empty = [{'instruction': 'Say nothing.', 'response': ' '},
             {'instruction': '', 'response': 'Yes.'}]
    write(tmp_path / 'my.jsonl', ROWS + empty)
    out, _ = run(DOLLY, '--source=my.jsonl', '--max_tokens=40', '--val_share=0.1', cwd=tmp_path)
    folder = tmp_path / 'data' / 'dolly'
    found = documents_of(folder)
    encode = folio.tokenizer.load(Dataset(str(folder)).spec).encode
    fitting = []
    for prompt, answer in map(pair_of, ROWS):
        if 1 + len(encode(prompt)) + len(encode(answer)) <= 40:  # 1: the end-of-text token
            fitting.append((prompt, answer))
    n_long = 40 - len(fitting)
    assert 0 < n_long < 40
    assert sorted(found['train'] + found['val']) == sorted(fitting)
    assert f'{40 - n_long} of 42 documents; left out: {n_long} of over 40 tokens, 2 without' in out


def test_half_a_surrogate_pair_does_not_stop_a_bpe(tmp_path):
    rows = [{'instruction': 'Go \ud83d.', 'response': f'Yes {i}.'} for i in range(20)]
    write(tmp_path / 'sur.jsonl', rows)
    run(DOLLY, '--source=sur.jsonl', '--tokenizer=bpe', '--vocab_size=300',
        cwd=tmp_path)
    data = Dataset(str(tmp_path / 'data' / 'dolly'))
    text = folio.tokenizer.load(data.spec).decode(data.tokens('train').tolist())
    assert 'Go \ufffd.' in text


def test_code_keeps_its_indentation(tmp_path):
    rows = [{'instruction': '\n  def f(x):\n', 'context': '    # here\n',
             'response': '\n \n    if x:\n        return 1\n    return 2\n'}] * 20
    write(tmp_path / 'my.jsonl', rows)
    run(DOLLY, '--source=my.jsonl', '--tokenizer=bpe', '--vocab_size=257', cwd=tmp_path)
    prompt, answer = documents_of(tmp_path / 'data' / 'dolly')['val'][0]
    assert prompt == 'Instruction:\n  def f(x):\n\nContext:\n    # here\n\nResponse:\n'
    assert answer == '    if x:\n        return 1\n    return 2'


@pytest.mark.slow
def test_it_comes_from_the_hub(tmp_path):
    file = ''.join(json.dumps(row) + '\n' for row in ROWS).encode()
    hub = Hub({'databricks/databricks-dolly-15k': {'databricks-dolly-15k.jsonl': file}})
    run(DOLLY, cwd=tmp_path, env=os.environ | hub.environment(tmp_path / 'hub'))
    hub.server.shutdown()
    write(tmp_path / 'my.jsonl', ROWS)
    run(DOLLY, '--source=my.jsonl', '--dataset=same', cwd=tmp_path)
    data = tmp_path / 'data'
    for name in ('train.bin', 'train.mask.bin', 'val.bin', 'val.mask.bin'):
        assert (data / 'dolly' / name).read_bytes() == (data / 'same' / name).read_bytes()


def test_the_config_fine_tunes_a_checkpoint_that_then_answers(tmp_path):
    write(tmp_path / 'my.jsonl', ROWS)
    run(DOLLY, '--source=my.jsonl', '--tokenizer=bpe', '--vocab_size=300', cwd=tmp_path)
    run('train.py', '--dataset=dolly', '--out_dir=tiny', '--max_iters=1', '--eval_iters=1', *TINY,
        cwd=tmp_path)
    schedule = ['--max_iters=3', '--warmup_iters=1', '--eval_interval=3', '--log_interval=1']
    run('train.py', ROOT / 'config/finetune_dolly.py', '--init_from=tiny/ckpt.pt', *TINY, *schedule,
        cwd=tmp_path)
    log = log_of(tmp_path, 'out/gpt2_dolly')
    assert [entry['iter'] for entry in log if 'val_loss' in entry] == [0, 3]
    prompt = 'Instruction:\nName the number 7.\n\nResponse:\n'
    (tmp_path / 'question.txt').write_text(prompt, encoding='utf-8')
    out, _ = run('sample.py', '--out_dir=out/gpt2_dolly', '--start=FILE:question.txt',
                 '--max_new_tokens=8', '--device=cpu', cwd=tmp_path)
    assert out.startswith(prompt)


@pytest.mark.parametrize('content, args, says', [
    (YES * 2 + '{"instruction": "Go."}\n', [], 'line 3'),
    ('{"instruction": "Go.", "context": 5, "response": "Yes."}\n', [], 'row 1'),
    (YES * 9, ['--max_tokens=5'], '0 of 9 rows can be used'),
    (YES * 9, ['--val_share=1'], 'val_share is 1.0'),
    (YES * 9, ['--tokenizer=bqe'], 'no tokenizer in bqe'),
], ids=['column', 'context', 'too long', 'share', 'tokenizer'])
def test_mistakes_get_one_line(tmp_path, content, args, says):
    (tmp_path / 'my.jsonl').write_text(content)
    _, error = run(DOLLY, '--source=my.jsonl', *args, cwd=tmp_path, status=2)
    assert error.startswith('error: ')
    assert says in error
    assert error.count('\n') == 1
    assert not (tmp_path / 'data').exists()


@pytest.mark.slow
def test_a_hub_that_refuses_gets_one_line(tmp_path):
    hub = Hub({})
    environment = os.environ | hub.environment(tmp_path / 'hub')
    _, error = run(DOLLY, cwd=tmp_path, status=2, env=environment)
    hub.server.shutdown()
    last = error.strip().splitlines()[-1]
    assert last.startswith('error: databricks/databricks-dolly-15k could not be downloaded')
    assert '--source=' in last
