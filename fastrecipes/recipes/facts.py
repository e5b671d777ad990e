"What a folder of images and the machine tell before anything is trained."
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fastrecipes.data.folders import found_and_split
from fastrecipes.data.processes import each_chunk
from fastrecipes.data.scan import verdicts
from fastrecipes.errors import few
from fastrecipes.files import in_bytes
from fastrecipes.production.serving import cores
from fastrecipes.randomness import stream
from fastrecipes.recipes.looks import FEW, Look, Picture, deep_features, label_noise, look_at, percent, picture, small_pixels
from fastrecipes.report.intervals import Estimate
from fastrecipes.training.transfer import PACKAGED, packaged_weights

__all__ = ['Facts', 'Machine', 'Suspect', 'facts_of']

LOOKED_AT = 2000        # training images that the linear models see: half a minute on one core
LEAST = 40              # below it nothing can be told from them
UNEVEN = 3.             # images of the commonest class to those of the rarest from which they are drawn equally often
NOISY = .05             # wrong labels from which something is done


@dataclass(frozen=True)
class Machine:
    "Cores that this process may use, bytes of memory (None: not known), the GPU's name if there is one, and whether it computes in bfloat16."
    cores: int
    memory: int | None
    gpu: str | None
    bf16: bool = False

    @classmethod
    def here(cls) -> 'Machine':
        gpu = torch.cuda.is_available()
        return cls(cores(), _memory(), torch.cuda.get_device_name() if gpu else None, gpu and torch.cuda.is_bf16_supported())

    def __str__(self):
        memory = f', {in_bytes(self.memory)} of memory' if self.memory else ''
        return f'{self.cores} core{"s"*(self.cores > 1)}{memory}, {self.gpu or "no GPU"}'


