"Files of decoded pixels: made once, on every core, and mapped into the memory of whoever reads them."
import math
import os
import shutil
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np
from filelock import FileLock

from fastrecipes.data.processes import each_chunk
from fastrecipes.errors import BadValue
from fastrecipes.files import in_bytes

__all__ = ['NoRoom', 'decode_once', 'take_room']

FLUSH = 5.                      # seconds between two writes of what is done


class NoRoom(Exception):
    "There is no room on the disk for decoded pixels."


def decode_once(files: list[Path], how: str, decode: Callable[[Path], np.ndarray], folder: Path, workers: int | None = None) -> Path:
    """A file in `folder` that holds the pixels of `files`, a NumPy array `(n, …)` of uint8 to be mapped, not read.

    It is made by the first who asks: `decode(file)` gives the pixels of one image, all of one shape, in `workers` processes (see `each_chunk`). Its name
    depends on the files (path, size, time of change) and on `how`, which says what `decode` does. It appears whole or not at all;
    decoding that was cut off goes on, and others who ask meanwhile wait. Raises `NoRoom` where the disk is too full."""
    target = folder/f'{_fingerprint(files, how)}.npy'
    if target.exists(): return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock := f'{target}.lock'):
            if not target.exists(): _fill(target, files, decode, workers)
        Path(lock).unlink(missing_ok=True)
    except OSError as e: raise NoRoom(f'{folder} cannot be written: {e.strerror or e}') from None
    return target


def _fingerprint(files, how: str) -> str:
    digest, real = blake2b(how.encode(), digest_size=12), {}
    for f in files:
        s, folder = os.stat(f), os.path.dirname(f)
        if folder not in real: real[folder] = os.path.realpath(folder)
        digest.update(f'\n{real[folder]}/{os.path.basename(f)} {s.st_size} {s.st_mtime_ns}'.encode())
    return digest.hexdigest()


def _fill(target: Path, files, decode, workers):
    "Decode into `target.part`, marking in `target.done` what is there, and give it its name when all is."
    part, done = Path(f'{target}.part'), Path(f'{target}.done')
    first = decode(files[0])
    shape = len(files), *first.shape
    if not (part.exists() and done.exists() and done.stat().st_size == len(files)): _reserve(part, done, shape)
    print(f'cache: {len(files):,} images to decode once, {_px(first.shape)}, {in_bytes(math.prod(shape))} in {target.parent}', flush=True)
    _decode(np.lib.format.open_memmap(part, 'r+'), np.memmap(done, np.uint8, 'r+'), files, decode, workers)
    os.replace(part, target)
    done.unlink()


def _decode(pixels, there, files, decode, workers):
    "Fill the rows of `pixels` that `there` does not mark yet; processes share the file that `pixels` is mapped from."
    left, finished, last = np.flatnonzero(there == 0), [], time.monotonic()

    def fill(i):
        one = decode(files[i])
        if one.shape != pixels.shape[1:]:
            raise BadValue(f'cache: images must come out in one size, got {_px(one.shape)} for {files[i]} and {_px(pixels.shape[1:])} for {files[0]}; '
                           'resize them by an item transform')
        pixels[i] = one

    try:
        for done, _ in each_chunk(fill, left.tolist(), workers):
            finished.append(left[done])
            if time.monotonic()-last < FLUSH: continue
            _mark(pixels, there, finished)
            last = time.monotonic()
    finally: _mark(pixels, there, finished)


def _mark(pixels, there, finished: list):
    "Say what is done only once it lies on the disk."
    pixels.flush()
    for rows in finished: there[rows] = 1
    there.flush()
    finished.clear()


def _reserve(part: Path, done: Path, shape):
    "Take the room for all pixels, and note that none is decoded."
    try:
        take_room({part: (shape, np.uint8)}, part.parent)
        done.write_bytes(bytes(shape[0]))
    except OSError as e:
        part.unlink(missing_ok=True)
        raise NoRoom(f'{part.parent}: {e.strerror or e}') from None


def take_room(arrays: dict[Path, tuple], folder: Path):
    """Make a file of each of `arrays`, (shape, dtype), with its room taken now: one with holes would end in a bus error when the disk fills up.

    Raises `NoRoom` where `folder` has too little left, and `OSError` where it runs out all the same."""
    size, free = sum(math.prod(shape)*np.dtype(dtype).itemsize for shape, dtype in arrays.values()), shutil.disk_usage(folder).free
    if size > .95*free: raise NoRoom(f'{in_bytes(size)} are needed and {in_bytes(free)} are free in {folder}')
    for file, (shape, dtype) in arrays.items():
        np.lib.format.open_memmap(file, 'w+', dtype, shape)
        if hasattr(os, 'posix_fallocate'):          # on Linux
            with open(file, 'r+b') as f: os.posix_fallocate(f.fileno(), 0, file.stat().st_size)


def _px(shape) -> str: return f'{shape[-1]}×{shape[-2]} px'
