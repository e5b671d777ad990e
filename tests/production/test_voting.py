"How answers are combined, against formulas, grids and scikit-learn."
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from fastrecipes.errors import BadValue
from fastrecipes.production.voting import Mean, Stack, Vote, meta_learner, mixture_weights, normed, vote_weights


def drawn(n=200, m=3, c=3, seed=0, sharp=(.5, 1., 4.)):
    "Members that are right more and more often, and classes."
    g = np.random.default_rng(seed)
    y = g.integers(0, c, n)
    z = g.normal(size=(n, m, c))
    for j, s in enumerate(sharp[:m]): z[np.arange(n), j, y] += s
    e = np.exp(z)
    return e/e.sum(2, keepdims=True), y


P = torch.tensor([[[.7, .2, .1], [.1, .6, .3], [.2, .5, .3]],           # two for class 1
                  [[.9, .1, .0], [.2, .3, .5], [.1, .8, .1]]]).double()       # one each


def test_the_mean_is_the_mean():
    assert Mean()(P).tolist() == [pytest.approx([1/3, 1.3/3, .7/3]), pytest.approx([.4, .4, .2])]
    assert Mean([2, 1, 1])(P)[0].tolist() == pytest.approx([.5*.7+.25*.1+.25*.2, .5*.2+.25*.6+.25*.5, .5*.1+.25*.3+.25*.3])


def test_votes_are_counted_and_ties_go_by_the_mean_probability():
    vote = Vote()
    out = vote(P)
    assert out[0].tolist() == pytest.approx([1/3, 2/3, 0])                  # shares of votes, no probabilities
    assert out[1].tolist() == pytest.approx([1.2/3, 1.2/3, .6/3])           # all three tie: divided as the mean is
    assert vote.tied(vote.votes(P)).sum(1).tolist() == [1, 3]
    weighted = Vote([.5, .3, .2])(P)
    assert weighted[1].tolist() == pytest.approx([.5, .2, .3])
    assert weighted[0].tolist() == pytest.approx([1/(1+1.3), 1.3/(1+1.3), 0])        # .5 to .3 + .2: a tie, to class 1


@pytest.mark.parametrize('weights', [None, [.2, .5, .3]])
def test_votes_are_numpys_counts_where_nothing_ties(weights):
    "As in scikit-learn's VotingClassifier: argmax of bincount."
    p, _ = drawn(c=4, sharp=(1., 1., 1.))
    counts = np.array([np.bincount(v, weights=weights, minlength=4) for v in p.argmax(2)])
    v = Vote(weights)
    clear = (v.tied(v.votes(torch.from_numpy(p))).sum(1) == 1).numpy()
    assert 20 < clear.sum() == (np.isclose(counts, counts.max(1, keepdims=True)).sum(1) == 1).sum()
    assert v(torch.from_numpy(p))[clear].numpy() == pytest.approx(counts[clear]/counts[clear].sum(1, keepdims=True))


def test_mixture_weights_are_those_of_the_least_log_loss():
    p, y = drawn()
    q = p[np.arange(len(y)), :, y]
    loss = lambda w: -np.log(q @ w).mean()
    w = mixture_weights(p, y)
    a = np.linspace(0, 1, 101)
    grid = [(loss(np.array([i, j, 1-i-j])), i, j) for i in a for j in a if i+j <= 1+1e-9]
    assert w.sum() == pytest.approx(1) and (w >= 0).all()
    assert loss(w) <= min(grid)[0] + 1e-6 and w == pytest.approx([*min(grid)[1:], 1-sum(min(grid)[1:])], abs=.02)
    theirs = minimize(loss, np.full(3, 1/3), bounds=[(0, 1)]*3, constraints=dict(type='eq', fun=lambda w: w.sum()-1), options=dict(ftol=1e-12))
    assert loss(w) == pytest.approx(theirs.fun, abs=1e-6)


def test_mixture_weights_of_two_members_by_hand():
    "Each sample is known to one member alone (.9 and .1): w maximises a·log(.8w+.1) + (1−a)·log(.9−.8w), so .8w + .1 = a."
    y = np.zeros(10, int)
    p = np.array([[[.9, .1], [.1, .9]]]*6 + [[[.1, .9], [.9, .1]]]*4)
    assert mixture_weights(p, y) == pytest.approx([(.6-.1)/.8, 1-(.6-.1)/.8], abs=1e-3)


def test_a_member_that_only_harms_gets_no_weight():
    p, y = drawn()
    bad = np.stack([p[:, 2], np.roll(p[:, 2], 1, 1)], 1)
    assert mixture_weights(bad, y)[1] < .02


def test_vote_weights_are_log_odds_plus_log_classes():
    "Three classes, 9 samples: 8 and 5 right, and one always wrong."
    y = np.zeros(9, int)
    one = np.eye(3)
    p = np.stack([np.where(np.arange(9)[:, None] < k, one[0], one[1]) for k in (8, 5, 0)], 1)
    odds = [math.log(a/(1-a))+math.log(2) for a in (8.5/10, 5.5/10)]
    assert vote_weights(p, y) == pytest.approx([odds[0]/sum(odds), odds[1]/sum(odds), 0])
    assert vote_weights(p[:, 2:].repeat(2, 1), y).tolist() == [.5, .5]      # none better than chance


@pytest.mark.parametrize('c', [2, 4])
def test_a_meta_learner_is_scikit_learns_logistic_regression(c):
    p, y = drawn(c=c)
    x = p[:, :, 1] if c == 2 else p.reshape(len(p), -1)
    theirs = LogisticRegression(max_iter=5000, tol=1e-6).fit(x, y)
    assert meta_learner(p, y)(torch.from_numpy(p)).numpy() == pytest.approx(theirs.predict_proba(x), abs=1e-9)


def test_a_stack_by_hand():
    "Two classes, two members: σ(2·p₀ − p₁ + .5) of the second class."
    s = Stack([[2., -1.]], [.5])
    p = torch.tensor([[[.3, .7], [.6, .4]]]).double()
    assert s(p)[0, 1] == pytest.approx(1/(1+math.exp(-(2*.7-.4+.5))))


@pytest.mark.parametrize('weights', [[1., -1.], [0., 0.], [math.nan, 1.], [[1., 2.]]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(BadValue, match='weights: a number ≥ 0 for each member, not all 0'): normed(weights)


def test_what_cannot_be_fitted_is_refused():
    p, y = drawn()
    with pytest.raises(BadValue, match='samples of all 3 classes, got 2'): meta_learner(p[y < 2], y[y < 2])
    with pytest.raises(BadValue, match='c: above 0'): meta_learner(p, y, c=0)
    for f in (mixture_weights, vote_weights, meta_learner):
        with pytest.raises(BadValue, match=r'got \(200, 3\)'): f(p[:, 0], y)
