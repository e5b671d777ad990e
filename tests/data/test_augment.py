"Augmentation: what it does to pixels, and that it does it by key."
import numpy as np
import pytest
import torch
from fastai.basics import Learner, nn

from fastrecipes.data.folders import image_folder
from fastrecipes.data.keyed import keyed
from fastrecipes.technique import discover

discover()


@pytest.fixture
def learn(digit_folder):
    dls = image_folder(digit_folder, size=16, bs=32, workers=0, seed=3)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), loss_func=nn.CrossEntropyLoss())
    keyed(learn, 3)
    return learn


def batch(learn, epoch=0):
    learn.dls.train.set_epoch(epoch)
    return next(iter(learn.dls.train))[0]


def test_a_flip_is_a_flip_of_half_the_images(learn):
    before = batch(learn)
    after = batch(learn.augment(flip=True, rotate=0, zoom=1, warp=0, lighting=0))
    kept = [torch.allclose(a, b, atol=1e-4) for a, b in zip(after, before)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-4) for a, b in zip(after, before)]
    assert all(k or m for k, m in zip(kept, mirrored)) and 6 < sum(mirrored) < 26


def test_light_scales_as_its_logit(learn):
    before = batch(learn).clamp(1e-7, 1-1e-7)
    learn.augment(flip=False, rotate=0, zoom=1, warp=0, lighting=.5, p=1.)
    after = batch(learn)
    # brightness adds a constant to an image's logits, contrast multiplies them: a straight line for each image
    for a, b in zip(after[:8], before[:8]):
        inner = (b > .05) & (b < .95)
        slope, shift = np.polyfit(torch.logit(b[inner]).numpy(), torch.logit(a[inner]).numpy(), 1)
        assert torch.logit(a[inner]).numpy() == pytest.approx(slope*torch.logit(b[inner]).numpy()+shift, abs=2e-3) and .49 < slope < 2.01


def test_the_same_epoch_looks_the_same_and_another_does_not(learn):
    learn.augment()
    assert torch.equal(batch(learn, 1), batch(learn, 1)) and not torch.equal(batch(learn, 1), batch(learn, 2))


def test_validation_images_stay_as_they_are_and_the_last_call_wins(learn):
    valid = learn.dls.valid.one_batch()[0]
    learn.augment().augment(flip=True, rotate=0, zoom=1, warp=0, lighting=0)
    assert torch.equal(learn.dls.valid.one_batch()[0], valid)
    assert [type(t).__name__ for t in learn.dls.train.after_batch.fs].count('Flip') == 1 and len(learn.dls.train.after_batch.fs) == 2


@pytest.mark.parametrize('kwargs, message', [(dict(zoom=.5), 'zoom must be 1 to 2'), (dict(rotate=-1), 'rotate must be 0 to 180'), (dict(lighting=1.), 'lighting must be 0 to 0.9')])
def test_values_outside_their_ranges(learn, kwargs, message):
    with pytest.raises(ValueError, match=message): learn.augment(**kwargs)


def test_images_in_memory_are_varied_too_and_what_is_no_image_is_refused(toy):
    from fastrecipes.data.loaders import as_dataloaders
    x = torch.rand(64, 3, 16, 16)
    dls = as_dataloaders(torch.utils.data.TensorDataset(x, torch.arange(64) % 2), bs=16)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768, 2))).augment()
    known = {tuple(i.flatten().tolist()) for i in x}
    assert not any(tuple(i.flatten().tolist()) in known for i in learn.dls.train.one_batch()[0])
    assert all(tuple(i.flatten().tolist()) in known for i in learn.dls.valid.one_batch()[0])
    with pytest.raises(ValueError, match=r'augment: needs a loader of images \(TensorImage\), .* got Tensor \(n, 4\)'): toy().augment()
