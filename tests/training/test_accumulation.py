"The gradient of a step is that of one big batch, to the end of each epoch; a long one is shortened, and nothing stays behind."
from copy import deepcopy

import pytest
import torch
from fastai.basics import SGD, Callback, CancelBatchException, CancelFitException, CancelTrainException, CrossEntropyLossFlat, DataLoaders, Learner, nn
from fastai.callback.training import GradientAccumulation
from fastai.losses import BCEWithLogitsLossFlat, MSELossFlat
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import Indexed
from fastrecipes.technique import discover

from .half import Half

discover()
W = torch.tensor([5., 1., .2])


def learner(n=56, bs=16, y=None, loss_func=None, net=None, drop_last=False, lr=.1):
    "56 samples in batches of 16, 16, 16 and 8; plain descent, so that a step is lr times the gradient."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g) if y is None else y
    ds = Indexed(TensorDataset(x, y), vocab=range(3))
    dls = DataLoaders(KeyedDL(ds, bs, seed=0, shuffle=True, drop_last=drop_last, num_workers=0), KeyedDL(ds, bs, num_workers=0), device=torch.device('cpu'))
    torch.manual_seed(1)
    learn = Learner(dls, net or nn.Linear(4, 3), loss_func or CrossEntropyLossFlat(), opt_func=SGD, lr=lr, wd=0.)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


class Followed(Callback):
    "For each step: the network before it, the batches since the last, and the gradient that it follows."
    order = 60
    def before_fit(self): self.steps, self.batches, self.losses = [], [], []
    def before_batch(self):
        if self.learn.training: self.batches.append((self.learn.xb[0].clone(), self.learn.yb[0].clone()))
    def after_batch(self):
        if self.learn.training: self.losses.append(float(self.learn.loss))
    def before_step(self):
        params = [p.detach().clone() for p in self.learn.model.parameters()]
        self.steps.append((params, self.batches, [p.grad.clone() for p in self.learn.model.parameters()]))
        self.batches = []


def gradient(learn, params, batches, loss):
    "Of `loss` over all the samples of `batches` at once, at `params`."
    named = dict(zip([n for n, _ in learn.model.named_parameters()], [p.clone().requires_grad_() for p in params]))
    x, y = (torch.cat(t) for t in zip(*batches))
    return torch.autograd.grad(loss(torch.func.functional_call(learn.model, named, (x,)), y), list(named.values()))


def assert_close(ours, theirs, rtol=1e-5):
    for a, b in zip(ours, theirs, strict=True): assert torch.allclose(a, b, rtol=rtol, atol=1e-7), (a, b)


SHARES = torch.rand(56, 3, generator=torch.Generator().manual_seed(3)).softmax(1)
HALF = torch.arange(56)[:, None] % 7 == torch.arange(3)                             # several classes a sample, or none
CASES = dict(
    plain=(lambda: learner(), F.cross_entropy),
    weights_of_the_loss=(lambda: learner(loss_func=nn.CrossEntropyLoss(weight=W)), lambda p, y: F.cross_entropy(p, y, W)),
    class_weights=(lambda: learner().class_weights(W.tolist()), lambda p, y: F.cross_entropy(p, y, W)),
    smoothing=(lambda: learner().label_smoothing(.2), lambda p, y: F.cross_entropy(p, y, label_smoothing=.2)),
    weights_and_smoothing=(lambda: learner().class_weights(W.tolist()).label_smoothing(.2), lambda p, y: F.cross_entropy(p, y, W, label_smoothing=.2)),
    ignored=(lambda: learner(y=torch.arange(56) % 4 - (torch.arange(56) % 4 == 3)*103), F.cross_entropy),                # a quarter is −100
    probabilities=(lambda: learner(y=SHARES, loss_func=nn.CrossEntropyLoss(weight=W)), lambda p, y: F.cross_entropy(p, y, W)),
    multi_label=(lambda: learner(y=HALF.float(), loss_func=BCEWithLogitsLossFlat()), F.binary_cross_entropy_with_logits),
    regression=(lambda: learner(y=HALF.float(), loss_func=MSELossFlat()), F.mse_loss),
    a_sum=(lambda: learner(loss_func=nn.CrossEntropyLoss(reduction='sum'), lr=1e-3), lambda p, y: F.cross_entropy(p, y, reduction='sum')))


