"Weights that do little set to 0, and kept there: the network loses nothing, and compresses."
from collections.abc import Sequence

import torch
from fastai.basics import Learner, nn
from fastai.callback.fp16 import MixedPrecision
from torch.nn.utils import parameters_to_vector
from torch.nn.utils import prune as torch_prune

from fastrecipes.errors import BadValue, nearest
from fastrecipes.technique import TechniqueCallback, say, technique

__all__ = ['ThresholdPruning', 'Prune', 'pruned_info']

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


class ThresholdPruning(torch_prune.BasePruningMethod):
    "Prune the weights of absolute value up to `threshold`; works with everything in `torch.nn.utils.prune`."
    PRUNING_TYPE = 'unstructured'

    def __init__(self, threshold: float): self.threshold = threshold
    def compute_mask(self, t, default_mask): return default_mask*(t.abs() > self.threshold)


class Prune(TechniqueCallback):
    """Hold the masks, and set what they mask to 0 before a fit and after each step; its gradient too, so no optimizer remembers it.

    The masks lie here and not in the model: its parameters and checkpoints keep their names and sizes."""
    order, run_valid = MixedPrecision.order+.5, False      # once gradients are unscaled, before they are clipped

    def __init__(self, masks):                              # [(module, parameter's name, mask)]
        self.masks, self.kept = [(m, name) for m, name, _ in masks], [mask for *_, mask in masks]       # tensors alone: they go with checkpoints, and come back

    def items(self) -> list[tuple[nn.Module, str, torch.Tensor]]: return [(m, name, mask) for (m, name), mask in zip(self.masks, self.kept, strict=True)]

    def before_fit(self): self.apply()
    def after_step(self): self.apply()

    def before_step(self):
        for m, name, mask in self.items():
            if (grad := getattr(m, name).grad) is not None: grad.mul_(mask.to(grad))

    def apply(self):
        "Set what is masked to 0."
        with torch.no_grad():
            for m, name, mask in self.items(): (w := getattr(m, name)).mul_(mask.to(w))

    @property
    def share(self) -> float: return 1 - sum(float(mask.sum()) for mask in self.kept)/sum(mask.numel() for mask in self.kept)


@technique('model', section=('Pruning', 'Regularization'), source='arXiv:1506.02626', touches=('weights', 'inference'),
           formula=r'w \leftarrow m \odot w, \qquad m_i = [\,|w_i| > q\,]')
def prune(self: Learner, amount: float | None = None, threshold: float | None = None, layers: list[str] | None = None) -> Learner:
    """Set the smallest weights to 0, now, and keep them there in every later fit.

    `amount` in [0, 1): the share of all weights of `layers` together, by absolute value (default .2); or `threshold` ≥ 0: all weights
    up to it. `layers`: names of modules, modules, or pairs (module, 'weight'); default: every convolution and linear layer. Call it on
    a trained network and fit again; again with a larger amount to go on (amounts are of the original weights). Masks stay out of
    checkpoints. It makes no network faster, and its file smaller only once compressed: `prune` of `compress` and `pipeline` is another
    thing, and removes whole channels.
    Raises `ValueError` outside the ranges, for both at once, for unknown layers, and for an amount below what is pruned already."""
    if amount is None and threshold is None: amount = .2
    if amount is not None and threshold is not None: raise BadValue(f'prune: amount or threshold, not both; got {amount=}, {threshold=}')
    if amount is not None and not 0 <= amount < 1: raise BadValue(f'prune: amount must be in [0, 1), got {amount}')
    if threshold is not None and threshold < 0: raise BadValue(f'prune: threshold must be ≥ 0, got {threshold}')
    if not (weights := _weights(self.model, layers)): raise BadValue('prune: the network has no convolution and no linear layer; name its weights by layers')
    before = _zeros(weights)
    if amount is not None and amount < before - 1e-9 and (held := getattr(self, 'prune_cb', None)) and amount < held.share - 1e-9:
        raise BadValue(f'prune: {before:.1%} of these weights are pruned already, and {amount:.1%} would bring some back; build the Learner again for less')
    _hold(self, _masks(weights, torch_prune.L1Unstructured(amount) if amount is not None else ThresholdPruning(threshold)))
    after = _zeros(weights)
    say(self, 'prune', f'{after:.1%} of {sum(getattr(m, n).numel() for m, n in weights):,} weights are 0 (before: {before:.1%})',
        aloud=after == before)
    return self


