"Who trains, who validates, who tests: stratified, seeded, stable as a folder grows, what belongs together kept on one side."
from collections import Counter
from fractions import Fraction
from numbers import Real

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import PermutationMethod, chi2_contingency

from fastrecipes.errors import BadValue
from fastrecipes.randomness import key_of

__all__ = ['SIDES', 'split', 'folds', 'check_shares', 'belonging', 'class_match']

SIDES = ('train', 'valid', 'test')
CHANCE = .01            # a difference of shares that chance makes more rarely is told


def check_shares(valid: float, test: float):
    "Raise unless the two shares lie in [0, 1) and leave something to train on."
    for name, share in (('valid', valid), ('test', test)):
        if not isinstance(share, Real): raise BadValue(f'{name}: a share of the images in [0, 1), got {share!r}; files, a CSV and a function go with a folder of images only')
        if not 0 <= share < 1: raise BadValue(f'{name}: a share of the images in [0, 1), got {share}')
    if valid + test >= 1: raise BadValue(f'valid + test: must leave images to train on, got {valid} + {test}')


def belonging(digests: list[str], groups: list[str | None] | None = None, pairs=()) -> list[str]:
    """A name for each image, the same for those that must stay together: equal digests, the same group (None: of no group), each of `pairs` `(m, 2)`.

    The name of the first group, else the smallest digest: it stays what it is as images are added to others."""
    if groups is None and not len(pairs): return list(digests)
    n, first, edges = len(digests), {}, [tuple(p) for p in pairs]
    for i, d in enumerate(digests): edges.append((i, first.setdefault(d, i)))
    named = [None if g is None else f'group {g}' for g in groups or [None]*n]
    for i, g in enumerate(named):
        if g is not None: edges.append((i, first.setdefault(g, i)))
    a, b = np.array(edges).T
    _, part = connected_components(coo_array((np.ones(len(a), np.int8), (a, b)), shape=(n, n)), directed=False)
    name = {}
    for p, d, g in zip(part.tolist(), digests, named): name[p] = min(name.get(p, (True, d)), (g is None, g or d))
    return [name[p][1] for p in part.tolist()]


def split(keys: list[str], labels: list[str], valid: float = .2, test: float = .1, seed: int = 42) -> list[str]:
    """`'train'`, `'valid'` or `'test'` for each image: each class gives its share, at least one of each where it has enough images.

    An image's place depends on (seed, key), its digest or what it belongs to (see `belonging`), so equal keys stay together and a new one moves
    none but those at the boundaries. A key of many images goes where it brings the classes nearer to their shares.
    Raises `BadValue` for shares outside [0, 1) or that leave nothing to train on."""
    check_shares(valid, test)
    order, held = _ordered(keys, labels, seed), Counter()
    for k in order: held.update(set(order[k]))
    n = Counter(labels)
    rooms = {s: {c: _quota(n[c], share, held[c] >= least) for c in n} for s, share, least in (('test', test, 3), ('valid', valid, 2))}
    last = {c: k for k in order for c in order[k]}              # the last of each class always trains
    free = {k: own for k, own in order.items() if k not in set(last.values())}
    side = _fill(free, {s: dict(room) for s, room in rooms.items()}, n)
    for s, room in rooms.items():
        for c in sorted(c for c in n if room[c]):
            if any(side.get(k) == s for k in free if c in free[k]): continue
            if waiting := [k for k in free if c in free[k] and k not in side]: side[min(waiting, key=lambda k: free[k].total())] = s
    return [side.get(k, 'train') for k in keys]


