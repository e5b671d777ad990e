"Units, weights and whole blocks left out at random while a network trains; the network itself stays as it is."
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from fastai.basics import Learner, get_model, nn
from fastai.layers import ResBlock
from timm.layers import DropPath
from timm.models import resnet as of_timm
from torchvision.models import mobilenetv2, mobilenetv3, regnet, resnet
from torchvision.ops import StochasticDepth as TorchvisionDepth

from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.errors import BadValue, nearest
from fastrecipes.layers.surgery import WEIGHTED, trace
from fastrecipes.randomness import key_of
from fastrecipes.repairs import fitting
from fastrecipes.technique import TechniqueCallback, put, say, technique

__all__ = ['DropConnect', 'DropUnits', 'DropBlocks', 'PermanentDropConnect', 'uniform_of']

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
LAYERS = ('all', 'first')


def uniform_of(index: torch.Tensor, *key) -> torch.Tensor:
    "One number in [0, 1) for each of `index` (int64, any shape), on its device: `randomness.uniform`, so SplitMix64 seeded by `key`, in torch."
    def bits(k: int) -> int: return k - 2**64 if k >= 2**63 else k              # int64 wraps around as uint64 does
    z = (index + 1)*bits(0x9E3779B97F4A7C15) + bits(key_of(*key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)): z = (z ^ _right(z, shift))*bits(factor)
    return _right(z ^ _right(z, 31), 11).double()*2.**-53


def _right(z: torch.Tensor, n: int) -> torch.Tensor:
    "Shifted by `n` bits, zeros coming in."
    return (z >> n) & ((1 << (64-n))-1)


