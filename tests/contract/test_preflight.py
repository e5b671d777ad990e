"Whatever the technique: what is wrong is said before anything moved, and a batch that is not finite costs no weight."
import pytest
import torch
from torch.utils.data import TensorDataset

from fastrecipes.training.finite import FiniteLoss

from .conftest import NAMES, X, Y, learner, use

BAD = list(range(0, 192, 10))                   # so many that one of them is in the first batches, also where sampling leaves some out


def tensors(learn): return [t.clone() for t in learn.model.state_dict().values()]


@pytest.mark.parametrize('name', NAMES)
def test_a_loader_without_a_batch_is_refused_before_anything_moved(name):
    learn = use(learner(192), name)
    dl = learn.dls.train
    dl.bs = 10*dl.n
    before = tensors(learn), list(learn.cbs), dl.epoch, torch.get_rng_state()
    for fit in (lambda: learn.fit(1, 3e-3), lambda: learn.fit_one_cycle(1, 3e-3), lambda: learn.lr_find(show_plot=False)):
        with pytest.raises(ValueError, match=f'^bs: {10*dl.n} is more than the {dl.n} training samples, which leaves no batch; use bs={dl.n} or less$'): fit()
    assert all(torch.equal(a, b) for a, b in zip(before[0], tensors(learn))) and (list(learn.cbs), dl.epoch) == before[1:3] and torch.equal(torch.get_rng_state(), before[3])


@pytest.mark.parametrize('name', NAMES)
def test_a_batch_that_is_not_finite_is_named_and_the_weights_stay_finite(name):
    learn = learner(192)
    x = X[:192].clone()
    x[BAD, 0, 0, 0] = float('nan')
    learn.dls.train_ds.dataset = TensorDataset(x, Y[:192])
    use(learn, name)
    with pytest.raises(ValueError) as e: learn.fit(1, 3e-3)
    said = str(e.value)
    assert said.startswith('the loss is nan in batch ') and ' of epoch 0 (samples ' in said and ': x has values that are not finite in sample ' in said
    named = said.split('not finite in sample ')[1].split(': mend')[0].split(', …')[0].split(', ')
    assert {int(n) for n in named} <= set(BAD) and said.endswith('The weights are as they were before.')
    assert all(t.isfinite().all() for t in tensors(learn)) and not [cb for cb in learn.cbs if isinstance(cb, FiniteLoss)]
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
