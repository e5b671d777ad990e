"What weights begin as."
from collections.abc import Callable
from inspect import signature
from typing import Literal

import torch
from fastai.basics import Learner, get_model, nn

from fastrecipes.arguments import check_names
from fastrecipes.errors import BadValue, nearest
from fastrecipes.layers.surgery import CONVOLUTIONS, WEIGHTED, seeded, trace
from fastrecipes.technique import say, technique

__all__ = ['INITS', 'delta_orthogonal_', 'init_weights', 'weight_init']

LAYERS = ('all', 'last')


def delta_orthogonal_(weight: torch.Tensor, gain: float = 1., groups: int = 1) -> torch.Tensor:
    """Fill the weight of a convolution `(out, in/groups, k, …)` with 0 but at its centre, and that with orthonormal columns times `gain`, in place.

    A signal keeps its norm (times `gain`) through any number of such layers of stride 1, at every place of a map: 10,000 layers of tanh
    train with it (arXiv:1806.05393). Of a ReLU's answers half the squares are lost: gain=2**.5 makes up for them. Raises `ValueError` where a
    group has fewer outputs than inputs, for columns cannot be orthonormal then, and for kernels of an even side, which have no centre."""
    if weight.ndim < 3: raise BadValue(f'delta_orthogonal: it is for the weights of convolutions, (out, in, k, …), got {tuple(weight.shape)}; linear layers have nn.init.orthogonal_')
    n_out, n_in = weight.shape[0]//groups, weight.shape[1]
    if n_out < n_in: raise BadValue(f'delta_orthogonal: a layer of {n_in} inputs and {n_out} outputs cannot keep the norm of a signal; it needs outputs ≥ inputs, {n_in} or more')
    if any(k % 2 == 0 for k in weight.shape[2:]): raise BadValue(f'delta_orthogonal: a kernel of {"×".join(map(str, weight.shape[2:]))} has no centre; take odd sides')
    centre = tuple(k//2 for k in weight.shape[2:])
    with torch.no_grad():
        weight.zero_()
        for part in weight.chunk(groups): part[(..., *centre)] = nn.init.orthogonal_(torch.empty(n_out, n_in), gain).to(weight)
    return weight


INITS = dict(constant=nn.init.constant_, uniform=nn.init.uniform_, normal=nn.init.normal_, xavier_uniform=nn.init.xavier_uniform_, xavier_normal=nn.init.xavier_normal_,
             kaiming_uniform=nn.init.kaiming_uniform_, kaiming_normal=nn.init.kaiming_normal_, delta_orthogonal=delta_orthogonal_)
OWN = dict(constant=dict(val=0.))


def init_weights(kind: str = 'kaiming_normal', **args) -> Callable:
    """A function of a layer, for `model.apply(init_weights('uniform', a=-1., b=1.))`: convolutions and linear layers get new weights, and biases of 0.

    `kind`: 'constant' (`val`, default 0), 'uniform' (from `a` to `b`, 0 to 1), 'normal' (`mean` 0, `std` 1), 'xavier_uniform', 'xavier_normal' (`gain`
    1), 'kaiming_uniform', 'kaiming_normal' (`a` the slope below 0, `mode` 'fan_in' or 'fan_out', `nonlinearity`): those of `torch.nn.init`;
    'delta_orthogonal' (`gain` 1): `delta_orthogonal_` for convolutions, orthogonal for linear layers. All other layers are left alone. A
    constant gives all units of a layer the same gradient: they stay equal for ever. Raises `ValueError` for other kinds and for empty ranges,
    `TypeError` for arguments that the kind does not take."""
    if kind not in INITS: raise BadValue(f'init_weights: kind must be one of {", ".join(INITS)}, got {kind!r}{nearest(kind, INITS)}')
    f = INITS[kind]
    check_names(f'init_weights {kind!r}', args, [n for n in signature(f).parameters if n not in ('tensor', 'weight', 'generator', 'groups')])
    args = {**OWN.get(kind, {}), **args}
    if kind == 'uniform' and not args.get('a', 0.) < args.get('b', 1.): raise BadValue(f'init_weights: a must be below b, got a={args.get("a", 0.)}, b={args.get("b", 1.)}')
    if kind == 'normal' and not args.get('std', 1.) >= 0: raise BadValue(f'init_weights: std must be ≥ 0, got {args["std"]}')

    def init(m: nn.Module):
        if not isinstance(m, WEIGHTED): return
        if kind != 'delta_orthogonal': f(m.weight, **args)
        elif isinstance(m, nn.Linear): nn.init.orthogonal_(m.weight, **args)
        elif getattr(m, 'transposed', False): raise BadValue('init_weights: delta_orthogonal is for convolutions, not for transposed ones; leave those out of what apply meets')
        else: delta_orthogonal_(m.weight, **args, groups=m.groups)
        if m.bias is not None: nn.init.zeros_(m.bias)
    return init


def weight_init(m: nn.Module):
    """For `model.apply(weight_init)`: Xavier-uniform weights; of linear layers with biases of .01, of convolutions with the gain of a ReLU (√2) and biases of 0.

    Told by what a layer is, not by its name; layers without bias, and all others, are fine."""
    if isinstance(m, nn.Linear):
        nn.init.xavier_uniform_(m.weight)
        if m.bias is not None: nn.init.constant_(m.bias, .01)
    elif isinstance(m, CONVOLUTIONS):
        nn.init.xavier_uniform_(m.weight, gain=nn.init.calculate_gain('relu'))
        if m.bias is not None: nn.init.zeros_(m.bias)


@technique('model', section='Layers', source='arXiv:1502.01852', touches=('model', 'inference'), before=('activation', 'coordconv', 'norm', 'prune', 'self_attention'),
           formula=r'\mathrm{Var}\,w = \frac{2}{n_\text{in}} \ \text{ (Kaiming)}, \qquad \frac{2}{n_\text{in}+n_\text{out}} \ \text{ (Xavier)}')
def initialize(self: Learner, kind: Literal['constant', 'uniform', 'normal', 'xavier_uniform', 'xavier_normal', 'kaiming_uniform', 'kaiming_normal',
                                            'delta_orthogonal'] = 'kaiming_normal', layers: Literal['all', 'last'] = 'all', args: dict | None = None) -> Learner:
    """Begin with new weights: those of all convolutions and linear layers, or of the last one, which gives the answers.

    `kind` and `args`: those of `init_weights`, as initialize('normal', args=dict(std=.01)). 'kaiming_normal' is for ReLU and its kin, 'xavier_…' for
    tanh, 'delta_orthogonal' for very deep networks without norms (it needs convolutions that do not narrow). `layers`: 'all', refused where
    a part is frozen, for it was trained before; 'last' alone is fine there. Drawn by the seed. Raises `ValueError` for other kinds and layers."""
    f = init_weights(kind, **(args or {}))
    if layers not in LAYERS: raise BadValue(f'initialize: layers must be one of {", ".join(LAYERS)}, got {layers!r}{nearest(layers, LAYERS)}')
    model = get_model(self.model)
    if layers == 'last': found = [m for m in [trace(self, 'initialize').answering] if m is not None]
    else: found = [m for m in model.modules() if isinstance(m, WEIGHTED) and m._parameters.get('weight') is not None]
    if not found: raise BadValue('initialize: the network has no convolution and no linear layer; fill other weights with torch.nn.init')
    if layers == 'all' and any(not p.requires_grad for p in model.parameters()):
        raise BadValue("initialize: a part of the network is frozen, for it was trained before, and that would be lost; take layers='last', or unfreeze it first")
    if kind == 'delta_orthogonal': _check_widths(found)
    with seeded(self, 'initialize', kind):
        for m in found: f(m)
    if self.opt is not None: self.opt.clear_state()             # what it remembers is of weights that are gone
    n, of = sum(m.weight.numel() for m in found), {p for m in found for p in m.parameters()}
    others = sum(p.numel() for p in model.parameters() if p.ndim > 1 and p not in of) if layers == 'all' else 0
    say(self, 'initialize', f'{n:,} weights of {len(found)} layer{"s"*(len(found) > 1)} begin anew ({kind}), their biases at 0'
        + (f'; {others:,} of other layers stay' if others else ''))
    return self


def _check_widths(found: list[nn.Module]):
    "Raise, before any weight is changed, where one of the layers cannot be delta-orthogonal."
    with torch.random.fork_rng([]):
        for m in found:
            if isinstance(m, nn.Linear): continue
            if getattr(m, 'transposed', False): raise BadValue('initialize: delta_orthogonal is for convolutions, and this network has transposed ones; take kaiming_normal')
            try: delta_orthogonal_(torch.empty(m.weight.shape), groups=m.groups)
            except BadValue as e: raise BadValue(f'initialize: {e}; or take kaiming_normal') from None
