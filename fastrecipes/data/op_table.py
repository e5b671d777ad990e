"Each op of the table as a technique: drawn for each training image by key, and done to whole batches."
import torch
from fastai.basics import Learner, TensorImage
from fastai.vision.core import TensorBBox, TensorMask, TensorPoint
from fasttransform import Transform

from fastrecipes.data import ops                # a technique has the name of its op
from fastrecipes.data.keyed import per_sample
from fastrecipes.data.loaders import first_sample, samples, shapes
from fastrecipes.data.ops import Interpolation, check_interpolation
from fastrecipes.data.transforms import check_images, on_batches
from fastrecipes.errors import BadValue
from fastrecipes.randomness import forked
from fastrecipes.technique import say, technique

__all__ = ['OP_ORDER', 'OfTraining', 'Varied', 'check_levels', 'check_range']

OP_ORDER = ('rotate', 'shear', 'translate', 'autocontrast', 'equalize', 'posterize', 'solarize', 'color', 'contrast', 'brightness', 'sharpness',
            'randaugment', 'autoaugment')       # in which they come, whatever the order of the calls


class OfTraining(Transform):
    "A transform of training batches on the 256 levels that Pillow knows, before IntToFloatTensor (10)."
    def __init__(self, who: str):
        super().__init__()
        self.who, self.order = who, OP_ORDER.index(who)/len(OP_ORDER)

    def __call__(self, b, split_idx=None, **kwargs):
        return b if split_idx else super().__call__(b, split_idx=split_idx, **kwargs)     # datasets in memory have none: `split_idx = 0` would pass over them


class Varied(OfTraining):
    "Replace training images by what `op` makes of them, each with probability `p` and by magnitudes of its own within `ranges`."
    def __init__(self, who: str, op, ranges=(), p: float = 1., **same):
        super().__init__(who)
        self.op, self.ranges, self.p, self.same = op, ranges, p, same

    def encodes(self, x: TensorImage):
        n = len(x)
        some = (per_sample(n, self.who, 'op', 'do') < self.p).nonzero()[:, 0]
        drawn = [(lo + per_sample(n, self.who, 'op', i)[some]*(hi-lo)).to(x.device) for i, (lo, hi) in enumerate(self.ranges)]
        some = some.to(x.device)
        return x.index_copy(0, some, self.op(x[some], *drawn, **self.same)) if len(some) else x


def check_range(who: str, **values):
    "Raise, in the name of `who`, for a value outside its range: `name=(value, lo, hi)`."
    for name, (value, lo, hi) in values.items():
        if not lo <= value <= hi: raise BadValue(f'{who}: {name} must be {lo} to {hi}, got {value}')


def check_levels(learn: Learner, who: str, moves: bool = False) -> torch.Tensor:
    """The first training image as the ops meet it, `(1, c, h, w)`, before it is normalised. Raises, in the name of `who`, unless it has the 256 levels
    of 1 or 3 channels (uint8, or floating point in [0, 1]); if the op `moves` pixels, also where targets would have to move along."""
    check_images(learn, who)
    with forked('glance'): x = samples(learn.dls.train.new(after_batch=[]), 1)[0]
    if x.shape[1] not in (1, 3): raise BadValue(f'{who}: needs images of 1 or 3 channels, got {shapes([x])}')
    known = x[x.isfinite()] if x.is_floating_point() else x
    if x.dtype != torch.uint8 and not (x.is_floating_point() and (known.numel() == 0 or known.min() >= 0 and known.max() <= 1)):
        raise BadValue(f'{who}: needs images of 256 levels, uint8 or floating point in [0, 1], got {x.dtype} from {float(known.min()):.3g} to {float(known.max()):.3g}; '
                       "let fastai's Normalize, a batch transform, normalise them")
    if moves and (still := [y for y in first_sample(learn.dls)[1] if _has_places(y, x)]):
        raise BadValue(f'{who}: moves the pixels of images, and their targets, {type(still[0]).__name__} {shapes(still[:1])}, would stay where they are; `augment` moves both')
    return x  # pyright: ignore[reportReturnType]


