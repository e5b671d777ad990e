"AugMix: its mixtures equal the authors' Pillow code given the same draws, its loss the definition, and only training sees it."
import numpy as np
import pytest
import torch
from fastai.basics import BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, DataLoaders, Learner, nn
from fastai.data.transforms import Normalize
from fastai.torch_core import TensorImage, TensorMask
from fastai.vision.augment import Rotate
from fastai.vision.core import TensorPoint
from PIL import Image, ImageOps
from scipy.spatial.distance import jensenshannon
from scipy.stats import beta, chisquare, entropy, kstest
from sklearn.datasets import load_sample_image
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastrecipes.data.augmix import OPERATIONS, AugMix, AugMixViews, Consistency, augment_and_mix, jensen_shannon, mixing_weights
from fastrecipes.data.folders import image_folder
from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.data.loaders import Indexed
from fastrecipes.data.transforms import Draw, on_batches
from fastrecipes.technique import discover

discover()
SEED = 3


# the loss

def logits(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_of_two_it_is_the_square_of_scipys_distance():
    a, b = logits(6, 5), logits(6, 5, seed=1)*4
    expected = np.mean([jensenshannon(p, q)**2 for p, q in zip(a.softmax(1).numpy(), b.softmax(1).numpy())])
    assert float(jensen_shannon([a, b])) == pytest.approx(expected, rel=1e-9)


def test_of_three_it_is_the_entropy_of_the_mean_less_the_mean_entropy():
    zs = [logits(7, 4, seed=s)*3 for s in range(3)]
    ps = np.stack([z.softmax(1).numpy() for z in zs])
    expected = np.mean(entropy(ps.mean(0), axis=1) - entropy(ps, axis=2).mean(0))
    assert float(jensen_shannon(zs)) == pytest.approx(expected, rel=1e-9)
    assert float(jensen_shannon([z.T for z in zs], axis=0)) == pytest.approx(expected, rel=1e-9)


def test_of_three_it_is_what_the_authors_compute():
    "`cifar.py` of github.com/google-research/augmix, where nothing is clamped."
    clean, aug1, aug2 = (logits(7, 4, seed=s) for s in range(3))
    p_clean, p_aug1, p_aug2 = (F.softmax(z, dim=1) for z in (clean, aug1, aug2))
    p_mixture = torch.clamp((p_clean + p_aug1 + p_aug2)/3., 1e-7, 1).log()
    expected = (F.kl_div(p_mixture, p_clean, reduction='batchmean') + F.kl_div(p_mixture, p_aug1, reduction='batchmean') + F.kl_div(p_mixture, p_aug2, reduction='batchmean'))/3.
    assert float(jensen_shannon([clean, aug1, aug2])) == pytest.approx(float(expected), rel=1e-9)


def test_it_is_0_where_all_agree_and_the_log_of_their_number_where_none_does():
    z = logits(5, 3)
    assert float(jensen_shannon([z, z, z])) == pytest.approx(0, abs=1e-12)
    far = [torch.eye(3)[[i]*4]*1000 for i in range(3)]
    assert float(jensen_shannon(far)) == pytest.approx(np.log(3), rel=1e-6)
    half = [o.half().requires_grad_() for o in far]
    jensen_shannon(half).backward()
    assert jensen_shannon(half).dtype == torch.float32 and all(o.grad.isfinite().all() for o in half)


# the mixtures

@pytest.mark.parametrize('alpha', [.3, 1., 4.])
def test_shares_have_the_distributions_of_the_paper(alpha):
    "Of a Dirichlet(alpha, alpha, alpha) each share is Beta(alpha, 2·alpha); the mixture's is Beta(alpha, alpha)."
    u = torch.from_numpy(np.random.default_rng(0).random((4000, 4)))
    weights, share = mixing_weights(u[:, :3], u[:, 3], alpha)
    assert torch.allclose(weights.sum(1), torch.ones(4000), atol=1e-6)
    for i in range(3): assert kstest(weights[:, i].numpy(), beta(alpha, 2*alpha).cdf).pvalue > .01
    assert kstest(share.numpy(), beta(alpha, alpha).cdf).pvalue > .01


def test_at_alpha_1_shares_are_normalised_exponentials_and_uniform():
    u, v = torch.rand(50, 3, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    weights, share = mixing_weights(u, v, 1.)
    e = -(1-u).log()
    assert torch.allclose(weights.double(), e/e.sum(1, keepdim=True), atol=1e-6) and torch.allclose(share.double(), v, atol=1e-6)
    edge, _ = mixing_weights(torch.tensor([[0., 0., 0.], [1., 1., 1.], [0., 1., 0.]]), torch.zeros(3), .05)
    assert edge.isfinite().all() and torch.allclose(edge.sum(1), torch.ones(3))


def authors_op(name, image, level, sign):
    "`augmentations.py` of github.com/google-research/augmix, its sampled level and sign given, on images of any size."
    int_parameter = lambda maxval: int(level*maxval/10)
    float_parameter = lambda maxval: float(level)*maxval/10.
    (w, h), at = image.size, Image.Resampling.BILINEAR
    return dict(autocontrast=lambda: ImageOps.autocontrast(image), equalize=lambda: ImageOps.equalize(image),
                posterize=lambda: ImageOps.posterize(image, 4-int_parameter(4)),
                rotate=lambda: image.rotate(int_parameter(30)*sign, resample=at),
                solarize=lambda: ImageOps.solarize(image, 256-int_parameter(256)),
                shear_x=lambda: image.transform(image.size, Image.AFFINE, (1, float_parameter(.3)*sign, 0, 0, 1, 0), resample=at),
                shear_y=lambda: image.transform(image.size, Image.AFFINE, (1, 0, 0, float_parameter(.3)*sign, 1, 0), resample=at),
                translate_x=lambda: image.transform(image.size, Image.AFFINE, (1, 0, int_parameter(w/3)*sign, 0, 1, 0), resample=at),
                translate_y=lambda: image.transform(image.size, Image.AFFINE, (1, 0, 0, 0, 1, int_parameter(h/3)*sign), resample=at))[name]()


def photos(n=12, h=33, w=40):
    "Cuts of scikit-learn's photographs `(n, 3, h, w)`, of 8 bits."
    whole = [load_sample_image(f) for f in ('china.jpg', 'flower.jpg')]
    return torch.stack([torch.from_numpy(whole[i % 2][20*i:20*i+h, 30*i:30*i+w].copy()).permute(2, 0, 1) for i in range(n)])


def pil(x): return Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())


@pytest.mark.parametrize('name', OPERATIONS)
def test_an_operation_is_the_authors(name):
    x = photos()
    level, sign = torch.linspace(.1, 9.9, len(x), dtype=torch.float64), torch.tensor([1., -1.]*6)
    got = OPERATIONS[name](x, level, sign)
    expected = torch.stack([torch.from_numpy(np.array(authors_op(name, pil(i), float(m), int(s)))).permute(2, 0, 1) for i, m, s in zip(x, level, sign)])
    assert int((got.int()-expected.int()).abs().max()) <= 1 and not torch.equal(expected, x)


def authors_mix(image, ops, levels, signs, weights, m):
    "`augment_and_mix.py` of the same, with preprocessing by 1/255."
    mix = np.zeros_like(np.float32(image))
    for i in range(len(weights)):
        augmented = image
        for op, level, sign in zip(ops[i], levels[i], signs[i]):
            if op >= 0: augmented = authors_op(list(OPERATIONS)[op], augmented, float(level), int(sign))
        mix += float(weights[i])*np.float32(augmented)/255
    return (1-float(m))*np.float32(image)/255 + float(m)*mix


@pytest.mark.parametrize('depth', [1, -1])
def test_a_mixture_is_the_authors_for_the_same_draws(depth):
    x = photos()
    drawn = AugMixViews(3., 3, depth, 1., 2).drawn(len(x), 0)
    got = augment_and_mix(x, *drawn)
    expected = torch.from_numpy(np.stack([authors_mix(pil(i), *(d[n].numpy() for d in drawn)) for n, i in enumerate(x)])).permute(0, 3, 1, 2)
    off = (got-expected).abs()*255              # one grey level where Pillow rounds otherwise; what equalize or solarize make of that is rare
    assert float(off.mean()) < .1 and float((off > 1.01).float().mean()) < (1e-9 if depth == 1 else 5e-3)
    assert float((expected-x/255).abs().mean()) > .02


def test_draws_have_the_distributions_of_the_paper():
    ops, levels, signs, weights, share = AugMixViews(3., 4, -1, 1., 2).drawn(3000, 0)
    assert ops.shape == levels.shape == signs.shape == (3000, 4, 3) and weights.shape == (3000, 4)
    lengths = (ops >= 0).sum(2).flatten()
    assert chisquare(lengths.bincount()[1:].numpy()).pvalue > .01 and bool((ops[..., 0] >= 0).all())
    assert bool(((ops[..., :-1] >= 0) | (ops[..., 1:] < 0)).all())          # a chain has no gaps
    assert chisquare(ops[ops >= 0].bincount(minlength=9).numpy()).pvalue > .01 and len(OPERATIONS) == 9
    assert kstest(levels.flatten()[:5000].numpy(), lambda v: (v-.1)/2.9).pvalue > .01 and abs(float(signs.mean())) < .03
    assert (AugMixViews(3., 2, 5, 1., 2).drawn(10, 0)[0] >= 0).all() and AugMixViews(3., 2, 5, 1., 2).drawn(10, 0)[0].shape == (10, 2, 5)


# in a Learner

STATS = [.5], [.25]


def learner(x=None, y=None, n=48, bs=16, c=3, classes=3, loss=None, workers=0, net=None, normalize=True):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, c, 12, 12, generator=g) if x is None else x
    y = torch.randint(classes, (n,), generator=g) if y is None else y
    kw = dict(num_workers=workers, seed=SEED, after_batch=[Normalize.from_stats(*STATS, cuda=False)] if normalize else [])
    train, valid = (Indexed(TensorDataset(x, y), vocab=range(classes)) for _ in range(2))
    dls = DataLoaders(KeyedDL(train, bs, shuffle=True, drop_last=True, **kw), KeyedDL(valid, bs, **kw), device=torch.device('cpu'))
    torch.manual_seed(0)
    learn = Learner(dls, net or nn.Sequential(nn.Flatten(), nn.Linear(c*144, classes)), loss or CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    keyed(learn, SEED)
    return learn


class Look(Callback):
    "What others see of each training batch, what the network gets, and the losses."
    order = 5                                   # once the divergence is added
    def before_fit(self): self.seen, self.inputs, self.answers, self.losses, self.targets = [], [], [], [], []
    def before_batch(self): self.seen += [self.learn.xb[0].clone()] if self.learn.training else []
    def after_pred(self):
        if self.learn.training: self.answers.append((self.learn.xb[0].clone(), self.learn.pred.clone()))
    def after_loss(self):
        if not self.learn.training: return
        self.losses.append((float(self.learn.loss_grad), float(self.learn.loss)))
        self.targets.append(self.learn.yb[0].clone())


def fitted(learn, lr=0.):
    inputs = []
    handle = learn.model.register_forward_pre_hook(lambda m, a: inputs.append(a[0].detach().clone()) if m.training else None)
    learn.fit(1, lr, cbs=(look := Look()))
    handle.remove()
    look.inputs = inputs
    return look


def batch(learn, epoch=0):
    learn.dls.train.set_epoch(epoch)
    return next(iter(learn.dls.train))


def views_by_hand(learn, x, epoch=0, view=0, args=(3., 3, -1, 1.)):
    "The mixtures of the images `x` in [0, 1] that are the first batch of `epoch`, with the draws of their key."
    drawn = []
    class Tap(AugMixViews):
        def __call__(self, b, split_idx=None, **kwargs):
            drawn.append(self.drawn(len(b[0]), view))
            return b
    other = Learner(learn.dls, nn.Linear(1, 1), CrossEntropyLossFlat())
    keyed(other, SEED)
    on_batches(other, [Tap(*args, 0)], instead_of=lambda t: 'Mix' in type(t).__name__ or 'Apart' in type(t).__name__)
    batch(other, epoch)
    return augment_and_mix((x*255).round().to(torch.uint8), *drawn[0])


def test_without_the_consistency_loss_the_mixture_takes_the_images_place():
    learn = learner(normalize=False)
    plain, y = batch(learn, 2)
    x, same = batch(learn.augmix(jsd=False), 2)
    assert torch.allclose(x, views_by_hand(learn, plain, 2), atol=1e-6) and not torch.allclose(x, plain, atol=.05) and torch.equal(y, same)
    assert isinstance(x, TensorImage) and learn.techniques['augmix'].effect == 'each training image is a mixture of 3 chains of 1 to 3 operations'
    learn.fit(1)


def test_one_forward_pass_of_images_and_two_views_and_all_others_see_the_images_alone():
    learn = learner()
    plain = batch(learn)[0]
    learn.augmix()
    x, y = batch(learn)
    assert torch.equal(x, plain) and len(y) == 16              # what leaves the loader: a batch as ever
    look = fitted(learn)
    assert [len(i) for i in look.inputs] == [48]*3 and torch.equal(look.inputs[0][:16], plain.as_subclass(torch.Tensor))
    for seen, (xb, pred), inputs in zip(look.seen, look.answers, look.inputs):
        assert len(seen) == len(xb) == len(pred) == 16 and torch.equal(seen, xb) and torch.equal(xb, inputs[:16])
        assert torch.allclose(pred, learn.model(inputs)[:16], atol=1e-6)
    pixels = plain*STATS[1][0] + STATS[0][0]
    for i in (0, 1):
        expected = (views_by_hand(learn, pixels, view=i)-STATS[0][0])/STATS[1][0]
        assert torch.allclose(look.inputs[0][16*(i+1):16*(i+2)], expected.as_subclass(torch.Tensor), atol=1e-4)
    assert not torch.allclose(look.inputs[0][16:32], look.inputs[0][32:], atol=.1)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_the_loss_is_cross_entropy_of_the_images_and_twelve_times_the_divergence(reduction):
    learn = learner(loss=CrossEntropyLossFlat(reduction=reduction)).augmix()
    look = fitted(learn)
    for inputs, y, (grad, reported) in zip(look.inputs, look.targets, look.losses):
        with torch.no_grad(): clean, one, two = learn.model(inputs).chunk(3)
        ps = np.stack([z.softmax(1).numpy() for z in (clean, one, two)])
        js = entropy(ps.mean(0), axis=1) - entropy(ps, axis=2).mean(0)
        expected = float(F.cross_entropy(clean, y, reduction=reduction)) + 12*(js.mean() if reduction == 'mean' else js.sum())
        assert grad == pytest.approx(expected, rel=1e-4) and reported == pytest.approx(expected, rel=1e-4) and js.mean() > 1e-4
    assert 'two mixtures beside each training image; answers to the three diverged by ' in learn.techniques['augmix'].effect


def test_training_with_it_brings_the_answers_together():
    "Two Learners that start from answers far apart, one of them with weight 0."
    def spread(weight):
        learn = learner().augmix(weight=weight)
        with torch.no_grad(): learn.model[1].weight.mul_(10)
        learn.fit(6, 2e-2)                      # .0043 and .0444
        look = fitted(learn)
        with torch.no_grad(): return np.mean([float(jensen_shannon(learn.model(i).chunk(3))) for i in look.inputs])
    assert spread(1000.) < .2*spread(0.)


@pytest.mark.parametrize('others', ['ours, of 8 bits', 'of fastai, of floats'])
def test_views_share_the_flips_and_turns_of_other_augmentation(others):
    learn = learner(normalize=False)
    if others == 'ours, of 8 bits': learn.augment(flip=True, rotate=30)
    else: on_batches(learn, [Rotate(p=1., draw=Draw('turn', -30, 30))], instead_of=lambda t: False)
    plain = batch(learn)[0]
    look = fitted(learn.augmix())
    assert torch.allclose(look.seen[0], plain) and torch.allclose(look.inputs[0][16:32], views_by_hand(learn, plain).as_subclass(torch.Tensor), atol=1e-4)


def test_a_view_belongs_to_its_sample_and_epoch_whatever_the_batch_or_the_workers():
    def views(bs, epoch, workers=0):
        learn = learner(bs=bs, workers=workers).augmix(jsd=False)
        learn.dls.train.set_epoch(epoch)
        return torch.cat([x for x, _ in learn.dls.train])
    assert torch.equal(views(16, 1), views(8, 1)) and torch.equal(views(16, 1), views(16, 1, workers=2)) and not torch.equal(views(16, 1), views(16, 2))


def test_pixels_of_8_bits_are_scaled_before_they_are_mixed(digit_folder):
    learn = Learner(image_folder(digit_folder, size=16, bs=32, workers=0, seed=SEED), nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), loss_func=nn.CrossEntropyLoss())
    keyed(learn, SEED)
    plain = batch(learn)[0]
    valid = learn.dls.valid.one_batch()[0]
    learn.augmix()
    assert torch.equal(batch(learn)[0], plain) and torch.equal(learn.dls.valid.one_batch()[0], valid)
    look = fitted(learn)
    assert torch.allclose(look.inputs[0][32:64], views_by_hand(learn, plain).as_subclass(torch.Tensor), atol=1e-6)
    with learn.dls.train.dataset.set_split_idx(1): assert torch.equal(batch(learn.augmix(jsd=False))[0], plain)      # what `tta` asks of the training set
    assert learn.tta()[0].shape[1] == 10


