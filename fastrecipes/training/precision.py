"In how many bits a network computes: the forward pass in 16, weights and optimizer in 32, on whatever device the data are."
import warnings

import torch
from fastai.basics import L, Learner
from fastai.callback.fp16 import MixedPrecision
from torch.overrides import TorchFunctionMode

from fastrecipes.errors import BadValue
from fastrecipes.technique import TechniqueCallback, applied, put, say, technique

__all__ = ['Autocast', 'device_of', 'low_precision']

CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


class Autocast(TechniqueCallback, MixedPrecision):
    """Run each forward pass under `torch.autocast` on the device of the data; scale the loss where float16 needs it.

    fastai 2.8.12 asks for a GPU whatever the device, and leaves autocast on when a forward pass dies."""
    def __init__(self, wanted: torch.dtype, **scaling):
        self.wanted, self.scaling, self.inside, self.guards = wanted, scaling, False, False

    def before_fit(self):
        device = device_of(self.learn).type
        dtype = low_precision(device, self.wanted)
        self.autocast, self.inside, self.scales = torch.autocast(device, dtype), False, L()
        self.guard, self.sound = Unwritten() if device == 'cpu' else None, set()
        self.learn.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16, **self.scaling)

    def before_batch(self):
        self.autocast.__enter__()
        self.inside, self.shapes = True, tuple(getattr(x, 'shape', None) for x in self.learn.xb)
        self.guards = self.guard is not None and self.learn.training and self.shapes not in self.sound
        if self.guards: self.guard.__enter__()

    def after_pred(self):
        if self.guards and not self.guard.met: self.sound.add(self.shapes)          # a watch costs time, and inputs of one shape meet the same
        self._leave()
        super().after_pred()

    def after_loss(self): pass                      # the loss is computed in 32 bits

    def after_cancel_batch(self): self._leave()
    def abort(self, level): self._leave()

    def _leave(self):
        if self.inside and self.guards: self.guard.__exit__(None, None, None)
        if self.inside: self.autocast.__exit__(None, None, None)
        self.inside = False


class Unwritten(TorchFunctionMode):
    """Compute in 32 bits the convolutions whose bfloat16 gradient torch 2.15 leaves unwritten on a CPU: `met` is whether there were any.

    oneDNN skips the taps of a padded kernel that see no pixel, where a picture is narrower than the stride (in 3D, than the kernel): what lay
    in memory before, NaN or 1e33 or yesterday's gradient, is then the gradient of those weights."""
    met = False

    def __enter__(self):
        self.met = False
        return super().__enter__()

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f not in CONVOLUTIONS or not _skips(*args, **kwargs): return f(*args, **kwargs)
        self.met = True
        with torch.autocast('cpu', enabled=False):
            return f(*(a.float() if isinstance(a, torch.Tensor) else a for a in args), **{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})


