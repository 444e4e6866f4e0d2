"""A run is never lost, and never silently wrong."""
import contextlib
import fcntl
import json
import os
import pickle
import pty
import random
import re
import signal
import subprocess
import sys
import termios
import threading
import time

import numpy as np
import pytest
import torch

import folio.log
from conftest import ROOT, TINY, run
from folio import checkpoint
from folio.configurator import UserError

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


def planted(code, folder):
    """Write a script that runs train.py after a few lines of Python; return its path."""
    train = str(ROOT / 'train.py')
    path = folder / 'planted.py'
    path.write_text(f'import os, runpy, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n'
                    f'import folio\n{code}\nrunpy.run_path({train!r}, run_name="__main__")\n')
    return path


def python(code, *args, cwd):
    """Run train.py after a few lines of Python that plant an accident; return (status, output)."""
    done = subprocess.run([sys.executable, str(planted(code, cwd)), *args], cwd=cwd, text=True,
                          capture_output=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def command(*args, processes=1, script=ROOT / 'train.py'):
    """Return the command that starts a script, under torchrun if there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return [*launcher, str(script), *args]


def start(*args, cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options):
    return subprocess.Popen(
        command(*args, **options), cwd=cwd, text=True, stdout=stdout, stderr=stderr,
        # Tests that were started by nohup have SIGHUP ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))


@contextlib.contextmanager
def ends_within(seconds, process):
    """Kill a process that does not end in time, so that a test which waits for it goes on."""
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


def log_of(folder, out_dir='out'):
    return folio.log.read(str(folder / out_dir / 'log.jsonl'))


def steps_logged(folder):
    return [entry['iter'] for entry in log_of(folder) if 'loss' in entry]


def figures(folder, out_dir='out'):
    """Return what a log says, without what depends on the clock."""
    return [{k: v for k, v in entry.items() if k not in ('tokens_per_second', 'train_seconds')}
            for entry in log_of(folder, out_dir) if 'iter' in entry]


def differences(ours, theirs, where=''):
    """Return the names of what differs between two checkpoints, to the last bit."""
    if isinstance(ours, list):
        ours = dict(enumerate(ours))
        theirs = dict(enumerate(theirs))
    if isinstance(ours, dict):
        found = [f'{where}.{k}' for k in ours.keys() ^ theirs.keys()]
        for k in ours.keys() & theirs.keys():
            found += differences(ours[k], theirs[k], f'{where}.{k}')
        return found
    same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    return [] if same else [where]


def assert_same_run(folder, ours='out', theirs='alone'):
    """Weights, optimizers, best loss and log are those of the other run, to the last bit."""
    a = load(folder, f'{ours}/ckpt.pt')
    b = load(folder, f'{theirs}/ckpt.pt')
    for key in ('model', 'optimizer', 'scaler', 'windows', 'iter_num', 'best_val_loss',
                'best_iter'):
        assert not differences(a[key], b[key], key)
    assert figures(folder, ours) == figures(folder, theirs)


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


def test_best_pt_without_ckpt_pt_is_a_run(book):
    run('train.py', *FAST, cwd=book)
    best = (book / 'out' / 'best.pt').read_bytes()
    os.remove(book / 'out' / 'ckpt.pt')
    out, _ = run('train.py', *FAST, '--init_from=auto', '--max_iters=3', '--n_layer=1', cwd=book)
    assert 'the run that was in out is now in out/previous-1' in out
    assert (book / 'out' / 'previous-1' / 'best.pt').read_bytes() == best


def test_a_second_run_in_one_folder_is_refused(book):
    run('train.py', *FAST, '--max_iters=5', cwd=book)
    before = {name: (book / 'out' / name).read_bytes() for name in ('ckpt.pt', 'log.jsonl')}
    with folio.log.only_one(str(book / 'out' / 'lock')):
        for how in ('scratch', 'resume'):
            assert 'another run is at work in out' in refused(*FAST, f'--init_from={how}', cwd=book)
    assert before == {name: (book / 'out' / name).read_bytes() for name in before}
    run('train.py', *FAST, '--init_from=resume', cwd=book)


def test_a_run_may_begin_from_a_checkpoint_of_its_own_folder(book):
    run('train.py', *FAST, cwd=book)
    best = (book / 'out' / 'best.pt').read_bytes()
    run('train.py', *FAST, '--init_from=out/best.pt', cwd=book)
    assert (book / 'out' / 'previous-1' / 'best.pt').read_bytes() == best
    assert log_of(book)[1]['val_loss'] == log_of(book, 'out/previous-1')[-1]['val_loss']


# ---- Divergence ----------------------------------------------------------------------------------
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_run_that_diverges_stops_and_what_is_saved_stays_finite(book, dtype):
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


def test_a_run_that_diverges_before_its_first_checkpoint_says_so(book):
    line = refused(*FAST, '--learning_rate=9e18', '--warmup_iters=0', '--eval_interval=1000',
                   cwd=book)
    assert 'nothing was saved yet' in line
    assert not (book / 'out' / 'ckpt.pt').exists()


def test_only_finite_weights_are_saved(book):
    """The weight is one that no loss has shown, when a signal asks for a checkpoint."""
    plant = '''
import signal, torch
step = torch.optim.AdamW.step
def plant(self, *args, **options):
    result = step(self, *args, **options)
    plant.calls += 1
    if plant.calls == 7:
        with torch.no_grad():
            self.param_groups[0]["params"][1][0, 0] = float("inf")
        os.kill(os.getpid(), signal.SIGTERM)
    return result
plant.calls = 0
torch.optim.AdamW.step = plant
'''
    status, printed = python(plant, *FAST, cwd=book)
    assert status == 2
    assert 'the largest weight is inf' in printed
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


def test_masked_losses_do_not_depend_on_how_a_step_is_cut(book):
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
    process = start(*FAST, '--batch_size=2', '--gradient_accumulation_steps=4', cwd=book,
                    processes=2)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    np.testing.assert_allclose(losses_and_norms(book, 'out'), losses_and_norms(book, 'one'),
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_split_without_targets_is_an_error(book, split):
    make_mask(book, split, 0)
    assert f'{split}.mask.bin leaves no target' in refused(*FAST, cwd=book)


def test_an_evaluation_without_targets_is_an_error(book):
    """There are some, but not in the first windows, which are the ones that are evaluated."""
    n_tokens = os.path.getsize(book / 'data' / 'book' / 'val.bin') // 2
    make_mask(book, 'val', np.arange(n_tokens) == n_tokens - 1)
    assert 'val.bin has no targets in the windows' in refused(*FAST, cwd=book)


# ---- A resume ------------------------------------------------------------------------------------
def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path, model):
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, {'model': model.state_dict(), 'model_args': model.config.__dict__})
    whole = checkpoint.load(path)
    good = (tmp_path / 'ckpt.pt').read_bytes()
    rng = random.Random(0)
    n_refused = 0
    for _ in range(150):
        damaged = bytearray(good)
        bit = rng.randrange(8 * len(good))
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / 'ckpt.pt').write_bytes(damaged)
        try:
            # Between the records there is padding, where a bit changes nothing.
            assert not differences(whole, checkpoint.load(path))
        except UserError:
            n_refused += 1
    assert n_refused > 100


def test_a_damaged_checkpoint_is_refused_and_kept(book):
    run('train.py', *FAST, cwd=book)
    damaged = bytearray((book / 'out' / 'ckpt.pt').read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (book / 'out' / 'ckpt.pt').write_bytes(damaged)
    assert 'out/ckpt.pt is damaged' in refused(*FAST, '--init_from=auto', cwd=book)
    assert (book / 'out' / 'ckpt.pt').read_bytes() == damaged


@pytest.mark.slow
def test_another_batch_size_on_resume_visits_each_window_once(book):
    """A note is taken of each window that is asked for after the first pass, which is not a step.

    The thread that makes batches ahead asks for more than are used.
    """
    note = '''
from folio import data
plain = data.train_batches
def noted(*args):
    first, batch_size = args[6], args[3]
    for batch in plain(*args):
        with open("windows.txt", "a") as f:
            f.writelines(f"{i}\\n" for i in range(first, first + batch_size))
        first += batch_size
        yield batch
data.train_batches = noted
'''
    options = [*FAST, '--eval_interval=100']
    seen = []
    for steps, size, count, how in ((3, 4, 2, 'scratch'), (5, 2, 3, 'resume'), (7, 5, 1, 'resume')):
        status, printed = python(note, *options, f'--max_iters={steps}', f'--batch_size={size}',
                                 f'--gradient_accumulation_steps={count}', f'--init_from={how}',
                                 cwd=book)
        assert status == 0, printed
        asked_for = [int(n) for n in (book / 'windows.txt').read_text().split()]
        os.remove(book / 'windows.txt')
        seen += asked_for[:load(book)['windows'] - len(seen)]
    assert seen == list(range(3 * 8 + 2 * 6 + 2 * 5))
    assert [e['tokens'] // 32 for e in log_of(book) if 'loss' in e] == [8, 16, 24, 30, 36, 41, 46]


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_resume_notices_other_data(book, split):
    run('train.py', *FAST, cwd=book)
    before = (book / 'out' / 'ckpt.pt').read_bytes()
    path = book / 'data' / 'book' / f'{split}.bin'
    tokens = path.read_bytes()
    path.write_bytes(tokens[:-2] + tokens[:2])  # the same size, another end
    says = f'{split}.bin is not the file of the run in out/ckpt.pt'
    assert says in refused(*FAST, '--init_from=auto', cwd=book)
    path.write_bytes(tokens)
    make_mask(book, split, 1)
    assert says in refused(*FAST, '--init_from=auto', cwd=book)
    os.remove(book / 'data' / 'book' / f'{split}.mask.bin')
    assert (book / 'out' / 'ckpt.pt').read_bytes() == before
    run('train.py', *FAST, '--init_from=resume', '--max_iters=11', cwd=book)


def test_a_resume_notices_another_seed(book):
    run('train.py', *FAST, cwd=book)
    assert 'seed is 1337, not 1' in refused(*FAST, '--seed=1', '--init_from=resume', cwd=book)


def test_a_run_keeps_its_data_while_others_take_their_place(book):
    """Both files are replaced after the first evaluation; a resume then notices."""
    run('train.py', *FAST, '--out_dir=alone', cwd=book)
    replace = '''
from folio import data
plain = data.evaluate
def replaced(*args, **options):
    result = plain(*args, **options)
    for name in ("train", "val"):
        tokens = open(f"data/book/{name}.bin", "rb").read()
        with open("other", "wb") as f:
            f.write(tokens[:1000] + tokens[1000::-1] + tokens[2001:])
        os.replace("other", f"data/book/{name}.bin")
    return result
data.evaluate = replaced
'''
    status, printed = python(replace, *FAST, cwd=book)
    assert status == 0, printed
    assert_same_run(book)
    line = refused(*FAST, '--init_from=resume', '--max_iters=20', cwd=book)
    assert 'is not the file of the run' in line


def test_a_resume_with_more_steps_ends_as_if_they_had_been_meant(book):
    options = [*FAST, '--dropout=0.1', '--lr_decay_iters=20']
    run('train.py', *options, '--max_iters=20', '--out_dir=alone', cwd=book)
    run('train.py', *options, '--max_iters=10', cwd=book)
    run('train.py', *options, '--max_iters=20', '--init_from=resume', cwd=book)
    assert_same_run(book)


# ---- Settings ------------------------------------------------------------------------------------
@pytest.mark.parametrize('arg', [
    '--learning_rate=nan', '--weight_decay=nan', '--grad_clip=nan', '--min_lr=-1',
    '--learning_rate=-1', '--muon_learning_rate=-1', '--weight_decay=-0.1', '--grad_clip=-1',
    '--dropout=nan', '--device=meta'])
def test_settings_that_would_train_nonsense_are_refused(book_once, arg):
    name = arg.removeprefix('--').partition('=')[0]
    assert name in refused(*FAST, '--out_dir=none', arg, cwd=book_once)
    assert not (book_once / 'none').exists()


def test_max_iters_alone_shortens_a_run(book):
    """The recipe's warm-up and its cooldown end in time, and so does its learning rate."""
    run('train.py', ROOT / 'config' / 'train_book.py', *FAST, '--max_iters=20', cwd=book)
    rates = [entry['lr'] for entry in log_of(book) if 'loss' in entry]
    assert rates[-1] < 0.1 * max(rates)


@pytest.mark.parametrize('args, says', [
    (['--learning_rate=3e-5', '--min_lr=6e-5'], 'min_lr (6e-05) is above learning_rate (3e-05)'),
    (['--max_iters=6', '--lr_decay_iters=4', '--min_lr=0'], 'from step 4 (lr_decay_iters) on'),
    (['--max_iters=6', '--warmup_iters=2000'], 'never reaches its peak'),
])
def test_a_schedule_that_nobody_means_is_said(book, args, says):
    out, _ = run('train.py', *FAST, *args, cwd=book)
    assert says in out


def test_a_usual_schedule_has_nothing_to_say(book):
    out, _ = run('train.py', *FAST, cwd=book)
    assert 'rate' not in out


# ---- Signals -------------------------------------------------------------------------------------
@pytest.mark.parametrize('number', [
    signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_continue(book, number):
    process = start(*FAST, *ENDLESS, cwd=book)
    with ends_within(60, process):
        read_until(process, 'iter 3:')
        process.send_signal(number)
        printed = process.stdout.read()
    assert process.wait() == 128 + number
    assert 'notice: stopping as soon as the run is saved' in printed
    step = load(book)['iter_num']
    assert f'stopped at step {step}, saved in out/ckpt.pt' in printed
    assert 'the same command with --init_from=resume continues' in printed
    run('train.py', *FAST, '--init_from=resume', f'--max_iters={step + 2}', cwd=book)
    assert steps_logged(book) == list(range(step + 2))


def late(seconds, folder):
    """Return a script that trains with batches which take so many seconds each."""
    return planted(f'''
from folio import data
plain = data.train_batches
def late(*args):
    for batch in plain(*args):
        print("waiting", flush=True)
        time.sleep({seconds})
        yield batch
data.train_batches = late
''', folder)


def test_a_signal_does_not_wait_for_the_end_of_a_step(book):
    """The step takes a minute, in 200 micro-steps."""
    process = start(*FAST, *ENDLESS, '--batch_size=1', '--gradient_accumulation_steps=200',
                    cwd=book, script=late(0.3, book))
    with ends_within(60, process):
        read_until(process, 'waiting')
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        printed = process.stdout.read()
    assert process.wait() == 128 + signal.SIGTERM
    assert 'stopped at step 0' in printed
    assert time.monotonic() - began < MOMENT


def test_a_second_signal_stops_at_once_and_says_what_is_lost(book):
    process = start(*FAST, *ENDLESS, cwd=book, script=late(100, book))
    with ends_within(60, process):
        read_until(process, 'waiting')
        process.send_signal(signal.SIGINT)
        read_until(process, 'notice: stopping as soon as the run is saved')
        time.sleep(2.5)  # sooner, it may be the same signal, passed on twice
        process.send_signal(signal.SIGINT)
        printed = process.stdout.read()
    assert process.wait() == 128 + signal.SIGINT
    assert 'what came after the last checkpoint is lost' in printed


@pytest.mark.slow
def test_nohup_outlives_its_terminal(book):
    process = subprocess.Popen(['nohup', *command(*FAST, '--max_iters=100')], cwd=book, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
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
def test_a_signal_in_an_evaluation_leaves_the_resumed_run_the_same(tmp_path, processes):
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
        command(*FAST, *ENDLESS), cwd=book, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=take_terminal)
    os.close(theirs)
    with ends_within(60, process):
        printed = b''
        while b'iter 3:' not in printed:
            printed += os.read(ours, 1000)
        os.close(ours)
        assert process.wait() == 128 + signal.SIGHUP
    assert load(book)['iter_num'] >= 4


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full, which Linux has')
def test_a_run_survives_a_full_disk_under_its_log(book):
    plant = '''
from folio import log
class FullLog(log.Log):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.file = open("/dev/full", "ab", buffering=0)
log.Log = FullLog
'''
    status, printed = python(plant, *FAST, cwd=book)
    assert status == 0
    assert printed.count('/dev/full cannot be written') == 1
    assert load(book)['iter_num'] == 10


FAILS = """
import torch, folio.data, folio.optim
calls = []
plain = {function}
def fails(*args, **options):
    calls.append(1)
    if len(calls) == {call}:
        raise {error}
    return plain(*args, **options)
{function} = fails
"""


@pytest.mark.parametrize('function, call, error, says', [
    ('folio.data.train_batch', 9, 'OSError(5, "Input/output error")', 'error: [Errno 5] Input'),
    ('folio.data.evaluate', 2, 'torch.OutOfMemoryError("CUDA out of memory")', 'halve'),
    ('folio.optim.learning_rate_at', 8, 'KeyError("a bug")', 'Traceback'),
])
def test_a_run_that_an_error_ends_is_saved_first(book, function, call, error, says):
    """A disk that fails, an evaluation that finds no memory or a bug of an editor loses no step."""
    plant = FAILS.format(function=function, call=call, error=error)
    status, printed = python(plant, *FAST, '--eval_interval=7', cwd=book)
    assert status != 0
    assert 'an error ends the run; step 7 is saved in out/ckpt.pt' in printed
    assert says in printed
    assert load(book)['iter_num'] == 7


def test_an_error_whose_run_cannot_be_saved_either_is_told_with_both_reasons(book):
    plant = FAILS.format(function='folio.optim.learning_rate_at', call=8, error='KeyError("a bug")')
    full = FAILS.format(function='torch.save', call=2, error='OSError(28, "No space left")')
    status, printed = python(plant + full.replace('fails', 'fills').replace('calls', 'saves')
                             .replace('plain', 'writes'), *FAST, cwd=book)
    assert status == 1
    assert 'notice: step 7 is not saved: could not write out/ckpt.pt: No space left' in printed
    assert "KeyError: 'a bug'" in printed
    assert 'excepthook' not in printed
    assert load(book)['iter_num'] == 5


def test_half_a_step_is_not_saved(book):
    """An error in an optimizer leaves weights that no run has had."""
    plant = FAILS.format(function='torch.optim.AdamW.step', call=8, error='KeyError("a bug")')
    status, printed = python(plant, *FAST, cwd=book)
    assert status == 1, printed
    assert load(book)['iter_num'] == 5


# ---- What a run looks at -------------------------------------------------------------------------
def make_items(folder, n):
    """Write n items like HellaSwag's, of letters, to items.jsonl."""
    with open(folder / 'items.jsonl', 'w') as f:
        for i in range(n):
            endings = [letters(15, seed=4 * i + k).strip() + 'x' for k in range(4)]
            item = {'ctx': letters(15, seed=i) + 'x', 'endings': endings, 'label': i % 4}
            f.write(json.dumps(item) + '\n')


CRASHES = {
    'hellaswag': '''
import hellaswag
hellaswag.score.calls = 0
plain = hellaswag.score
def crash(*args, **options):
    plain.calls += 1
    return plain(*args, **options) if plain.calls == 1 else os._exit(9)
hellaswag.score = crash
''',
    'sample': '''
from folio import engine
engine.generate = lambda *args, **options: os._exit(9)
''',
}


@pytest.mark.parametrize('what', CRASHES)
def test_a_checkpoint_is_saved_before_the_model_is_looked_at(tmp_path, what):
    """HellaSwag, or a sample, takes the process down at step 5."""
    make_chars(tmp_path, letters(5000), letters(1000))
    make_items(tmp_path, 4)
    status, printed = python(CRASHES[what], *FAST, '--dataset=chars', f'--{what}_interval=5',
                             '--hellaswag_source=items.jsonl', cwd=tmp_path)
    assert status == 9, printed
    assert load(tmp_path)['iter_num'] == 5


def test_what_samples_need_is_missed_before_the_first_step(tmp_path):
    """A nanoGPT folder without a description has GPT-2's tokens, which cannot be had here."""
    make_chars(tmp_path, letters(5000), letters(1000))
    os.remove(tmp_path / 'data' / 'chars' / 'meta.pkl')
    environment = os.environ | {
        'TIKTOKEN_CACHE_DIR': str(tmp_path / 'none'), 'https_proxy': 'http://127.0.0.1:9',
        'HTTPS_PROXY': 'http://127.0.0.1:9'}
    line = refused(*FAST, '--dataset=chars', '--sample_interval=5', cwd=tmp_path, env=environment)
    assert 'tokenizer' in line
    assert not (tmp_path / 'out').exists()


# ---- Bit for bit ---------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize('processes, options', [(3, []), (4, []), (2, ['--compile=True'])],
                         ids=['3', '4', '2-compile'])
def test_a_resume_of_several_processes_is_bitwise_identical(book, processes, options):
    options = [*FAST, *options, '--gradient_accumulation_steps=12', '--batch_size=1',
               '--dropout=0.1', '--lr_decay_iters=10', '--init_from=auto']
    for args in (['--out_dir=alone'], ['--max_iters=5'], []):
        process = start(*options, *args, cwd=book, processes=processes)
        printed = process.communicate(timeout=280)[0]
        assert process.returncode == 0, printed
        assert f'{processes} processes' in printed
        if 'compile is off' in printed:
            pytest.skip('no compiler here, as train.py said')
    assert_same_run(book)


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


@pytest.mark.parametrize('change', ['cut', 'odd', 'meta'])
def test_files_that_disagree_are_refused(book, change):
    train = book / 'data' / 'book' / 'train.bin'
    if change == 'cut':
        train.write_bytes(train.read_bytes()[:-100])
    if change == 'odd':
        train.write_bytes(train.read_bytes()[:-1])
    if change == 'meta':
        meta = json.loads((book / 'data' / 'book' / 'meta.json').read_text())
        meta['splits']['train']['tokens'] += 1
        (book / 'data' / 'book' / 'meta.json').write_text(json.dumps(meta))
    line = refused(*FAST, cwd=book)
    assert 'train.bin is missing, damaged or empty' in line


def test_a_token_beyond_the_vocabulary_is_one_line(tmp_path):
    make_chars(tmp_path, letters(5000), letters(1000))
    tokens = np.full(5000, 60000, dtype='<u2')
    tokens.tofile(tmp_path / 'data' / 'chars' / 'train.bin')
    assert 'holds the token 60000' in refused(*FAST, '--dataset=chars', cwd=tmp_path)
