"The mean over views: exact for mirror images, keyed for draws, and loud where nothing varies."
import pytest
import torch
from fastai.basics import Learner, nn
from fastai.vision.all import Flip, Normalize

from fastrecipes.data.augment import Vary
from fastrecipes.data.loaders import as_dataloaders
from fastrecipes.errors import BadValue
from fastrecipes.production import tta  # noqa: F401


def pictures(n=24, seed=0, **kwargs):
    "A linear Learner on seeded pictures in memory."
    g = torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, 3, 6, 6, generator=g), torch.arange(n) % 3
    dls = as_dataloaders((torch.utils.data.TensorDataset(x, y), torch.utils.data.TensorDataset(x, y)), bs=8, seed=seed)
    torch.manual_seed(seed)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), nn.CrossEntropyLoss(), **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn, x, y


def seen_by(learn):
    "The inputs that the network meets, as they come."
    seen = []
    learn.model.register_forward_pre_hook(lambda m, xb: seen.append(xb[0].detach().clone().as_subclass(torch.Tensor)))
    return seen


def test_flips_are_the_mean_of_two_answers_exactly():
    learn, x, y = pictures()
    p, targets = learn.tta(views='flip')
    with torch.no_grad(): expected = (learn.model(x).softmax(1) + learn.model(x.flip(-1)).softmax(1))/2
    assert torch.allclose(p, expected, atol=1e-6) and torch.equal(targets, y)
    assert not torch.allclose(p, learn.model(x).softmax(1), atol=1e-3)


def test_flips_come_before_pixels_are_normalised(learn):
    "Files, by numbers for each pixel: a mirror image after normalisation would be another one."
    learn.normalize('standardize', over='pixels')
    m = next(t.pixels for t in learn.dls.valid.after_batch.fs if hasattr(t, 'pixels'))
    raw = learn.dls.valid.new(after_batch=[t for t in learn.dls.valid.after_batch.fs if not hasattr(t, 'pixels')])
    x = torch.cat([b[0].as_subclass(torch.Tensor) for b in raw])
    learn.model.eval()
    with torch.no_grad(): expected = (learn.model(m(x)).softmax(1) + learn.model(m(x.flip(-1))).softmax(1))/2
    with learn.no_bar(): p, _ = learn.tta(views='flip')
    assert torch.allclose(p, expected, atol=1e-5)


def test_views_vary_as_training_does_and_beta_weighs_the_image_itself():
    learn, x, y = pictures()
    learn.augment()
    seen = seen_by(learn)
    p, targets = learn.tta(n=2, beta=.25)
    assert torch.equal(targets, y)
    batches = [torch.cat(seen[i:i+3]) for i in (0, 3, 6)]           # two views, then the image itself
    assert torch.equal(batches[2], x) and not any(torch.allclose(b, x, atol=1e-2) for b in batches[:2]) and not torch.equal(*batches[:2])
    with torch.no_grad(): own = [learn.model(b).softmax(1) for b in batches]
    assert torch.allclose(p, .75*(own[0]+own[1])/2 + .25*own[2], atol=1e-6)
    both = learn.tta(n=2, beta=None)
    assert torch.allclose(both[0][0], (own[0]+own[1])/2, atol=1e-6) and torch.allclose(both[0][1], own[2], atol=1e-6)
    assert torch.allclose(learn.tta(n=2, use_max=True)[0], torch.stack(own).amax(0), atol=1e-6)


@pytest.mark.parametrize('technique', ['augmix', 'randaugment', 'autoaugment'])
def test_what_varies_training_varies_views(technique):
    learn, x, y = pictures()
    learn.use(technique)
    seen = seen_by(learn)
    p, targets = learn.tta(n=1, beta=0.)
    view, plain = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert torch.equal(plain, x) and view.shape == x.shape and not torch.allclose(view, x, atol=1e-2) and torch.equal(targets, y)
    with torch.no_grad(): assert torch.allclose(p, learn.model(view).softmax(1), atol=1e-6)


def test_draws_are_keyed_and_leave_the_global_stream_alone():
    learn, *_ = pictures()
    learn.augment()
    torch.manual_seed(1)
    first = learn.tta(n=1)[0]
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, learn.tta(n=1)[0])
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_fastais_own_transforms_vary_too(make_learn):
    learn = make_learn()
    learn.dls.add_tfms([Flip(p=1.)], 'after_batch')
    seen = seen_by(learn)
    with learn.no_bar(): learn.tta(n=1, beta=0.)
    n = len(learn.dls.valid)
    for a, b in zip(seen[:n], seen[n:]): assert torch.allclose(a, b.flip(-1), atol=1e-6)


def test_given_transforms_come_beside_those_of_validation(make_learn):
    "fastai 2.8.12 leaves out what scales and normalises then."
    learn = make_learn()
    seen = seen_by(learn)
    with learn.no_bar(): learn.tta(n=1, batch_tfms=Flip(p=1.))
    n = len(learn.dls.valid)
    assert any(isinstance(t, Normalize) for t in learn.dls.valid.after_batch.fs)
    for a, b in zip(seen[:n], seen[n:]): assert torch.allclose(a, b.flip(-1), atol=1e-5)


def test_fastai_leaves_augmentation_of_the_training_loader_out(make_learn):
    "The defect: n views of fastai 2.8.12 are one image, and the answer is that of `get_preds`."
    learn = make_learn().augment()
    with learn.no_bar():
        plain = learn.get_preds()[0]
        theirs, ours = learn._orig_tta(n=2)[0], learn.tta(n=2)[0]
    assert torch.allclose(theirs, plain, atol=1e-6) and not torch.allclose(ours, plain, atol=1e-3)


def test_the_learner_stays_as_it_was(make_learn):
    learn = make_learn().augment()
    loaders, fs = [id(dl) for dl in learn.dls.loaders], [list(dl.after_batch.fs) for dl in learn.dls.loaders]
    with learn.no_bar(): a, _ = learn.get_preds(); learn.tta(n=1); b, _ = learn.get_preds()       # noqa: E702
    assert torch.equal(a, b) and loaders == [id(dl) for dl in learn.dls.loaders] and fs == [list(dl.after_batch.fs) for dl in learn.dls.loaders]
    assert not any(isinstance(t, Vary) for t in learn.dls.valid.after_batch.fs) and learn.dls.valid.dataset.split_idx == 1


@pytest.mark.parametrize('how, said', [(dict(), 'training images are not varied, so all views would be one'), (dict(n=0), 'n must be a whole number ≥ 1, got 0'),
                                       (dict(beta=2), 'beta must be 0 to 1'), (dict(views='mirror'), "views must be 'flip' or None, got 'mirror'")])
def test_what_makes_no_views_is_refused(how, said):
    with pytest.raises(BadValue, match=said): pictures()[0].tta(**how)


def test_a_loader_that_is_not_there_is_refused():
    with pytest.raises(BadValue, match=r'ds_idx is 0 \(training\), 1 \(validation\) … \d, got 5'): pictures()[0].tta(ds_idx=5, views='flip')


def test_what_is_no_picture_has_no_mirror_image(toy):
    with pytest.raises(BadValue, match=r'flip: needs images \(n, c, h, w\), got \(n, 4\)'): toy().tta(views='flip')
