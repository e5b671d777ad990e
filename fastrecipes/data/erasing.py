"Parts of a picture hidden: the network must not rely on one detail."
import torch
from fastai.basics import Learner

from fastrecipes.data.keyed import keyed
from fastrecipes.data.loaders import first_sample, shapes
from fastrecipes.data.mixing import Mix
from fastrecipes.errors import BadValue
from fastrecipes.technique import TechniqueCallback, put, say, technique

__all__ = ['Cutout', 'erase']


def erase(x: torch.Tensor, centre: torch.Tensor, size: int) -> torch.Tensor:
    "`x` `(n, c, h, w)` with a square of `size` px about `centre` `(n, 2)` (row, column; px) set to 0, cut off at the border; a new tensor."
    lo = centre.round()-size//2
    inside = [(torch.arange(s, device=x.device) >= lo[:, i:i+1]) & (torch.arange(s, device=x.device) < lo[:, i:i+1]+size) for i, s in enumerate(x.shape[-2:])]
    return x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


class Cutout(TechniqueCallback):
    "Erase a square of each training image before its batch is mixed and seen; images are normalised then, so 0 is their mean colour."
    order, run_valid = Mix.order-1, False

    def __init__(self, size): self.size, self.told = size, False

    def before_fit(self): self.told = False

    def before_batch(self):
        if not self.learn.training: return
        _check(self.size, self.learn.xb)
        h, w = self.learn.xb[0].shape[-2:]
        n, draw = len(self.learn.xb[0]), keyed(self.learn).per_sample
        centre = torch.stack([draw(n, 'cutout', axis)*side for axis, side in (('row', h), ('column', w))], 1).to(self.learn.xb[0].device)
        before, self.learn.xb = self.learn.xb[0], tuple(erase(x, centre, self.size) for x in self.learn.xb)
        if not self.told: self._tell(before)

    def _tell(self, before):
        say(self.learn, 'cutout', f'{float((self.learn.xb[0] != before).any(1).float().mean()):.1%} of the pixels of the first batch erased')
        self.told = True


def _check(size: int, xb):
    for x in xb:
        if x.ndim != 4: raise BadValue(f'cutout: needs images (n, c, height, width), got {shapes([x])}; use mixup for other inputs')
        if size > min(x.shape[-2:]): raise BadValue(f'cutout: size must be 1 to {min(x.shape[-2:])} px for these images, got {size}')


@technique('train', section='Data augmentation', source='arXiv:1708.04552', touches=('inputs',))
def cutout(self: Learner, size: int = 16) -> Learner:
    """Hide a square of each training image.

    `size` ≥ 1 px a side (the paper's 16 for images of 32); the centre is anywhere in the image, so that part of the square may lie
    outside. It is filled with 0, the mean colour of normalised images. Masks stay as they are: the network must guess what is hidden.
    Each image draws by (seed, epoch, sample). Raises `ValueError` for a size below 1 or above the images', and for inputs that are no images."""
    if size < 1: raise BadValue(f'cutout: size must be at least 1 px, got {size}')
    if seen := first_sample(self.dls): _check(size, seen[0])
    keyed(self)
    return put(self, Cutout(size))
