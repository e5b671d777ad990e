"Penalties on the weights: what `wd`, decoupled from the gradient by AdamW and its kin, does not compute."
from fastai.basics import Learner
from fastai.callback.training import GradientAccumulation

from fastrecipes.errors import BadValue
from fastrecipes.technique import TechniqueCallback, put, say, technique

__all__ = ['WeightPenalty']


class WeightPenalty(TechniqueCallback):
    "Add `l1·Σ|w| + l2·Σw²` to the loss that is differentiated; the loss that is reported stays that of the data."
    order, run_valid = GradientAccumulation.order-1, False      # before the scaling: one penalty a step, not one a batch

    def __init__(self, l2, l1): self.l2, self.l1 = l2, l1

    def after_loss(self):
        if not self.learn.training or not len(self.learn.yb): return
        ws = [p for p in self.learn.model.parameters() if p.requires_grad and p.ndim > 1]       # no biases, no norms
        penalty = sum(self.l1*w.abs().sum() + self.l2*w.square().sum() for w in ws)
        self.learn.loss_grad = self.learn.loss_grad + penalty
        if self.learn.iter == 0: say(self.learn, 'weight_penalty', f'{float(penalty.detach()):.3g} added to the loss of an epoch\'s first batch, over {len(ws)} weight matrices')


@technique('train', section='Regularization', source='doi:10.1111/j.1467-9868.2005.00503.x', touches=('gradient',))
def weight_penalty(self: Learner, l2: float = 5e-4, l1: float = 0.) -> Learner:
    """Penalise large weights: ridge (`l2`), LASSO (`l1`), or elastic net (both).

    Adds l1·Σ|w| + l2·Σw² to the training loss. The sums run over every element of every trained weight matrix, so suitable values
    shrink as models grow. Biases and norms are left alone. Raises `ValueError` if one of them is negative."""
    if min(l1, l2) < 0: raise BadValue(f'weight_penalty: l1 and l2 must be ≥ 0, got {l1=}, {l2=}')
    put(self, WeightPenalty(l2, l1))
    if not l1 and not l2: say(self, 'weight_penalty', 'both strengths are 0: nothing is penalised', aloud=True)
    return self
