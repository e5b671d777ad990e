"Pruning in steps, each trained until it has made up for what it lost, as far as the network will go."
import gzip
import math
from dataclasses import dataclass

import torch
from fastai.basics import CancelFitException, Learner, get_model, nn, patch
from matplotlib.figure import Figure

from fastrecipes.errors import BadValue, nearest
from fastrecipes.files import writes
from fastrecipes.production.pruning import KINDS, Prune, _weights, _zeros
from fastrecipes.repairs import fitting, orientation
from fastrecipes.technique import TechniqueCallback, applied, check_changeable, put, say
from fastrecipes.training.resume import remember
from fastrecipes.training.stopping import EarlyStop

__all__ = ['Pruned', 'PruningStep', 'gzipped']


def gzipped(model: nn.Module, bits: int = 32) -> int:
    """The bytes of all weights and statistics of `model`, compressed by gzip: what zeros are worth in a file.

    `bits`: 32 (float32), or 8 (weights of convolutions and linear layers as int8, w ≈ s·q with one scale a tensor, the rest as it is)."""
    if bits not in (8, 32): raise BadValue(f'gzipped: bits must be 8 or 32, got {bits}')
    small = {f'{name}.weight'.lstrip('.') for name, m in model.named_modules() if isinstance(m, KINDS)} if bits == 8 else ()
    def raw(name, t):
        t = t.detach().cpu()
        if t.is_floating_point(): t = t.float()
        if name in small: t = (127*t/t.abs().amax().clamp_min(1e-30)).round().to(torch.int8)
        return t.contiguous().numpy().tobytes()
    return len(gzip.compress(b''.join(raw(name, t) for name, t in model.state_dict().items()), compresslevel=6, mtime=0))


@dataclass(frozen=True)
class PruningStep:
    """One row: the share of weights to be 0 and that are; the metric in validation before and after fine-tuning, and on the test set (None: there is none);
    epochs of fine-tuning; bytes of the weights under gzip, in float32 and in int8; whether it was accepted."""
    amount: float
    zeros: float
    before: float | None
    valid: float
    test: float | None
    epochs: int
    bytes: int
    bytes_int8: int
    accepted: bool = True


@dataclass(repr=False)
class Pruned:
    "What `iterative_prune` did: `.steps`, the network it began with first; `.accepted`, the one it ended with. Printed, it is a table."
    steps: list[PruningStep]
    floor: float
    monitor: str = 'accuracy'

    @property
    def original(self) -> PruningStep: return self.steps[0]

    @property
    def accepted(self) -> PruningStep: return [s for s in self.steps if s.accepted][-1]

    @property
    def least(self) -> float:
        "What the metric had to come to in validation."
        return self.floor*self.original.valid

    def smaller(self, step: PruningStep) -> tuple[float, float]:
        "How many times fewer bytes than the original's float32: (in float32, in int8), all of them under gzip."
        return self.original.bytes/step.bytes, self.original.bytes/step.bytes_int8

    def __str__(self):
        head = ('zeros', 'before', 'after', 'test', 'epochs', 'gzip', 'int8', '')
        rows = [head] + [(_pct(s.zeros), _pct(s.before), _pct(s.valid), _pct(s.test), str(s.epochs), *(f'{n/1e3:,.0f} kB ({r:.1f}×)' for n, r in
                          zip((s.bytes, s.bytes_int8), self.smaller(s))), '' if s.accepted else 'taken back') for s in self.steps]
        width = [max(len(r[i]) for r in rows) for i in range(7)]
        return '\n'.join([*('  '.join([*(c.rjust(w) for c, w in zip(r, width)), r[7]]).rstrip() for r in rows), self.verdict])

    __repr__ = __str__

    @property
    def verdict(self) -> str:
        "What came of it, in one sentence."
        ended, failed = self.accepted, self.steps[-1] if not self.steps[-1].accepted else None
        why = f'; {_pct(failed.amount)} did not come back to {_pct(self.least)} in {failed.epochs} epochs, and was taken back' if failed else ''
        if ended is self.original: return f'No weight was pruned{why}'
        smaller = self.smaller(ended)
        return (f'{_pct(ended.zeros)} of the weights are 0 at {_pct(ended.valid)} {self.monitor} in validation ({_pct(self.original.valid)} before){why}; '
                f'{smaller[0]:.1f} times smaller under gzip, {smaller[1]:.1f} in int8; no faster')

    def plot(self) -> Figure:
        "The metric over the share of zeros, before and after fine-tuning, with the floor; and how many times smaller the file is. Returns the figure."
        fig = Figure(figsize=(9, 3.4), layout='constrained')
        left, right = fig.subplots(1, 2)
        kept = [s for s in self.steps if s.accepted]
        x = [100*s.zeros for s in self.steps]
        left.plot(x[1:], [100*s.before for s in self.steps[1:]], 'o--', color='.6', label='validation, just pruned')
        left.plot(x, [100*s.valid for s in self.steps], 'o-', color='C0', label='validation, fine-tuned')
        if kept[0].test is not None: left.plot(x, [100*s.test for s in self.steps], 's:', color='C1', label='test')
        if not self.steps[-1].accepted: left.plot(x[-1:], [100*self.steps[-1].valid], 'x', color='C3', ms=10, mew=2, label='taken back')
        left.axhline(100*self.least, color='C3', lw=1, label=f'{self.floor:.1%} of the original')
        low = min(100*self.least, *(100*v for s in self.steps for v in (s.valid, s.test) if v is not None))
        left.set(xlabel='weights that are 0, %', ylabel=f'{self.monitor}, %', ylim=(low - .4*(101-low), 100 + .1*(101-low)))       # what was just pruned may fall off the picture
        fig.legend(handles=left.lines, loc='outside lower center', ncols=5, fontsize='small')
        for i, label in enumerate(('float32', 'int8')): right.plot([100*s.zeros for s in kept], [self.smaller(s)[i] for s in kept], 'o-', label=label)
        right.set(xlabel='weights that are 0, %', ylabel='times smaller under gzip', ylim=(0, None))
        right.legend(fontsize='small')
        return fig


