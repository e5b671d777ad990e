"""What would go wrong is said before the first batch, all of it at once.

It happens by itself in the fits of a Learner that has techniques or keyed draws, as does the guard against a loss that is not a number, and
never in `validate` or `get_preds`; a plain Learner of fastai's is left alone. `FASTRECIPES_PREFLIGHT=0` switches both off."""
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from copy import copy
from functools import cached_property, partial, wraps
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from fastai.basics import BaseLoss, FocalLoss, L, Learner, TensorCategory, get_model, patch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixHandler
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import SaveModelCallback, TrackerCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import Datasets, TfmdDL
from fastai.distributed import ParallelTrainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from fastrecipes.data.keyed import Keyed
from fastrecipes.data.loaders import Indexed, batch_size_of, labels_of
from fastrecipes.errors import BadValue, few, nearest
from fastrecipes.losses.base import ClassLoss
from fastrecipes.losses.classification import CrossEntropy, classes_of
from fastrecipes.metrics.base import Judge
from fastrecipes.repairs import is_trial
from fastrecipes.technique import TECHNIQUES
from fastrecipes.training.finite import FiniteLoss
from fastrecipes.training.glance import Glance, glance
from fastrecipes.training.stopping import EarlyStop, monitored

__all__ = ['problems']

MB, FLOAT = 1e6, 4                              # bytes
ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss,
               F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
DOUBLES = {MixHandler: ('mixup', 'cutmix'), GradientAccumulation: ('grad_accum',), GradientClip: ('grad_clip',), MixedPrecision: (), ParallelTrainer: ()}


def problems(learn: Learner, n_epoch: int = 1, folder=None) -> list[str]:
    """Everything that would go wrong in a fit of `n_epoch` epochs, a sentence each: who, what is wrong, what came; the way out.

    `folder`: where checkpoints are to be written, if they are. The data, the network and every draw stay as they are: two training samples
    are read and shown to the network. What a check cannot judge, it passes."""
    return list(_found(Start(learn, n_epoch, folder), CHECKS))


@patch
def preflight(self: Learner, n_epoch: int = 1, folder=None) -> Learner:
    """Raise one `ValueError` for everything that would go wrong in a fit of `n_epoch` epochs (see `problems`), before its first batch.

    `folder`: where checkpoints are to be written, if they are. The fits of a Learner that has techniques do so by themselves."""
    self.__dict__.pop('_checked', None)
    _check(self, n_epoch, folder=folder)
    return self


class Start:
    "A fit that is about to begin, as the checks see it."
    def __init__(self, learn: Learner, n_epoch: int = 1, folder=None, cbs=()):
        self.learn, self.n_epoch, self.folder = learn, n_epoch, folder
        self.cbs = [cb for cb in (*learn.cbs, *L(cbs)) if not isinstance(cb, type)]
        self.techniques = learn.techniques
        self.classes = _over_classes(learn.loss_func)

    @cached_property
    def labels(self): return _labels(self.learn.dls.train, self.classes)

    @cached_property
    def vocab(self) -> list:
        "The names of the classes, as far as the data know them."
        vocab = getattr(self.learn.dls, 'vocab', None)
        vocab = [] if vocab is None else list(vocab)
        return list(vocab[-1]) if vocab and isinstance(vocab[-1], (list, tuple, L)) else vocab      # texts have a vocabulary of words too

    @cached_property
    def glance(self) -> Glance | None: return glance(self.learn, self.cbs)


def batches(start: Start) -> Iterator[str]:
    "Loaders without a batch."
    dls = start.learn.dls
    train, bs = dls.train, batch_size_of(dls.train)
    if _is_empty(train):
        n = getattr(train, 'n', None) if isinstance(train, TfmdDL) else len(train.dataset)
        world = getattr(train, 'world', 1)
        if n: yield f'bs: {bs}{f" on each of {world} processes" if world > 1 else ""} is more than the {n} training samples, which leaves no batch; use bs={max(1, n//world)} or less'
        else: yield 'dls: there are no training samples; look at the path, the labels and the split that they came from'
    if len(dls.loaders) < 2: yield 'valid: there is no loader to validate on, and each epoch ends with it; give DataLoaders(train, valid)'
    elif _is_empty(dls.valid) and (needy := [*start.learn.metrics.attrgot('name'), *(f'{who} ({cb.monitor})' for who, cb in _trackers(start) if cb.monitor != 'train_loss')]):
        yield f'valid: there are no validation samples, and {", ".join(needy)} cannot do without; hold some out (valid=.2), or take {"it" if len(needy) == 1 else "them"} off'


