"From a folder of images to fastai `DataLoaders` that know what they hold: classes, splits, what was set aside and why."
import os
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from fastai.data.all import CategoryBlock, DataBlock, DataLoaders, TransformBlock
from fastai.vision.all import IntToFloatTensor, PILImage
from fasttransform import Transform
from PIL import Image

from fastrecipes.arguments import check_types
from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.pixels import RESIZES, Resize, fit_image, read_image
from fastrecipes.data.scan import scan, verdicts
from fastrecipes.data.splits import check_shares, split
from fastrecipes.errors import BadValue, nearest

__all__ = ['image_folder', 'Fit', 'RGBImage', 'Holdings', 'SIDES']

SIDES = ('train', 'valid', 'test')
GIVEN = {'train': 'train', 'training': 'train', 'valid': 'valid', 'val': 'valid', 'validation': 'valid', 'test': 'test'}


class RGBImage(PILImage):
    "An image as `read_image` reads it: upright, 8 bits, RGB."
    @classmethod
    def create(cls, source: Path | str | bytes | np.ndarray | Image.Image, **kwargs):      # the types that `learn.predict` takes
        return cls(read_image(Image.fromarray(source) if isinstance(source, np.ndarray) else source))


class Fit(Transform):
    "Bring an image to `size` (width, height) with the Pillow call that the bundle uses too."
    order = 1
    def __init__(self, size, resize: str = 'crop'): self.size, self.resize = tuple(size), resize
    def encodes(self, x: PILImage): return type(x)(fit_image(x, self.size, self.resize))


@dataclass
class Holdings:
    "What `image_folder` found: counts by class and side, what was set aside, how many files are copies of another."
    path: str
    counts: dict[str, dict[str, int]]
    set_aside: list[tuple[str, str]]
    duplicates: int = 0
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ''


def image_folder(path, *, size: int = 224, bs: int = 64, valid: float = .2, test: float = .1, resize: Resize = 'crop', seed: int = 42,
                 workers: int | None = None, device=None, progress=None) -> DataLoaders:
    """`path/<class>/*` as `DataLoaders` of three loaders (train, valid, test), images `size`×`size` px in [0, 1], not normalised.

    `valid`, `test`: shares of each class, 0–1, held out by (`seed`, content); `path/train`, `valid` and `test` are kept where they
    are given, and what is missing is taken from `train`. `resize`: 'crop', 'squish' or 'pad'. `workers`: processes that decode
    (default: one a core where there is a GPU, else 0). What was found lies in `.holdings`.

    Raises `FileNotFoundError` and `ValueError`: no folder, no images, one class, a class without images, a class only outside
    training, fewer training images than `bs`."""
    check_types(image_folder, locals())
    path = Path(path)
    if resize not in RESIZES: raise BadValue(f'resize: one of {", ".join(RESIZES)}, got {resize!r}{nearest(resize, RESIZES)}')
    if size < 8: raise BadValue(f'size: at least 8 px, got {size}')
    if bs < 1: raise BadValue(f'bs: at least 1, got {bs}')
    check_shares(valid, test)

    files, labels, digests, sides, holdings = _hold(path, valid, test, seed, progress)
    n_train = sides.count('train')
    if bs > n_train: raise BadValue(f'bs: {bs} is more than the {n_train} training images; use bs={max(1, n_train//2)} or less')

    block = DataBlock((TransformBlock(type_tfms=RGBImage.create, batch_tfms=IntToFloatTensor), CategoryBlock(vocab=sorted(set(labels)))),
                      get_y=_ClassOf([*_given(path).values(), path]), splitter=_Sides(sides), item_tfms=Fit((size, size), resize))
    if workers is None: workers = min(16, os.cpu_count()) if torch.cuda.is_available() else 0   # on a CPU they would only slow the model down
    dls = block.dataloaders(files, bs=bs, val_bs=2*bs, num_workers=workers, dl_type=KeyedDL, seed=seed,
                            path=Path('.'), device=device)
    dls.holdings = holdings
    return dls


class _ClassOf:
    "A file's class: the folder right below the first of `roots` that holds it."
    def __init__(self, roots): self.roots = roots
    def __call__(self, file): return next(file.relative_to(r).parts[0] for r in self.roots if file.is_relative_to(r))


class _Sides:
    "A splitter that was told who goes where."
    def __init__(self, sides): self.sides = sides
    def __call__(self, items): return [[i for i, s in enumerate(self.sides) if s == side] for side in SIDES]


def _hold(path, valid, test, seed, progress):
    "Scan, verify and split: files, their labels, digests and sides, and the `Holdings`."
    given = _given(path)
    found = {}                                  # side → {class: files}; '' where the folder is not split
    stray = []
    for side, folder in (given or {'': path}).items():
        found[side], aside = scan(folder)
        stray += aside
    if not any(files for classes in found.values() for files in classes.values()):
        raise BadValue(f'path: no images in {path}; it should hold one folder of images per class, like {path}/cats/1.jpg')
    classes = sorted({c for split_ in found.values() for c in split_})
    verdict = verdicts([p for by_class in found.values() for files in by_class.values() for p in files], progress=progress)

    rows = [(p, c, verdict[p].digest, side) for side, by_class in found.items() for c, files in by_class.items()
            for p in files if not verdict[p].reason]
    set_aside = [(str(p), v.reason) for p, v in verdict.items() if v.reason] + [(str(p), why) for p, why in stray]
    _check_classes(path, classes, rows, given)
    files, labels, digests, sides = map(list, zip(*rows))
    sides = _take_missing(sides, digests, labels, valid, test, seed) if given else split(digests, labels, valid, test, seed)
    if 'valid' not in sides:
        raise BadValue(f'valid: no image is left to validate on with valid={valid}; give each class at least 2 images and a share above 0')
    counts = {c: {s: 0 for s in SIDES} for c in classes}
    for c, s in zip(labels, sides): counts[c][s] += 1
    holdings = Holdings(str(path), counts, sorted(set_aside), duplicates=len(digests)-len(set(digests)),
                        notes=_notes(counts, digests, labels, sides), fingerprint=_fingerprint(digests, labels))
    return files, labels, digests, sides, holdings


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
        if given and c not in trained: raise BadValue(f'path: class {c!r} is in {path} but not in its train folder: nothing to learn it from')


def _take_missing(sides, digests, labels, valid, test, seed):
    "Take from the given training folder the sides that were not given."
    want = {'valid': 0 if 'valid' in sides else valid, 'test': 0 if 'test' in sides else test}
    inside = [i for i, s in enumerate(sides) if s == 'train']
    for i, s in zip(inside, split([digests[i] for i in inside], [labels[i] for i in inside], seed=seed, **want)): sides[i] = s
    return sides


def _notes(counts, digests, labels, sides) -> list[str]:
    "What a careful reader should know about these data."
    notes = [f'class {c!r} has no image in {s}: too few images' for c, n in counts.items() for s in ('valid', 'test')
             if not n[s] and any(m[s] for m in counts.values())]
    where, named = {}, {}
    for d, c, s in zip(digests, labels, sides):
        where.setdefault(d, set()).add(s)
        named.setdefault(d, set()).add(c)
    if leaks := sum(len(s) > 1 for s in where.values()): notes.append(f'{leaks} images lie in more than one of train, valid and test')
    if both := sum(len(c) > 1 for c in named.values()): notes.append(f'{both} images carry more than one label')
    return notes


def _fingerprint(digests, labels) -> str:
    return blake2b('\n'.join(sorted(f'{c}/{d}' for c, d in zip(labels, digests))).encode(), digest_size=16).hexdigest()
