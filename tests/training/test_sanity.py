"A healthy network learns a few samples by heart; a sick one is told what is wrong with it."
import math

import pytest
import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, L, MSELossFlat, nn, params
from fastai.callback.mixup import MixUp

from fastrecipes.technique import discover

discover()


def net(*last, hidden=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(.5), nn.Linear(hidden, 3), *last)


def healthy(toy, **kwargs): return toy(model=net(), **{'lr': .01, **kwargs})


def test_a_healthy_network_learns(toy):
    found = healthy(toy).overfit_batch()
    assert found and found.verdict.startswith('it learns: loss ') and '100 % of the samples right' in str(found)
    assert found.accuracy == 1 and found.end < .1*found.start and len(found.losses) == 100 and not found.unreached and not found.frozen


def test_its_losses_are_those_of_plain_descent_on_the_first_samples_without_dropout(toy):
    "Against a loop of torch's own."
    learn = healthy(toy, opt_func=SGD, lr=.1, wd=0.)
    model = net()
    model.load_state_dict(learn.model.state_dict())
    model[3].p = 0.
    x, y = (t[:5] for t in learn.dls.train_ds.dataset.tensors)
    opt, losses = torch.optim.SGD(model.parameters(), lr=.1), []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(float(loss))
    assert learn.overfit_batch(n=5, steps=20).losses == pytest.approx(losses, rel=1e-4)


def test_a_dead_layer_is_named(toy):
    learn = toy(model=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), lr=.01)
    with torch.no_grad(): learn.model[0].bias.fill_(-100.)
    found = learn.overfit_batch()
    assert not found and found.unreached == ('0 (Linear)',) and found.verdict.startswith('no gradient reaches: 0 (Linear) (loss ')


def test_a_layer_that_begins_with_no_gradient_and_gets_one_later_is_not_dead(toy):
    learn = healthy(toy)
    with torch.no_grad(): learn.model[4].weight.zero_()             # as the last norm of a residual block: nothing reaches what is before it, in the first step
    assert learn.overfit_batch()


def test_layers_that_nothing_uses_are_named(toy):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = net(), nn.Linear(4, 3)
        def forward(self, x): return self.used(x)
    assert toy(model=Spare(), lr=.01).overfit_batch().unreached == ('spare (Linear)',)


def test_a_network_that_is_not_to_be_trained_is_told(toy):
    learn = healthy(toy)
    learn.create_opt()
    learn.model.requires_grad_(False)
    found = learn.overfit_batch()
    assert not found and found.verdict.startswith('no gradient reaches: any layer; none is to be trained (requires_grad is False everywhere)') and found.frozen


def test_a_frozen_layer_is_told_and_does_no_harm(toy):
    learn = healthy(toy)
    learn.model[0].requires_grad_(False)
    found = learn.overfit_batch()
    assert found and found.frozen == ('0 (Linear)',) and found.verdict.endswith('; frozen: 0 (Linear)')


def test_a_frozen_body_stays_frozen(toy):
    learn = healthy(toy, splitter=lambda m: L(m[:4], m[4:]).map(params))
    learn.freeze()
    found = learn.overfit_batch(steps=200)
    assert found and found.frozen == ('0 (Linear)',)                # norm layers train on, as fastai does it


@pytest.mark.parametrize('technique', [False, True])
def test_a_loss_that_is_detached_is_told(toy, technique):
    learn = healthy(toy, loss_func=lambda p, y: nn.functional.cross_entropy(p.detach(), y))
    if technique: learn.grad_clip()
    found = learn.overfit_batch()
    assert not found and 'no gradient reaches: any layer; the loss does not depend on the network' in found.verdict and len(found.losses) == 1


def test_a_rate_that_is_too_high_is_told(toy):
    learn = toy(model=nn.Linear(4, 1), loss_func=MSELossFlat(), labels=torch.ones(64, 1), opt_func=SGD, lr=1.5)
    found = learn.overfit_batch(steps=20)
    assert not found and found.end > found.start and found.accuracy is None and found.verdict.startswith('loss does not fall: ') and '(now 1.5)' in found.verdict
    found = learn.overfit_batch(lr=1e3)
    assert not found and found.verdict.startswith('not finite: the loss is inf in step ') and 'a lower lr (now 1000) may help' in found.verdict and math.isinf(found.end)


