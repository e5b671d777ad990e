"Numbers of the training set, against NumPy and scikit-learn; and where `normalize` puts them."
import numpy as np
import pytest
import torch
from fastai.basics import DataLoaders, Learner, nn
from fastai.data.block import DataBlock
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.vision.all import ImageBlock, MaskBlock, RandomErasing, imagenet_stats
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.decomposition import PCA
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from torch.utils.data import DataLoader, TensorDataset

from fastrecipes.data.folders import image_folder
from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import Indexed
from fastrecipes.data.statistics import KINDS, Moments, PixelMap, moments_of, normalization_of, normalized_by, normalizes, whitening
from fastrecipes.production.export import export_learner
from fastrecipes.technique import discover

discover()
EPS = 1e-5
MATRICES = ('decorrelate', 'pca', 'zca')


def crops(n=2000, side=6):
    "Small colour pictures as CIFAR has them: crops of scikit-learn's two photos, `(n, 3, side, side)` in [0, 1]."
    rng, photos = np.random.default_rng(0), [im[::4, ::4] for im in load_sample_images().images]
    at = [(photos[i % 2], rng.integers(0, 100), rng.integers(0, 150)) for i in range(n)]
    return torch.tensor(np.stack([p[r:r+side, c:c+side] for p, r, c in at])).permute(0, 3, 1, 2).float()/255


def digit_pictures(): return torch.tensor(load_digits().images, dtype=torch.float32)[:, None]/16


PICTURES = dict(digits=digit_pictures, crops=crops)


def learner(x, y=None, bs=64, n=None, tfms=(), **kwargs):
    "A linear Learner on pictures in memory, the last fifth of them for validation."
    n = n or len(x)*4//5
    y = torch.arange(len(x)) % 3 if y is None else y
    train, valid = (Indexed(TensorDataset(x[s], y[s]), vocab=range(3)) for s in (slice(0, n), slice(n, None)))
    kw = dict(seed=0, num_workers=0, after_batch=list(tfms))
    dls = DataLoaders(KeyedDL(train, bs, shuffle=True, drop_last=True, **kw), KeyedDL(valid, bs, **kw), device=torch.device('cpu'))
    torch.manual_seed(0)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)), nn.CrossEntropyLoss(), **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def all_of(dl) -> torch.Tensor: return torch.cat([b[0].as_subclass(torch.Tensor) for b in dl.new(shuffle=False, drop_last=False)])


def rows(x, over) -> np.ndarray:
    "Pictures as the vectors that are meant, in float64."
    return (x.flatten(1) if over == 'pixels' else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])).double().numpy()


@pytest.fixture(params=PICTURES)
def pictures(request): return PICTURES[request.param]()


@pytest.mark.parametrize('full', [False, True])
def test_moments_in_parts_of_any_size_and_order_are_numpys_at_once(full):
    "A mean of 1e4 and a spread of 1e-2: sums of squares would have lost it in 32 bits, and half of it in 64."
    x = torch.randn(1001, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))*torch.tensor([1e-2, 1, 2, 3, 0]) + 1e4
    for parts in ([1001], [1, 500, 500], [7]*143, [0, 1000, 1]):
        seen = Moments(full)
        for part in x[torch.randperm(1001, generator=torch.Generator().manual_seed(len(parts)))].split(parts): seen.add(part)
        assert seen.n == 1001 and np.allclose(seen.mean, x.mean(0), rtol=1e-14) and np.allclose(seen.std, x.numpy().std(0), rtol=1e-6, atol=1e-8)
        assert seen.lo.tolist() == x.amin(0).tolist() and seen.hi.tolist() == x.amax(0).tolist()
        if full: assert np.allclose(seen.cov, np.cov(x.numpy().T, bias=True), rtol=1e-6, atol=1e-8)


