"Who answers in an ensemble: a fastai Learner, a scikit-learn estimator, a function; asked for probabilities on the same samples, each as it was trained."
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fastai.basics import Learner, Pipeline, Transform, nn
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Normalize
from sklearn.base import clone, is_classifier
from sklearn.utils.validation import has_fit_parameter
from torch.utils.data import Sampler

from fastrecipes.data.keyed import resampled
from fastrecipes.data.loaders import in_order, labels_of, shapes, unvaried
from fastrecipes.data.statistics import normalizes
from fastrecipes.errors import BadValue
from fastrecipes.files import writes
from fastrecipes.losses.classification import classes_of
from fastrecipes.production.export import activation_of
from fastrecipes.production.parity import as_it_was, full_precision
from fastrecipes.randomness import default_seed, stream

__all__ = ['Estimator', 'Mirror']


TO_MAKE = 'make: a function (dls, seed) that trains a Learner, or a scikit-learn classifier, got {}; what is trained already goes into Ensemble(members)'


def flat(x: torch.Tensor) -> np.ndarray:
    "Inputs `(n, …)` as rows `(n, d)` of numbers, pixels in [0, 1]: what an estimator sees unless told otherwise."
    return x.reshape(len(x), -1).numpy()


class Network:
    "A Learner as a member."
    def __init__(self, learn: Learner): self.learn = learn

    def answers(self, dl: TfmdDL, vocab=None, *, flip: bool = False, seen=None, act=None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Probabilities `(n, c)` for the samples of `dl`, in their order, seen through its own validation transforms, in 32 bits; and their classes, if `dl` has them.

        `flip`: for their mirror images. `act`: what outputs go through instead."""
        learn = self.learn
        own = seen_by(dl, learn.dls.valid, flip)
        aside = [cb for cb in learn.cbs if isinstance(cb, (MixedPrecision, ProgressCallback))]
        with as_it_was(learn), learn.removed_cbs(aside), full_precision(), unvaried(dl.dataset):
            p, y = learn.get_preds(dl=own, act=act or activation_of(learn.loss_func), reorder=False)    # else fastai renews it, and varies it
        return torch.Tensor(p.float()), None if y is None else y


class Estimator:
    """A fitted scikit-learn classifier with `predict_proba`, or a function of inputs that gives probabilities `(n, c)`, as a member.

    `features(x)`: what it is given for a batch of inputs, for images pixels in [0, 1] `(n, 3, h, w)` that nothing normalises; default: these in rows `(n, 3·h·w)`, and to
    a function as they are. Classes are told apart by their number, or by name where the estimator was fitted to names; one that it never saw has probability 0."""
    def __init__(self, estimator, features: Callable | None = None):
        by_function = not hasattr(estimator, 'fit')
        if not hasattr(estimator, 'predict_proba') and not (by_function and callable(estimator)):
            raise BadValue(f'members: {type(estimator).__name__} gives no probabilities; take one with predict_proba, or wrap it in CalibratedClassifierCV')
        self.estimator, self.by_function = estimator, by_function and not hasattr(estimator, 'predict_proba')
        self.features = features or ((lambda x: x) if self.by_function else flat)

    def answers(self, dl: TfmdDL, vocab, *, flip: bool = False, seen=None) -> tuple[torch.Tensor, torch.Tensor | None]:
        "Probabilities `(n, c)` for the samples of `dl`, in their order, and their classes, if `dl` has them; `flip`: for their mirror images. `seen`: these, at hand."
        x, y = seen or pixels_in(dl, flip=flip)
        p = torch.as_tensor(np.asarray((self.estimator if self.by_function else self.estimator.predict_proba)(self.features(x))), dtype=torch.float32)
        if not self.by_function: p = self._placed(p, list(vocab))
        if p.shape != (len(x), len(vocab)): raise BadValue(f'members: {self} gives {tuple(p.shape)} for {len(x)} samples of {len(vocab)} classes')
        return p, y

    def _placed(self, p, vocab: list):
        "The columns of `predict_proba` where the vocabulary has their classes."
        names = {str(v): i for i, v in enumerate(vocab)}
        at = [int(k) if isinstance(k, (int, np.integer)) else names.get(str(k), -1) for k in self.estimator.classes_]
        if bad := [k for k, i in zip(self.estimator.classes_, at) if not 0 <= i < len(vocab)]:
            raise BadValue(f'members: {self} was fitted to a class {bad[0]!r}, and the classes are {", ".join(map(str, vocab))}')
        out = torch.zeros(len(p), len(vocab))
        out[:, at] = p
        return out

    def __str__(self): return getattr(self.estimator, '__name__', type(self.estimator).__name__)


class Mirror(Transform):
    "Mirror each image of a batch left to right: before it is normalised, for that may differ from pixel to pixel."
    order = Normalize.order-.5

    def __call__(self, b, split_idx=None, **kwargs):
        x, *rest = b
        if x.ndim != 4: raise BadValue(f'flip: needs images (n, c, h, w), got {shapes([x])}')
        return x.flip(-1), *rest


def seen_by(dl: TfmdDL, like: TfmdDL, flip: bool = False) -> TfmdDL:
    "The samples of `dl`, in order, through the transforms of `like`; `flip`: mirrored."
    own = in_order(dl, like)
    if flip: own.after_batch = Pipeline([*own.after_batch.fs, Mirror()], split_idx=1)
    return own


def pixels_in(dl: TfmdDL, like: TfmdDL | None = None, flip: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    "The inputs of `dl`, in order, as validation has them (`like`: by the transforms of that loader) but not normalised; and their classes, None where it has none."
    own = seen_by(dl, like or dl, flip)
    own.after_batch = Pipeline([t for t in own.after_batch.fs if not normalizes(t)], split_idx=1)
    with unvaried(dl.dataset): batches = [[t.detach().cpu().as_subclass(torch.Tensor) for t in b[:2]] for b in own]
    if not batches: raise BadValue('members: there is no sample to answer for')
    x = torch.cat([b[0] for b in batches])
    return x, torch.cat([b[1] for b in batches]) if len(batches[0]) > 1 else None


def member_of(o) -> 'Network | Estimator':
    "A Learner, an estimator, a function or a member, as a member. Raises `ValueError` for what does not tell classes apart."
    if isinstance(o, (Network, Estimator)): return o
    if isinstance(o, nn.Module): raise BadValue(f'members: a network needs the data that it was trained for; give the Learner, not its model ({type(o).__name__})')
    if isinstance(o, (str, Path)): raise BadValue(f'members: {str(o)!r} is a path; give what load_run makes of a run folder, or load_learner of an export')
    if not isinstance(o, Learner): return Estimator(o)
    if classes_of(o.loss_func) is None: raise BadValue(f'members: a Learner must tell classes apart, got one with the loss {o.loss_func}')
    return Network(o)


class Rows(Sampler):
    "Draw the samples number `rows` `(k,)`, one as often as it stands there, in a new order each epoch."
    def __init__(self, rows, seed: int | None = None):
        self.rows, self.seed, self.epoch = np.asarray(rows), default_seed() if seed is None else seed, 0

    def __len__(self): return len(self.rows)
    def draw(self, rng: np.random.Generator) -> np.ndarray:
        "The sample indices of one epoch, in order."
        return rng.permutation(self.rows)

    def __iter__(self):
        yield from self.draw(stream(self.seed, 'rows', self.epoch)).tolist()
        self.epoch += 1


class Weighted(Rows):
    "Draw as many samples as there are, with replacement, sample i with probability p[i]/Σp, anew each epoch."
    def __init__(self, p, seed: int | None = None):
        super().__init__(np.arange(len(p)), seed)
        self.p = np.asarray(p, float)/np.sum(p)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        "The sample indices of one epoch, in order."
        return rng.choice(len(self.p), len(self.p), p=self.p)


def made(make, dls: DataLoaders, seed: int, rows=None, weights=None) -> 'Network | Estimator':
    """A new member trained on the training samples number `rows`, or on all by `weights` `(n,)`.

    `make`: a function `(dls, seed)` that trains a Learner, of which the loader draws just so; or a scikit-learn classifier, of which a copy is fitted to
    the same pixels, with `sample_weight` where it takes that, else to a draw by the weights."""
    if hasattr(make, 'fit') and not isinstance(make, Learner):
        x, y = pixels_in(dls.train, dls.valid)
        new = clone(make)
        if 'random_state' in new.get_params(): new.set_params(random_state=seed % 2**32)
        if weights is not None and has_fit_parameter(new, 'sample_weight'): return Estimator(new.fit(flat(x), y.numpy(), sample_weight=np.asarray(weights)*len(y)))
        if weights is not None: rows = Weighted(weights, seed).draw(stream(seed, 'weights'))
        return Estimator(new.fit(flat(x)[rows], y.numpy()[rows]))
    if not callable(make) or isinstance(make, (Learner, Network, Estimator)):
        raise BadValue(TO_MAKE.format(type(make).__name__))
    sampler = Weighted(weights, seed) if weights is not None else Rows(rows, seed)
    if len(sampler) < dls.train.bs: raise BadValue(f'bs: {dls.train.bs} is more than the {len(sampler)} samples that a member is trained on; use {max(1, len(sampler)//2)} or less')
    member = member_of(make(resampled(dls, sampler, seed), seed))
    if isinstance(member, Network) and getattr(member.learn.dls.train, 'sampler', None) is not sampler:
        raise BadValue('make: the Learner was not trained on the samples that its loaders draw; leave out what draws by itself, such as balance, and train on the dls that are given')
    return member


def check_makes(makes, dls) -> np.ndarray:
    "The classes of the training samples; raises for what cannot train members, before anything is trained."
    for make in makes:
        if hasattr(make, 'fit') and not isinstance(make, Learner):
            if not is_classifier(make) or not hasattr(make, 'predict_proba'): raise BadValue(f'make: {type(make).__name__} is no classifier that gives probabilities')
        elif not callable(make) or isinstance(make, (Learner, Network, Estimator)): raise BadValue(TO_MAKE.format(type(make).__name__))
    return labels_of(dls.train, 'ensemble')


def told(what: str, make: Callable):
    "`make()`, and a line that says what it is at."
    if writes(): print(f'{what} …', flush=True)
    return make()
