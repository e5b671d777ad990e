"Ranges, variances, norms of signals through many layers; against the formulas of the papers."
import numpy as np
import pytest
import torch
import torchvision
from fastai.basics import nn

from fastrecipes.layers.init import INITS, delta_orthogonal_, init_weights, weight_init

from .learners import digits, pictures


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.Linear(300, 200, bias=False))


@pytest.mark.parametrize('kind, args, low, high, std', [
    ('constant', {}, 0, 0, [0, 0]), ('constant', dict(val=.7), .7, .7, [0, 0]), ('uniform', dict(a=0., b=1.), 0, 1, [12**-.5]*2), ('uniform', dict(a=-1., b=1.), -1, 1, [3**-.5]*2),
    ('normal', dict(mean=0., std=.02), None, None, [.02]*2), ('xavier_uniform', {}, None, None, [(2/(144+576))**.5, (2/500)**.5]),
    ('xavier_normal', dict(gain=2.), None, None, [2*(2/720)**.5, 2*(2/500)**.5]),
    ('kaiming_uniform', {}, None, None, [(2/144)**.5, (2/300)**.5]), ('kaiming_normal', dict(mode='fan_out', nonlinearity='relu'), None, None, [(2/576)**.5, (2/200)**.5])])
def test_range_and_spread_are_those_of_the_papers(net, kind, args, low, high, std):
    "Xavier: 2/(fan in + fan out); Kaiming: 2/fan, at a slope of 0 below 0; a convolution's fan counts its kernel."
    for p in net.parameters(): nn.init.constant_(p, 9.)
    net.apply(init_weights(kind, **args))
    for w, s in zip((net[0].weight, net[2].weight), std):
        assert float(w.detach().std()) == pytest.approx(s, rel=.05, abs=1e-6) and (low is None or low-1e-6 <= float(w.detach().min()) <= float(w.detach().max()) <= high+1e-6)
        if 'uniform' in kind: assert float(w.detach().abs().max()) <= max(s*3**.5*1.001, 1 if kind == 'uniform' else 0)
    assert bool((net[0].bias == 0).all()) and bool((net[1].weight == 9).all()) and bool((net[1].bias == 9).all())


def test_a_signal_keeps_its_norm_through_128_layers():
    "arXiv:1806.05393, where Kaiming's shrinks or grows by powers of the depth; at every place of the map."
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Conv2d(12, 12, 3, padding=1, bias=False) for _ in range(128)))
    x = torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        y = layers.apply(init_weights('delta_orthogonal'))(x)
        assert torch.allclose(y.norm(dim=1), x.norm(dim=1), rtol=1e-3)
        z = layers.apply(init_weights('kaiming_normal'))(x)
    assert not .01 < float(z.norm()/x.norm()) < 100


