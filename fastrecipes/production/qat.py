"Quantization-aware training: the network meets the rounding to 8 bits while it can still adapt, and takes the ranges that it learnt with it."
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import onnx
import torch
from fastai.basics import Learner, nn, trainable_params
from fastai.callback.progress import ProgressCallback
from fastai.data.core import TfmdDL
from onnx import numpy_helper
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import FakeQuantize, MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from fastrecipes.data.keyed import keyed, with_train
from fastrecipes.errors import BadValue
from fastrecipes.files import writes
from fastrecipes.production.entries import two_samples
from fastrecipes.production.graphs import any_number, as_onnx, own_bytes, reason
from fastrecipes.production.pruning import Prune
from fastrecipes.randomness import forked
from fastrecipes.technique import TECHNIQUES, applied
from fastrecipes.training.precision import device_of
from fastrecipes.training.schedules import fit_by

__all__ = ['FakeQuantized', 'fake_quantized', 'integer_graph', 'trained_for_8_bits']

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
CLIPS = (aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default, aten.clamp.default)
ADDS = (aten.add.Tensor, aten.add_.Tensor)
LEFT_OUT = ('compile', 'to_channelslast', 'to_fp32')    # of the techniques: what they make of a network is not for one that is traced already


def _spec(observer, dtype, lo: int, hi: int, qscheme, **kwargs) -> QuantizationSpec:
    how = dict(quant_min=lo, quant_max=hi, dtype=dtype, qscheme=qscheme, **({'ch_axis': kwargs['ch_axis']} if 'ch_axis' in kwargs else {}))
    return QuantizationSpec(is_dynamic=False, observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=observer, **{**how, **kwargs}), **how)


# what onnxruntime computes fastest on x86: uint8 activations by int8 weights; −127…127, so that 0 is 0 and a sign can be changed
ACTIVATION = _spec(MovingAverageMinMaxObserver, torch.uint8, 0, 255, torch.per_tensor_affine)
WEIGHT = _spec(MovingAveragePerChannelMinMaxObserver, torch.int8, -127, 127, torch.per_channel_symmetric, ch_axis=0, averaging_constant=1.)    # of 1: the weights as they are


class U8S8(Quantizer):
    """Ask for 8 bits where onnxruntime has integer kernels: inputs and weights of convolutions and linear layers, sums of two activations, and what these give.

    What a convolution or a sum gives is rounded after the clip (ReLU, ReLU6) that follows it, as one integer kernel does all three."""
    def annotate(self, model: GraphModule) -> GraphModule:
        for n in model.graph.nodes:
            if n.op != 'call_function': continue
            if n.target in CONVOLUTIONS or n.target is aten.linear.default:
                if n.args[1].op != 'get_attr': continue
                self._ask(n, {n.args[0]: ACTIVATION, n.args[1]: WEIGHT})
            elif n.target in ADDS and all(map(_is_activation, n.args[:2])): self._ask(n, {a: ACTIVATION for a in n.args[:2]})
            else: continue
            if n.target is not aten.linear.default: self._ask(_last(n), output=ACTIVATION)
        return model

    def validate(self, model): pass

    @staticmethod
    def _ask(n: Node, inputs: dict | None = None, output: QuantizationSpec | None = None):
        a = n.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation(_annotated=True))
        if inputs: a.input_qspec_map.update(inputs)
        if output: a.output_qspec = output


def _is_activation(a) -> bool:
    return isinstance(a, Node) and a.op == 'call_function' and isinstance(v := a.meta.get('val'), torch.Tensor) and v.is_floating_point() and v.ndim > 1


def _last(n: Node) -> Node:
    "The last node of those that one integer kernel computes with `n`."
    while len(n.users) == 1 and (u := next(iter(n.users))).target in CLIPS: n = u
    return n


