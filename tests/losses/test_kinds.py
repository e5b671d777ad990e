"Losses by their names: what each is for, what it takes, and how targets are told from a loss."
from functools import partial

import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, nn
from fastai.losses import BCEWithLogitsLossFlat, DiceLoss, FocalLossFlat, L1LossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from torch.nn import functional as F

from fastrecipes.losses.classification import HingeLoss, NLLLossFlat, SigmoidFocalLoss, SoftmaxFocalLoss
from fastrecipes.losses.kinds import LOSSES, WORDS, make_loss, same_loss, targets_of
from fastrecipes.losses.regression import MAPELoss, RMSELoss
from fastrecipes.losses.segmentation import IoULoss, SoftDiceLoss

W = torch.tensor([1., 2., 3.])


def test_every_row_of_the_table_has_its_name():
    assert list(LOSSES) == 'mae mse rmse mape mspe rmspe ce nll label_smoothing focal bce hinge soft_f1 dice iou'.split()
    assert {t for k in LOSSES.values() for t in k.makes} == WORDS.keys()
    for k in LOSSES.values(): assert k.settings.keys() <= k.makes.keys()


@pytest.mark.parametrize('kind, targets', [(n, t) for n, k in LOSSES.items() for t in k.makes])
def test_each_is_made_for_each_of_its_targets_and_can_be_differentiated(kind, targets):
    shape = (4, 3, 2, 2) if 'mask' in targets else (4, 3)
    pred = torch.randn(shape, requires_grad=True)
    y = torch.rand(shape)+.1 if targets == 'numbers' else (torch.rand(shape) > .5).float() if 'label' in targets else torch.randint(3, (4, *shape[2:]))
    loss = make_loss(kind, targets, shared=dict(axis=1) if targets == 'masks' else None)
    loss(pred.log_softmax(1) if kind == 'nll' else pred, y).backward()
    assert bool(pred.grad.isfinite().all()) and pred.grad.any()


@pytest.mark.parametrize('kind, settings, expected', [
    ('focal', dict(gamma=3.), lambda z, y: (-(1-z.softmax(1)[range(8), y])**3*z.log_softmax(1)[range(8), y]).mean()),
    ('label_smoothing', dict(eps=.3), lambda z, y: F.cross_entropy(z, y, label_smoothing=.3)), ('label_smoothing', {}, lambda z, y: F.cross_entropy(z, y, label_smoothing=.1)),
    ('hinge', dict(margin=.2), lambda z, y: F.multi_margin_loss(z, y, margin=.2)), ('soft_f1', dict(smooth=2.), lambda z, y: SoftDiceLoss(2.)(z, y)),
    ('ce', dict(gamma=None), F.cross_entropy)])
