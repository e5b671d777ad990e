"Two training samples and what the network makes of them, looked at before a fit: no draw, mode or statistic is another one afterwards."
import sys
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from fastai.basics import CastToTensor, Learner, get_model, to_device
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import HookCallback
from fastai.callback.mixup import MixHandler
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientAccumulation
from fastai.learner import _cast_tensor
from torch import nn
from torch.nn.parameter import is_lazy

from fastrecipes.data.loaders import batch_size_of, samples
from fastrecipes.randomness import forked

__all__ = ['Glance', 'answer_of', 'glance', 'unseen']

KNOWN = (ParamScheduler, MixedPrecision, MixHandler, HookCallback, CastToTensor, GradientAccumulation)     # they leave a batch in its shape and type


@dataclass
class Glance:
    "Inputs, targets, and what the network answers or raises."
    xb: tuple
    yb: tuple
    pred: object = None
    error: Exception | None = None

    def differentiated(self, f):
        "The loss `f` of what was answered, after its gradient by the outputs was taken."
        many = isinstance(self.pred, (list, tuple))
        leaves = [p.detach().requires_grad_(p.is_floating_point()) for p in (self.pred if many else (self.pred,))]  # pyright: ignore[reportGeneralTypeIssues]
        with unseen(leaves[0].device), torch.enable_grad():
            values = f(type(self.pred)(leaves) if many else leaves[0], *self.yb)
            if isinstance(values, torch.Tensor) and values.numel() == 1 and values.requires_grad: torch.autograd.grad(values.sum(), leaves, allow_unused=True)
        return values


def glance(learn: Learner, cbs) -> Glance | None:
    """Two samples and what the network makes of them; None where that is not to be had, or, for one of `cbs`, would not be what training does.

    Where it fails, a whole batch is tried, in case the network is made for its size."""
    device, model = _device_of(get_model(learn.model)), get_model(learn.model)
    if device is None or any(map(_meddles, cbs)): return None
    bs = batch_size_of(dl := learn.dls.train) or 2
    for n in sorted({2, bs}):
        with unseen(device, getattr(dl, 'device', None)):
            if not isinstance(b := samples(dl, n), (list, tuple)): return None
            i = getattr(learn.dls, 'n_inp', 1 if len(b) == 1 else len(b)-1)         # as the Learner splits a batch
            xb, yb = _cast_tensor(to_device(tuple(b[:i]), device)), _cast_tensor(to_device(tuple(b[i:]), device))
            try: return Glance(xb, yb, answer_of(model, xb))
            except Exception as e: seen = Glance(xb, yb, error=e)
    return seen


def _device_of(model) -> torch.device | None:
    "Where a network lies, if it lies in one place, ready to compute."
    tensors = [*model.parameters(), *model.buffers()]
    where = {t.device for t in tensors}
    return where.pop() if len(where) == 1 and not any(t.is_meta or is_lazy(t) for t in tensors) else None


def _meddles(cb) -> bool:
    "Whether a callback may change what the network gets or the loss is made of, in a way that is not known here."
    ours = type(cb).__module__.startswith('fastrecipes.')
    return not ours and not isinstance(cb, KNOWN) and any(getattr(type(cb), e, None) or e in vars(cb) for e in ('before_batch', 'after_pred', 'after_loss'))


@contextmanager
def unseen(*devices: torch.device | None):
    "A block without gradients of which no draw, warning or compilation is felt outside."
    eager = torch.compiler.set_stance('force_eager') if 'torch._dynamo' in sys.modules else nullcontext()
    with forked('preflight'), torch.random.fork_rng({d for d in devices if d is not None and d.type == 'cuda'}), torch.no_grad(), warnings.catch_warnings(), eager:
        warnings.simplefilter('ignore')
        yield


def answer_of(model: nn.Module, xb: tuple):
    "What a network answers in evaluation mode; then modes and buffers (batch statistics, observers) are as they were."
    was, modes, buffers = model.training, [(m, m.training) for m in model.modules()], [(b, b.clone()) for b in model.buffers()]
    try: return model.eval()(*xb)
    finally:
        model.train(was)                        # and not only the flags: some layers (LoRA) merge their weights in `eval`
        for m, mode in modes: m.training = mode
        for b, before in buffers: b.copy_(before)