@pytest.mark.parametrize('shape, groups, gain', [((8, 8, 3, 3), 1, 1.), ((10, 4, 5, 3), 1, 2**.5), ((6, 4, 3), 1, 1.), ((8, 2, 1, 1, 3), 1, 1.), ((12, 3, 3, 3), 4, 1.)])
def test_the_centre_has_orthonormal_columns_and_the_rest_is_0(shape, groups, gain):
    w = delta_orthogonal_(torch.full(shape, 7.), gain, groups).numpy()
    centre = w[(..., *(k//2 for k in shape[2:]))]
    assert np.count_nonzero(w) == np.count_nonzero(centre) > 0
    for part in np.split(centre, groups): assert np.allclose(part.T @ part, gain**2*np.eye(shape[1]), atol=1e-5)


def test_what_cannot_keep_a_norm_is_refused():
    with pytest.raises(ValueError, match='delta_orthogonal: a layer of 8 inputs and 4 outputs cannot keep the norm'): delta_orthogonal_(torch.empty(4, 8, 3, 3))
    with pytest.raises(ValueError, match='a kernel of 4×4 has no centre'): delta_orthogonal_(torch.empty(8, 8, 4, 4))
    with pytest.raises(ValueError, match='linear layers have nn.init.orthogonal_'): delta_orthogonal_(torch.empty(8, 8))
    with pytest.raises(ValueError, match='transposed'): nn.ConvTranspose2d(4, 4, 3).apply(init_weights('delta_orthogonal'))


def test_linear_layers_are_orthogonal_then():
    layer = nn.Linear(20, 12).apply(init_weights('delta_orthogonal'))
    assert torch.allclose(layer.weight @ layer.weight.T, torch.eye(12), atol=1e-5)


def test_unknown_kinds_and_arguments_are_refused():
    with pytest.raises(ValueError, match="init_weights: kind must be one of .*, got 'kaiming'; did you mean 'kaiming_normal'"): init_weights('kaiming')
    with pytest.raises(TypeError, match="init_weights 'normal': no argument 'sdt'; did you mean 'std'"): init_weights('normal', sdt=1.)
    with pytest.raises(ValueError, match='a must be below b, got a=1.0, b=1.0'): init_weights('uniform', a=1.)
    with pytest.raises(ValueError, match='std must be ≥ 0, got -1'): init_weights('normal', std=-1)
    assert list(INITS) == 'constant uniform normal xavier_uniform xavier_normal kaiming_uniform kaiming_normal delta_orthogonal'.split()


class ConvBlock(nn.Module):
    "Named like a convolution, and none."
    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(16, 32, 3), nn.Parameter(torch.ones(1))


def test_weight_init_tells_layers_by_what_they_are():
    net = nn.Sequential(nn.Linear(300, 200), nn.Linear(300, 200, bias=False), ConvBlock(), nn.Conv2d(16, 32, 3, bias=False), nn.ConvTranspose2d(16, 32, 3), nn.BatchNorm2d(3))
    net.apply(weight_init)
    assert bool((net[0].bias == torch.tensor(.01)).all()) and bool((net[2].conv.bias == 0).all()) and bool((net[4].bias == 0).all())
    assert float(net[2].scale.detach()) == 1 and bool((net[5].weight == 1).all())
    for m, gain, fans in ((net[0], 1, 500), (net[1], 1, 500), (net[2].conv, 2**.5, 48*9), (net[3], 2**.5, 48*9), (net[4], 2**.5, 48*9)):
        bound = gain*(6/fans)**.5
        assert .97*bound < float(m.weight.detach().abs().max()) <= bound and float(m.weight.detach().std()) == pytest.approx(bound/3**.5, rel=.05)


def test_a_learner_begins_anew_by_its_seed():
    one, two, other = (digits().initialize('xavier_normal') for _ in range(3))
    other = digits()
    other.keyed_cb.seed = 5
    other.initialize('xavier_normal')
    ws = [o.model[2].weight for o in (one, two, other)]
    assert torch.equal(ws[0], ws[1]) and not torch.equal(ws[0], ws[2]) and not torch.equal(ws[0], digits().model[2].weight)
    assert one.techniques['initialize'].effect == '9,872 weights of 3 layers begin anew (xavier_normal), their biases at 0'
    state = torch.get_rng_state()
    one.initialize('normal', args=dict(std=.5))
    assert float(one.model[2].weight.detach().std()) == pytest.approx(.5, rel=.05) and torch.equal(state, torch.get_rng_state())


def test_the_last_layer_alone_and_what_is_frozen_is_not_lost():
    learn = digits()
    learn.model[0].requires_grad_(False)
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match="initialize: a part of the network is frozen.*layers='last'"): learn.initialize()
    assert all(torch.equal(p, q) for p, q in zip(before, learn.model.parameters()))
    learn.initialize(layers='last')
    assert [torch.equal(p, q) for p, q in zip(before, learn.model.parameters())] == [True]*4 + [False]*2


def test_narrowing_convolutions_are_refused_before_any_weight_changes():
    net = torchvision.models.resnet18(num_classes=3)
    net.layer1[0].conv1 = nn.Conv2d(64, 32, 3, padding=1)
    net.layer1[0].bn1, net.layer1[0].conv2 = nn.BatchNorm2d(32), nn.Conv2d(32, 64, 3, padding=1)
    learn, before = pictures(net), net.conv1.weight.detach().clone()
    with pytest.raises(ValueError, match='initialize: delta_orthogonal: a layer of 64 inputs and 32 outputs cannot'): learn.initialize('delta_orthogonal')
    assert torch.equal(net.conv1.weight, before)
