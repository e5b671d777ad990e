"Metrics of numbers: how far predictions are from the truth."
import math

from fastrecipes.errors import BadValue
from fastrecipes.losses.kinds import WORDS, targets_of
from fastrecipes.metrics.base import Judge

__all__ = ['OfNumbers', 'ERRORS']

ERRORS = dict(mbe=lambda e, y: e, mae=lambda e, y: e.abs(), mse=lambda e, y: e.square(), rmse=lambda e, y: e.square(),
              mape=lambda e, y: (e/y).abs(), mspe=lambda e, y: (e/y).square(), rmspe=lambda e, y: (e/y).square())


class OfNumbers(Judge):
    """Errors of numbers, e = truth − prediction, over all numbers of all samples: lower is better, 0 at best; mbe: the nearer 0.

    mbe mean e, above 0 where predictions are too low · mae mean |e| · mse mean e² · rmse √mse, in the unit of the targets or its square;
    mape mean |e/y| · mspe mean (e/y)² · rmspe √mspe, as shares: .1 is 10 %. `floor` > 0: targets nearer 0 are taken for it, as in the losses of these
    names, for of 0 there is no share; where there are many of them the value says little, and mae more."""
    def __init__(self, kind: str, *, floor: float = 1e-6, **rest):
        if not 0 < floor < math.inf: raise BadValue(f'{kind}: floor must be > 0 and finite, got {floor}')
        self.floor, self.better = floor, 'nearer 0' if kind == 'mbe' else 'lower'
        super().__init__(kind, **rest)

    def look(self, learn, pred, yb):
        if (own := targets_of(learn.loss_func)) and own.kind != 'numbers':
            raise BadValue(f'{self.name}: is for numbers, and by {type(learn.loss_func).__name__} these targets are {WORDS[own.kind]}; take accuracy, f1, …')
        return super().look(learn, pred, yb)

    def reset(self):
        super().reset()
        self.total = 0.

    def seen(self, pred, y):
        if len(pred) != len(y) or pred.numel() != y.numel():
            raise BadValue(f'{self.name}: outputs {tuple(pred.shape)}, targets {tuple(y.shape)} must hold as many numbers; '
                           'classes are judged by accuracy, f1, …')
        return pred.flatten(1) if pred.ndim > 1 else pred[:, None], y.flatten(1) if y.ndim > 1 else y[:, None]

    def add(self, pred, y):
        pred, y = pred.cpu().double(), y.cpu().double()
        values = ERRORS[self.kind](y-pred, y.abs().clamp_min(self.floor))
        self.total, self.n = self.total + float(values.sum()), self.n + values.numel()

    @property
    def value(self):
        mean = self.total/self.n if self.n else math.nan
        return math.sqrt(mean) if self.kind in ('rmse', 'rmspe') else mean
