"""
Write a report on runs: their settings, losses, test and texts, and what these figures say.
    python extras/report.py out/book
    python extras/report.py out/small_1 out/small_2 out/large_1 out/large_2 --to=out/sizes

It reads log.jsonl and best.pt (or ckpt.pt) of each run, and its data set if that is still there. It
writes report.md and pictures. Runs that differ in nothing but their seed share a column: the mean ±
its standard error. A run that is still going, was cut short or never saved anything is reported as
far as it goes. With a config file that imports a model, it reports on runs of that model.

Needs model.py, folio/, plots.py and ngrams.py next to it, and matplotlib.
"""
import math
import os
import re
import statistics
import sys
import textwrap
import types

sys.path.insert(0, os.path.abspath(__file__ + '/../..'))  # the root of the checkout
import torch
from tqdm import tqdm

import folio.checkpoint
import folio.tokenizer
from extras import ngrams, plots
from folio import engine
from folio.configurator import UserError, configure, require_at_least
from folio.data import Dataset, evaluate
from folio.log import read
from folio.machine import Machine, default_device
from model import GPT

# ---- Settings ------------------------------------------------------------------------------------
to = 'out/report'  # the folder to write
prompts = 'The|If|It is'  # what the texts begin with, separated by |; the same for every run
temperatures = '0.6 0.8 1.0 1.2'  # of the strategies that draw
num_samples = 4  # texts per prompt, for each strategy and temperature; 0: no texts
max_new_tokens = 200  # tokens in a text, at most
seed = 1337  # of the texts
device = default_device()  # cpu, cuda, cuda:1, mps …

# What build-nanogpt draws for comparison
GPT2_LOSS = 3.2924  # of OpenAI's 124 M on the validation split of FineWeb-Edu
HELLASWAG = {'guessing': 0.25, 'GPT-2 124 M': 0.2945, 'GPT-3 124 M': 0.337}

# Settings that are always shown; the others are shown if they differ between the runs
MAIN = ['dataset', 'arch', 'n_layer', 'n_head', 'n_embd', 'block_size', 'dropout', 'optimizer',
        'learning_rate', 'schedule', 'warmup_iters', 'max_iters', 'batch_size',
        'gradient_accumulation_steps', 'weight_decay']
# The seed, and settings that do not change a run's figures
ASIDE = {'seed', 'out_dir', 'note', 'log_interval', 'sample_interval', 'always_save_checkpoint',
         'wandb_log', 'wandb_project', 'wandb_run_name', 'backend'}
# What train.py logs of steps and evaluations; other numbers in the log are drawn as they are
LOGGED = {'iter', 'tokens', 'train_seconds', 'loss', 'lr', 'grad_norm', 'tokens_per_second', 'mfu',
          'val_loss', 'perplexity', 'bits_per_byte', 'word_perplexity'}
MEASURES = ['log-prob', 'distinct-1', 'distinct-2', 'distinct-3', 'repeated-4', 'self-BLEU']
STRATEGIES = {
    'greedy': 'greedy',
    'top_k': 'top-k 50',
    'nucleus': 'nucleus 0.9',
    'sample': 'plain sampling',
}
MOST_STEPS = 12  # rows in a table of losses
NGRAM_ORDER = 6  # tokens in the longest n-gram
NGRAM_TOKENS = 5_000_000  # the first training tokens, in which n-grams are counted


