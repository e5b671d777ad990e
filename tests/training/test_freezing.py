"What is frozen stands still, and what is let go trains at its own rate."
import copy

import pytest
import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, L, Learner, OptimWrapper, nn, params
from fastai.callback.training import BnFreeze, set_bn_eval
from torch.utils.data import TensorDataset

from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.data.loaders import Indexed
from fastrecipes.training.freezing import frozen_norms
from fastrecipes.training.resume import resumable


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
                         nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3)))


def learner(model=None, **kwargs) -> Learner:
    g = torch.Generator().manual_seed(0)
    ds = Indexed(TensorDataset(3*torch.rand(48, 3, 8, 8, generator=g), torch.randint(3, (48,), generator=g)), vocab=range(3))
    dls = DataLoaders(KeyedDL(ds, 16, seed=0, shuffle=True, num_workers=0), KeyedDL(ds, 16, num_workers=0), device=torch.device('cpu'))
    learn = Learner(dls, model or network(), CrossEntropyLossFlat(), splitter=lambda m: L(map(params, m)), **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    keyed(learn, 0)
    return learn


def state(*modules): return copy.deepcopy([list(m.state_dict().values()) for m in modules])
def same(a, b): return [all(torch.equal(x, y) for x, y in zip(s, t)) for s, t in zip(a, b)]


OPTIMIZERS = dict(fastais=SGD, torchs=lambda ps, lr: OptimWrapper(ps, torch.optim.SGD, lr=lr))


@pytest.mark.parametrize('opt', OPTIMIZERS)
@pytest.mark.parametrize('first', ['freeze', 'freeze_bn'])
def test_frozen_norms_keep_statistics_and_weights_to_the_bit_and_the_heads_train(opt, first):
    learn = learner(opt_func=OPTIMIZERS[opt])
    for step in ('freeze', 'freeze_bn') if first == 'freeze' else ('freeze_bn', 'freeze'): getattr(learn, step)()
    before = state(*learn.model)
    learn.fit(2, .1)
    assert same(before, state(*learn.model)) == [True, True, False]
    assert not torch.equal(before[2][2], learn.model[2][2].running_mean)
    assert learn.techniques['freeze_bn'].effect == '2 of 3 norm layers are frozen: statistics, weight and bias stand still'


def test_without_it_fastai_moves_statistics_and_trains_the_weights_of_frozen_norms():
    learn = learner()
    learn.freeze()
    learn.fit(1, .1)
    norm, new = learn.model[0][1], network()[0][1]
    assert not torch.equal(norm.running_mean, new.running_mean) and not torch.equal(norm.weight, new.weight)


def test_after_unfreezing_they_train():
    learn = learner().freeze_bn()
    learn.freeze()
    learn.fit(1, .1)
    before = state(*learn.model)
    learn.unfreeze()
    learn.fit(1, .1)
    assert same(before, state(*learn.model)) == [False]*3 and not torch.equal(before[0][2], learn.model[0][1].weight)
    assert learn.techniques['freeze_bn'].effect == 'nothing is frozen now: all 3 norm layers train'


def test_frozen_in_part_by_groups():
    learn = learner().freeze_bn()
    learn.freeze_to(1)
    before = state(*learn.model)
    learn.fit(1, .1)
    assert same(before, state(*learn.model)) == [True, False, False] and frozen_norms(learn.model) == [learn.model[0][1]]


def test_a_training_batch_meets_frozen_norms_as_inference_does():
    class Seen(Callback):
        def after_pred(self):
            if self.learn.training: self.body = self.learn.model[0](self.learn.xb[0]).detach(), self.learn.xb[0]
    learn = learner().freeze_bn()
    learn.freeze()
    learn.fit(1, .1, cbs=(seen := Seen()))
    with torch.no_grad(): assert torch.equal(seen.body[0], network()[0].eval()(seen.body[1]))


def test_norms_without_parameters_follow_the_layer_in_front():
    body, head = ([nn.Conv2d(n, 4, 3), nn.BatchNorm2d(4, affine=False)] for n in (3, 4))
    learn = learner(nn.Sequential(nn.Sequential(*body), nn.Sequential(*head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))).freeze_bn()
    learn.freeze()
    before = state(*learn.model)
    learn.fit(1, .1)
    assert same(before, state(*learn.model)) == [True, False] and not torch.equal(before[1][2], learn.model[1][1].running_mean)


def test_modes_are_given_back_however_a_fit_ends():
    class Die(Callback):
        order = 60
        def after_pred(self): raise RuntimeError('dies')
    learn = learner().freeze_bn()
    learn.freeze()
    with pytest.raises(RuntimeError, match='dies'): learn.fit(1, cbs=Die())
    assert all(m.training for m in learn.model.modules())


def test_it_says_where_there_is_nothing_to_freeze(capsys):
    learn = learner(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))).freeze_bn()
    learn.freeze()
    learn.fit(1)
    assert 'freeze_bn: no layer keeps batch statistics: nothing to freeze' in capsys.readouterr().out


