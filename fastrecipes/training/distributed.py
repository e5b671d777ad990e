"Several processes for one Learner, each with a share of every batch: they train what one process would, with the batch of all of them."
import math
import os
import sys
from datetime import timedelta

import torch
from accelerate import PartialState
from fastai.basics import GatherPredsCallback, Learner, apply, nn, noop, num_distrib, rank_distrib
from fastai.callback.progress import ProgressCallback
from fastai.data.core import TfmdDL
from fastai.distributed import DistributedDataParallel, DistributedTrainer
from torch import distributed

from fastrecipes.data.keyed import Keyed, KeyedDL, keyed, keyed_kind
from fastrecipes.errors import BadValue, PeerGone
from fastrecipes.objective import objective
from fastrecipes.repairs import fitting
from fastrecipes.technique import TechniqueCallback, put, say, technique

__all__ = ['Distributed', 'one_process']

GONE = ('closed by peer', 'reset by peer', 'broken pipe', 'timed out', 'timeout', 'connection refused', 'remote process exited')


class Distributed(TechniqueCallback, DistributedTrainer):
    """Give each process its share of every batch, average the gradients, and bring validation predictions together before they are judged.

    The network is wrapped around each forward pass only: whoever looks at it, or saves it, sees the plain one. Each process sees the
    predictions for the whole validation batch, so losses and metrics of any kind are those of a single process, exactly."""
    order = Keyed.order+.5                      # the epoch is known; before anyone looks at the loader or at predictions

    def __init__(self, sync_bn: bool, timeout: float): self.sync_bn, self.timeout, self.ddp, self.inner = sync_bn, timeout, None, None

    def before_fit(self):
        if not fitting(self.learn): return
        device = next(self.learn.model.parameters()).device
        if self.sync_bn and device.type == 'cuda': self.learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.learn.model)
        self.ddp = DistributedDataParallel(self.learn.model, device_ids=[device.index] if device.type == 'cuda' else None)

    def before_train(self): self.learn.dl = self._share(self.learn.dl)

    def before_validate(self):
        alone = any(isinstance(cb, GatherPredsCallback) and cb.with_input for cb in self.learn.cbs)     # `predict`, on one process or on all
        self.learn.dl = self._share(self.learn.dl, 1 if alone else num_distrib())
        self.learn.dl.gathered = True

    def _share(self, dl, world: int | None = None) -> KeyedDL:
        return _keyed(dl).shared(rank_distrib() if world != 1 else 0, world or num_distrib())

    def before_batch(self):
        if self.learn.training: self.inner, self.learn.model = self.learn.model, self.ddp

    def after_pred(self):
        self._unwrap()
        dl = self.learn.dl
        if self.learn.training or dl.world == 1: return
        whole = dl.bs*dl.world
        n = min(whole, dl.n-self.learn.iter*whole)              # the last batch: some processes repeated a sample of it
        self.learn.pred, self.learn.yb = (apply(lambda t: _gathered(t, n), o) for o in (self.learn.pred, self.learn.yb))

    def after_cancel_batch(self): self._unwrap()
    def after_fit(self): self.ddp = None

    def abort(self, level):
        self._unwrap()
        if level != 'fit': return None
        self.ddp, e = None, sys.exc_info()[1]
        if isinstance(e, RuntimeError) and any(word in str(e).lower() for word in GONE):
            return PeerGone(f'to_distributed: another of the {num_distrib()} processes is gone, or silent for {self.timeout:g} s ({str(e).splitlines()[0]:.120})')

    def _unwrap(self):
        if self.inner is not None: self.learn.model, self.inner = self.inner, None


def _keyed(dl) -> KeyedDL: return dl if isinstance(dl, KeyedDL) else dl.new(cls=keyed_kind(dl) or KeyedDL)


def _gathered(t, n: int):
    "What all processes hold of a batch, one behind the other: `n` samples."
    if not isinstance(t, torch.Tensor): return t
    t = t.detach().as_subclass(torch.Tensor)
    if t.dtype in (torch.float16, torch.bfloat16): t = t.float()            # gloo has no 16-bit floats
    parts = [torch.empty_like(t) for _ in range(num_distrib())]
    distributed.all_gather(parts, t.contiguous())
    return torch.cat(parts)[:n]


@technique('train', section='Training', source='https://docs.pytorch.org/docs/stable/notes/ddp.html', touches=('model', 'inference'), replaces='fastai 2.8.12',
           refuses={'to_parallel': 'each splits a batch over devices; keep to_distributed, which is faster'})
def to_distributed(self: Learner, sync_bn: bool = True, timeout: float = 600.) -> Learner:
    """Train in several processes, one a GPU or, on a CPU, as many as you start: `torchrun --nproc-per-node 2 -m fastrecipes image-classifier …`.

    Each process takes its share of every batch: the batch size is that of one of them, as in torch, so that two train as one would with
    twice the batch. `sync_bn`: batch norm sees the whole batch (GPUs only; on a CPU each process's share). `timeout` > 0 s: how long a
    process waits for one that is silent before it gives up. Validation losses, metrics and `get_preds` are exact and the same in all; the
    first process alone prints and writes. In one process it says so and changes nothing. Raises `ValueError` outside the range, and for
    loaders that are not fastai's."""
    if not timeout > 0: raise BadValue(f'to_distributed: timeout must be > 0 s, got {timeout}')
    self.remove_cb(DistributedTrainer)
    n = num_distrib()
    if n < 2:
        say(self, 'to_distributed', 'one process here: nothing to share; start several with torchrun --nproc-per-node 2 …', aloud=True)
        return self
    if not all(isinstance(dl, TfmdDL) for dl in self.dls.loaders):
        raise BadValue(f'to_distributed: needs fastai loaders, got {", ".join(type(dl).__name__ for dl in self.dls.loaders)}; `as_dataloaders` converts torch\'s')
    state = PartialState(cpu=torch.device(self.dls.device or 'cpu').type == 'cpu', timeout=timedelta(seconds=timeout))
    self.dls.to(state.device)
    keyed(self)
    objective(self).distributed = True
    if rank_distrib():
        self.remove_cb(ProgressCallback)
        self.logger = noop
    bs = self.dls.train.bs
    say(self, 'to_distributed', f'{n} processes, each with {bs} of the {n*bs} samples of a batch, {math.ceil(len(self.dls.train)/n)} batches an epoch')
    return put(self, Distributed(sync_bn, timeout))


def one_process(who: str):
    "Raise where `torchrun` started more than one process for what only one can do."
    if (n := int(os.environ.get('WORLD_SIZE', 1))) > 1:
        raise BadValue(f'{who}: runs in one process, and torchrun started {n}; train with image-classifier --to_distributed --out RUN, then give RUN to compress and ship')
