"Requests that wait at once are run as one batch; nobody waits for a batch to fill."
from collections import deque
from collections.abc import Callable
from threading import Lock

import numpy as np

__all__ = ['Batcher', 'MOST']

MOST = 16                               # images a batch: beyond it a CPU gains nothing, and the first would wait for the last


class Batcher:
    """`run` (pixels `(n, h, w, 3)` → probabilities `(n, c)`) for one image at a time, from many threads: `batcher(pixels)` → `(c,)`.

    Who finds it idle runs what is there, itself alone as a rule; those who come meanwhile are the next batch, at most `most` of them, run by
    the first of them. An error of `run` is raised in every thread of its batch. `seen(n)` is told the size of each batch."""
    def __init__(self, run: Callable, most: int = MOST, seen: Callable = lambda n: None):
        self.run, self.most, self.seen = run, most, seen
        self.lock, self.waiting, self.busy = Lock(), deque(), False

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        job = _Job(pixels)
        with self.lock:
            self.waiting.append(job)
            first, self.busy = not self.busy, True
        if not first: job.turn.acquire()        # until it is answered, or the next to run a batch
        if not job.done: self._run_waiting(job)
        if job.error: raise job.error
        return job.answer  # pyright: ignore[reportReturnType]

    def _run_waiting(self, own: '_Job'):
        "One batch of what waits, `own` the first of it; then wake the answered, and the one who runs the next."
        with self.lock: jobs = [self.waiting.popleft() for _ in range(min(self.most, len(self.waiting)))]
        try:
            answers = self.run(np.stack([job.pixels for job in jobs]))
            for job, answer in zip(jobs, answers, strict=True): job.answer = answer
            self.seen(len(jobs))
        except Exception as e:
            for job in jobs: job.error = e
        finally:
            with self.lock:
                following = self.waiting[0] if self.waiting else None
                self.busy = following is not None
            for job in jobs:
                job.done = True
                if job is not own: job.turn.release()
            if following: following.turn.release()


class _Job:
    def __init__(self, pixels):
        self.pixels, self.answer, self.error, self.done, self.turn = pixels, None, None, False, Lock()
        self.turn.acquire()
