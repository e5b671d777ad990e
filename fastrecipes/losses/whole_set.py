"Losses that are no means over samples, and how validation puts together what batches say of the whole set."
import torch
from fastai.basics import AvgLoss, LabelSmoothingCrossEntropy, patch
from torch import Tensor

from fastrecipes.losses.base import Loss
from fastrecipes.losses.classification import classes_of
from fastrecipes.repairs import REPAIRS

__all__ = ['OverSet']


class OverSet(Loss):
    """A loss of a set, not a mean over its samples: `sums(pred, target)` of batches add up, and `of(sums)` is the loss of them together.

    So validation has the loss of the whole set, whatever the batch size; training has that of each batch. `reduction` 'none': the loss of
    each sample alone `(n,)`; there is no sum."""
    reductions = ('mean', 'none')

    def sums(self, pred, target, each: bool = False) -> Tensor: raise NotImplementedError
    def of(self, sums: Tensor) -> Tensor: raise NotImplementedError
    def forward(self, pred, target): return self.of(self.sums(pred, target, each=self.reduction == 'none'))


if REPAIRS:
    @patch
    def accumulate(self: AvgLoss, learn):
        """Add a batch to the mean of the loss: one over classes by the weights of its targets, Σwl/Σw over all samples; one of a set by its sums.

        fastai 2.8.12 averages the batches' weighted means by their number of samples, so that the value depends on the batch size."""
        f, targets = learn.loss_func, learn.yb[0]
        if isinstance(f, OverSet):
            self.sums = learn.to_detach(f.sums(learn.pred, *learn.yb)).double() + (self.sums if self.count else 0.)
            self.total, self.count = f.of(self.sums), 1
            return
        over = classes_of(f)
        smoothed = isinstance(getattr(f, 'func', f), LabelSmoothingCrossEntropy)    # half of it has no weights
        if over is None or over.reduction == 'sum' or smoothed or len(learn.yb) > 1 or targets.is_floating_point():
            return self._orig_accumulate(learn)
        kept = targets[targets != over.ignore_index].long()
        w = kept.new_tensor(kept.numel(), dtype=torch.float32) if over.weight is None else over.weight.to(kept.device)[kept].sum()
        self.total += learn.to_detach(learn.loss.sum() if over.reduction == 'none' else torch.where(w > 0, learn.loss*w, 0.))
        self.count += learn.to_detach(w)
