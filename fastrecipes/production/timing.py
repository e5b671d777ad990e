"How long a thing takes beside another: in turns, on one thread, so that whatever else the machine does falls on both."
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

__all__ = ['interleaved', 'image_times', 'medians', 'surely']

WARM, PAIRS, PATIENCE = 3, 50, 4.       # rounds before the timing; rounds timed, at most, and for at most so many seconds a contestant


def interleaved(runs: Mapping[str, Callable]) -> dict[str, list[float]]:
    """The ms that each of `runs` took in 5 to 50 rounds, called in turns, first one and then the other way round, with torch on one thread.

    In its turn each is called twice, and the second call timed: the first fills the caches that another has emptied, so that a thing takes as long here as by itself."""
    threads, rounds, names = torch.get_num_threads(), [], list(runs)
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            started = time.perf_counter()
            while len(rounds) < WARM + 5 or len(rounds) < WARM + PAIRS and time.perf_counter()-started < PATIENCE*len(runs):
                rounds.append({name: _ms(runs[name]) for name in names})
                names.reverse()
    finally: torch.set_num_threads(threads)
    return {name: [round(r[name], 4) for r in rounds[WARM:]] for name in runs}


def image_times(runs: Mapping[str, Callable], size: tuple[int, int]) -> dict[str, list[float]]:
    "`interleaved` for functions of pixels, each given one image of `size` (width, height): uint8 `(1, h, w, 3)`."
    pixels = np.random.default_rng(0).integers(0, 256, (1, size[1], size[0], 3), dtype=np.uint8)
    return interleaved({name: lambda run=run: run(pixels) for name, run in runs.items()})


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    "The median of each."
    return {name: round(statistics.median(t), 4) for name, t in times.items()}


def surely(after: list[float], before: list[float]) -> float:
    "`after` as a share of `before`, round by round: not more than this in three rounds of four. Noise alone does not bring it below 1."
    return float(np.quantile(np.divide(after, before), .75))


def _ms(run) -> float:
    run()
    start = time.perf_counter()
    run()
    return 1000*(time.perf_counter()-start)
