"What becomes of a gradient between its batch and the step: it waits for those of other batches, and is shortened where it is too long."
import math

from fastai.basics import CancelBatchException, Learner, nn
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation

from fastrecipes.errors import BadValue
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
        steps, bs = math.ceil(len(dl)/n), getattr(dl, 'bs', None) or dl.batch_size
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

    def __init__(self, max_norm: float):
        self.max_norm = max_norm
        self._reset()

    def _reset(self): self.steps, self.clipped, self.largest = 0, 0, 0.

    def before_fit(self):
        if fitting(self.learn): self._reset()

    def before_step(self):
        ps = [p for p, *_ in self.learn.opt.all_params(with_grad=True)]
        norm = nn.utils.get_total_norm([p.grad for p in ps])
        self.steps += 1
        if not norm.isfinite(): return                          # not to be mended by shortening: it would make zeros and NaNs of it
        self.largest = max(self.largest, float(norm))
        if norm <= self.max_norm: return
        nn.utils.clip_grads_with_norm_(ps, self.max_norm, norm)
        self.clipped += 1

    def after_train(self):
        say(self.learn, 'grad_clip', f'{self.clipped} of {self.steps} steps clipped to a norm of {self.max_norm:g}, the largest was {self.largest:.3g}')


@technique('train', section='Training', source='https://docs.fast.ai/callback.training.html', touches=('gradient',))
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
           example=dict(max_norm=.5))                           # on the contract's digits the first gradients are shorter than 1
def grad_clip(self: Learner, max_norm: float = 1.) -> Learner:
    """Shorten a gradient that is longer than `max_norm` to that length, its direction kept: one bad batch does not throw the weights far off.

    `max_norm` > 0, the Euclidean norm over all trained weights together; the effect tells how many steps were clipped and the largest
    norm met: set it so that few are. It sees the gradient of the step: accumulated, unscaled, penalties included. A gradient that is
    not finite stays so. Raises `ValueError` unless max_norm > 0."""
    if not max_norm > 0: raise BadValue(f'grad_clip: max_norm must be > 0, got {max_norm}')
    return put(self, GradClip(max_norm))
