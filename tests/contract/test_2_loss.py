"""Clause 2, what pairs mean: the loss of each batch and the gradient of a step equal values computed by hand, sample by sample.

A technique whose record says that it touches targets or the gradient has its argument in `ON` and its formula in `by_hand` or `step_by_hand`."""
import itertools
import math
from copy import deepcopy

import pytest
import torch
from fastai.basics import Callback, CancelFitException, CrossEntropyLossFlat, DataLoaders, Learner, nn
from torch.utils.data import TensorDataset

from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import Indexed

from .conftest import TECHNIQUES, refusal

W, EPS, T, ALPHA, L2, NORM = [3., 1., .5], .1, 4., .9, .01, .05
TAU, SHARES = 1.5, [.7, .2, .1]
GAMMA = 2.
RHO = .05
ON = dict(class_weights=W, label_smoothing=EPS, mixup=.4, cutmix=1., cutout=3, weight_penalty=L2, to_bf16=True, to_fp16=True, prune=.3, to_parallel=dict(device_ids=[0, 1]),
          early_stop=dict(restore=False), logit_adjustment=dict(tau=TAU, shares=SHARES), distill=lambda learn: dict(teacher=teacher(), T=T, alpha=ALPHA), grad_accum=2, grad_clip=NORM,
          augmix=lambda learn: watched(learn), loss=dict(kind='focal', gamma=GAMMA), sam=RHO)
PAIRS = [p for p in itertools.combinations(sorted(ON), 2) if not refusal(*p)]


def test_every_technique_that_touches_targets_or_the_gradient_has_its_formula_here():
    assert {t.name for t in TECHNIQUES.values() if {'targets', 'gradient'} & set(t.touches)} <= ON.keys()


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))


def teacher(): return net(7)


