"The learning-rate trial."
import pytest
import torch

from fastrecipes.training.finders import find_lr


def test_it_sweeps_geometrically_and_restores_the_weights(toy):
    learn = toy()
    before = learn.model.weight.data.clone()
    found = find_lr(learn, num_it=50)
    assert torch.equal(learn.model.weight.data, before)
    assert found.lrs[1]/found.lrs[0] == pytest.approx(10**(6/50), rel=1e-3) and found.lrs[0] == pytest.approx(1e-6)
    assert found.lrs[0] < found.lr < found.lrs[-1]


def test_a_trial_that_breaks_off_at_once_falls_back(toy):
    learn = toy()
    with torch.no_grad(): learn.model.weight.fill_(float('nan'))
    assert find_lr(learn).lr == 1e-3
