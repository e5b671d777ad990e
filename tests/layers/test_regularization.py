"The penalty against one step by hand, and what it leaves alone."
from functools import partial

import pytest
import torch
from fastai.basics import SGD, Adam, Callback, DataLoaders, Learner, OptimWrapper, nn
from fastai.callback.training import GradientAccumulation

from fastrecipes.layers.regularization import WeightDecay, WeightPenalty, decouples


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


# weight decay

def fitted(opt_func, technique, epochs=2, lr=.05, **kwargs):
    "The weights and biases of a small network after some steps, with what `technique` does to the Learner."
    torch.manual_seed(0)
    x, y = torch.randn(32, 4), torch.randn(32, 1)
    ds = list(zip(x, y))
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1))
    learn = Learner(DataLoaders.from_dsets(ds, ds, bs=8, shuffle=False, drop_last=False, device='cpu'), model, nn.MSELoss(), opt_func=opt_func, lr=lr, **kwargs)
    learn.logger = lambda row: None
    learn.remove_cb(learn.progress)
    learn.dls.loaders[0] = learn.dls.train.new(shuffle=False)
    technique(learn)
    learn.fit(epochs, lr)
    return [p.detach().clone() for p in model.parameters()]


def near(a, b, **kwargs): return all(torch.allclose(p, q, **kwargs) for p, q in zip(a, b))


def test_the_step_without_a_gradient_is_w_less_lr_wd_w(learn):
    learn.opt_func, learn.wd = Adam, None
    learn.weight_decay(.1)
    learn.fit(1, .5)
    assert learn.model.weight.tolist() == [pytest.approx([.95, -1.9])]          # w·(1 − .5·.1)


def test_under_sgd_it_is_the_penalty_of_half_the_squares_and_under_adam_it_is_not():
    "wd/2·Σw² by `weight_penalty`, which adds it to the loss that is differentiated."
    for opt_func, same in ((SGD, True), (Adam, False)):
        decayed, plain = (fitted(opt_func, lambda learn: learn.weight_decay(wd)) for wd in (.1, 0.))
        penalised = fitted(opt_func, lambda learn: learn.weight_decay(0.).weight_penalty(.05))
        assert near(decayed, penalised, atol=1e-6) == same and not near(decayed, plain, atol=1e-3)


def test_it_is_that_of_torchs_adamw():
    "Which decays biases and norms too."
    ours = fitted(partial(Adam, eps=1e-8, mom=.9, sqr_mom=.999), lambda learn: learn.weight_decay(.3), wd_bn_bias=True)
    theirs = fitted(partial(OptimWrapper, opt=torch.optim.AdamW), lambda learn: learn.weight_decay(.3), wd_bn_bias=True)
    assert near(ours, theirs, atol=1e-5)


class Everything:
    "For an optimizer of torch that knows weight decay as a penalty only."
    adam, adamw = (partial(OptimWrapper, opt=o, eps=1e-5) for o in (torch.optim.Adam, torch.optim.AdamW))


def test_an_optimizer_that_knows_it_as_a_penalty_only_is_made_to_decay():
    got = fitted(Everything.adam, lambda learn: learn.weight_decay(.3))
    expected = fitted(partial(Adam, eps=1e-5, mom=.9, sqr_mom=.999), lambda learn: learn.weight_decay(.3))
    coupled = fitted(Everything.adam, lambda learn: None, wd=.3)
    assert near(got, expected, atol=1e-4) and not near(got, coupled, atol=1e-3)


def test_which_optimizers_decouple():
    ps = lambda: [nn.Parameter(torch.ones(1))]
    assert decouples(Adam(ps(), lr=1.)) and decouples(SGD(ps(), lr=1.)) and not decouples(Adam(ps(), lr=1., decouple_wd=False))
    assert [decouples(OptimWrapper(ps(), o)) for o in (torch.optim.Adam, partial(torch.optim.SGD, lr=1.), torch.optim.AdamW)] == [False, False, True]


def test_biases_and_norms_are_left_alone_a_fit_may_have_its_own_and_the_last_call_wins():
    learn = None
    class Seen(Callback):
        def before_fit(self): self.wds = []
        def after_step(self): self.wds.append(self.learn.opt.hypers[0]['wd'])
    def keep(o): nonlocal learn; learn = o.weight_decay(.3).weight_decay(.2).add_cb(Seen())
    fitted(Adam, keep)
    assert set(learn.seen.wds) == {.2}
    learn.fit(1, .01, wd=.4)
    assert set(learn.seen.wds) == {.4} and [cb.wd for cb in learn.cbs if type(cb) is WeightDecay] == [.2]
    assert [learn.opt.state[p].get('do_wd', True) for p in learn.model.parameters()] == [True, False, False, False, True, False]
    assert not near(fitted(SGD, lambda o: o.weight_decay(0.)), fitted(SGD, lambda o: o.weight_decay(5.)), atol=1e-2)


def test_a_negative_decay_is_refused_and_none_is_said_aloud(learn, capsys):
    with pytest.raises(ValueError, match='weight_decay: wd must be ≥ 0, got -1'): learn.weight_decay(-1)
    learn.weight_decay(0.)
    assert 'weight_decay: a decay of 0: nothing is taken off' in capsys.readouterr().out
