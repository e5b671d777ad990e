"Images without labels, labelled by a network: what it answers, which answers are trained on, and loaders that mix them with true labels."
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from fastai.basics import DataLoaders, Learner
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize, get_image_files
from fastai.losses import CrossEntropyLossFlat
from fasttransform import Transform
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Sampler, TensorDataset

from fastrecipes.data.duplicates import near_pairs
from fastrecipes.data.keyed import KeyedDL, keyed_kind, with_train
from fastrecipes.data.loaders import Indexed, labels_of
from fastrecipes.data.scan import verdicts
from fastrecipes.data.splits import SIDES
from fastrecipes.errors import BadValue, NotThere, few
from fastrecipes.losses.base import by_class
from fastrecipes.losses.classification import classes_of, cross_entropy_of, soft_cross_entropy
from fastrecipes.randomness import default_seed, stream

__all__ = ['MixedSampler', 'PseudoLabels', 'SoftCrossEntropy', 'picked', 'pseudo_label']


class SoftCrossEntropy(CrossEntropyLossFlat):
    "fastai's `CrossEntropyLossFlat` that also takes targets which are probabilities, shaped as the logits: −Σ t·log p, the mean over samples; lower is better."
    def __call__(self, inp, targ, **kwargs):
        if not (isinstance(targ, torch.Tensor) and targ.is_floating_point()): return super().__call__(inp, targ, **kwargs)
        own = cross_entropy_of(self)
        logits, soft = by_class(inp, targ, own.axis)
        return soft_cross_entropy(logits.flatten(0, -2), soft.flatten(0, -2), own.weight, own.smoothing, own.reduction)


