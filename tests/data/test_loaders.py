"Torch datasets and loaders where a folder is accepted."
import numpy as np
import pytest
import torch
from fastai.basics import Learner, nn
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import Indexed, as_dataloaders, labels_of, samples

X, Y = torch.randn(60, 3, 8, 8), torch.arange(60) % 3


def trained(dls):
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn


def test_a_dataset_is_split_by_class():
    dls = as_dataloaders(TensorDataset(X, Y), bs=8, valid=.2, test=.1)
    assert [len(dl.dataset) for dl in dls.loaders] == [42, 12, 6] and np.bincount(labels_of(dls.train)).tolist() == [14, 14, 14]
    probabilities, targets = trained(dls).get_preds()
    assert probabilities.shape == (12, 3) and torch.allclose(probabilities.sum(1), torch.ones(12))


def test_torch_loaders_train_predict_and_export_as_in_fastai_they_do_not(tmp_path):
    loaders = DataLoader(TensorDataset(X, Y), batch_size=10, shuffle=True), DataLoader(TensorDataset(X, Y), batch_size=20)
    learn = trained(as_dataloaders(loaders))
    assert (learn.dls.train.bs, learn.dls.valid.bs, len(learn.dls.train)) == (10, 20, 6)
    assert learn.get_preds()[0].shape == (60, 3)
    learn.path = tmp_path
    learn.export('l.pkl')
    assert (tmp_path/'l.pkl').exists()


def test_a_loaders_own_sampler_and_collation_are_kept():
    sampler = torch.utils.data.SubsetRandomSampler([5, 6, 7])
    dls = as_dataloaders((DataLoader(TensorDataset(X, Y), 3, sampler=sampler, collate_fn=lambda b: (torch.stack([x for x, _ in b])*0, torch.stack([y for _, y in b]))),
                          TensorDataset(X, Y)))
    x, y = next(iter(dls.train))
    assert sorted(y.tolist()) == [0, 1, 2] and x.abs().max() == 0


def test_pillow_images_become_pixels():
    class Images(Dataset):
        classes = ['a', 'b']
        def __len__(self): return 8
        def __getitem__(self, i): return Image.new('L', (4, 4), 51), i % 2
    dls = as_dataloaders((Images(), Images()), bs=4)
    assert dls.train.one_batch()[0].shape == (4, 3, 4, 4) and dls.train.one_batch()[0].unique().tolist() == [pytest.approx(.2)] and dls.vocab == ['a', 'b']


def test_labels_are_read_from_targets_tensors_subsets_or_items():
    class WithTargets(Dataset):
        targets = [2, 0, 1]
        def __getitem__(self, i): raise AssertionError('decoded')
    assert labels_of(WithTargets()).tolist() == [2, 0, 1]
    assert labels_of(Subset(TensorDataset(X, Y), [1, 5])).tolist() == [1, 2]
    assert labels_of([(0, 1), (0, 0)]).tolist() == [1, 0]


def test_what_holds_no_samples_is_refused():
    class Stream(IterableDataset):
        def __iter__(self): return iter(())
    with pytest.raises(ValueError, match='IterableDataset'): as_dataloaders((DataLoader(Stream()), DataLoader(Stream())))
    with pytest.raises(ValueError, match='path: a folder, fastai DataLoaders, .* got int'): as_dataloaders(3)
    with pytest.raises(ValueError, match='bs: 64 is more than the 42 training samples'): as_dataloaders(TensorDataset(X, Y))


class ItemByItem(Indexed): whole = False


@pytest.mark.parametrize('shape', [(3, 4, 4), (5,)])
@pytest.mark.parametrize('part', [False, True])
@pytest.mark.parametrize('workers', [0, 2])
def test_whole_batches_are_those_made_of_items(shape, part, workers):
    from fastrecipes.data.balance import BalanceClassSampler
    y = torch.arange(41) % 7 % 3
    data = TensorDataset(torch.rand(41, *shape), y)
    if part: data, y = Subset(data, range(40, 3, -1)), y[torch.arange(40, 3, -1)]
    for kwargs in (dict(shuffle=True), dict(shuffle=True, drop_last=True), {}, dict(shuffle=True, sampler=BalanceClassSampler(y.tolist())), dict(shuffle=True, rank=1, world=2)):
        quick, slow = (KeyedDL(kind(data, range(3)), bs=8, seed=3, num_workers=workers, **kwargs) for kind in (Indexed, ItemByItem))
        assert quick._whole() and not slow._whole()
        for _ in range(2):
            for a, b in zip(quick, slow, strict=True):
                assert type(a) is type(b) and all(type(p) is type(q) and torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_items_are_still_seen_one_by_one_by_whom_they_are_given_to():
    data, seen = Indexed(TensorDataset(torch.rand(8, 3, 4, 4), torch.arange(8) % 2)), []
    for kwargs in (dict(after_item=lambda o: seen.append(1) or o), dict(create_batch=lambda b: seen.append(1)), dict(before_batch=lambda b: seen.append(1) or b)):
        seen.clear()
        list(KeyedDL(data, bs=4, num_workers=0, **kwargs))
        assert seen


@pytest.mark.parametrize('n, rows', [(3, [0, 14, 28]), (100, [*range(42)])])
def test_samples_that_lie_evenly_over_all(n, rows):
    dls = as_dataloaders((TensorDataset(X[:42], Y[:42]), TensorDataset(X, Y)), bs=8)
    for dl in (dls.loaders[1].new(dataset=dls.train.dataset), DataLoader(TensorDataset(X[:42], Y[:42]), 8)):
        assert torch.equal(samples(dl, n, spread=True)[0], X[rows]) and torch.equal(samples(dl, 2)[0], X[:2])
