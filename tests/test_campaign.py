"""
Stop training again and again, and compare what it ends with to a run that was left alone.
    python tests/test_campaign.py         # 50 kills, 20 kills of one among three, 20 other stops
    python tests/test_campaign.py --kills=5 --worker_kills=2 --stops=3

A kill is a SIGKILL at a random moment, drawn from a fixed seed: while the run starts up, in a step,
in an evaluation, and each fourth one while a checkpoint is being written. The other stops are, in
turn, a pipe that nobody reads any more (and SIGTERM some time later), a terminal that is closed,
and a disk that is full. Then --init_from=auto resumes; with three processes torchrun restarts them.
Weights, optimizers and log are compared, to the last bit: no step missing, none twice.
"""
import argparse
import json
import os
import pathlib
import pty
import random
import resource
import signal
import subprocess
import tempfile
import time

import pytest

from conftest import assert_same_run, command, log_of, make_book, steps_of

# Steps of milliseconds and a checkpoint after each ten: thousands of moments at which it can hurt.
TRAINING = [
    '--dataset=book', '--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=64',
    '--block_size=32', '--batch_size=4', '--gradient_accumulation_steps=3', '--dropout=0.1',
    '--optimizer=muon', '--arch=modern', '--warmup_iters=10', '--eval_interval=10',
    '--eval_iters=2', '--log_interval=1', '--sample_interval=100', '--init_from=auto']


