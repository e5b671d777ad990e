"Training batches are as large as their place in the fit asks for, masks with them; validation sees the full size, and what cannot take less is told so."
import numpy as np
import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, nn
from fastai.torch_core import TensorImage, TensorMask
from PIL import Image
from timm import create_model
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import Indexed
from fastrecipes.technique import discover
from fastrecipes.training.resizing import resized, share_of, side_of

discover()
H, W = 24, 32


def pooled(): return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
def flat(): return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4*12*16, 3))
def pixelwise(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))


def learner(net=pooled, x=None, y=None, n=40, bs=10):
    "Four batches an epoch of images 24×32."
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, H, W, generator=g) if x is None else x
    y = torch.randint(3, (n,), generator=g) if y is None else y
    ds = Indexed(TensorDataset(x, y), vocab=range(3))
    dls = DataLoaders(KeyedDL(ds, bs, seed=0, shuffle=True, num_workers=0), KeyedDL(ds, bs, num_workers=0), device=torch.device('cpu'))
    torch.manual_seed(1)
    learn = Learner(dls, net(), CrossEntropyLossFlat(axis=1 if y.ndim > 1 else -1))
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


class Seen(Callback):
    "What the network gets: training batches one by one, and the sizes of validation batches."
    order = 86
    def __init__(self): self.train, self.valid, self.losses = [], [], []
    def before_batch(self): (self.train if self.learn.training else self.valid).append((*self.learn.xb, *self.learn.yb))
    def after_loss(self):
        if self.learn.training: self.losses.append((float(self.learn.loss), self.learn.pred.detach()))


def sides(batches): return [tuple(b[0].shape[-2:]) for b in batches]


@pytest.mark.parametrize('done, expected', [(0, .5), (.49, .5), (.5, .5), (.65, .75), (.7, .5+.5*2/3), (.8, 1), (1, 1)])
def test_the_share_grows_in_a_line_between_delay_and_finetune(done, expected): assert share_of(done, .5, .5, .2) == pytest.approx(expected)


@pytest.mark.parametrize('done, expected', [(0, .25), (.499, .25), (.5, 1), (1, 1)])
def test_delay_and_finetune_may_leave_nothing_between(done, expected): assert share_of(done, .25, .5, .5) == expected


@pytest.mark.parametrize('full, share, multiple, side', [(224, .5, 4, 112), (224, .53, 32, 128), (30, .5, 4, 16), (30, 1, 4, 30), (30, .99, 4, 28), (16, .1, 4, 4), (5, .5, 8, 5)])
def test_sides_are_multiples_but_for_the_full_one(full, share, multiple, side): assert side_of(full, share, multiple) == side


@pytest.mark.parametrize('size', [(12, 16), (20, 28), (8, 8)])
def test_images_are_resized_as_pillow_does_it(size):
    x = torch.rand(2, 3, H, W, generator=torch.Generator().manual_seed(0))
    theirs = np.stack([[np.asarray(Image.fromarray(c.numpy()).resize(size[::-1], Image.Resampling.BILINEAR)) for c in o] for o in x])
    assert torch.allclose(resized(x, size), torch.from_numpy(theirs), atol=1e-5)


@pytest.mark.parametrize('size', [(12, 16), (8, 8)])         # in other sizes some pixels are equally near, and the two differ
def test_masks_take_the_nearest_pixel_as_pillow_does_it_and_keep_their_type(size):
    y = TensorMask(torch.randint(256, (2, H, W), generator=torch.Generator().manual_seed(0)))
    theirs = np.stack([np.asarray(Image.fromarray(o.numpy().astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)) for o in y])
    assert torch.equal(resized(y, size).as_subclass(torch.Tensor), torch.from_numpy(theirs).long()) and type(resized(y, size)) is TensorMask
    assert type(resized(TensorImage(torch.rand(1, 3, H, W)), size)) is TensorImage


def test_each_batch_has_the_size_of_its_place_and_validation_the_full_one():
    learn = learner().progressive_resize(delay=.25, finetune=.25, multiple=2)
    learn.fit(2, cbs=(seen := Seen()))
    # of eight batches: two of half a side, then 1/2 + (i/8 − 1/4), then full from 3/4 on
    assert sides(seen.train) == [(12, 16)]*3 + [(16, 20), (18, 24), (22, 28), (24, 32), (24, 32)] and set(sides(seen.valid)) == {(H, W)}
    assert 'begin at 12×16 px, and are 24×32 px from 75% of the fit on' in learn.techniques['progressive_resize'].effect
    learn.fit(1, cbs=(again := Seen()))
    assert sides(again.train)[0] == (12, 16)                # each fit grows anew
    learn.get_preds(cbs=(seen := Seen()))
    assert set(sides(seen.valid)) == {(H, W)}


