"The contact sheet: what is on it, and that nobody notices that it was made."
import numpy as np
import pytest
import torch
from fastai.basics import Learner, nn
from fastai.data.transforms import Normalize
from PIL import Image

from fastrecipes.data.contact_sheet import show_augmented
from fastrecipes.data.folders import image_folder
from fastrecipes.data.keyed import keyed
from fastrecipes.data.pixels import fit_image
from fastrecipes.technique import discover

discover()


@pytest.fixture
def dls(photos):
    dls = image_folder(photos, size=16, bs=4, workers=0, seed=3, test=0.)
    for dl in dls.loaders: dl.after_batch.add(Normalize.from_stats([.5]*3, [.25]*3, cuda=False))
    return dls


def pictures(fig):
    "rows × columns × h × w × c, 8 bits."
    axes = [ax for ax in fig.axes if ax.images]
    rows = len({round(ax.get_subplotspec().rowspan.start) for ax in axes})
    shown = np.stack([np.asarray(ax.images[0].get_array()) for ax in axes])
    return (shown*255).round().astype(np.uint8).reshape(rows, -1, *shown.shape[1:])


def test_originals_come_first_and_versions_follow_denormalised(dls):
    fig = show_augmented(dls, 'solarize', n=5, p=1., threshold=0)
    shown = pictures(fig)
    assert shown.shape == (4, 6, 16, 16, 3)
    for row, i in zip(shown, np.linspace(0, len(dls.train.items)-1, 4).astype(int)):
        picture = np.array(fit_image(Image.open(dls.train.items[i]).convert('RGB'), (16, 16), 'crop'))
        assert np.array_equal(row[0], picture)
        for version in row[1:]: assert set(np.unique(np.minimum(np.abs(version.astype(int)-row[0]), np.abs(255-version.astype(int)-row[0])))) == {0}     # a value, or its inverse
    assert not np.array_equal(shown[:, 1], shown[:, 2])


def test_the_versions_are_those_that_training_would_see(dls):
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), nn.CrossEntropyLoss())
    keyed(learn, 7)
    shown = pictures(show_augmented(learn, 'posterize', n=3, bits=1, p=1.))
    learn.posterize(bits=1, p=1.)
    dl = learn.dls.train
    for epoch in range(3):
        dl.set_epoch(epoch)
        at = np.linspace(0, len(dls.train.items)-1, 4).astype(int)
        seen = {}
        for i, (x, _) in enumerate(dl):
            seen |= dict(zip(dl.draws(i).tolist(), ((x*.25+.5)*255).round().byte().permute(0, 2, 3, 1).numpy()))
        for row, i in zip(shown, at):
            if i in seen: assert np.array_equal(row[epoch+1], seen[i])
        assert len(seen.keys() & set(at.tolist())) >= 3                                    # the last batch is dropped


@pytest.mark.parametrize('technique', ['mixup', 'cutout', 'randaugment', 'augment', ['rotate', 'color'], dict(rotate=40, mixup=True)])
def test_loaders_learner_and_random_streams_stay_as_they_are(dls, technique):
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), nn.CrossEntropyLoss())
    kept = dls.train, list(dls.train.after_batch.fs), dls.train.epoch, list(learn.cbs), {k: v.clone() for k, v in learn.model.state_dict().items()}
    torch.manual_seed(5), np.random.seed(5)
    a, b = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5), np.random.seed(5)
    shown = pictures(show_augmented(learn, technique, n=2))
    assert torch.equal(torch.rand(3), a) and np.array_equal(np.random.rand(3), b)
    assert learn.dls is dls and (dls.train, list(dls.train.after_batch.fs), dls.train.epoch, list(learn.cbs)) == kept[:4] and not learn.__dict__.get('techniques')
    assert all(torch.equal(v, kept[4][k]) for k, v in learn.model.state_dict().items())
    assert shown.shape[:2] == (4, 3) and not np.array_equal(shown[:, 0], shown[:, 1])
    assert np.array_equal(shown[:, 0], pictures(show_augmented(dls, 'rotate', n=1))[:, 0])


@pytest.mark.parametrize('kind', ['standardize', 'zca'])
def test_what_normalize_does_is_undone(dls, kind):
    solarize = dict(p=1., threshold=0)
    shown, plain = (pictures(show_augmented(dls, t, n=2)).astype(int) for t in (dict(normalize=dict(kind=kind, over='channels'), solarize=solarize), dict(solarize=solarize)))
    assert np.abs(shown-plain).max() <= 1


def test_what_is_refused(dls, toy):
    with pytest.raises(ValueError, match='show_augmented: normalize does not change what images look like'): show_augmented(dls, 'normalize')
    with pytest.raises(TypeError, match="no technique named 'rotat'; did you mean 'rotate'"): show_augmented(dls, 'rotat')
    with pytest.raises(TypeError, match='rotate: .*degree'): show_augmented(dls, 'rotate', degree=3)
    with pytest.raises(ValueError, match='show_augmented: balance does not change what images look like.* those that do are .*cutout.*rotate'): show_augmented(dls, 'balance')
    with pytest.raises(ValueError, match='show_augmented: n and rows must be at least 1, got n=0'): show_augmented(dls, 'rotate', n=0)
    with pytest.raises(TypeError, match='show_augmented: p: arguments go with one name'): show_augmented(dls, ['rotate', 'color'], p=1.)
    with pytest.raises(ValueError, match='rotate: degrees must be 0 to 180, got 999'): show_augmented(dls, 'rotate', degrees=999)
    with pytest.raises(ValueError, match='show_augmented: needs a loader of images'): show_augmented(toy().dls, 'rotate')