# ---- Runs ----------------------------------------------------------------------------------------
def read_run(folder):
    """Return a run as its log tells it: settings, the entries of each kind, and notes on the gaps.

    Raises UserError if there is no log with settings in it.
    """
    entries = read(os.path.join(folder, 'log.jsonl'))
    headers = [entry for entry in entries if 'config' in entry]
    if not headers:
        raise UserError(f'no run in {folder}, or none that has begun: its log.jsonl has no '
                        'settings; to list the runs: ls out/*/log.jsonl')

    # A run writes a header each time it is started. The settings of the newest one hold now, but it
    # began with the weights that the first one names.
    run = types.SimpleNamespace(folder=folder, name=os.path.basename(folder))
    run.header = headers[-1]
    run.config = run.header['config'] | {'init_from': headers[0]['config']['init_from']}
    run.steps = [entry for entry in entries if 'loss' in entry]
    run.evals = [entry for entry in entries if 'val_loss' in entry]
    run.swags = [entry for entry in entries if 'hellaswag' in entry]
    run.others = [entry for entry in entries if 'iter' in entry and 'hellaswag' not in entry]
    run.best = min(run.evals, key=lambda entry: entry['val_loss'], default={})
    run.tokens_per_step = (run.config['gradient_accumulation_steps'] * run.config['batch_size']
                           * run.config['block_size'])
    # In an evaluation; 0: the whole split
    run.n_windows = run.config['eval_iters'] * run.config['batch_size']
    run.n_targets = run.n_windows * run.config['block_size']
    # What the log cannot tell, but the run's other files can: see `examine`.
    run.data = None  # its Dataset
    run.spec = None  # of its tokenizer
    run.masked = False  # whether the loss counts some of the tokens only
    run.saved = ''  # which checkpoint is examined
    run.measured = {}  # {split: metrics} of that checkpoint
    run.texts = {}  # {(strategy, temperature): (texts of each prompt, measures)}

    run.notes = []
    done = max([entry['iter'] for entry in run.evals] + [entry['iter'] + 1 for entry in run.steps],
               default=0)
    if done < run.config['max_iters']:
        run.notes.append(f'its log ends at step {done} of {run.config["max_iters"]}')
    return run


def open_checkpoint(run):
    """Return a run's best.pt, or else its ckpt.pt, or else None; note which."""
    for name in ('best.pt', 'ckpt.pt'):
        path = os.path.join(run.folder, name)
        if os.path.exists(path):
            checkpoint = folio.checkpoint.load(path)
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
        masked = data.mask('val') is not None
    except UserError as e:
        run.notes.append(f'no test and no n-grams: {e}')
        return
    if run.spec is None:  # no checkpoint tells it
        run.spec = data.spec
    # The folder may have been prepared again from another text since.
    if folio.tokenizer.spec_hash(run.spec) != folio.tokenizer.spec_hash(data.spec):
        run.notes.append(f'no test and no n-grams: {data.folder} has another vocabulary now')
        return
    run.data = data
    run.masked = masked
    if masked:
        run.notes.append('its loss is of the answers alone, as its data have masks')


def examine(run, columns):
    """Open a run's files, put it into its column, and measure its model.

    columns: lists of runs that differ in nothing but their seed; the first of each writes texts.
    Checkpoint and model are locals of this function, so that their memory is free again before the
    next run is opened.
    """
    checkpoint = open_checkpoint(run)
    open_data(run, checkpoint)
    column = column_of(run, columns)
    column.append(run)
    if checkpoint is None:
        return
    try:
        folio.checkpoint.refuse_other_code(checkpoint, GPT)
        # In the format it was trained in, so that the figures equal those of --eval_only
        machine = Machine(device, run.config.get('dtype', 'auto'))
        model = folio.checkpoint.build(GPT, checkpoint).to(machine.device).eval()
        if run.data:
            measure_splits(run, model, machine)
        if run is column[0] and num_samples > 0:
            torch.manual_seed(seed)  # once: each text draws random numbers of its own
            for kind in tqdm(kinds_of_text(), desc=f'{run.name}, texts', unit=' strategies'):
                run.texts[kind] = write_texts(model, checkpoint, machine, *kind)
    except UserError as e:
        # A prompt may have characters that the tokenizer does not know. Report the rest.
        run.notes.append(str(e))


def column_of(run, columns):
    """Return the column for a run; if there is none yet, add one to `columns`."""
    for column in columns:
        # The same seed twice isn't a second sample.
        is_new_seed = run.config['seed'] not in [other.config['seed'] for other in column]
        if is_new_seed and setting_of(run) == setting_of(column[0]):
            return column
    columns.append([])
    return columns[-1]


def setting_of(run):
    """Return all that a run's figures depend on, except for the seed."""
    settings = {key: value for key, value in run.config.items() if key not in ASIDE}
    return settings, run.header['record']['model'], run.spec


def measure_splits(run, model, machine):
    """Measure a model on the whole test split, and on as much training text as validation has."""
    n_val = math.ceil(len(run.data.tokens('val')) / run.config['block_size'])
    for split, n_windows in (('test', 0), ('train', run.n_windows or n_val)):
        if split in run.data.splits():
            run.measured[split] = evaluate(model, run.data, split, run.config['block_size'],
                                           run.config['batch_size'], n_windows, machine)


