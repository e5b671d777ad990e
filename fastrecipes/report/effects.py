"""By how much a change makes a recipe better: measured with several seeds on the same images, and judged among many such changes.

Which seeds and which images is chance, both: so each counts as a draw (doi:10.1002/sim.2532, where readers are seeds and cases images)."""
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2
from scipy.stats import t as student

from fastrecipes.errors import BadValue
from fastrecipes.report.intervals import LEVEL, Difference, signed

__all__ = ['Effect', 'Verdict', 'crossed', 'holm', 'verdicts']

POWER = .9              # with which the seeds that a verdict asks for would find what matters
SURE = .8               # a variance known from few seeds may be too small by luck: it is taken as high as this share of samples would have it
LEAST = 3               # seeds; of two that agree by luck the interval is too narrow
MANY = 20               # seeds that one may think of where images are what is missing
MOST = 200              # seeds; more are not asked for


@dataclass(frozen=True)
class Effect(Difference):
    """How much better with a change than without, the mean over `seeds` runs of each, of `n` images; with the ends of its 95 % interval.

    `se`, `dof`: the standard error and its degrees of freedom; `p`: of no effect at all, two-sided; `by_seed`, `by_image`, `by_both`: the variance of
    a score from seed to seed, from image to image, and what is left."""
    seeds: int = 0
    se: float = math.nan
    dof: float = math.nan
    p: float = 1.
    by_seed: float = 0.
    by_image: float = 0.
    by_both: float = 0.

    def __str__(self): return super().__str__() if self.seeds > 1 else f'{signed(self.value)} points (one seed)'

    def interval(self, level: float) -> tuple[float, float]:
        half = student.ppf((1+level)/2, self.dof)*self.se
        return self.value-half, self.value+half

    def needs(self, size: float, alpha: float) -> float:
        "Seeds with which an effect of `size` is found at level `alpha` in 9 cases of 10; infinite where images are too few, whatever the seeds."
        seeds, _ = self._enough(size, alpha, [(s, self.n) for s in range(LEAST, MOST+1)], self._seed_at_most) or (math.inf, 0)
        return seeds

    def needs_images(self, size: float, alpha: float) -> int:
        "Images, with 20 seeds or as many as there are, of which the same holds, to two digits; 0 where seeds alone vary more than that."
        _, images = self._enough(size, alpha, [(max(self.seeds, MANY), n) for n in np.geomspace(self.n, 1e4*self.n, 400)], self.by_seed) or (0, 0)
        return int(float(f'{images:.1e}'))

    def _enough(self, size, alpha, designs, by_seed):
        "The first of ever larger designs (seeds, images) that finds `size`; None where none does."
        def found(design):
            se, dof = _error(*design, by_seed, self.by_image, self.by_both)
            return (student.ppf(1-alpha/2, dof) + student.ppf(POWER, dof))*se <= size
        i = bisect_left(designs, True, key=found)
        return designs[i] if i < len(designs) else None

    @property
    def _seed_at_most(self) -> float:
        free = self.seeds-1
        return max(0., ((self.n*self.by_seed + self.by_both)*free/chi2.ppf(1-SURE, free) - self.by_both)/self.n)


@dataclass(frozen=True)
class Verdict:
    "What can be said of an effect: `word` is 'helped', 'hurt', 'no difference' or 'not resolved'; `why` the sentence; `seeds`: how many in all would resolve it."
    word: str
    why: str
    seeds: float = 0

    def __str__(self): return self.why