def test_bn_freeze_of_fastai_finds_no_frozen_norm_as_it_trains_their_weights():
    "fastai 2.8.12: `BnFreeze` asks requires_grad, which train_bn=True leaves on."
    learn = learner()
    learn.freeze()
    before = learn.model[0][1].running_mean.clone()
    learn.fit(1, .1, cbs=BnFreeze())
    assert not torch.equal(before, learn.model[0][1].running_mean)


def test_set_bn_eval_of_fastai_fails_at_norms_without_parameters_and_forgets_to_undo_in_depth():
    "fastai 2.8.12."
    with pytest.raises((StopIteration, RuntimeError)): set_bn_eval(nn.Sequential(nn.BatchNorm2d(3, affine=False)))
    net = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3).requires_grad_(False)))
    set_bn_eval(net)
    set_bn_eval(net, use_eval=False)
    assert not net[0][0].training


# fit_gradual_unfreeze

class Followed(Callback):
    "At each training batch: which groups train, at which rates, and whether weights that were frozen moved."
    order = 61                                  # once the schedule has set them
    def __init__(self): self.batches = []
    def before_batch(self):
        if self.learn.training: self.batches.append(([next(g.parameters()).requires_grad for g in self.learn.model], [h['lr'] for h in self.learn.opt.hypers]))


def stages(seen):
    "(which groups train, the highest rates) of each run of batches in which the same groups train."
    found = []
    for trains, rates in seen.batches:
        if not found or found[-1][0] != trains: found.append((trains, rates, 0))
        found[-1] = (trains, [max(a, b) for a, b in zip(found[-1][1], rates)], found[-1][2]+1)
    return found


@pytest.mark.parametrize('schedule', ['flat_cos', 'one_cycle'])
def test_groups_are_let_go_from_the_head_down_each_at_its_rate(schedule):
    learn = learner().add_cb(seen := Followed())
    assert learn.fit_gradual_unfreeze(3, .1, step_epochs=2, div=10., schedule=schedule) is learn
    got = stages(seen)
    assert [(trains, n) for trains, _, n in got] == [([False, False, True], 6), ([False, True, True], 6), ([True, True, True], 9)]
    for _, rates, _ in got: assert rates == pytest.approx([.001, .01, .1], rel=.15)     # a cycle of 6 batches may miss its top


def test_the_rates_of_the_paper_are_the_default():
    learn = learner(lr=.02).add_cb(seen := Followed())
    learn.fit_gradual_unfreeze(1)
    assert seen.batches[0][1] == pytest.approx([.02/2.6**2, .02/2.6, .02])


def test_two_steps_are_the_head_and_then_all():
    learn = learner().add_cb(seen := Followed())
    learn.fit_gradual_unfreeze(1, .1, steps=2)
    assert [trains for trains, *_ in stages(seen)] == [[False, False, True], [True, True, True]]


def test_with_freeze_bn_norms_are_let_go_with_their_layers():
    class Norms(Callback):
        def __init__(self): self.seen = []
        def before_batch(self):
            if self.learn.training and self.learn.iter == 0: self.seen.append([m.training for m in self.learn.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)])
    learn = learner().freeze_bn().add_cb(norms := Norms())
    learn.fit_gradual_unfreeze(1, .1)
    assert norms.seen == [[False, False, True], [False, True, True], [True, True, True]]


class Killed(BaseException): pass


class Kill(Callback):
    order = 1100
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.learn.training:
            self.at -= 1
            if self.at == 0: raise Killed


@pytest.mark.parametrize('at', [2, 3, 5, 8])
def test_killed_in_any_step_it_goes_on_in_that_step(at, tmp_path):
    def program(folder, kill=None):
        learn = learner().freeze_bn()
        if kill: learn.add_cb(Kill(kill))
        with resumable(folder, every=1): learn.fit_gradual_unfreeze(1, .1)
        return learn
    whole = program(tmp_path/'whole')
    with pytest.raises(Killed): program(tmp_path/'run', at)
    again = program(tmp_path/'run')
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values())) and whole.recorder.values == again.recorder.values


@pytest.mark.parametrize('given, said', [(dict(steps=4), 'steps must be 2 to 3, the number of parameter groups, got 4'), (dict(steps=1), 'got 1'),
                                         (dict(div=.5), 'div must be ≥ 1, got 0.5'), (dict(step_epochs=0), 'step_epochs must be ≥ 1, got 0'),
                                         (dict(lr=0.), 'lr must be one number > 0.*got 0.0'), (dict(lr=slice(1e-3)), 'lr must be one number'),
                                         (dict(schedule='cosine'), "schedule must be .*got 'cosine'.*'cos'")])
def test_what_makes_no_sense_is_refused(given, said):
    learn = learner()
    with pytest.raises(ValueError, match=f'fit_gradual_unfreeze: .*{said}'): learn.fit_gradual_unfreeze(1, **given)
    assert all(p.requires_grad for p in learn.model.parameters())


def test_a_learner_of_one_group_is_refused():
    learn = learner()
    learn.splitter = params
    with pytest.raises(ValueError, match='all parameters are in one group.*splitter'): learn.fit_gradual_unfreeze(1)
