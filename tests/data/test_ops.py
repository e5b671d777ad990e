"The op table against Pillow itself, on photographs; and each op as a technique, by the draws of its key."
import numpy as np
import pytest
import torch
from fastai.basics import Learner, nn
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.vision.core import TensorImage, TensorMask
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from fastrecipes.data import ops
from fastrecipes.data.folders import image_folder
from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.data.loaders import as_dataloaders
from fastrecipes.data.op_table import OP_ORDER
from fastrecipes.randomness import uniform
from fastrecipes.technique import discover

discover()
PHOTOS = [Image.fromarray(i) for i in load_sample_images().images]
MODES = dict(nearest=Image.Resampling.NEAREST, bilinear=Image.Resampling.BILINEAR, bicubic=Image.Resampling.BICUBIC)
SIZES = [(32, 32), (33, 47), (96, 64), (7, 5), (2, 3)]


def crops(h, w, n=8, mode='RGB', seed=0):
    "Pieces of the two photographs, of many scales; one is flat."
    rng, out = np.random.default_rng(seed), [Image.new(mode, (w, h), (90, 13, 200) if mode == 'RGB' else 90)]
    for k in range(n-1):
        side = int(rng.integers(40, 420))
        x, y = rng.integers(0, 640-side), rng.integers(0, 427-side)
        out.append(PHOTOS[k % 2].crop((x, y, x+side, y+side)).resize((w, h)).convert(mode))
    return out


def batch(images): return torch.stack([torch.from_numpy(np.array(i)).view(*i.size[::-1], -1).permute(2, 0, 1) for i in images])


def gap(ours, theirs): return (ours.int()-batch(theirs).int()).abs()


def shear_matrix(im, sx, sy): return 1, sx, -sx*im.height/2, sy, 1, -sy*im.width/2


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('h, w', SIZES)
@pytest.mark.parametrize('interpolation', MODES)
def test_what_moves_pixels_is_pillows_within_a_level_and_nearest_to_the_bit(interpolation, h, w, mode):
    images, resample, fill = crops(h, w, mode=mode), MODES[interpolation], (3, 200, 77) if mode == 'RGB' else 77
    u, v = np.random.default_rng(1).uniform(-1, 1, (2, len(images)))
    degrees = np.where(np.arange(8) < 5, [0, 90, 180, 270, 45, 0, 0, 0], u*180)
    dx, dy = u*w*.6, v*h*.6
    x, t = batch(images), torch.from_numpy
    def moved(matrices): return [i.transform(i.size, Image.AFFINE, m, resample, fillcolor=fill) for i, m in zip(images, matrices)]
    gaps = [gap(ops.rotate(x, t(degrees), interpolation, fill), [i.rotate(d, resample, fillcolor=fill) for i, d in zip(images, degrees)]),
            gap(ops.translate(x, t(dx), t(dy), interpolation, fill), moved((1, 0, -a, 0, 1, -b) for a, b in zip(dx, dy))),
            gap(ops.shear(x, t(u), t(v), interpolation, fill), moved(shear_matrix(i, a, b) for i, a, b in zip(images, u, v)))]
    assert max(int(g.max()) for g in gaps) <= (interpolation != 'nearest')
    assert all((g > 0).float().mean() < .01 for g in gaps)


def test_a_number_is_for_all_images_and_what_comes_in_is_black():
    x = batch(crops(20, 20))
    assert torch.equal(ops.rotate(x, 30), ops.rotate(x, torch.full((8,), 30.))) and not ops.translate(x, 5)[..., :5].any() and torch.equal(ops.translate(x, 5)[..., 5:], x[..., :-5])
    assert torch.equal(ops.affine(x, (1, 0, 0, 0, 1, -3)), ops.translate(x, dy=3., interpolation='nearest'))


LEVELS = {
    'autocontrast': (lambda x, m: ops.autocontrast(x), lambda im, m: ImageOps.autocontrast(im), [0.]),
    'equalize': (lambda x, m: ops.equalize(x), lambda im, m: ImageOps.equalize(im), [0.]),
    'invert': (lambda x, m: ops.invert(x), lambda im, m: ImageOps.invert(im), [0.]),
    'posterize': (ops.posterize, lambda im, m: ImageOps.posterize(im, int(m)), range(1, 9)),
    'solarize': (ops.solarize, ImageOps.solarize, [0, .5, 1, 100, 127.3, 254.2, 255, 256])}
