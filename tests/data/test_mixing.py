"Blends: the formula, the distribution of shares, the keys."
import numpy as np
import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, nn
from scipy import stats

from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import Indexed
from fastrecipes.data.mixing import blend, boxes, paste
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
    assert 'of 16 samples of its first batch blended' in learn.techniques['mixup'].effect


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


def images(n=64, side=8, masks=False, seed=0, loss_func=None, bs=16):
    "A Learner on noise images; with `masks`, a class for each pixel, which is also written into the image's first channel."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, side, side, generator=g)
    y = torch.randint(3, (n, side, side) if masks else (n,), generator=g)
    if masks: x[:, 0] = y.float()
    ds = Indexed(torch.utils.data.TensorDataset(x, y), vocab=range(3))
    dls = DataLoaders(KeyedDL(ds, bs, seed=seed, shuffle=True, drop_last=True, num_workers=0), KeyedDL(ds, bs, num_workers=0), device=torch.device('cpu'))
    model = nn.Conv2d(3, 3, 1) if masks else nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    learn = Learner(dls, model, loss_func or CrossEntropyLossFlat(axis=1 if masks else -1))
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


class Batches(Callback):
    "The inputs and targets of training batches as the model and the loss meet them, and what the Objective was told."
    order = 60
    def before_fit(self): self.seen = []
    def before_batch(self):
        o = self.learn.objective_cb
        if self.learn.training: self.seen.append((self.learn.xb[0].clone(), self.learn.yb[0].clone(), o.partner, o.share))


def test_boxes_by_hand_and_at_the_border():
    mask = boxes(torch.tensor([.75, .75]), torch.tensor([[.5, .5], [0., 1.]]), 4, 8)      # area ¼: 2×4 px of 4×8
    assert mask[0].nonzero().tolist() == [[r, c] for r in (1, 2) for c in (2, 3, 4, 5)]
    assert mask[1].nonzero().tolist() == [[0, 6], [0, 7]]


def test_a_paste_by_hand_out_of_place():
    x = torch.tensor([[[[1., 2.]]], [[[3., 4.]]]])
    assert paste(x, torch.tensor([1, 0]), torch.tensor([[[False, True]], [[False, False]]])).tolist() == [[[[1., 4.]]], [[[3., 4.]]]]
    assert x[0, 0, 0].tolist() == [1., 2.]


def test_the_share_is_what_is_visible():
    learn = images().cutmix()
    x0 = learn.dls.train_ds.dataset.tensors[0]
    learn.fit(1, cbs=(watch := Batches()))
    for x, _, partner, share in watch.seen:
        share = torch.where(partner == torch.arange(len(partner)), 1., share)       # pasted into itself, it shows all of itself
        index = [int((x0 == img[None]).all(1).flatten(1).sum(1).argmax()) for img in x]
        visible = torch.stack([(img == x0[i]).all(0).float().mean() for img, i in zip(x, index)])
        clear = share > .5                                       # the image that shows most of itself is the sample itself
        assert torch.allclose(visible[clear], share[clear])


def test_cutmix_writes_into_the_dataset_in_fastai_and_not_here():
    from fastai.callback.mixup import CutMix
    def changed(add):
        learn = images()
        x0 = learn.dls.train_ds.dataset.tensors[0].clone()
        class Views(Callback):
            "Give slices of the dataset's tensor, as a loader of cached batches does."
            order = -5
            def before_batch(self): self.learn.xb = (self.learn.dls.train_ds.dataset.tensors[0][:16],)
        add(learn)
        learn.fit(1, cbs=Views())
        return not torch.equal(learn.dls.train_ds.dataset.tensors[0], x0)
    assert changed(lambda learn: learn.add_cb(CutMix())) and not changed(lambda learn: learn.cutmix())


def test_a_mask_stays_behind_under_cutmix_in_fastai_and_is_pasted_here():
    from fastai.callback.mixup import CutMix
    def off(add):
        learn = images(masks=True)
        add(learn)
        seen = []
        class Compare(Callback):
            order = 60
            def before_batch(self):
                if self.learn.training: seen.append((self.learn.xb[0][:, 0] != self.learn.yb[0]).float().mean())
        learn.fit(1, cbs=Compare())
        return float(max(seen))
    assert off(lambda learn: learn.add_cb(CutMix())) > .05 and off(lambda learn: learn.cutmix()) == 0


def test_mixup_and_cutmix_raise_together_in_fastai_and_take_turns_here():
    from fastai.callback.mixup import CutMix, MixUp
    with pytest.raises(RuntimeError): images(loss_func=CrossEntropyLossFlat()).add_cbs([MixUp(), CutMix()]).fit(1)
    learn = images(n=640).mixup(.4).cutmix(1.)
    x0 = learn.dls.train_ds.dataset.tensors[0]
    pixels = set(x0.flatten().tolist())
    learn.fit(1, cbs=(watch := Batches()))
    pasted = [bool(np.isin(x.flatten().tolist(), list(pixels)).all()) for x, *_ in watch.seen]      # a blend makes new values, a paste does not
    assert 8 <= sum(pasted) <= 32 and len(pasted) == 40 and all(share is not None for *_, share in watch.seen)
    assert 'blended' in learn.techniques['mixup'].effect and 'pasted' in learn.techniques['cutmix'].effect


def test_the_mean_share_is_the_papers():
    lam = torch.from_numpy(np.random.default_rng(0).beta(1, 1, 20_000)).float()
    centre = torch.from_numpy(np.random.default_rng(1).random((20_000, 2))).float()
    area = boxes(lam, centre, 64, 64).float().mean((1, 2))
    # E[area]: a box of relative side r about a uniform centre keeps r − r²/4 of each side, and r² is uniform: ∫(r − r²/4)² 2r dr
    assert float(area.mean()) == pytest.approx(2*(1/4 - 1/2/5 + 1/16/6), abs=.01)


def test_cutmix_refuses_what_is_no_image(toy):
    with pytest.raises(ValueError, match='cutmix: needs images .* got .n, 4.; use mixup'): toy().cutmix().fit(1)
    with pytest.raises(ValueError, match='cutmix: alpha must be > 0, got 0'): toy().cutmix(0)
