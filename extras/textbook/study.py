"""
Run the study of "Textbooks Are All You Need" (Gunasekar et al. 2023) in miniature.
    python extras/textbook/prepare.py
    python extras/textbook/study.py --allow_code_execution=True

Trains one model on raw code and one on the textbook, with as many tokens, fine-tunes each on the
exercises, lets all four solve the held-out problems, and prints one table. Models that are done are
not made again: their results are in --out_dir.

`val loss` is measured on the solutions of validation exercises. After ± comes the standard error of
the mean over the seeds or, if that is larger, the mean of the standard errors over the problems.
README.md next to this file has the table, with the machine and the time it took.

Needs train.py, model.py, folio/, extras/humaneval.py, extras/confine.py and the recipes next to it.
"""
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the root of the checkout
from extras import confine
from folio.configurator import UserError, configure
from folio.data import write_jsonl
from folio.log import read

# ---- Settings ------------------------------------------------------------------------------------
out_dir = 'out/textbook_study'  # holds a folder for each run
seeds = 3  # of each model
problems = 'builtin'  # or humaneval, or a file: see extras/humaneval.py
num_samples = 10  # for each problem
temperature = 0.2  # of the samples
max_new_tokens = 64  # of a solution
settings = ''  # more settings for each training run, such as '--device=cpu --max_iters=10'
allow_code_execution = False  # True allows code that a model wrote to run on this machine

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.abspath(HERE + '/../..')
# The four models: each one's recipe and, if it is fine-tuned, the model that it starts from. A
# model comes after the one that it needs.
CONFIGS = {
    'raw code': 'train_textbook_raw.py',
    'textbook': 'train_textbook.py',
    'raw code, then exercises': 'finetune_exercises.py',
    'textbook, then exercises': 'finetune_exercises.py'}
PRETRAINED = {
    'raw code, then exercises': 'raw code',
    'textbook, then exercises': 'textbook'}


# ---- One model -----------------------------------------------------------------------------------
def run(script, *arguments):
    """Run one of our scripts, show its lines on standard error, and return them.

    If the script fails, exit with its status.
    """
    command = [sys.executable, os.path.join(ROOT, script), *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end='', file=sys.stderr, flush=True)
            lines.append(line)
    if process.returncode != 0:
        sys.exit(process.returncode)
    return lines


def folder_of(name, seed):
    """Return the folder of a run: out/textbook_study/raw_code_then_exercises_1, say."""
    name = name.replace(', ', '_').replace(' ', '_')
    return os.path.join(out_dir, f'{name}_{seed}')


def made_with():
    """Return what a result depends on: the settings, and a hash of the recipes and of the data.

    The data is known by its meta.json files. Raise UserError if the data is not there.
    """
    files = hashlib.sha256()
    for name in ('raw', 'filtered', 'exercises'):
        try:
            with open(f'data/textbook_{name}/meta.json', 'rb') as f:
                files.update(f.read())
        except FileNotFoundError:
            raise UserError(f'data/textbook_{name} is not there; '
                            'python extras/textbook/prepare.py writes it') from None
    for recipe in CONFIGS.values():
        with open(os.path.join(HERE, recipe), 'rb') as f:
            files.update(f.read())
    return {'problems': problems, 'num_samples': num_samples, 'temperature': temperature,
            'settings': settings, 'max_new_tokens': max_new_tokens, 'files': files.hexdigest()}


def train(name, seed):
    """Train one of the models into its folder."""
    arguments = [os.path.join(HERE, CONFIGS[name]),
                 f'--out_dir={folder_of(name, seed)}',
                 f'--seed={seed}']
    if name in PRETRAINED:
        arguments.append(f'--init_from={folder_of(PRETRAINED[name], seed)}/ckpt.pt')
    # The user's settings come last, so that they win
    run('train.py', *arguments, *settings.split())