def test_whitening_by_hand():
    "Covariance ((2, 1), (1, 2)): λ = 3 along (1, 1), 1 along (1, −1); its inverse root has (1/√3 ± 1)/2."
    cov = torch.tensor([[2., 1.], [1., 2.]])
    r, a = 2**-.5, 3**-.5
    turned, values = whitening(cov, 'decorrelate')
    assert turned.abs().numpy() == pytest.approx(np.full((2, 2), r)) and turned[:, 0].tolist() == pytest.approx([r, r]) and values.tolist() == pytest.approx([3, 1])
    assert whitening(cov, 'pca', 1e-12)[0][:, 0].tolist() == pytest.approx([r*a, r*a])
    assert whitening(cov, 'zca', 1e-12)[0].numpy() == pytest.approx(np.array([[a+1, a-1], [a-1, a+1]])/2)
    assert whitening(cov, 'zca', 1.)[0].numpy() == pytest.approx(np.array([[.5+r, .5-r], [.5-r, .5+r]])/2)  # √(3+1), √(1+1)


@pytest.mark.parametrize('over', ['channels', 'pixels'])
def test_the_covariance_of_what_was_whitened_is_lambda_over_lambda_plus_eps(pictures, over):
    "np.cov and NumPy's eigenvalues of the pictures themselves; the identity where λ is at least .01 (COVERAGE.md)."
    learn = learner(pictures)
    raw = rows(pictures[:len(learn.dls.train_ds)], over)
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(raw.T, bias=True)))
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    for kind in MATRICES:
        done = np.atleast_2d(np.cov(rows(all_of(learn.normalize(kind, over).dls.train), over).T, bias=True))
        want = values if kind == 'decorrelate' else values/(values+EPS)
        if kind == 'zca': done = vectors.T @ done @ vectors
        assert np.abs(done-np.diag(want)).max() < 1e-3
        if kind != 'decorrelate': assert np.abs(np.diag(done)-1)[values >= .01].max() < 2e-3


def test_pca_is_scikit_learns(pictures):
    "PCA(whiten=True) divides by √(λ·n/(n−1)) and signs by its own rule: equal up to that, eps and sign, where λ is not faint."
    learn = learner(pictures).normalize('pca', 'pixels')
    n = len(learn.dls.train_ds)
    train, valid = (rows(x, 'pixels') for x in (pictures[:n], pictures[n:]))
    theirs = PCA(whiten=True, svd_solver='full').fit(train)
    kept = (gaps := -np.diff(theirs.explained_variance_, append=0)) > 2e-3
    kept &= np.r_[True, gaps[:-1] > 2e-3]                               # the directions of eigenvalues that lie close are anybody's
    assert kept.sum() >= 5
    lam = theirs.explained_variance_*(n-1)/n
    expected = theirs.transform(valid)*np.sqrt(n/(n-1)*lam/(lam+EPS))
    ours = rows(all_of(learn.dls.valid), 'pixels')
    signs = np.sign((ours*expected).sum(0))
    assert np.abs(ours-signs*expected)[:, kept].max() < 1e-3
    basis = normalization_of(learn).factor.numpy()
    assert (np.take_along_axis(basis, np.abs(basis).argmax(0)[None], 0) > 0).all()


@pytest.mark.parametrize('over', ['channels', 'pixels'])
def test_zca_is_the_inverse_root_of_the_covariance(over):
    "W·(cov + eps)·W = 1 with W symmetric and positive: the closed form, for validation with the numbers of training."
    x = crops()
    learn = learner(x).normalize('zca', over)
    n = len(learn.dls.train_ds)
    train, valid = rows(x[:n], over), rows(x[n:], over)
    values, vectors = np.linalg.eigh(np.cov(train.T, bias=True))
    root = vectors @ np.diag((values.clip(0)+EPS)**-.5) @ vectors.T
    assert np.abs(rows(all_of(learn.dls.valid), over) - (valid-train.mean(0)) @ root).max() < 1e-3