class MixedSampler(Sampler):
    """Batches made up of `shares[k]` samples of `pools[k]`, arrays of sample numbers: each pool is gone through in random order, again and again.

    An epoch has `batches` batches; as many as the pool that lasts longest, where that is None. A number that a pool has twice comes up twice as often. Seeded."""
    def __init__(self, pools: list, shares: list[int], batches: int | None = None, seed: int | None = None):
        self.pools, self.shares = [np.asarray(p, dtype=np.int64) for p in pools], list(shares)
        self.batches = batches or max(-(-len(p)//s) for p, s in zip(self.pools, self.shares))
        self.seed, self.epoch = default_seed() if seed is None else seed, 0

    def __len__(self): return self.batches*sum(self.shares)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        "The sample numbers of one epoch, batch by batch."
        parts = []
        for pool, share in zip(self.pools, self.shares):
            n = self.batches*share
            parts.append(np.concatenate([rng.permutation(pool) for _ in range(-(-n//len(pool)))])[:n].reshape(self.batches, share))
        return np.concatenate(parts, 1).ravel()

    def __iter__(self):
        yield from self.draw(stream(self.seed, 'mixed', self.epoch)).tolist()
        self.epoch += 1


def picked(probabilities: np.ndarray, threshold: float = .3, balance: bool = True) -> np.ndarray:
    """Which rows of `probabilities` `(n, c)` to train on, row numbers in order: those with a class at `threshold` or above.

    `balance`: as many of each class that was answered at all, the mean of what there is: of a class with more the most probable, of one with fewer all,
    and again from the most probable on until there are enough. arXiv:1911.04252, section 2.3"""
    confidence, answer = probabilities.max(1), probabilities.argmax(1)
    kept = np.flatnonzero(confidence >= threshold)
    if not balance or not len(kept): return kept
    kept = kept[np.argsort(-confidence[kept], kind='stable')]
    classes = np.unique(answer[kept])
    n = max(1, round(len(kept)/len(classes)))
    return np.sort(np.concatenate([np.resize(kept[answer[kept] == c][:n], n) for c in classes]))


@dataclass
class PseudoLabels:
    """What a network made of unlabelled images: `probabilities` `(n, c)` of each of `items` (files, or numbers into the dataset `source`), and
    `rows`, those that are trained on, again where a class has too few.

    `left_out`: how many were not even looked at, by reason. `.targets`: what is trained on, probabilities or class numbers. Printed, it says what there is."""
    items: list
    probabilities: np.ndarray = field(repr=False)
    rows: np.ndarray = field(repr=False)
    vocab: list
    soft: bool
    threshold: float
    left_out: dict[str, int]
    source: Dataset | None = field(default=None, repr=False)

    @property
    def targets(self) -> torch.Tensor:
        "Of all items, trained on or not: probabilities `(n, c)` where `soft`, else class numbers `(n,)`."
        return torch.from_numpy(self.probabilities).float() if self.soft else torch.from_numpy(self.probabilities.argmax(1))

    @property
    def counts(self) -> dict[str, int]:
        "How many are trained on, by class, repetitions included."
        n = np.bincount(self.probabilities.argmax(1)[self.rows], minlength=len(self.vocab))
        return {str(c): int(k) for c, k in zip(self.vocab, n)}

    def __str__(self):
        n, own = len(self.rows), len(set(self.rows.tolist()))
        said = f'{own:,} of {len(self.items):,} unlabelled images labelled with a probability of {self.threshold:g} or more'
        if n > own: said += f', {n-own:,} of them again, for as many of each class'
        if self.left_out: said += '; left out: ' + ', '.join(f'{k:,} {why}' for why, k in self.left_out.items())
        if none := [c for c, k in self.counts.items() if not k]: said += f'; none is taken for {few(none)}'
        return said

    def loaders(self, dls: DataLoaders, ratio: float | None = None) -> DataLoaders:
        """`dls` with what was labelled among its training images; validation and test stay as they are.

        `ratio`: images labelled by the network for each with a true label, in each batch (default: as many as there are); at least one of
        either. An epoch sees each of those that are more once, the others again and again. Where labels are soft, all training targets
        are probabilities, and the loss is a `SoftCrossEntropy`. Raises `ValueError` where `ratio` is not above 0, and for batches of one."""
        dls = _keyed(dls)
        dl, bs, labelled = dls.train, dls.train.bs, labelled_of(dls)
        if ratio is not None and not ratio > 0: raise BadValue(f'ratio: above 0, got {ratio}; for true labels alone take the loaders as they are')
        if bs < 2: raise BadValue(f'bs: at least 2, an image of either kind, got {bs}')
        own, rows = np.unique(self.rows, return_inverse=True)
        n = len(labelled)
        true = min(bs-1, max(1, round(bs/(1 + (len(self.rows)/n if ratio is None else ratio)))))
        sampler = MixedSampler([np.arange(n), n+rows], [true, bs-true], seed=dl.seed)
        return _renewed(dls, self._among(labelled, own), sampler)

    def _among(self, labelled, own: np.ndarray):
        "The dataset `labelled` with the items number `own` behind its own."
        mine, theirs = torch.as_tensor(labels_of(labelled, 'pseudo_label')).long(), self.targets[own]
        targets = torch.cat([F.one_hot(mine, len(self.vocab)).float() if self.soft else mine, theirs])
        if self.source is None:
            files = [*map(Path, labelled.items), *(self.items[i] for i in own)]
            of = dict(zip(files, targets if self.soft else targets.tolist()))
            y = [_Target(of, self.vocab)] if self.soft else [_Class(of, self.vocab), Categorize(vocab=self.vocab)]
            return Datasets(files, tfms=[labelled.tls[0].tfms, y], splits=[range(len(files))]).train
        images = _pictures([labelled, Indexed(_Blank(self.source, [self.items[i] for i in own]), self.vocab)])
        joint = Indexed(TensorDataset(images, targets) if isinstance(images, torch.Tensor) else _Targeted(images, targets), labelled.vocab)
        if self.soft: joint.loss_func = SoftCrossEntropy()
        return joint


def labelled_of(dls: DataLoaders):
    "The training data of `dls` with true labels: all, or what `PseudoLabels.loaders` put others behind."
    return vars(dls).get('labelled', dls.train.dataset)


def labelled_alone(dls: DataLoaders, like: DataLoaders | None = None) -> DataLoaders:
    "`dls` with the true labels of their training images alone; `like`: in epochs of as many batches as those of `like`, each image again and again."
    dls, labelled = _keyed(dls), labelled_of(dls)
    return _renewed(dls, labelled, like and MixedSampler([np.arange(len(labelled))], [dls.train.bs], len(like.train), seed=dls.train.seed))


def _keyed(dls: DataLoaders) -> DataLoaders:
    dl = dls.train
    if cls := keyed_kind(dl): return with_train(dls, dl.new(cls=cls))
    if not isinstance(dl, KeyedDL): raise BadValue(f'pseudo_label: needs a loader of fastai over an indexed dataset, got {type(dl).__name__}; give the data to `as_dataloaders`')
    return dls


def _renewed(dls: DataLoaders, dataset, sampler) -> DataLoaders:
    "`dls` that train on `dataset`, their transforms kept."
    new = with_train(dls, dls.train.new(dataset, sampler=sampler, shuffle=True))
    new.train._types = None                             # of the targets that were; found out when they are shown
    new.labelled = labelled_of(dls)
    return new


class _Target(Transform):
    "What is known of a file: probabilities."
    order, loss_func = 1, SoftCrossEntropy()
    def __init__(self, of: dict, vocab): self.of, self.vocab, self.c = of, vocab, len(vocab)
    def encodes(self, o: Path): return self.of[o]
    def decodes(self, o: torch.Tensor): return str(self.vocab[int(o.argmax())])


class _Class(Transform):
    "The name of a file's class."
    def __init__(self, of: dict, vocab): self.of, self.names = of, list(vocab)
    def encodes(self, o: Path): return self.names[self.of[o]]


class _Blank(Dataset):
    "The pictures of some samples of a dataset, each with class 0, whatever else it gives."
    def __init__(self, dataset, at): self.dataset, self.at = dataset, list(at)
    def __len__(self): return len(self.at)
    def __getitem__(self, i):
        x = self.dataset[self.at[i]]
        return x[0] if isinstance(x, (tuple, list)) else x, 0


class _Targeted(Dataset):
    "Samples with other targets."
    def __init__(self, dataset, targets): self.dataset, self.targets = dataset, targets
    def __len__(self): return len(self.targets)
    def __getitem__(self, i): return self.dataset[i][0], self.targets[i]


def _pictures(parts: list[Indexed]):
    "The pictures of `parts` as one tensor where they lie in tensors, else as a dataset."
    def of(p):
        if p.whole: return p.batch(range(len(p)))[0]
        source = p.dataset.dataset if isinstance(p.dataset, _Blank) else None
        return source.tensors[0][p.dataset.at] if isinstance(source, TensorDataset) else None
    tensors = [of(p) for p in parts]
    if any(t is None for t in tensors) or len({(t.shape[1:], t.dtype) for t in tensors}) > 1: return ConcatDataset(parts)
    return torch.cat([t.as_subclass(torch.Tensor) for t in tensors])


def pseudo_label(learn: Learner, unlabelled, threshold: float = .3, soft: bool = False, balance: bool = True, *, bs: int | None = None) -> PseudoLabels:
    """What a trained classifier says of images without labels, made ready to be trained on: `.loaders(dls)` mixes them with labelled ones.

    `unlabelled`: a folder (sub-folders and their names do not matter), a list of files, or, for a Learner on a torch `Dataset`, another, of
    pictures or of tuples that begin with one. Kept are answers with a probability of `threshold` in [0, 1) or more. `soft`: all probabilities are the target,
    else the most probable class. `balance`: as many of each class (see `picked`). `bs`: images at a time. Answered in evaluation mode, without augmentation.

    Images that the Learner validates, tests or trains on are left out, as are pictures that look like one it validates or tests on (see
    `near_pairs`), copies, and files that cannot be read: `.left_out` counts them. Raises `ValueError` outside the ranges, where no answer
    is sure enough, and for a Learner that does not tell classes apart; `FileNotFoundError` for a folder that is not there."""
    if not 0 <= threshold < 1: raise BadValue(f'threshold: a probability in [0, 1), got {threshold}')
    if classes_of(learn.loss_func) is None: raise BadValue(f'pseudo_label: needs a Learner that tells classes apart, got one with the loss {learn.loss_func}')
    items, left_out = new_images(learn.dls, unlabelled)
    in_files = not isinstance(unlabelled, Dataset)

    valid = learn.dls.valid
    if in_files: dl = learn.dls.test_dl(items, bs=bs or valid.bs)
    else: dl = valid.new(Indexed(_Blank(unlabelled, items), valid.dataset.vocab), bs=bs or valid.bs)
    with learn.no_bar(), learn.no_logging(): p = learn.get_preds(dl=dl)[0].numpy().astype(np.float32)
    if soft and not np.allclose(p.sum(1), 1, atol=1e-3): raise BadValue("soft: this Learner's answers do not sum to 1 over the classes, as its loss has it; take soft=False")
    rows = picked(p, threshold, balance)
    if not len(rows): raise BadValue(f'threshold: no answer has a probability of {threshold:g} or more, the surest has {p.max():.2f}; lower it, or train longer')
    return PseudoLabels(items, p, rows, list(learn.dls.vocab), soft, threshold, left_out, None if in_files else unlabelled)


def new_images(dls: DataLoaders, unlabelled) -> tuple[list, dict[str, int]]:
    "Which of `unlabelled`, as `pseudo_label` takes it, may be labelled, and how many may not, by reason. Raises as it does."
    in_files = isinstance(labelled_of(dls), Datasets)
    if in_files == isinstance(unlabelled, Dataset):
        kind = 'are read from files; give a folder or a list of files' if in_files else 'come from a torch Dataset; give another'
        raise BadValue(f'unlabelled: the labelled images {kind}, got {type(unlabelled).__name__}')
    if in_files and not all(isinstance(dl.items[0], (str, Path)) for dl in dls.loaders if len(dl.items)):
        raise BadValue('pseudo_label: the items of these loaders are no files; give the data to `image_folder`')
    items, left_out = (_of_files if in_files else _of_dataset)({s: labelled_of(dls) if s == 'train' else dl.dataset for s, dl in zip(SIDES, dls.loaders)}, unlabelled)
    if not items: raise BadValue(f'unlabelled: no image is left: {", ".join(f"{n:,} {why}" for why, n in left_out.items()) or "none was there"}')
    return items, left_out


def _of_files(known: dict, unlabelled) -> tuple[list[Path], dict[str, int]]:
    if isinstance(unlabelled, (str, Path)):
        if not Path(unlabelled).is_dir(): raise NotThere(f'unlabelled: no folder {unlabelled}')
        files = sorted(p for p in get_image_files(unlabelled) if not any(part.startswith('.') for part in p.relative_to(unlabelled).parts))
        if not files: raise BadValue(f'unlabelled: no images in {unlabelled}')
    else:
        files = [Path(p) for p in unlabelled]
        if gone := [p for p in files if not p.is_file()]: raise NotThere(f'unlabelled: no file {few(gone, 3)}')
    known = {side: list(map(Path, data.items)) for side, data in known.items()}
    of = {**verdicts(files), **verdicts(sum(known.values(), []))}
    held = [p for side in SIDES[1:] for p in known.get(side, ())]
    looks = {files[j-len(held)] for i, j in near_pairs([of[p].phash for p in [*held, *files]]).tolist() if i < len(held) <= j}
    return _apart(files, lambda p: of[p].digest, {side: {of[p].digest for p in ps} for side, ps in known.items()}, lambda p: of[p].reason, looks)


def _of_dataset(known: dict, unlabelled: Dataset) -> tuple[list[int], dict[str, int]]:
    if isinstance(unlabelled, IterableDataset): raise BadValue('unlabelled: an IterableDataset has no samples to index; pass a map-style dataset')
    def digests(data): return [blake2b(memoryview(np.ascontiguousarray(data[i][0]))).digest() for i in range(len(data))]
    own = digests(Indexed(_Blank(unlabelled, range(len(unlabelled))), known['train'].vocab))
    return _apart(list(range(len(own))), own.__getitem__, {side: set(digests(data)) for side, data in known.items()})


def _apart(items: list, digest, known: dict[str, set], reason=lambda o: None, looks=frozenset()) -> tuple[list, dict[str, int]]:
    "Those of `items` that are new, and how many are not, by reason."
    words, seen, kept, left_out = dict(train='that are training images', valid='that are validation images', test='that are test images'), set(), [], Counter()
    for o in items:
        d = digest(o)
        side = next((s for s in reversed(SIDES) if d in known.get(s, ())), None)
        why = 'that cannot be read' if reason(o) else words[side] if side else 'that look like an image held out' if o in looks else 'that are copies of others' if d in seen else None
        seen.add(d)
        if why: left_out[why] += 1
        else: kept.append(o)
    return kept, dict(left_out)
