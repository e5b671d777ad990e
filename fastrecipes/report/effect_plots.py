"Figures of an ablation: what each technique does, what it costs, how the arms learned."
import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastrecipes.report.plots import INK, LINE, SERIES, SOFT, STYLES, legend, short, svg, ticks_of_log

__all__ = ['forest', 'worth', 'curves', 'error']

POINTS = FuncFormatter(lambda v, _: f'{v:+g}'.replace('-', '−') if v else '0')
WHERE = {'alone': ('o', SERIES[0]), 'in the set': ('s', SERIES[1])}


def forest(findings) -> str:
    "The effect of each technique in accuracy points with its 95 % interval, alone and in the set; filled where it is resolved among all of them."
    names = list(dict.fromkeys(f.comparison.technique for f in findings))

    def draw(ax):
        ax.axvline(0, color=SOFT, lw=1)
        for where, (mark, colour) in WHERE.items():
            mine = [f for f in findings if f.comparison.where == where]
            for k, f in enumerate(mine):
                e, y = f.effects['accuracy'], names.index(f.comparison.technique) + (.14 if where != 'alone' else -.14)
                if np.isfinite(e.lo): ax.plot([100*e.lo, 100*e.hi], [y, y], color=colour, lw=3, solid_capstyle='round', alpha=.45)
                resolved = f.verdict.word in ('helped', 'hurt')
                ax.plot([100*e.value], [y], mark, color=colour, ms=6, mfc=colour if resolved else 'none', label=where if k == 0 else None)
        ax.set_yticks(range(len(names)), [short(n) for n in names], fontsize=11)
        ax.tick_params(axis='y', labelcolor=INK)
        ax.set(ylim=(len(names)-.4, -.6), xlabel='points of accuracy on the test images')
        ax.grid(False, axis='y')
        ax.spines['left'].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.xaxis.set_major_formatter(POINTS)
        legend(ax, 36)
    return svg(draw, (5.3, 1+.5*len(names)))


def worth(findings) -> str:
    "What each technique gains, alone, against how many times as long a training takes."
    mine = [f for f in findings if f.comparison.where == 'alone']

    def draw(ax):
        ax.axhline(0, color=SOFT, lw=1)
        ax.axvline(1, color=SOFT, lw=1, ls=':')
        ys = [100*f.effects['accuracy'].value for f in mine]
        gap = .045*(max(ys)-min(ys) or 1)
        taken = []
        for f, y in sorted(zip(mine, ys), key=lambda o: o[1]):
            ax.plot([f.times], [y], 'o', color=SERIES[0], ms=6)
            at = max([y, *(t+gap for t, x in taken if abs(np.log(x/f.times)) < .25)])        # names that would lie on each other move up
            taken.append((at, f.times))
            ax.annotate(short(f.comparison.technique), (f.times, at), (7, 0), textcoords='offset points', va='center', fontsize=9, color=INK)
        ax.set(xlabel='training time, times the baseline’s', ylabel='points of accuracy')
        ax.margins(x=.28, y=.12)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:.3g}'))
        ax.yaxis.set_major_formatter(POINTS)
    return svg(draw)


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
    n, mean = np.asarray(images, float), np.exp(np.log(np.asarray(errors).clip(1e-6)).mean(0))

    def draw(ax):
        for seed in errors: ax.plot(n, 100*np.asarray(seed), 'o', color=SERIES[0], ms=4, alpha=.6)
        at = np.geomspace(n[0], 2*n[-1], 50)
        line = np.exp(np.log(mean).mean() - exponent*(np.log(at)-np.log(n).mean()))
        ax.plot(at[at <= n[-1]], 100*line[at <= n[-1]], color=SERIES[1])
        ax.plot(at[at >= n[-1]], 100*line[at >= n[-1]], color=SERIES[1], ls=':')
        ax.set(xscale='log', yscale='log', xlabel='images to train on', ylabel='error, %')
        for axis in (ax.xaxis, ax.yaxis): ticks_of_log(axis, ',g')
    return svg(draw)
