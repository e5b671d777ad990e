"Can the network learn at all? A few samples by heart, before hours are spent on all of them."
import math
from dataclasses import dataclass

from fastai.basics import CancelFitException, GetAttr, Learner, get_model, nn, num_distrib, patch
from fastai.callback.mixup import MixHandler
from timm.layers import DropPath

from fastrecipes.arguments import check_types
from fastrecipes.data.keyed import Keyed, with_train
from fastrecipes.data.loaders import samples
from fastrecipes.errors import BadValue, few
from fastrecipes.losses.classification import classes_of
from fastrecipes.objective import Objective
from fastrecipes.training.aside import Trial, aside
from fastrecipes.training.schedules import check_fit_of

__all__ = ['Memorized']

BY_HEART, FELL = .9, .1                         # by how much of itself the loss has fallen where that is learnt (without classes), and where it falls at all
OFF = ('fastrecipes.data.', 'fastrecipes.layers.dropping')      # where the techniques live that draw inputs, targets or layers anew in each batch


@dataclass(frozen=True)
class Memorized:
    "What became of a few samples that a network was to learn by heart."
    learns: bool
    verdict: str                    # in words, with what to look at
    start: float                    # the training loss of the first step and of the last
    end: float
    accuracy: float | None          # on these samples, in the last step; None where there are no classes
    losses: tuple                   # of each step
    unreached: tuple = ()           # layers with weights to train that no gradient came to
    frozen: tuple = ()              # layers all of whose weights are not to be trained

    def __str__(self): return self.verdict
    def __bool__(self): return self.learns


@patch
def overfit_batch(self: Learner, n: int = 8, steps: int = 100, lr: float | slice | None = None) -> Memorized:
    """Train on the same `n` ≥ 2 samples for `steps` ≥ 2 steps, say whether the network learnt them by heart, and undo it: the first thing to try.

    It learns if it comes to name all classes right, or, without classes, if the loss falls to a tenth. If not, the verdict says what to look at:
    the loss does not fall, is not finite, or no gradient reaches some layers. `lr`: the Learner's by default. The samples are the first of the
    training set, transformed once. Loss, optimizer and techniques are those of training, but dropout, mixing and what else draws in each batch
    are off; decay and smoothing are not, and keep a loss from 0. Answers true if it learns. Raises `ValueError` outside these ranges."""
    check_types(Learner.overfit_batch, dict(n=n, steps=steps), 'overfit_batch')
    check_fit_of('overfit_batch', self, 1, lr)
    for name, v in dict(n=n, steps=steps).items():
        if v < 2: raise BadValue(f'overfit_batch: {name} must be ≥ 2, got {v}')
    if num_distrib() > 1: raise BadValue(f'overfit_batch: looks at one process, and there are {num_distrib()}; call it before they are started')
    with aside(self, 'overfit_batch'):
        if (b := samples(self.dls.train, n)) is None: raise BadValue(f'overfit_batch: a {type(self.dls.train).__name__} does not give single samples; give the data to `as_dataloaders`')
        if not isinstance(b, (tuple, list)) or len(b) < 2: raise BadValue('overfit_batch: the samples have no targets to learn')
        self.dls = with_train(self.dls, Again(self.dls.train, tuple(b), steps, n))
        for cb in self.cbs:
            if isinstance(cb, MixHandler) or type(cb).__module__.startswith(OFF) and not isinstance(cb, Keyed): cb.run = False
        frozen = _layers(self.model, lambda p: not p.requires_grad)
        seen, error = Watch(), None
        try: self.fit(1, lr, cbs=seen)
        except RuntimeError as e:
            if 'does not require grad' not in str(e): raise
            error = e
        rate = self.lr if lr is None else lr
        unreached = _layers(self.model, lambda p: p.requires_grad and p not in seen.reached, among=lambda p: p.requires_grad)
    return _judge(seen, rate, unreached, frozen, detached=error is not None)


