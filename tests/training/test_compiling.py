"Compiled, or with channels last, a network computes what it did; it falls back where it must, and what is kept of it is the plain one."
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import torch._dynamo
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, Learner, load_learner, nn
from fastai.callback.channelslast import ChannelsLast
from torch._dynamo.backends.common import aot_autograd
from torch.utils.data import TensorDataset

from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import Indexed
from fastrecipes.production.export import export_learner
from fastrecipes.technique import discover

discover()
GRAPHS = []


@torch._dynamo.register_backend
def counted(gm, inputs):
    GRAPHS.append(gm)
    return gm.forward


@torch._dynamo.register_backend
def no_compiler(gm, inputs): raise RuntimeError('no C++ compiler here')


@torch._dynamo.register_backend
def no_large_graphs(gm, inputs):
    "Compiles the part that has batch norm in it, not the one behind."
    if not any(isinstance(m, nn.BatchNorm2d) for m in gm.modules()) and not any('norm' in n.name for n in gm.graph.nodes): raise RuntimeError('too large')
    return gm.forward


def fails(gm, inputs): raise RuntimeError('no backward here')
no_backward = torch._dynamo.register_backend(aot_autograd(fw_compiler=lambda gm, inputs: gm.forward, bw_compiler=fails), name='no_backward')


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    GRAPHS.clear()


def plain(): return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(.3), nn.Linear(32, 3))


class Broken(nn.Module):
    "Two graphs: batch statistics and a draw are behind it when the second is compiled."
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(.5)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def learner(net=plain, bs=10, n=40, n_valid=25, side=12, lr=.1):
    "Four batches to train on; validation batches of 10, 10 and 5."
    g = torch.Generator().manual_seed(0)
    def data(n): return Indexed(TensorDataset(torch.rand(n, 3, side, side, generator=g), torch.randint(3, (n,), generator=g)), vocab=range(3))
    dls = DataLoaders(KeyedDL(data(n), bs, seed=0, shuffle=True, num_workers=0), KeyedDL(data(n_valid), bs, num_workers=0), device=torch.device('cpu'))
    torch.manual_seed(1)
    learn = Learner(dls, net(), CrossEntropyLossFlat(), opt_func=SGD, lr=lr, wd=0.)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn.weight_decay(0.)               # keyed or not, the same for all: it takes nothing off


def keyed_learner(*args, **kwargs):
    from fastrecipes.data.keyed import keyed
    return keyed(learner(*args, **kwargs), 0).learn


def tensors(model): return [t.detach().clone() for t in model.state_dict().values()]
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
def close(a, b): return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b, strict=True))


def trained(learn, n=2):
    learn.fit(n)
    return tensors(learn.model), learn.recorder.values


# compile

@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_it_trains_and_validates_as_without(backend):
    (a, rows), (b, plainly) = trained(keyed_learner().compile(backend=backend)), trained(keyed_learner())
    assert close(a, b) and [v for r in rows for v in r] == pytest.approx([v for r in plainly for v in r], rel=1e-4)


def test_the_network_is_compiled_once_for_each_of_training_and_validation_and_once_more_for_other_sizes():
    learn = keyed_learner().compile(backend='counted')
    learn.fit(2)
    assert len(GRAPHS) == 3                     # training; validation of 10, and of any size, for its last batch has 5
    learn.dls.loaders[1] = learn.dls.valid.new(bs=7)
    learn.fit(2)
    assert len(GRAPHS) == 3
    assert len(learn.get_preds()[0]) == 25 and len(GRAPHS) == 3


def test_growing_images_are_compiled_twice():
    learn = keyed_learner(n=200, bs=10, side=24).compile(backend='counted').progressive_resize(.5, delay=0., finetune=.2, multiple=2)
    learn.fit(1)
    assert len(GRAPHS) <= 2+2 and len(learn.recorder.losses) == 20


def test_each_learner_is_compiled_however_many_there_are():
    "Dynamo compiles a function 8 times at most, and all networks share the function that calls them."
    kept = []                                   # those that are gone do not count
    for i in range(10):
        kept.append(learn := keyed_learner(lambda: nn.Sequential(nn.Conv2d(3, 4+i, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4+i, 3)), n_valid=10).compile(backend='counted'))
        learn.fit(1)
        assert len(GRAPHS) == 2*(i+1)


