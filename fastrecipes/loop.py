"""What a batch costs beside its arithmetic, without what nobody asked for; the numbers stay the same, bit for bit.

fastai 2.8.12 asks every callback at each of the eleven events of a batch; one without a method of that name looks for it in the Learner, then in the model, to learn
that there is none. It moves each batch to where it is, and works out its lists of metrics anew. Beside a loop of one's own: `bench/loop.py`."""
from operator import attrgetter

import torch
from fastai.basics import AvgSmoothLoss, Callback, CastToTensor, Learner, OptimWrapper, Recorder, event, num_distrib, patch

from fastrecipes.repairs import REPAIRS

__all__ = ['answers']

ORDER = attrgetter('order')


def answers(cb: Callback, name: str) -> bool:
    "Whether `cb` does anything at the event `name`: by a method of its class or its own, or in a way of its own. After a fit each is made to run again."
    kind = type(cb)
    return hasattr(kind, name) or name in vars(cb) or name == 'after_fit' or kind.__call__ is not Callback.__call__ or kind.__getattr__ is not Callback.__getattr__


if REPAIRS:
    @patch
    def __call__(self: Learner, event_name):
        "Tell the callbacks of an event, or of several, in their order. A model that has a method of an event's name is not called, as fastai 2.8.12 does, by every callback."
        for name in (event_name,) if isinstance(event_name, str) else event_name:
            if not hasattr(event, name): raise Exception(f'missing {name}')
            for cb in sorted(self.cbs, key=ORDER):
                if answers(cb, name): cb(name)

    @patch
    def _set_device(self: Learner, b):
        "A batch that lies where the model does is taken as it is."
        if type(b) is tuple:
            there = next(self.model.parameters()).device
            if all(isinstance(o, torch.Tensor) and o.device == there for o in b): return b
        return self._orig__set_device(b)

    @patch
    def before_batch(self: CastToTensor):
        "What are plain tensors already is not cast."
        if any(type(o) is not torch.Tensor for o in (*self.xb, *self.yb)): self._orig_before_batch()

    @patch
    def after_batch(self: Recorder):
        "Note rate and smooth loss of a training batch: the value once, and no list of metrics where there is but the loss."
        if not self.training or self.train_metrics or getattr(self, 'cancel_train', False) or not len(self.yb): return self._orig_after_batch()
        self.smooth_loss.accumulate(self.learn)
        opt = self.opt
        self.lrs.append(opt.opt.param_groups[-1]['lr'] if type(opt) is OptimWrapper else opt.hypers[-1]['lr'])      # which makes dicts of all that a torch optimizer knows
        self.losses.append(value := self.smooth_loss.value)
        self.learn.smooth_loss = value

    @patch
    def accumulate(self: AvgSmoothLoss, learn):
        "Of a loss that is one number, and here, there is no mean to take and nothing to gather or to copy."
        loss = learn.loss
        if loss.ndim or not loss.is_cpu or num_distrib(): return self._orig_accumulate(learn)
        self.count += 1
        self.val = torch.lerp(loss.detach(), self.val, self.beta)
