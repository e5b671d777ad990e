"Techniques that change what is asked of the network: the training loss, never the one that is reported on validation data."
import math
from typing import Literal

import numpy as np
import torch
from fastai.basics import Learner
from fastai.data.transforms import get_c

from fastrecipes.data.loaders import labels_of
from fastrecipes.errors import BadValue, nearest
from fastrecipes.objective import check_together, cross_entropy_of, kind_of, objective
from fastrecipes.technique import say, technique

__all__ = ['effective_number_weights']

WEIGHTS, BETA = ('inverse', 'effective'), .999


def effective_number_weights(counts, beta: float = BETA) -> np.ndarray:
    """(1−β)/(1−βⁿ) for classes of n = `counts` samples `(c,)`, scaled to a mean of 1; arXiv:1901.05555. A class without samples weighs 0.

    Of n samples (1−βⁿ)/(1−β) count as new, at most 1/(1−β), for they resemble one another the more there are. `beta` in [0, 1): at 0
    all classes weigh the same, towards 1 as the inverse of n. Raises `ValueError` outside the range and for counts below 0 or all 0."""
    n = np.asarray(counts, dtype=float)
    if not 0 <= beta < 1: raise BadValue(f'beta: must be in [0, 1), got {beta}')
    if n.ndim != 1 or not (n >= 0).all() or not n.any(): raise BadValue(f'counts: one number ≥ 0 for each class, not all 0, got {n.tolist()}')
    w = np.zeros(len(n))
    w[n > 0] = (1-beta)/-np.expm1(n[n > 0]*math.log(beta)) if beta else 1.              # 1−βⁿ itself would be rounding near β = 1
    return w*(np.count_nonzero(n)/w.sum())


@technique('loss', section=('Loss', 'Regularization'), source='arXiv:1512.00567', touches=('targets',),
           formula=r"y' = (1-\varepsilon)\,y + \varepsilon/c")
def label_smoothing(self: Learner, eps: float = .1) -> Learner:
    """Ask for 1−eps+eps/c on the right class and eps/c on each of the others, instead of 1 and 0.

    `eps` in [0, 1). It keeps the network from over-confidence and from learning wrong labels by heart; with rare classes it can
    cost balanced accuracy. Validation loss stays that of the plain targets. The value is that of
    `torch.nn.CrossEntropyLoss(label_smoothing=eps)`, also with class weights and mixed targets.
    Raises `ValueError` outside the range and for a loss that is not a cross entropy."""
    if not 0 <= eps < 1: raise BadValue(f'label_smoothing: eps must be in [0, 1), got {eps}')
    if cross_entropy_of(self.loss_func) is None:
        raise BadValue(f'label_smoothing: the loss must be a cross entropy over classes, got {self.loss_func}; other targets can be smoothed in the data')
    check_together('label_smoothing', kind_of(self))
    objective(self).smoothing = eps
    c = get_c(self.dls)
    say(self, 'label_smoothing', f'targets {1-eps+eps/c:.3f} and {eps/c:.4f} instead of 1 and 0' if c else f'targets smoothed by {eps}')
    return self


@technique('loss', section=('Balance', 'Loss'), source='doi:10.1093/oxfordjournals.pan.a004868', touches=('targets',),
           refuses={'balance': 'each makes up for rare classes, and together they would do it twice; keep one'},
           formula=r'L = \frac{\sum_i w_{y_i}\,\ell_i}{\sum_i w_{y_i}}, \qquad w_k = \frac{n}{c\,n_k} \ \text{ or } \ \frac{1-\beta}{1-\beta^{n_k}}')
def class_weights(self: Learner, weights: list[float] | None | Literal['inverse', 'effective'] = 'inverse', beta: float = BETA) -> Learner:
    """Let each sample count in the training loss by the weight of its class.

    `weights`: 'inverse', n/(c·n_class) of the training set, so that every class has the same say; 'effective', (1−β)/(1−β^n_class), which
    trusts a class of few samples less (arXiv:1901.05555); or a number ≥ 0 for each class, in the order of the vocabulary. `beta` in
    [0, 1) goes with 'effective': at 0 all weigh the same, towards 1 as 'inverse'; the paper tried .9 to .9999, the larger for the larger
    data. The loss is Σwl/Σw, so that only the ratios of the weights matter, also with mixed or smoothed targets. Unlike `balance` it
    draws every sample once an epoch. Validation loss stays unweighted. Raises `ValueError` for a wrong number of weights, negative
    ones or all 0, for a loss that is not a cross entropy, and where samples have no single class and no numbers are given."""
    if (ce := cross_entropy_of(self.loss_func)) is None:
        raise BadValue(f'class_weights: the loss must be a cross entropy over classes, got {self.loss_func}; for several labels a sample, BCEWithLogitsLossFlat(pos_weight=…)')
    kind = 'inverse' if weights is None else weights if isinstance(weights, str) else 'given'
    if kind not in (*WEIGHTS, 'given'): raise BadValue(f'class_weights: weights must be numbers, one a class, or one of {", ".join(WEIGHTS)}, got {kind!r}{nearest(kind, WEIGHTS)}')
    if kind != 'effective' and beta != BETA: raise BadValue(f"class_weights: beta goes with weights='effective', got {weights=}, {beta=}")
    if not 0 <= beta < 1: raise BadValue(f"class_weights: beta must be in [0, 1), got {beta}; what it comes to near 1 is weights='inverse'")
    check_together('class_weights', kind_of(self))
    if kind != 'given':
        n = _counts(self, 'class_weights', ce, 'weights')
        weights = (effective_number_weights(n, beta) if kind == 'effective' else np.divide(n.sum()/np.count_nonzero(n), n, where=n > 0, out=np.zeros(len(n)))).tolist()
    if min(weights) < 0 or not sum(weights) > 0: raise BadValue(f'class_weights: weights must be ≥ 0 and not all 0, got {list(weights)}')
    if (c := get_c(self.dls)) and len(weights) != c: raise BadValue(f'class_weights: one weight for each of the {c} classes, got {len(weights)}')
    objective(self).class_weight = torch.tensor(weights, dtype=torch.float32)
    source = dict(given='', inverse=', from the shares of the classes', effective=f', from the effective numbers of samples at β = {beta:g}')[kind]
    if max(weights) == min(weights): say(self, 'class_weights', 'the classes weigh the same: nothing is changed', aloud=True)
    else: say(self, 'class_weights', f'weights {min(weights):.3g} to {max(weights):.3g}{source}')
    return self


