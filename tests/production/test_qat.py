"Training for 8 bits: what is rounded and how, what is learnt, and that the graph of integers is the network that was trained."
import copy

import numpy as np
import onnx
import pytest
import torch
from fastai.basics import nn
from fastai.callback.core import Callback
from onnx import numpy_helper

from fastrecipes.errors import BadValue
from fastrecipes.production.entries import two_samples
from fastrecipes.production.graphs import quiet
from fastrecipes.production.quantization import quantized_share
from fastrecipes.production.quantized import Quantized
from fastrecipes.production.quantizing import calibration_batches
from fastrecipes.technique import discover

with quiet('torch.utils._pytree'): from fastrecipes.production import qat
from fastrecipes.production.qat import fake_quantized, integer_graph, trained_for_8_bits

discover()


class Residual(nn.Module):
    "All that is asked for: convolutions with batch norm, a clip, a sum, a linear layer."
    def __init__(self, c=3):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(.3), nn.Linear(32, c)
    def forward(self, x):
        x = self.norm_a(self.a(x)).relu()
        x = (x+self.norm_b(self.b(x))).relu()
        return self.head(self.drop(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)))


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    net = Residual()
    for m in (net.norm_a, net.norm_b): m.running_mean.normal_(), m.running_var.uniform_(.5, 2), m.weight.data.uniform_(.5, 1.5)
    return net.eval()


@pytest.fixture(scope='module')
def x(): return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def made(net, x):
    "(the network that rounds, its graph of integers): for all that only read them."
    fake = fake_quantized(net, (x[:2],), [(x.numpy(),)])
    return fake, integer_graph(fake, (x[:2],))


@pytest.fixture
def fake(made): return copy.deepcopy(made[0])


@pytest.fixture
def graph(made): return made[1]


def held(graph): return {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(graph).graph.initializer}


def test_weights_are_rounded_per_channel_in_steps_of_their_largest_over_127(net, fake):
    folded = net.a.weight*(net.norm_a.weight/(net.norm_a.running_var + net.norm_a.eps).sqrt())[:, None, None, None]
    fq = fake.fakes(weights=True)[0]
    assert torch.allclose(fq.scale, folded.detach().abs().amax((1, 2, 3))/127, rtol=1e-5) and not fq.zero_point.any()
    step = fq.scale[:, None, None, None]
    assert torch.allclose(fq(folded), (folded/step).round().clamp(-127, 127)*step, atol=1e-6)


def test_activations_are_rounded_in_256_steps_of_the_range_seen_with_0_among_them(fake, x):
    fq = next(f for f in fake.fakes(weights=False) if f.activation_post_process.min_val == x.min())      # the input's
    lo, hi = float(x.min()), float(x.max())
    step = (hi-lo)/255
    assert float(fq.scale) == pytest.approx(step, rel=1e-5) and int(fq.zero_point) == round(-lo/step)
    z = int(fq.zero_point)
    assert torch.allclose(fq(x), ((x/step).round() + z).clamp(0, 255).sub(z)*step, atol=1e-5)


def test_what_is_rounded_is_what_integer_kernels_compute(fake):
    "Weights of three layers; the input, two ReLUs (one after the sum), the second norm, and what the head takes: no rounding within convolution, norm and ReLU."
    assert len(fake.fakes(weights=True)) == 3 and len(fake.fakes(weights=False)) == 5
    assert not [n for n in fake.net.graph.nodes if 'batch_norm' in str(n.target)]


def test_without_rounding_it_is_the_network(net, fake, x):
    for f in (*fake.fakes(True), *fake.fakes(False)): f.disable_fake_quant()
    with torch.no_grad(): assert torch.allclose(fake.eval()(x), net(x), atol=1e-4)


def test_validation_moves_no_range_and_training_does(fake, x):
    ranges = lambda: [(f.scale.clone(), f.zero_point.clone(), f.activation_post_process.max_val.clone()) for f in fake.fakes(weights=False)]
    same = lambda a, b: all(torch.equal(s, t) for one, other in zip(a, b) for s, t in zip(one, other))
    before = ranges()
    fake.eval()(10*x)
    assert same(before, ranges())
    fake.train()(10*x)
    assert not same(before, ranges())


