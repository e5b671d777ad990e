"Several networks on scanned digits: who is in the table, what is left behind, that a killed run goes on, what is refused."
import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from fastrecipes.data.samples import digits
from fastrecipes.flags import CommandLine
from fastrecipes.recipes import ensemble as recipe
from fastrecipes.recipes.ensemble import ensemble
from fastrecipes.recipes.ship import ship
from fastrecipes.report.run_folder import load_run

from .dying import killed

RECIPE = dict(arch='test_resnet', members=2, pretrained=False, size=16, epochs=2, lr=3e-3, bs=16, valid=.25, test=.25, augment=dict(flip=False))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Zeros, ones and sevens, 40 of each."
    root = tmp_path_factory.mktemp('three')
    for c in '017':
        (root/'few'/c).mkdir(parents=True)
        for p in sorted((digits(root/'all')/c).iterdir())[:40]: shutil.copy(p, root/'few'/c)
    return root/'few'


@pytest.fixture(scope='module')
def run(data, tmp_path_factory): return ensemble(data, **RECIPE, calibrate=True, out=str(tmp_path_factory.mktemp('ens')/'run'))


def test_the_table_is_that_of_the_networks(run):
    e = run.evaluation
    assert [m.name for m in e.members] == ['test_resnet 1', 'test_resnet 2'] and e.side == 'test'
    own = [m.learn.get_preds(ds_idx=2) for m in run.ensemble.members]
    y = own[0][1]
    for m, (p, _) in zip(e.members, own): assert m.accuracy.value == pytest.approx(accuracy_score(y, p.argmax(1)))
    assert e.ensemble.accuracy.value == pytest.approx(accuracy_score(y, sum(p for p, _ in own).argmax(1)))
    valid = [accuracy_score(*(t.argmax(1) if t.ndim > 1 else t for t in m.learn.get_preds(ds_idx=1))) for m in run.ensemble.members]
    assert e.best == e.members[int(np.argmax(valid))].name and str(e.gain) in str(run) and run.ensemble.calibration.n == 30


def test_members_differ_by_their_seed_and_share_the_split(run):
    a, b = (m.learn for m in run.ensemble.members)
    assert any(not torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))
    assert [list(dl.items) for dl in a.dls.loaders] == [list(dl.items) for dl in b.dls.loaders]
    assert list(a.dls.train.get_idxs()) != list(b.dls.train.get_idxs()) and a.keyed_cb.seed != b.keyed_cb.seed


def test_what_is_left_behind_is_one_network_that_ships(run, tmp_path):
    told = json.loads((run.path/'provenance.json').read_text())
    assert told['finished'] and told['kind'] == 'average' and told['accuracy']['ensemble (average)'] == run.evaluation.ensemble.accuracy.value
    page = (run.path/'report.html').read_text()
    assert 'ensemble (average)' in page and 'test_resnet 2' in page and 'augment' in page
    again = load_run(run.path)
    p = run.ensemble.get_preds()[0]
    with again.no_bar(): assert torch.allclose(again.get_preds()[0], p, atol=1e-5)
    bundle = ship(str(run.path), str(tmp_path/'b'))
    assert np.abs(bundle.predictor().probabilities(list(again.dls.valid.items))-p.numpy()).max() <= 1e-4
    card = bundle.predictor().card
    assert card['ensemble']['members'] == ['test_resnet 1', 'test_resnet 2'] and card['calibration']['T'] == run.ensemble.calibration.T
    with pytest.raises(ValueError, match='holds a finished run'): ensemble(run.learn.dls.holdings.path, **RECIPE, calibrate=True, out=str(run.path))


def test_a_killed_run_goes_on_and_ends_the_same(run, data, tmp_path, monkeypatch):
    again = lambda: ensemble(data, **RECIPE, calibrate=True, out=str(tmp_path/'run'))
    for name, n in (('1.pt', 2), ('2.pt', 3)): killed(monkeypatch, again, name, n)
    there = again()
    assert all(map(torch.equal, there.learn.model.state_dict().values(), run.learn.model.state_dict().values()))
    assert there.evaluation.gain == run.evaluation.gain and there.ensemble.calibration == run.ensemble.calibration


