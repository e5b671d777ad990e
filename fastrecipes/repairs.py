"Narrow mends of fastai itself, each with the defect it mends; `FASTRECIPES_REPAIRS=0` leaves fastai as it is."
import os
import warnings
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from itertools import count, takewhile
from pathlib import Path

import cloudpickle
import numpy as np
import torch
from fastai.basics import (Callback, CancelEpochException, GatherPredsCallback, L, LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat, Learner, Recorder, defaults,
                           get_model, noop, patch)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixHandler
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import LRFinder
from fastai.callback.tracker import SaveModelCallback, TrackerCallback
from fastai.distributed import DistributedTrainer, ParallelTrainer, rank_distrib
from torch import nn
from torch.nn import functional as F

from fastrecipes.errors import BadValue, nearest
from fastrecipes.files import whole

__all__ = ['REPAIRS', 'bare', 'export_to', 'fitting', 'holding', 'is_trial', 'orientation', 'with_message', 'with_own_memory']
REPAIRS = os.environ.get('FASTRECIPES_REPAIRS', '1') != '0'


def fitting(learn: Learner) -> bool:
    "Whether a fit is under way, and not `validate()` or `get_preds()`, which call before_fit and after_fit too."
    return learn.__dict__.get('_fitting', False) or not REPAIRS


def is_trial(learn: Learner, cbs=()) -> bool:
    "Whether a fit of `learn`, with `cbs` for it alone, is one of `lr_find` and its like: nothing of it is counted, judged or kept."
    return any(isinstance(cb, LRFinder) for cb in (*learn.cbs, *L(cbs)))


def orientation(monitor: str, metrics=()) -> str:
    """'lower', 'higher' or 'nearer 0': which value of what is reported as `monitor` is the better one.

    Our metrics say so themselves (`better`); of others losses, errors, perplexity and those named as a measure of errors are the better the lower."""
    lower = any(word in monitor for word in ('loss', 'error', 'mse', 'mae', 'rmse', 'msle', 'perplexity'))
    own = monitor.removeprefix('train_').removeprefix('valid_')
    return next((m.better for m in metrics if m.name in (monitor, own) and hasattr(m, 'better')), 'lower' if lower else 'higher')


def _nearer_0(value, best): return abs(value) < abs(best)


def export_to(learn: Learner, path, pickle_module=cloudpickle, pickle_protocol=2) -> Path:
    "Pickle a `bare` copy of `learn` to `path` for `load_learner`, whole or not at all; of several processes one writes."
    path = Path(path)
    if rank_distrib(): return path
    with whole(path) as tmp, warnings.catch_warnings():
        warnings.simplefilter('ignore')          # torch and fastai warn of pickles in general
        torch.save(bare(learn), tmp, pickle_module=pickle_module, pickle_protocol=pickle_protocol)
    return path


ASKED = ('before_validate', 'before_batch', 'after_pred')      # the events at which a callback can change what a network is asked or answers
OF_TRAINING = (MixedPrecision, ParallelTrainer, DistributedTrainer, MixHandler, TrackerCallback, CSVLogger, GatherPredsCallback)


def bare(learn: Learner) -> Learner:
    """A copy of `learn` that holds nothing of its training: no data, optimizer, batch or logger, and of its callbacks those that a prediction needs.

    These are fastai's defaults, made anew, and callbacks of others that act on batches or predictions outside training, as those of a text
    Learner do. Precision is that of training's machine: what is loaded answers in 32 bits, as after `to_fp32()`. The network is shared where its
    tensors own their memory; one that is wrapped for several devices or compiled is taken out."""
    model = get_model(learn.model)
    new = holding(learn, with_own_memory(getattr(model, '_orig_mod', model)))
    new.dls, new.logger, new.loss_grad = learn.dls.new_empty(), print, None
    if 'techniques' in vars(learn):
        new.techniques = {n: replace(a, arguments={k: v if _plain(v) else f'<{type(v).__name__}>' for k, v in a.arguments.items()}) for n, a in learn.techniques.items()}
    for cb in learn.cbs:
        if type(cb) in defaults.callbacks or isinstance(cb, ProgressCallback): new.add_cb(copy(cb) if isinstance(cb, Recorder) else type(cb)())     # a fit that died leaves bars
        elif _takes_part(cb): new.add_cb(copy(cb))
    return new


def holding(learn: Learner, model: nn.Module) -> Learner:
    "A copy of `learn` that holds `model`: no callbacks, optimizer and batch; its techniques are a record of its own."
    new = copy(learn)
    for name, value in list(vars(new).items()):
        if isinstance(value, Callback): delattr(new, name)
    new._end_cleanup()
    new.model, new.opt, new.cbs = model, None, L()
    if 'techniques' in vars(learn): new.techniques = dict(learn.techniques)
    return new


def _takes_part(cb: Callback) -> bool:
    "Whether a callback, of others than us, may change what a network answers when it is asked."
    if hasattr(cb, 'undoable') or isinstance(cb, OF_TRAINING) or not cb.run_valid: return False          # ours leave their work in the network, and are gone
    return any(hasattr(type(cb), event) for event in ASKED)


