"A first look by a linear model: against the error that two bell curves leave, known noise, mirror images that are another class, timm's own features."
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.stats import norm

from fastrecipes.recipes.looks import Mirror, deep_features, label_noise, look_at, picture, small_pixels
from fastrecipes.training.transfer import packaged_weights

ARCH = 'tf_efficientnet_lite0'


def clouds(n: int, c: int = 2, apart: float = 2., d: int = 10, seed: int = 0):
    "`n` points about `c` corners, each `apart` from the others, and their classes."
    rng = np.random.default_rng(seed)
    y = np.arange(n) % c
    x = rng.normal(size=(n, d))
    x[np.arange(n), y] += apart/2**.5
    return x.astype(np.float32), y


def keys(x): return [str(i) for i in range(len(x))]


@pytest.mark.parametrize('apart', [1., 2., 4.])
def test_the_accuracy_is_that_of_the_best_linear_rule(apart):
    x, y = clouds(4000, apart=apart)
    look = look_at('points', x, x, y, keys(x))
    best = norm.cdf(apart/2)                                   # two normal clouds, cut half way between
    assert look.accuracy.lo <= best <= look.accuracy.hi and look.accuracy.n == 4000
    assert look.accuracy.value == (look.predicted == y).mean() and (0 <= look.sureness).all() and (look.sureness <= 1).all()
    surest = look.sureness >= np.quantile(look.sureness, .8)
    assert (look.predicted == y)[surest].mean() > look.accuracy.value


def test_copies_are_never_on_both_sides():
    "Points without any class, each of them twice: whoever has seen the copy knows the answer."
    rng = np.random.default_rng(0)
    x, y = np.repeat(rng.normal(size=(100, 60)), 2, 0), np.repeat(np.arange(100) % 2, 2)
    honest = look_at('points', x, x, y, [str(i//2) for i in range(200)]).accuracy
    assert honest.lo < .5 < honest.hi and look_at('points', x, x, y, keys(x)).accuracy.lo > .6


@pytest.mark.parametrize('share', [0., .2, .4])
def test_how_many_labels_are_wrong(share):
    x, y = clouds(2000, c=5, apart=6.)
    rng = np.random.default_rng(1)
    wrong = rng.random(2000) < share
    noisy = np.where(wrong, (y + rng.integers(1, 5, 2000)) % 5, y)
    noise = label_noise(look_at('points', x, x, noisy, keys(x)), noisy)
    assert noise.lo-.01 <= wrong.mean() <= noise.hi+.01 and noise.n == 400


def test_hard_is_not_noisy():
    "Classes that overlap are confused at their borders; what lies far from them is told right. Points that no rule tells apart say nothing of labels."
    x, y = clouds(2000, apart=2.)
    look = look_at('points', x, x, y, keys(x))
    assert look.accuracy.value < .87 and label_noise(look, y).value < .02
    x, y = clouds(600, c=10, apart=0.)
    assert label_noise(look_at('points', x, x, y, keys(x)), y) is None


def test_mirror_images_that_are_the_same_and_such_that_are_another_class():
    x, y = clouds(400, apart=3.)
    same = look_at('points', x, x, y, keys(x)).mirror
    assert same.plain == same.mirrored and not same.harms
    other = x.copy()
    other[:, [0, 1]] = x[:, [1, 0]]                            # the mirror image of one class looks like the other
    swapped = look_at('points', x, other, y, keys(x)).mirror
    assert swapped.mirrored < .15 and swapped.harms and swapped.z > 5
    assert Mirror(.9, .2, .89, .5).harms and not Mirror(.9, .2, .94, -2.5).harms and not Mirror(.5, .4, .49, 1.).harms


def test_the_harm_is_mcnemars():
    plain, learnt = np.ones(100, bool), np.ones(100, bool)
    learnt[:10], plain[10:12] = False, False                   # 10 right before only, 2 right afterwards only
    one = np.zeros(100, int)
    assert Mirror.of(one, plain, plain, learnt) == Mirror(.98, .98, .9, pytest.approx(8/12**.5)) and Mirror.of(one, plain, plain, plain).z == 0
    labels = (np.arange(100) >= 90).astype(int)                # a common class that looks the same mirrored, a rare one that does not
    assert Mirror.of(labels, plain, labels == 0, plain).mirrored == .5


def test_what_is_seen_of_a_picture(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (40, 50), dtype=np.uint8)
    Image.fromarray(grey).convert('RGB').save(tmp_path/'grey.jpg')
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path/'colour.png')
    p, q = picture(tmp_path/'grey.jpg'), picture(tmp_path/'colour.png')
    assert p.grey and not q.grey and q.large.shape == (96, 96, 3) and q.small.shape == (16, 16, 3)
    x = small_pixels(np.stack([p.small, q.small]))
    assert x.shape == (2, 768) and x[1, 3*17+2] == pytest.approx(q.small[1, 1, 2]/255)


@pytest.mark.skipif(not packaged_weights(ARCH), reason='the weights extra is not installed')
def test_the_features_are_timms():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    model = timm.create_model(ARCH, num_classes=0).eval()
    model.load_state_dict(dict(zip(model.state_dict(), torch.load(packaged_weights(ARCH), weights_only=True).values())))
    cfg = model.pretrained_cfg
    x = torch.from_numpy((pictures/255-np.array(cfg['mean']))/np.array(cfg['std'])).float().permute(0, 3, 1, 2)
    with torch.no_grad(): want = model(x)
    np.testing.assert_allclose(deep_features(pictures, ARCH, bs=2), want, rtol=1e-3, atol=1e-4)
