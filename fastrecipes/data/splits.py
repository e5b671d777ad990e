"Who trains, who validates, who tests: stratified, seeded, stable as a folder grows, copies of an image kept on one side."
from fractions import Fraction

from fastrecipes.errors import BadValue
from fastrecipes.randomness import key_of

__all__ = ['split', 'check_shares']


def check_shares(valid: float, test: float):
    "Raise unless the two shares lie in [0, 1) and leave something to train on."
    for name, share in (('valid', valid), ('test', test)):
        if not 0 <= share < 1: raise BadValue(f'{name}: a share of the images in [0, 1), got {share}')
    if valid + test >= 1: raise BadValue(f'valid + test: must leave images to train on, got {valid} + {test}')


def split(digests: list[str], labels: list[str], valid: float = .2, test: float = .1, seed: int = 42) -> list[str]:
    """`'train'`, `'valid'` or `'test'` for each image: each class gives its share, at least one of each where it has enough images.

    An image's place depends on (seed, digest), so equal images stay together and a new one moves none but those at the boundaries.
    Raises `BadValue` for shares outside [0, 1) or that leave nothing to train on."""
    check_shares(valid, test)
    sides = ['train']*len(digests)
    for label in sorted(set(labels)):
        groups = {}
        for i, (d, own) in enumerate(zip(digests, labels)):
            if own == label: groups.setdefault(d, []).append(i)
        order = sorted(groups, key=lambda d: key_of(seed, 'split', d))
        n = sum(map(len, groups.values()))
        quota = {'test': _quota(n, test, len(order) >= 3), 'valid': _quota(n, valid, len(order) >= 2)}
        for d in order[:-1]:                    # the last group always trains
            side = next((s for s in ('test', 'valid') if quota[s] > 0), 'train')
            if side == 'train': break
            quota[side] -= len(groups[d])
            for i in groups[d]: sides[i] = side
    return sides


def _quota(n: int, share: float, enough: bool) -> int:
    "How many of `n` images a share means: rounded, at least one where there are enough."
    return 0 if not share else max(round(n*Fraction(str(share))), 1 if enough else 0)
