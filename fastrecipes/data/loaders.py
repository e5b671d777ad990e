"Whatever holds the data, as fastai `DataLoaders`: a folder, torch datasets, torch loaders; and the labels they hold."
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from fastai.basics import noop
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.core import Tabular
from fastai.torch_core import TensorImage, to_device
from fasttransform import Pipeline
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset, TensorDataset

from fastrecipes.data.folders import image_folder
from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.splits import split
from fastrecipes.errors import BadValue
from fastrecipes.randomness import forked

__all__ = ['as_dataloaders', 'batch_size_of', 'first_sample', 'in_order', 'labels_of', 'samples', 'shapes', 'unvaried', 'Indexed']


class Indexed:
    """A torch dataset of (input, class) as fastai expects one: it knows its classes and its loss, and can be emptied for `export`.

    Pictures, Pillow's or floating-point tensors `(c, h, w)`, come out as `TensorImage`: fastai's transforms pass over plain tensors."""
    loss_func = CrossEntropyLossFlat()
    def __init__(self, dataset, vocab=None):
        self.dataset = dataset
        self.vocab = list(vocab if vocab is not None else _classes(dataset))
    def __len__(self): return len(self.dataset)
    def __getitem__(self, i):
        x, y = self.dataset[i]
        if isinstance(x, Image.Image): x = torch.from_numpy(np.array(x.convert('RGB'))).permute(2, 0, 1).float()/255
        if isinstance(x, torch.Tensor) and x.ndim == 3 and x.is_floating_point(): x = TensorImage(x)
        return x, torch.as_tensor(y)
    def new_empty(self): return type(self)([], self.vocab)

    @property
    def whole(self) -> bool:
        "Whether `batch` can take samples out of two tensors, all at once."
        d, _ = self._rows()
        return type(d) is TensorDataset and len(d.tensors) == 2

    def batch(self, indices: list[int]):
        "These samples, collated."
        d, rows = self._rows()
        at = torch.tensor(indices if rows is None else [rows[i] for i in indices])
        x, y = (t[at] for t in d.tensors)
        return (TensorImage(x) if x.ndim == 4 and x.is_floating_point() else x), y

    def _rows(self) -> tuple:
        "The dataset that holds the samples, and which of them are meant, in order; None for all."
        return (self.dataset.dataset, self.dataset.indices) if type(self.dataset) is Subset else (self.dataset, None)


class _Given:
    "A torch sampler of the user's: it draws as it always did."
    def __init__(self, sampler): self.sampler = sampler
    def __len__(self): return len(self.sampler)
    def draw(self, rng): return list(self.sampler)


def as_dataloaders(data, *, bs: int = 64, valid: float = .2, test: float = .1, seed: int = 42, **folder) -> DataLoaders:
    """`data` as fastai `DataLoaders`: a folder of images (see `image_folder`), `DataLoaders`, one torch `Dataset` (split here), or
    a tuple (train, valid[, test]) of torch `Dataset`s or `DataLoader`s. Raises `ValueError` for anything else."""
    if isinstance(data, (str, Path)): return image_folder(data, bs=bs, valid=valid, test=test, seed=seed, **folder)
    if isinstance(data, DataLoaders):
        return data if all(isinstance(dl, TfmdDL) for dl in data.loaders) else _from_parts(data.loaders, bs, seed)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        sides = split([str(i) for i in range(len(data))], [str(y) for y in labels_of(data)], valid, test, seed)
        return _from_parts([Subset(data, [i for i, s in enumerate(sides) if s == side]) for side in ('train', 'valid', 'test')], bs, seed)
    if isinstance(data, (tuple, list)) and len(data) > 1 and all(isinstance(o, (Dataset, DataLoader)) for o in data):
        return _from_parts(data, bs, seed)
    raise BadValue(f'path: a folder, fastai DataLoaders, a torch Dataset, or a tuple (train, valid[, test]) of these or of torch '
                   f'DataLoaders, got {type(data).__name__}' + ('; its data are its .dls' if hasattr(data, 'dls') else ''))


def _from_parts(parts, bs, seed) -> DataLoaders:
    sets = [p.dataset if isinstance(p, DataLoader) else p for p in parts]
    if any(isinstance(s, IterableDataset) for s in sets): raise BadValue('path: an IterableDataset has no samples to index; pass map-style datasets')
    vocab = _classes(sets[0])
    loaders = [_loader(p, i == 0, bs, seed, vocab) for i, p in enumerate(parts)]
    if len(loaders[0]) == 0: raise BadValue(f'bs: {loaders[0].bs} is more than the {len(loaders[0].dataset)} training samples')
    return DataLoaders(*loaders, device=torch.device('cuda') if torch.cuda.is_available() else torch.device('cpu'))


