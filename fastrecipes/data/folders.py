"From a folder of images to fastai `DataLoaders` that know what they hold: classes, splits, what was set aside and why."
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from fastai.data.all import CategoryBlock, DataBlock, DataLoaders, TransformBlock
from fastai.vision.all import IntToFloatTensor

from fastrecipes.arguments import checked
from fastrecipes.data.assignments import GIVEN, Assignment, assigned, grouped
from fastrecipes.data.cache import cached
from fastrecipes.data.duplicates import near_pairs
from fastrecipes.data.images import Fit, RGBImage
from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.pixels import RESIZES, Resize
from fastrecipes.data.scan import no_images, scan, verdicts
from fastrecipes.data.splits import SIDES, belonging, check_shares, class_match, split
from fastrecipes.errors import BadValue, nearest

__all__ = ['Found', 'Holdings', 'image_folder']

NearDuplicates = Literal['warn', 'together']


@dataclass
class Holdings:
    "What `image_folder` found: counts by class and side, what was set aside, how many files are copies of another, how alike train and valid are."
    path: str
    counts: dict[str, dict[str, int]]
    set_aside: list[tuple[str, str]]
    duplicates: int = 0
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ''
    match: str = ''


@dataclass
class Found:
    """The usable images of a folder, one place in each list for each: `files`, their classes, digests, given sides ('' where the folder gives
    none), what each belongs to (see `belonging`), and the pairs of near-duplicates among them `(m, 2)`."""
    path: Path
    files: list[Path]
    labels: list[str]
    digests: list[str]
    sides: list[str]
    keys: list[str]
    near: np.ndarray
    set_aside: list[tuple[str, str]]
    notes: list[str]

    def name(self, i: int) -> str:
        "How messages call an image."
        return self.files[i].relative_to(self.path).as_posix()

    def part(self, kept: list[bool]) -> 'Found':
        "Those images alone that are `kept`."
        if all(kept): return self
        new, own = np.cumsum(kept)-1, {n: [o for o, k in zip(getattr(self, n), kept) if k] for n in ('files', 'labels', 'digests', 'sides', 'keys')}
        return replace(self, near=new[self.near[np.asarray(kept)[self.near].all(1)]], **own)

    def split(self, valid: float, test: float, seed: int) -> list[str]:
        "A side for each: the given one where there are any, and what those lack is taken from `train`."
        if not any(self.sides): return split(self.keys, self.labels, valid, test, seed)
        want = {'valid': 0 if 'valid' in self.sides else valid, 'test': 0 if 'test' in self.sides else test}
        sides, inside = list(self.sides), [i for i, s in enumerate(self.sides) if s == 'train']
        for i, s in zip(inside, split([self.keys[i] for i in inside], [self.labels[i] for i in inside], seed=seed, **want)): sides[i] = s
        return sides

    def holdings(self, sides: list[str]) -> Holdings:
        "What there is on each side."
        counts = {c: {s: 0 for s in SIDES} for c in sorted(set(self.labels))}
        for c, s in zip(self.labels, sides): counts[c][s] += 1
        match, differs = class_match(counts)
        notes = [*self.notes, *_notes(counts, self.digests, self.labels, sides), *_lookalikes(self, sides), *([match] if differs else [])]
        return Holdings(str(self.path), counts, self.set_aside, len(self.digests)-len(set(self.digests)), notes, _fingerprint(self.digests, self.labels), match)


@checked
def image_folder(path, *, size: int = 224, bs: int = 64, valid: float | list[str] | str | Callable = .2, test: float = .1, groups: str | Callable | None = None,
                 near_duplicates: NearDuplicates = 'warn', resize: Resize = 'crop', seed: int = 42, workers: int | None = None, cache: bool | str = False,
                 device=None, progress=None) -> DataLoaders:
    """`path/<class>/*` as `DataLoaders` of three loaders (train, valid, test), images `size`×`size` px in [0, 1], not normalised.

    `valid`, `test`: shares of each class, 0–1, held out by (`seed`, content); `path/train`, `valid` and `test` are kept where they
    are given, and what is missing is taken from `train`. `resize`: 'crop', 'squish' or 'pad'. `workers`: processes that decode
    (default: one a core where there is a GPU, else 0). `cache`: decode every image once, into a file in the user's cache folder or
    the one named (see `cached`). What was found lies in `.holdings`.

    `valid` may also be the files that validate, names relative to `path`; a CSV with the columns file and split (train, valid or test)
    that lists every image, and decides alone; or a function of the file that gives True, False or a side. `groups`: who or what is in the picture, and
    never on two sides: a regular expression (its group, or all that matches, in the name relative to `path`; a file that it does not match is
    alone), a column of the CSV, or a function of the file (None: alone). Pictures that look the same (see `near_pairs`) are kept
    on one side, too, with `near_duplicates='together'`; with 'warn', `.holdings.notes` tell of those on two sides, and of those with two labels.

    Raises `FileNotFoundError` and `ValueError`: no folder, no images, one class, a class without images, a class only outside
    training, fewer training images than `bs`; files that are not there or not listed, a group that was given two sides."""
    check_loaders(size, bs, resize)
    found, sides = found_and_split(path, valid, test, groups, near_duplicates, seed, progress)
    dls = loaders_of(found, sides, size=size, bs=bs, resize=resize, seed=seed, workers=workers, device=device)
    if not cache: return dls
    held, effect = cached(dls, None if cache is True else cache)
    if held is dls: print(f'cache: {effect}')
    return held


