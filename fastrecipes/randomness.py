"""Keyed randomness: a draw is a function of its key, never of how many draws came before.

What happens to an item depends on (seed, epoch, sample index), what happens to a batch on (seed, epoch, batch). So a run
resumes at batch k without replaying, worker processes and ranks agree, and paired runs differ only by what is compared."""
import random
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch

__all__ = ['key_of', 'stream', 'uniform', 'forked', 'default_seed']


def key_of(*key) -> int:
    "64 bits that depend on every part of `key` (numbers and strings): the same in every process and on every machine."
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), 'little')


def stream(*key) -> np.random.Generator:
    "A NumPy generator of its own for `key`."
    return np.random.default_rng(key_of(*key))


def uniform(indices, *key) -> np.ndarray:
    "One number in [0, 1) for each of `indices`: output number `index` of SplitMix64 (doi:10.1145/2660193.2660195) seeded by `key`."
    with np.errstate(over='ignore'):
        z = np.uint64(key_of(*key)) + (np.asarray(indices).astype(np.uint64) + np.uint64(1))*np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30)))*np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27)))*np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11))*2.**-53


def seed_torch(key: int):
    "Seed torch, on every device that is there. (`torch.manual_seed` notes each call for devices that are not, in 3 ms, and keeps the notes for good.)"
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(key % 2**63)


@contextmanager
def forked(*key):
    "Seed Python, NumPy and torch (CPU) by `key` for the block; afterwards their streams go on as if nothing had happened."
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = key_of(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)
    try: yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def default_seed() -> int:
    "The seed that torch was last given, so that fastai's `set_seed` and our `seed_everything` both reach keyed draws."
    return torch.initial_seed() % 2**32
