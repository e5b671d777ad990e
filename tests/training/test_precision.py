"16 bits where they were asked for, on the device that there is, and 32 again afterwards."
import pytest
import torch
from fastai.basics import Callback, nn
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientClip

from fastrecipes.training import precision
from fastrecipes.training.precision import low_precision


class Spy(nn.Linear):
    "What type the forward pass is computed in, and whether autocast is on."
    def forward(self, x):
        y = super().forward(x)
        self.seen = y.dtype, torch.is_autocast_enabled('cpu')
        return y


@pytest.mark.parametrize('name', ['to_fp16', 'to_bf16'])
def test_mixed_precision_on_a_cpu_does_nothing_in_fastai_and_something_here(toy, name):
    learn = toy(model=Spy(4, 3))
    learn.add_cb(MixedPrecision()).fit(1)
    assert learn.model.seen == (torch.float32, False)               # fastai 2.8.12 asks for autocast on 'cuda', whatever the device
    learn = toy(model=Spy(4, 3))
    getattr(learn, name)().fit(1)
    assert learn.model.seen == (torch.bfloat16, True)
    assert all(p.dtype is torch.float32 for p in learn.model.parameters())


def test_float16_on_a_cpu_is_bfloat16_and_says_so(toy, capsys):
    learn = toy().to_fp16()
    assert 'to_fp16: forward passes in bfloat16: a CPU has no fast float16' in capsys.readouterr().out
    assert 'bfloat16' in learn.techniques['to_fp16'].effect
    assert low_precision('cuda', torch.float16) is torch.float16 and low_precision('cpu', torch.float16) is torch.bfloat16


@pytest.mark.parametrize('emulated, warned', [(True, 1), (False, 0)])
def test_a_cpu_that_emulates_bfloat16_is_warned_of(toy, monkeypatch, recwarn, emulated, warned):
    for kind in ('avx512_bf16', 'amx_tile'): monkeypatch.setattr(torch.cpu, f'_is_{kind}_supported', lambda: not emulated, raising=False)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX2')
    toy().to_bf16()
    assert len([w for w in recwarn if 'emulates bfloat16' in str(w.message)]) == warned


@pytest.mark.parametrize('where', ['forward', 'loss', 'callback', 'ctrl-c', 'validation'])
def test_autocast_stays_on_when_a_forward_dies_in_fastai_and_not_here(toy, where):
    class Dies(nn.Linear):
        def forward(self, x):
            if where == 'forward' or where == 'validation' and not self.training: raise RuntimeError('dies')
            if where == 'ctrl-c': raise KeyboardInterrupt
            return super().forward(x)
    class Late(Callback):
        order = 60
        def before_batch(self):
            if where == 'callback': raise RuntimeError('dies')
    def loss(pred, y):
        if where == 'loss': raise RuntimeError('dies')
        return nn.functional.cross_entropy(pred, y)
    learn = toy(model=Dies(4, 3), loss_func=loss).to_bf16()
    with pytest.raises((RuntimeError, KeyboardInterrupt)): learn.fit(1, cbs=Late())
    assert not torch.is_autocast_enabled('cpu')


def test_the_loss_and_the_predictions_are_in_32_bits(toy):
    learn = toy().to_bf16()
    kept = {}
    class Keep(Callback):
        order = 60
        def after_loss(self): kept.update(pred=self.learn.pred.dtype, loss=self.learn.loss.dtype)
    learn.fit(1, cbs=Keep())
    assert kept == dict(pred=torch.float32, loss=torch.float32)
    assert learn.get_preds()[0].dtype is torch.float32


def test_it_computes_what_autocast_computes(toy):
    learn = toy(n=16, bs=16).to_bf16()
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad(): expected = learn.model(learn.dls.valid_ds.dataset.tensors[0]).float()
    class Keep(Callback):
        order = 60
        def after_pred(self): self.learn.kept = self.learn.pred
    learn.validate(cbs=Keep())
    assert torch.equal(learn.kept, expected)


def test_clipping_sees_the_gradients_as_they_are(toy):
    norms = []
    class Norm(Callback):
        order = GradientClip.order + 1
        def before_step(self): norms.append(torch.stack([p.grad.norm() for p in self.learn.model.parameters()]).norm())
    toy().to_fp16(init_scale=2.**10).fit(1, cbs=[GradientClip(.01), Norm()])
    assert max(norms) <= .01 + 1e-6 and min(norms) > .005


