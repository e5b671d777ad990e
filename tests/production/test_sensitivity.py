"What each layer can lose: measured as by hand, without a trace, and shared out by hand."
import numpy as np
import pytest
import torch
from fastai.basics import nn
from torch.nn import functional as F

from fastrecipes.production.sensitivity import _batches, equal_harm

from ..contract.test_5_no_trace import state
from ..layers.learners import digits


def mlp(toy):
    torch.manual_seed(1)
    return toy(n=64, model=nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)))


def by_hand(model, i, k, x, y):
    "(loss, accuracy) without the `k` units of layer `i` whose rows and columns are smallest together."
    w, nxt, bias = model[i].weight, model[i+2].weight, model[i].bias
    gone = (w.square().sum(1) + nxt.square().sum(0)).argsort()[:k]
    h = x
    for j, m in enumerate(model):
        h = m(h)
        if j == i+1: h = h.index_fill(1, gone, 0.)
    return float(F.cross_entropy(h, y)), float((h.argmax(1) == y).float().mean()), bias


def test_each_group_is_cut_alone_and_measured(toy):
    learn = mlp(toy)
    seen, (x, y) = learn.sensitivity(), learn.dls.valid_ds.dataset.tensors
    assert seen.layers == [['0'], ['2']] and seen.channels.tolist() == [16, 8] and seen.tried == (.25, .5, .75) and seen.n == 64
    with torch.no_grad():
        for g, i in enumerate((0, 2)):
            for r, ratio in enumerate(seen.tried):
                loss, acc, _ = by_hand(learn.model, i, int(ratio*seen.channels[g]), x, y)
                assert seen.loss[g, r] == pytest.approx(loss, rel=1e-5) and seen.accuracy[g, r] == pytest.approx(acc)
        assert seen.dense == (pytest.approx(float(F.cross_entropy(learn.model(x), y))), pytest.approx(float((learn.model(x).argmax(1) == y).float().mean())))


def test_nothing_of_it_is_felt_afterwards():
    learn = digits()
    learn.fit(1, 3e-3)
    modes = [(m, m.training) for m in learn.model.modules()]
    before, weights, rng, values = state(learn), {k: v.clone() for k, v in learn.model.state_dict().items()}, torch.get_rng_state(), [*learn.recorder.values]
    learn.sensitivity(n=20)
    assert state(learn) == before and torch.equal(torch.get_rng_state(), rng) and learn.recorder.values == values and all(m.training == mode for m, mode in modes)
    assert all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())


