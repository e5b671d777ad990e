"Images decoded once: every later epoch, process and run takes whole batches of pixels from memory, without workers."
import re
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType

import numpy as np
import PIL
import torch
from fastai.basics import DataLoaders, Learner
from fastai.data.core import Datasets, TfmdDL
from fastai.data.load import fa_collate
from fastai.data.transforms import Categorize, ToTensor
from fastai.vision.augment import Resize
from fastai.vision.core import AddMaskCodes, PILBase
from fastcore.xdg import xdg_cache_home
from fasttransform import Pipeline
from fasttransform.cast import retain_type
from fasttransform.transform import compose_tfms
from torch.utils.data import Subset, TensorDataset

from fastrecipes.data.decoded import NoRoom, decode_once
from fastrecipes.data.images import Fit, RGBImage
from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.data.memory import InPlace, recycled
from fastrecipes.data.pixels import fit_image, read_image
from fastrecipes.errors import BadValue
from fastrecipes.files import in_bytes
from fastrecipes.technique import say, technique

__all__ = ['CachedDL', 'cached']

SAME = (ToTensor, Fit, Resize, AddMaskCodes)        # item transforms that touch pictures only, and give the same at each call (Resize: as it validates)


class Pixels:
    "One element of a dataset's samples, pictures: that of sample i lies in row `rows[i]` of the array in `file`, which each process maps for itself."
    def __init__(self, file: Path, like: torch.Tensor, rows): self.file, self.like, self.rows, self._array = file, like, np.asarray(rows, dtype=np.int64), None

    def take(self, idx: np.ndarray):
        if self._array is None: self._array = np.asarray(np.load(self.file, mmap_mode='r'))
        out = recycled((len(idx), *self._array.shape[1:]), torch.uint8)
        np.take(self._array, self.rows[idx], 0, out.numpy(), mode='clip')       # any other mode takes memory of its own
        return retain_type(out, self.like)

    def __getstate__(self): return {**vars(self), '_array': None}


class Values:
    "Another element of a dataset's samples, all of them collated; classes looked up without the dispatch of each."
    def __init__(self, tl):
        *before, last = tl.tfms.fs
        if type(last) is not Categorize: self.values = retain_type(fa_collate(items := list(tl)), items[0])
        else: self.values = retain_type(torch.tensor([last.vocab.o2i[compose_tfms(item, before)] for item in tl.items]), tl[0])

    def take(self, idx: np.ndarray): return self.values[torch.from_numpy(idx)]