def test_bytes_that_nothing_scales_stay_bytes():
    x = TensorImage(photos())
    mixed = AugMixViews(3., 2, 2, 1., 0)((x, torch.zeros(12)))[0]
    assert mixed.dtype == torch.uint8 and mixed.shape == x.shape and not torch.equal(mixed, x)


def test_an_image_with_a_bad_pixel_has_views_that_are_no_numbers():
    x = TensorImage(torch.rand(3, 1, 8, 8))
    x[1, 0, 2, 3] = torch.nan
    out, y = AugMixViews(3., 3, -1, 1., 2)((x, torch.zeros(3)))
    assert out.shape == (9, 1, 8, 8) and out[[4, 7]].isnan().all() and out[[0, 2, 3, 5, 6, 8]].isfinite().all() and torch.equal(out[0], x[0])


def test_the_last_call_wins():
    learn = learner()
    n = len(learn.cbs)
    learn.augmix(weight=3.).augmix(weight=5., width=2)
    assert [cb.weight for cb in learn.cbs if isinstance(cb, Consistency)] == [5.] and len(learn.cbs) == n+3
    assert [t.width for t in learn.dls.train.after_batch.fs if isinstance(t, AugMixViews)] == [2] and len(learn.dls.train.after_batch.fs) == 3
    learn.augmix(jsd=False)
    assert len(learn.cbs) == n and len(learn.dls.train.after_batch.fs) == 2 and [len(i) for i in fitted(learn).inputs] == [16]*3
    learn.augmix()
    assert [len(i) for i in fitted(learn).inputs] == [48]*3


