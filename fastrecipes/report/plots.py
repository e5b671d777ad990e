"""The report's figures as inline SVG: text stays text, colours are CSS variables, so they follow the page's light or dark scheme.

Each function returns `<svg …>` without size, to be scaled by the page; drawn for the width of a phone."""
import io
import math
import re
import warnings
from hashlib import blake2b
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

__all__ = ['losses', 'metrics', 'lr_find', 'schedule', 'confusion', 'intervals', 'tradeoff', 'field_of', 'MOST_COUNTS']

# Stand-ins that become CSS variables; the page gives them the colour-blind safe palette of doi:10.1038/nmeth.1618, lighter where it is dark.
INK, SOFT, LINE, ON = '#010101', '#020202', '#030303', '#040404'
SERIES = ('#050505', '#060606', '#070707', '#080808')
VARIABLES = {INK: '--ink', SOFT: '--soft', LINE: '--line', ON: '--on', **{c: f'--c{i}' for i, c in enumerate(SERIES, 1)}}
PAGE = SimpleNamespace(ink=INK, soft=SOFT, series=SERIES)
PLAIN = SimpleNamespace(ink='.1', soft='.45', series=('C0', 'C1', 'C2', 'C3'))          # on a figure of matplotlib's
STYLES = ('-', '--', '-.', ':')                 # a second cue beside colour
MOST_COUNTS = 20                                # classes up to which a confusion matrix prints its counts
LABEL = 18                                      # letters of a class name that are shown on an axis
STYLE = {'svg.fonttype': 'none', 'font.size': 10, 'text.color': INK, 'text.parse_math': False, 'axes.edgecolor': LINE, 'axes.labelcolor': SOFT,
         'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'grid.color': LINE, 'grid.linewidth': .6, 'axes.axisbelow': True,
         'xtick.color': LINE, 'ytick.color': LINE, 'xtick.labelcolor': SOFT, 'ytick.labelcolor': SOFT, 'xtick.major.size': 3, 'ytick.major.size': 0,
         'lines.linewidth': 1.8, 'lines.markersize': 4, 'axes.unicode_minus': True}


def field_of(o, name: str, default=None):
    "A field of a dict or an object."
    return o.get(name, default) if isinstance(o, dict) else getattr(o, name, default)


def losses(fits) -> str:
    "Training and validation loss over the epochs of all fits, one after another."
    return _curves(fits, lambda c: c.endswith('_loss'), 'loss')  # pyright: ignore[reportReturnType]


def metrics(fits) -> str | None:
    "The other columns of the fits; None where there are none."
    return _curves(fits, lambda c: not c.endswith('_loss'), None)


def lr_find(lrs, losses, suggestion=None) -> str:
    "The loss while the rate rose, with the rate that was chosen."
    def draw(ax):
        y = np.asarray(losses, float)
        ax.plot(lrs, y, color=SERIES[0])
        ax.set_xscale('log')
        low, first = np.nanmin(y), y[np.isfinite(y)][0]
        ax.set_ylim(low-.08*(span := max(first-low, 1e-9)), first+.6*span)      # it explodes at the end: that must not flatten the rest
        ax.set(xlabel='learning rate', ylabel='loss')
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_locator(LogLocator(numticks=7))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f'1e{math.log10(v):.0f}'))
        ax.set_xlim(lrs[0], lrs[-1])
        if suggestion:
            ax.axvline(suggestion, color=SERIES[1], ls='--')
            left = math.log(suggestion) > np.log([lrs[0], lrs[-1]]).mean()
            ax.annotate(f'{suggestion:.1e}', (suggestion, 1), (-5 if left else 5, -2), xycoords=blended_transform_factory(ax.transData, ax.transAxes),
                        textcoords='offset points', va='top', ha='right' if left else 'left', color=SERIES[1])
    return svg(draw)


def schedule(rates) -> str:
    "The learning rate of each training batch; of the last layers where they differ."
    def draw(ax):
        ax.plot(range(1, len(rates)+1), rates, color=SERIES[0])
        ax.set(xlabel='batch', ylabel='learning rate', ylim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:.2g}'))
    return svg(draw)


