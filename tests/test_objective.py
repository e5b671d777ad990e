"The training loss when techniques meet: one batch against a value computed by hand, validation and Learner untouched."
import pytest
import torch
from fastai.basics import Callback, CancelFitException, CrossEntropyLossFlat, nn
from fastai.callback.mixup import MixUp
from fastai.losses import BCEWithLogitsLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from torch.nn import functional as F

from fastrecipes.objective import cross_entropy_of, objective
from fastrecipes.technique import discover

discover()


class Catch(Callback):
    "Keep what the first training batch looked like, then stop."
    order = 50
    def before_batch(self): self.seen = self.learn.xb[0].clone(), self.learn.yb[0].clone()
    def after_loss(self):
        if not self.learn.training: return
        o = self.learn.objective_cb if hasattr(self.learn, 'objective_cb') else None
        self.kept = self.learn.pred.detach(), self.learn.loss_grad.item(), o and o.partner, o and o.share
        raise CancelFitException('caught')


def hand(pred, y, c, partner=None, share=None, eps=0., w=None):
    "Soft-target cross entropy, sample by sample."
    w, num, den = torch.ones(c) if w is None else w, 0., 0.
    for i in range(len(y)):
        t = torch.zeros(c)
        t[y[i]] += 1 if share is None else share[i]
        if share is not None: t[y[partner[i]]] += 1-share[i]
        assert t.sum() == pytest.approx(1, abs=1e-6)
        logp = pred[i] - torch.logsumexp(pred[i], 0)
        num += -(w*((1-eps)*t + eps/c)*logp).sum()
        den += (w*t).sum()
    return (num/den).item()


W = torch.tensor([5., 1., .5])

@pytest.mark.parametrize('loss_func, w', [(nn.CrossEntropyLoss(), None), (F.cross_entropy, None), (CrossEntropyLossFlat(), None), (nn.CrossEntropyLoss(weight=W), W),
                                          (CrossEntropyLossFlat(weight=W/100), W/100)])
@pytest.mark.parametrize('eps', [0., .1])
@pytest.mark.parametrize('alpha', [None, .4])
def test_one_batch_equals_the_hand_computed_loss(toy, loss_func, w, eps, alpha):
    learn = toy(loss_func=loss_func)
    if eps: learn.label_smoothing(eps)
    if alpha: learn.mixup(alpha)
    learn.fit(1, cbs=(catch := Catch()))
    pred, loss, partner, share = catch.kept
    assert loss == pytest.approx(hand(pred, catch.seen[1], 3, partner, share, eps, w), rel=1e-5)


def test_mixup_with_class_weights_follows_the_weights_scale_in_fastai_and_not_here(toy):
    def loss(scale, mix):
        learn = mix(toy(loss_func=CrossEntropyLossFlat(weight=W*scale)))
        learn.fit(1, cbs=(catch := Catch()))
        return catch.kept[1]
    plain = loss(1, lambda learn: learn.add_cb(MixUp(.4))), loss(.01, lambda learn: learn.add_cb(MixUp(.4)))
    assert plain[1] < .05*plain[0]                              # fastai 2.8.12: mean(w·l), where cross entropy takes Σwl/Σw
    ours = loss(1, lambda learn: learn.mixup(.4)), loss(.01, lambda learn: learn.mixup(.4))
    assert ours[1] == pytest.approx(ours[0], rel=1e-5)


def test_validation_loss_is_the_data_s_own_under_smoothing_and_mixing(toy):
    learn = toy().label_smoothing(.3).mixup(1.)
    learn.fit(2)
    x, y = learn.dls.valid_ds.dataset.tensors
    assert learn.recorder.values[-1][1] == pytest.approx(F.cross_entropy(learn.model(x), y).item(), rel=1e-5)


def test_the_inputs_of_the_dataset_are_not_written_to(toy):
    learn = toy()
    before = learn.dls.train_ds.dataset.tensors[0].clone()
    learn.mixup(1.).fit(1)
    assert torch.equal(learn.dls.train_ds.dataset.tensors[0], before)


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError('dies'), CancelFitException('stops')])
def test_a_fit_that_dies_under_mixup_leaves_the_loss_function_alone(toy, error):
    class Die(Callback):
        order = 55
        def after_loss(self):
            if self.learn.training: raise error
    learn = toy().mixup(.4)
    loss_func = learn.loss_func
    try: learn.fit(1, cbs=Die())
    except (KeyboardInterrupt, ValueError): pass
    assert learn.loss_func is loss_func
    learn.fit(1)
    assert learn.recorder.values[-1][1] > 0


def test_a_batch_of_one_sample_trains(toy):
    toy(bs=1, n=4, labels=[0, 1, 2, 0]).mixup(.4).label_smoothing(.1).fit(1)


