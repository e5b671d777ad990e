"A step by SAM follows the gradient from the worst place near by; all else is as it was, whatever happens on the way."
from copy import deepcopy

import pytest
import torch
from fastai.basics import SGD, Callback, CancelBatchException, CancelFitException, CrossEntropyLossFlat, DataLoaders, Learner, nn
from fastai.callback.mixup import CutMix
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import Indexed
from fastrecipes.technique import discover
from fastrecipes.training.sharpness import ascent

from .half import Half

discover()
A, W0 = torch.tensor([3., .5, 1.]), torch.tensor([1., -2., .1])


class Bowl(nn.Module):
    "Answers √a·w, whatever it is asked: half of its square is ½·Σa·w², whose gradient is a·w."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(W0.clone())
    def forward(self, x): return self.weight*A.sqrt() + 0*x


def half_square(pred, y): return pred.square().sum(1).mean()/2


def learner(net=None, loss_func=None, n=48, bs=16, lr=.1, mom=0., shape=(4,)):
    g = torch.Generator().manual_seed(0)
    ds = Indexed(TensorDataset(torch.randn(n, *shape, generator=g), torch.randint(3, (n,), generator=g)), vocab=range(3))
    dls = DataLoaders(KeyedDL(ds, bs, seed=0, shuffle=True, num_workers=0), KeyedDL(ds, bs, num_workers=0), device=torch.device('cpu'))
    torch.manual_seed(1)
    learn = Learner(dls, net() if net else nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), loss_func or CrossEntropyLossFlat(),
                    opt_func=lambda ps, lr: SGD(ps, lr, mom=mom), lr=lr, wd=0.)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def bowl(): return learner(Bowl, half_square, n=16, shape=(3,))


class Passes(Callback):
    "The batch, the loss and the weights of each pass of each training batch; the gradient of each step."
    order = 60
    def before_fit(self): self.xs, self.ys, self.losses, self.ws, self.grads = [], [], [], [], []
    def after_loss(self):
        if not self.learn.training: return
        self.xs.append(self.learn.xb[0].clone()), self.ys.append(self.learn.yb[0].clone()), self.losses.append(float(self.learn.loss))
        self.ws.append([p.detach().clone() for p in self.learn.model.parameters()])
    def before_step(self): self.grads.append([p.grad.clone() for p in self.learn.model.parameters()])


def tensors(learn): return [t.clone() for t in learn.model.state_dict().values()]
def equal(a, b): return all(map(torch.equal, a, b))


# the formula

def test_on_a_quadratic_the_step_is_the_closed_form():
    learn = bowl().sam(.2)
    learn.fit(1)
    g = A*W0
    assert learn.model.weight.tolist() == pytest.approx((W0 - .1*A*(W0 + .2*g/g.norm())).tolist(), rel=1e-6)


def test_on_a_quadratic_the_adaptive_step_is_the_closed_form():
    learn = bowl().sam(.5, adaptive=True)
    learn.fit(1)
    g, t = A*W0, W0.abs() + .01
    assert learn.model.weight.tolist() == pytest.approx((W0 - .1*A*(W0 + .5*t*t*g/(t*g).norm())).tolist(), rel=1e-6)


def test_the_ascent_is_as_long_as_rho_over_all_weights_and_leads_uphill():
    gs = [torch.tensor([[3., 0.]]), torch.tensor([-4.])]
    assert [e.tolist() for e in ascent(gs, .5, [1., 1.])] == [[[pytest.approx(.3), 0.]], [pytest.approx(-.4)]]


def test_where_weights_are_scaled_the_adaptive_ascent_is_scaled_with_them():
    "A layer times c and the next one over c answer the same; gradients go the other way."
    w, v, g, h = torch.tensor([1., -2.]), torch.tensor([.5, 3.]), torch.tensor([.3, .1]), torch.tensor([-.2, .4])
    one = ascent([g, h], .5, [w.abs(), v.abs()])
    two = ascent([g/7, h*7], .5, [w.abs()*7, v.abs()/7])
    assert torch.allclose(one[0]*7, two[0]) and torch.allclose(one[1]/7, two[1]) and not torch.allclose(*(ascent([g/s, h*s], .5, [1., 1.])[0] for s in (1, 7)))


@pytest.mark.parametrize('bad', [0., float('nan'), float('inf')])
def test_a_gradient_without_a_direction_has_no_ascent(bad): assert ascent([torch.tensor([bad, 0.])], .5, [1.]) is None


class Published:
    "The two steps as the authors of SAM and ASAM write them, over torch's own SGD."
    def __init__(self, model, rho, adaptive):
        self.model, self.rho, self.adaptive, self.sgd = model, rho, adaptive, torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)

    def step(self, x, y):
        F.cross_entropy(self.model(x), y).backward()
        old = {}
        with torch.no_grad():
            t = {n: p.abs() + .01 if self.adaptive and 'weight' in n else torch.ones_like(p) for n, p in self.model.named_parameters()}
            norm = sum(float((t[n]*p.grad).square().sum()) for n, p in self.model.named_parameters())**.5
            for n, p in self.model.named_parameters():
                old[p] = p.data.clone()
                p += self.rho*t[n]**2*p.grad/norm
        self.sgd.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        for p, w in old.items(): p.data = w
        self.sgd.step()
        self.sgd.zero_grad()


