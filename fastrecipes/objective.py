"""The training loss, composed: smoothing, class weights and mixed targets meet in one callback, which computes the loss anew after fastai did.

`learn.loss_func` is never swapped, so validation, `get_preds` and `export` see the data's own loss, also when a fit dies half way."""
from dataclasses import dataclass
from functools import partial

import torch
from fastai.basics import BaseLoss, Learner, LabelSmoothingCrossEntropy, nn
from fastai.callback.training import GradientAccumulation
from fastai.layers import NoneReduce
from torch.nn import functional as F

from fastrecipes.errors import BadValue
from fastrecipes.losses.classification import soft_cross_entropy, soft_targets
from fastrecipes.technique import TechniqueCallback

__all__ = ['Objective', 'objective', 'CrossEntropy', 'cross_entropy_of']


@dataclass(frozen=True)
class CrossEntropy:
    "What a cross-entropy loss, however it is spelt, was told: all that is needed to compute it against soft targets."
    weight: torch.Tensor | None = None
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


class Objective(TechniqueCallback):
    "Replace `loss_grad` and `loss` after the forward pass by the loss that the techniques ask for; training only."
    order, run_valid = GradientAccumulation.order-2, False      # before penalties, before the scaling by accumulation and fp16

    def __init__(self): self.smoothing = self.class_weight = self.partner = self.share = None

    def before_batch(self): self.partner = self.share = None    # what an interrupted batch may have left

    def mix(self, partner: torch.Tensor, share: torch.Tensor):
        "Say that sample i of this batch is `share[i]` itself and the rest sample `partner[i]`."
        self.partner, self.share = partner, share

    def after_loss(self):
        if not self.learn.training or not len(self.learn.yb): return
        if self.smoothing is None and self.class_weight is None and self.share is None: return
        loss = self.of(self.learn.pred, *self.learn.yb)
        self.learn.loss_grad, self.learn.loss = loss, loss.clone()

    def of(self, pred, *yb):
        "The loss that is differentiated for predictions `pred` and the data's own targets `yb`."
        if ce := cross_entropy_of(self.learn.loss_func): return self._cross_entropy(ce, pred, *yb)
        if self.share is None: return self.learn.loss_func(pred, *yb)
        others = tuple(y[self.partner] for y in yb)
        if all(y.is_floating_point() for y in yb):
            return self.learn.loss_func(pred, *(torch.lerp(o, y, _like(self.share, y)) for o, y in zip(others, yb)))
        try:
            with NoneReduce(self.learn.loss_func) as each: mine, theirs = each(pred, *yb), each(pred, *others)
        except TypeError as e:
            raise BadValue(f'mixup: cannot mix the targets of {self.learn.loss_func}: it has no per-sample form (reduction) ({e})') from None
        mine, theirs = (v.view(len(self.share), -1).mean(1) for v in (mine, theirs))
        mixed = torch.lerp(theirs, mine, self.share.to(mine))
        return mixed.sum() if getattr(self.learn.loss_func, 'reduction', 'mean') == 'sum' else mixed.mean()

    def _cross_entropy(self, ce: CrossEntropy, pred, target):
        logits = pred.movedim(ce.axis, -1)
        c = logits.shape[-1]
        if target.is_floating_point(): soft = target.movedim(ce.axis, -1)
        else: soft = soft_targets(target.reshape(logits.shape[:-1]).long(), c, ce.ignore_index).to(logits.dtype)
        if self.share is not None: soft = torch.lerp(soft[self.partner], soft, _like(self.share, soft))
        weight = ce.weight if self.class_weight is None else self.class_weight
        smoothing = ce.smoothing if self.smoothing is None else self.smoothing
        return soft_cross_entropy(logits.reshape(-1, c), soft.reshape(-1, c), weight, smoothing, ce.reduction)


def _like(share, x): return share.to(x.device, x.dtype).view(-1, *[1]*(x.ndim-1))


def objective(learn: Learner) -> Objective:
    "The `Objective` of `learn`, added by the first technique that changes its loss."
    if (cb := next((o for o in learn.cbs if type(o) is Objective), None)) is None: learn.add_cb(cb := Objective())
    return cb