@pytest.mark.parametrize('net, backend', [(plain, 'no_compiler'), (plain, 'no_backward'), (Broken, 'no_large_graphs')])
def test_what_cannot_be_compiled_trains_without_bit_for_bit_and_is_told(net, backend, capsys):
    learn = keyed_learner(net).compile(backend=backend)
    (a, rows), (b, plainly) = trained(learn), trained(keyed_learner(net))
    assert same(a, b) and [list(r) for r in rows] == [list(r) for r in plainly]
    said = capsys.readouterr().out
    assert f'compile: nothing is compiled, training goes on without: {backend} failed (' in said and said.count('compile:') == 1
    assert dict(no_compiler='no C++ compiler here', no_backward='no backward here', no_large_graphs='too large')[backend] in learn.techniques['compile'].effect


def test_an_error_of_the_network_itself_is_raised_as_it_is_and_not_blamed_on_compiling():
    class Raises(nn.Linear):
        def forward(self, x): raise KeyError('of the network')
    learn = keyed_learner(lambda: nn.Sequential(nn.Flatten(), Raises(432, 3))).compile(backend='eager')
    with pytest.raises(KeyError, match='of the network'): learn.fit(1)
    assert 'nothing' not in learn.techniques['compile'].effect and '_compiled_call_impl' not in vars(learn.model)


class End(Callback):
    order = 90
    def __init__(self, at): self.at = at
    def __call__(self, name):
        if name == self.at: raise KeyboardInterrupt
        return super().__call__(name)


@pytest.mark.parametrize('at', [None, 'before_batch', 'after_pred', 'after_backward', 'after_batch', 'after_epoch'])
def test_the_network_is_plain_between_batches_and_after_a_fit_however_it_ended(at, tmp_path):
    learn = keyed_learner().compile(backend='counted')
    class Look(Callback):
        def before_epoch(self): assert '_compiled_call_impl' not in vars(self.learn.model)
        before_train = before_validate = after_epoch = before_epoch
    try: learn.fit(1, cbs=[Look(), *([End(at)] if at else [])])
    except KeyboardInterrupt: pass
    n, x = len(GRAPHS), torch.rand(2, 3, 12, 12)
    learn.model.eval()(x)
    assert len(GRAPHS) == n and '_compiled_call_impl' not in vars(learn.model)
    again = load_learner(export_learner(learn, tmp_path/'learner.pkl'))
    assert torch.equal(again.model.eval()(x), learn.model(x)) and len(GRAPHS) == n
    assert '_compiled_call_impl' not in vars(deepcopy(learn.model)) and learn.compile_cb.__getstate__()['made'] is None


def test_a_network_that_was_compiled_for_good_stays_so():
    learn = keyed_learner()
    learn.model.compile(backend='eager')
    own = learn.model._compiled_call_impl
    learn.compile(backend='counted').fit(1)
    assert learn.model._compiled_call_impl is own and GRAPHS


def test_layers_with_hooks_are_not_compiled_and_their_hooks_are_called():
    learn, seen = keyed_learner().compile(backend='counted'), []
    class Hooked(Callback):
        def before_batch(self): self.handle = self.learn.model[0].register_forward_hook(lambda m, i, o: seen.append(len(o)))
        def after_pred(self): self.handle.remove()
    learn.fit(1, cbs=Hooked())
    assert len(seen) == 4+3 and not GRAPHS and 'nothing is compiled in batches in which layers have hooks' in learn.techniques['compile'].effect


def test_averages_and_masks_reach_compiled_code():
    def run(learn): return trained(learn.prune(.5).ema(.5))
    (a, rows), (b, plainly) = run(keyed_learner().compile(backend='aot_eager')), run(keyed_learner())
    assert close(a, b) and [v for r in rows for v in r] == pytest.approx([v for r in plainly for v in r], rel=1e-4)


@pytest.mark.parametrize('other', ['dropout', 'dropconnect', 'stochastic_depth', 'to_parallel'])
def test_what_compiled_code_does_not_see_is_refused(other):
    with pytest.raises(ValueError, match=f"'compile' and '{other}' do not go together"): learner().use(**{'compile': dict(backend='eager'), other: True})


@pytest.mark.parametrize('given, said', [(dict(mode='fast'), "compile: mode must be one of default, .* got 'fast'"),
                                         (dict(backend='inducter'), "backend must be one of .*inductor.* got 'inducter'")])
def test_what_there_is_not_is_refused(given, said):
    with pytest.raises(ValueError, match=said): learner().compile(**given)


# to_channelslast

