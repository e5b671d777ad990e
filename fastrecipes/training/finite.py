"A loss that is not a number ends the fit before it costs the weights, and says which samples brought it."
import math
from pathlib import Path

import torch
from fastai.basics import Learner
from fastai.callback.fp16 import MixedPrecision, NonNativeMixedPrecision
from fastai.data.core import Datasets, TfmdDL
from torch import nn
from torch.utils.data import Dataset, Subset

from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import Indexed
from fastrecipes.errors import BadValue, few
from fastrecipes.randomness import forked
from fastrecipes.technique import TECHNIQUES, TechniqueCallback

__all__ = ['FiniteLoss']


class FiniteLoss(TechniqueCallback):
    """Before each backward pass look at the loss, before each step at the gradient; where one is not finite, stop, and say where it came from.

    The weights have not moved then, statistics of norm layers go back to before the batch, and gradients to 0. In after_batch, where
    fastai's TerminateOnNaNCallback looks, it is too late."""
    order, run_valid = MixedPrecision.order-.5, False       # after accumulation has cancelled what is no step yet, before fp16 scales, before clipping
    transient = ('stepped', 'running', 'kept', 'since', 'said')

    def __init__(self): self.stepped, self.running, self.kept, self.since, self.said = [], [], [], None, None

    def __call__(self, event_name):
        if event_name in ('before_train', 'before_batch', 'before_backward', 'before_step'): super().__call__(event_name)   # others, fastai looks up in vain: 20 µs each

    def before_train(self):
        self.stepped = [p for group in self.learn.opt.param_lists for p in group]
        self.running = [b for m in self.learn.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) for b in m.buffers(recurse=False)]
        self.kept, self.since = [b.clone() for b in self.running], None

    def before_batch(self):
        if self.running: torch._foreach_copy_(self.kept, self.running)     # the forward pass writes them: a NaN would stay for good

    def before_backward(self):
        if self.since is None: self.since = self.learn.iter
        value = _number(self.learn.loss_grad)
        if not math.isfinite(value): self._stop(f'the loss is {value:g}', self.learn.iter)

    def before_step(self):
        first, self.since = self.since, None
        grads = [p.grad._values() if p.grad.is_sparse else p.grad for p in self.stepped if p.grad is not None]
        if not grads or math.isfinite(_total(grads)) or _scaled(self.learn): return
        if all(bool(g.isfinite().all()) for g in grads): return     # only the sum of squares overflows
        names = [n for n, p in self.learn.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        self._stop(f'the gradient of {few(names, 3)} is not finite, though the loss is {_number(self.learn.loss):.4g},', first)

    def _stop(self, what: str, first: int):
        "Leave everything as it was before the batch, and raise."
        last = self.learn.iter
        with torch.no_grad():
            for b, before in zip(self.running, self.kept): b.copy_(before)
        self.learn.opt.zero_grad()
        try: why = self._why(range(first, last+1))
        except Exception: why = '.'             # on data more exotic than it knows; what matters is said
        where = f'batch {last}' if first == last else f'batches {first} to {last}'
        self.said = f'{what} in {where} of epoch {self.learn.epoch}{why} The weights are as they were before.'
        raise BadValue(self.said)

    def _why(self, iters) -> str:
        "Which samples those were, and what is wrong with them, or else with the weights, or else what may help."
        dl, learn = self.learn.dls.train, self.learn
        draws = _drawn(dl, iters)
        if len(iters) == 1 and draws is not None and len(draws) != len(learn.xb[0]): draws = None       # the loader skipped some
        def name(d): return f'{d % len(dl.dataset)}{_file(dl.dataset, d % len(dl.dataset))}'
        def of(found, name): return '; '.join(f'{part} has values that are not finite in sample {few(map(name, those))}' for part, those in found.items())
        which = '' if draws is None else f' (samples {few(map(name, draws))})'

        if found := _bad_items(dl, draws): return f'{which}: {of(found, name)}: mend or remove it.'
        if found := {part: rows for part, t in _parts(learn.xb, learn.yb) if (rows := _bad_rows(t))}:
            return f'{which}: {of(found, lambda i: name(draws[i]) if draws and len(iters) == 1 else f"{i} of the batch")}: look at it and its transforms.'
        if bad := [n for n, p in learn.model.named_parameters() if not p.isfinite().all()]:
            return f'{which}: {few(bad, 3)} held values that are not finite already; build the network again, or load weights that are.'
        ways = [f'a lower lr (now {max(h["lr"] for h in learn.opt.hypers):.2g})']
        if 'grad_clip' in TECHNIQUES and 'grad_clip' not in learn.techniques: ways.append('grad_clip()')
        if _scaled(learn): ways.append('to_bf16() instead of to_fp16()')
        return f'{which}: its inputs, targets and the weights are finite; try {", ".join(ways)}, or look at these samples.'


def _scaled(learn: Learner) -> bool:
    "Whether fp16 scales the loss: what overflows then is skipped, and the scale lowered."
    scaler = vars(learn).get('scaler')
    return scaler is not None and scaler.is_enabled() or any(isinstance(cb, NonNativeMixedPrecision) for cb in learn.cbs)


def _number(t) -> float: return float(t.detach().as_subclass(torch.Tensor).sum() if t.numel() > 1 else t.detach().as_subclass(torch.Tensor))


def _total(grads) -> float:
    norms = torch._foreach_norm(grads)
    try: return float(torch.stack(norms).sum())
    except RuntimeError: return sum(map(float, norms))      # a network in parts, on several devices


def _drawn(dl, iters) -> list[int] | None:
    "What the loader drew for these batches of the iteration that is running; None where it does not tell."
    if not isinstance(dl, TfmdDL) or not dl.indexed or dl.prebatched: return None
    if isinstance(dl, KeyedDL): return [int(d) for i in iters for d in dl.draws(i)]
    order = vars(dl).get('_DataLoader__idxs')
    return [d for i in iters for d in order[i*dl.bs:(i+1)*dl.bs]] if isinstance(order, list) else None


def _file(data, i: int) -> str:
    "` (cat/3.png)` for the file that sample `i` of a dataset was read from, empty where it was not."
    while isinstance(data, (Indexed, Subset)): i, data = data.indices[i] if isinstance(data, Subset) else i, data.dataset
    items = data.items if isinstance(data, Datasets) else getattr(data, 'samples', None) if isinstance(data, Dataset) else None
    item = items[i] if items is not None and i < len(items) else None
    if isinstance(item, tuple) and item: item = item[0]
    return f' ({"/".join(Path(item).parts[-2:])})' if isinstance(item, (str, Path)) else ''


def _parts(xb, yb):
    "Inputs and targets by name: x, y, or x[0], x[1], … where there are several."
    for name, ts in (('x', xb), ('y', yb)):
        for i, t in enumerate(ts): yield (name if len(ts) == 1 else f'{name}[{i}]'), t


def _bad_rows(t) -> list[int]:
    if not isinstance(t, torch.Tensor) or not t.is_floating_point(): return []
    return (~t.isfinite()).reshape(len(t), -1).any(1).nonzero().flatten().tolist()


def _bad_items(dl, draws) -> dict[str, list[int]]:
    "The samples that come out of the dataset with values that are not finite, by part: in the batch, mixing has spread them."
    found = {}
    for d in draws or ():
        with forked('preflight'): item = dl.do_item(d)
        if not isinstance(item, tuple): continue
        n = getattr(dl, 'n_inp', len(item)-1)
        for part, t in _parts(item[:n], item[n:]):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and not t.isfinite().all(): found.setdefault(part, []).append(d)
    return found
