"A Learner as a file that others run: ONNX, torch.export, TorchScript; written once it answers as the Learner does on the whole validation set."
import io
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from fastai.basics import Learner, patch
from torch.export import export

from fastrecipes.arguments import checked
from fastrecipes.errors import BadValue
from fastrecipes.files import check_file, in_bytes, whole
from fastrecipes.production.entries import Entry, entry_of
from fastrecipes.production.export import graph_of
from fastrecipes.production.graphs import any_number, as_onnx, check_opset, opset_of, ops_of, quiet_export, reason
from fastrecipes.production.parity import Agreement, agreement
from fastrecipes.production.predictor import Graph
from fastrecipes.repairs import with_own_memory

__all__ = ['Exported', 'to_onnx', 'to_torch_export', 'to_torchscript']

ENDINGS = dict(to_onnx=('.onnx',), to_torch_export=('.pt2',), to_torchscript=('.pt', '.pth', '.ts'))        # as torch's own pages have them


@dataclass(frozen=True)
class Exported:
    """A file that was written, and stands for its path. Printed: what goes in and comes out, its operators by count, its size, and how it compares with the Learner.

    `format`: 'ONNX', 'torch.export' or 'TorchScript'; `ops`: the operators and how often each occurs; `opset`: of ONNX alone."""
    path: Path
    format: str
    inputs: tuple[str, ...]
    output: str
    ops: dict[str, int]
    size_bytes: int
    agreement: Agreement
    opset: int | None = None

    def __fspath__(self): return str(self.path)

    def __str__(self):
        rows = [('in', ', '.join(self.inputs)), ('out', self.output), ('operators', ', '.join(f'{n} {op}' for op, n in self.ops.items())), ('parity', str(self.agreement))]
        what = f'{self.format}, opset {self.opset}' if self.opset else self.format
        return '\n'.join([f'{self.path}: {what}, {in_bytes(self.size_bytes)}', *(f'  {name.ljust(9)}  {value}' for name, value in rows)])

    def text(self) -> str:
        "The whole graph as text, one operator a line."
        if self.format == 'ONNX':
            proto = onnx.load(self.path)
            for t in proto.graph.initializer: _without_values(t)
            return onnx.printer.to_text(proto)
        return str(torch.export.load(self.path).graph_module.code) if self.format == 'torch.export' else str(_loaded(self.path).inlined_graph)


def _check_path(path, who: str):
    check_file(path, who)
    path = Path(path)
    for other, endings in ENDINGS.items():
        if other != who and path.suffix in endings: raise BadValue(f'{who}: {path.name} has the ending of what {other} writes; name it {path.with_suffix(ENDINGS[who][0]).name}')


@patch
@checked
def to_onnx(self: Learner, path: str, *, opset: int | None = None) -> Exported:
    """Write the Learner as an ONNX file: its inputs before normalisation, in any number, to probabilities; numbers where it has no classes.

    uint8 pixels `(n, h, w, 3)` of data made by `image_folder`, images `(n, c, h, w)` of other data in [0, 1], of a table codes and numbers in their own units.
    Labels and input are in the file's metadata; `opset` (18 to 25): torch's choice if None. The file is checked in full and answers, on every
    validation sample, as the Learner does in 32 bits, probabilities within 1e-4; else, and where torch cannot write the network, `ValueError`, and no file."""
    check_opset(opset, 'to_onnx')
    _check_path(path, 'to_onnx')
    entry = entry_of(self, 'to_onnx')
    if entry.module is None:
        if opset: raise BadValue(f'to_onnx: opset={opset}: a network in 8 bits is a graph already, in an opset of its own; leave opset off')
        data, allowed = graph_of(self), .05         # the last bit of a pixel may round to another of 256 steps than in torch
    else:
        proto = as_onnx(entry.module, entry.example, inputs=list(entry.inputs), output=entry.output, opset=opset, who='to_onnx')
        onnx.helper.set_model_props(proto, entry.card)
        data, allowed = proto.SerializeToString(), None
    proto = onnx.load_from_string(data)
    session = Graph(data).session
    def run(*xb): return torch.from_numpy(session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), xb, strict=True)})[0])
    agreed = agreement(self, entry, run, 'to_onnx', allowed)
    with whole(path) as tmp: tmp.write_bytes(data)
    values = [f'{v.name}: {onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)} ({_dims(v)})' for v in (*proto.graph.input, *proto.graph.output)]
    return Exported(Path(path), 'ONNX', tuple(values[:-1]), values[-1], ops_of(proto), len(data), agreed, opset_of(proto))