@pytest.mark.parametrize('over', ['channels', 'pixels'])
@pytest.mark.parametrize('kind, theirs', [('center', StandardScaler(with_std=False)), ('standardize', StandardScaler()), ('minmax', MinMaxScaler()),
                                          ('minmax_signed', MinMaxScaler((-1, 1)))])
def test_scalings_are_scikit_learns_fitted_on_training_alone(pictures, kind, theirs, over):
    "StandardScaler and MinMaxScaler leave the scale of what is constant, as we do (the corner of the digits); the signed one puts it at −1, we at 0."
    learn = learner(pictures).normalize(kind, over)
    n = len(learn.dls.train_ds)
    theirs.fit(rows(pictures[:n], over))
    constant = theirs.data_range_ == 0 if kind == 'minmax_signed' else None
    for dl, x in ((learn.dls.train, pictures[:n]), (learn.dls.valid, pictures[n:])):
        ours, expected = rows(all_of(dl), over), theirs.transform(rows(x, over))
        if constant is not None: expected[:, constant] = (rows(x, over)-theirs.data_min_)[:, constant]
        assert np.isfinite(ours).all() and np.abs(ours-expected).max() < 1e-4


def test_auto_takes_the_pixels_for_a_matrix_that_can_hold_them_and_else_the_channels():
    small, large = crops(100), torch.rand(20, 3, 40, 40)                                # 108 and 4,800 values
    for kind in KINDS:
        shapes = [tuple(p.factor.shape) if (p := normalization_of(learner(x, bs=8).normalize(kind))).factor is not None else tuple(p.shift.shape) for x in (small, large)]
        assert shapes == ([(108, 108), (3, 3)] if kind in MATRICES else [(3, 1, 1), (3, 1, 1)])
    with pytest.raises(ValueError, match=r"normalize: a matrix over the pixels takes at most 4,096 values, got 4,800 \(3×40×40\); take over='channels'"):
        learner(large, bs=8).normalize('zca', 'pixels')
    assert normalization_of(learner(large, bs=8).normalize('center', 'pixels')).shift.shape == (3, 40, 40)     # a mean image needs no matrix


def test_each_training_image_counts_once_not_augmented_whatever_draws_it():
    "Upsampled, flipped, erased, shuffled, without the last batch, in other batches: the numbers are those of the set."
    x = crops(205)
    y = torch.tensor([0]*150+[1]*30+[2]*9+[0]*16)
    plain = normalization_of(learner(x, y, bs=64, n=189).normalize('zca'))
    learn = learner(x, y, bs=50, n=189, tfms=[RandomErasing(p=1., max_count=3)]).balance('upsampling').augment(rotate=90., p=1.).normalize('zca')
    again = normalization_of(learn)
    assert torch.allclose(plain.factor, again.factor, rtol=1e-4, atol=1e-4) and torch.allclose(plain.shift, again.shift)
    assert np.allclose(plain.shift.flatten(), rows(x[:189], 'pixels').mean(0), atol=1e-6)
    assert len(learn.dls.train) == 3*150//50 and [type(t).__name__ for t in learn.dls.train.after_batch.fs][-2:] == ['NormalizePixels', 'RandomErasing']


def test_augmentation_stays_before_it_and_validation_clean():
    x = crops(200)
    clean = all_of(learner(x).normalize('standardize').dls.valid)
    learn = learner(x).normalize('standardize').augment(rotate=90., p=1.)
    assert type(learn.dls.train.after_batch.fs[-1]).__name__ == 'NormalizePixels' and len(learn.dls.train.after_batch.fs) > 1
    assert torch.equal(all_of(learn.dls.valid), clean) and torch.equal(all_of(learn.dls.test_dl(learn.dls.valid_ds)), clean)