class FakeQuantized(nn.Module):
    """A traced network, batch norms folded, that rounds weights and activations as 8 bits do, with the gradient passed straight through (arXiv:1712.05877).

    Training follows the range of each activation by a moving average; evaluation leaves them alone. The range of a weight is always its own. Made by `fake_quantized`."""
    def __init__(self, net: GraphModule):
        super().__init__()
        self.net = net

    def forward(self, *xb): return self.net(*xb)

    def train(self, mode: bool = True):
        self.training = mode                            # what is traced is the network in evaluation mode
        for fq in self.fakes(weights=False): fq.enable_observer(mode)
        return self

    def fakes(self, weights: bool) -> list[FakeQuantize]:
        "Those that round weights, or those that round activations."
        return [m for m in self.net.modules() if isinstance(m, FakeQuantize) and m.is_per_channel == weights]


def fake_quantized(model: nn.Module, xb: tuple[torch.Tensor, ...], batches: Sequence[tuple[np.ndarray, ...]]) -> FakeQuantized:
    """`model` as a network that rounds as 8 bits do, on the CPU; `model` stays as it is.

    `xb`: two samples of its inputs; `batches`: those of training samples that ranges begin with. Dropout and the like are traced as in evaluation, and so are
    batch norms: folded into the convolution before them, or with the statistics that they have. Raises `ValueError` where torch cannot trace
    it (control flow that depends on the data, say), and where it has no layer that can be quantized."""
    net = deepcopy(model).cpu().float().eval().requires_grad_(True)
    try: traced = torch.export.export(net, xb, dynamic_shapes=any_number(net, xb)).module(check_guards=False)
    except Exception as e:      # a tracer meets whatever people write
        raise BadValue(f"quantize: torch cannot trace this network, so it cannot be trained for 8 bits ({reason(e)}); call quantize('static')") from e
    made = FakeQuantized(prepare_pt2e(traced, U8S8()))
    if not made.fakes(weights=True): raise BadValue('quantize: this network has no convolution and no linear layer that can be quantized')
    made.train()
    with torch.no_grad():
        for b in batches: made(*map(torch.from_numpy, b))
    return made


