"Augmentation: what it does to pixels, and that it does it by key."
from collections import Counter

import numpy as np
import pytest
import torch
from fastai.basics import Learner, TensorImage, nn
from fastai.vision.augment import Brightness, Contrast, Flip, Rotate, Warp, Zoom, setup_aug_tfms
from fastai.vision.core import TensorMask, TensorPoint
from scipy.stats import chi2_contingency, chisquare
from torch.utils.data import TensorDataset
from torchvision.transforms.v2 import RandomCrop

from fastrecipes.data.augment import Cut, Homography, Vary
from fastrecipes.data.folders import image_folder
from fastrecipes.data.keyed import keyed
from fastrecipes.data.loaders import as_dataloaders
from fastrecipes.data.transforms import Draw, on_batches
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


def fastais(**kw):
    "The transforms of `aug_transforms`, fastai's own code, with our draws."
    tfms = [Flip(p=1., draw=Draw('flip', 1, 1, p=.5)), Rotate(p=1., draw=Draw('rotate', -30, 30, .75)),
            Zoom(p=1., draw=Draw('zoom', 1, 1.5, .75, neutral=1.), draw_x=Draw('zoom x', 0, 1), draw_y=Draw('zoom y', 0, 1)),
            Warp(p=1., draw_x=Draw('warp x', -.2, .2, .75), draw_y=Draw('warp y', -.2, .2, .75)),
            Brightness(p=1., draw=Draw('brightness', .4, .6, .75, neutral=.5)), Contrast(p=1., draw=Draw('contrast', .8, 1/.8, .75, neutral=1., log=True))]
    tfms = setup_aug_tfms(tfms)
    for t in tfms: t.split_idx = None           # on data in memory, which have none, its light would do nothing
    return tfms


def in_memory():
    g = torch.Generator().manual_seed(0)
    x = nn.functional.interpolate(torch.rand(64, 3, 6, 5, generator=g), scale_factor=4, mode='bilinear')                   # 24×20, smooth
    x = x.clamp(.02, .98)
    return Learner(as_dataloaders((TensorDataset(x, torch.arange(64) % 2),)*2, bs=16, seed=3), nn.Sequential(nn.Flatten(), nn.Linear(1440, 2)))


def test_it_does_what_fastais_transforms_do(digit_folder):
    "In one resampling instead of several steps: to 2e-5 in floating point, to a level or two of 255 in 8 bits."
    for make, tolerance in ((in_memory, 2e-5), (lambda: Learner(image_folder(digit_folder, size=24, bs=32, seed=3), nn.Linear(1, 10), nn.CrossEntropyLoss()), 2/255)):
        ours, theirs = make().augment(rotate=30, zoom=1.5), make()
        on_batches(theirs, fastais(), lambda t: False)
        for epoch in (0, 1):
            a, b = batch(ours, epoch), batch(theirs, epoch)
            assert a.dtype == b.dtype == torch.float32 and not torch.equal(a, batch(make(), epoch)) and float((a-b).abs().max()) < tolerance


def test_torch_and_opencv_resample_alike():
    g = torch.Generator().manual_seed(0)
    m = torch.eye(3)+.1*torch.randn(8, 3, 3, generator=g)
    h = Homography(m/m[:, 2:, 2:])
    x = TensorImage(torch.rand(8, 3, 20, 30, generator=g))
    assert torch.allclose(h.image(x), x.affine_coord(coord_tfm=h), atol=2e-5)
    for c in (1, 2, 4): assert torch.allclose(h.image(y := torch.rand(8, c, 20, 30, generator=g)), TensorImage(y).affine_coord(coord_tfm=h), atol=2e-5)
    u = (x*255).byte()
    assert (h.image(u).float()-TensorImage(u.float()).affine_coord(coord_tfm=h)).abs().max() <= .51
    assert torch.allclose(h(h(p := torch.rand(8, 5, 2)-.5), invert=True), p, atol=1e-5)


def test_what_is_cut_is_what_would_be_resampled():
    g = torch.Generator().manual_seed(0)
    x, dx, dy = torch.rand(32, 3, 9, 7, generator=g), torch.randint(-3, 4, (32,), generator=g).double(), torch.randint(-3, 4, (32,), generator=g).double()
    cut = Cut(torch.rand(32, generator=g) < .5, dx, dy, 9, 7)
    assert torch.allclose(cut.image(x), Homography.image(cut, x), atol=1e-5) and cut.image(x).dtype == torch.float32
    assert torch.equal(cut.image((x*255).byte()), Homography.image(cut, (x*255).byte()))