def with_own_memory(model: nn.Module) -> nn.Module:
    "`model`, or a copy of it where a tensor is a part of a larger one: files hold the whole of what is pointed into."
    def owns(t): return t.device.type == 'meta' or t.layout != torch.strided or t.untyped_storage().nbytes() <= t.numel()*t.element_size()
    if all(map(owns, (*model.parameters(), *model.buffers()))): return model
    model = deepcopy(model)
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if not owns(t): t.data = t.data.clone()
    return model


def _plain(v) -> bool:
    "Whether an argument of a technique can be pickled for years: no teacher, no modules."
    if isinstance(v, (list, tuple)): return all(map(_plain, v))
    return v is None or isinstance(v, (bool, int, float, str))


def with_message(e: Exception, cb: Callback, event_name: str) -> Exception:
    "`e`, which has no message, with one that says where it happened."
    e.args = (f'{type(e).__name__} without a message in `{type(cb).__name__}` when calling event `{event_name}`',)
    return e


if REPAIRS:
    @patch
    def fit(self: Learner, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        """Train for the epochs from `start_epoch` to `n_epoch`, at a rate of `lr`.

        fastai 2.8.12 cancels the epochs before `start_epoch`, and trackers that run after a cancelled epoch find no row to read (IndexError);
        the momentum that a schedule ended at and a `wd` given for one fit stay for the next; nothing tells callbacks a fit from `validate()`."""
        self._fitting, self._first_epoch = True, start_epoch
        if reset_opt or self.opt is None: self.create_opt()
        before = [dict(h) for h in self.opt.hypers]
        try: self._orig_fit(n_epoch, lr, wd, cbs)
        finally:
            self._fitting = False
            for k in before[0]:
                old = [h[k] for h in before]
                if k != 'lr' and [h.get(k) for h in self.opt.hypers] != old: self.opt.set_hyper(k, old)

    @patch
    def _do_fit(self: Learner):
        "Epochs until there are `n_epoch`, a number that may change while they are trained (`fit_for`)."
        for self.epoch in takewhile(lambda epoch: epoch < self.n_epoch, count(self._first_epoch)): self._with_events(self._do_epoch, 'epoch', CancelEpochException)

    @patch
    def _with_events(self: Learner, f, event_type, ex, final=noop):
        """Run `f` between the events before_ and after_`event_type`; where an exception ends it, give each callback's `abort` a turn.

        fastai 2.8.12 calls nothing then: what a callback lent for a batch or a fit (autocast, a wrapped model) would stay for good. An
        `abort` may return an exception that says better what happened: it is raised instead, once all have had their turn."""
        try:
            try:
                self(f'before_{event_type}')
                f()
            except ex: self(f'after_cancel_{event_type}')
            self(f'after_{event_type}')
            final()
        except BaseException as e:
            aborts = [(cb, type(cb).abort) for cb in self.cbs.sorted('order') if hasattr(type(cb), 'abort')]
            if better := [told for cb, abort in aborts if (told := abort(cb, event_type)) is not None]: raise better[0] from e
            raise

    @patch
    def abort(self: MixHandler, level: str):
        "Give the Learner its loss back: fastai 2.8.12 does so only in after_train, and later fits would train on mixtures that nobody makes."
        if level == 'fit' and self.learn.loss_func == self.lf: self.learn.loss_func = self.old_lf

    @patch
    def abort(self: LRFinder, level: str):     # noqa: F811  (a method of another class)
        "Give the Learner its weights and rate back: fastai 2.8.12 leaves those of the trial when it is interrupted."
        if level == 'fit' and 'tmp_p' in vars(self): self.after_fit()

    @patch
    def abort(self: ProgressCallback, level: str):      # noqa: F811
        "Close the bars and give the Learner its logger back: fastai 2.8.12 leaves its own, a bar that cannot be pickled, and nothing of an interrupted fit is exported."
        if level == 'fit': self.after_fit()

    @patch
    def __call__(self: Callback, event_name):
        "Answer an event. fastai 2.8.12 replaces an exception that has no message by an IndexError of its own, for it reads `e.args[0]`."
        try: return self._orig___call__(event_name)
        except IndexError as e:
            cause = e.__context__
            if cause is None or cause.args or e.args != ('tuple index out of range',): raise
            raise with_message(cause, self, event_name) from None

    @patch
    def __init__(self: TrackerCallback, monitor='valid_loss', comp=None, min_delta=0., reset_on_fit=True):
        "Watch `monitor`; without `comp`, which way is better is found out when the metrics are known."
        self._orig___init__(monitor, comp, min_delta, reset_on_fit)
        self.found_out = comp is None

    @patch
    def before_fit(self: TrackerCallback):      # noqa: F811
        """Find the column of `monitor`, and which way is better; outside a fit stand aside.

        fastai 2.8.12 takes a lower value for the better only where 'loss' or 'error' is in the name: it keeps the worst model by 'mae' or 'rmse'.

        fastai 2.8.12 watches `validate()` too, whose row has no train_loss: it takes the next column for `monitor`, finds it better and saves
        the model. It has a bare assertion for a name that is not reported."""
        if not fitting(self.learn):
            self.run = False
            return
        names = [n for n in self.recorder.metric_names[1:] if n != 'time']
        if self.monitor not in names: raise BadValue(f'monitor must be one of {", ".join(names)}, got {self.monitor!r}{nearest(self.monitor, names)}')
        if self.reset_on_fit: self.last_saved_path = None
        if vars(self).get('found_out'):         # not in one that was made before this module was imported
            comp = dict(lower=np.less, higher=np.greater, **{'nearer 0': _nearer_0})[orientation(self.monitor, self.learn.metrics)]
            if (comp == np.greater) != (self.comp == np.greater): self.min_delta *= -1
            self.comp, self.best = comp, self.best if comp == self.comp else None
        self._orig_before_fit()

    @patch
    def after_fit(self: SaveModelCallback, **kwargs):
        "Load the best model, if one was saved: where nothing ever was better, fastai 2.8.12 loads what an earlier run left under the same name."
        if self.at_end or self.every_epoch or self.last_saved_path: self._orig_after_fit(**kwargs)
        else: print(f'SaveModelCallback: {self.monitor} never got better than {self.best}, so nothing was saved and the weights stay as they are')

    @patch
    def before_fit(self: Recorder):            # noqa: F811
        "Begin a record; what `validate()` and `get_preds()` begin is put aside in after_fit: fastai 2.8.12 loses the fit's for it."
        aside = {} if fitting(self.learn) else {k: v for k, v in vars(self).items() if k in ('lrs', 'iters', 'losses', 'values')}
        self._orig_before_fit()
        self.of_fit = aside

    @patch
    def after_fit(self: Recorder):              # noqa: F811
        vars(self).update(vars(self).pop('of_fit', {}))

    class NoAttribute(AttributeError):
        "What neither a Learner nor its model has; which name is near it is looked up when somebody reads it."
        def __init__(self, learn, k):
            super().__init__(k)
            self.learn = learn
        def __str__(self):
            k, model = self.args[0], vars(self.learn).get('model')
            return f'neither this Learner nor its {type(model).__name__} has an attribute {k!r}{nearest(k, dir(type(self.learn)))}'

    def attribute(self, k, of_model=Learner.__getattr__):
        "An attribute of the model; or an error that names the Learner and what is near: fastai 2.8.12's names the model alone."
        try: return of_model(self, k)
        except AttributeError: raise NoAttribute(self, k) from None
    Learner.__getattr__ = attribute             # not by `patch`: a module has a `__getattr__` of its own

    @patch
    def export(self: Learner, fname='export.pkl', pickle_module=cloudpickle, pickle_protocol=2):
        """Save what inference needs, whole or not at all, to `fname` in the Learner's folder; the Learner itself is not touched.

        When it cannot be pickled, fastai 2.8.12 leaves half a file, and the Learner without data and optimizer: later fits train nothing.
        It pickles what only training needs along: a teacher, the average of weights, a log file that is open (which fails)."""
        export_to(self, self.path/fname, pickle_module, pickle_protocol)

    @patch
    def load(self: Learner, file, device=None, **kwargs):
        "Load weights (and the optimizer). Of those of another network fastai 2.8.12 prints torch's page of sizes: here a sentence names the first layer that differs."
        try: return self._orig_load(file, device=device, **kwargs)
        except RuntimeError as e:
            if 'Error(s) in loading state_dict' not in str(e): raise
            first = str(e).splitlines()[1].strip().rstrip('. ')
            raise BadValue(f'load: {file} holds the weights of another network: {first[0].lower()}{first[1:]}. Build the Learner as it was when they were saved '
                           '(slim, norm, coordconv and their like change its layers), or export it, and read that with load_learner') from e

    @patch
    def activation(self: LabelSmoothingCrossEntropyFlat, out): return F.softmax(out, self.axis)     # fastai 2.8.12 takes the last axis, a mask's width
    @patch
    def decodes(self: LabelSmoothingCrossEntropyFlat, out): return out.argmax(self.axis)

    @patch
    def activation(self: LabelSmoothingCrossEntropy, out): return F.softmax(out, 1)                 # noqa: F811  it computes along axis 1
    @patch
    def decodes(self: LabelSmoothingCrossEntropy, out): return out.argmax(1)                        # noqa: F811

    # fastai 2.8.12 finds no activation on torch's own cross entropies: `get_preds` gives logits, and `predict` every class as the answer.
    F.cross_entropy.activation = nn.CrossEntropyLoss.activation = staticmethod(partial(F.softmax, dim=1))
    F.cross_entropy.decodes = nn.CrossEntropyLoss.decodes = staticmethod(partial(torch.argmax, dim=1))
