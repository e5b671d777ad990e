"Each schedule sets, before every batch and for every parameter group, what its formula says; plots show the same and train nothing."
import math

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Adam, Callback, L, nn, params
from fastai.losses import CrossEntropyLossFlat

from fastrecipes.technique import discover
from fastrecipes.training.resume import resumable
from fastrecipes.training.schedules import RESTARTED, SCHEDULES, cycles_of, fit_by

discover()
N, E = 4, 4                                     # batches an epoch; epochs


def split(model): return L(model[0], model[1], model[2]).map(params)


def three(toy, **kwargs):
    "Three parameter groups, four batches an epoch."
    torch.manual_seed(5)
    return toy(model=nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)), splitter=split, **kwargs)


class Seen(Callback):
    "The hyper-parameters that each step takes."
    order = 90
    def before_fit(self): self.rates, self.moms = [], []
    def before_step(self):
        self.rates.append([float(h['lr']) for h in self.learn.opt.hypers])
        self.moms.append(float(self.learn.opt.hypers[-1]['mom']))


def cos(start, end, t): return end + (start-end)*(1 + math.cos(math.pi*t))/2        # arXiv:1608.03983, equation 5


def sgdr(t, ends=(1, 4)):
    "Cycles that end after these epochs, of so many in all."
    e, starts = t*ends[-1], (0, *ends)
    i = max(j for j, s in enumerate(starts[:-1]) if s <= e)
    return cos(1, 0, (e-starts[i])/(starts[i+1]-starts[i]))


def one_cycle(t): return cos(.04, 1, t/.25) if t < .25 else cos(1, 1e-5, (t-.25)/.75)


FORMULAS = {                                    # of the share of the fit that is over, for a rate of 1
    ('constant', ()): lambda t: 1.,
    ('step', ()): lambda t: 1. if t < .5 else .1 if t < .75 else .01,
    ('step', (('gamma', .5), ('milestones', (1, 3.5)))): lambda t: 1. if t < 1/4 else .5 if t < 3.5/4 else .25,
    ('step', (('every', 1),)): lambda t: .1**int(4*t),
    ('decay', ()): lambda t: 100**-t,
    ('decay', (('form', 'inverse'), ('div_final', 10))): lambda t: 1/(1 + 9*t),
    ('decay', (('form', 'linear'), ('div_final', 4))): lambda t: 1 - .75*t,
    ('decay', (('form', 'polynomial'), ('power', 2))): lambda t: .01 + .99*(1-t)**2,
    ('cos', ()): lambda t: cos(1, 1e-5, t),
    ('flat_cos', (('pct_start', .5),)): lambda t: 1 if t < .5 else cos(1, 1e-5, 2*t-1),
    ('flat_cos', ()): lambda t: 1 if t < .75 else cos(1, 1e-5, 4*t-3),
    ('sgdr', ()): sgdr,
    ('one_cycle', ()): one_cycle}


@pytest.mark.parametrize('schedule, kwargs', FORMULAS, ids=str)
def test_each_batch_and_group_has_the_rate_of_the_formula(toy, schedule, kwargs):
    learn, seen = three(toy), Seen()
    fit_by(learn, schedule, E, slice(1e-4, 1e-2), cbs=seen, **dict(kwargs))
    expected = [[lr*FORMULAS[schedule, kwargs](i/(N*E)) for lr in (1e-4, 1e-3, 1e-2)] for i in range(N*E)]
    assert np.allclose(seen.rates, expected, rtol=2e-5, atol=1e-11)
    assert [float(v) for v in learn.recorder.lrs] == [r[-1] for r in seen.rates]


def test_the_formulas_cover_every_schedule(): assert {s for s, _ in FORMULAS} == set(SCHEDULES)


