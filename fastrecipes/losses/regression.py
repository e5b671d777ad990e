"""Losses for numbers. MAE is fastai's `L1LossFlat`, MSE its `MSELossFlat`; here are those that are relative, or roots.

The mean bias error is no loss, for errors of opposite sign cancel: see the metrics."""
import torch
from fastai.losses import L1LossFlat, MSELossFlat
from torch import Tensor

from fastrecipes.losses.base import NumberLoss, alike, check_settings
from fastrecipes.losses.whole_set import OverSet

__all__ = ['L1LossFlat', 'MAPELoss', 'MSELossFlat', 'MSPELoss', 'RMSELoss', 'RMSPELoss']


class _Relative(NumberLoss):
    def __init__(self, floor: float = 1e-6, reduction: str = 'mean'):
        super().__init__(reduction)
        check_settings(type(self).__name__, floor=floor)
        self.floor = floor

    def error(self, pred, target): return (pred-target)/target.abs().clamp_min(self.floor)


class MAPELoss(_Relative):
    """Mean absolute percentage error: the mean of |y−ŷ| / max(|y|, floor); 0 at best, without an upper bound, 1 is an error of 100 %.

    `floor` > 0: targets nearer to 0 are divided by it; data with many of them are better served by MAE. `reduction`: 'mean', 'sum', 'none'."""
    def each(self, pred, target): return self.error(pred, target).abs()


class MSPELoss(_Relative):
    "Mean squared percentage error: the mean of ((y−ŷ) / max(|y|, floor))²; 0 at best, without an upper bound. Arguments as those of `MAPELoss`."
    def each(self, pred, target): return self.error(pred, target).square()


class _Root(OverSet):
    "The root of a mean square: Σe² and n add up over batches."
    def sums(self, pred, target, each=False):
        e = self.error(*alike(type(self).__name__, pred, target))
        e = e.reshape(len(e), -1)
        sums = torch.stack([e.square().sum(1), e.new_full((len(e),), e.shape[1])], -1)
        return sums if each else sums.sum(0)

    def of(self, sums: Tensor):
        mean = sums[..., 0]/sums[..., 1]
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).sqrt()      # at 0 a root has no derivative: stay there


class RMSELoss(_Root):
    """Root mean squared error: √ of the mean of (y−ŷ)², in the units of y; 0 at best, without an upper bound.

    The mean is over all numbers of the batch, in validation over those of the whole set. `reduction`: 'mean', or 'none' for the RMSE of
    each sample `(n,)`."""
    def error(self, pred, target): return pred-target


class RMSPELoss(_Root, _Relative):
    "Root mean squared percentage error: √ of the mean of ((y−ŷ) / max(|y|, floor))²; as `RMSELoss`, relative as `MAPELoss`; 1 is 100 %."