def learner():
    g = torch.Generator().manual_seed(0)
    ds = Indexed(TensorDataset(torch.rand(48, 3, 8, 8, generator=g), torch.randint(3, (48,), generator=g)), vocab=range(3))
    dls = DataLoaders(KeyedDL(ds, 16, seed=0, shuffle=True, drop_last=True, num_workers=0), KeyedDL(ds, 16, num_workers=0), device=torch.device('cpu'))
    learn = Learner(dls, net(1), CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def use(learn, names): return learn.use(**{n: ON[n](learn) if callable(ON[n]) else ON[n] for n in names})


VIEWS = {}                                      # of each image, by its pixels: the two mixtures that augmix put behind it


class Watch(Callback):
    "What goes into the forward pass: images, then the first view of each, then the second."
    order = 81
    def before_batch(self):
        if self.learn.training: VIEWS.update((x.numpy().tobytes(), (v, w)) for x, v, w in zip(*self.learn.xb[0].chunk(3)))


def watched(learn):
    learn.add_cb(Watch())
    return dict(severity=3.)


def low(names): return 'to_bf16' in names or 'to_fp16' in names


def by_hand(model, logits, x, y, names, partner, share):
    "The loss of a batch, sample by sample and class by class."
    w = torch.tensor(W) if 'class_weights' in names else torch.ones(3)
    eps = EPS if 'label_smoothing' in names else 0.
    moved = logits + TAU*torch.tensor(SHARES).log() if 'logit_adjustment' in names else logits      # not what a teacher is compared with
    num = den = 0.
    for i in range(len(y)):
        t = torch.zeros(3)
        t[y[i]] += 1. if share is None else share[i]
        if share is not None: t[y[partner[i]]] += 1-share[i]
        assert float(t.sum()) == pytest.approx(1, abs=1e-5)
        logp = moved[i] - moved[i].exp().sum().log()
        focus = (1-logp.exp())**(GAMMA if 'loss' in names else 0)
        num, den = num - (w*((1-eps)*t + eps/3)*focus*logp).sum(), den + (w*t).sum()
    loss = num/den
    if 'distill' in names:
        answer, soft = teacher()(x).detach(), 0.
        if low(names):
            with torch.autocast('cpu', torch.bfloat16): answer = teacher()(x).detach().float()
        for i in range(len(y)):
            p, q = (answer[i]/T).softmax(0), (logits[i]/T).softmax(0)
            soft = soft + T*T*(p*(p.log()-q.log())).sum()/len(y)
        loss = (1-ALPHA)*loss + ALPHA*soft
    if 'augmix' in names:
        views = [forward(model, torch.stack(v), names) for v in zip(*(VIEWS[o.numpy().tobytes()] for o in x))]
        for i in range(len(y)):
            ps = [z[i].softmax(0) for z in (logits, *views)]
            loss = loss + 12.*sum((p*(p.log()-(sum(ps)/3).log())).sum() for p in ps)/3/len(y)
    if 'weight_penalty' in names: loss = loss + L2*sum(p.square().sum() for p in model.parameters() if p.ndim > 1)
    return loss


def step_by_hand(model, batches, names):
    "The gradient of the loss over all of these batches at once, masked where weights are pruned, shortened where it is too long."
    x, y = (torch.cat([b[i] for b in batches]) for i in (0, 1))
    partner = share = None
    if batches[0][2] is not None: partner, share = torch.cat([b[2] + 16*i for i, b in enumerate(batches)]), torch.cat([b[3] for b in batches])
    def gradient(model):
        grads = torch.autograd.grad(by_hand(model, forward(model, x, names), x, y, names, partner, share), list(model.parameters()))
        return [g*(p != 0) if p.ndim > 1 else g for g, p in zip(grads, model.parameters())] if 'prune' in names else grads
    grads = gradient(model)
    if 'sam' in names:
        there = deepcopy(model)
        for p, g in zip(there.parameters(), grads): p.data += RHO*g/torch.cat([o.flatten() for o in grads]).norm()
        grads = gradient(there)
    norm = sum(float(g.square().sum()) for g in grads)**.5
    return [g*NORM/norm for g in grads] if 'grad_clip' in names and norm > NORM else list(grads)


def forward(model, x, names):
    with torch.autocast('cpu', torch.bfloat16, enabled=low(names)): return model(x).float()


class Batches(Callback):
    "Inputs, targets, mixture and loss of each training batch until the first step, and the network before it."
    order = 5.5                                 # once losses are made up, before accumulation and GradScaler scale them
    def before_fit(self): self.seen, self.losses = [], []
    def after_loss(self):
        if not self.learn.training or vars(self.learn).get('sam_cb') and self.learn.sam_cb.again: return       # the second of sam's passes
        if not self.seen: self.before = deepcopy(self.learn.model)
        o = getattr(self.learn, 'objective_cb', None)
        self.seen.append((self.learn.xb[0], self.learn.yb[0], *((o.partner, o.share) if o else (None, None))))
        self.losses.append(self.learn.loss_grad.detach())


class Step(Callback):
    "The gradient as the first step is to follow it; then the fit is over."
    order = 60
    def before_step(self):
        self.grads = [p.grad.clone() for p in self.learn.model.parameters()]
        raise CancelFitException('caught')


@pytest.mark.parametrize('names', [*((n,) for n in ON), *PAIRS], ids='+'.join)
def test_the_losses_and_the_gradient_of_a_step_equal_the_values_by_hand(names):
    learn = use(learner(), names)
    learn.fit(1, cbs=[batches := Batches(), step := Step()])
    model = getattr(batches.before, 'module', batches.before)
    assert len(batches.seen) == (2 if 'grad_accum' in names else 1)
    for (x, y, partner, share), loss in zip(batches.seen, batches.losses):
        assert float(loss) == pytest.approx(float(by_hand(model, forward(model, x, names), x, y, names, partner, share).detach()), rel=1e-4)
    mine, theirs = (torch.cat([g.flatten() for g in grads]) for grads in (step.grads, step_by_hand(model, batches.seen, names)))
    assert float((mine-theirs).norm()/theirs.norm()) < (2e-2 if low(names) else 1e-4)       # in 16 bits sums depend on their order


class Steps(Callback):
    "The gradient of every step, and how many batches had gone by."
    order = 60
    def __init__(self, batches): self.batches, self.taken = batches, []
    def before_step(self): self.taken.append((len(self.batches.seen), [p.grad.clone() for p in self.learn.model.parameters()]))


@pytest.mark.parametrize('names', [('grad_accum',), *(p for p in PAIRS if 'grad_accum' in p)], ids='+'.join)
def test_an_epoch_of_steps_leaves_no_batch_out(names):
    "Three batches, steps of two: the second step has the last batch alone, at its own scale."
    learn = use(learner(), names)
    batches = Batches()
    learn.fit(1, 0., cbs=[batches, steps := Steps(batches)])                    # at a rate of 0 the network stays the one of the first batch
    assert [n for n, _ in steps.taken] == [2, 3]
    model = getattr(batches.before, 'module', batches.before)
    for part, (_, grads) in zip((batches.seen[:2], batches.seen[2:]), steps.taken):
        mine, theirs = (torch.cat([g.flatten() for g in gs]) for gs in (grads, step_by_hand(model, part, names)))
        assert float((mine-theirs).norm()/theirs.norm()) < (2e-2 if low(names) else 1e-4)


class Before(Callback):
    "The pictures of each training batch before they are mixed."
    order = -5
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen += [self.learn.xb[0].clone()] if self.learn.training else []


def seen_in(pictures, i, mixed):
    "(partner, share) of a picture that was blended, or pasted over, with one of `pictures`: found by looking at its pixels only."
    own = pictures[i]
    for j, other in enumerate(pictures):
        visible = (mixed == own).all(0)
        if bool((visible | (mixed == other).all(0)).all()): return j, float(visible.float().mean())
        share = float(((mixed-other)*(own-other)).sum()/(own-other).square().sum()) if i != j else 1.
        if torch.allclose(mixed, share*own + (1-share)*other, atol=1e-5): return j, share


@pytest.mark.parametrize('names', [('mixup',), ('cutmix',), ('cutmix', 'mixup')], ids='+'.join)
def test_the_mixture_that_the_loss_is_told_is_the_one_in_the_pictures(names):
    learn = use(learner(), names)
    learn.fit(2, 0., cbs=[before := Before(), batches := Batches()])
    assert len(batches.seen) == len(before.seen) == 6
    for pictures, (mixed, _, partner, share) in zip(before.seen, batches.seen):
        for i in range(len(mixed)):
            if int(partner[i]) == i: continue       # mixed with itself
            j, visible = seen_in(pictures, i, mixed[i])
            assert float(share[i]) == pytest.approx(visible, abs=1e-4) and (visible > .9999 or int(partner[i]) == j)


@pytest.mark.parametrize('names', [('mixup', 'label_smoothing'), ('cutmix', 'label_smoothing'), ('mixup', 'cutmix', 'label_smoothing')], ids='+'.join)
def test_soft_targets_sum_to_1_however_they_came_about(names):
    "A network that answers 0 finds every class equally likely: its loss is Σt·log c, so log c where targets sum to 1."
    learn = use(learner(), names)
    for p in learn.model[-1].parameters(): nn.init.zeros_(p)
    learn.fit(1, 0., cbs=(batches := Batches()))
    assert len(batches.losses) == 3 and [float(v) for v in batches.losses] == pytest.approx([math.log(3)]*3, rel=1e-6)
    assert all(share is not None and bool(((share >= 0) & (share <= 1)).all()) for *_, share in batches.seen)


@pytest.mark.parametrize('names', PAIRS, ids='+'.join)
def test_a_pair_trains_and_reports_the_datas_own_validation_loss(names):
    learn = use(learner(), names)
    learn.fit(2, 1e-2)
    x, y = learn.dls.valid_ds.dataset.tensors
    with torch.no_grad(): logits = forward(learn.model.eval(), x, names)
    assert learn.recorder.values[-1][1] == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-4)
    assert all(learn.techniques[n].effect for n in names)