def _loader(part, train: bool, bs: int, seed: int, vocab) -> KeyedDL:
    "One torch dataset or loader as a `KeyedDL`; a loader keeps its batch size, order and collation."
    if not isinstance(part, DataLoader): return KeyedDL(Indexed(part, vocab), bs, seed=seed, shuffle=train, drop_last=train, num_workers=0)
    random = isinstance(part.sampler, RandomSampler)
    own = None if random or isinstance(part.sampler, SequentialSampler) else _Given(part.sampler)
    kw = {} if part.collate_fn is torch.utils.data.default_collate else {'create_batch': part.collate_fn}
    return KeyedDL(Indexed(part.dataset, vocab), part.batch_size, seed=seed, sampler=own, shuffle=random or own is not None,
                   drop_last=part.drop_last, num_workers=part.num_workers, **kw)


def _classes(dataset) -> list:
    "The names of a dataset's classes: its own, else the numbers up to the largest label."
    while isinstance(dataset, Subset): dataset = dataset.dataset
    if (names := getattr(dataset, 'classes', None)) is not None: return list(names)
    return list(range(int(max(labels_of(dataset)))+1)) if len(dataset) else []


def in_order(dl: TfmdDL, like: TfmdDL) -> TfmdDL:
    "A loader of the samples of `dl`, all, in their order, with the transforms of `like` as validation has them; go through it `with unvaried(dl.dataset)`."
    new = dl.new(shuffle=False, drop_last=False)
    for name in ('after_item', 'before_batch', 'after_batch'): setattr(new, name, Pipeline(list(getattr(like, name).fs), split_idx=1))
    new.before_iter = noop                      # fastai's would tell the transforms that this is the training set
    return new


def unvaried(dataset):
    "A block in which a dataset gives its samples as validation has them, where its own transforms vary them."
    return getattr(dataset, 'set_split_idx', lambda i: nullcontext())(1)


def batch_size_of(dl) -> int | None:
    "How many samples a loader of fastai or torch puts into a batch; None where it does not say."
    return getattr(dl, 'bs', None) or getattr(dl, 'batch_size', None)


def samples(dl, n: int, spread: bool = False):
    """The first `n` samples as a batch, or `n` `spread` evenly over all, made in this process as the loader would, and only as many as there are;
    None where it takes an iteration to know."""
    if isinstance(dl, TfmdDL) and dl.indexed and not dl.prebatched and len(dl.dataset):
        dl.before_iter()                                # tells its transforms which side this is; each iteration does
        b = dl.do_batch([o for i in _rows(len(dl.dataset), n, spread) if (o := dl.do_item(i)) is not None])
        return dl.after_batch(b if dl.device is None else to_device(b, dl.device))
    if isinstance(dl, DataLoader) and not isinstance(dl.dataset, IterableDataset) and dl.batch_size and len(dl.dataset):
        return dl.collate_fn([dl.dataset[i] for i in _rows(len(dl.dataset), n, spread)])


def _rows(total: int, n: int, spread: bool): return [i*total//n for i in range(n)] if spread and total > n else range(min(n, total))


def first_sample(dls: DataLoaders) -> tuple[tuple, tuple] | None:
    "(inputs, targets) of the first training sample, as a batch of one; None where it takes an iteration to know. No draw is felt outside."
    with forked('glance'): b = samples(dls.train, 1)
    if b is None: return None
    i = getattr(dls, 'n_inp', 1 if len(b) == 1 else len(b)-1)
    return tuple(b[:i]), tuple(b[i:])


def shapes(batch) -> str:
    "The shapes of a batch's tensors in words: `(n, 3, 16, 16), (n, 2)`."
    return ', '.join(f'({", ".join(["n", *map(str, x.shape[1:])])})' for x in batch)


def labels_of(data, who: str = 'labels') -> np.ndarray:
    """The class index of each sample of a dataset or loader `(n,)`, in order, without decoding inputs where the dataset allows.

    Raises `ValueError`, in the name of `who`, where a sample has no single class."""
    if isinstance(data, (TfmdDL, DataLoader)): return labels_of(data.dataset, who)
    if isinstance(data, Indexed): return labels_of(data.dataset, who)
    if isinstance(data, Subset): return labels_of(data.dataset, who)[list(data.indices)]
    if isinstance(data, Tabular): values = list(data.targ.to_numpy().squeeze(1)) if len(data.y_names) == 1 else [None]
    elif isinstance(data, Datasets): values = list(data.tls[-1])
    elif (targets := getattr(data, 'targets', None)) is not None: values = list(targets)
    elif (tensors := getattr(data, 'tensors', None)) is not None: values = list(tensors[-1])
    else: values = [data[i][-1] for i in range(len(data))]
    try: labels = np.array([int(v) for v in values])
    except (TypeError, ValueError, RuntimeError): labels = None
    if labels is None or any(isinstance(v, (float, np.floating)) or getattr(v, 'is_floating_point', bool)() for v in values[:1]):
        raise BadValue(f'{who}: each sample must have one class (an integer); multi-label, regression and segmentation data have none')
    return labels
