"Smaller pictures at first: early epochs learn coarse features, and need not pay for fine ones."
import torch
from fastai.basics import Learner, get_model, nn
from torch.nn import functional as F

from fastrecipes.data.loaders import shapes
from fastrecipes.errors import BadValue
from fastrecipes.technique import TechniqueCallback, put, say, technique
from fastrecipes.training.clock import share_over
from fastrecipes.training.glance import answer_of, glance, unseen

__all__ = ['ProgressiveResize', 'share_of', 'side_of', 'resized']


def share_of(done: float, initial: float, delay: float, finetune: float) -> float:
    "The side of a picture, as a share of the full one, when `done` (0–1) of the fit is over: `initial` until `delay`, 1 in the last `finetune`, a line between."
    if done >= 1-finetune - 1e-9: return 1.
    return initial if done <= delay else initial + (1-initial)*(done-delay)/(1-finetune-delay)


def side_of(full: int, share: float, multiple: int) -> int:
    "`share` of `full` px, rounded to a multiple of `multiple` px; `full` itself where the share is 1."
    return full if share >= 1 else min(full, max(multiple, multiple*int(share*full/multiple + .5)))


def resized(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    "`x` at `size` (h, w): pictures `(n, c, h, w)` by bilinear interpolation that averages what it leaves out, masks of classes `(n, h, w)` by the nearest pixel."
    plain = x.as_subclass(torch.Tensor)
    if x.is_floating_point(): new = F.interpolate(plain if x.ndim == 4 else plain[:, None], size, mode='bilinear', antialias=True)
    else: new = F.interpolate((plain if x.ndim == 4 else plain[:, None]).double(), size, mode='nearest-exact').to(x.dtype)
    return (new if x.ndim == 4 else new[:, 0]).as_subclass(type(x))


class ProgressiveResize(TechniqueCallback):
    "Resize each training batch, inputs and masks, to the side that its place in the fit asks for."
    order, run_valid = 85, False                # after all that changes pictures: augmix puts its views behind them at 80

    def __init__(self, initial, delay, finetune, multiple): self.initial, self.delay, self.finetune, self.multiple = initial, delay, finetune, multiple

    def size(self, full: tuple[int, int], done: float) -> tuple[int, int]:
        share = share_of(done, self.initial, self.delay, self.finetune)
        h, w = (side_of(s, share, self.multiple) for s in full)
        return h, w

    def before_batch(self):
        if not self.learn.training: return
        full = tuple(self.learn.xb[0].shape[-2:])
        size = self.size(full, share_over(self.learn, self.learn.iter))
        if size != full: self.learn.xb, self.learn.yb = (tuple(resized(t, size) if _has_pixels(t, full) else t for t in b) for b in (self.learn.xb, self.learn.yb))


def _has_pixels(t, full) -> bool: return isinstance(t, torch.Tensor) and t.ndim in (3, 4) and tuple(t.shape[-2:]) == full


def _check(learn: Learner, cb: ProgressiveResize) -> list[tuple[int, int]] | None:
    "The sizes that come up, the full one last; None where it takes an iteration to know. Raises for a network, or a teacher, that cannot take the smaller ones."
    if (seen := glance(learn, ())) is None: return None
    x = seen.xb[0]
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or not x.is_floating_point():
        raise BadValue(f'progressive_resize: needs images (n, c, height, width) of numbers, got {shapes(seen.xb)}; leave it off, or train on fewer samples first')
    full = tuple(x.shape[-2:])
    sizes = list(dict.fromkeys(cb.size(full, i/1000) for i in range(1001)))
    if seen.error is not None: return sizes                 # the full size does not work either: that is for others to say
    for who, net in (('network', get_model(learn.model)), ('teacher', getattr(getattr(learn, 'distill_cb', None), 'teacher', None))):
        for size in sizes[:-1][:2]:                         # the smallest, and one that is no power of 2 where it can be
            if net is not None: _try(who, net, seen, size, full)
    return sizes


def _try(who: str, net: nn.Module, seen, size, full):
    device = next((p.device for p in net.parameters()), seen.xb[0].device)
    what, instead = f'the {who} cannot take images of {size[0]}×{size[1]} px', 'use one that pools whatever is left (nn.AdaptiveAvgPool2d), or begin with a larger share (initial=…)'
    with unseen(device):
        try: got = answer_of(net, tuple((resized(x, size) if _has_pixels(x, full) else x).to(device) for x in seen.xb))
        except Exception as e: raise BadValue(f'progressive_resize: {what} ({(str(e).strip() or type(e).__name__).splitlines()[0]}); {instead}') from e
    if not isinstance(got, torch.Tensor) or not isinstance(seen.pred, torch.Tensor): return
    expected = tuple(seen.pred.shape)
    if any(_has_pixels(y, full) for y in seen.yb): expected = (*expected[:-2], *size)       # an answer for each pixel
    if tuple(got.shape) != expected: raise BadValue(f'progressive_resize: {what}: it answers {tuple(got.shape)}, not {expected}; {instead}')


@technique('train', section='Training', source='arXiv:2104.00298', touches=('inputs',))
def progressive_resize(self: Learner, initial: float = .5, delay: float = .5, finetune: float = .2, multiple: int = 4) -> Learner:
    """Train on smaller images first, and let them grow to their full size over the fit: it takes less time, at little or no loss of accuracy.

    Sides are `initial` (0–1] of the full ones until `delay` of the fit is over, grow in a line from then on, and are full in its last
    `finetune` (delay + finetune ≤ 1), rounded to multiples of `multiple` px. Batches are resized as they are seen, on their device, once they
    are augmented and mixed, so that a `cutout` keeps its share; masks keep their classes, and points on the scale of fastai need no change.
    Half a side is a quarter of the pixels. Validation sees the full size. Each fit grows anew. Raises `ValueError` outside the ranges, for
    inputs that are no images, and for a network (or the teacher of `distill`) that cannot take the smaller ones."""
    if not 0 < initial <= 1: raise BadValue(f'progressive_resize: initial must be in (0, 1], got {initial}')
    for name, value in (('delay', delay), ('finetune', finetune)):
        if not 0 <= value <= 1: raise BadValue(f'progressive_resize: {name} must be in [0, 1], got {value}')
    if delay+finetune > 1: raise BadValue(f'progressive_resize: delay and finetune share the fit, and must come to 1 at most, got {delay} + {finetune}')
    if multiple < 1: raise BadValue(f'progressive_resize: multiple must be ≥ 1 px, got {multiple}')
    cb = ProgressiveResize(initial, delay, finetune, multiple)
    sizes = _check(self, cb)
    put(self, cb)
    if sizes is None: return say(self, 'progressive_resize', f'images begin at {initial:.0%} of their sides, and are full from {1-finetune:.0%} of the fit on') or self
    (h, w), (full_h, full_w) = sizes[0], sizes[-1]
    if len(sizes) == 1: say(self, 'progressive_resize', f'nothing is smaller than {full_h}×{full_w} px in multiples of {multiple} px, so images keep their size', aloud=True)
    else: say(self, 'progressive_resize', f'images begin at {h}×{w} px, and are {full_h}×{full_w} px from {1-finetune:.0%} of the fit on ({len(sizes)} sizes)')
    return self