def _has_places(y, x) -> bool:
    "Whether targets `y` say something about places in the images `x`, and are not moved as images are."
    return isinstance(y, (TensorMask, TensorPoint, TensorBBox)) or isinstance(y, torch.Tensor) and not isinstance(y, TensorImage) and y.ndim > 2 and y.shape[-2:] == x.shape[-2:]


def _vary(learn: Learner, who: str, effect: str, op, ranges=(), p: float = .5, **same):
    "Check what all ops share, and have the training loader do this one in place of an earlier call's."
    check_range(who, p=(p, 0, 1))
    if same:
        check_interpolation(who, same['interpolation'])
        check_range(who, fill=(same['fill'], 0, 255))
    x = check_levels(learn, who, moves=bool(same))
    nothing = p == 0 and 'p is 0' or who == 'color' and x.shape[1] == 1 and 'images of one channel have no colour' or \
        who == 'equalize' and x[0, 0].numel() <= 256 and f'a channel with fewer than 255 px below its brightest value stays, and these have {x[0, 0].numel()} px in all'
    on_batches(learn, [Varied(who, op, ranges, p, **same)], instead_of=lambda t: isinstance(t, Varied) and t.who == who)
    say(learn, who, f'next to nothing to do: {nothing}' if nothing else f'{p:.0%} of the training images {effect}', aloud=bool(nothing))
    return learn


def _shift(x, right, down, interpolation, fill): return ops.translate(x, right*x.shape[-1], down*x.shape[-2], interpolation, fill)


def _posterize(x, bits): return ops.posterize(x, bits.floor().clamp(max=8))


@technique('data', section='Data augmentation', source='https://pillow.readthedocs.io/en/stable/reference/Image.html#PIL.Image.Image.rotate', touches=('inputs',))
def rotate(self: Learner, degrees: float = 15., p: float = .5, interpolation: Interpolation = 'bilinear', fill: int = 0) -> Learner:
    """Turn training images about their centre: `im.rotate(angle, interpolation, fillcolor=fill)` of Pillow.

    `degrees`: the angle is drawn from −degrees to degrees, 0–180. For things that are photographed at a slant; not where the angle tells
    classes apart (6 and 9). `augment` turns, zooms and tilts in one go, mirrored at the border.
    `p`: the share of images, 0–1. `interpolation`: 'nearest', 'bilinear' or 'bicubic'. `fill`: the grey level of what comes in from outside, 0–255 (0 is black).
    Each image draws by (seed, epoch, sample). Raises `ValueError` outside these ranges, for images without 256 levels of 1 or 3
    channels, and where targets (masks, points, boxes) would have to move along."""
    check_range('rotate', degrees=(degrees, 0, 180))
    return _vary(self, 'rotate', f'turned by up to {degrees:g}° either way', ops.rotate, [(-degrees, degrees)], p, interpolation=interpolation, fill=fill)


@technique('data', section='Data augmentation', source='https://pillow.readthedocs.io/en/stable/reference/Image.html#PIL.Image.Image.transform', touches=('inputs',))
def shear(self: Learner, amount: float = .2, p: float = .5, interpolation: Interpolation = 'bilinear', fill: int = 0) -> Learner:
    """Slant training images: `im.transform(im.size, Image.AFFINE, (1, sx, -sx*h/2, sy, 1, -sy*w/2), interpolation, fillcolor=fill)` of Pillow.

    `amount`: sx and sy are drawn from −amount to amount, 0–1; .2 moves a pixel by a fifth of its distance from the centre line. For
    handwriting and for views from the side. `p`: the share of images, 0–1.
    `interpolation`: 'nearest', 'bilinear' or 'bicubic'. `fill`: the grey level of what comes in from outside, 0–255 (0 is black).
    Each image draws by (seed, epoch, sample). Raises `ValueError` outside these ranges, for images without 256 levels of 1 or 3
    channels, and where targets (masks, points, boxes) would have to move along."""
    check_range('shear', amount=(amount, 0, 1))
    return _vary(self, 'shear', f'slanted by up to {amount:g} either way', ops.shear, [(-amount, amount)]*2, p, interpolation=interpolation, fill=fill)


