"""
Runs as one page: their curves, figures and texts, and what n-grams make of the same data.
    python report.py out/book
    python report.py out/book out/mine --to=out/comparison --temperatures='0.5 1.0'

Reads log.jsonl and best.pt (or ckpt.pt) of each run, and data/ where it is still there; writes report.md and pictures.
A run that is going on, was cut short or never saved anything is reported as far as it goes. Four small runs took 55 s
on two cores of an AMD EPYC (torch 2.13, 2026-11-21).
"""
import glob
import html
import math
import os
import re
import sys
import types

import numpy as np
import torch

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the root
from extras import ngrams
from extras import plots
import folio.tokenizer
import folio.checkpoint
from folio import engine
from folio import fast
from folio.checkpoint import read_log
from folio.configurator import UserError, configure
from folio.data import Dataset, tokenizer_of
from folio.evaluation import evaluate
from folio.machine import Machine, default_device
from model import GPT

# ---- Settings --------------------------------------------------------------------------------------------------------
to = 'out/report'  # the folder to write
prompts = 'The|If|It is'  # what the texts begin with, | between two; the same for every run
temperatures = '0.6 0.8 1.0 1.2'  # of the strategies that draw
num_samples = 4  # texts a prompt, for each strategy and temperature; 0 leaves the texts out
max_new_tokens = 200  # tokens a text, and at most what the context holds
ngram_order = 6  # tokens of the longest n-gram; 0 leaves them out
ngram_tokens = 5_000_000  # training tokens to count them in, from the first on
seed = 1337  # of the texts
device = default_device()  # cpu, cuda, cuda:1, mps …
GPT2_LOSS = 3.2924  # of OpenAI's 124 M on FineWeb-Edu's validation split, in build-nanogpt's plot
HELLASWAG = {'guessing': 0.25, 'GPT-2 124 M': 0.2945, 'GPT-3 124 M': 0.337}  # in it too
STRATEGIES = {'greedy': 'greedy', 'top_k': 'top-k 50', 'nucleus': 'nucleus 0.9', 'sample': 'plain sampling'}
MEASURES = ('log-prob', 'distinct-1', 'distinct-2', 'distinct-3', 'repeated-4', 'self-BLEU')


# ---- Runs ------------------------------------------------------------------------------------------------------------
def read_run(folder):
    """A run as its log has it: its settings, the lines of each kind, and notes on what is missing."""
    path = os.path.join(folder, 'log.jsonl')
    if not os.path.isfile(path):
        there = ', '.join(os.path.dirname(p) for p in sorted(glob.glob('out/*/log.jsonl')))
        raise UserError(f'no run in {folder} (no log.jsonl); ' + (f'there are {there}' if there else
                                                                 'train one: python train.py config/train_book.py'))
    damaged = []
    entries = read_log(path, damaged)
    headers = [e for e in entries if 'config' in e]
    if not headers:
        raise UserError(f'{path} does not begin with the settings of a run (yet); wait until it does, or leave it out')
    run = types.SimpleNamespace(**headers[-1], folder=folder, name=os.path.basename(folder))
    run.notes, run.test, run.data, run.spec, run.masked = [], {}, None, None, False
    if damaged:
        run.notes.append(f'left out as damaged: line {", ".join(map(str, damaged))} of its log')
    run.steps, run.evals, run.swags = ([e for e in entries if key in e] for key in ('loss', 'val_loss', 'hellaswag'))
    run.best = min(run.evals, key=lambda e: math.inf if math.isnan(e['val_loss']) else e['val_loss'], default={})
    run.n_windows = run.config['eval_iters'] * run.config['batch_size']  # of an evaluation, 0: all of the split
    iter_num = max([e['iter'] + ('loss' in e) for e in entries if 'iter' in e], default=0)
    if iter_num < run.config['max_iters']:
        run.notes.append(f'its log ends at step {iter_num} of {run.config["max_iters"]}')
    if run.best and run.best is not run.evals[-1]:
        run.notes.append(f'the last evaluation, at step {run.evals[-1]["iter"]}, gave {run.evals[-1]["val_loss"]:.4f}')
    return run


