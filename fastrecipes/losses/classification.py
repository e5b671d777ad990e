"""Losses over classes and labels, and how a cross entropy is told from other losses.

Cross entropy itself is fastai's `CrossEntropyLossFlat`, that of several labels its `BCEWithLogitsLossFlat`; `soft_cross_entropy` is what
mixing, smoothing, class weights and teachers all come down to."""
from dataclasses import dataclass
from functools import partial

import torch
from fastai.losses import BaseLoss, BCEWithLogitsLossFlat, CrossEntropyLossFlat, LabelSmoothingCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from fastrecipes.losses.base import ClassLoss, LabelLoss, check_settings, soft_targets, wide

__all__ = ['BCEWithLogitsLossFlat', 'BinaryHingeLoss', 'CrossEntropy', 'CrossEntropyLossFlat', 'HingeLoss',
           'LabelSmoothingCrossEntropy', 'NLLLossFlat', 'OneVsAllLoss', 'SigmoidFocalLoss', 'SoftmaxFocalLoss', 'classes_of', 'cross_entropy_of', 'soft_cross_entropy', 'soft_targets']


@dataclass(frozen=True)
class CrossEntropy:
    "What a cross-entropy loss, however it is spelt, was told: all that is needed to compute it against soft targets."
    weight: Tensor | None = None
    smoothing: float = 0.
    ignore_index: int = -100
    reduction: str = 'mean'
    axis: int = 1

    def soft(self, logits, target, weight=None, smoothing=0., reduction='mean'):
        return soft_cross_entropy(logits, target, weight, smoothing, reduction)


def cross_entropy_of(loss_func) -> CrossEntropy | None:
    """The settings of `loss_func` if it is fastai's or torch's cross entropy; None for any other loss.

    So is a negative log-likelihood: the softmax of log-probabilities is the probabilities."""
    axis, f = (loss_func.axis, loss_func.func) if isinstance(loss_func, BaseLoss) else (1, loss_func)
    if isinstance(f, nn.CrossEntropyLoss): return CrossEntropy(f.weight, f.label_smoothing, f.ignore_index, f.reduction, axis)
    if isinstance(f, nn.NLLLoss): return CrossEntropy(f.weight, 0., f.ignore_index, f.reduction, axis)
    if isinstance(f, LabelSmoothingCrossEntropy): return CrossEntropy(f.weight, f.eps, reduction=f.reduction, axis=axis)
    kw = {}
    if isinstance(f, partial) and not f.args: f, kw = f.func, f.keywords
    if f in (F.cross_entropy, F.nll_loss):
        return CrossEntropy(kw.get('weight'), kw.get('label_smoothing', 0.), kw.get('ignore_index', -100), kw.get('reduction', 'mean'))
    return None


def classes_of(loss_func) -> CrossEntropy | ClassLoss | None:
    "`loss_func` as a loss over classes: weight, ignore_index, reduction, axis, and `soft`, as of `ClassLoss`; None where it is none of those known."
    return loss_func if isinstance(loss_func, ClassLoss) and not loss_func.multi_label else cross_entropy_of(loss_func)


def soft_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None, smoothing: float = 0., reduction: str = 'mean',
                       gamma: float = 0.) -> Tensor:
    """Cross entropy of `logits` `(n, c)` against probabilities `target` `(n, c)`; lower is better, 0 at best without smoothing.

    `weight` `(c,)` weighs each class' share of a target, and the mean is Σwl/Σw: for one-hot targets the value of
    `torch.nn.functional.cross_entropy(weight=…, label_smoothing=…)`. `smoothing` in [0, 1]. Rows of zeros are left out.
    `gamma` ≥ 0: the focal loss, −Σ w·t·(1−p)^gamma·log p. `reduction`: 'mean', 'sum' or 'none' `(n,)`. Computed in float32 at least."""
    logp = F.log_softmax(wide(logits), -1)
    target = target.to(logp.dtype)
    w = torch.ones_like(logp[0]) if weight is None else weight.to(logp)
    smoothed = (1-smoothing)*target + smoothing*target.sum(-1, keepdim=True)/target.shape[-1]
    if gamma: smoothed = smoothed*(-torch.expm1(logp)).clamp_min(torch.finfo(logp.dtype).tiny)**gamma       # 1−p; a root has no derivative at 0
    return _reduced(-(w*smoothed*logp).sum(-1), (w*target).sum(-1), reduction)


def _reduced(loss, w, reduction): return loss if reduction == 'none' else loss.sum() if reduction == 'sum' else loss.sum()/w.sum()


class NLLLossFlat(BaseLoss):
    "torch's `nn.NLLLoss` of log-probabilities with classes along `axis`: 0 at best, lower is better; arguments as its own."
    y_int = True
    def __init__(self, *args, axis: int = -1, **kwargs): super().__init__(nn.NLLLoss, *args, axis=axis, **kwargs)
    def activation(self, x): return x.exp()
    def decodes(self, x): return x.argmax(self.axis)


