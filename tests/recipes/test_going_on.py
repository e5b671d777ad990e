"The whole pipeline killed in one stage after the other, and run again each time: it ends as the one that was never killed."
from dataclasses import replace

import pytest
import torch

from fastrecipes.data.samples import digits
from fastrecipes.production.timing import surely
from fastrecipes.recipes.classify import image_classifier
from fastrecipes.recipes.compress import compress
from fastrecipes.recipes.pipeline import pipeline

from .dying import killed

RECIPE = dict(arch='resnet18', student='resnet10t', prune=.5, tolerance=60., epochs=1, lr=3e-3, size=16, bs=32, pretrained=False, valid=.3, test=.2, augment=dict(flip=False))


@pytest.fixture
def data(tmp_path): return digits(tmp_path/'digits', imbalance=100)


def weights(learn): return list(learn.model.state_dict().values())


def test_a_pipeline_goes_on_at_the_stage_and_inside_it(data, tmp_path, monkeypatch, capsys):
    whole = pipeline(data, **RECIPE, out=str(tmp_path/'whole'))
    again = lambda: pipeline(data, **RECIPE, out=str(tmp_path/'run'))
    for name, n in (('1.pt', 3), ('2.pt', 2), ('3.pt', 2), ('4.pt', 3), ('journal.pt', 1)):   # recipe, plain fastai, student, pruned; timing the last stage
        killed(monkeypatch, again, name, n)
    capsys.readouterr()
    ended = again()

    assert 'going on from its last checkpoint' in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.learn), weights(ended.learn)))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.compressed.learn), weights(ended.compressed.learn))) and whole.compressed.onnx == ended.compressed.onnx
    assert [replace(r, seconds=None) for r in whole.rows] == [replace(r, seconds=None) for r in ended.rows]
    still = lambda stages: [replace(s, latency_ms=None, reason='') for s in stages]
    assert still(whole.compressed.stages) == still(ended.compressed.stages)
    assert (tmp_path/'whole'/'history.csv').read_text() == (tmp_path/'run'/'history.csv').read_text()
    assert not (tmp_path/'run'/'checkpoint').exists()


def test_what_was_measured_before_the_kill_is_not_measured_again(data, tmp_path, monkeypatch):
    "Which stages are kept depends on times, and times are not the same twice."
    learn = image_classifier(data, **{k: v for k, v in RECIPE.items() if k not in ('student', 'prune', 'tolerance')}, out=str(tmp_path/'float')) and str(tmp_path/'float')
    again = lambda: compress(learn, prune=.5, tolerance=60., epochs=1, lr=3e-3, out=str(tmp_path/'small'))
    killed(monkeypatch, again, 'journal.pt', 1)
    first = torch.load(tmp_path/'small'/'checkpoint'/'journal.pt', weights_only=False)
    kept = []
    monkeypatch.setattr('fastrecipes.production.gate.Gate._judge', lambda self, change, size, time: (kept.append(time), (True, ''))[1])
    again()
    assert kept[0] == surely(**first['times of one image 1'])


def test_images_that_changed_meanwhile_are_refused(data, tmp_path, monkeypatch):
    again = lambda: image_classifier(data, arch='resnet10t', epochs=1, lr=3e-3, size=16, bs=32, pretrained=False, out=str(tmp_path/'run'))
    killed(monkeypatch, again, '1.pt', 2)
    next((data/'0').iterdir()).unlink()
    with pytest.raises(ValueError, match='path: the images have changed since the run in .* began; add --overwrite'): again()