def test_milestones_are_met_at_their_epoch_and_not_one_later():
    "29/100 of 100 epochs are 28.999999999999996."
    class Learn:
        opt, lr = type('Opt', (), dict(hypers=[dict(lr=1.)], set_hyper=lambda *args: None))(), 1.
        def fit(self, n_epoch, cbs, **kwargs): self.f = cbs[0].scheds['lr']
    from fastai.basics import Learner
    learn = Learn()
    Learner.fit_step(learn, 100, every=1, gamma=.9)
    assert [float(learn.f(e/100)[0]) for e in range(100)] == pytest.approx([.9**e for e in range(100)])


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_a_single_rate_is_that_of_all_groups_and_none_is_the_learners(toy, schedule):
    for lr in (None, .02):
        learn, seen = three(toy, lr=.02), Seen()
        fit_by(learn, schedule, 2, lr, cbs=seen)
        assert all(len(set(r)) == 1 for r in seen.rates) and max(r[0] for r in seen.rates) == pytest.approx(.02, rel=.05)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_a_fit_that_starts_later_has_the_rates_of_the_later_epochs(toy, schedule):
    whole, late = Seen(), Seen()
    fit_by(three(toy), schedule, 4, 1e-3, cbs=whole)
    fit_by(three(toy), schedule, 4, 1e-3, cbs=late, start_epoch=3)
    assert late.rates == pytest.approx(np.array(whole.rates[-N:])) and len(late.rates) == N


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_weight_decay_callbacks_and_a_new_optimizer_are_taken(toy, schedule):
    learn, seen = three(toy), Seen()
    class Decay(Callback):
        def before_step(self): self.wd = self.learn.opt.hypers[-1]['wd']
    learn.create_opt()
    old = learn.opt
    fit_by(learn, schedule, 1, 1e-3, wd=.07, cbs=[seen, decay := Decay()], reset_opt=True)
    assert decay.wd == .07 and len(seen.rates) == N and learn.opt is not old


# warm restarts

def test_restarts_of_equal_length_divide_by_zero_in_fastai_and_not_here(toy):
    learn, seen = toy(), Seen()
    learn.fit_sgdr(3, 2, 1., cycle_mult=1, cbs=seen)
    assert [r[0] for r in seen.rates] == pytest.approx([cos(1, 0, (i % 8)/8) for i in range(24)], abs=1e-9)


@pytest.mark.parametrize('n, mult, cycles', [(1, 2, [1]), (2, 2, [2]), (3, 2, [1, 2]), (5, 2, [2, 3]), (7, 2, [1, 2, 4]), (10, 2, [1, 3, 6]),
                                             (15, 2, [1, 2, 4, 8]), (3, 1, [1, 1, 1]), (13, 3, [1, 3, 9])])
def test_cycles_of_a_number_of_epochs(n, mult, cycles): assert cycles_of(n, mult) == cycles


def test_any_number_of_epochs_is_made_of_cycles_that_do_not_shrink():
    for n in range(1, 200):
        lengths = cycles_of(n)
        assert sum(lengths) == n and all(0 < a <= b for a, b in zip(lengths, lengths[1:]))


def test_sgdr_by_epochs_says_its_cycles_and_trains_them(toy, capsys):
    learn, seen = toy(), Seen()
    fit_by(learn, 'sgdr', 7, 1., cbs=seen)
    assert 'sgdr: 7 epochs in 3 cycles of 1, 2, 4' in capsys.readouterr().out
    assert [i for i, r in enumerate(seen.rates) if r[0] == 1.] == [0, 1*N, 3*N] and len(seen.rates) == 7*N


@pytest.mark.parametrize('opt, torchs', [('sgd', lambda ps: torch.optim.SGD(ps, lr=.1, momentum=.9)),
                                         ('adamw', lambda ps: torch.optim.AdamW(ps, lr=.1, betas=(.9, .99), eps=1e-5, weight_decay=.3))])
def test_restarts_with_an_optimizer_of_their_own_are_torchs(toy, opt, torchs):
    "SGDWR and AdamWR: torch's cosine and optimizer; its SGD puts decay into the gradient, so that it is taken off the weights by hand."
    learn = toy(opt_func=SGD if opt == 'adamw' else Adam, wd=.3)
    learn.train_bn = learn.wd_bn_bias = True                                        # torch decays biases too
    model = nn.Linear(4, 3)
    model.load_state_dict(learn.model.state_dict())
    batches = []
    class Keep(Callback):
        def before_step(self): batches.append((self.learn.xb[0].clone(), self.learn.yb[0].clone()))
    learn.fit_sgdr(2, 1, .1, cycle_mult=2, cbs=Keep(), opt=opt)
    o = torchs(model.parameters())
    plan = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=N, T_mult=2)
    for x, y in batches:
        o.zero_grad()
        CrossEntropyLossFlat()(model(x), y).backward()
        if opt == 'sgd':
            with torch.no_grad(): torch._foreach_mul_(list(model.parameters()), 1-plan.get_last_lr()[0]*.3)
        o.step()
        plan.step()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(learn.model.parameters(), model.parameters()))


