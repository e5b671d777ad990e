"What is taken from memory is what would have been decoded, to the bit, in every place where a loader is used."
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from fastai.vision.all import (CategoryBlock, DataBlock, FlipItem, ImageBlock, Learner, MaskBlock, Normalize, RegressionBlock, Resize,
                               ResizeMethod, TensorCategory, TensorImage, TensorMask, aug_transforms, get_image_files, load_learner, nn, parent_label)
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder

from fastrecipes.data import decoded
from fastrecipes.data.cache import CachedDL, cached
from fastrecipes.data.folders import image_folder
from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import as_dataloaders
from fastrecipes.data.samples import digits
from fastrecipes.randomness import stream
from fastrecipes.technique import discover

discover()


@pytest.fixture(scope='module')
def data(tmp_path_factory): return digits(tmp_path_factory.mktemp('cache')/'digits', imbalance=100)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "12 pictures of 3 shapes in 2 classes, with a mask beside each."
    root = tmp_path_factory.mktemp('photos')
    for i in range(12):
        rng, (h, w) = stream('photos', i), ((20, 30), (30, 20), (25, 25))[i % 3]
        for name, a in (('ab'[i % 2], rng.integers(0, 256, (h, w, 3))), ('masks', rng.integers(0, 4, (h, w)))):
            (root/name).mkdir(exist_ok=True)
            Image.fromarray(a.astype(np.uint8)).save(root/name/f'{i}.png')
    return root


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 10))


