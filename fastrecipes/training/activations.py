"What layers make of a whole dataset, in files to be mapped: made once, whole or not at all, and found again as long as nothing has changed."
import os
import shutil
import time
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from fastai.basics import Learner, get_model, nn, noop, to_device
from fastai.data.core import Datasets, TfmdLists
from filelock import FileLock
from PIL import Image
from torch.utils.data import Subset

from fastrecipes.data.decoded import FLUSH, NoRoom, take_room
from fastrecipes.data.keyed import KeyedDL, keyed_kind
from fastrecipes.data.loaders import Indexed, in_order, samples, unvaried
from fastrecipes.errors import BadValue
from fastrecipes.files import in_bytes, writes
from fastrecipes.randomness import forked

__all__ = ['Stored', 'store', 'as_keyed']

VERSION = 1                                     # of what is stored and how it is named
PROBES = 16                                     # samples whose pixels are looked at, to see whether the transforms are the same


class Stored:
    "Activations and targets of both sides, mapped from the files in `folder`."
    def __init__(self, folder: Path, like: tuple, views: int):
        self.folder, self.like, self.views = folder, like, views
        self.columns = {side: [np.load(folder/f'{side}.{j}.npy', mmap_mode='r') for j in range(len(like))]
                        for side in ('train', 'valid') if (folder/f'{side}.0.npy').exists()}

    @property
    def size(self) -> int: return sum(f.stat().st_size for f in self.folder.iterdir())


def as_keyed(dl) -> KeyedDL:
    "A loader with keyed draws over the data of `dl`."
    return dl if isinstance(dl, KeyedDL) else dl.new(cls=keyed_kind(dl) or KeyedDL)


def _plain(learn: Learner, side: str) -> KeyedDL:
    "A loader of a side's samples, in their order, as validation shows them."
    dls = learn.dls
    return in_order(as_keyed(dls.train if side == 'train' else dls.valid), dls.loaders[min(1, len(dls.loaders)-1)])


def _varied(learn: Learner, view: int) -> KeyedDL:
    "A loader of the training samples as epoch number `view` shows them, all of them once."
    dl = as_keyed(learn.dls.train).new(shuffle=True, drop_last=False, sampler=None)
    dl.set_epoch(view)
    return dl


def _fingerprint(learn: Learner, body: list[str], views: int, dtype: str) -> str:
    "What is stored depends on it: the body and its weights, data, transforms, and how it is kept."
    digest, model = blake2b(digest_size=12), get_model(learn.model)
    _feed(digest, [VERSION, views, dtype, as_keyed(learn.dls.train).seed if views > 1 else None])
    for name in body:
        layer = model.get_submodule(name)
        _feed(digest, [name, repr(layer), layer.state_dict()])
    for side in ('train', 'valid'):
        dl = learn.dls.train if side == 'train' else learn.dls.valid
        _feed(digest, [side, len(dl.dataset)])
        _feed(digest, _source(dl.dataset))
        _feed(digest, _probe(_plain(learn, side), len(dl.dataset), unvaried(dl.dataset)))
    if views > 1: _feed(digest, _probe(_varied(learn, 0), len(learn.dls.train.dataset), nullcontext()))
    return digest.hexdigest()


def _probe(dl, n: int, block):
    "Some samples, far apart, as the body would meet them: transforms that differ give other pixels."
    with forked('precompute'), block:
        if dl.before_iter is not noop: dl.before_iter()
        b = dl.do_batch([dl.do_item(int(i)) for i in sorted(set(np.linspace(0, n-1, min(n, PROBES)).astype(int).tolist()))])
        return dl.after_batch(b if dl.device is None else to_device(b, dl.device))


def _source(data):
    "What the samples are made from, in their order."
    if isinstance(data, Indexed): return _source(data.dataset)
    if isinstance(data, Subset): return [list(data.indices), _source(data.dataset)]
    if isinstance(data, Datasets): return [_source(tl) for tl in data.tls]
    if isinstance(data, TfmdLists): return list(data.items)
    for names in (('tensors',), ('samples',), ('data', 'targets')):
        if all(hasattr(data, n) for n in names): return [getattr(data, n) for n in names]
    return [data[i] for i in range(len(data))]


def _feed(digest, o):
    "Take `o` into the digest; of files their path, size and time of change."
    if isinstance(o, torch.Tensor): o = o.detach().as_subclass(torch.Tensor).cpu().contiguous().numpy() if o.dtype != torch.bfloat16 else o.detach().float().cpu().numpy()
    if isinstance(o, Image.Image): o = np.asarray(o)
    if isinstance(o, np.ndarray) and o.dtype != object:
        digest.update(f'{o.dtype}{o.shape}'.encode())
        return digest.update(np.ascontiguousarray(o).view(np.uint8).data if o.size else b'')
    if isinstance(o, dict): o = list(o.items())
    if isinstance(o, (str, Path)):
        try: s = os.stat(o) if os.sep in str(o) else None
        except (OSError, ValueError): s = None
        return digest.update(f'{o!s}|'.encode() if s is None else f'{os.path.abspath(o)} {s.st_size} {s.st_mtime_ns}|'.encode())
    if hasattr(o, '__iter__'):
        for e in o: _feed(digest, e)
        return digest.update(b']')
    digest.update(f'{o!r}|'.encode())


def store(learn: Learner, body: list[str], folder: Path, views: int, dtype: str) -> tuple[Stored, bool]:
    """What the body makes of the data: found in `folder`, or worked out now and written there whole; and whether it was found.

    What was cut off goes on; others who ask meanwhile wait. Raises `NoRoom` where the disk is too full."""
    target = folder/_fingerprint(learn, body, views, dtype)
    first, like = _first(learn, body)
    if found := target.is_dir(): return Stored(target, like, views), found
    lock = FileLock(f'{target}.lock')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as e: raise NoRoom(f'{folder} cannot be written: {e.strerror or e}') from None
    try:
        if not target.is_dir(): _fill(learn, body, target, first, views, dtype)
    finally: lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
    return Stored(target, like, views), found


