"Every loss by its name: the targets that it is for, its settings, and what it cannot be combined with."
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from fastai.losses import BaseLoss, BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss, FocalLoss, L1LossFlat, MSELossFlat
from torch import Tensor, nn
from torch.nn import functional as F

from fastrecipes.errors import BadName, BadValue, nearest
from fastrecipes.losses.base import ClassLoss, LabelLoss, NumberLoss, check_settings
from fastrecipes.losses.classification import (BinaryHingeLoss, HingeLoss, NLLLossFlat, OneVsAllLoss, SigmoidFocalLoss, SoftmaxFocalLoss, classes_of,
                                               cross_entropy_of)
from fastrecipes.losses.regression import MAPELoss, MSPELoss, RMSELoss, RMSPELoss
from fastrecipes.losses.segmentation import IoULoss, SoftDiceLoss, SoftF1Loss
from fastrecipes.losses.whole_set import OverSet

__all__ = ['LOSSES', 'make_loss']

WORDS = dict(classes='one class a sample', masks='a class a pixel', labels='several labels a sample', label_masks='several labels a pixel',
             numbers='numbers')


@dataclass(frozen=True)
class Kind:
    "A loss by its name: `makes`, targets → what makes it; `settings`, targets → their names; `refuses`, technique → why the two do not go together."
    makes: Mapping[str, Callable]
    settings: Mapping[str, tuple] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)


def _everywhere(classes: Callable, labels: Callable | None = None) -> dict:
    return dict(classes=classes, masks=classes) | (dict(labels=labels, label_masks=labels) if labels else {})


def _smoothed(eps: float = .1, **kwargs): return CrossEntropyLossFlat(label_smoothing=eps, **kwargs)


_OF_SETS = dict(label_smoothing='it looks at how far what is predicted overlaps with what is there, and smoothed targets are everywhere',
                **dict.fromkeys(('class_weights', 'logit_adjustment'), 'it gives every class the same say, however rare, already'))
_NO_SOFTMAX = 'logits are moved by what a softmax makes of the shares of classes, and it has no softmax'
_OF_PIXELS = dict.fromkeys(('masks', 'label_masks'), ('smooth',))
_BOTH = partial(dict.fromkeys, ('classes', 'masks', 'labels', 'label_masks'))

LOSSES = dict(
    mae=Kind(dict(numbers=L1LossFlat)), mse=Kind(dict(numbers=MSELossFlat)), rmse=Kind(dict(numbers=RMSELoss)),
    mape=Kind(dict(numbers=MAPELoss)), mspe=Kind(dict(numbers=MSPELoss)), rmspe=Kind(dict(numbers=RMSPELoss)),
    ce=Kind(_everywhere(CrossEntropyLossFlat)),
    nll=Kind(_everywhere(NLLLossFlat)),
    label_smoothing=Kind(_everywhere(_smoothed), dict.fromkeys(('classes', 'masks'), ('eps',)), dict(label_smoothing='each smooths the targets')),
    focal=Kind(_everywhere(SoftmaxFocalLoss, SigmoidFocalLoss), _BOTH(('gamma',)) | dict.fromkeys(('labels', 'label_masks'), ('gamma', 'alpha'))),
    bce=Kind(_everywhere(OneVsAllLoss, BCEWithLogitsLossFlat), refuses=dict(logit_adjustment=_NO_SOFTMAX)),
    hinge=Kind(_everywhere(HingeLoss, BinaryHingeLoss), _BOTH(('margin',)),
               dict(label_smoothing='a hinge asks for a margin between scores, and smoothed targets for a probability',
                    logit_adjustment=_NO_SOFTMAX)),
    soft_f1=Kind(dict(classes=SoftF1Loss, labels=partial(SoftF1Loss, multi_label=True)), dict.fromkeys(('classes', 'labels'), ('smooth',)), _OF_SETS),
    dice=Kind(dict(masks=SoftDiceLoss, label_masks=partial(SoftDiceLoss, multi_label=True)), _OF_PIXELS, _OF_SETS),
    iou=Kind(dict(masks=IoULoss, label_masks=partial(IoULoss, multi_label=True)), _OF_PIXELS, _OF_SETS))

MBE = ('mbe, the mean of truth − prediction, is a metric and no loss: errors of opposite sign cancel, so that it has no least value, and a '
       'network that answers ever more would be ever better; train on mae or mse')