@pytest.mark.parametrize('n, taken', [(2, [(16, 16), (16, 8)]), (3, [(16, 16, 16), (8,)]), (9, [(16, 16, 16, 8)])])
@pytest.mark.parametrize('case', CASES)
def test_the_gradient_of_a_step_is_that_of_one_big_batch_the_last_of_an_epoch_included(case, n, taken):
    make, loss = CASES[case]
    learn = make().grad_accum(n)
    learn.fit(2, cbs=(seen := Followed()))
    assert [tuple(len(x) for x, _ in batches) for _, batches, _ in seen.steps] == taken*2
    for params, batches, grad in seen.steps: assert_close(grad, gradient(learn, params, batches, loss))
    assert all(not p.grad.any() for p in learn.model.parameters())


def test_masks_with_ignored_pixels_weigh_by_the_pixels_that_count():
    y = torch.randint(3, (28, 5, 5), generator=torch.Generator().manual_seed(0))
    y[:, :, 2:][torch.rand(28, generator=torch.Generator().manual_seed(1)) < .5] = 255
    y[:4] = 255                                                                     # in batches of 2, some have nothing that counts
    ds = Indexed(TensorDataset(torch.randn(28, 3, 5, 5, generator=torch.Generator().manual_seed(2)), y), vocab=range(3))
    dls = DataLoaders(KeyedDL(ds, 2, num_workers=0), KeyedDL(ds, 2, num_workers=0), device=torch.device('cpu'))
    learn = Learner(dls, nn.Conv2d(3, 3, 1), CrossEntropyLossFlat(axis=1, ignore_index=255), opt_func=SGD, lr=.1, wd=0.).grad_accum(5)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    learn.fit(1, cbs=(seen := Followed()))
    assert bool((seen.steps[0][1][0][1] == 255).all()) and [len(b) for _, b, _ in seen.steps] == [5, 5, 4]
    for params, batches, grad in seen.steps: assert_close(grad, gradient(learn, params, batches, lambda p, y: F.cross_entropy(p, y, ignore_index=255)))


class Mixed(Followed):
    "Also what the Objective was told of each batch."
    def before_fit(self):
        super().before_fit()
        self.mixes = []
    def before_batch(self):
        super().before_batch()
        if self.learn.training: self.mixes.append((self.learn.objective_cb.partner, self.learn.objective_cb.share))


def test_mixed_targets_weigh_by_what_was_mixed():
    learn = learner(drop_last=True, n=48).class_weights(W.tolist()).mixup(1.).grad_accum(3)
    learn.fit(1, cbs=(seen := Mixed()))
    (params, batches, grad), = seen.steps
    def loss(logits, y):
        onehot = F.one_hot(y, 3).float().split(16)
        soft = torch.cat([s[:, None]*t + (1-s[:, None])*t[p] for t, (p, s) in zip(onehot, seen.mixes)])
        return -(W*soft*logits.log_softmax(1)).sum()/(W*soft).sum()
    assert_close(grad, gradient(learn, params, batches, loss))


@pytest.mark.parametrize('loss_func, reduction', [(None, 'mean'), (nn.CrossEntropyLoss(weight=W), 'mean'), (nn.CrossEntropyLoss(reduction='sum'), 'sum')])
def test_a_penalty_counts_once_a_step(loss_func, reduction):
    learn = learner(loss_func=loss_func, lr=1e-3).weight_penalty(.5).grad_accum(3)
    learn.fit(1, cbs=(seen := Followed()))
    for params, batches, grad in seen.steps:
        data = gradient(learn, params, batches, lambda p, y: F.cross_entropy(p, y, getattr(loss_func, 'weight', None), reduction=reduction))
        assert_close(grad, [data[0] + 2*.5*params[0], data[1]])                     # l2·Σw²: 2·l2·w; the bias is not penalised


def test_the_reported_loss_is_that_of_each_batch():
    learn = learner(loss_func=nn.CrossEntropyLoss(weight=W)).grad_accum(4)
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1, cbs=(seen := Followed()))
    (_, batches, _), = seen.steps
    assert seen.losses == pytest.approx([float(F.cross_entropy(F.linear(x, *before), y, W)) for x, y in batches])
    rows = [make(learner(lr=0.)) for make in (lambda learn: learn, lambda learn: learn.grad_accum(3))]
    for learn in rows: learn.fit(1)
    assert rows[0].recorder.values == rows[1].recorder.values and rows[0].recorder.losses == rows[1].recorder.losses