def confusion(matrix, labels) -> str:
    "Rows are the truth, columns the prediction; the stronger a cell, the larger its share of the row; counts for up to 20 classes."
    m = np.asarray(matrix)
    share = m/np.maximum(m.sum(1, keepdims=True), 1)
    n, names = len(m), [short(o) for o in labels]

    def draw(ax):
        if n <= MOST_COUNTS: _cells(ax, m, share)
        else: ax.imshow(np.dstack([np.full((n, n, 3), (0, .45, .7)), share]), interpolation='nearest')   # it reads on light and dark alike
        ax.grid(False)
        ax.set(xlim=(-.5, n-.5), ylim=(n-.5, -.5), aspect='equal', xlabel='predicted', ylabel='true')
        every = range(0, n, max(1, math.ceil(n/40)))
        size = 10 if n <= 10 else 8.5 if n <= 20 else 6
        ax.set_xticks(every, [names[i] for i in every], rotation=0 if max(map(len, names))*n < 36 else 90, fontsize=size)
        ax.set_yticks(every, [names[i] for i in every], fontsize=size)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    side = 4.6 if n <= 10 else 6.4 if n <= 20 else 8
    return svg(draw, (side, side))


def intervals(rows) -> str:
    "Estimates with their intervals: `rows` of (model, {metric: Estimate})."
    kinds = list(dict.fromkeys(k for _, by_metric in rows for k in by_metric))
    ends = [e for _, by_metric in rows for e in by_metric.values()]

    def draw(ax):
        for i, (name, by_metric) in enumerate(rows):
            for j, kind in enumerate(kinds):
                if (e := by_metric.get(kind)) is None: continue
                y = i + .26*(j-(len(kinds)-1)/2)
                ax.plot([e.lo, e.hi], [y, y], color=SERIES[j], lw=3, solid_capstyle='round', alpha=.45)
                ax.plot([e.value], [y], 'os'[j % 2], color=SERIES[j], ms=6, label=kind if i == 0 else None)
        ax.set_yticks(range(len(rows)), [short(name) for name, _ in rows], fontsize=11)
        ax.tick_params(axis='y', labelcolor=INK)
        low, high = min(e.lo for e in ends), max(e.hi for e in ends)
        pad = max(.01, .06*(high-low))
        ax.set(ylim=(len(rows)-.4, -.6), xlim=(max(-pad, low-pad), min(1+pad/2, high+pad)))
        ax.grid(False, axis='y')
        ax.spines['left'].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{100*v:.4g} %' if v <= 1.0001 else ''))
        legend(ax, 24)
    return svg(draw, (5.3, .6+.5*len(rows)))


COSTS = dict(size_bytes=(1e6, 'size of the .onnx, MB'), latency_ms=(1, 'one image on one thread, ms'))


def tradeoff(stages, cost: str, most: float | None = None) -> str:
    "Accuracy of each stage, with its interval, against what it costs: 'size_bytes' or 'latency_ms'; a hollow mark was not kept. `most`: what it may cost, in MB or ms."
    def draw(ax):
        draw_tradeoff(ax, stages, cost, most)
        legend(ax, 36)
    return svg(draw)


def draw_tradeoff(ax, stages, cost: str, most: float | None = None, colours=SERIES, soft=SOFT):
    "`tradeoff` on axes of yours, in colours of yours; the line joins what no other stage beats in both accuracy and cost."
    (unit, label), points = COSTS[cost], []
    for i, s in enumerate(s for s in stages if field_of(s, cost)):
        e, x = field_of(s, 'test') or field_of(s, 'valid'), field_of(s, cost)/unit
        colour, kept = colours[i % len(colours)], field_of(s, 'kept')
        points.append((x, 100*e.value))
        ax.errorbar([x], [100*e.value], [[100*(e.value-e.lo)], [100*(e.hi-e.value)]], color=colour, fmt='o', ms=8, lw=1.2, zorder=3,
                    mfc=colour if kept else 'none', label=short(field_of(s, 'name')) + ('' if kept else ' (not kept)'))
    front = [p for p in sorted(points) if not any(x <= p[0] and y >= p[1] and (x, y) != p for x, y in points)]
    ax.plot(*zip(*front), color=soft, lw=1, ls=':', zorder=2)
    if most is not None: ax.axvline(most, color=soft, lw=1, ls='--')
    ax.set(xscale='log', xlabel=label, ylabel='accuracy, %')
    ticks_of_log(ax.xaxis)


def ticks_of_log(axis, form: str = 'g'):
    "1, 2, 5, 10, … on a logarithmic axis, as plain numbers."
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda v, _: format(v, form)))


