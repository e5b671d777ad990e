"Images as fastai's data blocks handle them: read and resized by the calls that serving uses too."
from pathlib import Path

import numpy as np
from fastai.vision.all import PILImage
from fasttransform import Transform
from PIL import Image

from fastrecipes.data.pixels import fit_image, read_image

__all__ = ['Fit', 'RGBImage']


class RGBImage(PILImage):
    "An image as `read_image` reads it: upright, 8 bits, RGB."
    @classmethod
    def create(cls, source: Path | str | bytes | np.ndarray | Image.Image, **kwargs):      # the types that `learn.predict` takes
        return cls(read_image(Image.fromarray(source) if isinstance(source, np.ndarray) else source))


class Fit(Transform):
    "Bring an image to `size` (width, height) with the Pillow call that the bundle uses too."
    order = 1
    def __init__(self, size, resize: str = 'crop'): self.size, self.resize = tuple(size), resize
    def encodes(self, x: PILImage): return type(x)(fit_image(x, self.size, self.resize))
