"Which layers can lose channels and which cannot: each cut alone, and the loss measured."
from dataclasses import dataclass

import numpy as np
import torch
from fastai.basics import Learner, get_model, patch, to_detach, to_device
from fastai.learner import _cast_tensor
from matplotlib.figure import Figure

from fastrecipes.errors import BadValue
from fastrecipes.production.slimming import channel_groups, slimmed
from fastrecipes.technique import check_changeable
from fastrecipes.training.aside import aside
from fastrecipes.training.precision import device_of

__all__ = ['Sensitivity', 'equal_harm']


def equal_harm(harm: np.ndarray, tried, channels: np.ndarray, budget: float) -> np.ndarray:
    """The share `(g,)` of its channels that each of g groups should lose, so that together they lose `budget` of all, and the worst harm of one is least.

    `harm` `(g, r)`: what it cost to cut a group by each of the ratios `tried` `(r,)`, ascending; between them it is taken to grow in a line, from 0 at 0,
    and never to fall. Every group goes as far as one level of harm allows; where what does no harm at all is more than `budget`, each takes its share of
    that. Raises `ValueError` where `budget` is not between 0 and the largest ratio."""
    tried, channels = np.asarray([0., *tried]), np.asarray(channels, float)
    if not 0 < budget <= tried[-1] + 1e-9:
        raise BadValue(f'ratios: budget, the share of all channels to remove, must be above 0 and at most the largest ratio tried, {tried[-1]:g}, got {budget}')
    harm = np.maximum.accumulate(np.concatenate([np.zeros((len(harm), 1)), np.maximum(harm, 0)], 1), 1)

    def at(level):
        "How far each group goes at a level of harm."
        def of(h):
            k = int(np.searchsorted(h, level, 'right')) - 1                         # the last ratio that costs no more
            return tried[-1] if k == len(h)-1 else tried[k] + (tried[k+1]-tried[k])*(level-h[k])/(h[k+1]-h[k])
        return np.array([of(h) for h in harm])
    def share(level): return float(at(level) @ channels/channels.sum())

    if (free := share(0.)) >= budget: return at(0.)*budget/free
    low, high = 0., float(harm.max())
    for _ in range(60): low, high = (mid, high) if share(mid := (low+high)/2) < budget else (low, mid)
    part = (budget-share(low))/(share(high)-share(low))         # where harm does not grow with the ratio, there is a jump between the two
    return (1-part)*at(low) + part*at(high)


@dataclass(frozen=True, repr=False)
class Sensitivity:
    """What it costs to cut one group of layers alone, without fine-tuning. Printed, it is a table.

    `layers`: the names of each group, those that lose the same channels together; `channels` of each `(g,)`; the ratios `tried` `(r,)`; `loss` `(g, r)`
    in validation; `accuracy` `(g, r)`, None where answers are no classes; `dense`: (loss, accuracy) of the network as it is; on `n` images."""
    layers: list[list[str]]
    channels: np.ndarray
    tried: tuple
    loss: np.ndarray
    accuracy: np.ndarray | None
    dense: tuple
    n: int

    @property
    def names(self) -> list[str]:
        "The groups, each by its first layer and how many more there are."
        return [g[0] + f' +{len(g)-1}'*(len(g) > 1) for g in self.layers]

    @property
    def _shown(self) -> tuple[str, np.ndarray, object]:
        if self.accuracy is None: return 'loss', self.loss, lambda v: f'{v:.3f}'
        return 'accuracy, %', 100*self.accuracy, lambda v: f'{v:.1f}'

    def __str__(self):
        what, values, text = self._shown
        dense = text(self.dense[0] if self.accuracy is None else 100*self.dense[1])
        rows = [('layers', 'channels', *(f'{r:.0%} cut' for r in self.tried)), *((name, str(c), *map(text, v)) for name, c, v in zip(self.names, self.channels, values))]
        width = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        return '\n'.join([f'{what} on {self.n} validation images, one group of layers cut; {dense} as it is',
                          *('  '.join([r[0].ljust(width[0]), *(c.rjust(w) for c, w in zip(r[1:], width[1:]))]) for r in rows)])

    __repr__ = __str__

    def ratios(self, budget: float) -> dict[str, float]:
        """Ratios for `slim(per_layer=…)` that remove `budget` of all channels: groups whose cut raises the loss less lose more, by `equal_harm`.

        Raises `ValueError` where `budget` is not between 0 and the largest ratio tried."""
        shares = equal_harm(self.loss - self.dense[0], self.tried, self.channels, budget)
        return {g[0]: round(float(r), 4) for g, r in zip(self.layers, shares) if r >= 5e-5}

    def plot(self) -> Figure:
        "A map of what each group and ratio costs: points of accuracy, or loss where there is none; the darker, the more. Returns the figure."
        drop = self.loss - self.dense[0] if self.accuracy is None else 100*(self.dense[1]-self.accuracy)
        fig = Figure(figsize=(3.2 + .9*len(self.tried), 1.3 + .27*len(self.layers)), layout='constrained')
        ax, top = fig.subplots(), max(float(drop.max()), 1e-9)
        shown = ax.imshow(drop, aspect='auto', cmap='Reds', vmin=0, vmax=top)
        for (i, j), v in np.ndenumerate(drop):
            ax.text(j, i, f'{v:.2f}' if self.accuracy is None else f'{v:.1f}', ha='center', va='center', size='small', color='w' if v > .6*top else '.15')
        ax.set(xticks=range(len(self.tried)), xticklabels=[f'{r:.0%}' for r in self.tried], yticks=range(len(self.names)), xlabel='channels removed, of this group alone')
        ax.set_yticklabels(self.names, size='small')
        fig.colorbar(shown, label='rise of the loss' if self.accuracy is None else 'points of accuracy lost')
        return fig


