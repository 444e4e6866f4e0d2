import json
import os
import re

import pytest

from conftest import TINY, run, shared

QUICK = [*TINY, '--steps=2', '--prompt_tokens=8', '--new_tokens=4']


def test_a_bench_measures_training_data_and_text(book):
    out, _ = run('bench.py', *QUICK, '--json=bench.json', '--gradient_accumulation_steps=2', cwd=book)
    figures = json.loads((book / 'bench.json').read_text())
    names = ['training step', 'training', 'training, peak memory', 'batches from token files', 'prefill', 'decoding']
    assert all(figures[name] > 0 and f'\n{name} ' in out for name in names)
    assert '2 x 4 x 32 = 256 tokens a step' in out and 'data/book' in out and 'MFU' not in out  # no known GPU
    assert figures['training'] == pytest.approx(256 / (figures['training step'] / 1000))


def test_a_bench_needs_no_data_set_and_takes_a_config_file(tmp_path):
    (tmp_path / 'small.py').write_text("arch = 'modern'\noptimizer = 'muon'\nn_layer = 1\n")
    out, _ = run('bench.py', 'small.py', *QUICK, '--dataset=none', '--profile=True', '--decode_batch=3', cwd=tmp_path)
    assert 'random tokens' in out and 'modern' in out and '3 x 8 tokens of prompt' in out and 'Self CPU' in out
    assert json.loads((tmp_path / 'out' / 'trace.json').read_text())['traceEvents']


def test_peers_do_the_same_work_and_the_table_says_how_much_faster_ours_is(tmp_path):
    pytest.importorskip('transformers')
    shared('tiktoken')
    lines = [json.dumps({'text': f'Text number {i} of many, and its words. ' * 20}) for i in range(40)]
    (tmp_path / 'some.jsonl').write_text('\n'.join(lines))
    item = {'ctx': 'A man sits', 'endings': ['down.', 'on a roof and sings.', 'up', 'in the rain.'], 'label': 1}
    (tmp_path / 'items.jsonl').write_text(json.dumps(item))
    out, _ = run('bench.py', *QUICK, '--bias=True', '--dataset=none', '--peers=all', '--texts=some.jsonl',
                 '--hellaswag_source=items.jsonl', '--json=bench.json', '--rounds=1', cwd=tmp_path)
    figures = json.loads((tmp_path / 'bench.json').read_text())
    for name in ('training step', 'decoding, 1 x 900 tokens, int8', "Muon's step", 'tokenizing to a file',
                 'learning a BPE of 32,000, tokenizers', 'HellaSwag'):
        assert figures[name] > 0 and f'\n{name} ' in out
    assert 'transformers' in out and 'a document a task' in out and 'rustbpe' in out
    apart = float(re.search('the scores differ by (.*) at most', out).group(1))
    assert apart < 1e-4


def test_a_race_takes_the_time_to_a_loss(book):
    tiny = ' '.join([*TINY, '--max_iters=2'])
    race = ['--race=True', '--rounds=1', f'--race_ours={tiny}', f'--race_theirs={tiny} --seed=2', '--json=bench.json']
    out, _ = run('bench.py', *race, '--race_loss=99.0', cwd=book)
    figures = json.loads((book / 'bench.json').read_text())
    assert out.count('round ') == 2 and 'seed=2' in out
    assert figures['race, share of the time'] == figures['race to 99.0'] / figures['race to 99.0, theirs']
    _, error = run('bench.py', *race, '--race_loss=0.1', cwd=book, status=2)
    assert 'above 0.1' in error


def test_int8_weights_cost_little_perplexity(book):
    out, _ = run('bench.py', *QUICK, '--quantize=int8', cwd=book)
    with_int8, without = map(float, re.search(r'perplexity, int8 weights +(.*?) +(.*) without', out).groups())
    assert with_int8 == pytest.approx(without, rel=0.01) and '\ndecoding ' in out
    _, error = run('bench.py', *QUICK, '--quantize=int4', cwd=book, status=2)
    assert error.count('\n') == 1 and 'int8' in error


def test_a_mistake_gets_one_line(tmp_path):
    _, error = run('bench.py', '--btach_size=3', cwd=tmp_path, status=2)
    assert error == 'error: unknown setting btach_size on the command line: did you mean batch_size?\n'
    _, error = run('bench.py', '--steps=0', cwd=tmp_path, status=2)
    assert 'at least 1' in error
    _, error = run('bench.py', cwd=tmp_path, status=2, env=os.environ | {'WORLD_SIZE': '2', 'RANK': '0'})
    assert 'one process' in error and error.count('\n') == 1
