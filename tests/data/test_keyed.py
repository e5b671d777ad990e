"Order and transforms are functions of (seed, epoch, sample)."
import numpy as np
import pytest
import torch
from fastai.basics import set_seed
from fastai.data.core import DataLoaders, TfmdDL
from fasttransform import ItemTransform

from fastrecipes.data.transforms import Draw
from fastrecipes.data.keyed import KeyedDL, keyed, per_sample
from fastrecipes.technique import discover

discover()


class Noisy:
    "A dataset whose items draw from the global generators, as random transforms do."
    def __len__(self): return 12
    def __getitem__(self, i): return torch.tensor([float(i), torch.rand(1).item(), np.random.rand()]), torch.tensor(i % 3)


def epoch(dl, e):
    dl.set_epoch(e)
    return torch.cat([x for x, _ in dl])


def loader(seed=0, **kwargs): return KeyedDL(Noisy(), 4, seed=seed, shuffle=True, num_workers=kwargs.pop('num_workers', 0), **kwargs)


def test_an_epoch_is_the_same_however_it_is_reached():
    dl = loader()
    in_turn = [epoch(dl, e) for e in range(3)]
    torch.rand(7)
    assert torch.equal(epoch(loader(), 2), in_turn[2])
    assert not torch.equal(in_turn[0], in_turn[1])
    assert sorted(in_turn[1][:, 0].tolist()) == list(range(12))


def test_worker_processes_draw_what_the_main_process_draws():
    assert torch.equal(epoch(loader(num_workers=2), 1), epoch(loader(), 1))


def test_another_seed_is_another_order():
    assert epoch(loader(1), 0)[:, 0].tolist() != epoch(loader(2), 0)[:, 0].tolist()


def test_an_item_s_draws_do_not_depend_on_its_batch():
    by_4, by_6 = epoch(loader(), 0), epoch(KeyedDL(Noisy(), 6, seed=0, shuffle=True, num_workers=0), 0)
    assert torch.equal(by_4[by_4[:, 0].argsort()], by_6[by_6[:, 0].argsort()])


def test_a_sample_that_comes_twice_draws_twice():
    class Twice:
        def __len__(self): return 8
        def draw(self, rng): return [5]*8
    x = epoch(loader(sampler=Twice()), 0)
    assert x[:, 0].tolist() == [5.]*8 and len(set(x[:, 1].tolist())) == 8


def test_iterating_leaves_the_global_generators_alone():
    torch.manual_seed(3)
    a = torch.rand(1)
    torch.manual_seed(3)
    list(loader())
    assert torch.equal(torch.rand(1), a)


def test_unshuffled_copies_read_in_order_and_keep_no_sampler():
    dl = loader(sampler=type('S', (), dict(__len__=lambda s: 3, draw=lambda s, r: [0, 0, 0]))())
    plain = dl.new(shuffle=False, drop_last=False)
    assert len(dl) == 1 and torch.cat([x for x, _ in plain])[:, 0].tolist() == list(range(12))
    assert dl.new().sampler is dl.sampler


def test_per_sample_draws_follow_the_sample_through_the_batches():
    seen = {}
    class Look(ItemTransform):
        def encodes(self, b):
            for i, u in zip(b[0][:, 0].long().tolist(), per_sample(len(b[0]), 'test').tolist()): seen.setdefault(i, []).append(u)
            return b
    for bs in (3, 5):
        dl = KeyedDL(Noisy(), bs, seed=0, shuffle=True, num_workers=0, after_batch=Look())
        seen_before = {k: list(v) for k, v in seen.items()}
        dl.set_epoch(4)
        list(dl)
    assert all(v[-1] == seen_before[k][-1] for k, v in seen.items()) and len({v[-1] for v in seen.values()}) == 12


def test_draws_lie_in_their_range_with_their_share_left_neutral():
    torch.manual_seed(0)
    v = Draw('x', -2, 3, p=.6)(torch.zeros(4000, 1))
    moved = v[v != 0]
    assert -2 <= v.min() and v.max() <= 3 and len(moved)/4000 == pytest.approx(.6, abs=.03) and moved.mean().item() == pytest.approx(.5, abs=.12)


def test_a_plain_fastai_loader_becomes_keyed_and_other_learners_keep_theirs(toy):
    learn = toy()
    shared = learn.dls = DataLoaders(TfmdDL(Noisy(), 4, shuffle=True, num_workers=0), TfmdDL(Noisy(), 4, num_workers=0))
    keyed(learn, 7)
    assert type(shared.train) is TfmdDL and type(learn.dls.train) is KeyedDL and learn.dls.train.seed == 7
    assert keyed(learn) is keyed(learn)


def test_lr_find_costs_no_epoch_and_changes_no_later_fit(toy):
    def trained(find):
        set_seed(0)
        learn = toy().mixup(.4)
        if find: learn.lr_find(num_it=20, show_plot=False, suggest_funcs=None)
        learn.fit(2, 1e-2)
        return learn.model.weight.data
    assert torch.equal(trained(True), trained(False))


def test_a_fit_started_at_an_epoch_draws_what_that_epoch_draws(toy):
    def order(learn, **kw):
        drawn = []
        from fastai.basics import Callback
        class Watch(Callback):
            def before_batch(self):
                if self.learn.training: drawn.append(self.learn.xb[0].sum().item())
        learn.mixup(.4).fit(3, cbs=Watch(), **kw)
        return drawn
    assert order(toy(), start_epoch=2) == order(toy())[-4:]


def test_two_fits_continue_the_count(toy):
    learn = toy().mixup(.4)
    learn.fit(2)
    learn.fit(1)
    assert keyed(learn).done == 3 and learn.dls.train.epoch == 2
