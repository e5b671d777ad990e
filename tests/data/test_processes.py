"Work spread over processes: in order, whole, and its errors where they can be caught."
import os
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrecipes.data.processes import CHUNK, FEW, each_chunk
from fastrecipes.errors import BadValue


@pytest.mark.parametrize('n', [0, 1, CHUNK, FEW-1, FEW, 3*FEW+5])
def test_every_item_once_and_in_order(n):
    said = list(each_chunk(lambda i: i*i, list(range(n)), workers=2))
    assert [v for _, values in said for v in values] == [i*i for i in range(n)] and [i for some, _ in said for i in range(n)[some]] == list(range(n))


def test_many_are_done_by_other_processes_and_few_by_threads():
    who = lambda i: (os.getpid(), threading.get_ident())
    many, few = ({w for _, ws in each_chunk(who, list(range(n)), workers=2) for w in ws} for n in (FEW, 2*CHUNK))
    assert all(pid == os.getpid() for pid, _ in few) and threading.get_ident() not in {t for _, t in few}
    if sys.platform == 'linux': assert len({pid for pid, _ in many}) == 2 and os.getpid() not in {pid for pid, _ in many}


@pytest.mark.parametrize('n', [2*CHUNK, FEW])
def test_nothing_is_drawn(n):
    drawn = lambda: (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    before = drawn()
    for _ in each_chunk(lambda i: i, list(range(n)), workers=2): pass
    assert drawn() == before


@pytest.mark.parametrize('n', [2*CHUNK, FEW])
def test_an_error_is_the_one_that_was_raised(n):
    def fails(i):
        if i == CHUNK+3: raise BadValue('three too many')
        return i
    done = []
    with pytest.raises(BadValue, match='^three too many$'):
        for some, _ in each_chunk(fails, list(range(n)), workers=2): done.append(some)
    assert done == [slice(0, CHUNK)]


def test_one_worker_needs_no_other_process():
    assert {p for _, ps in each_chunk(lambda i: os.getpid(), list(range(FEW)), workers=1) for p in ps} == {os.getpid()}


def test_what_is_written_to_a_mapped_file_is_there_afterwards(tmp_path):
    a = np.lib.format.open_memmap(Path(tmp_path/'a.npy'), 'w+', np.int64, (FEW,))
    def write(i): a[i] = i
    for _ in each_chunk(write, list(range(FEW)), workers=2): pass
    assert (np.load(tmp_path/'a.npy') == np.arange(FEW)).all()