def quiet(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def same(a, b):
    return len(a) == len(b) and all(len(p) == len(q) and all(type(x) is type(y) and torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(p, q)) for p, q in zip(a, b))


def test_every_batch_is_the_one_that_would_have_been_decoded(data, tmp_path):
    plain = image_folder(data, size=12, bs=32)
    held, effect = cached(plain, tmp_path)
    n = sum(len(dl.dataset) for dl in plain.loaders)
    assert effect == f'{n} images decoded once, {(128+n*3*12*12)/1e3:.1f} kB of pixels'
    for a, b in zip(plain.loaders, held.loaders):
        assert type(b) is CachedDL and b.num_workers == 1 and len(a) == len(b) and same(list(a), list(b)) and same(list(a), list(b))      # two epochs
    assert [type(x) for x in held.one_batch()] == [TensorImage, TensorCategory]
    assert type(plain.train) is KeyedDL


def test_training_is_the_same_to_the_bit_with_what_else_acts_on_batches(data, tmp_path):
    weights = []
    for on in (False, True):
        learn = quiet(Learner(image_folder(data, size=12, bs=32), net()))
        learn.use(cache=str(tmp_path) if on else None, balance='upsampling', augment=dict(flip=False), mixup=.4)
        learn.fit(2, 1e-2)
        weights.append([*learn.model.parameters()])
    assert isinstance(learn.dls.train, CachedDL) and all(torch.equal(a, b) for a, b in zip(*weights))


def test_what_is_not_of_these_data_is_decoded(data, tmp_path):
    learn = quiet(Learner(image_folder(data, size=12, bs=32), net()))
    file = learn.dls.valid.items[0]
    before = learn.predict(file)[2]
    learn.cache(str(tmp_path/'pixels')).export(tmp_path/'l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    with again.no_bar(): assert torch.equal(learn.predict(file)[2], before) and torch.equal(again.predict(file)[2], before)
    assert type(again.dls.train) is KeyedDL
    assert torch.equal(learn.get_preds(dl=learn.dls.test_dl([file]))[0][0], before) and (tmp_path/'l.pkl').stat().st_size < 200_000
    assert learn.dls.test_dl([file]).num_workers == 1


def test_it_is_decoded_once_for_all_who_ask_also_with_other_splits(data, tmp_path, monkeypatch, capsys):
    learn = quiet(Learner(image_folder(data, size=12, bs=32), net())).cache(str(tmp_path))
    assert 'images to decode once, 12×12 px' in capsys.readouterr().out
    monkeypatch.setattr(decoded, '_fill', lambda *a: pytest.fail('decoded again'))
    other = image_folder(data, size=12, bs=16, seed=7, valid=.4)
    held, _ = cached(other, tmp_path)
    assert same(list(other.valid), list(held.valid)) and held.train.columns[0].file == learn.dls.train.columns[0].file and not capsys.readouterr().out


def test_another_process_reads_the_same_file(data, tmp_path):
    held, _ = cached(image_folder(data, size=12, bs=32), tmp_path)
    code = f'''
import sys
from fastrecipes.data import decoded
from fastrecipes.data.cache import cached
from fastrecipes.data.folders import image_folder
decoded._fill = None
print(int(cached(image_folder({str(data)!r}, size=12, bs=32), {str(tmp_path)!r})[0].valid.one_batch()[0].sum()*255))
'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert int(out.stdout) == pytest.approx(int(held.valid.one_batch()[0].sum()*255), abs=1), out.stderr


def test_other_sizes_lie_beside(data, tmp_path):
    learn = quiet(Learner(image_folder(data, size=12, bs=32), net())).cache(str(tmp_path), sizes=[8, 10])
    small = learn.dls.train.sized(8)
    assert same(list(small.new(shuffle=False)), list(image_folder(data, size=8, bs=32).train.new(shuffle=False))) and learn.dls.train.one_batch()[0].shape[-1] == 12
    assert small.one_batch()[0].shape == (32, 3, 8, 8) and small.dataset is learn.dls.train.dataset
    with pytest.raises(ValueError, match='size: one of 8, 10 px, which were cached, got 9'): learn.dls.train.sized(9)


def block(photos, targets=CategoryBlock, get_y=parent_label, item_tfms=None, batch_tfms=None):
    files = sorted(f for f in get_image_files(photos) if f.parent.name != 'masks')
    b = DataBlock((ImageBlock, targets), get_y=get_y, splitter=lambda items: (list(range(8)), list(range(8, 12))), item_tfms=item_tfms, batch_tfms=batch_tfms)
    return b.dataloaders(files, bs=4, num_workers=0)


def test_fastais_own_loaders_with_masks(photos, tmp_path):
    "Their masks are decoded once as well, by nearest neighbour."
    dls = block(photos, MaskBlock(codes=range(4)), lambda f: f.parent.parent/'masks'/f.name, Resize(16, ResizeMethod.Squish))
    held, _ = cached(dls, tmp_path)
    assert same(list(dls.valid), list(held.valid)) and [type(x) for x in held.valid.one_batch()] == [TensorImage, TensorMask] and len(list(tmp_path.glob('*.npy'))) == 2


def test_fastais_random_crop_becomes_the_one_of_validation(photos, tmp_path):
    dls = block(photos, item_tfms=Resize(16))
    held, _ = cached(dls, tmp_path)
    asked = {f: x for f, x in zip(dls.train.items, torch.cat([b[0] for b in dls.test_dl(dls.train.items)]))}
    assert same(list(dls.valid), list(held.valid)) and torch.equal(torch.cat([x for x, _ in held.train.new(shuffle=False)]), torch.stack([asked[f] for f in held.train.items]))


def test_numbers_as_targets(photos, tmp_path):
    dls = block(photos, RegressionBlock, lambda f: float(f.stem)/2, Resize(16, ResizeMethod.Squish))
    held, _ = cached(dls, tmp_path)
    assert same(list(dls.valid), list(held.valid))


def test_batch_transforms_go_on(photos, tmp_path):
    dls = block(photos, item_tfms=Resize(16, ResizeMethod.Squish), batch_tfms=[*aug_transforms(), Normalize.from_stats([.5]*3, [.5]*3)])
    learn = quiet(Learner(dls, net())).cache(str(tmp_path))
    assert same(list(dls.valid), list(learn.dls.valid)) and not torch.equal(learn.dls.train.one_batch()[0], learn.dls.train.one_batch()[0])
    assert learn.dls.train.seed == learn.keyed_cb.seed


@pytest.mark.parametrize('how, why', [
    (dict(item_tfms=[Resize(16), FlipItem()]), 'cache: the item transform FlipItem may give something else in every epoch; draw at random in batch transforms'),
    (dict(item_tfms=None), r'cache: images must come out in one size')])
def test_what_cannot_be_kept_is_refused(photos, tmp_path, how, why):
    learn = Learner(block(photos, **how), net())
    before = learn.dls
    with pytest.raises(ValueError, match=why): learn.cache(str(tmp_path))
    assert learn.dls is before and not list(tmp_path.glob('*.npy')) and not learn.techniques


def test_a_torch_dataset_that_decodes_is_refused_and_one_in_memory_has_nothing_to_decode(photos, capsys):
    x, y = torch.rand(8, 3, 6, 6), torch.arange(8) % 2
    learn = Learner(as_dataloaders((TensorDataset(x, y), TensorDataset(x, y)), bs=4), net(), nn.CrossEntropyLoss()).cache()
    assert capsys.readouterr().out == 'cache: there is nothing to decode: the samples are in memory\n' and type(learn.dls.train) is KeyedDL
    folder = ImageFolder(photos)
    with pytest.raises(ValueError, match='cache: ImageFolder decodes by itself'): cached(as_dataloaders((folder, folder), bs=4))


def test_sizes_are_for_our_own_data(photos, tmp_path):
    with pytest.raises(ValueError, match='cache: sizes are for the data of image_folder'): cached(block(photos, item_tfms=Resize(16)), tmp_path, sizes=[8])


def test_a_full_disk_costs_the_speed_and_nothing_else(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decoded.shutil, 'disk_usage', lambda p: type('U', (), dict(free=1000)))
    learn = quiet(Learner(image_folder(data, size=12, bs=32), net())).cache(str(tmp_path))
    assert 'are free in' in capsys.readouterr().out and 'images are decoded in every epoch' in learn.techniques['cache'].effect
    learn.fit(1)
    assert type(learn.dls.train) is KeyedDL


def test_image_folder_takes_it_as_an_argument(data, tmp_path, monkeypatch, capsys):
    dls = image_folder(data, size=12, bs=32, cache=str(tmp_path))
    assert isinstance(dls.train, CachedDL) and same(list(dls.valid), list(image_folder(data, size=12, bs=32).valid)) and sum(dls.holdings.counts['0'].values()) > 100
    monkeypatch.setattr(decoded.shutil, 'disk_usage', lambda p: type('U', (), dict(free=1000)))
    assert type(image_folder(data, size=10, bs=32, cache=str(tmp_path)).train) is KeyedDL and 'are free in' in capsys.readouterr().out
