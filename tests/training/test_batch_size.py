"The noise scale of a quadratic is known; estimates of it are unbiased; what fits a device is found through its errors."
import itertools
import math

import numpy as np
import pytest
import torch
from fastai.basics import Callback, DataLoaders, Learner, nn
from torch.utils.data import TensorDataset

from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import Indexed
from fastrecipes.technique import discover
from fastrecipes.training.batch_size import FoundBatch, largest, largest_batch, noise_and_signal, noise_scale, suggest

discover()
D = 5


class Quadratic(nn.Module):
    "w − x: with half its square as the loss, the gradient of sample x is w − x, that of all is w − E[x], and Σ is the covariance of x."
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, D))
    def forward(self, x): return self.w - x


def half_square(p, y): return p.square().sum(1).mean()/2


def quadratic(n=4096, bs=16, mean=.5, sigma=1.5, **kwargs):
    x = mean + sigma*torch.randn(n, D, generator=torch.Generator().manual_seed(0))
    ds = Indexed(TensorDataset(x, torch.zeros(n)), vocab=[0])
    dls = DataLoaders(KeyedDL(ds, bs, seed=0, shuffle=True, num_workers=0), KeyedDL(ds, bs, num_workers=0), device=torch.device('cpu'))
    learn = Learner(dls, Quadratic(), half_square, **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn, x.double()


def closed_form(x, w=0.): return float(x.var(0).sum()/(w-x.mean(0)).square().sum())


@pytest.mark.parametrize('mean, sigma', [(.5, 1.5), (1., .5), (.2, 2.)])
def test_the_noise_scale_of_a_quadratic_is_its_covariance_over_its_slope(mean, sigma):
    learn, x = quadratic(mean=mean, sigma=sigma)
    found = learn.find_batch_size(pairs=100)
    true = closed_form(x)
    assert found.noise_scale == pytest.approx(true, rel=.25) and found.interval[0] < true < found.interval[1]
    assert found.suggestion == max(2**round(math.log2(found.noise_scale)), 8) and found.sizes == (16, 128) and len(found.norms) == 100


def test_the_estimates_are_unbiased_over_all_batches_that_can_be_drawn():
    "Of 7 samples, all batches of 4, with all parts of 2 of each: tr Σ of the samples exactly; |G|² as of a distribution that they were drawn from, E|mean|² − tr Σ/n."
    g = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).double()
    pairs = []
    for big in itertools.combinations(range(7), 4):
        of_small = np.mean([float(g[list(s)].mean(0).square().sum()) for s in itertools.combinations(big, 2)])
        pairs.append(noise_and_signal(2, 4, of_small, float(g[list(big)].mean(0).square().sum())))
    noise, signal = np.mean(pairs, 0)
    assert noise == pytest.approx(float(g.var(0).sum())) and signal == pytest.approx(float(g.mean(0).square().sum() - g.var(0).sum()/7))


def test_the_norms_are_those_of_the_batches_that_were_drawn():
    learn, _ = quadratic(n=256)
    batches = []
    class Seen(Callback):
        def before_batch(self): batches.append(self.learn.xb[0].clone())
    learn.add_cb(Seen())
    found = learn.find_batch_size(pairs=5, times=3)
    assert len(batches) == 15
    for i, (small, big) in enumerate(found.norms):
        means = torch.stack([b.mean(0) for b in batches[3*i:3*i+3]])
        assert (small, big) == (pytest.approx(float(means.square().sum(1).mean()), rel=1e-5), pytest.approx(float(means.mean(0).square().sum()), rel=1e-5))


def test_the_gradient_is_that_of_the_loss_with_its_techniques():
    learn, x = quadratic(sigma=.5)
    with torch.no_grad(): learn.model.w += 1.
    plain = closed_form(x, 1.)
    learn.weight_penalty(l2=1.).grad_accum(2).grad_clip(1e-3)                            # 2·l2·w = 2 joins each gradient, and no noise
    assert learn.find_batch_size(pairs=60).noise_scale == pytest.approx(float(x.var(0).sum()/(3-x.mean(0)).square().sum()), rel=.1) != pytest.approx(plain, rel=.5)


def test_the_interval_covers_what_it_says():
    "Of 200 measurements with 16 pairs, drawn as normal gradients are, more than 85 % of the 95 % intervals hold the truth (a bootstrap of 16 is a little narrow)."
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        g = rng.normal(.5, 1.5/4, (16, 8, D))                                            # means of 16 samples
        _, (low, high) = noise_scale(16, 128, (g**2).sum(-1).mean(1), (g.mean(1)**2).sum(-1))
        inside += low <= 1.5**2/.5**2 <= high
    assert inside > .85*200


def test_where_nothing_but_noise_is_left_the_scale_is_infinite_and_the_suggestion_classic():
    scale, (low, high) = noise_scale(16, 128, [8.]*9, [1/2, 1., 1.]*3)
    assert scale == high == math.inf and low > 0
    size, why = suggest(scale, None, 5000)
    assert size == 64 and 'classic value' in why


@pytest.mark.parametrize('scale, fits, n, size, why', [
    (90., None, 5000, 64, 'nearest to the noise scale'), (91., None, 5000, 128, 'nearest'), (3., None, 5000, 8, 'above the noise scale of 3'),
    (1000., 300, 5000, 256, 'largest that fits; the noise scale asks for 1024'),
    (1000., None, 500, 256, 'all there is of 500 training samples'), (1000., 5000, 5000, 1024, 'nearest'), (0., None, 5000, 8, 'above'), (3., 5, 5000, 4, 'nearest to')])
def test_the_suggestion_is_a_power_of_two_within_the_limits(scale, fits, n, size, why):
    got, said = suggest(scale, fits, n)
    assert got == size and why in said


