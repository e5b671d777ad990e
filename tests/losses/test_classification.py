"Losses over classes and labels against torch, torchvision, scikit-learn, and sums by hand."
import copy
import pickle

import numpy as np
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, nn
from fastai.losses import FocalLossFlat, LabelSmoothingCrossEntropyFlat
from sklearn.metrics import hinge_loss, log_loss
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from fastrecipes.losses.classification import (BCEWithLogitsLossFlat, BinaryHingeLoss, HingeLoss, LabelSmoothingCrossEntropy, NLLLossFlat, OneVsAllLoss, SigmoidFocalLoss,
                                               SoftmaxFocalLoss, cross_entropy_of, soft_cross_entropy, soft_targets)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(50, 7, generator=g, dtype=torch.float64)*3, torch.randint(7, (50,), generator=g), torch.rand(7, generator=g, dtype=torch.float64)+.1


@pytest.mark.parametrize('smoothing', [0., .1])
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_one_hot_targets_give_torchs_cross_entropy(batch, smoothing, weighted, reduction):
    logits, y, w = batch
    y[::9] = -100
    expected = F.cross_entropy(logits, y, w if weighted else None, label_smoothing=smoothing, reduction=reduction)
    got = soft_cross_entropy(logits, soft_targets(y, 7), w if weighted else None, smoothing, reduction)
    assert torch.allclose(got, expected, rtol=1e-12)


def test_weights_are_normalised_by_each_class_share_of_a_soft_target():
    logits, target, w = torch.tensor([[0., 0.], [0., 0.]]), torch.tensor([[1., 0.], [.25, .75]]), torch.tensor([1., 3.])
    # both classes cost log 2, so whatever the weights the weighted mean is log 2; a plain mean of weighted losses would be 1.75 log 2
    assert soft_cross_entropy(logits, target, w).item() == pytest.approx(.693147, abs=1e-6)
    assert soft_cross_entropy(logits, target, w, reduction='sum').item() == pytest.approx(3.5*.693147, abs=1e-5)


def test_saturated_half_precision_logits_stay_finite():
    logits = torch.tensor([[6e4, -6e4]], dtype=torch.float16)
    assert soft_cross_entropy(logits, torch.tensor([[0., 1.]])).item() == pytest.approx(119_936, rel=1e-3)


# one class a sample or pixel

CLASSES = dict(focal=SoftmaxFocalLoss, bce=OneVsAllLoss, hinge=HingeLoss)


def each_by_hand(name, z, t, gamma=2., margin=1.):
    "The loss of one sample, class by class: logits `z` and probabilities `t`, both `(c,)`."
    c = len(z)
    if name == 'focal':
        p = [float(np.exp(a))/sum(float(np.exp(b)) for b in z) for a in z]
        return -sum(t[j]*(1-p[j])**gamma*np.log(p[j]) for j in range(c))
    if name == 'bce': return -sum(t[j]*np.log(1/(1+np.exp(-z[j]))) + (1-t[j])*np.log(1-1/(1+np.exp(-z[j]))) for j in range(c))/c
    return sum(t[y]*sum(max(0., margin-z[y]+z[j]) for j in range(c) if j != y)/c for y in range(c))


@pytest.mark.parametrize('name', CLASSES)
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_a_loss_over_classes_is_the_sum_by_hand(batch, name, weighted, soft, reduction):
    logits, y, w = batch
    t = F.one_hot(y, 7).double()
    if soft: t = .7*t + .3*t.flip(0)
    loss = CLASSES[name](weight=w if weighted else None, reduction=reduction)
    weight = w.numpy() if weighted else np.ones(7)
    share = (t.numpy()*weight).sum(1)
    if name == 'focal': each = [each_by_hand(name, z, row) for z, row in zip(logits.numpy(), t.numpy()*weight)]
    elif name == 'hinge': each = [each_by_hand(name, z, row) for z, row in zip(logits.numpy(), t.numpy()*weight)]
    else: each = [s*each_by_hand(name, z, row) for s, z, row in zip(share, logits.numpy(), t.numpy())]
    expected = torch.tensor(each) if reduction == 'none' else torch.tensor(sum(each)/(1 if reduction == 'sum' else share.sum()))
    assert torch.allclose(loss(logits, t if soft else y), expected, rtol=1e-6)