def test_an_exported_learner_takes_no_views_along(tmp_path):
    learn = learner().augmix()
    batch(learn)
    learn.path = tmp_path
    views = learn.dls.train.after_batch.fs[0]
    assert views.kept is not None and views.__getstate__()['kept'] is None
    learn.export('l.pkl')
    assert (tmp_path/'l.pkl').stat().st_size < 40_000 and views.kept is not None


def test_a_loader_that_makes_no_views_is_named():
    learn = learner().augmix()
    learn.dls = learner().dls
    with pytest.raises(ValueError, match='augmix: this training loader makes no views.*call augmix again'): learn.fit(1)
    learn.augmix().fit(1)
    assert next(cb for cb in learn.cbs if isinstance(cb, AugMix)).split.own is None


@pytest.mark.parametrize('name, value, domain', [('severity', 0, '0.1 to 10'), ('severity', 11, '0.1 to 10'), ('width', 0, '≥ 1'), ('depth', 0, '≥ 1, or -1'),
                                                 ('alpha', 0, '> 0'), ('weight', -1, '≥ 0')])
def test_arguments_outside_their_range_are_refused(name, value, domain):
    with pytest.raises(ValueError, match=f'^augmix: {name} must be {domain}, got {value}$'): learner().augmix(**{name: value})