def test_no_draw_is_felt_outside_and_a_folder_of_images_is_seen_as_validation_sees_it(digit_folder):
    import random
    dls = image_folder(digit_folder, size=8, bs=32, workers=0, device=torch.device('cpu'))
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
    learn.augment()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    learn.normalize('standardize')
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    pixels = np.stack([np.asarray(Image.open(f).convert('RGB')) for f in dls.train.items])/255.
    own = normalization_of(learn)
    assert own.shift.flatten().tolist() == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=1e-6)
    assert (1/own.factor).flatten().tolist() == pytest.approx(pixels.std((0, 1, 2)).tolist(), abs=1e-6)
    assert [sum(map(normalizes, dl.after_batch.fs)) for dl in learn.dls.loaders] == [1, 1, 1] and len({id(dl.after_batch.fs[-1]) for dl in learn.dls.loaders}) == 1
    assert not any(normalizes(t) for dl in dls.loaders for t in dl.after_batch.fs)         # another Learner's loaders stay as they are


def test_loaders_without_their_normalisation_draw_orders_of_their_own(digit_folder):
    "A `copy` of a loader of fastai 2.8.12 reads by the order that the original was last given, every epoch the same; before that, it cannot."
    dls = image_folder(digit_folder, size=8, bs=32, workers=0, device=torch.device('cpu'))
    dls.add_tfms([Normalize.from_stats([.5]*3, [.5]*3, cuda=False)], 'after_batch')
    bare = normalized_by(dls, None)
    epochs = [torch.cat([y for _, y in bare.train]).tolist() for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] and 0 <= bare.one_batch()[0].min() < .1
    assert [sum(map(normalizes, dl.after_batch.fs)) for dl in (*dls.loaders, *bare.loaders)] == [1]*3 + [0]*3


def test_it_replaces_a_normalize_and_the_last_call_wins():
    learn = learner(crops(200), tfms=[Normalize.from_stats([.2]*3, [.7]*3, cuda=False)])
    learn.normalize('zca').normalize('minmax')
    assert [type(t).__name__ for dl in learn.dls.loaders for t in dl.after_batch.fs if normalizes(t)] == ['NormalizePixels']*2
    x = all_of(learn.dls.train)
    assert x.amin((0, 2, 3)).tolist() == pytest.approx([0]*3, abs=1e-6) and x.amax((0, 2, 3)).tolist() == pytest.approx([1]*3, abs=1e-6)
    assert learn.techniques['normalize'].effect == 'minmax over 3 channels, from 160 training images'


def test_a_nan_stays_one_and_costs_the_others_nothing(capsys):
    x = crops(200)
    whole = x.clone()
    x[7, 1, 2, 3], x[9, 0, 0, 0] = float('nan'), float('inf')
    for kind in KINDS:
        for over in ('channels', 'pixels'):
            learn = learner(x).normalize(kind, over)
            done = all_of(learn.dls.train)
            assert [i for i, v in enumerate(done) if not v.isfinite().all()] == [7, 9]
    keep = [i for i in range(160) if i not in (7, 9)]
    assert normalization_of(learner(x).normalize('center')).shift.flatten().tolist() == pytest.approx(whole[keep].mean((0, 2, 3)).tolist(), abs=1e-6)
    assert '2 images with values that are not finite are left out' in capsys.readouterr().out
    with pytest.raises(ValueError, match='normalize: needs images of finite values, got none in 160; clean the data first'):
        learner(torch.full((200, 3, 4, 4), float('nan'))).normalize()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('over', ['channels', 'pixels'])
def test_images_decode_to_what_they_were(kind, over):
    x = crops(400)
    learn = learner(x, bs=100).normalize(kind, over)
    assert torch.allclose(learn.dls.valid.decode(learn.dls.valid.one_batch())[0], x[320:], atol=2e-4)


