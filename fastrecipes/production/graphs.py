"Networks as ONNX graphs: what torch writes, tidied; any opset that both torch and onnxruntime know; the same graph in fewer bytes."
import inspect
import io
import logging
import warnings
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from itertools import count

import onnx
import torch
from fastai.basics import nn
from onnx import numpy_helper

from fastrecipes.errors import BadValue

__all__ = ['OPSETS', 'as_onnx', 'compact', 'own_bytes', 'opset_of', 'ops_of']

INT8, CONV = onnx.TensorProto.INT8, ('Conv', 'ConvTranspose')
OPSETS = range(18, 26)  # torch 2.15 writes these; of others it leaves the graph at 18, or half converted. onnxruntime 1.23 and later run them


def as_onnx(model: nn.Module, xb: tuple[torch.Tensor, ...], *, inputs=None, output: str = 'y', opset: int | None = None, who: str = 'quantize') -> onnx.ModelProto:
    """`model`, which is on the CPU and in evaluation mode, as an ONNX graph of any number of samples, checked in full.

    `xb`: two samples of its inputs, called `inputs` in the graph (x0, x1, …); it gives one tensor, `output`. `opset`: 18 to 25, or torch's own choice.
    Raises `ValueError`, in the name of `who`, where torch cannot write it, and where it gives more than one tensor."""
    check_opset(opset, who)
    try:
        with quiet_export(), torch.no_grad():
            program = torch.onnx.export(model, xb, dynamo=True, external_data=False, verbose=False, opset_version=opset, dynamic_shapes=any_number(model, xb),
                                        input_names=inputs or [f'x{i}' for i in range(len(xb))], output_names=[output])
    except (torch.onnx.OnnxExporterError, torch.onnx.errors.UnsupportedOperatorError) as e: raise BadValue(f'{who}: torch cannot write this network as ONNX: {reason(e)}') from e
    proto = pooled(without_traces(program.model_proto))
    if len(proto.graph.output) != 1: raise BadValue(f'{who}: needs a network of one output, this one has {len(proto.graph.output)}')
    if opset and opset_of(proto) != opset: raise BadValue(f'{who}: torch cannot write this network in opset {opset}, it kept {opset_of(proto)}; leave opset off')
    onnx.checker.check_model(proto, full_check=True)
    return proto


def check_opset(opset: int | None, who: str):
    "Raise `BadValue` for an opset outside `OPSETS`."
    if opset is None or isinstance(opset, int) and not isinstance(opset, bool) and opset in OPSETS: return
    raise BadValue(f'{who}: opset must be {OPSETS[0]} to {OPSETS[-1]}, which torch writes and onnxruntime runs, got {opset!r}')


def opset_of(proto: onnx.ModelProto) -> int:
    "The version of the standard operators that a graph is written in."
    return next(o.version for o in proto.opset_import if o.domain in ('', 'ai.onnx'))


def ops_of(proto: onnx.ModelProto) -> dict[str, int]:
    "How often each operator occurs in a graph and the graphs within it, the most frequent first, ties by name."
    found, graphs = Counter(), [proto.graph, *proto.functions]
    for g in graphs:
        found.update(n.op_type for n in g.node)
        graphs += [a.g for n in g.node for a in n.attribute if a.HasField('g')]
    return dict(sorted(found.items(), key=lambda o: (-o[1], o[0])))


def any_number(model: nn.Module, xb) -> tuple:
    "The dynamic shapes of inputs that have any number of samples; those that `forward` takes as `*xb` are one argument to torch."
    n = torch.export.Dim('n')
    each = tuple({0: n} for _ in xb)
    return (each,) if takes_all(model) else each


def takes_all(model: nn.Module) -> bool:
    "Whether `forward` takes its inputs as one `*xb`."
    return any(p.kind is p.VAR_POSITIONAL for p in list(inspect.signature(model.forward).parameters.values())[:1])


def reason(e: BaseException) -> str:
    "The first line of what lies below an error of the exporter."
    while e.__cause__ is not None: e = e.__cause__
    return (str(e).strip() or type(e).__name__).split('\n')[0]


@contextmanager
def quiet_export():
    "The exporter tells of its steps, and of what it fell back on, by print, warnings and logging."
    with quiet('torch.onnx'), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        yield


@contextmanager
def quiet(logger: str | None = None):
    "A block in which this logger, or the root, tells of errors alone."
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try: yield
    finally: log.setLevel(level)


def without_traces(proto: onnx.ModelProto) -> onnx.ModelProto:
    "The graph without the exporter's notes: stack traces with the paths of the machine it ran on, class names, rewrites."
    graphs = [proto.graph]
    for g in graphs:
        for o in (g, *g.node, *g.input, *g.output, *g.value_info, *g.initializer): del o.metadata_props[:]
        graphs += [a.g for n in g.node for a in n.attribute if a.HasField('g')]
    for f in proto.functions:
        for o in (f, *f.node, *f.value_info): del o.metadata_props[:]
    return proto


