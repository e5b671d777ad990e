"""The training loss, composed: its kind, smoothing, class weights, moved logits and mixed targets meet in one callback, which computes the loss anew after fastai did.

`learn.loss_func` is never swapped, so validation, `get_preds` and `export` see the data's own loss, also when a fit dies half way."""
from inspect import signature

import torch
from fastai.basics import Learner, find_bs
from fastai.callback.training import GradientAccumulation
from fastai.layers import NoneReduce
from torch import distributed

from fastrecipes.errors import BadValue
from fastrecipes.losses.base import ClassLoss, by_class
from fastrecipes.losses.classification import CrossEntropy, classes_of, cross_entropy_of
from fastrecipes.losses.kinds import LOSSES
from fastrecipes.losses.whole_set import OverSet
from fastrecipes.technique import TechniqueCallback, applied

__all__ = ['Objective', 'check_mixable', 'check_together', 'kind_of', 'mean_over_processes', 'objective', 'CrossEntropy', 'cross_entropy_of']


class Objective(TechniqueCallback):
    "Replace `loss_grad` and `loss` after the forward pass by the loss that the techniques ask for; training only."
    order, run_valid = GradientAccumulation.order-2, False      # before penalties, before the scaling by accumulation and fp16

    def __init__(self):
        self.instead = None                     # the loss that is trained on, where it is not the Learner's own
        self.smoothing = self.class_weight = self.adjustment = self.partner = self.share = None
        self.distributed = False                # whether other processes hold the rest of each batch

    def before_batch(self): self.partner = self.share = None    # what an interrupted batch may have left

    def mix(self, partner: torch.Tensor, share: torch.Tensor):
        "Say that sample i of this batch is `share[i]` itself and the rest sample `partner[i]`."
        self.partner, self.share = partner, share

    @property
    def acts(self) -> bool:
        "Whether the loss of the batch in hand is computed anew."
        return any(o is not None for o in (self.instead, self.smoothing, self.class_weight, self.adjustment, self.share))

    @property
    def trained(self):
        "The loss that is trained on."
        return self.learn.loss_func if self.instead is None else self.instead

    def after_loss(self):
        if not self.learn.training or not len(self.learn.yb): return
        loss = self.of(self.learn.pred, *self.learn.yb) if self.acts else self.learn.loss_grad
        if self.distributed and classes_of(self.trained) and (own := self._denominator()) is not None:
            loss = loss*(own/self.denominator()) if own else self.learn.pred.sum()*0.      # gradients are averaged: Σwl/Σw over all processes comes out
        if loss is not self.learn.loss_grad: self.learn.loss_grad, self.learn.loss = loss, loss.clone()

    def of(self, pred, *yb):
        "The loss that is differentiated for predictions `pred` and the data's own targets `yb`."
        f = self.trained
        if over := classes_of(f): return self._over_classes(over, pred, *yb)
        if self.share is None: return f(pred, *yb)
        others = tuple(y[self.partner] for y in yb)
        if all(y.is_floating_point() for y in yb):
            return f(pred, *(torch.lerp(o, y, _like(self.share, y)) for o, y in zip(others, yb)))
        with NoneReduce(f) as each: mine, theirs = each(pred, *yb), each(pred, *others)
        mine, theirs = (v.view(len(self.share), -1).mean(1) for v in (mine, theirs))
        mixed = torch.lerp(theirs, mine, self.share.to(mine))
        return mixed.sum() if getattr(f, 'reduction', 'mean') == 'sum' else mixed.mean()

    def count(self) -> int:
        "The number of targets in the batch in hand: samples, pixels, or samples times outputs."
        y = self.learn.yb[0]
        return y.numel() if isinstance(y, torch.Tensor) else find_bs(self.learn.yb)

    def denominator(self) -> float | None:
        """What the loss of the batch in hand is a mean over: Σw of its targets, their number where all count alike; None for a sum.

        Where several processes share a batch, the mean of theirs."""
        own = self._denominator()
        return mean_over_processes(own, self.learn.pred.device) if own is not None and self.distributed else own

    def _denominator(self) -> float | None:
        f = self.trained
        over, y = classes_of(f), self.learn.yb[0]
        if (over.reduction if over else getattr(f, 'reduction', None) or getattr(f, 'keywords', {}).get('reduction')) == 'sum': return None
        if over is None or isinstance(over, OverSet): return self.count()
        weight = over.weight if self.class_weight is None else self.class_weight
        if y.is_floating_point():
            soft = y.movedim(over.axis, -1)
            if not self.acts: return soft[..., 0].numel()            # torch takes the plain mean over rows of probabilities
            w = (soft if weight is None else soft*weight.to(soft)).sum(-1)
        else:
            kept = y != over.ignore_index
            w = kept.float() if weight is None else weight.to(y.device)[torch.where(kept, y, 0).long()]*kept
        if self.share is not None: w = torch.lerp(w[self.partner], w, _like(self.share, w))
        return float(w.sum())

    def _over_classes(self, over: CrossEntropy | ClassLoss, pred, target):
        logits, soft = by_class(pred, target, over.axis, over.ignore_index)         # in 32 bits, whatever those of the network
        if self.share is not None: soft = torch.lerp(soft[self.partner], soft, _like(self.share, soft))
        weight = over.weight if self.class_weight is None else self.class_weight
        smoothing = getattr(over, 'smoothing', 0.) if self.smoothing is None else self.smoothing
        if self.adjustment is not None: logits = logits + self.adjustment.to(logits.device)
        return over.soft(logits.flatten(0, -2), soft.flatten(0, -2), weight, smoothing, over.reduction)


def check_together(name: str, kind: str | None):
    "Raise the sentence by which a loss of `kind` refuses the technique `name`."
    if kind is None or not (why := LOSSES[kind].refuses.get(name)): return
    others = [n for n, o in LOSSES.items() if name not in o.refuses and LOSSES[kind].makes.keys() & o.makes.keys() and n != 'nll']
    raise BadValue(f"{name!r} and loss={kind!r} do not go together: {why}; keep one, or take {', '.join(others)}, which go with it")


def kind_of(learn: Learner) -> str | None:
    "The kind of loss that the technique `loss` was asked for."
    return applied(learn)['loss'].arguments['kind'] if 'loss' in applied(learn) else None


def check_mixable(who: str, loss_func, yb):
    "Raise, in the name of `who`, where targets like `yb` can be mixed neither themselves nor in the loss of each sample."
    if classes_of(loss_func) or all(y.is_floating_point() for y in yb) or hasattr(loss_func, 'reduction') or 'reduction' in signature(loss_func).parameters: return
    raise BadValue(f'{who}: cannot mix the targets of {loss_func}, which are classes, for it has no per-sample form; give it an argument reduction, as the losses of torch have')


def mean_over_processes(x: float, device) -> float:
    "The mean of `x` over the processes that train together."
    distributed.all_reduce(t := torch.tensor(x, dtype=torch.float64, device=device))
    return float(t)/distributed.get_world_size()


def _like(share, x): return share.to(x.device, x.dtype).view(-1, *[1]*(x.ndim-1))


def objective(learn: Learner) -> Objective:
    "The `Objective` of `learn`, added by the first technique that changes its loss."
    if (cb := next((o for o in learn.cbs if type(o) is Objective), None)) is None: learn.add_cb(cb := Objective())
    return cb
