"The same done to many files at once, on every core."
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader

__all__ = ['each_chunk']

CHUNK, FEW = 64, 512        # items done in one go; items below which starting processes takes longer than they save


def each_chunk(f: Callable, items: list, workers: int | None = None) -> Iterator[tuple[slice, list]]:
    """`f(item)` of each item, chunk by chunk in their order: (which items, what `f` gave for them); an exception of `f` is raised here.

    In `workers` processes (default: one a core, at most 16) where there are many items and processes can be forked, else in threads: on small
    images Python itself is busy, and its threads wait for each other. `f` needs no pickling and must not be torch's work, what it gives must be
    picklable. The processes end with this one, however it ends. Nothing is drawn: a run that finds the work done trains the same."""
    workers, chunks = workers or min(16, os.cpu_count()), [slice(i, i+CHUNK) for i in range(0, len(items), CHUNK)]
    todo = _Chunks(f, items, chunks)
    if len(items) >= FEW and workers > 1 and sys.platform == 'linux':
        done = DataLoader(todo, batch_size=None, num_workers=workers, collate_fn=_as_it_is, multiprocessing_context='fork', prefetch_factor=4,
                          generator=torch.Generator())             # else its workers' seed is taken from the one that draws the weights
        yield from zip(chunks, map(_or_raise, done))
        return
    with ThreadPoolExecutor(workers) as pool:
        try: yield from zip(chunks, map(_or_raise, pool.map(todo.__getitem__, range(len(chunks)))))
        finally: pool.shutdown(cancel_futures=True)


class _Chunks:
    "A dataset of chunks: torch's loader has processes that watch over each other, and keeps the order."
    def __init__(self, f, items, chunks): self.f, self.items, self.chunks = f, items, chunks
    def __len__(self): return len(self.chunks)
    def __getitem__(self, i):
        try: return [self.f(o) for o in self.items[self.chunks[i]]]
        except Exception as e: return e


def _as_it_is(o): return o


def _or_raise(o):
    if isinstance(o, Exception): raise o
    return o
