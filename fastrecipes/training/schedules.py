"How the rate moves over a fit: each schedule is one method `fit_<name>`, and what is plotted beforehand is what that method would train with."
import inspect
import math
from functools import partial
from numbers import Integral, Real
from typing import Literal, get_args

import numpy as np
from fastai.basics import SGD, Adam, L, Learner, Optimizer, OptimWrapper, patch
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedExp, SchedLin, SchedNo, SchedPoly, combined_cos
from matplotlib.figure import Figure
from torch import zeros

from fastrecipes.errors import BadName, BadValue, nearest
from fastrecipes.files import writes
from fastrecipes.repairs import REPAIRS

__all__ = ['SCHEDULES', 'Schedule', 'by_share', 'check_fit_of', 'cycles_of', 'fit_by', 'rates_by_batch']

Schedule = Literal['constant', 'step', 'decay', 'cos', 'flat_cos', 'sgdr', 'one_cycle']        # each is a `fit_<name>`
SCHEDULES = get_args(Schedule)
RESTARTED = dict(sgd=partial(SGD, mom=.9), adamw=Adam)      # both take the weight decay off the weights, and not into the gradient
NEARLY = 1e-9                                               # of an epoch: fractions of a fit are sums of floats


def _fit(who: str, learn: Learner, n_epoch, lr, scheds, wd, cbs, reset_opt, start_epoch):
    "Fit with the schedule that `scheds` makes of the rate of each parameter group: an array, so that layers keep their ratios."
    check_fit_of(who, learn, n_epoch, lr)
    if learn.opt is None: learn.create_opt()
    learn.opt.set_hyper('lr', learn.lr if lr is None else lr)
    scheds = {'lr': scheds(np.array([h['lr'] for h in learn.opt.hypers]))}
    learn.fit(n_epoch, cbs=ParamScheduler(scheds)+L(cbs), reset_opt=reset_opt, wd=wd, start_epoch=start_epoch)


def check_fit_of(who: str, learn, n_epoch, lr=None):
    """Raise `ValueError`, naming `who`, for a number of epochs that is no whole number ≥ 1, and for rates that cannot be: `lr` is None, a number > 0, a
    slice of them, or one for each parameter group (0 for some)."""
    if not isinstance(n_epoch, Integral) or isinstance(n_epoch, bool) or n_epoch < 1: raise BadValue(f'{who}: n_epoch must be a whole number ≥ 1, got {n_epoch!r}')
    if lr is None: return
    rates = [r for r in (lr.start, lr.stop) if r is not None] if isinstance(lr, slice) else [*lr] if isinstance(lr, (list, tuple, L, np.ndarray)) and np.ndim(lr) else [lr]
    if not rates or not all(isinstance(r, Real) and math.isfinite(r) for r in rates): raise BadValue(f'{who}: lr must be a number, got {lr!r}; learn.lr_find() suggests one')
    if min(rates) < 0 or not max(rates) > 0 or isinstance(lr, slice) and not min(rates) > 0: raise BadValue(f'{who}: lr must be > 0, got {lr}')
    if not isinstance(lr, slice) and len(rates) not in (1, n := _n_groups(learn)): raise BadValue(f'{who}: lr has {len(rates)} rates for {n} parameter group{"s"*(n > 1)}')


