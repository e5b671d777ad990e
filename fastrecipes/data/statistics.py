"What the training set says of pixels: mean, spread, covariance, streamed in one pass, and the normalisation that is made of them."
import time
from copy import copy
from typing import Literal

import torch
from fastai.basics import Learner, Pipeline, TensorImage, Transform, nn
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Normalize
from fastai.vision.core import imagenet_stats

from fastrecipes.data.keyed import keyed
from fastrecipes.data.loaders import first_sample, in_order, unvaried
from fastrecipes.data.transforms import check_images
from fastrecipes.errors import BadValue, nearest
from fastrecipes.files import writes
from fastrecipes.randomness import forked
from fastrecipes.technique import say, technique

__all__ = ['Moments', 'NormalizePixels', 'PixelMap', 'moments_of', 'normalization_of', 'whitening']

KINDS = ('center', 'standardize', 'decorrelate', 'pca', 'zca', 'minmax', 'minmax_signed')
OF_A_MATRIX = ('decorrelate', 'pca', 'zca')
MOST = 4096             # values of an image whose covariance is still worth its square: 67 MB in the Learner and in the bundle
CONSTANT = 1e-6         # a spread below it is the rounding of 32 bits
PATIENCE = 15.          # s between two lines about a long pass


class Moments:
    """Count, mean, deviations, smallest and largest of vectors `(n, d)` that come in parts, in float64, whatever the parts and their order.

    `full`: all co-moments `(d, d)`, else those of each value with itself `(d,)`; merged by Chan's formula (doi:10.2307/2683386), so that
    nothing cancels. `std` and `cov` divide by n."""
    def __init__(self, full: bool = False): self.full, self.n, self.images, self.left_out = full, 0, 0, 0

    def add(self, x: torch.Tensor) -> 'Moments':
        "Take in the vectors `x` `(n, d)`."
        if not len(x): return self
        x = x.cpu().double()
        n, mean, lo, hi = len(x), x.mean(0), x.amin(0), x.amax(0)
        off = x-mean
        own = off.T @ off if self.full else off.square().sum(0)
        if not self.n: self.n, self.mean, self.deviations, self.lo, self.hi = n, mean, own, lo, hi
        else:
            d, total = mean-self.mean, self.n+n
            self.deviations += own + (torch.outer(d, d) if self.full else d.square())*(self.n*n/total)
            self.mean, self.lo, self.hi, self.n = self.mean + d*(n/total), self.lo.minimum(lo), self.hi.maximum(hi), total
        return self

    @property
    def cov(self) -> torch.Tensor: return self.deviations/self.n

    @property
    def std(self) -> torch.Tensor: return ((self.deviations.diagonal() if self.full else self.deviations)/self.n).sqrt()


def moments_of(dls: DataLoaders, over: str = 'channels', full: bool = False) -> Moments:
    """The `Moments` of the training images as a network would meet them in validation, not normalised: each once, in the order of the data.

    `over`: 'channels' (a vector a pixel) or 'pixels' (a vector `(c·h·w,)` an image). Images with values that are not finite count in
    `.left_out` only. Raises `ValueError` where none is left."""
    seen, told = Moments(full), time.monotonic()
    with forked('normalize'), unvaried(dls.train.dataset):
        for b in _plain(dls):
            for x in (x for x in b[:max(1, dls.train.n_inp)] if isinstance(x, TensorImage)):
                x = x.detach().as_subclass(torch.Tensor)
                finite = x.flatten(1).isfinite().all(1)
                seen.images, seen.left_out = seen.images + len(x), seen.left_out + int((~finite).sum())
                x = x[finite]
                seen.add(x.flatten(1) if over == 'pixels' else x.movedim(1, -1).flatten(0, -2))
            if writes() and time.monotonic()-told > PATIENCE:
                told = time.monotonic()
                print(f'normalize: {seen.images:,} of {len(dls.train.dataset):,} training images looked at', flush=True)
    if not seen.n: raise BadValue(f'normalize: needs images of finite values, got none in {seen.images:,}; clean the data first')
    return seen


