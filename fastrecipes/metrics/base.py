"What the metrics share: batches taken in sample by sample, and classes, labels and masks told apart by their shapes."
import math
from copy import copy
from numbers import Integral

import torch
from fastai.basics import L, Metric
from torch import nn
from torch.nn import functional as F

from fastrecipes.errors import BadValue, few, nearest
from fastrecipes.files import writes
from fastrecipes.losses.classification import cross_entropy_of

__all__ = ['Judge', 'OfClasses', 'CLASSES', 'LABELS', 'IGNORED']

IGNORED = -100                                  # torch's own; never the number of a class
ONE, CLASSES, LABELS = 'one output', 'classes', 'labels'


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
    def of_logits(self) -> bool: return bool(self.default['logits'] if self.logits is None else self.logits)

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
                               'numbers are judged by mae, rmse and the like')
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
