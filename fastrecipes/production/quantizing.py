"`learn.quantize`: from a Learner to one in 8 bits, with what that cost and gained."
from copy import deepcopy
from functools import cache
from typing import Literal, get_args

import numpy as np
import onnx
import torch
from fastai.basics import Learner, patch
from fastai.data.core import TfmdDL

from fastrecipes.arguments import checked
from fastrecipes.data.loaders import in_order, unvaried
from fastrecipes.errors import BadValue, nearest
from fastrecipes.files import writes
from fastrecipes.objective import cross_entropy_of
from fastrecipes.production.entries import two_samples
from fastrecipes.production.graphs import compact, quiet
from fastrecipes.production.quantization import quantize_dynamic, quantize_within, quantized_share
from fastrecipes.production.quantized import Quantization, Quantized, network_graph, quantized_learner, times_of_one
from fastrecipes.randomness import forked, stream
from fastrecipes.report import intervals
from fastrecipes.training.schedules import SCHEDULES

__all__ = ['calibration_batches']

Kind = Literal['static', 'dynamic', 'qat']
AGREE = .98             # of the validation samples on which a graph must answer as the network that was trained for it


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
    if not ys: raise BadValue('quantize: there is no validation sample to measure it by; set learn.dls to DataLoaders that have some, for an exported Learner has none')
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
@checked
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

    if kind == 'dynamic': made = quantize_dynamic(graph, 0. if force else .5)
    elif kind == 'static':
        batches = calibration_batches(self, calibration or 128, seed)
        made, in_float = quantize_within(graph, batches, lambda g: _points_lost(quality(g)), .5 if tolerance is None else tolerance)
    else:
        with quiet('torch.utils._pytree'):              # torchao 0.18 makes torch 2.15 warn of an enumeration that it registers
            from fastrecipes.production.qat import trained_for_8_bits
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


def _layer(graph: bytes, node: str) -> str:
    "A node by the name that its layer has in the network, as far as its weights tell."
    n = next(n for n in onnx.load_from_string(graph).graph.node if n.name == node)
    held = [i.rpartition('.')[0] for i in n.input if '.' in i and 'val_' not in i]
    return held[0] if held else node.removeprefix('node_')