def score(name, seed):
    """Return the metrics of a trained model on the problems: see extras/humaneval.py."""
    printed = run('extras/humaneval.py',
                  f'--out_dir={folder_of(name, seed)}',
                  f'--problems={problems}',
                  '--allow_code_execution=True',
                  f'--num_samples={num_samples}',
                  '--strategy=sample',
                  f'--temperature={temperature}',
                  f'--seed={seed}',
                  f'--max_new_tokens={max_new_tokens}')
    return json.loads(printed[-1])


def make(name, seed, path):
    """Train and score a model, and write its metrics to a file, whole or not at all."""
    made = made_with()  # now: a recipe may be edited while a model trains
    train(name, seed)
    write_jsonl(path, [score(name, seed) | {'made_with': made}])


def all_results():
    """Return {name: metrics of each seed}, after making those that are missing.

    Raise UserError if the data is not there, or a result was made with other settings, recipes or
    data.
    """
    expected = made_with()
    results = {name: [] for name in CONFIGS}
    n_runs = len(CONFIGS) * seeds
    taken = []  # seconds of each run that was made now
    for number, (name, seed) in enumerate(itertools.product(CONFIGS, range(1, seeds + 1))):
        path = os.path.join(folder_of(name, seed), 'result.json')
        if not os.path.exists(path):
            progress = f'---- run {number + 1} of {n_runs}: {name}, seed {seed}'
            if taken:
                minutes = statistics.fmean(taken) * (n_runs - number) / 60
                progress += f'; about {minutes:.0f} min to go'
            print(progress, file=sys.stderr, flush=True)
            start = time.monotonic()
            make(name, seed, path)
            taken.append(time.monotonic() - start)
        with open(path, encoding='utf-8') as f:
            result = json.load(f)
        if result['made_with'] != expected:
            raise UserError(f'{path} was made with other settings, recipes or data; '
                            f'give another --out_dir, or remove {out_dir}')
        results[name].append(result)
    return results


# ---- The table -----------------------------------------------------------------------------------
def val_losses(name, seed):
    """Return the validation losses in the log of a run, oldest first."""
    log = read(os.path.join(folder_of(name, seed), 'log.jsonl'))
    return [entry['val_loss'] for entry in log if 'val_loss' in entry]


def loss_on_exercises(name, seed):
    """Return the validation loss of a model on the solutions of exercises."""
    if name in PRETRAINED:
        return val_losses(name, seed)[-1]
    # A pretrained model's own log has its loss on other data. But its fine-tuning begins with an
    # evaluation, before the first step.
    return val_losses(f'{name}, then exercises', seed)[0]


def standard_error(values):
    """Return the standard error of the mean of at least two values."""
    return statistics.stdev(values) / len(values)**0.5


def loss_cell(losses):
    """Return 'mean ± standard error' of the losses of all seeds; of a single one the loss alone."""
    if len(losses) == 1:
        return f'{losses[0]:.3f}'
    return f'{statistics.fmean(losses):.3f} ± {standard_error(losses):.3f}'


def percentage(results, metric):
    """Return 'mean ± standard error %' of one of the metrics over the results of all seeds."""
    values = [result[metric] for result in results]
    error = statistics.fmean(result[f'{metric}_stderr'] for result in results)  # over the problems
    if len(values) > 1:
        error = max(error, standard_error(values))
    return f'{100 * statistics.fmean(values):.1f} ± {100 * error:.1f} %'


def main():
    confine.permit(allow_code_execution)
    if seeds < 1 or num_samples < 10:
        raise UserError('seeds must be at least 1, and num_samples at least 10, for pass@10')
    results = all_results()
    print('| trained on | val loss | pass@1 | pass@10 |\n| --- | --- | --- | --- |')
    for name in CONFIGS:
        losses = [loss_on_exercises(name, seed) for seed in range(1, seeds + 1)]
        pass_at_1 = percentage(results[name], 'pass@1')
        pass_at_10 = percentage(results[name], 'pass@10')
        print(f'| {name} | {loss_cell(losses)} | {pass_at_1} | {pass_at_10} |')
    n_problems = results['textbook'][0]['n']
    print(f'seeds: {seeds}; {n_problems} problems, '
          f'{num_samples} samples of each at temperature {temperature}')


if __name__ == '__main__':
    configure(globals())
    main()