@patch
def sensitivity(self: Learner, ratios: tuple = (.25, .5, .75), n: int = 512, round_to: int = 1) -> Sensitivity:
    """Cut each group of layers alone by each of `ratios` (in (0, 1), ascending), without training, and measure loss and accuracy in validation (arXiv:1608.08710).

    `n` ≥ 1 images, spread evenly over the validation set; widths are multiples of `round_to`. The network is copied: the Learner, its optimizer, its
    records and every random stream stay as they are. Layers that must lose the same channels are cut together; a group too narrow for a
    ratio counts as uncut. Raises `ValueError` outside the ranges, and where the network cannot be cut."""
    ratios = tuple(ratios) if isinstance(ratios, (tuple, list)) else (ratios,)
    if not ratios or any(not 0 < r < 1 for r in ratios) or list(ratios) != sorted(set(ratios)):
        raise BadValue(f'sensitivity: ratios must lie between 0 and 1, in ascending order, got {ratios}')
    check_changeable(self, 'sensitivity')
    if n < 1: raise BadValue(f'sensitivity: n must be ≥ 1 image, got {n}')
    with aside(self, 'sensitivity'):
        model, device = get_model(self.model), device_of(self)
        batches = _batches(self, n)
        one = batches[0][0]
        try: groups = channel_groups(model, *(x[:2] for x in one))
        except BadValue as e: raise BadValue(f'sensitivity: {str(e).removeprefix("channel_groups: ")}') from e
        if not groups: raise BadValue('sensitivity: no layer of this network has channels that can be cut: there is but the one that answers')
        dense = _measured(self, model, batches, device)
        def cut(group, ratio):
            try: return _measured(self, slimmed(model, 0., *(x[:2] for x in one), round_to=round_to, per_layer={group[0]: ratio}), batches, device)
            except BadValue as e:
                if 'wide enough' not in str(e): raise BadValue(f'sensitivity: {str(e).removeprefix("prune: ")}') from e
                return dense
        seen = np.array([[cut(g, r) for r in ratios] for g in groups], float)
        layers = dict(model.named_modules())
        channels = np.array([_width(layers[g[0]]) for g in groups])
    return Sensitivity(groups, channels, ratios, seen[..., 0], None if np.isnan(dense[1]) else seen[..., 1], tuple(dense), sum(len(yb[0]) for _, yb in batches))


def _width(m) -> int: return m.weight.shape[1 if getattr(m, 'transposed', False) else 0]*(m.groups if getattr(m, 'transposed', False) else 1)


def _batches(learn: Learner, n: int) -> list[tuple[tuple, tuple]]:
    "(inputs, targets) of `n` images, spread evenly over the validation set, on the CPU."
    dl, kept, seen = learn.dls.valid, [], 0
    total = len(getattr(dl, 'dataset', ()))
    if not total: raise BadValue('sensitivity: there is no validation image to measure on')
    for b in dl:
        at = [i for i in range(len(b[0])) if (seen+i+1)*n//total > (seen+i)*n//total or n >= total]
        seen += len(b[0])
        if not at: continue
        i = getattr(learn.dls, 'n_inp', max(1, len(b)-1))
        rows = to_device(to_detach(tuple(o[at] for o in b)), 'cpu')
        kept.append((_cast_tensor(rows[:i]), _cast_tensor(rows[i:])))
    return kept


@torch.no_grad()
def _measured(learn: Learner, model, batches, device) -> tuple[float, float]:
    "(mean loss, accuracy or NaN) of `model`, in evaluation mode."
    mode, total, right, n = model.training, 0., 0., 0
    model.to(device).eval()
    for xb, yb in batches:
        pred, yb = model(*to_device(xb, device)), to_device(yb, device)
        size = len(yb[0])
        total, n = total + float(learn.loss_func(pred, *yb))*size, n + size
        classes = len(yb) == 1 and isinstance(pred, torch.Tensor) and pred.ndim == 2 and pred.shape[1] > 1 and not yb[0].is_floating_point() and yb[0].numel() == size
        right += float((pred.argmax(1) == yb[0].view(-1)).sum()) if classes else float('nan')
    model.train(mode)
    return total/n, right/n
