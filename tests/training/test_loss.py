"The technique `loss`: the batch that is trained on against a value by hand, what it goes with, what it refuses; the attribute of its name."
import inspect
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from fastai.basics import Callback, CancelFitException, CrossEntropyLossFlat, Learner, nn
from fastai.losses import BCEWithLogitsLossFlat, FocalLossFlat, L1LossFlat, MSELossFlat
from torch.nn import functional as F

from fastrecipes.losses.classification import NLLLossFlat, OneVsAllLoss, SigmoidFocalLoss, SoftmaxFocalLoss
from fastrecipes.losses.kinds import LOSSES
from fastrecipes.losses.segmentation import IoULoss, SoftDiceLoss
from fastrecipes.objective import objective
from fastrecipes.technique import TECHNIQUES, discover

discover()

W, SHARES = [5., 1., .5], [.7, .2, .1]
OF_CLASSES = [n for n, k in LOSSES.items() if 'classes' in k.makes and n != 'nll']
OTHERS = dict(label_smoothing=.1, class_weights=W, logit_adjustment=dict(shares=SHARES))


class Catch(Callback):
    "What the first training batch was, and what was differentiated; then stop."
    order = 5.5
    def after_loss(self):
        if not self.learn.training: return
        o = self.learn.objective_cb
        self.kept = self.learn.pred.detach(), self.learn.yb[0], self.learn.loss_grad.item(), o.partner, o.share
        raise CancelFitException('caught')


def first(learn):
    learn.fit(1, cbs=(catch := Catch()))
    return catch.kept


def by_hand(kind, z, t, w, eps=0.):
    "The loss of a batch, from logits and (mixed) probabilities `(n, c)`, class by class in float64."
    z, t, w = (np.asarray(a, dtype=float) for a in (z, t, w))
    n, c = z.shape
    p = np.exp(z)/np.exp(z).sum(1, keepdims=True)
    s = (1-eps)*t + eps/c
    share = (t*w).sum(1)
    if kind == 'soft_f1':
        both = (p*t).sum(0)
        return 1-np.mean(2*both/(p.sum(0)+t.sum(0)))
    if kind == 'bce':
        q = 1/(1+np.exp(-z))
        each = share*-(s*np.log(q)+(1-s)*np.log(1-q)).mean(1)
    elif kind == 'hinge': each = [sum(w[y]*t[i, y]*sum(max(0, 1-z[i, y]+z[i, j]) for j in range(c) if j != y)/c for y in range(c)) for i in range(n)]
    else: each = -(w*(.9*s+.1/c if kind == 'label_smoothing' else s)*np.log(p)*((1-p)**2 if kind == 'focal' else 1)).sum(1)
    return sum(each)/share.sum()


def mixed(y, c, partner=None, share=None):
    t = F.one_hot(y, c).double()
    return t if share is None else share[:, None]*t + (1-share[:, None])*t[partner]


@pytest.mark.parametrize('kind', OF_CLASSES)
@pytest.mark.parametrize('others', [o for n in range(3) for o in itertools.combinations([*OTHERS, 'mixup'], n)], ids='+'.join)
def test_a_batch_is_trained_on_the_loss_by_hand_also_with_what_it_goes_with(toy, kind, others):
    if set(others) & LOSSES[kind].refuses.keys() or {'class_weights', 'logit_adjustment'} <= set(others): return
    learn = toy().use(loss=kind, **{n: OTHERS.get(n, .4) for n in others})
    pred, y, loss, partner, share = first(learn)
    if 'logit_adjustment' in others: pred = pred + torch.tensor(SHARES).log()
    expected = by_hand(kind, pred, mixed(y, 3, partner, share), W if 'class_weights' in others else [1., 1., 1.], .1 if 'label_smoothing' in others else 0.)
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('kind, other', [(k, o) for k in OF_CLASSES for o in OTHERS])
def test_what_does_not_go_together_is_refused_in_either_order_naming_both(toy, kind, other):
    why = LOSSES[kind].refuses.get(other)
    calls = [lambda learn: learn.loss(kind), lambda learn: learn.use(**{other: OTHERS[other]})]
    for one, two in (calls, calls[::-1]):
        one(learn := toy())
        before, cbs = list(learn.techniques), list(learn.cbs)
        if why is None: two(learn)
        else:
            with pytest.raises(ValueError, match=f"'{other}' and loss='{kind}' do not go together: .*; keep one, or take ") as e: two(learn)
            assert why in str(e.value) and list(learn.techniques) == before and list(learn.cbs) == cbs
        learn.fit(1)