def integer_graph(fake: FakeQuantized, xb: tuple[torch.Tensor, ...]) -> bytes:
    "What `fake` has learnt as an ONNX graph of integers: its weights in int8, its ranges, QuantizeLinear and DequantizeLinear where it rounds; `fake` stays as it is."
    net = deepcopy(fake).cpu().eval()
    with torch.no_grad(): net(*xb)                      # the ranges of the weights after the last step
    proto = as_onnx(convert_pt2e(net.net), xb)
    _integer_biases(proto)
    own_bytes(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def _integer_biases(model: onnx.ModelProto):
    "Biases of layers in 8 bits as int32 in steps of input times weight, which is what integer kernels add; they stay in float where that is too many steps."
    g = model.graph
    held, made = {t.name: t for t in g.initializer}, {o: n for n in g.node for o in n.output}
    array = lambda name: numpy_helper.to_array(held[name])
    for n in list(g.node):
        if n.op_type not in ('Conv', 'Gemm') or len(n.input) < 3 or n.input[2] not in held: continue
        x, w = (made.get(i) for i in n.input[:2])
        if any(d is None or d.op_type != 'DequantizeLinear' for d in (x, w)) or w.input[0] not in held: continue
        scale = np.atleast_1d(array(w.input[1])).astype(np.float32).copy()
        if scale.size == len(array(w.input[0])):
            scale[~array(w.input[0]).reshape(scale.size, -1).any(1)] = 1.       # a channel of zeros has a scale of no meaning, too small to divide a bias by
        steps = array(x.input[1]).astype(np.float32)*scale
        q = np.rint(array(n.input[2])/steps.astype(np.float64))
        if np.abs(q).max() > 2**31-1: continue
        new = {'_weight_scale': scale.reshape(array(w.input[1]).shape), '_q': q.astype(np.int32), '_scale': steps.astype(np.float32), '_zero': np.zeros(steps.shape, np.int32)}
        name = n.output[0] + '_bias'
        g.initializer.extend(numpy_helper.from_array(a, name + k) for k, a in new.items())
        w.input[1] = name + '_weight_scale'
        d = onnx.helper.make_node('DequantizeLinear', [name + '_q', name + '_scale', name + '_zero'], [name], name=name, **({'axis': 0} if steps.ndim else {}))
        g.node.insert(list(g.node).index(n), d)
        n.input[2] = name
    used = {i for n in g.node for i in n.input} | {o.name for o in g.output}
    kept = [t for t in g.initializer if t.name in used]
    del g.initializer[:]
    g.initializer.extend(kept)


def trained_for_8_bits(learn: Learner, batches: Sequence[tuple[np.ndarray, ...]], epochs: int = 2, lr: float | None = None, schedule: str = 'flat_cos',
                       seed: int = 42) -> tuple[FakeQuantized, bytes]:
    """The network of `learn` after `epochs` (≥ 1) more in which it rounds as 8 bits do, and its graph of integers; `learn` stays as it is.

    It is trained on the data of `learn`, with its loss, optimizer, weight decay and those of its techniques that act on batches, targets, loss and gradient, at a
    rate of `lr` > 0 (default: a tenth of the Learner's) by `schedule`. Weights that `prune` set to 0 stay 0. `batches`: what ranges begin with.
    Draws depend on `seed` alone, and no random stream of the caller moves. Raises `ValueError` as `fake_quantized` does."""
    with forked(seed, 'quantization-aware training'):
        xb = two_samples(learn)
        net = fake_quantized(learn.model, xb, batches)
        student = _student(learn, net, seed)
        rate = float(np.max(learn.lr.stop if isinstance(learn.lr, slice) else learn.lr))/10 if lr is None else lr
        fit_by(student, schedule, epochs, rate)
        net = net.cpu().eval()
        return net, integer_graph(net, xb)


def _student(learn: Learner, net: FakeQuantized, seed: int) -> Learner:
    "A Learner that trains `net` as `learn` trained its own network."
    dls = with_train(learn.dls, learn.dls.train.new()) if isinstance(learn.dls.train, TfmdDL) else learn.dls        # a loader counts its epochs
    student = Learner(dls, net.to(device_of(learn)), learn.loss_func, opt_func=learn.opt_func, splitter=trainable_params, metrics=list(learn.metrics),
                      path=learn.path, model_dir=learn.model_dir, wd=learn.wd, wd_bn_bias=learn.wd_bn_bias, moms=learn.moms)
    if not any(isinstance(cb, ProgressCallback) for cb in learn.cbs): student.remove_cb(ProgressCallback)
    student.logger = learn.logger
    keyed(student, seed)
    student.use(**_going_on(learn))
    if masks := _masks(learn, net): student.add_cb(Prune(masks))
    return student


def _going_on(learn: Learner) -> dict[str, dict]:
    "The techniques that have their say in this training too: not where they change the network, its precision or its place, which are settled."
    known = {n: a.arguments for n, a in applied(learn).items() if n in TECHNIQUES and TECHNIQUES[n].stage in ('loss', 'optim', 'train')}
    on = {n: args for n, args in known.items() if n not in LEFT_OUT and not {'model', 'precision', 'inference'} & {*TECHNIQUES[n].touches}}
    lost = [n for n, args in on.items() if any(isinstance(v, str) and v.startswith('<') for v in args.values())]        # as export keeps what it cannot pickle
    if lost and writes(): print(f'quantize: without {", ".join(lost)}, whose arguments an exported Learner does not hold')
    return {n: args for n, args in on.items() if n not in lost}


def _masks(learn: Learner, net: FakeQuantized) -> list[tuple[nn.Module, str, torch.Tensor]]:
    "What is to stay 0: the zeros of a network that was pruned."
    if 'prune' not in learn.techniques and not any(isinstance(cb, Prune) for cb in learn.cbs): return []
    named = [(net.get_submodule(n.rpartition('.')[0]), n.rpartition('.')[2], p) for n, p in net.named_parameters()]
    return [(m, name, p.detach() != 0) for m, name, p in named if p.ndim > 1 and bool((p == 0).any())]
