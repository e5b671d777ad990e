"The training loss by its name."
from typing import Literal

import torch
from fastai.basics import Learner

from fastrecipes.data.loaders import first_sample
from fastrecipes.errors import BadValue
from fastrecipes.losses.base import ClassLoss
from fastrecipes.losses.classification import cross_entropy_of
from fastrecipes.losses.kinds import LOSSES, Targets, make_loss, same_loss, targets_of
from fastrecipes.losses.whole_set import OverSet
from fastrecipes.objective import check_together, objective
from fastrecipes.technique import applied, say, technique

__all__ = []

Kind = Literal[tuple(LOSSES)]                   # pyright: ignore[reportInvalidTypeForm]


@technique('loss', section='Loss', source='https://docs.pytorch.org/docs/stable/nn.html#loss-functions', touches=('targets',),
           example=dict(kind='focal'),
           formula=r'\ell_\text{focal} = -(1-p_y)^\gamma \log p_y, \qquad \ell_\text{Dice} = 1 - \frac{2\,TP}{2\,TP+FP+FN}, \ \dots')
def loss(self: Learner, kind: Kind,             # pyright: ignore[reportInvalidTypeForm]
         gamma: float | None = None, alpha: float | None = None, eps: float | None = None, margin: float | None = None, smooth: float | None = None) -> Learner:
    """Train on another loss, by its name; validation, `predict` and metrics keep the Learner's own, so that runs can be compared.

    `kind`, for numbers: mae, mse, rmse, mape, mspe, rmspe. For one class a sample, or a pixel: ce, nll (outputs that are log-probabilities),
    label_smoothing, focal, bce (each class against the rest), hinge. For several labels: bce, focal, hinge. soft_f1 for both, of samples;
    dice and iou for both, of pixels. Settings, each of one kind, None the default: `gamma` ≥ 0 (2) of focal; `alpha` in [0, 1] (none) of
    focal with several labels; `eps` in [0, 1) (.1) of label_smoothing; `margin` > 0 (1) of hinge; `smooth` > 0 (1e-6) of soft_f1, dice
    and iou. Class weights and ignored targets of the Learner's loss stay. All take mixed targets; `label_smoothing`, `class_weights` and
    `logit_adjustment` where they make sense. rmse, rmspe, soft_f1, dice and iou are losses of a whole batch: those of accumulated batches, or
    of several processes, are averaged. `predict` turns outputs into probabilities as before: those learnt by hinge, bce, soft_f1, dice
    or iou say less of how sure the network is. Raises `ValueError` for a kind that is not for the Learner's targets, a loss of its
    own that does not tell what they are, a setting outside its range, and what does not go together; `TypeError` for a setting of
    another kind."""
    settings = dict(gamma=gamma, alpha=alpha, eps=eps, margin=margin, smooth=smooth)
    if kind not in LOSSES: make_loss(kind, who='loss')
    if (own := targets_of(self.loss_func)) is None:
        raise BadValue(f'loss: {self.loss_func} does not tell whether targets are classes, labels or numbers, or that outputs are logits; '
                       'give the Learner a loss of torch or fastai')
    targets = _with_pixels(self, own)
    new = make_loss(kind, targets, 'loss', _shared(kind, targets, own), **settings)
    if kind == 'nll' and not _takes_log_probabilities(self.loss_func):
        raise BadValue(f"loss: 'nll' takes log-probabilities, and {self.loss_func} is for a network that answers something else; "
                       "'ce' is both the log-softmax and the nll of it")
    if own.weight is not None and 'class_weights' in LOSSES[kind].refuses:
        raise BadValue(f"loss: {kind!r} has no class weights, and {self.loss_func} has; {LOSSES[kind].refuses['class_weights']}: "
                       'give the Learner a loss without, or take ce or focal')
    for other in applied(self): check_together(other, kind)
    objective(self)
    given = ', '.join(f'{n} {v:g}' for n, v in settings.items() if v is not None)
    if same_loss(self.loss_func, new):
        was, objective(self).instead = objective(self).instead, None
        say(self, 'loss', f'{kind} is the loss that the Learner has: ' + ('nothing is changed' if was is None else 'nothing else is trained on any more'), aloud=True)
        return self
    objective(self).instead = new
    each = 'one value a batch' if isinstance(new, OverSet) else 'a mean over targets' if own.reduction != 'sum' else 'a sum over targets'
    say(self, 'loss', f'{kind}{f" ({given})" if given else ""}, {each}, in place of {_name(self.loss_func)}, which validation keeps')
    return self


def _with_pixels(learn: Learner, own: Targets) -> str:
    "The kind of the Learner's targets, where those of its loss may be a sample's or a pixel's: what its first sample shows."
    if own.kind == 'numbers' or (seen := first_sample(learn.dls)) is None or not seen[1]: return own.kind
    y = seen[1][0]
    if not isinstance(y, torch.Tensor): return own.kind
    many = y.ndim > (2 if own.kind == 'labels' or y.is_floating_point() else 1) and y[0].numel() > 1
    return {'classes': 'masks', 'labels': 'label_masks'}[own.kind] if many else own.kind


def _shared(kind: str, targets: str, own: Targets) -> dict:
    "What the new loss takes over from the Learner's own."
    makes = LOSSES[kind].makes.get(targets)
    cls = getattr(makes, 'func', makes)
    whole = isinstance(cls, type) and issubclass(cls, OverSet)
    shared = {} if whole else dict(reduction=own.reduction)
    if targets in ('classes', 'masks'): shared |= dict(weight=own.weight, ignore_index=own.ignore_index, axis=own.axis)
    elif isinstance(cls, type) and issubclass(cls, ClassLoss): shared |= dict(axis=own.axis)
    return shared


def _takes_log_probabilities(loss_func) -> bool:
    return cross_entropy_of(loss_func) is not None and 'nll' in _name(loss_func).lower()


def _name(loss_func) -> str:
    f = getattr(loss_func, 'func', loss_func)
    return f.__name__ if hasattr(f, '__name__') else type(f).__name__
