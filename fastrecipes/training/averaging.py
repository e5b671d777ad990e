"Weights averaged over the path of training: the average generalises better than the point where it happens to end."
from contextlib import contextmanager

import torch
from fastai.basics import Learner, TfmdDL, get_model, nn, to_device
from fastai.callback.schedule import ParamScheduler
from fastai.learner import _cast_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.errors import BadValue
from fastrecipes.randomness import forked
from fastrecipes.repairs import fitting, is_trial
from fastrecipes.technique import TechniqueCallback, put, say, technique
from fastrecipes.training.clock import share_over

__all__ = ['EMA', 'SWA', 'ema_decay']


class _Average(TechniqueCallback):
    """Hold the average of a network's tensors, and change places with them: in the network from each validation on until the next epoch
    trains, and for good once the fit is over, however it ended. Training goes on with the weights that it left.

    (torch's AveragedModel holds a deep copy of the network; with that go its hooks, and the Learner that they belong to.)"""
    order = ParamScheduler.order+.5             # after masks are put back and rates are set; trackers load what they kept after us

    def __init__(self): self._forget()

    def _forget(self): self.on, self.average, self.n, self.lent, self.skipped = False, None, 0, False, False

    def before_fit(self):
        self._forget()
        self.on = fitting(self.learn) and not is_trial(self.learn)

    def before_train(self): self._lend(False)
    def before_validate(self): self._lend(True)
    def before_step(self): self.skipped = False
    def after_cancel_step(self): self.skipped = True        # GradScaler met an overflow; after_step is called all the same

    def after_fit(self):
        if not self.on: return
        self._lend(True)
        self._forget()

    def abort(self, level):
        if level == 'fit': _Average.after_fit(self)

    def _tensors(self) -> list[torch.Tensor]:
        model = get_model(self.learn.model)
        return [t.detach() for t in (*model.parameters(), *model.buffers())]

    def _add(self, average, buffers: bool):
        "Let `average(mean, new, n)` of torch.optim.swa_utils take the network in: parameters, and `buffers` that are not counts; else those are copied."
        new, n_params = self._tensors(), sum(1 for _ in get_model(self.learn.model).parameters())
        if self.n == 0: self.average = [t.clone() for t in new]
        self.average = [a.to(t.device) for a, t in zip(self.average, new, strict=True)]     # a checkpoint brings them to the CPU
        averaged = [t.is_floating_point() and (buffers or i < n_params) for i, t in enumerate(new)]
        for dtype in {t.dtype for t in new}:
            pairs = [(a, t) for a, t, on in zip(self.average, new, averaged) if on and t.dtype == dtype]
            if pairs and self.n: average(*map(list, zip(*pairs)), self.n)
        for a, t, on in zip(self.average, new, averaged):
            if not on: a.copy_(t)
        self.n += 1

    def _lend(self, lent: bool):
        "Have the average in the network, or what is trained; the other one lies in `average`."
        if self.n < 2 or lent == self.lent: return              # of one set of weights there is no average
        for a, t in zip(self.average, self._tensors(), strict=True):
            other = t.clone()
            t.copy_(a)
            a.copy_(other)
        self.lent = lent


def ema_decay(n: int, decay: float, warmup: bool = True) -> float:
    "The weight that an average of `n` ≥ 1 steps keeps when the next one comes: `decay`, or, while that is less, timm's 1 − (1+n)^(−2/3)."
    return min(decay, 1 - (1+n)**(-2/3)) if warmup else decay


class EMA(_Average):
    "Take the network in after each step that was taken."
    def __init__(self, decay: float, warmup: bool):
        super().__init__()
        self.decay, self.warmup = decay, warmup

    def after_step(self):
        if not self.on or self.skipped: return
        self._add(get_ema_multi_avg_fn(ema_decay(max(self.n, 1), self.decay, self.warmup)), buffers=True)

    def after_train(self):
        if not self.on or not self.n: return
        kept = ema_decay(max(self.n-1, 1), self.decay, self.warmup)
        say(self.learn, 'ema', f'an average of {self.n} step{"s"*(self.n > 1)} is validated and kept, with a decay of {kept:.4g} at the end: '
            f'the last {min(self.n, round(1/(1-kept)))} weigh most')


class SWA(_Average):
    "Take the network in at the end of each epoch, or every `every` steps, once `start` of the fit is over, and give the average its batch statistics."
    def __init__(self, start: float, lr: float | None, every: int | None):
        super().__init__()
        self.start, self.rate, self.every = start, lr, every

    def _forget(self):
        super()._forget()
        self.steps, self.fresh, self.has_bn = 0, True, False

    def _begun(self, batches: int) -> bool:
        "Whether `start` of the fit is over after `batches` of this epoch."
        return share_over(self.learn, batches) >= self.start - 1e-9

    def before_batch(self):
        if not self.on or self.rate is None or not self.learn.training or not self._begun(self.learn.iter): return
        rates = [h['lr'] for h in self.learn.opt.hypers]
        top = max(rates)
        self.learn.opt.set_hyper('lr', [self.rate*r/top if top else self.rate for r in rates])     # earlier layers keep their share

    def after_step(self):
        if not self.on or self.skipped or not self.every or not self._begun(self.learn.iter+1): return
        if self.steps % self.every == 0: self._take()
        self.steps += 1

    def after_train(self):
        if not self.on: return
        if not self.every and self._begun(self.learn.n_iter): self._take()
        self._restate()

    def _take(self):
        self._add(get_swa_multi_avg_fn(), buffers=False)
        self.fresh = self.n == 1                # one set of weights has its own statistics

    def _restate(self):
        "Have the average in the network, with the batch statistics that it has on the training set."
        if self.n < 2: return
        self._lend(True)
        if not self.fresh: self.has_bn = _restate(self.learn)
        self.fresh = True

    def after_fit(self):
        if not self.on: return
        if not self.fresh: self._restate()      # cancelled in mid-epoch
        what = f'every {self.every} steps' if self.every else 'at the end of each epoch'
        if self.n > 1: say(self.learn, 'swa', f'an average of {self.n} sets of weights, taken {what}, is kept' + ('; its batch statistics are those of the training set'*self.has_bn))
        else: say(self.learn, 'swa', f'{self.n or "no"} set of weights was taken {what} after {self.start:.0%} of the fit: nothing to average; '
                                     'train for more epochs, start earlier, or take some every few steps', aloud=True)
        super().after_fit()


