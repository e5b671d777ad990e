"Several members as one: the formulas on real loaders, one network and one graph of all of them, a bundle that answers so, and what is refused."
import json
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import nn
from fastai.learner import load_learner
from fastai.vision.all import Flip, Normalize
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from fastrecipes.errors import BadValue
from fastrecipes.production import tta  # noqa: F401
from fastrecipes.production.ensembles import Ensemble
from fastrecipes.production.evaluation import log_loss
from fastrecipes.production.export import export_learner
from fastrecipes.production.members import Estimator
from fastrecipes.production.predictor import Graph
from fastrecipes.production.voting import mixture_weights, vote_weights
from fastrecipes.recipes.ship import ship
from fastrecipes.report import intervals

from .conftest import fitted


def other_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


@pytest.fixture(scope='module')
def pair(mixed_photos):
    "Two architectures; one normalises, the other does not."
    return fitted(mixed_photos), fitted(mixed_photos, model=other_net(), normalize=False)


def alone(learn, i=1):
    with learn.no_bar(): return learn.get_preds(ds_idx=i, act=partial(torch.softmax, dim=1))


def pixels(dl):
    "Pictures in [0, 1] as rows, by hand."
    plain = dl.new(shuffle=False, drop_last=False, after_batch=[t for t in dl.after_batch.fs if not isinstance(t, Normalize)])
    return np.concatenate([np.asarray(b[0]) for b in plain]).reshape(-1, 3*16*16)


def test_each_member_sees_the_images_as_it_was_trained(pair):
    (p, y), (q, _) = map(alone, pair)
    for dl_of in pair:                                      # whichever's loaders are asked about
        got, targets = Ensemble(pair, dls=dl_of.dls).get_preds()
        assert torch.allclose(got, (p+q)/2, atol=1e-6) and torch.equal(targets, y)
    got, _ = Ensemble(pair, 'weighted', weights=[3, 1]).get_preds()
    assert torch.allclose(got, .75*p+.25*q, atol=1e-6)


def test_what_varies_training_images_is_not_seen_by_members(make_learn):
    "A loader that fastai's get_preds renews forgets that it is validation's."
    learn = make_learn()
    learn.dls.add_tfms([Flip(p=1.)], 'after_batch')
    p, _ = alone(learn)
    assert torch.allclose(Ensemble([learn, learn]).get_preds()[0], p, atol=1e-6) and not torch.allclose(Ensemble([learn], flip=True).get_preds()[0], p, atol=1e-4)


def test_weights_are_fitted_to_the_validation_images(pair):
    (p, y), (q, _) = map(alone, pair)
    both = torch.stack([p, q], 1).numpy()
    assert Ensemble(pair, 'weighted').fit().weights == pytest.approx(mixture_weights(both, y.numpy()), abs=1e-5)
    assert Ensemble(pair, 'weighted_vote').fit().weights == pytest.approx(vote_weights(both, y.numpy()), abs=1e-6)
    rows = both.reshape(len(both), -1).astype(float)
    theirs = LogisticRegression(max_iter=5000, tol=1e-9, solver='newton-cg').fit(rows, y).predict_proba(rows)
    assert Ensemble(pair, 'blending').fit().get_preds()[0].numpy() == pytest.approx(theirs, abs=1e-4)


def test_files_and_single_items_are_answered_as_the_loader_does(pair):
    e = Ensemble(pair)
    files = list(e.dls.valid.items)[:5]
    p = e.get_preds()[0].numpy()
    assert e.probabilities(files) == pytest.approx(p[:5], abs=1e-6)
    label, i, q = e.predict(files[3])
    assert q.numpy() == pytest.approx(p[3], abs=1e-6) and label == e.vocab[int(i)] == e.vocab[p[3].argmax()]


def test_tensors_are_answered_where_the_data_are_tensors(toy):
    learners = toy(seed=0), toy(seed=1)
    x = torch.randn(7, 4)
    with torch.no_grad(): expected = sum(o.model(x).softmax(1) for o in learners)/2
    e = Ensemble(learners)
    assert e.probabilities(x) == pytest.approx(expected.numpy(), abs=1e-6) and e.predict(x[0])[2].numpy() == pytest.approx(expected[0].numpy(), abs=1e-6)


def test_estimators_see_pixels_in_rows_or_features_and_may_know_fewer_classes(pair):
    learn = pair[0]
    x, y = pixels(learn.dls.train), np.array([learn.dls.vocab.o2i[f.parent.name] for f in learn.dls.train.items])
    tree = DecisionTreeClassifier(max_depth=3, random_state=0).fit(x, y)
    named = LogisticRegression(max_iter=50).fit(x[y > 0].mean(1, keepdims=True), np.array(learn.dls.vocab)[y[y > 0]])
    mean = Estimator(named, lambda t: t.flatten(1).mean(1, keepdim=True).numpy())
    e = Ensemble([learn, tree, mean, lambda t: torch.full((len(t), 3), 1/3)])
    p, _ = e.answers(learn.dls.valid)
    v = pixels(learn.dls.valid)
    assert p[:, 0].numpy() == pytest.approx(alone(learn)[0].numpy(), abs=1e-6)
    assert p[:, 1].numpy() == pytest.approx(tree.predict_proba(v), abs=1e-6)
    assert p[:, 2].numpy() == pytest.approx(np.c_[np.zeros(len(v)), named.predict_proba(v.mean(1, keepdims=True))], abs=1e-4)
    assert e.names[1] == 'DecisionTreeClassifier' and torch.allclose(e.get_preds()[0], p.mean(1), atol=1e-6)
    with pytest.raises(BadValue, match='DecisionTreeClassifier.*is no network, and one graph cannot hold it'): e.as_learner()