def _skips(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> bool:
    size, kernel = input.shape[2-weight.ndim:], weight.shape[2:]
    strides = [stride]*len(size) if isinstance(stride, int) else stride
    return max(kernel) > 1 and any(n < s or len(size) == 3 and n < k for n, s, k in zip(size, strides, kernel))


def device_of(learn: Learner) -> torch.device:
    "What a fit computes on: fastai moves the network to the device of the loaders; torch's own have none, and their batches follow the network."
    device = getattr(learn.dls, 'device', None)
    return next(learn.model.parameters()).device if device is None else torch.device(device)


def low_precision(device: str, wanted: torch.dtype) -> torch.dtype:
    "The 16-bit type that a forward pass on `device` can use for `wanted`: a CPU has bfloat16 only. Raises where a GPU lacks bfloat16."
    if device == 'cpu': return torch.bfloat16
    if device == 'cuda' and wanted is torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise BadValue('to_bf16: this GPU has no bfloat16; use to_fp16()')
    return wanted


def _emulated() -> bool:
    "Whether this CPU computes bfloat16 in software: oneDNN takes it everywhere, in hardware only with AVX512-BF16 or AMX."
    has = [getattr(torch.cpu, f'_is_{kind}_supported', lambda: False)() for kind in ('avx512_bf16', 'amx_tile')]
    return not any(has) and torch.backends.cpu.get_cpu_capability().startswith(('AVX', 'DEFAULT', 'NO AVX'))


def _lower(learn: Learner, name: str, wanted: torch.dtype, **scaling) -> Learner:
    device = device_of(learn).type
    got = low_precision(device, wanted)
    put(learn, Autocast(wanted, **scaling))
    bits = str(got).removeprefix('torch.')
    if got is wanted: say(learn, name, f'forward passes in {bits} on {device}')
    else: say(learn, name, f'forward passes in {bits}: a CPU has no fast {str(wanted).removeprefix("torch.")}', aloud=True)
    if device == 'cpu' and _emulated(): warnings.warn(f'{name}: this CPU emulates bfloat16, so expect it to be slower than 32 bits')
    return learn


@technique('train', section='Training', source='arXiv:1710.03740', touches=('precision', 'gradient', 'inference'), replaces='fastai 2.8.12',
           refuses={'to_bf16': 'each sets the precision of the forward pass; keep one (to_fp32() undoes either)'},
           formula=r'g = \frac{1}{s}\,\nabla(s\,L)')
def to_fp16(self: Learner, init_scale: float = 2.**16, growth_factor: float = 2., backoff_factor: float = .5, growth_interval: int = 2000) -> Learner:
    """Compute the forward pass in float16, with a scaled loss: about half the memory, and faster on a GPU with tensor cores.

    Weights, optimizer and loss stay in float32. `init_scale` > 0 is what the loss is multiplied by at first; it shrinks by
    `backoff_factor` (0–1) when a gradient overflows and that step is skipped, and grows by `growth_factor` > 1 after
    `growth_interval` good steps. On a CPU it means bfloat16, which needs no scale, and says so. Validation and `get_preds` run in the
    same precision; a bundle is made in float32. Raises `ValueError` for a value outside its range."""
    for name, value, fine, domain in (('init_scale', init_scale, init_scale > 0, '> 0'), ('growth_factor', growth_factor, growth_factor > 1, '> 1'),
                                      ('backoff_factor', backoff_factor, 0 < backoff_factor < 1, 'between 0 and 1'), ('growth_interval', growth_interval, growth_interval >= 1, '≥ 1')):
        if not fine: raise BadValue(f'to_fp16: {name} must be {domain}, got {value}')
    return _lower(self, 'to_fp16', torch.float16, init_scale=init_scale, growth_factor=growth_factor, backoff_factor=backoff_factor, growth_interval=growth_interval)


@technique('train', section='Training', source='arXiv:1905.12322', touches=('precision', 'inference'), replaces='fastai 2.8.12')
def to_bf16(self: Learner) -> Learner:
    """Compute the forward pass in bfloat16: the range of float32 with 8 bits of mantissa, so no loss scale is needed.

    About half the memory, and faster where the hardware has it (GPUs since Ampere, CPUs with AVX512-BF16 or AMX); a CPU without
    emulates it, with a warning. Raises `ValueError` on a GPU that lacks it."""
    return _lower(self, 'to_bf16', torch.bfloat16)


@technique('train', section='Training', source='https://docs.fast.ai/callback.fp16.html', touches=('precision', 'inference'),
           after=('to_fp16', 'to_bf16'), replaces='fastai 2.8.12')
def to_fp32(self: Learner) -> Learner:
    "Compute in float32 throughout: undoes `to_fp16` and `to_bf16`."
    self.remove_cb(MixedPrecision)
    undone = [n for n in ('to_fp16', 'to_bf16') if applied(self).pop(n, None)]
    say(self, 'to_fp32', f'undid {undone[0]}' if undone else 'it was in 32 bits already')
    return self
