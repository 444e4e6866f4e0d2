"""
Keep the folder of a run: its lock, its log, and the run that was there before.
    python -c "from folio.log import read; print(read('out/book/log.jsonl')[-1])"

log.jsonl has a JSON object on each line. The first line of each start has the settings, the machine
and the code that ran. A line with `loss` is a training step, with `val_loss` an evaluation, with
`hellaswag` a score, with `sample` a text; all of these have `iter`, the number of steps before it.
"""
import filecmp
import glob
import json
import os
import shutil

import filelock

from folio.configurator import UserError, notice

FILES = ('ckpt.pt', 'best.pt', 'log.jsonl', 'model.py', 'model_until_*.py')  # of a run


class Log:
    """The folder of a run, held by one process. A line that cannot be written ends no run."""

    def __init__(self, out_dir, code, resume_at=None, wandb_run=None):
        """Take over a folder. Raises UserError if it cannot be written, or another run has it.

        code: the file that defines the model; the folder gets a copy of it, model.py.
        resume_at: the step at which the run continues: lines from there on are dropped, and will be
        written again. None: a new run; the files of an old one move to a subfolder previous-1.
        wandb_run: what wandb.init returned; every line with `iter` goes there as well.
        """
        self.wandb_run = wandb_run
        self.has_failed = False
        if os.path.realpath(out_dir) == os.path.dirname(os.path.realpath(code)):
            raise UserError(f'out_dir is the folder of {code}, and a run writes a model.py there: '
                            'give another --out_dir')
        path = os.path.join(out_dir, 'log.jsonl')
        try:
            os.makedirs(out_dir, exist_ok=True)
            self.lock = only_one(os.path.join(out_dir, 'lock'))  # until this process ends
            self.previous = None  # where an old run is now
            if resume_at is None:
                self.previous = set_aside(out_dir)
            elif os.path.exists(path):
                cut(path, resume_at)
            keep_code(code, os.path.join(out_dir, 'model.py'), resume_at)
            self.file = open(path, 'ab', buffering=0)
        except OSError as e:
            raise UserError(f'{out_dir} cannot be written ({e.strerror}): make room there, or give '
                            'another --out_dir') from None

    def write(self, **entry):
        """Add a line. If that fails, the run continues without it."""
        line = json.dumps(entry).encode() + b'\n'
        try:
            end = self.file.seek(0, os.SEEK_END)
            if self.file.write(line) < len(line):
                self.file.truncate(end)
                raise OSError('no room for a line')
        except OSError as e:
            if not self.has_failed:
                notice(f'{self.file.name} cannot be written ({e}); the run continues without it')
            self.has_failed = True
        if self.wandb_run is not None and 'iter' in entry:
            try:
                self.wandb_run.log(entry, step=entry['iter'])
            except Exception as e:  # whatever it is, it has nothing to do with the model
                notice(f'Weights & Biases: {type(e).__name__}: {e}; the run continues without it')
                self.wandb_run = None


class NoLog:
    """The log of every process but the first one, which writes for all."""

    def write(self, **entry):
        pass


def start_wandb(project, name, config):
    """Return a run of Weights & Biases. Raises UserError if that fails."""
    try:
        import wandb
        return wandb.init(project=project, name=name, config=config)
    except Exception as e:  # no package, no key, or a folder called wandb
        raise UserError(f'wandb_log does not work here ({type(e).__name__}: {e}): pip install '
                        'wandb, then wandb login or WANDB_MODE=offline') from None


def only_one(path):
    """Return a held lock on a file. Raises UserError if another process holds it.

    The lock ends with its process, even if that is killed.
    """
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f'another run is at work in {os.path.dirname(path)}; '
                        'wait until it is done') from None
    return lock


def set_aside(out_dir):
    """Move the files of the run in a folder into a subfolder previous-1, or the next number.

    Return the folder they are in now, or None if there was no run. Runs in subfolders stay.
    """
    found = []
    for pattern in FILES:
        found += glob.glob(pattern, root_dir=out_dir)
    if not {'ckpt.pt', 'best.pt', 'log.jsonl'} & set(found):
        return None  # at most a copy of some code
    number = 1
    while os.path.exists(os.path.join(out_dir, f'previous-{number}')):
        number += 1
    previous = os.path.join(out_dir, f'previous-{number}')
    os.makedirs(previous)
    for name in found:
        os.replace(os.path.join(out_dir, name), os.path.join(previous, name))
    return previous


def keep_code(code, path, resume_at):
    """Copy the code of the model; if a run continues with other code, keep its old copy too."""
    continues = resume_at is not None and os.path.exists(path)
    if continues and not filecmp.cmp(code, path, shallow=False):
        os.replace(path, path.replace('.py', f'_until_{resume_at}.py'))
    shutil.copyfile(code, path)


def cut(path, iter_num):
    """Drop the entries of a log from a step on."""
    kept = [entry for entry in read(path) if entry.get('iter', -1) < iter_num]
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(entry) + '\n' for entry in kept)
    os.replace(path + '.tmp', path)


def read(path):
    """Return the entries of a log, without a last line that a kill has cut short."""
    if not os.path.exists(path):
        return []
    entries = []
    with open(path, encoding='utf-8') as f:
        for number, line in enumerate(f, 1):
            if not line.endswith('\n'):
                break
            try:
                entries.append(json.loads(line))
            except ValueError:
                raise UserError(f'{path}, line {number} is damaged; remove that line') from None
    return entries
