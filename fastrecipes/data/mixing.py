"Train on mixtures of two samples: the network is asked for what lies between the classes."
import torch
from fastai.basics import Learner
from fastai.callback.training import GradientAccumulation

from fastrecipes.data.keyed import keyed
from fastrecipes.data.loaders import first_sample, shapes
from fastrecipes.errors import BadValue
from fastrecipes.objective import check_mixable, objective
from fastrecipes.technique import TechniqueCallback, say, technique

__all__ = ['Mix', 'blend', 'boxes', 'paste']


def blend(x: torch.Tensor, partner: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    "`share[i]·x[i] + (1−share[i])·x[partner[i]]`, a new tensor shaped as `x` `(n, …)`; `share` in [0, 1] `(n,)`."
    return torch.lerp(x[partner], x, share.to(x).view(-1, *[1]*(x.ndim-1)))


def boxes(lam: torch.Tensor, centre: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Boxes of area 1−`lam` `(n,)` about `centre` `(n, 2)`, both in [0, 1], shaped as the picture: a mask `(n, h, w)`, True inside.

    What would lie outside the picture is cut off, so a box may be smaller than 1−lam: count it (`1 - mask.float().mean((1, 2))`)."""
    half = (1-lam).sqrt()[:, None]/2
    size = torch.tensor([h, w], dtype=lam.dtype, device=lam.device)
    lo, hi = ((centre-half)*size).round(), ((centre+half)*size).round()
    rows, cols = (torch.arange(s, dtype=lam.dtype, device=lam.device) for s in (h, w))
    inside = [(r >= lo[:, i:i+1]) & (r < hi[:, i:i+1]) for i, r in enumerate((rows, cols))]
    return inside[0][:, :, None] & inside[1][:, None, :]


def paste(x: torch.Tensor, partner: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    "`x` `(n, …, h, w)` with what `x[partner]` shows inside `box` `(n, h, w)`, a new tensor."
    return torch.where(box.view(len(box), *[1]*(x.ndim-3), *box.shape[1:]), x[partner], x)


class Mix(TechniqueCallback):
    """Replace `xb` by mixtures of its samples before each training batch, and tell the Objective who was mixed with whom.

    `.alpha` holds those that are on, 'mixup' or 'cutmix'; with both, one of the two is drawn for each batch. Targets that have a
    value a pixel are pasted with the picture."""
    order, run_valid = GradientAccumulation.order-1, False

    def __init__(self): self.alpha, self.told = {}, set()

    def before_fit(self): self.told = set()

    def before_batch(self):
        if not self.learn.training: return
        rng, xb = keyed(self.learn).stream('mix'), self.learn.xb
        n, device = len(xb[0]), xb[0].device
        partner = torch.from_numpy(rng.permutation(n)).to(device)
        kind = sorted(self.alpha)[int(rng.integers(2)) if len(self.alpha) == 2 else 0]
        lam = torch.from_numpy(rng.beta(self.alpha[kind], self.alpha[kind], n)).float().to(device)
        if kind == 'mixup': share = self._blend(partner, lam)
        else: share = self._paste(partner, lam, torch.from_numpy(rng.random((n, 2))).float().to(device))
        if kind not in self.told: self._tell(kind, partner, share)

    def _blend(self, partner, lam):
        _check_blend(self.learn.xb)
        self.learn.xb = tuple(blend(x, partner, lam) for x in self.learn.xb)
        objective(self.learn).mix(partner, lam)
        return lam

    def _paste(self, partner, lam, centre):
        xb, yb = self.learn.xb, self.learn.yb
        _check_paste(xb)
        box = boxes(lam, centre, *xb[0].shape[-2:])
        share = 1-box.float().mean((1, 2))
        self.learn.xb = tuple(paste(x, partner, box) for x in xb)
        if _are_masks(xb, yb): self.learn.yb = tuple(paste(y, partner, box) for y in yb)
        else: objective(self.learn).mix(partner, share)
        return share

    def _tell(self, kind, partner, share):
        other = partner != torch.arange(len(partner), device=partner.device)
        verb = 'blended' if kind == 'mixup' else 'pasted over'
        say(self.learn, kind, f'{int((other & (share < 1)).sum())} of {len(share)} samples of its first batch {verb}, mean share of the other {1-share.mean():.2f}')
        self.told.add(kind)


def _are_masks(xb, yb) -> bool:
    "Whether the targets have a value a pixel."
    return len(yb) > 0 and all(isinstance(y, torch.Tensor) and y.ndim > 2 and y.shape[-2:] == xb[0].shape[-2:] for y in yb)


def _check_blend(xb):
    if not all(x.is_floating_point() for x in xb):
        raise BadValue('mixup: blends numbers, and an input of this model is not floating point (categories have no in-between); weight_penalty regularises those too')


def _check_paste(xb):
    if not all(x.ndim == 4 and x.shape[-2:] == xb[0].shape[-2:] for x in xb):
        raise BadValue(f'cutmix: needs images (n, c, height, width), got {shapes(xb)}; use mixup for other inputs')


def _mix(learn: Learner, kind: str) -> Mix:
    "The `Mix` of `learn`; the first call adds it. Refuses, before that, data that cannot be mixed by `kind`."
    if seen := first_sample(learn.dls):
        (_check_blend if kind == 'mixup' else _check_paste)(seen[0])
        if kind == 'mixup' or not _are_masks(*seen): check_mixable(kind, learn.loss_func, seen[1])
    keyed(learn)
    objective(learn)
    if (cb := next((o for o in learn.cbs if type(o) is Mix), None)) is None: learn.add_cb(cb := Mix())
    return cb


@technique('train', section=('Data augmentation', 'Loss'), source='arXiv:1710.09412', touches=('inputs', 'targets'),
           formula=r'\tilde x = \lambda x_1 + (1-\lambda)\,x_2, \qquad \tilde y = \lambda y_1 + (1-\lambda)\,y_2, \qquad \lambda \sim \mathrm{Beta}(\alpha, \alpha)')
def mixup(self: Learner, alpha: float = .4) -> Learner:
    """Train on convex blends of two samples and of their targets.

    `alpha` > 0 shapes the shares, drawn from Beta(alpha, alpha) for each sample: 0.1–0.4 blends lightly (the cheatsheet's are .2
    and .4), 1 evenly. It regularises long runs; in a few epochs it mostly costs accuracy. Any loss: cross entropies are taken
    against the blended targets, class weights normalised. With `cutmix`, one of the two is drawn for each batch.
    Raises `ValueError` unless alpha > 0."""
    if not alpha > 0: raise BadValue(f'mixup: alpha must be > 0, got {alpha}')
    _mix(self, 'mixup').alpha['mixup'] = alpha
    return self


@technique('train', section=('Data augmentation', 'Loss'), source='arXiv:1905.04899', touches=('inputs', 'targets'),
           formula=r'\tilde x = M \odot x_1 + (1-M) \odot x_2, \qquad \tilde y = \bar M\,y_1 + (1-\bar M)\,y_2')
def cutmix(self: Learner, alpha: float = 1.) -> Learner:
    """Train on images with a rectangle of another image pasted in, and on targets in proportion to what is visible.

    `alpha` > 0: the pasted share of a sample is drawn from Beta(alpha, alpha), 1 is uniform (the paper's); position uniform, cut off
    at the border, a rectangle a sample. Masks and other targets with a value a pixel are pasted along. With `mixup`, one of the two
    is drawn for each batch. Raises `ValueError` unless alpha > 0, and where the inputs are not images."""
    if not alpha > 0: raise BadValue(f'cutmix: alpha must be > 0, got {alpha}')
    _mix(self, 'cutmix').alpha['cutmix'] = alpha
    return self
