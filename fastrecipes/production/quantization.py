"A graph in 8 bits: a quarter of the bytes, and the integer instructions that CPUs have for it."
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch

from fastrecipes.errors import BadValue
from fastrecipes.files import writes
from fastrecipes.production.graphs import own_bytes, quiet
from fastrecipes.production.quantized import Quantized

__all__ = ['quantize_static', 'quantize_dynamic', 'quantize_within', 'quantized_share', 'linear_share', 'node_sensitivity']

LINEAR, LAYERS = ('MatMul', 'Gemm'), ('Conv', 'ConvTranspose', 'MatMul', 'Gemm')
EIGHT = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
PASSIVE = frozenset('Relu Clip Reshape Transpose Squeeze Unsqueeze Flatten Slice Gather MaxPool Split Concat Resize Pad Expand ArgMax DepthToSpace SpaceToDepth'.split())


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


def quantize_dynamic(graph: bytes, least: float = 0.) -> bytes:
    """An ONNX graph with the weights of its linear layers in int8 (per channel, symmetric), and their inputs brought to uint8 batch by batch.

    Needs no data; onnxruntime's dynamic quantization of MatMul and Gemm. Each batch has its range taken anew, which costs time; what a sample gets
    depends on the others of its batch. Raises `ValueError` where linear layers hold less than `least` (0–1) of the weights, or there is none."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize
    if (share := linear_share(graph)) < least:
        raise BadValue(f"quantize: 'dynamic' reaches linear layers, and they hold {share:.1%} of this network's weights: the rest would stay in 32 bits, and nothing get faster; "
                       "call quantize('static'), or pass force=True")
    model = onnx.load_from_string(graph)
    with _file() as file:
        quantize(model, str(file), op_types_to_quantize=list(LINEAR), per_channel=True, weight_type=QuantType.QInt8, nodes_to_exclude=_normalizing(model),
                 extra_options=dict(MatMulConstBOnly=True))
        return _checked(file, model)


@contextmanager
def _file():
    "A file for onnxruntime to write to, which meanwhile does not recommend a preprocessing that torch's exporter has done."
    with quiet(), tempfile.TemporaryDirectory() as folder: yield Path(folder)/'q.onnx'


def _checked(file: Path, source: onnx.ModelProto) -> bytes:
    "The graph in `file`, with the metadata of what it was made from."
    out = onnx.load(str(file))
    own_bytes(out)
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
