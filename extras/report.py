"""
Compare runs on one page: their curves, figures and texts, beside n-grams on the same data.
    python extras/report.py out/book
    python extras/report.py out/book out/mine --to=out/comparison --temperatures='0.5 1.0'

It reads log.jsonl and best.pt (or ckpt.pt) of each run, and its data set if that is still there. It
writes report.md and pictures. A run that is still going, was cut short or never saved anything is
reported as far as it goes. Four small runs took 55 s on two cores of an AMD EPYC (torch 2.13,
2026-11-21).

Needs model.py, folio/, plots.py and ngrams.py beside it, and matplotlib.
"""
import glob
import html
import math
import os
import re
import sys
import types

sys.path.insert(0, os.path.abspath(__file__ + '/../..'))  # the root of the checkout
import numpy as np
import torch

import folio.checkpoint
import folio.tokenizer
from extras import ngrams, plots
from folio import engine
from folio.configurator import UserError, configure
from folio.data import Dataset, evaluate
from folio.log import read
from folio.machine import Machine, default_device
from model import GPT

# ---- Settings ------------------------------------------------------------------------------------
to = 'out/report'  # the folder to write
prompts = 'The|If|It is'  # what the texts begin with, separated by |; the same for every run
temperatures = '0.6 0.8 1.0 1.2'  # of the strategies that draw
num_samples = 4  # texts per prompt, for each strategy and temperature; 0: no texts
max_new_tokens = 200  # tokens in a text, at most; fewer where the context is shorter
ngram_order = 6  # tokens in the longest n-gram; 0: no n-grams
ngram_tokens = 5_000_000  # the first training tokens, in which n-grams are counted
seed = 1337  # of the texts
device = default_device()  # cpu, cuda, cuda:1, mps …

# What build-nanogpt draws for comparison
GPT2_LOSS = 3.2924  # of OpenAI's 124 M on the validation split of FineWeb-Edu
HELLASWAG = {'guessing': 0.25, 'GPT-2 124 M': 0.2945, 'GPT-3 124 M': 0.337}

COLUMNS = ['run', 'parameters', 'tokens', 'seconds', 'tokens/s', 'val loss', 'at step',
           'perplexity', 'bits per byte', 'test perplexity', 'HellaSwag']
MEASURES = ['log-prob', 'distinct-1', 'distinct-2', 'distinct-3', 'repeated-4', 'self-BLEU']
STRATEGIES = {
    'greedy': 'greedy',
    'top_k': 'top-k 50',
    'nucleus': 'nucleus 0.9',
    'sample': 'plain sampling',
}


# ---- Runs ----------------------------------------------------------------------------------------
def val_loss_for_ranking(entry):
    """Return the validation loss of a log entry, or infinity if it is NaN."""
    if math.isnan(entry['val_loss']):  # min() would keep a NaN that comes first
        return math.inf
    return entry['val_loss']


def read_run(folder):
    """Return a run as its log tells it: settings, the entries of each kind, and notes on the gaps.

    Raises UserError if there is no log, or no settings in it.
    """
    path = os.path.join(folder, 'log.jsonl')
    if not os.path.isfile(path):
        advice = 'train one: python train.py config/train_book.py'
        logs = sorted(glob.glob('out/*/log.jsonl'))
        if logs:
            advice = 'there are ' + ', '.join(os.path.dirname(log) for log in logs)
        raise UserError(f'no run in {folder} (no log.jsonl); {advice}')
    entries = read(path)
    headers = [entry for entry in entries if 'config' in entry]
    if not headers:
        raise UserError(f'{path} does not begin with the settings of a run (yet); '
                        'wait until it does, or leave it out')

    # A run writes a header each time it is started. The settings of the newest one hold now.
    run = types.SimpleNamespace(folder=folder, name=os.path.basename(folder))
    run.config = headers[-1]['config']
    run.parameters = headers[-1]['parameters']
    run.steps = [entry for entry in entries if 'loss' in entry]
    run.evals = [entry for entry in entries if 'val_loss' in entry]
    run.swags = [entry for entry in entries if 'hellaswag' in entry]
    run.best = min(run.evals, key=val_loss_for_ranking, default={})
    # Windows in an evaluation; 0: the whole split
    run.n_windows = run.config['eval_iters'] * run.config['batch_size']
    # What only other files than the log can tell: see open_data and examine.
    run.data = None  # its Dataset
    run.spec = None  # of its tokenizer
    run.masked = False  # whether the loss counts some of the tokens only
    run.test = {}  # metrics on the test split

    run.notes = []
    done = max([entry['iter'] for entry in run.evals] + [entry['iter'] + 1 for entry in run.steps],
               default=0)
    if done < run.config['max_iters']:
        run.notes.append(f'its log ends at step {done} of {run.config["max_iters"]}')
    if run.best and run.best is not run.evals[-1]:
        last = run.evals[-1]
        run.notes.append(
            f'the last evaluation, at step {last["iter"]}, gave {last["val_loss"]:.4f}')
    return run


