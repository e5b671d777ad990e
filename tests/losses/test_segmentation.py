"Losses of overlap against scikit-learn where predictions are 0 or 1, sums by hand where they are not."
import copy
import pickle

import numpy as np
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, nn
from fastai.data.core import DataLoaders
from sklearn.metrics import f1_score, jaccard_score
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastrecipes.losses.segmentation import IoULoss, SoftDiceLoss, SoftF1Loss

HARD = 1e4                                      # logits so far apart that their softmax is 0 or 1
SCORES = {SoftDiceLoss: f1_score, SoftF1Loss: f1_score, IoULoss: jaccard_score}
OVERLAPS = list(SCORES)


def masks(n=3, c=4, h=6, w=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, h, w, generator=g, dtype=torch.float64), torch.randint(c, (n, h, w), generator=g)


def by_hand(loss, probs, target, weight=None, smooth=1e-6):
    "Class by class and pixel by pixel, from probabilities `(n, c)` and shares `(n, c)`."
    scores = []
    for j in range(probs.shape[1]):
        tp = sum(float(p*t) for p, t in zip(probs[:, j], target[:, j]))
        fp = sum(float(p*(1-t)) for p, t in zip(probs[:, j], target[:, j]))
        fn = sum(float((1-p)*t) for p, t in zip(probs[:, j], target[:, j]))
        scores.append((tp+smooth)/(tp+fp+fn+smooth) if loss is IoULoss else (2*tp+smooth)/(2*tp+fp+fn+smooth))
    return 1-np.average(scores, weights=weight)


@pytest.mark.parametrize('loss', OVERLAPS)
@pytest.mark.parametrize('seed', range(3))
def test_of_hard_predictions_it_is_scikit_learns_macro_score(loss, seed):
    z, y = masks(seed=seed)
    guess = z.argmax(1)
    logits = HARD*F.one_hot(guess, 4).movedim(-1, 1).double()
    expected = 1-SCORES[loss](y.ravel(), guess.ravel(), average='macro')
    assert float(loss()(logits, y)) == pytest.approx(expected, abs=1e-6)
    flat = loss()(logits.movedim(1, -1).reshape(-1, 4), y.ravel())               # samples instead of pixels
    assert float(flat) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('loss', OVERLAPS)
def test_of_hard_labels_it_is_scikit_learns_too(loss):
    g = torch.Generator().manual_seed(0)
    guess, y = (torch.rand(40, 5, generator=g) > .5 for _ in range(2))
    expected = 1-SCORES[loss](y.numpy(), guess.numpy(), average='macro')
    assert float(loss(multi_label=True)(HARD*(2*guess.double()-1), y.double())) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('loss', OVERLAPS)
