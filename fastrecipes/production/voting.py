"How the answers of several classifiers become one: the formulas, on probabilities `(n, m, c)` of n samples, m members and c classes."
import math
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from fastrecipes.errors import BadValue

__all__ = ['Mean', 'Stack', 'Vote', 'meta_learner', 'mixture_weights', 'vote_weights']

LEAST = 1e-7                            # a probability below it counts as this much: one answer that is sure and wrong must not decide alone
NEARLY = 1e-6                           # of all votes: sums of weights that are closer than that are a tie


class Mean(nn.Module):
    "Σ wₘ·pₘ: the mean of the members' probabilities by `weights` `(m,)`, ≥ 0, of sum 1; None: each as much."
    def __init__(self, weights=None):
        super().__init__()
        self.register_buffer('weights', None if weights is None else torch.as_tensor(normed(weights), dtype=torch.float64))

    def forward(self, p: torch.Tensor) -> torch.Tensor: return p.mean(1) if self.weights is None else (p*self.weights.to(p.dtype)[:, None]).sum(1)


class Vote(nn.Module):
    """The share of the votes that each class gets: a member votes for its most probable class, with its weight.

    Where classes tie for the most votes, these are divided among them by the mean probability that the members give them; all else are shares of votes
    alone, 0 for a class that no member names. Of equal probabilities of one member the first class has its vote."""
    def __init__(self, weights=None):
        super().__init__()
        self.register_buffer('weights', None if weights is None else torch.as_tensor(normed(weights), dtype=torch.float64))

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        votes = self.votes(p)
        tied = self.tied(votes).to(p.dtype)
        by = p.mean(1)*tied
        shared = (votes*tied).sum(1, keepdim=True)*by/by.sum(1, keepdim=True)
        return torch.where(tied.sum(1, keepdim=True) > 1, votes*(1-tied) + shared, votes)

    def votes(self, p: torch.Tensor) -> torch.Tensor:
        "The shares of the votes `(n, c)`, ties as they are."
        one = (p.argmax(2)[..., None] == torch.arange(p.shape[2], device=p.device)).to(p.dtype)
        return one.mean(1) if self.weights is None else (one*self.weights.to(p.dtype)[:, None]).sum(1)

    def tied(self, votes: torch.Tensor) -> torch.Tensor:
        "Which classes `(n, c)` have the most votes."
        return votes > votes.amax(1, keepdim=True)-NEARLY


class Stack(nn.Module):
    """A logistic regression on the members' probabilities side by side: softmax(W·x + b), x `(n, m·c)`; of two classes the second one's alone, `(n, m)`.

    `coef` and `intercept` as scikit-learn has them."""
    def __init__(self, coef, intercept):
        super().__init__()
        coef, intercept = np.asarray(coef, float), np.asarray(intercept, float)
        if len(coef) == 1: coef, intercept = np.concatenate([0*coef, coef]), np.concatenate([0*intercept, intercept])
        self.register_buffer('coef', torch.from_numpy(coef))
        self.register_buffer('intercept', torch.from_numpy(intercept))

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        return (side_by_side(p) @ self.coef.to(p.dtype).T + self.intercept.to(p.dtype)).softmax(1)


def side_by_side(p):
    "What a `Stack` sees of probabilities `(n, m, c)`."
    return p[:, :, 1] if p.shape[2] == 2 else p.reshape(p.shape[0], p.shape[1]*p.shape[2])


def meta_learner(p, y, c: float = 1.) -> Stack:
    "The `Stack` fitted to probabilities `(n, m, c)` and classes `(n,)`, all c of which occur: scikit-learn's `LogisticRegression`, of inverse penalty `c`."
    p, y = _checked(p, y)
    if not c > 0: raise BadValue(f'c: above 0, got {c}')
    if len(there := np.unique(y)) != p.shape[2]: raise BadValue(f'fit: a meta-learner needs samples of all {p.shape[2]} classes, got {len(there)}')
    fitted = LogisticRegression(C=c, max_iter=5000, tol=1e-6).fit(side_by_side(p), y)
    return Stack(fitted.coef_, fitted.intercept_)


def mixture_weights(p, y, tol: float = 1e-7, most: int = 100_000) -> np.ndarray:
    """The weights `(m,)`, ≥ 0, of sum 1, whose mean of the members' probabilities `(n, m, c)` has the least log loss for classes `(n,)`.

    A convex problem, by expectation maximisation: each weight is multiplied by how much more than the mixture its member gave the true classes, on average. It ends
    where no other weights can be better by more than `tol` nats, which that factor bounds."""
    p, y = _checked(p, y)
    q = p[np.arange(len(y)), :, y].clip(LEAST)              # what each member gave the truth (n, m)
    w = np.full(q.shape[1], 1/q.shape[1])
    for _ in range(most):
        gain = (q/(q @ w)[:, None]).mean(0)
        w = w*gain
        if math.log(gain.max()) <= tol: break
    return w/w.sum()


def vote_weights(p, y) -> np.ndarray:
    """The weights `(m,)` of votes that are best where members err independently: log(a/(1−a)) + log(c−1), a the share that a member has right, 0 for one no better than chance.

    a is (right + ½)/(n + 1), so that who has all right does not decide alone for good (doi:10.2307/2526418, for c classes as in SAMME). All at chance: equal ones."""
    p, y = _checked(p, y)
    a = ((p.argmax(2) == y[:, None]).sum(0) + .5)/(len(y)+1)
    w = np.maximum(np.log(a/(1-a)) + math.log(p.shape[2]-1), 0)
    return w/w.sum() if w.any() else np.full(len(w), 1/len(w))


def normed(weights: Sequence[float]) -> np.ndarray:
    "Weights ≥ 0, not all 0, over their sum. Raises `ValueError` for others."
    w = np.asarray(weights, float)
    if w.ndim != 1 or not np.isfinite(w).all() or (w < 0).any() or not w.any(): raise BadValue(f'weights: a number ≥ 0 for each member, not all 0, got {np.asarray(weights).tolist()}')
    return w/w.sum()


def _checked(p, y) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(p, float), np.asarray(y)
    if p.ndim != 3 or y.shape != p.shape[:1] or not len(y): raise BadValue(f'fit: probabilities (samples, members, classes) and a class for each sample, got {p.shape} and {y.shape}')
    return p, y.astype(int)
