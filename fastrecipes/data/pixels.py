"How an image file becomes pixels, in training and in serving alike: Pillow and NumPy only."
import io
import os
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastrecipes.errors import BadValue, nearest

__all__ = ['read_image', 'fit_image', 'fit_to', 'RESIZES', 'CROPS']

Resize = Literal['crop', 'squish', 'pad']
RESIZES = get_args(Resize)
CROPS = ('center', 'squash')      # how the makers of published weights read images: to a larger size, and the middle of that
FOREIGN = ('EPS', 'WMF')        # Pillow hands these to another program (Ghostscript, GDI): no place for somebody's upload


def read_image(source) -> Image.Image:
    """An upright 8-bit RGB image from a path, bytes, a binary file or a Pillow image.

    The first frame of an animation; 16 bits scaled to 8, not clipped; transparency on white. Raises `ValueError` with the reason
    in one sentence: no file, empty, not an image, truncated, too many pixels, floating-point pixels."""
    name = _name(source)
    try:
        ours = not isinstance(source, Image.Image)
        im = _open(source) if ours else source
        _check(im)
        im.load()
        return _rgb(_upright(im, in_place=ours))
    except FileNotFoundError: raise BadValue(f'{name}: no such file') from None
    except UnidentifiedImageError: raise BadValue(f'{name}: not an image, or of an unknown kind') from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e: raise BadValue(f'{name}: too many pixels ({e})') from None
    except Exception as e:      # on broken files decoders raise anything: OSError, SyntaxError, RuntimeError (AVIF), struct.error, …
        raise BadValue(f'{name}: {_reason(e)}') from None


def _name(source) -> str:
    "What a message calls `source`: its path where it has one."
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, 'filename', None) or getattr(source, 'name', None)
    return str(name) if isinstance(name, (str, os.PathLike)) and str(name) else 'image'


def _reason(e: Exception) -> str:
    return (getattr(e, 'strerror', None) or str(e) or 'cannot be decoded').split('\n')[0]


def _open(source) -> Image.Image:
    if isinstance(source, (str, os.PathLike)): data = Path(source).read_bytes()
    elif isinstance(source, (bytes, bytearray, memoryview)): data = bytes(source)
    elif hasattr(source, 'read'): data = source.read()
    else: raise TypeError(f'pass a path, bytes, a binary file or a Pillow image, not {type(source).__name__}')
    if not isinstance(data, bytes): raise TypeError('the file is open as text; open it as binary')
    if not data: raise ValueError('the file is empty')
    return Image.open(io.BytesIO(data))


def _check(im: Image.Image):
    "Refuse before anything is decoded: from its limit to twice its limit Pillow itself only warns."
    if im.format in FOREIGN: raise ValueError(f'{im.format} is a program that draws, not pixels')
    if Image.MAX_IMAGE_PIXELS and im.width*im.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f'{im.width}×{im.height}, at most {Image.MAX_IMAGE_PIXELS:,} are read')


def _upright(im: Image.Image, in_place: bool) -> Image.Image:
    "Turned as its EXIF data say; as it is where they are unreadable, for its pixels are not. In place it is not copied."
    try: return ImageOps.exif_transpose(im, in_place=in_place) or im
    except Exception: return im


def _rgb(im: Image.Image) -> Image.Image:
    "Any mode as 8-bit RGB."
    if im.mode.startswith('I'): return _from_deep(im)
    if im.mode == 'F': raise ValueError('its pixels are floating point, and nothing says which value is white; save it with 8 or 16 bits')
    if 'transparency' in im.info or im.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La'):
        im = (im.convert('LA') if im.mode == 'La' else im).convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
    return im.convert('RGB')


def _from_deep(im: Image.Image) -> Image.Image:
    "Integers of more than 8 bits: 65535 is white, and so is the one value that a PNG declares transparent."
    a = np.asarray(im).astype(np.float64)
    if isinstance(clear := im.info.get('transparency'), int): a[a == clear] = 65535
    return Image.fromarray(np.clip(np.rint(a/257), 0, 255).astype(np.uint8)).convert('RGB')


def fit_image(im: Image.Image, size: tuple[int, int], resize: str = 'crop', centering: tuple[float, float] = (.5, .5)) -> Image.Image:
    """Bring `im` to `size` (width, height): cut off what does not fit ('crop'), distort ('squish'), or add black bars ('pad').

    `centering`: which part is kept, or where the image lies between the bars, 0–1 from the left and from the top."""
    if resize == 'crop': return ImageOps.fit(im, size, Image.Resampling.BILINEAR, centering=centering)
    if resize == 'pad': return ImageOps.pad(im, size, Image.Resampling.BILINEAR, centering=centering)
    if resize == 'squish': return im.resize(size, Image.Resampling.BILINEAR)
    raise BadValue(f'resize: one of {", ".join(RESIZES)}, got {resize!r}{nearest(resize, RESIZES)}')


def fit_to(im: Image.Image, contract: dict) -> Image.Image:
    """Bring `im` to the input of a graph by its `contract` (`input` of bundle.json): by `fit_image`, or as published weights have it.

    These resize to `scale` (width, height), distorted ('squash') or by the shorter side ('center'), by Pillow's `interpolation`, and take the middle
    `size`, with black where there is less: what torchvision's `Resize` and `CenterCrop` do, to the pixel."""
    size, resize = tuple(contract['size']), contract['resize']
    if resize not in CROPS: return fit_image(im, size, resize)
    w, h = contract['scale']
    if resize == 'center': w, h = (w, int(w*im.height/im.width)) if im.width <= im.height else (int(h*im.width/im.height), h)
    if im.size != (w, h): im = im.resize((w, h), Image.Resampling[contract['interpolation'].upper()])
    if w < size[0] or h < size[1]: im = _on_black(im, (max(w, size[0]), max(h, size[1])))
    left, top = (round((a-b)/2) for a, b in zip(im.size, size))
    return im.crop((left, top, left+size[0], top+size[1]))


def _on_black(im: Image.Image, size: tuple[int, int]) -> Image.Image:
    "`im` in the middle of a larger black one, one pixel nearer to the upper left where it does not come out even."
    larger = Image.new(im.mode, size)
    larger.paste(im, ((size[0]-im.width)//2, (size[1]-im.height)//2))
    return larger