def is_fineweb_edu(run):
    """Return whether a run's losses are of FineWeb-Edu in GPT-2's tokens, as GPT2_LOSS is."""
    if run.data is None or run.spec['kind'] != 'gpt2':
        return False
    return re.search('fineweb-?edu', str(run.data.meta.get('source'))) is not None


def group_by(columns, key):
    """Return the columns in lists, by what key() returns for the first run of each."""
    groups = {}
    for column in columns:
        groups.setdefault(key(column[0]), []).append(column)
    return list(groups.values())


def tested_on(run):
    """Return what a run was validated on. Runs in which that is the same share a picture."""
    vocabulary = run.spec and folio.tokenizer.spec_hash(run.spec)
    return run.config['dataset'], run.n_targets, vocabulary


# ---- Texts ---------------------------------------------------------------------------------------
def kinds_of_text():
    """Return the (strategy, temperature) of all texts; greedy has no temperature."""
    kinds = [('greedy', 0.0)]
    for strategy in ('top_k', 'nucleus', 'sample'):
        kinds += [(strategy, temperature) for temperature in parse_temperatures()]
    return kinds


def write_texts(model, checkpoint, machine, strategy, temperature):
    """Return (groups, measures): for each prompt a list of texts, and their MEASURES."""
    tokenizer = folio.checkpoint.tokenizer_of(checkpoint)
    n_texts = 1 if strategy == 'greedy' else num_samples  # the others would be the same
    groups = []
    log_probs = []  # of each token, whatever strategy and temperature drew it
    for prompt in prompts.split('|'):
        ids = folio.checkpoint.encode_prompt(checkpoint, tokenizer, prompt)
        tokens = []
        own = []
        with machine.autocast:
            # These 50 and 0.9 are named in STRATEGIES.
            for next_B, logits_BV in engine.generate_with_logits(
                    model, torch.tensor([ids] * n_texts), max_new_tokens, strategy=strategy,
                    temperature=temperature, top_k=50, top_p=0.9):
                tokens.append(next_B)
                own.append(logits_BV.log_softmax(dim=-1).gather(1, next_B[:, None])[:, 0])
        texts = []
        for new, logp in zip(torch.stack(tokens, 1).tolist(), torch.stack(own, 1).tolist()):
            end = new.index(tokenizer.eot) if tokenizer.eot in new else len(new)
            texts.append(tokenizer.decode(new[:end]))
            log_probs += logp[:end + 1]  # to end a text is a choice as well
        groups.append(texts)
    return groups, {'log-prob': statistics.fmean(log_probs)} | ngrams.measure(groups)


# ---- Numbers as text -----------------------------------------------------------------------------
def standard_error(values):
    """Return the standard error of the mean of at least two values."""
    return statistics.stdev(values) / len(values)**0.5


def shown(values, decimals=None):
    """Return the mean of some numbers as text, with ± its standard error if they differ.

    decimals: by default as many as three significant digits need, and none for a whole number.

    >>> shown([961.0897]), shown([30]), shown([1.0, 2.0], decimals=3), shown([])
    ('961', '30', '1.500 ± 0.500', '–')
    """
    values = [value for value in values if value is not None and not math.isnan(value)]
    if not values:
        return '–'
    mean = statistics.fmean(values)
    if decimals is None and float(mean).is_integer():
        decimals = 0
    elif decimals is None:
        decimals = max(0, 2 - math.floor(math.log10(abs(mean))))
    text = f'{mean:,.{decimals}f}'
    if len(set(values)) > 1:
        text += f' ± {standard_error(values):,.{decimals}f}'
    return text


def table(head, rows):
    """Return a table in Markdown; all cells are text."""
    return '\n'.join(f'| {" | ".join(row)} |' for row in (head, ['---'] * len(head), *rows))


def name_of(column):
    """Return the names of the runs in a column."""
    return ', '.join(run.name for run in column)


