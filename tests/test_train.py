import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, TINY, run
import folio.checkpoint


def log_of(folder):
    return [json.loads(line) for line in (folder / 'out' / 'log.jsonl').read_text().splitlines()]


def figures(folder):
    """What a log says, without what depends on the clock."""
    keep = ('iter', 'loss', 'val_loss', 'lr', 'grad_norm', 'tokens')
    return [{k: v for k, v in entry.items() if k in keep} for entry in log_of(folder) if 'iter' in entry]


def start_training(folder, *args):
    return subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *TINY, *args], cwd=folder, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize('options', [
    ['--dropout=0.2'],
    ['--dropout=0.2', '--dtype=bfloat16', '--arch=modern'],
    ['--gradient_accumulation_steps=3', '--batch_size=2', '--optimizer=muon', '--arch=modern', '--dropout=0.1'],
    ['--dtype=float16', '--schedule=trapezoid', '--cooldown_iters=10'],
], ids=['dropout', 'bfloat16', 'accumulation-muon', 'float16-scaler'])
def test_resume_is_bitwise_identical(book, options):
    """A run killed with SIGKILL at a random moment and resumed, against one that was left alone."""
    options = [*options, '--max_iters=120']  # long enough for the kill to come before the end
    run('train.py', *TINY, *options, cwd=book)
    undisturbed, expected = folio.checkpoint.load(str(book / 'out' / 'ckpt.pt')), figures(book)
    os.rename(book / 'out', book / 'undisturbed')
    step = random.Random(str(options)).randrange(11, 50)
    process = start_training(book, *options, '--log_interval=1')
    for line in process.stdout:
        if line.startswith(f'iter {step}:'):
            break
    process.kill()
    process.wait()
    assert 0 < folio.checkpoint.load(str(book / 'out' / 'ckpt.pt'))['iter_num'] < 120
    run('train.py', *TINY, *options, '--log_interval=1', '--init_from=resume', cwd=book)
    resumed = folio.checkpoint.load(str(book / 'out' / 'ckpt.pt'))
    for name, weight in undisturbed['model'].items():
        assert torch.equal(weight, resumed['model'][name]), name
    for ours, theirs in zip(undisturbed['optimizer'], resumed['optimizer'], strict=True):
        assert all(torch.equal(ours['state'][p][k], theirs['state'][p][k])
                   for p in ours['state'] for k in ours['state'][p])
    assert undisturbed['scaler'] == resumed['scaler'] and undisturbed['best_val_loss'] == resumed['best_val_loss']
    steps = [entry['iter'] for entry in figures(book) if 'loss' in entry]
    assert steps == list(range(120))  # nothing twice, nothing missing
    assert all(entry in figures(book) for entry in expected)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(book, number):
    process = start_training(book, '--max_iters=100000', '--log_interval=1', '--eval_interval=100000')
    for line in process.stdout:
        if line.startswith('iter 3:'):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait() == 128 + number and 'Traceback' not in rest
    step = folio.checkpoint.load(str(book / 'out' / 'ckpt.pt'))['iter_num']
    assert step >= 4 and f'stopped at step {step}' in rest and '--init_from=resume' in rest
    out, _ = run('train.py', *TINY, f'--max_iters={step + 2}', '--log_interval=1', '--init_from=auto', cwd=book)
    assert f'iter {step}:' in out and f'iter {step - 1}:' not in out


def test_evaluation_does_not_depend_on_the_batch_size(book):
    run('train.py', *TINY, cwd=book)
    losses = [run('train.py', *TINY, '--init_from=resume', '--eval_only=True', '--eval_iters=0', f'--batch_size={n}',
                  cwd=book)[0].split('val: ')[1].split(',')[0] for n in (1, 7, 64)]
    assert len(set(losses)) == 1


def test_the_final_evaluation_is_of_the_whole_split_and_of_the_saved_weights(book):
    out, _ = run('train.py', *TINY, '--eval_iters=0', '--max_iters=15', cwd=book)
    last = [entry for entry in log_of(book) if 'val_loss' in entry][-1]
    assert last['iter'] == 15 == folio.checkpoint.load(str(book / 'out' / 'ckpt.pt'))['iter_num']
    out, _ = run('train.py', *TINY, '--eval_iters=0', '--max_iters=15', '--eval_only=True', '--init_from=resume',
                 cwd=book)
    assert f'val: loss {last["val_loss"]:.4f}, perplexity {last["perplexity"]:.4f}, ' \
           f'bits_per_byte {last["bits_per_byte"]:.4f}' in out