@technique('data', section='Data augmentation', source='https://pillow.readthedocs.io/en/stable/reference/Image.html#PIL.Image.Image.transform', touches=('inputs',))
def translate(self: Learner, share: float = .1, p: float = .5, interpolation: Interpolation = 'bilinear', fill: int = 0) -> Learner:
    """Shift training images: `im.transform(im.size, Image.AFFINE, (1, 0, -dx, 0, 1, -dy), interpolation, fillcolor=fill)` of Pillow.

    `share`: dx is drawn from −share to share of the width, dy of the height, 0–1. For objects that are
    not always in the middle. `p`: the share of images, 0–1.
    `interpolation`: 'nearest', 'bilinear' or 'bicubic'. `fill`: the grey level of what comes in from outside, 0–255 (0 is black).
    Each image draws by (seed, epoch, sample). Raises `ValueError` outside these ranges, for images without 256 levels of 1 or 3
    channels, and where targets (masks, points, boxes) would have to move along."""
    check_range('translate', share=(share, 0, 1))
    return _vary(self, 'translate', f'shifted by up to {share:.0%} of their size either way', _shift, [(-share, share)]*2, p, interpolation=interpolation, fill=fill)


@technique('data', section='Data augmentation', source='https://pillow.readthedocs.io/en/stable/reference/ImageOps.html#PIL.ImageOps.autocontrast', touches=('inputs',))
def autocontrast(self: Learner, p: float = .5) -> Learner:
    """Stretch each channel of training images from black to white: `ImageOps.autocontrast(im)` of Pillow.

    For images of uneven exposure; what spans all levels already stays as it is, and so does a channel of one value. `p`: the share of images,
    0–1. Each image draws by (seed, epoch, sample). Raises `ValueError` outside these ranges, and for images without 256 levels of 1 or 3 channels."""
    return _vary(self, 'autocontrast', 'stretched from black to white', ops.autocontrast, p=p)


@technique('data', section='Data augmentation', source='https://pillow.readthedocs.io/en/stable/reference/ImageOps.html#PIL.ImageOps.equalize', touches=('inputs',))
def equalize(self: Learner, p: float = .5) -> Learner:
    """Spread the values of each channel of training images evenly: `ImageOps.equalize(im)` of Pillow.

    For images of uneven light, and for networks that should not lean on absolute brightness. A channel with fewer than 255 px below its
    brightest value stays as it is, so that it does little to images below 32×32 px. `p`: the share of images,
    0–1. Each image draws by (seed, epoch, sample). Raises `ValueError` outside these ranges, and for images without 256 levels of 1 or 3 channels."""
    return _vary(self, 'equalize', 'with evenly spread values', ops.equalize, p=p)


@technique('data', section='Data augmentation', source='https://pillow.readthedocs.io/en/stable/reference/ImageOps.html#PIL.ImageOps.posterize', touches=('inputs',))
def posterize(self: Learner, bits: int = 4, p: float = .5) -> Learner:
    """Keep fewer levels of training images: `ImageOps.posterize(im, bits)` of Pillow.

    `bits`: how many are kept is drawn from `bits` to 8, 1–8; 4 keeps 16 levels. For networks that should look at shapes, and for data
    that will come compressed. `p`: the share of images,
    0–1. Each image draws by (seed, epoch, sample). Raises `ValueError` outside these ranges, and for images without 256 levels of 1 or 3 channels."""
    check_range('posterize', bits=(bits, 1, 8))
    return _vary(self, 'posterize', f'with {bits} to 8 bits kept', _posterize, [(bits, 9)], p)


@technique('data', section='Data augmentation', source='https://pillow.readthedocs.io/en/stable/reference/ImageOps.html#PIL.ImageOps.solarize', touches=('inputs',))
def solarize(self: Learner, threshold: int = 128, p: float = .5) -> Learner:
    """Invert the bright parts of training images: `ImageOps.solarize(im, threshold)` of Pillow.

    `threshold`: the level from which on an image is inverted is drawn from `threshold` to 256, 0–256; the lower, the more. Strong:
    for long runs, where little else still regularises. `p`: the share of images,
    0–1. Each image draws by (seed, epoch, sample). Raises `ValueError` outside these ranges, and for images without 256 levels of 1 or 3 channels."""
    check_range('solarize', threshold=(threshold, 0, 256))
    return _vary(self, 'solarize', f'inverted above a level of {threshold} to 256', ops.solarize, [(threshold, 256)], p)


