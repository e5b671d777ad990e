"Norms between the layers of a network: exchanged for those of another kind, or put where there are none."
from collections import Counter
from typing import Literal

from fastai.basics import Learner, nn
from fastai.layers import BatchNorm, InstanceNorm
from torch.nn import BatchNorm1d, BatchNorm2d, GroupNorm, InstanceNorm2d, LayerNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fastrecipes.errors import BadValue, nearest
from fastrecipes.layers.surgery import CONVOLUTIONS, WEIGHTED, Call, Inserted, Trace, operate, trace, uninsert
from fastrecipes.technique import say, technique

__all__ = ['BatchNorm', 'BatchNorm1d', 'BatchNorm2d', 'GroupNorm', 'InstanceNorm', 'InstanceNorm2d', 'LayerNorm', 'OverLast']

NORMS = ('batch', 'layer', 'instance', 'group')
KINDS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm)


class OverLast(nn.Module):
    "A norm of channels `(n, c, …)` for inputs that have them last `(n, …, c)`, as transformers do."
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm
    def forward(self, x): return self.norm(x.movedim(-1, 1)).movedim(1, -1)


def _made(kind: str, c: int, shape: tuple, last: bool, groups: int, eps: float) -> nn.Module | None:
    """A norm of `c` channels for inputs of `shape`, the channels `last` or second; None where the kind has no values to take a mean over.

    'layer' of a map is over all of a sample (as in arXiv:1803.08494, figure 2), of vectors and tokens over each of them."""
    if last and len(shape) == 2: last = False
    places = shape[1:-1] if last else shape[2:]
    n_places, dims = 1, len(places)
    for s in places: n_places *= s
    if kind == 'instance' and n_places < 2: return None
    if kind == 'layer' and (last or not dims): return nn.LayerNorm(c, eps)
    if kind in ('layer', 'group'):
        most = 1 if kind == 'layer' else max(1, min(groups, c//2))
        if c//2 < 1 and n_places < 2: return None
        new = nn.GroupNorm(next(g for g in range(most, 0, -1) if c % g == 0), c, eps)
    else:
        made = {'batch': (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), 'instance': (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)}[kind][max(dims, 1)-1]
        new = made(c, eps=eps, affine=True)
    return OverLast(new) if last else new


def _replaced(m: nn.Module, call: Call, kind: str, groups: int) -> nn.Module | None:
    "What is to stand for the norm `m`: with its weights where they are one a channel, and what timm has in the same layer (activation, dropout) behind it; None: `m` stays."
    core = m.norm if isinstance(m, OverLast) else m
    c = getattr(core, 'num_features', None) or getattr(core, 'num_channels', None) or core.normalized_shape[-1]
    shape = call.takes
    last = isinstance(m, OverLast) or isinstance(core, nn.LayerNorm) and not (type(core) is not nn.LayerNorm and len(shape) == 4 and shape[1] == c)     # LayerNorm2d and its kin
    new = _made(kind, c, shape, last, groups, core.eps)
    inner = new.norm if isinstance(new, OverLast) else new
    if new is None or type(inner) is type(core) and repr(inner) == repr(core): return None
    for name in ('weight', 'bias'):
        old = getattr(core, name, None)
        if old is not None and old.shape == getattr(inner, name).shape:
            getattr(inner, name).data = old.detach().clone()
            getattr(inner, name).requires_grad_(old.requires_grad)
    behind = [getattr(m, n) for n in ('drop', 'act') if isinstance(getattr(m, n, None), nn.Module)]
    return nn.Sequential(new, *behind) if behind else new


def _without(seen: Trace) -> list[nn.Module]:
    "Convolutions and linear layers, but the answering one, that no norm follows at once; those of one place (in gates) have nothing to take a mean over."
    leaves, hidden = seen.entered((*KINDS, OverLast)), seen.hidden
    return [m for m, after in zip(leaves, [*leaves[1:], None]) if isinstance(m, WEIGHTED) and m in hidden and not isinstance(after, (*KINDS, OverLast))
            and not (isinstance(m, CONVOLUTIONS) and all(s == 1 for s in seen.calls[m].gives[2:]))]


@technique('model', section='Layers', source='arXiv:1803.08494', touches=('model', 'inference'), before=('prune',), after=('activation',),
           example=dict(kind='group', insert=True),
           formula=r'y = \gamma\,\frac{x-\mu}{\sqrt{\sigma^2+\varepsilon}} + \beta')
def norm(self: Learner, kind: Literal['batch', 'layer', 'instance', 'group'] = 'group', groups: int = 32, insert: bool = False) -> Learner:
    """Exchange a network's norms for those of one kind, or put norms where it has none.

    `kind`: over what a value's mean and spread are taken: 'batch' (its channel, the whole batch; running means in validation), 'layer'
    (all of its sample; of vectors and tokens, each), 'instance' (its channel in its sample), 'group' (a group of channels in its sample).
    `groups` ≥ 1: at most so many, of two channels or more, and in each layer the largest number that divides its channels. `insert`: put one
    behind each convolution and linear layer that has none instead, but the last. Weights and biases of norms stay where both kinds have
    one for each channel; running means go. Take 'group' where batches are small (below 16 a device), else 'batch': a pretrained network has
    learned its own, and needs some epochs for another. With 'batch' each process of several looks at its own part of the batch.
    Raises `ValueError` for unknown kinds, groups below 1, and where nothing could be exchanged or inserted."""
    if kind not in NORMS: raise BadValue(f'norm: kind must be one of {", ".join(NORMS)}, got {kind!r}{nearest(kind, NORMS)}')
    if groups < 1: raise BadValue(f'norm: groups must be ≥ 1, got {groups}')
    seen = trace(self, 'norm')
    if insert:
        again = bool(ours := [m for m in self.model.modules() if isinstance(m, Inserted) and m.by == 'norm'])
        bare = {m[m.at] for m in ours} | set(_without(seen))
        changes = {m: Inserted('norm', 0, m, new) for m in seen.calls if m in bare and (new := _made(kind, *_channels(m, seen.calls[m]), groups, 1e-5)) is not None}
        if not changes: raise BadValue(f'norm: no layer in front of the last is without a norm that {kind!r} could be; leave out insert to exchange those that are there')
        if again: uninsert(self, 'norm')
        operate(self, changes, 'norm')
        which = Counter(type(m).__name__ for m in changes)
        say(self, 'norm', f'a {kind} norm put behind {len(changes)} layers ({", ".join(f"{n} {t}" for t, n in which.items())})')
        return self
    inner = {m.norm for m in seen.calls if isinstance(m, OverLast)}
    old = [m for m in seen.calls if isinstance(m, (*KINDS, OverLast)) and m not in inner]
    if not old: raise BadValue(f'norm: the network has no norm to exchange; norm({kind!r}, insert=True) puts one behind each of its layers')
    changes = {m: new for m in old if (new := _replaced(m, seen.calls[m], kind, groups)) is not None}
    wrong = [m for m in old if m not in changes and kind == 'instance' and not isinstance(m, _InstanceNorm) and not isinstance(getattr(m, 'norm', None), _InstanceNorm)]
    if wrong and not changes: raise BadValue(f'norm: {kind!r} needs maps, and the norms of this network meet vectors; take layer or group')
    operate(self, changes, 'norm')
    were = ', '.join(sorted({type(m).__name__ for m in changes}))
    stays = f'; {len(wrong)} stay, which meet single vectors' if wrong else ''
    if changes: say(self, 'norm', f'{len(changes)} norms replaced by {kind} norms (they were {were}){stays}')
    else: say(self, 'norm', f'all {len(old)} norms are of that kind already', aloud=True)
    return self


def _channels(m: nn.Module, call: Call) -> tuple[int, tuple, bool]:
    "How many channels a layer gives, the shape, and whether they come last."
    linear = isinstance(m, nn.Linear)
    return m.out_features if linear else m.out_channels, call.gives, linear