@pytest.mark.parametrize('kind', ['zca', 'pca'])
def test_show_batch_predict_and_what_was_pickled_see_the_pictures(digit_folder, tmp_path, kind):
    import matplotlib.pyplot as plt
    from fastai.learner import load_learner
    learn = Learner(image_folder(digit_folder, size=8, bs=32, workers=0, device=torch.device('cpu')), nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
    learn.normalize(kind)
    file = learn.dls.valid.items[0]
    raw = np.asarray(Image.open(file).convert('RGB'))
    learn.dls.valid.show_batch(max_n=4)
    assert np.abs(plt.gcf().axes[0].images[0].get_array().astype(int)-raw).max() <= 1
    plt.close('all')

    with learn.no_bar(): expected, shown = learn.get_preds()[0][0], learn.predict(file)
    assert torch.allclose(shown[2], expected, atol=1e-5)
    size = export_learner(learn, tmp_path/'learner.pkl').stat().st_size
    again = load_learner(tmp_path/'learner.pkl')
    with again.no_bar(): assert torch.allclose(again.predict(file)[2], expected, atol=1e-5)
    assert 4*192**2 < size < 6*192**2                                                   # the matrix once, not its inverse


def test_images_of_another_size_are_refused_where_pixels_are_known_and_taken_where_channels_are():
    x = crops(400)
    p = normalization_of(learner(x).normalize('zca', 'pixels'))
    with pytest.raises(ValueError, match=r"normalize: knows images of 3×6×6 values, got 3×8×8; over='channels' takes images of any height"): p(torch.rand(2, 3, 8, 8))
    p = normalization_of(learner(x).normalize('zca', 'channels'))
    assert p(torch.rand(2, 3, 8, 8)).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match='normalize: knows images of 3 channels, got 1×8×8'): p(torch.rand(2, 1, 8, 8))


def test_pixels_of_a_map_by_hand_and_back():
    x = torch.arange(8.).reshape(1, 2, 2, 2)
    swap = torch.tensor([[0., 1.], [2., 0.]])                                            # rows times it: (a, b) → (2b, a)
    done = PixelMap(torch.tensor([1., 2.]).view(2, 1, 1), swap)(x)
    assert done.tolist() == [[[[4, 6], [8, 10]], [[-1, 0], [1, 2]]]]
    for p in (PixelMap(torch.ones(2, 1, 1), swap), PixelMap(torch.ones(2, 2, 2)), PixelMap(torch.ones(2, 1, 1), torch.full((2, 1, 1), 4.)),
              PixelMap(torch.ones(2, 2, 2), torch.eye(8).flip(1)*3)):
        assert torch.allclose(p.inverse()(p(x)), x, atol=1e-5)
    standard = PixelMap.standard([.5, .2], [.1, .4])
    assert torch.allclose(standard(x), (x-torch.tensor([.5, .2]).view(2, 1, 1))/torch.tensor([.1, .4]).view(2, 1, 1), atol=1e-5)
    assert standard.same_as(PixelMap.standard([.5, .2], [.1, .4])) and not standard.same_as(PixelMap.standard([.5, .2], [.1, .3])) and not standard.same_as(PixelMap(standard.shift))


def test_a_trained_network_is_warned_of(capsys):
    said = 'the layers that were trained before expect the statistics of their own weights'
    assert said not in learner(crops(200)).normalize().techniques['normalize'].effect
    learn = learner(crops(200), tfms=[Normalize.from_stats(*imagenet_stats, cuda=False)])
    assert said in learn.normalize().techniques['normalize'].effect and said in capsys.readouterr().out
    learn = learner(crops(200))
    learn.model[1].weight.requires_grad_(False)
    assert said in learn.normalize().techniques['normalize'].effect and said in capsys.readouterr().out