@technique('data', section='Data augmentation', source='https://pillow.readthedocs.io/en/stable/reference/ImageEnhance.html#PIL.ImageEnhance.Color', touches=('inputs',))
def color(self: Learner, amount: float = .5, p: float = .5) -> Learner:
    """Vary the colourfulness of training images: `ImageEnhance.Color(im).enhance(factor)` of Pillow.

    `amount`: the factor is drawn from 1 − amount to 1 + amount, 0–1. 0 is grey, above 1 more colourful. For photographs from many cameras; does nothing to images of one channel.
    `p`: the share of images, 0–1. Each image draws by (seed, epoch, sample). Raises `ValueError` outside these ranges, and for images without 256 levels of 1 or 3 channels."""
    check_range('color', amount=(amount, 0, 1))
    return _vary(self, 'color', f'more or less colourful, by up to {amount:.0%}', ops.color, [(1-amount, 1+amount)], p)


@technique('data', section='Data augmentation', source='https://pillow.readthedocs.io/en/stable/reference/ImageEnhance.html#PIL.ImageEnhance.Contrast', touches=('inputs',))
def contrast(self: Learner, amount: float = .5, p: float = .5) -> Learner:
    """Vary the contrast of training images: `ImageEnhance.Contrast(im).enhance(factor)` of Pillow.

    `amount`: the factor is drawn from 1 − amount to 1 + amount, 0–1. 0 is the mean grey, above 1 more contrast. For images of uneven exposure. `p`: the share of images,
    0–1. Each image draws by (seed, epoch, sample). Raises `ValueError` outside these ranges, and for images without 256 levels of 1 or 3 channels."""
    check_range('contrast', amount=(amount, 0, 1))
    return _vary(self, 'contrast', f'with more or less contrast, by up to {amount:.0%}', ops.contrast, [(1-amount, 1+amount)], p)


@technique('data', section='Data augmentation', source='https://pillow.readthedocs.io/en/stable/reference/ImageEnhance.html#PIL.ImageEnhance.Brightness', touches=('inputs',))
def brightness(self: Learner, amount: float = .5, p: float = .5) -> Learner:
    """Vary the brightness of training images: `ImageEnhance.Brightness(im).enhance(factor)` of Pillow.

    `amount`: the factor is drawn from 1 − amount to 1 + amount, 0–1. 0 is black, above 1 brighter. For images of uneven light. `p`: the share of images,
    0–1. Each image draws by (seed, epoch, sample). Raises `ValueError` outside these ranges, and for images without 256 levels of 1 or 3 channels."""
    check_range('brightness', amount=(amount, 0, 1))
    return _vary(self, 'brightness', f'brighter or darker, by up to {amount:.0%}', ops.brightness, [(1-amount, 1+amount)], p)


@technique('data', section='Data augmentation', source='https://pillow.readthedocs.io/en/stable/reference/ImageEnhance.html#PIL.ImageEnhance.Sharpness', touches=('inputs',))
def sharpness(self: Learner, amount: float = .5, p: float = .5) -> Learner:
    """Blur or sharpen training images: `ImageEnhance.Sharpness(im).enhance(factor)` of Pillow.

    `amount`: the factor is drawn from 1 − amount to 1 + amount, 0–1. 0 is smoothed by a 3×3 kernel, above 1 sharper. For data that come from several lenses, or scaled.
    `p`: the share of images, 0–1. Each image draws by (seed, epoch, sample). Raises `ValueError` outside these ranges, and for images without 256 levels of 1 or 3 channels."""
    check_range('sharpness', amount=(amount, 0, 1))
    return _vary(self, 'sharpness', f'sharper or softer, by up to {amount:.0%}', ops.sharpness, [(1-amount, 1+amount)], p)