def test_a_smaller_last_batch_counts_by_its_samples_and_by_batches_in_fastai():
    "fastai 2.8.12 divides by n_acc, however many samples came together: 48 and then 8 of 32."
    def scale(add):
        learn = learner(bs=24)                                                      # 24, 24, 8
        add(learn)
        learn.fit(1, cbs=(seen := Followed()))
        params, batches, grad = seen.steps[0]
        return float(grad[0].norm()/gradient(learn, params, batches, F.cross_entropy)[0].norm()), len(seen.steps)
    assert scale(lambda learn: learn.grad_accum(2)) == (pytest.approx(1), 2)
    assert scale(lambda learn: learn.add_cb(GradientAccumulation(32))) == (pytest.approx(48/32), 1)


def test_the_end_of_an_epoch_is_left_to_the_next_fit_in_fastai_and_stepped_here():
    def left(add):
        learn = learner()
        add(learn)
        learn.fit(1, cbs=(seen := Followed()))
        return max(float(p.grad.abs().max()) for p in learn.model.parameters()), sum(len(b) for _, b, _ in seen.steps)
    grad, batches = left(lambda learn: learn.add_cb(GradientAccumulation(48)))
    assert grad > 0 and batches == 3                                                # of four
    assert left(lambda learn: learn.grad_accum(3)) == (0, 4)


class End(Callback):
    "End the second batch, before its step, in one of the ways that there are."
    order = 50
    def __init__(self, error): self.error = error
    def after_backward(self):
        if self.learn.iter == 1: raise self.error


@pytest.mark.parametrize('error', [CancelFitException('enough'), CancelTrainException('next'), KeyboardInterrupt(), RuntimeError('dies')], ids=lambda e: type(e).__name__)
def test_a_fit_that_ends_between_two_steps_leaves_nothing_to_the_next(error):
    learn = learner().grad_accum(3)
    start = [p.detach().clone() for p in learn.model.parameters()]
    try: learn.fit(1, cbs=End(error))
    except (KeyboardInterrupt, RuntimeError): pass
    assert_close(learn.model.parameters(), start, 0)                                # no step was taken
    assert all(not p.grad.any() for p in learn.model.parameters()) and learn.grad_accum_cb.batches == learn.grad_accum_cb.total == 0
    learn.fit(1, cbs=(seen := Followed()))
    assert_close(seen.steps[0][2], gradient(learn, *seen.steps[0][:2], F.cross_entropy))


def test_a_batch_that_is_cancelled_does_not_count():
    learn = learner().grad_accum(2)
    class Skip(Callback):
        order = 50
        def after_pred(self):
            if self.learn.training and self.learn.iter == 0: raise CancelBatchException('skip')
    learn.fit(1, cbs=[Skip(), seen := Followed()])
    params, batches, grad = seen.steps[0]
    assert_close(grad, gradient(learn, params, batches[1:], F.cross_entropy))


def test_a_gradient_that_someone_left_does_not_enter_the_fit():
    learn = learner().grad_accum(2)
    learn.create_opt()
    learn.model(torch.ones(1, 4)).sum().backward()
    learn.fit(1, cbs=(seen := Followed()))
    assert_close(seen.steps[0][2], gradient(learn, *seen.steps[0][:2], F.cross_entropy))


def test_validating_and_predicting_between_batches_changes_nothing():
    learn = learner().grad_accum(2)
    learn.fit(1)
    assert len(learn.get_preds()[0]) == 56 and learn.validate()[0] == pytest.approx(learn.recorder.values[-1][1])


def test_it_tells_its_steps(capsys):
    for n, said in ((2, 'steps of 2 batches of 16: as batches of 32, 2 steps an epoch'), (3, 'steps of 3 batches of 16: as batches of 48, 2 steps an epoch, the last of 1 batch'),
                    (6, 'steps of 6 batches of 16: as batches of 96, 1 step an epoch, the last of 4 batches')):
        learn = learner().grad_accum(n)
        learn.fit(1)
        assert learn.techniques['grad_accum'].effect == said
    learn.grad_accum(1)
    assert 'grad_accum: steps of 1 batch: nothing is accumulated' in capsys.readouterr().out and not hasattr(learn, 'grad_accum_cb')


