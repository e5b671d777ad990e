"Averages equal those that timm and torch take of the same steps; the network has them when it is validated and once the fit is over."
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Callback, CancelEpochException, CancelFitException, CancelTrainException, CrossEntropyLossFlat, DataLoaders, Learner, load_learner, nn
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import BnFreeze
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.data.loaders import Indexed
from fastrecipes.production.export import export_learner
from fastrecipes.technique import discover
from fastrecipes.training import averaging
from fastrecipes.training.averaging import ema_decay
from fastrecipes.training.precision import Autocast

discover()


def samples(n=64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=g)*3 + 1, torch.randint(3, (n,), generator=g)


def plain(): return nn.Linear(4, 3)
def norms(): return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(.3), nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=.3), nn.Linear(6, 3))


def learner(net=norms, bs=16, lr=.2):
    "64 samples, four batches an epoch."
    ds = Indexed(TensorDataset(*samples()), vocab=range(3))
    dls = DataLoaders(KeyedDL(ds, bs, seed=0, shuffle=True, num_workers=0), KeyedDL(ds, bs, num_workers=0), device=torch.device('cpu'))
    torch.manual_seed(1)
    learn = Learner(dls, net(), CrossEntropyLossFlat(), opt_func=SGD, lr=lr, wd=0.)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def tensors(model): return [t.detach().clone() for t in model.state_dict().values()]
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
def close(a, b): return all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(a, b, strict=True))


class Trail(Callback):
    "The network after each step, and at the end of each epoch's training; what it is while it is validated."
    order = 59                                  # before the averages change places with it
    def __init__(self): self.steps, self.ends, self.rates, self.validated, self.began = [], [], [], [], []
    def before_train(self): self.began.append(None)
    def before_batch(self):
        if self.learn.training and self.began[-1] is None: self.began[-1] = tensors(self.learn.model)
        if not self.learn.training and self.learn.iter == 0: self.validated.append(tensors(self.learn.model))
    def after_step(self): self.steps.append(deepcopy(self.learn.model))
    def after_batch(self):
        if self.learn.training: self.rates.append([h['lr'] for h in self.learn.opt.hypers])
    def after_train(self): self.ends.append(tensors(self.learn.model))


def fitted(learn, n=3, **kwargs):
    learn.fit(n, cbs=(path := Trail()), **kwargs)
    return path


# ema

@pytest.mark.parametrize('decay, warmup', [(.9, False), (.9, True), (.5, True)])
def test_it_is_the_average_of_timm_over_the_same_steps(decay, warmup):
    learn = learner().ema(decay, warmup)
    path = fitted(learn)
    theirs = ModelEmaV3(path.steps[0], decay=decay, use_warmup=warmup)
    for i, net in enumerate(path.steps, 1): theirs.update(net, step=i)
    assert len(path.steps) == 12 and close(tensors(learn.model), tensors(theirs.module)) and not close(tensors(learn.model), tensors(path.steps[-1]))


def test_without_warmup_it_is_torchs_averaged_model_bit_for_bit():
    learn = learner(plain).ema(.8, warmup=False)
    path = fitted(learn)
    theirs = AveragedModel(path.steps[0], multi_avg_fn=get_ema_multi_avg_fn(.8))
    for net in path.steps: theirs.update_parameters(net)
    assert same(tensors(learn.model), tensors(theirs.module))


def test_the_decay_grows_as_timms():
    theirs = ModelEmaV3(plain(), decay=.99, use_warmup=True)
    for n in (1, 2, 10, 100, 999, 5000): assert ema_decay(n, .99) == pytest.approx(theirs.get_decay(n+1)) and ema_decay(n, .99, False) == .99
    assert ema_decay(7, .999) == pytest.approx(.75)         # 1 − 8^(−2/3)


def test_training_goes_on_as_if_there_were_no_average():
    with_it, without = fitted(learner().ema(.9)), fitted(learner())
    assert all(same(tensors(a), tensors(b)) for a, b in zip(with_it.steps, without.steps, strict=True))


def test_the_average_is_what_is_validated_reported_and_kept():
    learn = learner().ema(.9)
    path = fitted(learn)
    assert not same(path.validated[0], path.ends[0]) and same(path.validated[2], tensors(learn.model))
    assert learn.validate()[0] == pytest.approx(learn.recorder.values[-1][1])


