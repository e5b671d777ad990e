"""Metrics by name, exact over the whole set whatever the batch size: of counts or sums where they say all, of kept scores where nothing less will do.

fastai's own (`accuracy`, `mae`, `F1Score`, …) keep their names and what they do; those of the same name here also take masks with pixels to be
skipped, labels, one output for two classes, and classes that do not occur."""
import inspect
import math
from copy import copy
from itertools import permutations
from numbers import Integral
from typing import Literal

import numpy as np
import torch
from fastai.basics import L, Metric
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score, roc_auc_score
from torch import nn
from torch.nn import functional as F

from fastrecipes.arguments import check_names, check_types
from fastrecipes.errors import BadName, BadValue, few, nearest
from fastrecipes.files import writes
from fastrecipes.losses.classification import cross_entropy_of

__all__ = ['METRICS', 'metric']

IGNORED = -100                                  # torch's own; never the number of a class
ONE, CLASSES, LABELS = 'one output', 'classes', 'labels'
OVERLAPS = dict(precision=precision_score, recall=recall_score, f1=f1_score, dice=f1_score, iou=jaccard_score)
ERRORS = dict(mbe=lambda e, y: e, mae=lambda e, y: e.abs(), mse=lambda e, y: e.square(), rmse=lambda e, y: e.square(),
              mape=lambda e, y: (e/y).abs(), mspe=lambda e, y: (e/y).square(), rmspe=lambda e, y: (e/y).square())


class Judge(Metric):
    """What the metrics here share: a name, an orientation, and two steps: `seen`, a batch sample by sample, and `add`, what is kept of it.

    `better`: 'higher', 'lower' or 'nearer 0', which `early_stop` goes by. `m(preds, targs)` judges tensors by themselves, without a Learner."""
    better, transient = 'higher', ('kept',)

    def __init__(self, kind: str, *, name: str | None = None):
        self.kind, self._name, self.vocab, self.told = kind, name or kind, (), []
        self.default = dict(ignore_index=IGNORED, logits=True)          # until a loss is known
        self.reset()

    @property
    def name(self): return self._name

    def reset(self): self.n, self.kept = 0, []

    def accumulate(self, learn):
        "Take in a batch; of fastai's own distributed training each process holds a part."
        self.add(*learn.to_detach(self.look(learn, learn.pred, learn.yb), cpu=False))

    def look(self, learn, pred, yb) -> tuple:
        "What is `seen` of a batch of `learn`. Raises `ValueError` for outputs, targets or names of classes that it cannot judge."
        f, ce = getattr(learn.loss_func, 'func', learn.loss_func), cross_entropy_of(learn.loss_func)
        self.vocab = _vocabulary(learn.dls)
        self.default = dict(ignore_index=ce.ignore_index if ce else getattr(f, 'ignore_index', IGNORED),
                            logits=not (isinstance(f, nn.BCELoss) or f is F.binary_cross_entropy))
        return self.arrange(pred, *yb)

    def arrange(self, pred, *targets):
        "`seen`, of one tensor of outputs and one of targets; of anything else it says so."
        if len(targets) != 1 or not all(isinstance(o, torch.Tensor) for o in (pred, *targets)):
            got = ', '.join(type(o).__name__ for o in (pred, *targets))
            raise BadValue(f'{self.name}: judges one tensor of outputs by one of targets, got {got}; write a metric that picks one, and calls this')
        pred, y = (o.detach().as_subclass(torch.Tensor) for o in (pred, *targets))
        return self.seen(pred.float() if pred.dtype in (torch.float16, torch.bfloat16) else pred, y)

    def __call__(self, preds, targs):
        own = copy(self)
        own.reset()
        own.add(*own.arrange(preds, targs))
        return own.value

    def __getstate__(self): return {**vars(self), 'kept': []}           # an exported Learner has no use for validation's predictions

    def nothing(self, why: str) -> float:
        "Not a number, and why, said once."
        if why not in self.told and writes(): print(f'{self.name}: {why}; it is not a number')
        self.told = [*self.told, why]
        return math.nan