def test_the_refusals_are_these():
    refused = {(k, o) for k in OF_CLASSES for o in OTHERS if o in LOSSES[k].refuses}
    assert refused == {('label_smoothing', 'label_smoothing'), ('bce', 'logit_adjustment'), ('hinge', 'label_smoothing'), ('hinge', 'logit_adjustment'),
                       ('soft_f1', 'label_smoothing'), ('soft_f1', 'class_weights'), ('soft_f1', 'logit_adjustment')}
    assert all(LOSSES[k].refuses == LOSSES['soft_f1'].refuses for k in ('dice', 'iou')) and all(not LOSSES[k].refuses for k in ('ce', 'focal', 'nll', 'mae'))


@pytest.mark.parametrize('kind', OF_CLASSES)
def test_validation_and_predictions_keep_the_learners_own_loss(toy, kind):
    learn = toy().loss(kind)
    loss_func = learn.loss_func
    learn.fit(2, .1)
    x, y = learn.dls.valid_ds.dataset.tensors
    logits = learn.model(x).detach()
    for bs in (16, 7):
        learn.dls.loaders[1] = learn.dls.valid.new(bs=bs)
        assert learn.validate()[0] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    p, _ = learn.get_preds()
    assert torch.allclose(p, logits.softmax(1), atol=1e-6) and learn.loss_func is loss_func


def test_weights_ignored_targets_axis_and_reduction_stay_those_of_the_learners_loss(toy):
    w = torch.tensor(W)
    learn = toy(labels=[0, 1, 2, -7]*16, loss_func=nn.CrossEntropyLoss(w, ignore_index=-7, label_smoothing=.5)).loss('focal')
    pred, y, loss, *_ = first(learn)
    kept = y != -7
    assert loss == pytest.approx(by_hand('focal', pred[kept], mixed(y[kept], 3), w), rel=1e-5)
    pred, y, loss, *_ = first(toy(loss_func=nn.CrossEntropyLoss(reduction='sum')).loss('focal'))
    assert loss == pytest.approx(16*by_hand('focal', pred, mixed(y, 3), [1.]*3), rel=1e-5)
    z, m = torch.randn(2, 5, 4, 3), torch.randint(3, (2, 5, 4))
    learn = toy(loss_func=CrossEntropyLossFlat(axis=-1)).loss('focal', gamma=1.)
    assert float(objective(learn).of(z, m)) == pytest.approx(float(SoftmaxFocalLoss(1.)(z.movedim(-1, 1), m)), rel=1e-5)


def test_a_kind_without_weights_refuses_a_loss_with_them(toy):
    with pytest.raises(ValueError, match="loss: 'soft_f1' has no class weights, and CrossEntropyLoss.* has; it gives every class the same say.*take ce or focal"):
        toy(loss_func=nn.CrossEntropyLoss(torch.tensor(W))).loss('soft_f1')


@pytest.mark.parametrize('loss_func, name', [(FocalLossFlat(), 'FocalLoss'), (SoftmaxFocalLoss(1.), 'SoftmaxFocalLoss'), (OneVsAllLoss(), 'OneVsAllLoss')])
def test_other_losses_over_classes_may_be_replaced_as_well(toy, loss_func, name):
    learn = toy(loss_func=loss_func).loss('ce')
    pred, y, loss, *_ = first(learn)
    assert loss == pytest.approx(F.cross_entropy(pred, y).item(), rel=1e-5)
    assert learn.techniques['loss'].effect == f'ce, a mean over targets, in place of {name}, which validation keeps'


def test_log_probabilities_have_their_own_kind(toy):
    with pytest.raises(ValueError, match="loss: 'nll' takes log-probabilities, and FlattenedLoss of CrossEntropyLoss.* answers something else; 'ce' is both"):
        toy(loss_func=CrossEntropyLossFlat()).loss('nll')
    for loss_func in (nn.NLLLoss(), NLLLossFlat(), F.nll_loss):
        learn = toy(model=nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)), loss_func=loss_func).loss('nll').mixup(.4).class_weights(W)
        pred, y, loss, partner, share = first(learn)
        assert loss == pytest.approx(by_hand('ce', pred, mixed(y, 3, partner, share), W), rel=1e-5)


# accumulated batches

class Grab(Callback):
    order = 60
    def before_step(self):
        self.gradient = self.learn.model.weight.grad.clone()
        raise CancelFitException('grabbed')


@pytest.mark.parametrize('kind', [k for k in OF_CLASSES if k != 'soft_f1'])
def test_batches_accumulate_to_the_gradient_of_the_whole_batch(toy, kind):
    grads = []
    for bs in (64, 16):
        learn = toy(bs=bs, labels=[0]*40 + [1]*16 + [2]*8).loss(kind).class_weights(W)
        if bs < 64: learn.grad_accum(4)
        learn.fit(1, cbs=(grab := Grab()))
        grads.append(grab.gradient)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


