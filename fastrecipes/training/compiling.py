"The same network, computed faster: compiled to fewer and larger kernels, or with its pixels in the order that convolutions like."
from contextlib import contextmanager
from functools import partial
from typing import Literal, get_args

import torch
from fastai.basics import Learner, get_model, nn
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import AMPMode
from torch.utils._pytree import tree_leaves

from fastrecipes.errors import BadValue, nearest
from fastrecipes.technique import TechniqueCallback, put, say, technique
from fastrecipes.training.distributed import Distributed
from fastrecipes.training.glance import answer_of, glance, unseen

__all__ = ['Compile', 'ChannelsLastFormat', 'Mode']

Mode = Literal['default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs']


class Compile(TechniqueCallback):
    """Lend the network a compiled call for each batch, as `nn.Module.compile` would for good: pickles, hooks, graphs and dead fits see the plain one.

    The first batch of a kind is tried beforehand, with draws and statistics put back. Where that fails, all is computed without."""
    order = 89                                  # once others have put their hooks in place, and batches have their size

    def __init__(self, mode: str, backend: str):
        self.mode, self.backend, self.failed, self.made, self.lent, self.proved = mode, backend, None, None, None, set()

    def __getstate__(self): return {**vars(self), 'made': None, 'lent': None, 'proved': set()}      # compiled code stays here

    def before_batch(self):
        model = get_model(self.learn.model)
        if self.failed: return
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()):
            say(self.learn, 'compile', 'nothing is compiled in batches in which layers have hooks, for compiled code does not see those that come later')
            return
        if self.made is None or self.made[0] is not model:
            self.proved = set()
            self.made = model, torch.compile(model._call_impl, mode=self.mode, backend=self.backend, isolate_recompiles=True)  # else all networks share 8 compilations
        self.lent = model, vars(model).get('_compiled_call_impl')
        vars(model)['_compiled_call_impl'] = partial(self._call, *self.made)

    def after_batch(self): self._return()

    def abort(self, level): self._return()

    def _return(self):
        if self.lent is None: return
        (model, before), self.lent = self.lent, None
        vars(model).pop('_compiled_call_impl', None)
        if before is not None: vars(model)['_compiled_call_impl'] = before

    def _call(self, model, compiled, *args, **kwargs):
        "What stands in for the network's `__call__`."
        if self.failed: return model._call_impl(*args, **kwargs)
        if (mode := (model.training, torch.is_grad_enabled())) in self.proved: return compiled(*args, **kwargs)
        try:
            with _repeatable(model): _try_it(model, compiled, args, kwargs)
        except Exception as e:
            out = model._call_impl(*args, **kwargs)             # what is wrong with the batch is raised here, as ever
            self.failed = _reason(e)
            say(self.learn, 'compile', f'nothing is compiled, training goes on without: {self.backend} failed ({self.failed})', aloud=True)
            return out
        self.proved.add(mode)
        return compiled(*args, **kwargs)


def _try_it(model, compiled, args, kwargs):
    "Call the compiled network, and where it is to learn, take a gradient: backward passes are compiled when the first one is wanted."
    out = compiled(*args, **kwargs)
    if answers := [o for o in tree_leaves(out) if isinstance(o, torch.Tensor) and o.requires_grad]:
        torch.autograd.grad(sum(o.sum() for o in answers), [p for p in model.parameters() if p.requires_grad], allow_unused=True)


@contextmanager
def _repeatable(model: nn.Module):
    "Put draws and buffers (batch statistics) back after the block."
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == 'cuda'}
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng(devices): yield
    finally:
        with torch.no_grad():
            for b, before in buffers: b.copy_(before)


def _reason(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 and lines[0].endswith('raised:') else lines[0] if lines else type(e).__name__).rstrip('.:')


HOOKS = 'it hooks into layers anew in each batch, and compiled code does not see such hooks; keep one'


@technique('train', section='Training', source='https://docs.pytorch.org/docs/stable/generated/torch.compile.html', example=dict(backend='eager'),     # inductor takes half a minute
           refuses={'dropout': HOOKS, 'dropconnect': HOOKS, 'stochastic_depth': HOOKS,
                    'to_parallel': 'it copies the network for each batch, and copies are not compiled; use to_distributed'})