@pytest.mark.parametrize('given, said', [(dict(grad_accum=0), 'grad_accum: n must be ≥ 1 batch, got 0'), (dict(grad_accum=2.), 'n must be a whole number, got 2.0'),
                                         (dict(grad_clip=0.), 'grad_clip: max_norm must be > 0, got 0'), (dict(grad_clip=float('nan')), 'got nan'),
                                         (dict(grad_clip=dict(mode='value', max_value=-1.)), 'max_value must be > 0, got -1'),
                                         (dict(grad_clip=dict(mode='adaptive', max_ratio=0.)), 'max_ratio must be > 0, got 0'),
                                         (dict(grad_clip=dict(mode='values')), "mode must be one of norm, value, adaptive, got 'values'; did you mean 'value'"),
                                         (dict(grad_clip=dict(mode='value', max_norm=2.)), "mode 'value' takes max_value, got max_norm=2"),
                                         (dict(grad_clip=dict(max_ratio=.1)), "mode 'norm' takes max_norm, got max_ratio=0.1")])
def test_what_makes_no_sense_is_refused(given, said):
    learn = learner()
    with pytest.raises(ValueError, match=said): learn.use(**given)
    assert not learn.__dict__.get('techniques')


# grad_clip

def norm(grads): return float(torch.cat([g.flatten() for g in grads]).norm())


@pytest.mark.parametrize('max_norm', [.05, 100.])
def test_a_step_follows_the_gradient_shortened_to_max_norm(max_norm):
    learn = learner().grad_clip(max_norm)
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1, cbs=[seen := Followed(), Stop()])
    params, batches, grad = seen.steps[0]
    full = gradient(learn, before, batches, F.cross_entropy)
    assert norm(full) > .05
    assert_close(grad, [g*min(1, max_norm/norm(full)) for g in full], 1e-4)         # torch divides by norm + 1e-6
    assert_close(learn.model.parameters(), [b - .1*g for b, g in zip(before, grad)])


class Stop(Callback):
    order = 70
    def after_step(self): raise CancelFitException('one step')


def test_it_counts_the_steps_it_shortened_and_tells_the_largest_norm():
    learn = learner()
    learn.fit(1, cbs=(seen := Followed()))
    norms = sorted(norm(g) for *_, g in seen.steps)
    between = sum(norms[1:3])/2
    learn = learner(lr=1e-9).grad_clip(between)                                     # the weights stand still, the gradients nearly
    learn.fit(1, cbs=(still := Followed()))
    expected = [norm(gradient(learn, p, b, F.cross_entropy)) for p, b, _ in still.steps]
    n = sum(v > between for v in expected)
    assert 0 < n < 4 and learn.techniques['grad_clip'].effect == f'{n} of 4 steps clipped to a norm of {between:g}, the largest was {max(expected):.3g}'
    learn.grad_clip(1e6).fit(1)
    assert learn.techniques['grad_clip'].effect.startswith('0 of 4 steps clipped')


def test_it_sees_the_gradient_that_was_accumulated():
    learn = learner().grad_clip(.05).grad_accum(3)
    learn.fit(1, cbs=(seen := Followed()))
    assert len(seen.steps) == 2 and learn.grad_clip_cb.steps == 2
    for params, batches, grad in seen.steps:
        full = gradient(learn, params, batches, F.cross_entropy)
        assert_close(grad, [g*.05/norm(full) for g in full], 1e-4)


def test_it_sees_gradients_unscaled_and_accumulation_scales_with_the_scaler():
    learn = learner(loss_func=nn.CrossEntropyLoss(weight=W)).grad_clip(.05).grad_accum(3)
    learn.add_cb(half := Half(torch.float16))
    learn.fit(2, cbs=(seen := Followed()))
    assert len(seen.steps) == 4 and half.kept.get_scale() == 2.**12              # it grows every two steps, not every two batches
    for params, batches, grad in seen.steps:
        full = gradient(learn, params, batches, lambda p, y: F.cross_entropy(p, y, W))
        assert_close(grad, [g*min(1, .05/norm(full)) for g in full], 1e-4)