def test_batches_accumulate_by_the_weights_of_a_loss_that_was_replaced(toy):
    grads = []
    for bs in (64, 16):
        learn = toy(bs=bs, labels=[0]*40 + [1]*16 + [2]*8, loss_func=FocalLossFlat(weight=torch.tensor(W))).loss('ce')
        if bs < 64: learn.grad_accum(4)
        learn.fit(1, cbs=(grab := Grab()))
        grads.append(grab.gradient)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


def test_losses_of_a_whole_batch_are_averaged_where_batches_accumulate(toy):
    learn = toy().loss('soft_f1').grad_accum(4)
    batches = []
    class Seen(Callback):
        order = -1
        def after_pred(self):
            if self.learn.training: batches.append((self.learn.xb[0], self.learn.yb[0]))
    before = learn.model.weight.detach().clone(), learn.model.bias.detach().clone()
    learn.fit(1, cbs=[Seen(), grab := Grab()])
    w, b = (v.requires_grad_() for v in before)
    loss = sum(SoftDiceLoss()(F.linear(x, w, b), y) for x, y in batches)/4
    assert len(batches) == 4 and torch.allclose(grab.gradient, torch.autograd.grad(loss, w)[0], rtol=1e-4, atol=1e-7)


# other targets

NUMBERS = dict(mae=lambda p, y: (p-y).abs().mean(), rmse=lambda p, y: (p-y).square().mean().sqrt(), mape=lambda p, y: ((p-y)/y).abs().mean(),
               mspe=lambda p, y: ((p-y)/y).square().mean(), rmspe=lambda p, y: ((p-y)/y).square().mean().sqrt())


def of_numbers(toy, loss_func=None):
    learn = toy(loss_func=loss_func or MSELossFlat(), labels=torch.rand(64, 3, generator=torch.Generator().manual_seed(1))+.5)
    learn.metrics = []
    return learn


@pytest.mark.parametrize('kind', NUMBERS)
@pytest.mark.parametrize('mix', [False, True])
def test_numbers(toy, kind, mix):
    learn = of_numbers(toy).loss(kind)
    if mix: learn.mixup(.4)
    pred, y, loss, partner, share = first(learn)
    if mix: y = share[:, None]*y + (1-share[:, None])*y[partner]
    assert loss == pytest.approx(float(NUMBERS[kind](pred, y)), rel=1e-5)
    learn.fit(1)
    x, y = learn.dls.valid_ds.dataset.tensors
    assert learn.recorder.values[-1][1] == pytest.approx(F.mse_loss(learn.model(x), y).item(), rel=1e-5)


def test_the_loss_that_a_learner_has_is_said_to_change_nothing(toy, capsys):
    for learn, kind in ((toy(), 'ce'), (of_numbers(toy), 'mse'), (of_numbers(toy, L1LossFlat()), 'mae')):
        learn.loss(kind)
        assert f'loss: {kind} is the loss that the Learner has: nothing is changed' in capsys.readouterr().out and not objective(learn).acts
    learn = toy().loss('focal').loss('ce')
    assert objective(learn).instead is None
    pred, y, loss, *_ = first(toy(loss_func=nn.CrossEntropyLoss(label_smoothing=.2)).loss('ce'))
    assert loss == pytest.approx(F.cross_entropy(pred, y).item(), rel=1e-5)


LABELS = dict(focal=lambda p, y: SigmoidFocalLoss(2., .25)(p, y), hinge=lambda p, y: (1-(2*y-1)*p).relu().mean(),
              soft_f1=lambda p, y: 1-(2*(p.sigmoid()*y).sum(0)/(p.sigmoid()+y).sum(0)).mean())


@pytest.mark.parametrize('kind', LABELS)
def test_several_labels(toy, kind):
    learn = toy(loss_func=BCEWithLogitsLossFlat(), labels=(torch.rand(64, 3, generator=torch.Generator().manual_seed(1)) > .5).float())
    learn.metrics = []
    pred, y, loss, *_ = first(learn.loss(kind, **dict(alpha=.25) if kind == 'focal' else {}))
    assert loss == pytest.approx(float(LABELS[kind](pred, y)), rel=1e-5)
    learn.mixup(.4).fit(1)
    assert torch.allclose(learn.get_preds()[0], learn.model(learn.dls.valid_ds.dataset.tensors[0]).sigmoid(), atol=1e-6)


