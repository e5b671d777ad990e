"Settings found by a short trial instead of a guess: the learning rate."
import math
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from fastai.basics import CancelFitException, Learner, Recorder, patch, tuplify
from fastai.callback.schedule import LRFinder, ParamScheduler, SuggestionMethod, minimum, slide, steep, valley

from fastrecipes.errors import BadValue
from fastrecipes.repairs import REPAIRS
from fastrecipes.training.aside import Trial, aside
from fastrecipes.training.preflight import check_ours

__all__ = ['FoundRate', 'find_lr']

FALLBACK = 1e-3
SHORTEST, IGNORED = 6, 5                        # batches of a trial; the last of them that fastai does not look at
NEEDED = {valley: 1, minimum: 1, steep: 2, slide: 17}       # losses that fastai's suggestions are made of


class Sweep(Trial):
    "Raise the rate from batch to batch; end the trial when the loss has grown to four times its least, or is no number."
    def __init__(self, *args): LRFinder.__init__(self, *args)

    def before_fit(self):
        ParamScheduler.before_fit(self)
        self.best_loss = math.inf

    def before_batch(self): LRFinder.before_batch(self)

    def after_batch(self):
        LRFinder.after_batch(self)
        if math.isnan(self.learn.smooth_loss): raise CancelFitException('it stays so')


def _sweep(learn: Learner, start_lr, end_lr, num_it, stop_div=True) -> SimpleNamespace:
    "The rates and smoothed losses of a trial of at most `num_it` batches; the Learner is as before, but `recorder.trial` keeps them for `plot_lr_find`."
    numbers = all(isinstance(v, (int, float)) for v in (start_lr, end_lr))
    if not numbers or not 0 < start_lr < end_lr: raise BadValue(f'lr_find: rates must be numbers with 0 < start_lr < end_lr, got {start_lr} and {end_lr}')
    if num_it < SHORTEST: raise BadValue(f'lr_find: num_it must be ≥ {SHORTEST} batches, for the last {IGNORED} are not looked at, got {num_it}')
    check_ours(learn)
    if not len(learn.dls.train): raise BadValue('lr_find: the training loader has no batch; lower bs, or let drop_last be False')
    with aside(learn, 'lr_find'), learn.no_logging():
        learn.fit(num_it//len(learn.dls.train) + 1, cbs=Sweep(start_lr, end_lr, num_it, stop_div))
        trial = SimpleNamespace(lrs=[float(v) for v in learn.recorder.lrs], losses=[float(v) for v in learn.recorder.losses])
    learn.recorder.trial = vars(trial)
    return trial


if REPAIRS:
    @patch
    def lr_find(self: Learner, start_lr=1e-7, end_lr=10, num_it=100, stop_div=True, show_plot=True, suggest_funcs=(SuggestionMethod.Valley)):
        """Raise the rate from `start_lr` to `end_lr` over `num_it` ≥ 6 batches, undo it, and suggest rates by `suggest_funcs`.

        `stop_div`: end when the loss has grown to four times its least. The Learner is as before however the trial ends, Ctrl-C included; the
        losses stay in `recorder.trial`, for `recorder.plot_lr_find()`. Raises `ValueError` where no rate can be told from the losses. fastai 2.8.12
        leaves the optimizer, records and random streams of the trial, after an interruption its weights too, and writes to `models/`."""
        trial = _sweep(self, start_lr, end_lr, num_it, stop_div)
        points = nms = values = None
        if suggest_funcs is not None:
            funcs = tuplify(suggest_funcs)
            nms = [getattr(f, 'func', f).__name__ for f in funcs]
            values, points = zip(*(f(*_readable(trial, num_it, f), num_it) for f in funcs))
        if show_plot: self.recorder.plot_lr_find(suggestions=points, nms=nms)
        if values is not None: return namedtuple('SuggestedLRs', nms)(*values)


@patch
def plot_lr_find(self: Recorder, skip_end=5, return_fig=True, suggestions=None, nms=None, **kwargs):
    "Plot the last trial of `lr_find`, also when other fits have come since."
    shown = SimpleNamespace(**self.trial) if 'trial' in vars(self) else self
    return Recorder._orig_plot_lr_find(shown, skip_end, return_fig, suggestions, nms, **kwargs)


def _readable(trial, num_it, func):
    "The rates and losses that a suggestion is made from: without the first tenth, the last few, and what is no number."
    finite = next((i for i, v in enumerate(trial.losses) if not math.isfinite(v)), len(trial.losses))
    kept = slice(num_it//10, min(finite, max(len(trial.losses)-IGNORED, 0)))
    lrs, losses = torch.tensor(trial.lrs[kept]), torch.tensor(trial.losses[kept])
    if not len(losses):
        why = f'it is not a number from batch {finite} on; look at the data' if finite < len(trial.losses) else 'it rose at once; lower start_lr'
        raise BadValue(f'lr_find: no rate can be told from the loss of {len(trial.losses)} batches: {why}')
    func = func.func if isinstance(func, partial) else func
    if len(losses) < (least := NEEDED.get(func, 1)):
        raise BadValue(f'lr_find: {func.__name__} needs {least} losses, and of {len(trial.losses)} batches {len(losses)} can be used; raise num_it, or lower start_lr')
    return lrs, losses


@dataclass(frozen=True)
class FoundRate:
    "A learning rate, and the losses of the trial that it was read from."
    lr: float
    lrs: list[float]
    losses: list[float]


def find_lr(learn: Learner, num_it: int = 60) -> FoundRate:
    """Raise the rate exponentially from 1e-6 to 1 over at most `num_it` batches and take the valley of the losses (`lr_find`).

    The Learner is as if it had not run. Where the trial breaks off too early to tell, 1e-3."""
    trial = _sweep(learn, 1e-6, 1, num_it)
    lrs, losses = trial.lrs, trial.losses
    usable = [i for i, loss in enumerate(losses) if loss == loss][num_it//10:-IGNORED]
    if len(usable) < 10: return FoundRate(FALLBACK, lrs, losses)
    lr, _ = valley(torch.tensor([lrs[i] for i in usable]), torch.tensor([losses[i] for i in usable]), num_it)
    return FoundRate(float(lr), lrs, losses)
