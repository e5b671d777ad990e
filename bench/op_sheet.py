"All ops of the table, at several magnitudes, beside Pillow's and 32 times their difference: `python bench/op_sheet.py sheet.png [image]`."
import argparse

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from fastrecipes.data import ops

SIDE = 160
BILINEAR = Image.Resampling.BILINEAR
ENHANCERS = {name: getattr(ImageEnhance, name.title()) for name in ('color', 'contrast', 'brightness', 'sharpness')}
SHEET = {                                       # op → (magnitudes, ours, Pillow's)
    'rotate': ((-30, 10, 90, 135), ops.rotate, lambda im, v: im.rotate(v, BILINEAR)),
    'translate': ((-40, 12.5, 60, 100), ops.translate, lambda im, v: im.transform(im.size, Image.AFFINE, (1, 0, -v, 0, 1, 0), BILINEAR)),
    'shear': ((-.3, .1, .3, .8), ops.shear, lambda im, v: im.transform(im.size, Image.AFFINE, (1, v, -v*im.height/2, 0, 1, 0), BILINEAR)),
    'autocontrast': ((None,), lambda x, v: ops.autocontrast(x), lambda im, v: ImageOps.autocontrast(im)),
    'equalize': ((None,), lambda x, v: ops.equalize(x), lambda im, v: ImageOps.equalize(im)),
    'invert': ((None,), lambda x, v: ops.invert(x), lambda im, v: ImageOps.invert(im)),
    'posterize': ((1, 2, 4, 6), ops.posterize, ImageOps.posterize),
    'solarize': ((0, 64, 128, 192), ops.solarize, ImageOps.solarize)}
SHEET |= {name: ((0, .5, 1.5, 3), getattr(ops, name), lambda im, v, of=of: of(im).enhance(v)) for name, of in ENHANCERS.items()}


def sheet(image: Image.Image) -> Figure:
    "One row an op: for each magnitude ours, Pillow's, and 32·|difference|."
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    fig = Figure((13, 1.2*len(SHEET)), layout='constrained')
    axes = fig.subplots(len(SHEET), 12)
    for ax in axes.flat: ax.axis('off')
    for row, (name, (magnitudes, ours, theirs)) in zip(axes, SHEET.items()):
        for i, v in enumerate(magnitudes):
            a, b = ours(x, v)[0].permute(1, 2, 0).numpy(), np.array(theirs(image, v))
            gap = np.abs(a.astype(int)-b)
            titles = name if v is None else f'{name} {v:g}', 'Pillow', f'≤ {gap.max()}, {(gap > 0).mean():.2%}'
            for ax, picture, title in zip(row[3*i:3*i+3], (a, b, np.clip(gap*32, 0, 255).astype(np.uint8)), titles):
                ax.imshow(picture)
                ax.set_title(title, fontsize=7)
    return fig


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('sheet', help='the picture to write')
    parser.add_argument('image', nargs='?', help="the picture to start from: scikit-learn's china.jpg unless given")
    asked = parser.parse_args()
    given = Image.open(asked.image).convert('RGB') if asked.image else Image.fromarray(load_sample_image('china.jpg')).crop((120, 0, 520, 400))
    sheet(given.resize((SIDE, SIDE))).savefig(asked.sheet, dpi=110)