class CachedDL(KeyedDL):
    """A `KeyedDL` whose batches are taken whole from `columns`, one a sample's element, instead of item by item from its dataset.

    For another dataset (`test_dl`, `predict`, an exported Learner) its `new` is a plain `KeyedDL` again."""
    def __init__(self, *args, columns=None, sizes=None, workers: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.columns, self.sizes, self.workers = columns, sizes or {}, workers
        self.after_batch = InPlace(self.after_batch, split_idx=self.after_batch.split_idx)

    def new(self, dataset=None, cls=None, **kwargs):
        if dataset is not None and dataset is not self.dataset: return super().new(dataset, cls or KeyedDL, **{'num_workers': self.workers, **kwargs})
        ours = dict(columns=self.columns, sizes=self.sizes, workers=self.workers) if issubclass(cls or type(self), CachedDL) else {}
        return super().new(dataset, cls, **{**ours, **kwargs})

    def create_batches(self, samps):
        if self.columns is None: yield from super().create_batches(samps)
        else:
            for draws in self.chunkify(samps):
                idx = np.asarray(draws) % len(self.dataset)
                yield tuple(c.take(idx) for c in self.columns)

    def sized(self, size: int) -> 'CachedDL':
        "The same loader with its images at `size`×`size` px. Raises `ValueError` unless `cached` was asked for that size too."
        if size not in self.sizes: raise BadValue(f'size: one of {", ".join(map(str, self.sizes)) or "none"} px, which were cached, got {size}')
        fits = [Fit((size, size), t.resize) if isinstance(t, Fit) else t for t in self.after_item.fs]
        return self.new(columns=self.sizes[size], after_item=Pipeline(fits))


def cached(dls: DataLoaders, folder=None, sizes: list[int] | None = None, workers: int | None = None) -> tuple[DataLoaders, str]:
    """`dls` with every image decoded once, for good, and what was done in a sentence.

    `folder`: where the files of pixels lie (default: `fastrecipes/pixels` in the user's cache folder). `sizes`: further sizes in px, for
    `CachedDL.sized`. Where there is nothing to decode, or no room on the disk, `dls` come back as they were. Raises `ValueError` for
    pictures that may not be the same in every epoch."""
    folder = Path(folder) if folder else xdg_cache_home()/'fastrecipes'/'pixels'
    loaders = [dl for dl in dls.loaders if _has_pictures(dl)]
    if not loaders: return dls, 'there is nothing to decode: the samples are in memory'
    recipes = [{size: _recipes(dl, size) for size in (None, *(sizes or ()))} for dl in loaders]
    decoded = {}
    try:
        for how, (decode, paths) in _asked(recipes).items():
            file = decode_once(ordered := sorted(paths), how, decode, folder, workers)
            decoded[how] = file, {f: i for i, f in enumerate(ordered)}
    except NoRoom as e: return dls, f'{e}; images are decoded in every epoch'
    new = copy(dls)
    new.loaders = list(dls.loaders)
    for dl, by_size in zip(loaders, recipes):
        values = {j: Values(tl) for j, tl in enumerate(dl.dataset.tls) if j not in by_size[None]}
        columns = {size: [values[j] if j in values else own[j].column(decoded) for j in range(len(dl.dataset.tls))] for size, own in by_size.items()}
        ours = dict(columns=columns.pop(None), sizes=columns, workers=dl.fake_l.num_workers, num_workers=0)
        new.loaders[dls.loaders.index(dl)] = dl.new(cls=CachedDL, **ours)
    return new, f'{sum(len(rows) for _, rows in decoded.values()):,} images decoded once, {in_bytes(sum(f.stat().st_size for f, _ in decoded.values()))} of pixels'


def _has_pictures(dl) -> bool:
    "Whether the samples of `dl` hold pictures that are read from files. Raises where that cannot be told."
    if not isinstance(dl, TfmdDL): raise BadValue(f'cache: needs fastai loaders, got {type(dl).__name__}; give torch datasets and loaders to `as_dataloaders`')
    data = dl.dataset
    if (torchs := vars(data).get('dataset')) is not None and not _in_memory(torchs):        # `Indexed` has it
        raise BadValue(f'cache: {type(torchs).__name__} decodes by itself, and nothing says whether it gives the same in every epoch; give the folder of images to `image_folder`')
    return isinstance(data, Datasets) and len(data) > 0 and any(_maker(tl) is not None for tl in data.tls)


def _in_memory(dataset) -> bool:
    while isinstance(dataset, Subset): dataset = dataset.dataset
    return isinstance(dataset, (TensorDataset, list)) or isinstance(getattr(dataset, 'data', None), (torch.Tensor, np.ndarray))


@dataclass
class Recipe:
    "How the pictures of one element of the samples become pixels: `how` says it in words, `decode(file)` does it, and `like` is one of them."
    how: str
    decode: Callable[[Path], np.ndarray]
    like: torch.Tensor
    files: list[Path]

    def column(self, decoded: dict[str, tuple]) -> Pixels:
        file, row = decoded[self.how]
        return Pixels(file, self.like, [row[f] for f in self.files])


def _recipes(dl, size: int | None) -> dict[int, Recipe]:
    "The recipe of each element of the samples that is a picture, by its place; at `size`×`size` px, or as the loader has it."
    for t in dl.after_item.fs:
        if type(t) not in SAME: raise BadValue(f'cache: the item transform {_name(t)} may give something else in every epoch; draw at random in batch transforms, such as augment')
    if dl.before_batch.fs or not isinstance(dl.create_batch, MethodType): raise BadValue('cache: takes whole batches, and this loader makes its own, by before_batch or create_batch')
    after = list(dl.after_item.fs)
    if size is not None:
        if not any(isinstance(t, Fit) for t in after): raise BadValue('cache: sizes are for the data of image_folder, others say in their own way how a picture gets its size')
        after = [Fit((size, size), t.resize) if isinstance(t, Fit) else t for t in after]
    return {j: _recipe(tl, k, after) for j, tl in enumerate(dl.dataset.tls) if (k := _maker(tl)) is not None}


def _maker(tl) -> int | None:
    "Which of the transforms of `tl` makes a picture from a file; None where none does."
    value = tl.items[0]
    for k, t in enumerate(tl.tfms.fs):
        source, value = value, t(value)
        if isinstance(value, PILBase): return k if isinstance(source, (str, Path)) else None


def _recipe(tl, k: int, after) -> Recipe:
    "`tl`'s transforms from number `k` on, and `after`."
    fs = list(tl.tfms.fs)
    source = compose_tfms(tl.items[0], fs[:k])
    make, finish = Pipeline(fs[k:]), Pipeline(after)
    finish.split_idx = 1                        # fastai's Resize cuts the middle out then, and a random part for training
    if [t.name for t in fs[k:]] == [RGBImage.create.__qualname__] and [type(t) for t in after] == [Fit, ToTensor]:
        decode = partial(_quickly, fit=after[0])
    else: decode = lambda file: finish(make(file)).numpy()
    sample = finish(picture := make(source))
    if not isinstance(sample, torch.Tensor) or sample.dtype != torch.uint8: raise BadValue(f'cache: keeps pixels of 8 bits, got {getattr(sample, "dtype", type(sample).__name__)}')
    how = ' | '.join([type(picture).__qualname__, *map(_words, [*fs[k:], *after]), f'Pillow {PIL.__version__}'])     # all kinds of PILBase share one `create`
    return Recipe(how, decode, sample, [Path(compose_tfms(item, fs[:k])) for item in tl.items])


def _quickly(file: Path, fit: Fit) -> np.ndarray:
    "What `image_folder`'s own transforms give, without the dispatch of each, which takes four times as long as a small image."
    return np.asarray(fit_image(read_image(file), fit.size, fit.resize)).transpose(2, 0, 1)


def _name(t) -> str: return re.split(r'[ (]', t.name)[0]


def _words(t) -> str:
    "A transform and its settings: two that read alike do alike."
    plain = {k: v for k, v in sorted(vars(t).items()) if isinstance(v, (bool, int, float, str, tuple)) and k not in ('split_idx', 'order')}
    return f'{type(t).__module__}.{type(t).__qualname__} {_name(t)} {plain}'


def _asked(recipes) -> dict[str, tuple[Callable, set]]:
    "By `how`: the way to decode, and the files of all loaders."
    asked = {}
    for r in (r for by_size in recipes for own in by_size.values() for r in own.values()): asked.setdefault(r.how, (r.decode, set()))[1].update(r.files)
    return asked


@technique('data', section='Loading', source='arXiv:2306.12517', before=('normalize',))
def cache(self: Learner, folder: str | None = None, sizes: list[int] | None = None) -> Learner:
    """Decode every image once, into a file of pixels that later epochs, processes and runs take whole batches from.

    `folder`: where these files lie (default: `fastrecipes/pixels` in the user's cache folder; delete them when you like). `sizes`: further
    sizes in px to keep beside, for training that begins with small images. A file is found again as long as images and resizing are the same,
    and what it takes (3·height·width bytes an image) is said before; where the disk is too full, images are decoded in every epoch. Results are
    the same to the bit. Raises `ValueError` where item transforms draw at random (fastai's `Resize` then cuts the middle out in training too)."""
    loaders, effect = cached(self.dls, folder, sizes)
    done, drawn = loaders is not self.dls, isinstance(self.dls.train, KeyedDL)
    seed = keyed(self).seed
    if done:
        self.dls = loaders
        if not drawn: loaders.train.seed = seed
    say(self, 'cache', effect, aloud=not done)
    return self
