"How an image file becomes pixels, in training and in serving alike: Pillow and NumPy only."
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastrecipes.errors import BadValue

__all__ = ['read_image', 'fit_image', 'RESIZES']

RESIZES = ('crop', 'squish', 'pad')


def read_image(source) -> Image.Image:
    """An upright 8-bit RGB image from a path, bytes, a binary file or a Pillow image.

    The first frame of an animation; 16 bits scaled to 8, not clipped; transparency on white. Raises `ValueError` with the reason
    in one sentence: no file, empty, not an image, truncated, too many pixels."""
    name = str(source) if isinstance(source, (str, Path)) else 'image'
    try:
        im = source if isinstance(source, Image.Image) else _open(source)
        im.load()
        return _rgb(ImageOps.exif_transpose(im))
    except FileNotFoundError: raise BadValue(f'{name}: no such file') from None
    except UnidentifiedImageError: raise BadValue(f'{name}: not an image, or of an unknown kind') from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e: raise BadValue(f'{name}: too many pixels ({e})') from None
    except (OSError, SyntaxError, ValueError, EOFError) as e:      # what Pillow's decoders raise for broken files
        raise BadValue(f'{name}: {str(e) or "cannot be decoded"}'.split('\n')[0]) from None


def _open(source) -> Image.Image:
    data = source if isinstance(source, bytes) else Path(source).read_bytes() if isinstance(source, (str, Path)) else source.read()
    if not data: raise ValueError('the file is empty')
    return Image.open(io.BytesIO(data))


def _rgb(im: Image.Image) -> Image.Image:
    "Any mode as 8-bit RGB."
    if im.mode == 'RGB': return im
    if im.mode.startswith('I') or im.mode == 'F': return _from_deep(im)
    if 'transparency' in im.info or im.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La'):
        im = im.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
    return im.convert('RGB')


def _from_deep(im: Image.Image) -> Image.Image:
    "16 bits and more: 65535 is white."
    a = np.asarray(im).astype(np.float64)
    return Image.fromarray(np.clip(np.rint(a*255/65535), 0, 255).astype(np.uint8)).convert('RGB')


def fit_image(im: Image.Image, size: tuple[int, int], resize: str = 'crop', centering: tuple[float, float] = (.5, .5)) -> Image.Image:
    "Bring `im` to `size` (width, height): cut off what does not fit ('crop'), distort ('squish'), or add black bars ('pad')."
    if resize == 'crop': return ImageOps.fit(im, size, Image.Resampling.BILINEAR, centering=centering)
    if resize == 'pad': return ImageOps.pad(im, size, Image.Resampling.BILINEAR, centering=centering)
    return im.resize(size, Image.Resampling.BILINEAR)