def found_and_split(path, valid=.2, test: float = .1, groups=None, near_duplicates: NearDuplicates = 'warn', seed: int = 42, progress=None) -> tuple[Found, list[str]]:
    "The images of a folder and the side of each, by the arguments of `image_folder`."
    check_shares(0 if (explicit := assigned(valid)) else valid, test)
    found = found_in(path, valid if explicit else None, groups, near_duplicates, progress)
    if isinstance(valid, (str, Path)): test = 0.               # a CSV says it of every image
    sides = found.split(0 if explicit else valid, test, seed)
    if 'valid' not in sides:
        way = 'name at least one that is there' if explicit else 'give each class at least 2 images and a share above 0'
        raise BadValue(f'valid: no image is left to validate on with valid={_shown(valid)}; {way}')
    return found, sides


def _shown(valid) -> str: return getattr(valid, '__name__', None) or f'[{len(valid)} files]' if not isinstance(valid, (int, float, str)) else repr(valid)


def check_loaders(size: int, bs: int, resize: str):
    "Raise for what no loader can be made with."
    if resize not in RESIZES: raise BadValue(f'resize: one of {", ".join(RESIZES)}, got {resize!r}{nearest(resize, RESIZES)}')
    if size < 8: raise BadValue(f'size: at least 8 px, got {size}')
    if bs < 1: raise BadValue(f'bs: at least 1, got {bs}')


def loaders_of(found: Found, sides: list[str], *, size: int = 224, bs: int = 64, resize: Resize = 'crop', seed: int = 42, workers: int | None = None,
               device=None) -> DataLoaders:
    "`found` as `DataLoaders`, with the images on the `sides` given. Raises `ValueError` where `bs` leaves no training batch."
    n_train = sides.count('train')
    if bs > n_train: raise BadValue(f'bs: {bs} is more than the {n_train} training images; use bs={max(1, n_train//2)} or less')
    block = DataBlock((TransformBlock(type_tfms=RGBImage.create, batch_tfms=IntToFloatTensor), CategoryBlock(vocab=sorted(set(found.labels)))),
                      get_y=_ClassOf([*_given(found.path).values(), found.path]), splitter=_Sides(sides), item_tfms=Fit((size, size), resize))
    if workers is None: workers = min(16, os.cpu_count()) if torch.cuda.is_available() else 0   # on a CPU they would only slow the model down
    dls = block.dataloaders(found.files, bs=bs, val_bs=2*bs, num_workers=workers, dl_type=KeyedDL, seed=seed,
                            path=Path('.'), device=device)
    dls.holdings = found.holdings(sides)
    return dls


class _ClassOf:
    "A file's class: the folder right below the first of `roots` that holds it."
    def __init__(self, roots): self.roots = roots
    def __call__(self, file): return next(file.relative_to(r).parts[0] for r in self.roots if file.is_relative_to(r))


class _Sides:
    "A splitter that was told who goes where."
    def __init__(self, sides): self.sides = sides
    def __call__(self, items): return [[i for i, s in enumerate(self.sides) if s == side] for side in SIDES]


def found_in(path, valid=None, groups=None, near_duplicates: NearDuplicates = 'warn', progress=None) -> Found:
    "Scan and verify `path`, and find who belongs together. `valid`, `groups`, `near_duplicates`: as `image_folder` takes them, no share."
    path, choices = Path(path), get_args(NearDuplicates)
    if near_duplicates not in choices: raise BadValue(f'near_duplicates: one of {", ".join(choices)}, got {near_duplicates!r}{nearest(near_duplicates, choices)}')
    given = _given(path)
    if given and valid is not None: raise BadValue(f'valid: {path} has folders {", ".join(d.name for d in given.values())}, which say who validates; give one or the other')
    found = {}                                  # side → {class: files}; '' where the folder is not split
    stray = []
    for side, folder in (given or {'': path}).items():
        found[side], aside = scan(folder)
        stray += aside
    if not any(files for classes in found.values() for files in classes.values()): raise no_images(path)
    classes = sorted({c for split_ in found.values() for c in split_})
    told = Assignment(path, [p for by_class in found.values() for files in by_class.values() for p in files], valid)     # before anything is decoded
    of = grouped(groups, told)
    verdict = verdicts(told.files, progress=progress)

    rows = [(p, c, verdict[p].digest, told.side(p) or side) for side, by_class in found.items() for c, files in by_class.items()
            for p in files if not verdict[p].reason]
    set_aside = [(str(p), v.reason) for p, v in verdict.items() if v.reason] + [(str(p), why) for p, why in stray]
    _check_classes(path, classes, rows, given or valid is not None)
    files, labels, digests, sides = map(list, zip(*rows))
    named, notes = None, []
    if groups is not None:
        named = [of(p) for p in files]
        if all(g is None for g in named):
            columns = list(next(iter(told.rows.values()), ()))
            or_column = f', or name a column of {valid}: {", ".join(columns)}{nearest(groups, columns).rstrip(";")}' if columns and isinstance(groups, str) else ''
            raise BadValue(f'groups: {groups!r} finds no group in any name, such as {told.name(files[0])}; it should match a part of it{or_column}')
        if alone := [told.name(p) for p, g in zip(files, named) if g is None]: notes = [f'{len(alone)} images are of no group, such as {alone[0]}']
    _, first = np.unique(digests, return_index=True)
    first.sort()                                # one of each that are equal byte by byte
    near = first[near_pairs([verdict[files[i]].phash for i in first])]
    keys = belonging(digests, named, near if near_duplicates == 'together' else ())
    if named and any(sides): _check_groups(told, files, sides, named)
    return Found(path, files, labels, digests, sides, keys, near, sorted(set_aside), notes)


