"Any pipeline of albumentations over the training images, a mask along with its image; what it draws is keyed by (seed, epoch, sample)."
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import cloudpickle
import numpy as np
import torch
from fastai.basics import Learner, TensorImage, TensorMask, Transform, to_device
from fastai.vision.core import TensorBBox, TensorPoint

from fastrecipes.data.keyed import per_sample
from fastrecipes.data.loaders import shapes
from fastrecipes.data.transforms import check_images, on_batches
from fastrecipes.errors import BadValue, NotThere
from fastrecipes.randomness import forked
from fastrecipes.technique import applied, say, technique

__all__ = ['Albumentations']


def arriving(learn: Learner, order: float) -> tuple[tuple, tuple]:
    "(inputs, targets) of the first training sample, a batch of one, as a transform of that `order` meets it: not yet normalised. No draw is felt outside."
    dl = learn.dls.train
    with forked('glance'):
        dl.before_iter()
        b = dl.do_batch([dl.do_item(0)])
        if dl.device is not None: b = to_device(b, dl.device)
        for t in dl.after_batch.fs:
            if t.order < order: b = t(b, split_idx=dl.after_batch.split_idx)
    return tuple(b[:dl.n_inp]), tuple(b[dl.n_inp:])


def check_pixels(who: str, xb):
    "Raise, in the name of `who`, unless a sample has one image, of whole numbers or of numbers in [0, 1]."
    if len(xb) != 1: raise BadValue(f'{who}: needs one image a sample, got {shapes(xb)}; use augment, which varies several')
    x = xb[0]
    if not x.is_floating_point() or not x.isfinite().all() or 0 <= float(x.min()) <= float(x.max()) <= 1: return
    raise BadValue(f'{who}: needs pixels in [0, 1] or of 8 bits, got {float(x.min()):.3g} to {float(x.max()):.3g}; scale the images, and leave what '
                   'normalises them to a transform of whole batches, Normalize')


def is_mask(y, x) -> bool:
    "Whether targets `y` have a value for each pixel of images `x`."
    return isinstance(y, TensorMask) or isinstance(y, torch.Tensor) and y.ndim > 2 and y.shape[-2:] == x.shape[-2:]


def _library():
    os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')      # albumentations 2.0.8 asks the network for its newest version while it is imported
    import albumentations                       # a second of import: only for who uses it
    return albumentations


