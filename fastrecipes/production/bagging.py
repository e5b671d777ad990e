"Members that are told apart by the samples they were trained on, drawn with replacement; and what they are worth by those they did not draw."
import math
from dataclasses import dataclass, field

import numpy as np
from fastai.data.core import DataLoaders

from fastrecipes.errors import BadValue
from fastrecipes.production.ensembles import Ensemble
from fastrecipes.production.members import check_makes, made, told
from fastrecipes.randomness import key_of, stream
from fastrecipes.report import intervals
from fastrecipes.report.intervals import Estimate

__all__ = ['Bagged', 'bagging', 'estimate_632']


def estimate_632(resub: float, left_out: float) -> float:
    "Efron's .632 estimate of an accuracy (doi:10.2307/2288636): .368 of that on what was trained on, too good, and .632 of that on what was left out, too bad."
    return .368*resub + .632*left_out


@dataclass(repr=False)
class Bagged:
    """What `bagging` made: `.ensemble`, and what it is worth by the samples that members did not draw, with no other data. Accuracies, 0–1:

    `oob`: of the ensemble, each training sample answered by the members that did not draw it (the out-of-bag estimate); `resub`: of a member on what it drew, `left_out`: on
    what it did not, both the mean over members; `.estimate_632`: of a member, from the two. `drawn` `(members, n)`: how often each drew each sample."""
    ensemble: Ensemble
    oob: Estimate | None
    resub: float
    left_out: float
    drawn: np.ndarray = field(repr=False)

    @property
    def estimate_632(self) -> float: return estimate_632(self.resub, self.left_out)

    def __str__(self):
        pc = lambda v: f'{v:.1%}'.replace('%', ' %')
        oob = f'out of bag {self.oob} on {self.oob.n} training samples' if self.oob else 'every sample was drawn by each member: no out-of-bag estimate'
        return (f'{len(self.drawn)} members, each on {pc((self.drawn > 0).mean())} of the samples; the ensemble {oob}; '
                f'a member {pc(self.resub)} on what it drew, {pc(self.left_out)} on the rest: .632 estimate {pc(self.estimate_632)}')

    __repr__ = __str__


def bagging(make, dls: DataLoaders, n: int = 10, *, kind: str = 'average', seed: int = 42) -> Bagged:
    """Train `n` ≥ 2 members, each on a bootstrap draw of the training samples, and let them answer together: bagging (doi:10.1007/BF00058655).

    `make`: a function `(dls, seed)` that trains a Learner on these loaders, or a scikit-learn classifier. As many samples as there are, with replacement: a
    member sees about .632 of them. What varies much from draw to draw, such as deep trees, gains; a network that has few images loses a third of them. `kind` as
    in `Ensemble`. It costs n trainings. Raises `ValueError` outside the ranges."""
    y = check_makes([make], dls)
    if n < 2: raise BadValue(f'n: at least 2 members, got {n}')
    rows = [stream(seed, 'bagging', i).integers(0, len(y), len(y)) for i in range(n)]
    members = [told(f'member {i+1} of {n}', lambda i=i: made(make, dls, key_of(seed, 'bag', i) % 2**32, rows[i])) for i in range(n)]
    ensemble = Ensemble(members, kind, dls=dls, names=[f'bag {i+1}' for i in range(n)]).fit()
    drawn = np.stack([np.bincount(r, minlength=len(y)) for r in rows])
    p = ensemble.answers(dls.train)[0].numpy()
    return Bagged(ensemble, out_of_bag(p, y, drawn, ensemble), *_in_and_out(p, y, drawn), drawn)


def out_of_bag(p, y, drawn, ensemble: Ensemble) -> Estimate | None:
    "The accuracy of the ensemble where each sample is answered by the members that did not draw it; samples that all drew do not count."
    out = drawn.T == 0                                      # (n, m)
    some = np.flatnonzero(out.any(1))
    if not len(some): return None
    votes = ensemble.kind in ('majority', 'weighted_vote')
    w = out*(np.ones(p.shape[1]) if ensemble.weights is None else ensemble.weights)
    said = np.eye(p.shape[2])[p.argmax(2)] + 1e-6*p if votes else p
    return intervals.accuracy(y[some], (w[..., None]*said).sum(1)[some].argmax(1))


def _in_and_out(p, y, drawn) -> tuple[float, float]:
    "The mean over members of their accuracy on what they drew, as often as they did, and on what they did not."
    right = (p.argmax(2) == y[:, None]).T
    inside = [np.average(r, weights=d) for r, d in zip(right, drawn)]
    outside = [r[d == 0].mean() for r, d in zip(right, drawn) if (d == 0).any()]
    return float(np.mean(inside)), float(np.mean(outside)) if outside else math.nan