def test_accumulated_batches_count_once():
    learn = learner().grad_accum(2).ema(.9)
    path = fitted(learn)
    theirs = ModelEmaV3(path.steps[0], decay=.9, use_warmup=True)
    for i, net in enumerate(path.steps, 1): theirs.update(net, step=i)
    assert len(path.steps) == 6 and close(tensors(learn.model), tensors(theirs.module)) and 'an average of 6 steps' in learn.techniques['ema'].effect


class Half(Autocast):
    "An enabled GradScaler, the forward pass in 32 bits."
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', torch.bfloat16, enabled=False)
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)


def test_a_step_that_the_scaler_skips_is_not_averaged():
    class Overflow(Callback):
        def after_backward(self):
            if self.learn.iter == 1: self.learn.model.weight.grad[0, 0] = float('inf')
    learn = learner(plain).ema(.9).add_cb(Half(torch.float16))
    learn.fit(1, cbs=Overflow())
    assert 'an average of 3 steps' in learn.techniques['ema'].effect


def test_what_is_pruned_stays_0_and_what_is_frozen_stays_as_it_is():
    learn = learner(norms).prune(.5).ema(.9)
    learn.model[0].requires_grad_(False)
    frozen, zero = learn.model[0].weight.detach().clone(), learn.model[4].weight == 0
    learn.fit(2)
    assert torch.equal(learn.model[0].weight, frozen) and bool(zero.any()) and bool((learn.model[4].weight[zero] == 0).all())