def compile(self: Learner, mode: Mode = 'default', backend: str = 'inductor') -> Learner:       # noqa: A001
    """Compile the network with `torch.compile` at its first batch: the same numbers but for rounding, in less time a batch.

    Compiling takes half a minute or more, so it is for long fits; gains are largest on GPUs and with `to_bf16`. `mode`: 'default',
    'reduce-overhead' (CUDA graphs, for small batches), 'max-autotune' (tries kernels, for minutes). `backend`: 'inductor' needs a C++ compiler
    on a CPU, Triton on a GPU; 'aot_eager' is for finding out what fails. Training and validation are compiled once each, and once more for
    batches of another size, the last one or those of `progressive_resize`: from then on any size will do. Where it fails it says so and goes on
    without. What is saved, exported and served is the plain network. Raises `ValueError` for an unknown mode or backend."""
    if mode not in get_args(Mode): raise BadValue(f'compile: mode must be one of {", ".join(get_args(Mode))}, got {mode!r}{nearest(mode, get_args(Mode))}')
    import torch._dynamo                        # two seconds, for those who use it
    if backend not in (known := torch._dynamo.list_backends(None)): raise BadValue(f'compile: backend must be one of {", ".join(known)}, got {backend!r}{nearest(backend, known)}')
    put(self, Compile(mode, backend))
    say(self, 'compile', f'forward and backward passes are compiled by {backend}' + f', mode {mode}'*(mode != 'default'))
    return self


class ChannelsLastFormat(TechniqueCallback, ChannelsLast):
    "Lay out weights `(o, i, h, w)` with the channels of a pixel side by side for as long as a fit or a validation lasts; afterwards as they were."
    order = Distributed.order-.1                # a wrapped network remembers how its weights lay

    def __init__(self): self.laid = []

    def __getstate__(self): return {**vars(self), 'laid': []}

    def before_fit(self):
        self._undo()
        self.laid = _lay(get_model(self.learn.model))

    def after_fit(self): self._undo()
    def abort(self, level):
        if level in ('validate', 'fit'): self._undo()

    def _undo(self):
        for p in self.laid: p.data = p.data.contiguous()
        self.laid = []


class ChannelsLastImages(TechniqueCallback):
    "Lay out images `(n, c, h, w)` like that, when all others have done with them."
    order = Compile.order-1
    def before_batch(self): self.learn.xb = tuple(map(_channels_last, self.learn.xb))


def _channels_last(x): return x.contiguous(memory_format=torch.channels_last) if isinstance(x, torch.Tensor) and x.ndim == 4 and x.is_floating_point() else x


def _lay(model: nn.Module) -> list[nn.Parameter]:
    "Lay out the weights of a network's 2d convolutions, and return those that lay otherwise."
    laid = [p for p in model.parameters() if p.ndim == 4 and p.is_contiguous()]
    for p in laid: p.data = _channels_last(p.data)
    return laid


@technique('train', section='Training', source='https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html', replaces='fastai 2.8.12')
def to_channelslast(self: Learner, use_amp: bool = False, amp_mode: Literal['fp16', 'bf16'] = 'fp16') -> Learner:
    """Lay out images and convolution weights with the channels of a pixel side by side, which is how the fast kernels read them.

    The same numbers but for rounding; faster for most convolution networks, above all in 16 bits. `use_amp`: also `to_fp16()` or, by `amp_mode`,
    `to_bf16()` (fastai's default, which on a CPU did nothing). A network without 2d convolutions has nothing to lay out and says so. Once a fit
    is over the weights lie as before. Raises `ValueError` for a network that looks at its pixels by `view`, which takes them in the usual order."""
    modes = [m.value for m in AMPMode]
    if amp_mode not in modes: raise BadValue(f'to_channelslast: amp_mode must be one of {", ".join(modes)}, got {amp_mode!r}')
    n = sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in self.model.modules())
    self.remove_cbs([ChannelsLast, ChannelsLastImages])
    if n: _try(self)
    if use_amp: self.to_fp16() if amp_mode == 'fp16' else self.to_bf16()
    if n:
        say(self, 'to_channelslast', f'images and the weights of {n} convolutions lie channels last')
        return put(put(self, ChannelsLastFormat()), ChannelsLastImages())
    say(self, 'to_channelslast', 'the network has no 2d convolution: nothing to lay out', aloud=True)
    return self


def _try(learn: Learner):
    "Raise where the network can take images of the usual layout only."
    if (seen := glance(learn, ())) is None or seen.error is not None: return
    model = get_model(learn.model)
    laid = _lay(model)
    try:
        with unseen(seen.xb[0].device): answer_of(model, tuple(map(_channels_last, seen.xb)))
    except RuntimeError as e:
        raise BadValue(f'to_channelslast: the network cannot take images channels last ({str(e).splitlines()[0]}); put reshape where it has view, or leave it off') from e
    finally:
        for p in laid: p.data = p.data.contiguous()
