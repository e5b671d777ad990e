"Effects over seeds and images: the variance by its textbook form, intervals and verdicts by what they promise of simulated results."
from itertools import chain, combinations

import numpy as np
import pytest
from scipy.stats import norm, ttest_1samp

from fastrecipes.errors import BadValue
from fastrecipes.report.effects import LEAST, MOST, crossed, holm, verdicts


def runs(rng, seeds, images, shift=0., by_image=0., by_both=0.):
    "Right or wrong with a change minus without it `(seeds, images)`: a latent ease of each image, moved for all, by image, by seed and image."
    ease, own = rng.normal(1.2, 1.2, images), rng.normal(shift, by_image, images)
    of_seed = rng.normal(0, .1, (seeds, 1))
    without = ease + of_seed + rng.normal(0, .5, (seeds, images)) > 0
    with_it = ease + own + of_seed + rng.normal(0, by_both, (seeds, 1)) + rng.normal(0, .5, (seeds, images)) > 0
    return with_it.astype(float) - without


def true_effect(shift, by_image=0., by_both=0.):
    before = 1.2**2 + .1**2 + .5**2
    return norm.cdf((1.2+shift)/(before + by_image**2 + by_both**2)**.5) - norm.cdf(1.2/before**.5)


def test_the_standard_error_is_that_of_the_two_way_analysis_of_variance():
    d = runs(np.random.default_rng(0), 4, 50, .3, .5, .3)
    e, (s, n) = crossed(d), d.shape
    mean = sum(d[i, j] for i in range(s) for j in range(n))/(s*n)
    rows, columns = [sum(d[i])/n for i in range(s)], [sum(d[:, j])/s for j in range(n)]
    ms_rows, ms_columns = n*sum((r-mean)**2 for r in rows)/(s-1), s*sum((c-mean)**2 for c in columns)/(n-1)
    ms_rest = sum((d[i, j]-rows[i]-columns[j]+mean)**2 for i in range(s) for j in range(n))/((s-1)*(n-1))
    assert e.value == pytest.approx(mean) and e.se**2 == pytest.approx((ms_rows+ms_columns-ms_rest)/(s*n)) and e.n == 50 and e.seeds == 4
    assert (e.by_both, e.by_image, e.by_seed) == pytest.approx((ms_rest, (ms_columns-ms_rest)/s, max(0, (ms_rows-ms_rest)/n)))
    assert e.lo < e.value < e.hi and e.interval(.95) == pytest.approx((e.lo, e.hi)) and e.interval(.99)[0] < e.lo


def test_of_seeds_alone_it_is_students():
    "Images that all vary alike say nothing of images: what is left is a t test over the seeds' means."
    means = np.array([.1, .3, .2, .5])
    e = crossed(np.repeat(means[:, None], 1000, 1))
    theirs = ttest_1samp(means, 0)
    assert e.p == pytest.approx(theirs.pvalue) and (e.lo, e.hi) == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-6) and e.dof == pytest.approx(3)


def test_runs_that_agree_are_not_exact():
    e = crossed(np.zeros((3, 100)))
    assert e.value == 0 and e.p == 1 and e.se == .01 and e.lo < 0 < e.hi


@pytest.mark.parametrize('shape', [(5,), (0, 3), (3, 1), (2, 3, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(BadValue, match=r'd: \(seeds, images\)'): crossed(np.zeros(shape))


@pytest.mark.parametrize('seeds, images, changed', [(3, 300, (0., 0., 0.)), (5, 400, (.1, .2, .05)), (5, 1000, (.2, .3, .15)), (10, 500, (0., .2, 0.))])
def test_95_of_100_intervals_hold_the_true_effect(seeds, images, changed):
    rng, truth = np.random.default_rng(1), true_effect(*changed)
    held = [e.lo <= truth <= e.hi for e in (crossed(runs(rng, seeds, images, *changed)) for _ in range(1000))]
    assert .93 <= np.mean(held) <= .97


def test_holm_rejects_what_closed_testing_does():
    "All subsets that hold a hypothesis must fall to Bonferroni: the definition, of which Holm's is the short cut."
    rng = np.random.default_rng(2)
    for _ in range(200):
        ps = rng.uniform(0, .06, 5)
        subsets = list(chain.from_iterable(combinations(range(5), k) for k in range(1, 6)))
        closed = [all(min(ps[j] for j in sub) <= .05/len(sub) for sub in subsets if i in sub) for i in range(5)]
        assert holm(ps) == closed
    assert holm([float('nan'), .001]) == [False, True]


def test_wrong_verdicts_among_many_are_as_rare_as_they_should():
    rng = np.random.default_rng(3)
    wrong = [any(v.word in ('helped', 'hurt') for v in verdicts([crossed(runs(rng, 4, 200)) for _ in range(8)], .01)) for _ in range(300)]
    assert np.mean(wrong) <= .05


def test_the_seeds_it_asks_for_find_an_effect_of_that_size():
    "A pilot of few seeds asks; as many as it asks for find the planted effect in 9 cases of 10."
    rng, changed, found, asked = np.random.default_rng(4), (.12, .15, .02), [], []
    size = true_effect(*changed)
    for _ in range(100):
        pilot = crossed(runs(rng, 4, 3000, *changed))
        asked.append(pilot.needs(size, .05))
        if np.isfinite(asked[-1]): found.append(crossed(runs(rng, asked[-1], 3000, *changed)).p <= .05)
    assert .015 < size < .03 and len(found) > 80 and np.mean(found) >= .9 and max(o for o in asked if np.isfinite(o)) <= MOST and min(asked) >= LEAST


def test_the_words():
    rng = np.random.default_rng(5)
    helped, hurt = crossed(runs(rng, 5, 2000, .5)), crossed(runs(rng, 5, 2000, -.5))
    same, open_ = crossed(runs(rng, 5, 20000)), crossed(runs(rng, 3, 1500, .02, 0., .05))
    few_images, one, two = crossed(runs(rng, 8, 400, 0., .5)), crossed(runs(rng, 1, 2000, .5)), crossed(runs(rng, 2, 2000, .5))
    said = verdicts([helped, hurt, same, open_, few_images, one, two], .01)
    assert [v.word for v in said] == ['helped', 'hurt', 'no difference', *['not resolved']*4]
    lo, hi = same.interval(1-.05/7)
    assert str(said[2]) == f'no difference larger than {100*max(-lo, hi):.1f} points'
    assert said[3].why == f'not resolved: about {open_.needs(.01, .05/7)-3} more seeds would' and said[3].seeds == open_.needs(.01, .05/7)
    assert said[4].why.startswith('not resolved: for a difference of 1.0 points 400 test images are too few, whatever the seeds; about ')
    assert said[5].why == 'not resolved: 1 seed does not tell how far seeds vary, 3 do' and said[6].why == 'not resolved: 2 seeds do not tell how far seeds vary, 3 do'
    assert str(one) == f'{100*one.value:+.1f} points (one seed)' and ' to ' in str(two)