class Albumentations(Transform):
    """Run a Compose over each image of a training batch, and over its mask, while pixels have 8 bits.

    It keeps the Compose as bytes: an exported Learner loads where there is no albumentations."""
    order = 3                                   # before IntToFloatTensor, which is 10, and before transforms that need the images' final size

    def __init__(self, compose):
        super().__init__()
        self.pickled, self._compose = cloudpickle.dumps(compose), None      # a copy: the user's keeps its own random state

    @property
    def compose(self):
        if self._compose is None: self._compose = cloudpickle.loads(self.pickled)
        return self._compose

    def __getstate__(self): return {**vars(self), '_compose': None}

    def __call__(self, b, split_idx=None, **kwargs):
        if split_idx: return b                  # the training loader at validation, as in `tta`
        x, *rest = b
        at = next((i for i, y in enumerate(rest) if is_mask(y, x)), None)
        images, masks = self.over(x, None if at is None else rest[at], _seeds(len(x)))
        if at is not None: rest[at] = masks
        return images, *rest

    def over(self, x, y, seeds: list[int]):
        "Images `x` `(n, c, h, w)` and masks `y` `(n, …, h, w)`, or None, each with the seed of its draws. An image that is not finite comes out so."
        floating, pixels = x.is_floating_point(), x.detach().as_subclass(torch.Tensor)
        bad = ~pixels.isfinite().flatten(1).all(1)
        if floating: pixels = (pixels.nan_to_num(0, 0, 0).clamp(0, 1)*255).round()
        pixels = pixels.to(torch.uint8).movedim(1, -1).cpu().numpy()
        labels = None if y is None else _as_array(y)
        done = []
        with forked('albumentations'):          # transforms of the user's own may draw from the streams of Python and NumPy
            for i, seed in enumerate(seeds): done.append(self.one(np.ascontiguousarray(pixels[i]), None if y is None else labels[i], seed))
        images, masks = zip(*done)
        if len(sizes := {o.shape[:2] for o in images}) > 1:
            got = ' and '.join(f'{h}×{w}' for h, w in sorted(sizes)[:2])
            raise BadValue(f'albumentations: images of one batch must come out in one size, got {got} px (height×width); end the pipeline with Resize or a crop')
        out = torch.from_numpy(np.stack(images)).movedim(-1, 1).contiguous().to(x.device)
        if floating:
            out = out.to(x.dtype)/255
            out[bad] = torch.nan
        return type(x)(out), None if y is None else _as_masks(masks, y)

    def one(self, image: np.ndarray, mask: np.ndarray | None, seed: int):
        "One image `(h, w, c)` of 8 bits, and its mask, through the Compose."
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # `set_random_seed` of albumentations 2.0.8 gives all transforms the same draws: two flips would always come together
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        done = self.compose(image=image) if mask is None else self.compose(image=image, mask=mask)
        out, mask = done['image'], done.get('mask')
        if isinstance(out, np.ndarray) and out.ndim == 2: out = out[..., None]
        if not isinstance(out, np.ndarray) or out.dtype != np.uint8 or out.ndim != 3 or out.shape[-1] != image.shape[-1]:
            got = f'{getattr(out, "dtype", type(out).__name__)} {tuple(out.shape)}'
            raise BadValue(f'albumentations: the pipeline must give images of 8 bits and {image.shape[-1]} channel(s), got {got}; leave Normalize, ToFloat and '
                           'ToTensorV2 out of it, the loader does that')
        return out, mask


def _seeds(n: int) -> list[int]:
    "48 bits for each of the samples of the batch in hand."
    high, low = ((per_sample(n, 'albumentations', part).double()*2**24).long() for part in ('high', 'low'))
    return ((high << 24) + low).tolist()


def _as_array(y) -> np.ndarray:
    "Masks `(n, h, w)` or `(n, c, h, w)` as OpenCV takes them: channels last, 8 bits where the values allow, else float32, exact to 2²⁴."
    y = y.detach().as_subclass(torch.Tensor).cpu()
    if y.ndim == 4: y = y.movedim(1, -1)
    small = not y.is_floating_point() and (y.dtype is torch.uint8 or bool(((y >= 0) & (y < 256)).all()))
    return np.ascontiguousarray(y.to(torch.uint8 if small else torch.float32).numpy())


def _as_masks(masks, like):
    out = torch.from_numpy(np.stack(masks)).to(like.device, like.dtype)
    return type(like)(out.movedim(-1, 1).contiguous() if like.ndim == 4 else out)


def _composed(given):
    "What was given as a Compose. Raises where it is none, or wants more than images and masks."
    A = _library()
    if isinstance(given, (str, Path)):
        if not Path(given).is_file(): raise NotThere(f'albumentations: no file {given}; write one by albumentations.save(compose, …), JSON or YAML')
        try: given = A.load(given, data_format='yaml' if Path(given).suffix in ('.yaml', '.yml') else 'json')
        except Exception as e: raise BadValue(f'albumentations: {given} holds no pipeline that albumentations.save wrote ({type(e).__name__}: {e})') from None
    parts = (A.BaseCompose, A.BasicTransform)
    if isinstance(given, parts) and not isinstance(given, A.Compose): given = [given]
    if isinstance(given, (list, tuple)) and all(isinstance(t, parts) for t in given): given = A.Compose(list(given))
    if not isinstance(given, A.Compose):
        got = [type(t).__name__ for t in given] if isinstance(given, (list, tuple)) else type(given).__name__
        raise BadValue(f'albumentations: compose must be an albumentations.Compose, a list of its transforms, or the file of a saved one, got {got}')
    if not given.transforms: raise BadValue('albumentations: compose has no transforms, got an empty one; leave the technique out instead')
    if given.processors:
        raise BadValue(f'albumentations: carries images and masks along, got a Compose for {" and ".join(given.processors)}; make it without, or use augment, which moves points')
    return given


