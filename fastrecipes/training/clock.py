"Fits that last as long as they are told to: the schedule follows the clock and ends when the time does, however fast the machine is."
import math
import time
from numbers import Real

from fastai.basics import CancelTrainException, L, Learner, patch
from fastai.callback.schedule import ParamScheduler

from fastrecipes.errors import BadValue
from fastrecipes.repairs import REPAIRS
from fastrecipes.technique import TechniqueCallback
from fastrecipes.training.schedules import by_share

__all__ = ['Clock', 'check_minutes', 'share_over']

AT_MOST = 10_000                                # epochs


class Clock(TechniqueCallback):
    """End a fit when it has trained for `seconds`; until then `learn.pct_train` is the share of them that is over, and `learn.n_epoch` what so far promises.

    What counts is training: not validation, nor what a run that was cut off did after its last checkpoint."""
    order, run_valid, transient = -9.5, False, ('since',)       # right after TrainEvalCallback, which counts batches

    def __init__(self, seconds: float): self.seconds, self.spent, self.batches, self.since, self.ended = seconds, 0., 0, None, False

    def before_fit(self): self.learn.n_epoch = self.learn._first_epoch + 1

    def before_train(self): self.since = time.monotonic()

    def before_batch(self):
        self._count()
        half = self.spent/self.batches/2 if self.batches else 0.        # of a batch: it ends on the side of the hour that is nearer
        self.learn.pct_train = min(self.spent/self.seconds, 1.)
        self.ended = self.batches > 0 and self.learn.iter > 0 and self.spent + half >= self.seconds      # an epoch that has begun has a batch
        if self.ended: raise CancelTrainException('time is up')
        self.batches += 1

    def after_batch(self): self._count()        # for a checkpoint that is taken now

    def _count(self):
        now = time.monotonic()
        self.spent, self.since = self.spent + now - self.since, now

    def after_train(self):
        self._count()
        left, epochs = self.seconds - self.spent, self.learn.epoch + 1
        if self.ended: self.learn.recorder.cancel_train = False         # an epoch that ends early has a row like any other
        ends = self.ended or left <= self.spent/self.batches/2
        self.learn.n_epoch = epochs if ends else epochs + math.ceil(left/self.spent*epochs)
        if (bar := getattr(getattr(self.learn, 'progress', None), 'mbar', None)) is not None: bar.main_bar.total = self.learn.n_epoch


def share_over(learn: Learner, batches: int) -> float:
    "How much of the fit is over, 0 to 1, when `batches` of the epoch in hand are."
    if any(isinstance(cb, Clock) for cb in learn.cbs): return learn.pct_train
    return (learn.epoch + batches/learn.n_iter)/learn.n_epoch


def check_minutes(who: str, minutes):
    "Raise `ValueError`, naming `who`, for what is no number of minutes above 0."
    if isinstance(minutes, bool) or not isinstance(minutes, Real) or not 0 < minutes < math.inf: raise BadValue(f'{who}: minutes must be a number above 0, got {minutes!r}')


@patch
def fit_for(self: Learner, minutes, lr=None, schedule='one_cycle', wd=None, cbs=None, reset_opt=False, **kwargs):
    """Fit for `minutes` > 0 of training, with the rate where `schedule` has it at that share of the time: it ends annealed, on a fast machine and on a busy one.

    The last epoch ends where the time does, and is validated; validation comes on top. `schedule`: constant, step, decay, cos, flat_cos or one_cycle
    ('sgdr' counts epochs); `kwargs` are those of its method. What goes by the share of a fit (`swa`, `progressive_resize`) goes by the clock, too. Two runs are not the
    same to the bit, for no two take the same number of batches. Raises `ValueError` for other arguments."""
    if not REPAIRS: raise BadValue('fit_for: needs the mends of fastai; unset FASTRECIPES_REPAIRS')
    check_minutes('fit_for', minutes)
    scheds = by_share(self, schedule, lr, **kwargs)
    if self.opt is None: self.create_opt()
    self.fit(AT_MOST, lr, wd, [Clock(60*minutes), ParamScheduler(scheds), *L(cbs)], reset_opt)
