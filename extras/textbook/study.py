"""
The study of "Textbooks Are All You Need" (Gunasekar et al. 2023) in small: four models, several seeds, one table.
    python prepare/textbook/prepare.py && python textbook.py --allow_code_execution=True

Trains one model on raw code and one on the textbook with as many tokens, fine-tunes each on the exercises, and lets all
four solve the held-out problems. What is done already is not done again: --out_dir says where it is kept. `val loss` is
that of the solutions of exercises for validation; ± is the standard error of the mean over the seeds or, where that is
larger, the mean of those over the problems. The README has the table, with the machine and the time it took.
"""
import hashlib
import json
import os
import statistics
import subprocess
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the root
from extras import confine
from folio.checkpoint import read_log
from folio.configurator import UserError, configure

# ---- Settings --------------------------------------------------------------------------------------------------------
out_dir = 'out/textbook_study'  # a folder in it for each run
seeds = 3  # of each model
problems = 'builtin'  # or humaneval, or a file: see humaneval.py
num_samples = 10  # for each problem
temperature = 0.2  # of the samples
max_new_tokens = 64  # of a solution
settings = ''  # for each training run as well, such as '--device=cpu --max_iters=10'
allow_code_execution = False  # True says that code which a model wrote may be run on this machine

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STAGES = {'raw code': ('train_textbook_raw.py', None), 'textbook': ('train_textbook.py', None),
          'raw code, exercises': ('finetune_exercises.py', 'raw code'),
          'textbook, exercises': ('finetune_exercises.py', 'textbook')}


# ---- One model -------------------------------------------------------------------------------------------------------
def run(script, *arguments):
    """Run a script of ours, whose errors go to the screen; returns its standard output."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def evaluations(folder):
    """The validation losses of a run, the first at step 0."""
    return [entry['val_loss'] for entry in read_log(os.path.join(folder, 'log.jsonl')) if 'val_loss' in entry]


def made_with():
    """What a result depends on: the settings, and a hash of what describes the data. UserError if there is none."""
    described = b''
    for name in ('raw', 'filtered', 'exercises'):
        try:
            with open(f'data/textbook_{name}/meta.json', 'rb') as f:
                described += f.read()
        except FileNotFoundError:
            raise UserError(f'data/textbook_{name} is not there: python prepare/textbook/prepare.py') from None
    return {'problems': problems, 'num_samples': num_samples, 'temperature': temperature, 'settings': settings,
            'max_new_tokens': max_new_tokens, 'data': hashlib.sha256(described).hexdigest()}


def result_of(name, seed):
    """The figures of one model, trained and scored if that has not been done yet. UserError if done otherwise."""
    folder = folder_of(name, seed)
    path, (config, start) = os.path.join(folder, 'result.json'), STAGES[name]
    if not os.path.exists(path):
        start = [f'--init_from={folder_of(start, seed)}/ckpt.pt'] if start else []
        print(f'seed {seed}: {name}', file=sys.stderr)
        run('train.py', os.path.join(ROOT, 'extras/textbook', config), f'--out_dir={folder}', f'--seed={seed}', *start,
            *settings.split())
        printed = run('extras/humaneval.py', f'--out_dir={folder}', f'--problems={problems}', '--allow_code_execution=True',
                      f'--num_samples={num_samples}', '--strategy=sample', f'--temperature={temperature}',
                      f'--seed={seed}', f'--max_new_tokens={max_new_tokens}', '--batch_size=500')
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(json.loads(printed.splitlines()[-1]) | {'made_with': made_with()}, f)
        os.replace(path + '.tmp', path)
    with open(path, encoding='utf-8') as f:
        result = json.load(f)
    if result['made_with'] != made_with():
        raise UserError(f'{folder} was made with other settings or data; give another --out_dir, or remove {out_dir}')
    return result


def folder_of(name, seed):
    return os.path.join(out_dir, f'{name.replace(", ", "_").replace(" ", "_")}_{seed}')


# ---- The table -------------------------------------------------------------------------------------------------------
def error_of(values):
    """The standard error of the mean."""
    return statistics.stdev(values) / len(values)**0.5 if len(values) > 1 else 0.0


def share(figures, key):
    """'mean ± standard error' of one of the figures over the seeds."""
    values = [f[key] for f in figures]
    error = max(error_of(values), statistics.fmean(f[f'{key}_stderr'] for f in figures))
    return f'{100 * statistics.fmean(values):.1f} ± {100 * error:.1f} %'


if __name__ == '__main__':
    configure(globals())
    confine.permit(allow_code_execution)
    if seeds < 1 or num_samples < 10:
        raise UserError('seeds is at least 1, num_samples at least 10, for pass@10')
    results = {name: [result_of(name, seed) for seed in range(1, seeds + 1)] for name in STAGES}
    print('| trained on | val loss | pass@1 | pass@10 |\n| --- | --- | --- | --- |')
    for name, figures in results.items():
        after = name if STAGES[name][1] else f'{name}, exercises'  # which begins with an evaluation of what it is given
        at = -1 if STAGES[name][1] else 0
        losses = [evaluations(folder_of(after, seed))[at] for seed in range(1, seeds + 1)]
        print(f'| {name} | {statistics.fmean(losses):.3f} ± {error_of(losses):.3f} | {share(figures, "pass@1")} | '
              f'{share(figures, "pass@10")} |')
    print(f'{seeds} seeds, {results["textbook"][0]["n"]} problems, {num_samples} samples each at temperature '
          f'{temperature}')
