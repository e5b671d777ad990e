"Channels removed: shapes, shares, and what cannot be cut."
import onnxruntime
import pytest
import timm
import torch
from fastai.basics import DataLoaders, Learner, OptimWrapper, load_learner, nn
from fastai.callback.tracker import SaveModelCallback
from fastai.layers import ResBlock

from fastrecipes.production import slimming
from fastrecipes.production.export import export_learner
from fastrecipes.production.graphs import quiet_export
from fastrecipes.production.slimming import channel_groups, one_image_ms, onnx_runner, slimmed, widths

from ..layers.learners import digits, pictures


def net(c=3): return nn.Sequential(nn.Conv2d(c, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
                                   nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def test_half_the_channels_go_and_the_answer_keeps_its_width():
    model = net()
    thin = slimmed(model, .5, torch.rand(2, 3, 8, 8))
    assert widths(thin) == [16, 32, 10] and widths(model) == [32, 64, 10]
    assert thin[3].weight.shape == (32, 16, 3, 3) and thin[1].num_features == 16 and thin(torch.rand(2, 3, 8, 8)).shape == (2, 10)


def test_the_weakest_channels_go():
    model = net()
    with torch.no_grad():
        for m in (model[0], model[3]): m.weight[::2] *= 1e-3            # every other channel does next to nothing
        model[1].weight[::2] = 1e-3
        model[3].weight[:, ::2] *= 1e-3
        model[7].weight[:, ::2] *= 1e-3
    x = torch.rand(4, 3, 8, 8)
    thin = slimmed(model, .5, x)
    with torch.no_grad():
        assert torch.equal(thin[0].weight, model[0].weight[1::2])
        assert torch.allclose(thin.eval()(x), model.eval()(x), atol=.02)


def test_importance_is_the_sum_of_squares():
    "Of 27 weights of .3 (squares: 2.4, sizes: 8.1) and one of 2 (squares: 4, size: 2), the one stays."
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    with torch.no_grad():
        for p in model.parameters(): p.zero_()
        model[0].weight[:4], model[0].weight[4:, 0, 0, 0], model[4].weight[:] = .3, 2., .1
    assert torch.equal(slimmed(model, .5, torch.rand(2, 3, 8, 8), round_to=4)[0].weight, model[0].weight[4:])


@pytest.mark.parametrize('arch', ['resnet10t', 'mobilenetv3_small_050', 'convnext_atto'])
def test_networks_of_timm_get_smaller(arch):
    model = timm.create_model(arch, num_classes=10)
    thin = slimmed(model, .5, torch.rand(2, 3, 64, 64))
    size = [sum(p.numel() for p in m.parameters()) for m in (model, thin)]
    assert size[1] < .65*size[0]


def test_F5_images_of_one_channel(toy):
    assert widths(slimmed(net(1), .5, torch.rand(2, 1, 8, 8))) == [16, 32, 10]


def test_F4_the_best_checkpoint_of_the_fit_that_follows_loads(tmp_path):
    x, y = torch.rand(64, 3, 8, 8), torch.arange(64) % 10
    ds = torch.utils.data.TensorDataset(x, y)
    dls = DataLoaders.from_dsets(ds, ds, bs=16, device='cpu')
    learn = Learner(dls, slimmed(net(), .5, x[:2]), nn.CrossEntropyLoss(), path=tmp_path)
    class WorseLater(SaveModelCallback):
        "The first epoch is the best."
        def after_epoch(self):
            self.learn.recorder.values[-1][1] = float(self.learn.epoch)
            super().after_epoch()
    with learn.no_bar(), learn.no_logging(): learn.fit(3, cbs=WorseLater())
    assert widths(learn.model) == [16, 32, 10]


def test_the_model_given_is_not_touched():
    model = net().eval().requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    thin = slimmed(model, .25, torch.rand(2, 3, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in thin.parameters()) and not thin.training


def test_what_cannot_be_cut_is_refused():
    class Fixed(nn.Module):
        "A width that is written into a reshape."
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 32, 1), nn.Linear(32*64, 10)
        def forward(self, x): return self.fc(self.conv(x).reshape(len(x), 32*64))
    with pytest.raises(ValueError, match='prune: torch-pruning cannot cut this network'): slimmed(Fixed(), .5, torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match='no layer is wide enough to lose 50%'): slimmed(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(512, 10)), .5, torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match='between 0 and 1, got 1'): slimmed(net(), 1, torch.rand(2, 3, 8, 8))


def size(model): return sum(p.numel() for p in model.parameters())


ARCHS = dict(resnet18=32, mobilenetv3_small_100=32, convnext_atto=32, efficientnet_b0=32, regnetx_002=32, regnety_002=32, vit_tiny_patch16_224=32, deit_tiny_patch16_224=32)


def created(arch):
    torch.manual_seed(0)
    more = dict(img_size=ARCHS[arch], depth=3) if 'it_' in arch else {}
    return timm.create_model(arch, num_classes=10, **more)


@pytest.mark.parametrize('arch', ARCHS)
def test_networks_of_timm_lose_three_quarters_of_their_parameters_and_train(arch):
    model, x = created(arch), torch.rand(2, 3, ARCHS[arch], ARCHS[arch])
    thin = slimmed(model, .5, x)
    assert size(thin) < .33*size(model)
    assert thin(x).shape == (2, 10) and type(thin) is type(model) and list(thin.state_dict()) == list(model.state_dict())
    thin.train()(torch.cat([x, x.flip(0)])).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in thin.parameters())


