"albumentations: what it does to pixels and masks equals the library called by hand, sample by sample, with the seeds of the key."
import os
import pickle
import random
import sys

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')          # else the import asks the network for the newest version

import albumentations as A                                      # noqa: E402
import numpy as np                                              # noqa: E402
import pytest                                                   # noqa: E402
import torch                                                    # noqa: E402
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, load_learner, nn  # noqa: E402
from fastai.data.block import DataBlock                         # noqa: E402
from fastai.torch_core import TensorImage, TensorMask           # noqa: E402
from fastai.vision.data import ImageBlock, MaskBlock, PointBlock                    # noqa: E402
from torch.utils.data import TensorDataset                      # noqa: E402

from fastrecipes.data.albumentation import Albumentations, arriving, check_pixels, is_mask      # noqa: E402
from fastrecipes.data.folders import image_folder               # noqa: E402
from fastrecipes.data.keyed import KeyedDL, keyed               # noqa: E402
from fastrecipes.data.loaders import Indexed                    # noqa: E402
from fastrecipes.randomness import uniform                      # noqa: E402
from fastrecipes.technique import discover                      # noqa: E402

discover()
SEED = 3


@pytest.fixture
def learn(digit_folder): return folder_learner(digit_folder)


def folder_learner(folder, workers=0):
    learn = Learner(image_folder(folder, size=16, bs=32, workers=workers, seed=SEED), nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), loss_func=nn.CrossEntropyLoss())
    keyed(learn, SEED)
    return learn


def pipeline(): return A.Compose([A.HorizontalFlip(p=.5), A.Affine(rotate=(-20, 20), translate_percent=(-.1, .1), p=.8), A.GaussNoise(p=.5), A.RandomBrightnessContrast(p=.5)])


def batch(learn, epoch=0):
    learn.dls.train.set_epoch(epoch)
    return next(iter(learn.dls.train))


def seeds(draws, epoch):
    "48 bits a draw, in two halves of 24: what a float32 holds exactly."
    high, low = (np.float32(uniform(draws, SEED, epoch, 'albumentations', part)).astype(np.float64)*2**24 for part in ('high', 'low'))
    return [int(h)*2**24 + int(w) for h, w in zip(high, low)]


def by_hand(compose, images, seeds, masks=None):
    "Each uint8 image `(h, w, c)`, and mask, through `compose` whose state is that of its seed."
    done = []
    for i, s in enumerate(seeds):
        compose.set_random_state(np.random.default_rng(s), random.Random(s))
        done.append(compose(image=images[i], **({} if masks is None else dict(mask=masks[i]))))
    return done