def _restate(learn: Learner) -> bool:
    "Give batch norms the mean statistics of the training set, by torch's `update_bn` over the epoch in hand as it was drawn; False where there are none."
    model, dl = get_model(learn.model), learn.dls.train
    net = _Trained(model)
    if not (norms := [m for m in net.modules() if isinstance(m, _BatchNorm)]): return False
    device, age = next(model.parameters()).device, keyed(learn).age
    n_inp = getattr(learn.dls, 'n_inp', None)
    with forked('swa', age), torch.random.fork_rng([device] if device.type == 'cuda' else []), _or_as_before(norms):
        if isinstance(dl, TfmdDL): dl = dl.new()            # what is drawn from it counts for nobody
        if isinstance(dl, KeyedDL): dl.set_epoch(age)
        update_bn(((_cast_tensor(to_device(tuple(b[:n_inp or max(1, len(b)-1)]), device)),) for b in dl), net)     # it takes the first of a tuple
    return True


class _Trained(nn.Module):
    "A network as `update_bn` takes it: several inputs are one, and layers that training keeps in evaluation mode stay there."
    def __init__(self, model):
        super().__init__()
        self.model, self.modes = model, [(m, m.training or not model.training) for m in model.modules()]

    def modules(self): return (m for m, on in self.modes if on and getattr(m, 'track_running_stats', False))
    def forward(self, xb): return self.model(*xb)

    def train(self, mode: bool = True):
        for m, on in self.modes: m.training = on and mode
        return self


@contextmanager
def _or_as_before(norms):
    "Leave statistics and momenta as they were when the block dies: `update_bn` of torch 2.15 takes the momenta away for good."
    before = [(m, m.momentum, [b.clone() for b in m.buffers()]) for m in norms]
    try: yield
    except BaseException:
        for m, momentum, buffers in before:
            m.momentum = momentum
            for b, old in zip(m.buffers(), buffers): b.copy_(old)
        raise


@technique('train', section='Training', source='arXiv:2411.18704', refuses={'swa': 'each keeps an average of the weights, and an average of averages is neither; keep one'},
           formula=r'\bar w \leftarrow d\,\bar w + (1-d)\,w')
def ema(self: Learner, decay: float = .999, warmup: bool = True) -> Learner:
    """Average the weights over the last steps, later ones weighing more, and keep the average: steadier than the weights that are trained.

    After each step average ← decay·average + (1 − decay)·weights, `decay` between 0 and 1: it remembers about 1/(1 − decay) steps, so choose
    .9 to .99 for a few hundred steps, .9999 for many thousand. `warmup`: begin with a decay that grows as timm's, 1 − (1+n)^(−2/3) after n
    steps, else the first weights weigh for long. Batch statistics are averaged like weights. It is the average that is validated, tracked,
    kept and exported; training goes on with its own weights to the end of the fit, and a next fit starts from the average. Raises
    `ValueError` for a decay outside its range."""
    if not 0 < decay < 1: raise BadValue(f'ema: decay must be between 0 and 1, got {decay}')
    return put(self, EMA(decay, warmup))


@technique('train', section='Training', source='arXiv:1803.05407', example=dict(start=.5),    # the contract's fits have two epochs
           formula=r'\bar w = \frac1n \sum_{i=1}^n w_i')
def swa(self: Learner, start: float = .75, lr: float | None = None, every: int | None = None) -> Learner:
    """Average the weights that the last epochs end with: a point in the middle of a wide minimum, which generalises better than its rim.

    From `start` (0 to 1) of the fit on, weights are taken in at the end of each epoch, those at `start` included, or `every` so many steps.
    `lr` > 0: a constant rate from there on, that of the last layers (earlier ones keep their share); the rate must not come to 0, so give it,
    or use `fit_constant`. From then on the average is validated, tracked and kept; a network with batch norm looks at the training set once
    more for its statistics, so that such an epoch takes about a third longer. A fit too short for two sets of weights says so. Raises
    `ValueError` outside the ranges."""
    if not 0 <= start < 1: raise BadValue(f'swa: start must be in [0, 1), got {start}')
    if lr is not None and not lr > 0: raise BadValue(f'swa: lr must be > 0, got {lr}')
    if every is not None and every < 1: raise BadValue(f'swa: every must be ≥ 1 step, got {every}')
    keyed(self)
    return put(self, SWA(start, lr, every))
