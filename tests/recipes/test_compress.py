"Compression end to end on real images: what each stage changed, what is shipped, and that a run can be taken up again."
import json

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import numpy_helper

from fastrecipes.cli import main
from fastrecipes.production.predictor import Graph, Predictor
from fastrecipes.production.slimming import widths
from fastrecipes.recipes.classify import image_classifier
from fastrecipes.recipes.compress import compress
from fastrecipes.recipes.ship import ship

RECIPE = dict(arch='resnet18', epochs=6, size=16, pretrained=False, lr=3e-3, bs=32, valid=.3, test=.2, augment=dict(flip=False, warp=.1), balance='upsampling')


@pytest.fixture(scope='module')
def run(digit_folder, tmp_path_factory):
    "The run folder of a trained classifier."
    out = tmp_path_factory.mktemp('compress')/'run'
    image_classifier(digit_folder, **RECIPE, out=str(out))
    return out


@pytest.fixture(scope='module')
def small(run):
    "All three stages, with a tolerance that lets them show what they do."
    return compress(str(run), 'resnet10t', prune=.5, tolerance=10., epochs=6, lr=3e-3, pretrained=False, out=str(run.parent/'small'))


def test_F1_every_stage_took_effect_in_what_is_delivered(small):
    "Pruned during quantization-aware training, the peer delivers the unpruned network and prints that it is pruned."
    original, distilled, pruned, quantized = small.stages
    assert all(s.kept for s in small.stages), str(small)
    assert original.size_bytes > 2*distilled.size_bytes > 4*pruned.size_bytes > 10*quantized.size_bytes
    held = [numpy_helper.to_array(t) for t in onnx.load_from_string(small.onnx).graph.initializer if len(t.dims) == 4 and np.prod(t.dims) > 3]     # but for the pixels' statistics
    convs = [tuple(m.weight.shape) for m in small.learn.model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sorted(w.shape for w in held) == sorted(convs) and max(widths(small.learn.model)) == 256             # resnet10t ends in 512 channels
    assert {w.dtype for w in held} == {np.dtype(np.int8)}


def test_it_keeps_most_of_the_accuracy(small):
    assert small.accepted.change.value >= -.10 and small.accepted.test.value > .8


def test_choices_are_made_on_validation_and_claims_on_test(small):
    loaders = small.learn.dls.loaders
    for stage in small.stages: assert (stage.valid.n, stage.test.n) == (len(loaders[1].items), len(loaders[2].items))
    assert all(s.change.n == len(loaders[1].items) for s in small.stages[1:])


def test_the_shipped_graph_is_the_accepted_one_and_answers_exactly_as_it(small, tmp_path):
    path, n = ship(small, tmp_path/'bundle').path, len(small.learn.dls.valid.items)
    assert (path/'model.onnx').read_bytes() == small.onnx
    card = json.loads((path/'bundle.json').read_text())
    assert card['parity'] == dict(n=n, agree=n, max_diff=0., versus='the accepted graph')
    assert [s['name'] for s in card['compression']] == ['original', 'distil to resnet10t', 'prune 50%', 'quantize (static)']
    pixels = np.stack([Predictor(path).pixels(f) for f in small.learn.dls.valid.items[:8]])
    assert np.array_equal(Predictor(path).run(pixels), Graph(small.onnx)(pixels))


def test_a_graph_further_from_the_original_than_allowed_is_not_shipped(small, tmp_path):
    from dataclasses import replace
    worse = replace(small.stages[-1], change=replace(small.stages[-1].change, value=-.2))
    with pytest.raises(ValueError, match='ship: the accepted graph is −20.0 points .* at most −10 is allowed'):
        ship(replace(small, stages=[*small.stages[:-1], worse]), tmp_path/'b')


def test_a_run_of_compress_is_shipped_as_what_it_accepted(small, run, tmp_path):
    folder = run.parent/'small'
    assert {p.name for p in folder.iterdir()} == {'recipe.yaml', 'provenance.json', 'history.csv', 'learner.pkl', 'report.html', 'bundle', 'compressed.json', 'compressed.onnx'}
    bundle = ship(str(folder), tmp_path/'again')
    assert (tmp_path/'again'/'model.onnx').read_bytes() == (folder/'bundle'/'model.onnx').read_bytes() == small.onnx and bundle.parity.max_diff == 0
    assert yaml.safe_load((folder/'recipe.yaml').read_text())['learn'] == str(run)


def test_the_report_shows_every_stage(run, small):
    page = (run.parent/'small'/'report.html').read_text()
    assert 'id="compression"' in page and all(s.name in page for s in small.stages) and page.count('<svg') >= 5


def test_what_costs_too_much_is_rolled_back_and_the_original_is_shipped(run, tmp_path):
    small = compress(str(run), prune=.9, quantize=False, tolerance=0., epochs=1, lr=1e-5)
    assert [s.kept for s in small.stages] == [True, False] and 'is allowed' in small.stages[1].reason
    assert str(small).endswith('Nothing was kept: the network is as it was')
    bundle = ship(small, tmp_path/'b')
    assert bundle.parity.versus == 'the Learner' and bundle.size_bytes == small.original.size_bytes


def test_the_techniques_of_the_original_train_the_student_too(run):
    from fastrecipes.data.keyed import KeyedDL
    small = compress(str(run), prune=.5, quantize=False, tolerance=100., epochs=1, lr=1e-3)
    assert {'label_smoothing', 'distill'} <= small.learn.techniques.keys()
    dl = small.learn.dls.train
    assert isinstance(dl, KeyedDL) and dl.sampler is not None and dl.n == 10*max(map(len, dl.sampler.members))


@pytest.mark.parametrize('kwargs, message', [
    (dict(prune=1.5), 'prune: a share of the channels between 0 and 1, or false, got 1.5'), (dict(quantize='int4'), "quantize: one of static, qat, dynamic, or false, got 'int4'"),
    (dict(tolerance=-1), 'tolerance: 0 to 100 points of accuracy, got -1'), (dict(student='resent18'), 'did you mean'),
    (dict(student='resnet18', epochs=0), 'epochs: at least 1'), (dict(epochs='two'), "epochs must be a whole number, got 'two'"),
    (dict(student='resent18'), '^student: neither timm nor'), (dict(prune=False, quantize=False), 'compress: student, prune and quantize are all off'),
    (dict(max_mb=0), 'max_mb: above 0, or none at all, got 0'), (dict(max_ms=1, minutes=0), 'minutes: above 0, got 0'), (dict(max_mb=1, prune=.4), 'prune: 1 MB are searched for'),
    (dict(max_mb=1, student='resnet10t', control=True), 'control: it is for a student by itself'), (dict(control=True), 'control: it trains the student without its teacher'),
    (dict(minutes=5.), 'minutes: the time of a search, and nothing is searched for; name max_mb or max_ms'), (dict(epoch=3), "compress: no argument 'epoch'; did you mean 'epochs'")])
def test_bad_arguments_are_refused_before_anything_is_read(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message): compress('nowhere', **kwargs)


def test_what_is_no_trained_classifier_is_refused(small, run):
    with pytest.raises(ValueError, match='learn: a fitted Learner or a run folder, got Compressed; what compress gave holds its Learner in .learn'): compress(small)
    with pytest.raises(ValueError, match='is the run to compress; name another folder'): compress(str(run), out=str(run), overwrite=True)
    with pytest.raises(FileNotFoundError, match='learner.pkl is a file; give the folder of the run'): compress(str(run/'learner.pkl'))


def test_a_compressed_run_starts_again_from_its_float_network_and_says_so(run, small, capsys):
    folder = run.parent/'small'
    again = compress(str(folder), prune=False, tolerance=20.)
    assert 'was compressed already: starting from its float network' in capsys.readouterr().out
    assert again.original.size_bytes == small.stages[2].size_bytes


def test_the_command_line_takes_it(run, tmp_path, capsys):
    assert main(['compress', str(run), '--prune', 'false', '--tolerance', '20', '--out', str(tmp_path/'c')]) == 0
    out = capsys.readouterr().out
    assert 'quantize (static)' in out and 'times smaller' in out
    assert main(['compress', str(run), '--quantize', 'int4']) == 2 and 'static' in capsys.readouterr().err
    assert main(['compress', 'nowhere']) == 2 and 'run: nowhere does not exist' in capsys.readouterr().err


def test_the_control_is_the_same_student_trained_as_long_without_a_teacher(run, tmp_path, monkeypatch):
    from fastrecipes.production.gate import Compressed
    from fastrecipes.recipes import compressing as module
    from fastrecipes.report.intervals import accuracy
    fits, train = [], module.train
    def watch(learn, epochs, *args, **kwargs):
        start = [p.detach().clone() for p in learn.model[0].parameters()]
        train(learn, epochs, *args, **kwargs)
        fits.append((learn, epochs, start))
    monkeypatch.setattr(module, 'train', watch)
    small = compress(str(run), 'resnet10t', prune=False, quantize=False, control=True, tolerance=100., epochs=1, lr=3e-3, pretrained=False, out=str(tmp_path/'small'))
    (student, n, a), (alone, m, b) = fits
    assert n == m and all(map(torch.equal, a, b)) and 'distill' in student.techniques and 'distill' not in alone.techniques
    assert student.techniques.keys() - {'distill'} == alone.techniques.keys()
    p, y = alone.get_preds(ds_idx=2)
    q, _ = student.get_preds(ds_idx=2)
    assert small.control.test.value == accuracy(y.numpy(), p.argmax(1).numpy()).value
    assert small.control.change.value == pytest.approx(float((q.argmax(1) == y).float().mean() - (p.argmax(1) == y).float().mean()), abs=1e-6)
    assert small.accepted.name == 'distil to resnet10t' and small.learn is student and 'control: the teacher gave' in str(small)
    assert Compressed.load(small.learn, tmp_path/'small').control == small.control and 'resnet10t alone' in (tmp_path/'small'/'report.html').read_text()
    with pytest.raises(ValueError, match='control: it trains the student without its teacher, and no student is named'): compress(str(run), control=True)
