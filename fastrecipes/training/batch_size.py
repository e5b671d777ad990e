"How large a batch pays: the gradient noise scale of a network on its data, and the largest batch that fits the device."
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from fastai.basics import CancelBatchException, CancelFitException, Learner, apply, find_bs, num_distrib, patch
from fastai.data.core import TfmdDL
from matplotlib.figure import Figure

from fastrecipes.arguments import check_types
from fastrecipes.data.keyed import Keyed, with_train
from fastrecipes.data.loaders import batch_size_of
from fastrecipes.errors import BadValue
from fastrecipes.randomness import stream
from fastrecipes.training.aside import Trial, aside
from fastrecipes.training.reproducibility import clean_mem

__all__ = ['FoundBatch', 'largest', 'noise_and_signal', 'noise_scale']

LEAST, CLASSIC = 8, 64                          # a smaller batch has too little for batch norm to average; the value to take where nothing is known
RESAMPLED = 2000


def noise_and_signal(small: int, big: int, of_small, of_big) -> tuple:
    """Unbiased estimates of tr(Σ) and |G|² from squared norms of gradients over `small` and `big` samples (arXiv:1812.06162, appendix A.1).

    Σ is the covariance of the gradient of one sample, G the gradient that all of them would give. Either estimate may come out negative."""
    return (of_small-of_big)/(1/small - 1/big), (big*of_big - small*of_small)/(big-small)


def noise_scale(small: int, big: int, of_small, of_big, level: float = .95) -> tuple[float, tuple[float, float]]:
    """tr(Σ)/|G|² in samples, from one pair of squared norms `(n,)` each, and its interval by the percentiles of a bootstrap over the pairs.

    The ratio of the means, not the mean of ratios, which has none. Infinite where no gradient can be told from the noise."""
    s, g = noise_and_signal(small, big, np.asarray(of_small, float), np.asarray(of_big, float))
    drawn = stream('find_batch_size').integers(len(s), size=(RESAMPLED, len(s)))
    def ratio(s, g): return np.where(g > 0, np.maximum(s, 0)/np.where(g > 0, g, 1), np.inf)
    tails = [(1-level)/2, (1+level)/2]
    low, high = np.quantile(ratio(s[drawn].mean(1), g[drawn].mean(1)), tails, method='nearest')     # between a number and infinity there is no mean
    return float(ratio(s.mean(), g.mean())), (float(low), float(high))


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    "The largest n ≤ `most` that `fits`, by doubling from `start` and then bisection; 0 if none does."
    good, bad, n = 0, most+1, min(start, most)
    while good < n < bad:
        if fits(n): good = n
        else: bad = n
        n = (good+bad)//2 if bad <= most else min(2*good, most)
    return good


@dataclass(frozen=True)
class FoundBatch:
    "A batch size, what it is read from, and how it was limited; sizes are in samples."
    noise_scale: float              # tr(Σ)/|G|²; infinite where no gradient can be told from the noise
    interval: tuple                 # its 95 % interval over the pairs
    suggestion: int                 # a power of two
    why: str
    fits: int | None                # the largest batch that fits the device; None where it was not tried
    limit: str                      # how that was found, or why it was not
    sizes: tuple                    # of the two batches of a pair
    norms: tuple                    # (squared norm at the small size, at the big one) of each pair

    def __str__(self):
        low, high = self.interval
        return f'noise scale {self.noise_scale:.3g} ({low:.3g} to {high:.3g}, {len(self.norms)} pairs)\nbatch size {self.suggestion}: {self.why}\n{self.limit}'

    def plot(self) -> Figure:
        """What a batch size costs: optimizer steps and samples to the same loss, each as a multiple of its least, 1 + B/b and 1 + b/B at noise scale B.

        The crossing is at B; the bands are its interval. Returns the figure."""
        fig = Figure(figsize=(6, 3.8), layout='constrained')
        ax, marks = fig.subplots(), [v for v in (self.noise_scale, *self.interval, self.suggestion, self.fits) if v and math.isfinite(v)]
        x = np.geomspace(max(min(marks)/8, 1), max(marks)*8, 200)
        def both(scale): return (np.full_like(x, np.nan), np.ones_like(x)) if math.isinf(scale) else (1 + scale/x, 1 + x/max(scale, 1e-9))
        for i, (label, color) in enumerate((('optimizer steps', 'C0'), ('samples', 'C1'))):
            ax.plot(x, both(self.noise_scale)[i], color=color, label=label)
            edges = [np.where(np.isnan(e), 1e9, e) for e in (both(v)[i] for v in self.interval)]
            ax.fill_between(x, *edges, color=color, alpha=.15, lw=0)
        ax.axvline(self.suggestion, color='.2', label=f'suggestion: {self.suggestion}')
        if self.fits: ax.axvline(self.fits, color='C3', ls='--', label=f'largest that fits: {self.fits}')
        low, high = self.interval
        ax.set(xscale='log', yscale='log', xlim=(x[0], x[-1]), ylim=(1, 100), xlabel='batch size (samples)', ylabel='× the least possible',
               title=f'noise scale {self.noise_scale:.3g} ({low:.3g} to {high:.3g})')
        ax.xaxis.set_major_formatter(lambda v, _: f'{v:g}')
        ax.yaxis.set_major_formatter(lambda v, _: f'{v:g}')
        ax.legend(loc='upper right', framealpha=.9)
        return fig


