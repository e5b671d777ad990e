"Clause 1: alone, every technique trains to a floor that a broken one would miss, and can say what it changed."
import pytest
import torch
from fastai.basics import CancelFitException, Callback

from .conftest import NAMES, TECHNIQUES, arguments, learner, use

FLOOR = .8          # accuracy after four epochs; 10 % is chance, plain training comes to about 95 %


def test_the_floor_is_one_that_plain_training_passes_and_no_training_misses():
    learn = learner()
    assert learn.validate()[1] < .3
    learn.fit(4, 3e-3)
    assert learn.recorder.values[-1][2] > .9


@pytest.mark.parametrize('name', NAMES)
def test_it_trains_to_the_floor_and_took_effect(name, capsys):
    learn = use(learner(), name)
    learn.fit(4, 3e-3)
    assert learn.recorder.values[-1][2] > FLOOR
    effect = learn.techniques[name].effect
    assert effect and len(effect) > 10
    if 'nothing' in effect: assert effect in capsys.readouterr().out             # no effect where none is possible is said aloud


@pytest.mark.parametrize('name', NAMES)
def test_the_method_returns_the_learner_and_a_second_call_replaces_the_first(name):
    learn = learner()
    given = arguments(name, learn)
    once = getattr(learn, name)(**given)
    n = len(learn.cbs)
    assert once is learn and getattr(learn, name)(**given) is learn and len(learn.cbs) == n and list(learn.techniques) == [name]


@pytest.mark.parametrize('name', NAMES)
def test_off_is_off(name):
    learn = learner()
    before = list(learn.cbs), learn.dls, learn.loss_func
    learn.use(**{name: False}).use(**{name: None})
    assert (list(learn.cbs), learn.dls, learn.loss_func) == before and not learn.__dict__.get('techniques')


@pytest.mark.parametrize('name', NAMES)
def test_its_first_two_batches_are_different_or_it_says_why_not(name):
    "Inputs, loss, gradient, order or weights: by the gradient of the second batch, something differs from plain training."
    class Catch(Callback):
        order = 60
        def before_fit(self): self.seen = []
        def after_backward(self):
            self.seen += [self.learn.xb[0].clone(), *(torch.zeros(()) if p.grad is None else p.grad.clone() for p in self.learn.model.parameters())]
            if self.learn.iter == 1: raise CancelFitException('caught')
    seen = []
    for names in ((), (name,)):
        learn = use(learner(), *names)
        learn.fit(1, cbs=(catch := Catch()))
        seen.append(catch.seen)
    same = all(a.shape == b.shape and bool((a == b).all()) for a, b in zip(*seen, strict=True))
    watches = not TECHNIQUES[name].touches                                       # looks on, and may stop
    assert not same or watches or any(word in learn.techniques[name].effect for word in ('nothing', 'already', '32 bits'))


@pytest.mark.parametrize('name', NAMES)
def test_it_may_come_between_two_fits_and_what_it_does_to_weights_lasts(name):
    "The optimizer has momentum by then: it must not bring back what was taken away."
    learn = learner(256)
    learn.fit(1, 3e-3)
    use(learn, name)
    gone = [p == 0 for p in learn.model.parameters()]
    assert 'weights' not in TECHNIQUES[name].touches or any(z.float().mean() > .1 for z in gone)
    learn.fit(1, 3e-3)
    assert learn.recorder.values[-1][0] < 2.3 and len(learn.techniques[name].effect) > 10           # below that of guessing
    if 'weights' in TECHNIQUES[name].touches: assert all(bool((p[z] == 0).all()) for p, z in zip(learn.model.parameters(), gone))