def test_directions_that_hardly_vary_are_said_aloud(capsys):
    "Grey pictures of three equal channels vary along (1, 1, 1) alone; eight pictures along seven directions."
    learner(crops(200)[:, :1].repeat(1, 3, 1, 1)).normalize('zca', 'channels')
    assert '2 of 3 directions hardly vary in them: what other images show there, augmented ones too, is multiplied by up to 316; raise eps (.1)' in capsys.readouterr().out
    learner(crops(10), bs=4).normalize('pca', 'pixels', eps=1e-4)
    assert '101 of 108 directions hardly vary in them' in (said := capsys.readouterr().out) and 'up to 100; raise' in said
    learner(crops(200)).normalize('zca', 'channels')
    learner(crops(10), bs=4).normalize('decorrelate', 'pixels')
    assert capsys.readouterr().out == ''


def test_a_long_pass_tells_how_far_it_is(capsys, monkeypatch):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr('fastrecipes.data.statistics.time', type('Clock', (), dict(monotonic=lambda: next(now))))
    learner(crops(250), bs=50).normalize()                                               # 4 batches, 10 s between any two looks at the clock
    assert capsys.readouterr().out.splitlines() == [f'normalize: {n} of 200 training images looked at' for n in (100, 200)]


@pytest.mark.parametrize('kwargs, message', [(dict(kind='zcaa'), "kind must be one of center, .*, got 'zcaa'; did you mean 'zca'"),
                                             (dict(over='image'), "over must be one of auto, channels, pixels, got 'image'"), (dict(kind='zca', eps=0.), 'eps must be above 0, got 0')])
def test_values_outside_their_domain(kwargs, message):
    with pytest.raises(ValueError, match=f'normalize: {message}'): learner(crops(200)).normalize(**kwargs)


def test_what_is_no_image_is_refused_before_anything_changes(toy):
    learn = toy()
    before = learn.dls, list(learn.cbs)
    with pytest.raises(ValueError, match=r'normalize: needs a loader of images \(TensorImage\), .* got Tensor \(n, 4\)'): learn.normalize()
    assert (learn.dls, list(learn.cbs)) == before and not learn.techniques
    learn = learner(crops(200))
    learn.dls.loaders[1] = DataLoader(learn.dls.valid_ds, 8)
    with pytest.raises(ValueError, match='normalize: needs loaders whose batches it can transform, got a DataLoader; .*as_dataloaders'): learn.normalize()
    dls = masked(np.zeros((18, 8, 8), np.uint8))
    for dl in dls.loaders: dl.after_batch.fs = dl.after_batch.fs.filter(lambda t: not isinstance(t, IntToFloatTensor))
    with pytest.raises(ValueError, match='normalize: needs pixels as numbers in 0…1, got torch.uint8; give the data the batch transform IntToFloatTensor'):
        Learner(dls, nn.Flatten(), nn.MSELoss()).normalize()


def masked(masks) -> DataLoaders:
    "Pictures of one grey each, with masks; the last two for validation."
    data = DataBlock((ImageBlock, MaskBlock(['a', 'b'])), get_x=lambda i: np.full((8, 8, 3), i*12, np.uint8), get_y=lambda i: masks[i], splitter=lambda o: (list(range(16)), [16, 17]))
    return data.dataloaders(range(18), bs=4, num_workers=0, device='cpu')


def test_masks_stay_masks():
    masks = np.random.default_rng(0).integers(0, 2, (18, 8, 8)).astype(np.uint8)
    learn = Learner(masked(masks), nn.Flatten(), nn.MSELoss()).normalize()
    x, y = learn.dls.valid.one_batch()
    values = np.arange(16)*12/255
    assert np.array_equal(y, masks[16:]) and x[:, 0, 0, 0].tolist() == pytest.approx(((np.array([16, 17])*12/255-values.mean())/values.std()).tolist(), abs=1e-5)


def test_moments_of_a_loader_with_worker_processes():
    learn = learner(x := crops(200))
    learn.dls.train.fake_l.num_workers = 2
    seen = moments_of(learn.dls, 'pixels', full=True)
    assert seen.images == seen.n == 160 and np.allclose(seen.cov, np.cov(rows(x[:160], 'pixels').T, bias=True), atol=1e-8)