class SoftmaxFocalLoss(ClassLoss):
    """Focal loss of one class a sample or pixel: −Σ w·t·(1−p)^gamma·log p over classes, p the softmax of `pred`; ≥ 0, lower is better.

    `gamma` ≥ 0: samples that are right already count the less the larger it is; 0 is cross entropy, the paper's 2 the default. `pred`
    `(n, c, …)`, `target` `(n, …)` class numbers, or t itself, probabilities shaped as `pred`. `weight` `(c,)` is the paper's α, and the mean
    is divided by Σwt, as a weighted cross entropy's is (fastai's `FocalLossFlat` focuses by p^w and divides by n). `reduction`: 'mean',
    'sum', 'none'. arXiv:1708.02002"""
    def __init__(self, gamma: float = 2., weight=None, ignore_index: int = -100, reduction: str = 'mean', axis: int = 1):
        super().__init__(weight, ignore_index, reduction, axis)
        check_settings('SoftmaxFocalLoss', gamma=gamma)
        self.gamma = gamma

    def soft(self, logits, target, weight=None, smoothing=0., reduction='mean'):
        return soft_cross_entropy(logits, target, weight, smoothing, reduction, self.gamma)


class SigmoidFocalLoss(LabelLoss):
    """Focal loss of labels that are there or not: −α·t·(1−p)^gamma·log p − (1−α)·(1−t)·p^gamma·log(1−p), p the sigmoid of `pred`; ≥ 0, lower is better.

    `gamma` ≥ 0, 0 is binary cross entropy. `alpha` in [0, 1] weighs what is there against what is not (the paper's .25), None neither. `target`
    in [0, 1]; for 0 and 1 the value of `torchvision.ops.sigmoid_focal_loss`, whose gradient is no number at saturated logits for gamma < 1.
    `reduction`: 'mean', 'sum', 'none'. arXiv:1708.02002"""
    def __init__(self, gamma: float = 2., alpha: float | None = None, reduction: str = 'mean'):
        super().__init__(reduction)
        check_settings('SigmoidFocalLoss', gamma=gamma, alpha=alpha)
        self.gamma, self.alpha = gamma, alpha

    def each(self, z, t):
        logp, logq = F.logsigmoid(z), F.logsigmoid(-z)
        a, b = (1., 1.) if self.alpha is None else (self.alpha, 1-self.alpha)
        return -a*t*(self.gamma*logq).exp()*logp - b*(1-t)*(self.gamma*logp).exp()*logq


class OneVsAllLoss(ClassLoss):
    """Binary cross entropy of each class against the rest, the mean over the classes of a sample: ≥ 0, lower is better.

    `pred` `(n, c, …)`, `target` `(n, …)` class numbers, or probabilities shaped as `pred`. What is answered are sigmoids, which need not sum
    to 1. `weight` `(c,)` weighs samples by their class, and the mean is Σwl/Σw. `reduction`: 'mean', 'sum', 'none'. arXiv:2110.00476"""
    def soft(self, logits, target, weight=None, smoothing=0., reduction='mean'):
        kept = target.sum(-1)
        w = kept if weight is None else (target*weight.to(target)).sum(-1)
        t = (1-smoothing)*target + smoothing*kept.unsqueeze(-1)/target.shape[-1]
        return _reduced(w*F.binary_cross_entropy_with_logits(logits, t, reduction='none').mean(-1), w, reduction)

    def activation(self, x): return torch.sigmoid(x)


class HingeLoss(ClassLoss):
    """Multi-class hinge: Σ max(0, margin − pred[y] + pred[j]) / c over the classes j other than the right one, y; ≥ 0, lower is better.

    Computed by torch's `multi_margin_loss`; scores are not probabilities, and their softmax is no more than a ranking. `margin` > 0. `pred`
    `(n, c, …)`, `target` `(n, …)` class numbers, or probabilities, which take each class' loss in their proportion. `weight` `(c,)` weighs
    samples by their class, and the mean is Σwl/Σw (torch's own divides by n). `reduction`: 'mean', 'sum', 'none'. Weston and Watkins' form"""
    def __init__(self, margin: float = 1., weight=None, ignore_index: int = -100, reduction: str = 'mean', axis: int = 1):
        super().__init__(weight, ignore_index, reduction, axis)
        check_settings('HingeLoss', margin=margin)
        self.margin = margin

    def soft(self, logits, target, weight=None, smoothing=0., reduction='mean'):
        assert not smoothing, 'refused before'
        w = target if weight is None else target*weight.to(target)
        i, y = target.nonzero(as_tuple=True)                    # mostly one class a sample, two where they are mixed
        if not len(i): return _reduced(logits.sum(-1)*0, w.sum(-1), reduction)
        each = w[i, y]*F.multi_margin_loss(logits[i], y, margin=self.margin, reduction='none')
        return _reduced(logits.new_zeros(len(logits)).index_add(0, i, each), w.sum(-1), reduction)


class BinaryHingeLoss(LabelLoss):
    """The hinge of labels z = `pred`: max(0, margin − z) where the label is there, max(0, margin + z) where not; ≥ 0, lower is better.

    `target` in [0, 1]: what lies between takes both in its proportion. `margin` > 0. A label is predicted where z > 0. `reduction`: 'mean',
    'sum', 'none'."""
    def __init__(self, margin: float = 1., reduction: str = 'mean'):
        super().__init__(reduction)
        check_settings('BinaryHingeLoss', margin=margin)
        self.margin = margin

    def each(self, z, t): return t*F.relu(self.margin-z) + (1-t)*F.relu(self.margin+z)
