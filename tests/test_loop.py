"The loop: the same calls in the same order as fastai's own dispatch, the same record, and none to callbacks that do not answer."
from types import SimpleNamespace

import pytest
import torch
from fastai.basics import AvgSmoothLoss, Callback, CancelBatchException, CancelStepException, CancelValidException, Learner, Recorder, nn

from fastrecipes.loop import answers

ALL = 'before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch after_train \
before_validate after_validate after_epoch after_fit'.split()


def spy(log: list, tag: str, of, order_: int = 0, **own):
    "A callback that notes the events in `of`."
    def noting(name): return lambda self: log.append((tag, name, getattr(self, 'iter', None)))
    return type(tag, (Callback,), dict(order=order_, **{n: noting(n) for n in of}, **own))()


class Meddler(Callback):
    "Adds and removes callbacks in mid-fit, cancels a batch, a step and a validation, and is off for an epoch."
    order = 3
    def __init__(self, log): self.log, self.late = log, spy(log, 'late', ALL, 7)
    def after_batch(self):
        if self.training and self.iter == 1 and self.late not in self.learn.cbs: self.learn.add_cb(self.late)
        elif self.training and self.iter == 2 and self.epoch == 1: self.learn.remove_cb(self.late)
    def after_pred(self):
        if self.training and self.iter == 3: raise CancelBatchException
    def before_step(self):
        if self.iter == 0: raise CancelStepException
    def before_validate(self):
        if self.epoch == 1: raise CancelValidException


class Everything(Callback):
    "Takes events in a way of its own."
    def __init__(self, log): self.log = log
    def __call__(self, event_name): self.log.append(('everything', event_name))


class Dynamic(Callback):
    def __init__(self, log): self.log = log
    def __getattr__(self, name):
        if name == 'before_batch': return lambda: self.log.append(('dynamic', name))
        return super().__getattr__(name)


def run(toy, how) -> tuple[list, torch.Tensor]:
    log = []
    idle = spy(log, 'idle', ['before_fit', 'before_batch'])
    idle.run = False                                            # until the end of the fit, as fastai has it
    mine = spy(log, 'mine', [])
    mine.after_step = lambda: log.append(('instance', 'after_step'))
    learn = toy(cbs=[spy(log, 'b', ALL, 5), spy(log, 'a', ALL, -5), spy(log, 'trainer', ALL, 1, run_valid=False), Meddler(log), idle, mine, Everything(log), Dynamic(log)])
    how(learn)
    return log, learn.model.weight.detach().clone()


@pytest.mark.parametrize('how', [lambda l: l.fit(2, .01), lambda l: l.fit_one_cycle(2, .01), lambda l: l.validate(), lambda l: (l.fit(1, .01), l.get_preds(), l.fit(1, .01))],
                         ids=['fit', 'one cycle', 'validate', 'twice'])
def test_calls_and_their_order_are_fastais(toy, monkeypatch, how):
    if not hasattr(Learner, '_orig___call__'): pytest.skip('FASTRECIPES_REPAIRS=0')
    mine = run(toy, how)
    monkeypatch.setattr(Learner, '__call__', Learner._orig___call__)
    theirs = run(toy, how)
    assert mine[0] == theirs[0] and len(mine[0]) > 20 and torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize('train_metrics', [False, True])
def test_the_record_is_fastais(toy, monkeypatch, train_metrics):
    "Losses, rates and rows to the bit, where it cancels a training and where a batch holds more than tensors, too."
    def record(learn):
        learn.recorder.train_metrics = train_metrics
        learn.fit_one_cycle(3, .05)
        r = learn.recorder
        return [float(o) for o in r.losses], r.lrs, r.iters, [list(v) for v in r.values], float(learn.smooth_loss)
    mine = record(toy())
    for kind, name in ((Recorder, 'after_batch'), (AvgSmoothLoss, 'accumulate'), (Learner, '_set_device'), (Learner, '__call__')):
        if not hasattr(kind, f'_orig_{name}'): pytest.skip('FASTRECIPES_REPAIRS=0')
        monkeypatch.setattr(kind, name, getattr(kind, f'_orig_{name}'))
    assert mine == record(toy()) and len(mine[0]) == 12


def test_a_loss_for_each_sample_is_averaged():
    smooth = AvgSmoothLoss(beta=.5)
    for loss in (torch.tensor([1., 3.]), torch.tensor(5.)): smooth.accumulate(SimpleNamespace(loss=loss))
    assert float(smooth.value) == pytest.approx((.25*2 + .5*5)/(1-.5**2))


def test_batches_go_where_the_model_is(toy):
    learn, x = toy(), torch.zeros(2, 4)
    assert learn._set_device(b := (x, x)) is b
    moved = learn._set_device([x, dict(a=x)])
    assert isinstance(moved[1], dict) and torch.equal(moved[0], x)
    learn.model.to('meta')
    assert [o.device.type for o in learn._set_device((x, x))] == ['meta', 'meta']


def test_who_answers():
    log = []
    assert answers(spy(log, 'x', ['before_batch']), 'before_batch') and not answers(spy(log, 'x', ['before_batch']), 'after_batch')
    assert answers(spy(log, 'x', []), 'after_fit') and answers(Everything(log), 'after_step') and answers(Dynamic(log), 'before_batch')


def test_a_model_with_a_method_of_that_name_is_left_alone(toy):
    class Net(nn.Linear):
        def before_batch(self): raise AssertionError('called')
    toy(model=Net(4, 3)).fit(1, .01)


def test_an_event_that_does_not_exist(toy):
    with pytest.raises(Exception, match='missing after_lunch'): toy()('after_lunch')


def test_several_at_once(toy):
    log = []
    toy(cbs=spy(log, 'a', ALL))(['before_fit', 'after_fit'])
    assert [name for _, name, _ in log] == ['before_fit', 'after_fit']
