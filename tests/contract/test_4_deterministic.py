"Clause 4, its first half: the same seed gives the same numbers, bit by bit; whatever else draws in between."
import numpy as np
import pytest
import torch

from .conftest import NAMES, learner, use


def trained(name, burn=0, seed=0):
    learn = use(learner(256, seed=seed), name)
    for _ in range(2):
        torch.rand(burn), np.random.rand(burn)
        learn.fit(1, 3e-3)
    return [p.detach().clone() for p in learn.model.parameters()], learn.recorder.values[-1]


@pytest.mark.parametrize('name', NAMES)
def test_the_same_seed_is_the_same_run(name):
    (a, history), (b, again) = trained(name), trained(name, burn=7)
    assert all(torch.equal(p, q) for p, q in zip(a, b)) and history == again


@pytest.mark.parametrize('name', NAMES)
def test_another_seed_is_another_run(name):
    (a, _), (b, _) = trained(name), trained(name, seed=1)
    assert not all(torch.equal(p, q) for p, q in zip(a, b))


@pytest.mark.parametrize('name', NAMES)
def test_lr_find_leaves_no_mark_on_what_follows(name):
    runs = []
    for find in (False, True):
        learn = use(learner(256), name)
        if find: learn.lr_find(num_it=6, show_plot=False)
        learn.fit(1, 3e-3)
        runs.append([p.detach().clone() for p in learn.model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*runs))
