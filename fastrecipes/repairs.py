"Narrow mends of fastai itself, each with the defect it mends; `FASTRECIPES_REPAIRS=0` leaves fastai as it is."
import os

import numpy as np
from fastai.basics import CancelEpochException, L, Learner, noop, patch
from fastai.callback.schedule import ParamScheduler, combined_cos

__all__ = ['REPAIRS', 'fitting']
REPAIRS = os.environ.get('FASTRECIPES_REPAIRS', '1') != '0'


def fitting(learn: Learner) -> bool:
    "Whether a fit is under way, and not `validate()` or `get_preds()`, which call before_fit and after_fit too."
    return learn.__dict__.get('_fitting', False) or not REPAIRS


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
        for self.epoch in range(self._first_epoch, self.n_epoch): self._with_events(self._do_epoch, 'epoch', CancelEpochException)

    @patch
    def fit_flat_cos(self: Learner, n_epoch, lr=None, div_final=1e5, pct_start=0.75, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        """Fit for `n_epoch` epochs at a flat `lr`, annealed by a cosine to `lr/div_final` from `pct_start` of the way (0–1) on.

        fastai 2.8.12 ignores `start_epoch` here and trains every epoch again."""
        if self.opt is None: self.create_opt()
        self.opt.set_hyper('lr', self.lr if lr is None else lr)
        lr = np.array([h['lr'] for h in self.opt.hypers])
        scheds = {'lr': combined_cos(pct_start, lr, lr, lr/div_final)}
        self.fit(n_epoch, cbs=ParamScheduler(scheds)+L(cbs), reset_opt=reset_opt, wd=wd, start_epoch=start_epoch)

    @patch
    def _with_events(self: Learner, f, event_type, ex, final=noop):
        """Run `f` between the events before_ and after_`event_type`; where an exception ends it, give each callback's `abort` a turn.

        fastai 2.8.12 calls nothing then: what a callback lent for a batch or a fit (autocast, a wrapped model) would stay for good."""
        try: self._orig__with_events(f, event_type, ex, final)
        except BaseException:
            for cb in self.cbs.sorted('order'):
                if abort := getattr(type(cb), 'abort', None): abort(cb, event_type)
            raise
