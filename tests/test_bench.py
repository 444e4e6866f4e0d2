"""bench.py's table: what it measures, and which mistakes it explains."""
import json
import os
import re

import pytest

import bench
from conftest import TINY, run

QUICK = [*TINY, '--steps=2', '--prompt_tokens=8', '--new_tokens=4']


def test_a_bench_measures_training_data_and_text(book):
    out, _ = run('bench.py', *QUICK, '--json=bench.json', '--gradient_accumulation_steps=2',
                 cwd=book)
    metrics = json.loads((book / 'bench.json').read_text())
    for name in ['training step', 'training', 'training, peak memory', 'batches from token files',
                 'prefill', 'decoding']:
        assert metrics[name] > 0 and f'\n{name} ' in out
    assert '2 x 4 x 32 = 256 tokens a step' in out and 'data/book' in out
    assert 'MFU' not in out  # no known GPU
    assert metrics['training'] == pytest.approx(256 / (metrics['training step'] / 1000))


def test_a_bench_needs_no_data_set_and_takes_a_config_file(tmp_path):
    config = "arch = 'modern'\noptimizer = 'muon'\nn_layer = 1\n"
    (tmp_path / 'small.py').write_text(config)
    out, _ = run('bench.py', 'small.py', *QUICK, '--dataset=none', '--profile=True',
                 '--decode_batch=3', cwd=tmp_path)
    assert 'random tokens' in out and 'modern' in out
    assert '3 x 8 tokens of prompt' in out and 'Self CPU' in out
    assert json.loads((tmp_path / 'out' / 'trace.json').read_text())['traceEvents']


def test_settings_of_a_script_are_read_without_running_it(tmp_path):
    (tmp_path / 'script.py').write_text('''"""A script."""
import no_such_module
# ---- Settings
out_dir = 'out'  # config = configure(
learning_rate = 6e-4
min_lr = learning_rate / 10
device = default_device()
config = configure(globals())
n_steps = 3
''')
    settings = bench.settings_of(tmp_path / 'script.py')
    assert list(settings) == ['out_dir', 'learning_rate', 'min_lr', 'device']
    assert settings['out_dir'] == 'out' and settings['min_lr'] == pytest.approx(6e-5)


def test_int8_weights_cost_little_perplexity(book):
    out, _ = run('bench.py', *QUICK, '--quantize=int8', cwd=book)
    found = re.search(r'perplexity, int8 weights +(.*?) +(.*) without', out)
    with_int8, without = map(float, found.groups())
    assert with_int8 == pytest.approx(without, rel=0.01) and '\ndecoding ' in out
    _, error = run('bench.py', *QUICK, '--quantize=int4', cwd=book, status=2)
    assert error.count('\n') == 1 and 'int8' in error


def test_a_mistake_gets_one_line(tmp_path):
    _, error = run('bench.py', '--btach_size=3', cwd=tmp_path, status=2)
    assert error == ('error: unknown setting btach_size on the command line: '
                     'did you mean batch_size?\n')
    _, error = run('bench.py', '--steps=0', cwd=tmp_path, status=2)
    assert 'at least 1' in error
    two_processes = os.environ | {'WORLD_SIZE': '2', 'RANK': '0'}
    _, error = run('bench.py', cwd=tmp_path, status=2, env=two_processes)
    assert 'one process' in error and error.count('\n') == 1
