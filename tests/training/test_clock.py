"Fits by the clock: a clock of the test's own, which each batch moves by a second."
import math

import pytest
import torch
from fastai.basics import Callback, nn
from fastai.callback.schedule import combined_cos

from fastrecipes.errors import BadValue
from fastrecipes.technique import discover
from fastrecipes.training import clock as module
from fastrecipes.training.resume import resumable
from fastrecipes.training.schedules import SCHEDULES


discover()


@pytest.fixture
def seconds(monkeypatch):
    "A clock that stands still until somebody adds to `seconds[0]`."
    now = [1000.]
    monkeypatch.setattr(module.time, 'monotonic', lambda: now[0])
    return now


class Tick(Callback):
    "A second a training batch, `late` more for each from the fourth on, and an hour for each validation."
    order, transient = 70, ('now', 'seen')
    def __init__(self, now, late=0.): self.now, self.late, self.seen = now, late, []
    def after_step(self):
        self.now[0] += 1. + self.late*(self.learn.train_iter >= 3)
        self.seen.append((self.learn.epoch, self.learn.n_epoch, round(self.learn.pct_train, 6)))
    def after_validate(self): self.now[0] += 3600


def test_it_ends_with_the_time_and_anneals_by_it(toy, seconds):
    "Ten seconds are ten batches: two epochs of four and half of one, which is validated and reported as the others."
    learn, tick = toy(), Tick(seconds)
    learn.fit_for(10/60, .1, cbs=tick)
    r = learn.recorder
    assert len(r.losses) == 10 and [e for e, *_ in tick.seen] == [0]*4 + [1]*4 + [2]*2
    assert r.lrs == pytest.approx([combined_cos(.25, .1/25, .1, .1/1e5)(i/10) for i in range(10)])         # one-cycle, arXiv:1708.07120
    assert [len(v) for v in r.values] == [3, 3, 3] and learn.n_epoch == 3
    assert [n for _, n, _ in tick.seen][4] == 3                 # after four of ten batches: two epochs and a half


def test_a_machine_that_slows_down_ends_in_time_too(toy, seconds):
    "From the fourth batch on each takes three seconds: they begin at 0, 1, 2, 3, 6 and 9 of ten, and there the rates are."
    learn = toy()
    learn.fit_for(10/60, .1, 'cos', cbs=Tick(seconds, late=2.))
    assert learn.recorder.lrs == pytest.approx([1e-6 + (.1-1e-6)*(1+math.cos(math.pi*t/10))/2 for t in (0, 1, 2, 3, 6, 9)])


def test_less_than_a_batch_is_one_batch(toy, seconds):
    learn = toy()
    learn.fit_for(1e-6, .1, cbs=Tick(seconds))
    assert len(learn.recorder.losses) == 1 and len(learn.recorder.values) == 1


def test_an_epoch_that_has_begun_has_a_batch(toy, seconds):
    "The third waits five seconds for its first batch, and two were left: a row without one would have no loss."
    class Wait(Callback):
        order, transient = 60, ('now',)
        def __init__(self, now): self.now = now
        def before_train(self): self.now[0] += 5.*(self.learn.epoch == 2)
    learn = toy()
    learn.fit_for(10/60, .1, cbs=[Tick(seconds), Wait(seconds)])
    assert len(learn.recorder.losses) == 9 and [len(v) for v in learn.recorder.values] == [3, 3, 3] and math.isfinite(learn.recorder.values[-1][0])


@pytest.mark.parametrize('die_at', [2, 6])
def test_a_run_that_was_cut_off_has_the_rest_of_its_time(toy, seconds, tmp_path, die_at):
    "What it trained before the last checkpoint counts; all together it is as long, and where it would have been."
    class Die(Callback):
        order = 2000
        def after_batch(self):
            if self.learn.training and self.learn.train_iter == die_at: raise KeyboardInterrupt
    whole = toy()
    whole.fit_for(10/60, .1, cbs=Tick(seconds))
    with pytest.raises(KeyboardInterrupt), resumable(tmp_path, every=1): toy().fit_for(10/60, .1, cbs=[Tick(seconds), Die()])
    seconds[0] += 10_000
    again = toy()
    with resumable(tmp_path, every=1): again.fit_for(10/60, .1, cbs=Tick(seconds))
    assert len(again.recorder.losses) == 10 and again.recorder.lrs == whole.recorder.lrs and torch.equal(again.model.weight, whole.model.weight)


@pytest.mark.parametrize('schedule', [s for s in SCHEDULES if s != 'sgdr'])
def test_every_schedule_that_counts_no_epochs(toy, seconds, schedule):
    "At the share i/8 of the time the rate is that of a fit of one epoch with eight batches."
    by_time, by_batch = toy(), toy(n=128)
    by_time.fit_for(8/60, .1, schedule, cbs=Tick(seconds))
    getattr(by_batch, f'fit_{schedule}')(1, .1)
    assert by_time.recorder.lrs == pytest.approx(by_batch.recorder.lrs)


def test_what_goes_by_the_share_of_a_fit_goes_by_the_clock(toy, seconds):
    "SWA from half of the time on, a weight set every batch: those after batches 5 to 10."
    class Weights(Callback):
        order = 58                              # before SWA
        def after_step(self): mine.append(self.learn.model.weight.detach().clone())
    mine, learn = [], toy().swa(start=.5, every=1)
    learn.fit_for(10/60, .1, 'constant', cbs=[Tick(seconds), Weights()])
    assert torch.allclose(learn.model.weight, torch.stack(mine[-5:]).mean(0), atol=1e-6)


def test_sizes_grow_by_the_clock(seconds):
    sizes = []
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
        def forward(self, x):
            if self.training: sizes.append(x.shape[-1])
            return self.conv(x).mean((2, 3))
    from fastrecipes.data.loaders import as_dataloaders
    from fastai.basics import Learner
    data = torch.utils.data.TensorDataset(torch.rand(64, 3, 32, 32), torch.arange(64) % 3)
    learn = Learner(as_dataloaders((data, data), bs=16), Net(), nn.CrossEntropyLoss())
    learn.remove_cb(learn.progress)
    learn.progressive_resize(.5, delay=0., finetune=.5)
    sizes.clear()
    with learn.no_logging(): learn.fit_for(10/60, .1, cbs=Tick(seconds))
    assert len(sizes) == 10 and sizes[0] == 16 and sizes[4] < 32 and sizes[5:] == [32]*5


@pytest.mark.parametrize('minutes', [0, -1, float('inf'), float('nan'), 'five', True])
def test_no_number_of_minutes(toy, minutes):
    with pytest.raises(BadValue, match='fit_for: minutes must be a number above 0'): toy().fit_for(minutes)


@pytest.mark.parametrize('schedule, said', [('sgdr', 'whose cycles are epochs'), ('one_cycel', "did you mean 'one_cycle'|one_cycle")])
def test_other_schedules_are_refused(toy, schedule, said):
    with pytest.raises(BadValue, match=said): toy().fit_for(1, .1, schedule)


def test_a_fit_by_epochs_afterwards_is_as_ever(toy, seconds):
    learn = toy()
    learn.fit_for(3/60, .1, cbs=Tick(seconds))
    learn.fit(2, .1)
    assert len(learn.recorder.losses) == 8 and learn.n_epoch == 2
