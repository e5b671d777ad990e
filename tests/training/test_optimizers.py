"Each optimizer of torch and timm steps as the library's own does, on fastai's groups, rates and decay; what it keeps survives a kill, a freeze and a file."
import pickle
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper, nn
from fastai.callback.schedule import ParamScheduler
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import Indexed
from fastrecipes.randomness import key_of
from fastrecipes.technique import discover
from fastrecipes.training.optimizers import InPairs
from fastrecipes.training.precision import Autocast
from tests.contract.conftest import learner as digits
from tests.contract.test_4_resumes import check

discover()
NAMES = [n for n in list_optimizers() if not n.startswith(('bnb', 'fused'))]
SOME = ['adahessian', 'kron', 'muon', 'lamb', 'lion', 'adopt', 'adamw', 'sgd', 'lookahead_adan']
WD, PEAKS, STEPS = .1, [.004, .02], 6


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def parts(m): return [list(m[:2].parameters()), list(m[2:].parameters())]


def learner(wd=WD, **kwargs):
    g = torch.Generator().manual_seed(0)
    ds = Indexed(TensorDataset(torch.randn(48, 4, generator=g), torch.randint(3, (48,), generator=g)), vocab=range(3))
    dls = DataLoaders(KeyedDL(ds, 16, seed=0, shuffle=True, num_workers=0), KeyedDL(ds, 16, num_workers=0), device=torch.device('cpu'))
    learn = Learner(dls, net(), CrossEntropyLossFlat(), splitter=parts, wd=wd, **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


class Batches(Callback):
    "The training batches."
    order = 60
    def before_fit(self): self.seen = []
    def after_pred(self):
        if self.learn.training: self.seen.append((self.learn.xb[0].clone(), self.learn.yb[0].clone()))


def falling(pct): return np.array(PEAKS)*(1-pct)         # the rates of the two groups
def momentum(pct): return .95 - .2*pct


def of_library(name, model, batches, moms=False, seed=None, **kwargs):
    "The weights after a step of the library's own optimizer on each batch, with four groups: matrices decay; biases and norms do not."
    groups = [dict(params=[p for p in ps if bool(p.ndim > 1) == decays], weight_decay=WD*decays, lr=peak, max_lr_snapshot=peak)
              for decays in (True, False) for ps, peak in zip(parts(model), PEAKS)]
    if name.startswith('kron'): kwargs['deterministic'] = True
    opt = create_optimizer_v2(groups, name, lr=1e-3, weight_decay=0., momentum=.95 if 'muon' in name else .9, **kwargs)
    for i, (x, y) in enumerate(batches):
        pct = i/STEPS
        for g, peak in zip(opt.param_groups, 2*PEAKS):
            g['lr'] = peak*(1-pct)
            if moms and 'momentum' in g: g['momentum'] = momentum(pct)
            elif moms and g.get('betas'): g['betas'] = (momentum(pct), *g['betas'][1:])
        key = key_of(seed, 'optimizer', i//3, i % 3) % 2**63
        if hasattr(opt, 'rng'): opt.rng = random.Random(key)
        if hasattr(opt, 'generator'): opt.generator = torch.Generator().manual_seed(key)
        F.cross_entropy(model(x), y).backward(create_graph=name == 'adahessian')
        with torch.compiler.set_stance('force_eager'): opt.step()
        opt.zero_grad()
    return list(model.parameters())


def trained(name, moms=False, change=lambda learn: learn, **kwargs):
    "Ours after as many steps, and the library's own."
    learn = learner().optimizer(name, **kwargs)
    change(learn)
    model, scheds = deepcopy(learn.model), dict(lr=falling) | (dict(mom=momentum) if moms else {})
    learn.fit(2, cbs=[batches := Batches(), ParamScheduler(scheds)])
    assert len(batches.seen) == STEPS
    return learn, of_library(name, model, batches.seen, moms, learn.keyed_cb.seed, **kwargs)


def assert_close(learn, theirs, **kwargs):
    for p, q in zip(learn.model.parameters(), theirs): assert torch.allclose(p, q, **{**dict(rtol=1e-5, atol=1e-6), **kwargs}), (p, q)


@pytest.mark.parametrize('name', [*NAMES, 'lookahead_sgd', 'lookahead_adamw'])
def test_six_steps_at_falling_rates_by_layer_equal_the_librarys_own(name):
    learn, theirs = trained(name)
    assert_close(learn, theirs)
    assert any(not torch.equal(p, q) for p, q in zip(learn.model.parameters(), net().parameters()))


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'momentum', 'muon', 'nadam', 'lion', 'adan', 'rmsprop', 'kron', 'adagrad', 'lookahead_sgd'])
def test_a_schedule_of_momentum_reaches_the_optimizer_and_idles_where_it_has_none(name): assert_close(*trained(name, moms=True))