def _given(path: Path) -> dict[str, Path]:
    "The `train`, `valid` and `test` folders of `path` by side, if it has a `train` and at least one of the others."
    if not path.is_dir(): return {}
    dirs = {GIVEN[d.name.lower()]: d for d in path.iterdir() if d.is_dir() and d.name.lower() in GIVEN}
    return {s: dirs[s] for s in SIDES if s in dirs} if 'train' in dirs and len(dirs) > 1 else {}


def _check_classes(path, classes, rows, given):
    "Raise for a class that cannot be learnt."
    usable = Counter(c for _, c, *_ in rows)
    trained = {c for _, c, _, side in rows if side in ('', 'train')}
    if len(classes) == 1: raise BadValue(f'path: only one class, {classes[0]!r}, in {path}; a classifier needs at least two folders')
    for c in classes:
        if not usable[c]: raise BadValue(f'path: class {c!r} of {path} has no readable image; remove its folder or add images')
        if isinstance(given, dict) and given and c not in trained: raise BadValue(f'path: class {c!r} is in {path} but not in its train folder: nothing to learn it from')
        if given and c not in trained: raise BadValue(f'valid: it leaves no image of class {c!r} to train on; leave one, or its folder out')


def _check_groups(told, files, sides, named):
    "Raise where those who said who validates have put one group on two sides."
    where = {}
    for p, s, g in zip(files, sides, named):
        other, there = where.setdefault(g, (p, s)) if g is not None else (p, s)
        if there != s: raise BadValue(f'groups: {g!r} is on two sides: {told.name(other)} in {there or "train"}, {told.name(p)} in {s or "train"}; give all of a group the same')


def _notes(counts, digests, labels, sides) -> list[str]:
    "What a careful reader should know about these data."
    notes = [f'class {c!r} has no image in {s}: too few images' for c, n in counts.items() for s in ('valid', 'test')
             if not n[s] and any(m[s] for m in counts.values())]
    where, named = {}, {}
    for d, c, s in zip(digests, labels, sides):
        where.setdefault(d, set()).add(s)
        named.setdefault(d, set()).add(c)
    if leaks := sum(len(s) > 1 for s in where.values()): notes.append(f'{leaks} images lie in more than one of train, valid and test')
    both = [' and '.join(sorted(c)) for c in named.values() if len(c) > 1]
    if both: notes.append(f'{len(both)} image{"s"*(len(both) > 1)} in more than one class, such as one in {both[0]}: remove the copies that are wrong')
    return notes


def _lookalikes(found: Found, sides) -> list[str]:
    "Near-duplicates that lie on two sides, and those that have two labels."
    apart = [(i, j) for i, j in found.near.tolist() if sides[i] != sides[j]]
    torn = [(i, j) for i, j in found.near.tolist() if found.labels[i] != found.labels[j]]
    notes = []
    if apart:
        i, j = apart[0]
        leaked, held = {k for pair in apart for k in pair if sides[k] != 'train'}, sum(s != 'train' for s in sides)
        notes.append(f'leakage: {len(leaked)} of the {held} images held out look like one on another side, such as {found.name(i)} ({sides[i]}) and {found.name(j)} ({sides[j]}): '
                     'they are easier than new ones; near_duplicates=\'together\' keeps them on one side')
    if torn: notes.append(f'{len(torn)} pairs of images look alike and have different labels, such as {found.name(torn[0][0])} and {found.name(torn[0][1])}')
    return notes


def _fingerprint(digests, labels) -> str:
    return blake2b('\n'.join(sorted(f'{c}/{d}' for c, d in zip(labels, digests))).encode(), digest_size=16).hexdigest()
