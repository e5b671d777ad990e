"How sure a measured accuracy is: 95 % intervals for one model, and for the difference of two models on the same images."
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, t as student

from fastrecipes.errors import BadValue, nearest

__all__ = ['Estimate', 'Difference', 'Loss', 'accuracy', 'balanced_accuracy', 'difference', 'over_folds', 'LEVEL']

LEVEL = .95
MINUS = '−'


@dataclass(frozen=True)
class Estimate:
    "A share (0–1) measured on `n` images, with the ends of its 95 % interval; higher is better."
    value: float
    lo: float
    hi: float
    n: int | None = None

    def __str__(self): return f'{self.value:.1%} ({100*self.lo:.1f}–{100*self.hi:.1f})'.replace('%', ' %', 1)


@dataclass(frozen=True)
class Difference(Estimate):
    "How much better the first of two models is (−1 to 1), with the ends of its 95 % interval."
    @property
    def resolved(self) -> bool: return self.lo > 0 or self.hi < 0

    def __str__(self): return f'{signed(self.value)} points ({signed(self.lo)} to {signed(self.hi)})'


@dataclass(frozen=True)
class Loss(Estimate):
    "A loss in nats, 0 or more, with the ends of its 95 % interval; lower is better."
    def __str__(self): return f'{self.value:.3f} ({self.lo:.3f}–{self.hi:.3f})'


def over_folds(scores, pooled: Estimate | None = None, kind: type[Estimate] = Estimate) -> Estimate:
    """The mean of a score over the k folds of a cross-validation `(k,)`, k ≥ 2. Interval: the corrected resampled t, doi:10.1023/A:1024068626366.

    Folds are not independent: each two share most of their training images, and k scores vary less than k data sets would make them. So the variance
    of the mean is taken as (1/k + 1/(k−1))·s², not s²/k: 1/(k−1) is test images to training images. `pooled`: the estimate from all
    images as one test set; an interval inside its is widened to it, so that folds that agree by luck do not look exact."""
    s = np.asarray(scores, float)
    k = len(s)
    if k < 2: raise BadValue(f'scores: of at least 2 folds, got {k}')
    half = student.ppf((1+LEVEL)/2, k-1)*np.sqrt((1/k + 1/(k-1))*s.var(ddof=1))
    lo, hi = s.mean()-half, s.mean()+half
    if pooled: lo, hi = min(lo, pooled.lo), max(hi, pooled.hi)
    return kind(float(s.mean()), max(0., float(lo)), float(hi) if kind is Loss else min(1., float(hi)), pooled.n if pooled else None)


def accuracy(targets, preds) -> Estimate:
    """The share of right predictions; class numbers or names `(n,)`. Interval: Wilson's score, doi:10.1080/01621459.1927.10502953.

    All right or all wrong is no zero width: 20 of 20 right is 100 % (83.9–100.0). Raises `ValueError` for no images or unequal lengths."""
    t, p = _checked(targets, preds)
    k, n = int((t == p).sum()), len(t)
    ci = binomtest(k, n).proportion_ci(LEVEL, method='wilson')
    return Estimate(k/n, float(ci.low), float(ci.high), n)


def balanced_accuracy(targets, preds, seed: int = 0, n: int = 2000) -> Estimate:
    """The mean over classes of the share of a class's images that are predicted right; class numbers or names `(n,)`.

    A class without images does not count, nor does it for scikit-learn; a prediction of it is just wrong. Interval: percentiles of `n`
    bootstrap draws stratified by class and smoothed: a class with k of m right varies as Beta(k+½, m−k+½) about k/m, so that a class
    that is all right (10 of 10) still counts as uncertain, where resampling would call it exact. Raises as `accuracy` does."""
    t, p = _checked(targets, preds)
    classes, which = np.unique(t, return_inverse=True)
    m = np.bincount(which)
    k = np.bincount(which, weights=t == p)
    draws = np.random.default_rng(seed).beta(k+.5, m-k+.5, size=(n, len(classes)))
    draws += k/m - (k+.5)/(m+1)                  # smoothing must widen, not move: many small classes would drag the mean to ½
    lo, hi = _percentiles(draws.mean(1))
    return Estimate(float((k/m).mean()), max(0., lo), min(1., hi), len(t))


def difference(targets, preds_a, preds_b, metric: str = 'accuracy', seed: int = 0, n: int = 2000) -> Difference:
    """`metric` of `preds_a` minus that of `preds_b`, 'accuracy' or 'balanced_accuracy', on the same images: above 0, a is better.

    Interval: percentiles of `n` paired bootstrap draws (within each class for balanced accuracy), smoothed: the shares of images that
    only a has right, that only b has, and the rest vary as Dirichlet(counts + ½) about what was measured. So two models that agree on every
    image differ by 0 with an interval that shrinks as images are added, never by exactly 0. Raises as `accuracy` does."""
    if metric not in ('accuracy', 'balanced_accuracy'):
        raise BadValue(f'metric: accuracy or balanced_accuracy, got {metric!r}{nearest(metric, ("accuracy", "balanced_accuracy"))}')
    t, a = _checked(targets, preds_a)
    _, b = _checked(targets, preds_b)
    which = np.unique(t, return_inverse=True)[1] if metric == 'balanced_accuracy' else np.zeros(len(t), int)
    m = np.bincount(which)
    only_a, only_b = (np.bincount(which, weights=x) for x in ((a == t) & (b != t), (b == t) & (a != t)))
    measured = (only_a-only_b)/m
    g = np.random.default_rng(seed).gamma(np.stack([only_a, only_b, m-only_a-only_b]) + .5, size=(n, 3, len(m)))     # Dirichlet, normalised
    draws = (g[:, 0]-g[:, 1])/g.sum(1) + measured - (only_a-only_b)/(m+1.5)
    lo, hi = _percentiles(draws.mean(1))
    return Difference(float(measured.mean()), max(-1., lo), min(1., hi), len(t))


def _percentiles(draws): return (float(q) for q in np.quantile(draws, [(1-LEVEL)/2, (1+LEVEL)/2]))


def signed(x: float) -> str:
    "A share in points: `+1.2`."
    return f'{100*x:+.1f}'.replace('-', MINUS)


def _checked(targets, preds):
    "Both as arrays of one length above 0."
    t, p = np.asarray(targets), np.asarray(preds)
    if t.ndim != 1 or t.shape != p.shape: raise BadValue(f'preds: one class for each target, got {p.shape} for {t.shape}')
    if not len(t): raise BadValue('targets: at least one image, got none')
    return t, p
