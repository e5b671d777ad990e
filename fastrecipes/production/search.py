"What a network must come to, how much of it must go for that, and how long a search may take."
import time
from collections.abc import Callable
from dataclasses import dataclass

from fastrecipes.errors import BadValue
from fastrecipes.training.resume import remember

__all__ = ['Budget', 'Targets', 'least_cut']

MOST, HALVINGS = .95, 6         # a search ends at this ratio, and halves what is left so often


@dataclass(frozen=True)
class Targets:
    "What is asked of a compressed network: `max_mb` > 0 megabytes (10⁶ bytes) of .onnx at most, `max_ms` > 0 milliseconds for one image on one thread at most; None: either way."
    max_mb: float | None = None
    max_ms: float | None = None

    def __post_init__(self):
        for name, v in vars(self).items():
            if v is not None and not v > 0: raise BadValue(f'{name}: above 0, or none at all, got {v}')

    def __bool__(self): return any(v is not None for v in vars(self).values())

    def excess(self, size_bytes: int, ms: float) -> float:
        "How many times too much the worse of the two is; at most 1 where both are met."
        return max([v/most for v, most in ((size_bytes/1e6, self.max_mb), (ms, self.max_ms)) if most is not None], default=0.)

    def met(self, size_bytes: int, ms: float) -> bool: return self.excess(size_bytes, ms) <= 1

    def __str__(self): return ' and '.join(f'{v:g} {unit}' for v, unit in ((self.max_mb, 'MB'), (self.max_ms, 'ms an image')) if v is not None)


class Budget:
    "A number of minutes that a run which was cut off and goes on has in all: what was decided before is decided so again."
    def __init__(self, minutes: float):
        if not minutes > 0: raise BadValue(f'minutes: above 0, got {minutes}')
        self.seconds, self.before, self.since = 60*minutes, 0., time.monotonic()

    def allows(self, what: str, seconds: float = 0.) -> bool:
        "Whether `what`, which takes about so many `seconds`, is begun in time; where not, a sentence says so."
        self.before, self.since = remember(f'spent before {what}', lambda: self.spent), time.monotonic()
        if self.before + seconds <= self.seconds: return True
        print(f'{what}: left out, {self.before/60:.1f} of {self.seconds/60:g} minutes are gone; minutes=… allows more', flush=True)
        return False

    @property
    def spent(self) -> float: return self.before + time.monotonic() - self.since


def least_cut(cost: Callable[[float], tuple[int, float]], targets: Targets, most: float = MOST) -> float:
    """The least share to remove so that `targets` are met, to a 64th of `most`: 0 where they are met as it is. `cost(share)`: (bytes, ms) that are left.

    Raises `ValueError` where not even `most` of it, in [0, 1), is enough."""
    if targets.met(*(least := cost(0.))): return 0.
    if not most or not targets.met(*(least := cost(most))):
        without = f'without {most:.0%} of its channels' if most else 'with all its channels'
        more = '' if most else '; prune=True lets it lose some'
        raise BadValue(f'{without} it has {least[0]/1e6:.3g} MB and takes {least[1]:.3g} ms an image, where {targets} are asked for{more}')
    low, high = 0., most
    for _ in range(HALVINGS): low, high = (low, mid) if targets.met(*cost(mid := (low+high)/2)) else (mid, high)
    return high
