"""A run is never lost, and never silently wrong."""

import contextlib
import json
import os
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from conftest import ROOT, TINY, run
from folio import checkpoint, data
from folio.configurator import UserError, configure
from folio.lock import only_one
from folio.machine import Machine

EACH_STEP = '--log_interval=1'
FAST = [*TINY, EACH_STEP, '--max_iters=10', '--eval_interval=5']
MOMENT = 10  # seconds that a stop may take on a busy machine; torchrun gives 30


# ---- What the tests share ------------------------------------------------------------------------
def refused(*args, cwd, **options):
    """Run train.py; return the one line with which it ends."""
    _, err = run('train.py', *args, cwd=cwd, status=2, **options)
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith('error: '), err
    return lines[0]


def python(code, *args, cwd):
    """Run train.py after a few lines of Python that plant an accident; return (status, output)."""
    script = str(ROOT / 'train.py')
    code = (
        f'import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport folio\n{code}\n'
        f'sys.argv[0] = {script!r}\nrunpy.run_path({script!r}, run_name="__main__")'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, *args], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def start(*args, cwd, processes=1):
    """Start train.py, under torchrun if there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return subprocess.Popen(
        [*launcher, str(ROOT / 'train.py'), *args],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
        # Tests that were started by nohup have SIGHUP ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


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
    return checkpoint.read_log(str(folder / out_dir / 'log.jsonl'))


def figures(folder, out_dir='out'):
    """Return what a log says, without what depends on the clock."""
    return [
        {k: v for k, v in entry.items() if k not in ('tokens_per_second', 'train_seconds')}
        for entry in log_of(folder, out_dir)
        if 'iter' in entry
    ]


def differences(ours, theirs, where=''):
    """Return the names of what differs between two checkpoints, to the last bit."""
    if isinstance(ours, dict):
        names = [f'{where}.{k}' for k in ours.keys() ^ theirs.keys()]
        return names + [
            name
            for k in ours.keys() & theirs.keys()
            for name in differences(ours[k], theirs[k], f'{where}.{k}')
        ]
    if isinstance(ours, list):
        same_length = len(ours) == len(theirs)
        return (
            []
            if same_length and not any(differences(*pair) for pair in zip(ours, theirs))
            else [where]
        )
    same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    return [] if same else [where]


def assert_same_run(folder, ours='out', theirs='alone'):
    """Weights, optimizers, best loss and log are those of the other run, to the last bit."""
    for key in (
        'model',
        'optimizer',
        'scaler',
        'windows',
        'iter_num',
        'best_val_loss',
        'evals_without_gain',
    ):
        assert not differences(
            load(folder, f'{ours}/ckpt.pt')[key], load(folder, f'{theirs}/ckpt.pt')[key], key
        )
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


def test_files_that_are_not_ours_stay_where_they_are(tmp_path):
    out = tmp_path / 'out'
    (out / 'previous-1').mkdir(parents=True)
    (out / 'previous').mkdir()
    ours = ['ckpt.pt', 'best.pt', 'log.jsonl']
    theirs = ['notes.txt', 'previous/ckpt.pt', 'previous-1/ckpt.pt', 'previous-1/plan.md']
    for name in ours + theirs:
        (out / name).write_text(name)
    assert checkpoint.set_aside(str(out)) == str(out / 'previous-2')
    assert all((out / name).read_text() == name for name in theirs)
    assert all((out / 'previous-2' / name).read_text() == name for name in ours)
    assert checkpoint.set_aside(str(out)) is None


def test_a_second_run_in_one_folder_is_refused(book):
    run('train.py', *FAST, '--max_iters=5', cwd=book)
    before = (book / 'out' / 'ckpt.pt').read_bytes(), (book / 'out' / 'log.jsonl').read_bytes()
    with only_one(str(book / 'out' / 'lock')):
        for how in ('scratch', 'resume'):
            assert 'another run is at work in out' in refused(*FAST, f'--init_from={how}', cwd=book)
    assert before == (
        (book / 'out' / 'ckpt.pt').read_bytes(),
        (book / 'out' / 'log.jsonl').read_bytes(),
    )
    run('train.py', *FAST, '--init_from=resume', cwd=book)


def test_a_run_does_not_begin_from_a_file_that_it_would_move_away(book):
    run('train.py', *FAST, cwd=book)
    os.symlink(book / 'out', book / 'link')
    for source in (
        'out/best.pt',
        'out/ckpt.pt',
        'out',
        f'{book}/out/../out/best.pt',
        'link/best.pt',
    ):
        assert 'lies in out_dir' in refused(*FAST, f'--init_from={source}', cwd=book)
    assert sorted(os.listdir(book / 'out')) == ['best.pt', 'ckpt.pt', 'lock', 'log.jsonl', 'model.py']
    out, _ = run(
        'train.py', *FAST, '--init_from=out/best.pt', '--eval_only=True', cwd=book
    )  # reads it only
    assert 'val: loss' in out


def test_the_working_folder_may_be_the_out_dir(book):
    for how in ('scratch', 'auto'):
        run('train.py', *FAST, '--out_dir=.', f'--init_from={how}', '--max_iters=5', cwd=book)
    assert load(book, 'ckpt.pt')['iter_num'] == 5


# ---- Divergence ----------------------------------------------------------------------------------
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_run_that_diverges_stops_at_once_and_what_is_saved_stays_finite(book, dtype):
    run('train.py', *FAST, f'--dtype={dtype}', cwd=book)
    saved = (book / 'out' / 'ckpt.pt').read_bytes(), (book / 'out' / 'best.pt').read_bytes()
    huge = [
        '--learning_rate=9e18',
        '--decay_lr=False',
        '--grad_clip=0',
        '--max_iters=1000',
        '--log_interval=100',
    ]
    line = refused(*FAST, *huge, f'--dtype={dtype}', '--init_from=resume', cwd=book)
    step = int(re.search(r'diverged at step (\d+)', line)[1])
    assert 10 < step < 30 and 'learning rate 9.00e+18' in line and 'is not finite' in line
    assert 'out/ckpt.pt is intact' in line and '--init_from=resume' in line
    assert saved == (
        (book / 'out' / 'ckpt.pt').read_bytes(),
        (book / 'out' / 'best.pt').read_bytes(),
    )
    assert is_finite(load(book)) and is_finite(load(book, 'out/best.pt'))
    out, _ = run(
        'train.py', *FAST, f'--dtype={dtype}', '--init_from=resume', '--max_iters=12', cwd=book
    )
    assert 'done at step 12' in out


def test_a_run_that_diverges_before_its_first_checkpoint_says_so(book):
    line = refused(
        *FAST, '--learning_rate=9e18', '--warmup_iters=0', '--eval_interval=1000', cwd=book
    )
    assert 'nothing was saved yet' in line and not (book / 'out' / 'ckpt.pt').exists()


def test_the_first_tensor_that_is_not_finite_is_named(book):
    plant = '''
import torch
whole = torch.nn.utils.get_total_norm
def plant(gradients, *rest):
    gradients = list(gradients)
    plant.calls += 1
    if plant.calls == 8:
        gradients[3].view(-1)[5] = float("nan")
    return whole(gradients, *rest)
plant.calls = 0
torch.nn.utils.get_total_norm = plant
'''
    status, printed = python(plant, *FAST, cwd=book)
    assert status == 2 and 'diverged at step 7' in printed and 'Traceback' not in printed
    assert 'the gradient of transformer.h.0.attn.c_attn.weight is not finite' in printed
    assert load(book)['iter_num'] == 5 and is_finite(load(book))


def test_weights_that_are_not_finite_are_never_saved(book):
    """A weight that no norm and no evaluation has shown, when a signal asks for a checkpoint."""
    plant = '''
import signal, torch
from folio import optim
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
    assert status == 2 and 'the weight transformer.wpe.weight is not finite' in printed, printed
    assert load(book)['iter_num'] == 5 and is_finite(load(book))


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
        run(
            'train.py',
            *FAST,
            '--dtype=float32',
            f'--batch_size={size}',
            f'--gradient_accumulation_steps={count}',
            f'--out_dir=cut{size}',
            '--eval_interval=100',
            cwd=book,
        )
    expected = losses_and_norms(book, 'cut8')
    assert len(expected) == 10 and all(loss > 1.5 for loss, _ in expected)
    for size, _ in CUTS[1:]:
        np.testing.assert_allclose(
            losses_and_norms(book, f'cut{size}'), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
def test_masked_losses_of_two_processes_are_those_of_one(book):
    sparse_targets(book)
    fast = [*FAST, '--dtype=float32']
    run('train.py', *fast, '--batch_size=8', '--out_dir=one', cwd=book)
    process = start(
        *fast, '--batch_size=2', '--gradient_accumulation_steps=4', cwd=book, processes=2
    )
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    np.testing.assert_allclose(
        losses_and_norms(book, 'out'), losses_and_norms(book, 'one'), rtol=1e-5, atol=1e-5
    )


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
def test_no_flipped_bit_in_a_checkpoint_becomes_a_weight(tmp_path, model):
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(
        path, {'model': model.state_dict(), 'model_args': model.config.__dict__, 'iter_num': 7}
    )
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
        except UserError as e:
            assert 'damaged' in str(e) or 'refused' in str(e) or 'not a checkpoint' in str(e)
            n_refused += 1
    assert n_refused > 100


def test_a_damaged_checkpoint_is_not_resumed_and_not_overwritten(book):
    run('train.py', *FAST, cwd=book)
    damaged = bytearray((book / 'out' / 'ckpt.pt').read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (book / 'out' / 'ckpt.pt').write_bytes(damaged)
    assert 'out/ckpt.pt is damaged' in refused(*FAST, '--init_from=auto', cwd=book)
    assert (book / 'out' / 'ckpt.pt').read_bytes() == damaged


@pytest.mark.slow
def test_another_batch_size_on_resume_neither_repeats_nor_skips_windows(book):
    """A note is taken of each window that is asked for."""
    note = '''
from folio import data
plain = data.window_starts
def noted(n_tokens, block_size, seed, first, count):
    with open("windows.txt", "a") as f:
        f.writelines(f"{i}\\n" for i in range(first, first + count))
    return plain(n_tokens, block_size, seed, first, count)
data.window_starts = noted
'''
    options = [*FAST, '--eval_interval=100']
    for steps, size, count, how in ((3, 4, 2, 'scratch'), (5, 2, 3, 'resume'), (7, 5, 1, 'resume')):
        status, printed = python(
            note,
            *options,
            f'--max_iters={steps}',
            f'--batch_size={size}',
            f'--gradient_accumulation_steps={count}',
            f'--init_from={how}',
            cwd=book,
        )
        assert status == 0, printed
    n_windows = 3 * 8 + 2 * 6 + 2 * 5
    assert (book / 'windows.txt').read_text().split() == [str(i) for i in range(n_windows)]
    assert [e['tokens'] // 32 for e in log_of(book) if 'loss' in e] == [8, 16, 24, 30, 36, 41, 46]
    assert load(book)['windows'] == n_windows


def test_another_seed_or_other_data_are_refused(book):
    run('train.py', *FAST, cwd=book)
    before = (book / 'out' / 'ckpt.pt').read_bytes()
    assert 'was trained with --seed=1337' in refused(
        *FAST, '--seed=1', '--init_from=resume', cwd=book
    )
    train = book / 'data' / 'book' / 'train.bin'
    tokens = train.read_bytes()
    train.write_bytes(tokens[:-2] + tokens[:2])  # the same size, another end
    assert 'is not the one that out/ckpt.pt was trained on' in refused(
        *FAST, '--init_from=auto', cwd=book
    )
    train.write_bytes(tokens)
    make_mask(book, 'train', 1)
    assert 'is not the one that out/ckpt.pt was trained on' in refused(
        *FAST, '--init_from=auto', cwd=book
    )
    os.remove(book / 'data' / 'book' / 'train.mask.bin')
    assert (book / 'out' / 'ckpt.pt').read_bytes() == before
    run('train.py', *FAST, '--init_from=resume', '--max_iters=11', cwd=book)


def test_data_made_anew_during_a_run_are_not_those_that_it_is_of(book):
    """The run has the old file open; what lies there when it saves is another one."""
    replace = '''
from folio import data
plain = data.train_batch
def replaced(*args, **options):
    if not os.path.exists("replaced"):
        tokens = open("data/book/train.bin", "rb").read()
        with open("replaced", "wb") as f:
            f.write(tokens[:1000] + tokens[1000::-1] + tokens[2001:])
        os.replace("replaced", "data/book/train.bin")
        open("replaced", "w").close()
    return plain(*args, **options)
data.train_batch = replaced
'''
    status, printed = python(replace, *FAST, cwd=book)
    assert status == 0, printed
    assert 'is not the one that' in refused(*FAST, '--init_from=resume', '--max_iters=20', cwd=book)


def test_a_resume_with_more_steps_goes_on_as_if_they_had_been_meant(book):
    options = [*FAST, '--dropout=0.1']
    run('train.py', *options, '--max_iters=20', '--out_dir=alone', cwd=book)
    run('train.py', *options, '--max_iters=10', cwd=book)
    run('train.py', *options, '--max_iters=20', '--init_from=resume', cwd=book)
    assert_same_run(book)


def test_what_was_logged_after_a_checkpoint_is_dropped_with_its_evaluation_if_that_was_to_come(
    tmp_path,
):
    lines = [
        {'config': {}},
        {'iter': 4, 'val_loss': 3.0},
        {'iter': 4, 'hellaswag': 0.2},
        {'iter': 4, 'loss': 3.1},
        {'iter': 5, 'loss': 3.0},
    ]
    for is_validated, kept in ((True, lines[:3]), (False, [lines[0], lines[2]])):
        (tmp_path / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        checkpoint.truncate_log(str(tmp_path / 'log.jsonl'), 4, is_validated)
        assert checkpoint.read_log(str(tmp_path / 'log.jsonl')) == kept


# ---- Settings ------------------------------------------------------------------------------------
@pytest.mark.parametrize('value', ['nan', 'inf', '-inf', '1e20', '100000000000000000000'])
@pytest.mark.parametrize('setting', ['rate', 'steps'])
def test_numbers_that_are_none_are_refused_on_the_command_line_and_in_files(
    tmp_path, setting, value
):
    settings = {'rate': 0.5, 'steps': 3}
    with pytest.raises(UserError, match=setting):
        configure(dict(settings), [f'--{setting}={value}'])
    (tmp_path / 'config.py').write_text(f'{setting} = float("{value}")\n')
    with pytest.raises(UserError, match=setting):
        configure(dict(settings), [str(tmp_path / 'config.py')])


@pytest.mark.parametrize(
    'args',
    [
        ['--learning_rate=nan'],
        ['--weight_decay=nan'],
        ['--grad_clip=nan'],
        ['--learning_rate=inf'],
        ['--min_lr=-1'],
        ['--learning_rate=-1'],
        ['--muon_learning_rate=-1', '--optimizer=muon'],
        ['--weight_decay=-0.1'],
        ['--grad_clip=-1'],
        ['--seed=99999999999999999999'],
        ['--beta1=nan'],
        ['--dropout=nan'],
        ['--schedule=trapezoid', '--cooldown_iters=0'],
        ['--device=meta'],
    ],
    ids=' '.join,
)
def test_settings_that_would_train_nonsense_are_refused(book_once, args):
    name = args[-1] if 'trapezoid' in args[0] else args[0]
    assert name.removeprefix('--').partition('=')[0] in refused(
        *FAST, '--out_dir=none', *args, cwd=book_once
    )
    assert not (book_once / 'none').exists()


# ---- Signals -------------------------------------------------------------------------------------
def follow_advice(printed, cwd, *more):
    """Type the command that a stopped run has printed, with more settings; return its output."""
    command = shlex.split(re.search(r'go on with: (.*)', printed)[1])
    if command[0] == 'torchrun':
        command[:1] = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    elif command[0] == 'python':
        command[0] = sys.executable
    done = subprocess.run([*command, *more], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize('number', [
    signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_saves_and_prints_a_command_that_goes_on(book, number):
    process = start(
        *FAST, '--max_iters=100000', '--eval_interval=100000', '--init_from=auto', cwd=book
    )
    with ends_within(60, process):
        read_until(process, 'iter 3:')
        process.send_signal(number)
        printed = process.stdout.read()
    assert process.wait() == 128 + number and 'Traceback' not in printed
    step = load(book)['iter_num']
    out = follow_advice(printed, book, f'--max_iters={step + 2}')
    assert f'iter {step}:' in out and f'iter {step - 1}:' not in out


@pytest.mark.slow
def test_nohup_outlives_its_terminal(book):
    process = subprocess.Popen(
        ['nohup', sys.executable, str(ROOT / 'train.py'), *FAST, '--max_iters=100'],
        cwd=book,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with ends_within(60, process):
        read_until(process, 'iter 3:')
        process.send_signal(signal.SIGHUP)
        printed = process.stdout.read()
    assert process.wait() == 0 and 'done at step 100' in printed


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_prints_a_command_that_goes_on(book):
    """Steps are logged rarely: the signal is seen at the next one all the same."""
    process = start(
        *FAST,
        '--max_iters=100000',
        '--eval_interval=100000',
        '--gradient_accumulation_steps=2',
        '--log_interval=100',
        cwd=book,
        processes=2,
    )
    with ends_within(120, process):
        read_until(process, 'iter 100:')
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        printed = process.stdout.read()
    assert time.monotonic() - began < MOMENT and process.wait() != 0
    step = load(book)['iter_num']
    assert f'stopped at step {step}' in printed and 'torchrun --nproc_per_node=2' in printed
    out = follow_advice(printed, book, f'--max_iters={step + 2}')
    assert '2 processes' in out and f'done at step {step + 2}' in out


def stop_in_the_middle(folder, options, after, delay, processes=1):
    """Send SIGTERM to a run some time after a line; return how many seconds it took to end."""
    process = start(*options, cwd=folder, processes=processes)
    with ends_within(120, process):
        read_until(process, after)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        printed = process.stdout.read()
    seconds = time.monotonic() - began
    assert process.wait() != 0 and 'stopped at step 10, saved in out/ckpt.pt' in printed, printed
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_signal_in_an_evaluation_is_heard_and_the_resumed_run_is_the_same(tmp_path, processes):
    """The evaluation takes some seconds, for the split is long."""
    make_chars(tmp_path, letters(5000), letters(600000))
    options = [
        *TINY,
        '--dataset=chars',
        EACH_STEP,
        '--eval_interval=10',
        '--eval_iters=0',
        '--max_iters=15',
        '--gradient_accumulation_steps=2',
        '--dropout=0.1',
        '--init_from=auto',
    ]
    process = start(*options, '--out_dir=alone', cwd=tmp_path, processes=processes)
    assert 'done at step 15' in process.communicate(timeout=200)[0]
    assert (
        stop_in_the_middle(tmp_path, options, after='iter 9:', delay=0.5, processes=processes)
        < MOMENT
    )
    assert not any(entry['iter'] == 10 for entry in figures(tmp_path))  # it was in the middle of it
    process = start(*options, cwd=tmp_path, processes=processes)
    assert 'done at step 15' in process.communicate(timeout=200)[0]
    assert_same_run(tmp_path)


def make_items(folder, n):
    """Write n items like HellaSwag's, of letters, to items.jsonl."""
    with open(folder / 'items.jsonl', 'w') as f:
        for i in range(n):
            endings = [letters(15, seed=4 * i + k).strip() + 'x' for k in range(4)]
            f.write(
                json.dumps({'ctx': letters(15, seed=i) + 'x', 'endings': endings, 'label': i % 4})
                + '\n'
            )


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_signal_in_hellaswag_is_heard_and_the_resumed_run_is_the_same(tmp_path, processes):
    make_chars(tmp_path, letters(5000), letters(1000))
    make_items(tmp_path, 4000)
    options = [
        *TINY,
        '--dataset=chars',
        EACH_STEP,
        '--eval_interval=10',
        '--hellaswag_interval=10',
        '--max_iters=15',
        '--hellaswag_source=items.jsonl',
        '--gradient_accumulation_steps=2',
        '--init_from=auto',
    ]
    process = start(*options, '--out_dir=alone', cwd=tmp_path, processes=processes)
    printed = process.communicate(timeout=200)[0]
    assert 'done at step 15' in printed, printed
    assert (
        stop_in_the_middle(tmp_path, options, after='step 10:', delay=0.3, processes=processes)
        < MOMENT
    )
    assert ['val_loss' in e for e in figures(tmp_path) if e['iter'] == 10] == [
        True
    ]  # HellaSwag was not done
    process = start(*options, cwd=tmp_path, processes=processes)
    assert 'done at step 15' in process.communicate(timeout=200)[0]
    assert_same_run(tmp_path)


