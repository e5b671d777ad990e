"The op table: what Pillow does to one image, done to whole batches, with a magnitude for each sample; equal to Pillow's own to the grey level."
from functools import wraps
from typing import Literal

import torch
from torch.nn import functional as F

from fastrecipes.errors import BadValue, nearest

__all__ = ['INTERPOLATIONS', 'Interpolation', 'affine', 'autocontrast', 'brightness', 'check_interpolation', 'color', 'contrast', 'equalize', 'invert',
           'posterize', 'rotate', 'sharpness', 'shear', 'solarize', 'translate', 'turned']      # techniques have the same names: not in `all.py`

Interpolation = Literal['nearest', 'bilinear', 'bicubic']
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic')
LUMA = (19595, 38470, 7471)                     # Pillow's `convert('L')`, in 1/65536
PART = 2**18                                    # values that are worked on at once on a CPU


def on_bytes(op):
    """Make `op(x, magnitude)` of uint8 images `(n, 1 or 3, h, w)` one of floats in [0, 1] too: they are rounded to 256 levels, and samples
    with values that are not finite stay as they are. On a CPU it is done in parts that stay in its cache, several times faster."""
    @wraps(op)
    def f(x, *args, **kwargs):
        who = op.__name__.strip('_')
        if x.ndim != 4 or x.shape[1] not in (1, 3): raise BadValue(f'{who}: needs images (n, 1 or 3, h, w), got {tuple(x.shape)}')
        if x.dtype != torch.uint8 and not x.is_floating_point(): raise BadValue(f'{who}: needs uint8, or floating point in [0, 1], got {x.dtype}')
        plain, run = x.as_subclass(torch.Tensor).contiguous(), op if x.dtype == torch.uint8 else _rounded(op)
        each = {i: _checked(who, v, len(x)) for i, v in [*enumerate(args[:1]), *kwargs.items()] if i not in ('interpolation', 'fill')}
        if not len(x): return x
        parts = -(-x.numel()//PART) if x.device.type == 'cpu' else 1
        rows = -(-len(x)//min(max(1, parts), len(x)))
        out = [_run(run, plain[i:i+rows], args, kwargs, {k: v[i:i+rows] if len(v) > 1 else v for k, v in each.items()}) for i in range(0, len(x), rows)]
        return (out[0] if len(out) == 1 else torch.cat(out)).as_subclass(type(x))
    return f


def _checked(who, value, n: int) -> torch.Tensor:
    value = torch.as_tensor(value)
    if value.ndim and len(value) not in (1, n): raise BadValue(f'{who}: needs a number or one for each of the {n} images, got {len(value)}')
    return value if value.ndim else value[None]


def _run(run, x, args, kwargs, each): return run(x, *(each.get(i, v) for i, v in enumerate(args)), **{k: each.get(k, v) for k, v in kwargs.items()})


def _rounded(op):
    def f(x, *args, **kwargs):
        out = op(x.mul(255).round_().clamp_(0, 255).nan_to_num_(0).to(torch.uint8), *args, **kwargs).to(x.dtype).div_(255)
        return torch.where(x.isfinite().flatten(1).all(1)[:, None, None, None], out, x)
    return f


def check_interpolation(who: str, interpolation: str):
    "Raise, in the name of `who`, for an interpolation that there is not."
    if interpolation in INTERPOLATIONS: return
    raise BadValue(f'{who}: interpolation must be one of {", ".join(INTERPOLATIONS)}, got {interpolation!r}{nearest(interpolation, INTERPOLATIONS)}')


def _each(value, x: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    "A number, or one a sample `(n,)`, as `(n, 1, 1, 1)` on the device of `x`."
    return torch.as_tensor(value, dtype=dtype, device=x.device).reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)


# what moves pixels

def affine(x, matrix, interpolation: Interpolation = 'nearest', fill=0):
    """`im.transform(im.size, Image.AFFINE, matrix, interpolation, fillcolor=fill)` of each image; `matrix` `(n, 6)`: (a, b, c, d, e, f).

    Pixel (column, row) shows what lies at (a·column + b·row + c, d·column + e·row + f), `fill` (a grey level, or one a channel) where that
    is outside. NEAREST counts in 1/65536 px as Pillow does; BILINEAR is within one grey level of it."""
    check_interpolation('affine', interpolation)
    return _affine(x, torch.as_tensor(matrix, dtype=torch.float64).reshape(-1, 6), interpolation, fill)


@on_bytes
def _affine(x, matrix, interpolation, fill):
    n, c, h, w = x.shape
    m = matrix.to(x.device).expand(n, 6)[:, :, None, None].unbind(1)
    cols, rows = (torch.arange(s, dtype=torch.float64, device=x.device) for s in (w, h))
    if interpolation == 'nearest':
        start = m[2] + m[0]*.5 + m[1]*.5, m[5] + m[3]*.5 + m[4]*.5
        a, b, d, e, at_x, at_y = (v.mul(65536).add(.5).floor().long() for v in (m[0], m[1], m[3], m[4], *start))
        cols, rows = cols.long(), rows.long()[:, None]
        at_x, at_y = ((at_x + b*rows + a*cols) >> 16), ((at_y + e*rows + d*cols) >> 16)
    else:
        at_x, at_y = (p*(cols+.5) + q*(rows+.5)[:, None] + r for p, q, r in (m[:3], m[3:]))       # in Pillow's order: ties fall as there
    inside = ((at_x >= 0) & (at_x < w) & (at_y >= 0) & (at_y < h))[:, None].view(torch.uint8)
    out = {'nearest': _nearest, 'bilinear': _bilinear, 'bicubic': _bicubic}[interpolation](x, at_x, at_y)*inside
    fill = torch.as_tensor(fill, dtype=torch.uint8, device=x.device).reshape(1, -1, 1, 1)
    return out.add_((1-inside)*fill) if fill.any() else out


def _nearest(x, at_x, at_y):
    n, c, h, w = x.shape
    at = at_y.clamp(0, h-1).mul_(w).add_(at_x.clamp(0, w-1)).view(n, 1, -1)
    return x.reshape(n, c, -1).gather(2, at.expand(n, c, -1)).view(x.shape)


def _bilinear(x, at_x, at_y):
    h, w = x.shape[2:]
    grid = torch.empty(*at_x.shape, 2, device=x.device)
    for i, (at, side) in enumerate(((at_x, w), (at_y, h))): grid[..., i] = at.mul_(2/side).sub_(1)
    return F.grid_sample(x.float(), grid, 'bilinear', 'border', align_corners=False).add_(1e-3).to(torch.uint8)    # Pillow truncates: 199.9999 is 200


def _bicubic(x, at_x, at_y):
    n, c, h, w = x.shape
    at_x, at_y = at_x-.5, at_y-.5
    left, top = at_x.floor(), at_y.floor()
    across, down = _cubic((at_x-left).float())[..., None, :], _cubic((at_y-top).float())[..., None]
    near, first = (torch.arange(*r, dtype=torch.int32, device=x.device) for r in ((-1, 3), (0, n*h, h)))
    columns, rows = (left.int()[..., None]+near).clamp_(0, w-1), (top.int()[..., None]+near).clamp_(0, h-1).add_(first[:, None, None, None]).mul_(w)
    at = rows[..., None] + columns[..., None, :]
    pixels = x.permute(0, 2, 3, 1).reshape(-1, c).float()
    out = F.embedding_bag(at.view(-1, 16), pixels, mode='sum', per_sample_weights=(across*down).view(-1, 16))    # a weighted sum of sixteen pixels for each
    return out.add_(1e-3).clamp_(0, 255).to(torch.uint8).view(n, h, w, c).permute(0, 3, 1, 2)


def _cubic(d):
    "The weights of the four neighbours at distance `d` from the second: the kernel with a = −1, as Pillow's transforms take it."
    s, t = d*d, d*d*d
    return torch.stack([-d+2*s-t, 1-2*s+t, d+s-t, t-s], -1)


def turned(degrees, h: int, w: int) -> torch.Tensor:
    "The matrix `(n, 6)` of `Image.rotate(degrees)`, counter-clockwise about the centre of `w`×`h` px."
    angle = -torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float64) % 360)
    cos, sin = angle.cos().round(decimals=15), angle.sin().round(decimals=15)
    x, y = w/2, h/2
    return torch.stack([cos, sin, cos*-x + sin*-y + x, -sin, cos, -sin*-x + cos*-y + y], -1)