def test_a_batch_is_the_full_one_made_smaller():
    small, full = Seen(), Seen()
    learner().progressive_resize().fit(1, cbs=small)
    plain = learner().weight_penalty()
    plain.fit(1, cbs=full)
    assert torch.equal(small.train[0][0], resized(full.train[0][0], (12, 16))) and all(torch.equal(a[1], b[1]) for a, b in zip(small.train, full.train))


def test_masks_go_with_their_images_and_the_loss_is_theirs():
    "The last of four batches has .5 + .5·(.75 − .5)/.3 of each side: 22 and 29.3 px."
    y = torch.randint(3, (40, H, W), generator=torch.Generator().manual_seed(2))
    learn = learner(pixelwise, y=y).progressive_resize()
    learn.fit(1, cbs=(seen := Seen()))
    assert [tuple(b[1].shape) for b in seen.train] == [(10, 12, 16)]*3 + [(10, 24, 28)] and seen.train[0][1].dtype == torch.int64
    for (_, mask), (loss, pred) in zip(seen.train, seen.losses): assert loss == pytest.approx(float(F.cross_entropy(pred, mask)), rel=1e-5)


def test_views_of_augmix_are_resized_with_their_images():
    learn = learner().augmix().progressive_resize()
    learn.fit(1, cbs=(seen := Seen()))
    assert len(seen.train[0][0]) == 30 and sides(seen.train)[0] == (12, 16)


def vit(): return create_model('vit_tiny_patch16_224', img_size=(H, W), patch_size=8, num_classes=3, depth=1, embed_dim=24, num_heads=2)


def answers_by_position(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())


@pytest.mark.parametrize('net, said', [(flat, 'the network cannot take images of 12×16 px .addmm: mat1 and mat2 shapes cannot be multiplied.*; use one that pools'),
                                       (vit, 'the network cannot take images of 12×16 px .*; use one that pools'),
                                       (answers_by_position, r'the network cannot take images of 12×16 px: it answers \(2, 560\), not \(2, 2640\)')])
def test_a_network_made_for_its_size_is_refused_before_anything_moved(net, said):
    learn = learner(net)
    before, rng, cbs = [t.clone() for t in learn.model.state_dict().values()], torch.get_rng_state(), list(learn.cbs)
    with pytest.raises(ValueError, match=f'^progressive_resize: {said}'): learn.progressive_resize()
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.state_dict().values())) and torch.equal(rng, torch.get_rng_state())
    assert list(learn.cbs) == cbs and learn.model.training and not learn.__dict__.get('techniques')


def test_a_teacher_made_for_its_size_is_refused():
    learn = learner().distill(flat())
    with pytest.raises(ValueError, match='the teacher cannot take images of 12×16 px'): learn.progressive_resize()


def test_looking_at_the_network_leaves_its_statistics_alone():
    learn = learner()
    before = [t.clone() for t in learn.model.state_dict().values()]
    learn.progressive_resize()
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.state_dict().values())) and all(m.training for m in learn.model.modules())


def test_inputs_that_are_no_images_are_refused():
    learn = learner(lambda: nn.Linear(4, 3), x=torch.rand(40, 4))
    with pytest.raises(ValueError, match=r'progressive_resize: needs images .* got \(n, 4\); leave it off'): learn.progressive_resize()


def test_nothing_to_grow_is_said_aloud(capsys):
    learn = learner().progressive_resize(1.)
    assert 'progressive_resize: nothing is smaller than 24×32 px' in capsys.readouterr().out
    learn.fit(1, cbs=(seen := Seen()))
    assert set(sides(seen.train)) == {(H, W)}


@pytest.mark.parametrize('given, said', [(dict(initial=0.), r'initial must be in \(0, 1\], got 0.0'), (dict(initial=1.5), 'got 1.5'),
                                         (dict(delay=-.1), r'delay must be in \[0, 1\], got -0.1'),
                                         (dict(finetune=2.), 'finetune must be .* got 2.0'),
                                         (dict(delay=.9), 'must come to 1 at most, got 0.9 [+] 0.2'), (dict(multiple=0), 'multiple must be ≥ 1 px, got 0')])
def test_what_makes_no_sense_is_refused(given, said):
    with pytest.raises(ValueError, match=f'progressive_resize: .*{said}'): learner().progressive_resize(**given)