def _weights(model, layers) -> list[tuple[nn.Module, str]]:
    "(module, name of a parameter) for what `layers` says; raises for what it does not find."
    if layers is None: return [(m, 'weight') for m in model.modules() if isinstance(m, KINDS)]
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not len(layers): raise BadValue(f'prune: layers must be a list, got {layers!r}')
    named, found = dict(model.named_modules()), []
    for layer in layers:
        m, name = layer if isinstance(layer, tuple) else (layer, 'weight')
        if isinstance(m, str) and m not in named:
            raise BadValue(f'prune: no layer {m!r}{nearest(m, [n for n, o in named.items() if isinstance(o, KINDS)])}')
        m = named[m] if isinstance(m, str) else m
        inside = [(o, name) for o in m.modules() if isinstance(o, KINDS)] if isinstance(m, nn.Module) and not isinstance(getattr(m, name, None), nn.Parameter) else [(m, name)]
        if not inside or not all(isinstance(getattr(o, n, None), nn.Parameter) for o, n in inside): raise BadValue(f'prune: {layer!r} has no parameter {name!r}')
        found += [pair for pair in inside if not any(pair[0] is o and pair[1] == n for o, n in found)]
    return found


def _masks(weights, method) -> list[tuple[nn.Module, str, torch.Tensor]]:
    "What `method` of torch.nn.utils.prune keeps of all these weights together; `prune.global_unstructured` would rename and reorder the parameters."
    params = [getattr(m, n).detach() for m, n in weights]
    flat = parameters_to_vector(params)
    parts = method.compute_mask(flat, torch.ones_like(flat)).bool().split([p.numel() for p in params])
    return [(m, n, part.view_as(p)) for (m, n), p, part in zip(weights, params, parts)]


def _hold(learn: Learner, masks):
    "Put the callback on `learn`, with the masks it held for other layers."
    old = next((cb for cb in learn.cbs if type(cb) is Prune), None)
    kept = [o for o in old.items() if not any(o[0] is m and o[1] == n for m, n, _ in masks)] if old else []
    if old: learn.remove_cb(old)
    learn.add_cb(cb := Prune(kept + masks))
    cb.apply()


def _zeros(weights) -> float:
    "The share of these weights that is 0."
    ws = [getattr(m, n).detach() for m, n in weights]
    return sum(int((w == 0).sum()) for w in ws)/max(1, sum(w.numel() for w in ws))


def pruned_info(model: nn.Module | Learner) -> dict[str, float]:
    """Print and return how much of each weight of `model` is 0, in % (0–100), by the name of its module, and `'Total'` over all of them.

    Convolutions and linear layers, however deep they are nested; masks of `torch.nn.utils.prune` that are still on count as well."""
    if isinstance(model, Learner): model = model.model
    if not isinstance(model, nn.Module): raise BadValue(f'pruned_info: a network or a Learner, got {type(model).__name__}')
    named = [(name or type(m).__name__, m.weight.detach()) for name, m in model.named_modules() if isinstance(m, KINDS)]
    info = {name: 100*float((w == 0).float().mean()) for name, w in named}
    n = sum(w.numel() for _, w in named)
    info['Total'] = 100*sum(int((w == 0).sum()) for _, w in named)/n if n else 0.
    for name, pct in info.items(): print(f'{name} {pct:.2f}%')
    return info