LEVELS |= {name: (getattr(ops, name), lambda im, m, of=getattr(ImageEnhance, name.title()): of(im).enhance(m), [0, .1, .73, 1, 1.2, 1.9, 3.3, -.4])
           for name in ('color', 'contrast', 'brightness', 'sharpness')}


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('h, w', SIZES)
@pytest.mark.parametrize('name', LEVELS)
def test_what_maps_levels_is_pillows_to_the_bit(name, h, w, mode):
    ours, theirs, magnitudes = LEVELS[name]
    images = crops(h, w, mode=mode)
    for shift in range(len(magnitudes)):
        m = [float(magnitudes[(i+shift) % len(magnitudes)]) for i in range(len(images))]
        assert gap(ours(batch(images), torch.tensor(m, dtype=torch.float64)), [theirs(i, v) for i, v in zip(images, m)]).max() == 0


def test_equalize_and_autocontrast_where_histograms_are_odd():
    "Two values, one brightest pixel, gaps, 255 and 256 px below the brightest: where Pillow's integers step."
    rng = np.random.default_rng(0)
    at = np.arange(400).reshape(20, 20)
    odd = [np.where(rng.random((20, 20)) < .3, 10, 12), np.full((20, 20), 255), np.where(at < 255, 0, 7), np.where(at < 254, 0, 7), np.where(at < 256, 0, 7),
           rng.choice([0, 1, 254, 255], (20, 20)), rng.integers(100, 103, (20, 20)), np.where(at == 5, 200, 199)]
    images = [Image.fromarray(a.astype(np.uint8)) for a in odd]
    assert gap(ops.equalize(batch(images)), [ImageOps.equalize(i) for i in images]).max() == 0
    assert gap(ops.autocontrast(batch(images)), [ImageOps.autocontrast(i) for i in images]).max() == 0


@pytest.mark.parametrize('name, magnitude', [('rotate', torch.linspace(-90, 90, 7)), ('color', torch.linspace(0, 2, 7)), ('solarize', torch.linspace(0, 256, 7)), ('equalize', None)])
def test_parts_of_a_large_batch_are_images_of_their_own(name, magnitude, monkeypatch):
    x, op = batch(crops(31, 29, 7)), getattr(ops, name)
    def done(x, i=slice(None)): return op(x) if magnitude is None else op(x, magnitude[i])
    one_by_one = torch.cat([done(x[i:i+1], slice(i, i+1)) for i in range(7)])
    for part in (1, 3*31*29*3, 2**30):
        monkeypatch.setattr(ops, 'PART', part)
        assert torch.equal(done(x), one_by_one)
    assert torch.equal(done(x.to(memory_format=torch.channels_last)), one_by_one) and done(x[:0], slice(0, 0)).shape == x[:0].shape


@pytest.mark.parametrize('name', [*LEVELS, 'rotate', 'shear'])
def test_floats_are_256_levels_and_what_is_not_finite_stays(name):
    x = batch(crops(24, 24))
    op = (lambda v: LEVELS[name][0](v, 3)) if name in LEVELS else lambda v: getattr(ops, name)(v, .3)
    y = TensorImage(x.float()/255)
    out = op(y)
    assert isinstance(out, TensorImage) and torch.equal((out*255).round().byte().as_subclass(torch.Tensor), op(x)) and out.min() >= 0 and out.max() <= 1
    y[2, 0, 3, 3], y[5, 1, 0, 0] = float('nan'), float('inf')
    bad = op(y.clone())
    assert torch.equal(bad[[0, 1, 3, 4, 6, 7]], out[[0, 1, 3, 4, 6, 7]]) and torch.equal(bad[5], y[5]) and torch.equal(bad[2].isnan(), y[2].isnan())


def test_what_an_op_refuses():
    x = batch(crops(8, 8))
    with pytest.raises(ValueError, match=r'invert: needs images \(n, 1 or 3, h, w\), got \(3, 8, 8\)'): ops.invert(x[0])
    with pytest.raises(ValueError, match='color: needs uint8, or floating point in .0, 1., got torch.int64'): ops.color(x.long(), 1)
    with pytest.raises(ValueError, match='color: needs a number or one for each of the 8 images, got 5'): ops.color(x, torch.ones(5))
    with pytest.raises(ValueError, match="affine: interpolation must be one of nearest, bilinear, bicubic, got 'bicubik'; did you mean 'bicubic'"): ops.rotate(x, 5, 'bicubik')


# as techniques

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Forty photographs of two kinds, 40×40 px."
    path = tmp_path_factory.mktemp('photographs')
    for k, im in enumerate(crops(40, 40, 41)[1:]):
        (path/'ab'[k % 2]).mkdir(exist_ok=True)
        im.save(path/'ab'[k % 2]/f'{k}.png')
    return path