def test_settings_reach_the_loss(kind, settings, expected):
    z, y = torch.randn(8, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    assert float(make_loss(kind, **settings)(z, y)) == pytest.approx(float(expected(z, y)), rel=1e-5)


@pytest.mark.parametrize('args, kwargs, error, message', [
    (('focl',), {}, ValueError, "make_loss: kind must be one of mae, .*, iou, got 'focl'; did you mean 'focal'"),
    (('focal', 'class'), {}, ValueError, "make_loss: targets must be one of classes, .*, got 'class'; did you mean 'classes'"),
    (('mbe', 'numbers'), {}, ValueError, 'make_loss: mbe, .*is a metric and no loss: errors of opposite sign cancel, .*; train on mae or mse'),
    (('dice',), {}, ValueError, "'dice' is for a class a pixel or several labels a pixel, and these targets are one class a sample; "
     'for those there are ce, label_smoothing, focal, bce, hinge, soft_f1'),
    (('mse', 'masks'), {}, ValueError, "'mse' is for numbers, and these targets are a class a pixel; for those there are .*dice, iou"),
    (('soft_f1', 'masks'), {}, ValueError, 'for those there are .*dice, iou'), (('ce', 'labels'), {}, ValueError, 'for those there are focal, bce, hinge, soft_f1'),
    (('ce',), dict(gamma=2.), TypeError, "'ce' has no gamma for one class a sample; it takes none"),
    (('focal',), dict(alpha=.25), TypeError, "'focal' has no alpha for one class a sample; it takes gamma"),
    (('focal',), dict(gama=2.), TypeError, "'focal' has no gama for one class a sample; did you mean 'gamma'"),
    (('focal',), dict(gamma=-1.), ValueError, 'make_loss: gamma must be ≥ 0 and finite, got -1.0'),
    (('focal', 'labels'), dict(alpha=2.), ValueError, r'alpha must be in \[0, 1\], got 2.0'),
    (('label_smoothing',), dict(eps=1.), ValueError, r'eps must be in \[0, 1\), got 1.0'), (('hinge',), dict(margin=0.), ValueError, 'margin must be > 0 and finite, got 0.0'),
    (('dice', 'masks'), dict(smooth=0.), ValueError, 'smooth must be > 0 and finite, got 0.0'), (('focal',), dict(gamma=float('nan')), ValueError, 'gamma must be .*got nan')])
def test_what_there_is_not(args, kwargs, error, message):
    with pytest.raises(error, match=message): make_loss(*args, **kwargs)


@pytest.mark.parametrize('loss_func, kind, axis, ignored, reduction, weighted', [
    (nn.CrossEntropyLoss(W, ignore_index=7, reduction='sum'), 'classes', 1, 7, 'sum', True), (CrossEntropyLossFlat(axis=2), 'classes', 2, -100, 'mean', False),
    (F.cross_entropy, 'classes', 1, -100, 'mean', False), (partial(F.nll_loss, weight=W), 'classes', 1, -100, 'mean', True), (NLLLossFlat(axis=1), 'classes', 1, -100, 'mean', False),
    (LabelSmoothingCrossEntropyFlat(axis=1), 'classes', 1, -100, 'mean', False),
    (FocalLossFlat(axis=1, weight=W), 'classes', 1, -100, 'mean', True), (DiceLoss(axis=2), 'classes', 2, -100, 'sum', False),
    (nn.MultiMarginLoss(reduction='sum'), 'classes', 1, -100, 'sum', False), (HingeLoss(weight=W, ignore_index=3, axis=-1), 'classes', -1, 3, 'mean', True),
    (SoftDiceLoss(axis=2), 'classes', 2, -100, 'mean', False), (IoULoss(multi_label=True, axis=3), 'labels', 3, -100, 'mean', False),
    (BCEWithLogitsLossFlat(pos_weight=W), 'labels', 1, -100, 'mean', True),
    (nn.BCEWithLogitsLoss(reduction='sum'), 'labels', 1, -100, 'sum', False), (SigmoidFocalLoss(), 'labels', 1, -100, 'mean', False),
    (F.binary_cross_entropy_with_logits, 'labels', 1, -100, 'mean', False), (MSELossFlat(), 'numbers', 1, -100, 'mean', False),
    (L1LossFlat(reduction='sum'), 'numbers', 1, -100, 'sum', False),
    (nn.HuberLoss(), 'numbers', 1, -100, 'mean', False), (F.mse_loss, 'numbers', 1, -100, 'mean', False),
    (RMSELoss(), 'numbers', 1, -100, 'mean', False), (MAPELoss(), 'numbers', 1, -100, 'mean', False)])
def test_a_loss_tells_its_targets(loss_func, kind, axis, ignored, reduction, weighted):
    t = targets_of(loss_func)
    assert (t.kind, t.axis, t.ignore_index, t.reduction, t.weight is not None) == (kind, axis, ignored, reduction, weighted)


@pytest.mark.parametrize('loss_func', [nn.BCELoss(), nn.CosineEmbeddingLoss(), lambda p, y: p.sum()])
def test_a_loss_of_ones_own_or_of_no_logits_tells_nothing(loss_func): assert targets_of(loss_func) is None


def test_losses_that_are_one():
    assert same_loss(CrossEntropyLossFlat(), nn.CrossEntropyLoss()) and same_loss(MSELossFlat(), nn.MSELoss()) and same_loss(SoftmaxFocalLoss(2.), SoftmaxFocalLoss())
    assert not same_loss(SoftmaxFocalLoss(1.), SoftmaxFocalLoss()) and not same_loss(CrossEntropyLossFlat(label_smoothing=.1), nn.CrossEntropyLoss())
    assert not same_loss(CrossEntropyLossFlat(), SoftmaxFocalLoss()) and not same_loss(MSELossFlat(), L1LossFlat())
