"What is found, what is replaced and what must survive it: hooks, modes, frozen groups, the optimizer's memory, sharing."
import pytest
import torch
from fastai.basics import Callback, nn
from fastai.vision.all import DataBlock, ImageBlock, MaskBlock, resnet18, unet_learner
from torch.nn import functional as F
from torch.nn.utils import spectral_norm

from fastrecipes.layers.surgery import Inserted, operate, trace, uninsert

from .learners import digits, pictures


class Backwards(nn.Module):
    "Layers in another order than they are called, one of them twice, one never."
    def __init__(self):
        super().__init__()
        self.head, self.never, self.second, self.first, self.act = nn.Linear(4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()
    def forward(self, x): return self.head(self.act(self.second(self.act(self.first(x)))).mean((2, 3)))


def test_a_trace_is_in_the_order_of_the_calls_and_leaves_nothing_behind():
    learn = pictures(Backwards())
    net = learn.model.train()
    net.second.eval()
    state, modes = torch.get_rng_state(), [m.training for m in net.modules()]
    seen = trace(learn, 'test')
    assert [c.name for c in seen.calls.values()] == ['first', 'second', 'act', 'head', ''] and seen.answering is net.head
    assert [c.name for c in seen.hidden.values()] == ['first', 'second', 'act'] and seen.calls[net.act].times == 2
    assert (seen.calls[net.first].takes, seen.calls[net.first].gives) == ((1, 3, 32, 32), (1, 4, 15, 15))
    assert [m for m in seen.entered()] == [net.first, net.act, net.second, net.head]
    assert torch.equal(state, torch.get_rng_state()) and modes == [m.training for m in net.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_network_that_cannot_be_run_is_a_sentence_and_leaves_nothing_behind():
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 3)).train()
    with pytest.raises(ValueError, match='test: the network cannot be run on a sample of its data .RuntimeError: .*; `learn.preflight'): trace(pictures(net), 'test')
    assert net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_modes_and_hooks_come_along_and_a_new_layer_is_where_the_old_one_was():
    learn, seen = digits(), []
    learn.model.eval()
    handle = learn.model[1].register_forward_hook(lambda m, args, out: seen.append(type(m)))
    old = learn.model[1]
    operate(learn, {old: nn.Tanh()}, 'test')
    learn.model(torch.zeros(1, 1, 16, 16))
    assert seen == [nn.Tanh] and not learn.model[1].training and not old._forward_hooks
    handle.remove()
    learn.model(torch.zeros(1, 1, 16, 16))
    assert len(seen) == 1


def test_what_is_put_behind_a_layer_comes_out_again_and_the_layers_own_hooks_stay_with_it():
    "A spectral norm is a hook in front of its layer, and must not move to what holds it."
    learn = digits()
    spectral_norm(learn.model[2])
    conv, x, keys = learn.model[2], torch.rand(2, 1, 16, 16), list(learn.model.state_dict())
    plain, seen = learn.model.eval()(x), []
    conv.register_forward_hook(lambda m, args, out: seen.append(float(out.mean())))
    operate(learn, {conv: Inserted('test', 0, conv, nn.Threshold(1e9, 7.))}, 'test')
    learn.model(x)
    assert seen == [7.] and isinstance(learn.model[2], Inserted)            # what looks at the place sees what it gives now
    uninsert(learn, 'other')
    assert isinstance(learn.model[2], Inserted)
    uninsert(learn, 'test')
    assert learn.model[2] is conv and torch.equal(learn.model(x), plain) and len(seen) == 2 and list(learn.model.state_dict()) == keys


def test_the_whole_network_may_be_what_is_replaced():
    learn = digits(nn.Linear(4, 2))
    operate(learn, {learn.model: nn.Linear(4, 3)}, 'test')
    assert learn.model.out_features == 3


def two_groups(m): return [list(m[:2].parameters()), list(m[2:].parameters())]