@pytest.mark.parametrize('arch', ['vit_tiny_patch16_224', 'resnet10t'])
def test_what_was_cut_is_written_as_onnx_and_answers_the_same(arch):
    torch.manual_seed(0)
    x = torch.rand(1, 3, 32, 32)
    thin = slimmed(timm.create_model(arch, num_classes=10, **(dict(img_size=32, depth=1) if 'vit' in arch else {})), .5, x).eval()
    with quiet_export(): program = torch.onnx.export(thin, (x,), dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    with torch.no_grad(): assert torch.allclose(thin(x), torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), atol=1e-4)


@pytest.mark.parametrize('fused', [True, False])
def test_heads_without_what_was_nothing_attend_as_before(fused):
    "torch's fused attention divides by the root of the width that is left."
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', num_classes=10, img_size=32, depth=2).eval()
    a = model.blocks[0].attn
    a.fused_attn = fused
    dims = torch.arange(9*64).view(9, 64)[:, ::2].flatten()             # every other dimension of each head of queries, keys and values
    with torch.no_grad():
        a.qkv.weight *= 20
        a.qkv.weight[dims], a.qkv.bias[dims] = 0, 0
        a.proj.weight[:, dims[:96]] = 0
    x = torch.rand(2, 3, 32, 32)
    thin = slimmed(model, 0., x, per_layer={'blocks.0.attn.qkv': .5})
    b = thin.blocks[0].attn
    assert b.qkv.weight.shape == (288, 192) and b.head_dim == 32 and b.num_heads == 3 and b.fused_attn is fused and b.scale == pytest.approx(32**-.5)
    with torch.no_grad(): assert torch.allclose(thin(x), model(x), atol=1e-5) and not torch.allclose(b.qkv.weight[0], a.qkv.weight[1])


def test_attention_with_normalised_queries_keeps_its_heads_and_loses_the_rest():
    model = timm.create_model('vit_tiny_patch16_224', num_classes=10, img_size=32, depth=2, qk_norm=True)
    thin = slimmed(model, .5, torch.rand(2, 3, 32, 32))
    assert thin.blocks[0].attn.qkv.weight.shape == (576, 96) and thin.blocks[0].mlp.fc1.weight.shape == (384, 96)


