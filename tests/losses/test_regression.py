"Losses for numbers against scikit-learn, sums by hand, and differences for derivatives."
import numpy as np
import pytest
import torch
from fastai.basics import Learner, nn
from fastai.data.core import DataLoaders
from sklearn import metrics as sk
from torch.utils.data import TensorDataset

from fastrecipes.losses.regression import L1LossFlat, MAPELoss, MSELossFlat, MSPELoss, RMSELoss, RMSPELoss

LOSSES = dict(mae=L1LossFlat, mse=MSELossFlat, rmse=RMSELoss, mape=MAPELoss, mspe=MSPELoss, rmspe=RMSPELoss)
SKLEARN = dict(mae=sk.mean_absolute_error, mse=sk.mean_squared_error, rmse=sk.root_mean_squared_error, mape=sk.mean_absolute_percentage_error,
               mspe=lambda y, p: sk.mean_squared_error(np.ones(y.size), (p/y).ravel()), rmspe=lambda y, p: sk.root_mean_squared_error(np.ones(y.size), (p/y).ravel()))


def numbers(*shape, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.uniform(.5, 3, shape)*rng.choice([-1, 1], shape)
    return y, y + rng.normal(0, .4, shape)


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('shape', [(37,), (20, 1), (20, 3), (6, 2, 2)])
def test_the_value_is_scikit_learns(name, shape):
    y, p = numbers(*shape)
    expected = SKLEARN[name](y.ravel() if name == 'rmse' else y.reshape(len(y), -1), p.ravel() if name == 'rmse' else p.reshape(len(y), -1))
    assert float(LOSSES[name]()(torch.tensor(p), torch.tensor(y))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('name, expected', [('mae', 1.5), ('mse', 2.5), ('rmse', 2.5**.5), ('mape', .75), ('mspe', .625), ('rmspe', .625**.5)])
def test_two_numbers_by_hand(name, expected):
    "Truths 2 and −2, errors −1 and 2: half of 2, all of −2."
    p, y = torch.tensor([1., 0.]), torch.tensor([2., -2.])
    assert float(LOSSES[name]()(p, y)) == pytest.approx(expected, rel=1e-6)
    assert float(LOSSES[name]()(y, y)) < 1e-15                                   # 0 at best


@pytest.mark.parametrize('name', LOSSES)
def test_the_gradient_is_that_of_differences(name):
    y, p = numbers(4, 3)
    loss = LOSSES[name]() if name not in ('mae', 'mse') else LOSSES[name]().func        # fastai's flat ones make targets 32 bits
    assert torch.autograd.gradcheck(lambda q: loss(q, torch.tensor(y)), torch.tensor(p, requires_grad=True))


@pytest.mark.parametrize('name', ['rmse', 'rmspe'])
def test_without_an_error_the_gradient_of_a_root_is_0_and_not_no_number(name):
    p = torch.ones(4, requires_grad=True)
    LOSSES[name]()(p, torch.ones(4)).backward()
    assert p.grad.tolist() == [0.]*4


@pytest.mark.parametrize('name', ['rmse', 'mape', 'mspe', 'rmspe'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_outputs_of_16_bits_are_computed_in_32(name, dtype):
    p, y = torch.tensor([300., -250., 4.], dtype=dtype), torch.tensor([1., -2., 3.])
    got = LOSSES[name]()(p, y)
    assert got.dtype == torch.float32 and float(got) == pytest.approx(SKLEARN[name](y.numpy(), p.float().numpy()), rel=1e-5)


@pytest.mark.parametrize('name', ['mape', 'mspe'])
def test_reductions(name):
    y, p = (torch.tensor(a) for a in numbers(5, 2))
    each = LOSSES[name](reduction='none')(p, y)
    assert each.shape == (5, 2) and float(each.sum()) == pytest.approx(float(LOSSES[name](reduction='sum')(p, y)))
    assert float(each.mean()) == pytest.approx(float(LOSSES[name]()(p, y)))


@pytest.mark.parametrize('name', ['rmse', 'rmspe'])
def test_unreduced_a_root_is_that_of_each_sample(name):
    y, p = numbers(5, 2)
    each = LOSSES[name](reduction='none')(torch.tensor(p), torch.tensor(y))
    assert each.tolist() == pytest.approx([float(SKLEARN[name](a, b)) for a, b in zip(y, p)])


def test_a_target_of_0_is_divided_by_the_floor():
    assert float(MAPELoss(floor=.5)(torch.tensor([1., 3.]), torch.tensor([0., 2.]))) == pytest.approx((1/.5 + .5)/2)
    assert float(RMSPELoss(floor=.5)(torch.tensor([1.]), torch.tensor([0.]))) == pytest.approx(2)


def test_a_column_and_a_row_are_not_spread_out_to_a_square():
    "torch would: (4, 1) against (4,) is (4, 4)."
    assert float(RMSELoss()(torch.arange(4.)[:, None], torch.arange(4.))) < 1e-15
    with pytest.raises(ValueError, match=r'RMSELoss: outputs and targets must be as many, got \(4, 3\) and \(4,\)'): RMSELoss()(torch.zeros(4, 3), torch.zeros(4))


@pytest.mark.parametrize('make, message', [
    (lambda: RMSELoss(reduction='sum'), "RMSELoss: reduction must be one of mean, none, got 'sum'"), (lambda: MAPELoss(reduction='men'), "got 'men'; did you mean 'mean'"),
    (lambda: MAPELoss(floor=0.), 'MAPELoss: floor must be > 0 and finite, got 0.0'), (lambda: RMSPELoss(floor=-1.), 'RMSPELoss: floor must be .*got -1.0')])
def test_what_is_out_of_its_domain(make, message):
    with pytest.raises(ValueError, match=message): make()


@pytest.mark.parametrize('name', LOSSES)
def test_validation_has_the_loss_of_the_whole_set_whatever_the_batch_size(name):
    y, p = numbers(50, 2)
    ds = TensorDataset(torch.tensor(p, dtype=torch.float32), torch.tensor(y, dtype=torch.float32))
    expected = SKLEARN[name](y.ravel(), p.ravel())
    for bs in (50, 16, 7, 1):
        learn = Learner(DataLoaders.from_dsets(ds, ds, bs=bs, num_workers=0, device='cpu'), nn.Linear(2, 2), LOSSES[name]())
        learn.remove_cb(learn.progress)
        with torch.no_grad(): learn.model.weight.copy_(torch.eye(2)), learn.model.bias.zero_()
        assert learn.validate()[0] == pytest.approx(expected, rel=1e-5)
        _, _, each = learn.get_preds(with_loss=True)
        assert len(each) == 50 and learn.loss_func.reduction == 'mean'
