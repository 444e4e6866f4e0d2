"""train.py under torchrun: several processes, one run."""
import json
import os

import pytest

from conftest import TINY, log_of, plant, run
from folio.machine import CPU_HAS_BFLOAT16

SHORT = ['--dtype=float32', '--log_interval=1', '--max_iters=12', '--eval_interval=6']
SINGLE = ['--gradient_accumulation_steps=2', '--batch_size=4', *SHORT]
ACCUMULATED = ['--gradient_accumulation_steps=4', '--batch_size=2', *SHORT]
MUON = ['--arch=modern', '--optimizer=muon']


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
ITEM = {'ctx': 'the name of the', 'endings': ['object', 'class that is', 'zzz', 'qqqq']}
LOOKS = ['--sample_interval=10', '--hellaswag_interval=12', '--hellaswag_source=items.jsonl']


@pytest.fixture(scope='module')
def two_processes(book_once, tmp_path_factory):
    """The folder of a run of two processes, which looks at samples and a score, and its output."""
    folder = tmp_path_factory.mktemp('two')
    os.symlink(book_once / 'data', folder / 'data')
    with open(folder / 'items.jsonl', 'w') as f:
        for i in range(30):
            f.write(json.dumps(ITEM | {'label': i % 4}) + '\n')
    out, _ = run('train.py', *TINY, *ACCUMULATED, *MUON, *LOOKS, cwd=folder, processes=2)
    return folder, out


def test_two_processes_give_the_losses_of_one(two_processes, one_process):
    folder, out = two_processes
    assert '2 processes' in out
    options = [*ACCUMULATED, *MUON]
    assert_close(losses(folder), one_process(*options), options)


def test_two_processes_draw_one_sample_and_score_once(two_processes):
    entries = log_of(two_processes[0])
    assert [entry['iter'] for entry in entries if 'sample' in entry] == [10, 12]
    assert [entry['iter'] for entry in entries if 'acc' in entry] == [0, 12]


def test_two_processes_log_the_scores_of_their_checkpoint(two_processes):
    folder, _ = two_processes
    out, _ = run('hellaswag.py', '--out_dir=out', '--source=items.jsonl', '--device=cpu',
                 '--dtype=float32', cwd=folder)
    figures = json.loads(out.splitlines()[-1])
    logged = [entry for entry in log_of(folder) if 'acc' in entry][-1]
    assert figures['n'] == 30
    assert figures['acc'] == logged['acc']
    assert figures['acc_mean'] == logged['hellaswag']


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    SINGLE, ACCUMULATED, [*ACCUMULATED, '--activation_checkpointing=True']],
    ids=['single', 'accumulated', 'activation checkpointing'])
def test_two_processes_with_adamw_give_the_losses_of_one(book, one_process, options):
    run('train.py', *TINY, *options, cwd=book, processes=2)
    assert_close(losses(book), one_process(*options), options)


@pytest.mark.slow
def test_a_resume_may_change_the_number_of_processes(book, one_process):
    """Four steps on two processes, four on one, four on two again."""
    options = [*ACCUMULATED, *MUON, '--eval_interval=4', '--lr_decay_iters=12']
    run('train.py', *TINY, *options, '--max_iters=4', cwd=book, processes=2)
    run('train.py', *TINY, *options, '--init_from=resume', '--max_iters=8', cwd=book)
    run('train.py', *TINY, *options, '--init_from=auto', cwd=book, processes=2)
    assert_close(losses(book), one_process(*options), options)


# ---- A mistake -----------------------------------------------------------------------------------
@pytest.mark.parametrize('script, args, says', [
    ('train.py', [*TINY, *SINGLE, '--dataset=nope'], 'no data set in data/nope'),
    # Before the processes are connected
    pytest.param('train.py', [*TINY, *SINGLE, '--dtype=int8'], 'dtype is', marks=pytest.mark.slow),
    pytest.param('hellaswag.py', ['--source=nope', '--device=cpu'], 'nope cannot be read',
                 marks=pytest.mark.slow),
], ids=['after', 'before', 'hellaswag'])
def test_a_mistake_is_one_line_that_is_seen_once(book_once, script, args, says):
    _, err = run(script, *args, cwd=book_once, status=1, processes=2)  # torchrun's status
    lines = [line for line in err.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1, err
    assert says in lines[0]


@pytest.mark.slow
def test_too_little_memory_in_one_process_ends_all_with_its_line(book):
    config = plant(book, when='os.environ["RANK"] == "1"',
                   accident='raise torch.OutOfMemoryError("CUDA out of memory")')
    _, err = run('train.py', config, *TINY, *SINGLE, cwd=book, status=1, processes=2)
    assert 'error: CUDA out of memory: train.py takes less with half' in err