def rotate(x, degrees, interpolation: Interpolation = 'bilinear', fill=0):
    "`im.rotate(degrees, interpolation, fillcolor=fill)`: counter-clockwise about the centre, the size kept."
    return affine(x, turned(degrees, *x.shape[-2:]), interpolation, fill)


def translate(x, dx=0., dy=0., interpolation: Interpolation = 'bilinear', fill=0):
    "`im.transform(im.size, Image.AFFINE, (1, 0, -dx, 0, 1, -dy), interpolation, fillcolor=fill)`: `dx` px to the right, `dy` px down."
    return affine(x, _matrix(1, 0, -torch.as_tensor(dx), 0, 1, -torch.as_tensor(dy)), interpolation, fill)


def shear(x, sx=0., sy=0., interpolation: Interpolation = 'bilinear', fill=0):
    """`im.transform(im.size, Image.AFFINE, (1, sx, -sx*h/2, sy, 1, -sy*w/2), interpolation, fillcolor=fill)`: the centre stays in place.

    `sx`: px to the left for each row further down; `sy`: px up for each column further right."""
    (h, w), sx, sy = x.shape[-2:], torch.as_tensor(sx), torch.as_tensor(sy)
    return affine(x, _matrix(1, sx, -sx*h/2, sy, 1, -sy*w/2), interpolation, fill)


