"A network in 8 bits as a Learner holds it: an ONNX graph that onnxruntime computes, and what its making cost and gained."
import json
import statistics
import threading
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from fastai.basics import Learner, nn, trainable_params
from onnx import compose

from fastrecipes.data.loaders import shapes
from fastrecipes.data.statistics import normalization_of
from fastrecipes.errors import BadValue
from fastrecipes.production.entries import two_samples
from fastrecipes.production.export import Pixels, activation_of, input_contract, labels, twin, two_pictures
from fastrecipes.production.graphs import as_onnx, compact
from fastrecipes.production.predictor import Graph
from fastrecipes.production.timing import interleaved
from fastrecipes.report.intervals import Difference, Estimate
from fastrecipes.report.tables import aligned

__all__ = ['Quantization', 'Quantized', 'network_graph', 'pixels_graph', 'quantization_table', 'quantized_learner']

FIXED = 'a network in 8 bits cannot be trained or changed, its weights are integers; {} the float Learner that it was made from, and call quantize() on that again'
TRAIN = f"fit: {FIXED.format('fit')} ('qat' trains it for 8 bits)"


@dataclass(frozen=True)
class Quantization:
    """How a network was quantized, and what that did; printed, it is one line.

    `share` (0–1) of its weights that are in 8 bits; `size_bytes` of the .onnx and `latency_ms` of one sample on one thread, each (before, after);
    `accuracy` (before, after) and their paired `change` on the validation samples, or the mean `loss` (before, after) where these have no
    single class; `in_float`: layers that stayed so; `agreement` (0–1) of the graph with the network that was trained for it ('qat')."""
    kind: str
    share: float
    size_bytes: tuple[int, int]
    latency_ms: tuple[float, float]
    accuracy: tuple[Estimate, Estimate] | None = None
    change: Difference | None = None
    loss: tuple[float, float] | None = None
    in_float: tuple[str, ...] = ()
    agreement: float | None = None

    @property
    def faster(self) -> float:
        "How many times as fast as the float graph; below 1 it is slower."
        return self.latency_ms[0]/self.latency_ms[1]

    def __str__(self):
        (b0, b1), (t0, t1) = self.size_bytes, self.latency_ms
        how = f'{self.faster:.1f} times as fast' if self.faster >= 1.02 else f'SLOWER, {1/self.faster:.2f} times the time' if self.faster < .98 else 'no faster'
        parts = [f'{_percent(self.share)} of the weights in 8 bits', f'{b0/1e3:,.0f} → {b1/1e3:,.0f} kB', self._quality,
                 f'one sample in {t0:.3g} → {t1:.3g} ms on one thread: {how}']
        if self.in_float: parts.append(f'in 32 bits stayed {", ".join(self.in_float)}')
        if self.agreement is not None: parts.append(f'answers as the network that was trained on {_percent(self.agreement)} of the validation samples')
        return f'{self.kind}: ' + '; '.join(parts)

    @property
    def _quality(self) -> str:
        if self.accuracy: return f'accuracy {_percent(self.accuracy[0].value)} → {_percent(self.accuracy[1].value)}, {self.change} on {self.change.n} validation samples'
        return f'validation loss {self.loss[0]:.4g} → {self.loss[1]:.4g}'


def _percent(share: float) -> str: return f'{100*share:.1f} %'


def quantization_table(*learners: Learner) -> str:
    "What `quantize` did, a line for each of these Learners below one for the float network that the first came from."
    told = [learn.model.told for learn in learners]
    quality = lambda q, i: _percent(q.accuracy[i].value) if q.accuracy else f'{q.loss[i]:.4g}'
    rows = [('', 'in 8 bits', '.onnx', 'one sample', 'accuracy' if told[0].accuracy else 'loss', 'change'),
            ('float', '0.0 %', f'{told[0].size_bytes[0]/1e3:,.0f} kB', f'{told[0].latency_ms[0]:.3g} ms', quality(told[0], 0), '')]
    rows += [(q.kind, _percent(q.share), f'{q.size_bytes[1]/1e3:,.0f} kB', f'{q.latency_ms[1]:.3g} ms', quality(q, 1), str(q.change or '')) for q in told]
    return '\n'.join(aligned(rows))


class Quantized(nn.Module):
    """An ONNX graph as a network: takes what the float network took, any number of samples, and gives what it answered, in onnxruntime on the CPU.

    Tensors on another device come back to it. `told`: the `Quantization` that made it. It can be pickled, copied and saved; `train()` raises `ValueError`."""
    fixed = FIXED.format('change')                      # what techniques are told

    def __init__(self, graph: bytes, told: Quantization | None = None, threads: int | None = None):
        super().__init__()
        self.graph, self.told, self.threads, self._run = graph, told, threads, None
        self.place = nn.Parameter(torch.empty(0))       # fastai asks a network's parameters where it lies, and makes optimizers of them
        self.eval()

    def forward(self, *xb):
        if self._run is None: self._run = Graph(self.graph, self.threads)
        wanted = self._run.session.get_inputs()
        if len(xb) != len(wanted): raise BadValue(f'quantize: the graph takes {len(wanted)} inputs, got {len(xb)}')
        for x, w in zip(xb, wanted):
            if x.ndim != len(w.shape) or any(isinstance(s, int) and s != n for n, s in zip(x.shape, w.shape)):
                sides = '×'.join('n' if not isinstance(s, int) else str(s) for s in w.shape)
                raise BadValue(f'quantize: the graph was made for inputs of {sides}, got {"×".join(map(str, x.shape))}; quantize again with data of that size')
        return torch.from_numpy(self._run.session.run(None, {w.name: _array(x, w.type) for x, w in zip(xb, wanted)})[0]).to(xb[0].device)

    def train(self, mode: bool = True):
        if mode: raise BadValue(TRAIN)
        return super().train(False)

    def pixels_graph(self, learn: Learner) -> bytes: return pixels_graph(learn)         # for `graph_of`

    def extra_repr(self): return str(self.told or f'{len(self.graph):,} bytes')

    def get_extra_state(self): return torch.frombuffer(bytearray(self.graph), dtype=torch.uint8)
    def set_extra_state(self, state): self.graph, self._run = bytes(state.cpu().numpy()), None

    def __getstate__(self): return {**vars(self), '_run': None}         # a session belongs to its process