def test_the_gradient_passes_straight_through_where_nothing_is_clipped(fake, x):
    fq = next(f for f in fake.fakes(weights=False) if f.activation_post_process.min_val == x.min())
    lo, hi, step = float(x.min()), float(x.max()), float(fq.scale)
    inside, outside = torch.linspace(lo+step, hi-step, 50, requires_grad=True), torch.tensor([2*lo, lo-step, hi+step, 2*hi], requires_grad=True)
    fake.eval()
    (3*fq(torch.cat([inside, outside]))).sum().backward()
    assert (inside.grad == 3).all() and (outside.grad == 0).all()


def test_the_graph_of_integers_holds_the_ranges_that_were_learnt_and_the_weights_as_they_are_now(fake, x):
    with torch.no_grad():
        for p in fake.parameters(): p.mul_(1.5)             # a last step, after which no batch has come
    graph = integer_graph(fake, (x[:2],))
    tensors = held(graph)
    scales = {np.float32(a) for n, a in tensors.items() if a.dtype == np.float32 and a.ndim == 0}
    assert {np.float32(f.scale.item()) for f in fake.fakes(weights=False)} <= scales
    int8 = [a for a in tensors.values() if a.dtype == np.int8 and a.ndim > 1]
    step = (fake.net.head.weight.detach().abs().amax(1)/127).numpy()
    assert any(a.shape == (3,) and a.dtype == np.float32 and np.allclose(a, step, rtol=1e-5) for a in tensors.values())
    assert len(int8) == 3 and all((np.abs(a.reshape(len(a), -1)).max(1) == 127).all() for a in int8) and quantized_share(graph) == 1


def test_the_graph_answers_as_the_network_that_was_trained_for_any_number_of_samples(fake, graph, x):
    net, graph = fake.eval(), Quantized(graph)
    for n in (1, 2, 32):
        with torch.no_grad(): a, b = net(x[:n]), graph(x[:n])
        assert (a-b).abs().max() < .03*a.abs().max() and (a.argmax(1) == b.argmax(1)).float().mean() > .96
    assert (graph(x)-b).abs().max() == 0


def test_onnxruntime_computes_its_layers_in_integers(graph, tmp_path):
    from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
    options = SessionOptions()
    options.optimized_model_filepath, options.graph_optimization_level = str(tmp_path/'o.onnx'), GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    InferenceSession(graph, options, providers=['CPUExecutionProvider'])
    kinds = [n.op_type for n in onnx.load(tmp_path/'o.onnx').graph.node]
    assert kinds.count('QLinearConv') == 2 and kinds.count('QLinearAdd') == 1 and kinds.count('QGemm') == 1 and not {'Conv', 'Gemm', 'Add', 'Relu'} & {*kinds}


def test_biases_are_int32_in_steps_of_input_times_weight(net, graph):
    tensors = held(graph)
    q, s = next((tensors[n], tensors[n.removesuffix('_q') + '_scale']) for n, a in tensors.items() if a.dtype == np.int32 and a.shape == (3,) and n.endswith('_bias_q'))
    assert np.abs(q*s - net.head.bias.detach().numpy()).max() <= s.max()/2 + 1e-9


def test_a_channel_of_zeros_does_not_spoil_its_bias(net, x):
    net = copy.deepcopy(net)
    with torch.no_grad(): net.a.weight[2], net.norm_a.bias[2] = 0., 40.         # 40 in steps of 1e-9 is more than 32 bits hold
    fake = fake_quantized(net, (x[:2],), [(x.numpy(),)]).eval()
    with torch.no_grad(): a, b = fake(x), Quantized(integer_graph(fake, (x[:2],)))(x)
    assert (a-b).abs().max() < .03*a.abs().max()