def test_a_crop_is_one_of_the_padded_picture_each_as_likely():
    "As torchvision's RandomCrop(padding, 'reflect') cuts: all (2·2+1)² places, whole pixels, alike likely (χ², p > 1e-3)."
    x = torch.randint(0, 256, (1, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded = nn.functional.pad(x.float(), (2, 2, 2, 2), mode='reflect').byte()[0]
    places = {tuple(padded[:, i:i+9, j:j+7].flatten().tolist()): (i, j) for i in range(5) for j in range(5)}
    assert len(places) == 25
    vary = Vary(flip=False, rotate=0, zoom=1, warp=0, lighting=0, crop=2, p=1.)
    torch.manual_seed(0)
    seen = Counter(places[tuple(y.flatten().tolist())] for y in vary(TensorImage(x.expand(2500, 3, 9, 7).contiguous()), split_idx=0))
    assert chisquare([seen[(i, j)] for i in range(5) for j in range(5)]).pvalue > 1e-3
    theirs, torchs = Counter(), RandomCrop((9, 7), padding=2, padding_mode='reflect')
    for _ in range(2500): theirs[places[tuple(torchs(x[0]).flatten().tolist())]] += 1
    assert chi2_contingency([[c[(i, j)] for i in range(5) for j in range(5)] for c in (seen, theirs)]).pvalue > 1e-3


def test_a_mask_and_points_move_with_the_picture():
    "A spot, its mask, and a point at its middle are found at one place."
    torch.manual_seed(0)
    axis = torch.linspace(-1, 1, 65)
    spot = torch.exp(-((axis[:, None]-.2)**2+(axis+.3)**2)/(2*.05**2)).expand(16, 1, 65, 65)
    vary = Vary(flip=True, rotate=30, zoom=1.2, warp=.2, lighting=0, crop=3, p=1.)
    point = TensorPoint(torch.tensor([[[-.3, .2]]]).repeat(16, 1, 1), img_size=(65, 65))
    image, mask, point = (torch.Tensor(o) for o in vary((TensorImage(spot.expand(16, 3, 65, 65).contiguous()), TensorMask((spot[:, 0] > .5).long()), point), split_idx=0))
    centre = torch.stack([(image[:, 0]*a).sum((1, 2))/image[:, 0].sum((1, 2)) for a in (axis, axis[:, None])], 1)
    assert (centre-point[:, 0]).abs().max() < .02 and (centre-torch.tensor([-.3, .2])).norm(dim=1).min() > .02
    assert ((image[:, 0] > .5).long() != mask).float().mean() < .005 and (mask.sum((1, 2)) > 5).all()


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
        inner = (b > .1) & (b < .9) & (a > .1) & (a < .9)
        slope, shift = np.polyfit(torch.logit(b[inner]).numpy(), torch.logit(a[inner]).numpy(), 1)
        assert torch.logit(a[inner]).numpy() == pytest.approx(slope*torch.logit(b[inner]).numpy()+shift, abs=.03) and .49 < slope < 2.01


def test_the_same_epoch_looks_the_same_and_another_does_not(learn):
    learn.augment()
    assert torch.equal(batch(learn, 1), batch(learn, 1)) and not torch.equal(batch(learn, 1), batch(learn, 2))


def test_validation_images_stay_as_they_are_and_the_last_call_wins(learn):
    valid = learn.dls.valid.one_batch()[0]
    learn.augment().augment(flip=True, rotate=0, zoom=1, warp=0, lighting=0)
    assert torch.equal(learn.dls.valid.one_batch()[0], valid)
    assert [type(t).__name__ for t in learn.dls.train.after_batch.fs] == ['Vary', 'IntToFloatTensor']


@pytest.mark.parametrize('kwargs, message', [(dict(zoom=.5), 'zoom must be 1 to 2'), (dict(rotate=-1), 'rotate must be 0 to 180'), (dict(lighting=1.), 'lighting must be 0 to 0.9'),
                                              (dict(crop=16), 'crop must be 0 to 15 px for these images, got 16')])
def test_values_outside_their_ranges(learn, kwargs, message):
    with pytest.raises(ValueError, match=message): learn.augment(**kwargs)


def test_images_in_memory_are_varied_too_and_what_is_no_image_is_refused(toy):
    from fastrecipes.data.loaders import as_dataloaders
    x = torch.rand(64, 3, 16, 16)
    dls = as_dataloaders(torch.utils.data.TensorDataset(x, torch.arange(64) % 2), bs=16)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768, 2))).augment()
    known = {tuple(i.flatten().tolist()) for i in x}
    assert sum(tuple(i.flatten().tolist()) in known for i in learn.dls.train.one_batch()[0]) <= 1
    assert all(tuple(i.flatten().tolist()) in known for i in learn.dls.valid.one_batch()[0])
    with pytest.raises(ValueError, match=r'augment: needs a loader of images \(TensorImage\), .* got Tensor \(n, 4\)'): toy().augment()
