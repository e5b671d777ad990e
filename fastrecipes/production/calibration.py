"Probabilities that mean what they say: one temperature, fitted on validation images, that all outputs are divided by."
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from fastai.basics import Learner, get_model, nn, patch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from fastrecipes.arguments import checked
from fastrecipes.data.loaders import samples
from fastrecipes.errors import BadValue
from fastrecipes.losses.classification import cross_entropy_of
from fastrecipes.metrics.scored import CalibrationError
from fastrecipes.production.members import Network
from fastrecipes.repairs import fitting, is_trial
from fastrecipes.technique import TechniqueCallback, check_changeable, put

__all__ = ['Calibration', 'Tempered', 'calibrated', 'temperature']

WIDEST = 20.                            # times: further from 1 than that, a temperature makes up for no overconfidence
BINS = 15


@dataclass(frozen=True)
class Calibration:
    """The temperature `T` (> 0; above 1 the network was too sure), fitted on `n` images, and what it did there, (before, after): `log_loss` in nats and
    `error`, the expected calibration error (0–1, `bins` of confidence)."""
    T: float
    n: int
    log_loss: tuple[float, float]
    error: tuple[float, float]
    bins: int = BINS

    @property
    def at_bound(self) -> bool: return not 1/WIDEST*1.001 < self.T < WIDEST/1.001

    def record(self) -> dict: return asdict(self)

    def __str__(self):
        how = 'too sure' if self.T > 1.005 else 'not sure enough' if self.T < .995 else 'as sure as it should be'
        said = (f'T = {self.T:.3g}: it was {how}; calibration error {self.error[0]:.3f} → {self.error[1]:.3f}, log loss {self.log_loss[0]:.3f} → {self.log_loss[1]:.3f} '
                f'on the {self.n:,} images that T was fitted on; no answer changes')
        why = 'too few mistakes to fit it by' if self.T < 1 else 'what it says has next to nothing to do with what is right'
        return said + (f'; T IS AT THE END OF ITS RANGE: {why}' if self.at_bound else '')


def temperature(logits, y) -> float:
    """The T, 1/20 to 20, for which softmax(logits/T) `(n, c)` has the least log loss for classes `(n,)`: arXiv:1706.04599.

    The loss is convex in 1/T, so there is one. Raises `ValueError` for no samples, and for values that are not finite."""
    z, y = torch.as_tensor(np.asarray(logits)).double(), torch.as_tensor(np.asarray(y)).long()
    if z.ndim != 2 or y.shape != z.shape[:1] or not len(y): raise BadValue(f'temperature: outputs (n, c), n ≥ 1, and n classes, got {tuple(z.shape)} and {tuple(y.shape)}')
    if not z.isfinite().all(): raise BadValue('temperature: some outputs are not finite numbers')
    loss = lambda log_beta: float(F.cross_entropy(z*math.exp(log_beta), y))
    end = math.log(WIDEST)
    return math.exp(-minimize_scalar(loss, bounds=(-end, end), method='bounded', options=dict(xatol=1e-9)).x)


def calibrated(logits, y) -> Calibration:
    "The `Calibration` that fits outputs `(n, c)` of samples of classes `(n,)`."
    return told(logits, y, temperature(logits, y))


def told(logits, y, T: float) -> Calibration:
    "What it does to outputs `(n, c)` to divide them by `T`."
    z, y = torch.as_tensor(np.asarray(logits)).double(), torch.as_tensor(np.asarray(y)).long()
    both = z, z/T
    ece = CalibrationError(bins=BINS, logits=True)
    return Calibration(T, len(y), tuple(float(F.cross_entropy(o, y)) for o in both), tuple(float(ece(o, y)) for o in both))


class Tempered(nn.Module):
    "A network whose outputs are divided by a temperature."
    def __init__(self, model: nn.Module, T: float):
        super().__init__()
        self.model, self.T = model, T

    def forward(self, *x): return self.model(*x)/self.T


class Calibrated(TechniqueCallback):
    "Forget the calibration when the network is trained on: it is that of other weights."
    def before_fit(self):
        if fitting(self.learn) and not is_trial(self.learn): vars(self.learn).pop('calibration', None)


@patch
@checked
def calibrate(self: Learner, ds_idx: int = 1) -> Calibration:
    """Divide the network's outputs by the temperature that fits the validation images best (`ds_idx` 1), and tell what that did (arXiv:1706.04599).

    Networks that were trained long are surer than they are right. One number mends most of it; the most probable class stays the same, so that accuracy does. It is
    kept in the network, in the weights of its last layer where that is linear, and so in all that is exported, shipped, saved: `learn.calibration`
    and the bundle's card tell it. Do it last: further training moves it again. Fit it on images that training did not see, and tell of it on others,
    for on its own it always looks good. Raises `ValueError` where outputs are no logits of classes, where there are no such images, and for a network in 8 bits."""
    check_changeable(self, 'calibrate')
    if cross_entropy_of(self.loss_func) is None: raise BadValue(f'calibrate: needs a Learner trained by cross entropy, whose outputs are logits, got the loss {self.loss_func}')
    if not 0 < ds_idx < len(self.dls.loaders) or not len(self.dls.loaders[ds_idx].dataset): raise BadValue(f'calibrate: no images are held out at ds_idx={ds_idx}')
    z, y = Network(self).answers(self.dls.loaders[ds_idx], act=lambda z: z)
    found = calibrated(z, y)
    before = vars(self).get('calibration')
    temper(self, found.T)
    self.calibration = found if before is None else told(z*before.T, y, before.T*found.T)       # beside the network as it was trained
    put(self, Calibrated())
    return found


def temper(learn: Learner, T: float):
    "Have the network of `learn` answer its outputs over `T`: by its last layer, where that is linear and nothing else has a share in the outputs; else by a layer of its own."
    model = get_model(learn.model)
    b = samples(learn.dls.valid, 8)
    xb = None if b is None else b[:learn.dls.valid.n_inp]
    if xb is None or not (last := _last_linear(model, xb)) or not _folded(model, last, xb, T): learn.model = Tempered(learn.model, T)


def _last_linear(model: nn.Module, xb) -> nn.Linear | None:
    "The linear layer whose output is the network's."
    made, hooks = {}, []
    for m in model.modules():
        if type(m) is nn.Linear: hooks.append(m.register_forward_hook(lambda m, _, out: made.__setitem__(id(out), (m, out))))
    try: out = _outputs(model, xb)
    finally:
        for h in hooks: h.remove()
    return made.get(id(out), (None,))[0]


def _folded(model, last: nn.Linear, xb, T: float) -> bool:
    "Whether the last layer's weights, over T, do it; they are put back if not (they may be shared, or made anew in each forward pass)."
    params = [p for p in (last._parameters.get('weight'), last._parameters.get('bias')) if p is not None]
    before, old = _outputs(model, xb).clone(), [p.detach().clone() for p in params]
    with torch.no_grad():
        for p in params: p.div_(T)
    if torch.allclose(_outputs(model, xb), before/T, rtol=1e-4, atol=1e-5*float(before.abs().max()/T)): return True
    with torch.no_grad():
        for p, v in zip(params, old): p.copy_(v)
    return False


def _outputs(model, xb):
    modes = {m: m.training for m in model.modules()}
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(): return model(*(x.to(device) for x in xb))
    finally:
        for m, training in modes.items(): m.training = training
