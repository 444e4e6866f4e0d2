import json
import os

import pytest

from conftest import TINY, run

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


def test_a_mistake_gets_one_line(tmp_path):
    _, error = run('bench.py', '--btach_size=3', cwd=tmp_path, status=2)
    assert error == 'error: unknown setting btach_size on the command line: did you mean batch_size?\n'
    _, error = run('bench.py', '--steps=0', cwd=tmp_path, status=2)
    assert 'at least 1' in error
    _, error = run('bench.py', cwd=tmp_path, status=2, env=os.environ | {'WORLD_SIZE': '2', 'RANK': '0'})
    assert 'one process' in error and error.count('\n') == 1
