"What a server counts, in memory that its worker processes share: each answers for all."
import mmap
from threading import Lock

import numpy as np

__all__ = ['Metrics', 'ROUTES', 'STATUSES']

ROUTES = ('/', '/predict', '/card', '/healthz', '/readyz', '/metrics', '/openapi.json', 'other')
STATUSES = (200, 400, 404, 405, 408, 413, 415, 500, 503, 0)                     # 0: any other
SECONDS = (.005, .01, .025, .05, .1, .25, .5, 1., 2.5, 5., 10.)
SIZES = (1, 2, 4, 8, 16)
REQUESTS, LATENCY, BATCHES, FLYING = 'fastrecipes_requests_total', 'fastrecipes_predict_seconds', 'fastrecipes_batch_images', 'fastrecipes_predictions_in_flight'
SERIES = [(REQUESTS, r, s) for r in ROUTES for s in STATUSES] + [(LATENCY, b) for b in (*SECONDS, 'more', 'sum')] + \
         [(BATCHES, b) for b in (*SIZES, 'more', 'sum')] + [(FLYING,)]
INDEX = {series: i for i, series in enumerate(SERIES)}


class Metrics:
    """Counters of up to `workers` processes. Made before they are forked; each then writes to its own slot alone, so that nothing needs a lock between processes.

    A worker that takes the slot of a dead one counts on from there. `.text()`: all slots together, in Prometheus' text format."""
    def __init__(self, workers: int = 1):
        self.memory = mmap.mmap(-1, 8*len(SERIES)*workers)                      # anonymous: shared with children, on no disk
        self.all = np.frombuffer(self.memory, np.float64).reshape(workers, -1)
        self.owners, self.slot, self.lock = [None]*workers, 0, Lock()

    def give_slot(self, owner) -> int:
        "In the parent, before a fork: the slot of the coming process, called `owner`; what it had in flight when it died is forgotten."
        self.slot = self.owners.index(None) if None in self.owners else len(self.owners)-1
        self.owners[self.slot] = owner
        self.all[self.slot, INDEX[FLYING,]] = 0
        return self.slot

    def take_back(self, owner):
        "In the parent: the process `owner` is no more."
        if owner in self.owners: self.owners[self.owners.index(owner)] = None

    def add(self, *series, amount: float = 1.):
        "Add to a counter of this process."
        with self.lock: self.all[self.slot, INDEX[series]] += amount

    def request(self, route: str, status: int, seconds: float):
        "Count an answer; of a prediction that was made, how long it took too."
        self.add(REQUESTS, route if route in ROUTES else 'other', status if status in STATUSES else 0)
        if route == '/predict' and status == 200: self._observe(LATENCY, SECONDS, seconds)

    def batch(self, n: int):
        "Count a batch of `n` images."
        self._observe(BATCHES, SIZES, n)

    def in_flight(self, by: int):
        "Predictions that are being made: one more (1), one less (−1)."
        self.add(FLYING, amount=by)

    def _observe(self, name, bounds, value):
        self.add(name, next((b for b in bounds if value <= b), 'more'))
        self.add(name, 'sum', amount=value)

    def total(self, *series) -> float:
        "A counter over all processes."
        return float(self.all[:, INDEX[series]].sum())

    def text(self) -> str:
        "Prometheus' text format, version 0.0.4: https://prometheus.io/docs/instrumenting/exposition_formats"
        lines = [f'# HELP {REQUESTS} Answers by route and HTTP status.', f'# TYPE {REQUESTS} counter']
        lines += [f'{REQUESTS}{{route="{r}",status="{s or "other"}"}} {n:.0f}' for r in ROUTES for s in STATUSES if (n := self.total(REQUESTS, r, s))]
        lines += self._histogram(LATENCY, SECONDS, 'Seconds from the first byte of a prediction to its answer.')
        lines += self._histogram(BATCHES, SIZES, 'Images that were run as one batch.')
        lines += [f'# HELP {FLYING} Predictions that are being made.', f'# TYPE {FLYING} gauge', f'{FLYING} {self.total(FLYING):.0f}']
        return '\n'.join(lines) + '\n'

    def _histogram(self, name, bounds, said) -> list[str]:
        counts = np.cumsum([self.total(name, b) for b in (*bounds, 'more')])
        rows = [f'{name}_bucket{{le="{b if b == "+Inf" else format(b, "g")}"}} {n:.0f}' for b, n in zip((*bounds, '+Inf'), counts)]
        return [f'# HELP {name} {said}', f'# TYPE {name} histogram', *rows, f'{name}_sum {self.total(name, "sum"):g}', f'{name}_count {counts[-1]:.0f}']
