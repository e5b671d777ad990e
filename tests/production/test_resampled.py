"Members told apart by their training samples: bagging, boosting, stacking and snapshots, against scikit-learn and the papers' formulas."
import math

import numpy as np
import pytest
import torch
from fastai.basics import Learner, nn
from sklearn.datasets import load_digits
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import AdaBoostClassifier, StackingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier
from torch.utils.data import TensorDataset

from fastrecipes.data.keyed import keyed
from fastrecipes.data.loaders import as_dataloaders
from fastrecipes.data.splits import folds as folds_of
from fastrecipes.errors import BadValue
from fastrecipes.production.bagging import bagging, estimate_632
from fastrecipes.production.boosting import boosting, samme
from fastrecipes.production.members import Rows, Weighted
from fastrecipes.production.snapshots import Snapshots  # noqa: F401
from fastrecipes.production.stacking import out_of_fold, stacking
from fastrecipes.production.voting import Vote

D = load_digits()
X, Y = torch.tensor(D.images/16).float()[:, None], torch.tensor(D.target).long()


def loaders(n=200, bs=20): return as_dataloaders((TensorDataset(X[:n], Y[:n]), TensorDataset(X[n:2*n], Y[n:2*n])), bs=bs, seed=0)


def rows(part): return X[part].reshape(-1, 64).numpy()


def network(dls, seed, epochs=2, lr=.02):
    torch.manual_seed(seed)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    keyed(learn, seed)
    learn.fit(epochs, lr)
    return learn


def test_samme_by_hand():
    "Four samples, one wrong, three classes: err ¼, α = log 3 + log 2, and the wrong one's weight is six times the others'."
    err, alpha, w = samme([True, False, False, False], [1, 1, 1, 1], 3)
    assert (err, alpha) == (.25, pytest.approx(math.log(3)+math.log(2))) and w.tolist() == pytest.approx([6/9, 1/9, 1/9, 1/9])
    assert samme([False]*3, [1, 1, 1], 3)[1] == math.inf
    assert samme([True, True, False], [1, 1, 1], 3)[1] == pytest.approx(0) and samme([True]*3, [1]*3, 2)[1] < 0


def test_boosted_stumps_are_scikit_learns_adaboost():
    dls, stump = loaders(), DecisionTreeClassifier(max_depth=2, random_state=0)
    b = boosting(stump, dls, 4)
    theirs = AdaBoostClassifier(stump, n_estimators=4, random_state=0).fit(rows(slice(0, 200)), Y[:200].numpy())
    assert b.errors == pytest.approx(theirs.estimator_errors_.tolist(), abs=.03)           # each tree breaks ties of features by a seed of its own
    assert b.alphas[0] == pytest.approx(theirs.estimator_weights_[0])
    w = np.full(200, 1/200)
    for m, e, a in zip(b.ensemble.members, b.errors, b.alphas):
        wrong = m.estimator.predict(rows(slice(0, 200))) != Y[:200].numpy()
        err = w[wrong].sum()
        assert e == pytest.approx(err) and a == pytest.approx(math.log((1-err)/err)+math.log(9))
        w = w*np.exp(a*wrong)
        w /= w.sum()
    assert b.weights == pytest.approx(w)
    votes = sum(a*np.eye(10)[m.estimator.predict(rows(slice(200, 400)))] for m, a in zip(b.ensemble.members, b.alphas))
    assert (b.ensemble.get_preds()[0].numpy().argmax(1) == votes.argmax(1)).all() and 'weighted error' in str(b)


def test_boosting_ends_where_nothing_is_left_or_nothing_is_learnt():
    with pytest.raises(BadValue, match='over in round 1: its member has all training samples right.*take weaker members'): boosting(DecisionTreeClassifier(), loaders(), 3)
    rarest = DummyClassifier(strategy='constant', constant=int(torch.bincount(Y[:200]).argmin()))
    with pytest.raises(BadValue, match='over in round 1: its member has 9.* % wrong, by weight, no better than chance; train longer'): boosting(rarest, loaders(), 3)


