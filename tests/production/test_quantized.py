"A Learner in 8 bits is a Learner: it validates, predicts, is exported and loaded, and says what was done to it."
import copy
import pickle

import numpy as np
import onnx
import pytest
import torch
from fastai.basics import Learner, load_learner, nn

from fastrecipes.errors import BadValue
from fastrecipes.production.bundle import answers
from fastrecipes.production.predictor import Graph
from fastrecipes.production.export import input_contract, labels
from fastrecipes.production.quantization import quantize_static, quantized_share
from fastrecipes.production.quantized import Quantization, Quantized, network_graph, pixels_graph, quantization_table
from fastrecipes.report.intervals import accuracy as interval, difference
from fastrecipes.technique import discover

discover()


@pytest.fixture(scope='module')
def pair(mixed_photos):
    "(the float Learner, the one in 8 bits)"
    from .conftest import fitted
    learn = fitted(mixed_photos)
    learn.remove_cb(learn.progress)
    return learn, learn.quantize(tolerance=100)


def test_F10_it_validates_predicts_and_shows_results(pair):
    learn, q = pair
    p, y = q.get_preds()
    loss, acc = q.validate()
    assert acc == pytest.approx(float((p.argmax(1) == y).float().mean())) and loss == pytest.approx(float(nn.functional.nll_loss(p.log(), y)), rel=1e-4)
    item = learn.dls.valid.items[3]
    assert torch.allclose(q.predict(item)[2], p[3], atol=1e-6) and q.predict(item)[0] == learn.dls.vocab[int(p[3].argmax())]
    q.show_results(max_n=2)


def test_F10_it_is_exported_and_loaded_with_the_same_answers(pair, tmp_path):
    _, q = pair
    q.export(tmp_path/'q.pkl')
    loaded, items = load_learner(tmp_path/'q.pkl'), q.dls.valid.items[:5]
    a, b = (o.get_preds(dl=o.dls.test_dl(items))[0] for o in (q, loaded))
    assert torch.equal(a, b) and len(q.dls.valid.items) and str(loaded.model.told) == str(q.model.told)
    with pytest.raises(ValueError, match='^fit: a network in 8 bits cannot be trained or changed'): loaded.fit(1)


def test_ours_exports_it_too(pair, tmp_path):
    from fastrecipes.production.export import export_learner
    q = pair[1]
    loaded = load_learner(export_learner(q, tmp_path/'q.pkl'))
    assert loaded.model.graph == q.model.graph


@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle', 'fit_flat_cos', 'fine_tune'])
def test_a_fit_is_refused_in_one_sentence(pair, fit):
    with pytest.raises(BadValue, match='^fit: a network in 8 bits cannot be trained or changed.*quantize'): getattr(pair[1], fit)(1)
    with pytest.raises(BadValue, match='^fit: '): pair[1].model.train()


def test_the_float_learner_stays_as_it_was(mixed_photos):
    from .conftest import fitted
    learn = fitted(mixed_photos, epochs=1)
    before, cbs, opt, rng = copy.deepcopy(learn.model.state_dict()), list(learn.cbs), learn.opt, torch.get_rng_state()
    learn.quantize(tolerance=100)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), learn.model.state_dict().values())) and list(learn.cbs) == cbs
    assert learn.opt is opt and torch.equal(rng, torch.get_rng_state()) and all(cb.learn is learn for cb in cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)


def test_the_float_graph_answers_as_the_network_does_and_for_any_number_of_samples(pair):
    learn = pair[0]
    net, model = Quantized(network_graph(learn)), learn.model.eval()
    for n in (1, 2, 7):
        x = torch.randn(n, 3, 16, 16)
        with torch.no_grad(): assert torch.allclose(net(x), model(x), atol=1e-5)


def test_it_can_be_pickled_copied_and_its_state_loaded(pair):
    net, x = pair[1].model, torch.randn(3, 3, 16, 16)
    expected = net(x)
    other = Quantized(network_graph(pair[0]))
    assert not torch.equal(other(x), expected)
    other.load_state_dict(net.state_dict())
    for o in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net), other): assert torch.equal(o(x), expected)
    assert sum(p.numel() for p in net.parameters()) == 0 and not net.training


def test_inputs_of_another_size_are_refused(pair):
    with pytest.raises(BadValue, match='inputs of n×3×16×16, got 2×3×20×16'): pair[1].model(torch.zeros(2, 3, 20, 16))
    with pytest.raises(BadValue, match='takes 1 inputs, got 2'): pair[1].model(torch.zeros(2, 3, 16, 16), torch.zeros(2))


def test_what_is_in_8_bits_is_not_quantized_again(pair):
    with pytest.raises(BadValue, match='in 8 bits already'): pair[1].quantize()


