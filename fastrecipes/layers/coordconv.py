"Convolutions that are told where they are."
from copy import copy
from typing import Literal

import torch
from fastai.basics import Learner, nn
from timm.layers import Conv2dSame

from fastrecipes.errors import BadValue, nearest
from fastrecipes.layers.surgery import operate, trace
from fastrecipes.technique import say, technique

__all__ = ['AddCoord2D', 'CoordConv2d']

LAYERS = ('first', 'all')


class AddCoord2D(nn.Module):
    """Images `(n, c, h, w)` with two channels more `(n, c+2, h, w)`: of each place its row, 1/h to 1, then its column, 1/w to 1.

    `len`: the side of square images, or (h, w): the channels are a buffer then, not saved with the weights, and other sizes raise
    `ValueError`; None: worked out for each batch, of any size. arXiv:1807.03247 has −1 to 1, which a convolution with bias makes of these."""
    def __init__(self, len: int | tuple[int, int] | None = None):
        super().__init__()
        self.size = (len, len) if isinstance(len, int) else None if len is None else tuple(len)
        if self.size and (min(self.size) < 1 or self.size[2:] or not self.size[1:]): raise BadValue(f'AddCoord2D: len must be a side ≥ 1 or a pair (h, w) of them, got {len!r}')
        self.register_buffer('coords', _coords(*self.size) if self.size else None, persistent=False)

    def forward(self, x):
        h, w = x.shape[-2:]
        if self.size and self.size != (h, w): raise BadValue(f'AddCoord2D: made for images of {self.size[0]}×{self.size[1]}, got {h}×{w}; len=None takes any size')
        coords = self.coords if self.size else _coords(h, w, x.device)
        return torch.cat([x, coords.to(x.dtype).expand(x.shape[0], 2, h, w)], 1)

    def extra_repr(self): return '×'.join(map(str, self.size)) if self.size else 'any size'


def _coords(h: int, w: int, device=None) -> torch.Tensor:
    "The two channels `(2, h, w)`: row, column."
    rows, columns = (torch.arange(1, n+1, dtype=torch.float32, device=device)/n for n in (h, w))
    return torch.stack([rows[:, None].expand(h, w), columns.expand(h, w)])


class CoordConv2d(nn.Sequential):
    """A convolution of images and of the places in them: `AddCoord2D(len)`, then `nn.Conv2d(in_channels+2, …)`; arXiv:1807.03247.

    Takes `(n, in_channels, h, w)`; all other arguments are those of `nn.Conv2d`, of which `groups` must be 1."""
    def __init__(self, in_channels: int, out_channels: int, kernel_size, *args, len: int | tuple[int, int] | None = None, **kwargs):
        conv = nn.Conv2d(in_channels+2, out_channels, kernel_size, *args, **kwargs)
        if conv.groups > 1: raise BadValue(f'CoordConv2d: groups must be 1, for every one would have to see the places, got {conv.groups}')
        super().__init__(AddCoord2D(len), conv)

    @classmethod
    def of(cls, conv: nn.Conv2d) -> 'CoordConv2d':
        "`conv` with two input channels more, whose weights are 0: it gives what `conv` gave, until it is trained. Its bias is the same parameter."
        wide = copy(conv)
        wide._parameters, wide.in_channels = dict(conv._parameters), conv.in_channels+2
        for hooks in ('_forward_hooks', '_forward_pre_hooks'): vars(wide)[hooks] = vars(conv)[hooks].copy()
        w = conv.weight.detach()
        wide.weight = nn.Parameter(torch.cat([w, w.new_zeros(w.shape[0], 2, *w.shape[2:])], 1), requires_grad=conv.weight.requires_grad)
        new = cls.__new__(cls)
        nn.Sequential.__init__(new, AddCoord2D(), wide)
        return new


@technique('model', section='Layers', source='arXiv:1807.03247', touches=('model', 'inference'), before=('prune', 'norm'))
def coordconv(self: Learner, layers: Literal['first', 'all'] = 'first') -> Learner:
    """Tell convolutions where in the picture they are, by two input channels more: row and column, each from 1/size to 1.

    `layers`: the 'first' convolution of the network, or 'all' but the answering one; those in groups are left alone. Pictures of any height
    and width. The weights of the new channels start at 0, so that a trained network answers as before. Helps where the place matters (keypoints,
    boxes, masks, pictures taken alike); for what may stand anywhere it is no gain. Raises `ValueError` for other layers, and where the
    network has no such convolution."""
    if layers not in LAYERS: raise BadValue(f'coordconv: layers must be one of {", ".join(LAYERS)}, got {layers!r}{nearest(layers, LAYERS)}')
    seen = trace(self, 'coordconv')
    placed = {m[1] for m in self.model.modules() if isinstance(m, CoordConv2d)}
    able = [m for m in seen.hidden if type(m) in (nn.Conv2d, Conv2dSame) and m.groups == 1]
    if not able: raise BadValue('coordconv: the network has no two-dimensional convolution in front of its last layer; it is for networks that look at pictures')
    new = [m for m in (able[:1] if layers == 'first' else able) if m not in placed]
    operate(self, {m: CoordConv2d.of(m) for m in new}, 'coordconv')
    if new: say(self, 'coordconv', f'{len(new)} of {len(able)} convolutions told their row and column ({new[0].weight.shape[1]} → {new[0].weight.shape[1]+2} channels in the first)')
    else: say(self, 'coordconv', f'{len(placed)} of {len(able)} convolutions are told their row and column already', aloud=True)
    return self
