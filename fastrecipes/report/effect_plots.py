"Figures of an ablation: what each technique does, what it costs, how the arms learned."
from functools import partial

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastrecipes.report.plots import LINE, PAGE, SERIES, STYLES, legend, short, svg, ticks_of_log

__all__ = ['curves', 'draw_error', 'draw_forest', 'draw_worth', 'error', 'forest', 'worth']

POINTS = FuncFormatter(lambda v, _: f'{v:+g}'.replace('-', '−') if v else '0')
MARKS = {'alone': ('o', 0), 'in the set': ('s', 1)}       # a mark and the number of a colour


def forest(findings) -> str:
    "The effect of each technique in accuracy points with its 95 % interval, alone and in the set; filled where it is resolved among all of them."
    return svg(partial(draw_forest, findings=findings), (5.3, 1+.5*len({f.comparison.technique for f in findings})))


def draw_forest(ax, findings, look=PAGE):
    "`forest` on axes of yours."
    names = list(dict.fromkeys(f.comparison.technique for f in findings))
    ax.axvline(0, color=look.soft, lw=1)
    for where, (mark, i) in MARKS.items():
        mine, colour = [f for f in findings if f.comparison.where == where], look.series[i]
        for k, f in enumerate(mine):
            e, y = f.effects['accuracy'], names.index(f.comparison.technique) + (.14 if where != 'alone' else -.14)
            if np.isfinite(e.lo): ax.plot([100*e.lo, 100*e.hi], [y, y], color=colour, lw=3, solid_capstyle='round', alpha=.45)
            resolved = f.verdict.word in ('helped', 'hurt')
            ax.plot([100*e.value], [y], mark, color=colour, ms=6, mfc=colour if resolved else 'none', label=where if k == 0 else None)
    ax.set_yticks(range(len(names)), [short(n) for n in names], fontsize=11)
    ax.tick_params(axis='y', labelcolor=look.ink)
    ax.set(ylim=(len(names)-.4, -.6), xlabel='points of accuracy on the test images')
    ax.grid(False, axis='y')
    ax.spines['left'].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(POINTS)
    legend(ax, 36, look.ink)


def worth(findings) -> str:
    "What each technique gains, alone, against how many times as long a training takes."
    return svg(partial(draw_worth, findings=findings))


def draw_worth(ax, findings, look=PAGE):
    "`worth` on axes of yours."
    mine = [f for f in findings if f.comparison.where == 'alone']
    ax.axhline(0, color=look.soft, lw=1)
    ax.axvline(1, color=look.soft, lw=1, ls=':')
    ys = [100*f.effects['accuracy'].value for f in mine]
    gap = .045*(max(ys)-min(ys) or 1)
    taken = []
    for f, y in sorted(zip(mine, ys), key=lambda o: o[1]):
        ax.plot([f.times], [y], 'o', color=look.series[0], ms=6)
        at = max([y, *(t+gap for t, x in taken if abs(np.log(x/f.times)) < .25)])        # names that would lie on each other move up
        taken.append((at, f.times))
        ax.annotate(short(f.comparison.technique), (f.times, at), (7, 0), textcoords='offset points', va='center', fontsize=9, color=look.ink)
    ax.set(xlabel='training time, times the baseline’s', ylabel='points of accuracy')
    ax.margins(x=.28, y=.12)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:.3g}'))
    ax.yaxis.set_major_formatter(POINTS)


def curves(by_arm: dict[str, list[list[float]]]) -> str | None:
    "Accuracy on the validation images by epoch, the mean over seeds, of the arms that are named; the last is the baseline, in grey. None where an epoch is all there is."
    means = {name: np.mean([c[:min(map(len, runs))] for c in runs], 0) for name, runs in by_arm.items() if runs and min(map(len, runs)) > 1}
    if not means: return None

    def draw(ax):
        for i, (name, y) in enumerate(means.items()):
            grey = name == 'baseline'
            ax.plot(range(1, len(y)+1), 100*y, color=LINE if grey else SERIES[i % 4], ls=STYLES[i//4 % 4], lw=3 if grey else 1.6, marker='o' if len(y) < 25 else '', label=short(name))
        ax.set(xlabel='epoch', ylabel='validation accuracy, %')
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        legend(ax, 36)
    return svg(draw, (5.3, 3.3+.16*(len(means)//2)))


def error(images, errors, exponent: float) -> str:
    "The error on the test images by how many there were to train on, a dot a seed, with the line through their means drawn on to twice as many."
    return svg(partial(draw_error, images=images, errors=errors, exponent=exponent))


def draw_error(ax, images, errors, exponent: float, look=PAGE):
    "`error` on axes of yours."
    n, mean = np.asarray(images, float), np.exp(np.log(np.asarray(errors).clip(1e-6)).mean(0))
    for seed in errors: ax.plot(n, 100*np.asarray(seed), 'o', color=look.series[0], ms=4, alpha=.6)
    at = np.geomspace(n[0], 2*n[-1], 50)
    line = np.exp(np.log(mean).mean() - exponent*(np.log(at)-np.log(n).mean()))
    ax.plot(at[at <= n[-1]], 100*line[at <= n[-1]], color=look.series[1])
    ax.plot(at[at >= n[-1]], 100*line[at >= n[-1]], color=look.series[1], ls=':')
    ax.set(xscale='log', yscale='log', xlabel='images to train on', ylabel='error, %')
    for axis in (ax.xaxis, ax.yaxis): ticks_of_log(axis, ',g')
