"""
Draw the pictures of report.py, each a PNG: losses, HellaSwag, and measures of texts.
    python extras/report.py out/book

A run here is what `read_run` of report.py returns. Runs that differ in nothing but their seed are a
column: they share a colour and an entry in the legend. References are values to compare with,
{label: value}, drawn as level lines.

Needs folio/configurator.py and matplotlib.
"""
import numpy as np

from folio.configurator import UserError

LOOK = {
    'axes.grid': True,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'figure.constrained_layout.use': True,
    'figure.dpi': 100,
    'font.size': 14,
    'grid.alpha': 0.3,
    'legend.frameon': False,
    'lines.linewidth': 1.8,
    'text.parse_math': False,  # a $ in the name of a run is a dollar
}
TEXT_TITLES = {
    'log-prob': 'mean log-probability (nats a token)',
    'distinct-2': 'distinct pairs of words (share)',
    'repeated-4': 'repeated 4-grams of words (share)',
    'self-BLEU': 'self-BLEU (1: all texts the same)',
}


# ---- What the pictures share ---------------------------------------------------------------------
def pyplot():
    """Return matplotlib.pyplot, set to write files without a screen; UserError if it is missing."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError('report.py draws with a package: pip install matplotlib') from None
    plt.switch_backend('Agg')
    plt.rcParams.update(LOOK)
    return plt


def save(path, figure, axes, *extra):
    """Write a picture with the legend of axes below it, where it covers no curve.

    extra: legend entries that are not runs, as keyword arguments of a Line2D: {label, color, …}.
    """
    plt = pyplot()
    handles, _ = axes.get_legend_handles_labels()
    for line in extra:
        handles.append(plt.Line2D([], [], **line))
    columns = 3 if figure.get_figwidth() > 10 else 2
    figure.legend(handles=handles, loc='outside lower center', ncols=columns)
    figure.savefig(path)
    plt.close(figure)


def label_tokens(axes):
    """Label the x axis as tokens, as in 200 k or 1.5 B."""
    from matplotlib.ticker import EngFormatter, MaxNLocator
    formatter = EngFormatter()
    # Tokens come in billions and trillions, not in giga and tera
    formatter.ENG_PREFIXES = formatter.ENG_PREFIXES | {9: 'B', 12: 'T'}
    axes.xaxis.set_major_formatter(formatter)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel('tokens seen')


def draw_references(axes, references):
    """Draw {label: value}, three at most, as level lines; return their entries for the legend."""
    entries = []
    for (label, value), style in zip(references.items(), (':', '--', '-.')):
        axes.axhline(value, color='black', linestyle=style, zorder=1)
        entries.append({'label': f'{label}, {value:.4g}', 'color': 'black', 'linestyle': style})
    return entries


def label_of(run, column):
    """Return a run's label in the legend: the first run of a column names them all."""
    if run is column[0]:
        return ', '.join(other.name for other in column)
    return '_nolegend_'


