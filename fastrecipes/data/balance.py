"Balanced sampling: each class comes up equally often in an epoch, whatever its share of the data."
from typing import Literal

import numpy as np
from fastai.basics import Learner
from fastai.data.transforms import get_c
from torch.utils.data import Sampler

from fastrecipes.data.keyed import keyed, resampled
from fastrecipes.data.loaders import labels_of
from fastrecipes.errors import BadValue, nearest
from fastrecipes.randomness import default_seed, stream
from fastrecipes.technique import say, technique

__all__ = ['BalanceClassSampler', 'WeightedSampler']

MODES = ('upsampling', 'downsampling', 'weighted')


class BalanceClassSampler(Sampler):
    """Draw each class n times an epoch: n is the largest class' size (`mode='upsampling'`) or the smallest's (`'downsampling'`).

    A class of m samples gives each of them ⌊n/m⌋ times and the remainder without repetition, redrawn each epoch; seeded."""
    def __init__(self, labels, mode: str = 'upsampling', seed: int | None = None):
        if mode not in MODES[:2]: raise BadValue(f'mode: {" or ".join(map(repr, MODES[:2]))}, got {mode!r}{nearest(mode, MODES[:2])}')
        labels = np.asarray(labels)
        if not len(labels): raise BadValue('labels: there are none')
        self.members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
        self.per_class = (max if mode == 'upsampling' else min)(map(len, self.members))
        self.seed, self.epoch = default_seed() if seed is None else seed, 0

    def __len__(self): return self.per_class*len(self.members)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        "The sample indices of one epoch, in order."
        drawn = [np.concatenate([np.repeat(m, self.per_class//len(m)), rng.permutation(m)[:self.per_class % len(m)]]) for m in self.members]
        return rng.permutation(np.concatenate(drawn))

    def __iter__(self):
        yield from self.draw(stream(self.seed, 'balance', self.epoch)).tolist()
        self.epoch += 1


class WeightedSampler(Sampler):
    "Draw as many samples as there are, with replacement, by the `weights` of their classes: class c comes up in proportion to weight[c]·size(c)."
    def __init__(self, labels, weights, seed: int | None = None):
        labels, weights = np.asarray(labels), np.asarray(weights, dtype=float)
        if weights.ndim != 1 or len(weights) <= labels.max() or (weights < 0).any() or not weights[labels].sum() > 0:
            raise BadValue(f'weights: one number ≥ 0 for each of the {labels.max()+1} classes, not all 0, got {weights.tolist()}')
        self.p = weights[labels]/weights[labels].sum()
        self.seed, self.epoch = default_seed() if seed is None else seed, 0

    def __len__(self): return len(self.p)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        "The sample indices of one epoch, in order."
        return rng.choice(len(self.p), len(self.p), p=self.p)

    __iter__ = BalanceClassSampler.__iter__


@technique('data', section='Balance', source='doi:10.1109/TKDE.2008.239', touches=('sampling',),
           formula=r'\text{draws of class } k = \max_j n_j \ \text{ (up)}, \quad \min_j n_j \ \text{ (down)}')
def balance(self: Learner, mode: Literal['upsampling', 'downsampling', 'weighted'] = 'upsampling',
            weights: list[float] | None = None) -> Learner:
    """Draw the classes of the training set equally often; validation stays as it is.

    `mode`: 'upsampling' (every class as often as the largest), 'downsampling' (as the smallest) or 'weighted' (with replacement,
    by `weights`, one a class; default: the inverse of the class' size). Use it where the rare classes matter as much as the
    common ones; it costs some accuracy on the common ones, and an upsampled epoch is longer.
    Raises `ValueError` for an unknown mode, for weights with another mode, and where samples have no single class."""
    if mode not in MODES: raise BadValue(f'balance: mode must be one of {", ".join(MODES)}, got {mode!r}{nearest(mode, MODES)}')
    if weights is not None and mode != 'weighted': raise BadValue(f"balance: weights go with mode='weighted', got {mode=}")
    try: labels = labels_of(self.dls.train, 'balance')
    except BadValue as e: raise BadValue(f'{e}; give `as_dataloaders` a torch loader with a sampler of your own') from None
    counts = np.bincount(labels)
    if weights is not None and len(weights) != (c := get_c(self.dls) or len(counts)): raise BadValue(f'balance: one weight for each of the {c} classes, got {len(weights)}')
    if mode != 'weighted': sampler = BalanceClassSampler(labels, mode)
    else: sampler = WeightedSampler(labels, np.divide(1., counts, where=counts > 0, out=np.zeros(len(counts))) if weights is None else weights)
    dls = resampled(self.dls, sampler, sampler.seed)
    seed = keyed(self).seed                             # nothing is refused from here on
    sampler.seed = dls.train.seed = seed
    self.dls = dls
    seen = counts[counts > 0]
    if weights is None and seen.min() == seen.max(): say(self, 'balance', f'the classes are balanced already: {seen[0]} samples each', aloud=True)
    else: say(self, 'balance', f'{len(sampler)} draws an epoch by {mode} ({seen.min()} to {seen.max()} samples a class in the data)')
    return self