def test_a_killed_snapshot_ensemble_has_the_weights_of_all_cycles(data, tmp_path, monkeypatch):
    "Killed in the second cycle, and when the fit is over."
    made = lambda out: ensemble(data, **RECIPE, kind='snapshot', out=str(tmp_path/out))
    for name, n in (('1.pt', 6), ('journal.pt', 1)): killed(monkeypatch, lambda: made('killed'), name, n)
    whole, there = made('whole'), made('killed')
    assert all(map(torch.equal, there.learn.model.state_dict().values(), whole.learn.model.state_dict().values()))
    a, b = (m.learn.model.state_dict() for m in there.ensemble.members)
    assert not all(map(torch.equal, a.values(), b.values()))


@pytest.mark.parametrize('kind', ['weighted', 'stacking', 'bagging', 'snapshot'])
def test_every_kind_ends_in_a_table_and_a_network(data, kind):
    r = ensemble(data, **{**RECIPE, 'epochs': 2}, kind=kind, folds=2)
    p, q = r.ensemble.get_preds(2)[0], r.learn.get_preds(ds_idx=2)[0]
    assert torch.allclose(p, q, atol=1e-5) and len(r.evaluation.members) == 2 and r.evaluation.ensemble.name in str(r)
    if kind == 'bagging': assert '.632 estimate' in str(r)
    if kind == 'snapshot': assert r.ensemble.names == ['cycle 1', 'cycle 2']
    if kind == 'weighted': assert r.ensemble.weights.sum() == pytest.approx(1) and 'weight' in str(r)


def test_boosted_networks_vote_by_their_alphas(data, capsys):
    r = ensemble(data, **{**RECIPE, 'epochs': 1, 'lr': 1e-3}, kind='boosting', flip=True)
    alphas = [float(line.rsplit('vote ', 1)[1]) for line in r.made.splitlines() if 'vote ' in line]
    assert len(alphas) == 2 and r.ensemble.weights == pytest.approx(np.array(alphas)/sum(alphas), abs=.01) and r.ensemble.flip


def test_networks_may_differ(data):
    r = ensemble(data, **{**RECIPE, 'members': ['test_resnet', 'resnet10t'], 'epochs': 1}, kind='majority')
    assert r.ensemble.names == ['test_resnet', 'resnet10t'] and r.learn.ensemble['kind'] == 'majority'


@pytest.mark.parametrize('change, message', [
    (dict(members=1), 'members: at least 2, got 1'),
    (dict(members=['test_resnet']), 'members: at least 2, got 1'), (dict(members='resnet18'), 'members must be a list or a whole number'),
    (dict(kind='bagged'), "kind: one of average.*got 'bagged'; did you mean 'bagging'"), (dict(kind='bagging', members=['a', 'b']), 'bagging makes them of one network'),
    (dict(kind='stacking', folds=1), 'folds: at least 2, got 1'), (dict(kind='snapshot', epochs=3), 'epochs: those of 2 equal cycles, such as 4, got 3'),
    (dict(kind='bagging', balance=True), 'balance: it draws the training images, and so does bagging'), (dict(precompute='x'), 'precompute: it keeps the answers'),
    (dict(members=['test_resnet', 'resnet10']), "neither timm nor torchvision has a network 'resnet10'"), (dict(valid=0.), 'valid: '),
    (dict(mixupp=.4), "no argument and no technique named 'mixupp'; did you mean 'mixup'"), (dict(epochs=0), 'epochs: at least 1')])
def test_what_is_wrong_is_refused_before_any_training(data, monkeypatch, change, message):
    monkeypatch.setattr(recipe, 'image_classifier', None)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message): ensemble(data, **{**RECIPE, **change})


def test_the_command_line_takes_a_number_or_a_list():
    line = CommandLine(ensemble, 'ensemble')
    assert line.parse(['photos/', '--members', '4'])['members'] == 4
    assert line.parse(['photos/', '--members', '[resnet18,convnext_atto]', '--kind', 'stacking'])['members'] == ['resnet18', 'convnext_atto']
