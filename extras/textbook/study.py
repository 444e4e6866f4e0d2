"""
Run the study of "Textbooks Are All You Need" (Gunasekar et al. 2023) in small.
    python extras/textbook/prepare.py
    python extras/textbook/study.py --allow_code_execution=True

Trains one model on raw code and one on the textbook, with as many tokens, fine-tunes each on the
exercises, lets all four solve the held-out problems, and prints one table. What was done before is
not done again: its results are in --out_dir.

`val loss` is measured on the solutions of validation exercises. After ± comes the standard error of
the mean over the seeds or, where it is larger, the mean of the standard errors over the problems.
README.md beside this file has the table, with the machine and the time it took.

Needs train.py, model.py, folio/, extras/humaneval.py, extras/confine.py and the recipes beside it.
"""
import hashlib
import json
import os
import statistics
import subprocess
import sys

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the root of the checkout
from extras import confine
from folio.configurator import UserError, configure
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
    'raw code, exercises': 'finetune_exercises.py',
    'textbook, exercises': 'finetune_exercises.py'}
PRETRAINED = {
    'raw code, exercises': 'raw code',
    'textbook, exercises': 'textbook'}


# ---- One model -----------------------------------------------------------------------------------
def run(script, *arguments):
    """Run one of our scripts and return its standard output; its errors go to the screen.

    If the script fails, exit with its status.
    """
    command = [sys.executable, os.path.join(ROOT, script), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return done.stdout


def folder_of(name, seed):
    """Return the folder of a run: out/textbook_study/raw_code_exercises_1, say."""
    name = name.replace(', ', '_').replace(' ', '_')
    return os.path.join(out_dir, f'{name}_{seed}')


def made_with():
    """Return what a result depends on: the settings, and a hash of the descriptions of the data.

    Raise UserError if the data is not there.
    """
    described = b''
    for name in ('raw', 'filtered', 'exercises'):
        try:
            with open(f'data/textbook_{name}/meta.json', 'rb') as f:
                described += f.read()
        except FileNotFoundError:
            raise UserError(f'data/textbook_{name} is not there; '
                            'python extras/textbook/prepare.py writes it') from None
    return {'problems': problems, 'num_samples': num_samples, 'temperature': temperature,
            'settings': settings, 'max_new_tokens': max_new_tokens,
            'data': hashlib.sha256(described).hexdigest()}


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
                  f'--max_new_tokens={max_new_tokens}',
                  '--batch_size=500')
    return json.loads(printed.splitlines()[-1])


def result_of(name, seed):
    """Return the metrics of a model, which is trained and scored first if it was not before.

    Raise UserError if it was, but with other settings or data.
    """
    folder = folder_of(name, seed)
    path = os.path.join(folder, 'result.json')
    if not os.path.exists(path):
        print(f'seed {seed}: {name}', file=sys.stderr)
        train(name, seed)
        result = score(name, seed) | {'made_with': made_with()}
        # Renamed when it is whole: a result that is there is never half a result
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(result, f)
        os.replace(path + '.tmp', path)
    with open(path, encoding='utf-8') as f:
        result = json.load(f)
    if result['made_with'] != made_with():
        raise UserError(f'{folder} was made with other settings or data; '
                        f'give another --out_dir, or remove {out_dir}')
    return result


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
    return val_losses(f'{name}, exercises', seed)[0]


def standard_error(values):
    """Return the standard error of the mean; 0 for a single value."""
    if len(values) == 1:
        return 0.0
    return statistics.stdev(values) / len(values)**0.5


def percentage(results, metric):
    """Return 'mean ± standard error %' of one of the metrics over the results of all seeds."""
    values = [result[metric] for result in results]
    over_seeds = standard_error(values)
    over_problems = statistics.fmean(result[f'{metric}_stderr'] for result in results)
    error = max(over_seeds, over_problems)
    return f'{100 * statistics.fmean(values):.1f} ± {100 * error:.1f} %'


def main():
    confine.permit(allow_code_execution)
    if seeds < 1 or num_samples < 10:
        raise UserError('seeds must be at least 1, and num_samples at least 10, for pass@10')
    all_seeds = range(1, seeds + 1)
    results = {name: [result_of(name, seed) for seed in all_seeds] for name in CONFIGS}
    print('| trained on | val loss | pass@1 | pass@10 |\n| --- | --- | --- | --- |')
    for name in CONFIGS:
        losses = [loss_on_exercises(name, seed) for seed in all_seeds]
        loss = f'{statistics.fmean(losses):.3f} ± {standard_error(losses):.3f}'
        pass_at_1 = percentage(results[name], 'pass@1')
        pass_at_10 = percentage(results[name], 'pass@10')
        print(f'| {name} | {loss} | {pass_at_1} | {pass_at_10} |')
    n_problems = results['textbook'][0]['n']
    print(f'{seeds} seeds, {n_problems} problems, '
          f'{num_samples} samples each at temperature {temperature}')


if __name__ == '__main__':
    configure(globals())
    main()
