"""Runs that go on where they were killed: parameters, optimizer, schedule, draws and history come out bit for bit as if nothing had happened.

Inside `resumable(folder)` each Learner's fits are checkpointed. The same program run again comes by the same fits: those that had come to
their end are passed over, the one that was cut off goes on at its last checkpoint. What is drawn is keyed, so nothing is replayed."""
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, is_dataclass
from functools import wraps
from itertools import islice
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from fastai.basics import Callback, L, Learner, Metric, get_model, nn
from fastai.callback.schedule import LRFinder
from fastai.learner import Recorder

from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.errors import BadValue
from fastrecipes.files import whole, writes
from fastrecipes.repairs import REPAIRS
from fastrecipes.technique import applied
from fastrecipes.training import preflight  # noqa: F401  its look at a fit is taken inside ours: fits that are passed over need none

__all__ = ['resumable', 'remember', 'Checkpoint', 'state_of', 'restore']

BUDGET = .05                                    # the share of the time that writing checkpoints may take
_run: ContextVar['_Run | None'] = ContextVar('run', default=None)


@contextmanager
def resumable(folder, every: int | None = None):
    """A block whose fits can be killed and go on: run the same program again, and it continues from the checkpoints in `folder`.

    `every`: batches between two checkpoints (default: as many as keep writing under 5 % of the time); one more at each start of an epoch
    and after each fit. A checkpoint is written whole or not at all and replaces the one before; when the block comes to its end they are
    removed. Seed before the Learners are made, and make the same Learners with the same techniques each time: only fits are remembered.
    Raises `ValueError` for checkpoints of another program."""
    if not REPAIRS: raise BadValue('resumable: needs the mends of fastai; unset FASTRECIPES_REPAIRS')
    if every is not None and every < 1: raise BadValue(f'resumable: every must be ≥ 1 batch, got {every}')
    run = _Run(Path(folder), every)
    token = _run.set(run)
    try: yield run
    finally: _run.reset(token)
    run.clear()


def remember(name: str, make: Callable):
    "What `make()` gives, worked out once: in a run that goes on, what it gave before. For times and trials, which are not the same twice."
    return make() if (run := _run.get()) is None else run.remember(name, make)


class _Run:
    "The checkpoints of one `resumable` block: one file for each Learner, by the order of their first fits, and a journal."
    def __init__(self, folder: Path, every):
        self.folder, self.every, self.acts, self.asked = folder, every, WeakKeyDictionary(), Counter()
        self.journal = _read(folder/'journal.pt') or {}

    def act(self, learn) -> '_Act':
        if learn not in self.acts: self.acts[learn] = _Act(learn, self.folder/f'{len(self.acts)+1}.pt', self.every)
        return self.acts[learn]

    def remember(self, name, make):
        self.asked[name] += 1
        if (key := f'{name} {self.asked[name]}') not in self.journal:
            self.journal[key] = make()
            _write(self.folder/'journal.pt', self.journal)
        return self.journal[key]

    def clear(self):
        if not writes() or not self.folder.is_dir(): return
        for file in self.folder.glob('*.pt'): file.unlink()
        if not any(self.folder.iterdir()): self.folder.rmdir()


@dataclass(frozen=True, order=True)
class _Place:
    "How far a Learner has come: before `batch` of `epoch` of its fit number `fit`; an epoch of −1: before that fit."
    fit: int = 0
    epoch: int = -1
    batch: int = 0