def test_numbers_of_several_types_are_averaged_each_in_its_own():
    class Mixed(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.scale, self.seen = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Buffer(torch.tensor(0))
        def forward(self, x):
            self.seen += self.training
            return super().forward(x)*self.scale.float()
    learn = learner(Mixed).ema(.5, warmup=False)
    path = fitted(learn, 1)
    scale = path.steps[0].scale
    for net in path.steps[1:]: scale = .5*scale + .5*net.scale
    assert torch.allclose(learn.model.scale, scale) and learn.model.scale.dtype == torch.float64 and learn.model.seen == 4


@pytest.mark.parametrize('method', ['ema', 'swa'])
def test_early_stop_and_trackers_keep_the_average_of_the_best_epoch(method, tmp_path):
    class Worse(Callback):
        order = 59                              # once the Recorder has its row
        def after_epoch(self): self.learn.recorder.values[-1][1] = float(abs(self.learn.epoch-1))
    learn = getattr(learner(), method)(**dict(swa=dict(start=0.), ema=dict(decay=.9))[method]).early_stop(patience=1)
    learn.path = tmp_path
    path = fitted(learn.add_cbs([Worse(), SaveModelCallback(fname='best')]), 4)
    assert len(path.validated) == 3 and same(tensors(learn.model), path.validated[1])
    assert same(torch.load(tmp_path/'models'/'best.pth').values(), path.validated[1])


class End(Callback):
    def __init__(self, at, error): self.at, self.error, self.order = at, error, 90
    def __call__(self, name):
        if name == self.at and self.learn.epoch == 2 and (name != 'after_batch' or self.learn.training): raise self.error
        return super().__call__(name)


@pytest.mark.parametrize('at', ['before_batch', 'after_step', 'after_batch', 'after_train', 'before_validate', 'after_pred', 'after_epoch', 'before_epoch'])
@pytest.mark.parametrize('error', [CancelFitException('enough'), KeyboardInterrupt(), RuntimeError('dies')], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('method', ['ema', 'swa'])
def test_however_a_fit_ends_the_network_has_the_average_and_nothing_is_held(method, error, at):
    learn = getattr(learner(plain), method)(**dict(swa=dict(start=0., every=1), ema=dict(decay=.9, warmup=False))[method])
    path = Trail()
    try: learn.fit(4, cbs=[path, End(at, error)])
    except (KeyboardInterrupt, RuntimeError): pass
    theirs = AveragedModel(path.steps[0], multi_avg_fn=get_ema_multi_avg_fn(.9)) if method == 'ema' else AveragedModel(path.steps[0])
    for net in path.steps: theirs.update_parameters(net)
    assert 8 <= len(path.steps) <= 12 and close(tensors(learn.model), tensors(theirs.module))
    assert vars(learn)[f'{method}_cb'].average is None
    validated = learn.validate()
    learn.fit(1, 1e-9)
    assert learn.validate()[0] == pytest.approx(validated[0], rel=1e-4)


def test_a_next_fit_starts_from_the_average_with_an_average_of_its_own():
    learn = learner().ema(.9)
    learn.fit(2)
    kept = tensors(learn.model)
    path = fitted(learn, 1)
    assert same(path.began[0], kept)
    theirs = ModelEmaV3(path.steps[0], decay=.9, use_warmup=True)
    for i, net in enumerate(path.steps, 1): theirs.update(net, step=i)
    assert close(tensors(learn.model), tensors(theirs.module))


@pytest.mark.parametrize('cancel', [CancelEpochException('epoch'), CancelTrainException('train')], ids=lambda e: type(e).__name__)
def test_an_epoch_that_is_cancelled_leaves_training_its_weights(cancel):
    class Skip(Callback):
        def after_batch(self):
            if self.learn.training and (self.learn.epoch, self.learn.iter) == (1, 1): raise cancel
    learn = learner().ema(.9)
    path = Trail()
    learn.fit(3, cbs=[path, Skip()])
    assert len(path.steps) == 10 and close(path.began[2], tensors(path.steps[5]))


@pytest.mark.parametrize('method', ['ema', 'swa'])
def test_the_average_is_exported(method, tmp_path):
    learn = getattr(learner(), method)()
    learn.fit(4)
    assert same(tensors(load_learner(export_learner(learn, tmp_path/'learner.pkl')).model), tensors(learn.model))


def test_predictions_and_lr_find_outside_of_a_fit_are_left_alone():
    learn = learner().ema(.9)
    before = tensors(learn.model)
    learn.lr_find(num_it=6, show_plot=False)
    assert same(tensors(learn.model), before)
    learn.get_preds(), learn.validate()
    assert same(tensors(learn.model), before) and learn.ema_cb.average is None


# swa

def averaged(path, chosen):
    "torch's average of the chosen steps, batch statistics re-estimated on the training set as it is drawn in the last epoch."
    theirs = AveragedModel(path.steps[0])
    for i in chosen: theirs.update_parameters(path.steps[i])
    return theirs


def drawn(learn, epoch):
    dl = learn.dls.train.new()
    dl.set_epoch(epoch)
    return [xb for xb, _ in dl]


@pytest.mark.parametrize('given, chosen', [(dict(), [11, 15]), (dict(start=.5), [7, 11, 15]), (dict(start=0.), [3, 7, 11, 15]), (dict(start=.4), [7, 11, 15]),
                                           (dict(start=.75, every=2), [11, 13, 15]), (dict(start=.6, every=3), [9, 12, 15]), (dict(start=.76, every=1), [12, 13, 14, 15])])
def test_it_is_torchs_average_of_the_weights_from_start_on(given, chosen):
    learn = learner(plain).swa(**given)
    path = fitted(learn, 4)
    assert close(tensors(learn.model), tensors(averaged(path, chosen).module)) and f'an average of {len(chosen)} sets' in learn.techniques['swa'].effect


def test_batch_statistics_are_those_of_torchs_update_bn():
    learn = learner().swa(start=.5)
    learn.model[3].p = 0.                       # dropout draws
    path = fitted(learn, 4)
    theirs = averaged(path, [7, 11, 15])
    update_bn(drawn(learn, 3), theirs)
    assert close(tensors(learn.model), tensors(theirs.module)) and 'batch statistics' in learn.techniques['swa'].effect
    assert [m.momentum for m in learn.model.modules() if isinstance(m, nn.BatchNorm1d)] == [.1, .3]


def test_from_then_on_the_average_is_validated_with_statistics_of_its_own():
    learn = learner().swa(start=.5)
    learn.model[3].p = 0.
    path = fitted(learn, 4)
    theirs = averaged(path, [7, 11])
    update_bn(drawn(learn, 2), theirs)
    assert same(path.validated[0], path.ends[0]) and close(path.validated[2], tensors(theirs.module)) and same(path.validated[3], tensors(learn.model))
    assert learn.validate()[0] == pytest.approx(learn.recorder.values[-1][1])


def test_training_goes_on_with_its_weights_and_draws():
    with_it, without = fitted(learner().swa(start=0.), 4), fitted(keyed(learner()).learn, 4)
    assert all(same(tensors(a), tensors(b)) for a, b in zip(with_it.steps, without.steps, strict=True))


class Noisy(TensorDataset):
    "Draws from every stream there is for each sample."
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + random.random() + np.random.rand() + torch.rand(1), y


def test_a_torch_loader_draws_as_if_the_training_set_had_not_been_looked_at():
    def run(use):
        learn = learner()
        learn.dls.loaders[0] = DataLoader(Noisy(*samples()), 16, shuffle=True)
        use(learn)
        random.seed(0), np.random.seed(0)
        return fitted(learn, 3)
    with_it, without = run(lambda learn: learn.swa(start=0.)), run(keyed)
    assert all(same(tensors(a), tensors(b)) for a, b in zip(with_it.steps, without.steps, strict=True))


def test_buffers_that_are_no_batch_statistics_are_copied_as_in_torch():
    class Counts(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.seen = nn.Buffer(torch.tensor(0.))
        def forward(self, x):
            self.seen += self.training
            return super().forward(x)
    learn = learner(Counts).swa(start=.5)
    learn.fit(4)
    assert learn.model.seen == 16


def test_layers_that_training_keeps_in_evaluation_mode_keep_their_statistics():
    learn = learner().swa(start=0.)
    learn.model[0].requires_grad_(False)
    learn.model[1].requires_grad_(False)
    learn.fit(2, cbs=BnFreeze())
    assert learn.model[1].running_mean.tolist() == [0.]*6 and learn.model[5].running_mean.abs().sum() > 0


def test_the_rate_is_constant_from_start_on_and_layers_keep_their_shares():
    learn = learner(lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))).swa(start=.5, lr=.03)
    learn.splitter = lambda m: [list(m[0].parameters()), list(m[1].parameters())]
    path = Trail()
    learn.fit_one_cycle(4, slice(.01, .1), cbs=path)
    assert all(r == pytest.approx([.003, .03], rel=1e-4) for r in path.rates[8:]) and len(path.rates) == 16
    plain = learner(lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)))
    plain.splitter = learn.splitter
    plain.fit_one_cycle(4, slice(.01, .1), cbs=(without := Trail()))
    assert path.rates[:8] == without.rates[:8]


