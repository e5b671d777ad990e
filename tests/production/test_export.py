"What leaves a Learner, and that the Learner is as it was: after success, and after every failure."
import tempfile
import threading
import warnings
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from fastai.basics import Callback, nn
from fastai.callback.progress import CSVLogger
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
from torch.nn import functional as F

from fastrecipes.data.statistics import KINDS, PixelMap
from fastrecipes.errors import BadValue
from fastrecipes.production.export import Served, activation_of, export_learner, input_contract, served
from fastrecipes.production.formats import to_onnx
from fastrecipes.production.graphs import as_onnx, compact
from fastrecipes.production.quantization import quantize_static
from fastrecipes.production.quantized import Quantized


def loaded(path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return load_learner(path)


def state(learn): return {k: v for k, v in vars(learn).items()}


def test_a_failed_export_leaves_the_learner_as_it_was(make_learn, tmp_path):
    "fastai's `export`, unmended, sets `dls` and `opt` aside and puts them back only where pickling succeeds; ours never touches them."
    model = make_learn().model
    model.lock = threading.Lock()               # cannot be pickled
    learn = make_learn(model=model)
    before, opt_state = state(learn), learn.opt.state_dict()
    with pytest.raises(TypeError, match='pickle'): export_learner(learn, tmp_path/'learner.pkl')
    assert state(learn) == before and len(learn.dls.train.items) and learn.opt.state_dict().keys() == opt_state.keys()
    assert list(tmp_path.iterdir()) == []
    learn.validate()

    opt = learn.opt
    with pytest.raises(TypeError, match='pickle'): learn.export(tmp_path/'theirs.pkl')
    assert learn.opt is opt and len(learn.dls.train_ds)


@pytest.mark.parametrize('ours', [True, False])
def test_fastai_2_8_12_a_csv_logger_cannot_be_exported(make_learn, tmp_path, ours):
    learn = make_learn(path=tmp_path, cbs=CSVLogger())
    cbs = list(learn.cbs)
    if ours: export_learner(learn, tmp_path/'learner.pkl')
    else: learn.export('learner.pkl')
    again = loaded(tmp_path/'learner.pkl')
    assert [type(cb).__name__ for cb in again.cbs] == ['TrainEvalCallback', 'Recorder', 'CastToTensor', 'ProgressCallback']
    assert list(learn.cbs) == cbs and all(cb.learn is learn for cb in cbs) and learn.csv_logger in cbs


def test_what_was_exported_predicts_the_same_and_holds_no_training(learn, tmp_path):
    with learn.no_bar(): expected = learn.get_preds()[0]
    opt, dls = learn.opt, learn.dls
    again = loaded(export_learner(learn, tmp_path/'new'/'learner.pkl'))
    assert learn.opt is opt and learn.dls is dls
    assert again.opt is None and len(again.dls.train_ds) == len(again.dls.valid_ds) == 0
    assert list(again.dls.vocab) == ['blue', 'green', 'red']
    with again.no_bar(): assert torch.allclose(again.get_preds(dl=again.dls.test_dl(list(learn.dls.valid.items)))[0], expected, atol=1e-6)


class Dies(Callback):
    def after_loss(self): raise RuntimeError('in the middle of a batch')


def test_a_learner_whose_fit_died_can_be_exported(learn, tmp_path):
    with pytest.raises(RuntimeError): learn.fit(1, cbs=Dies())
    with pytest.raises(RuntimeError): learn.fit(1, cbs=[CSVLogger(tmp_path/'history.csv'), Dies()])
    assert loaded(export_learner(learn, tmp_path/'learner.pkl')).cbs.attrgot('learn').unique().map(type) == [type(learn)]
    with learn.no_bar(), learn.no_logging(): learn.fit(1)


def test_a_failed_export_keeps_the_file_that_was_there(learn, tmp_path):
    export_learner(learn, p := tmp_path/'learner.pkl')
    before = p.read_bytes()
    learn.model.lock = threading.Lock()
    with pytest.raises(TypeError): export_learner(learn, p)
    assert p.read_bytes() == before and list(tmp_path.iterdir()) == [p]


def test_served_scales_normalises_and_gives_probabilities():
    "Pixels 51, 102, 255 are .2, .4, 1; less .5, over .25: −1.2, −.4, 2; the model passes each channel's mean."
    model = Served(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), lambda x: F.softmax(x, 1), PixelMap.standard([.5]*3, [.25]*3))
    pixels = torch.tensor([51, 102, 255], dtype=torch.uint8).expand(2, 5, 4, 3)
    e = np.exp([-1.2, -.4, 2.])
    assert np.allclose(model(pixels), [e/e.sum()]*2, atol=1e-6)


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), F.cross_entropy, CrossEntropyLossFlat(), FocalLossFlat()])
def test_losses_over_classes_end_in_a_softmax(loss):
    assert activation_of(loss)(torch.tensor([[0., np.log(3.)]])).numpy() == pytest.approx(np.array([[.25, .75]]))


