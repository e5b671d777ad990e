"Values and slopes against closed forms in NumPy, constants against what their papers claim of them, networks against ones that were built with the activation."
import math

import numpy as np
import pytest
import timm
import torch
from fastai.basics import Learner, nn
from scipy.special import erf
from torch.nn import functional as F

from fastrecipes.layers import activations
from fastrecipes.layers.activations import (ACTIVATIONS, GLU, HIDDEN, SERLU, ClampGate, MyActFunc1, MyActFunc2, MyActFunc3, RationalGate, ShiftedReLU, ShiftedTanhGate, Softmax,
                                            TanhGate, plot_activations)

from .learners import digits, pictures

X = np.array([-6., -3., -1.7, -.9, -.4, -.05, .05, .3, .8, 1.9, 4.])       # away from the kinks at −1 and 0


def sigma(x): return 1/(1+np.exp(-x))
def softplus(x): return np.log1p(np.exp(x))
def left(x, a, b): return np.where(x < 0, a, b)


LAMBDA, ALPHA = 1.0507009873554805, 1.6732632423543772
FORMULAS = dict(             # (value, slope), written down from the papers
    sigmoid=(sigma, lambda x: sigma(x)*(1-sigma(x))),
    tanh=(np.tanh, lambda x: 1/np.cosh(x)**2),
    relu=(lambda x: left(x, 0, x), lambda x: left(x, 0, 1)),
    shifted_relu=(lambda x: left(x, 0, x)-.5, lambda x: left(x, 0, 1)),
    leaky_relu=(lambda x: left(x, .01*x, x), lambda x: left(x, .01, 1)),
    prelu=(lambda x: left(x, .25*x, x), lambda x: left(x, .25, 1)),
    elu=(lambda x: left(x, np.expm1(x), x), lambda x: left(x, np.exp(x), 1)),
    selu=(lambda x: LAMBDA*left(x, ALPHA*np.expm1(x), x), lambda x: LAMBDA*left(x, ALPHA*np.exp(x), 1)),
    serlu=(lambda x: 1.07862*left(x, 2.90427*x*np.exp(x), x), lambda x: 1.07862*left(x, 2.90427*(1+x)*np.exp(x), 1)),
    gelu=(lambda x: x*(1+erf(x/2**.5))/2, lambda x: (1+erf(x/2**.5))/2 + x*np.exp(-x*x/2)/math.sqrt(2*math.pi)),
    swish=(lambda x: x*sigma(x), lambda x: sigma(x)*(1+x*(1-sigma(x)))),
    elish=(lambda x: left(x, np.exp(x)-1, x)*sigma(x), lambda x: left(x, np.exp(x), 1)*sigma(x) + left(x, np.exp(x)-1, x)*sigma(x)*(1-sigma(x))),
    mish=(lambda x: x*np.tanh(softplus(x)), lambda x: np.tanh(softplus(x)) + x*sigma(x)/np.cosh(softplus(x))**2),
    tanh_gate=(lambda x: .5*x*(np.tanh(x)+1), lambda x: .5*(np.tanh(x)+1) + .5*x/np.cosh(x)**2),
    shifted_tanh_gate=(lambda x: .5*x*(np.tanh(x+1)+1), lambda x: .5*(np.tanh(x+1)+1) + .5*x/np.cosh(x+1)**2),
    clamp_gate=(lambda x: x*((2*x+1)/(abs(x+1)+abs(x))*.5+.5), lambda x: np.where(x < -1, 0, left(x, 2*x+1, 1))))


