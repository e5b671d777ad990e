"One temperature: fitted in closed form and by grid, kept in what is exported, and no answer changes."
import json
import math

import numpy as np
import pytest
import torch
from fastai.basics import nn
from fastai.learner import load_learner
from scipy.special import log_softmax, softmax
from torch.nn import functional as F

from fastrecipes.errors import BadValue
from fastrecipes.production.calibration import Tempered, calibrated, temperature
from fastrecipes.recipes.ship import ship


def sure(n=400, c=4, seed=0, times=3.):
    "Outputs whose softmax is right as often as it says, and the same `times` too large."
    g = np.random.default_rng(seed)
    z = g.normal(size=(n, c))*1.5
    y = np.array([g.choice(c, p=softmax(o)) for o in z])
    return z*times, y


def test_two_classes_in_closed_form():
    "Outputs ±a, a share q right: the best confidence is q, so 2a/T = log(q/(1−q))."
    a, q = 3., .8
    z = np.tile([a, -a], (10, 1))
    y = np.array([0]*8 + [1]*2)
    assert temperature(z, y) == pytest.approx(2*a/math.log(q/(1-q)), rel=1e-5)


def test_it_is_the_least_on_a_grid():
    z, y = sure()
    T = temperature(z, y)
    loss = lambda T: -log_softmax(z/T, 1)[np.arange(len(y)), y].mean()
    grid = np.linspace(.5, 10, 2001)
    best = grid[np.argmin([loss(t) for t in grid])]
    assert T == pytest.approx(best, abs=.006) and 2.4 < T < 3.6


def test_what_it_did_is_told():
    z, y = sure()
    c = calibrated(z, y)
    for i, T in enumerate((1., c.T)):
        p = softmax(z/T, 1)
        conf, right = p.max(1), p.argmax(1) == y
        b = np.minimum(np.ceil(conf*15).astype(int), 15)
        assert c.error[i] == pytest.approx(sum((b == k).mean()*abs(conf[b == k].mean()-right[b == k].mean()) for k in set(b)), abs=1e-6)
        assert c.log_loss[i] == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean())
    assert c.error[1] < c.error[0]/2 and 'too sure' in str(c) and 'no answer changes' in str(c)


def test_without_a_mistake_it_says_that_it_is_at_its_end():
    z, y = np.eye(3)[[0, 1, 2]*4], np.array([0, 1, 2]*4)
    c = calibrated(z, y)
    assert c.T == pytest.approx(1/20, rel=1e-3) and c.at_bound and 'T IS AT THE END OF ITS RANGE' in str(c)


@pytest.mark.parametrize('z, y, said', [(np.zeros((0, 3)), [], 'got'), (np.zeros((4, 3)), [0], 'got'), ([[math.nan, 0]], [0], 'not finite')])
def test_what_cannot_be_fitted_is_refused(z, y, said):
    with pytest.raises(BadValue, match=said): temperature(z, y)


def test_it_is_in_the_last_layer_and_the_answers_stay(toy):
    learn = toy(model=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    learn.fit(2, .05)
    xb = learn.dls.valid.one_batch()[0]
    before, names = learn.model(xb).detach(), list(learn.model.state_dict())
    z = torch.cat([learn.model(x).detach() for x, _ in learn.dls.valid])
    y = torch.cat([y for _, y in learn.dls.valid])
    c = learn.calibrate()
    assert c.T == pytest.approx(temperature(z, y), rel=1e-6) and learn.calibration == c and c.n == 64
    assert torch.allclose(learn.model(xb), before/c.T, atol=1e-5) and (learn.model(xb).argmax(1) == before.argmax(1)).all()
    assert list(learn.model.state_dict()) == names and learn.validate()[0] == pytest.approx(c.log_loss[1], rel=1e-5)
    assert float(F.cross_entropy(z/c.T, y)) == pytest.approx(c.log_loss[1], rel=1e-5)
    again = learn.calibrate()
    assert again.T == pytest.approx(1, abs=1e-3) and learn.calibration.T == pytest.approx(c.T, rel=1e-2)


class Twice(nn.Module):
    "The last layer has a share elsewhere: scaling it does more than divide the outputs."
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
    def forward(self, x): return self.a(self.a(x).relu())


@pytest.mark.parametrize('model', [Twice(), nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))])
def test_where_the_last_layer_cannot_hold_it_a_layer_of_its_own_does(toy, model):
    learn = toy(c=5, model=model, labels=[i % 3 for i in range(64)])
    learn.model.eval()
    xb = learn.dls.valid.one_batch()[0]
    weights, before = [p.clone() for p in model.parameters()], learn.model(xb).detach()
    c = learn.calibrate()
    assert isinstance(learn.model, Tempered) and torch.allclose(learn.model.eval()(xb), before/c.T, atol=1e-5)
    assert all(map(torch.equal, weights, model.parameters()))


def test_training_on_forgets_it(toy):
    learn = toy()
    learn.calibrate()
    learn.validate()
    assert 'calibration' in vars(learn)
    learn.fit(1)
    assert 'calibration' not in vars(learn)


def test_twice_it_tells_of_the_network_as_it_was_trained(learn):
    last = learn.model[-1]
    before = float(learn.validate()[0])
    once = learn.calibrate()
    with torch.no_grad(): last.weight.mul_(2), last.bias.mul_(2)           # as if it had been surer, not trained
    again, kept = learn.calibrate(), learn.calibration
    assert .06 < once.T < 19 and once.T != 1 and again.T == pytest.approx(2, rel=1e-3) and kept.T == pytest.approx(once.T*again.T)
    assert kept.log_loss == pytest.approx((_loss_at(learn, kept.T), float(learn.validate()[0])), rel=1e-4) and once.log_loss[0] == pytest.approx(before, rel=1e-4)
    assert again.log_loss[0] != pytest.approx(kept.log_loss[0], rel=1e-3)


def _loss_at(learn, T: float) -> float:
    "The mean log loss in validation were the outputs `T` times as large."
    z, y = learn.get_preds(act=lambda z: z)
    return float(F.cross_entropy(z*T, y))


def test_where_nothing_is_right_it_says_so():
    z = np.tile([5., 0., 0.], (20, 1))
    told = calibrated(z, np.ones(20, int))
    assert told.T > 19 and 'what it says has next to nothing to do with what is right' in str(told)


def test_it_is_shipped_exported_and_told_in_the_card(learn, tmp_path):
    before = learn.get_preds()[0]
    c = learn.calibrate()
    p = learn.get_preds()[0]
    assert torch.allclose(p, (before.log()/c.T).softmax(1), atol=1e-5) and (p.argmax(1) == before.argmax(1)).all()
    bundle = ship(learn, tmp_path/'b')
    assert np.abs(bundle.predictor().probabilities(learn.dls.valid.items)-p.numpy()).max() <= 1e-4
    card = json.loads((tmp_path/'b'/'bundle.json').read_text())
    assert card['calibration']['T'] == c.T and card['calibration']['error'] == list(c.error)
    from fastrecipes.production.export import export_learner
    again = load_learner(export_learner(learn, tmp_path/'l.pkl'))
    assert again.calibration == c and all(map(torch.equal, again.model.state_dict().values(), learn.model.state_dict().values()))


def test_what_it_is_not_for_is_refused(toy):
    with pytest.raises(BadValue, match='calibrate: needs a Learner trained by cross entropy'): toy(loss_func=nn.MSELoss()).calibrate()
    with pytest.raises(BadValue, match='no images are held out at ds_idx=2'): toy().calibrate(2)
    with pytest.raises(BadValue, match='no images are held out at ds_idx=0'): toy().calibrate(0)
