"When to stop: a metric by its name, watched while training and at no other time."
import math

from fastai.basics import CancelFitException, Learner
from fastai.callback.tracker import TrackerCallback

from fastrecipes.errors import BadValue, nearest
from fastrecipes.repairs import is_trial, orientation
from fastrecipes.technique import TechniqueCallback, put, say, technique

__all__ = ['EarlyStop', 'monitored']


def cost(monitor: str, value: float, metrics=()) -> float:
    "What is the smaller the better `value` is: itself, its negative or its size."
    return {'lower': value, 'higher': -value, 'nearer 0': abs(value)}[orientation(monitor, metrics)]


def monitored(learn: Learner) -> list[str]:
    "The names that can be monitored: the losses and metrics that the Learner reports."
    return ['train_loss', 'valid_loss', *learn.metrics.attrgot('name')]


class EarlyStop(TechniqueCallback):
    "After each trained epoch look up `monitor` in the Recorder; cancel the fit when it got no better, then put the best weights back."
    order = TrackerCallback.order + 3

    def __init__(self, monitor, patience, min_delta, restore):
        self.monitor, self.patience, self.min_delta, self.restore = monitor, patience, min_delta, restore
        self.fresh, self.trained = True, False
        self._forget()

    def _forget(self): self.best, self.best_epoch, self.weights, self.waited = None, None, None, 0

    def before_fit(self): self.fresh = True         # `validate()` and `get_preds()` call it too: nothing is forgotten until an epoch trains
    def before_epoch(self): self.trained = False

    def before_train(self):
        self.trained = not is_trial(self.learn)
        if self.trained and self.fresh: self._forget()
        self.fresh = self.fresh and not self.trained

    def after_epoch(self):
        if not self.trained: return                 # `validate()` and skipped epochs come here too, with nothing to judge
        value = self.learn.recorder.values[-1][self.learn.recorder.metric_names[1:].index(self.monitor)]
        if self._better(value): self._keep(value)
        else: self.waited += 1
        if self.waited < self.patience: return
        since = 'it never was a number' if self.best is None else f'best {self.best:.4f} in epoch {self.best_epoch}'
        say(self.learn, 'early_stop', f'stopped after epoch {self.learn.epoch}: {self.monitor} no better for {self.waited} epochs, {since}')
        raise CancelFitException('early_stop')

    def after_fit(self):
        if self.fresh or self.best_epoch is None: return
        if self.restore and self.best_epoch != self.learn.epoch: self.learn.model.load_state_dict(self.weights)
        if self.waited < self.patience:
            say(self.learn, 'early_stop', f'ran to the end; best {self.monitor} {self.best:.4f} in epoch {self.best_epoch}{", restored" if self.restore else ""}')
        self.weights = None

    def _better(self, value) -> bool:
        if value is None or math.isnan(value): return False
        if self.best is None: return True
        new, best = (cost(self.monitor, v, self.learn.metrics) for v in (value, self.best))
        return new < best - self.min_delta

    def _keep(self, value):
        self.best, self.best_epoch, self.waited = value, self.learn.epoch, 0
        if self.restore: self.weights = {k: v.detach().clone() for k, v in self.learn.model.state_dict().items()}


@technique('train', section='Training', source='doi:10.1007/3-540-49430-8_3')
def early_stop(self: Learner, monitor: str = 'valid_loss', patience: int = 3, min_delta: float = 0., restore: bool = True) -> Learner:
    """Stop when `monitor` has got no better for `patience` epochs, and go back to the weights of the best epoch.

    `monitor`: 'train_loss', 'valid_loss' or the name of a metric. `patience` ≥ 1 epochs. `min_delta` ≥ 0: what counts as better.
    `restore`: put the best weights back at the end, also when the fit ran through. A loss that is not a number is never better.
    Raises `ValueError` for an unknown name or a value outside its range."""
    if monitor not in (names := monitored(self)): raise BadValue(f'early_stop: monitor must be one of {", ".join(names)}, got {monitor!r}{nearest(monitor, names)}')
    if patience < 1: raise BadValue(f'early_stop: patience must be ≥ 1 epoch, got {patience}')
    if min_delta < 0: raise BadValue(f'early_stop: min_delta must be ≥ 0, got {min_delta}')
    return put(self, EarlyStop(monitor, patience, min_delta, restore))