def open_checkpoint(run):
    """Return a run's best.pt, else its ckpt.pt, else None; note which, and what is damaged."""
    for name in ('best.pt', 'ckpt.pt'):
        if not os.path.exists(os.path.join(run.folder, name)):
            continue
        try:
            checkpoint = folio.checkpoint.load(os.path.join(run.folder, name))
        except UserError as e:
            run.notes.append(str(e))
            continue
        run.saved = f'{name}, of step {checkpoint.get("iter_num", 0)}'
        run.notes.append(f'its model is {run.saved}')
        return checkpoint
    run.notes.append('no checkpoint, so no test and no texts')
    return None


def open_data(run, checkpoint):
    """Set run.data, run.spec and run.masked as far as the files go; note what is missing."""
    if checkpoint:
        run.spec = checkpoint.get('tokenizer')
    try:
        data = Dataset(run.config['dataset'])
        if run.spec is None:  # nanoGPT's checkpoints carry no tokenizer
            run.spec = data.spec
        # The folder may have been prepared again from another text since.
        if folio.tokenizer.spec_hash(run.spec) != folio.tokenizer.spec_hash(data.spec):
            raise UserError(f'{data.folder} has another vocabulary by now')
        run.data = data
        run.masked = data.mask('val') is not None
        if run.masked:
            run.notes.append('its loss is of the answers alone, as its data have masks')
        if 'test' not in data.splits():
            run.notes.append(f'no test: {data.folder} has no such split')
    except UserError as e:
        run.notes.append(f'no test and no n-grams: {e}')


def is_fineweb_edu(run):
    """Return whether a run's losses are of FineWeb-Edu in GPT-2's tokens, as GPT2_LOSS is."""
    if run.spec and run.spec['kind'] != 'gpt2':
        return False
    if run.data:
        return re.search('fineweb-?edu', str(run.data.meta.get('source'))) is not None
    # The data is not here any more: go by the name that prepare/fineweb gives it.
    return os.path.basename(run.config['dataset']).startswith('fineweb')


def group_by_data(runs):
    """Return lists of runs that can share a picture: their losses are of the same tokens."""
    groups = {}
    for run in runs:
        n_targets = run.n_windows * run.config['block_size']
        vocabulary = run.spec and folio.tokenizer.spec_hash(run.spec)
        key = (run.config['dataset'], n_targets, vocabulary)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