def classes(start: Start) -> Iterator[str]:
    """Classes that cannot be told apart or learnt, where each sample has one and its label costs no input.

    A class that only validation lacks is no mistake: it is learnt, and the notes of `image_folder` tell of it."""
    if start.labels is None or not len(start.labels): return
    present, vocab = {c for c in start.labels.tolist() if not start.classes or c != start.classes.ignore_index}, start.vocab
    def named(cs): return few([repr(vocab[c]) if c < len(vocab) else str(c) for c in sorted(cs)])
    try: later = _labels(start.learn.dls.valid, start.classes) if len(start.learn.dls.loaders) > 1 else None
    except KeyError as e:                       # fastai's Categorize on a label that it did not meet in training
        if 'was not included' not in str(e): raise
        yield f'labels: {str(e.args[0]).rstrip(".")}, but validation has it: it cannot be learnt; put samples of it into the training set, or leave it out'
        later = None
    later = [] if later is None else later.tolist()
    missing = {c for c in (*range(len(vocab)), *later) if c >= 0 and c not in present and not (c < len(vocab) and vocab[c] == '#na#')}
    if len(present) == 1:
        yield f'labels: all {len(start.labels)} training samples are of class {named(present)}: there is nothing to tell it from; add samples of another class'
    elif missing:
        seen, many = sum(c in missing for c in later), len(missing) > 1
        yield (f'labels: no training sample of class{"es"*many} {named(missing)}{f" ({seen} in validation)" if seen else ""}: {"they" if many else "it"} cannot be learnt; '
               f'add samples, or leave {"them" if many else "it"} out of the vocabulary')


def outputs(start: Start) -> Iterator[str]:
    "As many outputs as classes."
    if (c := _n_outputs(start)) is None or not start.vocab or c == len(start.vocab) or start.glance.yb[0].ndim > 1: return
    yield f'model: {c} outputs for {len(start.vocab)} classes ({few(start.vocab)}); its last layer must have {len(start.vocab)} (n_out={len(start.vocab)})'


def inputs(start: Start) -> Iterator[str]:
    "Inputs that the network cannot take. An error that is not about their shape or type is left to training, whose traceback tells more."
    if start.glance is None or (e := start.glance.error) is None or not re.search(r'channel|shape|size|dimension|match|type', str(e)): return
    x = start.glance.xb[0]
    first = next((m for m in get_model(start.learn.model).modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))), None)
    shape = tuple(x.shape) if isinstance(x, torch.Tensor) else ()
    if isinstance(first, nn.modules.conv._ConvNd) and len(shape) > 1 and first.in_channels != shape[1]:
        yield (f'model: it takes {first.in_channels} channel{"s"*(first.in_channels > 1)}, the images have {shape[1]} (inputs {shape}); build it for {shape[1]} (n_in={shape[1]}), '
               f'or load images with {first.in_channels}')
    elif isinstance(first, nn.Linear) and len(shape) == 2 and first.in_features != shape[1]:
        yield f'model: it takes {first.in_features} features, the samples have {shape[1]} (inputs {shape}); give its first layer {shape[1]}'
    else: yield f'model: it cannot take the inputs, {_shapes(start.glance.xb)} ({_reason(e)}); give it others, or build it for these'


