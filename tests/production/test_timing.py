"What is said about speed from times that are never twice the same."
import time

import numpy as np
import pytest

from fastrecipes.production.timing import image_times, interleaved, medians, surely


def test_each_is_called_in_every_round_and_none_always_first():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) or time.sleep(.001) for name in 'abc'})
    assert calls[::2] == calls[1::2]                        # once to fill the caches, once by the clock
    rounds = [tuple(calls[i:i+6:2]) for i in range(0, len(calls), 6)]
    assert all(sorted(r) == ['a', 'b', 'c'] for r in rounds) and {r[0] for r in rounds} == {'a', 'c'}
    assert len(times['a']) == len(rounds)-3 and min(times['b']) >= 1.


def test_a_thing_takes_as_long_beside_others_as_by_itself(monkeypatch):
    "By a clock of our own: a thing that finds the caches emptied by another takes 20 ms, else 1; what is timed is 1 ms in either case."
    now, last = [0.], []
    def run(name):
        now[0] += .001 if last[-1:] == [name] else .02
        last.append(name)
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    assert medians(interleaved({'a': lambda: run('a')})) == {'a': pytest.approx(1)}
    assert medians(interleaved({name: lambda name=name: run(name) for name in 'ab'})) == {'a': pytest.approx(1), 'b': pytest.approx(1)}


def test_noise_is_not_taken_for_a_gain_and_a_gain_is_seen_through_it():
    rng = np.random.default_rng(0)
    def noisy(ms): return ms*rng.lognormal(0, .05, 50)
    assert all(surely(noisy(1.), noisy(1.)) > 1 for _ in range(100))
    assert all(surely(noisy(.8), noisy(1.)) < .98 for _ in range(100))


def test_surely_is_the_upper_quartile_of_the_rounds():
    assert surely([1., 2., 3., 4., 5.], [1.]*5) == 4.


def test_an_image_of_the_size_that_is_served():
    seen = []
    assert medians(image_times({'run': lambda pixels: seen.append(pixels.shape)}, (4, 3)))['run'] == pytest.approx(0, abs=1.)
    assert set(seen) == {(1, 3, 4, 3)}
