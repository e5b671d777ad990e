"Intervals against hand values, scikit-learn, and the coverage they promise."
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from fastrecipes.report.intervals import Estimate, accuracy, balanced_accuracy, difference


def classes(*rights):
    "Targets and predictions in which class i has `rights[i] = (k, m)`: k of m right; a wrong one is given to the next class."
    t = np.concatenate([np.full(m, i) for i, (_, m) in enumerate(rights)])
    p = np.concatenate([np.r_[np.full(k, i), np.full(m-k, (i+1) % len(rights))] for i, (k, m) in enumerate(rights)])
    return t, p


def test_wilson_by_hand():
    e = accuracy(*classes((45, 50), (36, 50)))      # 81 of 100: (81 + z²/2 ± z·√(81·19/100 + z²/4))/(100 + z²), z = 1.959964
    assert (e.value, e.n) == (.81, 100)
    assert (e.lo, e.hi) == (pytest.approx(.7222, abs=1e-4), pytest.approx(.8749, abs=1e-4))


@pytest.mark.parametrize('k, lo, hi', [(20, .83887, 1.), (0, 0., .16113)])      # n/(n+z²) and z²/(n+z²)
def test_all_right_and_all_wrong_have_width(k, lo, hi):
    e = accuracy(*classes((k, 20), (0, 0)))
    assert (e.lo, e.hi) == (pytest.approx(lo, abs=1e-5), pytest.approx(hi, abs=1e-5))


def test_printed_in_percent():
    assert str(Estimate(.981, .964, .99)) == '98.1 % (96.4–99.0)'
    assert str(difference([0]*1000, [0]*1000, [1]*50 + [0]*950)).startswith('+5.0 points (+3.')


def test_balanced_accuracy_is_scikit_learns():
    t, p = classes((9, 10), (30, 90), (4, 4))
    assert balanced_accuracy(t, p).value == pytest.approx(balanced_accuracy_score(t, p)) == pytest.approx((.9 + 1/3 + 1)/3)


def test_a_class_without_images_does_not_count():
    assert balanced_accuracy([0, 0, 1, 1], [0, 2, 1, 1]).value == .75      # class 2 is only predicted


def test_names_serve_as_classes():
    assert balanced_accuracy(['cat', 'cat', 'dog'], ['cat', 'dog', 'dog']).value == .75


def test_a_balanced_interval_never_closes():
    e = balanced_accuracy(*classes((10, 10), (10, 10)))
    assert e.value == e.hi == 1. and .75 < e.lo < .95
    assert balanced_accuracy(*classes((500, 500), (500, 500))).lo > .99


def test_a_perfect_small_class_is_not_certain():
    "Resampling alone would see no doubt in 6 of 6: the interval must be wider than that of the large class halved."
    small, large = balanced_accuracy(*classes((6, 6), (950, 1000))), accuracy(*classes((950, 1000)))
    assert small.hi-small.lo > 3*(large.hi-large.lo)/2


def test_many_perfect_classes_are_not_dragged_down():
    e = balanced_accuracy(*classes(*[(5, 5)]*100))
    assert e.lo > .97


def test_difference_is_paired():
    "Both are right on 80 of 100, and wrong on the same images but one each: far narrower than two intervals of accuracy."
    t = np.zeros(100)
    a, b = np.r_[np.ones(20), np.zeros(80)], np.r_[0, np.ones(20), np.zeros(79)]
    d = difference(t, a, b, 'accuracy')
    assert d.value == 0 and d.lo < 0 < d.hi and not d.resolved
    assert d.hi-d.lo < .1 < .15 < accuracy(t, a).hi-accuracy(t, a).lo


def test_difference_is_first_minus_second():
    t = np.zeros(200)
    d = difference(t, np.zeros(200), np.r_[np.ones(30), np.zeros(170)], 'accuracy')
    assert d.value == .15 and d.resolved and .1 < d.lo < .15 < d.hi < .21
    assert difference(t, np.r_[np.ones(30), np.zeros(170)], np.zeros(200), 'accuracy').value == -.15


def test_balanced_difference_weighs_classes_alike():
    t, a = classes((10, 10), (90, 90))
    _, b = classes((5, 10), (90, 90))
    assert difference(t, a, b, 'balanced_accuracy').value == .25 and difference(t, a, b, 'accuracy').value == .05


def test_models_that_agree_are_not_proved_equal():
    t, a = classes((50, 60), (30, 40))
    for metric in ('accuracy', 'balanced_accuracy'):
        d = difference(t, a, a, metric)
        assert d.value == 0 and d.lo < -.005 and d.hi > .005


def test_refusals_name_what_came():
    with pytest.raises(ValueError, match='at least one image'): accuracy([], [])
    with pytest.raises(ValueError, match=r'\(2,\) for \(3,\)'): balanced_accuracy([0, 1, 1], [0, 1])
    with pytest.raises(ValueError, match="'balanced_acuracy'; did you mean 'balanced_accuracy'"): difference([0], [0], [0], 'balanced_acuracy')


@pytest.mark.parametrize('m, recall', [((30, 30, 30), (.9, .95, .8)), ((5,)*20, (.9,)*20), ((8, 12) + (36,)*8, (.8, .9) + (.98,)*8)])
def test_balanced_intervals_cover_the_truth(m, recall):
    "Of 95 % intervals at least 92 % must hold the truth: balanced, tiny and imbalanced test sets."
    rng, runs = np.random.default_rng(1), 400
    held = [(e := balanced_accuracy(*classes(*zip(rng.binomial(m, recall), m)), n=500)).lo <= np.mean(recall) <= e.hi for _ in range(runs)]
    assert np.mean(held) > .92


@pytest.mark.parametrize('only_a, only_b', [(.02, .02), (.1, .04), (.005, .005)])
def test_differences_cover_the_truth(only_a, only_b):
    rng, t, held = np.random.default_rng(2), np.zeros(150, int), []
    for _ in range(400):
        u = rng.random(150)
        d = difference(t, (u < only_b).astype(int), ((u >= only_b) & (u < only_a+only_b)).astype(int), 'accuracy', n=500)
        held.append(d.lo <= only_a-only_b <= d.hi)
    assert np.mean(held) > .92
