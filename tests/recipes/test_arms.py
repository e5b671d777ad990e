"The design of an ablation and the sums made of its results."
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss

from fastrecipes.recipes.arms import METRICS, Arm, Outcome, arms, chosen, comparisons, effect, findings, gain, named
from fastrecipes.report.effects import crossed
from fastrecipes.report.evidence import Scored


def scored(rng, y, right, c=4):
    "Answers that are right with probability `right`."
    p = rng.dirichlet(np.ones(c), len(y))
    top = np.where(rng.random(len(y)) < right, y, (y+1) % c)
    p[np.arange(len(y)), top] += 1
    return Scored((p/p.sum(1, keepdims=True)).astype(np.float32), y, 'test')


def test_each_technique_alone_and_in_the_set():
    of = comparisons(['a', 'b', 'c'])
    assert [(c.technique, c.where, sorted(c.having), sorted(c.lacking)) for c in of] == [
        ('a', 'alone', ['a'], []), ('b', 'alone', ['b'], []), ('c', 'alone', ['c'], []),
        ('a', 'in the set', ['a', 'b', 'c'], ['b', 'c']), ('b', 'in the set', ['a', 'b', 'c'], ['a', 'c']), ('c', 'in the set', ['a', 'b', 'c'], ['a', 'b'])]
    assert [named(a, ['a', 'b', 'c']) for a in arms(of)] == ['baseline', 'a', 'b', 'c', 'all but a', 'all', 'all but b', 'all but c']
    assert named(Arm(['c', 'b']), ['a', 'b', 'c', 'd']) == 'b + c'


def test_of_few_techniques_no_arm_is_trained_twice():
    assert len(arms(comparisons(['a']))) == 2 and len(comparisons(['a'])) == 1
    assert [named(a, ['a', 'b']) for a in arms(comparisons(['a', 'b']))] == ['baseline', 'a', 'b', 'all'] and len(comparisons(['a', 'b'])) == 4
    assert len(arms(comparisons(['a', 'b', 'c'], alone=True))) == 4


def test_gains_are_the_differences_of_scikit_learns_metrics():
    rng = np.random.default_rng(0)
    y = rng.choice(4, 300, p=[.6, .25, .1, .05])
    a, b = scored(rng, y, .8), scored(rng, y, .6)
    assert gain(a, b, 'accuracy').mean() == pytest.approx(accuracy_score(y, a.predicted) - accuracy_score(y, b.predicted))
    assert gain(a, b, 'balanced_accuracy').mean() == pytest.approx(balanced_accuracy_score(y, a.predicted) - balanced_accuracy_score(y, b.predicted))
    assert gain(a, b, 'log_loss').mean() == pytest.approx(log_loss(y, b.probabilities.astype(float)) - log_loss(y, a.probabilities.astype(float)), rel=1e-5)


def results(gains: dict, seeds=4, images=400, seed=0):
    "Outcomes of all arms of techniques that add so much to the share that is right."
    rng, names = np.random.default_rng(seed), list(gains)
    y = rng.integers(0, 4, images)
    return {(a, s): Outcome(scored(rng, y, .6 + sum(gains[n] for n in a)), scored(rng, y, .6 + sum(gains[n] for n in a)), 2. if 'slow' in a else 1., 5.)
            for a in arms(comparisons(names)) for s in range(seeds)}


def test_an_effect_is_taken_over_the_seeds_that_both_arms_have():
    runs = results(dict(good=.2))
    del runs[Arm(['good']), 1]
    e = effect(runs, Arm(['good']), Arm())
    assert e == crossed([gain(runs[Arm(['good']), s].test, runs[Arm(), s].test, 'accuracy') for s in (0, 2, 3)]) and e.seeds == 3
    assert effect({k: o for k, o in runs.items() if not k[0]}, Arm(['good']), Arm()) is None


def test_findings_and_choice():
    runs = results(dict(good=.2, slow=0., bad=-.2), seeds=5)
    found = findings(runs, comparisons(['good', 'slow', 'bad']), .02)
    by = {(f.comparison.technique, f.comparison.where): f for f in found}
    assert [by['good', w].verdict.word for w in ('alone', 'in the set')] == ['helped']*2 and [by['bad', w].verdict.word for w in ('alone', 'in the set')] == ['hurt']*2
    assert by['slow', 'alone'].times == pytest.approx(2) and by['good', 'alone'].times == pytest.approx(1) and by['slow', 'alone'].mb == 0
    assert set(by['good', 'alone'].effects) == set(METRICS) and by['good', 'alone'].valid.value != by['good', 'alone'].effects['accuracy'].value
    assert by['good', 'alone'].effects['log_loss'].value > 0 and chosen(found) == Arm(['good'])


def test_what_helps_here_and_hurts_there_is_not_chosen():
    runs = results(dict(a=.2, b=.0), seeds=5)
    for s in range(5): runs[Arm('ab'), s] = Outcome(*[scored(np.random.default_rng(s), runs[Arm(), 0].test.targets, .2)]*2, 1.)
    assert chosen(findings(runs, comparisons(['a', 'b']), .02)) == Arm()