class _Act:
    "The fits of one Learner in a `resumable` block, and its checkpoint."
    def __init__(self, learn: Learner, file: Path, every: int | None):
        self.file, self.every, self.fits, self.cost, self.written = file, every, 0, 0., -float('inf')
        self.saved = _read(file)
        self.due = self.saved and _Place(*self.saved['place'])      # where this session is to go on; None once it has
        keyed(learn)
        learn.preflight(folder=file.parent)
        if self.due: self._check(learn)

    def _check(self, learn):
        here, there = list(get_model(learn.model).state_dict()), list(self.saved['model'])
        if here != there: raise BadValue(f'resumable: {self.file} is of another network ({len(there)} tensors, {len(here)} here); remove it to begin again')

    def fit(self, learn: Learner, train: Callable, n_epoch: int, start_epoch: int):
        "Train, from where the checkpoint is; or pass over a fit that it is past."
        self.fits += 1
        if self.due and self.due.fit >= self.fits:
            if self.due == _Place(self.fits): self._restore(learn)
            return
        if self.due and self.due.epoch > start_epoch: start_epoch = self.due.epoch
        if learn.opt is None: learn.create_opt()                    # so that a checkpoint finds one, whatever the fit does first
        with learn.added_cbs(Checkpoint(self)): train(start_epoch)
        self.save(learn, _Place(self.fits))

    def begin(self, learn: Learner) -> int:
        "The batch that the epoch in hand starts at; what the checkpoint holds is put back now, after everybody's before_train."
        here = _Place(self.fits-1, learn.epoch)
        if self.due:
            if self.due < here or self.due.fit > here.fit: raise BadValue(f'resumable: {self.file} is of another program: it was at {self.due}, this one is at {here}')
            place = self.due
            self._restore(learn)
            return place.batch
        if learn.epoch > 0: self.save(learn, here)
        return 0

    def _restore(self, learn):
        restore(learn, self.saved)
        self.saved = self.due = None

    def save(self, learn: Learner, place: _Place):
        started = time.monotonic()
        _write(self.file, state_of(learn) | dict(place=(place.fit, place.epoch, place.batch)))
        self.written = time.monotonic()
        self.cost = self.written-started

    def is_due(self, batches: int) -> bool:
        if self.every: return batches % self.every == 0
        return time.monotonic()-self.written > self.cost/BUDGET


class Checkpoint(Callback):
    "Save after a training batch where it is time, last of all callbacks: what the others did in the batch is in it."
    order, run_valid = 1000, False
    def __init__(self, act): self.act = act

    @property
    def name(self): return 'checkpoint_cb'

    def after_batch(self):
        if self.learn.training and self.act.is_due(self.learn.iter+1):
            self.act.save(self.learn, _Place(self.act.fits-1, self.learn.epoch, self.learn.iter+1))


def _act_of(learn: Learner, cbs=()) -> _Act | None:
    "The act that a fit of `learn` belongs to: none outside a resumable block, and `lr_find` is no fit."
    run = _run.get()
    return None if run is None or any(isinstance(cb, LRFinder) for cb in (*L(cbs), *learn.cbs)) else run.act(learn)


