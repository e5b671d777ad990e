"A graph in 8 bits: a quarter of the bytes, and the integer instructions that CPUs have for it."
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx
import torch
from fastai.basics import Learner, patch
from fastai.data.core import TfmdDL

from fastrecipes.data.loaders import in_order, unvaried
from fastrecipes.errors import BadValue, nearest
from fastrecipes.files import writes
from fastrecipes.objective import cross_entropy_of
from fastrecipes.production.export import compact
from fastrecipes.production.quantized import Quantization, Quantized, network_graph, quantized_learner, times_of_one, two_samples
from fastrecipes.randomness import forked, stream
from fastrecipes.report import intervals
from fastrecipes.training.schedules import SCHEDULES

__all__ = ['quantize_static', 'quantize_dynamic', 'quantize_within', 'quantized_share', 'linear_share', 'node_sensitivity', 'calibration_batches']

Kind = Literal['static', 'dynamic', 'qat']
LINEAR, LAYERS = ('MatMul', 'Gemm'), ('Conv', 'ConvTranspose', 'MatMul', 'Gemm')
EIGHT = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
PASSIVE = frozenset('Relu Clip Reshape Transpose Squeeze Unsqueeze Flatten Slice Gather MaxPool Split Concat Resize Pad Expand ArgMax DepthToSpace SpaceToDepth'.split())
AGREE = .98             # of the validation samples on which a graph must answer as the network that was trained for it


def quantize_static(graph: bytes, batches: Iterable, exclude: Sequence[str] = ()) -> bytes:
    """An ONNX graph with weights in int8 (per channel, symmetric) and activations in uint8, its ranges measured on `batches` of its input.

    Post-training static quantization of onnxruntime in QDQ form. Activations are uint8 because x86 multiplies u8 by s8: the same graph
    with int8 activations ran at a third of the speed. `batches`: about a hundred training samples, arrays, or tuples of them where it has
    several inputs. `exclude`: names of nodes that stay in float. Raises `ValueError` where no layer of it could be quantized."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    model = onnx.load_from_string(graph)

    class Reader(CalibrationDataReader):
        def __init__(self, names): self.feeds = iter([dict(zip(names, b if isinstance(b, tuple) else (b,))) for b in batches])
        def get_next(self): return next(self.feeds, None)

    with _file() as file:
        quantize(model, str(file), Reader([i.name for i in model.graph.input]), quant_format=QuantFormat.QDQ, per_channel=True,
                 activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax,
                 op_types_to_quantize=_known(), nodes_to_exclude=[*_normalizing(model), *exclude],
                 extra_options=dict(OpTypesToExcludeOutputQuantization=['Gemm', 'MatMul']))     # answers stay numbers, not one of 256 steps
        return _checked(file, model)


def quantize_dynamic(graph: bytes) -> bytes:
    """An ONNX graph with the weights of its linear layers in int8 (per channel, symmetric), and their inputs brought to uint8 batch by batch.

    Needs no data; onnxruntime's dynamic quantization of MatMul and Gemm. Each batch has its range taken anew, which costs time; what a sample gets
    depends on the others of its batch. Raises `ValueError` where the graph has no linear layer."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize
    model = onnx.load_from_string(graph)
    with _file() as file:
        quantize(model, str(file), op_types_to_quantize=list(LINEAR), per_channel=True, weight_type=QuantType.QInt8, nodes_to_exclude=_normalizing(model),
                 extra_options=dict(MatMulConstBOnly=True))
        return _checked(file, model)


@contextmanager
def _file():
    "A file for onnxruntime to write to, which meanwhile does not recommend a preprocessing that torch's exporter has done."
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder: yield Path(folder)/'q.onnx'
    finally: log.setLevel(level)