def test_the_optimizer_keeps_its_groups_the_frozen_ones_and_what_it_remembers():
    learn = digits()
    learn.splitter = two_groups
    learn.fit(1, 3e-3)
    learn.opt.set_hyper('wd', [.3, .4])
    before = {p: dict(s) for p, s in learn.opt.state.items()}
    operate(learn, {learn.model[3]: nn.PReLU()}, 'test')
    kept = [p for p in learn.model.parameters() if p in before]
    assert len(kept) == 6 and all(torch.equal(learn.opt.state[p]['sqr_avg'], before[p]['sqr_avg']) for p in kept)
    learn.freeze_to(1)
    operate(learn, {learn.model[3]: nn.PReLU()}, 'test')
    assert [len(g) for g in learn.opt.param_lists] == [2, 5] and learn.opt.frozen_idx == 1 and [h['wd'] for h in learn.opt.hypers] == [.3, .4]
    assert [p.requires_grad for p in learn.model.parameters()] == [False]*2 + [True]*5
    slope = learn.model[3].weight
    learn.opt.set_hyper('wd', 0.)                                           # fastai decays frozen weights that have had a gradient
    first = [p.detach().clone() for p in learn.model[0].parameters()]
    learn.fit(1, 1e-2)
    assert float(slope) != .25 and all(torch.equal(p, q) for p, q in zip(first, learn.model[0].parameters()))
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())


def test_layers_whose_weights_are_pruned_are_not_replaced():
    learn = digits().prune(.3)
    with pytest.raises(ValueError, match='coordconv: it would replace layers whose weights are pruned; prune after coordconv'): learn.coordconv()
    assert type(learn.model[0]) is nn.Conv2d and 'coordconv' not in learn.techniques
    learn.norm('group', insert=True).fit(1)                                 # these stay, with something behind them
    assert float((learn.model[2][0].weight == 0).float().mean()) > .2


def test_layers_come_to_the_device_of_the_network():
    learn = digits()
    assert all(p.device == torch.device('cpu') for p in learn.activation('prelu').model.parameters())
    learn.model.to('meta')
    operate(learn, {learn.model[1]: nn.PReLU()}, 'test')
    assert learn.model[1].weight.device.type == 'meta'


@pytest.fixture(scope='module')
def unet():
    def random(high, *shape): return torch.randint(high, shape, dtype=torch.uint8).numpy()
    masks = DataBlock((ImageBlock, MaskBlock(['a', 'b'])), get_x=lambda i: random(256, 64, 64, 3), get_y=lambda i: random(2, 64, 64),
                      splitter=lambda items: ([0, 1, 2, 3], [4, 5]))
    dls = masks.dataloaders(range(6), bs=2, num_workers=0, device='cpu')
    learn = unet_learner(dls, resnet18, pretrained=False, normalize=False)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def test_the_unet_of_fastai_goes_on_seeing_the_maps_of_its_encoder(unet):
    "It looks into its encoder by hooks, one of them on the ReLU that `activation` replaces."
    unet.activation('elu').norm('group')
    n = int(unet.techniques['activation'].effect.split()[0])
    assert n > 20 and not any(isinstance(m, (nn.ReLU, nn.BatchNorm2d)) for m in unet.model.modules())
    class Stored(Callback):
        order = 60
        def after_pred(self): self.maps = [h.stored for h in self.learn.model.sfs]
    first = unet.model.layers[0][2]
    assert isinstance(first, nn.ELU)
    outs = []
    handle = first.register_forward_hook(lambda m, args, out: outs.append(out))
    unet.fit(1, 1e-3, cbs=(stored := Stored()))
    handle.remove()
    assert any(o is outs[-1] or o is not None and o.shape == outs[-1].shape and torch.equal(o, outs[-1]) for o in stored.maps) and unet.recorder.values[-1][1] < 10


def test_self_attention_and_coordinates_in_a_unet_change_no_answer_at_first(unet):
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        plain = unet.model.eval()(x)
        unet.coordconv('all').self_attention()
        assert torch.allclose(unet.model.eval()(x), plain, atol=1e-5)
    unet.fit(1, 1e-3)
    assert F.cross_entropy(unet.model.eval()(x).detach(), torch.zeros(2, 64, 64, dtype=torch.long)) < 10


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0., activation=nn.ReLU(), batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 10)
    def forward(self, x): return self.head(self.body(x.flatten(0, 1)).mean(1))


@pytest.mark.parametrize('techniques', [dict(activation='tanh'), dict(norm='group'), dict(norm=dict(kind='group', insert=True))], ids=str)
def test_torchs_own_transformer_answers_alike_with_and_without_a_gradient(techniques):
    "torch 2.15 takes another way where none is asked for, which knows its own layers only."
    torch.manual_seed(0)
    learn = digits(Tokens()).use(**techniques)
    learn.fit(1, 1e-2)
    x = learn.dls.valid_ds.dataset.tensors[0].double()          # group norm divides dark rows by next to nothing, and rounding grows
    answers = learn.model.double().eval()(x)
    with torch.no_grad(): assert torch.allclose(learn.model(x), answers, atol=1e-9)