def _first(learn, body):
    "The elements of a sample as they are stored, and what their types are like."
    with forked('precompute'): b = samples(_plain(learn, 'valid'), 2)
    if len(b) < 2 or getattr(learn.dls, 'n_inp', 1) != 1 or not all(isinstance(t, torch.Tensor) for t in b):
        raise BadValue(f'precompute: a sample must be one input and its targets, all tensors, got {", ".join(type(t).__name__ for t in b)}; train on the inputs themselves')
    out = _answer(learn, body, b[0])
    return [out.cpu(), *(y.cpu() for y in b[1:])], (None, *(y[:0].cpu() for y in b[1:]))


@contextmanager
def _evaluating(layers: list[nn.Module]):
    modes = [(m, m.training) for layer in layers for m in layer.modules()]
    try:
        for layer in layers: layer.eval()
        with torch.no_grad(): yield
    finally:
        for m, mode in modes: m.training = mode


def _answer(learn, body, x) -> torch.Tensor:
    model = get_model(learn.model)
    layers = [model.get_submodule(n) for n in body]
    x = x.as_subclass(torch.Tensor).to(next(p for p in model.parameters()).device)
    n = len(x)
    with _evaluating(layers):
        for layer in layers: x = layer(x)
    if not isinstance(x, torch.Tensor) or len(x) != n:
        raise BadValue(f'precompute: the body must give one tensor with a row a sample, got {type(x).__name__}; train on the inputs themselves')
    return x.as_subclass(torch.Tensor).float()


def _fill(learn, body, target: Path, first, views: int, dtype: str):
    "Work out what goes into `target.part`, noting in its file `done` how far each pass has come, and give it its name when all is there."
    part = Path(f'{target}.part')
    n = {side: len(dl.dataset) for side, dl in (('train', learn.dls.train), ('valid', learn.dls.valid))}
    passes = [('train', v) for v in range(views)] + [('valid', 0)]*bool(n['valid'])
    shapes = {(side, j): (n[side]*(views if side == 'train' else 1), *t.shape[1:]) for side in n if n[side] for j, t in enumerate(first)}
    dtypes = [np.dtype(dtype), *(t.numpy().dtype for t in first[1:])]
    if not (part/'done.npy').exists(): _reserve(part, shapes, dtypes, len(passes))
    columns = {key: np.lib.format.open_memmap(part/f'{key[0]}.{key[1]}.npy', 'r+') for key in shapes}
    done = np.lib.format.open_memmap(part/'done.npy', 'r+')
    if writes():
        size = sum(c.nbytes for c in columns.values())
        each = f', {views} views of each for training,' if views > 1 else ''
        print(f'precompute: {sum(n.values()):,} samples{each} through the body once, {in_bytes(size)} in {target.parent}', flush=True)
    for i, (side, view) in enumerate(passes):
        dl = _varied(learn, view) if side == 'train' and views > 1 else _plain(learn, side)
        own = [columns[side, j] for j in range(len(first))]
        with forked('precompute'), nullcontext() if side == 'train' and views > 1 else unvaried(dl.dataset): _pass(learn, body, dl, own, view*n[side], n[side], done[i:i+1], side)
    _settle(columns.values(), done)
    del columns, done
    (part/'done.npy').unlink()
    os.replace(part, target)


def _pass(learn, body, dl, columns, offset: int, n: int, done, side: str):
    "One time through a loader, from the batch where it was cut off."
    dl.first, last, rows = int(done[0])//dl.bs, time.monotonic(), int(done[0])//dl.bs*dl.bs
    for i, b in enumerate(dl, dl.first):
        at = offset + dl.draws(i) % n
        values = [_answer(learn, body, b[0]), *b[1:]]
        if len(values[0]) != len(at): raise BadValue(f'precompute: batch {i} has {len(values[0])} samples where {len(at)} were asked for; leave out what cannot be read')
        for c, t in zip(columns, values, strict=True):
            t = t.detach().cpu().numpy()
            if c.dtype == np.float16 and t.dtype == np.float32 and np.abs(t[np.isfinite(t)], dtype=np.float32).max(initial=0) > np.finfo(np.float16).max:
                raise BadValue(f'precompute: dtype float16 holds values up to 65,504, and the body gives {np.abs(t[np.isfinite(t)]).max():.3g}; use float32')
            c[at] = t
        rows += len(at)
        if time.monotonic()-last > FLUSH:
            _settle(columns, done, rows)
            last = time.monotonic()
    if rows != n: raise BadValue(f'precompute: the {side} loader gave {rows} of {n} samples; leave out what cannot be read')
    _settle(columns, done, rows)


def _settle(columns, done, rows: int | None = None):
    "Note what is done only once it lies on the disk."
    for c in columns: c.flush()
    if rows is not None: done[0] = rows
    done.flush()


def _reserve(part: Path, shapes: dict, dtypes: list, passes: int):
    "Take the room for everything, and note that nothing is done."
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        take_room({part/f'{side}.{j}.npy': (shape, dtypes[j]) for (side, j), shape in shapes.items()}, part.parent)
        np.save(tmp := part/'done.tmp.npy', np.zeros(passes, np.int64))
        os.replace(tmp, part/'done.npy')
    except (OSError, NoRoom) as e:
        shutil.rmtree(part, ignore_errors=True)
        raise e if isinstance(e, NoRoom) else NoRoom(f'{part.parent} cannot be written: {e.strerror or e}') from None