def smooth(values):
    """Return a noisy curve as a list of weighted means, each over a tenth of the curve."""
    window = np.hanning(2 * (len(values) // 20) + 3)[1:-1]  # the ends of a Hann window are zero
    sums = np.convolve(values, window, 'same')
    weights = np.convolve(np.ones(len(values)), window, 'same')  # less near the ends of the curve
    return list(sums / weights)


# ---- Losses --------------------------------------------------------------------------------------
def draw_run(axes, run, label, color, key, scale):
    """Draw a run's losses over entry[key] / scale; return the losses that have to be in view.

    The first tenth of the curve is not among them: it comes down from far above, and would press
    the rest flat.
    """
    x = [entry[key] / scale for entry in run.steps]
    y = [entry['loss'] for entry in run.steps]
    smoothed = smooth(y) if y else []
    axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(x, smoothed, color=color, linewidth=1.2)

    x = [entry[key] / scale for entry in run.evals]
    val_losses = [entry['val_loss'] for entry in run.evals]
    axes.plot(x, val_losses, 'o', color=color, label=label)
    return smoothed[len(y) // 10:] + val_losses[max(1, len(val_losses) // 10):]


def draw_losses(path, title, columns, references):
    """Draw the losses of runs on one data set, over tokens on the left, over time on the right."""
    # The two share their y axis, so its limits and label are set on the left one alone
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(12, 6), sharey=True)
    in_view = list(references.values())
    for axes, key, scale in ((left, 'tokens', 1), (right, 'train_seconds', 60)):
        for number, column in enumerate(columns):
            for run in column:
                in_view += draw_run(axes, run, label_of(run, column), f'C{number}', key, scale)
        reference_entries = draw_references(axes, references)
    if len(in_view) > 1:
        lowest = min(in_view)
        highest = max(in_view)
        margin = 0.05 * (highest - lowest) + 0.01
        left.set_ylim(lowest - margin, highest + margin)

    label_tokens(left)
    left.set_ylabel('loss (nats a token)')
    right.set_xlabel('minutes of training')
    figure.suptitle(title)
    has_dropout = any(column[0].config['dropout'] > 0 for column in columns)
    batches = 'training batches, under dropout' if has_dropout else 'training batches'
    training = {'label': f'{batches}, smoothed', 'color': 'gray', 'linewidth': 1.2}
    validation = {'label': 'validation', 'color': 'gray', 'marker': 'o', 'linestyle': 'none'}
    save(path, figure, left, training, validation, *reference_entries)


def draw_metric(path, title, columns, key):
    """Draw over tokens what runs logged under a key, for the runs that have it."""
    figure, axes = pyplot().subplots(figsize=(9, 5.6))
    for number, column in enumerate(columns):
        for run in column:
            entries = [entry for entry in run.others if key in entry]
            axes.plot([entry['iter'] * run.tokens_per_step for entry in entries],
                      [entry[key] for entry in entries],
                      '.-', color=f'C{number}', label=label_of(run, column))
    label_tokens(axes)
    axes.set_ylabel(key)
    figure.suptitle(title)
    save(path, figure, axes)


# ---- HellaSwag and texts -------------------------------------------------------------------------
def draw_hellaswag(path, title, columns, references):
    """Draw over tokens the accuracy that train.py logged on the items that the title names."""
    figure, axes = pyplot().subplots(figsize=(9, 5.6))
    for number, column in enumerate(columns):
        for run in column:
            axes.errorbar(
                x=[entry['iter'] * run.tokens_per_step for entry in run.swags],
                y=[entry['hellaswag'] for entry in run.swags],
                yerr=[entry['acc_mean_stderr'] for entry in run.swags],
                fmt='o-', color=f'C{number}', capsize=3, label=label_of(run, column))
    label_tokens(axes)
    axes.set_ylabel('accuracy ± standard error')
    figure.suptitle(title)
    save(path, figure, axes, *draw_references(axes, references))


def draw_texts(path, run, labels):
    """Draw four measures of a run's texts over the temperature, a curve for each strategy.

    labels: {strategy: label}. Greedy has no temperature, and is a level line.
    """
    figure, panels = pyplot().subplots(2, 2, figsize=(12, 8.5), sharex=True)
    for axes, (key, title) in zip(panels.flat, TEXT_TITLES.items()):
        for strategy, label in labels.items():
            temperatures = [t for s, t in run.texts if s == strategy]
            values = [found[key] for (s, _), (_, found) in run.texts.items() if s == strategy]
            if strategy == 'greedy':
                axes.axhline(values[0], color='C7', label=label)
            elif strategy == 'sample':
                # Dashed: the curve of a top-k that cuts nothing off is the same, and shows through
                axes.plot(temperatures, values, 'o--', label=label)
            else:
                axes.plot(temperatures, values, 's-', label=label)
        axes.set_title(title)
    for axes in panels[1]:
        axes.set_xlabel('temperature')
    figure.suptitle(run.name)

    # Real text in the first panel, unless the loss is on answers alone (masked data)
    real_text = {}
    if run.best and not run.masked:
        real_text['validation text'] = -run.best['val_loss']
    first = panels[0, 0]
    save(path, figure, first, *draw_references(first, real_text))