def pixels(x): return (x.as_subclass(torch.Tensor)*255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def test_images_are_those_of_the_library_by_hand(learn):
    plain = pixels(batch(learn, 2)[0])
    after = pixels(batch(learn.albumentations(pipeline()), 2)[0])
    expected = np.stack([o['image'] for o in by_hand(pipeline(), plain, seeds(learn.dls.train.draws(0), 2))])
    assert np.array_equal(after, expected) and not np.array_equal(after, plain)


def test_two_flips_come_independently(learn):
    "albumentations 2.0.8: `Compose.set_random_seed` gives every transform the same draws, so that two flips of p=.5 always come together."
    flips = A.Compose([A.HorizontalFlip(p=.5), A.VerticalFlip(p=.5)])
    x = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    def kinds(seed): return {seed(s) or flips(image=x)['image'].tobytes() for s in range(60)}
    assert len(kinds(flips.set_random_seed)) == 2               # the defect: when it goes, so may our way around
    plain = batch(learn)[0]
    after = batch(learn.albumentations(flips))[0]
    found = [[torch.equal(a, b.flip(dims) if dims else b) for dims in ((), (-1,), (-2,), (-2, -1))] for a, b in zip(after, plain)]
    assert all(any(f) for f in found) and all(sum(f[i] for f in found) > 1 for i in range(4))


def test_workers_change_nothing_and_an_epoch_is_not_another(digit_folder, learn):
    with_workers = folder_learner(digit_folder, 2).albumentations(pipeline())
    learn.albumentations(pipeline())
    for dls in (learn.dls, with_workers.dls): dls.train.set_epoch(1)
    for (x, y), (x2, y2) in zip(learn.dls.train, with_workers.dls.train, strict=True): assert torch.equal(x, x2) and torch.equal(y, y2)
    assert torch.equal(batch(learn, 1)[0], batch(learn, 1)[0]) and not torch.equal(batch(learn, 1)[0], batch(learn, 2)[0])


def test_transforms_that_draw_from_the_streams_of_numpy_and_python_are_keyed_too(learn):
    class Grey(A.ImageOnlyTransform):
        def apply(self, img, **params): return np.full_like(img, np.random.randint(128) + random.randrange(128))
    learn.albumentations([Grey(p=1)])
    np.random.seed(0), random.seed(0)
    before, after = batch(learn)[0], batch(learn)[0]
    levels = pixels(before)[:, 0, 0, 0]
    state = np.random.RandomState(0).randint(1000)
    assert torch.equal(before, after) and len(set(levels.tolist())) > 20 and np.random.randint(1000) == state
    for s, level in zip(seeds(learn.dls.train.draws(0), 0), levels):
        assert level == np.random.RandomState(s % 2**32).randint(128) + random.Random(s).randrange(128)


def segmentation(masks, images=None, seed=SEED, n=24, c=3, side=16):
    x = torch.rand(n, c, side, side, generator=torch.Generator().manual_seed(0)) if images is None else images
    ds = Indexed(TensorDataset(x, masks), vocab=range(3))
    kw = dict(num_workers=0, seed=seed)
    dls = DataLoaders(KeyedDL(ds, 12, shuffle=True, drop_last=True, **kw), KeyedDL(ds, 12, **kw), device=torch.device('cpu'))
    learn = Learner(dls, nn.Conv2d(c, 3, 1), CrossEntropyLossFlat(axis=1))
    keyed(learn, seed)
    return learn


@pytest.mark.parametrize('low, high, dtype', [(0, 3, torch.long), (-100, 3, torch.long), (0, 40_000, torch.int32), (0, 255, torch.uint8)])
def test_a_mask_moves_with_its_image(low, high, dtype):
    "The image is its own mask: wherever a pixel goes, its label goes. Values beyond 8 bits, or below 0, come out as they went in."
    values = torch.randint(0, 256, (24, 16, 16), generator=torch.Generator().manual_seed(1))
    masks = (low + values*(high-low)//255).to(dtype)
    learn = segmentation(masks, images=(values/255)[:, None], c=1)
    x, y = batch(learn.albumentations([A.HorizontalFlip(p=.5), A.RandomRotate90(p=.7), A.Transpose(p=.5), A.RandomCrop(9, 12)]))
    assert x.shape == (12, 1, 9, 12) and y.shape == (12, 9, 12) and y.dtype == dtype
    assert torch.equal((low + (x[:, 0]*255).round().long()*(high-low)//255).to(dtype), y.as_subclass(torch.Tensor))
    assert '16×16 → 9×12 px' in learn.techniques['albumentations'].effect and 'its mask' in learn.techniques['albumentations'].effect
    assert learn.dls.valid.one_batch()[0].shape == (12, 1, 16, 16)


def test_masks_of_fastai_are_those_of_the_library_by_hand():
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8), rng.integers(0, 3, (24, 16, 16)).astype(np.uint8)
    data = DataBlock((ImageBlock, MaskBlock(['sky', 'road', 'car'])), get_x=lambda i: images[i], get_y=lambda i: masks[i], splitter=lambda items: (list(range(16)), list(range(16, 24))))
    learn = Learner(data.dataloaders(range(24), bs=8, num_workers=0, device='cpu'), nn.Conv2d(3, 3, 1), CrossEntropyLossFlat(axis=1))
    keyed(learn, SEED)
    x, y = batch(learn.albumentations(pipeline()))
    draws = learn.dls.train.draws(0)
    done = by_hand(pipeline(), images[draws], seeds(draws, 0), masks[draws])
    assert isinstance(x, TensorImage) and isinstance(y, TensorMask) and y.dtype == torch.long
    assert np.array_equal(pixels(x), np.stack([o['image'] for o in done])) and np.array_equal(y.numpy(), np.stack([o['mask'] for o in done]))
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1]).all()


def test_masks_with_channels_move_too():
    x = torch.rand(6, 3, 8, 8)
    flipped, y = Albumentations(A.Compose([A.HorizontalFlip(p=1)])).over(TensorImage((x*255).round()/255), x[:, :2], list(range(6)))
    assert torch.equal(y, x[:, :2].flip(-1)) and torch.allclose(flipped, ((x*255).round()/255).flip(-1))


def test_an_image_with_a_bad_pixel_comes_out_not_finite_and_the_others_whole():
    x = TensorImage(torch.rand(3, 1, 8, 8))
    x[1, 0, 2, 3] = torch.inf
    out, _ = Albumentations(A.Compose([A.RandomCrop(4, 4), A.HorizontalFlip()])).over(x, None, [1, 2, 3])
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all() and out.shape == (3, 1, 4, 4)


def test_images_for_validation_and_tests_stay_as_they_are_and_the_last_call_wins(learn, digit_folder):
    valid = learn.dls.valid.one_batch()[0]
    files = [next(digit_folder.glob('*/*.png'))]
    test = learn.dls.test_dl(files).one_batch()[0]
    learn.albumentations([A.Rotate((90, 90), p=1)]).albumentations([A.InvertImg(p=1)])
    assert torch.equal(learn.dls.valid.one_batch()[0], valid) and torch.equal(learn.dls.test_dl(files).one_batch()[0], test)
    assert [type(t).__name__ for t in learn.dls.train.after_batch.fs] == ['Albumentations', 'IntToFloatTensor']
    inverted = batch(learn)[0]
    assert np.array_equal(255-pixels(inverted), pixels(batch(folder_learner(digit_folder))[0]))
    with learn.dls.train.dataset.set_split_idx(1): assert np.array_equal(255-pixels(batch(learn)[0]), pixels(inverted))    # what `tta` asks of the training set


def test_the_users_pipeline_stays_theirs(learn):
    mine, twin = (A.Compose([A.HorizontalFlip(p=.5)], seed=1) for _ in range(2))
    learn.albumentations(mine)
    batch(learn)
    x = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert all(np.array_equal(mine(image=x)['image'], twin(image=x)['image']) for _ in range(20))


@pytest.mark.parametrize('suffix', ['json', 'yaml'])
def test_a_saved_pipeline_is_the_pipeline(learn, tmp_path, suffix):
    A.save(pipeline(), tmp_path/f'p.{suffix}', data_format=suffix)
    one = batch(learn.albumentations(str(tmp_path/f'p.{suffix}')))[0]
    assert torch.equal(one, batch(learn.albumentations(pipeline()))[0])


@pytest.mark.parametrize('kind', [lambda t: t[0], list, tuple, A.Compose, lambda t: A.OneOf(t, p=1), lambda t: A.Sequential(t, p=1)])
def test_a_transform_and_a_list_are_pipelines(learn, kind):
    plain = batch(learn)[0]
    assert torch.equal(batch(learn.albumentations(kind([A.HorizontalFlip(p=1)])))[0], plain.flip(-1))
    assert learn.techniques['albumentations'].effect == 'HorizontalFlip over each training image'


def test_an_exported_learner_loads_without_the_library(learn, tmp_path, monkeypatch):
    learn.albumentations(pipeline()).path = tmp_path
    x = batch(learn)[0]
    learn.export('l.pkl')
    with monkeypatch.context() as m:
        for name in [n for n in sys.modules if n.partition('.')[0] in ('albumentations', 'albucore')]: m.setitem(sys.modules, name, None)
        with pytest.raises(ImportError): import albumentations          # noqa: F401
        again = load_learner(tmp_path/'l.pkl')
        assert again.techniques['albumentations'].arguments['compose'].startswith('Compose([ HorizontalFlip(p=0.5), Affine(')
        assert [type(t).__name__ for t in again.dls.train.after_batch.fs] == ['Albumentations', 'IntToFloatTensor']
    again.dls = learn.dls
    assert repr(pickle.loads(pickle.dumps(learn.dls.train.after_batch.fs[0])).compose) == repr(pipeline()) and torch.equal(batch(again)[0], x)


REFUSED = dict(
    no_pipeline=(lambda: 3, r'albumentations: compose must be an albumentations\.Compose, .* got int'),
    a_function=(lambda: print, r'compose must be .* got builtin_function_or_method'),
    another_list=(lambda: [A.HorizontalFlip(), 'flip'], r"compose must be .* got \['HorizontalFlip', 'str'\]"),
    empty=(lambda: A.Compose([]), 'compose has no transforms'),
    boxes=(lambda: A.Compose([A.HorizontalFlip()], bbox_params=A.BboxParams('coco')), 'got a Compose for bboxes'),
    points=(lambda: A.Compose([A.HorizontalFlip()], keypoint_params=A.KeypointParams('xy')), 'got a Compose for keypoints'),
    normalised=(lambda: [A.Normalize()], r'must give images of 8 bits and 3 channel\(s\), got float32 \(16, 16, 3\)'),
    tensors=(lambda: [A.HorizontalFlip(), A.ToTensorV2()], r'must give images of 8 bits .* got torch.uint8 \(3, 16, 16\)'),
    too_big=(lambda: [A.RandomCrop(20, 20)], r'does not take these images \(n, 3, 16, 16\) \(.*Crop size'),
    sizes=(lambda: [A.RandomScale((-.5, .5), p=1)], r'must come out in one size, got \d+×\d+ and \d+×\d+ px'))


@pytest.mark.parametrize('kind', REFUSED)
def test_what_is_no_pipeline_for_images_is_refused_and_nothing_is_changed(learn, kind):
    given, said = REFUSED[kind]
    dls = learn.dls
    with pytest.raises(ValueError, match=said): learn.albumentations(given())
    assert learn.dls is dls and not learn.__dict__.get('techniques')


def test_files_that_hold_none_are_refused(learn, tmp_path):
    with pytest.raises(FileNotFoundError, match='albumentations: no file nowhere.json'): learn.albumentations('nowhere.json')
    (tmp_path/'p.json').write_text('{"a": 1}')
    with pytest.raises(ValueError, match='p.json holds no pipeline that albumentations.save wrote'): learn.albumentations(tmp_path/'p.json')


def test_points_stay_where_they_are_so_that_only_colours_may_change():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    data = DataBlock((ImageBlock, PointBlock), get_x=lambda i: images[i], get_y=lambda i: np.float32([[3, 4]]), splitter=lambda items: ([0, 1, 2, 3], [4, 5, 6, 7]))
    learn = Learner(data.dataloaders(range(8), bs=4, num_workers=0, device='cpu'), nn.Linear(1, 1), nn.MSELoss())
    with pytest.raises(ValueError, match='albumentations: HorizontalFlip moves pixels, and points or boxes would stay behind; use augment'):
        learn.albumentations([A.RandomGamma(), A.OneOf([A.HorizontalFlip()])])
    x, y = batch(learn.albumentations([A.InvertImg(p=1)]))
    assert np.array_equal(255-pixels(x), images[learn.dls.train.draws(0)]) and torch.allclose(y, torch.tensor([3/8-1, 4/8-1]).expand(4, 1, 2))


def test_pixels_of_another_range_are_refused():
    learn = segmentation(torch.zeros(24, 16, 16).long(), images=torch.linspace(-2, 2, 24*3*256).view(24, 3, 16, 16))
    with pytest.raises(ValueError, match=r'albumentations: needs pixels in \[0, 1\] or of 8 bits, got -2 to -1.83'): learn.albumentations(pipeline())
    check_pixels('x', [torch.full((1, 3, 2, 2), torch.nan)])    # another's to name: it stays what it is
    with pytest.raises(ValueError, match=r'x: needs one image a sample, got \(n, 3, 2, 2\), \(n, 3, 2, 2\)'): check_pixels('x', [torch.rand(1, 3, 2, 2)]*2)


def test_two_masks_are_refused():
    x = torch.rand(24, 3, 16, 16)
    ds = [(TensorImage(a), TensorMask(torch.zeros(16, 16).long()), TensorMask(torch.zeros(16, 16).long())) for a in x]
    dls = DataLoaders.from_dsets(ds, ds, bs=4, num_workers=0, device='cpu', n_inp=1)
    dls.n_inp = 1
    for dl in dls.loaders: dl._n_inp = 1
    with pytest.raises(ValueError, match=r'carries one mask along with an image, got targets .* \(TensorMask, TensorMask\)'):
        Learner(dls, nn.Linear(1, 1), nn.MSELoss()).albumentations(pipeline())


def test_what_arrives_is_not_yet_normalised(learn):
    learn.albumentations([A.InvertImg(p=1)])
    before, after, state = arriving(learn, 3)[0][0], arriving(learn, 11)[0][0], torch.get_rng_state()
    assert before.dtype == torch.uint8 and before.shape == (1, 3, 16, 16) and np.array_equal(255-before.permute(0, 2, 3, 1).numpy(), pixels(after))
    assert torch.equal(state, torch.get_rng_state())


def test_a_mask_is_told_by_its_type_or_its_shape():
    x = torch.rand(4, 3, 8, 6)
    assert is_mask(torch.zeros(4, 8, 6), x) and is_mask(TensorMask(torch.zeros(4, 5, 5)), x) and is_mask(torch.zeros(4, 2, 8, 6), x)
    assert not is_mask(torch.zeros(4), x) and not is_mask(torch.zeros(8, 6), x) and not is_mask(torch.zeros(4, 6, 8), x)