def _pct(v) -> str: return '–' if v is None else f'{100*v:.1f} %'


class Floor(TechniqueCallback):
    "End a fit at the epoch that brings the metric to `least`, or when it got no better for `patience`; hold the last network that was accepted."
    order = EarlyStop.order+1

    def __init__(self, monitor, least, patience):
        self.monitor, self.least, self.patience = monitor, least, patience
        self.weights = self.kept = self.pruned = self.known = None      # the accepted network; the first two go with checkpoints
        self._begin()

    def _begin(self): self.taken, self.top, self.waited, self.trained = 0, -float('inf'), 0, False
    def before_fit(self): self._begin() if fitting(self.learn) else None
    def before_epoch(self): self.trained = False
    def before_train(self): self.trained = True

    def after_epoch(self):
        if not self.trained: return             # `validate()` comes here too
        names = self.learn.recorder.metric_names[1:]
        value = self.learn.recorder.values[-1][names.index(self.monitor if self.monitor in names else f'valid_{self.monitor}')]
        self.taken, self.waited = self.taken+1, 0 if value > self.top else self.waited+1
        self.top = max(value, self.top)
        if reached(value, self.least) or self.waited >= self.patience: raise CancelFitException('iterative_prune')

    def accept(self):
        "Hold the network and its masks as they are."
        held = _held(self.learn)
        self.weights = {k: v.detach().clone() for k, v in get_model(self.learn.model).state_dict().items()}
        self.pruned, self.kept = (list(held.masks), list(held.kept)) if held else (None, None)
        self.known = applied(self.learn).get('prune')

    def go_back(self):
        "Give the Learner what was accepted last, and an optimizer that remembers nothing of what came after."
        get_model(self.learn.model).load_state_dict(self.weights)
        if held := _held(self.learn): self.learn.remove_cb(held)
        if self.kept is not None: self.learn.add_cb(Prune([(m, name, mask) for (m, name), mask in zip(self.pruned, self.kept, strict=True)]))
        applied(self.learn).pop('prune', None)
        if self.known: applied(self.learn)['prune'] = self.known
        if self.learn.opt is not None: self.learn.opt.clear_state()


def reached(value: float, least: float) -> bool:
    "Whether a share of right answers comes to `least`, but for rounding."
    return value >= least - 1e-9


def _held(learn) -> Prune | None: return next((cb for cb in learn.cbs if type(cb) is Prune), None)


