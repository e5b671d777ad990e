"Metrics of scores and probabilities: how well they rank, and how far they are from what came."
import math
from itertools import permutations
from typing import Literal

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from fastrecipes.errors import BadValue
from fastrecipes.metrics.base import CLASSES, IGNORED, LABELS, OfClasses

__all__ = ['RocAuc', 'OfProbabilities', 'CalibrationError']


class RocAuc(OfClasses):
    """The chance that a sample of the class gets a higher score than one that is not of it: the area under the ROC curve, 0 to 1, .5 by guessing,
    higher is better.

    Of two classes that of the second, or of `pos_label`. Of more, or of labels, the mean over them: `average` 'macro', or 'weighted' by how often
    each is there; `multi_class` 'ovr', each against the rest, or 'ovo', over pairs of classes (doi:10.1023/A:1010920819831). What is
    not there is left out; where all are of one class it is not a number, and says so. scikit-learn computes it. Scores are kept: 4·c bytes a
    sample, and a pixel; 4 for two classes. `logits`: the outputs are made probabilities, unless False; default by the loss."""
    def __init__(self, kind: str = 'roc_auc', *, average: Literal['macro', 'weighted'] = 'macro', multi_class: Literal['ovr', 'ovo'] = 'ovr',
                 pos_label: int | str | None = None, logits: bool | None = None, **rest):
        super().__init__(kind, **rest)
        self.average, self.multi_class, self.pos_label, self.logits = average, multi_class, pos_label, logits
        self.one_of('average', average, ('macro', 'weighted'))
        self.one_of('multi_class', multi_class, ('ovr', 'ovo'))
        self.alone(pos_label, multi_class=None if multi_class == 'ovr' else multi_class, average=None if average == 'macro' else average)

    def seen(self, pred, y):
        pred, y = self.told_apart(pred, y)
        if self.pos_label is not None: self.number(self.pos_label)
        if self.what == CLASSES and self.c == 2: pred = pred[..., 1]-pred[..., 0] if self.of_logits else pred[..., 1]
        return pred, y

    def add(self, scores, y):
        kept = y != self.ignored
        if self.what == LABELS: scores, y = scores.flatten(0, -2), torch.where(kept, y, IGNORED).flatten(0, -2)
        else: scores, y = scores[kept], y[kept]
        self.n += len(y)
        self.kept.append((scores.cpu(), y.cpu()))

    @property
    def value(self):
        if not self.n: return math.nan
        scores, y = (torch.cat(o) for o in zip(*self.kept))
        if not scores.isfinite().all(): return self.nothing('outputs that are not finite cannot be ranked')
        sides = [(there, s) for there, s in self._sides(scores.double(), y.numpy()) if 0 < there.sum() < len(there)]
        if not sides: return self.nothing(f'the {len(y)} targets are all on one side, and there is nothing to rank them against')
        pairs = self.what == CLASSES and self.multi_class == 'ovo'
        weights = [1 if self.average == 'macro' else len(there) if pairs else there.sum() for there, _ in sides]
        return float(np.average([roc_auc_score(there, s) for there, s in sides], weights=weights))

    def _sides(self, scores, y):
        "What is ranked: whether each sample is of a class, and its score; in 64 bits, for in 32 probabilities near 1 would tie."
        pos = None if self.pos_label is None else self.number(self.pos_label)
        if scores.ndim == 1:
            yield (y == 0, -scores.numpy()) if pos == 0 else (y == 1, scores.numpy())
            return
        p, wanted = self.probabilities(scores).numpy(), range(self.c) if pos is None else [pos]
        if self.what == CLASSES and self.multi_class == 'ovo':
            for j, k in permutations(wanted, 2):
                either = (y == j) | (y == k)
                yield y[either] == k, p[either, k]
            return
        for k in wanted:
            known = y[:, k] != IGNORED if self.what == LABELS else slice(None)
            yield (y[known, k] == 1 if self.what == LABELS else y == k), p[known, k]


