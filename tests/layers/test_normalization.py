"Norms against networks of torchvision and timm that were built with them, and what is kept of the old ones."
import pytest
import timm
import torch
import torchvision
from fastai.basics import nn
from fastai.layers import LinBnDrop
from timm.layers import BatchNormAct2d

from fastrecipes.layers.normalization import OverLast
from fastrecipes.layers.surgery import Inserted

from .learners import digits, pictures

X = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def warmed(net):
    "Norms with weights and biases of their own."
    g = torch.Generator().manual_seed(3)
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)):
            m.weight.data.uniform_(.5, 1.5, generator=g), m.bias.data.normal_(generator=g)
    return net


@pytest.mark.parametrize('kind, groups, layer', [('group', 32, lambda c: nn.GroupNorm(32, c)), ('group', 8, lambda c: nn.GroupNorm(8, c)), ('layer', 32, lambda c: nn.GroupNorm(1, c)),
                                                 ('instance', 32, lambda c: nn.InstanceNorm2d(c, affine=True))], ids='group 8_groups layer instance'.split())
def test_a_network_is_the_one_that_is_built_with_the_norm(kind, groups, layer):
    net = warmed(torchvision.models.resnet18(num_classes=3))
    built = torchvision.models.resnet18(num_classes=3, norm_layer=layer)
    built.load_state_dict({k: v for k, v in net.state_dict().items() if 'running' not in k and 'num_batches' not in k})     # weights and biases of norms among them
    learn = pictures(net, side=64).norm(kind, groups)
    assert learn.techniques['norm'].effect == f'20 norms replaced by {kind} norms (they were BatchNorm2d)'
    assert torch.equal(learn.model.eval()(X), built.eval()(X)) and list(learn.model.state_dict()) == list(built.state_dict())


def test_a_norm_that_holds_the_activation_keeps_it():
    net = warmed(timm.create_model('efficientnet_lite0', num_classes=3))
    old = [m for m in net.modules() if isinstance(m, BatchNormAct2d)]
    acts = [type(m.act) for m in old]
    learn = pictures(net, side=64).norm('group')
    new = [m for m in net.modules() if isinstance(m, nn.Sequential) and len(m) == 3 and isinstance(m[0], nn.GroupNorm)]
    assert len(new) == len(old) == 49 and [type(m[2]) for m in new] == acts and all(m[2] is o.act for m, o in zip(new, old))
    assert torch.equal(new[0][0].weight, old[0].weight) and new[0][0].eps == old[0].eps and learn.model.eval()(X).isfinite().all()
    x = torch.rand(2, 32, 8, 8)
    assert torch.allclose(new[0](x), old[0].act(nn.functional.group_norm(x, 16, old[0].weight, old[0].bias, old[0].eps)))


def test_norms_of_tokens_and_of_maps_with_channels_in_front_go_over_the_right_values():
    learn = pictures(warmed(timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=3))).norm('batch')
    new = [m for m in learn.model.modules() if isinstance(m, OverLast)]
    assert len(new) == 25 and learn.techniques['norm'].effect.startswith('25 norms replaced')
    x = torch.rand(6, 5, 192)
    norm = new[0].train()
    y = (x - x.mean((0, 1)))/(x.var((0, 1), unbiased=False) + norm.norm.eps).sqrt()*norm.norm.weight + norm.norm.bias
    assert torch.allclose(norm(x), y, atol=1e-5)
    learn.fit(1, 1e-3)
    learn.norm('layer')
    assert not any(isinstance(m, OverLast) for m in learn.model.modules()) and sum(isinstance(m, nn.LayerNorm) for m in learn.model.modules()) == 25
    net = warmed(timm.create_model('convnext_atto', num_classes=3))
    pictures(net).norm('group')
    stem = net.stem[1]
    assert isinstance(stem, nn.GroupNorm) and (stem.num_groups, stem.num_channels) == (20, 40)      # LayerNorm2d
    assert net.eval()(torch.rand(2, 3, 32, 32)).isfinite().all()


def test_instance_norm_stays_away_from_vectors():
    with pytest.raises(ValueError, match="norm: 'instance' needs maps, and the norms of this network meet vectors; take layer or group"):
        digits(nn.Sequential(nn.Flatten(), LinBnDrop(256, 32), nn.ReLU(), nn.Linear(32, 10))).norm('instance')
    learn = digits(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10))).norm('instance')
    assert [type(m) for m in learn.model][1:4] == [nn.InstanceNorm2d, nn.Flatten, nn.BatchNorm1d] and '; 1 stay' in learn.techniques['norm'].effect


@pytest.mark.parametrize('c, groups, expected', [(64, 32, 32), (24, 32, 12), (6, 32, 3), (7, 32, 1), (64, 5, 4)])
def test_groups_have_two_channels_or_more_and_divide_them(c, groups, expected):
    net = nn.Sequential(nn.Conv2d(1, c, 3), nn.BatchNorm2d(c), nn.Flatten(), nn.Linear(c*196, 10))
    assert digits(net).norm('group', groups).model[1].num_groups == expected


def test_norms_are_put_where_there_are_none_and_the_last_layer_has_none():
    gate, head = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Flatten()], [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10)]
    learn = digits(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), *gate, *head))
    weight = learn.model[0].weight
    learn.norm('batch', insert=True)
    assert [i for i, m in enumerate(learn.model) if isinstance(m, Inserted)] == [0, 7] and learn.model[0][0].weight is weight
    assert [type(learn.model[i][1]) for i in (0, 7)] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert learn.techniques['norm'].effect == 'a batch norm put behind 2 layers (1 Conv2d, 1 Linear)'
    learn.norm('layer', insert=True)
    assert [type(learn.model[i][1]) for i in (0, 7)] == [nn.GroupNorm, nn.LayerNorm] and learn.model[0][0].weight is weight
    learn.fit(1)


def test_what_is_of_the_kind_already_stays_and_is_said_aloud(capsys):
    learn = digits(nn.Sequential(nn.Conv2d(1, 8, 3), bn := nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8*196, 10))).norm('batch')
    assert learn.model[1] is bn and 'all 1 norms are of that kind already' in capsys.readouterr().out


def test_frozen_norms_stay_frozen_and_modes_stay():
    net = torchvision.models.resnet18(num_classes=3)
    net.bn1.requires_grad_(False).eval()
    pictures(net).norm('group')
    assert isinstance(net.bn1, nn.GroupNorm) and not net.bn1.weight.requires_grad and not net.bn1.training and net.layer1[0].bn1.weight.requires_grad and net.layer1[0].bn1.training


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="norm: kind must be one of batch, layer, instance, group, got 'gruop'; did you mean 'group'"): digits().norm('gruop')
    with pytest.raises(ValueError, match='norm: groups must be ≥ 1, got 0'): digits().norm('group', 0)
    with pytest.raises(ValueError, match=r"norm: the network has no norm to exchange; norm\('group', insert=True\)"): digits().norm()
    with pytest.raises(ValueError, match='norm: no layer in front of the last is without a norm'): digits(nn.Sequential(nn.Flatten(), nn.Linear(256, 10))).norm('batch', insert=True)
