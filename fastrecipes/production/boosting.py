"Members trained one after another, each on what those before it had wrong."
import math
from dataclasses import dataclass, field

import numpy as np
from fastai.data.core import DataLoaders

from fastrecipes.errors import BadValue
from fastrecipes.production.ensembles import Ensemble
from fastrecipes.production.members import check_makes, made, told
from fastrecipes.randomness import key_of

__all__ = ['Boosted', 'boosting', 'samme']


def samme(wrong, weights, c: int) -> tuple[float, float, np.ndarray]:
    """One round of SAMME (doi:10.4310/SII.2009.v2.n3.a8): the weighted share `err` that a member has wrong, its vote α = log((1−err)/err) + log(c−1), and the samples' next weights.

    `wrong`, `weights` `(n,)`: weights ≥ 0; those that come out have sum 1. With none wrong α is infinite, and at 1 − 1/c or more, chance, it is ≤ 0."""
    wrong, w = np.asarray(wrong, bool), np.asarray(weights, float)
    w = w/w.sum()
    err = float(w[wrong].sum())
    if not err: return 0., math.inf, w
    alpha = math.log((1-err)/err) + math.log(c-1) if err < 1 else -math.inf
    new = w*np.exp(np.clip(alpha, -50, 50)*wrong)
    return err, alpha, new/new.sum()


@dataclass(repr=False)
class Boosted:
    "What `boosting` made: `.ensemble`, a weighted vote; each member's weighted `errors` (0–1) and `alphas` (votes); `reason`: why it ended; `weights` `(n,)`: the samples'."
    ensemble: Ensemble
    errors: list[float]
    alphas: list[float]
    reason: str
    weights: np.ndarray = field(repr=False)

    def __str__(self):
        rows = [f'{n}: weighted error {e:.1%}, vote {a:.2f}'.replace('%', ' %') for n, e, a in zip(self.ensemble.names, self.errors, self.alphas)]
        return '\n'.join([*rows, self.reason])

    __repr__ = __str__


def boosting(make, dls: DataLoaders, n: int = 5, *, seed: int = 42) -> Boosted:
    """Train up to `n` ≥ 2 members one after another, each on draws that favour what those before it had wrong; they vote by how right they were: SAMME, AdaBoost for many classes.

    `make` as in `bagging`; a scikit-learn classifier is given the weights themselves where it takes them. It is for members that are a little better than chance: one that has
    all its training images right leaves nothing to make up for, and ends it, as does one at chance; wrong labels get ever more weight. It costs n trainings. Raises
    `ValueError` outside the ranges, and where fewer than two members come of it."""
    y = check_makes([make], dls)
    if n < 2: raise BadValue(f'n: at least 2 members, got {n}')
    c, w = len(dls.vocab), np.full(len(y), 1/len(y))
    members, errors, alphas, reason = [], [], [], f'all {n} rounds'
    for i in range(n):
        m = told(f'round {i+1} of {n}', lambda: made(make, dls, key_of(seed, 'boost', i) % 2**32, weights=w))
        wrong = m.answers(dls.train, list(dls.vocab))[0].numpy().argmax(1) != y
        err, alpha, new = samme(wrong, w, c)
        if alpha <= 0 or math.isinf(alpha):
            reason = f'over in round {i+1}: its member has all training samples right, there is nothing left to make up for' if alpha > 0 else \
                f'over in round {i+1}: its member has {err:.1%} wrong, by weight, no better than chance'.replace('%', ' %')
            if len(members) < 2: raise BadValue(f'boosting: {reason}; {"take weaker members (a smaller network, fewer epochs), or bagging" if alpha > 0 else "train longer"}')
            break
        members, errors, alphas, w = [*members, m], [*errors, err], [*alphas, alpha], new
    return Boosted(Ensemble(members, 'weighted_vote', weights=alphas, dls=dls, names=[f'boost {i+1}' for i in range(len(members))]), errors, alphas, reason, w)
