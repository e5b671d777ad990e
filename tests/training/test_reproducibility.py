"Seeds and memory."
import gc
import os
import random
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

from fastrecipes.training.reproducibility import clean_mem, seed_everything


def test_all_generators_repeat():
    def draws(): return random.random(), np.random.rand(), torch.rand(1).item()
    assert seed_everything(3) == 3
    first = draws()
    seed_everything(3)
    assert draws() == first
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_hash_seed_reaches_child_processes():
    seed_everything(5)
    try: outs = {subprocess.run([sys.executable, '-c', 'print(hash("x"))'], capture_output=True, text=True).stdout for _ in range(2)}
    finally: del os.environ['PYTHONHASHSEED']
    assert len(outs) == 1


def test_the_same_seed_trains_the_same_weights(toy):
    def trained():
        seed_everything(1)
        learn = toy().mixup(.4).balance()
        learn.fit(2, 1e-2)
        return learn.model.weight.data
    assert torch.equal(trained(), trained())


def test_clean_mem_frees_a_learner_and_what_the_last_error_held(toy):
    learn = toy()
    learn.fit(1)
    ref = weakref.ref(learn.model)
    sys.last_value = ValueError(learn)
    gc.disable()
    try:
        del learn
        assert ref() is not None
        clean_mem()
        assert ref() is None
    finally: gc.enable()


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r'seed: a whole number from 0 to 2\*\*32-1, got -1'): seed_everything(-1)
    for seed in ('a', 1.5, None):
        with pytest.raises(ValueError, match=f'seed: a whole number .*got {seed!r}'): seed_everything(seed)
    assert seed_everything(np.int64(3)) == 3
