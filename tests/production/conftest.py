"A folder of photos as people have them, a small network on it, and its bundle."
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import Learner, nn
from fastai.vision.all import Normalize, accuracy
from PIL import Image

from fastrecipes.data.folders import image_folder
from fastrecipes.recipes.ship import ship

COLOURS = dict(blue=(30, 60, 220), green=(40, 200, 60), red=(220, 50, 40))


@pytest.fixture(scope='session')
def mixed_photos(tmp_path_factory):
    "Three classes of 14 images: PNG and JPEG, upright and turned, grey, 16 bits, palette, alpha, CMYK, 9 to 60 px a side."
    root, rng = tmp_path_factory.mktemp('mixed'), np.random.default_rng(0)
    for label, colour in COLOURS.items():
        (root/label).mkdir()
        for i in range(14):
            h, w = rng.integers(9, 61, 2)
            im = Image.fromarray(np.clip(rng.normal(colour, 60, (h, w, 3)), 0, 255).astype(np.uint8))
            _save(im, root/label/f'{i:02}', i)
    return root


def _save(im, stem, i):
    turned = Image.Exif()
    turned[0x0112] = 1 + i % 8
    kind = i % 7
    if kind == 0: im.save(f'{stem}.png')
    if kind == 1: im.save(f'{stem}.jpg', exif=turned)
    if kind == 2: im.quantize(16).save(f'{stem}.png')
    if kind == 3: Image.fromarray(np.asarray(im.convert('L')).astype(np.uint16)*257).save(f'{stem}.png')
    if kind == 4: im.convert('CMYK').save(f'{stem}.jpg')
    if kind == 5:
        im.putalpha(Image.linear_gradient('L').resize(im.size))
        im.save(f'{stem}.png')
    if kind == 6: im.convert('L').save(f'{stem}.jpg', exif=turned)


def small_net(c: int = 3):
    "Batch norm and dropout, which a graph must take in evaluation mode."
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, c))


def fitted(photos, resize='crop', loss_func=None, model=None, normalize=True, epochs=2, **kwargs):
    "A Learner on `photos` at 16 px, half of them for validation."
    dls = image_folder(photos, size=16, bs=8, valid=.5, test=0, resize=resize, workers=0, device=torch.device('cpu'))
    if normalize: dls.add_tfms([Normalize.from_stats([.5, .4, .3], [.25, .3, .2], cuda=False)], 'after_batch')
    torch.manual_seed(0)
    learn = Learner(dls, small_net() if model is None else model, loss_func, metrics=accuracy, **kwargs)
    learn.logger = print
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2)
    return learn


@pytest.fixture
def make_learn(mixed_photos): return partial(fitted, mixed_photos)


@pytest.fixture
def learn(make_learn): return make_learn()


@pytest.fixture(scope='session')
def shipped(mixed_photos, tmp_path_factory):
    "(Learner, Bundle): one bundle for all that only read it."
    learn = fitted(mixed_photos)
    return learn, ship(learn, tmp_path_factory.mktemp('shipped')/'bundle')
