"`learn.quantize` and what it measures with: on which samples, what it refuses, and a table as well as images."
import re

import numpy as np
import pytest
import torch
from fastai.basics import nn
from fastai.torch_core import TensorImage
from fasttransform import Transform

from fastrecipes.production.quantizing import calibration_batches
from fastrecipes.production.quantization import linear_share
from fastrecipes.production.quantized import network_graph
from fastrecipes.technique import discover

discover()


def test_calibration_is_on_training_images_as_validation_shows_them(make_learn):
    learn = make_learn(epochs=0)
    batches = calibration_batches(learn, 10, seed=1)
    train, valid = (torch.cat([b[0] for b in learn.dls.test_dl(list(dl.items))]).numpy() for dl in learn.dls.loaders[:2])
    got = np.concatenate([b[0] for b in batches])
    at = lambda one, many: np.flatnonzero((np.abs(many-one) < 1e-6).all((1, 2, 3)))
    assert len(got) == 10 and all(len(at(x, train)) == 1 and not len(at(x, valid)) for x in got)
    assert not np.array_equal(got, np.concatenate([b[0] for b in calibration_batches(learn, 10, seed=2)]))
    assert sum(len(b[0]) for b in calibration_batches(learn, 1000)) == len(learn.dls.train.dataset)


def test_calibration_leaves_out_what_only_training_does_to_images(make_learn):
    class Always(Transform):
        order = 100                             # behind the normalisation
        def encodes(self, x: TensorImage): return 0*x
    class Dark(Always): split_idx = 0           # as aug_transforms
    learn = make_learn(epochs=0)
    before = calibration_batches(learn, 10)
    learn.dls.add_tfms([Dark()], 'after_batch')
    learn.dls.train.after_batch.add(Always())   # as `augment`
    assert not learn.dls.train.one_batch()[0].any()
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(before, calibration_batches(learn, 10), strict=True))


def test_the_method_makes_a_learner_of_linear_layers_dynamic(toy):
    learn = toy(n=128, d=16, model=nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3)))
    learn.fit(2)
    q = learn.quantize('dynamic')
    assert q.model.told.share == 1 and q.model.told.kind == 'dynamic' and q.model.told.size_bytes[1] < q.model.told.size_bytes[0]
    p, r = learn.get_preds()[0], q.get_preds()[0]
    assert (p-r).abs().max() < .05 and q.validate()[1] == pytest.approx(q.model.told.accuracy[1].value)


def test_dynamic_is_refused_where_it_reaches_little_unless_forced(make_learn):
    learn = make_learn(epochs=0)
    learn.remove_cb(learn.progress)
    share = linear_share(network_graph(learn))
    assert share == pytest.approx(32*3/(32*3 + 8*3*9))
    with pytest.raises(ValueError, match=re.escape("'dynamic' reaches linear layers, and they hold 30.8% of this network's weights") + ".*call quantize.'static'.*force=True"):
        learn.quantize('dynamic')
    assert learn.quantize('dynamic', force=True).model.told.share == pytest.approx(share)


def test_dynamic_without_a_linear_layer_is_refused_even_where_forced(make_learn):
    learn = make_learn(model=nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), epochs=0)
    with pytest.raises(ValueError, match='no layer that can be quantized'): learn.quantize('dynamic', force=True)


@pytest.mark.parametrize('kind, kwargs, said', [
    ('statik', {}, "kind must be one of static, dynamic, qat, got 'statik'; did you mean 'static'"), ('static', dict(tolerance=-1), 'tolerance must be 0 to 100 points, got -1'),
    ('static', dict(calibration=0), 'calibration must be at least 1 sample, got 0'), ('qat', dict(epochs=0), 'epochs must be at least 1, got 0'),
    ('qat', dict(lr=0.), 'lr must be above 0, got 0.0'), ('qat', dict(schedule='flatcos'), "schedule must be one of constant.*got 'flatcos'; did you mean 'flat_cos'"),
    ('static', dict(epochs=3), "epochs=3 is for 'qat', and says nothing to 'static'"), ('dynamic', dict(calibration=9), "calibration=9 is for 'static' and 'qat'"),
    ('qat', dict(tolerance=1.), "tolerance=1.0 is for 'static'"), ('static', dict(force=True), "force=True is for 'dynamic'")])
def test_what_is_wrong_is_said_before_any_work(toy, kind, kwargs, said):
    learn = toy()
    learn.dls = None                            # nothing may be asked of it
    with pytest.raises(ValueError, match=f'^quantize: .*{said}'): learn.quantize(kind, **kwargs)


def test_without_validation_samples_it_is_refused(make_learn):
    from fastrecipes.production.export import export_learner
    from fastai.basics import load_learner
    learn = make_learn(epochs=0)
    loaded = load_learner(export_learner(learn, learn.path/'empty.pkl'))
    (learn.path/'empty.pkl').unlink()
    with pytest.raises(ValueError, match='^quantize: there is no training sample to show the network; set learn.dls to DataLoaders'): loaded.quantize()


def test_a_table_is_quantized_and_its_row_predicted():
    import pandas as pd
    from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(dict(kind=rng.choice(list('abc'), 120), x=rng.normal(size=120), z=rng.normal(size=120)))
    rows['y'] = np.where(rows.x+rows.z > 0, 'p', 'n')
    dls = TabularDataLoaders.from_df(rows, procs=[Categorify, Normalize], cat_names=['kind'], cont_names=['x', 'z'], y_names='y', valid_idx=list(range(90, 120)), bs=16)
    learn = tabular_learner(dls, layers=[32])
    learn.remove_cb(learn.progress)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    q = learn.quantize('dynamic')
    p, y = learn.get_preds()
    assert q.model.told.accuracy[0].value == pytest.approx(float((p.argmax(1) == y.flatten()).float().mean())) and q.model.told.share > .9
    assert torch.allclose(q.predict(rows.iloc[3])[2], learn.predict(rows.iloc[3])[2], atol=.05)
