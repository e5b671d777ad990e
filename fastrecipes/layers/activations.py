"The functions between layers: torch's own where it has them, those it lacks, all of them in one picture, and a network's exchanged for another."
from typing import Literal

import torch
from fastai.basics import Learner, nn
from fastai.layers import Mish, Swish
from timm.layers import activations as of_timm
from timm.layers import activations_me as frugal
from torch.nn import ELU, GELU, SELU, LeakyReLU, PReLU, ReLU, Sigmoid, Softmax, Tanh
from torch.nn import functional as F

from fastrecipes.errors import BadValue, nearest
from fastrecipes.layers.surgery import operate, trace
from fastrecipes.technique import say, technique

__all__ = ['ACTIVATIONS', 'ClampGate', 'ELU', 'ELiSH', 'GELU', 'GLU', 'LeakyReLU', 'Mish', 'MyActFunc1', 'MyActFunc2', 'MyActFunc3', 'PReLU', 'RationalGate',
           'ReLU', 'SELU', 'SERLU', 'ShiftedReLU', 'ShiftedTanhGate', 'Sigmoid', 'Softmax', 'Swish', 'Tanh', 'TanhGate', 'plot_activations']


class ShiftedReLU(nn.Module):
    "max(x, 0) − 1/2, at each element of `x`: a ReLU whose answers are nearer to a mean of 0. In [−.5, ∞)."
    def forward(self, x): return F.relu(x) - .5


class SERLU(nn.Module):
    """λx for x ≥ 0 and λαx·eˣ below, at each element: it keeps mean 0 and variance 1 as `SELU` does, and forgets large negative values.

    λ = 1.07862, α = 2.90427 (arXiv:1807.10117). In [−λα/e, ∞), lowest at −1."""
    scale, alpha = 1.07862, 2.90427
    def forward(self, x): return self.scale*torch.where(x >= 0, x, self.alpha*x*x.clamp(max=0).exp())      # clamped: ∞·0 would be the gradient of the branch not taken


class ELiSH(nn.Module):
    "x·σ(x) for x ≥ 0 and (eˣ−1)·σ(x) below, at each element (arXiv:1808.00783): swish on the right, ELU times a gate on the left."
    def forward(self, x): return torch.where(x >= 0, x, torch.expm1(x.clamp(max=0)))*x.sigmoid()


class TanhGate(nn.Module):
    "x·(tanh(x)+1)/2, at each element: x·σ(2x), a swish that turns twice as fast."
    def forward(self, x): return x*(x.tanh()+1)/2


class ShiftedTanhGate(nn.Module):
    "x·(tanh(x+1)+1)/2, at each element: the gate of `TanhGate` half open at −1."
    def forward(self, x): return x*((x+1).tanh()+1)/2


class ClampGate(nn.Module):
    """x·clamp(x+1, 0, 1), at each element: 0 up to −1, x from 0 on, the parabola x²+x between them.

    Equals x·((2x+1)/(|x+1|+|x|)/2+1/2), the form in which it is also known."""
    def forward(self, x): return x*(x+1).clamp(0, 1)


MyActFunc1, MyActFunc2, MyActFunc3, RationalGate = TanhGate, ShiftedTanhGate, ClampGate, ClampGate


class GLU(nn.Module):
    """linear1(x)·σ(linear2(x)) `(n, …, n_out)` for x `(n, …, n_in)`: one linear layer opens and shuts another (arXiv:1612.08083).

    `torch.nn.GLU` has no weights: it halves an input that holds both parts. Raises `ValueError` for widths below 1."""
    def __init__(self, n_in: int, n_out: int | None = None, bias: bool = True):
        super().__init__()
        n_out = n_in if n_out is None else n_out
        for what, n in (('n_in', n_in), ('n_out', n_out)):
            if n < 1: raise BadValue(f'GLU: {what} must be ≥ 1, got {n}')
        self.linear1, self.linear2 = (nn.Linear(n_in, n_out, bias) for _ in range(2))

    def forward(self, x): return self.linear1(x)*self.linear2(x).sigmoid()


ACTIVATIONS = dict(softmax=Softmax, sigmoid=Sigmoid, tanh=Tanh, relu=ReLU, shifted_relu=ShiftedReLU, leaky_relu=LeakyReLU, prelu=PReLU, elu=ELU, selu=SELU, serlu=SERLU,
                   gelu=GELU, swish=Swish, elish=ELiSH, mish=Mish, tanh_gate=TanhGate, shifted_tanh_gate=ShiftedTanhGate, clamp_gate=ClampGate, glu=GLU)
NOT_HIDDEN = dict(glu='has weights of its own and is built for a width: put GLU(n_in, n_out) in place of a linear layer',
                  softmax='makes shares of a sum of 1, which the loss does to the answers of the last layer already',
                  sigmoid='belongs behind the last layer or to a gate; between layers its slope of at most 1/4 starves those in front')