def pooled(proto: onnx.ModelProto) -> onnx.ModelProto:
    "The graph with means over height and width as GlobalAveragePool, for which onnxruntime has an integer kernel, and has none for ReduceMean."
    g = proto.graph
    held = {t.name: t for t in g.initializer}
    rank = {v.name: len(v.type.tensor_type.shape.dim) for v in (*g.input, *g.value_info)}
    for n in g.node:
        if n.op_type != 'ReduceMean' or rank.get(n.input[0]) != 4 or len(n.input) < 2 or n.input[1] not in held: continue
        given = {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute}
        if not given.get('keepdims', 1) or sorted(int(d) % 4 for d in numpy_helper.to_array(held[n.input[1]])) != [2, 3]: continue
        n.op_type = 'GlobalAveragePool'
        del n.input[1:], n.attribute[:]
    used = {i for n in g.node for i in n.input} | {o.name for o in g.output}
    for t in [t for t in g.initializer if t.name not in used]: g.initializer.remove(t)
    return proto


def compact(graph: bytes) -> bytes:
    """A graph that computes exactly the same in fewer bytes: short names within it, equal tensors once, nothing that whoever reads it assumes anyway.

    Inputs, outputs and metadata keep their names. Names are half the file of a small network in 8 bits, and next to nothing of a large one's."""
    proto = onnx.load_from_string(graph)
    g, version = proto.graph, {'' if o.domain == 'ai.onnx' else o.domain: o.version for o in proto.opset_import}
    if proto.functions or g.sparse_initializer or any(a.HasField('g') or a.graphs for n in g.node for a in n.attribute): return graph    # inner graphs know names of this one
    zeros = {t.name: t.data_type for t in g.initializer if t.data_type in (INT8, onnx.TensorProto.INT32) and not numpy_helper.to_array(t).any()}
    convolved = {i for n in g.node if n.op_type in CONV for i in n.input} - {i for n in g.node if n.op_type not in CONV for i in n.input}
    for n in g.node:
        n.name = n.doc_string = ''
        zero = zeros.get(n.input[2]) if n.op_type == 'DequantizeLinear' and len(n.input) == 3 else None
        if zero == onnx.TensorProto.INT32 or zero == INT8 and n.output[0] in convolved: del n.input[2]       # of int8 matrices it stays: without it QGemm is not made
        known = onnx.defs.get_schema(n.op_type, version.get(n.domain, 1), n.domain).attributes if onnx.defs.has(n.op_type, n.domain) else {}
        for a in [a for a in n.attribute if a.name in known and known[a.name].default_value.SerializeToString() == a.SerializeToString()]: n.attribute.remove(a)

    public = {o.name for o in (*g.input, *g.output)} | {''}
    used, first = {i for n in g.node for i in n.input} | public, {}
    tensors = [onnx.TensorProto.FromString(t.SerializeToString()) for t in g.initializer if t.name in used]
    same = {t.name: first.setdefault((t.data_type, *t.dims, numpy_helper.to_array(t).tobytes(), t.name if t.data_type == INT8 else ''), t.name)
            for t in tensors if t.name not in public}       # int8 is not shared: see `own_bytes`
    new, free = {name: name for name in public}, (s for i in count() if (s := format(i, 'x')) not in public)

    def short(name):
        if (name := same.get(name, name)) not in new: new[name] = next(free)
        return new[name]
    del g.initializer[:], g.value_info[:], g.quantization_annotation[:]
    for t in tensors:
        if same.get(t.name, t.name) != t.name: continue
        t.name, t.doc_string = short(t.name), ''
        g.initializer.append(t)
    for n in g.node:
        for names in (n.input, n.output):
            for i, name in enumerate(names): names[i] = short(name)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def own_bytes(proto: onnx.ModelProto):
    "Give each node that computes with int8 weights its own of them, and of their zero point: onnxruntime 1.32 cannot load for exact sums (see `Graph`) what is shared."
    g, tensors = proto.graph, {t.name: t for t in proto.graph.initializer if t.data_type == INT8}
    shared = {n.output[0]: n for n in g.node if n.op_type == 'DequantizeLinear' and n.input[0] in tensors}
    nodes, met, new = list(g.node), set(), (f'own/{i}' for i in count())
    del g.node[:]
    for n in nodes:
        for i, name in enumerate(n.input):
            if name in shared and name in met:
                own = onnx.NodeProto.FromString(shared[name].SerializeToString())
                own.name = own.output[0] = n.input[i] = next(new)
                g.node.append(own)
            met.add(name)
        g.node.append(n)
    met.clear()
    for n in g.node:
        for i, name in enumerate(n.input):
            if name in tensors and name in met:
                copy = onnx.TensorProto.FromString(tensors[name].SerializeToString())
                copy.name = n.input[i] = next(new)
                g.initializer.append(copy)
            met.add(name)
