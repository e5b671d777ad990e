"Squares cut out: where they lie, what they leave, who draws them."
import pytest
import torch
from fastai.basics import Callback, nn

from fastrecipes.data.erasing import erase


@pytest.fixture
def images(toy):
    "A Learner on 64 images of ones, 8×8 px, three channels."
    from fastai.basics import DataLoaders, Learner
    from fastrecipes.data.keyed import KeyedDL
    from fastrecipes.data.loaders import Indexed
    def make(side=8, **kwargs):
        ds = Indexed(torch.utils.data.TensorDataset(torch.ones(64, 3, side, side), torch.arange(64) % 3), vocab=range(3))
        dls = DataLoaders(KeyedDL(ds, 16, seed=0, shuffle=True, drop_last=True, num_workers=0), KeyedDL(ds, 16, num_workers=0), device=torch.device('cpu'))
        learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)), nn.CrossEntropyLoss(), **kwargs)
        learn.remove_cb(learn.progress)
        learn.logger = lambda row: None
        return learn
    return make


class Watch(Callback):
    order = 60
    def before_fit(self): self.seen = []
    def before_batch(self):
        if self.learn.training: self.seen.append(self.learn.xb[0])


def test_a_square_by_hand_and_one_over_the_corner():
    x = torch.ones(2, 1, 4, 4)
    out = erase(x, torch.tensor([[2., 2.], [0., 0.]]), 2)
    assert out[0, 0].tolist() == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    assert out[1, 0].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert x.min() == 1                                          # out of place


def test_the_mean_area_is_that_of_a_centre_anywhere(images):
    images(side=32).cutout(16).fit(25, cbs=(watch := Watch()))
    gone = torch.stack([1-x.mean((1, 2, 3)) for x in watch.seen]).flatten()
    inside = sum(min(32, c+8) - max(0, c-8) for c in range(33))/33     # px of 16 that lie inside, mean over rounded centres 0…32
    assert float(gone.mean()) == pytest.approx((inside/32)**2, rel=.05) and gone.max() == .25


def test_draws_belong_to_the_sample_not_to_its_batch(images):
    a, b = images().cutout(3), images().cutout(3)
    b.dls.loaders[0] = b.dls.train.new(bs=8)
    seen = []
    for learn in (a, b):
        learn.fit(1, cbs=(watch := Watch()))
        seen.append(torch.cat(watch.seen))
    assert torch.equal(*seen)                                    # the same order, other batches: the same holes
    a.fit(1, cbs=(watch := Watch()))
    assert not torch.equal(torch.cat(watch.seen), seen[0])


def test_validation_and_the_dataset_see_whole_images(images):
    learn = images().cutout(3)
    whole = []
    class Valid(Callback):
        order = 60
        def before_batch(self):
            if not self.learn.training: whole.append(self.learn.xb[0].min())
    learn.fit(1, cbs=Valid())
    assert min(whole) == 1 and learn.dls.train_ds.dataset.tensors[0].min() == 1


def test_it_says_how_much_was_erased(images):
    learn = images().cutout(3)
    learn.fit(1)
    assert 'of the pixels of the first batch erased' in learn.techniques['cutout'].effect


def test_what_it_cannot_cut_is_refused(images, toy):
    with pytest.raises(ValueError, match='cutout: size must be at least 1 px, got 0'): images().cutout(0)
    with pytest.raises(ValueError, match='cutout: size must be 1 to 8 px for these images, got 9'): images().cutout(9).fit(1)
    with pytest.raises(ValueError, match='cutout: needs images'): toy().cutout(1).fit(1)