HIDDEN = [n for n in ACTIVATIONS if n not in NOT_HIDDEN]
KINDS = (*(ACTIVATIONS[n] for n in HIDDEN), nn.ReLU6, nn.RReLU, nn.CELU, nn.Hardswish, nn.Softplus, of_timm.Swish, of_timm.Mish, of_timm.Tanh, of_timm.HardSwish,
         of_timm.HardMish, of_timm.PReLU, of_timm.GELU, of_timm.GELUTanh, of_timm.QuickGELU, frugal.SwishMe, frugal.MishMe, frugal.HardSwishMe, frugal.HardMishMe)


@technique('model', section='Layers', source='arXiv:1908.08681', touches=('model', 'inference'))
def activation(self: Learner, kind: Literal['tanh', 'relu', 'shifted_relu', 'leaky_relu', 'prelu', 'elu', 'selu', 'serlu', 'gelu', 'swish', 'elish', 'mish', 'tanh_gate',
                                            'shifted_tanh_gate', 'clamp_gate'] = 'mish') -> Learner:
    """Exchange the activations between the layers of a network for those of one kind; weights stay as they are.

    What stands behind the last layer, and the sigmoids of gates, are left alone; those written as functions in a `forward` cannot be
    exchanged, and the effect counts them. A pretrained network knows its own activations: give it an epoch or two to get used to others.
    'mish' and 'gelu' cost about twice the time of 'relu' in that layer, and its memory. Raises `ValueError` for unknown kinds, for 'glu',
    'softmax' and 'sigmoid', which have no place between layers, and where the network has no activation that can be exchanged."""
    if kind in NOT_HIDDEN: raise BadValue(f'activation: {kind!r} {NOT_HIDDEN[kind]}; take one of {", ".join(HIDDEN)}')
    if kind not in HIDDEN: raise BadValue(f'activation: kind must be one of {", ".join(HIDDEN)}, got {kind!r}{nearest(kind, HIDDEN)}')
    seen = trace(self, 'activation')
    old = [m for m in seen.hidden if isinstance(m, KINDS)]
    functions = ', '.join(f'{n} {name}' for name, n in seen.functions.items())
    if not old:
        raise BadValue('activation: the network has no activation between its layers' + (f' but functions in a `forward` ({functions}); write them as modules, such as nn.ReLU()'
                       if functions else '; it takes layers behind one another with nn.ReLU() or the like between them'))
    cls = ACTIVATIONS[kind]
    operate(self, {m: cls() for m in old}, 'activation')
    were = ', '.join(sorted({type(m).__name__ for m in old}))
    same = all(type(m) is cls for m in old)
    say(self, 'activation', (f'all {len(old)} are {cls.__name__} already' if same else f'{len(old)} replaced by {cls.__name__} (they were {were})')
        + (f'; functions in a `forward` stay: {functions}' if functions else ''), aloud=same)
    return self


def plot_activations(kinds: list[str] | str | None = None, low: float = -4., high: float = 4.):
    """One figure of activations `kinds` (default: all of `ACTIVATIONS` that map a number to a number) over [`low`, `high`], with their derivatives, dashed.

    'softmax' is shown as what it gives x beside 0, and 'glu' for the weights 1. Returns the figure. Raises `ValueError` for unknown kinds
    and unless low < high."""
    from matplotlib import pyplot as plt
    kinds = list(ACTIVATIONS) if kinds is None else [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in kinds:
        if kind not in ACTIVATIONS: raise BadValue(f'plot_activations: kinds must be of {", ".join(ACTIVATIONS)}, got {kind!r}{nearest(kind, ACTIVATIONS)}')
    if not kinds: raise BadValue('plot_activations: kinds is empty; leave it out for all of them')
    if not low < high: raise BadValue(f'plot_activations: low must be below high, got {low=}, {high=}')
    columns = min(6, len(kinds))
    rows = -(-len(kinds)//columns)
    fig, axes = plt.subplots(rows, columns, figsize=(2.3*columns, 2.2*rows), sharex=True, squeeze=False, layout='constrained')
    for ax in axes.flat[len(kinds):]: ax.set_axis_off()
    for kind, ax in zip(kinds, axes.flat):
        x = torch.linspace(low, high, 801, dtype=torch.float64, requires_grad=True)
        y = _of_numbers(kind)(x)
        slope, = torch.autograd.grad(y.sum(), x)
        for o, style in ((y, '-'), (slope, '--')): ax.plot(x.detach(), o.detach(), style, lw=1.4 if style == '-' else 1)
        ax.set_title(ACTIVATIONS[kind].__name__, fontsize=9)
        ax.set_ylim(max(-1.6, float(y.detach().min())-.2, low), min(2.6, high))
        ax.axhline(0, color='.8', lw=.6, zorder=0), ax.axvline(0, color='.8', lw=.6, zorder=0)
        ax.tick_params(labelsize=7)
    fig.legend(['value', 'derivative'], loc='outside lower center', ncols=2, fontsize=8, frameon=False)
    return fig


def _of_numbers(kind: str):
    "An activation as a function of numbers `(n,)`."
    if kind == 'softmax': return lambda x: torch.stack([x, torch.zeros_like(x)], -1).softmax(-1)[:, 0]
    if kind != 'glu': return ACTIVATIONS[kind]().double()
    unit = GLU(1, bias=False).double()
    for p in unit.parameters(): nn.init.ones_(p)
    return lambda x: unit(x[:, None])[:, 0]