def learner(folder):
    learn = Learner(image_folder(folder, size=40, bs=16, workers=0, seed=3), nn.Sequential(nn.Flatten(), nn.Linear(4800, 2)), loss_func=nn.CrossEntropyLoss())
    keyed(learn, 3)
    return learn


def seen(learn, epoch=0):
    learn.dls.train.set_epoch(epoch)
    return (next(iter(learn.dls.train))[0]*255).round().byte().as_subclass(torch.Tensor)


def between(lo, hi): return lambda u: lo+u*(hi-lo)


TECHNIQUES = {                                  # technique → (arguments, what its draws become, Pillow's call with them, levels it may be off)
    'rotate': (dict(degrees=40, fill=9), [between(-40, 40)], lambda im, a: im.rotate(a, MODES['bilinear'], fillcolor=(9,)*3), 1),
    'shear': (dict(amount=.4, interpolation='nearest'), [between(-.4, .4)]*2, lambda im, sx, sy: im.transform(im.size, Image.AFFINE, shear_matrix(im, sx, sy)), 0),
    'translate': (dict(share=.3, interpolation='bicubic'), [between(-12, 12)]*2, lambda im, dx, dy: im.transform(im.size, Image.AFFINE, (1, 0, -dx, 0, 1, -dy), MODES['bicubic']), 1),
    'autocontrast': ({}, [], ImageOps.autocontrast, 0), 'equalize': ({}, [], ImageOps.equalize, 0),
    'posterize': (dict(bits=2), [lambda u: int(2+u*7)], ImageOps.posterize, 0), 'solarize': (dict(threshold=60), [between(60, 256)], ImageOps.solarize, 0),
    'color': (dict(amount=.9), [between(.1, 1.9)], lambda im, f: ImageEnhance.Color(im).enhance(f), 0),
    'contrast': (dict(amount=.5), [between(.5, 1.5)], lambda im, f: ImageEnhance.Contrast(im).enhance(f), 0),
    'brightness': (dict(amount=1.), [between(0, 2)], lambda im, f: ImageEnhance.Brightness(im).enhance(f), 0),
    'sharpness': (dict(amount=1.), [between(0, 2)], lambda im, f: ImageEnhance.Sharpness(im).enhance(f), 0)}


@pytest.mark.parametrize('name', TECHNIQUES)
def test_a_technique_is_the_pillow_call_of_its_card_by_the_samples_own_draws(name, folder):
    arguments, becomes, pillow, off = TECHNIQUES[name]
    plain, learn = learner(folder), getattr(learner(folder), name)(**arguments, p=.6)
    for epoch in (0, 4):
        before, after = seen(plain, epoch), seen(learn, epoch)
        dl = learn.dls.train
        draws = [uniform(dl.draws(0), dl.seed, epoch, name, 'op', key).astype(np.float32).astype(float) for key in ('do', *range(len(becomes)))]
        expected = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in before]
        expected = [pillow(im, *(f(u) for f, u in zip(becomes, us))) if do < .6 else im for im, (do, *us) in zip(expected, zip(*draws))]
        g = gap(after, expected).flatten(1)
        assert g.max() <= off and (g > 0).float().mean() < .01
        assert 4 <= (after != before).flatten(1).any(1).sum() <= 14
    assert f'{.6:.0%} of the training images' in learn.techniques[name].effect


def test_the_order_of_calls_does_not_matter_but_the_table_does(folder):
    a = learner(folder).rotate(p=1).brightness(p=1).autocontrast(p=1)
    b = learner(folder).autocontrast(p=1).rotate(p=1).brightness(p=1)
    assert torch.equal(seen(a), seen(b))
    assert [t.who for t in a.dls.train.after_batch.fs if hasattr(t, 'who')] == [n for n in OP_ORDER if n in ('rotate', 'brightness', 'autocontrast')]


def test_the_last_call_wins_and_validation_and_other_learners_see_nothing(folder):
    learn, other = learner(folder), learner(folder)
    other.dls = learn.dls
    valid, before = learn.dls.valid.one_batch()[0], seen(other)
    learn.contrast(p=1).rotate(90, p=1).rotate(0, p=1).contrast(0, p=1)
    assert torch.equal(seen(learn), before) and torch.equal(seen(other), before)
    learn.brightness(1., p=1)
    assert not torch.equal(seen(learn), before) and torch.equal(seen(other), before) and torch.equal(learn.dls.valid.one_batch()[0], valid)
    test = learn.dls.test_dl(learn.dls.valid.items)
    assert torch.equal(test.one_batch()[0][:len(valid)], valid[:test.bs])