REFUSED = dict(
    loss=(lambda: learner(y=torch.zeros(48, 3), loss=BCEWithLogitsLossFlat()), dict(), 'with jsd the loss must be a cross entropy over classes, got FlattenedLoss of BCEWithLogitsLoss'),
    masks=(lambda: learner(y=torch.zeros(48, 12, 12).long(), net=nn.Conv2d(3, 3, 1)), dict(jsd=False),
           r'targets with a place in them, Tensor \(n, 12, 12\), would stay behind; use augment'),
    range=(lambda: learner(x=torch.linspace(-2, 2, 48*432).view(48, 3, 12, 12)), dict(), r'needs pixels in \[0, 1\] or of 8 bits, got -2'),
    channels=(lambda: learner(c=4), dict(), r'needs images of 1 or 3 channels, got \(n, 4, 12, 12\)'),
    vectors=(lambda: learner(x=torch.rand(48, 5), net=nn.Linear(5, 3), normalize=False), dict(), r'needs a loader of images \(TensorImage\)'))


@pytest.mark.parametrize('kind', REFUSED)
def test_data_it_cannot_serve_are_refused_and_nothing_is_changed(kind):
    make, given, said = REFUSED[kind]
    learn = make()
    before = list(learn.cbs), learn.dls
    with pytest.raises(ValueError, match=f'^augmix: .*{said}'): learn.augmix(**given)
    assert (list(learn.cbs), learn.dls) == before and not learn.__dict__.get('techniques')


@pytest.mark.parametrize('kind', [TensorPoint, TensorMask])
def test_targets_with_a_place_in_the_image_are_refused(kind):
    ds = [(TensorImage(torch.rand(3, 8, 8)), kind(torch.zeros(2, 2))) for _ in range(8)]
    dls = DataLoaders.from_dsets(ds, ds, bs=4, num_workers=0, device='cpu')
    with pytest.raises(ValueError, match=f'augmix: .*{kind.__name__}'): Learner(dls, nn.Linear(1, 1), nn.MSELoss()).augmix(jsd=False)


def test_any_loss_goes_with_mixtures_alone():
    learn = learner(y=torch.zeros(48, 3), loss=BCEWithLogitsLossFlat()).augmix(jsd=False)
    learn.fit(1, 1e-2)
    assert np.isfinite(learn.recorder.values[-1]).all()


@pytest.mark.parametrize('other', ['mixup', 'cutmix'])
def test_it_does_not_go_with_mixtures_of_two_samples(other):
    with pytest.raises(ValueError, match=f"'augmix' and '{other}' do not go together: AugMix asks for one answer"): learner().use(augmix=True, **{other: True})
