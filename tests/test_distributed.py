import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch

from conftest import ROOT, TINY, run
import folio.checkpoint
from folio.optim import CPU_HAS_BF16

ACCUMULATED = ['--gradient_accumulation_steps=4', '--batch_size=2', '--log_interval=1', '--max_iters=12']
SINGLE = ['--gradient_accumulation_steps=2', '--batch_size=4', '--log_interval=1', '--max_iters=12']


def torchrun(*args, cwd, processes=2, **options):
    """Run train.py under torchrun, one thread a process; returns its standard output and error together."""
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone',
                           f'--nproc_per_node={processes}', str(ROOT / 'train.py'), *TINY, *args], cwd=cwd,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
                          env=os.environ | {'OMP_NUM_THREADS': '1'}, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses(folder):
    """[(step, loss or validation loss, gradient norm), ...] of a run's log."""
    entries = [json.loads(line) for line in (folder / 'out' / 'log.jsonl').read_text().splitlines()]
    return [(e['iter'], e.get('loss', e.get('val_loss')), e.get('grad_norm', 0.0)) for e in entries
            if 'loss' in e or 'val_loss' in e]


def tolerance(options):
    """Muon's products may be in bfloat16, where a last digit of the gradient can turn one of the update."""
    return 2e-4 if CPU_HAS_BF16 and '--optimizer=muon' in options else 1e-5


def assert_close(ours, theirs, tolerance=1e-5):
    assert [step for step, _, _ in ours] == [step for step, _, _ in theirs]
    for (step, *a), (_, *b) in zip(ours, theirs):
        assert a == pytest.approx(b, abs=tolerance), f'step {step}'


def weights(folder):
    return folio.checkpoint.load(str(folder / 'out' / 'ckpt.pt'))['model']


@pytest.fixture(scope='module')
def one_process(book_once, tmp_path_factory):
    """Of a run of one process, {options: losses}, each trained once."""
    known = {}

    def train(*options):
        if options not in known:
            folder = tmp_path_factory.mktemp('one')
            os.symlink(book_once / 'data', folder / 'data')
            run('train.py', *TINY, *options, cwd=folder)
            known[options] = losses(folder)
        return known[options]
    return train


@pytest.mark.parametrize('options', [
    SINGLE, ACCUMULATED, [*SINGLE, '--fsdp=True'], [*ACCUMULATED, '--fsdp=True', '--arch=modern', '--optimizer=muon'],
    [*ACCUMULATED, '--arch=modern', '--optimizer=muon'],
], ids=['ddp', 'ddp-accumulation', 'fsdp', 'fsdp-accumulation-muon', 'ddp-accumulation-muon'])
def test_two_processes_give_the_losses_of_one(book, one_process, options):
    expected = one_process(*[o for o in options if not o.startswith('--fsdp')])
    output = torchrun(*options, cwd=book)
    assert ('sharded' in output) == ('--fsdp=True' in options) and '2 processes' in output
    assert_close(losses(book), expected, tolerance(options))


def test_a_resume_may_change_the_number_of_processes_and_the_sharding(book, one_process):
    """Four steps sharded over two processes, four on one, four on two without sharding."""
    options = [*ACCUMULATED, '--eval_interval=4', '--arch=modern', '--optimizer=muon']
    torchrun(*options, '--fsdp=True', '--max_iters=4', cwd=book)
    run('train.py', *TINY, *options, '--init_from=resume', '--max_iters=8', cwd=book)
    torchrun(*options, '--init_from=auto', cwd=book)
    assert_close(losses(book), one_process(*options), tolerance(options))


def test_a_sharded_checkpoint_is_an_ordinary_one(book):
    item = {'ctx': 'the name of the', 'endings': ['object', 'class that is', 'zzz', 'qqqq'], 'label': 1}
    (book / 'items.jsonl').write_text(''.join(json.dumps(item | {'label': i % 4}) + '\n' for i in range(30)))
    torchrun(*SINGLE, '--fsdp=True', '--sample_interval=10', '--hellaswag_interval=12',
             '--hellaswag_source=items.jsonl', cwd=book)
    saved = folio.checkpoint.load(str(book / 'out' / 'ckpt.pt'))
    assert all(type(w) is torch.Tensor for w in saved['model'].values())
    entries = [json.loads(line) for line in (book / 'out' / 'log.jsonl').read_text().splitlines()]
    assert [e['iter'] for e in entries if 'sample' in e] == [10]
    assert [e['iter'] for e in entries if 'acc' in e] == [0, 12]
    out, _ = run('hellaswag.py', '--out_dir=out', '--source=items.jsonl', '--device=cpu', cwd=book)
    figures, logged = json.loads(out.splitlines()[-1]), [e for e in entries if 'acc' in e][-1]
    assert figures['acc_mean'] == logged['hellaswag'] and figures['acc'] == logged['acc'] and figures['n'] == 30
    text, _ = run('sample.py', '--out_dir=out', '--max_new_tokens=20', '--device=cpu', cwd=book)
    assert len(text.strip()) > 5


def test_a_killed_worker_is_restarted_and_the_run_ends_with_the_same_weights(book):
    options = [*ACCUMULATED, '--max_iters=60', '--dropout=0.1', '--init_from=auto']
    torchrun(*options, cwd=book)
    undisturbed = weights(book)
    os.rename(book / 'out', book / 'undisturbed')
    process = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                                '--max-restarts=3', str(ROOT / 'train.py'), *TINY, *options], cwd=book, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {'OMP_NUM_THREADS': '1'})
    alarm = threading.Timer(120, process.kill)
    alarm.start()
    killed, output = False, ''
    for line in process.stdout:
        output += line
        if re.match(r'iter 2\d:', line) and not killed:
            workers = subprocess.run(['ps', '--ppid', str(process.pid), '-o', 'pid='], capture_output=True, text=True)
            os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
            killed = True
    alarm.cancel()
    assert killed and process.wait() == 0, output
    starts = [json.loads(line) for line in (book / 'out' / 'log.jsonl').read_text().splitlines()]
    assert [e['first_iter'] for e in starts if 'config' in e][-1] >= 20  # it went on, and did not begin anew
    assert all(torch.equal(w, undisturbed[name]) for name, w in weights(book).items())


def test_float16_is_refused_where_parameters_are_sharded(book):
    _, error = run('train.py', *TINY, '--gradient_accumulation_steps=2', '--fsdp=True', '--dtype=float16', cwd=book,
                   status=2, env=os.environ | {'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0'})
    assert error.startswith('error: float16') and '--dtype=bfloat16' in error and error.count('\n') == 1