def open_files(run):
    """The run's checkpoint, or None; run.data and run.spec become its data set and tokenizer; run.notes say why not."""
    checkpoint = None
    for name in (name for name in ('best.pt', 'ckpt.pt') if os.path.exists(os.path.join(run.folder, name))):
        try:
            checkpoint = folio.checkpoint.load(os.path.join(run.folder, name))
            run.saved = f'{name}, of step {checkpoint["iter_num"]}'
            break
        except UserError as e:
            run.notes.append(str(e))
    run.notes.append(f'its model is {run.saved}' if checkpoint else 'no checkpoint, so no test and no texts')
    run.spec = checkpoint.get('tokenizer') if checkpoint else None
    try:
        data = Dataset(run.config['dataset'])
        run.spec = run.spec or data.spec
        if folio.tokenizer.spec_hash(run.spec) != folio.tokenizer.spec_hash(data.spec):
            raise UserError(f'{data.folder} has another vocabulary by now')
        run.data = data
        run.masked = data.mask('val') is not None
        run.notes += ['its loss is of the answers alone, as its data have masks'] * run.masked
        run.notes += [f'no test: {data.folder} has no such split'] * ('test' not in data.splits())
    except UserError as e:
        run.notes.append(f'no test and no n-grams: {e}')
    return checkpoint


def is_fineweb_edu(run):
    """In GPT-2's tokens, as prepare/fineweb writes it; where the data is not here any more, going by its name."""
    if run.spec and run.spec['kind'] != 'gpt2':
        return False
    if run.data:
        return bool(re.search('fineweb-?edu', str(run.data.meta.get('source'))))
    return os.path.basename(run.config['dataset']).startswith('fineweb')