def test_focal_at_gamma_0_is_cross_entropy_and_falls_with_gamma(batch):
    logits, y, w = batch
    assert float(SoftmaxFocalLoss(0., weight=w)(logits, y)) == pytest.approx(float(F.cross_entropy(logits, y, w.float().double())), rel=1e-9)
    values = [float(SoftmaxFocalLoss(g)(logits, y)) for g in (0., .5, 1., 2., 5.)]
    assert values == sorted(values, reverse=True)
    assert float(SoftmaxFocalLoss(2.)(torch.zeros(1, 2), torch.tensor([1]))) == pytest.approx(.25*np.log(2))    # p = ½: (1−½)²·log 2


def test_fastais_focal_loss_is_ours_without_weights_and_focuses_by_the_weight_too_with_them(batch):
    "fastai 2.8.12 takes (1−p^w)^gamma, and the mean over samples."
    logits, y, w = batch
    assert float(SoftmaxFocalLoss()(logits, y)) == pytest.approx(float(FocalLossFlat()(logits, y)), rel=1e-6)
    p = logits.softmax(1)[range(50), y]
    paper = (w[y]*(1-p)**2*-p.log()).sum()/w[y].sum()
    assert float(SoftmaxFocalLoss(weight=w)(logits, y)) == pytest.approx(float(paper), rel=1e-6)
    assert float(FocalLossFlat(weight=w.float())(logits.float(), y)) != pytest.approx(float(paper), rel=1e-3)


def test_multi_class_hinge_is_torchs_and_the_margin_that_is_missing():
    "Crammer and Singer's of scikit-learn takes the worst rival only: of two classes that is all there are."
    z, y = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)).double(), torch.arange(30) % 2
    assert float(HingeLoss()(z, y)) == pytest.approx(float(nn.MultiMarginLoss()(z, y)), rel=1e-9)
    three = torch.cat([z, torch.full((30, 1), -1e6).double()], 1)
    assert 3*float(HingeLoss()(three, y)) == pytest.approx(hinge_loss(y, three.numpy(), labels=[0, 1, 2]), rel=1e-9)
    assert float(HingeLoss(.5)(z, y)) == pytest.approx(float(nn.MultiMarginLoss(margin=.5)(z, y)), rel=1e-9)


def test_one_vs_all_is_the_log_loss_of_every_class(batch):
    logits, y, _ = batch
    p = torch.sigmoid(logits).numpy()
    assert float(OneVsAllLoss()(logits, y)) == pytest.approx(np.mean([log_loss(y == j, p[:, j], labels=[False, True]) for j in range(7)]), rel=1e-9)


@pytest.mark.parametrize('name', CLASSES)
def test_ignored_targets_have_no_part_and_masks_are_many_samples(batch, name):
    logits, y, w = batch
    y[::9] = -100
    loss = CLASSES[name](weight=w)
    kept = y != -100
    assert float(loss(logits, y)) == pytest.approx(float(loss(logits[kept], y[kept])), rel=1e-9)
    masks, targets = logits.view(2, 5, 5, 7).movedim(-1, 1), y.view(2, 5, 5)
    assert float(loss(masks, targets)) == pytest.approx(float(loss(logits, y)), rel=1e-9)
    each = CLASSES[name](weight=w, reduction='none')(masks, targets)
    assert each.shape == (2, 5, 5) and not each[targets == -100].any()
    assert float(CLASSES[name](weight=w, axis=-1)(masks.movedim(1, -1), targets)) == pytest.approx(float(loss(logits, y)), rel=1e-9)


@pytest.mark.parametrize('name', CLASSES)
def test_a_batch_of_which_all_is_ignored_trains_nothing(name):
    z = torch.randn(4, 3, requires_grad=True)
    CLASSES[name](reduction='sum')(z, torch.full((4,), -100)).backward()
    assert not z.grad.any()


