"""bench.py's table: what it measures, and which mistakes it explains."""
import json
import platform

import pytest

import folio.checkpoint
from conftest import run
from folio.machine import Machine
from model import GPT, GPTConfig

QUICK = ['--dataset=book', '--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=32',
         '--block_size=32', '--batch_size=4', '--gradient_accumulation_steps=1', '--steps=2',
         '--prompt_tokens=8', '--new_tokens=4']


# ---- The table -----------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def measured(book_once, tmp_path_factory):
    """(what a bench printed, the metrics that it wrote)."""
    path = tmp_path_factory.mktemp('bench') / 'bench.json'
    out, _ = run('bench.py', *QUICK, f'--save_to={path}', '--gradient_accumulation_steps=2',
                 cwd=book_once)
    return out, json.loads(path.read_text())


@pytest.mark.parametrize('name', ['training step', 'training', 'batches from token files',
                                  'prefill', 'decoding'])
def test_a_bench_measures_training_data_and_text(measured, name):
    out, metrics = measured
    assert metrics[name] > 0
    assert f'\n{name} ' in out


def test_a_bench_says_what_it_measures(measured):
    out, _ = measured
    assert '2 x 4 x 32 = 256 tokens a step' in out
    assert 'data/book' in out


def test_tokens_a_second_are_those_of_the_step(measured):
    _, metrics = measured
    assert metrics['training'] == pytest.approx(256 / (metrics['training step'] / 1000))


def test_without_a_known_gpu_there_is_no_mfu(measured):
    out, _ = measured
    assert 'MFU' not in out


@pytest.mark.parametrize('name, tflops', [
    ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756), ('NVIDIA H100 NVL', 835),
    ('NVIDIA GH200 480GB', 990), ('NVIDIA A100-SXM4-80GB', 312), ('NVIDIA L4', 121)])
def test_a_gpu_is_known_by_its_whole_name(monkeypatch, name, tflops):
    monkeypatch.setattr(platform, 'processor', lambda: name)
    assert Machine('cpu', 'bfloat16').peak_flops == 1e12 * tflops
    assert Machine('cpu', 'float32').peak_flops is None


@pytest.mark.parametrize('name', ['NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'NVIDIA H100', 'x86_64'])
def test_the_peak_of_another_is_not_guessed(monkeypatch, name):
    monkeypatch.setattr(platform, 'processor', lambda: name)
    assert Machine('cpu', 'bfloat16').peak_flops is None


@pytest.fixture(scope='module')
def profiled(tmp_path_factory):
    """(the folder, what a bench without data printed, of a config file, with a profile)."""
    folder = tmp_path_factory.mktemp('profile')
    (folder / 'small.py').write_text("arch = 'modern'\noptimizer = 'muon'\nn_layer = 1\n")
    out, _ = run('bench.py', 'small.py', *QUICK, '--dataset=none', '--profile=True',
                 '--decode_batch=3', cwd=folder)
    return folder, out


def test_a_bench_needs_no_data_set(profiled):
    _, out = profiled
    assert 'random tokens' in out


def test_a_bench_takes_a_config_file_of_train(profiled):
    _, out = profiled
    assert '\nmodern, ' in out
    assert '3 x 8 tokens of prompt' in out


@pytest.mark.parametrize('dataset', ['none', 'book'])
def test_a_bench_of_a_run_needs_neither_its_config_nor_its_data(book_once, tmp_path, dataset):
    config = GPTConfig(block_size=32, vocab_size=3, n_layer=1, n_head=1, n_embd=16)
    path = tmp_path / 'ckpt.pt'
    folio.checkpoint.save(str(path), {'model': GPT(config).state_dict(),
                                      'model_args': vars(config)})
    out, _ = run('bench.py', f'--init_from={path}', *QUICK, f'--dataset={dataset}', cwd=book_once)
    assert 'random tokens' in out
    assert '\ntraining ' in out


def test_a_profile_is_shown_and_written(profiled):
    folder, out = profiled
    assert 'Self CPU' in out
    assert json.loads((folder / 'out' / 'trace.json').read_text())['traceEvents']


# ---- Mistakes ------------------------------------------------------------------------------------
@pytest.mark.parametrize('arg, says', [
    ('--btach_size=3', 'unknown setting btach_size on the command line: did you mean batch_size?'),
    ('--steps=0', 'at least 1'),
    ('--compile=no', "compile is 'no'; choose from auto, True, False"),
])
def test_a_mistake_gets_one_line(book_once, arg, says):
    _, error = run('bench.py', *QUICK, arg, cwd=book_once, status=2)
    assert error.startswith('error: ')
    assert says in error
    assert error.count('\n') == 1


def test_several_processes_are_refused(tmp_path, monkeypatch):
    for name, value in {'TORCHELASTIC_RUN_ID': 'none', 'RANK': '0', 'WORLD_SIZE': '2'}.items():
        monkeypatch.setenv(name, value)
    _, error = run('bench.py', cwd=tmp_path, status=2)
    assert 'one process' in error
    assert error.count('\n') == 1
