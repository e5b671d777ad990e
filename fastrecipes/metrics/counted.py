"Metrics of counts: hits, false alarms and misses of each class say all."
import math
from typing import Literal

import numpy as np
import torch
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from fastrecipes.errors import BadValue
from fastrecipes.metrics.base import CLASSES, LABELS, OfClasses

__all__ = ['Counted', 'Accuracy', 'BalancedAccuracy', 'Overlap', 'OVERLAPS']

OVERLAPS = dict(precision=precision_score, recall=recall_score, f1=f1_score, dice=f1_score, iou=jaccard_score)


class Counted(OfClasses):
    """A `Judge` that counts, for each class, hits, false alarms and misses `(c,)`: of pixels by the million it keeps 3·c numbers.

    `thresh` in (0, 1): a probability above it is a yes, for labels and for one output of two classes."""
    def __init__(self, kind: str, *, thresh: float = .5, **rest):
        if not 0 < thresh < 1: raise BadValue(f'{kind}: thresh must be in (0, 1), got {thresh}')
        self.thresh = thresh
        super().__init__(kind, **rest)

    def reset(self):
        super().reset()
        self.hits = self.alarms = self.misses = self.known = self.right = 0

    def seen(self, pred, y):
        pred, y = self.told_apart(pred, y)
        return pred.argmax(-1) if self.what == CLASSES else (self.probabilities(pred) > self.thresh).long(), y

    def add(self, guess, y):
        kept = y != self.ignored
        if self.what == LABELS:
            guess, y, kept = (o.flatten(0, -2) for o in (guess, y, kept))
            self.n, self.right = self.n + len(y), self.right + int(((guess == y) | ~kept).all(1).sum())
            counts = [(kept & o).sum(0) for o in ((guess == 1) & (y == 1), (guess == 1) & (y == 0), (guess == 0) & (y == 1), kept)]
        else:
            guess, y = guess[kept], y[kept]
            right = guess == y
            self.n, self.right = self.n + len(y), self.right + int(right.sum())
            counts = [torch.bincount(o, minlength=self.c) for o in (y[right], guess[~right], y[~right], y)]
        before = self.hits, self.alarms, self.misses, self.known
        self.hits, self.alarms, self.misses, self.known = (a + b.cpu().numpy() for a, b in zip(before, counts))


class Accuracy(Counted):
    """The share that is right, of samples, pixels or labels: 0 to 1, higher is better; not a number where nothing is judged.

    Of several labels each counts for itself; `subset`: a sample is right when all of its labels are."""
    def __init__(self, kind: str = 'accuracy', *, subset: bool = False, **rest):
        self.subset = subset
        super().__init__(kind, **rest)

    @property
    def value(self):
        if not self.n: return math.nan
        if self.what != LABELS or self.subset: return self.right/self.n
        return 1 - float((self.alarms+self.misses).sum()/self.known.sum()) if self.known.any() else math.nan


class BalancedAccuracy(Counted):
    """The mean over the classes of the share of each that is found: 0 to 1, 1/c for one answer to everything, higher is better.

    Classes without samples have no say. Of labels: the mean over both sides of each, and over the labels. doi:10.1109/ICPR.2010.764"""
    @property
    def value(self):
        if not self.n: return math.nan
        there = self.hits+self.misses
        rows = zip([self.hits], [there])
        if self.what == LABELS: rows = zip(np.stack([self.hits, self.known-there-self.alarms], 1), np.stack([there, self.known-there], 1))
        shares = [f[t > 0]/t[t > 0] for f, t in rows if t.any()]
        return float(np.mean([s.mean() for s in shares])) if shares else math.nan


class Overlap(Counted):
    """What is answered against what is there, for a class: 0 to 1, higher is better. TP: both; FP: answered only; FN: there only.

    precision TP/(TP+FP) · recall TP/(TP+FN) · f1 and dice 2TP/(2TP+FP+FN) · iou TP/(TP+FP+FN), of counts over the whole set: dice is no mean
    over images. scikit-learn computes them from the counts. `average`: 'auto', the second of two classes alone, else 'macro'; 'macro', the
    mean over the classes that are there or answered (of labels, over all); 'micro', of all counts together; 'weighted', by how often each is
    there. `pos_label`: one class alone, a number or a word of the vocabulary. `labels`: the classes to average over, to leave out a background.
    `zero_division`: what 0/0 is: 0, 1, or nan, which leaves the class out. The name tells average and class: f1, f1_macro, f1_diseased."""
    def __init__(self, kind: str, *, average: Literal['auto', 'macro', 'micro', 'weighted'] = 'auto', pos_label: int | str | None = None,
                 labels: list | None = None, zero_division: float = 0., **rest):
        self.average, self.pos_label, self.labels, self.zero_division = average, pos_label, labels, float(zero_division)
        super().__init__(kind, **rest)
        self.one_of('average', average, ('auto', 'macro', 'micro', 'weighted'))
        self.alone(pos_label, average=None if average == 'auto' else average, labels=labels)
        if zero_division not in (0, 1) and not math.isnan(zero_division):
            raise BadValue(f'{kind}: zero_division must be 0, 1 or nan, got {zero_division}')
        if labels is not None and not len(labels): raise BadValue(f'{kind}: labels must name at least one class, got {labels}')

    def seen(self, pred, y):
        found = super().seen(pred, y)
        self.asked()
        return found

    def asked(self) -> list[int]:
        "The classes that were asked for by name or number, or none."
        return [self.number(k) for k in (self.labels if self.labels is not None else [] if self.pos_label is None else [self.pos_label])]

    @property
    def value(self):
        if not self.n: return math.nan
        union, every = self.hits+self.alarms+self.misses, np.arange(self.c)
        second = self.average == 'auto' and self.c == 2 and self.what != LABELS
        of = self.asked() or ([1] if second else every if self.what == LABELS else every[union > 0])
        zero = self.zero_division
        if self.kind == 'iou' and math.isnan(zero): of, zero = [k for k in of if union[k]], 0.         # scikit-learn's does not take nan
        if not len(of): return math.nan
        other = np.full(self.c, -1)             # for one class, all the others
        there, answered = np.concatenate([every, every, other]), np.concatenate([every, other, every])
        return float(OVERLAPS[self.kind](there, answered, sample_weight=np.concatenate([self.hits, self.misses, self.alarms]).astype(float),
                                         labels=list(of), average='macro' if self.average == 'auto' else self.average, zero_division=zero))