def test_the_optimizer_of_restarts_stays_and_is_not_begun_anew_and_freezes_what_was_frozen(toy):
    learn = three(toy)
    learn.freeze()
    frozen = learn.model[0].weight.detach().clone()
    learn.fit_sgdr(1, 1, opt='sgd')
    opt = learn.opt
    learn.fit_sgdr(1, 1, opt='sgd')
    assert learn.opt is opt and learn.opt_func is RESTARTED['sgd'] and opt.frozen_idx == 2 and torch.equal(learn.model[0].weight, frozen)


# plots

@pytest.mark.parametrize('schedule', SCHEDULES)
def test_what_is_plotted_is_what_is_trained(toy, schedule):
    learn, seen = three(toy), Seen()
    fig = learn.plot_schedule(schedule, 3, lr=slice(1e-4, 1e-2))
    fit_by(learn, schedule, 3, slice(1e-4, 1e-2), cbs=seen)
    lines = fig.axes[0].lines
    assert len(lines) == 3
    for g, line in enumerate(lines): assert np.allclose(line.get_ydata(), [r[g] for r in seen.rates], rtol=1e-6, atol=1e-12)
    assert len(fig.axes) == (2 if schedule == 'one_cycle' else 1)
    if schedule == 'one_cycle': assert np.allclose(fig.axes[1].lines[0].get_ydata(), seen.moms)


def test_a_plot_takes_the_arguments_of_its_fit(toy):
    learn = toy()
    assert np.allclose(learn.plot_schedule('flat_cos', 2, lr=1., pct_start=.5).axes[0].lines[0].get_ydata(), [1 if i < 4 else cos(1, 1e-5, i/4-1) for i in range(8)])
    assert np.allclose(learn.plot_schedule('sgdr', 2, 1, lr=1.).axes[0].lines[0].get_ydata(), [sgdr(i/12, (1, 3)) for i in range(12)])
    with pytest.raises(ValueError, match='pct_start must be 0 to 1, got 2'): learn.plot_schedule('flat_cos', 2, pct_start=2)


def test_plotting_changes_nothing(toy):
    learn = three(toy)
    for made in (False, True):
        if made: learn.create_opt()
        before, hypers, rng = dict(vars(learn)), learn.opt and [dict(h) for h in learn.opt.hypers], torch.get_rng_state()
        for schedule in SCHEDULES: learn.plot_schedule(schedule, 2, lr=.5)
        learn.plot_schedule('sgdr', 2, 1, opt='sgd')
        assert vars(learn) == before and (learn.opt and [dict(h) for h in learn.opt.hypers]) == hypers and torch.equal(rng, torch.get_rng_state())


# going on in the middle

class Killed(BaseException): pass


class Kill(Callback):
    order = 900
    def after_batch(self):
        if self.learn.training and (self.learn.epoch, self.learn.iter) == (2, 1): raise Killed


@pytest.mark.parametrize('fit', [lambda o: fit_by(o, 'step', 4, slice(1e-3, 1e-1)), lambda o: o.fit_sgdr(2, 1, .1, cycle_mult=3, opt='sgd'), lambda o: fit_by(o, 'one_cycle', 4, .1)])
def test_killed_in_the_middle_and_run_again_it_ends_as_if_never_killed(toy, tmp_path, fit):
    def program(folder, kill=False):
        learn = three(toy)
        if kill: learn.add_cb(Kill())
        with resumable(folder, every=1): fit(learn)
        return [p.detach().clone() for p in learn.model.parameters()], [float(v) for v in learn.recorder.lrs], [float(v) for v in learn.recorder.losses], learn.opt.state_dict()['state']
    whole = program(tmp_path/'whole')
    with pytest.raises(Killed): program(tmp_path/'run', kill=True)
    again = program(tmp_path/'run')
    assert all(map(torch.equal, whole[0], again[0])) and whole[1:3] == again[1:3] and len(whole[1]) == 4*N
    assert all(torch.equal(a['grad_avg'], b['grad_avg']) for a, b in zip(whole[3], again[3]))