def test_a_boosted_network_is_shown_what_was_wrong_more_often():
    seen = []
    def make(dls, seed):
        seen.append(dls.train.sampler.p)
        return network(dls, seed)
    b = boosting(make, loaders(), 3)
    assert seen[0] == pytest.approx(np.full(200, 1/200))
    p = b.ensemble.members[0].answers(loaders().train)[0].numpy()
    wrong = p.argmax(1) != Y[:200].numpy()
    assert seen[1][wrong].min() > 2*seen[1][~wrong].max() and seen[1].sum() == pytest.approx(1)
    assert isinstance(b.ensemble.combine, Vote) and b.ensemble.weights == pytest.approx(np.array(b.alphas)/sum(b.alphas))


def test_draws_follow_their_weights_and_rows_are_drawn_as_often_as_named():
    p = np.array([.7, .2, .1, 0])
    drawn = np.concatenate([Weighted(p).draw(np.random.default_rng(i)) for i in range(2000)])
    assert np.bincount(drawn, minlength=4)/len(drawn) == pytest.approx(p, abs=.02)
    assert sorted(Rows([3, 3, 1]).draw(np.random.default_rng(0))) == [1, 3, 3] and len(Rows([3, 3, 1])) == 3


def test_bagging_by_hand():
    dls = loaders()
    b = bagging(GaussianNB(var_smoothing=1e-2), dls, 5)
    y = Y[:200].numpy()
    p = np.stack([m.estimator.predict_proba(rows(slice(0, 200))) for m in b.ensemble.members])
    for d, m in zip(b.drawn, b.ensemble.members):           # fitted to what was drawn, as often as it was
        again = GaussianNB(var_smoothing=1e-2).fit(rows(slice(0, 200))[np.repeat(np.arange(200), d)], np.repeat(y, d))
        assert d.sum() == 200 and m.estimator.theta_ == pytest.approx(again.theta_)
    out = b.drawn == 0
    right = p.argmax(2) == y
    some = out.any(0)
    assert b.oob.n == some.sum() and b.oob.value == pytest.approx(((p*out[..., None]).sum(0).argmax(1) == y)[some].mean())
    assert b.left_out == pytest.approx(np.mean([r[o].mean() for r, o in zip(right, out)]))
    assert b.resub == pytest.approx(np.mean([(r*d).sum()/200 for r, d in zip(right, b.drawn)]))
    assert b.estimate_632 == pytest.approx(.368*b.resub + .632*b.left_out) == pytest.approx(estimate_632(b.resub, b.left_out))
    assert (b.drawn > 0).mean() == pytest.approx(1-1/math.e, abs=.03) and str(b.oob) in str(b)


def test_a_network_is_trained_on_its_draw_alone():
    seen = []
    def make(dls, seed):
        seen.append(sorted(i % 200 for i in dls.train.get_idxs()))
        return network(dls, seed)
    b = bagging(make, loaders(), 2)
    assert [np.bincount(s, minlength=200).tolist() for s in seen] == b.drawn.tolist()
    p, y = b.ensemble.get_preds()
    assert (p.argmax(1) == y).float().mean() > .5 and torch.equal(y, Y[200:400])


def test_a_learner_that_draws_otherwise_is_refused():
    def make(dls, seed): return network(loaders(), seed)
    with pytest.raises(BadValue, match='make: the Learner was not trained on the samples that its loaders draw'): bagging(make, loaders(), 2)


def test_stacking_is_scikit_learns_on_the_same_folds():
    dls, y = loaders(), Y[:200].numpy()
    makes = [GaussianNB(var_smoothing=1e-2), KNeighborsClassifier(5)]
    e = stacking(makes, dls, folds=4, seed=1)
    fold = np.array(folds_of([str(i) for i in range(200)], [str(k) for k in y], 4, 1))
    cv = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(4)]
    theirs = StackingClassifier([(str(i), m) for i, m in enumerate(makes)], LogisticRegression(max_iter=5000, tol=1e-6), cv=cv, stack_method='predict_proba').fit(rows(slice(0, 200)), y)
    got, _ = e.get_preds()
    assert got.numpy() == pytest.approx(theirs.predict_proba(rows(slice(200, 400))), abs=1e-4) and e.names == ['GaussianNB', 'KNeighborsClassifier']