# ---- Texts ---------------------------------------------------------------------------------------
@torch.no_grad()
def write_texts(model, tokenizer, machine, strategy, temperature):
    """Return (groups, metrics): for each prompt a list of num_samples texts, and their MEASURES."""
    size = model.config.block_size
    groups = []
    nats = 0.0
    n_tokens = 0
    for prompt in prompts.split('|'):
        ids = tokenizer.encode(prompt) or [tokenizer.start]
        ids = ids[-max(1, size // 2):]  # at least half of the context is for the text
        # Prompt and text must fit into one context, because one forward pass over both gives the
        # loss below. The last token is only predicted: hence + 1.
        count = min(max_new_tokens, size + 1 - len(ids))
        prompts_BT = torch.tensor([ids] * num_samples)
        with machine.autocast:
            # These 50 and 0.9 are named in STRATEGIES.
            steps = list(engine.generate(model, prompts_BT, count, strategy=strategy,
                                         temperature=temperature, top_k=50, top_p=0.9, seed=seed))
        new_BT = torch.stack(steps, dim=1).cpu()
        targets_BT = torch.cat((torch.full_like(prompts_BT, -1), new_BT), dim=1)
        texts = []
        for new, targets_T in zip(new_BT.tolist(), targets_BT):
            if tokenizer.eot in new:
                new = new[:new.index(tokenizer.eot)]
                targets_T[len(ids) + len(new) + 1:] = -1  # what follows the end does not count
            texts.append(tokenizer.decode(new))
        groups.append(texts)

        # By the model's own probabilities, whatever strategy and temperature drew the texts.
        idx_BT = torch.cat((prompts_BT, new_BT), dim=1)[:, :-1].to(machine.device)
        targets_BT = targets_BT[:, 1:].to(machine.device)
        with machine.autocast:
            _, loss = model(idx_BT, targets_BT)
        n_targets = (targets_BT != -1).sum().item()
        nats += loss.item() * n_targets
        n_tokens += n_targets
    return groups, {'log-prob': -nats / n_tokens} | ngrams.measure(groups)


# ---- Sections of the page ------------------------------------------------------------------------
# A section is a list of blocks of Markdown; the page puts an empty line between them.
def table(head, rows):
    """Return a table in Markdown; all cells are text."""
    lines = []
    for row in (head, ['---'] * len(head), *rows):
        # A | in the name of a run would begin another cell.
        escaped = [text.replace('|', '\\|') for text in row]
        lines.append(f'| {" | ".join(escaped)} |')
    return '\n'.join(lines)


def cell(value, spec):
    """Return a number as text in the format `spec`; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return '–'
    return format(value, spec)


def loss_cells(metrics):
    """Return the cells of validation loss, perplexity and bits per byte."""
    return [cell(metrics.get('val_loss'), '.4f'),
            cell(metrics.get('perplexity'), ',.4f'),
            cell(metrics.get('bits_per_byte'), '.4f')]


def per_word(metrics):
    """Return what to write after a perplexity: that per word, where words were counted, or ''."""
    if 'word_perplexity' not in metrics:
        return ''
    return f' ({metrics["word_perplexity"]:,.4f} a word)'


def run_row(run):
    """Return a run's line in the first table: a cell for each of COLUMNS."""
    # The newest of either: an evaluation may be newer than the last step, or older.
    newest = max(run.steps + run.evals, key=lambda entry: entry['tokens'], default={})
    speed = None
    if run.steps:
        speed = np.median([entry['tokens_per_second'] for entry in run.steps])
    hellaswag = '–'
    if run.swags:
        score = run.swags[-1]
        accuracy = cell(score.get('hellaswag'), '.4f')
        stderr = cell(score.get('acc_mean_stderr'), '.4f')
        hellaswag = f'{accuracy} ± {stderr}'
    loss, perplexity, bits_per_byte = loss_cells(run.best)
    return [
        run.name,
        f'{run.parameters / 1e6:,.2f} M',
        cell(newest.get('tokens'), ','),
        cell(newest.get('train_seconds'), ',.0f'),
        cell(speed, ',.0f'),
        loss,
        cell(run.best.get('iter'), ','),
        perplexity + per_word(run.best),
        bits_per_byte,
        cell(run.test.get('perplexity'), ',.4f') + per_word(run.test),
        hellaswag,
    ]


def ngram_metrics(data, losses):
    """Return {'1-gram': metrics, …}, with the metrics that a model's log has.

    losses: (order,), in nats per token.
    """
    bytes_per_token = data.per_token('val', 'bytes') or math.nan  # NaN: bytes were not counted
    metrics = {}
    for n, loss in enumerate(losses, 1):
        metrics[f'{n}-gram'] = {
            'val_loss': loss,
            'perplexity': math.exp(loss),
            'bits_per_byte': loss * (1 / math.log(2) / bytes_per_token),
        }
    return metrics


def loss_section(picture, runs):
    """Draw the curves of a group of runs; return their section, with a table of n-grams as well."""
    name = runs[0].config['dataset']
    references = {}
    if any(is_fineweb_edu(run) for run in runs):
        references['GPT-2 124 M'] = GPT2_LOSS
    counted = 'There are no n-grams beside them.'
    models = {}
    # All of these runs have the same tokens, so take those of the first.
    datasets = [run.data for run in runs if run.data and run.best]
    if datasets and ngram_order:
        data = datasets[0]
        n_targets = runs[0].n_windows * runs[0].config['block_size']  # 0: the whole split
        try:
            losses = ngrams.losses(data, ngram_order, ngram_tokens, n_val=n_targets)
            # Only the best n-gram goes into the picture; the table has all.
            references[f'{losses.argmin() + 1}-gram'] = losses.min()
            total = len(data.tokens('train'))
            counted = (f'N-grams were counted in {min(ngram_tokens, total):,} '
                       f'of {total:,} training tokens.')
            models = ngram_metrics(data, losses)
        except UserError as e:  # its tokens are damaged
            runs[0].notes.append(f'no n-grams: {e}')
    plots.draw_losses(os.path.join(to, picture), name, runs, references=references)
    blocks = [f'### {name}', f'![losses]({picture})', counted]
    for metric in further_metrics(runs):
        other = picture.replace('.png', f'-{metric}.png')
        plots.draw_metric(os.path.join(to, other), name, runs, metric)
        blocks.append(f'![{metric}]({other})')

    rows = [[model, *loss_cells(metrics)] for model, metrics in models.items()]
    rows += [[run.name, *loss_cells(run.best)] for run in runs]
    head = ['model', 'val loss', 'perplexity', 'bits per byte']
    return [*blocks, table(head, rows)]


def further_metrics(runs):
    """Return the names of the numbers that evaluations logged besides those of train.py."""
    ours = {'iter', 'tokens', 'train_seconds', 'val_loss', 'perplexity', 'bits_per_byte',
            'word_perplexity'}
    found = []
    for run in runs:
        for entry in run.evals:
            for name, value in entry.items():
                if name not in ours and name not in found and type(value) in (int, float):
                    found.append(name)
    return found


def label_of(strategy, temperature):
    """Return the name in a table of texts that were drawn in this way."""
    if strategy == 'greedy':
        return STRATEGIES[strategy]
    return f'{STRATEGIES[strategy]}, temperature {temperature:g}'


def text_section(picture, run, model, tokenizer, machine, temperature_list):
    """Let a run's model write texts, and return their section.

    A kind of text is a strategy and a temperature. The section has the measures of each kind, as a
    table and a picture, and then for each prompt the first text of each kind.
    """
    kinds = [('greedy', 0.0)]  # greedy has no temperature
    for strategy in ('top_k', 'nucleus', 'sample'):
        kinds += [(strategy, temperature) for temperature in temperature_list]
    groups = {}  # kind: for each prompt a list of texts
    measured = {}  # kind: metrics
    for kind in kinds:
        groups[kind], measured[kind] = write_texts(model, tokenizer, machine, *kind)
    plots.draw_texts(os.path.join(to, picture), run, measured, labels=STRATEGIES)

    rows = []
    for kind in kinds:
        rows.append([label_of(*kind)] + [f'{measured[kind][measure]:.3f}' for measure in MEASURES])
    blocks = [f'### {run.name}: {run.saved}',
              table(['strategy', *MEASURES], rows),
              f'![measures of its texts]({picture})']
    for i, prompt in enumerate(prompts.split('|')):
        blocks.append(f'<details><summary>After “{html.escape(prompt)}”</summary>')
        for kind in kinds:
            first_text = groups[kind][i][0]
            blocks += [label_of(*kind) + ':', fenced(prompt + first_text)]
        blocks.append('</details>')
    return blocks


def fenced(text):
    """Return a text as a fenced block of Markdown."""
    # The fence must be longer than any row of ~ in the text, which would end the block.
    longest = max((len(tildes) for tildes in re.findall('~+', text)), default=0)
    fence = '~' * (3 + longest)
    return f'{fence}text\n{text}\n{fence}'


ABOUT_RUNS = """\
Tokens and seconds are those of training, up to where the log ends; tokens/s is the median of its
lines. Loss (in nats a token), perplexity and bits per byte are those of the best evaluation. Test
perplexity is what `python train.py … --init_from=FOLDER/best.pt --eval_only=True` prints. Between
models with different tokenizers only bits per byte can be compared."""
ABOUT_LOSS = """\
An n-gram predicts each of the same validation tokens from the n - 1 before it, as counted in the
training split: interpolated absolute discounting (Ney, Essen and Kneser 1994), whose probabilities
sum to one."""
ABOUT_HELLASWAG = """\
The share of items whose right ending has the lowest mean loss per token, as train.py logs it. The
lines of GPT-2 and GPT-3 are those that build-nanogpt draws."""
ABOUT_TEXTS = """\
{0} texts for each of {1} prompts, of at most {2} tokens and no more than the context holds; below,
the first of each. log-prob is the model's own for a token, at temperature 1: text that is much
likelier than real text is dull, text that is much less likely is broken. Of the words of all texts,
distinct-n is the share of different n-grams (Li et al. 2016), and repeated-4 the share of 4-grams
that stood in the same text before (Welleck et al. 2020); self-BLEU compares the texts of one prompt
(Zhu et al. 2018). Greedy writes the same text {0} times, so its distinct-n is at most 1/{0}. All of
these depend on the length of the texts: compare within a run, not across tokenizers."""


# ---- The script ----------------------------------------------------------------------------------
def parse_temperatures():
    """Return the setting `temperatures` as a sorted list of numbers. Raises UserError."""
    try:
        values = sorted({float(word) for word in temperatures.split()})
    except ValueError:
        values = []
    if not values or not 0 < values[0] <= values[-1] < math.inf:
        raise UserError(f'temperatures is {temperatures!r}; give numbers above 0, '
                        "as in --temperatures='0.6 1.0'")
    return values


def check_counts():
    """Raise UserError for an impossible number of texts, tokens or n-grams."""
    if num_samples < 0 or num_samples == 1:  # self-BLEU compares each text with others
        raise UserError(f'num_samples is {num_samples}; it must be 0 or at least 2')
    if max_new_tokens < 1:
        raise UserError(f'max_new_tokens is {max_new_tokens}; it must be at least 1')
    if ngram_order < 0:
        raise UserError(f'ngram_order is {ngram_order}; it must be at least 0')
    if ngram_tokens < 1:
        raise UserError(f'ngram_tokens is {ngram_tokens}; it must be at least 1')


def examine(run, picture, temperature_list):
    """Open a run's files, set run.test, and return its section of texts, or [] without a model.

    Checkpoint and model are locals of this function, so that their memory is free again before the
    next run is opened.
    """
    checkpoint = open_checkpoint(run)
    open_data(run, checkpoint)
    if checkpoint is None:
        return []
    try:
        folio.checkpoint.refuse_other_code(checkpoint, GPT)
        # In the format it was trained in, so that the figures are those of train.py --eval_only
        machine = Machine(device, run.config.get('dtype', 'auto'))
        model = folio.checkpoint.build(GPT, checkpoint).to(machine.device).eval()
        if run.data and 'test' in run.data.splits():
            run.test = evaluate(model, run.data, 'test', block_size=run.config['block_size'],
                                batch_size=run.config['batch_size'], n_windows=run.n_windows,
                                machine=machine)
        if num_samples:
            tokenizer = folio.checkpoint.tokenizer_of(checkpoint)
            return text_section(picture, run, model, tokenizer, machine, temperature_list)
    except (UserError, RuntimeError) as e:
        # A prompt may have characters that the tokenizer does not know, or the memory may not
        # suffice. Report the rest.
        run.notes.append(str(e).partition('\n')[0])
    return []


def main():
    """Write the report."""
    folders = [arg for arg in sys.argv[1:] if not arg.startswith('-') and not arg.endswith('.py')]
    # configure takes config files and settings, but not folders.
    configure(globals(), [arg for arg in sys.argv[1:] if arg not in folders], strict=False)

    # Find mistakes now, and not after a minute of examining the first run.
    plots.pyplot()
    temperature_list = parse_temperatures()
    check_counts()
    Machine(device, 'auto')
    if not folders:
        raise UserError('which runs? Name their folders: '
                        'python extras/report.py out/book [out/other …]')
    runs = [read_run(folder) for folder in dict.fromkeys(map(os.path.normpath, folders))]
    try:
        os.makedirs(to, exist_ok=True)
    except OSError as e:
        raise UserError(f'{to} cannot be written ({e.strerror}); '
                        'give another --to=folder') from None

    names = [run.name for run in runs]
    texts = []
    for i, run in enumerate(runs):
        print(f'{run.folder} …', flush=True)
        run.color = f'C{i}'
        if names.count(run.name) > 1:  # tell out/a from more/a
            run.name = run.folder
        texts += examine(run, f'text{i + 1}.png', temperature_list)

    sections = ['## Loss', ABOUT_LOSS]
    for i, group in enumerate(group_by_data(runs), 1):
        sections += loss_section(f'loss{i}.png', group)
    if any(run.swags for run in runs):
        plots.draw_hellaswag(os.path.join(to, 'hellaswag.png'), runs, HELLASWAG)
        sections += ['## HellaSwag', ABOUT_HELLASWAG, '![accuracy on HellaSwag](hellaswag.png)']
    if texts:
        n_prompts = len(prompts.split('|'))
        sections += ['## Texts', ABOUT_TEXTS.format(num_samples, n_prompts, max_new_tokens), *texts]

    title = '# ' + ', '.join(run.name for run in runs)
    # Only now, because the sections above add notes.
    notes = '\n'.join(f'- {run.name}: {"; ".join(run.notes)}.' for run in runs)
    page = [title, table(COLUMNS, [run_row(run) for run in runs]), ABOUT_RUNS, notes, *sections]
    path = os.path.join(to, 'report.md')
    with open(path, 'w', encoding='utf-8', errors='replace') as f:
        f.write('\n\n'.join(page) + '\n')
    print(f'wrote {path}')


if __name__ == '__main__':
    main()