def of_masks(loss_func=None, own=CrossEntropyLossFlat):
    from tests.contract.test_other_learners import KINDS
    learn = KINDS['segmentation']()
    learn.loss_func = loss_func or own(axis=1)
    return learn


@pytest.mark.parametrize('kind, loss', [('dice', SoftDiceLoss(1.)), ('iou', IoULoss(1.)), ('focal', SoftmaxFocalLoss())])
@pytest.mark.parametrize('mix', [None, 'mixup', 'cutmix'])
def test_masks(kind, loss, mix):
    learn = of_masks().loss(kind, **dict(smooth=1.) if kind != 'focal' else {})
    if mix: getattr(learn, mix)(1.)
    pred, y, value, partner, share = first(learn)
    pred, y = (v.as_subclass(torch.Tensor) for v in (pred, y))
    if share is not None: y = torch.stack([share[i]*F.one_hot(y[i], 3) + (1-share[i])*F.one_hot(y[partner[i]], 3) for i in range(len(y))]).movedim(-1, 1)
    assert value == pytest.approx(float(loss(pred, y)), rel=1e-5)
    learn.fit(1)
    assert math.isfinite(learn.recorder.values[-1][0]) and learn.techniques['loss'].effect.startswith(kind)


@pytest.mark.parametrize('loss_func', [SoftDiceLoss(), IoULoss(), SoftmaxFocalLoss()])
def test_a_learner_made_with_a_loss_of_masks_predicts_and_shows_masks(loss_func):
    learn = of_masks(loss_func)
    learn.fit(1, 1e-2)
    p, y = learn.get_preds()
    assert torch.allclose(p.sum(1), torch.ones(len(p), 16, 16), atol=1e-5) and p.shape[1] == 3
    shown, mask, probabilities = learn.predict(0)
    assert mask.shape == (16, 16) and torch.equal(mask.as_subclass(torch.Tensor), probabilities.argmax(0).as_subclass(torch.Tensor))
    learn.show_results(max_n=2)
    whole = float(loss_func(*(torch.cat(t) for t in zip(*[(learn.model(x).detach(), y) for x, y in learn.dls.valid]))))
    assert learn.validate()[0] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize('make, kind, message', [
    (lambda toy: of_numbers(toy), 'focal', "loss: 'focal' is for one class a sample or .*, and these targets are numbers; for those there are mae, mse, rmse"),
    (lambda toy: toy(), 'dice', "loss: 'dice' is for a class a pixel.*these targets are one class a sample; for those there are .*soft_f1"),
    (lambda toy: of_masks(), 'soft_f1', 'these targets are a class a pixel; for those there are .*dice, iou'),
    (lambda toy: toy(), 'mbe', 'loss: mbe, .* is a metric and no loss: .*; train on mae or mse'),
    (lambda toy: toy(), 'focl', "loss: kind must be one of .*got 'focl'; did you mean 'focal'"),
    (lambda toy: toy(loss_func=lambda p, y: F.nll_loss(p.log_softmax(1), y)), 'focal', 'loss: .*does not tell whether targets are classes, labels or numbers'),
    (lambda toy: toy(loss_func=nn.BCELoss()), 'focal', 'loss: BCELoss.. does not tell .* that outputs are logits; give')])
def test_kinds_for_other_targets_are_refused_and_nothing_is_left(toy, make, kind, message):
    learn = make(toy)
    cbs = list(learn.cbs)
    with pytest.raises(ValueError, match=message): learn.loss(kind)
    assert list(learn.cbs) == cbs and not learn.techniques


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(kind='focal', gamma=-1.), ValueError, 'loss: gamma must be ≥ 0 and finite, got -1.0'),
    (dict(kind='focal', eps=.1), TypeError, "loss: 'focal' has no eps for one class a sample; it takes gamma"),
    (dict(kind='focal', alpha=.25), TypeError, "loss: 'focal' has no alpha for one class a sample; it takes gamma"),
    (dict(kind='hinge', margin='x'), ValueError, 'loss: margin must be a number'),
    (dict(kind='focal', gama=1.), TypeError, "loss: no argument 'gama'; did you mean 'gamma'"), (dict(), TypeError, "loss: missing a required argument: 'kind'")])
def test_settings_that_there_are_not(toy, kwargs, error, message):
    learn = toy()
    with pytest.raises(error, match=message): learn.loss(**kwargs)


def test_the_last_call_wins_and_one_that_is_refused_leaves_the_one_before(toy):
    learn = toy().loss('focal').loss('hinge')
    assert learn.techniques['loss'].arguments == dict(kind='hinge')
    with pytest.raises(ValueError): learn.loss('dice')
    assert learn.techniques['loss'].arguments == dict(kind='hinge')
    pred, y, loss, *_ = first(learn)
    assert loss == pytest.approx(F.multi_margin_loss(pred, y).item(), rel=1e-5)


