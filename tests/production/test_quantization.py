"Eight bits: what is stored, how far the answers move, and that pruned weights stay 0."
import numpy as np
import onnx
import pytest
import torch
from fastai.basics import Learner, nn
from onnx import numpy_helper

from fastrecipes.data.folders import image_folder
from fastrecipes.production.export import graph_of, input_contract
from fastrecipes.production.predictor import Graph, batched, pixels_of
from fastrecipes.production.quantization import quantize_static, quantized_share
from fastrecipes.technique import discover

discover()


@pytest.fixture(scope='module')
def graph(shipped):
    "The small network of the shipped bundle, as a graph."
    return graph_of(shipped[0])


def pixels(n=64, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


def stored(graph): return {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(graph).graph.initializer}


def test_weights_are_int8_per_channel_and_activations_uint8(graph):
    q = quantize_static(graph, [pixels()])
    held = stored(q)
    weights = {name: a for name, a in held.items() if a.dtype == np.int8 and a.ndim > 1}
    assert len(weights) == 2 and quantized_share(graph) == 0
    assert sorted(held[n.removesuffix('_quantized') + '_scale'].size for n in weights) == [3, 8]        # an output channel each
    points = {a.dtype for n, a in held.items() if n.endswith('zero_point') and not n.startswith('model.')}
    assert points == {np.dtype(np.uint8)}


def test_the_share_counts_weights_by_their_numbers():
    t = lambda name, kind, *dims: onnx.helper.make_tensor(name, kind, dims, [1]*int(np.prod(dims)))
    kinds = onnx.TensorProto
    graph = onnx.helper.make_graph([], 'g', [], [], [t('a', kinds.INT8, 5, 6), t('b', kinds.FLOAT, 2, 5), t('bias', kinds.FLOAT, 50), t('zero', kinds.UINT8, 9)])
    assert quantized_share(onnx.helper.make_model(graph).SerializeToString()) == .75


def test_every_weight_is_within_half_a_step_of_its_own(graph):
    q, w = stored(quantize_static(graph, [pixels()])), stored(graph)
    for name, a in q.items():
        if a.dtype != np.int8 or a.ndim < 2: continue
        original = w[name.removesuffix('_quantized')]
        scale = q[name.removesuffix('_quantized') + '_scale']
        axis = int(np.argmax([s == scale.size for s in a.shape]))
        step = scale.reshape([-1 if i == axis else 1 for i in range(a.ndim)])
        assert (np.abs(a*step - original) <= step/2 + 1e-6).all()


def test_answers_move_little(graph):
    x = pixels(200, seed=1)
    a, b = Graph(graph)(x), Graph(quantize_static(graph, [pixels()]))(x)
    assert np.abs(a-b).max() < .05 and (a.argmax(1) == b.argmax(1)).mean() > .95


def test_probabilities_are_not_one_of_256_steps(graph):
    p = Graph(quantize_static(graph, [pixels()]))(pixels(100, seed=1))
    assert len(np.unique(p)) > 250 and np.allclose(p.sum(1), 1, atol=1e-5) and np.abs(p*255 - np.rint(p*255)).max() > .2


@pytest.mark.parametrize('kind, over', [('zca', 'pixels'), ('pca', 'channels'), ('standardize', 'channels')])
def test_the_matrix_that_whitens_stays_in_32_bits_and_answers_move_little(digit_folder, kind, over):
    "In 8 bits a step of 1/255 in a faint direction comes out 300 times as large: of zca's answers here 7 in 100 were others."
    dls = image_folder(digit_folder, size=8, bs=32, valid=.3, test=0, workers=0, device=torch.device('cpu'))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    learn = Learner(dls, net).normalize(kind, over)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 3e-3)
    graph, contract = graph_of(learn), input_contract(learn)
    train, valid = (np.concatenate(list(batched(list(dl.items), lambda f: pixels_of(f, contract)))) for dl in learn.dls.loaders[:2])
    made = quantize_static(graph, [train[:128]])
    a, b = Graph(graph)(valid), Graph(made)(valid)
    assert (a.argmax(1) == b.argmax(1)).mean() > .96            # where a processor has no VNNI, sums of bytes saturate: .977 on one of those
    held = stored(made)
    assert {n for n, t in held.items() if t.dtype == np.int8 and t.ndim > 1} == {f'model.{i}.weight_quantized' for i in (0, 2, 5)}
    if over == 'pixels': assert np.array_equal(held['normalize.factor'], stored(graph)['normalize.factor']) and held['normalize.factor'].shape == (192, 192)


def test_the_labels_and_the_input_go_with_it(graph):
    assert Graph(quantize_static(graph, [pixels()])).metadata == Graph(graph).metadata


def test_F2_pruned_weights_are_still_0_in_8_bits(make_learn):
    learn = make_learn(epochs=0)
    learn.prune(.9)
    learn.remove_cb(learn.progress)
    learn.fit(1)
    q = stored(quantize_static(graph_of(learn), [pixels()]))
    weights = np.concatenate([a.flatten() for a in q.values() if a.dtype == np.int8 and a.ndim > 1])
    assert (weights == 0).mean() > .89


def test_a_graph_without_layers_is_refused(make_learn):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
        def forward(self, x): return x.mean((2, 3))*self.scale
    with pytest.raises(ValueError, match='quantize: this graph has no layer that can be quantized'):
        quantize_static(graph_of(make_learn(model=Mean(), epochs=0)), [pixels()])


def test_a_thread_more_or_less_changes_nothing(graph):
    q = quantize_static(graph, [pixels()])
    assert np.array_equal(Graph(q, 1)(pixels(8)), Graph(q, 2)(pixels(8))) and torch.get_num_threads() > 0
