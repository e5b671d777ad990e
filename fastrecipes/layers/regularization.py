"Large weights made small: by a penalty in the loss, or by a share of each weight taken off at each step."
import torch
from fastai.basics import Learner, Optimizer, nn
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import l2_reg

from fastrecipes.errors import BadValue
from fastrecipes.repairs import fitting
from fastrecipes.technique import TechniqueCallback, put, say, technique

__all__ = ['WeightDecay', 'WeightPenalty']


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


@technique('train', section='Regularization', source='doi:10.1111/j.1467-9868.2005.00503.x', touches=('gradient',),
           formula=r'L + \lambda_2 \sum w^2 + \lambda_1 \sum |w|')
def weight_penalty(self: Learner, l2: float = 5e-4, l1: float = 0.) -> Learner:
    """Penalise large weights: ridge (`l2`), LASSO (`l1`), or elastic net (both).

    Adds l1·Σ|w| + l2·Σw² to the training loss. The sums run over every element of every trained weight matrix, so suitable values
    shrink as models grow. Biases and norms are left alone. Raises `ValueError` if one of them is negative."""
    if min(l1, l2) < 0: raise BadValue(f'weight_penalty: l1 and l2 must be ≥ 0, got {l1=}, {l2=}')
    put(self, WeightPenalty(l2, l1))
    if not l1 and not l2: say(self, 'weight_penalty', 'both strengths are 0: nothing is penalised', aloud=True)
    return self


class WeightDecay(TechniqueCallback):
    "Where the optimizer adds `wd` to the gradient instead, or knows none: set its own to 0, and take lr·wd·w off each weight before the step."
    order, run_valid = 70, False        # after all that may still cancel the step

    def __init__(self, wd: float): self.wd, self.wds = wd, None

    def before_fit(self):
        if not fitting(self.learn): return
        self.wds = None if decouples(self.learn.opt) else [h.get('wd', self.wd) for h in self.learn.opt.hypers]
        if self.wds and 'wd' in self.learn.opt.hypers[0]: self.learn.opt.set_hyper('wd', 0.)

    def before_step(self):
        if not self.wds: return
        opt = self.learn.opt
        with torch.no_grad():
            for ps, h, wd in zip(opt.param_lists, opt.hypers, self.wds):
                for p in ps:
                    if p.grad is not None and opt.state[p].get('do_wd', p.ndim > 1): p.mul_(1 - h['lr']*wd)


def decouples(opt) -> bool:
    "Whether an optimizer takes lr·wd·w off the weights, aside from its gradient: fastai's by default; of torch's, AdamW and those like it."
    if isinstance(opt, Optimizer): return l2_reg not in opt.cbs
    inner = getattr(opt, 'opt', opt)
    return isinstance(inner, torch.optim.AdamW) or bool(inner.defaults.get('decoupled_weight_decay'))


@technique('optim', section='Regularization', source='arXiv:1711.05101', touches=('step',),
           formula=r'w \leftarrow w - \eta\,wd\,w')
def weight_decay(self: Learner, wd: float = 5e-4) -> Learner:
    """Shrink the weights by a share of themselves at each step: w ← w − lr·wd·w, aside from the gradient.

    `wd` ≥ 0; with SGD 5e-4 is usual, with Adam .01 to .1. Biases and norms are left alone unless the Learner has wd_bn_bias=True. With plain
    SGD it is the penalty wd/2·Σw² (`weight_penalty(l2=wd/2)`); with Adam it is not, for a penalty's gradient is divided by its own size. Also
    where the optimizer is one of torch that knows `weight_decay` as a penalty only. It replaces fastai's default (.01 for Adam); a `wd` given to
    a fit counts for that fit. Raises `ValueError` if negative."""
    if not wd >= 0: raise BadValue(f'weight_decay: wd must be ≥ 0, got {wd}')
    self.wd = wd
    put(self, WeightDecay(wd))
    n = sum(isinstance(m, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)) for m in self.model.modules())
    if wd: say(self, 'weight_decay', f'each weight of {n} layers loses the share lr·{wd:g} a step')
    else: say(self, 'weight_decay', 'a decay of 0: nothing is taken off the weights', aloud=True)
    return self
