"Policies over the op table: which ops an image gets, drawn for each sample by key; the images of a batch that get the same op get it at once."
from functools import cache
from typing import Literal

import numpy as np
import torch
from fastai.basics import Learner, TensorImage
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandAugment

from fastrecipes.data import ops
from fastrecipes.data.keyed import per_sample
from fastrecipes.data.op_table import OfTraining, check_levels, check_range
from fastrecipes.data.ops import Interpolation, check_interpolation
from fastrecipes.data.transforms import on_batches
from fastrecipes.errors import BadValue, nearest
from fastrecipes.technique import say, technique

__all__ = ['Policy', 'Drawn', 'AutoAugmented', 'apply_each', 'subpolicies']

POLICIES = ('imagenet', 'cifar10', 'svhn')
MOVES = {                                       # the matrix of each op that moves pixels, as torchvision gives it to Pillow: sheared about the corner
    'ShearX': lambda v, h, w: _matrices(v, 1, v, 0, 0, 1, 0),
    'ShearY': lambda v, h, w: _matrices(v, 1, 0, 0, v, 1, 0),
    'TranslateX': lambda v, h, w: _matrices(v, 1, 0, -v.trunc(), 0, 1, 0),
    'TranslateY': lambda v, h, w: _matrices(v, 1, 0, 0, 0, 1, -v.trunc()),
    'Rotate': ops.turned}
LEVELS = {
    'Brightness': lambda x, v: ops.brightness(x, 1+v), 'Color': lambda x, v: ops.color(x, 1+v), 'Contrast': lambda x, v: ops.contrast(x, 1+v),
    'Sharpness': lambda x, v: ops.sharpness(x, 1+v), 'Posterize': ops.posterize, 'Solarize': ops.solarize, 'AutoContrast': lambda x, v: ops.autocontrast(x),
    'Equalize': lambda x, v: ops.equalize(x), 'Invert': lambda x, v: ops.invert(x)}


def _matrices(v, *entries) -> torch.Tensor: return torch.stack([torch.as_tensor(e, dtype=torch.float64).expand(len(v)) for e in entries], -1)


def apply_each(x: torch.Tensor, names, values, interpolation: Interpolation = 'nearest', fill=0) -> torch.Tensor:
    """`x` `(n, c, h, w)` with op `names[i]` by `values[i]` done to image i: torchvision's names and magnitudes, 'Identity' for none; a new tensor.

    Images that are moved are moved together, whichever way."""
    names, values, out = np.asarray(names, object), torch.as_tensor(values, dtype=torch.float64), x.clone()
    if unknown := set(names)-{*MOVES, *LEVELS, 'Identity'}: raise BadValue(f'op: one of {", ".join([*MOVES, *LEVELS, "Identity"])}, got {unknown.pop()!r}')
    moved, matrix = np.isin(names, [*MOVES]), torch.empty(len(x), 6, dtype=torch.float64)
    for name in set(names):
        i = torch.from_numpy(np.flatnonzero(names == name))
        if name in MOVES: matrix[i] = MOVES[name](values[i], *x.shape[-2:])
        elif name in LEVELS:
            at = i.to(x.device)
            out[at] = LEVELS[name](x[at], values[i])
    if moved.any():
        at = torch.from_numpy(np.flatnonzero(moved))
        out[at.to(x.device)] = ops.affine(x[at.to(x.device)], matrix[at], interpolation, fill)
    return out


class Policy(OfTraining):
    "Training images changed by ops in turn, each image by its own: `draw(n, h, w)` gives the names and magnitudes of each turn."
    def __init__(self, who: str, interpolation: Interpolation = 'nearest'):
        super().__init__(who)
        self.interpolation = interpolation

    def encodes(self, x: TensorImage):
        for names, values in self.draw(len(x), *x.shape[-2:]): x = apply_each(x, names, values, self.interpolation)
        return x


def _pick(n: int, among: int, *key) -> np.ndarray:
    "A number from 0 to `among`−1 for each sample."
    return (per_sample(n, *key)*among).long().clamp(max=among-1).numpy()


def _values(space: dict, names, at, plus) -> torch.Tensor:
    "The magnitudes of `names` in torchvision's `space`, bin `at` each (None: no magnitude), with the sign of `plus` where they have one."
    values = [0. if a is None or not space[name][0].ndim else float(space[name][0][a]) for name, a in zip(names, at)]
    return torch.tensor([v if p or not space[name][1] else -v for name, v, p in zip(names, values, plus.tolist())], dtype=torch.float64)