def loss(start: Start) -> Iterator[str]:
    "A loss that does not go with the targets or the outputs; it is differentiated by the outputs only, so no weight has a part in it."
    g, f = start.glance, start.learn.loss_func
    if g is None or g.pred is None or not g.yb or not isinstance(y := g.yb[0], torch.Tensor): return
    who, raw = f'loss: {_name(f)}', getattr(f, 'func', f)
    got = f'outputs {_shapes(g.pred)}, targets {_shapes(g.yb)}'
    if (c := _n_outputs(start)) is not None and (wrong := _out_of_range(start, y, c)):
        if len(start.vocab) > c and y.ndim == 1: return             # `outputs` said so
        skipped = '' if y.ndim == 1 else ', or name those to be skipped (ignore_index)'
        yield f'{who} takes classes 0 to {c-1}, the outputs of the model, and the targets hold {few(wrong)}; give the last layer more outputs, or number the classes from 0{skipped}'
        return
    flat = isinstance(f, BaseLoss) and f.flatten
    if _is_elementwise(raw) and isinstance(g.pred, torch.Tensor) and g.pred.shape != y.shape and not (flat and g.pred.numel() == y.numel()):
        fix = 'flatten both (MSELossFlat()), or reshape one' if g.pred.numel() == y.numel() else f'the model must give as many numbers as a sample has targets, {math.prod(y.shape[1:])}'
        yield f'{who} compares number by number, and the shapes differ ({got}); {fix}'
        return
    try: values = g.differentiated(f)
    except Exception as e:
        if not _is_known(f) or 'same device' in str(e): return      # a loss of one's own may need what only training has
        if start.classes and y.is_floating_point(): fix = 'make the targets class numbers (y.long()), or take a loss for numbers: MSELossFlat(), BCEWithLogitsLossFlat()'
        elif _is_elementwise(raw) and not y.is_floating_point(): fix = "make the targets floating point (y.float()), or take fastai's loss, which does (BCEWithLogitsLossFlat())"
        else: fix = 'take the loss that belongs to these targets, or change the last layer'
        yield f'{who} cannot compare {got} ({_reason(e)}); {fix}'
        return
    if not isinstance(values, torch.Tensor): yield f"{who} returns {type(values).__name__}, not a tensor: there is nothing to differentiate; return a tensor of one number"
    elif values.numel() != 1: yield f"{who} returns {_shapes(values)}, not one number; use reduction='mean'"
    elif not values.requires_grad: yield f'{who} does not depend on the outputs in a way that can be differentiated ({got}); it may be a metric: argmax and comparisons have no gradient'


def metrics(start: Start) -> Iterator[str]:
    "Metrics of ours that cannot judge the outputs by the targets, or look for a class that there is not; the first validation would come to it."
    if start.glance is None or start.glance.pred is None: return
    for m in _judges(start.learn):
        try: copy(m).look(start.learn, start.glance.pred, start.glance.yb)
        except BadValue as e: yield str(e)


def monitors(start: Start) -> Iterator[str]:
    "Names to be watched that nobody reports."
    recorder = getattr(start.learn, 'recorder', None)
    names = monitored(start.learn)
    if getattr(recorder, 'train_metrics', False): names += [f'{side}_{n}' for side in ('train', 'valid') for n in start.learn.metrics.attrgot('name')]
    for who, cb in _trackers(start):
        if cb.monitor in names: continue
        close = nearest(cb.monitor, names)
        yield f'{who}: monitor must be one of {", ".join(names)}, got {cb.monitor!r}{close + " Or" if close else "; or"} add that metric to the Learner'


def clashes(start: Start) -> Iterator[str]:
    "Pairs of which one undoes or repeats the other."
    for pair in combinations(start.techniques, 2):
        for a, b in (pair, pair[::-1]):
            if a in TECHNIQUES and (why := TECHNIQUES[a].refuses.get(b)): yield f'{a!r} and {b!r} do not go together: {why}'
    for theirs, ours in DOUBLES.items():        # fastai's callback and its heirs; techniques that are none, and do the same
        both = [type(cb).__name__ for cb in start.cbs if isinstance(cb, theirs)]
        both += [n for n in ours if both and n in start.techniques]
        if len(both) > 1: yield f'cbs: {" and ".join(both)} would do the same thing twice; keep one'
    if mix := next((type(cb).__name__ for cb in start.cbs if isinstance(cb, MixHandler)), None):
        if over := [n for n in start.techniques if n in TECHNIQUES and TECHNIQUES[n].stage == 'loss']:
            yield f"cbs: fastai's {mix} swaps the loss that {' and '.join(over)} would compute anew from targets that are not mixed; use the technique instead: learn.{mix.lower()}()"
    for a, b in combinations([cb for cb in start.cbs if isinstance(cb, ParamScheduler)], 2):
        if same := sorted({*a.scheds} & {*b.scheds}): yield f'cbs: {type(a).__name__} and {type(b).__name__} both set {", ".join(same)}, and the last one wins; keep one'