@pytest.mark.parametrize('name', CLASSES)
@pytest.mark.parametrize('axis', [1, -1])
def test_probabilities_and_answers_are_taken_along_the_axis(name, axis):
    z = torch.randn(2, 4, 5, 6)
    loss = CLASSES[name](axis=axis)
    p = loss.activation(z.movedim(1, axis))
    assert torch.equal(loss.decodes(p), z.argmax(1)) and torch.allclose(p.movedim(axis, 1), z.sigmoid() if name == 'bce' else z.softmax(1))


def test_a_log_likelihood_of_masks():
    z, y = torch.randn(2, 4, 5, 6), torch.randint(4, (2, 5, 6))
    loss, logp = NLLLossFlat(axis=1), z.log_softmax(1)
    assert float(loss(logp, y)) == pytest.approx(float(F.nll_loss(logp, y)), rel=1e-6)
    assert torch.allclose(loss.activation(logp), z.softmax(1), atol=1e-6) and torch.equal(loss.decodes(loss.activation(logp)), z.argmax(1))
    assert cross_entropy_of(loss).axis == 1 and cross_entropy_of(nn.NLLLoss(ignore_index=3)).ignore_index == 3 and cross_entropy_of(F.nll_loss) is not None


def test_cross_entropy_is_scikit_learns_log_loss(batch):
    logits, y, _ = batch
    assert float(CrossEntropyLossFlat()(logits, y)) == pytest.approx(log_loss(y, logits.softmax(1).numpy(), labels=range(7)), rel=1e-6)


@pytest.mark.parametrize('eps', [.1, .3])
def test_fastais_label_smoothing_is_torchs_along_any_axis(eps):
    z, y = torch.randn(2, 4, 5, 6), torch.randint(4, (2, 5, 6))
    for reduction in ('mean', 'sum', 'none'):
        expected = F.cross_entropy(z, y, label_smoothing=eps, reduction=reduction)
        assert torch.allclose(LabelSmoothingCrossEntropy(eps, reduction=reduction)(z, y), expected, rtol=1e-5)
        assert torch.allclose(LabelSmoothingCrossEntropyFlat(eps=eps, reduction=reduction, axis=1)(z, y).sum(), expected.sum(), rtol=1e-5)
    assert LabelSmoothingCrossEntropy().eps == .1 and LabelSmoothingCrossEntropy().reduction == 'mean'


def test_fastais_label_smoothing_takes_the_softmax_of_a_masks_width_and_not_here():
    "fastai 2.8.12: `LabelSmoothingCrossEntropy` computes along axis 1 and answers along the last."
    z = torch.randn(2, 4, 5, 6)
    loss = LabelSmoothingCrossEntropy()
    assert torch.allclose(loss.activation(z), z.softmax(1)) and torch.equal(loss.decodes(z), z.argmax(1))


# several labels

@pytest.fixture
def labels():
    g = torch.Generator().manual_seed(0)
    return torch.randn(40, 5, generator=g).double()*3, (torch.rand(40, 5, generator=g) > .6).double()


@pytest.mark.parametrize('gamma', [0., 1., 2., 5.])
@pytest.mark.parametrize('alpha', [None, .25, 1.])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_focal_of_labels_is_torchvisions(labels, gamma, alpha, reduction):
    z, t = labels
    expected = sigmoid_focal_loss(z, t, -1 if alpha is None else alpha, gamma, reduction)
    assert torch.allclose(SigmoidFocalLoss(gamma, alpha, reduction)(z, t), expected, rtol=1e-9)


def test_torchvisions_gradient_of_a_saturated_label_is_no_number_and_ours_is_0():
    grads = []
    for f in (lambda z, t: sigmoid_focal_loss(z, t, -1, .5), SigmoidFocalLoss(.5, reduction='none')):
        z = torch.tensor([200.], requires_grad=True)
        f(z, torch.ones(1)).sum().backward()
        grads.append(float(z.grad))
    assert np.isnan(grads[0]) and grads[1] == 0


