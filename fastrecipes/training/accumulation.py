"What becomes of a gradient between its batch and the step: it waits for those of other batches, and is shortened where it is too long."
import math
from typing import Literal

import torch
from fastai.basics import CancelBatchException, Learner, nn
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from timm.utils.agc import adaptive_clip_grad, unitwise_norm

from fastrecipes.data.loaders import batch_size_of
from fastrecipes.errors import BadValue, nearest
from fastrecipes.layers.surgery import trace
from fastrecipes.objective import objective
from fastrecipes.repairs import fitting
from fastrecipes.technique import TechniqueCallback, put, say, technique

__all__ = ['GradAccum', 'GradClip']


class GradAccum(TechniqueCallback):
    """Multiply `loss_grad` by what its mean was divided by, cancel batches before the step that they share, divide the gradient in that step.

    fastai 2.8.12 counts samples instead of batches, leaves the end of an epoch to the next fit, and takes the mean of weighted means."""
    order, run_valid = GradientAccumulation.order, False        # losses and penalties are made up, GradScaler has yet to scale or unscale

    def __init__(self, n: int):
        self.n = n
        self._reset()

    def _reset(self): self.batches, self.own, self.total, self.unit = 0, 0., 0., 1.

    def _drop(self):
        self._reset()
        if self.learn.opt is not None: self.learn.opt.zero_grad()

    def before_fit(self):
        if fitting(self.learn): self._drop()                    # what someone else's backward pass left

    def before_train(self):
        dl, n = self.learn.dl, self.n
        steps, bs = math.ceil(len(dl)/n), batch_size_of(dl)
        last = len(dl) - (steps-1)*n
        say(self.learn, 'grad_accum', f'steps of {n} batches of {bs}: as batches of {n*bs}, {steps} step{"s"*(steps > 1)} an epoch'
            + (f', the last of {last} batch{"es"*(last > 1)}' if last < n else ''))

    def after_loss(self):
        if not self.learn.training or not len(self.learn.yb): return
        o = objective(self.learn)
        if not self.batches: self.unit = o.count()              # shares are near 1 then, and scaled 16-bit gradients in their range
        if (own := o.denominator()) is None:                    # a sum: batches add up, but a penalty counts once
            if self.batches and self.learn.loss.requires_grad: self.learn.loss_grad = self.learn.loss.clone()
        elif own: self.learn.loss_grad = self.learn.loss_grad*(own/self.unit)
        else: self.learn.loss_grad = self.learn.pred.sum()*0.   # nothing of this batch counts, and its mean is 0/0
        self.own = own or 0.

    def after_backward(self): self.batches, self.total = self.batches+1, self.total+self.own

    def before_step(self):
        if self.batches < self.n and self.learn.iter < self.learn.n_iter-1: raise CancelBatchException('grad_accum')    # neither step nor zero_grad
        if self.total:
            for p, *_ in self.learn.opt.all_params(with_grad=True): p.grad.div_(self.total/self.unit)
        self._reset()

    def after_train(self): self._drop()                         # a cancelled epoch may end between two steps
    def abort(self, level):
        if level == 'train': self._drop()


class GradClip(TechniqueCallback):
    "Shorten the gradient that a step is about to follow, and count how often."
    order, run_valid = MixedPrecision.order+1, False            # accumulated, unscaled, and masked where weights are pruned

    def __init__(self, limit: float, mode: str = 'norm'):
        self.limit, self.mode, self.spared = limit, mode, frozenset()
        self._reset()

    def _reset(self): self.steps, self.clipped, self.largest = 0, 0, 0.

    def before_fit(self):
        if not fitting(self.learn): return
        self._reset()
        if self.mode == 'adaptive': self.spared = frozenset(trace(self.learn, 'grad_clip').answering.parameters())     # anew, for a head may have been exchanged

    def before_step(self):
        ps = [p for p, *_ in self.learn.opt.all_params(with_grad=True) if p not in self.spared]
        size = SIZES[self.mode](ps) if ps else 0.
        self.steps += 1
        if not math.isfinite(size): return                      # not to be mended by shortening: it would make zeros and NaNs of it
        self.largest = max(self.largest, size)
        if size <= self.limit: return
        CLIPS[self.mode](ps, self.limit)
        self.clipped += 1

    def after_train(self):
        to = dict(norm='to a norm of {:g}', value='to entries of ±{:g}', adaptive='to {:g} times the norm of the weights of each unit')[self.mode].format(self.limit)
        say(self.learn, 'grad_clip', f'{self.clipped} of {self.steps} steps clipped {to}, the largest was {self.largest:.3g}')