def test_out_of_fold_answers_come_from_members_that_had_not_seen_the_sample():
    "A nearest neighbour knows its own label: in the fold it cannot."
    p, fold = out_of_fold([KNeighborsClassifier(1)], loaders(), 4, seed=1)
    y = Y[:200].numpy()
    assert sorted(set(fold)) == [0, 1, 2, 3]
    for k in range(4):
        own = KNeighborsClassifier(1).fit(rows(slice(0, 200))[fold != k], y[fold != k])
        assert (p[fold == k, 0].argmax(1) == own.predict(rows(slice(0, 200))[fold == k])).all()


def test_copies_of_a_file_lie_in_one_fold(photos):
    import shutil
    from fastrecipes.data.folders import image_folder
    for c in ('cat', 'dog'): shutil.copy(photos/c/'0.png', photos/c/'copy.png')
    dls = image_folder(photos, size=8, bs=4, valid=.2, test=0, workers=0)
    _, fold = out_of_fold([DecisionTreeClassifier()], dls, 3)
    held = {}
    for f, k in zip(dls.train.items, fold): held.setdefault(f.read_bytes(), set()).add(k)
    assert all(len(k) == 1 for k in held.values())


def test_snapshots_are_the_weights_at_the_ends_of_the_cycles():
    learn, kept = network(loaders(), 0, epochs=1), []
    from fastai.basics import Callback
    class Watch(Callback):
        order = 90
        def after_epoch(self): kept.append(([p.clone() for p in self.learn.model.parameters()], self.opt.hypers[-1]['lr']))
    e = learn.fit_snapshots(3, 2, .05, cbs=Watch())
    assert len(kept) == 6 and e.names == ['cycle 1', 'cycle 2', 'cycle 3']
    for m, i in zip(e.members, (1, 3, 5)): assert all(map(torch.equal, m.learn.model.parameters(), kept[i][0]))
    assert all(kept[i][1] < kept[i-1][1] for i in (1, 3, 5))                # the rate has come down when they are taken
    x = X[200:400]
    with torch.no_grad(): expected = torch.stack([m.learn.model(x).softmax(1) for m in e.members]).mean(0)
    assert torch.allclose(e.get_preds()[0], expected, atol=1e-6)
    assert all(map(torch.equal, learn.model.parameters(), e.members[-1].learn.model.parameters()))
    assert [m.learn.model is learn.model for m in e.members] == [False]*3
    assert network(loaders(), 0).fit_snapshots(3, 1, .05, last=2).names == ['cycle 2', 'cycle 3']


@pytest.mark.parametrize('args, said', [((1, 2), 'n_cycles must be a whole number ≥ 2, got 1'), ((3, 0), 'cycle_len must be a whole number ≥ 1, got 0')])
def test_cycles_that_are_none_are_refused(args, said):
    with pytest.raises(BadValue, match=said): network(loaders(), 0, epochs=1).fit_snapshots(*args)


def test_what_trains_no_members_is_refused():
    dls = loaders()
    with pytest.raises(BadValue, match='n: at least 2 members, got 1'): bagging(GaussianNB(), dls, 1)
    with pytest.raises(BadValue, match='n: at least 2 members, got 1'): boosting(GaussianNB(), dls, 1)
    with pytest.raises(BadValue, match='makes: at least 2, got 1'): stacking([GaussianNB()], dls)
    with pytest.raises(BadValue, match=r'make: a function \(dls, seed\).*got Learner; what is trained already goes into'): bagging(network(dls, 0, epochs=1), dls, 2)
    with pytest.raises(BadValue, match='folds: at least 2, got 1'): stacking([GaussianNB(), GaussianNB()], dls, folds=1)
    with pytest.raises(BadValue, match='last must be 2 to n_cycles=3, got 5'): network(dls, 0, epochs=1).fit_snapshots(3, 1, last=5)