def test_the_momentum_of_muon_is_not_reached_in_fastai():
    "fastai 2.8.12 maps both momentum and the first of betas, that of the fallback, to `mom`, and sets the latter."
    opt = OptimWrapper([nn.Parameter(torch.ones(3, 3))], opt=get_optimizer_class('muon'), lr=.1)
    opt.set_hyper('mom', .5)
    assert opt.opt.param_groups[0]['momentum'] == .95 and opt.opt.param_groups[0]['betas'][0] == .5


@pytest.mark.parametrize('ours', [False, True])
def test_norms_and_biases_decay_in_fastais_wrapper_and_not_here(ours):
    learn = learner(wd=.5)
    if ours: learn.optimizer('adamw')
    else: learn.opt_func = lambda ps, lr: OptimWrapper([list(p) for p in ps], opt=torch.optim.AdamW, lr=lr)
    with torch.no_grad(): [p.add_(1.) for p in learn.model.parameters()]         # biases too
    before = [p.detach().clone() for p in learn.model.parameters()]
    class NoGradient(Callback):
        order = 60
        def before_step(self):
            for p in self.learn.model.parameters(): p.grad.zero_()
    learn.fit(1, 1e-2, cbs=NoGradient())
    shrunk = [not torch.equal(p, b) for p, b in zip(learn.model.parameters(), before)]
    assert shrunk == [p.ndim > 1 or not ours for p in learn.model.parameters()]
    for p, b in zip(learn.model.parameters(), before):
        if p.ndim > 1: assert torch.allclose(p, b*(1-1e-2*.5)**3)


def test_with_wd_bn_bias_all_decay():
    learn = learner(wd=.5, wd_bn_bias=True).optimizer('adamw')
    class Groups(Callback):
        def after_step(self): self.seen = [(len(g['params']), g['weight_decay']) for g in self.learn.opt.opt.param_groups]
    learn.fit(1, cbs=(groups := Groups()))
    assert groups.seen == [(4, .5), (2, .5)]


def test_settings_reach_the_constructor():
    assert_close(*trained('adamw', betas=[.5, .7], eps=.1))
    learn = learner().optimizer('lookahead_sgd', momentum=.3, args=dict(dampening=0., lookahead_k=2, lookahead_alpha=.25))
    learn.create_opt()
    g = learn.opt.opt.param_groups[0]
    assert (g['momentum'], g['nesterov'], g['lookahead_k'], g['lookahead_alpha']) == (.3, True, 2, .25)


@pytest.mark.parametrize('name', ['adamw', 'adam', 'lion', 'muon', 'adahessian'])
def test_weight_decay_takes_lr_wd_w_off_whatever_the_optimizer_does_by_itself(name):
    learn = learner(wd=None).optimizer(name, **({} if name in ('muon', 'lion') else dict(eps=1e9)))            # steps of next to nothing
    learn.weight_decay(.5)
    before = [p.detach().clone() for p in learn.model.parameters()]
    class NoGradient(Callback):
        order = 60
        def before_step(self):
            if name in ('muon', 'lion'): [p.grad.zero_() for p in self.learn.model.parameters()]
    learn.fit(1, 1e-2, cbs=NoGradient())
    for p, b in zip(learn.model.parameters(), before): assert torch.allclose(p, b*(1-1e-2*.5)**3 if p.ndim > 1 else b, atol=1e-6)