# ---- Sections of the page ------------------------------------------------------------------------
# A section is a list of blocks of Markdown; the page puts an empty line between them.
def settings_section(columns):
    """Return the settings of all columns, side by side."""
    firsts = [column[0] for column in columns]
    names = list(MAIN)
    for name in sorted({name for run in firsts for name in run.config} - set(MAIN) - ASIDE):
        if len({run.config.get(name) for run in firsts}) > 1:
            names.append(name)
    rows = [[name, *(str(run.config.get(name, '–')) for run in firsts)] for name in names]
    rows.append(['seed', *(', '.join(str(run.config['seed']) for run in c) for c in columns)])
    rows.append(['tokens a step', *(f'{run.tokens_per_step:,}' for run in firsts)])
    rows.append(['tokenizer', *map(tokenizer_of, firsts)])
    rows.append(['validated on', *map(validated_on, firsts)])
    rows.append(['machine', *map(machine_of, firsts)])
    return ['## Settings', table(['', *map(name_of, columns)], rows)]


def tokenizer_of(run):
    if run.spec is None:
        return '–'
    return f'{run.spec["kind"]}, {folio.tokenizer.vocab_size_of(run.spec):,} tokens'


def validated_on(run):
    if run.data is None:
        return f'{run.n_targets:,} tokens' if run.n_targets else 'the whole split'
    total = len(run.data.tokens('val')) - 1
    if run.n_targets == 0 or run.n_targets >= total:
        return f'the whole split, {total:,} tokens'
    return f'{run.n_targets:,} of {total:,} tokens'


def machine_of(run):
    machine = run.header['machine']
    return f'{machine["device"]}, {machine["dtype"]}, torch {machine["torch"]}'


def figures_of(run):
    """Return what a run reached, {figure: number or None}."""
    # The newest of either: an evaluation may be newer than the last step, or older.
    newest = max(run.steps + run.evals, key=lambda entry: entry['tokens'], default={})
    speed = None
    if run.steps:
        speed = statistics.median(entry['tokens_per_second'] for entry in run.steps)
    train = run.measured.get('train', {})
    test = run.measured.get('test', {})
    return {
        'parameters': run.header['parameters'],
        'tokens seen': newest.get('tokens'),
        'seconds of training': newest.get('train_seconds'),
        'tokens/s, median': speed,
        'best at step': run.best.get('iter'),
        'validation loss': run.best.get('val_loss'),
        'training loss, without dropout': train.get('loss'),
        'test loss, whole split': test.get('loss'),
        'validation perplexity': run.best.get('perplexity'),
        '… per word': run.best.get('word_perplexity'),
        'test perplexity': test.get('perplexity'),
        '… of the test, per word': test.get('word_perplexity'),
        'validation bits per byte': run.best.get('bits_per_byte'),
    }


def results_section(columns):
    """Return what all columns reached, side by side; a figure that no run has is left out."""
    figures = [[figures_of(run) for run in column] for column in columns]
    rows = []
    for name in figures[0][0]:
        decimals = 3 if 'loss' in name or 'bits' in name else None
        cells = [shown([found[name] for found in column], decimals) for column in figures]
        if set(cells) != {'–'}:
            rows.append([name, *cells])
    return ['## Results', table(['', *map(name_of, columns)], rows), ABOUT_RESULTS]


def losses_by_step(columns):
    """Return a table of training and validation loss over the steps, MOST_STEPS of them."""
    steps = sorted({entry['iter'] for column in columns for run in column for entry in run.evals})
    every = max(1, math.ceil(len(steps) / MOST_STEPS))
    steps = steps[::-1][::every][::-1]  # the last is always among them
    head = ['step']
    for column in columns:
        head += [f'{name_of(column)}: training', 'validation']
    rows = []
    for before, step in zip([0, *steps], steps):
        row = [f'{step:,}']
        for column in columns:
            training = []
            validation = []
            for run in column:
                logged = [e['loss'] for e in run.steps if before <= e['iter'] < step]
                if logged:
                    training.append(statistics.fmean(logged))
                validation += [e['val_loss'] for e in run.evals if e['iter'] == step]
            row += [shown(training, 3), shown(validation, 3)]
        rows.append(row)
    return table(head, rows)