@pytest.mark.parametrize('name', FORMULAS)
def test_values_and_slopes_are_those_of_the_formula(name):
    value, slope = FORMULAS[name]
    x = torch.tensor(X, requires_grad=True)
    y = ACTIVATIONS[name]().double()(x)
    g, = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == pytest.approx(value(X).tolist(), rel=1e-9, abs=1e-12) and g.tolist() == pytest.approx(slope(X).tolist(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize('name', FORMULAS)
def test_slopes_are_those_of_finite_differences(name):
    assert torch.autograd.gradcheck(ACTIVATIONS[name]().double(), torch.tensor(X, requires_grad=True))


def test_every_activation_of_the_table_has_its_formula_here(): assert {*FORMULAS, 'softmax', 'glu'} == set(ACTIVATIONS)


@pytest.mark.parametrize('name', HIDDEN)
def test_slopes_far_out_are_numbers_and_half_precision_comes_back_as_it_went_in(name):
    x = torch.tensor([-1e4, -200., 0., 200., 1e4], requires_grad=True)
    g, = torch.autograd.grad(ACTIVATIONS[name]()(x).sum(), x)
    assert g.isfinite().all()
    assert ACTIVATIONS[name]().to(torch.bfloat16)(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_serlu_keeps_mean_0_and_variance_1_which_is_what_its_constants_are_for():
    "arXiv:1807.10117: of x ~ N(0, 1), E f = 0 and E f² = 1; by the trapezoidal rule."
    x = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    weight = torch.exp(-x*x/2)/math.sqrt(2*math.pi)
    y = SERLU()(x)
    assert float(torch.trapezoid(weight*y, x)) == pytest.approx(0, abs=1e-5) and float(torch.trapezoid(weight*y*y, x)) == pytest.approx(1, abs=1e-5)


def test_the_gates_have_the_other_names_and_forms_by_which_they_are_known():
    assert (MyActFunc1, MyActFunc2, MyActFunc3, RationalGate) == (TanhGate, ShiftedTanhGate, ClampGate, ClampGate)
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    assert torch.allclose(TanhGate()(x), x*(2*x).sigmoid())
    assert torch.allclose(ClampGate()(x), x*(x+1).clamp(0, 1)) and ClampGate()(torch.tensor([-1., 0.])).tolist() == [0., 0.]
    assert ShiftedReLU()(torch.tensor([-2., 0., 2.])).tolist() == [-.5, -.5, 1.5]


def test_glu_is_one_linear_layer_gating_another():
    torch.manual_seed(0)
    unit, x = GLU(5, 3), torch.randn(4, 7, 5)
    w1, b1, w2, b2 = (p.detach().numpy() for p in unit.parameters())
    assert np.allclose(unit(x).detach().numpy(), (x.numpy() @ w1.T + b1)*sigma(x.numpy() @ w2.T + b2), atol=1e-6)
    both = torch.cat([unit.linear1(x), unit.linear2(x)], -1)
    assert torch.allclose(unit(x), F.glu(both))                                         # torch's, fed with both halves
    assert GLU(5)(x).shape == x.shape
    with pytest.raises(ValueError, match='GLU: n_out must be ≥ 1, got 0'): GLU(5, 0)


def test_softmax_is_that_of_torch(): assert Softmax is nn.Softmax and ACTIVATIONS['relu'] is nn.ReLU and ACTIVATIONS['swish'] is nn.SiLU and ACTIVATIONS['mish'] is nn.Mish


# the swap

@pytest.mark.parametrize('arch', ['resnet10t', 'efficientnet_lite0', 'vit_tiny_patch16_224', 'resnetv2_50', 'convnext_atto'])
def test_a_network_of_timm_is_the_one_that_is_built_with_the_activation(arch):
    "Also where norm and activation are one layer (BatchNormAct2d), and where the activation is shared."
    kw = dict(img_size=32) if 'vit' in arch else {}
    torch.manual_seed(0)
    net, built = timm.create_model(arch, num_classes=3, **kw), timm.create_model(arch, num_classes=3, act_layer=nn.Mish, **kw)
    built.load_state_dict(net.state_dict())
    learn, x = pictures(net), torch.rand(2, 3, 32, 32)
    plain = net.eval()(x)
    learn.activation('mish')
    assert torch.equal(learn.model.eval()(x), built.eval()(x)) and not torch.equal(plain, built(x))
    assert list(learn.model.state_dict()) == list(built.state_dict())


def test_a_number_is_said_and_what_was_there():
    learn = digits().activation('swish')
    assert learn.techniques['activation'].effect == '2 replaced by SiLU (they were ReLU)'
    assert [type(m).__name__ for m in learn.model] == ['Conv2d', 'SiLU', 'Conv2d', 'SiLU', 'AdaptiveAvgPool2d', 'Flatten', 'Linear']


def test_the_last_call_wins_and_the_same_again_is_said_aloud(capsys):
    learn = digits().activation('swish').activation('serlu')
    assert [type(m) for m in learn.model if isinstance(m, (SERLU, nn.SiLU))] == [SERLU, SERLU] and 'they were SiLU' in learn.techniques['activation'].effect
    learn.activation('serlu')
    assert 'all 2 are SERLU already' in capsys.readouterr().out


def test_a_layer_that_is_there_twice_is_replaced_once():
    act = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 4, 3), act, nn.Flatten(), nn.LazyLinear(3))
    net(torch.zeros(1, 3, 32, 32))
    learn = pictures(net).activation('prelu')
    assert net[1] is net[3] and isinstance(net[1], nn.PReLU) and learn.techniques['activation'].effect.startswith('1 replaced')


class Functional(nn.Module):
    def __init__(self, inner=False):
        super().__init__()
        self.head, self.conv, self.act = nn.Linear(4, 3), nn.Conv2d(3, 4, 3), nn.ReLU() if inner else None      # the head first, though it answers
    def forward(self, x):
        x = F.relu(self.conv(x))
        if self.act is not None: x = self.act(x-.1)
        return self.head(torch.relu(x).mean((2, 3)))


def test_functions_cannot_be_exchanged_and_are_counted():
    learn = pictures(Functional(inner=True)).activation('mish')
    assert learn.techniques['activation'].effect == '1 replaced by Mish (they were ReLU); functions in a `forward` stay: 2 relu'
    with pytest.raises(ValueError, match='activation: the network has no activation between its layers but functions in a `forward` .2 relu.; write them as modules'):
        pictures(Functional()).activation('mish')


def test_gates_and_what_is_behind_the_last_layer_are_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.last, self.gate = nn.ReLU(), nn.Tanh(), nn.Sigmoid()
            self.head, self.conv = nn.Linear(4, 3), nn.Conv2d(3, 4, 3)
        def forward(self, x):
            x = self.act(self.conv(x))
            return self.last(self.head((x*self.gate(x)).mean((2, 3))))
    net = pictures(Net()).activation('gelu').model
    assert [type(net.act), type(net.last), type(net.gate)] == [nn.GELU, nn.Tanh, nn.Sigmoid]


@pytest.mark.parametrize('kind, said', [('glu', 'GLU.n_in, n_out. in place of a linear layer'), ('softmax', 'the loss does'), ('sigmoid', 'starves'), ('mihs', "did you mean 'mish'")])
def test_what_has_no_place_between_layers_is_refused(kind, said):
    with pytest.raises(ValueError, match=said): digits().activation(kind)


def test_no_activation_is_refused():
    with pytest.raises(ValueError, match='activation: the network has no activation between its layers; it takes'): digits(nn.Sequential(nn.Flatten(), nn.Linear(256, 10))).activation()


# the picture

def test_all_are_drawn_with_the_slope_that_numbers_have():
    fig = plot_activations()
    axes = [ax for ax in fig.axes if ax.lines]
    assert [ax.get_title() for ax in axes] == [cls.__name__ for cls in ACTIVATIONS.values()]
    for ax in axes:
        x, y, slope = ax.lines[0].get_xdata(), *(line.get_ydata() for line in ax.lines[:2])
        numbers, kink = np.gradient(y, x), (abs(x) < .02) | (abs(x+1) < .02)
        assert np.allclose(numbers[~kink][1:-1], slope[~kink][1:-1], atol=1e-3)
    sigmoid = axes[1].lines[0].get_ydata()
    assert np.allclose(axes[0].lines[0].get_ydata(), sigmoid)                           # softmax of (x, 0)
    activations_of(fig)


def activations_of(fig):
    from matplotlib import pyplot as plt
    plt.close(fig)


def test_a_choice_is_drawn_over_another_range_and_unknown_ones_are_refused():
    fig = plot_activations(['mish', 'relu'], -1, 2)
    assert len(fig.axes) == 2 and fig.axes[0].lines[0].get_xdata()[[0, -1]].tolist() == [-1, 2]
    activations_of(fig)
    with pytest.raises(ValueError, match="kinds must be of .*got 'mihs'; did you mean 'mish'"): plot_activations(['mihs'])
    with pytest.raises(ValueError, match='low must be below high, got low=2'): plot_activations(low=2, high=1)


def test_what_is_registered_is_a_method():
    assert callable(Learner.activation) and 'activation' not in activations.__all__