def test_float_targets_are_blended_themselves(toy):
    learn = toy(loss_func=MSELossFlat(), labels=torch.randn(64, 3))
    learn.metrics = []
    learn.mixup(.4).fit(1, cbs=(catch := Catch()))
    pred, loss, partner, share = catch.kept
    y = catch.seen[1]
    assert loss == pytest.approx((pred - (share[:, None]*y + (1-share[:, None])*y[partner])).square().mean().item(), rel=1e-5)


def test_multi_label_and_focal_losses_are_mixed(toy):
    learn = toy(loss_func=BCEWithLogitsLossFlat(), labels=(torch.rand(64, 3) > .5).float())
    learn.metrics = []
    learn.mixup(.4).fit(1)
    learn = toy(loss_func=FocalLossFlat()).mixup(.4)
    learn.fit(1, cbs=(catch := Catch()))
    pred, loss, partner, share = catch.kept
    def focal(y):
        ce = F.cross_entropy(pred, y, reduction='none')
        return (1-(-ce).exp())**2*ce
    y = catch.seen[1]
    assert loss == pytest.approx((share*focal(y) + (1-share)*focal(y[partner])).mean().item(), rel=1e-5)


def test_segmentation_losses_are_taken_pixel_by_pixel(toy):
    pred, y = torch.randn(4, 5, 6, 6), torch.randint(5, (4, 6, 6))
    learn = toy(loss_func=CrossEntropyLossFlat(axis=1)).label_smoothing(.2)
    assert objective(learn).of(pred, y).item() == pytest.approx(F.cross_entropy(pred, y, label_smoothing=.2).item(), rel=1e-5)


def test_fastais_own_smoothing_loss_is_read_with_its_settings():
    assert cross_entropy_of(LabelSmoothingCrossEntropyFlat(eps=.2)).smoothing == .2
    assert cross_entropy_of(FocalLossFlat()) is None


def test_label_smoothing_refuses_what_is_not_a_cross_entropy(toy):
    with pytest.raises(ValueError, match='label_smoothing: the loss must be a cross entropy'): toy(loss_func=FocalLossFlat()).label_smoothing()
    with pytest.raises(ValueError, match=r'eps must be in \[0, 1\), got 1'): toy().label_smoothing(1)


def test_accumulated_gradients_keep_the_loss_scale(toy):
    from fastai.callback.training import GradientAccumulation
    big, small = toy(bs=32, n=32, cbs=None).label_smoothing(.1), toy(bs=16, n=32).label_smoothing(.1)
    grads = []
    class Grab(Callback):
        order = 60
        def before_step(self):
            grads.append(self.learn.model.weight.grad.clone())
            raise CancelFitException('grabbed')
    big.fit(1, cbs=Grab())
    small.fit(1, cbs=[GradientAccumulation(32), Grab()])
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-6)


# moved logits: arXiv:2007.07314, eq. 10, against torch's own cross entropy of logits + tau·log(share)

N = [40, 16, 8]
MOVED = torch.log(torch.tensor([.625, .25, .125]))


def of_batch(learn):
    "The loss of the first batch and its gradient by the answers, those answers, the inputs and the targets."
    learn.fit(1, cbs=(catch := CatchGradient()))
    return catch.kept


class CatchGradient(Callback):
    order = 5.5
    def after_loss(self):
        if not self.learn.training: return
        gradient, = torch.autograd.grad(self.learn.loss_grad, self.learn.pred)
        self.kept = self.learn.loss_grad.item(), gradient, self.learn.pred.detach(), self.learn.xb[0], self.learn.yb[0]
        raise CancelFitException('caught')


def skewed(toy, **kwargs): return toy(labels=sum(([c]*n for c, n in enumerate(N)), []), **kwargs)


@pytest.mark.parametrize('tau', [1., .3, 2.])
@pytest.mark.parametrize('loss_func', [nn.CrossEntropyLoss(), CrossEntropyLossFlat(), nn.CrossEntropyLoss(weight=W, label_smoothing=.2), nn.CrossEntropyLoss(reduction='sum')])
def test_moved_logits_are_torchs_cross_entropy_of_moved_logits_and_so_is_the_gradient(toy, loss_func, tau):
    loss, gradient, pred, _, y = of_batch(skewed(toy, loss_func=loss_func).logit_adjustment(tau))
    z = pred.clone().requires_grad_()
    (expected := loss_func(z + tau*MOVED, y)).backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5) and torch.allclose(gradient, z.grad, rtol=1e-4, atol=1e-6)
    assert abs(loss - loss_func(pred, y).item()) > .01*abs(loss)


def test_moved_logits_meet_smoothing_and_mixed_targets(toy):
    learn = skewed(toy).label_smoothing(.1).mixup(.4).logit_adjustment()
    learn.fit(1, cbs=(catch := Catch()))
    pred, loss, partner, share = catch.kept
    assert loss == pytest.approx(hand(pred + MOVED, catch.seen[1], 3, partner, share, .1), rel=1e-5)


