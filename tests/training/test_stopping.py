"Early stopping: by name, in training only, best weights back."
import pytest
import torch
from fastai.basics import Callback
from fastai.callback.tracker import TrackerCallback

from fastrecipes.repairs import orientation
from fastrecipes.technique import discover

discover()


class Script(Callback):
    "Make epoch i report `values[i]` as the validation loss, and stamp the weights with i."
    order = 51                                  # after the Recorder wrote its row, before it is judged
    def __init__(self, values): self.values = values
    def after_epoch(self):
        if not self.learn.recorder.values or not self.learn.recorder.values[-1]: return      # `validate()`, skipped epochs
        self.learn.recorder.values[-1][1] = self.values[self.learn.epoch]
        with torch.no_grad(): self.learn.model.weight.fill_(self.learn.epoch)


def run(learn, values, **kwargs):
    learn.fit(len(values), cbs=Script(values), **kwargs)
    return len(learn.recorder.values), learn.model.weight[0, 0].item()


@pytest.mark.parametrize('values, epochs, weights', [
    ([3, 2, 4, 5, 1, 0], 4, 1),                 # two epochs without improvement: stopped after the fourth, back to the second
    ([3, 2, 1], 3, 2),                          # ran through, the last is the best
    ([3, 1, 2], 3, 1),                          # ran through, back to the best all the same
    ([2, 2, 2, 2], 3, 0),                       # equal is no better
    ([float('nan'), 1, float('nan'), float('nan')], 4, 1)])
def test_it_stops_after_patience_and_restores_the_best(toy, values, epochs, weights):
    assert run(toy().early_stop(patience=2), values) == (epochs, weights)


def test_min_delta_is_what_counts_as_better(toy):
    assert run(toy().early_stop(patience=2, min_delta=.5), [3, 2.8, 2.6, 0]) == (3, 0)


def test_without_restore_the_last_weights_stay(toy):
    assert run(toy().early_stop(patience=1, restore=False), [1, 2, 3]) == (2, 1)


def test_metrics_that_should_rise(toy):
    class Rise(Callback):
        order = 51
        def after_epoch(self): self.learn.recorder.values[-1][2] = [.5, .9, .8, .7, .6][self.learn.epoch]
    learn = toy().early_stop('accuracy', patience=2)
    learn.fit(5, cbs=Rise())
    assert len(learn.recorder.values) == 4 and learn.early_stop_cb.best == .9
    assert [orientation(m) for m in ('accuracy', 'error_rate', 'train_loss', 'valid_rmse')] == ['higher', 'lower', 'lower', 'lower']


@pytest.mark.parametrize('better, best', [('lower', -3.), ('higher', 1.), ('nearer 0', -.2), (None, 1.)])
def test_fastais_trackers_go_by_what_a_metric_says_of_itself(toy, better, best):
    class Says(Callback):
        order = 51
        def after_epoch(self): self.learn.recorder.values[-1][2] = [.5, -3., 1., -.2][self.learn.epoch]
    learn = toy()
    if better: learn.metrics[0].better = better
    learn.fit(4, cbs=[Says(), tracker := TrackerCallback('accuracy')])
    assert tracker.best == best


def test_validate_neither_judges_nor_changes_weights_as_fastais_savemodel_does(toy):
    learn = toy().early_stop(patience=1)
    learn.fit(2)
    with torch.no_grad(): learn.model.weight.fill_(7.)
    best = learn.early_stop_cb.best
    learn.validate()
    assert learn.early_stop_cb.best == best and (learn.model.weight == 7).all()


def test_lr_find_is_not_judged(toy):
    learn = toy().early_stop(patience=1)
    learn.lr_find(num_it=20, show_plot=False, suggest_funcs=None)
    assert learn.early_stop_cb.best is None


def test_it_goes_with_a_later_start_as_fastais_does_not(toy):
    assert run(toy().early_stop(patience=2), [9, 9, 3, 1], start_epoch=2)[1] == 3


def test_a_second_fit_starts_afresh(toy):
    learn = toy().early_stop(patience=1)
    assert run(learn, [1, 2, 3])[0] == 2 and run(learn, [5, 4, 3])[0] == 3


@pytest.mark.parametrize('kwargs, message', [(dict(monitor='accurcy'), "monitor must be one of train_loss, valid_loss, accuracy, got 'accurcy'; did you mean 'accuracy'"),
                                             (dict(patience=0), 'patience must be ≥ 1'), (dict(min_delta=-1), 'min_delta must be ≥ 0')])
def test_bad_arguments(toy, kwargs, message):
    with pytest.raises(ValueError, match=message): toy().early_stop(**kwargs)


def test_what_it_did_is_told(toy):
    learn = toy().early_stop(patience=1)
    run(learn, [1, 2])
    assert learn.techniques['early_stop'].effect == 'stopped after epoch 1: valid_loss no better for 1 epochs, best 1.0000 in epoch 0'