def losses_section(number, columns, baselines):
    """Draw the curves of columns that were validated alike; return their section.

    baselines: (order,), the losses of n-grams, in nats per token; empty without them.
    """
    first = columns[0][0]
    references = {}
    if any(is_fineweb_edu(column[0]) for column in columns):
        references['GPT-2 124 M'] = GPT2_LOSS
    if len(baselines) > 0:
        # Only the best n-gram goes into the picture; the table has all.
        references[f'{baselines.argmin() + 1}-gram'] = baselines.min()
    picture = f'loss{number}.png'
    name = first.config['dataset']
    plots.draw_losses(os.path.join(to, picture), name, columns, references)
    blocks = [f'### {name}, validated on {validated_on(first)}', f'![losses]({picture})',
              losses_by_step(columns)]
    if len(baselines) > 0:
        head = ['', *(f'{n}-gram' for n in range(1, len(baselines) + 1))]
        total = len(first.data.tokens('train'))
        blocks += [table(head, [['validation loss', *(f'{loss:.3f}' for loss in baselines)]]),
                   ABOUT_NGRAMS.format(min(NGRAM_TOKENS, total), total)]
    for key in further_keys(columns):
        picture = f'loss{number}-{key}.png'
        plots.draw_metric(os.path.join(to, picture), name, columns, key)
        blocks.append(f'![{key}]({picture})')
    return blocks


def baselines_of(columns):
    """Return the n-gram losses, (order,), on what columns were validated on; () without data."""
    found = [run for column in columns for run in column if run.data and run.best]
    if not found:
        return ()
    return ngrams.losses(found[0].data, NGRAM_ORDER, NGRAM_TOKENS, n_val=found[0].n_targets)


def further_keys(columns):
    """Return the names of the numbers in the logs that train.py does not write."""
    found = []
    for column in columns:
        for run in column:
            for entry in run.others:
                found += [key for key, value in entry.items() if type(value) in (int, float)]
    return [key for key in dict.fromkeys(found) if key not in LOGGED]


def hellaswag_section(number, columns):
    """Draw the accuracy of columns that were scored on the same items; return their section."""
    source = columns[0][0].config['hellaswag_source']
    title = f'{columns[0][0].swags[-1]["n"]:,} items of {source or "HellaSwag"}'
    # What others reach on HellaSwag says nothing about other items.
    references = {'guessing': 0.25} if source else HELLASWAG
    picture = f'hellaswag{number}.png'
    plots.draw_hellaswag(os.path.join(to, picture), title, columns, references)
    return [f'### {title}', f'![accuracy]({picture})']


def label_of(strategy, temperature):
    """Return what a table calls texts that were drawn in this way."""
    if strategy == 'greedy':
        return STRATEGIES[strategy]
    return f'{STRATEGIES[strategy]}, temperature {temperature:g}'


def texts_section(number, run):
    """Return the measures of a run's texts, as a table and a picture, and one text of each."""
    rows = []
    for kind, (_, measures) in run.texts.items():
        rows.append([label_of(*kind), *(shown([measures[name]]) for name in MEASURES)])
    blocks = [f'### {run.name}: {run.saved}', table(['strategy', *MEASURES], rows)]
    drawn_at = sorted({temperature for strategy, temperature in run.texts if strategy != 'greedy'})
    if len(drawn_at) > 1:
        picture = f'text{number}.png'
        plots.draw_texts(os.path.join(to, picture), run, STRATEGIES)
        blocks.append(f'![measures of its texts]({picture})')
    shown_at = min(drawn_at, key=lambda temperature: abs(temperature - 1))
    for i, prompt in enumerate(prompts.split('|')):
        for kind, (groups, _) in run.texts.items():
            if kind[0] == 'greedy' or kind[1] == shown_at:
                # Markdown shows an indented text as it is, whatever is in it.
                text = textwrap.indent(prompt + groups[i][0], '    ', lambda line: True)
                blocks += [f'After “{prompt}”, {label_of(*kind)}:', text]
    return blocks


# ---- What the figures say ------------------------------------------------------------------------
def val_losses(column):
    return [run.best['val_loss'] for run in column if run.best]