def test_an_evaluation_that_is_given_up_leaves_no_trace(tmp_path, model):
    make_chars(tmp_path, letters(1000), letters(1000))
    chars = data.Dataset(str(tmp_path / 'data' / 'chars'))
    calls = []
    model.train()
    result = data.evaluate(
        model,
        chars,
        'val',
        16,
        batch_size=2,
        n_windows=0,
        machine=Machine('cpu', 'float32'),
        should_stop=lambda: calls.append(1) or len(calls) > 2,
    )
    assert result is None and len(calls) == 3 and model.training


@pytest.mark.parametrize('what', ['hellaswag', 'sample'])
def test_a_checkpoint_is_saved_before_the_model_is_looked_at(tmp_path, what):
    """HellaSwag, or a sample, takes the process down at step 5."""
    make_chars(tmp_path, letters(5000), letters(1000))
    make_items(tmp_path, 4)
    plant = {
        'hellaswag': '''
import hellaswag
plain = hellaswag.score
calls = []
def crash(*args, **options):
    calls.append(1)
    return plain(*args, **options) if len(calls) == 1 else os._exit(9)
hellaswag.score = crash
''',
        'sample': '''
from folio import engine
engine.generate = lambda *args, **options: os._exit(9)
''',
    }[what]
    interval = '--hellaswag_interval=5' if what == 'hellaswag' else '--sample_interval=5'
    status, printed = python(
        plant, *FAST, '--dataset=chars', interval, '--hellaswag_source=items.jsonl', cwd=tmp_path
    )
    assert status == 9, printed
    assert load(tmp_path)['iter_num'] == 5