@patch
def find_batch_size(self: Learner, pairs: int = 16, times: int = 8) -> FoundBatch:
    """Suggest a batch size from the gradient noise scale (arXiv:1812.06162), and on a GPU find the largest that fits.

    32 or 64 are the classic values. Below the noise scale, gradients are mostly noise: half the batch needs twice the steps, at the same cost in
    samples, and small batches leave a GPU idle. Above it, gradients are alike: a larger batch costs more samples and hardly saves a step; it
    may generalize worse, and needs a higher rate. The scale grows as training goes on: measure after an epoch or so rather than at the start.

    Gradients are those of the training loss with all techniques, over `pairs` ≥ 2 pairs of a batch of the loader's size (smaller where there
    are few samples) and of `times` ≥ 2 such batches together. No step is taken: the Learner is as before, also after Ctrl-C. Batch norm and
    mixing look at the small batch in both. Raises `ValueError` outside these ranges, for too few samples, and in several processes."""
    check_types(Learner.find_batch_size, dict(pairs=pairs, times=times), 'find_batch_size')
    for name, v in dict(pairs=pairs, times=times).items():
        if v < 2: raise BadValue(f'find_batch_size: {name} must be ≥ 2, got {v}')
    if num_distrib() > 1: raise BadValue(f'find_batch_size: measures in one process, and there are {num_distrib()}; call it before they are started')
    with aside(self, 'find_batch_size'):
        n, bs = _prepare(self, times)
        pick = _Gradients(pairs, times, bs)
        self.fit(math.ceil(pairs/(len(self.dls.train)//times)), cbs=pick)
    if len(pick.norms) < 2: raise BadValue(f'find_batch_size: of {pairs} pairs the gradient is finite in {len(pick.norms)}; `learn.preflight()` looks at the data')
    scale, interval = noise_scale(bs, bs*times, *zip(*pick.norms))
    fits, limit = _device_limit(self, n)
    return FoundBatch(scale, interval, *suggest(scale, fits, n), fits, limit, (bs, bs*times), tuple(pick.norms))


def suggest(scale: float, fits: int | None, n: int) -> tuple[int, str]:
    "The power of two nearest to the noise scale, within what batch norm, the device and `n` training samples allow; and why."
    top = 2**int(math.log2(max(min(n, fits or n), 1)))
    limit = 'the largest that fits' if fits and fits < n else f'all there is of {n} training samples'
    if not math.isfinite(scale):
        return min(CLASSIC, top), 'a classic value, for no gradient can be told from the noise of these pairs: more pairs may tell, or the network is trained to its end'
    wanted = 2**round(math.log2(max(scale, 1)))
    if wanted > top: return top, f'{limit}; the noise scale asks for {wanted}: accumulate gradients (grad_accum) to get there'
    if wanted < LEAST <= top: return LEAST, f'above the noise scale of {scale:.3g}, for smaller batches leave batch norm and the device too little'
    return wanted, 'the power of two nearest to the noise scale: half of it would need about 1.5 times the steps, twice of it 1.5 times the samples'


def _prepare(learn: Learner, times: int) -> tuple[int, int]:
    "Give the Learner a loader with at least two pairs an epoch, of batches of one size: the number of samples, and that size."
    dl = learn.dls.train
    bs = batch_size_of(dl)
    if isinstance(dl, TfmdDL) and dl.indexed and not dl.prebatched:
        n, size = dl.n, min(bs, dl.n//(2*times))
        if size < 2: raise BadValue(f'find_batch_size: {n} training samples are too few for pairs of a batch and {times} together; it takes {4*times}')
        learn.dls = with_train(learn.dls, dl.new(bs=size, drop_last=True))
        return n, size
    if bs is None or len(dl) <= times: raise BadValue(f'find_batch_size: a {type(dl).__name__} of {len(dl)} batches is too short for {times} together; give it smaller batches')
    return len(dl)*bs, bs


class _Gradients(Trial):
    "After each backward pass take the gradient, and cancel the step; keep the squared norms of single gradients and of the mean of `times` of them."
    order = 1000                                # after all who have a part in the gradient of one batch
    def __init__(self, pairs, times, bs):
        super().__init__()
        self.pairs, self.times, self.bs, self.norms = pairs, times, bs, []

    def before_train(self): self._begin()
    def _begin(self): self.sum, self.singles = {}, []

    def after_backward(self):
        scaler = vars(self.learn).get('scaler')
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.
        grads = {p: p.grad.to_dense().clone().float()/scale for ps in self.learn.opt.param_lists for p in ps if p.grad is not None}
        self.learn.opt.zero_grad()
        if not math.isfinite(norm := _square(grads.values())): self._begin()
        elif find_bs(self.learn.yb) == self.bs:
            self.singles.append(norm)
            for p, g in grads.items(): self.sum[p] = self.sum[p].add_(g) if p in self.sum else g
        if len(self.singles) == self.times:
            self.norms.append((sum(self.singles)/self.times, _square(self.sum.values())/self.times**2))
            self._begin()
        if len(self.norms) == self.pairs: raise CancelFitException('enough')
        raise CancelBatchException('no step')


def _square(ts) -> float: return float(torch.stack([t.square().sum().double() for t in ts]).sum().cpu())


def _device_limit(learn: Learner, n: int) -> tuple[int | None, str]:
    "The largest batch that fits the device of the Learner, up to `n`, and how that was found."
    device = torch.device(getattr(learn.dls, 'device', None) or next(learn.model.parameters()).device)
    if device.type != 'cuda': return None, f"the largest batch was not looked for: on a {device.type.upper()} the machine's memory is the limit, and it slows down before it fails"
    size = largest_batch(learn, n)
    return size, f'the largest batch that fits {torch.cuda.get_device_name(device)}: {size}' + (', the whole training set' if size == n else '')


def largest_batch(learn: Learner, most: int) -> int:
    "The largest batch ≤ `most` that two training steps fit into the device's memory with; the Learner is as before."
    with aside(learn, 'largest_batch'):
        return largest(lambda n: _fits(learn, n), getattr(learn.dls.train, 'bs', None) or 1, most)


def _fits(learn: Learner, n: int) -> bool:
    try: learn.fit(2, cbs=_Tiled(n))
    except Exception as e:
        if not _is_out_of_memory(e): raise
        fits = False
    else: fits = True
    learn.dl, learn.xb, learn.yb, learn.pred, learn.loss, learn.loss_grad = None, (None,), (None,), None, None, None
    for p in learn.model.parameters(): p.grad = None
    clean_mem()                                 # the frames of the traceback held what filled the memory
    return fits


def _is_out_of_memory(e) -> bool: return isinstance(e, torch.cuda.OutOfMemoryError) or isinstance(e, RuntimeError) and 'ALLOC_FAILED' in str(e)     # of cuBLAS, cuDNN


class _Tiled(Trial):
    "Make batches of `n` samples by repeating those of the loader; two of them."
    order = Keyed.order+.5                      # before anyone looks at the batch
    def __init__(self, n):
        super().__init__()
        self.n = n

    def before_batch(self):
        at = torch.arange(self.n) % (bs := find_bs(self.learn.yb))
        def tiled(t): return t[at.to(t.device)] if isinstance(t, torch.Tensor) and t.ndim and len(t) == bs else t
        self.learn.xb, self.learn.yb = apply(tiled, self.learn.xb), apply(tiled, self.learn.yb)

    def after_batch(self):
        if self.learn.train_iter >= 2: raise CancelFitException('fits')
