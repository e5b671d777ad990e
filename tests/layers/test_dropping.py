"What is left out, by looking at what goes into a layer and comes out of it; how often, for how long, and what is never touched."
import numpy as np
import pytest
import timm
import torch
import torchvision
from fastai.basics import Callback, CancelFitException, nn
from fastai.layers import ResBlock

from fastrecipes.layers.dropping import uniform_of
from fastrecipes.randomness import uniform

from .learners import digits, pictures


def test_the_draws_are_those_of_randomness_on_any_device():
    index = [0, 1, 7, 2**31, 2**40+3, 2**62]
    for key in ((0,), (3, 'dropout', 5), (2**61, 'x')): assert uniform_of(torch.tensor(index), *key).tolist() == uniform(index, *key).tolist()


class Watch(Callback):
    "What went into and came out of `layer` in each training batch, and the gradient of its weight."
    order = 60
    def __init__(self, layer, batches=10**9): self.layer, self.batches = layer, batches
    def before_fit(self): self.seen, self.grads, self.samples = [], [], []
    def before_batch(self):                                      # behind the hooks of the technique
        self.handle = self.layer.register_forward_hook(lambda m, args, out: self.seen.append((args[0].detach().clone(), out.detach().clone())) if m.training else None)
    def after_pred(self): self.handle.remove()
    def after_backward(self):
        self.samples.append(self.learn.dl.draws(self.learn.iter))
        self.grads.append([p.grad.clone() for p in self.layer.parameters()])
        if len(self.seen) >= self.batches: raise CancelFitException('enough')


def watched(learn, layer, epochs=1, lr=0., **kwargs):
    learn.fit(epochs, lr, cbs=(watch := Watch(layer, **kwargs)))
    return watch


class Ones(nn.Module):
    "Answers that come through `inner` from ones."
    def __init__(self, inner, n=2000):
        super().__init__()
        self.inner, self.head, self.n = inner, nn.Linear(n, 10), n
    def forward(self, x): return self.head(self.inner(torch.ones(len(x), self.n, dtype=x.dtype)))


# dropout

@pytest.mark.parametrize('p', [.2, .5, .9])
@pytest.mark.parametrize('inner', [nn.Dropout(.1), nn.Dropout(.7, inplace=True)], ids=['own', 'in place'])
def test_units_are_left_out_with_probability_p_and_the_rest_scaled(inner, p):
    learn = digits(Ones(inner), n=256).dropout(p)
    assert f'p of 1 dropouts set to {p:g} (it was {inner.p:g})' == learn.techniques['dropout'].effect
    x = torch.cat([out for _, out in watched(learn, inner).seen])
    assert x.shape == (256, 2000) and sorted(set(x.flatten().tolist())) == [0., pytest.approx(1/(1-p))]
    assert float((x == 0).float().mean()) == pytest.approx(p, abs=4*(p*(1-p)/x.numel())**.5)          # once, not twice
    assert len({tuple(row) for row in (x == 0)[:, :64].tolist()}) == 256                               # no two samples alike
    assert inner.p in (.1, .7)


def test_a_network_without_dropout_gets_it_in_front_of_its_last_layer():
    learn = digits(n=256).dropout(.5)
    assert learn.techniques['dropout'].effect == '50% of what goes into the last layer (Linear) left out'
    watch, inputs = watched(learn, learn.model[-2], batches=1), []
    x = watch.seen[0][1]
    handle = learn.model[-1].register_forward_hook(lambda m, args, out: inputs.append((args[0].detach(), out.detach())))
    class Still(Callback):
        def after_pred(self): raise CancelFitException('seen')
    learn.keyed_cb.done = 0                                                      # the same epoch again
    learn.fit(1, 0., cbs=Still())
    handle.remove()
    dropped, out = inputs[-1]                                                    # the first is a look at one sample
    assert bool(((dropped == 0) | torch.isclose(dropped, 2*x)).all()) and torch.allclose(out, dropped @ learn.model[-1].weight.T + learn.model[-1].bias, atol=1e-5)
    share = float((dropped[x != 0] == 0).float().mean())
    assert .45 < share < .55 and [type(m).__name__ for m in learn.model] == ['Conv2d', 'ReLU', 'Conv2d', 'ReLU', 'AdaptiveAvgPool2d', 'Flatten', 'Linear']