@patch
def iterative_prune(self: Learner, epochs: int = 10, lr: float | None = None, *, step: float = .15, until: float = .9, floor: float = .995, first: int = 0,
                    patience: int = 5, monitor: str = 'accuracy') -> Pruned:
    """Prune `step` of the original weights, fine-tune until the metric is back at `floor` of the original's, and so on up to `until` (arXiv:1506.02626).

    Each step sets the smallest weights of all convolutions and linear layers together to 0 (`prune`), and trains for up to `epochs` ≥ 1 epochs at the rate
    `lr` (default: the Learner's): no longer than it takes, and not on when it got no better for `patience` ≥ 1 epochs. A step that does not come back is taken
    back, and ends it. `first` > 0: before, train the whole network for so many epochs at most, until it gets no better, and keep the best.
    `floor`, `step` and `until` between 0 and 1 (`until` below 1). `monitor`: a metric from 0 to 1 of which more is better, measured on
    the validation set, which decides; where the data have a third loader, it is measured there too and decides nothing. The Learner ends with the last
    accepted network, its masks on: later fits keep them. Interrupted, it holds that one as well; inside `resumable` it goes on where it was killed.
    An `early_stop` of the Learner stands aside. Raises `ValueError` outside these ranges, for a metric that the Learner does not report, and where so
    much is pruned already."""
    for name, v, most in (('step', step, 1), ('until', until, 1), ('floor', floor, 1.000001)):
        if not 0 < v < most: raise BadValue(f'iterative_prune: {name} must be above 0 and {"below" if most == 1 else "at most"} 1, got {v}')
    for name, v, least in (('epochs', epochs, 1), ('patience', patience, 1), ('first', first, 0)):
        if v != int(v) or v < least: raise BadValue(f'iterative_prune: {name} must be a whole number ≥ {least}, got {v}')
    check_changeable(self, 'iterative_prune')
    names = [m.name for m in self.metrics]
    if monitor not in names:
        there = ', '.join(names) or 'there is none: Learner(…, metrics=accuracy)'
        raise BadValue(f'iterative_prune: monitor must be one of the metrics ({there}), got {monitor!r}{nearest(monitor, names)}')
    if orientation(monitor, self.metrics) != 'higher': raise BadValue(f'iterative_prune: of {monitor!r} less is better, and a floor says nothing; monitor a metric such as accuracy')
    if not (weights := _weights(get_model(self.model), None)): raise BadValue('iterative_prune: the network has no convolution and no linear layer to prune')
    held = _held(self)
    amounts = [a for a in amounts_of(step, until) if not held or a > held.share + 1e-9]
    if not amounts: raise BadValue(f'iterative_prune: {held.share:.1%} of the weights are pruned already; raise until={until}')

    tests = len(self.dls.loaders) > 2 and len(self.dls[2].dataset)
    def valid(): return _validate(self, self.dls.valid, names.index(monitor))
    def outcome(amount, before, epochs=0, least=None):
        value, model = valid(), get_model(self.model)
        return PruningStep(amount, _zeros(weights), before, value, _validate(self, self.dls[2], names.index(monitor)) if tests else None, epochs,
                           gzipped(model), gzipped(model, 8), least is None or reached(value, least))

    with self.removed_cbs([cb for cb in self.cbs if type(cb) is EarlyStop]):
        if first: self.fit(first, lr, cbs=EarlyStop(monitor, patience, 0., True))
        done = Pruned([remember('iterative_prune: original', lambda: outcome(_zeros(weights), None))], floor, monitor)
        if not done.least > 0: raise BadValue(f'iterative_prune: {monitor} is {done.original.valid} before anything is pruned; train the network first (first=…)')
        put(self, guard := Floor(monitor, done.least, patience))
        guard.accept()
        try:
            for amount in amounts:
                self.prune(amount)
                before = remember('iterative_prune: pruned', valid)
                self.fit(epochs, lr)
                done.steps.append(remember('iterative_prune: step', lambda: outcome(amount, before, guard.taken, done.least)))
                _tell(done)
                if not done.steps[-1].accepted:
                    guard.go_back()
                    break
                guard.accept()
        except BaseException:
            guard.go_back()
            raise
        finally: self.remove_cb(guard)
    say(self, 'prune', done.verdict)
    return done


def amounts_of(step: float, until: float) -> list[float]:
    "The shares that the steps come to: step, 2·step, …, and `until` last."
    return [*(round(i*step, 6) for i in range(1, math.ceil(until/step - 1e-6))), until]


def _validate(learn: Learner, dl, i: int) -> float:
    "Metric number `i` on `dl`."
    with learn.no_bar(), learn.no_logging(): return float(learn.validate(dl=dl)[i+1])       # behind the loss


def _tell(done: Pruned):
    s = done.steps[-1]
    if writes(): print(f'iterative_prune: {_pct(s.amount)}: {done.monitor} {_pct(s.before)} just pruned, {_pct(s.valid)} after {s.epochs} epoch{"s"*(s.epochs > 1)}'
                       + ('' if s.accepted else f', less than {_pct(done.least)}: taken back'), flush=True)
