"An ensemble for the price of one training: the weights that the cycles of a fit with warm restarts end with."
from collections.abc import Sequence
from copy import deepcopy

from fastai.basics import Callback, Learner, get_model, patch

from fastrecipes.errors import BadValue
from fastrecipes.production.ensembles import Ensemble
from fastrecipes.production.export import twin
from fastrecipes.repairs import fitting
from fastrecipes.training import schedules  # noqa: F401  its fit_sgdr takes cycles of equal length
from fastrecipes.training.resume import remember

__all__ = ['Snapshots']


class Snapshots(Callback):
    "Keep the weights at the end of each of the epochs `at`."
    order = 65                                  # after averages and trackers have put theirs in

    def __init__(self, at: Sequence[int]): self.at, self.kept = tuple(at), []

    def after_epoch(self):
        if fitting(self.learn) and self.learn.epoch+1 in self.at and len(self.kept) < len(self.at):
            self.kept.append({k: v.detach().cpu().clone() for k, v in get_model(self.learn.model).state_dict().items()})


@patch
def fit_snapshots(self: Learner, n_cycles, cycle_len, lr_max=None, last=None, kind='average', wd=None, cbs=None, reset_opt=False) -> Ensemble:
    """Fit for `n_cycles` warm restarts of `cycle_len` epochs each, as `fit_sgdr` does, and make an ensemble of the weights that they end with: arXiv:1704.00109.

    M members for the price of one training: each restart leaves the minimum that the one before had found. The rate must be high enough for that, and a cycle long enough to come to
    rest. `last`: the members, the last so many (2 to n_cycles; default: all), for the first are the least trained. `kind` as in `Ensemble`, fitted on the validation images.
    The Learner itself goes on with the last weights. Raises `ValueError` outside the ranges."""
    if n_cycles != int(n_cycles) or n_cycles < 2: raise BadValue(f'fit_snapshots: n_cycles must be a whole number ≥ 2, got {n_cycles}')
    last = n_cycles if last is None else last
    if last != int(last) or not 2 <= last <= n_cycles: raise BadValue(f'fit_snapshots: last must be 2 to n_cycles={n_cycles}, got {last}')
    snapshots = Snapshots([(i+1)*int(cycle_len) for i in range(int(n_cycles))])
    self.add_cb(snapshots)                      # not for the fit alone: a run that was killed after it gets back what they kept
    try: self.fit_sgdr(n_cycles, cycle_len, lr_max, cycle_mult=1, cbs=cbs, reset_opt=reset_opt, wd=wd)
    finally: self.remove_cb(snapshots)
    kept = remember('snapshots', lambda: snapshots.kept)
    if len(kept) < n_cycles: raise BadValue(f'fit_snapshots: the fit ended after {len(kept)} of {n_cycles} cycles; leave out what ends it early')
    members = [_with(self, state) for state in kept[-last:]]
    return Ensemble(members, kind, dls=self.dls, names=[f'cycle {i+1}' for i in range(n_cycles-last, n_cycles)]).fit()


def _with(learn: Learner, state: dict) -> Learner:
    model = deepcopy(learn.model)
    get_model(model).load_state_dict(state)
    return twin(learn, model)