def crossed(d) -> Effect:
    """The effect from score differences `(seeds, images)`: each run with a change minus that of the same seed without, image by image.

    Of right or wrong that is 1, 0 or −1. Two-way analysis of variance with both random: Var = (MS_seed + MS_image − MS_rest)/(seeds·images). Runs that agree
    by luck are not exact: the standard error is at least 1/images. Degrees of freedom by Satterthwaite, of seeds that vary at least as chance alone would have
    them: a few that agree by luck would seem to leave images as the only doubt. One seed: no interval. Raises `ValueError` for other shapes and fewer than
    two images."""
    d = np.asarray(d, float)
    if d.ndim != 2 or not d.shape[0] or d.shape[1] < 2: raise BadValue(f'd: (seeds, images) with at least 2 images, got {d.shape}')
    s, n = d.shape
    mean, rows, columns = d.mean(), d.mean(1), d.mean(0)
    if s == 1: return Effect(float(mean), -math.inf, math.inf, n, 1, math.inf, 1., 1., math.nan, float(columns.var(ddof=1)), math.nan)
    of_seeds, of_images = n*rows.var(ddof=1), s*columns.var(ddof=1)
    rest = max(0., float(((d - rows[:, None] - columns + mean)**2).sum()/((s-1)*(n-1))))
    by_seed, by_image = max(0., (of_seeds-rest)/n), max(0., (of_images-rest)/s)
    images = max(0., of_images-rest)
    se = math.sqrt(max((of_seeds+images)/(s*n), 1/n**2))
    dof = _dof(s, n, max(of_seeds, rest), images)
    p = float(2*student.sf(abs(mean)/se, dof))
    half = student.ppf((1+LEVEL)/2, dof)*se
    return Effect(float(mean), float(mean-half), float(mean+half), n, s, se, float(dof), p, float(by_seed), float(by_image), rest)


def _error(s: float, n: float, by_seed: float, by_image: float, by_both: float) -> tuple[float, float]:
    "Standard error and degrees of freedom that are to be expected of `s` seeds and `n` images."
    of_seeds, images = n*by_seed + by_both, s*by_image
    return math.sqrt(max((of_seeds+images)/(s*n), 1/n**2)), _dof(s, n, of_seeds, images)


def _dof(s: float, n: float, of_seeds: float, images: float) -> float:
    "Satterthwaite's degrees of freedom of the sum of both mean squares."
    return (of_seeds+images)**2/(of_seeds**2/(s-1) + images**2/(n-1)) if of_seeds+images else s-1


def holm(ps: Sequence[float], alpha: float = 1-LEVEL) -> list[bool]:
    "Which of several hypotheses with these p-values are rejected, the chance that any true one is among them at most `alpha`: Holm, jstor:4615733."
    order = np.argsort(ps, kind='stable')
    out = [False]*len(ps)
    for k, i in enumerate(order):
        if not ps[i] <= alpha/(len(ps)-k): break
        out[i] = True
    return out


def verdicts(effects: Sequence[Effect], matters: float, alpha: float = 1-LEVEL) -> list[Verdict]:
    """What can be said of all of `effects` at once: the chance of any wrong 'helped' or 'hurt' is at most `alpha` (Holm).

    'No difference larger than x' where the interval of level 1 − alpha/len(effects) lies within `matters` about 0. Else the seeds that would tell: an effect as
    large as measured less a standard error, or `matters` if that is more, in 9 cases of 10."""
    found = holm([e.p if e.seeds >= LEAST else 1. for e in effects], alpha)
    return [_verdict(e, f, matters, alpha/len(effects)) for e, f in zip(effects, found)]


def _verdict(e: Effect, found: bool, matters: float, alpha: float) -> Verdict:
    if found: return Verdict(word := 'helped' if e.value > 0 else 'hurt', word)
    if e.seeds < LEAST: return Verdict('not resolved', f'not resolved: {e.seeds} seed{"s do" if e.seeds > 1 else " does"} not tell how far seeds vary, {LEAST} do', LEAST)
    lo, hi = e.interval(1-alpha)
    if -matters < lo and hi < matters: return Verdict('no difference', f'no difference larger than {100*max(-lo, hi):.1f} points')
    size = max(matters, abs(e.value)-e.se)          # as large as it seems, less what may be luck
    seeds = e.needs(size, alpha)
    if math.isfinite(seeds): return Verdict('not resolved', f'not resolved: about {max(1, seeds-e.seeds)} more seeds would', max(seeds, e.seeds+1))
    images = e.needs_images(size, alpha)
    way_out = f'; about {images:,} would do, with {max(e.seeds, MANY)} seeds' if images else ''
    return Verdict('not resolved', f'not resolved: for a difference of {100*size:.1f} points {e.n:,} test images are too few, whatever the seeds{way_out}', math.inf)