def say_losses(columns, baselines):
    """Return sentences on the losses of columns that were validated alike."""
    losses = {name_of(column): val_losses(column) for column in columns if val_losses(column)}
    if not losses:
        return []
    best, *others = sorted(losses, key=lambda name: statistics.fmean(losses[name]))
    lowest = statistics.fmean(losses[best])
    sentences = [f'On {columns[0][0].config["dataset"]} the lowest validation loss is '
                 f'{shown(losses[best], 3)} nats a token, by {best}.']
    for name in others:
        higher = statistics.fmean(losses[name]) - lowest
        if len(losses[best]) == 1 or len(losses[name]) == 1:
            sentences.append(f'The loss of {name} is {higher:.3f} higher; with a single '
                             'seed nobody knows whether by chance.')
            continue
        error = math.hypot(standard_error(losses[best]), standard_error(losses[name]))
        may_be_chance = ', which may be chance' if higher < 2 * error else ''
        sentences.append(f'The loss of {name} is {higher:.3f} ± {error:.3f} higher'
                         f'{may_be_chance}.')
    if len(baselines) > 0:
        beaten = [name for name in losses if statistics.fmean(losses[name]) < baselines.min()]
        lower = f'lower: {"; ".join(beaten)}' if beaten else 'no run is lower'
        sentences.append(f'The best n-gram, of {baselines.argmin() + 1} tokens, has '
                         f'{baselines.min():.3f}; {lower}.')
    return sentences


def say_overfitting(columns):
    """Return sentences on training text against validation text."""
    gaps = []
    sentences = []
    for column in columns:
        found = [run.best['val_loss'] - run.measured['train']['loss']
                 for run in column if run.best and 'train' in run.measured]
        if found:
            gaps.append(f'{shown(found, 3)} ({name_of(column)})')
        rises = [run.evals[-1]['val_loss'] - run.best['val_loss'] for run in column if run.best]
        if rises and min(rises) > 0:
            sentences.append(f'After its best step the validation loss of {name_of(column)} rose '
                             f'by {shown(rises, 3)}: more of this training would not help.')
    if gaps:
        sentences.append('The gap from training to validation loss, both without dropout, is '
                         f'{", ".join(gaps)}.')
    return sentences


def say_hellaswag(run):
    """Return a sentence on whether a run's accuracy is more than guessing."""
    score = run.swags[-1]
    accuracy = score['hellaswag']
    error = score['acc_mean_stderr']
    verdict = 'more than guessing' if accuracy > 0.25 + 2 * error else 'not clearly above guessing'
    items = run.config['hellaswag_source'] or 'HellaSwag'
    return (f'The accuracy of {run.name} on {score["n"]:,} items of {items} is {accuracy:.3f} ± '
            f'{error:.3f} (the error over items), {verdict}.')


def say_texts(run):
    """Return sentences on which strategy repeats itself, and which writes like real text."""
    measures = {label_of(*kind): found for kind, (_, found) in run.texts.items()}
    repeated = {label: found['repeated-4'] for label, found in measures.items()
                if not math.isnan(found['repeated-4'])}  # NaN: the texts are too short
    sentences = []
    if repeated:
        most = max(repeated, key=repeated.get)
        sentences.append(f'Among the texts of {run.name} those by {most} repeat themselves most: '
                         f'{repeated[most]:.1%} of their 4-grams occurred earlier in the text.')
    if run.best and not run.masked:
        real = -run.best['val_loss']
        nearest = min(measures, key=lambda label: abs(measures[label]['log-prob'] - real))
        sentences.append(f'In log-probability, texts by {nearest} come nearest to validation text: '
                         f'{measures[nearest]["log-prob"]:.2f} and {real:.2f} nats a token.')
    return sentences


ABOUT_RESULTS = """\
Losses are in nats a token: the validation loss at the step where it was best, the training and test
losses by the checkpoint that was saved then. The training loss is measured like the validation
loss, on as many tokens from the beginning of its split. After ± comes the standard error of the
mean over seeds; it is missing where there was one seed, or no difference. Between models with
different tokenizers only bits per byte and perplexity per word can be compared."""
ABOUT_LOSSES = """\
The training loss in the picture and in the table is the loss of the batches themselves: with
dropout if it is set, before the step is made, and on text that changes. So it may lie above the
validation loss. The table has the mean of the losses that were logged since the row above."""
ABOUT_NGRAMS = """\
An n-gram predicts each of the same validation tokens from the n - 1 before it, as counted in {0:,}
of {1:,} training tokens: interpolated absolute discounting (Ney, Essen and Kneser 1994), whose
probabilities sum to one."""
ABOUT_HELLASWAG = """\
The share of items whose right ending has the lowest mean loss per token, as train.py logs it. The
lines for GPT-2 and GPT-3 are those in build-nanogpt's plot, shown for HellaSwag itself alone."""
ABOUT_TEXTS = """\
{0} texts for each of {1} prompts, of at most {2} tokens, each with random numbers of its own;
greedy writes one, as it would always write the same. The first seed's model writes them. log-prob
is its mean log-probability of a token, at temperature 1: text that is much likelier than real text
is dull, text that is much less likely is broken. distinct-n is the share of different n-grams of
words in a text (after Li et al. 2016), repeated-4 the share of 4-grams that occurred earlier in the
same text (Welleck et al. 2020). self-BLEU compares the texts of one prompt: 1 if all are the same
(Zhu et al. 2018). All of these depend on the length of the texts: compare within a run, not across
tokenizers."""


