"""train.py under torchrun: several processes, one run."""
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch

import folio.log
from conftest import ROOT, TINY, run
from folio import checkpoint
from folio.machine import CPU_HAS_BFLOAT16

SHORT = ['--dtype=float32', '--log_interval=1', '--max_iters=12', '--eval_interval=6']
SINGLE = ['--gradient_accumulation_steps=2', '--batch_size=4', *SHORT]
ACCUMULATED = ['--gradient_accumulation_steps=4', '--batch_size=2', *SHORT]
MUON = ['--arch=modern', '--optimizer=muon']


def torchrun_command(*args):
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
            *args]


def torchrun(*args, cwd, script=ROOT / 'train.py'):
    """Run a script in two processes; return its standard output and error together."""
    done = subprocess.run(torchrun_command(str(script), *TINY, *args), cwd=cwd, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, done.stdout
    return done.stdout


def planted(folder, code):
    """Write a script that runs train.py after some lines of Python, and return its path."""
    path = folder / 'planted.py'
    path.write_text(f'import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n'
                    f'import folio\nimport torch\n{code}\n'
                    f'runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")\n')
    return path


def log_of(folder):
    return folio.log.read(str(folder / 'out' / 'log.jsonl'))


def losses(folder):
    """Return [(step, loss or validation loss, gradient norm), …] of a run's log."""
    found = []
    for entry in log_of(folder):
        if 'val_loss' in entry:
            found.append((entry['iter'], entry['val_loss'], 0.0))
        elif 'loss' in entry:
            found.append((entry['iter'], entry['loss'], entry['grad_norm']))
    return found


def assert_close(ours, theirs, options):
    # Muon's products may be in bfloat16, where a last digit of the gradient can turn one of the
    # update.
    tolerance = 1e-5
    if CPU_HAS_BFLOAT16 and '--optimizer=muon' in options:
        tolerance = 2e-4
    assert [step for step, _, _ in ours] == [step for step, _, _ in theirs]
    for (step, *a), (_, *b) in zip(ours, theirs):
        assert a == pytest.approx(b, abs=tolerance), f'step {step}'


@pytest.fixture(scope='module')
def one_process(book_once, tmp_path_factory):
    """A function from options to the losses of one process, trained once for each."""
    known = {}

    def train(*options):
        if options not in known:
            folder = tmp_path_factory.mktemp('one')
            os.symlink(book_once / 'data', folder / 'data')
            run('train.py', *TINY, *options, cwd=folder)
            known[options] = losses(folder)
        return known[options]
    return train


# ---- Two give what one gives ---------------------------------------------------------------------
def test_two_processes_give_the_losses_of_one(book, one_process):
    options = [*ACCUMULATED, *MUON]
    output = torchrun(*options, cwd=book)
    assert '2 processes' in output
    assert_close(losses(book), one_process(*options), options)


@pytest.mark.slow
@pytest.mark.parametrize('options', [SINGLE, ACCUMULATED], ids=['single', 'accumulated'])
def test_two_processes_with_adamw_give_the_losses_of_one(book, one_process, options):
    torchrun(*options, cwd=book)
    assert_close(losses(book), one_process(*options), options)


@pytest.mark.slow
def test_two_processes_that_compute_activations_twice_give_the_losses_of_one(book, one_process):
    torchrun(*ACCUMULATED, '--activation_checkpointing=True', cwd=book)
    assert_close(losses(book), one_process(*ACCUMULATED), ACCUMULATED)


LITTLE_MEMORY = '''
from model import GPT
forward = GPT.forward
def forward_of_two(self, idx_BT, *args, **options):
    if os.environ['RANK'] == '1' and len(idx_BT) > 2:
        raise torch.OutOfMemoryError('CUDA out of memory')
    return forward(self, idx_BT, *args, **options)
GPT.forward = forward_of_two
'''


@pytest.mark.slow
def test_a_memory_that_is_too_small_in_one_process_ends_all_with_its_line(book):
    done = subprocess.run(torchrun_command(str(planted(book, LITTLE_MEMORY)), *TINY, *SINGLE),
                          cwd=book, text=True, capture_output=True, timeout=120)
    assert done.returncode != 0
    assert 'error: CUDA out of memory: halve --batch_size' in done.stderr


@pytest.mark.slow
def test_a_resume_may_change_the_number_of_processes(book, one_process):
    """Four steps on two processes, four on one, four on two again."""
    options = [*ACCUMULATED, *MUON, '--eval_interval=4', '--lr_decay_iters=12']
    torchrun(*options, '--max_iters=4', cwd=book)
    run('train.py', *TINY, *options, '--init_from=resume', '--max_iters=8', cwd=book)
    torchrun(*options, '--init_from=auto', cwd=book)
    assert_close(losses(book), one_process(*options), options)


# ---- Samples and scores --------------------------------------------------------------------------
HELLASWAG = {'ctx': 'the name of the', 'endings': ['object', 'class that is', 'zzz', 'qqqq']}


@pytest.fixture(scope='module')
def scored(book_once, tmp_path_factory):
    """The folder of a run of two processes with samples and HellaSwag."""
    folder = tmp_path_factory.mktemp('scored')
    os.symlink(book_once / 'data', folder / 'data')
    with open(folder / 'items.jsonl', 'w') as f:
        for i in range(30):
            f.write(json.dumps(HELLASWAG | {'label': i % 4}) + '\n')
    torchrun(*SINGLE, '--sample_interval=10', '--hellaswag_interval=12',
             '--hellaswag_source=items.jsonl', cwd=folder)
    return folder


def test_two_processes_draw_one_sample_and_score_once(scored):
    entries = log_of(scored)
    assert [entry['iter'] for entry in entries if 'sample' in entry] == [10, 12]
    assert [entry['iter'] for entry in entries if 'acc' in entry] == [0, 12]


def test_two_processes_log_the_scores_of_their_checkpoint(scored):
    out, _ = run('hellaswag.py', '--out_dir=out', '--source=items.jsonl', '--device=cpu',
                 cwd=scored)
    figures = json.loads(out.splitlines()[-1])
    logged = [entry for entry in log_of(scored) if 'acc' in entry][-1]
    assert figures['n'] == 30
    assert figures['acc'] == logged['acc']
    assert figures['acc_mean'] == logged['hellaswag']


# ---- A mistake -----------------------------------------------------------------------------------
@pytest.mark.parametrize('script, args, says', [
    ('train.py', ['--dtype=int8'], 'dtype is'),  # before the processes are connected
    ('train.py', ['--dataset=nope'], 'no data set in data/nope'),  # after
    pytest.param('hellaswag.py', ['--source=nope', '--device=cpu'], 'nope cannot be read',
                 marks=pytest.mark.slow),
], ids=['before', 'after', 'hellaswag'])
def test_a_mistake_is_one_line_that_is_seen_once(book_once, script, args, says):
    if script == 'train.py':
        args = [*TINY, *SINGLE, *args]
    done = subprocess.run(torchrun_command(str(ROOT / script), *args), cwd=book_once, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1, done.stderr
    assert says in lines[0]


# ---- A worker that dies --------------------------------------------------------------------------
@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_the_run_ends_with_the_same_weights(book):
    options = [*ACCUMULATED, '--max_iters=60', '--eval_interval=10', '--dropout=0.1',
               '--init_from=auto']
    torchrun(*options, cwd=book)
    undisturbed = checkpoint.load(str(book / 'out'))['model']
    os.rename(book / 'out', book / 'undisturbed')
    command = torchrun_command('--max-restarts=3', str(ROOT / 'train.py'), *TINY, *options)
    process = subprocess.Popen(command, cwd=book, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    alarm = threading.Timer(120, process.kill)
    alarm.start()
    killed = False
    output = ''
    for line in process.stdout:
        output += line
        if re.match(r'iter 2\d:', line) and not killed:
            workers = subprocess.run(['ps', '--ppid', str(process.pid), '-o', 'pid='],
                                     capture_output=True, text=True)
            os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
            killed = True
    alarm.cancel()
    assert killed
    assert process.wait() == 0, output
    headers = [entry for entry in log_of(book) if 'config' in entry]
    assert headers[-1]['first_iter'] >= 20  # it went on, and did not begin anew
    for name, weight in checkpoint.load(str(book / 'out'))['model'].items():
        assert torch.equal(weight, undisturbed[name]), name