def _matrix(*entries) -> torch.Tensor:
    return torch.stack(torch.broadcast_tensors(*(torch.as_tensor(e, dtype=torch.float64) for e in entries)), -1)


# what maps the levels of each channel

def _levels(x) -> torch.Tensor:
    "The place of each value in a table of 256 for each channel of each image, one behind the other `(n·c, h·w)`."
    n, c = x.shape[:2]
    return x.reshape(n*c, -1).int() + torch.arange(0, 256*n*c, 256, dtype=torch.int32, device=x.device)[:, None]


def _mapped(x, levels, table) -> torch.Tensor:
    "`x` with its values replaced by `table` `(n·c, 256)`."
    return table.clamp(0, 255).to(torch.uint8).view(-1).index_select(0, levels.view(-1)).view(x.shape)


@on_bytes
def autocontrast(x):
    "`ImageOps.autocontrast(im)`: each channel stretched so that its darkest value is 0 and its brightest 255; one of a single value stays."
    lo, hi = (v.reshape(-1, 1).double() for v in (x.amin((2, 3)), x.amax((2, 3))))
    i = torch.arange(256., dtype=torch.float64, device=x.device).expand(len(lo), 256)
    scale = torch.full_like(hi, 255)/(hi-lo)                   # torch takes 255/x by a reciprocal, which is not quite that
    return _mapped(x, _levels(x), torch.where(hi > lo, i*scale + -lo*scale, i))


@on_bytes
def equalize(x):
    "`ImageOps.equalize(im)`: the values of each channel spread so that all come up equally often; a channel with fewer than 255 px below its brightest value stays."
    levels = _levels(x)
    hist = levels.view(-1).bincount(minlength=256*len(levels)).view(-1, 256)
    brightest = hist.gather(1, (hist > 0).int().mul(torch.arange(256, device=x.device)).amax(1, keepdim=True))
    step = (hist.sum(1, keepdim=True)-brightest)//255
    table = (step//2 + hist.cumsum(1)-hist)//step.clamp(min=1)
    return _mapped(x, levels, torch.where(step > 0, table, torch.arange(256, device=x.device)))


@on_bytes
def posterize(x, bits):
    "`ImageOps.posterize(im, bits)`: only so many leading bits of each value are kept, 8 (all) to 1; 0 is black."
    return x & (256 - 2**(8-_each(bits, x, torch.int32))).to(torch.uint8)


@on_bytes
def solarize(x, threshold=128.):
    "`ImageOps.solarize(im, threshold)`: values of `threshold` and above are inverted; 0 inverts all, 256 none."
    threshold = _each(threshold, x).ceil()
    return x ^ (x >= threshold.clamp(0, 255).to(torch.uint8)).view(torch.uint8)*((threshold <= 255)*255).to(torch.uint8)    # 255 − x is x ^ 255


@on_bytes
def invert(x):
    "`ImageOps.invert(im)`: 255 − value."
    return 255-x


# what goes from a degenerate image through the image and beyond

def _blend(plain, x, factor) -> torch.Tensor:
    "`Image.blend(plain, x, factor)`: in 32 bits, and truncated, as there."
    plain = plain.float()
    return (x-plain).mul_(_each(factor, x, torch.float32)).add_(plain).clamp_(0, 255).to(torch.uint8)


def _grey(x) -> torch.Tensor:
    "`im.convert('L')`, `(n, 1, h, w)`."
    if x.shape[1] == 1: return x
    r, g, b = x.int().unbind(1)
    return (r.mul_(LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2]).add_(0x8000) >> 16)[:, None]


@on_bytes
def color(x, factor):
    "`ImageEnhance.Color(im).enhance(factor)`: 0 is grey, 1 the image, above 1 more colourful."
    return _blend(_grey(x), x, factor)


@on_bytes
def contrast(x, factor):
    "`ImageEnhance.Contrast(im).enhance(factor)`: 0 is the mean grey, 1 the image, above 1 more contrast."
    return _blend((_grey(x).double().mean((1, 2, 3), keepdim=True)+.5).floor(), x, factor)


@on_bytes
def brightness(x, factor):
    "`ImageEnhance.Brightness(im).enhance(factor)`: 0 is black, 1 the image, above 1 brighter."
    return _blend(torch.zeros((), device=x.device), x, factor)


@on_bytes
def sharpness(x, factor):
    "`ImageEnhance.Sharpness(im).enhance(factor)`: 0 is smoothed by a 3×3 kernel (the border is not), 1 the image, above 1 sharper."
    h, w = x.shape[2:]
    smooth = x.float()
    if min(h, w) > 2:
        columns = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
        inner = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:] + 4*smooth[:, :, 1:-1, 1:-1]
        smooth[:, :, 1:-1, 1:-1] = inner.div_(13).add_(.5).floor_()
    return _blend(smooth, x, factor)