class Drawn(Policy):
    "`n` ops out of 14 for each image, evenly drawn, all of one magnitude."
    def __init__(self, n: int, magnitude: int, interpolation: Interpolation = 'nearest'):
        super().__init__('randaugment', interpolation)
        self.n, self.magnitude = n, magnitude

    def draw(self, n, h, w):
        space = _space(RandAugment, 31, h, w)
        for turn in range(self.n):
            names = np.array([*space], object)[_pick(n, len(space), self.who, turn, 'op')]
            yield names, _values(space, names, [self.magnitude]*n, per_sample(n, self.who, turn, 'sign') < .5)


class AutoAugmented(Policy):
    "One of 25 pairs of ops for each image, each of the two done with its own probability and magnitude."
    def __init__(self, policy: str, interpolation: Interpolation = 'nearest'):
        super().__init__('autoaugment', interpolation)
        self.policy = policy

    def draw(self, n, h, w):
        space, pairs = _space(AutoAugment, 10, h, w), subpolicies(self.policy)
        which = _pick(n, len(pairs), self.who, 'pair')
        for turn in (0, 1):
            names, p, at = zip(*(pairs[i][turn] for i in which))
            on = per_sample(n, self.who, turn, 'do').double().numpy() < np.array(p)
            yield np.where(on, np.array(names, object), 'Identity'), _values(space, names, at, per_sample(n, self.who, turn, 'sign') < .5)


@cache
def _space(kind, bins: int, h: int, w: int) -> dict: return kind()._augmentation_space(bins, (h, w))


@cache
def subpolicies(policy: str) -> list:
    "The 25 pairs of (op, probability, bin of 10) that the paper found for `policy`, as torchvision holds them."
    return AutoAugment(AutoAugmentPolicy(policy)).policies


@technique('data', section='Data augmentation', source='arXiv:1909.13719', touches=('inputs',))
def randaugment(self: Learner, n: int = 2, magnitude: int = 9, interpolation: Interpolation = 'nearest') -> Learner:
    """Do `n` randomly drawn ops to each training image, all of one magnitude: RandAugment.

    `n` ≥ 1: ops in turn, each out of torchvision's 14 (one does nothing). `magnitude`: 0–30, torchvision's bins; the paper takes n=2 and 9 for a
    ResNet-50 on ImageNet, 17 and 28 for EfficientNet-B5 and B7: the larger the model, the more. `interpolation`: 'nearest', 'bilinear' or
    'bicubic', of ops that move pixels; what comes in from outside is black. The paper's runs are long: a few epochs may cost accuracy.
    Each image draws by (seed, epoch, sample), and gets what torchvision gives a Pillow image. Raises `ValueError` outside these ranges,
    for images without 256 levels of 1 or 3 channels, and where targets (masks, points, boxes) would have to move along."""
    if n < 1: raise BadValue(f'randaugment: n must be at least 1, got {n}')
    check_range('randaugment', magnitude=(magnitude, 0, 30))
    return _follow(self, Drawn(n, magnitude, interpolation), f'{n} op{"s" if n > 1 else ""} out of 14 of magnitude {magnitude} for each training image')


@technique('data', section='Data augmentation', source='arXiv:1805.09501', touches=('inputs',))
def autoaugment(self: Learner, policy: Literal['imagenet', 'cifar10', 'svhn'] = 'imagenet', interpolation: Interpolation = 'nearest') -> Learner:
    """Do one of 25 pairs of ops to each training image, as a search on the data of the paper found them: AutoAugment.

    `policy`: 'imagenet', 'cifar10' (colours and light, for photographs) or 'svhn' (shear and inversion, for digits and signs): policies
    carry over to data of the same kind. `interpolation`: 'nearest', 'bilinear' or 'bicubic', of ops that move pixels; what comes in from
    outside is black. The paper's runs are long: a few epochs may cost accuracy. Each image draws by (seed, epoch, sample), and gets what
    torchvision gives a Pillow image. Raises `ValueError` for an unknown policy, for images without 256 levels of 1 or 3 channels, and
    where targets (masks, points, boxes) would have to move along."""
    if policy not in POLICIES: raise BadValue(f'autoaugment: policy must be one of {", ".join(POLICIES)}, got {policy!r}{nearest(policy, POLICIES)}')
    return _follow(self, AutoAugmented(policy, interpolation), f'one of 25 pairs of ops, found for {policy}, for each training image')


def _follow(learn: Learner, policy: Policy, effect: str) -> Learner:
    check_interpolation(policy.who, policy.interpolation)
    check_levels(learn, policy.who, moves=True)
    on_batches(learn, [policy], instead_of=lambda t: type(t) is type(policy))
    say(learn, policy.who, effect)
    return learn
