"An ensemble beside its members: who is right how often, and whether it is worth what it costs."
from dataclasses import dataclass

import numpy as np

from fastrecipes.errors import few
from fastrecipes.production.voting import LEAST
from fastrecipes.report import intervals
from fastrecipes.report.evidence import Scored
from fastrecipes.report.intervals import Difference, Estimate
from fastrecipes.report.tables import aligned

__all__ = ['Evaluation', 'Judged']


@dataclass(frozen=True)
class Judged:
    "How a member, or the ensemble, does: accuracy with its interval, log loss in nats."
    name: str
    accuracy: Estimate
    log_loss: float
    weight: float | None = None


@dataclass(repr=False)
class Evaluation:
    """An ensemble beside its members on the images of `side`: `.members`, `.ensemble`, `.best` (chosen on the validation images), `.gain` over it, image by
    image; `.ties`: images whose vote was tied; `.fitted`: whether its weights were fitted to these very images. `.scored`: the answers. Printed, it is a table."""
    kind: str
    side: str
    members: list[Judged]
    ensemble: Judged
    best: str
    gain: Difference
    scored: dict[str, Scored]
    ties: int = 0
    fitted: bool = False

    def __str__(self):
        weigh = any(m.weight is not None for m in self.members)
        rows = [('', f'{self.side} accuracy', 'log loss', *(['weight'] if weigh else []))]
        rows += [(m.name, str(m.accuracy), f'{m.log_loss:.3f}', *([f'{m.weight:.2f}' if m.weight is not None else ''] if weigh else [])) for m in (*self.members, self.ensemble)]
        idle = [m.name for m in self.members if m.weight is not None and m.weight < 5e-3]
        return '\n'.join([*aligned(rows), f'{self.ensemble.name} − {self.best}, the best by validation: {self.gain} on {self.gain.n} images{self.worth}',
                          *([f'next to no weight, so the ensemble may do without: {few(idle)}'] if idle else []),
                          *([f'{self.ties} of {self.gain.n} votes were tied; the probabilities decided'] if self.ties else []),
                          *(['the weights were fitted to these very images: the gain flatters; hold out test images'] if self.fitted else [])])

    @property
    def worth(self) -> str:
        if self.gain.lo > 0: return ': the ensemble is better'
        return ': the BEST MEMBER IS BETTER' if self.gain.hi < 0 else ': no difference is certain'

    __repr__ = __str__


def judged(name: str, kind: str, side: str, names, p, joint, y, p_valid, y_valid, weights=None, ties: int = 0, fitted: bool = False) -> Evaluation:
    "The `Evaluation` by the members' answers `(n, m, c)` and the ensemble's `(n, c)` for samples of classes `(n,)`, and by the members' for the images to choose by."
    y, y_valid = np.asarray(y).astype(int), np.asarray(y_valid)
    best = int((p_valid.argmax(2) == y_valid[:, None]).mean(0).argmax())
    def one(name, q, w=None): return Judged(name, intervals.accuracy(y, q.argmax(1)), log_loss(y, q), w)
    members = [one(n, p[:, i], None if weights is None else float(weights[i])) for i, n in enumerate(names)]
    scored = {n: Scored(p[:, i], y, side) for i, n in enumerate(names)} | {name: Scored(joint, y, side)}
    gain = intervals.difference(y, joint.argmax(1), p[:, best].argmax(1))
    return Evaluation(kind, side, members, one(name, joint), names[best], gain, scored, ties, fitted)


def log_loss(targets, probabilities) -> float:
    "The mean of −log p of the true class, in nats, 0 or more, lower is better; class numbers `(n,)`, probabilities `(n, c)`, kept 1e-7 from 0."
    p = np.asarray(probabilities, np.float64)[np.arange(len(targets)), targets]
    return float(-np.log(p.clip(LEAST, 1)).mean())