@pytest.mark.parametrize('n, given, said', [(1, {}, '1 set of weights was taken at the end of each epoch after 75% of the fit: nothing to average'),
                                            (1, dict(every=9), '1 set of weights was taken every 9 steps')])
def test_a_fit_too_short_to_average_says_so_and_changes_nothing(n, given, said, capsys):
    learn = learner().swa(**given)
    path = fitted(learn, n)
    assert f'swa: {said}' in capsys.readouterr().out and same(tensors(learn.model), tensors(path.steps[-1]))


def test_a_fit_that_is_cancelled_in_mid_epoch_gets_its_statistics_all_the_same():
    class Enough(Callback):
        def after_batch(self):
            if self.learn.training and (self.learn.epoch, self.learn.iter) == (1, 1): raise CancelFitException('enough')
    learn = learner().swa(start=0., every=1)
    learn.model[3].p = 0.
    path = Trail()
    learn.fit(2, cbs=[path, Enough()])
    theirs = averaged(path, range(6))
    update_bn(drawn(learn, 1), theirs)
    assert close(tensors(learn.model), tensors(theirs.module))


def test_update_bn_of_torch_takes_momenta_away_when_it_dies_and_here_they_stay():
    def dies():
        yield samples()[0]
        raise KeyboardInterrupt
    net = norms()
    with pytest.raises(KeyboardInterrupt): update_bn(dies(), net)
    assert net[1].momentum is None
    learn = learner().swa(start=0.)
    before = averaging.update_bn
    try:
        averaging.update_bn = lambda batches, model: before(dies_after(batches), model)
        with pytest.raises(KeyboardInterrupt): learn.fit(3)
    finally: averaging.update_bn = before
    assert [learn.model[i].momentum for i in (1, 5)] == [.1, .3] and learn.model[1].num_batches_tracked == 8      # of two epochs, as training left it
    learn.fit(1)


def dies_after(batches):
    yield next(batches)
    raise KeyboardInterrupt


# both

def test_each_refuses_the_other():
    for one, two in (('ema', 'swa'), ('swa', 'ema')):
        with pytest.raises(ValueError, match="do not go together: each keeps an average of the weights"): learner().use(**{one: True, two: True})


@pytest.mark.parametrize('given, said', [(dict(ema=1.), 'ema: decay must be between 0 and 1, got 1.0'), (dict(ema=0.), 'got 0.0'),
                                        (dict(swa=1.), r'swa: start must be in \[0, 1\), got 1.0'), (dict(swa=-.1), 'got -0.1'), (dict(swa=dict(lr=0.)), 'swa: lr must be > 0, got 0.0'),
                                         (dict(swa=dict(every=0)), 'swa: every must be ≥ 1 step, got 0')])
def test_what_makes_no_sense_is_refused(given, said):
    learn = learner()
    with pytest.raises(ValueError, match=said): learn.use(**given)
    assert not learn.__dict__.get('techniques')
