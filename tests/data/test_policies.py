"Policies: each image gets what torchvision gives a Pillow image, as often as the papers say."
import numpy as np
import pytest
import torch
from fastai.basics import Learner, TensorImage, nn
from PIL import Image
from scipy.stats import binomtest, chi2_contingency, chisquare
from sklearn.datasets import load_sample_images
from torchvision.transforms import AutoAugment, InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op

from fastrecipes.data.folders import image_folder
from fastrecipes.data.keyed import keyed
from fastrecipes.data.policies import LEVELS, MOVES, AutoAugmented, Drawn, apply_each, subpolicies
from fastrecipes.randomness import forked, uniform
from fastrecipes.technique import discover

discover()
PHOTOS = [Image.fromarray(i) for i in load_sample_images().images]
H, W = 45, 52


def crops(n):
    rng, out = np.random.default_rng(0), []
    for k in range(n):
        side = int(rng.integers(60, 420))
        x, y = rng.integers(0, 640-side), rng.integers(0, 427-side)
        out.append(PHOTOS[k % 2].crop((x, y, x+side, y+side)).resize((W, H)))
    return out


def batch(images): return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])


def torchvisions(images, names, values, interpolation='nearest', fill=None):
    return batch([_apply_op(i, n, float(v), InterpolationMode(interpolation), fill) for i, n, v in zip(images, names, values)])


@pytest.mark.parametrize('interpolation', ['nearest', 'bilinear', 'bicubic'])
@pytest.mark.parametrize('name', [*MOVES, *LEVELS])
def test_each_op_at_each_magnitude_is_torchvisions_on_pillow(name, interpolation):
    magnitudes, signed = AutoAugment()._augmentation_space(31, (H, W))[name]
    values = [v for m in np.atleast_1d(magnitudes.numpy()).tolist() for v in ((m, -m) if signed else (m,))]
    images = crops(len(values))
    gap = (apply_each(batch(images), [name]*len(values), values, interpolation, 77).int()-torchvisions(images, [name]*len(values), values, interpolation, 77)).abs()
    assert gap.max() <= (name in MOVES and interpolation != 'nearest') and (gap > 0).float().mean() < .01


@pytest.mark.parametrize('policy', [Drawn(2, 9), Drawn(3, 30), *map(AutoAugmented, ('imagenet', 'cifar10', 'svhn'))], ids=lambda p: f'{p.who} {getattr(p, "policy", "")}')
def test_a_batch_is_changed_image_by_image_as_it_was_drawn(policy):
    images = crops(48)
    with forked('here'): turns = list(policy.draw(48, H, W))
    with forked('here'): out = policy(TensorImage(batch(images)))
    expected = images
    for names, values in turns: expected = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in torchvisions(expected, names, values)]
    assert torch.equal(out.as_subclass(torch.Tensor), batch(expected)) and len({n for names, _ in turns for n in names}) > 8


def test_an_op_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="op: one of ShearX, .*, Identity, got 'Blur'"): apply_each(batch(crops(2)), ['Invert', 'Blur'], [0, 0])


def test_randaugment_draws_fourteen_ops_evenly_both_ways_and_anew_each_turn():
    with forked('draws'): turns = list(Drawn(2, 9).draw(14_000, H, W))
    space = RandAugment()._augmentation_space(31, (H, W))
    for names, values in turns:
        assert chisquare([(names == n).sum() for n in space]).pvalue > 1e-3
        for name, (magnitudes, signed) in space.items():
            of = values[torch.from_numpy(names == name)]
            assert set(of.abs().tolist()) == {abs(float(magnitudes[9])) if magnitudes.ndim else 0.}
            if signed: assert binomtest(int((of > 0).sum()), len(of)).pvalue > 1e-3
            else: assert (of >= 0).all()
    assert chi2_contingency([[((turns[0][0] == a) & (turns[1][0] == b)).sum() for b in space] for a in space]).pvalue > 1e-3


