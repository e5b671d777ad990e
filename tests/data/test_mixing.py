"Blends: the formula, the distribution of shares, the keys."
import numpy as np
import pytest
import torch
from fastai.basics import Callback
from scipy import stats

from fastrecipes.data.mixing import blend
from fastrecipes.technique import discover

discover()


class Watch(Callback):
    order = 50
    def before_fit(self): self.seen = []
    def before_batch(self):
        if self.learn.training: self.seen.append((self.learn.xb[0].clone(), self.learn.yb[0], self.learn.objective_cb.partner, self.learn.objective_cb.share))


def test_a_blend_by_hand():
    x = torch.tensor([[0., 10.], [4., 20.]])
    assert blend(x, torch.tensor([1, 0]), torch.tensor([.25, 1.])).tolist() == [[3., 17.5], [4., 20.]]


def test_shares_follow_the_beta_distribution(toy):
    toy(n=640).mixup(.4).fit(5, cbs=(watch := Watch()))
    shares = np.concatenate([s.numpy() for *_, s in watch.seen])
    assert len(shares) == 3200 and stats.kstest(shares, stats.beta(.4, .4).cdf).pvalue > .01


def test_draws_belong_to_the_batch_not_to_what_ran_before(toy):
    runs = []
    for burn in (0, 5):
        learn = toy().mixup(.4)
        torch.rand(burn); np.random.rand(burn)
        learn.fit(2, cbs=(watch := Watch()))
        runs.append(watch.seen)
    assert all(torch.equal(a, b) for one, two in zip(*runs) for a, b in zip(one, two))
    assert not torch.equal(runs[0][0][3], runs[0][1][3])


def test_hard_targets_stay_in_the_batch_so_that_training_metrics_read_them(toy):
    toy().mixup(1.).fit(1, cbs=(watch := Watch()))
    assert watch.seen[0][1].dtype == torch.long


def test_it_tells_what_it_did(toy):
    learn = toy().mixup(.4)
    learn.fit(1)
    assert 'of 16 samples of the first batch blended' in learn.techniques['mixup'].effect


def test_categories_cannot_be_blended(toy):
    from fastai.basics import nn
    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(5, 3)
        def forward(self, x): return self.e(x[:, 0])
    learn = toy(model=Embed()).mixup(.4)
    for dl in learn.dls.loaders: dl.dataset.dataset = torch.utils.data.TensorDataset(torch.randint(5, (64, 1)), torch.randint(3, (64,)))
    with pytest.raises(ValueError, match='blends numbers'): learn.fit(1)