def test_moved_logits_leave_out_what_the_loss_ignores_also_when_counting(toy):
    labels = [0]*40 + [1]*16 + [2]*8 + [-7]*16
    loss, _, pred, _, y = of_batch(toy(n=80, bs=80, labels=labels, loss_func=nn.CrossEntropyLoss(ignore_index=-7)).logit_adjustment())
    assert (y == -7).sum() == 16 and loss == pytest.approx(F.cross_entropy(pred + MOVED, y, ignore_index=-7).item(), rel=1e-5)


def test_moved_logits_of_masks_move_along_the_axis_of_the_classes(toy):
    pred, y = torch.randn(4, 3, 6, 5), torch.randint(3, (4, 6, 5))
    learn = skewed(toy, loss_func=CrossEntropyLossFlat(axis=1)).logit_adjustment(2.)
    assert objective(learn).of(pred, y).item() == pytest.approx(F.cross_entropy(pred + 2*MOVED[:, None, None], y).item(), rel=1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_moved_logits_of_16_bits_are_moved_in_32(toy, dtype):
    "log of a share of .0001 is −9.21; in bfloat16 −9.1875."
    pred, y = torch.randn(512, 3).to(dtype), torch.randint(3, (512,))
    learn = skewed(toy).logit_adjustment(shares=[.9998, .0001, .0001])
    exact = F.cross_entropy(pred.double() + torch.tensor([.9998, .0001, .0001]).double().log(), y).item()
    assert objective(learn).of(pred, y).item() == pytest.approx(exact, rel=1e-5)


def test_a_teacher_is_compared_with_the_plain_logits(toy):
    teacher = nn.Linear(4, 3)
    loss, _, pred, x, y = of_batch(learn := skewed(toy).logit_adjustment().distill(teacher, T=2., alpha=.7))
    answer = next(cb for cb in learn.cbs if cb.name == 'distill_cb').teacher(x).detach()
    kl = F.kl_div((pred/2).log_softmax(-1), (answer/2).log_softmax(-1), reduction='batchmean', log_target=True)
    assert loss == pytest.approx((.3*F.cross_entropy(pred + MOVED, y) + .7*4*kl).item(), rel=1e-5)


def test_moved_logits_are_those_of_training_only(toy):
    learn = skewed(toy).logit_adjustment()
    learn.fit(2)
    x, y = learn.dls.valid_ds.dataset.tensors
    logits = learn.model(x).detach()
    assert learn.recorder.values[-1][1] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert torch.allclose(learn.get_preds()[0], logits.softmax(-1), atol=1e-6)


def test_moved_logits_accumulate_to_the_gradient_of_the_whole_batch(toy):
    class Grab(Callback):
        order = 60
        def before_step(self):
            self.gradient = self.learn.model.weight.grad.clone()
            raise CancelFitException('grabbed')
    grabs = []
    for bs in (64, 16):
        learn = skewed(toy, bs=bs).label_smoothing(.1).logit_adjustment()
        if bs < 64: learn.grad_accum(4)
        learn.fit(1, cbs=(grab := Grab()))
        grabs.append(grab.gradient)
    assert torch.allclose(*grabs, rtol=1e-4, atol=1e-6)


def test_two_gaussians_100_to_1_are_parted_half_way_and_not_where_the_common_one_ends(toy):
    """N(−1, 1) and N(1, 1), a sample at each of their quantiles: the log odds of the rare class are 2x − log 100, so that a network fitted plainly
    changes its mind at x = log(100)/2 = 2.30, with a balanced error of (Φ(−3.30)+Φ(1.30))/2 = .452; the least, Φ(−1) = .159, is had at 0."""
    from scipy.stats import norm
    sides = [norm.ppf((torch.arange(n)+.5)/n, loc=mean) for mean, n in ((-1, 20000), (1, 200))]
    x = torch.cat([torch.as_tensor(s, dtype=torch.float32) for s in sides])[:, None]
    y = torch.tensor([0]*20000 + [1]*200)

    def boundary(adjust):
        learn = toy(n=4, c=2, d=1, bs=4, labels=[0, 1, 0, 1])
        learn.dls.train.dataset.dataset.tensors = x, y
        if adjust: learn.logit_adjustment()
        else: learn.label_smoothing(0.)
        opt = torch.optim.LBFGS(learn.model.parameters(), max_iter=200, line_search_fn='strong_wolfe')
        def closure():
            opt.zero_grad()
            (loss := objective(learn).of(learn.model(x), y)).backward()
            return loss
        opt.step(closure)
        (w0, w1), (b0, b1) = learn.model.weight.detach().flatten().tolist(), learn.model.bias.tolist()
        return (b0-b1)/(w1-w0)

    def balanced_error(at): return float(norm.sf(at+1) + norm.cdf(at-1))/2
    plain, moved = boundary(False), boundary(True)
    assert plain == pytest.approx(2.3026, abs=.05) and balanced_error(plain) == pytest.approx(.452, abs=.01)
    assert moved == pytest.approx(0, abs=.05) and balanced_error(moved) == pytest.approx(.1587, abs=.001)