def space(start: Start) -> Iterator[str]:
    "Room on the disk: two checkpoints at a time with Adam's two moments in 32 bits, and the models that fastai's callback saves."
    savers = [cb for cb in start.cbs if isinstance(cb, SaveModelCallback)]
    if not start.folder and not savers: return
    model = get_model(start.learn.model)
    weights = sum(p.numel() for p in model.parameters())*FLOAT
    others = sum(b.numel()*b.element_size() for b in model.buffers())
    needed = {Path(start.folder): 2*3*weights + others} if start.folder else {}
    for cb in savers:
        to, files = Path(start.learn.path)/start.learn.model_dir, math.ceil(start.n_epoch/int(cb.every_epoch)) if cb.every_epoch else 1
        needed[to] = needed.get(to, 0) + files*(weights*(3 if cb.with_opt else 1) + others)
    for to, size in needed.items():
        free = shutil.disk_usage(next(p for p in (to.absolute(), *to.absolute().parents) if p.exists())).free
        if free < size: yield f'checkpoints: {size/MB:,.0f} MB are needed in {to}, {free/MB:,.0f} MB are free; make room, or name another folder'


CHECKS = (batches, classes, outputs, inputs, loss, metrics, monitors, clashes, space)
ONCE = (classes, outputs, inputs, loss, metrics)         # for one state of the Learner; the others cost microseconds, and each fit brings callbacks of its own


def _found(start: Start, checks: Iterable) -> Iterator[str]:
    for check in checks:
        try: yield from check(start)
        except Exception: continue              # data more exotic than it knows: not for a check to stop a training that may well work


def _raise(found: list[str]):
    if len(found) == 1: raise BadValue(found[0])
    if found: raise BadValue(f'{len(found)} things are wrong before the first batch:' + ''.join(f'\n  - {p}' for p in found))


def _is_empty(dl) -> bool:
    try: return len(dl) == 0
    except TypeError: return False


def _judges(learn: Learner): return [m for m in learn.metrics if isinstance(m, Judge)]


def _trackers(start: Start):
    return [('early_stop' if isinstance(cb, EarlyStop) else type(cb).__name__, cb) for cb in start.cbs if isinstance(cb, (TrackerCallback, EarlyStop))]


def _over_classes(loss_func) -> CrossEntropy | ClassLoss | None:
    "How a loss counts classes: a cross entropy however it is spelt, focal, negative log-likelihood; None for a loss over numbers."
    if over := classes_of(loss_func): return over
    axis, f = (loss_func.axis, loss_func.func) if isinstance(loss_func, BaseLoss) else (1, loss_func)
    return CrossEntropy(ignore_index=getattr(f, 'ignore_index', -100), axis=axis) if isinstance(f, (FocalLoss, nn.NLLLoss)) else None


def _is_elementwise(f) -> bool:
    if isinstance(f, partial): f = f.func
    return any(f is o or isinstance(o, type) and isinstance(f, o) for o in ELEMENTWISE)


def _is_known(f) -> bool:
    f = getattr(f, 'func', f)
    return (f if hasattr(f, '__name__') else type(f)).__module__.split('.')[0] in ('torch', 'fastai')


def _labels(dl, over_classes) -> np.ndarray | None:
    "The class of each sample of a loader; None where samples have no single one, or telling would mean to read the inputs."
    data = getattr(dl, 'dataset', None)
    while isinstance(data, (Indexed, Subset)): data = data.dataset
    if isinstance(data, Datasets): values = data.tls[-1] if len(data.tls)-data.n_inp == 1 else None
    elif isinstance(data, Dataset): values = getattr(data, 'targets', None) if hasattr(data, 'targets') else (getattr(data, 'tensors', None) or [None])[-1]
    else: return None
    if values is None or not len(values): return None
    first = values[0]
    single = isinstance(first, (int, np.integer)) or isinstance(first, torch.Tensor) and first.ndim == 0 and not first.is_floating_point()
    return labels_of(dl) if single and (over_classes or isinstance(first, TensorCategory)) else None