def make_loss(kind: str, targets: str = 'classes', who: str = 'make_loss', shared: Mapping | None = None, **settings):
    """The loss `kind`, one of `LOSSES`, for `targets`: 'classes', 'masks', 'labels', 'label_masks' or 'numbers'; a setting of None is the default.

    `shared`: more that its class takes (weight, ignore_index, reduction, axis), without a check. Raises `ValueError` for a kind that there is
    not, or not for these targets, and for a setting outside its domain; `TypeError` for one that the kind does not have. `who` is named."""
    if kind == 'mbe': raise BadValue(f'{who}: {MBE}')
    if kind not in LOSSES: raise BadValue(f'{who}: kind must be one of {", ".join(LOSSES)}, got {kind!r}{nearest(kind, LOSSES)}')
    if targets not in WORDS: raise BadValue(f'{who}: targets must be one of {", ".join(WORDS)}, got {targets!r}{nearest(targets, WORDS)}')
    k = LOSSES[kind]
    if targets not in k.makes:
        fitting = [n for n, o in LOSSES.items() if targets in o.makes and n != 'nll']
        raise BadValue(f'{who}: {kind!r} is for {" or ".join(WORDS[t] for t in k.makes)}, and these targets are {WORDS[targets]}; '
                       f'for those there are {", ".join(fitting)}')
    given, takes = {n: v for n, v in settings.items() if v is not None}, k.settings.get(targets, ())
    for n in given:
        if n in takes: continue
        raise BadName(f'{who}: {kind!r} has no {n} for {WORDS[targets]}{nearest(n, takes) or ";"} it takes {", ".join(takes) or "none"}')
    check_settings(who, **given)
    return k.makes[targets](**given, **(shared or {}))


@dataclass(frozen=True)
class Targets:
    "What a loss says of its targets: their kind, a key of `WORDS`; the class axis, weights and ignored class of one over classes; its reduction."
    kind: str
    axis: int = 1
    weight: Tensor | None = None
    ignore_index: int = -100
    reduction: str = 'mean'


_NUMBERS = (nn.L1Loss, nn.MSELoss, nn.SmoothL1Loss, nn.HuberLoss, F.l1_loss, F.mse_loss, F.smooth_l1_loss, F.huber_loss)
_LABELS = (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss, F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss)


def targets_of(loss_func) -> Targets | None:
    "What targets `loss_func`, of torch, fastai or ours, is for; None for one of somebody else's, or one that takes probabilities."
    if over := classes_of(loss_func): return Targets('classes', over.axis, over.weight, over.ignore_index, over.reduction)
    f, kw = getattr(loss_func, 'func', loss_func), getattr(loss_func, 'keywords', {})
    weight = next((w for n in ('pos_weight', 'weight') if (w := getattr(f, n, kw.get(n))) is not None), None)
    rest = dict(weight=weight, reduction=getattr(loss_func, 'reduction', kw.get('reduction', 'mean')))
    def one_of(kinds): return any(f is o or isinstance(o, type) and isinstance(f, o) for o in kinds)
    if isinstance(f, (NumberLoss, OverSet)) and not isinstance(f, ClassLoss) or one_of(_NUMBERS): return Targets('numbers', **rest)
    if isinstance(f, (LabelLoss, ClassLoss)) or one_of(_LABELS): return Targets('labels', **rest | dict(axis=getattr(f, 'axis', 1)))
    if isinstance(f, (FocalLoss, DiceLoss, nn.MultiMarginLoss)):
        return Targets('classes', loss_func.axis if isinstance(loss_func, (BaseLoss, DiceLoss)) else 1, **rest)
    return None


def same_loss(one, other) -> bool:
    "Whether two losses are one, however they are spelt: cross entropies of the same smoothing, or of the same class and settings."
    a, b = cross_entropy_of(one), cross_entropy_of(other)
    if a or b: return bool(a and b) and a.smoothing == b.smoothing
    f, g = (getattr(o, 'func', o) for o in (one, other))
    def settings(o): return {n: getattr(o, n, None) for n in ('gamma', 'alpha', 'margin', 'smooth', 'floor')}
    return type(f) is type(g) and isinstance(f, nn.Module) and settings(f) == settings(g)