def test_what_samples_need_is_missed_before_the_first_step(tmp_path):
    """A nanoGPT folder without a description has GPT-2's tokens, which cannot be had here."""
    make_chars(tmp_path, letters(5000), letters(1000))
    os.remove(tmp_path / 'data' / 'chars' / 'meta.pkl')
    environment = os.environ | {
        'TIKTOKEN_CACHE_DIR': str(tmp_path / 'none'),
        'https_proxy': 'http://127.0.0.1:9',
        'HTTPS_PROXY': 'http://127.0.0.1:9',
    }
    line = refused(*FAST, '--dataset=chars', '--sample_interval=5', cwd=tmp_path, env=environment)
    assert 'tokenizer' in line and not (tmp_path / 'out').exists()


# ---- Bit for bit ---------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    'processes, options',
    [
        (3, []),
        (4, []),
        (2, ['--compile=True']),
    ],
    ids=['3', '4', '2-compile'],
)
def test_a_resume_of_several_processes_is_bitwise_identical(book, processes, options):
    options = [
        *FAST,
        *options,
        '--gradient_accumulation_steps=12',
        '--batch_size=1',
        '--dropout=0.1',
        '--init_from=auto',
    ]
    for args in (['--out_dir=alone'], ['--max_iters=5'], []):
        process = start(*options, *args, cwd=book, processes=processes)
        printed = process.communicate(timeout=280)[0]
        assert process.returncode == 0 and f'{processes} processes' in printed, printed
        if 'compile is off' in printed:
            pytest.skip('no compiler here, as train.py said')
    assert_same_run(book)


