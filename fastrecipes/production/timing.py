"How long a thing takes beside another: in turns, on one thread, so that whatever else the machine does falls on both."
import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ['interleaved']

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


def _ms(run) -> float:
    start = time.perf_counter()
    run()
    return 1000*(time.perf_counter()-start)