def test_images_are_spread_evenly_over_the_validation_set():
    learn = digits()
    x = torch.cat([b[0][0] for b in _batches(learn, 50)])
    everything = torch.cat([b[0] for b in learn.dls.valid])
    at = [i for i in range(192) if (i+1)*50//192 > i*50//192]
    assert len(x) == 50 and torch.equal(x, everything[at].as_subclass(torch.Tensor))
    assert sum(len(b[0][0]) for b in _batches(learn, 10_000)) == 192


def test_a_group_goes_as_far_as_one_level_of_harm_allows():
    # one loses .4 a channel's share, the other .1: at a level of .08 they lose .2 and .8
    harm, tried = np.array([[.2, .4], [.05, .1]]), (.5, 1.)
    assert equal_harm(harm, tried, np.array([1, 1]), .5) == pytest.approx([.2, .8], abs=1e-6)
    assert equal_harm(harm, tried, np.array([3, 1]), .35) == pytest.approx([.2, .8], abs=1e-6)           # (3·.2 + .8)/4
    assert equal_harm(harm, tried, np.array([1, 1]), .8) == pytest.approx([.6, 1.], abs=1e-6)            # the other cannot lose more than all
    assert equal_harm(harm, tried, np.array([1, 1]), 1.) == pytest.approx([1., 1.], abs=1e-6)


def test_what_does_no_harm_goes_first():
    harm = np.array([[0., 0.], [-.1, .3], [.2, .1]])                                                     # a fall is noise: it never gets better again
    assert equal_harm(harm, (.4, .8), np.array([1, 1, 1]), .2) == pytest.approx([.4, .2, 0.])            # (.8 + .4 + 0)/3 = .4 is free: half of that
    got = equal_harm(harm, (.4, .8), np.array([1, 1, 1]), .5)
    assert got.mean() == pytest.approx(.5) and got[0] == pytest.approx(.8)
    level = .3*(got[1]-.4)/.4
    assert level == pytest.approx(.2*got[2]/.4, abs=1e-6)                                                # the same harm to both


def test_harm_that_falls_again_is_noise_and_a_jump_is_shared():
    got = equal_harm(np.array([[.2, .1], [.1, .2]]), (.4, .8), np.array([1, 1]), .4)
    assert got == pytest.approx([.4*2/3, .4*4/3], abs=1e-6)                                              # a level of .1333: 2/3 of .4, and .4 + .4/3
    assert equal_harm(np.array([[.2, .1, .3], [.1, .2, .3]]), (.3, .6, .9), np.array([1, 1]), .3375) == pytest.approx([.225, .45], abs=1e-6)   # a level of .15
    assert equal_harm(np.array([[.1, .1], [.1, .1]]), (.4, .8), np.array([1, 1]), .5) == pytest.approx([.5, .5], abs=1e-6)


def test_the_ratios_are_those_that_slim_takes():
    learn = digits()
    learn.fit(2, 3e-3)
    seen = learn.sensitivity(ratios=(.5, .75))
    ratios = seen.ratios(.5)
    assert sum(ratios.get(g[0], 0)*c for g, c in zip(seen.layers, seen.channels))/seen.channels.sum() == pytest.approx(.5, abs=1e-3)
    learn.slim(per_layer=ratios, round_to=1)
    assert [m.out_channels for m in (learn.model[0], learn.model[2])] == [16 - int(np.ceil(16*ratios.get('0', 0) - 1e-6)), 32 - int(np.ceil(32*ratios.get('2', 0) - 1e-6))]


def test_the_table_and_the_map_show_each_group(toy):
    seen = mlp(toy).sensitivity()
    lines = str(seen).splitlines()
    assert len(lines) == 4 and lines[0].startswith('accuracy, % on 64 validation images') and lines[2].split()[:2] == ['0', '16'] and f'{100*seen.accuracy[1, 2]:.1f}' in lines[3]
    ax = seen.plot().axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ['0', '2'] and np.allclose(ax.images[0].get_array(), 100*(seen.dense[1]-seen.accuracy))


def test_numbers_have_a_loss_and_no_accuracy(toy):
    learn = mlp(toy)
    learn.model[4], learn.loss_func, learn.metrics = nn.Linear(8, 1), lambda pred, y: F.mse_loss(pred[:, 0], y.float()), []
    seen = learn.sensitivity((.5,))
    assert seen.accuracy is None and str(seen).startswith('loss on') and seen.loss.shape == (2, 1)
    seen.plot()


@pytest.mark.parametrize('kwargs, message', [(dict(ratios=(.5, .25)), 'in ascending order, got'), (dict(ratios=(0,)), 'between 0 and 1'), (dict(n=0), 'n must be ≥ 1 image, got 0')])
def test_what_makes_no_sense_is_refused(toy, kwargs, message):
    with pytest.raises(ValueError, match=f'sensitivity: .*{message}'): mlp(toy).sensitivity(**kwargs)


def test_a_network_without_anything_to_cut_and_a_budget_out_of_reach(toy):
    with pytest.raises(ValueError, match='sensitivity: no layer of this network has channels that can be cut'): toy().sensitivity()
    with pytest.raises(ValueError, match='ratios: budget, .* at most the largest ratio tried, 0.75, got 0.9'): mlp(toy).sensitivity().ratios(.9)
