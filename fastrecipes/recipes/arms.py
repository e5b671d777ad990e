"The design of an ablation: which sets of techniques are trained, which two of them tell what one technique does, and what their results come to."
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastrecipes.production.voting import LEAST as NEXT_TO_NONE
from fastrecipes.report.effects import Effect, Verdict, crossed, verdicts
from fastrecipes.report.evidence import Scored

__all__ = ['Arm', 'Comparison', 'Outcome', 'Finding', 'METRICS', 'comparisons', 'arms', 'named', 'gain', 'effect', 'findings', 'chosen']

Arm = frozenset                         # the names of the techniques that are on; the empty one is the baseline
METRICS = ('accuracy', 'balanced_accuracy', 'log_loss')


@dataclass(frozen=True)
class Comparison:
    "What tells of one technique: the arm that has it minus the one that lacks it, 'alone' or 'in the set' of all."
    technique: str
    where: str
    having: Arm
    lacking: Arm


@dataclass(frozen=True)
class Outcome:
    "One training: the answers on validation and test images, seconds, the most memory in MB where it is known, and a metric's course over the epochs."
    valid: Scored
    test: Scored
    seconds: float
    mb: float | None = None
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What one comparison came to: effects by metric on the images that are reported on and, of accuracy, on those that are chosen by; a verdict on the first;
    how many times as long a training takes, and how much more memory in MB."""
    comparison: Comparison
    effects: dict[str, Effect] = field(repr=False)
    valid: Effect
    verdict: Verdict
    times: float
    mb: float | None


def comparisons(names: Sequence[str], alone: bool = False) -> list[Comparison]:
    "Each technique alone beside none and, unless `alone`, all beside all but it; of one technique both are the same."
    every = Arm(names)
    found = [Comparison(n, 'alone', Arm([n]), Arm()) for n in names]
    return found if alone or len(names) < 2 else found + [Comparison(n, 'in the set', every, every-{n}) for n in names]


def arms(of: Sequence[Comparison]) -> list[Arm]:
    "What must be trained for these comparisons, each once, in their order, the baseline first."
    return list(dict.fromkeys(a for c in of for a in (c.lacking, c.having)))


def named(arm: Arm, names: Sequence[str]) -> str:
    "`baseline`, `mixup`, `all`, `all but ema`, `ema + mixup`."
    left = [n for n in names if n not in arm]
    if not arm: return 'baseline'
    if len(arm) == 1: return next(iter(arm))
    return 'all' if not left else f'all but {left[0]}' if len(left) == 1 else ' + '.join(n for n in names if n in arm)


def gain(having: Scored, lacking: Scored, metric: str) -> np.ndarray:
    "How much better the first does, image by image `(n,)`, so that the mean is the difference of the metric; of log loss in nats less."
    y = having.targets
    if metric == 'log_loss':
        p, q = (np.take_along_axis(s.probabilities.astype(float), y[:, None], 1)[:, 0].clip(NEXT_TO_NONE) for s in (having, lacking))
        return np.log(p) - np.log(q)
    right = (having.predicted == y).astype(float) - (lacking.predicted == y)
    if metric == 'accuracy': return right
    _, which, n = np.unique(y, return_inverse=True, return_counts=True)
    return right*len(y)/(len(n)*n[which])


def effect(runs: Mapping[tuple[Arm, int], Outcome], having: Arm, lacking: Arm, metric: str = 'accuracy', side: str = 'test') -> Effect | None:
    "The `Effect` by the seeds that both arms were trained with; None where there is none."
    seeds = sorted({s for a, s in runs if a == having} & {s for a, s in runs if a == lacking})
    if not seeds: return None
    return crossed([gain(getattr(runs[having, s], side), getattr(runs[lacking, s], side), metric) for s in seeds])


def findings(runs: Mapping[tuple[Arm, int], Outcome], of: Sequence[Comparison], matters: float) -> list[Finding]:
    "What the runs say of each comparison that was run at all; verdicts hold for all of them together."
    done = [(c, by_metric) for c in of if (by_metric := {m: effect(runs, c.having, c.lacking, m) for m in METRICS})['accuracy'] is not None]
    said = verdicts([e['accuracy'] for _, e in done], matters) if done else []
    return [Finding(c, e, effect(runs, c.having, c.lacking, side='valid'), v, *_cost(runs, c)) for (c, e), v in zip(done, said)]


def _cost(runs, c: Comparison) -> tuple[float, float | None]:
    pairs = [(runs[c.having, s], runs[c.lacking, s]) for a, s in runs if a == c.having and (c.lacking, s) in runs]
    mbs = [a.mb-b.mb for a, b in pairs if a.mb is not None and b.mb is not None]
    return float(np.exp(np.mean([np.log(a.seconds/b.seconds) for a, b in pairs]))), float(np.mean(mbs)) if mbs else None


def chosen(found: Sequence[Finding]) -> Arm:
    "The techniques that help on the validation images, alone or in the set, by the 95 % interval, and hurt in neither: a choice; what it is worth the test images tell."
    for_, against = ({f.comparison.technique for f in found if f.valid.seeds > 1 and test(f.valid)} for test in (lambda e: e.lo > 0, lambda e: e.hi < 0))
    return Arm(for_-against)
