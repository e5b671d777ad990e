"Trials: a Learner trains for a while to be measured, and nothing of it is felt afterwards."
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial

import numpy as np
import torch
from fastai.basics import Callback, CancelValidException, L, Learner, Metric, Recorder, nn
from fastai.callback.schedule import LRFinder
from fastai.optimizer import _BaseOptimizer
from torch.nn.parameter import is_lazy

from fastrecipes.randomness import forked

__all__ = ['Trial', 'aside']

PARTS = (nn.Module, Callback, Metric, _BaseOptimizer, torch.optim.Optimizer)        # what is restored by its attributes


class Trial(LRFinder):
    """A fit that is none: like those of `lr_find` it is not counted, judged, checkpointed or guarded, and does not validate.

    It saves nothing to disk, as fastai's LRFinder does: it is meant for a block `aside`."""
    def __init__(self): self.scheds = {}
    def before_fit(self): self.hps = {}
    def before_batch(self): pass
    def after_batch(self): pass
    def before_validate(self): raise CancelValidException('trial')
    def after_fit(self): pass
    def abort(self, level): pass


@contextmanager
def aside(learn: Learner, name: str):
    """A block in which `learn` may train, and after which it is as before, however the block ends: weights, gradients, modes and statistics of
    the network, optimizer and hyper-parameters, callbacks, metrics and records, effects, loaders, and every random stream.

    What the block draws depends on `name` alone. Copies lie in the memory of the CPU. Objects are restored in place: whoever holds one sees it."""
    seen, undos = {}, []
    for part in (learn.model, learn.opt, learn.cbs, learn._metrics, vars(learn).get('techniques')): undos += _undos(part, seen)
    for dl in learn.dls.loaders: undos += _undos_of_loader(dl)
    undos.append(partial(_refill, vars(learn), dict(vars(learn))))
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with forked('aside', name), torch.random.fork_rng(cuda): yield
    finally:
        for undo in reversed(undos): undo()


def _undos(o, seen: dict) -> Iterator:
    "What puts `o`, and all it is made of, back as it is now, in place."
    if id(o) in seen: return
    seen[id(o)] = o                             # kept, so that no other object gets its id
    if isinstance(o, torch.Tensor):
        if is_lazy(o) or o.is_meta: return
        if o.is_leaf:
            if o.grad is not None: yield from _undos(o.grad, seen)
            yield partial(setattr, o, 'grad', o.grad)
            yield partial(setattr, o, 'requires_grad', o.requires_grad)
        yield partial(_fill, o, o.detach().to('cpu', copy=True), o.device)     # undone first: a gradient must lie where its parameter does
    elif isinstance(o, np.ndarray): yield partial(np.copyto, o, o.copy())
    elif (rewind := _rewind(o)) is not None: yield rewind
    elif isinstance(o, L): yield from _undos(o.items, seen)
    elif isinstance(o, (list, set)):
        yield partial(_refill, o, o.copy())
        for v in o: yield from _undos(v, seen)
    elif isinstance(o, tuple):
        for v in o: yield from _undos(v, seen)
    elif isinstance(o, dict):
        yield partial(_refill, o, dict(o))
        for v in list(o.values()): yield from _undos(v, seen)
    elif isinstance(o, PARTS) or is_dataclass(o) and not isinstance(o, type): yield from _undos_of_part(o, seen)


def _undos_of_part(o, seen) -> Iterator:
    yield partial(_refill, vars(o), dict(vars(o)))
    for name, v in list(vars(o).items()):
        if isinstance(v, nn.Module) and not isinstance(o, nn.Module) and name not in getattr(type(o), 'stateful', ()): continue     # a teacher
        if isinstance(o, Recorder) and isinstance(v, (list, L)): yield partial(_refill, v, v.copy())        # of numbers, of which none is ever overwritten
        else: yield from _undos(v, seen)


def _undos_of_loader(dl) -> Iterator:
    "A loader's place in its epochs and its draws; its data are not touched."
    yield partial(_refill, vars(dl), dict(vars(dl)))
    for o in (*vars(dl).values(), getattr(vars(dl).get('sampler'), 'generator', None)):
        if (rewind := _rewind(o)) is not None: yield rewind


def _rewind(o):
    "What sets a random generator back to where it is now; None for what is none."
    if isinstance(o, random.Random): return partial(o.setstate, o.getstate())
    if isinstance(o, torch.Generator): return partial(o.set_state, o.get_state())
    if isinstance(o, np.random.Generator): return partial(setattr, o.bit_generator, 'state', o.bit_generator.state)


def _refill(o, before):
    "Give a container its former content."
    if isinstance(o, (dict, set)):
        for k in set(o)-set(before): o.pop(k) if isinstance(o, dict) else o.remove(k)
        o.update(before)
    else: o[:] = before


@torch.no_grad()
def _fill(t, before, device):
    if (t.shape, t.dtype, t.device) != (before.shape, before.dtype, device): t.data = before.to(device)
    elif not torch.equal(t.detach().cpu(), before): t.data.copy_(before)