@pytest.mark.parametrize('policy', ['imagenet', 'cifar10', 'svhn'])
def test_autoaugment_draws_each_pair_evenly_and_each_op_with_its_probability(policy):
    n = 50_000
    with forked('draws'): first, second = AutoAugmented(policy).draw(n, H, W)
    space = AutoAugment()._augmentation_space(10, (H, W))
    for turn, (names, values) in enumerate((first, second)):
        expected = {}                           # (op, magnitude) → share
        for pair in subpolicies(policy):
            op, p, at = pair[turn]
            magnitudes, signed = space[op]
            value = float(magnitudes[at]) if at is not None else 0.
            for v in ((value, -value) if signed and value else (value,)):
                expected[op, v] = expected.get((op, v), 0) + p/25/(2 if signed and value else 1)
            expected['Identity', 0.] = expected.get(('Identity', 0.), 0) + (1-p)/25
        drawn = list(zip(names.tolist(), [0. if i == 'Identity' else v for i, v in zip(names, values.tolist())]))
        counts = {key: drawn.count(key) for key in set(drawn)}
        assert counts.keys() <= expected.keys() and sum(expected.values()) == pytest.approx(1)
        keys = [k for k, share in expected.items() if share > 0]
        assert chisquare([counts.get(k, 0) for k in keys], np.array([expected[k] for k in keys])*n/sum(expected.values())).pvalue > 1e-3


def test_the_policies_are_those_of_the_paper_and_all_of_torchvisions():
    "arXiv:1805.09501, tables 7 to 9: the first and the last sub-policy of each; levels of ops without one count for nothing."
    paper = dict(imagenet=((('Posterize', .4, 8), ('Rotate', .6, 9)), (('Equalize', .8, None), ('Equalize', .6, None))),
                 cifar10=((('Invert', .1, None), ('Contrast', .2, 6)), (('TranslateY', .7, 9), ('AutoContrast', .9, None))),
                 svhn=((('ShearX', .9, 4), ('Invert', .2, None)), (('ShearX', .7, 2), ('Invert', .1, None))))
    for policy, (first, last) in paper.items():
        table = subpolicies(policy)
        assert len(table) == 25 and (table[0], table[-1]) == (first, last)
        assert all(op in {*MOVES, *LEVELS} and 0 <= p <= 1 for pair in table for op, p, _ in pair)


# as techniques

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('photographs')
    for k, im in enumerate(crops(40)):
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


def test_randaugment_is_torchvisions_by_the_samples_own_draws(folder):
    plain, learn = learner(folder), learner(folder).randaugment(n=3, magnitude=12)
    space = RandAugment()._augmentation_space(31, (40, 40))
    for epoch in (0, 2):
        images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in seen(plain, epoch)]
        after, dl = seen(learn, epoch), learn.dls.train
        for turn in range(3):
            op, sign = (uniform(dl.draws(0), dl.seed, epoch, 'randaugment', turn, what) for what in ('op', 'sign'))
            names = [list(space)[int(u*14)] for u in op]
            values = [(float(m[12]) if m.ndim else 0.)*(-1 if signed and s >= .5 else 1) for (m, signed), s in zip((space[n] for n in names), sign)]
            images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in torchvisions(images, names, values)]
        assert torch.equal(after, batch(images))


@pytest.mark.parametrize('name', ['randaugment', 'autoaugment'])
def test_validation_stays_an_epoch_repeats_and_the_last_call_wins(name, folder):
    learn = learner(folder)
    valid, before = learn.dls.valid.one_batch()[0], seen(learn)
    getattr(getattr(learn, name)(), name)(interpolation='bilinear')
    assert torch.equal(learn.dls.valid.one_batch()[0], valid) and torch.equal(seen(learn, 1), seen(learn, 1))
    assert not torch.equal(seen(learn), before) and [t.interpolation for t in learn.dls.train.after_batch.fs if hasattr(t, 'draw')] == ['bilinear']
    assert len(learn.techniques[name].effect) > 30


@pytest.mark.parametrize('name, kwargs, message', [
    ('randaugment', dict(n=0), 'randaugment: n must be at least 1, got 0'), ('randaugment', dict(magnitude=31), 'randaugment: magnitude must be 0 to 30, got 31'),
    ('randaugment', dict(interpolation='linear'), "randaugment: interpolation must be one of nearest, bilinear, bicubic, got 'linear'; did you mean 'bilinear'"),
    ('autoaugment', dict(policy='cifar'), "autoaugment: policy must be one of imagenet, cifar10, svhn, got 'cifar'; did you mean 'cifar10'")])
def test_what_the_policies_refuse(name, kwargs, message, folder, toy):
    learn = learner(folder)
    dls = learn.dls
    with pytest.raises(ValueError, match=message): getattr(learn, name)(**kwargs)
    assert learn.dls is dls and not learn.techniques
    with pytest.raises(ValueError, match=f'{name}: needs a loader of images'): getattr(toy(), name)()