def test_a_loss_that_knows_no_probabilities_is_refused():
    with pytest.raises(BadValue, match='MSELoss.*does not say how outputs become probabilities'): activation_of(nn.MSELoss())


@pytest.mark.parametrize('normalize, resize', [(True, 'crop'), (False, 'pad')])
def test_the_graph_gives_what_the_learner_gives_for_any_number_of_images(make_learn, tmp_path, normalize, resize):
    learn = make_learn(normalize=normalize, resize=resize)
    with learn.no_bar(): expected = learn.get_preds()[0].numpy()
    fit = learn.dls.valid.after_item.fs[0]
    pixels = np.stack([np.asarray(fit(learn.dls.valid_ds[i][0])) for i in range(len(learn.dls.valid_ds))])
    session = ort.InferenceSession(to_onnx(learn, tmp_path/'model.onnx'))
    for n in (1, 7, len(pixels)): assert np.abs(session.run(None, {'pixels': pixels[:n]})[0] - expected[:n]).max() < 1e-5


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('over', ['channels', 'pixels'])
def test_the_graph_normalises_as_the_learner_does(make_learn, tmp_path, kind, over):
    "Against the Learner's own answers, through its loaders; 21 images cannot whiten 768 pixels: their faint directions count 300-fold."
    learn = make_learn(epochs=0).normalize(kind, over)
    with learn.no_bar(): expected = learn.get_preds()[0].numpy()
    fit = learn.dls.valid.after_item.fs[0]
    pixels = np.stack([np.asarray(fit(learn.dls.valid_ds[i][0])) for i in range(len(learn.dls.valid_ds))])
    session = ort.InferenceSession(to_onnx(learn, tmp_path/'model.onnx'))
    for n in (1, 7, len(pixels)): assert np.abs(session.run(None, {'pixels': pixels[:n]})[0] - expected[:n]).max() < 1e-4
    matrix = [t for t in onnx.load(tmp_path/'model.onnx').graph.initializer if t.name == 'normalize.factor' and len(t.dims) == 2]
    assert [tuple(t.dims) for t in matrix] == ([(768, 768) if over == 'pixels' else (3, 3)] if kind in ('decorrelate', 'pca', 'zca') else [])


def test_the_file_holds_labels_and_input_and_no_paths_of_this_machine(learn, tmp_path):
    proto = onnx.load(to_onnx(learn, tmp_path/'model.onnx'))
    assert {p.key: p.value for p in proto.metadata_props} == {
        'labels': '["blue", "green", "red"]',
        'input': '{"size": [16, 16], "resize": "crop", "mode": "RGB", "dtype": "uint8", "layout": "NHWC", "pixels": "%s"}' % input_contract(learn)['pixels']}
    assert [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == ['n', 16, 16, 3]
    assert not any(n.metadata_props or n.doc_string for n in proto.graph.node)
    assert b'.py' not in proto.SerializeToString() and list(tmp_path.iterdir()) == [tmp_path/'model.onnx']


def test_export_leaves_mode_device_and_hooks_and_prints_nothing(learn, tmp_path, capfd, recwarn):
    learn.model.train()
    learn.model[1].eval()                       # as a frozen batch norm is
    hook = learn.model[0].register_forward_hook(lambda m, i, o: o)
    modes = [m.training for m in learn.model.modules()]
    weights = {k: v.clone() for k, v in learn.model.state_dict().items()}
    before, rng = [id(p) for p in learn.model.parameters()], torch.get_rng_state()
    to_onnx(learn, tmp_path/'model.onnx')
    assert [m.training for m in learn.model.modules()] == modes and all(p.requires_grad for p in learn.model.parameters())
    assert [id(p) for p in learn.model.parameters()] == before and list(learn.model[0]._forward_hooks) == [hook.id]
    assert all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items()) and torch.equal(torch.get_rng_state(), rng)
    assert capfd.readouterr() == ('', '') and not recwarn.list


def test_served_models_are_copies_in_32_bits_and_evaluation_mode(learn):
    learn.model.half().train()
    model = served(learn)
    assert not any(m.training for m in model.modules()) and all(m.training for m in learn.model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32} and {p.dtype for p in learn.model.parameters()} == {torch.float16}


class Branches(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x) if x.sum() > 0 else -self.net(x)


def test_a_model_that_cannot_become_a_graph_is_one_sentence(learn, tmp_path):
    learn.model = Branches(learn.model)
    with pytest.raises(BadValue, match='^to_onnx: torch cannot write this network as ONNX: ') as e: to_onnx(learn, tmp_path/'model.onnx')
    assert '\n' not in str(e.value) and list(tmp_path.iterdir()) == []


