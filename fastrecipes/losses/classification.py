"Cross entropy against probabilities: what mixing, smoothing, class weights and teachers all come down to; and how it is told from other losses."
from dataclasses import dataclass
from functools import partial

import torch
from fastai.losses import BaseLoss, LabelSmoothingCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ['CrossEntropy', 'cross_entropy_of', 'soft_cross_entropy', 'soft_targets']


@dataclass(frozen=True)
class CrossEntropy:
    "What a cross-entropy loss, however it is spelt, was told: all that is needed to compute it against soft targets."
    weight: Tensor | None = None
    smoothing: float = 0.
    ignore_index: int = -100
    reduction: str = 'mean'
    axis: int = 1


def cross_entropy_of(loss_func) -> CrossEntropy | None:
    "The settings of `loss_func` if it is fastai's or torch's cross entropy; None for any other loss."
    axis, f = (loss_func.axis, loss_func.func) if isinstance(loss_func, BaseLoss) else (1, loss_func)
    if isinstance(f, nn.CrossEntropyLoss): return CrossEntropy(f.weight, f.label_smoothing, f.ignore_index, f.reduction, axis)
    if isinstance(f, LabelSmoothingCrossEntropy): return CrossEntropy(f.weight, f.eps, reduction=f.reduction, axis=axis)
    kw = {}
    if isinstance(f, partial) and not f.args: f, kw = f.func, f.keywords
    if f is F.cross_entropy:
        return CrossEntropy(kw.get('weight'), kw.get('label_smoothing', 0.), kw.get('ignore_index', -100), kw.get('reduction', 'mean'))
    return None


def soft_targets(target: Tensor, n_classes: int, ignore_index: int = -100) -> Tensor:
    "Class indices `(n,)` as probabilities `(n, c)`; a row of zeros where the target is `ignore_index`."
    kept = target != ignore_index
    return F.one_hot(torch.where(kept, target, 0), n_classes)*kept.unsqueeze(-1)


def soft_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None, smoothing: float = 0., reduction: str = 'mean') -> Tensor:
    """Cross entropy of `logits` `(n, c)` against probabilities `target` `(n, c)`; lower is better, 0 at best without smoothing.

    `weight` `(c,)` weighs each class' share of a target, and the mean is Σwl/Σw: for one-hot targets the value of
    `torch.nn.functional.cross_entropy(weight=…, label_smoothing=…)`. `smoothing` in [0, 1]. Rows of zeros are left out.
    `reduction`: 'mean', 'sum' or 'none' `(n,)`. Computed in float32 at least."""
    logp = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    target = target.to(logp.dtype)
    w = torch.ones_like(logp[0]) if weight is None else weight.to(logp)
    smoothed = (1-smoothing)*target + smoothing*target.sum(-1, keepdim=True)/target.shape[-1]
    loss = -(w*smoothed*logp).sum(-1)
    return loss if reduction == 'none' else loss.sum() if reduction == 'sum' else loss.sum()/(w*target).sum()