def _n_outputs(start: Start) -> int | None:
    "How many classes the network answers for, where the loss and the targets are about classes."
    g = start.glance
    if not start.classes or g is None or not isinstance(g.pred, torch.Tensor) or len(g.yb) != 1 or not isinstance(g.yb[0], torch.Tensor) or g.yb[0].is_floating_point(): return None
    return g.pred.shape[start.classes.axis]


def _out_of_range(start: Start, y, c: int) -> list[int]:
    "The targets of all training samples, where they are known, else of the two at hand, that are no class of `c`."
    seen = set(y.unique().tolist()) | ({*start.labels.tolist()} if start.labels is not None else set())
    return sorted(v for v in seen if v != start.classes.ignore_index and not 0 <= v < c)


def _name(f) -> str:
    if isinstance(f, partial): f = f.func
    return type(f).__name__ if not hasattr(f, '__name__') or isinstance(f, (nn.Module, BaseLoss)) else f.__name__


def _shapes(ts) -> str:
    ts = ts if isinstance(ts, (list, tuple)) else (ts,)
    return ', '.join(f'{tuple(t.shape)} {str(t.dtype).removeprefix("torch.")}' if isinstance(t, torch.Tensor) else type(t).__name__ for t in ts)


def _reason(e: Exception) -> str: return f'{type(e).__name__}: {(str(e).strip() or "no message").splitlines()[0].rstrip(".")}'


class _Checked:
    "What of a Learner was found in order, and need not be looked at again; it holds on to the data, so neither copies nor files take it along."
    def __init__(self, state: tuple = ()): self.state = state
    def __reduce__(self): return _Checked, ()

    def is_of(self, state: tuple) -> bool: return len(self.state) == len(state) and all(a is b for a, b in zip(self.state, state))


def _check(learn: Learner, n_epoch: int = 1, cbs=(), folder=None):
    "Raise for what is wrong with this fit; data, network and loss are looked at once."
    state = (*learn.dls.loaders, learn.model, learn.loss_func, *learn.techniques.values(), *_judges(learn))
    known = learn.__dict__.get('_checked', _Checked()).is_of(state)
    _raise(list(_found(Start(learn, n_epoch, folder, cbs), [c for c in CHECKS if not (known and c in ONCE)])))
    learn._checked = _Checked(state)


def check_ours(learn: Learner):
    "Raise for what is wrong with a fit of `learn`, ahead of it, where fits of it are checked."
    if _is_ours(learn): _check(learn)


def _is_ours(learn: Learner, cbs=()) -> bool:
    ours = learn.techniques or any(isinstance(cb, Keyed) for cb in (*learn.cbs, *L(cbs)))
    return bool(ours) and _is_on()


def _is_on() -> bool: return os.environ.get('FASTRECIPES_PREFLIGHT', '1') != '0'


def _wrap_the_fits():
    "Let fits begin with the checks and run under the guard; `lr_find` is meant to drive the loss out of bounds and goes without it."
    fit = Learner.fit

    @wraps(fit)
    def checked_fit(self, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        trains, ours = n_epoch > start_epoch, _is_ours(self, cbs)
        if trains and not ours and _judges(self) and _is_on(): _raise(list(_found(Start(self, n_epoch, None, cbs), [metrics])))
        if not trains or not ours: return fit(self, n_epoch, lr, wd, cbs, reset_opt, start_epoch)
        _check(self, n_epoch, cbs)
        guard = [] if is_trial(self, cbs) else [FiniteLoss()]
        try: return fit(self, n_epoch, lr, wd, [*L(cbs), *guard], reset_opt, start_epoch)
        except BadValue as e:
            for g in guard:
                if g.said: e.args = (g.said,)   # fastai puts the event before it
            raise

    Learner.fit = checked_fit


_wrap_the_fits()
