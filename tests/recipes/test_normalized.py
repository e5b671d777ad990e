"Whitened pictures from a folder to a bundle, through compression, and taken up again."
import json

import numpy as np
import pytest
import torch

from fastrecipes.data.statistics import NormalizePixels, PixelMap, normalization_of
from fastrecipes.production.predictor import Predictor
from fastrecipes.recipes.classify import image_classifier
from fastrecipes.recipes.compress import compress
from fastrecipes.recipes.compressing import Work
from fastrecipes.recipes.ship import ship
from fastrecipes.report.run_folder import load_run
from fastrecipes.training.transfer import Backbone, backbone

RECIPE = dict(arch='resnet18', epochs=2, size=8, pretrained=False, lr=3e-3, bs=32, valid=.3, test=.2, augment=False, balance='upsampling')


@pytest.fixture(scope='module')
def run(digit_folder, tmp_path_factory):
    "The run folder of a classifier whose pictures are whitened by their 192 values."
    out = tmp_path_factory.mktemp('normalized')/'run'
    image_classifier(digit_folder, **RECIPE, normalize='zca', out=str(out))
    return out


@pytest.fixture
def learn(run): return load_run(run)


def test_the_recipe_leaves_one_normalisation_and_it_is_the_techniques(learn):
    for dl in learn.dls.loaders: assert [type(t).__name__ for t in dl.after_batch.fs if t.order == NormalizePixels.order] == ['NormalizePixels']
    x = torch.cat([x for x, _ in learn.dls.train.new(shuffle=False, drop_last=False, after_batch=learn.dls.valid.after_batch)]).flatten(1).numpy()
    values = np.linalg.eigvalsh(np.cov(x.T, bias=True))
    assert np.abs(values[-40:]-1).max() < 1e-2 and np.abs(values[:128]).max() < 1e-3            # grey pictures: 64 of 192 values are free


def test_a_run_that_is_taken_up_again_has_the_numbers_it_was_trained_with(run, learn):
    from fastai.learner import load_learner
    own, again = normalization_of(load_learner(run/'learner.pkl')), normalization_of(learn)
    assert own.factor.shape == (192, 192) and torch.equal(own.factor, again.factor) and torch.equal(own.shift, again.shift)


def test_the_bundle_answers_as_the_learner_does(learn, tmp_path):
    bundle = ship(learn, tmp_path/'bundle')
    n = len(learn.dls.valid.items)
    assert (bundle.parity.n, bundle.parity.agree) == (n, n) and bundle.parity.max_diff < 1e-4
    with learn.no_bar(): expected = learn.predict(learn.dls.valid.items[3])[2]
    assert np.allclose(Predictor(tmp_path/'bundle').probabilities([learn.dls.valid.items[3]])[0], expected, atol=1e-4)
    assert json.loads((tmp_path/'bundle'/'bundle.json').read_text())['metrics']['accuracy'] > .5        # 10 % is chance


def test_compression_keeps_it(run, tmp_path):
    small = compress(str(run), 'resnet10t', prune=.3, tolerance=20., epochs=2, lr=3e-3, pretrained=False, out=str(tmp_path/'small'))
    assert [s.kept for s in small.stages] == [True]*4, str(small)
    assert normalization_of(small.learn).same_as(normalization_of(load_run(run)))
    parity = json.loads((tmp_path/'small'/'bundle'/'bundle.json').read_text())['parity']
    assert parity['agree'] == parity['n'] and parity['max_diff'] == 0


def test_a_student_with_weights_of_its_own_sees_pixels_as_these_want_them(learn, monkeypatch):
    "The student's batches are normalised by its weights' statistics, and the teacher is asked about whitened ones."
    net = backbone('resnet10t', pretrained=False)
    net = Backbone(net.arch, net.body, net.n_features, net.pool, net.split, ((.5, .4, .3), (.2, .3, .4)))
    made = Work(learn, net, 1, 1e-3, 0, dict(teacher=learn, T=4., alpha=.9)).distilled()
    assert normalization_of(made).same_as(PixelMap.standard(*net.statistics)) and normalization_of(learn).factor.shape == (192, 192)
    teacher, x = made.distill_cb.teacher, made.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    with torch.no_grad(): assert torch.allclose(teacher(x), learn.model.eval()(learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)), atol=1e-2)