@pytest.mark.parametrize('kind', ['average', 'weighted', 'majority', 'weighted_vote', 'blending'])
def test_all_members_are_one_graph(pair, kind):
    e = Ensemble(pair, kind).fit()
    learn = e.as_learner()
    p, y = e.get_preds()
    with learn.no_bar(): q, _ = learn.get_preds()
    assert torch.allclose(p, q, atol=1e-5) and learn.ensemble['kind'] == kind
    with learn.no_bar(): assert learn.validate()[1] == pytest.approx(float((p.argmax(1) == y).float().mean()))


def test_a_bundle_answers_as_the_ensemble(pair, tmp_path):
    e = Ensemble([*pair, pair[0]], 'weighted_vote', weights=[.5, .3, .2], flip=True)
    bundle = ship(e, tmp_path/'b')
    p = e.get_preds()[0].numpy()
    got = bundle.predictor().probabilities(e.dls.valid.items)
    assert np.abs(got-p).max() <= 1e-4 and (got.argmax(1) == p.argmax(1)).all() and bundle.parity.n == len(p)
    card = json.loads((tmp_path/'b'/'bundle.json').read_text())
    assert card['ensemble'] == dict(kind='weighted_vote', members=e.names, flip=True, weights=[.5, .3, .2]) and card['labels'] == list(e.dls.vocab)


def test_one_onnx_with_labels_and_input(pair, tmp_path):
    e = Ensemble(pair, 'majority')
    graph = Graph(e.to_onnx(tmp_path/'e.onnx').read_bytes())
    assert json.loads(graph.metadata['labels']) == list(e.dls.vocab) and json.loads(graph.metadata['input'])['size'] == [16, 16]
    x = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    t = torch.from_numpy(x).permute(0, 3, 1, 2).float()/255
    norm = next(o for o in pair[0].dls.valid.after_batch.fs if isinstance(o, Normalize))
    with torch.no_grad(): votes = [pair[0].model.eval()((t-norm.mean.cpu())/norm.std.cpu()), pair[1].model.eval()(t)]
    shares = (nn.functional.one_hot(votes[0].argmax(1), 3) + nn.functional.one_hot(votes[1].argmax(1), 3)).numpy()/2
    one = shares.max(1) == 1
    assert graph(x)[one] == pytest.approx(shares[one], abs=1e-6)


def test_as_one_learner_it_is_exported_and_calibrated(pair, tmp_path):
    e = Ensemble(pair)
    before = e.get_preds()[0]
    c = e.calibrate()
    p = e.get_preds()[0]
    assert torch.allclose(p, (before.log()/c.T).softmax(1), atol=1e-5) and (p.argmax(1) == before.argmax(1)).all()
    assert c.log_loss[1] <= c.log_loss[0] and c.log_loss[1] == pytest.approx(log_loss(alone(pair[0])[1].numpy(), p.numpy()), abs=1e-5)
    again = load_learner(export_learner(e.as_learner(), tmp_path/'l.pkl'))
    again.dls = e.as_learner().dls
    with again.no_bar(): assert torch.allclose(again.get_preds()[0], p, atol=1e-5)
    assert again.calibration == c


def test_flip_of_one_member_is_its_mean_with_the_mirror_image(pair):
    with pair[1].no_bar(): expected = pair[1].tta(views='flip')[0]
    e = Ensemble([pair[1]], flip=True)
    assert torch.allclose(e.get_preds()[0], expected, atol=1e-6)
    with (learn := e.as_learner()).no_bar(): assert torch.allclose(learn.get_preds()[0], expected, atol=1e-5)


def test_it_is_measured_beside_its_best_member(pair):
    e = Ensemble(pair, names=['a', 'b'])
    r = e.evaluate()
    (p, y), (q, _) = [(o[0].numpy(), o[1].numpy()) for o in map(alone, pair)]
    right = [(o.argmax(1) == y).mean() for o in (p, q)]
    assert [m.accuracy.value for m in r.members] == right and r.best == 'ab'[int(np.argmax(right))] and r.side == 'validation'
    best = (p, q)[int(np.argmax(right))]
    assert r.gain == intervals.difference(y, ((p+q)/2).argmax(1), best.argmax(1)) and r.ensemble.accuracy == intervals.accuracy(y, ((p+q)/2).argmax(1))
    assert r.members[0].log_loss == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean(), rel=1e-5)
    assert str(r.gain) in str(r) and not r.fitted and 'flatters' not in str(r)
    assert 'the gain flatters' in str(Ensemble(pair, 'weighted').fit().evaluate())
    assert 'may do without: network 2' in str(Ensemble(pair, 'weighted', weights=[1, 0]).evaluate()) and 'do without' not in str(Ensemble(pair, 'weighted', weights=[3, 1]).evaluate())
    tied = Ensemble(pair, 'majority').evaluate()
    assert tied.ties == int((p.argmax(1) != q.argmax(1)).sum()) and (not tied.ties or f'{tied.ties} of {len(y)} votes were tied' in str(tied))