def in_memory(x):
    "A Learner on a batch of inputs, normalised on the way as fastai does it."
    data = torch.utils.data.TensorDataset(x, torch.arange(len(x)) % 2)
    dls = as_dataloaders((data, data), bs=8)
    dls.train.after_batch.add(Normalize.from_stats([.5], [.5], cuda=False))
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 2)))


def test_images_in_memory_are_varied_before_they_are_normalised_and_one_that_is_not_finite_stays():
    x = batch(crops(16, 16, 16)).float()/255
    x[3, 1, 2, 2] = float('nan')
    learn = in_memory(x).rotate(180., p=1.)
    out = learn.dls.train.one_batch()[0]*.5+.5
    known = {tuple((i*255).round().flatten().tolist()) for i in x}
    assert not any(tuple((i*255).round().flatten().tolist()) in known for i in out) and -1e-6 < out[out.isfinite()].min() and out[out.isfinite()].max() < 1+1e-6
    many = torch.cat([b[0] for b in learn.dls.train])
    assert many.isnan().flatten(1).any(1).sum() == x.isnan().flatten(1).any(1).sum() == 1 and many.isnan().sum() == 1


def test_what_cannot_be_varied_is_said(capsys):
    x = batch(crops(16, 16, 16)).float()/255
    assert 'images of one channel have no colour' in in_memory(x[:, :1].contiguous()).color().techniques['color'].effect
    assert 'these have 256 px in all' in in_memory(x).equalize().techniques['equalize'].effect
    assert 'p is 0' in in_memory(x).posterize(p=0).techniques['posterize'].effect
    assert capsys.readouterr().out.count('next to nothing to do') == 3


@pytest.mark.parametrize('name, kwargs, message', [
    ('rotate', dict(degrees=181), 'rotate: degrees must be 0 to 180, got 181'), ('shear', dict(amount=-.1), 'shear: amount must be 0 to 1, got -0.1'),
    ('translate', dict(share=2), 'translate: share must be 0 to 1'), ('posterize', dict(bits=0), 'posterize: bits must be 1 to 8, got 0'),
    ('solarize', dict(threshold=257), 'solarize: threshold must be 0 to 256'), ('sharpness', dict(p=1.1), 'sharpness: p must be 0 to 1, got 1.1'),
    ('color', dict(amount=float('nan')), 'color: amount must be 0 to 1, got nan'), ('rotate', dict(fill=256), 'rotate: fill must be 0 to 255'),
    ('rotate', dict(interpolation='cubic'), "rotate: interpolation must be one of .*; did you mean 'bicubic'")])
def test_values_outside_their_ranges(folder, name, kwargs, message):
    learn = learner(folder)
    dls = learn.dls
    with pytest.raises(ValueError, match=message): getattr(learn, name)(**kwargs)
    assert learn.dls is dls and not learn.techniques


def test_data_that_the_ops_cannot_serve(toy):
    with pytest.raises(ValueError, match=r'rotate: needs a loader of images \(TensorImage\), .* got Tensor \(n, 4\)'): toy().rotate()
    x = torch.linspace(0, 1, 16*3*64).view(16, 3, 8, 8)
    with pytest.raises(ValueError, match=r'color: needs images of 256 levels.* got torch.float32 from -1 to -0.8'): in_memory(x*2-1).color()
    with pytest.raises(ValueError, match=r'solarize: needs images of 1 or 3 channels, got \(n, 2, 8, 8\)'): in_memory(x[:, :2].contiguous()).solarize()
    masks = [(TensorImage(i), TensorMask(torch.zeros(8, 8).long())) for i in x]
    learn = Learner(DataLoaders(KeyedDL(masks, 8, shuffle=True), KeyedDL(masks, 8)), nn.Conv2d(3, 2, 1), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r'shear: moves the pixels of images, and their targets, TensorMask \(n, 8, 8\), would stay where they are; `augment` moves both'): learn.shear()
    assert 'of the training images' in learn.contrast().techniques['contrast'].effect        # moves nothing


def test_the_cards_name_pillows_calls():
    calls = dict(rotate='im.rotate(', shear='Image.AFFINE', translate='Image.AFFINE', autocontrast='ImageOps.autocontrast(im)', equalize='ImageOps.equalize(im)',
                 posterize='ImageOps.posterize(im, bits)', solarize='ImageOps.solarize(im, threshold)', color='ImageEnhance.Color(im)', contrast='ImageEnhance.Contrast(im)',
                 brightness='ImageEnhance.Brightness(im)', sharpness='ImageEnhance.Sharpness(im)')
    cards = discover()
    assert all(call in cards[name].doc and 'Pillow' in cards[name].summary for name, call in calls.items())