def folds(keys: list[str], labels: list[str], n: int, seed: int = 42) -> list[int]:
    """The fold, 0 to n−1, of each image: each class in equal parts, equal keys in one fold, by (seed, key) as `split` does.

    Raises `BadValue` unless 2 ≤ n ≤ the number of keys of the smallest class."""
    if n < 2: raise BadValue(f'folds: at least 2, got {n}')
    order, held = _ordered(keys, labels, seed), Counter()
    for k in order: held.update(set(order[k]))
    rarest = min(sorted(held), key=held.get)
    if held[rarest] < n:
        way = f'use folds={held[rarest]} or less' if held[rarest] > 1 else 'add images of it, or leave it out'
        raise BadValue(f'folds: {n}, but class {rarest!r} has {held[rarest]} image{"s"*(held[rarest] != 1)}, copies and groups counted once, and some fold would have none; {way}')
    size = Counter(labels)
    rooms = {f: {} for f in range(n)}
    for c, m in size.items():
        turn = key_of(seed, 'folds', c) % n                     # classes that do not divide give what is over to different folds
        for i in range(n): rooms[(i+turn) % n][c] = (i+1)*m//n - i*m//n
    fold = _fill(order, rooms, size)
    for k, own in order.items():                                # what fits nowhere goes where it does least harm
        if k in fold: continue
        fold[k] = min(rooms, key=lambda f: _cost(own, rooms[f], size))
        _take(own, rooms[fold[k]])
    for c in sorted(size):                                      # a fold without one of a class takes the smallest from the fold with the most
        mine = {k: own.total() for k, own in order.items() if c in own}
        held = Counter(fold[k] for k in mine)
        for f in rooms:
            if held[f] or held[most := max(held, key=held.get)] < 2: continue
            moved = min((k for k in mine if fold[k] == most), key=mine.get)
            fold[moved], held[f], held[most] = f, 1, held[most]-1
    return [fold[k] for k in keys]


def class_match(counts: dict[str, dict[str, int]]) -> tuple[str, bool]:
    """How well the shares of the classes in valid match train's, in a sentence, and whether they differ by more than chance (p < .01).

    `counts`: images by class and side. Pearson's χ² on the two rows; where a class is expected fewer than 5 times, p is from 2,000 tables
    with the same sums, not from the distribution."""
    table = np.array([[n[s] for n in counts.values()] for s in ('train', 'valid')])
    if len(counts) < 2 or not table.sum(1).all(): return '', False
    expected = table.sum(1, keepdims=True)*table.sum(0)/table.sum()
    table, expected, names = table[:, table.sum(0) > 0], expected[:, table.sum(0) > 0], [c for c, m in zip(counts, table.sum(0)) if m]
    how = {} if expected.min() >= 5 else dict(method=PermutationMethod(n_resamples=1999, rng=np.random.default_rng(0)))
    test = chi2_contingency(table, correction=False, **how)
    said = f'χ² = {test.statistic:.1f}, p = {test.pvalue:.2g}'
    if test.pvalue >= CHANCE: return f'The classes of valid match those of train ({said}).', False
    far = int((np.abs(table-expected)/np.sqrt(expected))[1].argmax())
    train, valid = (table[:, far]/table.sum(1)).tolist()
    return f'valid and train differ in their classes by more than chance ({said}): {names[far]!r} is {valid:.1%} of valid, {train:.1%} of train'.replace('%', ' %'), True


def _ordered(keys, labels, seed) -> dict[str, Counter]:
    "How many images of each class each key has, in the order that the seed gives the keys."
    held = {}
    for k, c in zip(keys, labels): held.setdefault(k, Counter())[c] += 1
    return {k: held[k] for k in sorted(held, key=lambda k: key_of(seed, 'split', k))}


def _fill(order: dict[str, Counter], rooms: dict, n: Counter) -> dict:
    "A place for each key: the first of `rooms` that it brings nearer to full. Those that fit in none are left out."
    place = {}
    for k, own in order.items():
        if (s := next((s for s in rooms if _cost(own, rooms[s], n) < 0), None)) is not None:
            place[k] = s
            _take(own, rooms[s])
    return place


def _cost(own: Counter, room: dict, n: Counter) -> float:
    "By how much the squared distance to full grows, each class by its size: below 0, it comes nearer."
    return sum(m*(m - 2*room[c])/n[c] for c, m in own.items())


def _take(own: Counter, room: dict):
    for c, m in own.items(): room[c] -= m


def _quota(n: int, share: float, enough: bool) -> int:
    "How many of `n` images a share means: rounded, at least one where there are enough."
    return 0 if not share else max(round(n*Fraction(str(share))), 1 if enough else 0)