@pytest.mark.parametrize('rho, adaptive', [(.05, False), (.3, False), (.5, True)])
def test_six_steps_equal_those_of_the_authors(rho, adaptive):
    learn = learner(mom=.9).sam(rho, adaptive)
    theirs = Published(deepcopy(learn.model), rho, adaptive)
    learn.fit(2, cbs=(seen := Passes()))
    assert len(seen.xs) == 12
    for x, y in zip(seen.xs[::2], seen.ys[::2]): theirs.step(x, y)
    for p, q in zip(learn.model.parameters(), theirs.model.parameters()): assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


# the second pass is the first one again, elsewhere

def with_norm_and_dropout(): return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(.5), nn.Linear(8, 3))


def test_dropout_leaves_out_the_same_units_in_both_passes_and_others_in_the_next_batch():
    learn, masks = learner(with_norm_and_dropout).sam(), []
    handle = learn.model[2].register_forward_hook(lambda m, args, out: masks.append(out != 0) if m.training else None)
    learn.fit(1)
    handle.remove()
    assert len(masks) == 6 and all(torch.equal(a, b) for a, b in zip(masks[::2], masks[1::2])) and not torch.equal(masks[0], masks[2])


def test_running_statistics_see_each_batch_once_and_at_the_weights():
    learn = learner(with_norm_and_dropout).sam(1.)
    norm = deepcopy(learn.model[1])
    learn.fit(1, cbs=(seen := Passes()))
    for x, (w, b, *_) in zip(seen.xs[::2], seen.ws[::2]): norm(F.linear(x, w, b))
    assert int(learn.model[1].num_batches_tracked) == 3
    assert torch.allclose(learn.model[1].running_mean, norm.running_mean, atol=1e-6) and torch.allclose(learn.model[1].running_var, norm.running_var, atol=1e-6)


@pytest.mark.parametrize('add', [lambda learn: learn.mixup(1.), lambda learn: learn.cutmix(1.), lambda learn: learn.cutout(2), lambda learn: learn.add_cb(CutMix())],
                         ids=['mixup', 'cutmix', 'cutout', 'CutMix of fastai, which writes into the batch'])
def test_a_batch_is_mixed_once_and_the_same_for_both(add):
    learn = learner(lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), shape=(3, 4, 4)).sam()
    add(learn)
    learn.fit(1, cbs=(seen := Passes()))
    assert len(seen.xs) == 6 and all(torch.equal(a, b) for a, b in zip(seen.xs[::2], seen.xs[1::2])) and not torch.equal(seen.xs[0], seen.xs[2])


def test_a_penalty_is_in_both_gradients():
    learn = bowl().sam(.2).weight_penalty(.5)
    learn.model.weight.data = W0[None].clone().requires_grad_().data                # a matrix: vectors are not penalised
    learn.fit(1)
    g = (A + 1)*W0                                                                  # of ½·a·w² + .5·w²
    assert learn.model.weight[0].tolist() == pytest.approx((W0 - .1*(A + 1)*(W0 + .2*g/g.norm())).tolist(), rel=1e-6)


def test_what_others_see_and_the_records_keep_is_the_pass_at_the_weights():
    class After(Callback):
        order = 1000
        def before_fit(self): self.seen = []
        def after_batch(self):
            if self.learn.training: self.seen.append((float(self.learn.loss), self.learn.pred.detach().clone()))
    learn = learner().sam(.5)
    learn.fit(1, cbs=[seen := Passes(), after := After()])
    assert [v for v, _ in after.seen] == seen.losses[::2] and all(a > b for a, b in zip(seen.losses[1::2], seen.losses[::2]))
    for (_, pred), x, (w, b, v, c) in zip(after.seen, seen.xs[::2], seen.ws[::2]): assert torch.allclose(pred, F.linear(F.linear(x, w, b).tanh(), v, c), atol=1e-6)
    rise = sum(a-b for a, b in zip(seen.losses[1::2], seen.losses[::2]))/3
    assert learn.techniques['sam'].effect == f'3 steps by the gradient 0.5 away, where the loss was {rise:.3g} higher on average'


# with others

def test_a_scaled_loss_gives_the_same_steps():
    plain, scaled = learner().sam(.3), learner().sam(.3)
    scaled.add_cb(half := Half(torch.float16))
    plain.fit(2), scaled.fit(2)
    assert half.kept.get_scale() == 2.**13                                          # once a step, not once a pass
    for p, q in zip(plain.model.parameters(), scaled.model.parameters()): assert torch.allclose(p, q, atol=1e-6)


def test_a_scaled_gradient_that_overflows_is_left_to_the_scaler():
    class Overflow(Callback):
        def after_backward(self):
            if self.learn.iter == 0: self.learn.model[0].weight.grad[0, 0] = float('inf')
    learn = learner().sam()
    learn.add_cb(half := Half(torch.float16))
    before = tensors(learn)
    learn.fit(1, cbs=[Overflow(), seen := Passes()])
    assert len(seen.losses) == 5 and len(seen.grads) == 2 and equal(seen.ws[1], before) and half.kept.get_scale() == 2.**10     # halved, then doubled


