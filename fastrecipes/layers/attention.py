"Every place of a feature map looks at all others."
import torch
from fastai.basics import Learner, nn
from fastai.layers import SelfAttention

from fastrecipes.errors import BadValue, nearest
from fastrecipes.layers.surgery import Inserted, operate, seeded, trace, uninsert
from fastrecipes.technique import say, technique

__all__ = ['SelfAttention']

MOST = 1024             # places of a map by default: every place looks at all, 4 MB an image at 32×32


@technique('model', section='Layers', source='arXiv:1805.08318', touches=('model', 'inference'), after=('norm', 'coordconv', 'activation'), before=('prune',),
           formula=r'o_j = x_j + \gamma \sum_i \mathrm{softmax}_i\big(f(x_i)^\top g(x_j)\big)\,h(x_i)')
def self_attention(self: Learner, layer: str | None = None) -> Learner:
    """Put a self-attention layer behind `layer`: each place of its map adds what it finds, anywhere in the picture, that resembles it.

    `layer`: the name of a module that gives maps of at least 8 channels; default: the last that gives the largest maps of at most 32×32
    places. What attention adds is multiplied by a weight that starts at 0: a trained network answers as before. Memory and time grow with the
    square of the number of places. It is fastai's `SelfAttention` (SAGAN's) whose weights have a spectral norm of 1 at first and are free
    then: held at 1, for the sake of two networks that play against each other, they could not be copied. Raises `ValueError` for an unknown layer, for one that gives
    no such maps or is used more than once, and where the network has none."""
    seen = trace(self, 'self_attention')
    ours = {n: m for n, m in self.model.named_modules() if isinstance(m, Inserted) and m.by == 'self_attention'}
    added = {o for m in ours.values() for o in (m, *m[1].modules())}

    def name(n): return next((k + n[len(k)+2:] for k in ours if n == f'{k}.0' or n.startswith(f'{k}.0.')), n)       # as it is without what an earlier call put in
    maps = {name(c.name): m for m, c in seen.hidden.items() if c.times == 1 and c.name and m not in added and len(c.gives) == 4 and c.gives[1] >= 8 and c.gives[2]*c.gives[3] > 1}
    if not maps: raise BadValue('self_attention: no layer in front of the last gives maps of 8 channels or more; it is for networks that look at pictures')
    if layer is None:
        places = {n: seen.calls[m].gives[2]*seen.calls[m].gives[3] for n, m in maps.items()}
        most = max((n for n in places.values() if n <= MOST), default=None)
        if most is None: raise BadValue(f'self_attention: all maps have more than {MOST:,} places; name the layer that it is to stand behind, such as {list(maps)[-1]}')
        layer = [n for n, p in places.items() if p == most][-1]
    elif layer not in maps:
        why = 'gives no maps of 8 channels or more, or is used more than once' if layer in dict(self.model.named_modules()) else 'is no layer of this network'
        raise BadValue(f'self_attention: {layer!r} {why}{nearest(layer, maps) or "; take " + list(maps)[-1]}')
    host = maps[layer]
    c, h, w = seen.calls[host].gives[1:]
    with seeded(self, 'self_attention', c): new = _plain(SelfAttention(c))
    was = ', '.join(ours)
    if ours: uninsert(self, 'self_attention')
    operate(self, {host: Inserted('self_attention', 0, host, new)}, 'self_attention')
    say(self, 'self_attention', f'1 layer put behind {layer}, where {h}×{w} places of {c} channels look at one another'
        + (f'; the one behind {was} is gone, with what it learned' if was else ''))
    return self


def _plain(layer: SelfAttention) -> SelfAttention:
    "The layer with plain convolutions, their weights divided by their largest singular value, once: torch 2.15 leaves a hook on one whose spectral norm is removed."
    for m in (layer.query, layer.key, layer.value):
        w = m[0].weight_orig.detach()
        m[0] = nn.Conv1d(w.shape[1], w.shape[0], 1, bias=False)
        m[0].weight.data = w/torch.linalg.matrix_norm(w[:, :, 0], 2)
    return layer
