"Loaders and Learners whose randomness is keyed: order and transforms by (seed, epoch, sample), the training step by (seed, epoch, batch)."
from collections import Counter
from copy import copy
from itertools import count

import numpy as np
import torch
from fastai.basics import DataLoaders, Learner, to_detach
from fastai.data.core import TfmdDL
from fastai.distributed import rank_distrib
from fastai.tabular.core import TabDataLoader, TabWeightedDL

from fastrecipes.errors import BadValue
from fastrecipes.randomness import default_seed, forked, key_of, seed_torch, stream, uniform
from fastrecipes.repairs import is_trial
from fastrecipes.technique import TechniqueCallback

__all__ = ['KeyedDL', 'Keyed', 'keyed', 'per_sample']

ITEMWISE = frozenset(('create_batch', 'create_item', 'do_batch', 'do_item', 'retain'))      # what users give a loader, or override, to see single items
_batch = None                                   # the (loader, batch number) whose transforms are running, for `per_sample`


class KeyedDL(TfmdDL):
    """A `TfmdDL` in which an item's place in the order and its random transforms depend on (seed, epoch, sample) only.

    `sampler.draw(rng)` may give the order instead of a permutation; a sample drawn again in an epoch gets draws of its own. `first`: the
    batch that the next iteration starts at. `rank`, `world`: which share of each batch of world·bs samples this process takes."""
    def __init__(self, dataset=None, bs=64, seed: int | None = None, sampler=None, rank: int = 0, world: int = 1, **kwargs):
        self.seed, self.sampler, self.epoch = default_seed() if seed is None else seed, sampler, -1
        self.first, self.rank, self.world, self.gathered = 0, rank, world, False
        super().__init__(dataset, bs, **kwargs)
        if sampler is not None: self.n = len(sampler)

    def new(self, dataset=None, cls=None, **kwargs):
        ours = {'seed': self.seed} if issubclass(cls or type(self), KeyedDL) else {}
        if 'shuffled' in kwargs: kwargs['shuffle'] = kwargs.pop('shuffled')         # as `tta` of fastai 2.8.12 spells it
        same = dataset is None or dataset is self.dataset
        if ours and same and kwargs.get('shuffle', self.shuffle): ours['sampler'] = self.sampler
        return super().new(dataset, cls, **{**ours, **kwargs})

    def set_epoch(self, epoch: int):
        "Make the next iteration that of `epoch`."
        self.epoch = epoch - 1

    def randomize(self): self.epoch += 1        # fastai calls it at the start of each iteration

    def get_idxs(self):
        if not self.shuffle or not self.indexed: return super().get_idxs()
        rng = stream(self.seed, 'order', self.epoch)
        order = rng.permutation(self.n) if self.sampler is None else self.sampler.draw(rng)
        return _draws(order, len(self.dataset))

    def __len__(self):
        if self.world == 1: return super().__len__()
        return self.n//(self.bs*self.world) + (0 if self.drop_last or self.n % (self.bs*self.world) == 0 else 1)

    @property
    def _DataLoader__idxs(self):
        "The draws of an iteration; fastai sets them at its start, before workers are made."
        return self._draws

    @_DataLoader__idxs.setter
    def _DataLoader__idxs(self, order): self._draws = self._part(list(order)) if self.first or self.world > 1 else order

    def _part(self, order: list) -> list:
        """Of each batch of world·bs, the share of `rank`: what the ranks take, one behind the other, is the batch of a single process.

        Where the last batch does not divide, the last ranks repeat its last sample: every rank has as many batches, of the same size."""
        part, whole = [], self.bs*self.world
        for i in range(self.first*whole, len(order), whole):
            batch = order[i:i+whole]
            if len(batch) < whole and self.drop_last: break
            n = -(-len(batch)//self.world)
            batch += batch[-1:]*(n*self.world-len(batch))
            part += batch[self.rank*n:(self.rank+1)*n]
        return part

    def shared(self, rank: int, world: int) -> 'KeyedDL':
        "The loader of one of `world` processes, at the same epoch."
        dl = self.new(rank=rank, world=world)
        dl.epoch = self.epoch
        return dl

    def to_detach(self, b, cpu=True, gather=True):
        "fastai asks the loader how what it counts is brought together from all processes: not at all where that was done already."
        return to_detach(b, cpu, gather and not self.gathered)

    def do_item(self, s):
        if not self.shuffle or s is None: return super().do_item(s)
        with forked(self.seed, 'item', self.epoch, int(s)): return super().do_item(int(s) % len(self.dataset))

    def create_batches(self, samps):
        "Whole batches where the dataset can give them (`Indexed` does, of tensors) and nothing is done to single items; the same ones, many times faster."
        if not self._whole(): return (yield from super().create_batches(samps))
        for draws in self.chunkify(samps): yield self.dataset.batch([int(i) % len(self.dataset) for i in draws])

    def _whole(self) -> bool:
        if not self.indexed or self.bs is None or not getattr(self.dataset, 'whole', False): return False
        return not self.after_item.fs and not self.before_batch.fs and not ITEMWISE & vars(self).keys() and all(getattr(type(self), n) is getattr(KeyedDL, n) for n in ITEMWISE)

    def __iter__(self):
        global _batch
        batches = super().__iter__()
        if not self.shuffle:
            yield from batches
            return
        for i in count(self.first):
            outer, _batch = _batch, (self, i)
            try:
                with forked(self.seed, 'batch', self.epoch, i): b = next(batches)
            except StopIteration: return
            finally: _batch = outer
            yield b

    def draws(self, i: int) -> np.ndarray:
        "The draws (sample + repetition·samples) that make up batch `i` of the iteration that is running."
        at = (i-self.first)*self.bs
        return np.asarray(self._draws[at:at+self.bs])


class KeyedTabDL(KeyedDL, TabDataLoader):
    "A `KeyedDL` of rows of a table."


def _draws(order, n: int) -> list[int]:
    "Number repetitions apart: the k-th time that sample i comes up it is draw i + k·n."
    seen, draws = Counter(), []
    for i in map(int, order):
        draws.append(i + seen[i]*n)
        seen[i] += 1
    return draws


def per_sample(n: int, *name) -> torch.Tensor:
    "A number in [0, 1) for each of the `n` samples of the batch in hand, keyed by (seed, epoch, sample, `name`); torch's own elsewhere."
    if _batch is not None:
        dl, i = _batch
        if len(draws := dl.draws(i)) == n: return torch.from_numpy(uniform(draws, dl.seed, dl.epoch, *name)).float()
    return torch.rand(n)


class Keyed(TechniqueCallback):
    "Count `learn`'s epochs over all its fits, key the training loader to them, and seed torch by (seed, epoch, batch) at each training batch."
    order, run_valid = -9, False                # right after TrainEvalCallback: before anything that draws

    def __init__(self, seed: int | None = None):
        self.seed, self.first, self.done = default_seed() if seed is None else seed, 0, 0
        self.counts = True

    def before_fit(self):
        self.first, self.counts = self.done, not is_trial(self.learn)

    def before_train(self):
        if isinstance(dl := self.learn.dls.train, KeyedDL): dl.set_epoch(self.age)

    def before_batch(self):
        if self.learn.training: seed_torch(key_of(self.seed, 'step', *self.step))

    def after_train(self):
        if self.counts: self.done = self.age + 1    # `lr_find` costs no epoch: what follows is what it would have been without

    @property
    def age(self) -> int:
        "The number of the epoch in hand, counted over all fits of this Learner."
        return self.first + self.learn.epoch

    @property
    def step(self) -> tuple:
        "(epoch, batch, rank): the key of what is drawn for the batch in hand."
        return self.age, self.learn.iter, rank_distrib()

    def stream(self, name: str) -> np.random.Generator:
        "A generator for what `name` draws in this batch."
        return stream(self.seed, name, *self.step)

    def per_sample(self, n: int, *name) -> torch.Tensor:
        "A number in [0, 1) for each of the `n` samples of this batch, keyed by (seed, epoch, sample, `name`); by batch where samples are not known."
        dl = self.learn.dl
        if isinstance(dl, KeyedDL) and len(draws := dl.draws(self.learn.iter)) == n: return torch.from_numpy(uniform(draws, dl.seed, dl.epoch, *name)).float()
        return torch.from_numpy(uniform(range(n), self.seed, *self.step, *name)).float()


def keyed(learn: Learner, seed: int | None = None) -> Keyed:
    "The `Keyed` callback of `learn`; the first call adds it and turns a plain training `TfmdDL`, or one of a table, into a `KeyedDL`."
    if (cb := next((o for o in learn.cbs if type(o) is Keyed), None)) is None:
        learn.add_cb(cb := Keyed(seed))
    if cls := keyed_kind(learn.dls.train): learn.dls = with_train(learn.dls, learn.dls.train.new(cls=cls, seed=cb.seed))
    return cb


def keyed_kind(dl):
    """What a loader becomes when it is keyed; None for one that draws by a plan of its own, or is keyed.

    fastai 2.8.12 loads every table by `TabWeightedDL`, which without weights still draws with replacement: a third of the rows sit an epoch out."""
    if type(dl) is TfmdDL: return KeyedDL
    if type(dl) is TabDataLoader or type(dl) is TabWeightedDL and len(set(dl.wgts)) == 1: return KeyedTabDL


def with_train(dls: DataLoaders, train) -> DataLoaders:
    "The same loaders with another one for training: a new `DataLoaders`, for other Learners may share the old one."
    new = copy(dls)
    new.loaders = [train, *dls.loaders[1:]]
    return new


def resampled(dls: DataLoaders, sampler, seed: int) -> DataLoaders:
    "`dls` with its training order drawn by `sampler`. Raises for a loader that is not fastai's or has no items to index."
    dl = dls.train
    if not isinstance(dl, TfmdDL) or not dl.indexed:
        raise BadValue(f'balance: needs a fastai loader over an indexed dataset, got {type(dl).__name__}; give torch loaders to `as_dataloaders`')
    if isinstance(dl, KeyedDL): return with_train(dls, dl.new(sampler=sampler, shuffle=True))
    cls = KeyedTabDL if isinstance(dl, TabDataLoader) else KeyedDL
    return with_train(dls, dl.new(cls=cls, seed=seed, sampler=sampler, shuffle=True))
