"compress by targets, on a network small enough that every way is gone: what is cut, what is tried in which order, what is delivered, and a run that was killed."
import re

import pytest
import torch
from fastai.basics import Learner, accuracy, nn

from fastrecipes.data.folders import image_folder
from fastrecipes.data.keyed import keyed
from fastrecipes.production import search
from fastrecipes.production.slimming import widths
from fastrecipes.recipes import compressing
from fastrecipes.recipes.compress import compress
from fastrecipes.recipes.ship import ship
from fastrecipes.report.history import lines_unless_terminal

WAYS = ['original', 'prune {}, quantize (static)', 'prune {} in two steps, quantize (static)', 'prune {}, quantize (qat)', 'prune where it is felt least, quantize (static)']


@pytest.fixture(scope='module')
def learn(digit_folder):
    torch.manual_seed(0)
    dls = image_folder(digit_folder, size=16, bs=32, valid=.3, test=.2, seed=1, workers=0)
    def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    net = nn.Sequential(block(3, 32), block(32, 64), block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(dls.vocab)))
    learn = lines_unless_terminal(Learner(dls, net, metrics=accuracy), 'original')
    keyed(learn, 0)
    learn.fit_flat_cos(4, 5e-3)
    return learn


@pytest.fixture(scope='module')
def bounds(learn):
    "Megabytes in 8 bits: whole, and with half of the channels."
    work = compressing.Work(learn, None, 1, 1e-3, 42, {})
    gate = type('', (), dict(contract=compressing.input_contract(learn)))
    route = compressing.Route(gate, work, None, True, 'static', learn, '')
    return [route._cost(net)[0]/1e6 for net in (learn.model, route._everywhere(learn, .5))]


def test_the_least_cut_that_meets_the_size_is_delivered_and_shipped(learn, bounds, tmp_path):
    small = compress(learn, max_mb=bounds[1], tolerance=100., epochs=1, lr=1e-3)
    assert [s.kept for s in small.stages] == [True, True] and small.quantized and 'prune' in small.accepted.name
    assert small.accepted.size_bytes <= 1e6*bounds[1] and small.accepted.size_bytes > .6*1e6*bounds[1]
    assert widths(small.learn.model)[:3] == [16, 32, 64]                  # half is the least that will do
    assert 'within' in small.verdict and (ship(small, tmp_path/'b').path/'model.onnx').read_bytes() == small.onnx
    assert len(small.plot().axes) == 2


def test_nothing_is_cut_where_8_bits_are_enough(learn, bounds):
    small = compress(learn, max_mb=1.02*bounds[0], tolerance=100., epochs=1, lr=1e-3)
    assert [s.name for s in small.stages] == ['original', 'quantize (static)'] and small.learn is learn


@pytest.mark.parametrize('kwargs, why', [(dict(max_ms=1e-6), 'without 95% of its channels it has .* where 1e-06 ms an image are asked for'),
                                         (dict(max_mb=.001, prune=False), 'with all its channels it has')])
def test_what_cannot_be_met_is_told_and_the_network_stays(learn, kwargs, why):
    small = compress(learn, **kwargs, tolerance=100., epochs=1, lr=1e-3)
    (_, tried) = small.stages
    assert not tried.kept and re.search(why, tried.reason) and 'Nothing was kept' in small.verdict and small.targets and small.word(tried) == 'tried'


class Killed(BaseException): pass


def searched(learn, bounds, **kwargs): return compress(learn, max_mb=bounds[1], tolerance=0., epochs=1, lr=1e-6, seed=3, **kwargs)


def test_where_too_much_is_lost_every_way_is_tried_and_a_killed_search_goes_on(learn, bounds, tmp_path, monkeypatch):
    monkeypatch.setattr(search, 'HALVINGS', 2)
    whole = searched(learn, bounds, out=str(tmp_path/'whole'))
    share = whole.stages[1].name.split()[1].rstrip(',')
    assert [s.name for s in whole.stages] == [w.format(share) for w in WAYS]
    assert not any(s.kept for s in whole.stages[1:]) and whole.accepted is whole.original
    consider, met = compressing.Gate.consider, []
    def kill(gate, name, make):
        met.append(name)
        if len(met) == 3: raise Killed
        return consider(gate, name, make)
    monkeypatch.setattr(compressing.Gate, 'consider', kill)
    with pytest.raises(Killed): searched(learn, bounds, out=str(tmp_path/'killed'))
    monkeypatch.setattr(compressing.Gate, 'consider', consider)
    again = searched(learn, bounds, out=str(tmp_path/'killed'))
    told = [[(s.name, s.size_bytes, s.valid, s.change, s.test) for s in c.stages] for c in (whole, again)]
    assert told[0] == told[1]


def test_the_most_accurate_within_both_is_delivered_else_the_nearest_that_keeps_its_accuracy(learn):
    from fastrecipes.production.gate import Candidate, Considered, Gate, Stage, Targets
    from fastrecipes.report.intervals import Difference, Estimate
    def gate_of(*tried):
        gate = Gate.__new__(Gate)
        gate.targets, gate.tolerance, gate.stages = Targets(max_mb=1.), .5, [Stage('original', True, '')]
        for name, valid, excess, fine in tried: gate.stages.append(Stage(name, False, '', valid=Estimate(valid, valid, valid, 100), change=Difference(0., 0., 0., 100)))
        gate.choose([Considered(i+1, Candidate(name.encode(), ''), excess, fine) for i, (name, _, excess, fine) in enumerate(tried)])
        return [s.name for s in gate.stages if s.kept][-1]
    assert gate_of(('a', .90, .9, True), ('b', .95, 1., True), ('c', .99, 1.1, True), ('d', .98, .5, False)) == 'b'
    assert gate_of(('a', .90, 1.5, True), ('b', .95, 1.2, True), ('c', .99, .4, False)) == 'b'
    assert gate_of(('a', .90, .5, False)) == 'original'