# ---- Machines and accidents ----------------------------------------------------------------------
@pytest.mark.slow
def test_a_locale_that_is_not_utf_8_and_a_path_of_other_letters_harm_nothing(book):
    """Samples hold what the terminal cannot show: they are printed as well as it goes."""
    folder = book / 'мой каталог 書'
    os.rename(book / 'data', book / 'moved')
    folder.mkdir()
    (folder / 'книга.txt').write_text('Жизнь и судьба, 書と人。\n' * 300, encoding='utf-8')
    environment = {
        k: v for k, v in os.environ.items() if k not in ('LANG', 'LC_CTYPE', 'PYTHONIOENCODING')
    }
    environment |= {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    run('prepare/book/prepare.py', '--book=книга.txt', cwd=folder)
    out, _ = run(
        'train.py', *FAST, '--sample_interval=5', '--out_dir=мой бег', cwd=folder, env=environment
    )
    assert 'done at step 10' in out and load(folder, 'мой бег/ckpt.pt')['iter_num'] == 10
    run(
        'sample.py',
        '--out_dir=мой бег',
        '--device=cpu',
        '--max_new_tokens=20',
        cwd=folder,
        env=environment,
    )


def test_a_split_that_vanishes_during_a_run_is_one_line_and_the_run_is_kept(book):
    plant = '''
from folio import data
plain = data.evaluate
calls = []
def vanish(*args, **options):
    calls.append(1)
    if len(calls) == 3:
        os.remove("data/book/val.bin")
    return plain(*args, **options)
data.evaluate = vanish
'''
    status, printed = python(plant, *FAST, cwd=book)
    assert status == 2 and 'val.bin is missing' in printed and 'Traceback' not in printed
    assert load(book)['iter_num'] == 5


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
    assert 'train.bin is missing, damaged or empty' in line and 'prepare' in line
