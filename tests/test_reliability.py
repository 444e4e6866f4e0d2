"""A run is never lost, and never silently wrong."""
import contextlib
import fcntl
import os
import pickle
import pty
import random
import re
import shutil
import signal
import subprocess
import termios
import threading
import time

import numpy as np
import pytest
import torch

import folio.log
from conftest import (ROOT, TINY, assert_same_run, command, largest_file, log_of, plant, run,
                      steps_of)
from folio import checkpoint

FAST = [*TINY, '--log_interval=1', '--max_iters=10', '--eval_interval=5']
ENDLESS = ['--max_iters=100000', '--eval_interval=100000']
MOMENT = 10  # seconds that a stop may take on a busy machine; torchrun gives 30


# ---- What the tests share ------------------------------------------------------------------------
def refused(*args, cwd, **options):
    """Run train.py; return the one line with which it ends."""
    _, err = run('train.py', *args, cwd=cwd, status=2, **options)
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith('error: ')
    return lines[0]


def start(*args, cwd, processes=1, stdout=subprocess.PIPE, stderr=subprocess.STDOUT):
    """Start train.py, and return its process."""
    return subprocess.Popen(
        command('train.py', *args, processes=processes), cwd=cwd, text=True, stdout=stdout,
        stderr=stderr,
        # Tests that were started by nohup have SIGHUP ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))


@contextlib.contextmanager
def ends_within(seconds, process):
    """Kill a process that does not end in time, so that a test does not wait for it for ever."""
    alarm = threading.Timer(seconds, process.kill)
    alarm.start()
    yield
    alarm.cancel()


def read_until(process, beginning):
    """Read what a process prints up to a line that begins so; return it."""
    printed = ''
    for line in process.stdout:
        printed += line
        if line.startswith(beginning):
            return printed
    raise AssertionError(printed)


def load(folder, name='out/ckpt.pt'):
    return checkpoint.load(str(folder / name))


def steps_logged(folder):
    return [entry['iter'] for entry in log_of(folder) if 'loss' in entry]


def is_finite(saved):
    """Return whether all numbers of a checkpoint's weights and optimizers are finite."""
    tensors = list(saved['model'].values())
    for optimizer in saved['optimizer']:
        tensors += [t for state in optimizer['state'].values() for t in state.values()]
    return all(torch.as_tensor(t).isfinite().all() for t in tensors)


def make_mask(folder, split, mask):
    """Make `mask`, one number for each token or one for all, the mask of a split of data/book."""
    n_tokens = os.path.getsize(folder / 'data' / 'book' / f'{split}.bin') // 2
    values = np.broadcast_to(np.asarray(mask, dtype=np.uint8), (n_tokens,))
    np.ascontiguousarray(values).tofile(folder / 'data' / 'book' / f'{split}.mask.bin')


def make_chars(folder, train, val):
    """Write data/chars, a nanoGPT folder of letters and blanks, from two texts."""
    letters = 'abcdefghijklmnopqrstuvwxyz '
    (folder / 'data' / 'chars').mkdir(parents=True)
    for split, text in {'train': train, 'val': val}.items():
        tokens = np.array([letters.index(c) for c in text], dtype='<u2')
        tokens.tofile(folder / 'data' / 'chars' / f'{split}.bin')
    with open(folder / 'data' / 'chars' / 'meta.pkl', 'wb') as f:
        pickle.dump({'itos': dict(enumerate(letters)), 'vocab_size': len(letters)}, f)


def letters(n, seed=0):
    """Return n random letters and blanks."""
    return ''.join(random.Random(seed).choices('abcdefghijklmnopqrstuvwxyz ', k=n))


# ---- Runs are never deleted ----------------------------------------------------------------------
def test_the_same_command_three_times_keeps_every_run(book):
    saved = []
    for n in (10, 5, 8):
        run('train.py', *FAST, f'--max_iters={n}', cwd=book)
        saved.append((book / 'out' / 'ckpt.pt').read_bytes())
    assert (book / 'out' / 'previous-1' / 'ckpt.pt').read_bytes() == saved[0]
    assert (book / 'out' / 'previous-2' / 'ckpt.pt').read_bytes() == saved[1]
    for number, steps in (('1', 10), ('2', 5)):
        kept = os.listdir(book / 'out' / f'previous-{number}')
        assert sorted(kept) == ['best.pt', 'ckpt.pt', 'log.jsonl', 'model.py']
        assert log_of(book, f'out/previous-{number}')[-1]['iter'] == steps


def test_best_pt_without_ckpt_pt_is_a_run(trained):
    best = (trained / 'out' / 'best.pt').read_bytes()
    os.remove(trained / 'out' / 'ckpt.pt')
    out, _ = run('train.py', *FAST, '--init_from=auto', '--max_iters=3', '--n_layer=1', cwd=trained)
    assert 'the run that was in out is now in out/previous-1' in out
    assert (trained / 'out' / 'previous-1' / 'best.pt').read_bytes() == best


def test_a_second_run_in_one_folder_is_refused(trained):
    before = {name: (trained / 'out' / name).read_bytes() for name in ('ckpt.pt', 'log.jsonl')}
    with folio.log.only_one(str(trained / 'out' / 'lock')):
        for how in ('scratch', 'resume'):
            line = refused(*FAST, f'--init_from={how}', cwd=trained)
            assert 'another run is at work in out' in line
    assert before == {name: (trained / 'out' / name).read_bytes() for name in before}


def test_a_run_may_begin_from_a_checkpoint_of_its_own_folder(trained):
    best = (trained / 'out' / 'best.pt').read_bytes()
    run('train.py', *FAST, '--init_from=out/best.pt', cwd=trained)
    assert (trained / 'out' / 'previous-1' / 'best.pt').read_bytes() == best
    assert log_of(trained)[1]['val_loss'] == log_of(trained, 'out/previous-1')[-1]['val_loss']


# ---- Divergence ----------------------------------------------------------------------------------
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_diverging_run_stops_and_its_checkpoints_stay_finite(book, dtype):
    run('train.py', *FAST, f'--dtype={dtype}', cwd=book)
    line = refused(*FAST, '--learning_rate=9e18', '--decay_lr=False', '--grad_clip=0',
                   '--max_iters=1000', f'--dtype={dtype}', '--init_from=resume', cwd=book)
    step = int(re.search(r'diverged at step (\d+)', line)[1])
    assert 10 < step < 20
    assert 'out/ckpt.pt is intact: --init_from=resume with a lower --learning_rate' in line
    for name in ('out/ckpt.pt', 'out/best.pt'):
        assert is_finite(load(book, name))
    out, _ = run('train.py', *FAST, f'--dtype={dtype}', '--init_from=resume',
                 f'--max_iters={step + 2}', cwd=book)
    assert f'done at step {step + 2}' in out


def test_divergence_before_the_first_checkpoint_is_said(book):
    line = refused(*FAST, '--learning_rate=9e18', '--warmup_iters=0', '--eval_interval=1000',
                   cwd=book)
    assert 'nothing was saved yet' in line
    assert not (book / 'out' / 'ckpt.pt').exists()


def test_only_finite_weights_are_saved(book):
    """A weight becomes infinite that no loss shows."""
    accident = 'self.spare = torch.nn.Parameter(torch.tensor(float("inf")))'
    config = plant(book, when='self.passes == 7', accident=accident)
    assert 'the largest weight is inf' in refused(config, *FAST, cwd=book)
    assert load(book)['iter_num'] == 5
    assert is_finite(load(book))


# ---- Masked targets ------------------------------------------------------------------------------
CUTS = [(8, 1), (2, 4), (1, 8)]  # batch_size, gradient_accumulation_steps


def sparse_targets(folder):
    """Let one token in five be a target, in clumps: some windows have many, some none."""
    n_tokens = os.path.getsize(folder / 'data' / 'book' / 'train.bin') // 2
    rng = np.random.RandomState(0)
    make_mask(folder, 'train', np.repeat(rng.rand(n_tokens // 10 + 1) < 1 / 5, 10)[:n_tokens])


def losses_and_norms(folder, out_dir):
    return [(e['loss'], e['grad_norm']) for e in log_of(folder, out_dir) if 'loss' in e]


def test_masked_losses_are_the_same_however_a_step_is_cut(book):
    sparse_targets(book)
    for size, count in CUTS:
        run('train.py', *FAST, f'--batch_size={size}', f'--gradient_accumulation_steps={count}',
            f'--out_dir=cut{size}', '--eval_interval=100', cwd=book)
    expected = losses_and_norms(book, 'cut8')
    assert len(expected) == 10
    assert all(loss > 1.5 for loss, _ in expected)
    for size, _ in CUTS[1:]:
        np.testing.assert_allclose(losses_and_norms(book, f'cut{size}'), expected, rtol=1e-5,
                                   atol=1e-5)


@pytest.mark.slow
def test_masked_losses_of_two_processes_are_those_of_one(book):
    sparse_targets(book)
    run('train.py', *FAST, '--batch_size=8', '--out_dir=one', cwd=book)
    run('train.py', *FAST, '--batch_size=2', '--gradient_accumulation_steps=4', cwd=book,
        processes=2)
    np.testing.assert_allclose(losses_and_norms(book, 'out'), losses_and_norms(book, 'one'),
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_split_without_targets_is_refused(book, split):
    make_mask(book, split, 0)
    assert f'{split}.mask.bin leaves no target' in refused(*FAST, cwd=book)


def test_an_evaluation_without_targets_is_refused(book):
    """There are some, but not in the first windows, which are the ones that are evaluated."""
    n_tokens = os.path.getsize(book / 'data' / 'book' / 'val.bin') // 2
    make_mask(book, 'val', np.arange(n_tokens) == n_tokens - 1)
    assert 'val.bin has no targets in the windows' in refused(*FAST, cwd=book)


# ---- A resume ------------------------------------------------------------------------------------
def test_a_damaged_checkpoint_is_refused_and_kept(trained):
    damaged = bytearray((trained / 'out' / 'ckpt.pt').read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (trained / 'out' / 'ckpt.pt').write_bytes(damaged)
    assert 'out/ckpt.pt is damaged' in refused(*FAST, '--init_from=auto', cwd=trained)
    assert (trained / 'out' / 'ckpt.pt').read_bytes() == damaged


def test_a_resume_with_another_batch_size_takes_the_next_window(book):
    options = [*FAST, '--eval_interval=100']
    for steps, size, count, how in ((3, 4, 2, 'scratch'), (5, 2, 3, 'resume'), (7, 5, 1, 'resume')):
        run('train.py', *options, f'--max_iters={steps}', f'--batch_size={size}',
            f'--gradient_accumulation_steps={count}', f'--init_from={how}', cwd=book)
    assert load(book)['windows'] == 3 * 8 + 2 * 6 + 2 * 5
    assert [e['tokens'] // 32 for e in log_of(book) if 'loss' in e] == [8, 16, 24, 30, 36, 41, 46]


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_resume_notices_other_data(trained, split):
    path = trained / 'data' / 'book' / f'{split}.bin'
    tokens = path.read_bytes()
    path.write_bytes(tokens[:-2] + tokens[:2])  # the same size, another end
    says = f'{split}.bin is not the file of the run in out/ckpt.pt'
    assert says in refused(*FAST, '--init_from=auto', cwd=trained)
    path.write_bytes(tokens)
    make_mask(trained, split, 1)
    assert says in refused(*FAST, '--init_from=auto', cwd=trained)
    os.remove(trained / 'data' / 'book' / f'{split}.mask.bin')
    run('train.py', *FAST, '--init_from=resume', '--max_iters=31', cwd=trained)


def test_a_resume_notices_another_seed(trained):
    line = refused(*FAST, '--seed=1', '--init_from=resume', cwd=trained)
    assert 'seed is 1337, not 1' in line


def test_a_run_keeps_its_data_while_others_take_their_place(book):
    """Somebody prepares the data again after the first evaluation; a resume then notices."""
    run('train.py', *FAST, '--out_dir=alone', cwd=book)
    prepared = shutil.copytree(book / 'data' / 'book', book / 'prepared')
    for name in ('train.bin', 'val.bin'):
        tokens = (prepared / name).read_bytes()
        (prepared / name).write_bytes(tokens[:1000] + tokens[1000::-1] + tokens[2001:])
    accident = ('for name in ("train.bin", "val.bin"): '
                'os.replace(f"prepared/{name}", f"data/book/{name}")')
    config = plant(book, when='self.passes == 1 and self.training', accident=accident)
    run('train.py', config, *FAST, cwd=book)
    assert_same_run(book)
    assert steps_of(book) == steps_of(book, 'alone')
    line = refused(config, *FAST, '--init_from=resume', '--max_iters=20', cwd=book)
    assert 'is not the file of the run' in line


def test_a_resume_with_more_steps_ends_as_if_they_had_been_meant(book):
    options = [*FAST, '--dropout=0.1', '--lr_decay_iters=20']
    run('train.py', *options, '--max_iters=20', '--out_dir=alone', cwd=book)
    run('train.py', *options, '--max_iters=10', cwd=book)
    run('train.py', *options, '--max_iters=20', '--init_from=resume', cwd=book)
    assert_same_run(book)
    assert steps_of(book) == steps_of(book, 'alone')


# ---- Settings ------------------------------------------------------------------------------------
def test_max_iters_alone_shortens_a_run(book):
    """The recipe's warm-up and its cooldown end in time, and so does its learning rate."""
    run('train.py', ROOT / 'config' / 'train_book.py', *FAST, '--max_iters=20', cwd=book)
    rates = [entry['lr'] for entry in log_of(book) if 'loss' in entry]
    assert rates[-1] < 0.1 * max(rates)


@pytest.mark.parametrize('args, says', [
    (['--learning_rate=3e-5', '--min_lr=6e-5'], 'min_lr (6e-05) is above learning_rate (3e-05)'),
    (['--max_iters=6', '--lr_decay_iters=4', '--min_lr=0'], 'from step 4 (lr_decay_iters) on'),
    (['--max_iters=6', '--warmup_iters=2000'], 'ends at step 6, within its warm-up of 2000 steps'),
    (['--lr_decay_iters=3', '--warmup_iters=5'], 'ends at step 3, within its warm-up of 5 steps'),
])
def test_an_odd_schedule_is_noticed(book, args, says):
    out, _ = run('train.py', *FAST, *args, cwd=book)
    assert says in out


def test_a_usual_schedule_needs_no_notice(book):
    out, _ = run('train.py', *FAST, cwd=book)
    assert 'rate' not in out


# ---- Signals -------------------------------------------------------------------------------------
def test_ctrl_c_saves_and_says_how_to_continue(book):
    process = start(*FAST, *ENDLESS, cwd=book)
    with ends_within(60, process):
        read_until(process, 'iter 3:')
        process.send_signal(signal.SIGINT)
        printed = process.stdout.read()
    assert process.wait() == 128 + signal.SIGINT
    assert 'Traceback' not in printed
    assert 'notice: stopping as soon as the run is saved' in printed
    step = load(book)['iter_num']
    assert f'stopped at step {step}, saved in out/ckpt.pt' in printed
    assert 'the same command with --init_from=resume continues' in printed
    run('train.py', *FAST, '--init_from=resume', f'--max_iters={step + 2}', cwd=book)
    assert steps_logged(book) == list(range(step + 2))


def test_a_signal_ends_a_step_of_minutes_at_once(book):
    process = start(*FAST, *ENDLESS, '--batch_size=1', '--gradient_accumulation_steps=1000000',
                    cwd=book)
    with ends_within(60, process):
        read_until(process, 'step 0:')
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        printed = process.stdout.read()
    assert process.wait() == 128 + signal.SIGTERM
    assert 'stopped at step 0' in printed
    assert time.monotonic() - began < MOMENT


def test_a_second_signal_stops_at_once_and_says_what_is_lost(book):
    accident = 'print("waiting", flush=True); time.sleep(100)'
    config = plant(book, when='self.passes == 1 and self.training', accident=accident)
    process = start(config, *FAST, *ENDLESS, cwd=book)
    with ends_within(60, process):
        read_until(process, 'waiting')
        process.send_signal(signal.SIGINT)
        read_until(process, 'notice: stopping as soon as the run is saved')
        time.sleep(2.5)  # earlier it may be the same signal, passed on twice
        process.send_signal(signal.SIGINT)
        printed = process.stdout.read()
    assert process.wait() == 128 + signal.SIGINT
    assert 'what came after the last checkpoint is lost' in printed


@pytest.mark.slow
def test_nohup_outlives_its_terminal(book):
    nohup = ['nohup', *command('train.py', *FAST, '--max_iters=100')]
    process = subprocess.Popen(nohup, cwd=book, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    with ends_within(60, process):
        read_until(process, 'iter 3:')
        process.send_signal(signal.SIGHUP)
        printed = process.stdout.read()
    assert process.wait() == 0
    assert 'done at step 100' in printed


@pytest.mark.slow
def test_a_signal_to_torchrun_saves(book):
    options = [*FAST, '--gradient_accumulation_steps=2', '--log_interval=100']
    process = start(*options, *ENDLESS, cwd=book, processes=2)
    with ends_within(120, process):
        read_until(process, 'iter 100:')
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        printed = process.stdout.read()
    assert time.monotonic() - began < MOMENT
    assert process.wait() != 0
    step = load(book)['iter_num']
    assert f'stopped at step {step}, saved in out/ckpt.pt' in printed
    out, _ = run('train.py', *options, '--init_from=resume', f'--max_iters={step + 2}', cwd=book)
    assert f'done at step {step + 2}' in out


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_signal_in_an_evaluation_leaves_a_resume_the_same(tmp_path, processes):
    """The evaluation takes some seconds, as the split is long."""
    make_chars(tmp_path, letters(5000), letters(600000))
    options = [*TINY, '--dataset=chars', '--log_interval=1', '--eval_interval=10', '--eval_iters=0',
               '--max_iters=15', '--gradient_accumulation_steps=2', '--dropout=0.1',
               '--init_from=auto']
    process = start(*options, '--out_dir=alone', cwd=tmp_path, processes=processes)
    assert 'done at step 15' in process.communicate(timeout=200)[0]
    process = start(*options, cwd=tmp_path, processes=processes)
    with ends_within(120, process):
        read_until(process, 'iter 9:')
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        printed = process.stdout.read()
    assert process.wait() != 0
    assert 'stopped at step 10, saved in out/ckpt.pt' in printed
    process = start(*options, cwd=tmp_path, processes=processes)
    assert 'done at step 15' in process.communicate(timeout=200)[0]
    assert_same_run(tmp_path)
    assert steps_of(tmp_path) == steps_of(tmp_path, 'alone')


# ---- Nobody listens, no room ---------------------------------------------------------------------
def test_a_run_survives_a_closed_pipe(book):
    """As in: python train.py … | head -6"""
    process = start(*FAST, '--max_iters=60', cwd=book)
    with ends_within(60, process):
        read_until(process, 'iter 3:')
        process.stdout.close()
        assert process.wait() == 0
    assert load(book)['iter_num'] == 60
    assert steps_logged(book) == list(range(60))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full, which Linux has')
def test_a_run_survives_a_full_disk_under_its_output(book):
    with open('/dev/full', 'w') as full:
        assert start(*FAST, cwd=book, stdout=full, stderr=full).wait() == 0
    assert load(book)['iter_num'] == 10


def take_terminal():
    """Make standard input the terminal of this process, and let it hear SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_closed_terminal_saves(book):
    """The terminal is closed, as a window is; the system then sends SIGHUP."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command('train.py', *FAST, *ENDLESS), cwd=book, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=take_terminal)
    os.close(theirs)
    with ends_within(60, process):
        printed = b''
        while b'iter 3:' not in printed:
            printed += os.read(ours, 1000)
        os.close(ours)
        assert process.wait() == 128 + signal.SIGHUP
    assert load(book)['iter_num'] >= 4


# ---- Errors --------------------------------------------------------------------------------------
def test_a_run_that_a_bug_ends_is_saved_first(book):
    config = plant(book, when='self.passes == 8', accident='raise KeyError("a bug")')
    out, err = run('train.py', config, *FAST, cwd=book, status=1)
    assert 'an error ends the run; step 7 is saved in out/ckpt.pt' in out
    assert 'Traceback' in err
    assert "KeyError: 'a bug'" in err
    assert load(book)['iter_num'] == 7


def test_a_run_out_of_memory_is_saved_first_and_says_what_to_do(book):
    """The memory ends in the evaluation before step 5."""
    config = plant(book, when='self.passes == 6 and not self.training',
                   accident='raise torch.OutOfMemoryError("CUDA out of memory")')
    out, err = run('train.py', config, *FAST, cwd=book, status=2)
    assert 'an error ends the run; step 5 is saved in out/ckpt.pt' in out
    assert 'half the --batch_size and twice the --gradient_accumulation_steps' in err
    assert err.count('\n') == 1
    assert load(book)['iter_num'] == 5


def test_an_error_on_a_full_disk_is_told_with_both_reasons(trained):
    config = plant(trained, when='self.passes == 3', accident='raise KeyError("a bug")')
    with largest_file((trained / 'out' / 'ckpt.pt').stat().st_size // 2):
        _, err = run('train.py', config, *FAST, '--init_from=resume', '--max_iters=40',
                     '--eval_interval=40', cwd=trained, status=1)
    assert 'notice: step 32 is not saved: could not write out/ckpt.pt: File too large' in err
    assert "KeyError: 'a bug'" in err
    assert 'excepthook' not in err
    assert load(trained)['iter_num'] == 30


def test_half_a_step_is_not_saved(book, monkeypatch):
    """An error in an optimizer leaves weights that no run has had."""
    step = torch.optim.AdamW.step

    def fail_in_step_7(optimizer, *args, **options):
        result = step(optimizer, *args, **options)
        if optimizer.state[optimizer.param_groups[0]['params'][0]]['step'] == 8:
            raise KeyError('a bug')
        return result

    monkeypatch.setattr(torch.optim.AdamW, 'step', fail_in_step_7)
    run('train.py', *FAST, cwd=book, status=1)
    assert load(book)['iter_num'] == 5


# ---- What a run looks at -------------------------------------------------------------------------
def test_a_checkpoint_is_saved_before_the_model_is_looked_at(book):
    """A sample ends the process at step 5."""
    config = plant(book, when='cache is not None', accident='sys.exit(9)')
    run('train.py', config, *FAST, '--sample_interval=5', cwd=book, status=9)
    assert load(book)['iter_num'] == 5


def test_what_a_score_needs_is_missed_before_the_first_step(book):
    line = refused(*FAST, '--hellaswag_interval=5', '--hellaswag_source=no.jsonl', cwd=book)
    assert 'no.jsonl cannot be read' in line
    assert not (book / 'out').exists()


# ---- Bit for bit ---------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize('processes, options', [(3, []), (2, ['--compile=True'])],
                         ids=['3', '2-compile'])
def test_a_resume_of_several_processes_is_bitwise_identical(book, processes, options):
    options = [*FAST, *options, '--gradient_accumulation_steps=12', '--batch_size=1',
               '--dropout=0.1', '--lr_decay_iters=10', '--init_from=auto']
    for args in (['--out_dir=alone'], ['--max_iters=5'], []):
        printed, _ = run('train.py', *options, *args, cwd=book, processes=processes)
        assert f'{processes} processes' in printed
        if 'compile is off' in printed:
            pytest.skip('no compiler here, as train.py said')
    assert_same_run(book)
    assert steps_of(book) == steps_of(book, 'alone')


# ---- Files ---------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_works_in_any_locale_and_path(book):
    """Samples hold what the terminal cannot show: they are printed as well as it goes."""
    folder = book / 'мой каталог 書'
    folder.mkdir()
    (folder / 'книга.txt').write_text('Жизнь и судьба, 書と人。\n' * 300, encoding='utf-8')
    hidden = ('LANG', 'LC_CTYPE', 'PYTHONIOENCODING')
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    run('prepare/book/prepare.py', '--book=книга.txt', cwd=folder)
    out, _ = run('train.py', *FAST, '--sample_interval=5', '--out_dir=мой бег', cwd=folder,
                 env=environment)
    assert 'done at step 10' in out
    assert load(folder, 'мой бег/ckpt.pt')['iter_num'] == 10
    run('sample.py', '--out_dir=мой бег', '--device=cpu', '--max_new_tokens=20', cwd=folder,
        env=environment)


def test_a_token_beyond_the_vocabulary_is_one_line(tmp_path):
    make_chars(tmp_path, letters(5000), letters(1000))
    tokens = np.full(5000, 60000, dtype='<u2')
    tokens.tofile(tmp_path / 'data' / 'chars' / 'train.bin')
    assert 'holds the token 60000' in refused(*FAST, '--dataset=chars', cwd=tmp_path)