def test_to_fp32_undoes_either_and_the_two_exclude_each_other(toy):
    learn = toy(model=Spy(4, 3)).to_fp16().to_fp32()
    assert not [cb for cb in learn.cbs if isinstance(cb, MixedPrecision)] and learn.techniques['to_fp32'].effect == 'undid to_fp16'
    learn.fit(1)
    assert learn.model.seen == (torch.float32, False)
    learn.to_fp16()
    with pytest.raises(ValueError, match="'to_fp16' and 'to_bf16' do not go together: each sets the precision"): learn.to_bf16()


def test_the_calls_of_fastai_stay_valid(toy):
    learn = toy().to_fp16(init_scale=2.**8, growth_factor=3., backoff_factor=.25, growth_interval=10)
    assert learn.autocast_cb.scaling == dict(init_scale=2.**8, growth_factor=3., backoff_factor=.25, growth_interval=10)
    assert learn.to_fp32() is learn and learn.to_bf16() is learn


@pytest.mark.parametrize('kwargs, message', [(dict(init_scale=0), 'init_scale must be > 0, got 0'), (dict(growth_factor=1), 'growth_factor must be > 1'),
                                             (dict(backoff_factor=1), 'backoff_factor must be between 0 and 1'), (dict(growth_interval=0), 'growth_interval must be ≥ 1')])
def test_values_outside_their_ranges_are_refused(toy, kwargs, message):
    with pytest.raises(ValueError, match=f'to_fp16: {message}'): toy().to_fp16(**kwargs)


def test_a_gpu_without_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(precision.torch.cuda, 'is_bf16_supported', lambda: False)
    with pytest.raises(ValueError, match='to_bf16: this GPU has no bfloat16; use to_fp16'): low_precision('cuda', torch.bfloat16)


class Strided(nn.Module):
    "A stride of 2 over one pixel: eight of the nine taps see padding alone."
    def __init__(self, nd=2, stride=2):
        super().__init__()
        self.conv, self.head = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[nd-1](32, 64, 3, stride, 1), nn.Linear(64, 3)

    def forward(self, x): return self.head(self.conv(x).flatten(2).mean(2))


def strewn():
    "Leave NaN in the memory that is free."
    kept = [torch.full((n,), float('nan'), dtype=torch.bfloat16) for n in [9*32*64]*40]
    del kept


@pytest.mark.parametrize('nd, stride, side', [(1, 2, 1), (2, 2, 1), (3, 2, 1), (3, 1, 2)])
def test_the_gradient_that_torch_leaves_unwritten_on_a_cpu_is_that_of_32_bits(toy, nd, stride, side):
    torch.manual_seed(0)
    model, x, y = Strided(nd, stride), torch.randn(8, 32, *[side]*nd), torch.arange(8) % 3
    expected = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model.conv.weight)[0]
    learn, seen = toy(model=model).to_bf16(), []
    class Keep(Callback):
        order = 60
        def before_batch(self): self.learn.xb, self.learn.yb = (x,), (y,)
        def after_pred(self): strewn()
        def before_step(self):
            seen.append(model.conv.weight.grad.clone())
            self.learn.opt.zero_grad()                              # the next batch meets the same weights
    learn.fit(2, 0., cbs=Keep())
    assert len(seen) > 2 and all(torch.allclose(g, expected, atol=.02*float(expected.abs().max())) for g in seen)
    if side > 1: return                                             # a kernel wider than the picture, no tap of which sees padding alone
    unseen = torch.ones(3, 3, 3)[tuple([slice(None)]*nd + [0]*(3-nd))].bool()
    unseen[(1,)*nd] = False
    assert all((g[:, :, unseen] == 0).all() for g in seen)


def test_the_watch_is_over_where_nothing_was_met(toy):
    class Wide(nn.Linear):
        def forward(self, x):
            modes.append(torch.overrides._get_current_function_mode() is not None)
            return super().forward(x)
    modes = []
    toy(model=Wide(4, 3), n=16, bs=8).to_bf16().fit(1)
    assert modes[-4:] == [True, False, False, False]                # the first batch of a shape; not in validation
    assert torch.overrides._get_current_function_mode() is None