def _memory() -> int | None:
    "Bytes that this process may use: what the machine has, or what its container was given."
    found = []
    with suppress(AttributeError, ValueError, OSError): found.append(os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES'))
    with suppress(ValueError, OSError): found.append(int(Path('/sys/fs/cgroup/memory.max').read_text()))        # 'max' where there is no limit
    return min(found, default=None)


@dataclass(frozen=True)
class Suspect:
    "A training image whose label may be wrong: the label it has, and the one that it looks like."
    name: str
    label: str
    likely: str

    def __str__(self): return f'{self.name} ({self.likely}?)'


@dataclass
class Facts:
    """What `recommend` reads. `counts`: training images by class; `held`: images by side; `widths`, `heights`: of the training images, in px; `grey`: whether they all are;
    `alike`, `torn`: images that look like another, and pairs of them with two labels; `looks`: linear models of held-out training images (see `Look`); `noise`:
    the share of wrong labels, `suspects`: where they may be."""
    path: str
    counts: Counter
    held: Counter
    widths: np.ndarray = field(repr=False)
    heights: np.ndarray = field(repr=False)
    grey: bool
    alike: int
    torn: int
    set_aside: list[tuple[str, str]]
    looks: list[Look] = field(repr=False)
    noise: Estimate | None
    suspects: list[Suspect] = field(repr=False)
    machine: Machine
    installed: str | None       # a network whose trained weights are

    @property
    def images(self) -> int: return self.counts.total()
    @property
    def uneven(self) -> bool: return self.ratio >= UNEVEN
    @property
    def epoch(self) -> int:
        "Images that an epoch trains on: with classes of unequal size, each as often as the commonest."
        return len(self.counts)*max(self.counts.values()) if self.uneven else self.images
    @property
    def ratio(self) -> float: return max(self.counts.values())/min(self.counts.values())
    @property
    def smallest(self) -> str: return min(sorted(self.counts), key=self.counts.get)
    @property
    def largest(self) -> str: return max(sorted(self.counts), key=self.counts.get)
    @property
    def side(self) -> int:
        "The shorter side of half of the images, in px."
        return int(np.median(np.minimum(self.widths, self.heights)))
    @property
    def noisy(self) -> bool: return self.noise is not None and self.noise.lo > NOISY
    @property
    def best(self) -> Look | None: return best_of(self.looks)

    @property
    def rows(self) -> list[tuple[str, str]]:
        "What was read, in words."
        c, w, h = self.counts, self.widths, self.heights
        one = len(set(zip(w.tolist(), h.tolist()))) == 1
        size = f'{w[0]}×{h[0]} px' if one else f'{w.min()}×{h.min()} to {w.max()}×{h.max()} px, the shorter side of half of them {self.side} px or more'
        aside = f'; {len(self.set_aside)} set aside: {few([f"{Path(name).name} ({why})" for name, why in self.set_aside], 3)}' if self.set_aside else ''
        least, most = min(c.values()), max(c.values())
        sizes = f'{least:,} training images each' if least == most else f'{least:,} ({self.smallest}) to {most:,} ({self.largest}) training images: {self.ratio:.1f} to 1'
        alike = f'{self.alike:,} images look like another' if self.alike else 'none'
        rows = [('images', f'{self.images:,} to train on, {self.held["valid"]:,} to validate, {self.held["test"]:,} to test{aside}'),
                ('classes', f'{len(c)}, of {sizes}'),
                ('pixels', f'{size}, {"grey" if self.grey else "in colour"}'),
                ('look-alikes', alike + (f', {self.torn} pairs of them with two labels' if self.torn else ''))]
        for k in self.looks:
            rows.append(('told apart', f'{k.accuracy} of images held out by a linear model of {k.features}, {percent(k.mirror.mirrored)} of their mirror images'))
        if not self.looks: rows.append(('told apart', f'not looked at: fewer than {LEAST} images in classes of {FEW} or more'))
        elif self.noise: rows.append(('labels', f'{self.noise} of the images that the model is surest of have another label'))
        else: rows.append(('labels', f'how many are wrong cannot be told: two models of half of the images each agree on {percent(self.best.agreement)} only'))
        return [*rows, ('machine', str(self.machine))]


def best_of(looks: list[Look]) -> Look | None:
    "The look that tells most images apart."
    return max(looks, key=lambda k: k.accuracy.value, default=None)


def facts_of(path, valid=.2, test: float = .1, groups=None, seed: int = 42, progress=print) -> Facts:
    "Read a folder of images. Of those to validate and test nothing is read but their number, and which look like another. A pretrained network is asked if its weights are installed."
    found, sides = found_and_split(path, valid, test, groups, 'together', seed)
    train = [i for i, s in enumerate(sides) if s == 'train']
    known = verdicts(found.files)
    sizes = np.array([[(v := known[found.files[i]]).width, v.height] for i in train])
    looked_at = _sample(found, train, seed)
    pictures = _pictures(found, looked_at, progress)
    looks, suspects, noise = [], [], None
    installed = next((a for a in PACKAGED if packaged_weights(a)), None)
    if len(looked_at) >= LEAST:
        looks, labels, names = _looks(found, looked_at, pictures, installed, seed, progress)
        best = best_of(looks)
        noise = label_noise(best, labels)
        if noise: suspects = _suspects(found, looked_at, best, labels, names)
    grey = all(p.grey for p in pictures or _pictures(found, train[:LEAST], progress))
    alike = {k for pair in found.near.tolist() for k in pair}
    torn = sum(found.labels[i] != found.labels[j] for i, j in found.near.tolist())
    return Facts(str(path), Counter(found.labels[i] for i in train), Counter(sides), *sizes.T, grey, len(alike), torn, found.set_aside, looks, noise, suspects,
                 Machine.here(), installed)


def _sample(found, train: list[int], seed: int) -> list[int]:
    "Some of the training images, of classes that have enough: drawn by the seed, in order."
    order = stream(seed, 'recommend').permutation(train).tolist()[:LOOKED_AT]
    keys = {}
    for i in order: keys.setdefault(found.labels[i], set()).add(found.keys[i])
    some = sorted(i for i in order if len(keys[found.labels[i]]) >= FEW)
    return some if len({found.labels[i] for i in some}) > 1 else []


def _pictures(found, which: list[int], progress) -> list[Picture]:
    if which: progress(f'looking at {len(which):,} of the training images')
    return [p for _, some in each_chunk(picture, [found.files[i] for i in which]) for p in some]


def _looks(found, which, pictures: list[Picture], installed: str | None, seed: int, progress) -> tuple[list[Look], np.ndarray, list[str]]:
    "By small pixels, and by the features of the network whose weights are installed."
    names, labels = np.unique([found.labels[i] for i in which], return_inverse=True)
    small, large = np.stack([p.small for p in pictures]), np.stack([p.large for p in pictures])
    kinds = {'their 16×16 pixels': (small_pixels, small)}
    if installed: kinds[f'what the pretrained {installed} sees'] = (lambda x: deep_features(x, installed), large)
    looks = []
    for name, (features, x) in kinds.items():
        progress(f'telling them apart by {name}')
        looks.append(look_at(name, features(x), features(x[:, :, ::-1]), labels, [found.keys[i] for i in which], seed))
    return looks, labels, names.tolist()


def _suspects(found, which, look: Look, labels, names) -> list[Suspect]:
    "Images whose label is not what the model says, the surest first."
    odd = sorted(np.flatnonzero(look.predicted != labels).tolist(), key=lambda i: (-look.sureness[i], i))
    return [Suspect(found.name(which[i]), names[labels[i]], names[look.predicted[i]]) for i in odd]