class OfProbabilities(OfClasses):
    """How far probabilities are from what came: lower is better, 0 at best, and the true probabilities are the best answer there is.

    log_loss: the mean of −log p of what came, in nats, as `valid_loss` without weights and smoothing. brier: the mean of Σ(p−y)² over the
    classes, 0 to 2; of two classes, and of a label, (p−y)², 0 to 1; doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2. Labels count one by one.
    `logits`: the outputs are made probabilities (softmax, sigmoid for labels and one output), unless False; default by the loss. Probabilities
    that come as such are taken for at least ε and at most 1−ε of their type, as in scikit-learn."""
    better = 'lower'

    def __init__(self, kind: str, *, logits: bool | None = None, **rest):
        super().__init__(kind, **rest)
        self.logits = logits

    def reset(self):
        super().reset()
        self.total = 0.

    def seen(self, pred, y):
        pred, y = self.told_apart(pred, y)
        kept = y != self.ignored
        return (self._log_loss if self.kind == 'log_loss' else self._brier)(pred, torch.where(kept, y, 0)), kept.long()

    def add(self, values, kept):
        values = values[kept > 0].cpu().double()
        self.total, self.n = self.total + float(values.sum()), self.n + len(values)

    def _log_loss(self, pred, y):
        eps = torch.finfo(pred.dtype).eps
        if self.what == CLASSES:
            logp = pred.log_softmax(-1) if self.of_logits else pred.clamp(eps, 1-eps).log()
            return -logp.gather(-1, y[..., None]).squeeze(-1)
        if self.of_logits: return F.binary_cross_entropy_with_logits(pred, y.to(pred), reduction='none')
        return F.binary_cross_entropy(pred.clamp(eps, 1-eps), y.to(pred), reduction='none')

    def _brier(self, pred, y):
        p = self.probabilities(pred)
        if self.what != CLASSES: return (p-y).square()
        off = p.scatter_add(-1, y[..., None], torch.full_like(y[..., None], -1, dtype=p.dtype)).square().sum(-1)
        return off/2 if self.c == 2 else off

    @property
    def value(self): return self.total/self.n if self.n else math.nan


class CalibrationError(OfClasses):
    """How far confidence is from the share that is right: Σ n_bin/n·|right − confidence| over equal `bins` of confidence, 0 to 1, lower is better.

    The expected calibration error of arXiv:1706.04599: confidence is the probability of the class that is answered, a bin is (a, b]. Of labels:
    the probability of each against how often it is there. `bins` ≥ 1. It is biased: too high and too low within a bin cancel, so that few bins
    hide errors; and chance alone adds about √(2·p(1−p)/(π·n_bin)) to a bin, so that many bins or few samples show errors that are not there: a
    network that is right in 90 % and says so shows .008 for 1,000 samples in one bin, .03 where they spread over 15. Compare values of as many
    samples and bins only. `logits` as for log_loss."""
    better = 'lower'

    def __init__(self, kind: str = 'calibration_error', *, bins: int = 15, logits: bool | None = None, **rest):
        if bins < 1: raise BadValue(f'{kind}: bins must be ≥ 1, got {bins}')
        self.bins = bins
        super().__init__(kind, **rest)
        self.logits = logits

    def reset(self):
        super().reset()
        self.confidence, self.right = np.zeros((2, self.bins))

    def seen(self, pred, y):
        pred, y = self.told_apart(pred, y)
        p, kept = self.probabilities(pred), y != self.ignored
        if self.what == LABELS: return p, y, kept.long()
        p, answer = p.max(-1) if self.what == CLASSES else (torch.maximum(p, 1-p), (p > .5).long())
        return p, (answer == y).long(), kept.long()

    def add(self, p, right, kept):
        p, right = (o[kept > 0].cpu().double() for o in (p, right))
        at = torch.bucketize(p, torch.linspace(0, 1, self.bins+1, dtype=torch.float64)[1:-1])
        self.n += len(p)
        sums = (torch.bincount(at, w, minlength=self.bins).numpy() for w in (p, right))
        self.confidence, self.right = (a+b for a, b in zip((self.confidence, self.right), sums))

    @property
    def value(self): return float(np.abs(self.right-self.confidence).sum()/self.n) if self.n else math.nan