def _judge(seen: 'Watch', lr, unreached: list[str], frozen: list[str], detached: bool) -> Memorized:
    "The verdict: what is worst first."
    losses, asleep = seen.losses, f'; frozen: {few(frozen)}' if frozen else ''
    start, end = (losses[0], losses[-1]) if losses else (math.nan, math.nan)
    right = '' if seen.accuracy is None else f', {100*seen.accuracy:.0f} % of the samples right'
    moved = f'{start:.3g} → {end:.3g} in {len(losses)} steps{right}'
    bad = next((i for i, v in enumerate(losses) if not math.isfinite(v)), None)
    fall = (start-end)/max(abs(start), 1e-12)
    by_heart, learns = seen.accuracy == 1 if seen.accuracy is not None else fall >= BY_HEART, False
    if detached:
        verdict = 'no gradient reaches: any layer; ' + ('the loss does not depend on the network in a way that can be differentiated (detach(), argmax, no_grad?)'
                                                        if seen.trainable else 'none is to be trained (requires_grad is False everywhere): unfreeze()')
    elif bad is not None:
        verdict = f'not finite: the loss is {losses[bad]:g} in step {bad}'
        verdict += (f'; a lower lr (now {_rate(lr)}) may help' if bad else ' already, before any weight moved; look at the data and the loss')
    elif unreached: verdict = f'no gradient reaches: {few(unreached)} (loss {moved}): not used, cut off, or all its outputs are stuck where nothing changes them'
    elif by_heart: learns, verdict = True, f'it learns: loss {moved}'
    elif fall > FELL: verdict = f'it learns, but not by heart: loss {moved}; more steps, or a higher lr (now {_rate(lr)}), or the network is too small'
    else: verdict = f'loss does not fall: {moved}; a lower or higher lr (now {_rate(lr)}), or targets that do not go with the inputs'
    return Memorized(learns, verdict + asleep, start, end, seen.accuracy, tuple(losses), tuple(unreached), tuple(frozen))


def _rate(lr) -> str: return f'{lr.stop if isinstance(lr, slice) else lr:g}'


def _layers(model: nn.Module, held, among=lambda p: True) -> list[str]:
    "The layers with weights of their own (those `among` them, if any) for all of which `held` is true: `4 (Linear)`."
    found = []
    for name, m in get_model(model).named_modules():
        ps = [p for p in m.parameters(recurse=False) if among(p)]
        if ps and all(map(held, ps)): found.append(f'{name} ({type(m).__name__})' if name else type(m).__name__)
    return found


class Again(GetAttr):
    "A training loader that gives one batch over and over; all else is the loader's in whose place it is."
    _default = 'dl'
    def __init__(self, dl, batch, times, bs): self.dl, self.batch, self.times, self.bs = dl, batch, times, bs
    def __len__(self): return self.times
    def __iter__(self):
        for _ in range(self.times): yield self.batch


class Watch(Trial):
    "Put what draws to sleep; note the loss of each step, the weights that a gradient reached, and how many samples are right."
    order = 1000                                # the gradient that the step is about to follow
    def __init__(self):
        super().__init__()
        self.losses, self.reached, self.accuracy, self.trainable = [], set(), None, True

    def before_batch(self):
        self.trainable = any(p.requires_grad for p in self.learn.model.parameters())
        for m in self.learn.model.modules():
            if isinstance(m, (nn.modules.dropout._DropoutNd, DropPath)): m.eval()

    def after_loss(self):
        self.losses.append(float(self.learn.loss_grad.detach()))
        trained = next((cb.trained for cb in self.learn.cbs if isinstance(cb, Objective)), self.learn.loss_func)
        if (over := classes_of(trained)) and not self.learn.yb[0].is_floating_point():
            y, kept = self.learn.yb[0], self.learn.yb[0] != over.ignore_index
            self.accuracy = float((self.learn.pred.argmax(over.axis) == y)[kept].float().mean())
        if not math.isfinite(self.losses[-1]): raise CancelFitException('not finite')

    def after_backward(self):
        self.reached |= {p for p in self.learn.model.parameters() if p not in self.reached and p.grad is not None and bool(p.grad.any())}
