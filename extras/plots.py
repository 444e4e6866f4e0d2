"""
The pictures of report.py: losses, HellaSwag, and measures of texts, each written as a PNG.
    python report.py out/book

A run here has a name, a color, its config, and what its log says: steps, evals, swags and best (see report.py).
"""
import math

import numpy as np

from folio.configurator import UserError


# ---- What pictures share ---------------------------------------------------------------------------------------------
def pyplot():
    """matplotlib's, set to write files, which needs no screen."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError('report.py draws with a package: pip install matplotlib') from None
    plt.switch_backend('Agg')
    plt.rcParams.update({'font.size': 14, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
                         'grid.alpha': 0.3, 'figure.constrained_layout.use': True, 'figure.dpi': 100,
                         'legend.frameon': False, 'lines.linewidth': 1.8, 'text.parse_math': False})
    return plt


def save(path, figure, axes, *extra):
    """Write a picture, its legend below all, where it covers no curve; extra: {label, color …} of what is no run."""
    plt = pyplot()
    handles = axes.get_legend_handles_labels()[0] + [plt.Line2D([], [], **look) for look in extra]
    figure.legend(handles=handles, loc='outside lower center', ncols=4 if figure.get_figwidth() > 10 else 2)
    figure.savefig(path)
    plt.close(figure)


def tokens_axis(axes):
    """Label the x axis as tokens, 200 k or 1.5 B."""
    from matplotlib.ticker import EngFormatter, MaxNLocator
    formatter = EngFormatter()
    formatter.ENG_PREFIXES = formatter.ENG_PREFIXES | {9: 'B', 12: 'T'}  # tokens come in billions, not in giga
    axes.xaxis.set_major_formatter(formatter)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel('tokens seen')


def level_lines(axes, levels):
    """Draw {label: value} as level lines; returns how they look in a legend."""
    looks = []
    for (label, value), style in zip(levels.items(), (':', '--', '-.')):
        axes.axhline(value, color='black', linestyle=style, zorder=1)
        looks.append(dict(label=f'{label}, {value:.4f}', color='black', linestyle=style))
    return looks


def smooth(values):
    """The mean around each value of a noisy curve, weighed over a tenth of it."""
    window = np.hanning(2 * (len(values) // 20) + 3)[1:-1]
    return list(np.convolve(values, window, 'same') / np.convolve(np.ones(len(values)), window, 'same'))


# ---- The pictures ----------------------------------------------------------------------------------------------------
def draw_losses(path, dataset, runs, levels):
    """Of runs on one data set, over tokens and over time; levels: {label: loss} to compare with."""
    figure, both = pyplot().subplots(1, 2, figsize=(12, 6), sharey=True)
    longest = max([e['train_seconds'] for run in runs for e in run.steps + run.evals], default=0)
    unit, seconds = ('hours', 3600) if longest > 7200 else ('minutes', 60) if longest > 300 else ('seconds', 1)
    shown = list(levels.values())
    for axes, key, scale in zip(both, ('tokens', 'train_seconds'), (1, seconds)):
        for run in runs:
            x, y = [e[key] / scale for e in run.steps], [e['loss'] for e in run.steps]
            means = smooth(y) if y else []
            axes.plot(x, y, color=run.color, alpha=0.25, linewidth=0.8)
            axes.plot(x, means, color=run.color, linewidth=1.2)
            axes.plot([e[key] / scale for e in run.evals], [e['val_loss'] for e in run.evals], 'o', color=run.color,
                      label=run.name)
            shown += means[len(y) // 10:] + [e['val_loss'] for e in run.evals[max(1, len(run.evals) // 10):]]
        lines = level_lines(axes, levels)
    shown = [loss for loss in shown if math.isfinite(loss)]
    if len(shown) > 1:  # the first steps come from far above, and would press flat what one wants to see
        margin = 0.05 * (max(shown) - min(shown)) + 0.01
        both[0].set_ylim(min(shown) - margin, max(shown) + margin)
    tokens_axis(both[0])
    both[0].set(ylabel='loss (nats a token)')
    both[1].set(xlabel=f'{unit} of training')
    figure.suptitle(dataset)
    save(path, figure, both[0], dict(label='training, smoothed', color='gray', linewidth=1.2),
         dict(label='validation', color='gray', marker='o', linestyle='none'), *lines)


def draw_hellaswag(path, runs, levels):
    """The accuracy that train.py logs (acc_mean) over tokens; levels: {label: accuracy} to compare with."""
    figure, axes = pyplot().subplots(figsize=(9, 5.6))
    for run in (run for run in runs if run.swags):
        step = math.prod(run.config[k] for k in ('gradient_accumulation_steps', 'batch_size', 'block_size'))
        axes.errorbar([e['iter'] * step for e in run.swags], [e['hellaswag'] for e in run.swags],
                      [e['acc_mean_stderr'] for e in run.swags], fmt='o-', color=run.color, capsize=3, label=run.name)
    tokens_axis(axes)
    axes.set(ylabel='HellaSwag accuracy ± standard error')
    save(path, figure, axes, *level_lines(axes, levels))


def draw_texts(path, run, measured, labels):
    """measured: {(strategy, temperature): figures}; labels: of the strategies, of which greedy knows no temperature."""
    figure, panels = pyplot().subplots(2, 2, figsize=(12, 8.5), sharex=True)
    titles = {'log-prob': 'mean log-probability (nats a token)', 'distinct-2': 'distinct pairs of words (share)',
              'repeated-4': 'repeated 4-grams of words (share)', 'self-BLEU': 'self-BLEU (1: all texts the same)'}
    for axes, (key, title) in zip(panels.flat, titles.items()):
        for strategy, label in labels.items():
            points = [(t, figures[key]) for (s, t), figures in measured.items() if s == strategy]
            if strategy == 'greedy':
                axes.axhline(points[0][1], color='C7', label=label)
            else:  # dashes, for without effect top-k is plain sampling
                axes.plot(*zip(*points), 'o--' if strategy == 'sample' else 's-', label=label)
        axes.set_title(title)
    for axes in panels[1]:
        axes.set(xlabel='temperature')
    figure.suptitle(run.name)
    real = {'validation text': -run.best['val_loss']} if run.best and not run.masked else {}
    save(path, figure, panels[0, 0], *level_lines(panels[0, 0], real))
