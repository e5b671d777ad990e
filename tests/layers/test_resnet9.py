"ResNet-9: its layers written out by hand, its size by arithmetic, its place among timm's networks."
import pytest
import timm
import torch
from torch.nn import functional as F

import fastrecipes.layers.resnet9  # noqa: F401  registers it
from fastrecipes.training.transfer import backbone, check_arch


def by_hand(state: dict, x):
    "The network of myrtle.ai, batch norm as in validation."
    def block(x, name, pool=False):
        norm = 2 if pool else 1
        x = F.conv2d(x, state[f'{name}.0.weight'], padding=1)
        if pool: x = F.max_pool2d(x, 2)
        w, b, m, v = (state[f'{name}.{norm}.{k}'].view(1, -1, 1, 1) for k in ('weight', 'bias', 'running_mean', 'running_var'))
        return ((x-m)/(v+1e-5).sqrt()*w + b).clamp(min=0)
    x = block(block(x, 'stem'), 'stage1.0', pool=True)
    x = x + block(block(x, 'stage1.1.pair.0'), 'stage1.1.pair.1')
    x = block(block(x, 'stage2', pool=True), 'stage3.0', pool=True)
    x = x + block(block(x, 'stage3.1.pair.0'), 'stage3.1.pair.1')
    return x.amax((2, 3))/8 @ state['fc.weight'].T + state['fc.bias']


@pytest.mark.parametrize('size', [32, 48])
def test_layer_by_layer(size):
    torch.manual_seed(0)
    net = timm.create_model('resnet9_w16', num_classes=7)
    net(torch.randn(16, 3, size, size))                         # statistics that are not 0 and 1
    x = torch.randn(4, 3, size, size)
    with torch.no_grad(): assert torch.allclose(net.eval()(x), by_hand(net.state_dict(), x), atol=1e-5)


@pytest.mark.parametrize('name, width', [('resnet9', 64), ('resnet9_w32', 32), ('resnet9_w16', 16)])
def test_weights(name, width):
    "Convolutions 3·w, 2w², 8w², 8w², 32w², 128w² times 9, two a channel for each norm, and the linear layer; 6.57 million at 64, as published."
    channels = [width, 2*width, 2*width, 2*width, 4*width, 8*width, 8*width, 8*width]
    convs = 9*(3*width + width**2*(2 + 2*4 + 8 + 32 + 2*64))
    n = sum(p.numel() for p in timm.create_model(name, num_classes=10).parameters())
    assert n == convs + 2*sum(channels) + 8*width*10 + 10
    if width == 64: assert n == 6_573_130


def test_it_is_one_of_timms():
    assert check_arch('resnet9') == 'timm' and {'resnet9', 'resnet9_w16', 'resnet9_w32'} <= set(timm.list_models())
    net = timm.create_model('resnet9_w16', num_classes=5, in_chans=1)
    x = torch.randn(2, 1, 32, 32)
    assert net(x).shape == (2, 5) and net.forward_features(x).shape == (2, 128, 4, 4) and net.get_classifier().out_features == 5
    assert torch.equal(net.eval().forward_head(net.forward_features(x)), net(x))
    net.reset_classifier(0)
    assert net(x).shape == (2, 128) == (2, net.num_features)


def test_the_body_of_a_learner_has_its_own_pooling_and_no_dropout():
    net = backbone('resnet9_w16', pretrained=False)
    assert not net.pool and net.n_features == 128 and net.dropout == 0. and net.body(torch.randn(2, 3, 32, 32)).shape == (2, 128)
    assert backbone('resnet18', pretrained=False).dropout == .2