TYPES = {'tensor(float)': np.float32, 'tensor(double)': np.float64, 'tensor(int64)': np.int64, 'tensor(int32)': np.int32, 'tensor(bool)': np.bool_, 'tensor(uint8)': np.uint8}


def _array(x: torch.Tensor, kind: str) -> np.ndarray:
    x = x.detach().as_subclass(torch.Tensor).cpu()
    return np.ascontiguousarray((x.float() if x.is_floating_point() else x).numpy().astype(TYPES[kind], copy=False))


def network_graph(learn: Learner) -> bytes:
    """The network of `learn` as a float ONNX graph, in the Learner's own normalisation: its inputs in, its outputs (logits) out, any number of samples.

    Batch norms that follow a convolution are folded into it. Raises `ValueError` where torch cannot write it, and where the graph does not
    answer as the network does."""
    if isinstance(learn.model, Quantized): raise BadValue('quantize: this Learner is in 8 bits already; quantize the float one that it was made from')
    model, xb = deepcopy(learn.model).cpu().float().eval().requires_grad_(False), two_samples(learn)
    graph = as_onnx(model, xb).SerializeToString()
    with torch.no_grad(): expected = model(*xb)
    if (off := float((Quantized(graph)(*xb)-expected).abs().max())) > 1e-3*max(1., float(expected.abs().max())):
        raise BadValue(f'quantize: as ONNX the network answers otherwise, by up to {off:.2g} on inputs of {shapes(xb)}')
    return graph


def quantized_learner(learn: Learner, graph: bytes, told: Quantization) -> Learner:
    "A Learner of the same kind on the same data that holds `graph`: it validates, predicts, shows results, is exported and loaded; `learn` keeps its own network."
    new = twin(learn, Quantized(graph, told))
    new.splitter, new.lock, new.fit = trainable_params, threading.Lock(), refuse_fit
    return new


def refuse_fit(*args, **kwargs):
    "In place of the `fit` of a quantized Learner: raises `ValueError`."
    raise BadValue(TRAIN)


def pixels_graph(learn: Learner) -> bytes:
    """A quantized Learner on images of `image_folder` as it is served: uint8 pixels `(n, h, w, 3)` in, probabilities out; between them the graph in 8 bits as it is.

    As `graph_of` makes one of a float Learner: labels and input are in its metadata."""
    contract, activation, normalize = input_contract(learn), activation_of(learn.loss_func), normalization_of(learn)
    core = onnx.load_from_string(learn.model.graph)

    class After(nn.Module):
        def forward(self, y): return activation(y)

    before = as_onnx(Pixels(normalize).eval(), (two_pictures(contract),))
    after = as_onnx(After().eval(), (learn.model(*(torch.zeros(2, *[d.dim_value for d in i.type.tensor_type.shape.dim[1:]]) for i in core.graph.input)),))
    parts = [compose.add_prefix(p, prefix) for p, prefix in ((before, 'before/'), (core, ''), (after, 'after/'))]
    for p in parts:
        p.ir_version = max(o.ir_version for o in parts)
        for ours in p.opset_import:
            if ours.domain in ('', 'ai.onnx'): ours.version = max(o.version for q in parts for o in q.opset_import if o.domain in ('', 'ai.onnx'))
    whole = compose.merge_models(parts[0], parts[1], [(parts[0].graph.output[0].name, parts[1].graph.input[0].name)])
    whole = compose.merge_models(whole, parts[2], [(parts[1].graph.output[0].name, parts[2].graph.input[0].name)])
    whole = _renamed(whole, pixels='before/x0', probabilities='after/y')
    del whole.metadata_props[:]
    onnx.helper.set_model_props(whole, dict(labels=json.dumps(labels(learn)), input=json.dumps(contract)))
    return compact(whole.SerializeToString())


def _renamed(model: onnx.ModelProto, **names: str) -> onnx.ModelProto:
    old = {v: k for k, v in names.items()}
    for o in (*model.graph.input, *model.graph.output): o.name = old.get(o.name, o.name)
    for n in model.graph.node:
        for many in (n.input, n.output):
            for i, name in enumerate(many): many[i] = old.get(name, name)
    return model


def times_of_one(before: bytes, after: bytes, xb: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    "The ms that the first sample of `xb` takes through two graphs, on one thread, in turns; medians."
    one = tuple(x[:1] for x in xb)
    nets = dict(before=Quantized(before, threads=1), after=Quantized(after, threads=1))
    times = interleaved({which: lambda net=net: net(*one) for which, net in nets.items()})
    ms = {which: round(statistics.median(took), 4) for which, took in times.items()}
    return ms['before'], ms['after']