def _entry(ps) -> float: return float(nn.utils.get_total_norm([p.grad for p in ps], float('inf')))


def _ratio(ps) -> float:
    "The largest norm of a unit's gradient, in norms of its weights (of 1e-3 at least, as `adaptive_clip_grad` has it)."
    return float(torch.stack([(unitwise_norm(p.grad.detach())/unitwise_norm(p.detach()).clamp(min=1e-3)).max() for p in ps]).max())


SIZES = dict(norm=lambda ps: float(nn.utils.get_total_norm([p.grad for p in ps])), value=_entry, adaptive=_ratio)
CLIPS = dict(norm=nn.utils.clip_grad_norm_, value=nn.utils.clip_grad_value_, adaptive=adaptive_clip_grad)


@technique('train', section='Training', source='https://docs.fast.ai/callback.training.html', touches=('gradient',),
           formula=r'g = \frac{\sum_b W_b\,\nabla L_b}{\sum_b W_b}')
def grad_accum(self: Learner, n: int = 2) -> Learner:
    """Take a step every `n` batches, with the gradient of one big batch made of them: a large batch in the memory of a small one.

    `n` ≥ 1 batches; the last step of an epoch takes those that are left. The gradient is the big batch's also where batches differ in
    size, with class weights, smoothing, mixed targets and ignored ones (with `distill` and class weights at once, nearly); but batch
    norm, and mixing, still look at one small batch at a time. An epoch has n times fewer steps: raise the learning rate, or train
    longer. Raises `ValueError` for n below 1."""
    if n < 1: raise BadValue(f'grad_accum: n must be ≥ 1 batch, got {n}')
    if n == 1:
        say(self, 'grad_accum', 'steps of 1 batch: nothing is accumulated', aloud=True)
        return self.remove_cb(GradAccum)
    objective(self)                                             # it knows what each batch's mean was divided by
    return put(self, GradAccum(n))


@technique('train', section='Training', source='arXiv:1211.5063', touches=('gradient',),
           example=dict(max_norm=.5),                           # on the contract's digits the first gradients are shorter than 1
           formula=r'g \leftarrow g \cdot \min\left(1, \frac{c}{\|g\|}\right)')
def grad_clip(self: Learner, max_norm: float = 1., mode: Literal['norm', 'value', 'adaptive'] = 'norm', max_value: float = .5, max_ratio: float = .01) -> Learner:
    """Shorten a gradient that is too long: one bad batch does not throw the weights far off.

    `mode`: what is too long. 'norm': the Euclidean norm over all trained weights together is cut to `max_norm` > 0, its direction kept.
    'value': each entry is cut to ±`max_value` > 0; that turns it. 'adaptive' (AGC, arXiv:2102.06171): the norm of each
    unit's gradient (an output of a layer; a whole bias) is cut to `max_ratio` > 0 times the norm of its weights, but for the
    last layer, as in the paper: it stands in for batch norm; .16 for small batches. The effect tells how many steps were clipped and the
    largest met: set it so that few are. It sees the gradient of the step: accumulated, unscaled, penalties included. A gradient that is
    not finite stays so. Raises `ValueError` for another mode, for a limit that is not > 0, and for the limit of another mode."""
    limits = dict(norm=('max_norm', max_norm, 1.), value=('max_value', max_value, .5), adaptive=('max_ratio', max_ratio, .01))
    if mode not in limits: raise BadValue(f'grad_clip: mode must be one of {", ".join(limits)}, got {mode!r}{nearest(mode, limits)}')
    name, limit, _ = limits[mode]
    if other := next((f'{n}={v}' for n, v, default in limits.values() if n != name and v != default), None): raise BadValue(f'grad_clip: mode {mode!r} takes {name}, got {other}')
    if not limit > 0: raise BadValue(f'grad_clip: {name} must be > 0, got {limit}')
    if mode == 'adaptive' and not trace(self, 'grad_clip').answering: raise BadValue('grad_clip: the network has no layer with a weight to tell the last one by; take mode=\'norm\'')
    return put(self, GradClip(limit, mode))
