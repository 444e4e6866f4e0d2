"""train.py: a run, what it keeps and logs, and that it can be stopped at any moment."""
import itertools
import os
import re
import subprocess
import time

import numpy as np
import pytest
import torch

import folio.data
from conftest import (TINY, assert_same, assert_same_run, command, log_of, run, run_process,
                      steps_of)
from folio import checkpoint
from folio.data import Dataset
from folio.tokenizer import CharTokenizer
from prepare.corpus import write_dataset


def evaluations(folder):
    return [entry for entry in log_of(folder) if 'val_loss' in entry]


def newest(folder):
    return checkpoint.load(str(folder / 'out'))


# ---- Stopped and resumed -------------------------------------------------------------------------
VARIANTS = {
    'dropout': ['--dropout=0.2'],
    'bfloat16': ['--dropout=0.2', '--dtype=bfloat16', '--arch=modern'],
    'accumulation-muon': ['--gradient_accumulation_steps=3', '--batch_size=2', '--optimizer=muon',
                          '--arch=modern', '--dropout=0.1'],
    'float16-scaler': ['--dtype=float16', '--schedule=trapezoid', '--cooldown=0.4'],
}


@pytest.mark.parametrize('options', VARIANTS.values(), ids=VARIANTS)
def test_resume_is_bitwise_identical(book, options):
    options = [*TINY, *options, '--lr_decay_iters=30']
    run('train.py', *options, '--out_dir=alone', cwd=book)
    run('train.py', *options, '--max_iters=13', cwd=book)
    run('train.py', *options, '--init_from=resume', cwd=book)
    assert_same_run(book)
    # The shorter run has one evaluation more, at its end.
    assert [entry for entry in steps_of(book) if entry['iter'] != 13] == steps_of(book, 'alone')