@technique('loss', section=('Balance', 'Loss'), source='arXiv:2007.07314', touches=('targets',),
           refuses=dict.fromkeys(('balance', 'class_weights'), 'each makes up for rare classes, and together they would do it twice; keep one'),
           formula=r'L = \mathrm{CE}(z + \tau \log \pi,\ y), \qquad \pi_k = n_k/n')
def logit_adjustment(self: Learner, tau: float = 1., shares: list[float] | None = None) -> Learner:
    """Train on logits moved by tau·log(share of the class), so that the logits themselves come out right for classes equally often.

    The network is spared from learning that a class is rare: what it answers, in use as well, has no bias against rare classes. At `tau`
    1 it aims at the best balanced accuracy there is, also where a network fits all its samples and class weights hardly matter.
    `tau` > 0: larger favours rare classes more. `shares`: a number > 0 for each class, in the order of the vocabulary; default: those of
    the training set (a sampler of your own draws others: give them). It costs accuracy on the common classes and no time, and the
    probabilities are those of balanced data: too high for rare classes where the data are not. Validation loss stays that of the plain
    logits, and so does what `distill` asks. Raises `ValueError` for tau or shares outside their ranges, for a loss that is
    not a cross entropy, where a class has no samples, and where samples have no single class and no shares are given."""
    if not 0 < tau < math.inf: raise BadValue(f'logit_adjustment: tau must be > 0 and finite, got {tau}')
    if (ce := cross_entropy_of(self.loss_func)) is None:
        raise BadValue(f'logit_adjustment: the loss must be a cross entropy over classes, got {self.loss_func}; for several labels a sample, BCEWithLogitsLossFlat(pos_weight=…)')
    check_together('logit_adjustment', kind_of(self))
    n = np.asarray(_counts(self, 'logit_adjustment', ce, 'shares') if shares is None else shares, dtype=float)
    if shares is None and not n.all():
        raise BadValue(f'logit_adjustment: {_name(self, int(n.argmin()))} has no training samples, and its logit would be moved without limit; add some, or give shares, one a class')
    if not len(n) or not ((n > 0) & (n < math.inf)).all(): raise BadValue(f'logit_adjustment: shares must be > 0 and finite, got {list(shares)}')
    if (c := get_c(self.dls)) and len(n) != c: raise BadValue(f'logit_adjustment: one share for each of the {c} classes, got {len(n)}')
    p, equal = n/n.sum(), n.min() == n.max()
    objective(self).adjustment = None if equal else torch.tensor(tau*np.log(p), dtype=torch.float32)
    if equal: say(self, 'logit_adjustment', 'the classes come up equally often: every logit would move as far, nothing is changed', aloud=True)
    else: say(self, 'logit_adjustment', f'training logits moved by {tau*math.log(p.min()):.3g} to {tau*math.log(p.max()):.3g}, for shares of {p.min():.2%} to {p.max():.2%}')
    return self


def _counts(learn: Learner, who: str, ce, instead: str) -> np.ndarray:
    "How many training samples each class has `(c,)`, those that the loss ignores left out; raises, in the name of `who`, where they have no single class."
    try: labels = labels_of(learn.dls.train, who)
    except BadValue as e: raise BadValue(f'{e}; give {instead}, one a class') from None
    labels = labels[labels != ce.ignore_index]
    if not len(labels) or labels.min() < 0: raise BadValue(f'{who}: classes are numbers from 0 on, got {labels.min() if len(labels) else "none"}; give {instead}, one a class')
    return np.bincount(labels, minlength=get_c(learn.dls) or 0)


def _name(learn: Learner, i: int) -> str:
    "Class `i` in words."
    vocab = getattr(learn.dls, 'vocab', None) or ()
    return f'class {vocab[i]!r}' if i < len(vocab) else f'class {i}'