def _checked(file: Path, source: onnx.ModelProto) -> bytes:
    "The graph in `file`, with the metadata of what it was made from."
    out = onnx.load(str(file))
    onnx.helper.set_model_props(out, {p.key: p.value for p in source.metadata_props})
    onnx.checker.check_model(out, full_check=True)
    if not quantized_share(out.SerializeToString()): raise BadValue('quantize: this graph has no layer that can be quantized')
    return out.SerializeToString()


def _known() -> list[str]:
    "The kinds of nodes that onnxruntime knows to quantize."
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
    return sorted({*QDQRegistry, *QLinearOpsRegistry} - {'Softmax'})


def _normalizing(model: onnx.ModelProto) -> list[str]:
    "The nodes that normalise pixels: they are no layer, and what whitening makes of faint directions is less than one of 256 steps before."
    return [n.name for n in model.graph.node if any(i.startswith('normalize.') for i in n.input)]


def quantized_share(graph: bytes) -> float:
    "The share (0–1) of a graph's weights (tensors of two or more dimensions) that are stored as 8-bit integers."
    held = Counter()
    for t in onnx.load_from_string(graph).graph.initializer:
        if len(t.dims) > 1: held[t.data_type in EIGHT] += int(np.prod(t.dims, dtype=np.int64))
    return held[True]/max(1, sum(held.values()))


def linear_share(graph: bytes) -> float:
    "The share (0–1) of a float graph's weights (tensors of two or more dimensions) that its linear layers hold: what dynamic quantization reaches."
    g = onnx.load_from_string(graph).graph
    size = {t.name: int(np.prod(t.dims, dtype=np.int64)) for t in g.initializer if len(t.dims) > 1}
    return sum(size[i] for i in {i for n in g.node if n.op_type in LINEAR for i in n.input if i in size})/max(1, sum(size.values()))


def node_sensitivity(graph: bytes, batches: Sequence) -> list[tuple[float, str]]:
    """What each node costs by itself: the signal-to-noise ratio of the graph's answers to `batches`, in dB, when it alone is in 8 bits; (dB, node), the worst first.

    6 dB less is twice the error. Nodes that only move numbers about are not asked."""
    floats, whole = onnx.load_from_string(graph), onnx.load_from_string(quantize_static(graph, batches))
    expected, found = _answers(graph, batches), []
    signal = np.square(expected, dtype=np.float64).sum()
    for name in _candidates(floats):
        noise = np.square(_answers(_alone(floats, whole, name), batches) - expected, dtype=np.float64).sum()
        found.append((10*float(np.log10(signal/noise)) if noise else float('inf'), name))
    return sorted(found)


def _alone(floats: onnx.ModelProto, whole: onnx.ModelProto, name: str) -> bytes:
    "The graph `floats` with the node `name` as it is in `whole`, its quantized twin: inputs, weights and output in 8 bits."
    out, made = onnx.ModelProto(), {o: n for n in whole.graph.node for o in n.output}
    out.CopyFrom(floats)
    g, new = out.graph, []
    node, twin = (next((n for n in m.graph.node if n.name == name), None) for m in (out, whole))
    if twin is None: return out.SerializeToString()         # a clip that the rounding does
    for k, i in enumerate(twin.input):
        if (d := made.get(i)) is None or d.op_type != 'DequantizeLinear': continue
        node.input[k] = f'{name}/{k}'
        if (q := made.get(d.input[0])) is not None: new.append(q)
        new.append(onnx.helper.make_node('DequantizeLinear', d.input, [node.input[k]], **{a.name: onnx.helper.get_attribute_value(a) for a in d.attribute}))
    if q := next((n for n in whole.graph.node if n.op_type == 'QuantizeLinear' and n.input[0] == twin.output[0]), None):
        y, bare, steps = node.output[0], f'{name}/bare', f'{name}/steps'
        node.output[0] = bare
        new += [onnx.helper.make_node('QuantizeLinear', [bare, *q.input[1:]], [steps]), onnx.helper.make_node('DequantizeLinear', [steps, *q.input[1:]], [y])]
    g.node.extend({n.SerializeToString(): n for n in new}.values())
    needed = {i for n in new for i in n.input}
    g.initializer.extend(t for t in whole.graph.initializer if t.name in needed)
    return out.SerializeToString()