def test_a_killed_run_that_is_resumed_ends_as_one_left_alone(book):
    options = [*TINY, '--dropout=0.2', '--log_interval=1', '--max_iters=120']
    run('train.py', *options, '--out_dir=alone', cwd=book)
    process = subprocess.Popen(command('train.py', *options), cwd=book, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if line.startswith('iter 23:'):
            break
    process.kill()
    process.wait()
    assert 20 <= newest(book)['iter_num'] < 120
    run('train.py', *options, '--init_from=resume', cwd=book)
    assert_same_run(book)
    assert steps_of(book) == steps_of(book, 'alone')  # nothing twice, nothing missing


def test_muons_momentum_rises_over_the_first_fifth_of_a_run(book):
    run('train.py', *TINY, '--optimizer=muon', '--lr_decay_iters=20', '--max_iters=3', cwd=book)
    _, muon = newest(book)['optimizer']
    assert muon['param_groups'][0]['momentum'] == pytest.approx(0.9)  # of step 2, the last one


def test_auto_begins_where_there_is_nothing_to_resume(book):
    out, _ = run('train.py', *TINY, '--init_from=auto', '--max_iters=1', cwd=book)
    assert 'no out/ckpt.pt yet: starting from scratch' in out
    assert 'iter 0:' in out


def test_a_finished_run_that_is_resumed_stays_as_it_is(trained):
    before = newest(trained)
    out, _ = run('train.py', *TINY, '--init_from=resume', cwd=trained)
    assert 'all its steps are done: for more, give a higher --max_iters' in out
    assert 'done at step 30' in out
    assert_same(newest(trained)['model'], before['model'])


# ---- Evaluation ----------------------------------------------------------------------------------
def test_evaluation_does_not_depend_on_the_batch_size(trained_once):
    losses = []
    for n in (1, 7, 64):
        out, _ = run('train.py', *TINY, '--init_from=resume', '--eval_only=True', '--eval_iters=0',
                     f'--batch_size={n}', cwd=trained_once)
        losses.append(float(re.search(r'val: loss (\S+),', out)[1]))
    assert losses == pytest.approx([losses[0]] * 3, abs=2e-4)  # four digits are printed


def test_the_final_evaluation_is_of_the_saved_weights(book):
    options = ['--eval_iters=0', '--max_iters=15']
    run('train.py', *TINY, *options, cwd=book)
    last = evaluations(book)[-1]
    assert last['iter'] == newest(book)['iter_num'] == 15
    out, _ = run('train.py', *TINY, *options, '--eval_only=True', '--init_from=resume',
                 '--hellaswag_interval=1', '--hellaswag_source=none', cwd=book)  # not needed here
    assert (f'val: loss {last["val_loss"]:.4f}, perplexity {last["perplexity"]:.4f}, '
            f'bits_per_byte {last["bits_per_byte"]:.4f}') in out
    assert 'steps of' not in out  # it takes none


def test_an_evaluation_takes_a_shorter_context(trained_once):
    lines = {}
    for size in (2, 32, 1024):
        out, _ = run('train.py', *TINY, '--init_from=resume', '--eval_only=True',
                     f'--block_size={size}', cwd=trained_once)
        lines[size] = out.splitlines()[-1]
    assert lines[2] != lines[32]
    assert lines[1024] == lines[32]  # the model has no more


def test_an_evaluation_of_untrained_weights_says_so(book_once):
    out, _ = run('train.py', *TINY, '--eval_only=True', cwd=book_once)
    assert 'these weights are untrained; to evaluate the run in out_dir: --init_from' in out


def test_patience_stops_a_run_that_no_longer_improves(book):
    """A rate so small that no weight changes: two evaluations after the first are in vain."""
    out, _ = run('train.py', *TINY, '--patience=2', '--learning_rate=1e-30', '--min_lr=0',
                 '--eval_interval=2', cwd=book)
    assert 'no gain in 2 evaluations' in out
    assert [entry['iter'] for entry in evaluations(book)] == [0, 2, 4]


def test_patience_lets_a_run_that_improves_go_on(book):
    out, _ = run('train.py', *TINY, '--patience=2', '--learning_rate=1e-2', '--eval_interval=5',
                 cwd=book)
    assert len(evaluations(book)) == 7
    assert 'no gain' not in out


# ---- What a run keeps ----------------------------------------------------------------------------
@pytest.fixture(scope='module')
def longer(book_once, tmp_path_factory):
    """The folder of a run of 60 steps, long enough to learn something."""
    folder = tmp_path_factory.mktemp('longer')
    os.symlink(book_once / 'data', folder / 'data')
    run('train.py', *TINY, '--learning_rate=1e-2', '--max_iters=60', cwd=folder)
    return folder


def test_loss_falls(longer):
    evals = evaluations(longer)
    assert evals[-1]['val_loss'] < evals[0]['val_loss'] - 0.5


def test_the_newest_checkpoint_is_of_the_last_step(longer):
    assert newest(longer)['iter_num'] == 60


def test_the_best_checkpoint_has_the_lowest_loss_that_was_logged(longer):
    best = checkpoint.load(str(longer / 'out' / 'best.pt'))
    lowest = min(evaluations(longer), key=lambda entry: entry['val_loss'])
    assert best['best_val_loss'] == lowest['val_loss']
    assert best['iter_num'] == lowest['iter'] == 60
    assert os.path.samefile(longer / 'out' / 'best.pt', longer / 'out' / 'ckpt.pt')


def test_the_log_begins_with_settings_and_machine(longer):
    first = log_of(longer)[0]
    assert first['config']['max_iters'] == 60
    assert first['machine']['torch'] == torch.__version__


def test_the_log_has_a_line_for_each_log_interval(longer):
    steps = [entry for entry in log_of(longer) if 'loss' in entry]
    assert [entry['iter'] for entry in steps] == list(range(0, 60, 5))
    assert all(entry['tokens'] == (entry['iter'] + 1) * 4 * 32 for entry in steps)
    assert all(entry['tokens'] == entry['iter'] * 4 * 32 for entry in evaluations(longer))
    for before, entry in zip(steps, steps[1:]):
        seconds = entry['train_seconds'] - before['train_seconds']
        n_tokens = entry['tokens'] - before['tokens']
        assert entry['tokens_per_second'] == pytest.approx(n_tokens / seconds)


def test_the_learning_rate_rises_and_falls(longer):
    rates = [entry['lr'] for entry in log_of(longer) if 'loss' in entry]
    assert rates[0] < rates[1]
    assert rates[1:] == sorted(rates[1:], reverse=True)


@pytest.mark.parametrize('always', [True, False])
def test_always_save_checkpoint_saves_a_worse_one_too(book, always):
    run('train.py', *TINY, f'--always_save_checkpoint={always}', '--learning_rate=5.0',
        '--max_iters=10', cwd=book)
    before, after = evaluations(book)
    assert after['val_loss'] > before['val_loss']
    assert (book / 'out' / 'ckpt.pt').exists() == always


def test_the_clock_stands_still_while_a_run_is_evaluated(book, monkeypatch):
    """Every evaluation takes 10,000 s, and between two looks at the clock there is one."""
    seconds = itertools.count()
    evaluate = folio.data.evaluate

    def long_evaluation(*args):
        for _ in range(10_000):
            next(seconds)
        return evaluate(*args)

    monkeypatch.setattr(time, 'perf_counter', lambda: next(seconds))
    monkeypatch.setattr(folio.data, 'evaluate', long_evaluation)
    run('train.py', *TINY, '--eval_interval=5', '--max_iters=10', cwd=book)
    assert 0 < newest(book)['train_seconds'] < 10_000


# ---- From other weights --------------------------------------------------------------------------
TUNED = [*TINY, '--out_dir=tuned', '--block_size=16', '--n_layer=7']


@pytest.fixture(scope='module')
def tuned(trained_once, tmp_path_factory):
    """A folder with data/ and out/, and tuned/, a run of other settings from out/best.pt."""
    folder = tmp_path_factory.mktemp('tuned')
    for name in ('data', 'out'):
        os.symlink(trained_once / name, folder / name)
    run('train.py', *TUNED, '--init_from=out/best.pt', cwd=folder)
    return folder


def test_weights_decide_the_shape_and_settings_the_context(tuned):
    args = checkpoint.load(str(tuned / 'tuned'))['model_args']
    assert args['n_layer'] == 2
    assert args['block_size'] == 16


def test_training_continues_from_the_loss_that_was_reached(tuned):
    reached = evaluations(tuned)[-1]['val_loss']
    saved = checkpoint.load(str(tuned / 'tuned'))
    assert saved['iter_num'] == 30
    assert saved['best_val_loss'] < reached + 0.3


def test_a_tuned_run_is_resumed_with_the_settings_that_began_it(tuned):
    run('train.py', *TUNED, '--init_from=resume', '--max_iters=32', cwd=tuned)
    assert checkpoint.load(str(tuned / 'tuned'))['iter_num'] == 32


# ---- Samples, masks, dropout ---------------------------------------------------------------------
def test_samples_are_printed_and_logged(book):
    out, _ = run('train.py', *TINY, '--sample_interval=10', '--max_iters=10', cwd=book)
    texts = [entry['sample'] for entry in log_of(book) if 'sample' in entry]
    assert len(texts) == 1
    assert len(texts[0]) == 200
    assert texts[0] in out


def test_samples_leave_the_training_as_it_is(book):
    run('train.py', *TINY, '--dropout=0.1', '--max_iters=6', '--out_dir=alone', cwd=book)
    run('train.py', *TINY, '--dropout=0.1', '--max_iters=6', '--sample_interval=3', cwd=book)
    assert_same_run(book)


def test_a_run_learns_the_targets_of_its_mask_alone(book):
    """With every token masked but 'e', the model learns to say e."""
    data = Dataset(str(book / 'data' / 'book'))
    e = data.spec['chars'].index('e')
    for split in data.splits():
        mask = data.tokens(split) == e
        mask.astype(np.uint8).tofile(book / 'data' / 'book' / f'{split}.mask.bin')
    run('train.py', *TINY, '--learning_rate=1e-2', cwd=book)
    assert evaluations(book)[-1]['val_loss'] < 0.3


def losses_of_a_model_that_stays(folder, dropout):
    """Return the losses of ten steps on one and the same batch, at a learning rate near zero."""
    text = 'a' * 1000
    write_dataset(folder / 'data' / 'same', CharTokenizer('ab'), {'train': [text], 'val': [text]},
                  source='here')
    run('train.py', *TINY, '--dataset=same', f'--dropout={dropout}', '--learning_rate=1e-12',
        '--min_lr=0', '--max_iters=10', '--log_interval=1', cwd=folder)
    return [entry['loss'] for entry in log_of(folder) if 'loss' in entry]


def test_dropout_differs_from_step_to_step(tmp_path):
    assert len(set(losses_of_a_model_that_stays(tmp_path, dropout=0.5))) == 10


def test_without_dropout_the_same_batch_has_the_same_loss(tmp_path):
    losses = losses_of_a_model_that_stays(tmp_path, dropout=0.0)
    assert losses == pytest.approx([losses[0]] * 10, abs=1e-6)


# ---- Compiling -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_compile_trains_the_same_model(book):
    args = [*TINY, '--dtype=float32', '--max_iters=4']
    out, _ = run_process('train.py', *args, '--compile=True', cwd=book)
    if 'compile is off: ' in out:
        pytest.skip('no compiler here, as train.py said')
    compiled = newest(book)['model']
    run('train.py', *args, '--compile=False', cwd=book)
    eager = newest(book)['model']
    assert eager.keys() == compiled.keys()
    for name in eager:
        torch.testing.assert_close(eager[name], compiled[name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_without_a_compiler_a_run_says_why_and_trains(book):
    environment = os.environ | {'CXX': '/no/such/compiler',
                                'TORCHINDUCTOR_CACHE_DIR': str(book / 'cache')}
    out, _ = run_process('train.py', *TINY, '--compile=True', '--max_iters=2', cwd=book,
                         env=environment)
    assert 'compile is off: ' in out
    assert 'compile False' in out
    assert 'done at step 2' in out