def _plain(dls: DataLoaders) -> TfmdDL:
    "A loader of the training data, in their order, whose transforms are validation's, up to where batches are normalised."
    new = in_order(dls.train, dls.loaders[min(1, len(dls.loaders)-1)])
    new.after_batch = Pipeline([t for t in new.after_batch.fs if t.order < Normalize.order], split_idx=1)
    return new


def whitening(cov: torch.Tensor, kind: str = 'zca', eps: float = 1e-5) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix W `(d, d)` by which rows `(x − mean) @ W` of covariance `cov` `(d, d)` have a diagonal one, and the eigenvalues λ `(d,)`; float64.

    'decorrelate': the eigenvectors, so that the diagonal holds λ, largest first. 'pca': these divided by √(λ+`eps`): the
    diagonal is λ/(λ+eps). 'zca': 'pca' turned back, W symmetric, an image still looks like itself. Of each eigenvector the entry that is
    largest in size is positive."""
    values, vectors = torch.linalg.eigh(cov.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    vectors = vectors*vectors.gather(0, vectors.abs().argmax(0)[None]).sign()
    if kind == 'decorrelate': return vectors, values
    scaled = vectors/(values+eps).sqrt()
    return scaled if kind == 'pca' else scaled @ vectors.T, values


class PixelMap(nn.Module):
    """`(x − shift)·factor + offset` for images `(n, c, h, w)`, in 32 bits; None leaves its part out.

    `shift`, `offset`: `(c, 1, 1)` or `(c, h, w)`. `factor`: the same, or a matrix that rows are multiplied by, `(c, c)` for the channels of
    each pixel or `(c·h·w, c·h·w)` for all values of an image."""
    def __init__(self, shift=None, factor=None, offset=None):
        super().__init__()
        for name, value in (('shift', shift), ('factor', factor), ('offset', offset)): self.register_buffer(name, None if value is None else value.detach().clone().float())

    @classmethod
    def standard(cls, mean, std) -> 'PixelMap':
        "Less `mean`, over `std`, one number a channel: what fastai's `Normalize` does."
        mean, std = (torch.as_tensor(v).detach().as_subclass(torch.Tensor).cpu().double().reshape(-1, 1, 1) for v in (mean, std))
        return cls(mean, 1/std)

    def forward(self, x):
        known = self.shift if self.shift is not None else self.offset
        if x.shape[1] != len(known) or known.shape[1:] not in ((1, 1), x.shape[2:]):
            got, want = ('×'.join(map(str, s)) for s in (x.shape[1:], known.shape))
            raise BadValue(f"normalize: knows images of {want.removesuffix('×1×1')} {'channels' if known.shape[1:] == (1, 1) else 'values'}, got {got}; "
                           "over='channels' takes images of any height and width")
        if self.shift is not None: x = x-self.shift
        if self.factor is not None:
            if self.factor.ndim == 3: x = x*self.factor
            elif len(self.factor) == x.shape[1]: x = (x.movedim(1, -1) @ self.factor).movedim(-1, 1).contiguous()       # no convolution: cuDNN's has 10 bits
            else: x = (x.flatten(1) @ self.factor).unflatten(1, x.shape[1:])
        return x if self.offset is None else x + self.offset

    def inverse(self) -> 'PixelMap':
        "What takes images back to what they were."
        back = None if self.factor is None else 1/self.factor.double() if self.factor.ndim == 3 else torch.linalg.inv(self.factor.double())
        return PixelMap(self.offset, back, self.shift)

    def same_as(self, other) -> bool:
        "Whether `other` does the same to the last digits of 32 bits."
        return all((a is None) == (b is None) and (a is None or a.shape == b.shape and torch.allclose(a.cpu(), b.cpu())) for a, b in zip(*(m._buffers.values() for m in (self, other))))


class NormalizePixels(Transform):
    "Apply a `PixelMap` to every image of a batch, where fastai's `Normalize` would."
    order = Normalize.order

    def __init__(self, pixels: PixelMap): self.pixels, self.back = pixels, None

    def to(self, device): self.pixels.to(device)

    def encodes(self, x: TensorImage): return self.pixels.to(x.device)(x)

    def decodes(self, x: TensorImage):
        if self.back is None: self.back = self.pixels.inverse()
        return self.back.to(x.device)(x)

    def __getstate__(self): return {**vars(self), 'back': None}        # a matrix need not be kept twice


def normalizes(tfm) -> bool:
    "Whether a transform of batches is one that normalises pixels, fastai's or ours."
    return isinstance(tfm, (Normalize, NormalizePixels))


def normalized_by(dls: DataLoaders, tfm: Transform | None) -> DataLoaders:
    """The same loaders, all of them with `tfm` (None: nothing) in place of what normalises them; no draw is felt outside.

    New ones: other Learners may share the old, and a copy of a loader of fastai would go on reading by the order of the old one."""
    new = copy(dls)
    with forked('normalize'): new.loaders = [dl.new() for dl in dls.loaders]
    for dl in new.loaders: dl.after_batch = Pipeline([*dl.after_batch.fs.filter(lambda t: not normalizes(t)), *([] if tfm is None else [tfm])])
    return new


def normalization_of(learn: Learner) -> PixelMap | None:
    "What normalises a Learner's batches in validation, a copy on the CPU, or None."
    own = next((t for t in getattr(getattr(learn.dls, 'valid', None), 'after_batch', None) or () if normalizes(t)), None)
    if isinstance(own, Normalize): return PixelMap.standard(own.mean, own.std)
    return own and PixelMap(*own.pixels._buffers.values()).cpu()


def _map_of(kind: str, seen: Moments, shape, eps: float) -> tuple[PixelMap, int]:
    "The `PixelMap` of a kind for vectors of these moments, `shape`d `(c, 1, 1)` or `(c, h, w)`; and the number of directions it blows up, for λ < `eps`."
    if kind in OF_A_MATRIX:
        matrix, values = whitening(seen.cov, kind, eps)
        return PixelMap(seen.mean.view(shape), matrix), 0 if kind == 'decorrelate' else int((values < eps).sum())
    if kind == 'center': return PixelMap(seen.mean.view(shape)), 0
    spread = seen.std if kind == 'standardize' else (seen.hi-seen.lo)/(2 if kind == 'minmax_signed' else 1)
    shift = {'standardize': seen.mean, 'minmax': seen.lo, 'minmax_signed': (seen.lo+seen.hi)/2}[kind]
    return PixelMap(shift.view(shape), torch.where(spread < CONSTANT, 1., 1/spread).view(shape)), 0


@technique('data', section='Normalization', source='arXiv:1512.00809', touches=('inputs', 'inference'), after=('cache',),
           formula=r"x' = W(x-\mu), \qquad W = \mathrm{diag}(1/\sigma), \quad U^\top, \quad (\Lambda+\varepsilon)^{-1/2}\,U^\top, \quad U(\Lambda+\varepsilon)^{-1/2}\,U^\top")
def normalize(self: Learner, kind: Literal['center', 'standardize', 'decorrelate', 'pca', 'zca', 'minmax', 'minmax_signed'] = 'standardize',
              over: Literal['auto', 'channels', 'pixels'] = 'auto', eps: float = 1e-5) -> Learner:
    """Bring pixels to a common scale by the numbers of the training set alone, in training, validation and serving.

    `kind`: 'center' (less the mean), 'standardize' (and over the standard deviation), 'minmax' (to 0…1), 'minmax_signed' (to −1…1),
    'decorrelate' (turned into the eigenvectors of the covariance), 'pca' (and each over √(λ+`eps`)), 'zca' (turned back: the nearest
    picture whose values are uncorrelated, of variance λ/(λ+eps)). `over`: 'channels' (a number for each channel, or a matrix of them),
    'pixels' (for each value of an image; a matrix holds at most 4,096), or 'auto': pixels where a matrix can hold them, else channels.
    `eps` > 0 bounds what 'pca' and 'zca' multiply by, 1/√eps; more of it leaves more of the faint directions faint: with augmentation, few
    images or borders that are always black, take .1. What is constant in training is not divided.

    'standardize' suits most networks that start from scratch. 'zca' over the pixels helps shallow networks on small images; after 'pca' and
    'decorrelate' over the pixels no neighbours are left for a convolution. A pretrained network has layers made for the statistics of its
    own weights: normalize replaces them, and says so. It costs one pass over the training images, not augmented, each once, and a matrix
    over d values 4·d² bytes in the Learner and in the bundle. Replaces a `Normalize` that is there; every image of a batch is normalised.
    Raises `ValueError` for unknown kinds, eps ≤ 0, a matrix over more than 4,096 values, and where inputs are no images."""
    for what, value, known in (('kind', kind, KINDS), ('over', over, ('auto', 'channels', 'pixels'))):
        if value not in known: raise BadValue(f'normalize: {what} must be one of {", ".join(known)}, got {value!r}{nearest(value, known)}')
    if not eps > 0: raise BadValue(f'normalize: eps must be above 0, got {eps}')
    check_images(self, 'normalize')
    x, matrix = first_sample(self.dls)[0][0], kind in OF_A_MATRIX
    if not x.is_floating_point(): raise BadValue(f'normalize: needs pixels as numbers in 0…1, got {x.dtype}; give the data the batch transform IntToFloatTensor')
    for dl in self.dls.loaders:
        if not isinstance(dl, TfmdDL): raise BadValue(f'normalize: needs loaders whose batches it can transform, got a {type(dl).__name__}; give all of them to `as_dataloaders`')
    d = x[0].numel()
    if matrix and over == 'pixels' and d > MOST:
        raise BadValue(f"normalize: a matrix over the pixels takes at most {MOST:,} values, got {d:,} ({'×'.join(map(str, x.shape[1:]))}); "
                       "take over='channels', or smaller images")
    over = over if over != 'auto' else 'pixels' if matrix and d <= MOST else 'channels'

    seen = moments_of(self.dls, over, full=matrix)
    pixels, faint = _map_of(kind, seen, x.shape[1:] if over == 'pixels' else (-1, 1, 1), eps)
    known = _made_for_others(self)
    keyed(self)
    self.dls = normalized_by(self.dls, NormalizePixels(pixels.to(x.device)))
    _tell(self, kind, over, seen, f'{faint:,} of {len(seen.mean):,} directions hardly vary in them: what other images show there, augmented ones too, is multiplied by up to '
          f'{eps**-.5:,.0f}; raise eps (.1)' if faint and eps < .01 else '', known)
    return self


def _made_for_others(learn: Learner) -> bool:
    "Whether a network seems to be trained already, on pixels of other statistics: it is frozen in part, or its data have ImageNet's."
    own = normalization_of(learn)
    return any(not p.requires_grad for p in learn.model.parameters()) or own is not None and own.same_as(PixelMap.standard(*imagenet_stats))


def _tell(learn: Learner, kind: str, over: str, seen: Moments, faint: str, pretrained: bool):
    many = f'{len(seen.mean):,} {"values of an image" if over == "pixels" else "channels" if len(seen.mean) > 1 else "channel"}'
    rest, still = [], int((seen.std < CONSTANT).sum())
    if still and kind not in ('center', *OF_A_MATRIX): many += f' ({still:,} of them constant, which are not divided)'
    if seen.left_out: rest.append(f'{seen.left_out:,} images with values that are not finite are left out')
    if faint: rest.append(faint)
    if pretrained: rest.append('the layers that were trained before expect the statistics of their own weights, and meet others now')
    say(learn, 'normalize', '; '.join([f'{kind} over {many}, from {seen.images-seen.left_out:,} training images', *rest]), aloud=bool(rest))
