"What the losses have in common: outputs in 32 bits at least, targets as probabilities, weights that move with the network."
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrecipes.errors import BadValue, nearest

__all__ = ['ClassLoss', 'LabelLoss', 'Loss', 'NumberLoss', 'soft_targets']

# setting → whether a value is in its domain, the domain in words
DOMAINS = dict(gamma=(lambda v: 0 <= v < math.inf, '≥ 0 and finite'), alpha=(lambda v: 0 <= v <= 1, 'in [0, 1]'),
               eps=(lambda v: 0 <= v < 1, 'in [0, 1)'), margin=(lambda v: 0 < v < math.inf, '> 0 and finite'),
               smooth=(lambda v: 0 < v < math.inf, '> 0 and finite'), floor=(lambda v: 0 < v < math.inf, '> 0 and finite'))


def check_settings(who: str, **settings):
    "Raise `BadValue`, in the name of `who`, for a setting outside its domain; None is none."
    for name, v in settings.items():
        fine, domain = DOMAINS[name]
        if v is not None and not fine(v): raise BadValue(f'{who}: {name} must be {domain}, got {v}')


def soft_targets(target: Tensor, n_classes: int, ignore_index: int = -100) -> Tensor:
    "Class indices `(n,)` as probabilities `(n, c)`; a row of zeros where the target is `ignore_index`."
    kept = target != ignore_index
    return F.one_hot(torch.where(kept, target, 0), n_classes)*kept.unsqueeze(-1)


def wide(x: Tensor) -> Tensor:
    "A plain tensor in float32, or float64 where it was."
    x = x.as_subclass(Tensor) if isinstance(x, Tensor) else x
    return x if x.dtype == torch.float64 else x.float()


def by_class(pred: Tensor, target: Tensor, axis: int = 1, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    "Outputs and targets, class numbers or probabilities along `axis`, as logits and probabilities `(n, …, c)`; zeros where a target is ignored."
    logits, target = wide(pred).movedim(axis, -1), target.as_subclass(Tensor)
    if target.is_floating_point(): return logits, target.movedim(axis, -1).to(logits)
    return logits, soft_targets(target.reshape(logits.shape[:-1]).long(), logits.shape[-1], ignore_index).to(logits)


def alike(who: str, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    "Outputs, and targets in their shape; raises, in the name of `who`, for another number of them (torch would spread them out)."
    pred, target = wide(pred), target.as_subclass(Tensor)
    if pred.numel() != target.numel():
        raise BadValue(f'{who}: outputs and targets must be as many, got {tuple(pred.shape)} and {tuple(target.shape)}')
    return pred, target.reshape(pred.shape).to(pred)


def _reduced(loss: Tensor, reduction: str) -> Tensor: return loss if reduction == 'none' else loss.sum() if reduction == 'sum' else loss.mean()


class Loss(nn.Module):
    "A loss of one of the `reductions`, lower is better; raises `ValueError` for another."
    reductions = ('mean', 'sum', 'none')

    def __init__(self, reduction: str = 'mean'):
        super().__init__()
        if reduction not in self.reductions:
            allowed = ', '.join(self.reductions)
            raise BadValue(f'{type(self).__name__}: reduction must be one of {allowed}, got {reduction!r}{nearest(reduction, self.reductions)}')
        self.reduction = reduction


class ClassLoss(Loss):
    """A loss over classes along `axis`: `pred` `(n, c, …)` holds logits, `target` `(n, …)` class numbers, or probabilities shaped as `pred`.

    `weight` `(c,)` weighs classes, is a buffer, and the mean is Σwl/Σw; targets of `ignore_index` are left out. A subclass computes `soft`:
    the loss of logits against probabilities, both `(m, c)`, rows of zeros left out."""
    y_int = True                                # fastai's MixUp may take the loss of either target
    multi_label = False

    def __init__(self, weight=None, ignore_index: int = -100, reduction: str = 'mean', axis: int = 1):
        super().__init__(reduction)
        self.ignore_index, self.axis = ignore_index, axis
        self.register_buffer('weight', None if weight is None else torch.as_tensor(weight, dtype=torch.float32))

    def soft(self, logits: Tensor, target: Tensor, weight: Tensor | None = None, smoothing: float = 0., reduction: str = 'mean') -> Tensor:
        raise NotImplementedError

    def forward(self, pred, target):
        logits, soft = by_class(pred, target, self.axis, self.ignore_index)
        loss = self.soft(logits.flatten(0, -2), soft.flatten(0, -2), self.weight, reduction=self.reduction)
        return loss.view(logits.shape[:-1]) if self.reduction == 'none' else loss

    def activation(self, x): return F.softmax(x, self.axis)
    def decodes(self, x): return x.argmax(self.axis)


class LabelLoss(Loss):
    """A loss over labels that are there or not, each by itself: `pred` holds logits of any shape, `target` numbers from 0 to 1 in that shape.

    The mean is that over all labels of all samples. A subclass computes `each`, the loss of every label."""

    def each(self, z: Tensor, t: Tensor) -> Tensor: raise NotImplementedError
    def forward(self, pred, target): return _reduced(self.each(*alike(type(self).__name__, pred, target)), self.reduction)
    def activation(self, x): return torch.sigmoid(x)
    def decodes(self, x): return x > .5


class NumberLoss(Loss):
    "A loss over numbers: `pred` of any shape, `target` in that shape, the mean that over all. A subclass computes `each`, the loss of every number."
    def each(self, pred: Tensor, target: Tensor) -> Tensor: raise NotImplementedError
    def forward(self, pred, target): return _reduced(self.each(*alike(type(self).__name__, pred, target)), self.reduction)
