"What of a network stands still while the rest trains: norm layers that really are frozen, and layers let go step by step."
from numbers import Real

import numpy as np
from fastai.basics import Learner, TrainEvalCallback, get_model, nn, patch

from fastrecipes.errors import BadValue, nearest
from fastrecipes.repairs import fitting
from fastrecipes.technique import TechniqueCallback, put, say, technique
from fastrecipes.training.schedules import SCHEDULES, fit_by

__all__ = ['FreezeBN', 'freeze_norms', 'frozen_norms', 'norms_of']


def norms_of(model: nn.Module) -> list[nn.Module]:
    "The layers of `model` that keep statistics of what they were trained on."
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    "Those of `norms_of(model)` that are frozen: by their own parameters, or, where they have none, by those of the layer in front."
    found, frozen, norms = [], False, set(norms_of(model))
    for m in model.modules():
        if own := list(m.parameters(recurse=False)): frozen = not any(p.requires_grad for p in own)
        if frozen and m in norms: found.append(m)
    return found


def freeze_norms(learn: Learner):
    "Let weight and bias of norm layers freeze with the group that they lie in; fastai's default, train_bn=True, trains them on."
    learn.train_bn = False
    opt = learn.opt
    if opt is None: return                                      # the next one is made so
    for i, ps in enumerate(opt.param_lists):
        for p in ps:
            forced = opt.state[p].pop('force_train', None) if p in opt.state else None
            if forced and i < opt.frozen_idx: p.requires_grad_(False)


class FreezeBN(TechniqueCallback):
    """Put frozen norm layers into evaluation mode for the batches of each training epoch: their statistics neither move nor follow the batch.

    fastai 2.8.12's BnFreeze finds none as long as train_bn is True, and fails at norm layers without parameters."""
    order, run_valid = TrainEvalCallback.order+1, False         # it puts the whole network into training mode

    def __init__(self): self.still = []

    def before_train(self):
        model = get_model(self.learn.model)
        self.still = [m for m in frozen_norms(model) if m.training]
        for m in self.still: m.eval()
        if fitting(self.learn): self._tell(len(self.still), len(norms_of(model)))

    def _tell(self, n: int, total: int):
        if n: effect = f'{n} of {total} norm layers are frozen: statistics, weight and bias stand still'
        elif total: effect = f'nothing is frozen now: all {total} norm layers train'
        else: effect = 'no layer keeps batch statistics: nothing to freeze'
        known = self.learn.techniques.get('freeze_bn')
        say(self.learn, 'freeze_bn', effect, aloud=not n and known is not None and known.effect != effect)

    def after_train(self): self._go_on()
    def abort(self, level):
        if level in ('train', 'fit'): self._go_on()

    def _go_on(self):
        for m in self.still: m.train()
        self.still = []

    def __getstate__(self): return {**vars(self), 'still': []}


@technique('train', section='Training', source='https://keras.io/guides/transfer_learning/', touches=('model',))
def freeze_bn(self: Learner) -> Learner:
    """Freeze the batch norm of frozen layers too, so that a body that does not train gives the same in training as in inference.

    By default fastai trains the weight and bias of norm layers in frozen groups, and the running statistics move in every batch: on few
    images, small batches or other pixels they drift from what the weights were trained with. Here they stay to the bit; norm layers that
    are not frozen train as they did, and so do all of them after `unfreeze()`. Layer norms keep no statistics; their weights freeze as well."""
    freeze_norms(self)
    return put(self, FreezeBN())


@patch
def fit_gradual_unfreeze(self: Learner, epochs: int, lr: float | None = None, *, step_epochs: int = 1, steps: int | None = None, div: float = 2.6,
                         schedule: str = 'flat_cos') -> Learner:
    """Train the head alone, then with the group of layers below it, and so on down: gradual unfreezing with layer-wise rates (arXiv:1801.06146).

    `epochs` ≥ 1: of the last step, in which all layers train; each step before has `step_epochs` ≥ 1. `steps`: 2 to the number of the Learner's
    parameter groups (default: one for each group); 2 are the head, then all. `lr`: the rate of the head (default: the Learner's); each group
    below has that of the one above divided by `div` ≥ 1 (2.6, the paper's). `schedule`: of each step, one of `SCHEDULES`. Each step is a fit of its own, and
    begins with a new optimizer state; in a `resumable` block it goes on in the step where it was killed. Raises `ValueError` outside the
    ranges, and for a Learner of one group, which needs a `splitter`."""
    if self.opt is None: self.create_opt()
    n = len(self.opt.param_lists)
    if n < 2: raise BadValue('fit_gradual_unfreeze: all parameters are in one group, so there is nothing to unfreeze in steps; give the Learner a splitter')
    steps = n if steps is None else steps
    if not 2 <= steps <= n: raise BadValue(f'fit_gradual_unfreeze: steps must be 2 to {n}, the number of parameter groups, got {steps}')
    for name, value in (('epochs', epochs), ('step_epochs', step_epochs), ('div', div)):
        if not value >= 1: raise BadValue(f'fit_gradual_unfreeze: {name} must be ≥ 1, got {value}')
    lr = self.lr if lr is None else lr
    if not isinstance(lr, Real) or not lr > 0: raise BadValue(f'fit_gradual_unfreeze: lr must be one number > 0, the rate of the head, got {lr}')
    if schedule not in SCHEDULES: raise BadValue(f'fit_gradual_unfreeze: schedule must be one of {", ".join(SCHEDULES)}, got {schedule!r}{nearest(schedule, SCHEDULES)}')
    rates = [lr/div**(n-1-i) for i in range(n)]
    for frozen in np.linspace(n-1, 0, steps).round().astype(int).tolist():
        self.freeze_to(frozen)
        fit_by(self, schedule, epochs if frozen == 0 else step_epochs, np.array(rates))
    return self