def test_it_trains_with_the_learners_loss_and_techniques_and_leaves_the_learner_alone(make_learn):
    learn = make_learn(model=Residual(), epochs=2)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    learn.label_smoothing(.1).dropconnect(.1).ema(.5)
    before, cbs, rng = copy.deepcopy(learn.model.state_dict()), list(learn.cbs), torch.get_rng_state()
    fake, graph = trained_for_8_bits(learn, calibration_batches(learn, 16), 1, 1e-3)
    assert list(qat._going_on(learn)) == ['label_smoothing', 'ema']
    assert all(torch.equal(a, b) for a, b in zip(before.values(), learn.model.state_dict().values())) and list(learn.cbs) == cbs and torch.equal(rng, torch.get_rng_state())
    again, same = trained_for_8_bits(learn, calibration_batches(learn, 16), 1, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(fake.parameters(), again.parameters())) and graph == same
    start = fake_quantized(learn.model, two_samples(learn), calibration_batches(learn, 16))
    assert not all(torch.equal(a, b) for a, b in zip(fake.parameters(), start.parameters()))


def test_no_validation_sample_is_seen_before_the_last_step(make_learn):
    "Ranges are of training batches: validation images ten times as bright move none of them."
    learn = make_learn(model=Residual(), epochs=0)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    plain, _ = trained_for_8_bits(learn, calibration_batches(learn, 16), 1, 1e-3)

    class Bright(Callback):
        def before_batch(self):
            if not self.training: self.learn.xb = tuple(10*x for x in self.learn.xb)
    made, fit_by = [], qat.fit_by

    def brightly(student, *args):
        student.add_cb(Bright())
        made.append(student)
        fit_by(student, *args)
    qat.fit_by = brightly
    try: bright, _ = trained_for_8_bits(learn, calibration_batches(learn, 16), 1, 1e-3)
    finally: qat.fit_by = fit_by
    assert made[0].recorder.values[-1][1] > 1 and all(torch.equal(a.scale, b.scale) for a, b in zip(plain.fakes(False), bright.fakes(False)))


def test_F2_pruned_weights_stay_0_through_training_and_are_0_in_int8(make_learn):
    learn = make_learn(model=Residual(), epochs=0)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    learn.prune(.9)
    zeros = [float((learn.model.get_submodule(n).weight == 0).float().mean()) for n in 'ab']
    _, graph = trained_for_8_bits(learn, calibration_batches(learn, 16), 2, 1e-2)
    weights = np.concatenate([a.flatten() for a in held(graph).values() if a.dtype == np.int8 and a.ndim > 1])
    assert (weights == 0).mean() > .89 and min(zeros) > .5


def test_F11_what_cannot_be_traced_raises_and_is_not_trained_in_float(make_learn):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(768, 3)
        def forward(self, x): return self.layer(x.flatten(1)) if x.sum() > 0 else -self.layer(x.flatten(1))
    learn = make_learn(model=Odd(), epochs=0)
    with pytest.raises(BadValue, match='torch cannot trace this network, so it cannot be trained for 8 bits'): fake_quantized(learn.model, two_samples(learn), [])
    with pytest.raises(BadValue, match='^quantize: torch cannot'): learn.quantize('qat')


def test_a_network_without_layers_is_refused():
    with pytest.raises(BadValue, match='no convolution and no linear layer'): fake_quantized(nn.BatchNorm1d(4), (torch.randn(2, 4),), [])


def test_the_method_gives_a_learner_and_tells_the_agreement(make_learn):
    learn = make_learn(model=Residual(), epochs=1)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    q = learn.quantize('qat', epochs=1, lr=1e-3, calibration=16)
    assert q.model.told.kind == 'qat' and q.model.told.agreement >= .98 and q.model.told.share == 1
    assert q.validate()[1] == pytest.approx(q.model.told.accuracy[1].value)


def test_a_graph_that_answers_otherwise_is_refused(make_learn, monkeypatch):
    learn = make_learn(model=Residual(), epochs=0)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    other = integer_graph(fake_quantized(Residual(), two_samples(learn), calibration_batches(learn, 16)), two_samples(learn))
    monkeypatch.setattr(qat, 'integer_graph', lambda *args: other)
    torch.manual_seed(3)
    with pytest.raises(BadValue, match='answers as the network that was trained on .* only, at least 98% is asked for'): learn.quantize('qat', epochs=1, lr=1e-2)
