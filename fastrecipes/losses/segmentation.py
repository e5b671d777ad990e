"""Losses of how far two sets overlap. Pixel-wise cross entropy is fastai's `CrossEntropyLossFlat(axis=1)`.

fastai's `DiceLoss` adds up over images and classes, so that its scale is that of the batch; here are means over classes, of all pixels together."""
import torch
from torch import Tensor
from torch.nn import functional as F

from fastrecipes.losses.base import ClassLoss, alike, by_class, check_settings
from fastrecipes.losses.whole_set import OverSet

__all__ = ['IoULoss', 'SoftDiceLoss', 'SoftF1Loss']


class _Overlap(OverSet, ClassLoss):
    "1 − the mean over classes of a score of TP, FP and FN, which probabilities and targets p and t give: TP = Σpt, FP = Σp(1−t), FN = Σ(1−p)t."
    def __init__(self, smooth: float = 1e-6, multi_label: bool = False, weight=None, ignore_index: int = -100, reduction: str = 'mean',
                 axis: int = 1):
        ClassLoss.__init__(self, weight, ignore_index, reduction, axis)
        check_settings(type(self).__name__, smooth=smooth)
        self.smooth, self.multi_label = smooth, multi_label

    def score(self, tp, fp, fn): raise NotImplementedError

    def sums(self, pred, target, each=False):
        "Σpt, Σp and Σt of each class, `(3, c)`, or of each sample `(n, 3, c)`; what is ignored has no part in any."
        if self.multi_label:
            z, t = (x.movedim(self.axis, -1) for x in alike(type(self).__name__, pred, target))
            kept = t != self.ignore_index
            sums = _sums(z.sigmoid()*kept, t*kept)
        else: sums = _sums_of_classes(*by_class(pred, target, self.axis, self.ignore_index))
        return sums if each else sums.sum(0)

    def of(self, sums: Tensor): return self._of(sums, self.weight)

    def _of(self, sums, weight):
        both, p, t = sums.unbind(-2)
        score = self.score(both, p-both, t-both)
        w = torch.ones_like(score[..., :1]) if weight is None else weight.to(score)
        return 1 - (score*w).sum(-1)/w.expand_as(score).sum(-1)

    def soft(self, logits, target, weight=None, smoothing=0., reduction='mean'):
        assert not smoothing, 'refused before'
        return self._of(_sums_of_classes(logits, target).sum(0), weight)

    def activation(self, x): return torch.sigmoid(x) if self.multi_label else F.softmax(x, self.axis)
    def decodes(self, x): return x > .5 if self.multi_label else x.argmax(self.axis)


def _sums(p, t): return torch.stack([x.reshape(len(x), -1, x.shape[-1]).sum(1) for x in (p*t, p, t)], 1)


def _sums_of_classes(logits, target): return _sums(logits.softmax(-1)*target.sum(-1, keepdim=True), target)


class SoftDiceLoss(_Overlap):
    """1 − Dice, the mean over classes of (2TP+smooth) / (2TP+FP+FN+smooth), of all pixels of the batch together; in [0, 1], lower is better.

    `pred` `(n, c, …)` holds logits, `target` `(n, …)` class numbers, or probabilities shaped as `pred`; with `multi_label`, masks that may
    overlap, a sigmoid each, shaped as `pred`. `smooth` > 0 pixels: a class that is neither there nor predicted scores 1. `weight` `(c,)`
    weighs the classes in their mean. Pixels of `ignore_index` have no part. `reduction`: 'mean', or 'none' for the loss of each sample
    `(n,)`. In validation it is that of the whole set. arXiv:1606.04797, with p for p², as is usual."""
    def score(self, tp, fp, fn): return (2*tp+self.smooth)/(2*tp+fp+fn+self.smooth)


class IoULoss(_Overlap):
    """1 − IoU (Jaccard), the mean over classes of (TP+smooth) / (TP+FP+FN+smooth); in [0, 1], lower is better, never below the Dice loss.

    Arguments and the rest as of `SoftDiceLoss`. With targets that are not 0 or 1 its least value is above 0. doi:10.1007/978-3-319-50835-1_22"""
    def score(self, tp, fp, fn): return (tp+self.smooth)/(tp+fp+fn+self.smooth)


class SoftF1Loss(SoftDiceLoss):
    """1 − F1, the mean over classes (macro), with probabilities in place of predictions; in [0, 1], lower is better.

    F1 of samples is Dice of pixels, so this is `SoftDiceLoss` by its name among classifiers, arguments included. A batch should hold several
    samples of each class; `multi_label` for several labels a sample."""
