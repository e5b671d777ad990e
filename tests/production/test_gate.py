"The gate on stages whose accuracy, size and speed are known."
import json

import numpy as np
import onnx
import pytest
import torch
from fastai.basics import nn

from fastrecipes.errors import BadValue
from fastrecipes.production.export import graph_of
from fastrecipes.production.gate import Candidate, Compressed, Gate, Stage
from fastrecipes.report.intervals import Difference, Estimate
from fastrecipes.report.run_folder import RunFolder


@pytest.fixture(scope='module')
def learn(shipped): return shipped[0]


@pytest.fixture
def gate(learn): return Gate(learn, tolerance=5.)


def padded(graph: bytes, extra: int) -> bytes:
    "The same graph with `extra` bytes that nothing reads."
    proto = onnx.load_from_string(graph)
    onnx.helper.set_model_props(proto, {**{p.key: p.value for p in proto.metadata_props}, 'ballast': 'x'*extra})
    return proto.SerializeToString()


def answering(learn, k: int) -> bytes:
    "A graph that always answers class k."
    class Always(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)
        def forward(self, x): return self.fc(x.mean((2, 3)))*0 + torch.eye(3)[k]*9
    model = learn.model
    learn.model = Always()
    try: return graph_of(learn)
    finally: learn.model = model


def test_the_original_is_measured_first(gate, learn):
    first = gate.stages[0]
    truth = np.array([learn.dls.vocab.o2i[f.parent.name] for f in learn.dls.valid.items])
    with learn.no_bar(): right = (learn.get_preds()[0].argmax(1).numpy() == truth).mean()
    assert first.name == 'original' and first.kept and first.valid.value == pytest.approx(right) and first.size_bytes == len(graph_of(learn))


def test_what_costs_too_much_is_rolled_back(gate, learn):
    before = gate.graph
    assert not gate.attempt('guess', lambda: Candidate(answering(learn, 0), 'answers blue', learn))
    stage = gate.stages[1]
    lost = stage.valid.value - gate.stages[0].valid.value
    assert not stage.kept and stage.change.value == pytest.approx(lost) and lost < -.05 and 'at most −5 is allowed' in stage.reason
    assert gate.graph is before and gate.learn is learn


def test_what_gains_nothing_is_rolled_back(gate, monkeypatch):
    "The same network a little bigger, timed by a clock as unsteady as that of a busy machine."
    rng = np.random.default_rng(0)
    monkeypatch.setattr('fastrecipes.production.gate.image_times', lambda runs, size: {name: rng.normal(1, .1, 30).tolist() for name in runs})
    assert not gate.attempt('ballast', lambda: Candidate(padded(gate.graph, 50_000), ''))
    assert 'neither smaller nor faster than before' in gate.stages[1].reason and gate.stages[1].change.value == 0


def test_what_costs_nothing_and_is_smaller_is_kept(learn):
    gate = Gate(learn, tolerance=0.)
    bare = gate.graph
    gate.graph = padded(bare, 50_000)
    assert gate.attempt('unpack', lambda: Candidate(bare, 'the ballast is gone', quantized=True))
    assert gate.graph is bare and gate.quantized and 'times smaller' in gate.stages[1].reason and gate.stages[1].proof == 'the ballast is gone'


def test_losses_do_not_add_up_from_stage_to_stage(gate, monkeypatch):
    "Each stage answers one more image wrongly. One of 21 is allowed, and two are not, whatever was lost by the stage before."
    original, truth, bare = gate.predicted, np.asarray(gate.sides['valid'][1]), gate.graph
    right = np.flatnonzero(original['valid'] == truth)
    def wrong(n): return original | {'valid': np.where(np.isin(np.arange(len(truth)), right[:n]), (truth+1) % 3, original['valid'])}
    told = iter([wrong(1), wrong(2)])
    monkeypatch.setattr(gate, '_predict', lambda graph: next(told))
    gate.graph = padded(bare, 100_000)
    assert gate.attempt('one', lambda: Candidate(padded(bare, 50_000), '')) and not gate.attempt('two', lambda: Candidate(bare, ''))
    assert [s.change.value for s in gate.stages[1:]] == pytest.approx([-1/21, -2/21]) and len(gate.graph) > len(bare)


@pytest.mark.parametrize('tolerance, kept', [(0., False), (4.7, False), (4.77, True)])
def test_the_tolerance_is_in_points_of_accuracy(learn, tolerance, kept):
    "One of 21 images is 4.76 points."
    gate = Gate(learn, tolerance)
    assert gate._judge(Difference(-1/21, -.2, .1, 21), .5, 1.)[0] is kept


def test_smaller_or_faster_has_to_be_seen(gate):
    same = Difference(0., -.1, .1, 21)
    assert not gate._judge(same, .99, .99)[0] and gate._judge(same, .97, 2.)[0] and gate._judge(same, 2., .5)[0]


def test_a_stage_that_cannot_be_made_is_a_row_and_not_the_end(gate):
    def make(): raise BadValue('prune: torch-pruning cannot cut this network')
    assert not gate.attempt('prune 50%', make)
    small = gate.compressed()
    assert [(s.name, s.kept, s.reason) for s in small.stages[1:]] == [('prune 50%', False, 'prune: torch-pruning cannot cut this network')]
    assert small.accepted is small.stages[0] and small.gains['smaller'] == 1 and not small.quantized
    assert 'prune 50%' in str(small) and 'rolled back: prune: torch-pruning cannot cut this network' in str(small)


def test_times_are_taken_beside_each_other(gate):
    small = gate.compressed()
    assert small.original.latency_ms > 0 and small.eager_ms > small.original.latency_ms      # a small network: eager torch is all overhead


def test_it_survives_a_run_folder(learn, tmp_path):
    stages = [Stage('original', True, 'came', valid=Estimate(.9, .8, .95, 21), size_bytes=400, latency_ms=2.),
              Stage('prune', True, 'smaller', 'half', Estimate(.9, .8, .95, 21), Difference(0., -.1, .1, 21), size_bytes=100, latency_ms=.5)]
    small = Compressed(learn, b'graph', stages, .5, 8., quantized=True)
    run = RunFolder.open('compress', dict(learn='runs/x'), tmp_path/'run')
    small.save(run)
    again = Compressed.load(learn, run.path)
    assert again == small and again.gains == dict(smaller=4., faster_than_torch=16., faster_than_onnx=4.)
    assert json.loads((run.path/'compressed.json').read_text())['stages'][1]['change']['value'] == 0


def test_what_is_slower_says_so_loudly(learn):
    stages = [Stage('original', True, 'came', size_bytes=400, latency_ms=2.), Stage('quantize', True, 'smaller', size_bytes=100, latency_ms=2.5)]
    assert Compressed(learn, b'graph', stages, .5, 5.).verdict == ('4.0 times smaller than the original as .onnx; SLOWER, 1.25 times the time of the original in onnxruntime, '
                                                                   '2.0 times as fast as in eager torch (5.00 ms)')


def test_a_graph_is_not_printed_byte_by_byte(learn):
    small = Compressed(learn, b'x'*12345, [], .5, 5.)
    assert repr(small.onnx) == str(small.onnx) == '<an ONNX graph of 12.3 kB>' and small.onnx == b'x'*12345


def test_a_learner_without_validation_images_is_refused(learn):
    dls = learn.dls
    learn.dls = dls.new_empty()
    try:
        with pytest.raises(BadValue, match='compress: there is no validation image'): Gate(learn, .5)
    finally: learn.dls = dls
