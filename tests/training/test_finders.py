"The learning-rate trial."
import math
import random

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Callback, nn
from fastai.callback.schedule import minimum, slide, steep, valley

from fastrecipes.technique import discover
from fastrecipes.training.finders import find_lr

discover()


def test_it_sweeps_geometrically_and_restores_the_weights(toy):
    learn = toy()
    before = learn.model.weight.data.clone()
    found = find_lr(learn, num_it=50)
    assert torch.equal(learn.model.weight.data, before)
    assert found.lrs[1]/found.lrs[0] == pytest.approx(10**(6/50), rel=1e-3) and found.lrs[0] == pytest.approx(1e-6)
    assert found.lrs[0] < found.lr < found.lrs[-1]


def test_a_trial_that_breaks_off_at_once_falls_back(toy):
    learn = toy()
    with torch.no_grad(): learn.model.weight.fill_(float('nan'))
    assert find_lr(learn).lr == 1e-3


# lr_find

@pytest.mark.parametrize('num_it', [6, 7, 30])              # of four batches an epoch
def test_each_batch_has_its_rate_and_there_are_num_it_of_them(toy, num_it):
    rates = []
    class Rates(Callback):
        order = 90
        def before_step(self): rates.append(float(self.learn.opt.hypers[-1]['lr']))
    learn = toy(cbs=Rates())
    learn.lr_find(1e-5, 1e-1, num_it, show_plot=False, suggest_funcs=None)
    assert learn.recorder.trial['lrs'] == rates == pytest.approx([1e-5*1e4**(i/num_it) for i in range(num_it)])


def test_suggestions_are_fastais_of_the_losses_between(toy):
    learn = toy(opt_func=SGD)
    found = learn.lr_find(1e-4, 1, 60, show_plot=False, suggest_funcs=(valley, slide, minimum, steep))
    lrs, losses = (torch.tensor(learn.recorder.trial[k][6:-5]) for k in ('lrs', 'losses'))
    assert found._fields == ('valley', 'slide', 'minimum', 'steep') and list(found) == [f(lrs, losses, 60)[0] for f in (valley, slide, minimum, steep)]


def streams(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_the_rate_the_optimizer_and_the_draws_are_as_before_and_the_record_is_kept(toy, tmp_path):
    "fastai 2.8.12 leaves an optimizer at its default rate, the trial's losses in place of the fit's, and moves the random streams."
    learn = toy(path=tmp_path)
    learn.lr_find(num_it=10, show_plot=False)
    assert learn.opt is None and not hasattr(learn.recorder, 'losses') and 'smooth_loss' not in vars(learn)
    learn.fit(1, .1)
    before = [dict(h) for h in learn.opt.hypers], list(learn.recorder.losses), list(learn.recorder.values), streams(), dict(vars(learn))
    learn.lr_find(num_it=10, show_plot=False)
    assert before == ([dict(h) for h in learn.opt.hypers], list(learn.recorder.losses), list(learn.recorder.values), streams(), dict(vars(learn)))
    assert not (tmp_path/'models').exists()


@pytest.mark.parametrize('batch', [0, 9])
@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('dies')], ids=str)
def test_a_trial_that_is_interrupted_leaves_nothing(toy, tmp_path, error, batch):
    learn = toy(path=tmp_path)
    class Dies(Callback):
        order = 80
        def after_step(self):
            if self.learn.train_iter == batch: raise error
    learn.fit(1, .1)
    momenta, weight, loss = [s['grad_avg'].clone() for s in learn.opt.state_dict()['state']], learn.model.weight.detach().clone(), vars(learn)['loss']
    learn.add_cb(Dies())
    cbs = list(learn.cbs)
    with pytest.raises(type(error)): learn.lr_find(show_plot=False)
    assert torch.equal(learn.model.weight, weight) and all(torch.equal(s['grad_avg'], m) for s, m in zip(learn.opt.state_dict()['state'], momenta))
    assert learn.opt.hypers[-1]['lr'] == .1 and list(learn.cbs) == cbs and vars(learn)['loss'] is loss and not (tmp_path/'models').exists()


def test_a_loss_that_is_no_number_ends_the_trial_at_once(toy):
    class Count(Callback):
        n = 0
        def after_pred(self): Count.n += 1
    learn = toy(loss_func=lambda p, y: p.sum()*math.nan, cbs=Count())
    with pytest.raises(ValueError, match='loss of 1 batches: it is not a number from batch 0 on; look at the data'): learn.lr_find(show_plot=False)
    assert Count.n == 1 and bool(learn.model.weight.isfinite().all())


def test_the_losses_before_one_that_is_no_number_are_enough(toy):
    class Late(nn.Module):
        n = 0
        def forward(self, p, y):
            Late.n += 1
            return nn.functional.cross_entropy(p, y)*(math.nan if Late.n > 30 else 1)
    learn = toy(loss_func=Late())
    assert 0 < learn.lr_find(1e-4, 1, 60, show_plot=False).valley < 1 and len(learn.recorder.trial['losses']) == 31


def test_a_trial_is_plotted_with_its_suggestion_and_again_after_a_fit(toy):
    import matplotlib.pyplot as plt
    learn = toy()
    learn.lr_find(1e-4, 1, 20)
    learn.fit(1)
    for show in (lambda: None, learn.recorder.plot_lr_find):
        show()
        assert plt.gca().lines[0].get_xdata() == pytest.approx([1e-4*1e4**(i/20) for i in range(15)])
        plt.close()


@pytest.mark.parametrize('kwargs, said', [(dict(num_it=5), 'num_it must be ≥ 6 batches.*got 5'), (dict(start_lr=1., end_lr=.1), 'got 1.0 and 0.1'),
                                          (dict(start_lr=0), '0 < start_lr < end_lr, got 0'),
                                          (dict(start_lr=[1e-5, 1e-4]), 'rates must be numbers'),
                                          (dict(num_it=6, suggest_funcs=steep), 'steep needs 2 losses, and of 6 batches 1 can be used'),
                                          (dict(num_it=20, suggest_funcs=slide), 'slide needs 17 losses')])
def test_what_makes_no_sense_is_refused(toy, kwargs, said):
    with pytest.raises(ValueError, match=said): toy().lr_find(show_plot=False, **kwargs)


def test_a_loader_without_a_batch_is_refused(toy):
    learn = toy(n=16, bs=16)
    learn.dls.train.bs = 32                                                             # drop_last: nothing is left; fastai divides by zero
    with pytest.raises(ValueError, match='no batch'): learn.lr_find(show_plot=False)