@pytest.mark.parametrize('name', SOME)
def test_frozen_layers_stay_and_train_once_unfrozen(name):
    learn = learner().optimizer(name)
    learn.freeze()
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1, 1e-2)
    moved = [not torch.equal(p, b) for p, b in zip(learn.model.parameters(), before)]
    assert moved == [False, False, True, True, True, True]       # a norm trains on, as fastai has it
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-3, 1e-2))
    assert all(not torch.equal(p, b) for i, (p, b) in enumerate(zip(learn.model.parameters(), before)) if i != 1)      # a bias in front of a norm has no gradient


def test_a_new_optimizer_leaves_frozen_what_is():
    learn = learner()
    learn.freeze()
    learn.optimizer('lion')
    assert learn.opt.frozen_idx == 1 and [p.requires_grad for p in learn.model.parameters()] == [False, False, True, True, True, True]


@pytest.mark.parametrize('name', ['lookahead_adamw', 'adahessian', 'adan'])
def test_a_freeze_clears_what_it_counted_too(name):
    learn = learner().optimizer(name)
    learn.fit(1)
    learn.freeze()
    assert not learn.opt.opt.state_dict()['state'] or name == 'adahessian' and not any('step' in s for s in learn.opt.opt.state_dict()['state'].values())
    assert all(g.get('lookahead_step', 0) == g.get('step', 0) == 0 for g in learn.opt.opt.param_groups)
    learn.fit(1)


KILLS = [((0, 1, 1), 'before'), ((1, 0, 2), 'after')]


@pytest.mark.parametrize('name, kwargs', [*((n, {}) for n in SOME), ('adahessian', dict(eps=1., args=dict(update_each=3))), ('kron', dict(args=dict(stochastic_weight_decay=True))),
                                          ('adamc', {}), ('mars', {}), ('nadam', {}), ('madgrad', {}), ('adafactor', {}), ('adafactorbv', {}), ('novograd', {})])
def test_killed_and_run_again_it_ends_as_if_never_killed(name, kwargs, tmp_path): check(lambda: digits(128, bs=32).optimizer(name, **kwargs), tmp_path, KILLS)


@pytest.mark.parametrize('name', SOME)
def test_it_comes_back_from_a_file_with_all_it_kept(name, tmp_path):
    learn, other = learner(path=tmp_path).optimizer(name), learner(path=tmp_path).optimizer(name)
    learn.fit(1, slice(1e-3, 1e-2))
    learn.save('half')
    other.fit(1, 1e-1)
    other.load('half')
    other.keyed_cb.done = learn.keyed_cb.done                    # the epoch that comes next
    assert [dict(h) for h in other.opt.hypers] == [dict(h) for h in learn.opt.hypers]
    for o in (learn, other): o.fit(1, slice(1e-3, 1e-2))
    assert all(torch.equal(p, q) for p, q in zip(learn.model.state_dict().values(), other.model.state_dict().values()))


def test_the_state_of_another_optimizer_is_refused():
    learn = learner()
    learn.create_opt()
    other = learner().optimizer('lion')
    other.create_opt()
    with pytest.raises(ValueError, match='not one of Lion; load the weights alone, with_opt=False'): other.opt.load_state_dict(learn.opt.state_dict())


@pytest.mark.parametrize('name', SOME)
def test_a_learner_with_it_can_be_copied_and_exported(name, tmp_path):
    learn = learner(path=tmp_path).optimizer(name)
    learn.fit(1)
    twin = deepcopy(learn)
    for o in (learn, twin): o.fit(1)
    assert all(torch.equal(p, q) for p, q in zip(learn.model.parameters(), twin.model.parameters()))
    learn.export('l.pkl')
    assert not any(hasattr(p, 'hess') for p in learn.model.parameters()) and pickle.loads(pickle.dumps(learn.opt_func)).keywords['name'] == name