@pytest.mark.parametrize('words, expected', [(['focal'], dict(kind='focal')), (['focal', '--loss.gamma', '3'], dict(kind='focal', gamma=3.))])
def test_at_the_command_line(toy, words, expected):
    from fastrecipes.flags import CommandLine
    def recipe(path: str, **techniques): pass
    given = CommandLine(recipe, 'recipe').parse(['photos', '--loss', *words])
    given.pop('path')
    assert TECHNIQUES['loss'].arguments(given['loss']) == expected
    pred, y, loss, *_ = first(toy().use(**given))
    assert loss == pytest.approx(float(SoftmaxFocalLoss(expected.get('gamma', 2.))(pred, y)), rel=1e-5)
    with pytest.raises(ValueError, match="--loss: .*got 'focl'; did you mean 'focal'"): CommandLine(recipe, 'recipe').parse(['photos', '--loss', 'focl'])
    with pytest.raises(TypeError, match='loss: needs kind'): toy().use(loss=True)


# the name that fastai gives to a batch's loss

def test_the_batchs_loss_is_a_number_in_the_batch_and_a_call_is_the_technique_always(toy):
    assert inspect.isfunction(Learner.loss) and Learner.loss is TECHNIQUES['loss'].f
    class Look(Callback):
        order = 55
        def before_fit(self): self.seen = []
        def after_batch(self): self.seen.append((float(self.learn.loss), float(self.loss), float(self.learn.loss_grad), type(self.learn.loss*2) is torch.Tensor))
    learn = toy()
    learn.fit(1, cbs=(look := Look()))
    assert len(look.seen) == 8 and all(a == b == c and plain for a, b, c, plain in look.seen)
    for leave in (lambda: learn.fit(1), learn.validate, learn.get_preds, lambda: learn.lr_find(num_it=6, show_plot=False), die(learn),
                  lambda: learn.one_batch(0, learn.dls.one_batch())):
        leave()
        assert learn.loss('focal') is learn and learn.loss('hinge').techniques['loss'].arguments == dict(kind='hinge')


def die(learn):
    class Die(Callback):
        order = 56
        def after_loss(self): raise KeyboardInterrupt
    def fit():
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Die())
        assert isinstance(learn.loss, torch.Tensor) and float(learn.loss) > 0
    return fit


def test_what_is_left_of_a_batch_can_be_copied_and_pickled(toy, tmp_path):
    from copy import copy, deepcopy
    learn = toy().loss('focal')
    learn.validate()
    value = float(learn.loss)
    for again in (copy(learn.loss), deepcopy(learn.loss), pickle.loads(pickle.dumps(learn.loss))): assert float(again) == value
    torch.save(learn.loss, tmp_path/'loss.pt')
    assert torch.load(tmp_path/'loss.pt') == value
    learn.export(tmp_path/'learn.pkl')
    from fastai.basics import load_learner
    again = load_learner(tmp_path/'learn.pkl')
    assert again.loss('hinge') is again


def test_a_batchs_loss_is_differentiated_and_added_to_as_any_tensor(toy):
    learn = toy()
    learn.model.train()
    learn.training = False
    for m in (learn.recorder.loss, *learn.metrics): m.reset()
    learn.one_batch(0, learn.dls.one_batch())
    (learn.loss*2 + 1).backward()
    assert learn.model.weight.grad.abs().sum() > 0 and type(learn.loss.detach()) is torch.Tensor


# our own losses, given to a Learner

def test_weighted_losses_over_classes_are_reported_by_the_weights_of_their_targets(toy):
    learn = toy(loss_func=SoftmaxFocalLoss(weight=W))
    x, y = learn.dls.valid_ds.dataset.tensors
    expected = by_hand('focal', learn.model(x).detach(), mixed(y, 3), W)
    for bs in (64, 9, 1):
        learn.dls.loaders[1] = learn.dls.valid.new(bs=bs)
        assert learn.validate()[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('loss_func, kind', [(SoftmaxFocalLoss(), 'focal'), (OneVsAllLoss(), 'bce')])
def test_a_loss_over_classes_takes_mixed_targets_as_the_learners_own(toy, loss_func, kind):
    pred, y, loss, partner, share = first(toy(loss_func=loss_func).mixup(.4))
    assert loss == pytest.approx(by_hand(kind, pred, mixed(y, 3, partner, share), [1.]*3), rel=1e-5)
