"""Whether `ablate` can be believed: false verdicts where nothing differs, planted effects that are found, intervals that hold the truth.

    python bench/ablation_honesty.py [--ablations 200] [--planted 200] [--seeds 5] [--images 1000] [--write]

A fast toy, trained for real: softmax regression on 200 of scikit-learn's digits, one pass of SGD; test images are drawn with noise. A/A: four
'techniques' that do nothing but draw another order and other weights; any 'helped' or 'hurt' among the eight comparisons of an ablation is false. Planted: a technique that puts right
each wrong answer with the probability that makes it 2 points on average; where three seeds do not resolve it, an ablation with as many as that one asks for is made anew.
Coverage: how many of the 95 % intervals hold the true effect, 0 or 2 points. One thread, a few minutes."""
import argparse
import contextlib
import io
import os
import sys
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np                                              # noqa: E402
from results import write                                       # noqa: E402
from sklearn.datasets import load_digits                        # noqa: E402

from fastrecipes.recipes.ablate import ablate                   # noqa: E402
from fastrecipes.recipes.arms import Outcome                    # noqa: E402
from fastrecipes.report.evidence import Scored                  # noqa: E402
from fastrecipes.report.intervals import accuracy               # noqa: E402

NOTHING = ('mixup', 'ema', 'cutout', 'weight_decay')            # names that go together; here they do nothing
PLANTED, MATTERS = .02, 2.
TRAIN, VALID, STEPS, RATE, NOISE = 200, 300, 200, .05, .25


class Toy:
    "A problem drawn by `number`: which digits are trained on and judged; `.recipe` trains on it. `.truth`: the mean effect of what is planted, where it is known."
    def __init__(self, number: int, images: int, planted: float = 0.):
        rng, d = np.random.default_rng([number, 1]), load_digits()
        order = rng.permutation(len(d.target))
        x, y = d.data/16, d.target
        self.planted, self.train = planted, (x[order[:TRAIN]], y[order[:TRAIN]])
        rest = order[TRAIN:]
        self.sides = {}
        for side, n in (('validation', VALID), ('test', images)):
            i = rng.choice(rest, n)
            self.sides[side] = (x[i] + rng.normal(0, NOISE, (n, 64)), y[i])

    def recipe(self, seed: int, **techniques) -> Outcome:
        on = [n for n in NOTHING if techniques.get(n)]
        rng = np.random.default_rng([seed, *map(NOTHING.index, on), len(on)])
        (x, y), w, b = self.train, rng.normal(0, .3, (64, 10)), np.zeros(10)
        for _ in range(STEPS):
            i = rng.integers(0, TRAIN, 16)
            z = x[i] @ w + b
            p = np.exp(z - z.max(1, keepdims=True))
            g = (p/p.sum(1, keepdims=True) - np.eye(10)[y[i]])/len(i)
            w, b = w - RATE*10*x[i].T @ g, b - RATE*10*g.sum(0)
        return Outcome(*[self._answers(side, w, b, 'mixup' in on, rng) for side in self.sides], 1.)

    def _answers(self, side, w, b, helped, rng) -> Scored:
        x, y = self.sides[side]
        z = x @ w + b
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        if helped and self.planted:
            wrong = np.flatnonzero(p.argmax(1) != y)
            p[(right := wrong[rng.random(len(wrong)) < self.planted*len(y)/max(1, len(wrong))])] = .01/9
            p[right, y[right]] = .99
        return Scored(p.astype(np.float32), y, side)


def quietly(toy: Toy, names, seeds: int, number: int, **how):
    with contextlib.redirect_stdout(io.StringIO()): return ablate(toy.recipe, techniques=list(names), seeds=seeds, seed=number, matters=MATTERS, **how)


def share(hits) -> str: return f'{sum(hits)} of {len(hits)}, {accuracy(np.ones(len(hits)), np.array(hits, float))}'


def main(ablations: int, planted: int, seeds: int, images: int) -> str:
    since, false, held, words = time.monotonic(), [], [], []
    for k in range(ablations):
        found = quietly(Toy(k, images), NOTHING, seeds, k).findings
        false.append(any(f.verdict.word in ('helped', 'hurt') for f in found))
        held += [e.lo <= 0 <= e.hi for e in (f.effects['accuracy'] for f in found)]
        words += [f.verdict.word for f in found]
        if k % 10 == 9: print(f'{k+1} A/A ablations: a false verdict in {sum(false)}, {np.mean(held):.1%} of intervals hold 0', flush=True)
    hit, hold, asked, pilots = [], [], [], 0
    for k in range(planted):
        toy = Toy(10_000+k, 4*images, PLANTED)
        f = quietly(toy, ['mixup'], 3, 20_000+k).findings[0]
        if f.verdict.word != 'not resolved': pilots += 1
        else:
            asked.append(f.verdict.seeds)
            if np.isfinite(asked[-1]): f = quietly(toy, ['mixup'], asked[-1], 30_000+k).findings[0]
        hit.append(f.verdict.word == 'helped')
        f = quietly(toy, ['mixup'], seeds, 40_000+k).findings[0]        # anew: where an interval ends a search, it is no fair sample
        hold.append(f.effects['accuracy'].lo <= PLANTED <= f.effects['accuracy'].hi)
        if k % 10 == 9: print(f'{k+1} planted: found in {sum(hit)} of {len(hit)}', flush=True)
    return '\n'.join([f'| | {ablations} A/A ablations, {seeds} seeds, {images:,} test images | '
                      f'{planted} planted effects of 2 points, {4*images:,} test images |', '|---|---|---|',
                      f'| a false verdict (of 8 comparisons; 5 % allowed) | {share(false)} | |',
                      f'| found, by 3 seeds or with as many as it then asked for (90 % promised) | | {share(hit)} |',
                      f'| seeds asked for | | none in {pilots}; else {min(asked)} to {max(asked)}, median {np.median(asked):.0f} |',
                      f'| 95 % intervals that hold the truth, of {seeds} seeds | {share(held)} | {share(hold)} |',
                      f'| verdicts | {", ".join(f"{w} {words.count(w)}" for w in dict.fromkeys(words))} | |', '', f'{(time.monotonic()-since)/60:.0f} minutes of one thread.'])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    defaults = dict(ablations=200, planted=200, seeds=5, images=1000)
    for name, default in defaults.items(): parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--write', action='store_true')
    asked = vars(parser.parse_args())
    to_write = asked.pop('write')
    said = main(**asked)
    print(said)
    how = ' '.join(f'--{k} {v}' for k, v in asked.items())
    if to_write: write('ablation_honesty', f'## Ablations: can they be believed?\n\n`python bench/ablation_honesty.py {how}`\n\n{said}')
