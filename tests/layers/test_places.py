"Coordinates and self-attention: against loops over the places of a map, and of no effect on a trained network at first."
import math
from copy import deepcopy

import pytest
import timm
import torch
from fastai.basics import nn

from fastrecipes.layers.attention import SelfAttention
from fastrecipes.layers.coordconv import AddCoord2D, CoordConv2d

from .learners import digits, pictures


@pytest.mark.parametrize('len, h, w', [(4, 4, 4), ((3, 5), 3, 5), (None, 3, 5), (None, 1, 2)])
def test_each_place_is_told_its_row_then_its_column(len, h, w):
    layer, x = AddCoord2D(len), torch.rand(2, 3, h, w)
    y = layer(x)
    assert y.shape == (2, 5, h, w) and torch.equal(y[:, :3], x)
    assert torch.equal(y[1, 3], torch.linspace(1/h, 1, h)[:, None].expand(h, w)) or torch.allclose(y[1, 3], torch.linspace(1/h, 1, h)[:, None].expand(h, w))
    for i in range(h):
        for j in range(w): assert y[0, 3:, i, j].tolist() == pytest.approx([(i+1)/h, (j+1)/w])
    assert layer(x.half()).dtype == torch.half and not layer.state_dict() and bool([*layer.buffers()]) == (len is not None)


def test_other_sizes_than_the_one_it_was_made_for_are_refused():
    with pytest.raises(ValueError, match='AddCoord2D: made for images of 4×4, got 4×5; len=None'): AddCoord2D(4)(torch.rand(1, 1, 4, 5))
    with pytest.raises(ValueError, match='AddCoord2D: len must be a side ≥ 1 or a pair'): AddCoord2D(0)
    with pytest.raises(ValueError, match='CoordConv2d: groups must be 1'): CoordConv2d(2, 4, 3, groups=2)


def test_a_convolution_of_places_finds_a_place_which_a_plain_one_cannot():
    layer = CoordConv2d(3, 1, 1)
    assert isinstance(layer[1], nn.Conv2d) and layer[1].weight.shape == (1, 5, 1, 1)
    layer[1].weight.data, layer[1].bias.data = torch.tensor([0., 0, 0, 2, 3]).view(1, 5, 1, 1), torch.tensor([-1.])
    assert layer(torch.rand(2, 3, 4, 6))[0, 0, 1, 2].item() == pytest.approx(2*2/4 + 3*3/6 - 1)
    assert CoordConv2d(3, 8, 3, 2, padding=1, bias=False, len=16)(torch.rand(1, 3, 16, 16)).shape == (1, 8, 8, 8)


@pytest.mark.parametrize('arch', ['resnet10t', 'tf_efficientnet_lite0', 'mobilenetv3_small_050'])
@pytest.mark.parametrize('layers', ['first', 'all'])
def test_a_network_answers_as_before_and_learns_of_places(arch, layers):
    torch.manual_seed(0)
    net, x = timm.create_model(arch, num_classes=3), torch.rand(2, 3, 40, 32)
    with torch.no_grad():
        plain = net.eval()(x)
        learn = pictures(net).coordconv(layers)
        assert torch.allclose(learn.model.eval()(x), plain, atol=1e-5)
    placed = [m for m in net.modules() if isinstance(m, CoordConv2d)]
    assert len(placed) == int(learn.techniques['coordconv'].effect.split()[0]) and (len(placed) == 1) == (layers == 'first')
    assert bool((placed[0][1].weight[:, -2:] == 0).all()) and placed[0][1].weight.shape[1] == 5
    learn.fit(1, 1e-2)
    assert not bool((placed[0][1].weight[:, -2:] == 0).all())


def test_convolutions_in_groups_the_last_layer_and_networks_without_are_left_alone(capsys):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1), nn.Flatten())
    learn = pictures(net).coordconv('all')
    assert [type(m) is CoordConv2d for m in net] == [True, False, False, False, False]
    learn.coordconv('all')
    assert 'told their row and column already' in capsys.readouterr().out and net[0][1].weight.shape[1] == 5
    with pytest.raises(ValueError, match='coordconv: the network has no two-dimensional convolution'): digits(nn.Sequential(nn.Flatten(), nn.Linear(256, 10))).coordconv()
    with pytest.raises(ValueError, match="layers must be one of first, all, got 'al'; did you mean 'all'"): digits().coordconv('al')