# with others

class Half(Autocast):
    "What a GPU does under to_fp16, as far as a CPU can: an enabled GradScaler, the forward pass in 32 bits."
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', torch.bfloat16, enabled=False)
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)


@pytest.mark.parametrize('name', ['sgd', 'lamb', 'lion', 'muon', 'lookahead_adamw'])
def test_a_scaled_loss_gives_the_same_steps(name): assert_close(*trained(name, change=lambda learn: learn.add_cb(Half(torch.float16))))


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'muon'])
def test_it_steps_by_the_gradient_that_was_accumulated_and_clipped(name):
    learn = learner(wd=0.).optimizer(name).grad_accum(3).grad_clip(.1)
    learn.model[1] = nn.Identity()                               # batch statistics would be those of small batches
    model = deepcopy(learn.model)
    learn.fit(1, 1e-2, cbs=(batches := Batches()))
    opt = create_optimizer_v2(model.parameters(), name, lr=1e-2, weight_decay=0., momentum=.95 if name == 'muon' else .9)
    x, y = (torch.cat(t) for t in zip(*batches.seen))
    F.cross_entropy(model(x), y).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), .1) > .1
    opt.step()
    assert_close(learn, list(model.parameters()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lamb', 'muon', 'adahessian', 'lookahead_sgd'])
def test_pruned_weights_stay_0(name):
    learn = learner().prune(.5).optimizer(name)
    zero = [p == 0 for p in learn.model.parameters()]
    learn.fit(2, 1e-2)
    assert all(not bool(p[z].any()) for p, z in zip(learn.model.parameters(), zero) if p.ndim > 1)


@pytest.mark.parametrize('other, said', [('grad_accum', 'take a larger bs'), ('sam', 'the other place')])
def test_adahessian_with_what_takes_its_graph_away_is_refused_before_the_first_batch(other, said):
    learn = learner().use(optimizer='adahessian', **{other: True})
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=f"'adahessian' and '{other}' do not go together: .*{said}"): learn.fit(1)
    assert all(torch.equal(p, b) for p, b in zip(learn.model.parameters(), before))


def test_adahessian_with_a_scaled_loss_is_refused():
    learn = learner().optimizer('adahessian')
    learn.add_cb(Half(torch.float16))
    with pytest.raises(ValueError, match="'adahessian' and 'to_fp16' do not go together.*take to_bf16"): learn.fit(1)


def test_a_batch_of_adahessian_that_dies_leaves_no_graph():
    class Die(Callback):
        order = 50
        def after_backward(self): raise RuntimeError('dies')
    learn = learner().optimizer('adahessian')
    with pytest.raises(RuntimeError): learn.fit(1, cbs=Die())
    assert all(p.grad is None and not hasattr(p, 'hess') for p in learn.model.parameters())


def test_the_decay_that_falls_with_the_rate_goes_by_the_highest_rate_of_the_fit():
    "lr²/max lr: timm takes the rate at the start, which for fastai is that of the Learner and not of the fit."
    learn = learner(wd=.5).optimizer('adamc', eps=1e9)
    w = learn.model[0].weight.detach().clone()
    learn.fit(1, cbs=ParamScheduler(dict(lr=lambda pct: [.01, .04, .02][round(pct*3)])))
    for lr, top in ((.01, .01), (.04, .04), (.02, .04)): w = w*(1 - lr*lr/top*.5)
    assert torch.allclose(learn.model[0].weight, w, atol=1e-6)


def test_products_in_pairs_are_those_of_einsum():
    g = torch.Generator().manual_seed(0)
    a, b, c, t = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, 2), (3, 3), (4,), (2, 3, 4)))
    for expr, ops in (('aA,bB,c,ABc->abc', (a, b, c, t)), ('aA,aB,cC,BbC->Abc', (a, a, torch.diag(c), torch.randn(2, 3, 4, generator=g, dtype=torch.float64))),
                      ('ab,bc->ac', (a, torch.ones(2, 3).double()))):
        with InPairs(): mine = torch.einsum(expr, *ops)
        assert torch.allclose(mine, torch.einsum(expr, *ops))


