"Train on blends of two samples: the network is asked for what lies between the classes."
import torch
from fastai.basics import Learner
from fastai.callback.training import GradientAccumulation

from fastrecipes.data.keyed import keyed
from fastrecipes.errors import BadValue
from fastrecipes.objective import objective
from fastrecipes.technique import TechniqueCallback, put, say, technique

__all__ = ['Mix', 'blend']


def blend(x: torch.Tensor, partner: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    "`share[i]·x[i] + (1−share[i])·x[partner[i]]`, a new tensor shaped as `x` `(n, …)`; `share` in [0, 1] `(n,)`."
    return torch.lerp(x[partner], x, share.to(x).view(-1, *[1]*(x.ndim-1)))


class Mix(TechniqueCallback):
    "Replace `xb` by blends of its samples before each training batch, and tell the Objective who was blended with whom."
    order, run_valid = GradientAccumulation.order-1, False

    def __init__(self, mixup: float): self.mixup, self.told = mixup, False

    def before_fit(self): self.told = False

    def before_batch(self):
        if not self.learn.training or not all(x.is_floating_point() for x in self.learn.xb): return self._refuse_unless_valid()
        n = len(self.learn.xb[0])
        rng = keyed(self.learn).stream('mix')
        partner = torch.from_numpy(rng.permutation(n)).to(self.learn.xb[0].device)
        share = torch.from_numpy(rng.beta(self.mixup, self.mixup, n)).float().to(partner.device)
        self.learn.xb = tuple(blend(x, partner, share) for x in self.learn.xb)
        objective(self.learn).mix(partner, share)
        if not self.told: self._tell(partner, share)

    def _refuse_unless_valid(self):
        if self.learn.training: raise BadValue('mixup: blends numbers, and an input of this model is not floating point (categories have no in-between)')

    def _tell(self, partner, share):
        own = torch.arange(len(partner), device=partner.device)
        say(self.learn, 'mixup', f'{int((partner != own).sum())} of {len(own)} samples of the first batch blended, mean share of the other {1-share.mean():.2f}')
        self.told = True


@technique('train', section='Data augmentation', source='arXiv:1710.09412', touches=('inputs', 'targets'))
def mixup(self: Learner, alpha: float = .4) -> Learner:
    """Train on convex blends of two samples and of their targets.

    `alpha` > 0 shapes the shares, drawn from Beta(alpha, alpha) for each sample: 0.1–0.4 blends lightly (the card's values are .2
    and .4), 1 evenly. It regularises long runs; in a few epochs it mostly costs accuracy. Any loss: cross entropies are taken
    against the blended targets, class weights normalised. Raises `ValueError` unless alpha > 0."""
    if not alpha > 0: raise BadValue(f'mixup: alpha must be > 0, got {alpha}')
    keyed(self)
    objective(self)
    return put(self, Mix(alpha))