def attended(layer, x):
    "SAGAN's equations, place by place: o_j = Σ_i β_ji h(x_i), β_j the softmax over i of f(x_i)·g(x_j); y = γo + x."
    f, g, h = (m[0].weight.detach()[:, :, 0] for m in (layer.query, layer.key, layer.value))
    n, c, rows, columns = x.shape
    places, out = [(i, j) for i in range(rows) for j in range(columns)], x.clone()
    for b in range(n):
        for at in places:
            scores = [float((f @ x[b, :, i, j]) @ (g @ x[b, :, at[0], at[1]])) for i, j in places]
            total = sum(map(math.exp, scores))
            o = sum(math.exp(s)/total*(h @ x[b, :, i, j]) for s, (i, j) in zip(scores, places))
            out[b, :, at[0], at[1]] = float(layer.gamma.detach())*o + x[b, :, at[0], at[1]]
    return out


def test_the_layer_that_is_put_in_computes_the_papers_equations():
    learn = digits().self_attention()
    layer = learn.model[1][1]
    assert type(layer) is SelfAttention and float(layer.gamma.detach()) == 0.
    assert all(float(torch.linalg.matrix_norm(m[0].weight[:, :, 0].detach(), 2)) == pytest.approx(1, abs=1e-4) for m in (layer.query, layer.key, layer.value))
    deepcopy(layer).load_state_dict(layer.state_dict())
    assert learn.techniques['self_attention'].effect.startswith('1 layer put behind 1, where 8×8 places of 16 channels')
    layer.gamma.data.fill_(.7)
    x = torch.randn(2, 16, 3, 4)
    assert torch.allclose(layer(x), attended(layer, x), atol=1e-4)


@pytest.mark.parametrize('arch, layer, place', [('resnet18', None, 'act1'), ('resnet18', 'layer2.0', 'layer2.0'), ('efficientnet_lite0', None, None)])
def test_a_network_answers_as_before_and_learns_to_look(arch, layer, place):
    torch.manual_seed(0)
    net, x = timm.create_model(arch, num_classes=3), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        plain = net.eval()(x)
        learn = pictures(net, side=64).self_attention(layer)
        assert torch.equal(learn.model.eval()(x), plain)
    if place: assert f'behind {place}, where' in learn.techniques['self_attention'].effect
    learn.fit(1, 1e-2)
    assert [float(p.detach()) for n, p in net.named_parameters() if n.endswith('gamma') and p.shape == (1,)] != [0.]


def test_the_last_call_wins_and_names_stay_those_of_the_network():
    net = timm.create_model('resnet18', num_classes=3)
    learn = pictures(net, side=64).self_attention('layer2').self_attention('layer2.0').self_attention('layer2')
    assert sum(isinstance(m, SelfAttention) for m in net.modules()) == 1 and 'behind layer2, where 8×8' in learn.techniques['self_attention'].effect
    assert isinstance(net.layer2[1], SelfAttention)


def test_its_weights_are_those_of_the_seed_and_what_is_drawn_elsewhere_stays():
    def attends(seed, drawn):
        learn = digits()
        learn.keyed_cb.seed = seed
        torch.rand(drawn)
        before = torch.get_rng_state()
        learn.self_attention()
        assert torch.equal(torch.get_rng_state(), before)
        return next(m for m in learn.model.modules() if isinstance(m, SelfAttention)).query[0].weight
    assert torch.equal(attends(1, 3), attends(1, 5)) and not torch.equal(attends(1, 3), attends(2, 3))


def test_where_attention_cannot_be_is_refused():
    learn, wide = pictures(timm.create_model('resnet18', num_classes=3), side=64), nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8*62*62, 3))
    with pytest.raises(ValueError, match="self_attention: 'layr2' is no layer of this network; did you mean 'layer2'"): learn.self_attention('layr2')
    with pytest.raises(ValueError, match="self_attention: '5' gives no maps of 8 channels"): digits().self_attention('5')
    with pytest.raises(ValueError, match='self_attention: all maps have more than 1,024 places'): pictures(wide, side=64).self_attention()
    with pytest.raises(ValueError, match='self_attention: no layer in front of the last gives maps'): digits(nn.Sequential(nn.Flatten(), nn.Linear(256, 10))).self_attention()