def _leaves(compose): return [leaf for t in compose.transforms for leaf in (_leaves(t) if hasattr(t, 'transforms') else [t])]


def _tried(tfm: Albumentations, xb, yb) -> str:
    "Run `tfm` over the first sample, several times; say what it makes of it. Raises for data, or a pipeline, that do not suit."
    A, x = _library(), xb[0]
    masks = [y for y in yb if is_mask(y, x)]
    moves = [type(t).__name__ for t in _leaves(tfm.compose) if not isinstance(t, A.ImageOnlyTransform)]
    for y in yb:
        if isinstance(y, (TensorPoint, TensorBBox)) and moves:
            raise BadValue(f'albumentations: {moves[0]} moves pixels, and points or boxes would stay behind; use augment, which moves them, or transforms of colour only')
    if len(masks) > 1 or any(isinstance(y, TensorImage) for y in masks):
        raise BadValue(f'albumentations: carries one mask along with an image, got targets {shapes(masks)} ({", ".join(type(y).__name__ for y in masks)}); use augment')
    y, n = masks[0] if masks else None, 8
    try: out, _ = tfm.over(x.repeat(n, 1, 1, 1), None if y is None else y.repeat(n, *[1]*(y.ndim-1)), list(range(n)))
    except BadValue: raise
    except Exception as e: raise BadValue(f'albumentations: the pipeline does not take these images {shapes(xb)} ({type(e).__name__}: {e}); try compose(image=…) on one of them') from e
    before, after = ('×'.join(map(str, o.shape[-2:])) for o in (x, out))
    names = ', '.join(type(t).__name__ for t in _leaves(tfm.compose))
    return f'{names} over each training image{" and its mask" if masks else ""}' + (f', {before} → {after} px' if before != after else '')


def _example(learn: Learner) -> dict:
    A = _library()
    return dict(compose=A.Compose([A.Affine(translate_px=(-1, 1), p=.5), A.RandomBrightnessContrast(p=.5)]))


@technique('data', section='Data augmentation', source='arXiv:1809.06839', touches=('inputs',), example=_example)
def albumentations(self: Learner, compose: Callable | Sequence | str) -> Learner:
    """Vary the training images by a pipeline of the library albumentations: some hundred transforms, as users of it have written them.

    `compose`: an `albumentations.Compose`, a list of transforms, or the path of a file that `albumentations.save` wrote (JSON or
    YAML; what the command line takes). A mask moves with its image. Each sample draws by (seed, epoch, sample), whatever seed the
    Compose has. Pixels are 8-bit, `(h, w, c)`; leave out Normalize, ToFloat and ToTensorV2. A pipeline that changes the size must
    give one size; validation keeps its own. It costs time on the processor, image by image, whatever the device: fractions of a
    millisecond to several; `augment` and the single ops take whole batches. Raises `ValueError` for anything else than a pipeline of images and masks, for
    pixels outside [0, 1], points and boxes under transforms that move pixels; `FileNotFoundError` for no such file."""
    given = _composed(compose)
    check_images(self, 'albumentations')
    xb, yb = arriving(self, Albumentations.order)
    check_pixels('albumentations', xb)
    effect = _tried(tfm := Albumentations(given), xb, yb)
    on_batches(self, [tfm], instead_of=lambda t: isinstance(t, Albumentations))
    # as text, in one line: an exported Learner keeps what its techniques were given
    if not isinstance(compose, str): applied(self)['albumentations'].arguments['compose'] = ' '.join(repr(given).split())
    say(self, 'albumentations', effect)
    return self
