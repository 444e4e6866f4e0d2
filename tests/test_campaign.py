"""
Kill training again and again, and compare what it ends with to an undisturbed run, to the last bit.
    python tests/test_campaign.py         # 50 kills of one process, 20 of one among three
    python tests/test_campaign.py --kills=5 --worker_kills=2

Every kill is a SIGKILL at a random moment, drawn from a fixed seed: in starting up, in a step, in
an evaluation, and each fourth one while a checkpoint is being written. The run goes on by
--init_from=auto; with three processes torchrun restarts it. Weights, optimizers and log are
compared: no step missing, none twice.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from folio import checkpoint  # noqa: E402

KILLS_IN_CI = 8
WORKER_KILLS_IN_CI = 3
# Steps of milliseconds and a checkpoint after each ten: thousands of moments at which it can hurt.
TRAINING = [
    '--dataset=book',
    '--device=cpu',
    '--n_layer=1',
    '--n_head=2',
    '--n_embd=64',
    '--block_size=32',
    '--batch_size=4',
    '--gradient_accumulation_steps=3',
    '--dropout=0.1',
    '--optimizer=muon',
    '--arch=modern',
    '--warmup_iters=10',
    '--eval_interval=10',
    '--eval_iters=2',
    '--log_interval=1',
    '--sample_interval=100',
    '--init_from=auto',
]


def steps_for(kills):
    """How many steps keep a run busy until it has been killed that often."""
    return 400 + 150 * kills


def make_data(folder):
    """Prepare data/book in a folder: 20,000 characters of Python's own reference."""
    from pydoc_data.topics import topics

    text = '\n\n'.join(topics[name] for name in sorted(topics))[:20000]
    (folder / 'book.txt').write_text(text, encoding='utf-8')
    subprocess.run(
        [sys.executable, str(ROOT / 'prepare/book/prepare.py'), '--book=book.txt'],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def command(n_processes, steps, restarts=0):
    launcher = [sys.executable]
    if n_processes > 1:
        launcher += [
            '-m',
            'torch.distributed.run',
            '--standalone',
            f'--nproc_per_node={n_processes}',
            f'--max-restarts={restarts}',
            '--monitor-interval=0.1',
        ]
    return [
        *launcher,
        str(ROOT / 'train.py'),
        *TRAINING,
        f'--max_iters={steps}',
        f'--lr_decay_iters={steps}',
    ]


def start(folder, out_dir, *args, **options):
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(
        [*command(*args, **options), f'--out_dir={out_dir}'],
        cwd=folder,
        env=environment,
        stdout=open(folder / 'printed.txt', 'a'),
        stderr=subprocess.STDOUT,
    )


def entries(path):
    return checkpoint.read_log(str(path), damaged=[])


def run_alone(folder, n_processes, steps):
    """An undisturbed run in folder/alone."""
    assert start(folder, 'alone', n_processes, steps).wait() == 0, (
        folder / 'printed.txt'
    ).read_text()[-3000:]


def wait_for_moment(rng, run, in_save):
    """Sleep until a random moment, or until a random moment in the writing of a checkpoint."""
    time.sleep(rng.uniform(0.2, 3.0))
    if in_save:
        temporary = run / rng.choice(['ckpt.pt.tmp', 'best.pt.tmp', 'ckpt.pt.tmp'])
        before = written(temporary)
        deadline = time.monotonic() + 5
        while written(temporary) in (before, 0) and time.monotonic() < deadline:
            time.sleep(0.0001)
        time.sleep(rng.uniform(0, 0.001))


def written(path):
    """When a file was written, in nanoseconds; 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def unfinished(run):
    """When the half-written checkpoints that a kill has left behind were written."""
    return [written(path) for path in run.glob('*.pt.tmp')]


def wait_for_log(process, run, began):
    """Wait until a process that began then has written to its log, or has ended."""
    while process.poll() is None and written(run / 'log.jsonl') <= began:
        time.sleep(0.01)


def kill_again_and_again(folder, kills, seed):
    """Train in folder/killed by one process, killed so often; return (kills, those in a save)."""
    rng = random.Random(seed)
    run = folder / 'killed'
    steps = steps_for(kills)
    done = 0
    in_saves = 0
    while True:
        began = time.time_ns()
        process = start(folder, 'killed', 1, steps)
        if done < kills:
            # The first step comes after seconds: some kills shall fall there, most later.
            in_save = done % 4 == 0
            if in_save or rng.random() < 0.85:
                wait_for_log(process, run, began)
            wait_for_moment(rng, run, in_save)
            if process.poll() is None:
                process.kill()
                process.wait()
                done += 1
                in_saves += any(moment > began for moment in unfinished(run))
                continue
        assert process.wait() == 0, (folder / 'printed.txt').read_text()[-3000:]
        return done, in_saves


def kill_workers(folder, kills, seed):
    """Train in folder/killed by three processes, one of which is killed so often.

    Return (kills, those in a save).
    """
    rng = random.Random(seed)
    run = folder / 'killed'
    process = start(folder, 'killed', 3, steps_for(kills), restarts=kills)
    began = time.time_ns()
    in_saves = 0
    for number in range(kills):
        wait_for_log(process, run, began)
        wait_for_moment(rng, run, in_save=number % 4 == 0)
        workers = subprocess.run(
            ['ps', '--ppid', str(process.pid), '-o', 'pid='], capture_output=True, text=True
        )
        workers = workers.stdout.split()
        assert len(workers) == 3, (folder / 'printed.txt').read_text()[-3000:]
        # In a save it is the first one, which writes, that is killed.
        victim = workers[0] if number % 4 == 0 else rng.choice(workers)
        os.kill(int(victim), signal.SIGKILL)
        time.sleep(1.0)  # until torchrun has ended the others, which may still write
        in_saves += any(moment > began for moment in unfinished(run))
        began = time.time_ns()
    assert process.wait() == 0, (folder / 'printed.txt').read_text()[-3000:]
    return kills, in_saves


# ---- What must be equal --------------------------------------------------------------------------
def figures(path):
    """What a log says, without headers and without what depends on the clock."""
    found = []
    for entry in entries(path):
        if 'iter' in entry:
            found.append(
                {k: v for k, v in entry.items() if k not in ('tokens_per_second', 'train_seconds')}
            )
    return found


def assert_same(ours, theirs, where):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f'{where}.{key}')
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs)):
            assert_same(*pair, f'{where}.{i}')
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_nothing_lost(folder, steps):
    """The log has each step once, and the checkpoints are the undisturbed run's, bit for bit."""
    assert figures(folder / 'killed' / 'log.jsonl') == figures(folder / 'alone' / 'log.jsonl')
    losses = [
        entry['iter'] for entry in figures(folder / 'killed' / 'log.jsonl') if 'loss' in entry
    ]
    assert losses == list(range(steps))
    for name in ('ckpt.pt', 'best.pt'):
        ours = checkpoint.load(str(folder / 'killed' / name))
        theirs = checkpoint.load(str(folder / 'alone' / name))
        for key in (
            'model',
            'optimizer',
            'scaler',
            'iter_num',
            'windows',
            'best_val_loss',
            'evals_without_gain',
        ):
            assert_same(ours[key], theirs[key], f'{name}: {key}')


def campaign(folder, kills, worker_kills, seed=15):
    """Both parts, in folder/one and folder/three; return {what: count}."""
    counted = {}
    for name, n_processes, n in (('one', 1, kills), ('three', 3, worker_kills)):
        if n == 0:
            continue
        part = folder / name
        part.mkdir()
        make_data(part)
        began = time.monotonic()
        run_alone(part, n_processes, steps_for(n))
        counted[f'{name}: seconds undisturbed'] = round(time.monotonic() - began)
        began = time.monotonic()
        kill = kill_again_and_again if n_processes == 1 else kill_workers
        done, in_saves = kill(part, n, seed)
        counted[f'{name}: kills'] = done
        counted[f'{name}: kills that left a half-written checkpoint'] = in_saves
        counted[f'{name}: seconds disturbed'] = round(time.monotonic() - began)
        assert_nothing_lost(part, steps_for(n))
        counted[f'{name}: steps'] = steps_for(n)
        resumes = [e['first_iter'] for e in entries(part / 'killed' / 'log.jsonl') if 'config' in e]
        counted[f'{name}: resumes that the log has kept'] = len(resumes) - 1
    return counted


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path):
    counted = campaign(tmp_path, KILLS_IN_CI, worker_kills=0)
    assert counted['one: kills'] == KILLS_IN_CI


@pytest.mark.slow
def test_a_run_of_three_processes_whose_workers_are_killed_ends_as_an_undisturbed_one(tmp_path):
    counted = campaign(tmp_path, kills=0, worker_kills=WORKER_KILLS_IN_CI)
    assert counted['three: kills'] == WORKER_KILLS_IN_CI


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0])
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--worker_kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        print(
            json.dumps(
                campaign(pathlib.Path(work), options.kills, options.worker_kills, options.seed),
                indent=2,
            )
        )