@pytest.mark.parametrize('weight', [None, [3., 1., .5, 0.]])
@pytest.mark.parametrize('smooth', [1e-6, 1.])
def test_of_probabilities_it_is_the_sum_by_hand(loss, weight, smooth):
    z, y = masks(2, h=3, w=2)
    shares = F.one_hot(y, 4).reshape(-1, 4)
    expected = by_hand(loss, z.softmax(1).movedim(1, -1).reshape(-1, 4), shares, weight, smooth)
    assert float(loss(smooth, weight=weight)(z, y)) == pytest.approx(expected, rel=1e-6)
    soft = torch.rand(2, 4, 3, 2, generator=torch.Generator().manual_seed(1)).softmax(1).double()
    expected = by_hand(loss, z.softmax(1).movedim(1, -1).reshape(-1, 4), soft.movedim(1, -1).reshape(-1, 4), weight, smooth)
    assert float(loss(smooth, weight=weight)(z, soft)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('loss', OVERLAPS)
def test_several_labels_have_a_sigmoid_each(loss):
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(8, 3, generator=g).double(), torch.rand(8, 3, generator=g).double()
    assert float(loss(multi_label=True)(z, t)) == pytest.approx(by_hand(loss, 1/(1+(-z).exp()), t), rel=1e-6)


@pytest.mark.parametrize('loss', OVERLAPS)
def test_ignored_pixels_have_no_part(loss):
    z, y = masks()
    y[:, ::2] = 255
    kept = y != 255
    expected = by_hand(loss, z.softmax(1).movedim(1, -1)[kept], F.one_hot(y[kept], 4))
    assert float(loss(ignore_index=255)(z, y)) == pytest.approx(expected, rel=1e-6)
    z.requires_grad_()
    loss(ignore_index=255)(z, y).backward()
    assert not z.grad[:, :, ::2].any() and z.grad[:, :, 1::2].any()


def test_one_pixel_by_hand_and_the_range():
    "Probabilities ½ and ½, class 0: TP ½, FN ½ and FP ½ of the classes: Dice 2/3 and 0, IoU ½ and 0."
    z, y = torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)
    assert float(SoftDiceLoss()(z, y)) == pytest.approx(1-(2/3+0)/2, abs=1e-5) and float(IoULoss()(z, y)) == pytest.approx(1-(.5+0)/2, abs=1e-5)
    right = HARD*torch.tensor([1., -1.]).view(1, 2, 1, 1)
    for loss in OVERLAPS: assert float(loss()(right, y)) == pytest.approx(0, abs=1e-6) and float(loss()(-right, y)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('loss', OVERLAPS)
def test_unreduced_it_is_that_of_each_sample_alone(loss):
    z, y = masks()
    each = loss(reduction='none')(z, y)
    assert each.shape == (3,) and each.tolist() == pytest.approx([float(loss()(z[i:i+1], y[i:i+1])) for i in range(3)])


@pytest.mark.parametrize('loss', OVERLAPS)
def test_the_gradient_is_that_of_differences(loss):
    z, y = masks(2, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda q: loss(weight=[1., 2., .5])(q, y), z.requires_grad_())
    assert torch.autograd.gradcheck(lambda q: loss(multi_label=True)(q, F.one_hot(y, 3).movedim(-1, 1)), z)


@pytest.mark.parametrize('loss', OVERLAPS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_16_bits_and_saturated_logits(loss, dtype):
    "100 000 pixels: in 16 bits their sum would not even be a number."
    z = torch.zeros(1, 2, 250, 400, dtype=dtype)
    z[:, 0] = 6e4
    y = torch.zeros(1, 250, 400, dtype=torch.long)
    y[:, :125] = 1
    z.requires_grad_()
    value = loss()(z, y)                        # all pixels class 0, half of them rightly: Dice 2/3 and 0, IoU ½ and 0
    value.backward()
    assert value.dtype == torch.float32 and value.item() == pytest.approx(1-(.5 if loss is IoULoss else 2/3)/2, abs=1e-5) and bool(z.grad.isfinite().all())


@pytest.mark.parametrize('axis', [1, -1])
def test_probabilities_and_answers_are_taken_along_the_axis_of_the_classes(axis):
    z, y = masks()
    pred = z.movedim(1, axis)
    for loss, plain in ((SoftDiceLoss(axis=axis), SoftDiceLoss()), (IoULoss(axis=axis), IoULoss()), (CrossEntropyLossFlat(axis=axis), nn.CrossEntropyLoss())):
        p = loss.activation(pred)
        assert torch.allclose(p.sum(axis), torch.ones(3, 6, 5).double()) and torch.equal(loss.decodes(p), z.argmax(1))
        assert float(loss(pred, y)) == pytest.approx(float(plain(z, y)))
    labels = SoftDiceLoss(multi_label=True)
    assert torch.allclose(labels.activation(z), z.sigmoid()) and torch.equal(labels.decodes(labels.activation(z)), z > 0)


def test_weights_are_a_buffer_and_the_loss_is_copied_and_pickled():
    loss = SoftDiceLoss(.5, weight=[1., 2.])
    assert loss.state_dict()['weight'].tolist() == [1., 2.] and loss.to(torch.float64).weight.dtype == torch.float64
    z, y = masks(c=2)
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))): assert again(z, y) == loss(z, y) and again.smooth == .5


@pytest.mark.parametrize('make, message', [(lambda: SoftDiceLoss(0.), 'SoftDiceLoss: smooth must be > 0 and finite, got 0.0'), (lambda: IoULoss(-1.), 'IoULoss: smooth must be'),
                                           (lambda: SoftF1Loss(reduction='sum'), "SoftF1Loss: reduction must be one of mean, none, got 'sum'")])
def test_what_is_out_of_its_domain(make, message):
    with pytest.raises(ValueError, match=message): make()


@pytest.mark.parametrize('loss', OVERLAPS)
def test_validation_has_the_loss_of_the_whole_set_whatever_the_batch_size(loss):
    x, y = masks(24, 3, 4, 4)
    ds = TensorDataset(x.float(), y)
    values = []
    for bs in (24, 10, 5, 1):
        learn = Learner(DataLoaders.from_dsets(ds, ds, bs=bs, num_workers=0, device='cpu'), nn.Conv2d(3, 3, 1), loss())
        learn.remove_cb(learn.progress)
        with torch.no_grad(): learn.model.weight.copy_(torch.eye(3)[..., None, None]), learn.model.bias.zero_()
        expected = by_hand(loss, x.softmax(1).movedim(1, -1).reshape(-1, 3), F.one_hot(y, 3).reshape(-1, 3))
        values.append(learn.validate()[0])
        p, t, each = learn.get_preds(with_loss=True)
        assert torch.allclose(p, x.softmax(1).float(), atol=1e-6) and each.shape == (24,)
    assert values == pytest.approx([expected]*4, rel=1e-5)
