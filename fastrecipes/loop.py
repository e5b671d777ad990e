"""What a batch costs beside its arithmetic, without what nobody asked for; the numbers stay the same, bit for bit.

fastai 2.8.12 asks every callback at each of the eleven events of a batch; one without a method of that name looks for it in the Learner, then in the model, to learn
that there is none. It moves each batch to where it is, and works out its lists of metrics anew. Beside a loop of one's own: `bench/loop.py`."""
from operator import attrgetter

import torch
from fastai.basics import (AvgSmoothLoss, Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException,
                           CancelValidException, CastToTensor, Learner, OptimWrapper, Recorder, TrainEvalCallback, event, nn, num_distrib, patch)
from fastai.callback.core import _inner_loop
from fastcore.xtras import modify_exception

from fastrecipes.repairs import REPAIRS, with_message

__all__ = ['answers']

CANCELS = (CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException, CancelValidException)
IN_A_BATCH = frozenset(_inner_loop)
ORDER = attrgetter('order')


def answers(cb: Callback, name: str) -> bool:
    "Whether `cb` does anything at the event `name`: by a method of its class or its own, or in a way of its own. After a fit each is made to run again."
    return hasattr(type(cb), name) or name in cb.__dict__ or name == 'after_fit' or not _plain(type(cb))


def _plain(kind: type) -> bool:
    "Whether callbacks of this class find and call the methods of events as fastai does."
    return kind.__call__ is Callback.__call__ and kind.__getattr__ is Callback.__getattr__


def _listeners(learn: Learner, name: str) -> list[Callback]:
    "Who answers `name`, in order: looked up anew where callbacks came or went, and at each event that is not of a batch."
    known, cbs = vars(learn.cbs).get('_known'), learn.cbs.items
    if known is None or name not in IN_A_BATCH or known[0] != cbs: known = learn.cbs._known = (list(cbs), {})
    if name not in known[1]:
        who, watch = [cb for cb in sorted(cbs, key=ORDER) if answers(cb, name)], vars(learn).get('_watch')
        known[1][name] = watch(who, name) if watch else who             # `profile` puts its clock around each
    return known[1][name]


def _where(module: nn.Module) -> torch.device | None:
    "Where the first parameter lies."
    for p in module._parameters.values():
        if p is not None: return p.device
    return next(filter(None, map(_where, module._modules.values())), None)


def _told(e: Exception, cb: Callback, event_name: str) -> Exception:
    "`e` with the place where it happened, as fastai has it; one without a message gets one."
    if not e.args: return with_message(e, cb, event_name)
    return modify_exception(e, f'Exception occured in `{type(cb).__name__}` when calling event `{event_name}`:\n\t{e.args[0]}', replace=True)


if REPAIRS:
    @patch
    def __call__(self: Learner, event_name):
        "Tell the callbacks of an event, or of several, in their order. A model that has a method of an event's name is not called, as fastai 2.8.12 does, by every callback."
        for name in (event_name,) if isinstance(event_name, str) else event_name:
            if not hasattr(event, name): raise Exception(f'missing {name}')
            for cb in _listeners(self, name):
                if name not in IN_A_BATCH or not _plain(type(cb)): cb(name)
                elif cb.run and (cb.run_train if self.training else cb.run_valid):
                    try: getattr(cb, name)()
                    except CANCELS: raise
                    except Exception as e: raise _told(e, cb, name)

    @patch
    def _set_device(self: Learner, b):
        "A batch that lies where the model does is taken as it is."
        if type(b) is tuple and (there := _where(self.model)) is not None and all(isinstance(o, torch.Tensor) and o.device == there for o in b): return b
        return self._orig__set_device(b)

    @patch
    def after_batch(self: TrainEvalCallback):
        "Count a training batch."
        learn = self.learn
        learn.pct_train += 1./(learn.n_iter*learn.n_epoch)
        learn.train_iter += 1

    @patch
    def before_batch(self: CastToTensor):
        "What are plain tensors already is not cast."
        learn = self.learn
        if any(type(o) is not torch.Tensor for o in (*learn.xb, *learn.yb)): self._orig_before_batch()

    @patch
    def after_batch(self: Recorder):                            # noqa: F811
        "Note rate and smooth loss of a training batch: the value once, and no list of metrics where there is but the loss."
        learn = self.learn
        if not learn.training or self.train_metrics or getattr(self, 'cancel_train', False) or not len(learn.yb): return self._orig_after_batch()
        opt, smooth = learn.opt, self.smooth_loss
        smooth.accumulate(learn)
        self.lrs.append(opt.opt.param_groups[-1]['lr'] if type(opt) is OptimWrapper else opt.hypers[-1]['lr'])      # which makes dicts of all that a torch optimizer knows
        learn.smooth_loss = value = smooth.value
        self.losses.append(value)

    @patch
    def accumulate(self: AvgSmoothLoss, learn):
        "Of a loss that is one number, and here, there is no mean to take and nothing to gather or to copy."
        loss = learn.loss
        if loss.ndim or not loss.is_cpu or num_distrib(): return self._orig_accumulate(learn)
        self.count += 1
        self.val = torch.lerp(loss.detach(), self.val, self.beta)
