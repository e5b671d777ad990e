"A Learner taken out of training: pickled for ourselves, or as a graph that takes pixels and gives probabilities."
import io
import json
import logging
import warnings
from contextlib import contextmanager, redirect_stdout
from copy import copy, deepcopy
from functools import partial
from itertools import count
from pathlib import Path

import cloudpickle
import onnx
import torch
from fastai.basics import Callback, L, Learner, defaults, nn
from fastai.distributed import rank_distrib
from fastai.learner import Recorder
from fastai.vision.all import IntToFloatTensor
from onnx import numpy_helper
from torch.nn import functional as F

from fastrecipes.data.images import Fit
from fastrecipes.data.statistics import PixelMap, normalization_of
from fastrecipes.errors import BadValue
from fastrecipes.files import whole
from fastrecipes.objective import cross_entropy_of
from fastrecipes.technique import Applied

__all__ = ['export_learner', 'Served', 'served', 'activation_of', 'input_contract', 'labels', 'graph_of', 'to_onnx', 'compact']


def export_learner(learn: Learner, path) -> Path:
    """Pickle `learn` to `path` for `load_learner`: without data, optimizer and callbacks other than fastai's defaults.

    `learn` itself is not touched, whatever happens (fastai 2.8.12 empties `learn.dls` and drops the optimizer when its `export`
    fails, as it does with a CSVLogger), and `path` is written at once or not at all."""
    path = Path(path)
    if rank_distrib(): return path               # one of the processes writes
    with whole(path) as tmp, warnings.catch_warnings():
        warnings.simplefilter('ignore')          # torch and fastai warn of pickles in general
        torch.save(_bare(learn), tmp, pickle_module=cloudpickle, pickle_protocol=2)
    return path


def _bare(learn: Learner) -> Learner:
    "A copy of `learn` that shares its model and holds nothing of its training: no data, optimizer, batch, logger, callbacks of others."
    bare = copy(learn)
    for name, value in list(vars(bare).items()):
        if isinstance(value, Callback): delattr(bare, name)
    bare._end_cleanup()
    bare.dls, bare.opt, bare.logger, bare.cbs, bare.loss_grad = learn.dls.new_empty(), None, print, L(), None
    bare.techniques = {n: Applied({k: v if _plain(v) else f'<{type(v).__name__}>' for k, v in a.arguments.items()}, a.effect) for n, a in vars(learn).get('techniques', {}).items()}
    for cb in learn.cbs:
        if type(cb) in defaults.callbacks: bare.add_cb(copy(cb) if isinstance(cb, Recorder) else type(cb)())     # a fit that died leaves bars
    return bare


def _plain(v) -> bool:
    "Whether an argument of a technique can be pickled for years: no teacher, no modules."
    if isinstance(v, (list, tuple)): return all(map(_plain, v))
    return v is None or isinstance(v, (bool, int, float, str))


class Served(nn.Module):
    "What is served: uint8 pixels `(n, h, w, 3)` → scaled to [0, 1] and normalised → the model → probabilities `(n, c)`."
    def __init__(self, model: nn.Module, activation, normalize: PixelMap | None = None):
        super().__init__()
        self.model, self.activation, self.normalize = model, activation, normalize

    def forward(self, pixels):
        x = pixels.permute(0, 3, 1, 2).float()/255
        if self.normalize is not None: x = self.normalize(x)
        return self.activation(self.model(x))


def served(learn: Learner) -> Served:
    "`learn` as it is served: a copy of its model on the CPU, in 32 bits and evaluation mode; `learn` keeps its device, mode and hooks."
    model = Served(deepcopy(learn.model).cpu().float(), activation_of(learn.loss_func), normalization_of(learn)).eval()
    return model.requires_grad_(False)


def activation_of(loss_func):
    "What turns the outputs of a model trained by `loss_func` into probabilities. Raises `ValueError` where the loss does not say."
    if ce := cross_entropy_of(loss_func): return partial(F.softmax, dim=ce.axis)
    if callable(activation := getattr(loss_func, 'activation', None)): return activation
    raise BadValue(f'ship: {loss_func} does not say how outputs become probabilities; use a cross entropy, or a loss with an `activation` method')