# refusals

@pytest.mark.parametrize('kwargs, said', [
    (dict(name='adamww'), "no optimizer 'adamww'; did you mean 'adamw'"), (dict(name='lookahead_'), "no optimizer 'lookahead_'"),
    (dict(name='lbfgs'), "'lbfgs': it asks for the loss many times"), (dict(name='schedule_free_adamw'), 'neither torch nor timm has a schedule-free'),
    (dict(name='adamwschedulefree'), 'schedule-free'),
    (dict(name='bnbadam8bit'), "'bnbadam8bit' is not to be had here"), (dict(name='lion', eps=1e-8), "'lion' takes no eps; it takes betas"),
    (dict(name='adamw', momentum=.9), 'takes no momentum'),
    (dict(name='adan', betas=[.9, .99]), r"'adan' has 3 betas, got \[0.9, 0.99\]"), (dict(name='adamw', betas=[.9, 1.5]), 'refuses .*Invalid beta parameter at index 1: 1.5'),
    (dict(name='adamw', args=dict(amsgrd=True)), "takes no argument 'amsgrd'; did you mean 'amsgrad'"),
    (dict(name='adamw', args=dict(lr=.1)), "'lr' is not for args; give it to the fit"),
    (dict(name='adamw', args=dict(lookahead_k=3)), "takes no argument 'lookahead_k'"), (dict(name='lookahead_adamw', args=dict(lookahead_k=0)), 'Invalid lookahead steps: 0'),
    (dict(name='sgd', momentum=0.), 'Nesterov momentum requires a momentum')], ids=lambda o: str(o)[:40] if isinstance(o, dict) else '')
def test_what_it_cannot_be_is_refused_and_the_old_one_stays(kwargs, said):
    learn = learner()
    before = learn.opt_func
    with pytest.raises((ValueError, TypeError), match=said): learn.optimizer(**kwargs)
    assert learn.opt_func is before and not learn.__dict__.get('techniques') and not hasattr(learn, 'optimizer_step_cb')


def test_its_name_alone_is_the_keyword_of_a_recipe_and_needed():
    assert learner().use(optimizer='lion').opt_func.keywords['name'] == 'lion'
    with pytest.raises(TypeError, match='needs name'): learner().use(optimizer=True)
    assert learner().use(optimizer='muon').techniques['optimizer'].effect == 'muon (Muon of timm) takes the steps of 63 weights in 6 tensors'


@pytest.mark.parametrize('name, wd, kwargs, told', [('lamb', 0., {}, True), ('lars', 0., {}, True), ('lamb', .1, {}, False), ('adamw', 0., {}, False),
                                                    ('lamb', 0., dict(args=dict(always_adapt=True)), False)])
def test_it_says_where_rates_are_not_adapted_by_layer_for_want_of_decay(name, wd, kwargs, told, capsys):
    learn = learner(wd=wd).optimizer(name, **kwargs)
    learn.fit(1, 1e-3)
    assert ('adapts the rate of each layer only where weights decay' in capsys.readouterr().out) is told


def test_without_decay_lamb_is_adam_and_the_sentence_is_true():
    "timm's LAMB with a clip that never acts: no trust ratio, so the step is Adam's, as long as no gradient norm exceeds 1."
    from timm.optim import Lamb
    w = [nn.Parameter(torch.tensor([[3., -2.], [1., .5]])) for _ in range(2)]
    opts = Lamb([w[0]], lr=.1, weight_decay=0., max_grad_norm=None), torch.optim.Adam([w[1]], lr=.1, eps=1e-6)
    for _ in range(3):
        for p, opt in zip(w, opts):
            p.grad = torch.tensor([[.1, -.2], [.3, .05]])
            opt.step()
    torch.testing.assert_close(*w)