def batch_norm(toy, **kwargs):
    torch.manual_seed(0)
    return toy(n=128, model=nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.2), nn.Linear(8, 3)), **kwargs)


def state(learn):
    return ([v.tolist() for v in learn.model.state_dict().values()], [None if p.grad is None else p.grad.tolist() for p in learn.model.parameters()],
            learn.opt and [dict(h) for h in learn.opt.hypers],
            torch.get_rng_state().tolist(), {k: id(v) for k, v in vars(learn).items()}, list(learn.recorder.losses),
            [type(cb) for cb in learn.cbs], learn.dls.train.bs, learn.dls.train.epoch)


@pytest.mark.parametrize('ends', [None, KeyboardInterrupt(), RuntimeError('dies')], ids=str)
def test_nothing_is_felt_afterwards(toy, ends):
    learn = batch_norm(toy)
    learn.fit(1, .01)
    class Ends(Callback):
        order = 60
        def after_backward(self):
            if ends is not None and self.learn.train_iter == 3: raise ends
    learn.add_cb(Ends())
    before = state(learn)
    try: learn.find_batch_size(pairs=2, times=3)
    except (KeyboardInterrupt, RuntimeError): assert ends is not None
    else: assert ends is None
    assert state(learn) == before


def test_it_measures_the_same_twice(toy):
    learn = batch_norm(toy).mixup(.4)
    found = learn.find_batch_size(pairs=3, times=2)
    torch.manual_seed(9)
    assert learn.find_batch_size(pairs=3, times=2) == found and found.fits is None and 'on a CPU' in found.limit and str(found).startswith('noise scale')


def test_few_samples_are_measured_in_smaller_batches(toy):
    assert toy(n=64, bs=64).find_batch_size(pairs=2, times=4).sizes == (8, 32)
    with pytest.raises(ValueError, match='20 training samples are too few for pairs of a batch and 8 together; it takes 32'): toy(n=20).find_batch_size()


def test_torchs_own_loader_is_measured_as_it_is(toy):
    learn = toy()
    learn.dls = DataLoaders(torch.utils.data.DataLoader(TensorDataset(torch.randn(40, 4), torch.randint(3, (40,))), 6, shuffle=True), learn.dls.valid, device=torch.device('cpu'))
    assert learn.find_batch_size(pairs=3, times=2).sizes == (6, 12)
    with pytest.raises(ValueError, match='DataLoader of 7 batches is too short for 8'): learn.find_batch_size()


def test_a_gradient_that_is_never_finite_is_said(toy):
    with pytest.raises(ValueError, match='of 4 pairs the gradient is finite in 0'): toy(loss_func=lambda p, y: p.sum()*math.nan).find_batch_size(pairs=4, times=2)


@pytest.mark.parametrize('kwargs', [dict(pairs=1), dict(times=0)])
def test_what_makes_no_sense_is_refused(toy, kwargs):
    with pytest.raises(ValueError, match=f'{next(iter(kwargs))} must be ≥ 2, got {next(iter(kwargs.values()))}'): toy().find_batch_size(**kwargs)


# the largest that fits

@pytest.mark.parametrize('most', [1, 2, 63, 64, 65, 1000])
def test_the_largest_is_found_wherever_the_limit_is_and_the_search_starts(most):
    for limit in (0, 1, 2, 5, 63, 64, 100, 999, 1000, 2000):
        for start in (1, 16, 64, 1000):
            asked = []
            assert largest(lambda n: (asked.append(n), n <= limit)[1], start, most) == min(limit, most)
            assert len(set(asked)) == len(asked) <= 22


class Limited(nn.Linear):
    "A network that a device's memory holds up to a batch of 100."
    def forward(self, x):
        self.seen = getattr(self, 'seen', []) + [len(x)]
        if len(x) > 100: raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 TiB.')
        return super().forward(x)


def test_what_is_out_of_memory_is_recovered_from_and_the_size_before_it_found(toy):
    learn = toy(n=400, model=Limited(4, 3)).mixup(.2)
    learn.fit(1, .01)
    before = state(learn)
    assert largest_batch(learn, 400) == 100
    assert state(learn) == before
    learn.fit(1)


def test_a_size_is_tried_with_two_steps_of_the_optimizer(toy):
    steps = []
    class Steps(Callback):
        def after_step(self): steps.append((len(self.learn.xb[0]), len([s for s in self.learn.opt.state.values() if 'sqr_avg' in s])))
    largest_batch(toy(n=64, cbs=Steps()), 40)
    assert steps == [(16, 2), (16, 2), (32, 2), (32, 2), (40, 2), (40, 2)]


def test_another_error_is_raised(toy):
    class Breaks(nn.Linear):
        def forward(self, x):
            if len(x) > 50: raise RuntimeError('shapes cannot be multiplied')
            return super().forward(x)
    with pytest.raises(RuntimeError, match='cannot be multiplied'): largest_batch(toy(n=400, model=Breaks(4, 3)), 400)


# the picture

@pytest.mark.parametrize('high', [90., math.inf])
def test_the_curves_cross_at_the_noise_scale(high):
    fig = FoundBatch(40., (20., high), 32, 'why', 512, 'limit', (16, 128), ((1., .5),)).plot()
    steps, samples = fig.axes[0].lines[:2]
    x, up, down = steps.get_xdata(), samples.get_ydata(), steps.get_ydata()
    assert np.allclose(down, 1 + 40/x) and np.allclose(up, 1 + x/40) and x[0] < 40 < x[-1]
    assert {line.get_xdata()[0] for line in fig.axes[0].lines[2:]} == {32, 512}
    fig.canvas.draw()