# ---- Texts -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def write_texts(model, tokenizer, machine, strategy, temperature):
    """(texts, figures): a list of num_samples texts for each prompt, drawn as one batch, and what is measured."""
    size, ends = model.config.block_size, {tokenizer.eot} - {None}
    starts = [(tokenizer.encode(prompt) or [tokenizer.start])[-(size // 2 or 1):] for prompt in prompts.split('|')]
    rows = [start for start in starts for _ in range(num_samples)]
    count = min(max_new_tokens, size + 1 - max(map(len, rows)))  # so that one context holds it: see the loss below
    idx_BT = torch.zeros(len(rows), max(map(len, rows)) + count, dtype=torch.long)
    targets_BT, texts = torch.full_like(idx_BT, -1), []
    with machine.autocast:
        steps = list(engine.generate(model, rows, count, strategy=strategy, temperature=temperature, top_k=50,
                                     top_p=0.9, seed=seed, stop=ends))
        for b, (start, new) in enumerate(zip(rows, torch.stack(steps, dim=1).tolist())):
            new = new[:new.index(tokenizer.eot) + 1] if tokenizer.eot in new else new
            idx_BT[b, :len(start + new)] = torch.tensor(start + new)
            targets_BT[b, len(start):len(start + new)] = torch.tensor(new)
            texts.append(tokenizer.decode([t for t in new if t not in ends]))
        _, loss = model(idx_BT[:, :-1].to(machine.device), targets_BT[:, 1:].to(machine.device))
    groups = [texts[i:i + num_samples] for i in range(0, len(texts), num_samples)]
    return groups, {'log-prob': -loss.item()} | ngrams.measure(groups)


# ---- The page --------------------------------------------------------------------------------------------------------
def table(head, rows):
    """In Markdown; all cells are text."""
    rows = [[cell.replace('|', '\\|') for cell in row] for row in (head, ['---'] * len(head), *rows)]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def cells(figures, **formats):
    """The figures that there are, as text: {key: format}; a dash for the others."""
    return [format(v, spec) if (v := figures.get(key, math.nan)) == v else '–' for key, spec in formats.items()]


def per_word(figures):
    return f' ({figures["word_perplexity"]:,.4f} a word)' if 'word_perplexity' in figures else ''


LOSS = dict(val_loss='.4f', perplexity=',.4f', bits_per_byte='.4f')


def row_of(run):
    """A run's line in the table."""
    last = max(run.steps + run.evals, key=lambda e: e['tokens'], default={})
    speed = {'median': np.median([e['tokens_per_second'] for e in run.steps])} if run.steps else {}
    swag = ' ± '.join(cells(run.swags[-1], hellaswag='.4f', acc_mean_stderr='.4f')) if run.swags else '–'
    loss, perplexity, bits = cells(run.best, **LOSS)
    return [run.name, f'{run.parameters / 1e6:,.2f} M', *cells(last, tokens=',', train_seconds=',.0f'),
            *cells(speed, median=',.0f'), loss, *cells(run.best, iter=','), perplexity + per_word(run.best), bits,
            cells(run.test, perplexity=',.4f')[0] + per_word(run.test), swag]


def dataset_section(picture, name, runs):
    """Of runs evaluated on the same tokens: their curves, and n-grams beside them."""
    models, levels, counted = [(run.name, run.best) for run in runs], {}, 'There are no n-grams beside them.'
    if any(is_fineweb_edu(run) for run in runs):
        levels['GPT-2 124 M'] = GPT2_LOSS
    try:
        for data in [run.data for run in runs if run.data and run.best and ngram_order][:1]:
            n_val = runs[0].n_windows * runs[0].config['block_size']
            losses = ngrams.losses(data, ngram_order, ngram_tokens, n_val)
            levels[f'{losses.argmin() + 1}-gram'] = losses.min()
            total = len(data.tokens('train'))
            counted = f'N-grams were counted in {min(ngram_tokens, total):,} of {total:,} training tokens.'
            bits = 1 / math.log(2) / (data.per_token('val', 'bytes') or math.nan)
            models = [(f'{n}-gram', {'val_loss': loss, 'perplexity': math.exp(loss), 'bits_per_byte': loss * bits})
                      for n, loss in enumerate(losses, 1)] + models
    except UserError as e:  # its tokens are damaged
        runs[0].notes.append(f'no n-grams: {e}')
    plots.draw_losses(os.path.join(to, picture), name, runs, levels)
    head = ['model', 'val loss', 'perplexity', 'bits per byte']
    rows = [[model, *cells(figures, **LOSS)] for model, figures in models]
    return [f'### {name}', f'![losses on {name}]({picture})', counted, table(head, rows)]


def text_section(picture, run, model, tokenizer, machine, levels):
    """A run's texts: a table and a picture of their measures, and the first text of each kind."""
    settings = [('greedy', 0.0)] + [(s, t) for s in ('top_k', 'nucleus', 'sample') for t in levels]
    made = {setting: write_texts(model, tokenizer, machine, *setting) for setting in settings}
    labels = {(s, t): STRATEGIES[s] + (f', temperature {t:g}' if s != 'greedy' else '') for s, t in settings}
    rows = [[labels[setting], *(f'{figures[m]:.3f}' for m in MEASURES)] for setting, (_, figures) in made.items()]
    parts = [f'### {run.name}: {run.saved}', table(['strategy', *MEASURES], rows),
             f'![measures of the texts of {run.name}]({picture})']
    plots.draw_texts(os.path.join(to, picture), run, {s: figures for s, (_, figures) in made.items()}, STRATEGIES)
    for i, prompt in enumerate(prompts.split('|')):
        parts.append(f'<details><summary>After “{html.escape(prompt)}”</summary>')
        for setting, (groups, _) in made.items():
            text = prompt + groups[i][0]
            fence = '~' * (3 + max(map(len, re.findall('~+', text)), default=0))  # longer than any in the text
            parts += [labels[setting] + ':', f'{fence}text\n{text}\n{fence}']
        parts.append('</details>')
    return parts


COLUMNS = ('run', 'parameters', 'tokens', 'seconds', 'tokens/s', 'val loss', 'at step', 'perplexity', 'bits per byte',
           'test perplexity', 'HellaSwag')
ABOUT_RUNS = """Tokens and seconds are of training, to where the log ends; tokens/s is the median of its lines. Loss,
in nats a token, perplexity and bits per byte are the best evaluation's. Test perplexity is what `python train.py …
--init_from=FOLDER/best.pt --eval_only=True` prints. Across tokenizers only bits per byte can be compared."""
ABOUT_LOSS = """An n-gram predicts the same validation tokens from the n - 1 before each, as counted in the training
split: interpolated absolute discounting (Ney, Essen and Kneser 1994), whose probabilities sum to one."""
ABOUT_HELLASWAG = """The share of items of which the right ending has the lowest mean loss a token, as train.py logs it.
The lines of GPT-2 and GPT-3 are those that build-nanogpt draws."""
ABOUT_TEXTS = """{0} texts for each of {1} prompts, of at most {2} tokens and what the context holds; below, the first
of each. log-prob is the model's own for a token, at temperature 1: text much likelier than real text is dull, much
less likely is broken. Of the words of all texts, distinct-n is the share of different n-grams (Li et al. 2016);
repeated-4 the share of 4-grams that stood in the same text before (Welleck et al. 2020); self-BLEU compares the texts
of one prompt (Zhu et al. 2018). Greedy writes the same text {0} times, so its distinct-n is at most 1/{0}. All depends
on the length: compare within a run, not across tokenizers."""


# ---- The script ------------------------------------------------------------------------------------------------------
def main():
    """What the command does; a function, so that tests can call it."""
    folders = [a for a in sys.argv[1:] if not a.startswith('-') and not a.endswith('.py')]
    configure(globals(), [a for a in sys.argv[1:] if a not in folders])
    plots.pyplot()  # or say how to install it
    try:
        levels = sorted({float(t) for t in temperatures.split()})
    except ValueError:
        levels = []
    if not levels or not 0 < levels[0] <= levels[-1] < math.inf:
        raise UserError(f"temperatures is {temperatures!r}; give numbers above 0, as in --temperatures='0.6 1.0'")
    if num_samples < 0 or num_samples == 1 or max_new_tokens < 1 or ngram_order < 0 or ngram_tokens < 1:
        raise UserError(f'num_samples ({num_samples}) must be 0 or at least 2, max_new_tokens ({max_new_tokens}) and '
                        f'ngram_tokens ({ngram_tokens}) at least 1, ngram_order ({ngram_order}) at least 0')
    Machine(device, 'auto')  # refuses one that is not there
    if not folders:
        raise UserError('which runs? Name their folders: python report.py out/book [out/other …]')
    runs = [read_run(folder) for folder in dict.fromkeys(map(os.path.normpath, folders))]
    names = [run.name for run in runs]
    try:
        os.makedirs(to, exist_ok=True)
    except OSError as e:
        raise UserError(f'{to} cannot be written ({e.strerror}); give another --to=folder') from None
    groups, texts = {}, []
    for i, run in enumerate(runs):
        print(f'{run.folder} …', flush=True)
        run.name, run.color = run.name if names.count(run.name) == 1 else run.folder, f'C{i}'
        checkpoint = open_files(run)
        evaluated = run.n_windows * run.config['block_size'], run.spec and folio.tokenizer.spec_hash(run.spec)
        groups.setdefault((run.config['dataset'], evaluated), []).append(run)
        try:
            if checkpoint:
                machine = Machine(device, run.config.get('dtype', 'auto'))
                model = fast.accelerate(GPT.from_pretrained(checkpoint)).to(machine.device).eval()
                if run.data and 'test' in run.data.splits():
                    sizes = run.config['block_size'], run.config['batch_size'], run.n_windows
                    run.test = evaluate(model, run.data, 'test', *sizes, machine)
                if num_samples:
                    texts += text_section(f'text{i + 1}.png', run, model, tokenizer_of(checkpoint), machine, levels)
        except (UserError, RuntimeError) as e:  # a prompt of unknown characters, no memory: the rest is reported
            run.notes.append(str(e).partition('\n')[0])
        checkpoint = model = None  # before the next one is read
    page = ['## Loss', ABOUT_LOSS]
    for i, ((name, _), group) in enumerate(groups.items(), 1):
        page += dataset_section(f'loss{i}.png', name, group)
    if any(run.swags for run in runs):
        plots.draw_hellaswag(os.path.join(to, 'hellaswag.png'), runs, HELLASWAG)
        page += ['## HellaSwag', ABOUT_HELLASWAG, '![accuracy on HellaSwag](hellaswag.png)']
    if texts:
        page += ['## Texts', ABOUT_TEXTS.format(num_samples, len(prompts.split('|')), max_new_tokens), *texts]
    notes = '\n'.join(f'- {run.name}: {"; ".join(run.notes)}.' for run in runs)
    page = [f'# {", ".join(run.name for run in runs)}', table(COLUMNS, map(row_of, runs)), ABOUT_RUNS, notes, *page]
    with open(os.path.join(to, 'report.md'), 'w', encoding='utf-8', errors='replace') as f:
        f.write('\n\n'.join(page) + '\n')
    print(f'wrote {os.path.join(to, "report.md")}')


if __name__ == '__main__':
    main()