class Campaign:
    """A run in folder/killed that is stopped `times` times, and one in folder/alone."""

    def __init__(self, folder, times, n_processes=1):
        self.folder = folder
        self.run = folder / 'killed'
        self.times = times
        self.steps = 400 + 150 * times  # keep it busy until the last stop
        self.n_processes = n_processes
        self.rng = random.Random(15)
        make_book(folder)

    def start(self, out_dir='killed', restarts=0, **options):
        args = [*TRAINING, f'--max_iters={self.steps}', f'--out_dir={out_dir}']
        if not options:
            printed = open(self.folder / 'printed.txt', 'a')
            options = {'stdout': printed, 'stderr': subprocess.STDOUT}
        return subprocess.Popen(
            command('train.py', *args, processes=self.n_processes, restarts=restarts),
            cwd=self.folder, env=os.environ | {'OMP_NUM_THREADS': '1'}, **options,
            # What nohup starts has SIGHUP ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))

    def wait_for_end(self, process):
        assert process.wait() == 0, (self.folder / 'printed.txt').read_text()[-3000:]

    def left_alone(self):
        self.wait_for_end(self.start('alone'))

    # ---- Moments ---------------------------------------------------------------------------------
    def wait_for_log(self, process, began):
        """Wait until a process that began then has written to its log, or has ended."""
        while process.poll() is None and written(self.run / 'log.jsonl') <= began:
            time.sleep(0.01)

    def wait_for_moment(self, in_save=False):
        """Sleep until a random moment, or until one in the writing of a checkpoint."""
        time.sleep(self.rng.uniform(0.2, 3.0))
        if in_save:
            temporary = self.run / self.rng.choice(['ckpt.pt.tmp', 'best.pt.tmp', 'ckpt.pt.tmp'])
            before = written(temporary)
            deadline = time.monotonic() + 5
            while written(temporary) in (before, 0) and time.monotonic() < deadline:
                time.sleep(0.0001)
            time.sleep(self.rng.uniform(0, 0.001))

    # ---- Stops -----------------------------------------------------------------------------------
    def kill(self):
        """Kill the run `times` times."""
        done = 0
        while True:
            began = time.time_ns()
            process = self.start()
            if done == self.times:
                return self.wait_for_end(process)
            # The first step comes after seconds: some kills shall fall there, most later.
            in_save = done % 4 == 0
            if in_save or self.rng.random() < 0.85:
                self.wait_for_log(process, began)
            self.wait_for_moment(in_save)
            assert process.poll() is None, 'the run has ended before its last kill'
            process.kill()
            process.wait()
            done += 1

    def kill_workers(self):
        """Kill one of several processes, `times` times."""
        process = self.start(restarts=self.times)
        began = time.time_ns()
        for number in range(self.times):
            self.wait_for_log(process, began)
            self.wait_for_moment(in_save=number % 4 == 0)
            workers = subprocess.run(['ps', '--ppid', str(process.pid), '-o', 'pid='],
                                     capture_output=True, text=True).stdout.split()
            assert len(workers) == self.n_processes
            # In a save it is the first one, which writes, that is killed.
            victim = workers[0] if number % 4 == 0 else self.rng.choice(workers)
            os.kill(int(victim), signal.SIGKILL)
            time.sleep(1.0)  # until torchrun has ended the others, which may still write
            began = time.time_ns()
        self.wait_for_end(process)

    def stop(self):
        """Stop the run `times` times, by a pipe, a terminal and a disk in turn."""
        for number in range(self.times):
            began = time.time_ns()
            ours, theirs = pty.openpty() if number % 3 == 1 else os.pipe()
            process = self.start(stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
            os.close(theirs)
            drain = subprocess.Popen(['cat'], stdin=ours, stdout=subprocess.DEVNULL)
            os.close(ours)
            self.wait_for_log(process, began)
            self.wait_for_moment()
            assert process.poll() is None, 'the run has ended before its last stop'
            if number % 3 == 2:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
                assert process.wait() == 2
            drain.kill()
            drain.wait()
            if number % 3 == 1:
                end(process, signal.SIGHUP)  # as the system does when a terminal is closed
            if number % 3 == 0:
                self.wait_for_moment()
                end(process, signal.SIGTERM)
        self.wait_for_end(self.start())

    # ---- What must be equal ----------------------------------------------------------------------
    def assert_nothing_lost(self):
        assert self.resumes() > 0
        assert steps_of(self.folder, 'killed') == steps_of(self.folder, 'alone')
        losses = [entry['iter'] for entry in log_of(self.folder, 'killed') if 'loss' in entry]
        assert losses == list(range(self.steps))
        for name in ('ckpt.pt', 'best.pt'):
            assert_same_run(self.folder, 'killed', 'alone', name)

    def resumes(self):
        """Return how many resumes the log has kept."""
        return sum('config' in entry for entry in log_of(self.folder, 'killed')) - 1


def end(process, number):
    """Send a signal, which saves, or ends the process at once if it comes before the first step."""
    process.send_signal(number)
    status = process.wait()
    assert status in (128 + number, -number), status


def written(path):
    """Return when a file was written, in nanoseconds; 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


# ---- The tests -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_left_alone(tmp_path):
    run = Campaign(tmp_path, times=8)
    run.left_alone()
    run.kill()
    run.assert_nothing_lost()


@pytest.mark.slow
def test_a_run_whose_workers_are_killed_ends_as_one_left_alone(tmp_path):
    run = Campaign(tmp_path, times=3, n_processes=3)
    run.left_alone()
    run.kill_workers()
    run.assert_nothing_lost()


@pytest.mark.slow
def test_a_run_survives_a_closed_pipe_and_a_full_log_bit_for_bit(tmp_path):
    run = Campaign(tmp_path, times=3)
    run.left_alone()
    run.stop()
    run.assert_nothing_lost()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0])
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--worker_kills', type=int, default=20)
    parser.add_argument('--stops', type=int, default=20)
    options = parser.parse_args()
    for what, times, n_processes in (('kill', options.kills, 1),
                                     ('kill_workers', options.worker_kills, 3),
                                     ('stop', options.stops, 1)):
        with tempfile.TemporaryDirectory() as folder:
            run = Campaign(pathlib.Path(folder), times, n_processes)
            run.left_alone()
            began = time.monotonic()
            getattr(run, what)()
            run.assert_nothing_lost()
            print(json.dumps({
                'what': what, 'times': times, 'steps': run.steps, 'resumes logged': run.resumes(),
                'seconds': round(time.monotonic() - began)}))