def _candidates(model: onnx.ModelProto) -> list[str]:
    "The nodes that lose something in 8 bits: layers with weights of their own, and arithmetic."
    kinds, weights, out = set(_known())-PASSIVE, {t.name for t in model.graph.initializer}, set(_normalizing(model))
    return [n.name for n in model.graph.node if n.op_type in kinds and n.name not in out and (n.op_type not in LAYERS or any(i in weights for i in n.input))]


def _answers(graph: bytes, batches) -> np.ndarray:
    net = Quantized(graph)
    return np.concatenate([net(*map(torch.from_numpy, b if isinstance(b, tuple) else (b,))).numpy() for b in batches])


def quantize_within(graph: bytes, batches: Sequence, lost: Callable[[bytes], float], tolerance: float) -> tuple[bytes, list[str]]:
    """`quantize_static` with as many nodes in 8 bits as cost at most `tolerance`, by what `lost(graph)` measures; and the nodes that stay in float.

    Where all of them cost more, they are ranked by `node_sensitivity`, and the worst 1, 2, 4, … left in float until it is within tolerance; then the smallest
    number that will do is searched for below that. Raises `ValueError` where only a float graph is good enough."""
    made = quantize_static(graph, batches)
    if (cost := lost(made)) <= tolerance + 1e-9: return made, []
    candidates = _candidates(onnx.load_from_string(graph))
    if writes(): print(f'quantize: with all layers in 8 bits {cost:.2g} points are lost, at most {tolerance:g} may be: measuring which of {len(candidates)} nodes cost them', flush=True)
    ranked = [name for _, name in node_sensitivity(graph, batches)]

    def attempt(k):
        try: one = quantize_static(graph, batches, ranked[:k])
        except BadValue: return None                        # nothing is left to quantize
        return one if lost(one) <= tolerance + 1e-9 else None

    bad, good, best = 0, 1, None
    while good < len(ranked) and (best := attempt(good)) is None: bad, good = good, 2*good
    if best is None:
        raise BadValue(f'quantize: in 8 bits it loses {cost:.2g} points, and not only by a few layers, where at most {tolerance:g} may be lost (tolerance); '
                       "allow more, or call quantize('qat')")
    while good-bad > 1:
        if (one := attempt(k := (good+bad)//2)) is None: bad = k
        else: good, best = k, one
    return best, ranked[:good]


def calibration_batches(learn: Learner, n: int = 128, seed: int = 42) -> list[tuple[np.ndarray, ...]]:
    "Inputs of `n` training samples drawn by `seed`, all where there are fewer, as validation would show them to the network, 32 at a time."
    dl, valid = learn.dls.train, learn.dls.loaders[min(1, len(learn.dls.loaders)-1)]
    n_inp = getattr(learn.dls, 'n_inp', 1)
    if not isinstance(dl, TfmdDL) or not dl.indexed:
        raise BadValue(f'quantize: needs a fastai loader over an indexed training set to draw from, got {type(dl).__name__}; give torch loaders to `as_dataloaders`')
    drawn = sorted(stream(seed, 'calibration').permutation(len(dl.dataset))[:n].tolist())
    with forked('calibration'), unvaried(dl.dataset):
        new = in_order(dl, valid)
        batches = [new.after_batch(new.do_batch([new.do_item(i) for i in drawn[at:at+32]])) for at in range(0, len(drawn), 32)]
    return [tuple(x.detach().as_subclass(torch.Tensor).cpu().numpy() for x in b[:n_inp]) for b in batches]


def _validated(learn: Learner, *nets) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    "What each of `nets` answers on the validation samples, and their targets."
    got, ys = [[] for _ in nets], []
    with forked('quantize'), torch.no_grad():
        for b in learn.dls.valid:
            b = tuple(t.detach().as_subclass(torch.Tensor).cpu() for t in b)
            i = getattr(learn.dls, 'n_inp', len(b)-1)
            for answers, net in zip(got, nets): answers.append(net(*b[:i]))
            ys.append(b[i:])
    if not ys: raise BadValue('quantize: there is no validation sample to measure it by; give the Learner its data back')
    return [torch.cat(o) for o in got], tuple(map(torch.cat, zip(*ys)))


def _classes(learn: Learner, answers: torch.Tensor, ys) -> np.ndarray | None:
    "The class of each sample, if each has one, so that there is an accuracy; those of a table lie in a column."
    if cross_entropy_of(learn.loss_func) is None or len(ys) != 1 or answers.ndim != 2 or ys[0].is_floating_point() or ys[0].numel() != len(answers): return None
    return ys[0].flatten().numpy()


def _quality(learn: Learner, before: torch.Tensor, after: torch.Tensor, ys) -> dict:
    "The fields of `Quantization` that say how well it does."
    if (y := _classes(learn, before, ys)) is not None:
        a, b = (p.argmax(1).numpy() for p in (before, after))
        return dict(accuracy=(intervals.accuracy(y, a), intervals.accuracy(y, b)), change=intervals.difference(y, b, a))
    return dict(loss=tuple(float(_loss(learn)(p, *ys)) for p in (before, after)))


def _loss(learn: Learner):
    "The Learner's loss, on the CPU."
    f = learn.loss_func
    return deepcopy(f).cpu() if hasattr(f, 'cpu') else f


def _points_lost(quality: dict) -> float:
    "Points of accuracy, or % of the loss."
    return -100*quality['change'].value if 'change' in quality else 100*(quality['loss'][1]/quality['loss'][0] - 1)


def _agreement(learn: Learner, one: torch.Tensor, other: torch.Tensor) -> float:
    "The share of answers (of samples, or of their pixels) that name the same class; where there are no classes, 1 less the relative error."
    if (ce := cross_entropy_of(learn.loss_func)) and one.ndim > 1: return float((one.argmax(ce.axis) == other.argmax(ce.axis)).float().mean())
    return 1 - float((one-other).norm()/one.norm())


ONLY_FOR = dict(tolerance=('static',), calibration=('static', 'qat'), epochs=('qat',), lr=('qat',), schedule=('qat',), force=('dynamic',))


@patch
def quantize(self: Learner, kind: Kind = 'static', *, tolerance: float | None = None, calibration: int | None = None, epochs: int | None = None, lr: float | None = None,
             schedule: str | None = None, force: bool | None = None, seed: int = 42) -> Learner:
    """A Learner whose network computes in 8 bits, in onnxruntime on the CPU; this one stays as it is. One line says what was gained and lost.

    'static': weights in int8, activations in uint8, their ranges measured on `calibration` (128) training samples; for most networks the one to take.
    Layers that cost more than `tolerance` (.5) points of accuracy on the validation samples (% of the loss, where these have no single class)
    stay in float. 'dynamic': linear layers alone, activation ranges taken anew in each batch; for transformers and tables, refused where they hold
    less than half of the weights, unless `force`. 'qat': `epochs` (2) more of training, in which the network meets the rounding, at a rate of `lr` (a tenth of the
    Learner's) by `schedule` ('flat_cos'), with the Learner's techniques and loss; batch norms are folded first; for networks that 'static' harms.
    What comes back validates, predicts, is exported and loaded; a fit of it is refused. Its `.model.told` is a `Quantization`.
    Raises `ValueError` for unknown kinds, values outside their ranges and arguments of another kind, for a network that torch cannot trace or
    write as ONNX, where nothing could be quantized, and where the graph does not answer as the network that was trained for it."""
    given = {n: v for n, v in dict(tolerance=tolerance, calibration=calibration, epochs=epochs, lr=lr, schedule=schedule, force=force).items() if v is not None}
    _check(kind, given)
    graph, in_float, agreement = network_graph(self), [], None
    (before,), ys = _validated(self, Quantized(graph))

    @cache
    def quality(made): return _quality(self, before, _validated(self, Quantized(made))[0][0], ys)

    if kind == 'dynamic': made = _dynamic(graph, force)
    elif kind == 'static':
        batches = calibration_batches(self, calibration or 128, seed)
        made, in_float = quantize_within(graph, batches, lambda g: _points_lost(quality(g)), .5 if tolerance is None else tolerance)
    else:
        with _quiet_import(): from fastrecipes.production.qat import trained_for_8_bits
        trained, made = trained_for_8_bits(self, calibration_batches(self, calibration or 128, seed), epochs or 2, lr, schedule or 'flat_cos', seed)
        agreement = _agreement(self, *_validated(self, trained, Quantized(made))[0])
        if agreement < AGREE:
            raise BadValue(f'quantize: the graph answers as the network that was trained on {agreement:.1%} of the validation samples only, at least {AGREE:.0%} is asked for; '
                           "call quantize('static')")
    made = compact(made)
    told = Quantization(kind, quantized_share(made), (len(graph), len(made)), times_of_one(graph, made, two_samples(self)), in_float=tuple(_layer(graph, n) for n in in_float),
                        agreement=agreement, **quality(made))
    if writes(): print(f'quantize: {told}', flush=True)
    return quantized_learner(self, made, told)


def _check(kind, given: dict):
    "Raise for what can be told wrong before any work."
    kinds = get_args(Kind)
    if kind not in kinds: raise BadValue(f'quantize: kind must be one of {", ".join(kinds)}, got {kind!r}{nearest(kind, kinds)}')
    if wrong := [n for n in given if kind not in ONLY_FOR[n]]:
        raise BadValue(f'quantize: {wrong[0]}={given[wrong[0]]!r} is for {" and ".join(map(repr, ONLY_FOR[wrong[0]]))}, and says nothing to {kind!r}; leave it off')
    for name, fine, domain in (('tolerance', lambda v: 0 <= v <= 100, '0 to 100 points'), ('calibration', lambda v: v >= 1 and v == int(v), 'at least 1 sample'),
                               ('epochs', lambda v: v >= 1 and v == int(v), 'at least 1'), ('lr', lambda v: v > 0, 'above 0')):
        if name in given and not fine(given[name]): raise BadValue(f'quantize: {name} must be {domain}, got {given[name]}')
    if (s := given.get('schedule')) is not None and s not in SCHEDULES: raise BadValue(f'quantize: schedule must be one of {", ".join(SCHEDULES)}, got {s!r}{nearest(s, SCHEDULES)}')


def _dynamic(graph: bytes, force: bool | None) -> bytes:
    share = linear_share(graph)
    if share < .5 and not force:
        raise BadValue(f"quantize: 'dynamic' reaches linear layers, and they hold {share:.1%} of this network's weights: the rest would stay in 32 bits, and nothing get faster; "
                       "call quantize('static'), or pass force=True")
    return quantize_dynamic(graph)


def _layer(graph: bytes, node: str) -> str:
    "A node by the name that its layer has in the network, as far as its weights tell."
    n = next(n for n in onnx.load_from_string(graph).graph.node if n.name == node)
    held = [i.rpartition('.')[0] for i in n.input if '.' in i and 'val_' not in i]
    return held[0] if held else node.removeprefix('node_')


@contextmanager
def _quiet_import():
    "torchao 0.18 makes torch 2.15 warn of an enumeration that it registers."
    log = logging.getLogger('torch.utils._pytree')
    level = log.level
    log.setLevel(logging.ERROR)
    try: yield
    finally: log.setLevel(level)