def test_loss_falls_and_best_and_newest_checkpoints_are_kept(book):
    run('train.py', *TINY, '--learning_rate=1e-2', '--max_iters=60', '--lr_decay_iters=60', cwd=book)
    evals = [entry for entry in log_of(book) if 'val_loss' in entry]
    assert evals[-1]['val_loss'] < evals[0]['val_loss'] - 0.5
    assert folio.checkpoint.load(str(book / 'out' / 'ckpt.pt'))['iter_num'] == 60
    best = folio.checkpoint.load(str(book / 'out' / 'best.pt'))
    assert best['best_val_loss'] == min(entry['val_loss'] for entry in evals)
    first = log_of(book)[0]
    assert first['config']['max_iters'] == 60 and 'torch' in first['machine']


def test_patience_stops_a_run_that_no_longer_improves(book):
    out, _ = run('train.py', *TINY, '--patience=2', '--learning_rate=1e-12', '--min_lr=0', '--eval_interval=2',
                 cwd=book)
    assert 'no gain in 2 evaluations' in out and len([e for e in log_of(book) if 'val_loss' in e]) < 16


def test_samples_are_drawn_during_training(book):
    out, _ = run('train.py', *TINY, '--sample_interval=10', '--max_iters=10', cwd=book)
    texts = [entry['sample'] for entry in log_of(book) if 'sample' in entry]
    assert len(texts) == 1 and len(texts[0]) == 200 and texts[0] in out


def test_samples_do_not_change_the_training(book):
    run('train.py', *TINY, '--dropout=0.1', cwd=book)
    plain = folio.checkpoint.load(str(book / 'out' / 'ckpt.pt'))['model']
    run('train.py', *TINY, '--dropout=0.1', '--sample_interval=5', cwd=book)
    sampled = folio.checkpoint.load(str(book / 'out' / 'ckpt.pt'))['model']
    assert all(torch.equal(plain[k], sampled[k]) for k in plain)


def test_a_fresh_run_puts_the_old_one_aside(book):
    run('train.py', *TINY, cwd=book)
    before = (book / 'out' / 'ckpt.pt').read_bytes()
    out, _ = run('train.py', *TINY, '--max_iters=5', cwd=book)
    assert 'out/previous' in out and (book / 'out' / 'previous-1' / 'ckpt.pt').read_bytes() == before
    assert [e['iter'] for e in figures(book) if 'val_loss' in e] == [0, 5]


def test_training_goes_on_from_a_checkpoint_file(book):
    run('train.py', *TINY, cwd=book)
    reached = figures(book)[-1]['val_loss']
    run('train.py', *TINY, '--init_from=out/best.pt', '--out_dir=tuned', '--block_size=16', '--n_layer=7', cwd=book)
    tuned = folio.checkpoint.load(str(book / 'tuned' / 'ckpt.pt'))
    assert (tuned['model_args']['n_layer'], tuned['model_args']['block_size'], tuned['iter_num']) == (2, 16, 30)
    assert tuned['best_val_loss'] < reached + 0.3
    run('train.py', *TINY, '--init_from=resume', '--out_dir=tuned', '--block_size=16', '--n_layer=7', '--max_iters=32',
        cwd=book)  # the same settings resume it, though n_layer came from the file


def test_masked_tokens_are_no_targets(book):
    """With every token masked but 'e', the model learns to say e."""
    import numpy as np
    from folio.data import Dataset
    data = Dataset(str(book / 'data' / 'book'))
    e = data.spec['chars'].index('e')
    for split in data.splits():
        (data.tokens(split) == e).astype(np.uint8).tofile(book / 'data' / 'book' / f'{split}.mask.bin')
    run('train.py', *TINY, '--learning_rate=1e-2', cwd=book)
    assert figures(book)[-1]['val_loss'] < 0.3


def test_compile_trains_the_same_model(book):
    out, _ = run('train.py', *TINY, '--compile=True', '--max_iters=4', cwd=book)
    compiled = folio.checkpoint.load(str(book / 'out' / 'ckpt.pt'))['model']
    if 'compile is off: ' in out:
        pytest.skip('no compiler here, as train.py said')
    run('train.py', *TINY, '--compile=False', '--max_iters=4', cwd=book)
    eager = folio.checkpoint.load(str(book / 'out' / 'ckpt.pt'))['model']
    assert eager.keys() == compiled.keys()
    for name in eager:
        torch.testing.assert_close(eager[name], compiled[name], atol=1e-4, rtol=1e-3)


def test_where_compile_does_not_work_the_reason_is_printed(book):
    environment = os.environ | {'CXX': '/no/such/compiler', 'TORCHINDUCTOR_CACHE_DIR': str(book / 'cache')}
    out, _ = run('train.py', *TINY, '--compile=True', '--max_iters=2', cwd=book, env=environment)
    assert 'compile is off: ' in out and 'compile False' in out and 'done at step 2' in out
