"How long a thing takes beside another: in turns, on one thread, so that whatever else the machine does falls on both."
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

__all__ = ['interleaved', 'image_times']

WARM, PAIRS, PATIENCE = 3, 50, 4.       # rounds before the timing; rounds timed, at most, and for at most so many seconds a contestant


def interleaved(runs: Mapping[str, Callable]) -> tuple[dict[str, float], int]:
    "The median ms of each of `runs`, called in turns with torch on one thread; and the number of rounds, 5 to 50."
    threads, rounds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            started = time.perf_counter()
            while len(rounds) < WARM + 5 or len(rounds) < WARM + PAIRS and time.perf_counter()-started < PATIENCE*len(runs):
                rounds.append([_ms(run) for run in runs.values()])
    finally: torch.set_num_threads(threads)
    return {name: round(statistics.median(times), 4) for name, times in zip(runs, zip(*rounds[WARM:]))}, len(rounds)-WARM


def image_times(runs: Mapping[str, Callable], size: tuple[int, int]) -> tuple[dict[str, float], int]:
    "`interleaved` for functions of pixels, each given one image of `size` (width, height): uint8 `(1, h, w, 3)`."
    pixels = np.random.default_rng(0).integers(0, 256, (1, size[1], size[0], 3), dtype=np.uint8)
    return interleaved({name: lambda run=run: run(pixels) for name, run in runs.items()})


def _ms(run) -> float:
    start = time.perf_counter()
    run()
    return 1000*(time.perf_counter()-start)