@patch
def fit_constant(self: Learner, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
    "Fit for `n_epoch` epochs at a rate of `lr`, from the first batch to the last."
    _fit('fit_constant', self, n_epoch, lr, lambda lr: SchedNo(lr, lr), wd, cbs, reset_opt, start_epoch)


@patch
def fit_step(self: Learner, n_epoch, lr=None, gamma=.1, milestones=None, every=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
    """Fit for `n_epoch` epochs, with `lr` multiplied by `gamma` (0–1) at each of the `milestones`, or `every` so many epochs.

    Both are in epochs, fractions allowed. By default at 1/2 and 3/4 of the fit (arXiv:1512.03385). Raises `ValueError` outside these ranges."""
    if not 0 < gamma <= 1: raise BadValue(f'fit_step: gamma must be above 0 and at most 1, got {gamma}')
    if milestones is not None and every is not None: raise BadValue(f'fit_step: milestones={milestones} and every={every} both say when; give one')
    check_fit_of('fit_step', self, n_epoch, lr)
    if every is not None:
        if not every > 0: raise BadValue(f'fit_step: every must be > 0 epochs, got {every}')
        milestones = [every*i for i in range(1, math.ceil(n_epoch/every))]
    milestones = [n_epoch/2, n_epoch*3/4] if milestones is None else list(milestones)
    if bad := [m for m in milestones if not m >= 0]: raise BadValue(f'fit_step: milestones must be ≥ 0 epochs, got {bad[0]}')
    def passed(pct): return sum(m <= pct*n_epoch + NEARLY for m in milestones)
    _fit('fit_step', self, n_epoch, lr, lambda lr: lambda pct: lr*gamma**passed(pct), wd, cbs, reset_opt, start_epoch)


FORMS = dict(exponential=lambda lr, div, power: SchedExp(lr, lr/div), linear=lambda lr, div, power: SchedLin(lr, lr/div),
             polynomial=lambda lr, div, power: lambda pct: SchedPoly(lr/div, lr, power)(1-pct), inverse=lambda lr, div, power: lambda pct: lr/(1 + (div-1)*pct))


@patch
def fit_decay(self: Learner, n_epoch, lr=None, form='exponential', div_final=100., power=.9, wd=None, cbs=None, reset_opt=False, start_epoch=0):
    """Fit for `n_epoch` epochs while `lr` falls to `lr/div_final`, batch by batch, by one of these forms (t: how much of the fit is over, 0–1).

    'exponential': lr/div_final^t; 'inverse': lr/(1 + (div_final−1)·t); 'linear': a straight line; 'polynomial': (1−t)^power between the two,
    of power .9 in arXiv:1606.00915. `div_final` ≥ 1, `power` > 0. Raises `ValueError` for others."""
    if form not in FORMS: raise BadValue(f'fit_decay: form must be one of {", ".join(FORMS)}, got {form!r}{nearest(form, FORMS)}')
    _check_div('fit_decay', div_final)
    if not power > 0: raise BadValue(f'fit_decay: power must be > 0, got {power}')
    _fit('fit_decay', self, n_epoch, lr, lambda lr: FORMS[form](lr, div_final, power), wd, cbs, reset_opt, start_epoch)


@patch
def fit_cos(self: Learner, n_epoch, lr=None, div_final=1e5, wd=None, cbs=None, reset_opt=False, start_epoch=0):
    "Fit for `n_epoch` epochs while `lr` falls to `lr/div_final` (≥ 1) by half a cosine, from the first batch on (arXiv:1608.03983, without restarts)."
    _check_div('fit_cos', div_final)
    _fit('fit_cos', self, n_epoch, lr, lambda lr: SchedCos(lr, lr/div_final), wd, cbs, reset_opt, start_epoch)


def _check_div(who, div_final):
    if not div_final >= 1: raise BadValue(f'{who}: div_final must be ≥ 1, got {div_final}')


if REPAIRS:
    @patch
    def fit_flat_cos(self: Learner, n_epoch, lr=None, div_final=1e5, pct_start=0.75, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        """Fit for `n_epoch` epochs at a flat `lr`, annealed by a cosine to `lr/div_final` from `pct_start` of the way (0–1; mostly .5 to .75) on.

        fastai 2.8.12 ignores `start_epoch` here and trains every epoch again."""
        if not 0 <= pct_start <= 1: raise BadValue(f'fit_flat_cos: pct_start must be 0 to 1, got {pct_start}')
        _check_div('fit_flat_cos', div_final)
        _fit('fit_flat_cos', self, n_epoch, lr, lambda lr: combined_cos(pct_start, lr, lr, lr/div_final), wd, cbs, reset_opt, start_epoch)

    @patch
    def fit_sgdr(self: Learner, n_cycles, cycle_len, lr_max=None, cycle_mult=2, cbs=None, reset_opt=False, wd=None, start_epoch=0,
                 opt: Literal['sgd', 'adamw'] | None = None):
        """Fit for `n_cycles` warm restarts: within each `lr_max` falls to 0 by half a cosine (arXiv:1608.03983).

        The first cycle takes `cycle_len` ≥ 1 epochs, each later one `cycle_mult` ≥ 1 times as many as the one before. `opt`: None for the Learner's
        optimizer; 'sgd' (momentum .9) or 'adamw' put that one in its place: SGDWR and AdamWR (arXiv:1711.05101), whose weight decay is decoupled.
        Raises `ValueError` for others. fastai 2.8.12 divides by zero where all cycles are of equal length."""
        for name, v in dict(n_cycles=n_cycles, cycle_len=cycle_len, cycle_mult=cycle_mult).items():
            if v != int(v) or v < 1: raise BadValue(f'fit_sgdr: {name} must be a whole number ≥ 1, got {v}')
        _restarts(self, [int(cycle_len)*int(cycle_mult)**i for i in range(int(n_cycles))], lr_max, opt, wd, cbs, reset_opt, start_epoch)


def _restarts(learn: Learner, cycles: list[int], lr=None, opt=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
    "Fit in `cycles` of so many epochs each, with `opt`."
    if opt not in (None, *RESTARTED): raise BadValue(f'fit_sgdr: opt must be None or one of {", ".join(RESTARTED)}, got {opt!r}{nearest(opt, RESTARTED)}')
    if opt and learn.opt_func is not RESTARTED[opt]:
        learn.opt_func, old = RESTARTED[opt], learn.opt
        learn.create_opt()
        if old is not None and old.frozen_idx: learn.opt.freeze_to(old.frozen_idx)
    ends = np.cumsum(cycles)
    def fall(lr):
        def rate(pct):
            at = pct*ends[-1] + NEARLY
            i = min(int(np.searchsorted(ends, at, 'right')), len(ends)-1)
            return SchedCos(lr, 0*lr)(max(at - NEARLY - (ends[i]-cycles[i]), 0.)/cycles[i])
        return rate
    _fit('fit_sgdr', learn, int(ends[-1]), lr, fall, wd, cbs, reset_opt, start_epoch)


def cycles_of(n_epoch: int, mult: int = 2) -> list[int]:
    "The lengths of the warm restarts that `n_epoch` ≥ 1 epochs are made of: each about `mult` times the one before, and together exactly as many."
    if n_epoch < 1 or mult < 1: raise BadValue(f'cycles_of: n_epoch and mult must be ≥ 1, got {n_epoch} and {mult}')
    if mult == 1: return [1]*n_epoch
    shares = [mult**i for i in range(n_epoch) if (mult**(i+1)-1)//(mult-1) <= n_epoch]
    ends = np.rint(np.cumsum(shares)*n_epoch/sum(shares)).astype(int)
    return np.diff(ends, prepend=0).tolist()


def fit_by(learn: Learner, schedule: str, n_epoch: int, lr=None, **kwargs):
    """Fit for `n_epoch` epochs by a schedule of `SCHEDULES`; `kwargs` are those of its method.

    'sgdr' makes cycles that double (or grow `cycle_mult` times) and says which: seven epochs are cycles of 1, 2 and 4; `opt` as in `fit_sgdr`.
    Raises `ValueError` for another schedule, and `TypeError` for an argument that its method does not take."""
    if schedule not in SCHEDULES: raise BadValue(f'schedule: one of {", ".join(SCHEDULES)}, got {schedule!r}{nearest(schedule, SCHEDULES)}')
    check_fit_of(f'fit_{schedule}', learn, n_epoch, lr)
    if schedule != 'sgdr': return _method(schedule)(learn, n_epoch, lr, **kwargs)
    cycles = cycles_of(n_epoch, kwargs.pop('cycle_mult', 2))
    if isinstance(learn, Learner) and writes(): print(f'sgdr: {n_epoch} epoch{"s"*(n_epoch > 1)} in {len(cycles)} cycle{"s"*(len(cycles) > 1)} of {", ".join(map(str, cycles))}')
    if unknown := kwargs.keys() - {'opt', 'wd', 'cbs', 'reset_opt', 'start_epoch'}: raise BadName(f'sgdr: no argument {sorted(unknown)[0]!r} for a number of epochs; call fit_sgdr')
    _restarts(learn, cycles, lr, **kwargs)


def _method(schedule): return getattr(Learner, f'fit_{schedule}')


class _Rehearsal:
    "What a `fit_…` method needs of a Learner, with parameter groups of its own: `fit` takes down the schedule and trains nothing."
    def __init__(self, learn: Learner):
        self.lr, self.moms, self.opt_func, self.groups = learn.lr, learn.moms, learn.opt_func, _n_groups(learn)
        self.create_opt()

    def create_opt(self): self.opt = Optimizer([[zeros(1)] for _ in range(self.groups)], [])

    def fit(self, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        self.n_epoch, self.start_epoch, self.scheds = n_epoch, start_epoch, next(cb for cb in L(cbs) if isinstance(cb, ParamScheduler)).scheds


def _n_groups(learn) -> int:
    "The parameter groups that the Learner's optimizer has, or will have."
    if isinstance(learn, _Rehearsal): return learn.groups
    if (opt := learn.opt) is None and isinstance(learn.opt_func, OptimWrapper): opt = learn.opt_func
    if opt is not None: return len(opt.param_lists)
    groups = L(learn.splitter(learn.model))
    return len(groups) if isinstance(groups[0], (L, list)) else 1


def by_share(learn: Learner, schedule: str, lr=None, **kwargs) -> dict:
    """What `fit_<schedule>` with a rate of `lr` would do at each share (0–1) of a fit: functions for `lr`, and for `mom` where it moves.

    Raises `ValueError` for another schedule, and for 'sgdr', which counts epochs."""
    if schedule not in SCHEDULES or schedule == 'sgdr':
        why = ', whose cycles are epochs' if schedule == 'sgdr' else nearest(schedule, SCHEDULES)
        raise BadValue(f'schedule: one of {", ".join(s for s in SCHEDULES if s != "sgdr")}, got {schedule!r}{why}')
    r = _Rehearsal(learn)
    check_fit_of(f'fit_{schedule}', r, 1, lr)
    _method(schedule)(r, 1, lr, **kwargs)
    return r.scheds


def rates_by_batch(learn: Learner, schedule: str, *args, **kwargs) -> dict[str, np.ndarray]:
    """What `fit_<schedule>(*args, **kwargs)` would set before each batch: `lr` (batches, groups), and `mom` (batches,) where it moves.

    For 'sgdr', a single number is one of epochs, as in `fit_by`. Nothing is trained or changed."""
    if schedule not in SCHEDULES: raise BadValue(f'schedule: one of {", ".join(SCHEDULES)}, got {schedule!r}{nearest(schedule, SCHEDULES)}')
    r, method = _Rehearsal(learn), _method(schedule)
    if schedule == 'sgdr' and len(args) + ('cycle_len' in kwargs) < 2 and 'n_cycles' not in kwargs: fit_by(r, schedule, *args, **kwargs)
    else:
        if 'lr' in kwargs and 'lr_max' in inspect.signature(method).parameters: kwargs['lr_max'] = kwargs.pop('lr')
        if schedule == 'one_cycle': check_fit_of('fit_one_cycle', r, *[inspect.signature(method).bind(r, *args, **kwargs).arguments.get(a) for a in ('n_epoch', 'lr_max')])
        method(r, *args, **kwargs)
    n = len(learn.dls.train)
    at = [(epoch + i/n)/r.n_epoch for epoch in range(r.start_epoch, r.n_epoch) for i in range(n)]
    return {k: np.array([np.broadcast_to(f(pct), r.groups) if k == 'lr' else f(pct) for pct in at]) for k, f in r.scheds.items()}


@patch
def plot_schedule(self: Learner, schedule: str, *args, **kwargs) -> Figure:
    """Plot what `fit_<schedule>` would do with these arguments, batch by batch, before anything is trained: `learn.plot_schedule('flat_cos', 5, lr=3e-3)`.

    The rate of each parameter group and, where it moves, the momentum. `schedule`: one of `SCHEDULES`; 'sgdr' also takes a number of epochs
    alone. Raises as that method does. Returns the figure; the Learner stays as it is."""
    moves = rates_by_batch(self, schedule, *args, **kwargs)
    fig = Figure(figsize=(6, 3.5), layout='constrained')
    ax, x = fig.subplots(), np.arange(1, len(moves['lr'])+1)
    style = dict(drawstyle='steps-post') if schedule == 'step' else {}
    groups = np.unique(moves['lr'], axis=1).shape[1]
    for g in range(moves['lr'].shape[1]) if groups > 1 else [-1]:
        ax.plot(x, moves['lr'][:, g], label=f'group {g}' if groups > 1 else 'learning rate', color=f'C{max(g, 0)}', **style)
    ax.set(xlabel='batch', ylabel='learning rate', ylim=(0, None), title=f'fit_{schedule}')
    lines = [*ax.lines]
    if 'mom' in moves:
        right = ax.twinx()
        right.plot(x, moves['mom'], '--', color='.4', label='momentum')
        right.set_ylabel('momentum')
        lines += right.lines
    if len(lines) > 1: fig.legend(handles=lines, loc='outside lower center', ncols=5)
    return fig