def _wrap_the_loop():
    "Let fits inside a resumable block be passed over, and epochs begin in their middle."
    fit, all_batches = Learner.fit, Learner.all_batches

    @wraps(fit)
    def resumable_fit(self, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        def train(first): fit(self, n_epoch, lr, wd, cbs, reset_opt, start_epoch=first)
        act = _act_of(self, cbs)
        return train(start_epoch) if act is None else act.fit(self, train, n_epoch, start_epoch)

    @wraps(all_batches)
    def resumed_batches(self):
        act = self.training and any(isinstance(cb, Checkpoint) for cb in self.cbs) and _act_of(self)
        if not act: return all_batches(self)
        self.n_iter, first = len(self.dl), act.begin(self)
        if first >= self.n_iter: return
        ours = isinstance(self.dl, KeyedDL)
        if ours: self.dl.first = first
        try:
            for i, b in enumerate(self.dl if ours else islice(self.dl, first, None), first): self.one_batch(i, b)
        finally:
            if ours: self.dl.first = 0

    Learner.fit, Learner.all_batches = resumable_fit, resumed_batches


_wrap_the_loop()


def state_of(learn: Learner) -> dict:
    "All of a Learner that its next batch depends on, and all that its records show, as tensors and plain data."
    params = list(get_model(learn.model).parameters())
    state = dict(model=get_model(learn.model).state_dict(), optimizer=learn.opt.state_dict(),
                 gradients=[p.grad if p.grad is None or p.grad.any() else 0 for p in params],
                 learner={n: vars(learn)[n] for n in ('train_iter', 'pct_train', 'smooth_loss', 'final_record') if n in vars(learn)},
                 effects={n: a.effect for n, a in applied(learn).items()}, metrics=[_attributes(m) for m in learn.metrics],
                 callbacks=[(name, _attributes(cb)) for name, cb in _named(learn)], random=_random_state())
    if isinstance(dl := getattr(learn, 'dl', None), KeyedDL): state['loader'] = dl.seed
    if (scaler := vars(learn).get('scaler')) is not None: state['scaler'] = scaler.state_dict()
    return state


def restore(learn: Learner, state: dict):
    "Put back what `state_of` took."
    model = get_model(learn.model)
    model.load_state_dict(state['model'])
    if learn.opt is None: learn.create_opt()
    params = list(model.parameters())
    for p, g in zip(params, state['gradients']): p.grad = torch.zeros_like(p) if isinstance(g, int) else g if g is None else g.to(p.device)
    learn.opt.load_state_dict(_on(params[0].device, state['optimizer']))
    if type(learn.opt).__name__ == 'Optimizer': learn.opt.state = defaultdict(dict, learn.opt.state)    # fastai's own gives back a dict that lacks new parameters
    vars(learn).update(state['learner'])
    for n, effect in state['effects'].items():
        if n in applied(learn): applied(learn)[n].effect = effect
    for m, saved in zip(learn.metrics, state['metrics']): _put_back(m, saved)
    here = dict(_named(learn))
    for name, saved in state['callbacks']:
        if name in here: _put_back(here[name], saved)
    if 'loader' in state and isinstance(learn.dl, KeyedDL):
        learn.dl.seed = state['loader']
        learn.dl.set_epoch(keyed(learn).age)
    if 'scaler' in state and vars(learn).get('scaler') is not None: learn.scaler.load_state_dict(state['scaler'])
    _set_random_state(state['random'])


def _named(learn):
    "The callbacks by class and count: `('ParamScheduler 1', cb)`."
    seen = Counter()
    for cb in learn.cbs:
        seen[type(cb).__name__] += 1
        yield f'{type(cb).__name__} {seen[type(cb).__name__]}', cb


class _Inside(dict):
    "The attributes of an object that is kept, not replaced: a metric within a callback, a network that is averaged."


def _attributes(o) -> dict:
    """What of `o` is state: its attributes that are plain data, tensors or metrics; networks that it names in `stateful`.

    All else (the Learner, progress bars, contexts, teachers) is made anew by the program. `transient` names what is not to come back."""
    left_out = {'learn', *getattr(type(o), 'transient', ()), *(('start_epoch', 'log') if isinstance(o, Recorder) else ())}     # the epoch's clock and row
    found = {}
    for name, v in vars(o).items():
        if name in left_out: continue
        if isinstance(v, Metric): found[name] = _Inside(_attributes(v))
        elif isinstance(v, nn.Module) and name in getattr(type(o), 'stateful', ()): found[name] = _Inside(v.state_dict())
        elif _plain(v): found[name] = v
    return found


def _put_back(o, saved: dict):
    for name, v in saved.items():
        if not isinstance(v, _Inside): vars(o)[name] = v
        elif isinstance(inside := vars(o).get(name), nn.Module): inside.load_state_dict(v)
        elif inside is not None: _put_back(inside, v)


def _plain(v) -> bool:
    if isinstance(v, (list, tuple, set, frozenset, L)): return all(map(_plain, v))
    if isinstance(v, dict): return all(_plain(k) and _plain(o) for k, o in v.items())
    if is_dataclass(v) and not isinstance(v, type): return all(map(_plain, vars(v).values()))
    return v is None or isinstance(v, (bool, int, float, str, bytes, Path, np.ndarray, np.generic, torch.dtype, torch.device)) or (
        isinstance(v, torch.Tensor) and not isinstance(v, nn.Parameter) and not v.requires_grad)


def _on(device, o):
    "Tensors inside dicts and lists on `device`; a torch optimizer's step counts stay where they are, its own loading sees to them."
    if isinstance(o, torch.Tensor): return o.to(device)
    if isinstance(o, dict): return {k: _on(device, v) for k, v in o.items()}
    return type(o)(_on(device, v) for v in o) if isinstance(o, (list, L)) else o


def _random_state() -> dict:
    return dict(python=random.getstate(), numpy=np.random.get_state(), torch=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def _set_random_state(state: dict):
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'])
    if state['cuda'] and torch.cuda.device_count() == len(state['cuda']): torch.cuda.set_rng_state_all(state['cuda'])


def _read(file: Path):
    return torch.load(file, map_location='cpu', weights_only=False) if file.is_file() else None     # a pickle, of a run of one's own, like learner.pkl


def _write(file: Path, state):
    with whole(file) as tmp: torch.save(state, tmp)