class _Dropping(TechniqueCallback):
    "Hook into the layers of `find()` for the forward pass of each training batch, and only for that long: no layer is changed, none keeps a hook."
    order, run_valid = 19, False        # once pictures are mixed; inside of `Parallel`, which copies what it finds

    def __init__(self, p: float): self.p, self.handles, self.found = p, [], None

    def find(self) -> list[tuple[Callable, Callable]]:
        "(how a layer takes a hook, the hook)."
        raise NotImplementedError

    def before_fit(self):
        if fitting(self.learn): self.found = self.find()        # anew, for layers may have been exchanged since; not in mid-epoch, for it looks at a sample

    def before_batch(self):
        if self.learn.training: self.handles = [register(hook) for register, hook in self.found or ()]

    def after_pred(self): self._unhook()
    def after_cancel_batch(self): self._unhook()
    def abort(self, level): self._unhook()

    def _unhook(self):
        for h in self.handles: h.remove()
        self.handles = []

    def __getstate__(self): return {**vars(self), 'handles': [], 'found': None}

    def rows(self, n: int) -> tuple[torch.Tensor, tuple]:
        "A number for each of `n` rows, and the key they go with: by (seed, epoch, sample) where rows are samples, or several a sample; else by batch."
        cb, dl = keyed(self.learn), self.learn.dl
        own = dl.draws(self.learn.iter) if isinstance(dl, KeyedDL) else ()
        if not len(own) or n % len(own): return torch.arange(n), (cb.seed, *cb.step)
        copies = torch.arange(n//len(own)).repeat_interleave(len(own))          # views of a batch stand behind one another
        return torch.from_numpy(own).long().repeat(n//len(own)) + copies*2**40, (dl.seed, dl.epoch)


class DropUnits(_Dropping):
    "Leave out each unit with probability `p`, in the dropouts that the network has, else in front of its answering layer; the rest is scaled by 1/(1−p)."
    def find(self):
        return [pair for i, (m, front) in enumerate(_units(self.learn)) for pair in (((m.register_forward_pre_hook, partial(self._in_front, i)),) if front else
                ((m.register_forward_pre_hook, self._still), (partial(m.register_forward_hook, always_call=True), partial(self._behind, i, m.p))))]

    def _still(self, m, args): m.p = 0.                         # its own draws are streamed, and may be in place
    def _in_front(self, i, m, args): return (self._drop(i, m, args[0]), *args[1:])

    def _behind(self, i, p, m, args, out):
        m.p = p
        if out is not None: return self._drop(i, m, out)

    def _drop(self, i, m, x):
        if not m.training or not self.p: return x
        whole = type(m) in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout) and x.ndim > 2   # channels, not units
        row, key = self.rows(len(x))
        each = x.shape[1:2] if whole else x.shape[1:]
        index = row.to(x.device)[:, None]*each.numel() + torch.arange(each.numel(), device=x.device)
        keep = (uniform_of(index, *key, 'dropout', i) >= self.p).view(len(x), *each, *[1]*(x.ndim-1-len(each)))
        return _alpha(x, keep, self.p) if isinstance(m, (nn.AlphaDropout, nn.FeatureAlphaDropout)) else x*(keep.to(x.dtype)/(1-self.p))


def _alpha(x, keep, p):
    "Alpha dropout (arXiv:1706.02515): what is left out goes to the lowest value of a SELU, and mean and variance stay those of N(0, 1)."
    low = -1.7580993408473766
    a = ((1-p)*(1+p*low**2))**-.5
    return a*torch.where(keep, x, low) - a*p*low


def _units(learn: Learner) -> list[tuple[nn.Module, bool]]:
    "Dropouts that act, or else the answering layer, in front of which one is to be."
    seen = trace(learn, 'dropout')
    if own := [m for m in seen.calls if isinstance(m, DROPOUTS) and m.p > 0]: return [(m, False) for m in own]
    return [(seen.answering, True)] if seen.answering else []


@technique('train', section='Regularization', source='doi:10.5555/2627435.2670313', touches=('model',),
           formula=r"x' = \frac{m \odot x}{1-p}, \qquad m_i \sim \mathrm{Bernoulli}(1-p)")
def dropout(self: Learner, p: float = .5) -> Learner:
    """Leave out units at random while training, so that none relies on another.

    `p` in [0, 1): the share left out; what is left is multiplied by 1/(1−p). It is set for the dropouts that the network has and uses; one
    without any gets it in front of its last layer. Each sample has draws of its own, keyed by (seed, epoch, sample). Validation and
    inference see the whole network. 0 turns all of a network's dropouts off. Helps networks that learn their data by heart; those that
    underfit, or rely on batch norm, it can cost accuracy: try .2. Raises `ValueError` outside the range, and where no layer is to be found."""
    if not 0 <= p < 1: raise BadValue(f'dropout: p must be in [0, 1), got {p}')
    if not (units := _units(self)): raise BadValue('dropout: the network has neither a dropout nor a linear layer or convolution to put one in front of; use nn.Dropout in it')
    keyed(self)
    put(self, DropUnits(p))
    if units[0][1]: effect = f'{p:.0%} of what goes into the last layer ({type(units[0][0]).__name__}) left out'
    else: effect = f'p of {len(units)} dropouts set to {p:g} (it was {", ".join(sorted({f"{m.p:g}" for m, _ in units}))})'
    if not p: effect += ': nothing is left out'
    say(self, 'dropout', effect, aloud=not p)
    return self


class DropConnect(_Dropping):
    "Multiply weights by a mask over 1−p, another one each step: in place of the parameter while its layer runs, so that gradients reach it through the mask."
    def __init__(self, p, layers):
        super().__init__(p)
        self.layers, self.lent = layers, {}

    def find(self):
        return [pair for i, m in enumerate(_connections(self.learn, self.layers)) for pair in
                ((m.register_forward_pre_hook, partial(self._lend, i)), (partial(m.register_forward_hook, always_call=True), self._put_back))]

    def _lend(self, i, m, args):
        if not m.training or m in self.lent: return
        self.lent[m] = w = m._parameters['weight']
        cb = keyed(self.learn)
        keep = uniform_of(torch.arange(w.numel(), device=w.device), cb.seed, 'dropconnect', i, *cb.step[:2]) >= self.p       # not by rank: all processes hold one network
        m._parameters['weight'] = w*(keep.view_as(w).to(w.dtype)/(1-self.p))

    def _put_back(self, m, args, out):
        if m in self.lent: m._parameters['weight'] = self.lent.pop(m)


class PermanentDropConnect(TechniqueCallback):
    "Hold weights that were left out at 0: before a fit and after each step, and their gradient, so that no optimizer remembers it."
    order, run_valid, undoable = 11, False, False           # once gradients are unscaled, as in `Prune`

    def __init__(self, masks): self.masks = masks           # [(layer, mask)]

    def before_fit(self): self.apply()
    def after_step(self): self.apply()

    def before_step(self):
        for m, mask in self.masks:
            if m.weight.grad is not None: m.weight.grad.mul_(mask.to(m.weight.grad))

    def apply(self):
        "Set what is left out to 0."
        with torch.no_grad():
            for m, mask in self.masks: m.weight.mul_(mask.to(m.weight))


def _connections(learn: Learner, layers: str) -> list[nn.Module]:
    "Convolutions and linear layers that have their own weight, but the answering one."
    found = [m for m in trace(learn, 'dropconnect').hidden if isinstance(m, WEIGHTED) and m._parameters.get('weight') is not None]
    return found[:1] if layers == 'first' else found


@technique('train', section='Regularization', source='https://proceedings.mlr.press/v28/wan13.html', touches=('model', 'inference'),
           example=dict(p=.3),                                  # the contract's network is small, and .5 leaves too little of it
           formula=r"w' = \frac{m \odot w}{1-p}, \qquad m_i \sim \mathrm{Bernoulli}(1-p)")
def dropconnect(self: Learner, p: float = .5, layers: Literal['all', 'first'] = 'all', permanent: bool = False) -> Learner:
    """Leave out weights at random while training: dropout of connections instead of units.

    `p` in [0, 1): the share of weights left out, drawn anew each step and keyed by (seed, epoch, batch); the rest is multiplied by 1/(1−p),
    so that what a layer gives is right on average. `layers`: 'all' convolutions and linear layers but the last, or the 'first' alone. Biases
    stay; validation and inference use all weights. The paper has it in one large linear layer, a mask for each sample; .5 in every
    convolution is much: try .1. `permanent`: one mask for good, in validation and inference too: a network of fewer connections, scaled once;
    it cannot be undone. Raises `ValueError` outside the range, for unknown layers, and where the last layer is the only one with weights."""
    if not 0 <= p < 1: raise BadValue(f'dropconnect: p must be in [0, 1), got {p}')
    if layers not in LAYERS: raise BadValue(f'dropconnect: layers must be one of {", ".join(LAYERS)}, got {layers!r}{nearest(layers, LAYERS)}')
    if not (found := _connections(self, layers)): raise BadValue('dropconnect: no convolution or linear layer in front of the last; a network of one layer has weight_penalty')
    cb = keyed(self)
    if any(type(o) is PermanentDropConnect for o in self.cbs): put(self, PermanentDropConnect([]))      # raises
    n = sum(m.weight.numel() for m in found)
    where = f'{p:.0%} of {n:,} weights in {len(found)} layer{"s"*(len(found) > 1)}'
    if not permanent:
        put(self, DropConnect(p, layers))
        say(self, 'dropconnect', f'{where} left out, others each step' if p else f'{where}: nothing is left out', aloud=not p)
        return self
    self.remove_cb(DropConnect)
    masks = [(m, uniform_of(torch.arange(m.weight.numel(), device=m.weight.device), cb.seed, 'dropconnect for good', i).view_as(m.weight) >= p) for i, m in enumerate(found)]
    put(self, PermanentDropConnect(masks))
    with torch.no_grad():
        for m, mask in masks: m.weight.mul_(mask.to(m.weight)/(1-p))
    say(self, 'dropconnect', f'{where} left out for good')
    return self


class DropBlocks(_Dropping):
    "Leave out the residual branch of block l of L for a sample with probability p·l/L; the others are scaled by 1/(1−p·l/L)."
    def find(self):
        ends = _branches(self.learn)
        return [(m.register_forward_hook, partial(self._drop, i, self.p*i/len(ends))) for i, m in enumerate(ends, 1)]

    def _drop(self, i, p, m, args, out):
        x = args[0] if isinstance(m, (DropPath, TorchvisionDepth)) else out     # what it would drop by itself is not dropped twice
        if not m.training: return
        row, key = self.rows(len(x))
        keep = (uniform_of(row.to(x.device), *key, 'depth', i) >= p).to(x.dtype)/(1-p)
        return x*keep.view(-1, *[1]*(x.ndim-1))


BRANCHES = {resnet.BasicBlock: ('bn2',), resnet.Bottleneck: ('bn3',), of_timm.BasicBlock: ('drop_path', 'se', 'bn2'), of_timm.Bottleneck: ('drop_path', 'se', 'bn3'),
            mobilenetv3.InvertedResidual: ('block',), mobilenetv2.InvertedResidual: ('conv',), regnet.ResBottleneckBlock: ('f',), ResBlock: ('convpath',)}


def _branches(learn: Learner) -> list[nn.Module]:
    "The layer at the end of each residual branch, in the order of the blocks: what is added to what went around it."
    calls = trace(learn, 'stochastic_depth').calls
    named = {o for m in get_model(learn.model).modules() for n, o in m.named_children() if n.startswith('drop_path')}
    ends = {m for m in calls if isinstance(m, (DropPath, TorchvisionDepth)) or m in named}
    for m in calls:
        if (names := BRANCHES.get(type(m))) is None or getattr(m, 'use_res_connect', True) is False: continue
        if (end := next((o for n in names if isinstance(o := getattr(m, n, None), nn.Module)), None)) in calls: ends.add(end)
    return [m for m in calls if m in ends]


@technique('train', section='Regularization', source='arXiv:1603.09382', touches=('model',),
           formula=r'x + \frac{b_l}{1-p_l}\,f_l(x), \qquad b_l \sim \mathrm{Bernoulli}(1-p_l), \quad p_l = p\,l/L')
def stochastic_depth(self: Learner, p: float = .1) -> Learner:
    """Leave out whole residual blocks at random while training: a network that is shallower for each sample, and whole in validation.

    `p` in [0, 1): how often the last block is left out; block l of L is so with probability p·l/L, and multiplied by 1/(1−p·l/L) where it
    is not. Each sample has draws of its own, keyed by (seed, epoch, sample). Finds the blocks of fastai (XResNet), torchvision (ResNet,
    RegNet, MobileNet, EfficientNet, ConvNeXt, Swin) and timm (all that have drop_path), and takes the place of rates set there. .1 to .2 for
    networks of 50 layers, more for deeper ones (.5 in the paper, of 110); small ones lose by it. Raises `ValueError` outside the range, and
    where the network has no residual block that is known."""
    if not 0 <= p < 1: raise BadValue(f'stochastic_depth: p must be in [0, 1), got {p}')
    if not (ends := _branches(self)): raise BadValue('stochastic_depth: the network has no residual block that could be left out; take dropout, or a network such as resnet18')
    keyed(self)
    put(self, DropBlocks(p))
    say(self, 'stochastic_depth', f'{len(ends)} residual blocks left out with probability {p/len(ends):.3g} (the first) to {p:g} (the last)' if p else
        f'{len(ends)} residual blocks at p = 0: nothing is left out', aloud=not p)
    return self