def _curves(fits, wanted, ylabel):
    columns = list(dict.fromkeys(c for f in fits for c in f['columns'] if wanted(c)))
    if not columns: return None
    starts = [0, *accumulate(len(f['rows']) for f in fits)]

    def draw(ax):
        for i, c in enumerate(columns):
            for f, first in zip(fits, starts):
                if c not in f['columns'] or not f['rows']: continue
                k = f['columns'].index(c)
                ax.plot(range(first+1, first+1+len(f['rows'])), [row[k] for row in f['rows']], color=SERIES[i % 4], ls=STYLES[i % 4],
                        marker='o' if len(f['rows']) < 25 else '', label=_words(c) if f is next(o for o in fits if c in o['columns']) else None)
        _mark(ax, [f for f in fits if f['rows']], starts)
        ax.set(xlabel='epoch', ylabel=ylabel or '', xlim=(.7, max(starts[-1], 1)+.3))
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        legend(ax, 36)
    return svg(draw)


def _mark(ax, fits, starts):
    "A line where the next fit begins, and the names of the fits above."
    if len(fits) < 2: return
    above = blended_transform_factory(ax.transData, ax.transAxes)
    first = 0
    for i, f in enumerate(fits):
        if i: ax.axvline(first+.5, color=SOFT, lw=1, ls=':')
        ax.text(first+.5 if i else .7, 1.02 + .085*(i % 2 == 0), (' ' if i else '') + f['name'], transform=above, fontsize=9, color=SOFT)
        first += len(f['rows'])


def _cells(ax, m, share):
    from matplotlib.patches import Rectangle
    n = len(m)
    for i in range(n):
        for j in range(n):
            ax.add_patch(Rectangle((j-.47, i-.47), .94, .94, lw=0, facecolor=SERIES[0], alpha=.05+.95*float(share[i, j])))
            if m[i, j]: ax.text(j, i, f'{m[i, j]}', ha='center', va='center', fontsize=11 if n <= 10 else 8.5, color=ON if share[i, j] > .5 else INK)


def legend(ax, below: float, ink=INK):
    "The names of the lines, so many points below the axes."
    down = ScaledTranslation(0, -below/72, ax.figure.dpi_scale_trans)
    ax.legend(loc='upper center', bbox_to_anchor=(.5, 0), bbox_transform=ax.transAxes + down, ncols=2, frameon=False, labelcolor=ink, borderaxespad=0)


def _words(column: str) -> str:
    return {'train_loss': 'training loss', 'valid_loss': 'validation loss'}.get(column, column.removesuffix('_score').replace('_', ' '))


def short(name) -> str:
    "A name as an axis shows it."
    return name if len(name := str(name)) <= LABEL else name[:LABEL-1] + '…'


def svg(draw, size=(5.3, 3.3)) -> str:
    "Call `draw(axes)` and return the figure as SVG that needs nothing from outside itself."
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter('ignore')          # a glyph that matplotlib's font lacks: the browser's has it
        fig = Figure(figsize=size)
        draw(fig.add_subplot())
        text = _saved(fig, 'fastrecipes')
        text = _saved(fig, blake2b(text.encode(), digest_size=6).hexdigest())   # ids that no other figure of the page has
    text = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->', '', text[text.index('<svg'):], flags=re.S)
    return re.sub('<[^>]*>', lambda tag: _tag(tag[0]), text)     # tags only: a class may be called '#010101'


def _tag(tag: str) -> str:
    "One tag without what would clash with, or not follow, the page around it."
    if tag.startswith('<svg'): return '<svg viewBox="' + re.search('viewBox="([^"]*)"', tag)[1] + '" xmlns:xlink="http://www.w3.org/1999/xlink">'
    tag = re.sub(r'(?<=<g) id="[^"]*"|font-family: [^;"]*;? ?', '', tag)
    tag = re.sub(r'(\.\d\d)\d+', r'\1', tag).replace('\n', ' ')
    for colour, name in VARIABLES.items(): tag = tag.replace(colour, f'var({name})')
    return tag


def _saved(fig, salt: str) -> str:
    with rc_context({'svg.hashsalt': salt}):
        fig.savefig(buffer := io.StringIO(), format='svg', transparent=True, bbox_inches='tight', pad_inches=.03, metadata={'Date': None, 'Creator': None})
    return buffer.getvalue()
