"The penalty against one step by hand, and what it leaves alone."
import pytest
import torch
from fastai.basics import SGD, DataLoaders, Learner, nn
from fastai.callback.training import GradientAccumulation

from fastrecipes.layers.regularization import WeightPenalty


@pytest.fixture
def learn():
    "One weight matrix [[1, -2]], zero inputs: the data contribute no gradient, the penalty all of it."
    model = nn.Linear(2, 1)
    model.weight.data, model.bias.data = torch.tensor([[1., -2.]]), torch.zeros(1)
    ds = [(torch.zeros(2), torch.zeros(1))]*4
    learn = Learner(DataLoaders.from_dsets(ds, ds, bs=4, device='cpu'), model, nn.MSELoss(), opt_func=SGD, lr=1., wd=0.)
    learn.logger = lambda row: None
    learn.remove_cb(learn.progress)
    return learn


@pytest.mark.parametrize('l1, l2, after', [(.1, 0., [.9, -1.9]), (0., .1, [.8, -1.6]), (.1, .1, [.7, -1.5])])
def test_one_step_descends_the_penalty(learn, l1, l2, after):
    learn.weight_penalty(l2, l1).fit(1)                     # w − lr·(l1·sign w + 2·l2·w)
    assert learn.model.weight.tolist() == [pytest.approx(after)]
    assert learn.recorder.values[-1] == [0., 0.]            # reported losses: the data's alone


def test_it_counts_once_a_step_under_accumulation(learn):
    learn.dls.loaders = [dl.new(bs=2, drop_last=False) for dl in learn.dls.loaders]
    learn.weight_penalty(.1).fit(1, cbs=GradientAccumulation(4))
    assert learn.model.weight.tolist() == [pytest.approx([.8, -1.6])]


def test_biases_norms_and_frozen_weights_are_left_alone(learn):
    learn.model.bias.data.fill_(1.)
    learn.model = nn.Sequential(learn.model, nn.BatchNorm1d(1))
    learn.model[0].weight.requires_grad_(False)
    learn.weight_penalty(.1)
    learn.create_opt()
    learn.opt.set_hypers(lr=0.)
    seen = learn.weight_penalty_cb
    learn.loss_grad, learn.training, learn.yb, learn.iter = torch.tensor(1.), True, (1,), 1
    seen.after_loss()
    assert float(learn.loss_grad) == 1.


def test_the_last_call_wins_and_the_method_survives(learn):
    learn.weight_penalty(.1).weight_penalty(.3)
    assert [cb.l2 for cb in learn.cbs if isinstance(cb, WeightPenalty)] == [.3]


def test_a_negative_strength_is_refused(learn):
    with pytest.raises(ValueError, match='weight_penalty: l1 and l2 must be ≥ 0, got l1=0.0, l2=-1'): learn.weight_penalty(-1)


def test_no_penalty_is_said_aloud(learn, capsys):
    learn.weight_penalty(0.)
    assert 'weight_penalty: both strengths are 0' in capsys.readouterr().out