class Layout(Callback):
    "How images and weights lie when the network gets them."
    order = 90
    def __init__(self): self.seen = []
    def before_batch(self): self.seen.append(tuple(t.is_contiguous(memory_format=torch.channels_last) for t in (self.learn.xb[0], self.learn.model[0].weight)))


def lies(model): return [p.is_contiguous() for p in model.parameters()]


@pytest.mark.parametrize('techniques', [{}, dict(mixup=.4, cutout=4), dict(progressive_resize=True)], ids='+'.join)
def test_images_and_weights_lie_channels_last_while_the_network_computes(techniques):
    learn = keyed_learner().use(**techniques).to_channelslast()
    learn.fit(1, cbs=(layout := Layout()))
    assert layout.seen == [(True, True)]*7
    learn.get_preds(cbs=(layout := Layout()))
    assert layout.seen == [(True, True)]*3 and all(lies(learn.model))


def test_it_computes_the_same_numbers():
    (a, rows), (b, plainly) = trained(keyed_learner().to_channelslast()), trained(keyed_learner())
    assert close(a, b) and [v for r in rows for v in r] == pytest.approx([v for r in plainly for v in r], rel=1e-4)
    one, two = (learn.get_preds()[0] for learn in (keyed_learner().to_channelslast(), keyed_learner()))
    assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize('at', ['before_batch', 'after_backward', 'after_epoch', 'before_validate'])
def test_weights_lie_as_before_however_a_fit_ended(at):
    learn = keyed_learner().to_channelslast()
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=End(at))
    assert all(lies(learn.model))
    with pytest.raises(KeyboardInterrupt): learn.validate(cbs=End('after_pred'))
    assert all(lies(learn.model))


def test_what_the_user_laid_out_stays_so():
    learn = keyed_learner()
    learn.model.to(memory_format=torch.channels_last)
    learn.to_channelslast().fit(1)
    assert not learn.model[0].weight.is_contiguous()


THEIRS = """from fastai.vision.all import *
learn = Learner(DataLoaders([], []), nn.Conv2d(3, 3, 3), loss_func=noop)
print(learn.to_channelslast(use_amp=False) is learn, learn.to_channelslast(use_amp=False))"""


def test_the_second_call_returns_none_in_fastai_and_the_learner_here():
    "fastai 2.8.12 also looks whether there is a `learn.channels_last`, which a technique of that name would always be."
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', THEIRS], capture_output=True, text=True).stdout.split() == ['True', 'None']
    learn = learner()
    assert learn.to_channelslast() is learn and learn.to_channelslast() is learn and len([cb for cb in learn.cbs if isinstance(cb, ChannelsLast)]) == 1


def test_16_bits_are_added_on_request_only_and_act_on_a_cpu_too():
    "fastai 2.8.12 adds float16 by default, for CUDA whatever the device: on a CPU it does nothing."
    assert 'to_fp16' not in learner().to_channelslast().techniques
    for amp_mode in ('fp16', 'bf16'):
        learn = learner().to_channelslast(use_amp=True, amp_mode=amp_mode)
        class Type(Callback):
            def after_pred(self): self.inside = torch.is_autocast_enabled('cpu')
        class Inside(nn.Module):
            def forward(self, x): self.dtype = x.dtype; return x
        learn.model.append(inside := Inside())
        learn.fit(1)
        assert f'to_{amp_mode}' in learn.techniques and inside.dtype == torch.bfloat16


def test_to_contiguous_of_fastai_takes_it_off():
    learn = learner().to_channelslast()
    learn.to_contiguous()
    assert not [cb for cb in learn.cbs if isinstance(cb, ChannelsLast)]


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(400, 3)
    def forward(self, x): return self.head(self.conv(x).view(len(x), -1))


def test_a_network_that_views_its_pixels_is_refused_and_lies_as_before():
    learn = learner(Views)
    with pytest.raises(ValueError, match='to_channelslast: the network cannot take images channels last .view size is not compatible.*; put reshape'): learn.to_channelslast()
    assert all(lies(learn.model)) and list(learn.techniques) == ['weight_decay']


def test_without_convolutions_there_is_nothing_to_lay_out(capsys):
    learn = learner(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3*12*12, 3))).to_channelslast()
    assert 'to_channelslast: the network has no 2d convolution: nothing to lay out' in capsys.readouterr().out and not hasattr(learn, 'channels_last_format_cb')


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="to_channelslast: amp_mode must be one of fp16, bf16, got 'fp8'"): learner().to_channelslast(amp_mode='fp8')