def dead(every=2):
    "A residual network in which every other channel of each layer is nothing."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), ResBlock(1, 32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p.shape[0] > 10: p[::every] = 0
            if p.ndim > 1 and p.shape[1] > 1: p[:, ::every] = 0
            if p.shape == (32,): p[::every] = 0
    return model


def test_a_network_without_what_was_nothing_answers_as_before():
    model, x = dead(), torch.rand(4, 1, 8, 8)
    thin = slimmed(model, .5, x)
    assert widths(thin) == [16, 16, 16, 10]
    with torch.no_grad(): assert torch.allclose(thin(x), model(x), atol=1e-5)


def test_widths_are_the_nearest_multiples_and_no_layer_loses_all():
    model = nn.Sequential(nn.Conv2d(3, 40, 1), nn.Conv2d(40, 16, 1), nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    assert [widths(slimmed(model, r, torch.rand(2, 3, 4, 4)))[:3] for r in (.15, .4, .8, .95)] == [[32, 16, 8], [24, 8, 8], [8, 8, 8], [8, 8, 8]]
    assert widths(slimmed(model, .8, torch.rand(2, 3, 4, 4), round_to=1))[:3] == [8, 3, 1]          # int(40*(1-.8)) is 7
    grouped = nn.Sequential(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    thin = slimmed(grouped, .5, torch.rand(2, 3, 4, 4), round_to=4)
    assert thin[1].groups == 3 and widths(thin) == [12, 12, 10]


def test_layers_have_ratios_of_their_own_and_those_cut_together_one():
    model, x = dead(), torch.rand(2, 1, 8, 8)
    first, inner, outer = '0', '3.convpath.0.0', '3.convpath.1.0'
    assert channel_groups(model, x) == [[first, outer], [inner]]
    assert widths(slimmed(model, 0., x, per_layer={inner: .75})) == [32, 8, 32, 10]
    assert widths(slimmed(model, .25, x, per_layer={outer: .5})) == [16, 24, 16, 10]
    with pytest.raises(ValueError, match="'0' and '3.convpath.1.0' are cut together, and cannot lose 0.5 and 0.25"): slimmed(model, 0., x, per_layer={first: .5, outer: .25})


def test_slim_cuts_in_place_and_what_stays_is_remembered():
    learn = digits()
    learn.fit(1, 3e-3)
    net, opt = learn.model, learn.opt
    head, layers, memory = net[6].bias, list(net), opt.state[net[6].bias]['grad_avg'].clone()
    net[0].weight.requires_grad_(False)
    assert learn.slim(.5) is learn and learn.model is net and list(net) == layers
    assert widths(net) == [8, 16, 10] and (net[2].in_channels, net[2].out_channels, net[6].in_features) == (8, 16, 256)
    assert net[6].bias is head and torch.equal(learn.opt.state[head]['grad_avg'], memory) and not net[0].weight.requires_grad and net[2].weight.requires_grad
    assert {p for p, *_ in learn.opt.all_params()} == {p for p in net.parameters() if p.requires_grad}
    assert learn.techniques['slim'].effect.startswith('24 of 58 channels removed in 3 layers: 9,930 → 3,818 parameters; 1 of its layers are frozen')
    before = [p.detach().clone() for p in net.parameters() if p.requires_grad]
    learn.fit(1, 3e-3)
    assert all(not torch.equal(p, b) for p, b in zip([p for p in net.parameters() if p.requires_grad], before))


def test_a_second_call_cuts_what_is_left():
    learn = digits().slim(.25, round_to=1)
    assert widths(learn.model) == [12, 24, 10] and widths(learn.slim(.5, round_to=1).model) == [6, 12, 10]


def test_F16_what_was_slimmed_exports_and_loads_into_one_slimmed_alike(tmp_path):
    learn = digits()
    learn.path = tmp_path
    learn.fit(1, 3e-3)
    learn.slim(.5).fit(1, 3e-3)
    x = torch.rand(4, 1, 16, 16)
    answer = learn.model.eval()(x)
    assert torch.equal(load_learner(export_learner(learn, tmp_path/'learner.pkl')).model.eval()(x), answer)
    learn.save('thin')
    again = digits().slim(.5)
    again.path = tmp_path
    assert torch.equal(again.load('thin').model.eval()(x), answer)


def test_F12_a_layer_that_is_not_there_is_an_error_that_names_the_nearest():
    net = dead()
    for name, message in (('3.convpath.0.O', "'3.convpath.0.O' is not there; did you mean '3.convpath.0.0'"), ('6', "'6' keeps its outputs"),
                          ('2', "'2' is no convolution or linear layer")):
        with pytest.raises(ValueError, match=f'slim: layer {message}'): digits(net).slim(per_layer={name: .5})
    assert widths(net) == [32, 32, 32, 10]


def test_a_latency_is_met_by_the_largest_network_that_meets_it(monkeypatch):
    "With a clock of our own: a thousand parameters take 1 ms."
    monkeypatch.setattr(slimming, 'one_image_ms', lambda net, *xb: size(net)/1000)
    x, plain = torch.rand(2, 1, 16, 16), digits()
    all_of_them = {size(n): widths(n) for r in range(10, 95, 2) for n in [slimmed(plain.model, r/100, x, round_to=4)]}
    for ms in (8., 3.):
        learn = digits().slim(max_ms=ms, round_to=4)
        assert widths(learn.model) == all_of_them[max(s for s in all_of_them if s <= 1000*ms)]
        assert f'an image takes {size(learn.model)/1000:.2f} ms instead of 9.93' in learn.techniques['slim'].effect


def test_a_latency_that_is_met_or_cannot_be(monkeypatch, capsys):
    monkeypatch.setattr(slimming, 'one_image_ms', lambda net, *xb: size(net)/1000)
    learn = digits().slim(max_ms=10)
    assert widths(learn.model) == [16, 32, 10] and 'nothing is cut' in capsys.readouterr().out
    with pytest.raises(ValueError, match=r'slim: max_ms=0.1: an image takes 9.93 ms, and 1.95 ms without 95%'): digits().slim(max_ms=.1)


def test_what_is_timed_is_the_network_and_the_least_of_its_times_counts(monkeypatch):
    model, x, asked = net(), torch.rand(2, 3, 8, 8), []
    with torch.no_grad(): assert torch.allclose(torch.from_numpy(onnx_runner(model, x)()[0]), model.eval()(x[:1]), atol=1e-5)
    monkeypatch.setattr(slimming, 'onnx_runner', lambda *a: asked.append(a) or 'run')
    monkeypatch.setattr(slimming, 'interleaved', lambda runs: {name: [3., 1., 2.] for name, run in runs.items() if run == 'run'})
    assert one_image_ms(model, x) == 1. and asked == [(model, x)]


def test_what_slim_refuses_it_leaves_as_it_was():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 32, 1), nn.Linear(32*64, 3)
        def forward(self, x): return self.fc(self.conv(x).reshape(len(x), 32*64))
    for learn, given, message in (
            (pictures(Fixed(), side=8), {}, 'cannot cut this network'), (pictures(nn.Sequential(nn.Flatten(), nn.Linear(5, 3))), {}, 'cannot be run on a sample'),
            (digits().prune(.5), {}, 'held at 0 by prune, .* slim first, then prune'),
            (digits().dropconnect(permanent=True), {}, 'held at 0 by .* slim first'), (digits(), dict(ratio=0), 'between 0 and 1, got 0'), (digits(), dict(ratio=1.), 'got 1.0'),
            (digits(), dict(max_ms=-1), 'max_ms must be > 0'), (digits(), dict(ratio=.5, max_ms=3), 'give it or ratio'),
            (digits(), dict(round_to=0), 'round_to must be ≥ 1 channel, got 0'), (digits(), dict(per_layer={}), 'names no layer'),
            (digits(), dict(per_layer={'0': 1.5}), "of '0' must lie between 0 and 1, got 1.5"), (digits(), dict(round_to=32), 'wide enough')):
        before = {k: v.clone() for k, v in learn.model.state_dict().items()}
        with pytest.raises(ValueError, match=f'slim: .*{message}'): learn.slim(**given)
        assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items()) and 'slim' not in learn.techniques
    learn = digits()
    learn.opt_func = OptimWrapper(opt=torch.optim.SGD(learn.model.parameters(), .1))
    with pytest.raises(ValueError, match='slim: opt_func is an optimizer'): learn.slim()
