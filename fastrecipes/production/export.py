"A Learner taken out of training: pickled for ourselves, or as a graph that takes pixels and gives probabilities."
import json
from copy import deepcopy
from functools import partial
from pathlib import Path

import onnx
import torch
from fastai.basics import Learner, defaults, get_model, nn
from fastai.callback.progress import ProgressCallback
from fastai.layers import ToTensorBase
from fastai.vision.all import IntToFloatTensor
from torch.nn import functional as F

from fastrecipes.data.images import Fit
from fastrecipes.data.statistics import PixelMap, normalization_of
from fastrecipes.errors import BadValue, few
from fastrecipes.objective import cross_entropy_of
from fastrecipes.production.graphs import as_onnx
from fastrecipes.repairs import export_to, holding

__all__ = ['export_learner', 'twin', 'Pixels', 'Served', 'served', 'plain_network', 'activation_of', 'input_contract', 'labels', 'graph_of']


def export_learner(learn: Learner, path) -> Path:
    """Pickle `learn` to `path` for `load_learner`, as `learn.export` does, and return the path: whole or not at all, `learn` untouched.

    In it are the network, the transforms, the loss and the classes; not the data, the optimizer, a teacher, or callbacks that only training needs."""
    return export_to(learn, path)


def twin(learn: Learner, model: nn.Module) -> Learner:
    "A Learner like `learn` on the same data that holds `model`: it validates, predicts and is exported; it has no optimizer and none of its callbacks but fastai's own, anew."
    return holding(learn, model).add_cbs([type(cb)() for cb in learn.cbs if type(cb) in (*defaults.callbacks, ProgressCallback)])


class Pixels(nn.Module):
    "uint8 pixels `(n, h, w, 3)` → numbers in [0, 1], normalised: `(n, 3, h, w)`."
    def __init__(self, normalize: PixelMap | None = None):
        super().__init__()
        self.normalize = normalize

    def forward(self, pixels):
        x = pixels.permute(0, 3, 1, 2).float()/255
        return x if self.normalize is None else self.normalize(x)


class Served(Pixels):
    "What is served: uint8 pixels `(n, h, w, 3)` → scaled to [0, 1] and normalised → the model → probabilities `(n, c)`."
    def __init__(self, model: nn.Module, activation, normalize: PixelMap | None = None):
        super().__init__(normalize)
        self.model, self.activation = model, activation

    def forward(self, pixels): return self.activation(self.model(super().forward(pixels)))


def served(learn: Learner) -> Served:
    "`learn` as it is served: a copy of its model on the CPU, in 32 bits and evaluation mode; `learn` keeps its device, mode and hooks."
    return Served(plain_network(learn), activation_of(learn.loss_func), normalization_of(learn)).eval()


def plain_network(learn: Learner, who: str = 'ship') -> nn.Module:
    """A copy of the network of `learn` on the CPU, in 32 bits and evaluation mode, without gradients and without what wraps it for several devices or compiled.

    Raises `ValueError`, in the name of `who`, for one that cannot be copied, as fastai's recurrent networks of texts."""
    model = get_model(learn.model)
    try: model = deepcopy(getattr(model, '_orig_mod', model))
    except RuntimeError as e:
        raise BadValue(f'{who}: {type(model).__name__} holds tensors that torch cannot copy (a weight that is computed anew in each pass, as in AWD_LSTM), so no graph is made of it; '
                       'export() keeps it for load_learner') from e
    model = model.cpu().float().eval().requires_grad_(False)
    for m in list(model.modules()):
        for name, child in m.named_children():
            if isinstance(child, ToTensorBase): setattr(m, name, nn.Identity())         # of a unet: types of tensors are nothing to a graph, and torch cannot trace them
    return model


def activation_of(loss_func, who: str = 'ship'):
    "What turns the outputs of a model trained by `loss_func` into probabilities. Raises `ValueError`, in the name of `who`, where the loss does not say."
    if ce := cross_entropy_of(loss_func): return partial(F.softmax, dim=ce.axis)
    if callable(activation := getattr(loss_func, 'activation', None)): return activation
    raise BadValue(f'{who}: {loss_func} does not say how outputs become probabilities; use a cross entropy, or a loss with an `activation` method')


def input_contract(learn: Learner) -> dict:
    "How an image becomes the input of the graph. Raises `ValueError` where the Learner's data are not those of `image_folder`."
    valid = getattr(learn.dls, 'valid', None)
    fit = next((t for t in getattr(getattr(valid, 'after_item', None), 'fs', ()) if isinstance(t, Fit)), None)
    if fit is None or not any(isinstance(t, IntToFloatTensor) for t in valid.after_batch.fs):
        raise BadValue('learn: must be a Learner on data made by image_folder, for what is shipped reads image files as training did, '
                       'and other data do not say how')
    return dict(size=list(fit.size), resize=fit.resize, mode='RGB', dtype='uint8', layout='NHWC',
                pixels='upright by EXIF, first frame, 16 bits scaled to 8, transparency on white, then resized by Pillow, bilinear')


def contract_if_any(learn: Learner) -> dict | None:
    "The `input_contract` of a Learner on data of `image_folder`, None on others."
    try: return input_contract(learn)
    except BadValue: return None


def two_pictures(contract: dict) -> torch.Tensor:
    "Pixels `(2, h, w, 3)` to trace a graph of this contract with."
    w, h = contract['size']
    return torch.randint(256, (2, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def labels(learn: Learner) -> list[str]:
    "The names of the classes, in the order of the model's outputs."
    return [str(v) for v in learn.dls.vocab]


def check_width(answers, names: list[str], who: str):
    "Raise where answers `(n, c)` are of another number of classes than there are `names`."
    if answers.ndim == 2 and answers.shape[1] != len(names):
        raise BadValue(f'{who}: the network gives {answers.shape[1]} outputs for {len(names)} classes ({few(names)}); its last layer must have {len(names)}')


def graph_of(learn: Learner, model: Served | None = None, *, opset: int | None = None, who: str = 'ship') -> bytes:
    """`learn` as an ONNX graph: uint8 pixels `(n, h, w, 3)` in, any n; probabilities `(n, c)` out; checked in full.

    Height and width are those of the Learner's data. Its labels and the reading of images are in the graph's metadata. `model`:
    what `served(learn)` gave, if it is at hand; `opset`: see `as_onnx`. Of a quantized Learner its own graph in 8 bits, between pixels and
    probabilities. Raises `ValueError`, in the name of `who`, where torch cannot write the model."""
    if own := getattr(learn.model, 'pixels_graph', None): return own(learn)
    contract = input_contract(learn)
    return served_graph(model or served(learn), labels(learn), contract, opset=opset, who=who)


def served_graph(model: Served, labels: list[str], contract: dict, *, opset: int | None = None, who: str = 'ship') -> bytes:
    "The ONNX graph of a served model, with its labels and the reading of images (`contract`) in its metadata."
    proto = as_onnx(model, (two_pictures(contract),), inputs=['pixels'], output='probabilities', opset=opset, who=who)
    onnx.helper.set_model_props(proto, dict(labels=json.dumps(labels), input=json.dumps(contract)))
    return proto.SerializeToString()