@patch
@checked
def to_torch_export(self: Learner, path: str) -> Exported:
    """Write the Learner as a program of torch.export, to be read by `torch.export.load(path).module()`, without its classes: what torch compiles and lowers.

    Inputs, output and parity as of `to_onnx`; labels and input are in the file's extra files, labels.json and input.json. Raises `ValueError`
    where torch cannot trace the network, or the program answers otherwise; no file is left then."""
    _check_path(path, 'to_torch_export')
    entry = _float_entry(self, 'to_torch_export')
    try:
        with quiet_export(): program = export(entry.module, entry.example, dynamic_shapes=any_number(entry.module, entry.example))
        buffer = io.BytesIO()
        with quiet_export(): torch.export.save(program, buffer, extra_files={f'{k}.json': v for k, v in entry.card.items()})
    except BadValue: raise
    except Exception as e: raise BadValue(f'to_torch_export: torch cannot trace this network: {reason(e)}') from e          # dynamo, sympy and the writer each raise their own
    program = torch.export.load(io.BytesIO(buffer.getvalue()))
    calls = Counter(str(n.target).removesuffix('.default') for n in program.graph.nodes if n.op == 'call_function')
    return _written(self, path, buffer, entry, program.module(), 'torch.export', calls)


@patch
@checked
def to_torchscript(self: Learner, path: str) -> Exported:
    """Write the Learner as TorchScript, traced, to be read by `torch.jit.load(path)` in Python, C++ or on a phone.

    Deprecated since torch 2.9, whose warning is silenced here: for what runs it already; else take `to_onnx` or `to_torch_export`. A branch that depends
    on the data is traced as it went: so the trace is compared with the network on one, two and five samples, and with the Learner on the
    validation set. Inputs, output and errors as of `to_torch_export`."""
    _check_path(path, 'to_torchscript')
    entry = _float_entry(self, 'to_torchscript')
    others = [tuple(torch.cat([x]*3)[:n] for x in entry.example) for n in (1, 5)]
    try:
        with quiet_export(), torch.no_grad(): traced = torch.jit.trace(entry.module, entry.example, check_inputs=others)
        buffer = io.BytesIO()
        with quiet_export(): torch.jit.save(traced, buffer, _extra_files={f'{k}.json': v for k, v in entry.card.items()})
    except Exception as e: raise BadValue(f'to_torchscript: torch cannot trace this network: {reason(e)}') from e
    loaded = _loaded(io.BytesIO(buffer.getvalue()))
    calls = Counter(n.kind() for n in loaded.inlined_graph.nodes() if n.kind().startswith('aten::'))
    return _written(self, path, buffer, entry, loaded, 'TorchScript', calls)


to_onnx, to_torch_export, to_torchscript = Learner.to_onnx, Learner.to_torch_export, Learner.to_torchscript    # noqa: F811  `patch` leaves None here


def _float_entry(learn: Learner, who: str) -> Entry:
    entry = entry_of(learn, who)
    if entry.module is None: raise BadValue(f'{who}: a network in 8 bits is an ONNX graph; write that by to_onnx, or the float Learner that it was made from')
    entry.module.model = with_own_memory(entry.module.model)
    return entry


def _written(learn: Learner, path, buffer: io.BytesIO, entry: Entry, net: Callable, format: str, calls: Counter) -> Exported:
    "Compare what was read back with the Learner, and give the file its name."
    who = {'torch.export': 'to_torch_export', 'TorchScript': 'to_torchscript'}[format]
    def run(*xb):
        with torch.no_grad(): return net(*xb)
    agreed = agreement(learn, entry, run, who)
    with whole(path) as tmp: tmp.write_bytes(buffer.getvalue())
    out = run(*entry.example)
    said = [f'{n}: {str(x.dtype).removeprefix("torch.")} (n{"".join(f", {d}" for d in x.shape[1:])})' for n, x in zip((*entry.inputs, entry.output), (*entry.example, out))]
    return Exported(Path(path), format, tuple(said[:-1]), said[-1], dict(sorted(calls.items(), key=lambda o: (-o[1], o[0]))), buffer.getbuffer().nbytes, agreed)


def _loaded(file):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.jit.load(file)


def _dims(value) -> str: return ', '.join(d.dim_param or str(d.dim_value) for d in value.type.tensor_type.shape.dim)


def _without_values(t: onnx.TensorProto):
    "Large weights as their shape alone: a number a line is no text to read."
    if t.ByteSize() > 256:
        for field in ('raw_data', 'float_data', 'int64_data', 'int32_data', 'double_data', 'uint64_data'): t.ClearField(field)
