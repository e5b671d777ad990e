"""Runs that go on where they were killed: parameters, optimizer, schedule, draws and history come out bit for bit as if nothing had happened.

Inside `resumable(folder)` each Learner's fits are checkpointed. The same program run again comes by the same fits: those that had come to
their end are passed over, the one that was cut off goes on at its last checkpoint. What is drawn is keyed, so nothing is replayed."""
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from fastai.basics import Callback, Learner, get_model

from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.errors import BadValue
from fastrecipes.files import whole, writes
from fastrecipes.repairs import REPAIRS, is_trial
from fastrecipes.training import preflight  # noqa: F401  its look at a fit is taken inside ours: fits that are passed over need none
from fastrecipes.training.state import restore, state_of

__all__ = ['resumable', 'remember', 'Checkpoint']

BUDGET = .05                                    # the share of the time that writing checkpoints may take
_run: ContextVar['_Run | None'] = ContextVar('run', default=None)


@contextmanager
def resumable(folder, every: int | None = None):
    """A block whose fits can be killed and go on: run the same program again, and it continues from the checkpoints in `folder`.

    `every`: batches between two checkpoints (default: as many as keep writing under 5 % of the time); one more at each start of an epoch
    and after each fit. A checkpoint is written whole or not at all and replaces the one before; when the block comes to its end they are
    removed. Seed before the Learners are made, and make the same Learners with the same techniques each time: only fits are remembered.
    Raises `ValueError` for checkpoints of another network, and for training loaders that are not fastai's."""
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
        self.folder, self.every, self.acts, self.met, self.asked = folder, every, WeakKeyDictionary(), 0, Counter()
        self.journal = _read(folder/'journal.pt') or {}

    def act(self, learn) -> '_Act':
        if learn not in self.acts:
            self.met += 1                           # not how many there are: those that nobody holds any more are gone from `acts`
            self.acts[learn] = _Act(learn, self.folder/f'{self.met}.pt', self.every)
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
        if not isinstance(dl := learn.dls.train, KeyedDL):
            raise BadValue(f'resumable: a {type(dl).__name__} draws its order anew, and no run could go on in the middle of it; give the data to `as_dataloaders`')
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
    return None if run is None or is_trial(learn, cbs) else run.act(learn)


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
        self.dl.first = first
        try:
            for i, b in enumerate(self.dl, first): self.one_batch(i, b)
        finally: self.dl.first = 0

    Learner.fit, Learner.all_batches = resumable_fit, resumed_batches


_wrap_the_loop()


def _read(file: Path):
    return torch.load(file, map_location='cpu', weights_only=False) if file.is_file() else None     # a pickle, of a run of one's own, like learner.pkl


def _write(file: Path, state):
    with whole(file) as tmp: torch.save(state, tmp)