def test_a_loss_that_is_no_number_from_the_start_is_told(toy):
    found = healthy(toy, loss_func=lambda p, y: p.sum()*math.nan).overfit_batch()
    assert not found and found.verdict.startswith('not finite: the loss is nan in step 0 already, before any weight moved; look at the data')


def test_a_network_that_cannot_tell_its_samples_apart_is_told(toy):
    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))
        def forward(self, x): return self.w.expand(len(x), 3)
    found = toy(model=Blind(), labels=torch.arange(64) % 3, lr=.01).overfit_batch(n=9)
    assert not found and found.verdict.startswith('loss does not fall: 1.1 → 1.1 in 100 steps, 33 % of the samples right')


def test_one_that_learns_too_slowly_is_told(toy):
    found = toy(model=nn.Linear(4, 1), loss_func=MSELossFlat(), labels=torch.ones(64, 1), opt_func=SGD, lr=.02).overfit_batch(steps=10)
    assert not found and found.verdict.startswith('it learns, but not by heart: loss')


def test_numbers_are_learnt_where_the_loss_falls_to_a_tenth(toy):
    found = toy(model=nn.Linear(4, 1), loss_func=MSELossFlat(), labels=torch.ones(64, 1), opt_func=SGD, lr=.1, wd=0.).overfit_batch(n=3, steps=200)
    assert found and found.accuracy is None and found.end <= .1*found.start


@pytest.mark.parametrize('add', [lambda o: o.mixup(1.), lambda o: o.dropout(.9), lambda o: o.dropconnect(.5), lambda o: o.add_cb(MixUp(1.))],
                         ids=['mixup', 'dropout', 'dropconnect', 'fastais mixup'])
def test_what_draws_anew_in_each_batch_is_off(toy, add):
    learn, plain = healthy(toy, loss_func=CrossEntropyLossFlat()), healthy(toy, loss_func=CrossEntropyLossFlat())
    add(learn)
    assert learn.overfit_batch(steps=10).losses == plain.overfit_batch(steps=10).losses


def test_gradients_are_accumulated_as_in_training(toy):
    losses = healthy(toy).grad_accum(2).overfit_batch(steps=10).losses
    assert all(a == b for a, b in zip(losses[::2], losses[1::2])) and len(set(losses)) == 5      # a step every second batch


def test_smoothing_is_on_and_keeps_the_loss_from_0(toy):
    found = healthy(toy).label_smoothing(.3).overfit_batch(steps=200)
    least = -(.8*math.log(.8) + .2*math.log(.1))                    # targets .8, .1, .1
    assert found and least <= found.end < 1.1*least


@pytest.mark.parametrize('ends', [None, KeyboardInterrupt(), RuntimeError('dies')], ids=str)
def test_the_learner_is_untouched_afterwards(toy, ends):
    learn = healthy(toy).mixup(.4)
    learn.fit(1)
    class Ends(Callback):
        order = 60
        def after_step(self):
            if ends is not None and self.learn.train_iter == 5: raise ends
    learn.add_cb(Ends())
    def state():
        return ([v.tolist() for v in learn.model.state_dict().values()], [s['grad_avg'].tolist() for s in learn.opt.state.values()], [dict(h) for h in learn.opt.hypers],
                torch.get_rng_state().tolist(), {k: id(v) for k, v in vars(learn).items()}, [(id(cb), cb.run) for cb in learn.cbs], [m.training for m in learn.model.modules()],
                list(learn.recorder.losses), learn.techniques['mixup'].effect)
    before = state()
    try: learn.overfit_batch(steps=10)
    except (KeyboardInterrupt, RuntimeError): assert ends is not None
    else: assert ends is None
    assert state() == before


def test_another_error_is_raised(toy):
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'): toy(model=nn.Linear(5, 3)).overfit_batch()


@pytest.mark.parametrize('kwargs', [dict(n=1), dict(steps=1)])
def test_what_makes_no_sense_is_refused(toy, kwargs):
    name, v = next(iter(kwargs.items()))
    with pytest.raises(ValueError, match=f'overfit_batch: {name} must be ≥ 2, got {v}'): toy().overfit_batch(**kwargs)


@pytest.mark.parametrize('kwargs', [dict(n='a'), dict(n=2.5), dict(steps='b'), dict(lr='find')])
def test_arguments_of_another_type_are_refused(toy, kwargs):
    with pytest.raises(ValueError, match=f'overfit_batch: {next(iter(kwargs))} must be .*got {next(iter(kwargs.values()))!r}'): toy().overfit_batch(**kwargs)