def test_what_is_served_is_the_same_graph_between_pixels_and_probabilities(pair):
    learn, q = pair
    graph, contract = pixels_graph(q), input_contract(learn)
    items = list(learn.dls.valid.items)
    p, _ = q.get_preds()
    got = answers(Graph(graph), items, contract)
    assert np.abs(got-p.numpy()).max() < .02 and (got.argmax(1) == p.argmax(1).numpy()).mean() > .9    # a pixel's last float bit may round to another of 256 steps
    ours, theirs = ([t.raw_data for t in onnx.load_from_string(g).graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1] for g in (q.model.graph, graph))
    assert np.median(np.abs(got-p.numpy())) < 1e-6 and ours == theirs and len(ours) == 2
    session = Graph(graph)
    assert session.input == 'pixels' and session.session.get_outputs()[0].name == 'probabilities'
    assert session.metadata['labels'] == '["blue", "green", "red"]' and labels(q) == ['blue', 'green', 'red'] and 'size' in session.metadata['input']
    assert session(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 3) and np.allclose(got.sum(1), 1, atol=1e-5)


def test_what_it_says_is_what_was_measured(pair):
    learn, q = pair
    told, (p0, y), (p1, _) = q.model.told, learn.get_preds(), q.get_preds()
    a, b = (interval(y.numpy(), p.argmax(1).numpy()) for p in (p0, p1))
    assert told.accuracy == (a, b) and told.change == difference(y.numpy(), p1.argmax(1).numpy(), p0.argmax(1).numpy())
    assert told.size_bytes == (len(network_graph(learn)), len(q.model.graph)) and told.share == quantized_share(q.model.graph)


def test_slower_is_said():
    e = interval([0, 1], [0, 1])
    said = lambda *ms: str(Quantization('dynamic', .5, (2000, 1000), ms, (e, e), difference([0, 1], [0, 1], [0, 1])))
    assert 'SLOWER, 1.61 times the time' in said(1., 1.61) and '2.0 times as fast' in said(1., .5) and 'no faster' in said(1., 1.01)
    assert '50.0 % of the weights in 8 bits; 2 → 1 kB; accuracy 100.0 % → 100.0 %' in said(1., 1.)


def test_the_table_has_a_line_for_each_and_one_for_the_float_network(pair):
    lines = quantization_table(pair[1], pair[1]).split('\n')
    assert len(lines) == 4 and lines[1].startswith('float   0.0 %') and lines[2].startswith('static  100.0 %') and f'{pair[1].model.told.latency_ms[1]:.3g} ms' in lines[3]


def test_a_learner_of_numbers_with_two_inputs_and_without_classes(toy):
    "Two inputs, a regression: judged by its loss."
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 1)
        def forward(self, x, z): return self.b((self.a(x)+z[:, None].float()).relu())[:, 0]

    from fastai.data.core import DataLoaders
    g = torch.Generator().manual_seed(0)
    ds = [(torch.randn(4, generator=g), torch.tensor(i % 3), torch.randn((), generator=g)) for i in range(40)]
    dls = DataLoaders.from_dsets(ds, ds[:17], bs=8, device=torch.device('cpu'), num_workers=0)
    dls.n_inp = 2
    learn = Learner(dls, Net(), nn.MSELoss())
    q = learn.quantize(tolerance=100)
    told, ((_, y), (p1, _)) = q.model.told, (learn.get_preds(), q.get_preds())
    assert told.accuracy is None and told.loss[1] == pytest.approx(float(nn.functional.mse_loss(p1, y)), rel=1e-4) and 'validation loss' in str(told)
    assert torch.allclose(p1, learn.get_preds()[0], atol=.1) and q.validate()[0] == pytest.approx(told.loss[1], rel=1e-4)


def test_a_graph_that_torch_cannot_write_is_refused(toy):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
        def forward(self, x): return self.layer(x) if x.sum() > 0 else -self.layer(x)
    with pytest.raises(BadValue, match='quantize: torch cannot write this network as ONNX'): toy(model=Odd()).quantize()


def test_an_int8_linear_layer_answers_as_the_formula_says(toy):
    "y = s_x·s_w·Σ(q_x−z)·q_w + b, with q by hand."
    learn = toy(d=5)
    graph = network_graph(learn)
    x = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    q = quantize_static(graph, [x])
    got = Quantized(q)(torch.from_numpy(x)).numpy()
    w, b = (p.detach().numpy().astype(np.float64) for p in learn.model.parameters())
    lo, hi = min(0., x.min()), max(0., x.max())
    s_x = (hi-lo)/255
    z = np.rint(-lo/s_x)
    s_w = np.abs(w).max(1, keepdims=True)/127                   # a scale an output
    q_x, q_w = np.clip(np.rint(x/np.float32(s_x)) + z, 0, 255), np.rint(w/s_w)
    assert np.abs(q_w).max() == 127
    assert np.allclose(got, (q_x-z) @ q_w.T*s_x*s_w.T + np.rint(b/(s_x*s_w[:, 0]))*s_x*s_w[:, 0], atol=2e-4)


@pytest.mark.parametrize('call', [lambda q: q.slim(), lambda q: q.prune(), lambda q: q.use(label_smoothing=.1), lambda q: q.sensitivity(), lambda q: q.iterative_prune()])
def test_what_would_change_the_network_is_refused_with_who_to_turn_to(pair, call):
    with pytest.raises(BadValue, match=r'^\w+: a network in 8 bits cannot be trained or changed.*change the float Learner'): call(pair[1])
    assert dict(pair[1].techniques) == dict(pair[0].techniques)