def _vocabulary(dls) -> tuple:
    "The words for classes that the data know, or none; those of masks are with the transform that adds them."
    vocab = getattr(dls, 'vocab', None)
    if vocab is None: vocab = getattr(getattr(getattr(dls, 'train', None), 'after_item', None), 'vocab', None)
    vocab = () if vocab is None else tuple(vocab)
    return tuple(vocab[-1]) if vocab and isinstance(vocab[-1], (list, tuple, L)) else vocab         # texts have a vocabulary of words too


class OfClasses(Judge):
    """A `Judge` of classes, labels or masks, which tells them apart by their shapes. What it takes is common to all of them.

    `axis`: that of the classes in the outputs, found from the shapes (the first that fits) unless given. `ignore_index`: targets that are left
    out; those that the loss ignores unless given. `name`: in the history and for `monitor`."""
    def __init__(self, kind: str, *, axis: int | None = None, ignore_index: int | None = None, **rest):
        self.axis, self.ignore_index, self.logits = axis, ignore_index, None
        super().__init__(kind, **rest)

    @property
    def ignored(self) -> int: return self.default['ignore_index'] if self.ignore_index is None else self.ignore_index

    @property
    def of_logits(self) -> bool: return self.default['logits'] if self.logits is None else self.logits

    def probabilities(self, pred):
        "Of outputs `(n, …, c)`, or `(n, …)`."
        return pred if not self.of_logits else pred.softmax(-1) if self.what == CLASSES else pred.sigmoid()

    def told_apart(self, pred, y) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs, classes last, `(n, …, c)`, or `(n, …)` for one output a sample or pixel; and the targets. Sets `what` they are, and `c`.

        CLASSES: numbers `(n, …)`. LABELS: 0 or 1, shaped as the outputs. ONE: 0 or 1, `(n, …)`, of two classes."""
        shapes = f'outputs {tuple(pred.shape)}, targets {tuple(y.shape)}'
        one = pred.ndim == 1 or (pred.shape[1] == 1 and self.axis in (None, 1))
        if y.ndim == pred.ndim > 1 and y.shape[1] == 1: y = y.squeeze(1)
        if one and pred.ndim > 1: pred = pred.squeeze(1)
        kept = y[y != self.ignored]
        if pred.shape == y.shape:
            odd = kept[(kept != 0) & (kept != 1)]
            if odd.numel():
                raise BadValue(f'{self.name}: targets shaped as the outputs must be 0 or 1, got {float(odd[0]):g} ({shapes}); '
                               f'numbers are judged by {", ".join(ERRORS)}')
            self.what, self.c = (ONE, 2) if one else (LABELS, pred.shape[self.axis or 1])
            return (pred, y.long()) if one else (pred.movedim(self.axis or 1, -1), y.movedim(self.axis or 1, -1).long())
        fit = [a for a in range(1, pred.ndim) if pred.shape[:a] + pred.shape[a+1:] == y.shape and self.axis in (None, a, a-pred.ndim)]
        if not fit:
            raise BadValue(f'{self.name}: {shapes} do not go together{"" if self.axis is None else f" with axis={self.axis}"}; '
                           'targets are class numbers (n, …) for outputs (n, c, …), or 0 and 1 shaped as the outputs')
        self.what, self.c = CLASSES, pred.shape[fit[0]]
        wrong = kept[(kept < 0) | (kept >= self.c) | (kept != kept.floor())]
        if wrong.numel():
            raise BadValue(f'{self.name}: targets must be classes 0 to {self.c-1}, got {float(wrong[0]):g} ({shapes}); '
                           f'number them from 0, or name one to be skipped: ignore_index={float(wrong[0]):g}')
        return pred.movedim(fit[0], -1), y.long()

    def number(self, label) -> int:
        "The number of a class, which may be given as a word of the vocabulary."
        k = self.vocab.index(label) if label in self.vocab else label
        if isinstance(k, Integral) and 0 <= k < self.c: return int(k)
        known = few([repr(v) for v in self.vocab], 12) if self.vocab else f'numbers, 0 to {self.c-1}, where no vocabulary is known'
        raise BadValue(f'{self.name}: the classes are {known}; got {label!r}{nearest(label, self.vocab)}')

    def one_of(self, argument: str, value, choices):
        if value in choices: return
        raise BadValue(f"{self.kind}: {argument} must be one of {', '.join(choices)}, got {value!r}{nearest(value, choices)}")

    def alone(self, pos_label, **others):
        "Raise where one class is asked for and an average over classes too; the name tells what was asked."
        if pos_label is not None and (given := [n for n, v in others.items() if v is not None]):
            raise BadValue(f'{self.kind}: pos_label={pos_label!r} is one class alone, and leaves nothing for {" and ".join(given)}; give one of them')
        asked = [str(v) for v in (*others.values(), pos_label) if isinstance(v, (str, int))]
        if self._name == self.kind: self._name = '_'.join([self.kind, *asked])


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


class OfNumbers(Judge):
    """Errors of numbers, e = truth − prediction, over all numbers of all samples: lower is better, 0 at best; mbe: the nearer 0.

    mbe mean e, above 0 where predictions are too low · mae mean |e| · mse mean e² · rmse √mse, in the unit of the targets or its square;
    mape mean |e/y| · mspe mean (e/y)² · rmspe √mspe, as shares: .1 is 10 %. `floor` > 0: targets nearer 0 are taken for it, as in the losses of these
    names, for of 0 there is no share; where there are many of them the value says little, and mae more."""
    def __init__(self, kind: str, *, floor: float = 1e-6, **rest):
        if not 0 < floor < math.inf: raise BadValue(f'{kind}: floor must be > 0 and finite, got {floor}')
        self.floor, self.better = floor, 'nearer 0' if kind == 'mbe' else 'lower'
        super().__init__(kind, **rest)

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


METRICS = dict(accuracy=Accuracy, balanced_accuracy=BalancedAccuracy, **dict.fromkeys(OVERLAPS, Overlap), roc_auc=RocAuc,
               **dict.fromkeys(('log_loss', 'brier'), OfProbabilities), calibration_error=CalibrationError, **dict.fromkeys(ERRORS, OfNumbers))


def metric(name: str, /, **settings) -> Metric:
    """The metric `name`, to be reported after each epoch: `Learner(…, metrics=[metric('f1', pos_label='diseased'), metric('roc_auc')])`.

    accuracy, balanced_accuracy, precision, recall, f1, dice, iou, roc_auc, log_loss, brier, calibration_error; of numbers mbe, mae, mse, rmse,
    mape, mspe, rmspe. `METRICS[name].__doc__` has formula, range, which way is better, and settings. All take `name`, that of the column and for
    `monitor`; those of classes `axis`, where the classes lie in the outputs (found by the shapes), and `ignore_index`, targets to be left out
    (those that the loss ignores); those that count `thresh`, .5: a probability above it is a yes, for labels and one output. Each is exact over
    the validation set whatever the batch size, and over the processes of `to_distributed`; `early_stop(name)` knows which way is better.
    They take outputs `(n, c)` with class numbers `(n,)`, `(n, c, h, w)` with masks `(n, h, w)`, `(n, c)` with labels `(n, c)` of 0 and 1, and
    `(n, 1)` for two classes.
    Raises `TypeError` for an unknown name or setting, `ValueError` for a value outside its range and, before the first batch or at the first
    that is validated, for targets or classes that it cannot judge."""
    if name not in METRICS: raise BadName(f'metric: no metric named {name!r}{nearest(name, METRICS) or "."} There are {", ".join(METRICS)}')
    makes = [c.__init__ for c in METRICS[name].mro() if issubclass(c, Judge) and '__init__' in vars(c)]
    check_names(name, settings, [n for f in makes for n, p in inspect.signature(f).parameters.items() if p.kind is p.KEYWORD_ONLY])
    for f in makes: check_types(f, settings, name)
    return METRICS[name](name, **settings)