def test_the_members_stay_as_they_were(pair):
    before = [{k: v.clone() for k, v in o.model.state_dict().items()} for o in pair]
    cbs, fs = [list(o.cbs) for o in pair], [list(o.dls.valid.after_batch.fs) for o in pair]
    pair[0].model.train()
    Ensemble(pair, flip=True).as_learner()
    assert pair[0].model.training and cbs == [list(o.cbs) for o in pair] and fs == [list(o.dls.valid.after_batch.fs) for o in pair]
    for o, state in zip(pair, before): assert all(torch.equal(v, state[k]) for k, v in o.model.state_dict().items())


def test_what_does_not_fit_together_is_refused(pair, toy, mixed_photos, tmp_path):
    with pytest.raises(BadValue, match='members: at least 2, got 1'): Ensemble(pair[:1])
    with pytest.raises(BadValue, match='Ensemble: members must be a list, got <fastai.learner.Learner'): Ensemble(*pair)
    with pytest.raises(BadValue, match=r'give the Learner, not its model \(Sequential\)'): Ensemble([pair[0], pair[1].model])
    with pytest.raises(BadValue, match="members: 'runs/x' is a path; give what load_run makes"): Ensemble([pair[0], 'runs/x'])
    with pytest.raises(TypeError, match="Ensemble.evaluate: no argument 'ds'"): Ensemble(pair).evaluate(ds=1)
    with pytest.raises(TypeError, match="^Ensemble: no argument 'kinds'; did you mean 'kind'"): Ensemble(pair, kinds='average')
    with pytest.raises(BadValue, match="kind: one of average, .*, got 'averge'; did you mean 'average'"): Ensemble(pair, 'averge')
    with pytest.raises(BadValue, match='members: must know the same classes, network 2 has 0, 1, 2, the data have blue, green, red'): Ensemble([pair[0], toy()])
    with pytest.raises(BadValue, match='LinearSVC gives no probabilities'): Ensemble([pair[0], LinearSVC()])
    with pytest.raises(BadValue, match='got one with the loss'): Ensemble([pair[0], toy(loss_func=nn.MSELoss())])
    with pytest.raises(BadValue, match='weights: one for each of the 2 members, got 3'): Ensemble(pair, 'weighted', weights=[1, 1, 1])
    with pytest.raises(BadValue, match="weights: go with kind='weighted'"): Ensemble(pair, weights=[1, 1])
    with pytest.raises(BadValue, match='weights: a number ≥ 0'): Ensemble(pair, 'weighted', weights=[1, -1])
    with pytest.raises(BadValue, match='names: one for each of the 2 members, got 1'): Ensemble(pair, names=['a'])
    with pytest.raises(BadValue, match=r'weighted: call fit\(\) first, or give weights'): Ensemble(pair, 'weighted').get_preds()
    with pytest.raises(BadValue, match='stacking: its meta-learner is fitted to out-of-fold answers'): Ensemble(pair, 'stacking').fit()
    with pytest.raises(BadValue, match='dls: none of the members is a Learner'): Ensemble([lambda x: x, lambda x: x])
    with pytest.raises(BadValue, match='there are no images at 2'): Ensemble(pair).get_preds(2)
    with pytest.raises(BadValue, match='gives .* for 21 samples of 3 classes'): Ensemble([pair[0], lambda x: torch.ones(len(x), 2)]).get_preds()


def test_members_trained_on_what_is_measured_are_refused(pair, mixed_photos):
    leaking = fitted(mixed_photos, epochs=0)
    leaking.dls = leaking.dls.__class__(*leaking.dls.loaders[::-1]) if len(leaking.dls.loaders) == 2 else leaking.dls.__class__(leaking.dls.loaders[1], leaking.dls.loaders[0])
    leaking.dls.vocab = pair[0].dls.vocab
    with pytest.raises(BadValue, match='network 2 was trained on 21 of the 21 images that the ensemble is measured on'): Ensemble([pair[0], leaking])


def test_members_of_another_size_go_in_python_and_not_in_one_graph(pair, mixed_photos):
    from fastai.basics import Learner
    from fastrecipes.data.folders import image_folder
    dls = image_folder(mixed_photos, size=24, bs=8, valid=.5, test=0, workers=0, device=torch.device('cpu'))
    large = Learner(dls, other_net(), metrics=[])
    e = Ensemble([pair[0], large])
    assert torch.allclose(e.get_preds()[0], (alone(pair[0])[0]+alone(large)[0])/2, atol=1e-6)
    with pytest.raises(BadValue, match=r'all must read images alike, and network 1 takes 16×16 px \(crop\), network 2 takes 24×24 px'): e.as_learner()