# ---- The script ----------------------------------------------------------------------------------
def parse_temperatures():
    """Return the setting `temperatures` as a sorted list of numbers. Raises UserError."""
    try:
        values = sorted({float(word) for word in temperatures.split()})
    except ValueError:
        values = []
    if not values:
        raise UserError(f'temperatures is {temperatures!r}; give numbers, '
                        "as in --temperatures='0.6 1.0'")
    return values


def main():
    """Write the report."""
    folders = [arg for arg in sys.argv[1:] if not arg.startswith('-') and not arg.endswith('.py')]
    # configure takes config files and settings, but not folders.
    config = configure(globals(), [arg for arg in sys.argv[1:] if arg not in folders], strict=False)

    # Find mistakes now, and not after a minute of examining the first run.
    plots.pyplot()
    for strategy, temperature in kinds_of_text():
        engine.check_sampling(strategy, temperature, top_k=50, top_p=0.9)
    require_at_least(0, config, 'num_samples')
    require_at_least(1, config, 'max_new_tokens')
    Machine(device, 'auto')
    if not folders:
        raise UserError('which runs? Name their folders: '
                        'python extras/report.py out/book [out/other …]')
    runs = [read_run(folder) for folder in dict.fromkeys(map(os.path.normpath, folders))]
    os.makedirs(to, exist_ok=True)

    names = [run.name for run in runs]
    columns = []  # lists of runs that differ in nothing but their seed
    for run in runs:
        print(f'{run.folder} …', flush=True)
        if names.count(run.name) > 1:  # tell out/a from more/a
            run.name = run.folder
        examine(run, columns)

    says = []  # a list of sentences for each paragraph
    losses = ['## Losses', ABOUT_LOSSES]
    for number, group in enumerate(group_by(columns, tested_on), 1):
        baselines = baselines_of(group)
        says.append(say_losses(group, baselines) + say_overfitting(group))
        losses += losses_section(number, group, baselines)
    hellaswag = []
    scored = [column for column in columns if all(run.swags for run in column)]
    by_items = group_by(scored, lambda run: run.config['hellaswag_source'])
    for number, group in enumerate(by_items, 1):
        says.append([say_hellaswag(run) for column in group for run in column])
        hellaswag += hellaswag_section(number, group)
    texts = []
    for number, run in enumerate([run for run in runs if run.texts], 1):
        says.append(say_texts(run))
        texts += texts_section(number, run)

    title = '# ' + '; '.join(map(name_of, columns))
    page = [title, *settings_section(columns), *results_section(columns)]
    page += ['## What the figures say', *(' '.join(sentences) for sentences in says), *losses]
    if hellaswag:
        page += ['## HellaSwag', ABOUT_HELLASWAG, *hellaswag]
    if texts:
        n_prompts = len(prompts.split('|'))
        page += ['## Texts', ABOUT_TEXTS.format(num_samples, n_prompts, max_new_tokens), *texts]
    notes = []
    for run in runs:
        command = ' '.join(run.header['record']['argv'])
        notes.append(f'- {run.name}: {"; ".join(run.notes)}. The command: `{command}`')
    page += ['## Notes', '\n'.join(notes)]
    path = os.path.join(to, 'report.md')
    with open(path, 'w', encoding='utf-8', errors='replace') as f:
        f.write('\n\n'.join(page) + '\n')
    print(f'wrote {path}')


if __name__ == '__main__':
    main()