def test_the_second_gradient_is_the_one_that_is_clipped():
    learn = bowl().sam(.2).grad_clip(.5)
    learn.fit(1, cbs=(seen := Passes()))
    g = A*W0
    there = A*(W0 + .2*g/g.norm())
    assert seen.grads[0][0].tolist() == pytest.approx((.5*there/there.norm()).tolist(), rel=1e-4)
    assert learn.techniques['grad_clip'].effect.endswith(f'the largest was {float(there.norm()):.3g}')


def test_pruned_weights_stay_0_in_both_passes_and_have_no_say_in_the_norm():
    learn = learner(lambda: nn.Linear(4, 3)).prune(.5).sam(.5)
    zero = learn.model.weight == 0
    learn.fit(1, cbs=(seen := Passes()))
    assert int(zero.sum()) == 6 and all(not bool(w[zero].any()) for w, _ in seen.ws)
    for here, there in zip(seen.ws[::2], seen.ws[1::2]): assert float(torch.cat([(a-b).flatten() for a, b in zip(here, there)]).norm()) == pytest.approx(.5, rel=1e-5)


def test_frozen_weights_do_not_move():
    learn = learner().sam(.5)
    learn.splitter = lambda m: [list(m[0].parameters()), list(m[2].parameters())]
    learn.freeze()
    before = [p.clone() for p in learn.model[0].parameters()]
    class There(Callback):
        def before_fit(self): self.moved = []
        def after_pred(self):
            if self.learn.training: self.moved.append(not equal(before, self.learn.model[0].parameters()))
    learn.fit(1, cbs=(there := There()))
    assert len(there.moved) == 6 and not any(there.moved)


# back to the bit

class End(Callback):
    "End the second pass of the second batch at `event`."
    order = 90
    def __init__(self, event, error): self.at, self.error, self.before = event, error, None
    def __call__(self, name):
        learn = self.learn
        if name == 'before_backward' and learn.training and not learn.sam_cb.again: self.before = tensors(learn)
        if name == self.at and learn.training and learn.iter == 1 and learn.sam_cb.again: raise self.error
        return super().__call__(name)


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward'])
@pytest.mark.parametrize('error', [RuntimeError('dies'), KeyboardInterrupt(), CancelFitException('enough')], ids=lambda e: type(e).__name__)
def test_a_batch_that_ends_between_the_two_passes_leaves_the_weights_to_the_bit(event, error):
    learn = learner(with_norm_and_dropout).sam(.5)
    try: learn.fit(1, cbs=(end := End(event, error)))
    except (RuntimeError, KeyboardInterrupt): pass
    assert equal(tensors(learn), end.before) and learn.sam_cb.again is False and not learn.sam_cb.kept and learn.sam_cb.batch is None
    learn.fit(1)                                                                    # and it goes on


def test_a_second_pass_that_is_cancelled_leaves_the_weights_and_the_next_batch_goes_on():
    learn = learner().sam(.5)
    learn.fit(1, cbs=[End('after_pred', CancelBatchException('skip')), seen := Passes()])
    assert len(seen.losses) == 5 and equal(seen.ws[2], seen.ws[3]) and len(seen.grads) == 2


def test_a_loss_that_is_not_finite_over_there_ends_the_fit_and_the_weights_are_as_before():
    class Burn(Callback):
        def after_loss(self):
            if self.learn.training and self.learn.iter == 1 and self.learn.sam_cb.again: self.learn.loss_grad = self.learn.loss_grad*float('nan')
    learn = learner().sam(.5)
    with pytest.raises(ValueError, match='^the loss is nan in batch 1 of epoch 0') as e: learn.fit(1, cbs=[Burn(), seen := Passes()])
    assert str(e.value).endswith('The weights are as they were before.') and equal(seen.ws[2], tensors(learn))


def test_validation_has_one_pass_and_no_ascent():
    learn = learner().sam(.5)
    learn.fit(1)
    before, seen = tensors(learn), []
    handle = learn.model.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    learn.validate()
    handle.remove()
    assert seen == [16, 16, 16] and equal(tensors(learn), before)


def test_where_the_loss_is_flat_it_stands_still():
    learn = bowl().sam(.2)
    learn.model.weight.data.zero_()
    learn.fit(1)
    assert not learn.model.weight.any() and 'two passes a batch' in learn.techniques['sam'].effect


@pytest.mark.parametrize('rho', [0., -.1, float('nan'), float('inf')])
def test_a_length_that_is_none_is_refused(rho):
    learn = learner()
    with pytest.raises(ValueError, match=f'sam: rho must be > 0, got {rho}'): learn.sam(rho)
    assert not learn.__dict__.get('techniques') and not hasattr(learn, 'sam_cb')


def test_with_accumulation_it_is_refused_by_both_names():
    with pytest.raises(ValueError, match="'sam' and 'grad_accum' do not go together: .*take a larger bs"): learner().use(sam=True, grad_accum=2)