def input_contract(learn: Learner) -> dict:
    "How an image becomes the input of the graph. Raises `ValueError` where the Learner's data are not those of `image_folder`."
    valid = getattr(learn.dls, 'valid', None)
    fit = next((t for t in getattr(getattr(valid, 'after_item', None), 'fs', ()) if isinstance(t, Fit)), None)
    if fit is None or not any(isinstance(t, IntToFloatTensor) for t in valid.after_batch.fs):
        raise BadValue('learn: must be a Learner on data made by image_folder, for what is shipped reads image files as training did, '
                       'and other data do not say how')
    return dict(size=list(fit.size), resize=fit.resize, mode='RGB', dtype='uint8', layout='NHWC',
                pixels='upright by EXIF, first frame, 16 bits scaled to 8, transparency on white, then resized by Pillow, bilinear')


def labels(learn: Learner) -> list[str]:
    "The names of the classes, in the order of the model's outputs."
    return [str(v) for v in learn.dls.vocab]


def graph_of(learn: Learner, model: Served | None = None) -> bytes:
    """`learn` as an ONNX graph: uint8 pixels `(n, h, w, 3)` in, any n; probabilities `(n, c)` out; checked in full.

    Height and width are those of the Learner's data. Its labels and the reading of images are in the graph's metadata. `model`:
    what `served(learn)` gave, if it is at hand. Of a quantized Learner its own graph in 8 bits, between pixels and probabilities. Raises
    `ValueError` where torch cannot write the model."""
    if own := getattr(learn.model, 'pixels_graph', None): return own(learn)
    contract = input_contract(learn)
    w, h = contract['size']
    pixels = torch.randint(256, (2, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        with quiet_export():
            program = torch.onnx.export(model or served(learn), (pixels,), dynamo=True, external_data=False, verbose=False,
                                        dynamic_shapes=({0: torch.export.Dim('n')},), input_names=['pixels'], output_names=['probabilities'])
    except torch.onnx.OnnxExporterError as e:
        why = (str(e.__cause__ or e).strip() or type(e).__name__).split('\n')[0]
        raise BadValue(f'ship: torch cannot write this model as ONNX: {why}') from e
    proto = pooled(without_traces(program.model_proto))
    onnx.helper.set_model_props(proto, dict(labels=json.dumps(labels(learn)), input=json.dumps(contract)))
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def to_onnx(learn: Learner, path) -> Path:
    "Write `learn` to `path` as one ONNX file, the graph that `graph_of` makes, at once or not at all."
    with whole(path) as tmp: tmp.write_bytes(graph_of(learn))
    return Path(path)


@contextmanager
def quiet_export():
    "The exporter tells of its steps, and of what it fell back on, by print, warnings and logging."
    log = logging.getLogger('torch.onnx')
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
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
    biases = {t.name for t in g.initializer if t.data_type == onnx.TensorProto.INT32 and not numpy_helper.to_array(t).any()}
    for n in g.node:
        n.name = n.doc_string = ''
        if n.op_type == 'DequantizeLinear' and len(n.input) == 3 and n.input[2] in biases: del n.input[2]       # that of int8 weights stays: without it QGemm is not made
        known = onnx.defs.get_schema(n.op_type, version.get(n.domain, 1), n.domain).attributes if onnx.defs.has(n.op_type, n.domain) else {}
        for a in [a for a in n.attribute if a.name in known and known[a.name].default_value.SerializeToString() == a.SerializeToString()]: n.attribute.remove(a)

    public = {o.name for o in (*g.input, *g.output)} | {''}
    used, first = {i for n in g.node for i in n.input} | public, {}
    tensors = [onnx.TensorProto.FromString(t.SerializeToString()) for t in g.initializer if t.name in used]
    same = {t.name: first.setdefault((t.data_type, *t.dims, numpy_helper.to_array(t).tobytes()), t.name) for t in tensors if t.name not in public}
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