def test_a_step_that_overflows_is_left_to_the_scaler_and_not_counted():
    class Overflow(Callback):
        def after_backward(self):
            if self.learn.iter == 0: self.learn.model.weight.grad[0, 0] = float('inf')
    learn = learner().grad_clip(.05).grad_accum(2)
    learn.add_cb(half := Half(torch.float16))
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1, cbs=[Overflow(), seen := Followed()])
    (params, batches, grad), = seen.steps                                           # the first step was skipped
    assert_close(params, before, 0)
    assert learn.grad_clip_cb.steps == 1 and half.kept.get_scale() == 2.**9
    assert norm(grad) == pytest.approx(.05, rel=1e-4) and len(batches) == 4


def test_a_gradient_that_is_not_finite_is_left_to_others():
    learn = learner().grad_clip(.05)
    learn.create_opt()
    learn.model.weight.grad = torch.ones(3, 4)
    learn.model.weight.grad[0, 0] = float('inf')
    learn.grad_clip_cb.before_step()
    assert sorted(set(learn.model.weight.grad.flatten().tolist())) == [1., float('inf')] and learn.grad_clip_cb.clipped == 0


def test_masked_weights_have_no_say_in_the_norm():
    learn = learner().prune(.5).grad_clip(.05)
    learn.fit(1, cbs=(seen := Followed()))
    for params, batches, grad in seen.steps:
        full = [g*(p != 0) if p.ndim > 1 else g for g, p in zip(gradient(learn, params, batches, F.cross_entropy), params)]
        assert_close(grad, [g*.05/norm(full) for g in full], 1e-4)


def deep(): return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_each_entry_is_cut_to_max_value():
    learn = learner().grad_clip(mode='value', max_value=.02)
    learn.fit(1, cbs=(seen := Followed()))
    found = []
    for params, batches, grad in seen.steps:
        full = gradient(learn, params, batches, F.cross_entropy)
        assert_close(grad, [torch.minimum(torch.maximum(g, torch.tensor(-.02)), torch.tensor(.02)) for g in full])
        found.append(max(float(g.abs().max()) for g in full))
    assert min(found) > .02 and learn.techniques['grad_clip'].effect == f'4 of 4 steps clipped to entries of ±0.02, the largest was {max(found):.3g}'


def test_each_units_gradient_is_cut_to_max_ratio_of_its_weights_but_for_the_last_layer():
    learn = learner(net=deep()).grad_clip(mode='adaptive', max_ratio=.02)
    learn.fit(1, cbs=(seen := Followed()))
    largest, cut = 0., 0
    for params, batches, grad in seen.steps:
        full = gradient(learn, params, batches, F.cross_entropy)
        for i, (w, g, got) in enumerate(zip(params, full, grad)):
            units = [(w[j], g[j], got[j]) for j in range(len(w))] if w.ndim > 1 else [(w, g, got)]
            for wu, gu, u in units:
                limit, ratio = .02*max(norm([wu]), 1e-3), norm([gu])/max(norm([wu]), 1e-3)
                assert_close([u], [gu*min(1, limit/norm([gu])) if i < 2 and norm([gu]) else gu], 1e-4)
                if i < 2: largest, cut = max(largest, ratio), cut + (ratio > .02)
    assert 0 < cut and learn.techniques['grad_clip'].effect == f'4 of 4 steps clipped to 0.02 times the norm of the weights of each unit, the largest was {largest:.3g}'


@pytest.mark.parametrize('mode', ['value', 'adaptive'])
def test_a_limit_that_nothing_reaches_leaves_the_gradient_to_the_bit(mode):
    net, limit = deep(), dict(value=dict(max_value=1e6), adaptive=dict(max_ratio=1e6))[mode]
    plain, clipped = learner(net=net), learner(net=deepcopy(net)).grad_clip(mode=mode, **limit)
    plain.fit(1), clipped.fit(1)
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), clipped.model.parameters()))
    assert clipped.techniques['grad_clip'].effect.startswith('0 of 4 steps clipped')


def test_the_other_modes_see_unscaled_and_accumulated_gradients_too():
    learn = learner().grad_clip(mode='value', max_value=.02).grad_accum(2)
    learn.add_cb(Half(torch.float16))
    learn.fit(1, cbs=(seen := Followed()))
    for params, batches, grad in seen.steps: assert_close(grad, [g.clamp(-.02, .02) for g in gradient(learn, params, batches, F.cross_entropy)], 1e-4)