def test_data_that_are_no_image_folder_are_refused(toy):
    with pytest.raises(BadValue, match='data made by image_folder'): input_contract(toy())


def residual():
    "A network in 8 bits with what a compact graph has to get right: shared zeros, biases, sums, a mean over height and width, layers that answer in float."
    torch.manual_seed(0)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc, self.answer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.answer(F.relu(self.fc((x + self.b(x)).mean((2, 3), keepdim=True).flatten(1))))
    net, x = Net().eval(), torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return net, x, as_onnx(net, (x[:2],)).SerializeToString()


def kinds(graph: bytes) -> Counter:
    "The kinds of nodes that onnxruntime makes of a graph."
    options = ort.SessionOptions()
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath, options.log_severity_level = f'{folder}/o.onnx', 3
        ort.InferenceSession(graph, options, providers=['CPUExecutionProvider'])
        return Counter(n.op_type for n in onnx.load(f'{folder}/o.onnx').graph.node)


def test_a_compact_graph_answers_bit_for_bit_and_is_run_by_the_same_kernels():
    net, x, floats = residual()
    for graph, most in ((floats, .9), (quantize_static(floats, [x.numpy()]), .6)):
        small = compact(graph)
        assert torch.equal(Quantized(small)(x), Quantized(graph)(x)) and kinds(small) == kinds(graph)
        one, other = (onnx.load_from_string(g).graph for g in (graph, small))
        assert len(small) < most*len(graph) and [(o.name, str(o.type)) for o in (*other.input, *other.output)] == [(o.name, str(o.type)) for o in (*one.input, *one.output)]
        assert compact(small) == small
    assert kinds(small)['QLinearConv'] == 2 and kinds(small)['QGemm'] == 2


def test_a_compact_graph_keeps_metadata_and_no_name_within_is_that_of_an_input():
    helper, f = onnx.helper, onnx.TensorProto.FLOAT
    value = lambda name: helper.make_tensor_value_info(name, f, [2])
    nodes = [helper.make_node('Add', ['0', 'one'], ['t']), helper.make_node('Add', ['t', 'same'], ['u']), helper.make_node('Mul', ['u', '1'], ['2'])]
    ones = [helper.make_tensor(name, f, [2], [1., 1.]) for name in ('one', 'same', 'unused')]
    model = helper.make_model(helper.make_graph(nodes, 'g', [value('0'), value('1')], [value('2')], ones), opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    helper.set_model_props(model, dict(labels='["a"]'))
    small = onnx.load_from_string(compact(model.SerializeToString()))
    assert [t.name for t in small.graph.initializer] == ['3'] and [(p.key, p.value) for p in small.metadata_props] == [('labels', '["a"]')]
    a, b = np.float32([1, 2]), np.float32([3, 4])
    assert ort.InferenceSession(small.SerializeToString()).run(None, {'0': a, '1': b})[0].tolist() == ((a+2)*b).tolist()


def test_a_graph_with_an_inner_graph_is_left_as_it_is():
    helper, f = onnx.helper, onnx.TensorProto.FLOAT
    out = helper.make_tensor_value_info('y', f, [1])
    branch = lambda name, v: helper.make_graph([helper.make_node('Add', ['x', name], [f'{name}y'])], name, [], [helper.make_tensor_value_info(f'{name}y', f, [1])],
                                               [helper.make_tensor(name, f, [1], [v])])
    node = helper.make_node('If', ['c'], ['y'], then_branch=branch('p', 1.), else_branch=branch('q', 2.))
    ins = [helper.make_tensor_value_info('x', f, [1]), helper.make_tensor_value_info('c', onnx.TensorProto.BOOL, [])]
    graph = helper.make_model(helper.make_graph([node], 'g', ins, [out]), opset_imports=[helper.make_opsetid('', 18)], ir_version=9).SerializeToString()
    assert compact(graph) == graph


@pytest.mark.parametrize('dims, keepdim, pools', [((2, 3), True, 1), ((-1, -2), True, 1), ((2, 3), False, 0), ((1, 2), True, 0), ((3,), True, 0)])
def test_a_mean_over_height_and_width_is_a_pooling_and_no_other_is(dims, keepdim, pools):
    class Mean(nn.Module):
        def forward(self, x): return x.mean(dims, keepdim=keepdim)
    x = torch.randn(2, 3, 5, 4)
    proto = as_onnx(Mean(), (x,))
    assert sum(n.op_type == 'GlobalAveragePool' for n in proto.graph.node) == pools and len(proto.graph.initializer) <= 1 - pools
    assert torch.allclose(Quantized(proto.SerializeToString())(x), x.mean(dims, keepdim=keepdim), atol=1e-6)
