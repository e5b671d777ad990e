"Batches from many threads: every one gets its own answer, none waits for a batch to fill."
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import numpy as np
import pytest

from fastrecipes.production.serving_batches import Batcher


def doubled(x): return 2.*x


def test_alone_it_is_a_batch_of_one_without_waiting():
    sizes = []
    start = time.monotonic()
    assert Batcher(doubled, seen=sizes.append)(np.array([3.])).tolist() == [6.] and sizes == [1] and time.monotonic()-start < .5


def test_those_who_come_meanwhile_are_the_next_batches_of_at_most_four():
    sizes, entered, go = [], Event(), Event()
    def run(x):
        if not entered.is_set(): entered.set(), go.wait(10)
        return doubled(x)
    batcher, answers = Batcher(run, most=4, seen=sizes.append), {}
    ask = lambda i: answers.__setitem__(i, batcher(np.array([float(i)])).item())
    threads = [Thread(target=ask, args=(i,)) for i in range(11)]
    threads[0].start()
    assert entered.wait(10)
    for t in threads[1:]: t.start()
    while len(batcher.waiting) < 10: time.sleep(.001)
    go.set()
    for t in threads: t.join(10)
    assert sizes == [1, 4, 4, 2] and answers == {i: 2.*i for i in range(11)} and not batcher.busy


def test_sixteen_threads_get_their_own_answers_thousands_of_times():
    sizes = []
    batcher = Batcher(doubled, seen=sizes.append)
    with ThreadPoolExecutor(16) as pool: answers = list(pool.map(lambda i: batcher(np.array([float(i)])).item(), range(4000)))
    assert answers == [2.*i for i in range(4000)] and sum(sizes) == 4000 and max(sizes) <= 16 and not batcher.busy and not batcher.waiting


def test_an_error_reaches_all_of_its_batch_and_the_next_batch_runs():
    entered, go = Event(), Event()
    def run(x):
        if not entered.is_set(): entered.set(), go.wait(10)
        if (x < 0).any(): raise ValueError('negative')
        return doubled(x)
    batcher, got = Batcher(run, most=2), {}
    def ask(i):
        try: got[i] = batcher(np.array([float(i)])).item()
        except ValueError as e: got[i] = str(e)
    threads = []
    for i in (1, -2, 3, 4, 5):
        threads.append(Thread(target=ask, args=(i,)))
        threads[-1].start()
        assert entered.wait(10)
        while len(batcher.waiting) < len(threads)-1: time.sleep(.001)
    go.set()
    for t in threads: t.join(10)
    assert got == {1: 2., -2: 'negative', 3: 'negative', 4: 8., 5: 10.}
    with pytest.raises(ValueError): batcher(np.array([-1.]))
    assert batcher(np.array([1.])).item() == 2.


def test_a_run_that_answers_too_few_is_an_error_not_a_hang():
    with pytest.raises(ValueError): Batcher(lambda x: x[:0])(np.array([1.]))