# refusals

@pytest.mark.parametrize('call, said', [
    (lambda o: o.fit_step(2, gamma=0), 'fit_step: gamma must be above 0 and at most 1, got 0'), (lambda o: o.fit_step(2, every=0), 'every must be > 0 epochs, got 0'),
    (lambda o: o.fit_step(2, every=1, milestones=[1]), r'milestones=\[1\] and every=1 both say when'),
    (lambda o: o.fit_step(2, milestones=[-1]), 'milestones must be ≥ 0 epochs, got -1'),
    (lambda o: o.fit_decay(2, form='exponentiel'), "form must be one of exponential.*got 'exponentiel'; did you mean 'exponential'"),
    (lambda o: o.fit_decay(2, div_final=.5), 'fit_decay: div_final must be ≥ 1, got 0.5'), (lambda o: o.fit_decay(2, power=0), 'power must be > 0, got 0'),
    (lambda o: o.fit_cos(2, div_final=0), 'fit_cos: div_final must be ≥ 1, got 0'), (lambda o: o.fit_flat_cos(2, pct_start=75), 'pct_start must be 0 to 1, got 75'),
    (lambda o: o.fit_sgdr(0, 1), 'n_cycles must be a whole number ≥ 1, got 0'), (lambda o: o.fit_sgdr(2, 1.5), 'cycle_len must be a whole number ≥ 1, got 1.5'),
    (lambda o: o.fit_sgdr(2, 1, cycle_mult=0), 'cycle_mult must be a whole number ≥ 1, got 0'),
    (lambda o: o.fit_sgdr(1, 1, opt='adam'), "opt must be None or one of sgd, adamw, got 'adam'; did you mean 'adamw'"),
    (lambda o: fit_by(o, 'cosine', 2), "schedule: one of constant, .*got 'cosine'; did you mean"), (lambda o: o.plot_schedule('flat', 2), "got 'flat'; did you mean 'flat_cos'"),
    (lambda o: cycles_of(0), 'n_epoch and mult must be ≥ 1, got 0')])
def test_what_makes_no_sense_is_refused_before_the_first_batch(toy, call, said):
    learn = toy()
    before = learn.model.weight.detach().clone()
    with pytest.raises(ValueError, match=said): call(learn)
    assert torch.equal(learn.model.weight, before)


def test_an_argument_that_a_schedule_does_not_have_is_refused(toy):
    with pytest.raises(TypeError, match="sgdr: no argument 'n_cycles'"): fit_by(toy(), 'sgdr', 2, n_cycles=3)
    with pytest.raises(TypeError, match='pct_begin'): fit_by(toy(), 'flat_cos', 2, pct_begin=.5)


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('n, lr, said', [(0, .1, 'n_epoch must be a whole number ≥ 1, got 0'), (1.5, .1, 'got 1.5'), (2, 'find', "lr must be a number, got 'find'; learn.lr_find"),
                                         (2, 0., 'lr must be > 0, got 0.0'), (2, -1., 'lr must be > 0, got -1'), (2, float('nan'), 'lr must be a number'),
                                         (2, [.1, .2], 'lr has 2 rates for 3 parameter groups'), (2, slice(0, .1), 'lr must be > 0')])
def test_epochs_and_rates_that_cannot_be_are_refused_before_anything_moves(toy, name, n, lr, said):
    learn = three(toy)
    for call in (fit_by, lambda learn, *args, **kwargs: learn.plot_schedule(*args, **kwargs)):
        with pytest.raises(ValueError, match=f'fit_{name}: .*{said}'): call(learn, name, n, lr=lr)
    assert learn.opt is None


def test_a_rate_of_0_keeps_a_group_still(toy):
    learn = three(toy)
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit_constant(1, [0., 0., .1])
    assert [torch.equal(a, b) for a, b in zip(before, learn.model.parameters())] == [True]*4 + [False]*2