def test_a_label_between_0_and_1_costs_both_in_its_proportion(labels):
    z, t = labels
    for loss in (SigmoidFocalLoss(2., .25, 'none'), BinaryHingeLoss(reduction='none')):
        assert torch.allclose(loss(z, torch.full_like(t, .3)), .3*loss(z, torch.ones_like(t)) + .7*loss(z, torch.zeros_like(t)))


def test_binary_hinge_is_scikit_learns(labels):
    z, t = labels
    assert float(BinaryHingeLoss()(z, t)) == pytest.approx(np.mean([hinge_loss(t[:, j].numpy(), z[:, j].numpy()) for j in range(5)]), rel=1e-9)
    assert BinaryHingeLoss(2., 'none')(torch.tensor([.5, .5]), torch.tensor([1, 0])).tolist() == [1.5, 2.5]


def test_binary_cross_entropy_of_labels_is_scikit_learns_log_loss(labels):
    z, t = labels
    assert float(BCEWithLogitsLossFlat()(z, t)) == pytest.approx(np.mean([log_loss(t[:, j].numpy(), z[:, j].sigmoid().numpy()) for j in range(5)]), rel=1e-6)


def test_labels_of_another_number_than_outputs_are_refused():
    with pytest.raises(ValueError, match=r'SigmoidFocalLoss: outputs and targets must be as many, got \(4, 3\) and \(4,\)'): SigmoidFocalLoss()(torch.zeros(4, 3), torch.zeros(4))


# both

ALL = dict(focal=SoftmaxFocalLoss(), focal_half=SoftmaxFocalLoss(.5), bce=OneVsAllLoss(), hinge=HingeLoss(),
           focal_labels=SigmoidFocalLoss(2., .25), focal_labels_half=SigmoidFocalLoss(.5), hinge_labels=BinaryHingeLoss())


def targets_for(name): return torch.tensor([[0., 1.]]) if 'labels' in name else torch.tensor([1])


@pytest.mark.parametrize('name', ALL)
def test_the_gradient_is_that_of_differences(name):
    z = torch.tensor([[.3, -.2, 1.1], [2., .1, -.4]], dtype=torch.float64, requires_grad=True)
    soft = torch.tensor([[.2, .5, .3], [0., 1., 0.]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q: ALL[name](q, soft), z)


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize('z', [[6e4, -6e4], [-6e4, 6e4], [0., 0.]], ids=str)
def test_saturated_logits_of_any_precision_give_finite_losses_and_gradients(name, dtype, z):
    pred = torch.tensor([z], dtype=dtype, requires_grad=True)
    loss = ALL[name](pred, targets_for(name))
    loss.backward()
    assert loss.dtype == torch.float32 and bool(loss.isfinite()) and bool(pred.grad.isfinite().all())
    exact = float(ALL[name](pred.detach().double(), targets_for(name).double() if 'labels' in name else targets_for(name)))
    assert loss.item() == pytest.approx(exact, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize('name', CLASSES)
def test_weights_are_a_buffer_and_the_loss_is_copied_and_pickled(batch, name):
    logits, y, w = batch
    loss = CLASSES[name](weight=w.tolist())
    assert torch.equal(loss.state_dict()['weight'], w.float()) and loss.to(torch.float64).weight.dtype == torch.float64
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))): assert again(logits, y) == loss(logits, y)


@pytest.mark.parametrize('make, message', [
    (lambda: SoftmaxFocalLoss(-1.), 'SoftmaxFocalLoss: gamma must be ≥ 0 and finite, got -1.0'),
    (lambda: SigmoidFocalLoss(alpha=1.5), r'SigmoidFocalLoss: alpha must be in \[0, 1\], got 1.5'),
    (lambda: HingeLoss(0.), 'HingeLoss: margin must be > 0 and finite, got 0.0'), (lambda: BinaryHingeLoss(-1.), 'BinaryHingeLoss: margin must be'),
    (lambda: OneVsAllLoss(reduction='avg'), "OneVsAllLoss: reduction must be one of mean, sum, none, got 'avg'")])
def test_what_is_out_of_its_domain(make, message):
    with pytest.raises(ValueError, match=message): make()