def test_a_sample_has_the_same_draws_whatever_batch_it_comes_in():
    def masks(bs):
        learn = digits(Ones(nn.Dropout(.5), n=50), n=128)
        learn.dls.loaders[0] = learn.dls.train.new(bs=bs)
        learn.dropout(.5)
        watch = watched(learn, learn.model.inner)
        return {int(s): row.tolist() for samples, (_, out) in zip(watch.samples, watch.seen) for s, row in zip(samples, out == 0)}
    small, large = masks(8), masks(64)
    assert len(small) == 128 and small == large


def test_rows_of_tokens_and_views_have_draws_of_their_own_and_odd_numbers_of_rows_work():
    class Rows(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.drop, self.head, self.k = nn.Dropout(.5), nn.Linear(30, 10), k
        def forward(self, x):
            n = len(x)*self.k if self.k else 5
            return self.head(self.drop(torch.ones(n, 30)))[:1].expand(len(x), -1)
    for k in (3, 0):
        learn = digits(Rows(k)).dropout(.5)
        out = watched(learn, learn.model.drop).seen[0][1]
        assert len({tuple(r) for r in out.tolist()}) == len(out) and .3 < float((out == 0).float().mean()) < .7


def test_channels_and_alpha_dropout_stay_what_they_are():
    class Maps(nn.Module):
        def __init__(self, drop):
            super().__init__()
            self.drop, self.head = drop, nn.Linear(8*16, 10)
        def forward(self, x): return self.head(self.drop(x.new_ones(len(x), 8, 4, 4) if not isinstance(self.drop, nn.AlphaDropout) else self.z(x)).flatten(1))
        def z(self, x): return torch.randn(len(x), 8, 4, 4)
    learn = digits(Maps(nn.Dropout2d(.1)), n=1024).dropout(.5)
    out = torch.cat([o for _, o in watched(learn, learn.model.drop).seen])
    assert bool((out == out[:, :, :1, :1]).all()) and float((out == 0).float().mean()) == pytest.approx(.5, abs=.03)
    learn = digits(Maps(nn.AlphaDropout(.1)), n=1024).dropout(.4)
    out = torch.cat([o for _, o in watched(learn, learn.model.drop).seen])
    assert float(out.mean()) == pytest.approx(0, abs=.02) and float(out.var()) == pytest.approx(1, abs=.03)      # what alpha dropout is for


def test_validation_is_whole_and_nothing_is_left_on_the_network():
    learn = digits().dropout(.5)
    learn.fit(1, 3e-3)
    x, y = learn.dls.valid_ds.dataset.tensors
    with torch.no_grad(): assert learn.recorder.values[-1][1] == pytest.approx(float(nn.functional.cross_entropy(learn.model.eval()((x-.5)/.5), y)), rel=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())


@pytest.mark.parametrize('name', ['dropout', 'dropconnect', 'stochastic_depth'])
@pytest.mark.parametrize('p', [1., -.1])
def test_a_share_outside_of_0_to_1_is_refused(name, p):
    with pytest.raises(ValueError, match=rf'{name}: p must be in \[0, 1\), got {p}'): getattr(digits(), name)(p)


def test_0_turns_a_networks_own_dropout_off(capsys):
    learn = digits(Ones(nn.Dropout(.7), n=20)).dropout(0.)
    assert bool((watched(learn, learn.model.inner).seen[0][1] == 1).all()) and 'nothing is left out' in capsys.readouterr().out and learn.model.inner.p == .7


# dropconnect

def effective(seen, bias):
    "The weight that a linear layer had in a batch, from what went in and came out."
    x, y = seen
    return torch.linalg.lstsq(x.double(), (y-bias).double()).solution.T


class Project(nn.Module):
    "Inputs of full rank, so that a weight can be told from what went in and came out."
    def __init__(self):
        super().__init__()
        self.register_buffer('basis', torch.randn(256, 32)/16)
    def forward(self, x): return x.flatten(1) @ self.basis


def linear():
    torch.manual_seed(0)
    return digits(nn.Sequential(nn.Identity(), Project(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 10)), n=512)


def test_weights_are_left_out_and_scaled_others_each_step_and_gradients_go_through_the_mask():
    learn = linear().dropconnect(.25)
    layer = learn.model[2]
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    watch = watched(learn, layer)
    masks = []
    for seen, (grad, _) in zip(watch.seen, watch.grads):
        w = effective(seen, bias)
        mask = w.abs() > 1e-4
        assert torch.allclose(w, weight.double()*mask/.75, atol=1e-4)
        assert bool((grad[~mask] == 0).all()) and float((grad[mask] != 0).float().mean()) > .5
        masks.append(mask)
    share = 1-torch.stack(masks).double().mean()
    assert len(masks) == 8 and float(share) == pytest.approx(.25, abs=4*(.25*.75/8/384)**.5) and not torch.equal(masks[0], masks[1])
    assert torch.equal(layer.weight, weight) and isinstance(layer.weight, nn.Parameter) and list(layer._parameters) == ['weight', 'bias']


def test_gradients_are_those_of_a_network_with_the_masked_weights():
    learn = linear().dropconnect(.25, layers='first')
    watch = watched(learn, learn.model[2], batches=1)
    (x, y), weight, bias = watch.seen[0], learn.model[2].weight.detach(), learn.model[2].bias.detach()
    mask = (effective((x, y), bias).abs() > 1e-4).float()
    w = weight.clone().requires_grad_()
    z = nn.functional.linear(x, w*mask/.75, bias)
    yb = learn.dls.train_ds.dataset.tensors[1][torch.tensor(watch.samples[0])]
    grad, = torch.autograd.grad(nn.functional.cross_entropy(learn.model[4](z.relu()), yb), w)
    assert torch.allclose(grad, watch.grads[0][0], atol=1e-6)


def test_all_but_the_last_or_the_first_alone():
    assert digits().dropconnect(.1).techniques['dropconnect'].effect == '10% of 4,752 weights in 2 layers left out, others each step'
    assert '144 weights in 1 layer ' in digits().dropconnect(.1, 'first').techniques['dropconnect'].effect
    with pytest.raises(ValueError, match="layers must be one of all, first, got 'frist'; did you mean 'first'"): digits().dropconnect(.1, 'frist')
    with pytest.raises(ValueError, match='no convolution or linear layer in front of the last'): digits(nn.Sequential(nn.Flatten(), nn.Linear(256, 10))).dropconnect()


def test_a_layer_that_raises_has_its_weight_back():
    learn = linear().dropconnect(.5)
    layer, weight = learn.model[2], learn.model[2].weight
    layer.register_forward_hook(lambda m, args, out: (_ for _ in ()).throw(RuntimeError('dies')) if m.training else None)
    with pytest.raises(RuntimeError, match='dies'): learn.fit(1)
    assert layer.weight is weight and len(layer._forward_hooks) == 1 and not layer._forward_pre_hooks


def test_for_good_the_same_weights_are_0_in_training_and_inference():
    learn = linear()
    before = learn.model[2].weight.detach().clone()
    learn.dropconnect(.5, permanent=True)
    gone = learn.model[2].weight == 0
    assert float(gone.float().mean()) == pytest.approx(.5, abs=.1) and torch.allclose(learn.model[2].weight[~gone], before[~gone]*2)
    learn.fit(1, 1e-2)
    x, y = learn.dls.valid_ds.dataset.tensors
    assert torch.equal(learn.model[2].weight == 0, gone) and not torch.allclose(learn.model[2].weight[~gone], before[~gone]*2)
    with torch.no_grad(): assert learn.recorder.values[-1][1] == pytest.approx(float(nn.functional.cross_entropy(learn.model.eval()((x-.5)/.5), y)), rel=1e-5)
    with pytest.raises(ValueError, match='cannot be undone'): learn.dropconnect(.1)


# stochastic depth

def depths(learn, blocks, epochs):
    "How often each block's branch was left out, and what it was multiplied by where it was not."
    watches = [Watch(b) for b in blocks]
    learn.fit(epochs, 0., cbs=watches)
    return watches


class Halves(nn.Module):
    "Residual blocks of fastai whose branch gives 1 and whose shortcut 0, so that each block gives what its branch was multiplied by."
    def __init__(self, n):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(ResBlock(1, 1, 1, norm_type=None) for _ in range(n)), nn.Linear(n, 10)
        for b in self.blocks:
            for m in b.modules():
                if isinstance(m, nn.Conv2d): nn.init.zeros_(m.weight), nn.init.ones_(m.bias)
    def forward(self, x): return self.head(torch.cat([b(x[:, :1, :2, :2]*0).mean((2, 3)) for b in self.blocks], 1))


def test_block_l_of_L_is_left_out_with_probability_p_times_l_over_L_and_scaled():
    learn = digits(Halves(4), n=1024).stochastic_depth(.8)
    assert learn.techniques['stochastic_depth'].effect == '4 residual blocks left out with probability 0.2 (the first) to 0.8 (the last)'
    shares = torch.cat([x for x, _ in watched(learn, learn.model.head).seen])
    assert shares.shape == (1024, 4)
    for i, p in enumerate((.2, .4, .6, .8)):
        assert sorted(set(shares[:, i].tolist())) == [0., pytest.approx(1/(1-p))]
        assert float((shares[:, i] == 0).float().mean()) == pytest.approx(p, abs=4*(p*(1-p)/1024)**.5)
    assert abs(np.corrcoef((shares == 0).float().T.numpy())[0, 1]) < .15             # blocks are drawn apart
    with torch.no_grad(): assert bool((torch.stack([b(torch.zeros(1, 1, 2, 2)) for b in learn.model.blocks]) == 1).all())      # nothing is left on them


BLOCKS = dict(                                                   # shortcuts that an architecture has, counted in its paper
    torchvision=dict(resnet18=8, resnet50=16, mobilenet_v2=10, mobilenet_v3_small=6, efficientnet_b0=9, convnext_tiny=18, regnet_y_400mf=16),
    timm=dict(resnet18=8, resnet26=8, convnext_atto=12, efficientnet_lite0=9, vit_tiny_patch16_224=24))


@pytest.mark.parametrize('source, arch', [(source, arch) for source, counts in BLOCKS.items() for arch in counts])
def test_the_blocks_of_torchvision_and_timm_are_found(source, arch):
    kw = dict(img_size=32) if 'vit' in arch else dict(drop_path_rate=.9) if arch == 'resnet26' else {}
    net = timm.create_model(arch, num_classes=3, **kw) if source == 'timm' else torchvision.models.get_model(arch, num_classes=3)
    learn = pictures(net, n=4, bs=2).stochastic_depth(.3)
    assert learn.techniques['stochastic_depth'].effect.startswith(f'{BLOCKS[source][arch]} residual blocks')


def test_a_branch_left_out_leaves_the_shortcut_and_rates_set_before_do_not_count_twice():
    torch.manual_seed(0)
    for net in (torchvision.models.resnet18(num_classes=3), timm.create_model('resnet18', num_classes=3, drop_path_rate=.9)):
        nn.init.ones_(net.layer4[1].bn2.weight)                                          # timm begins with 0
        learn = pictures(net, n=64, bs=32).stochastic_depth(.5)
        watch = watched(learn, net.layer4[1])                                        # the last block: relu(x + branch·m), x ≥ 0
        x, y = (torch.cat(o) for o in zip(*watch.seen))
        skipped = (x == y).flatten(1).all(1)
        assert .25 < float(skipped.float().mean()) < .75


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match='stochastic_depth: the network has no residual block that could be left out; take dropout'): digits().stochastic_depth()
