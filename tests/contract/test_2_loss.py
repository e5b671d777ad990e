"The named techniques in pairs: each trains, and one batch's loss and gradient equal a value computed by hand."
import itertools
from copy import deepcopy

import pytest
import torch
from fastai.basics import Callback, CancelFitException, CrossEntropyLossFlat, DataLoaders, Learner, nn
from torch.utils.data import TensorDataset

from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import Indexed
from fastrecipes.technique import discover

discover()
W, EPS, T, ALPHA, L2 = [3., 1., .5], .1, 4., .9, .01
ON = dict(class_weights=W, label_smoothing=EPS, mixup=.4, cutmix=1., cutout=3, weight_penalty=L2, to_bf16=True, prune=.3, to_parallel=dict(device_ids=[0, 1]),
          early_stop=dict(restore=False), distill=lambda learn: dict(teacher=teacher(), T=T, alpha=ALPHA))
PAIRS = [*itertools.combinations(sorted(ON), 2)]


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))


def teacher(): return net(7)


def learner():
    g = torch.Generator().manual_seed(0)
    ds = Indexed(TensorDataset(torch.randn(48, 3, 8, 8, generator=g), torch.randint(3, (48,), generator=g)), vocab=range(3))
    dls = DataLoaders(KeyedDL(ds, 16, seed=0, shuffle=True, drop_last=True, num_workers=0), KeyedDL(ds, 16, num_workers=0), device=torch.device('cpu'))
    learn = Learner(dls, net(1), CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def by_hand(model, logits, x, y, names, partner, share):
    "The loss of a batch, sample by sample and class by class."
    w = torch.tensor(W) if 'class_weights' in names else torch.ones(3)
    eps = EPS if 'label_smoothing' in names else 0.
    num = den = 0.
    for i in range(len(y)):
        t = torch.zeros(3)
        t[y[i]] += 1. if share is None else share[i]
        if share is not None: t[y[partner[i]]] += 1-share[i]
        assert float(t.sum()) == pytest.approx(1, abs=1e-5)
        logp = logits[i] - logits[i].exp().sum().log()
        num, den = num - (w*((1-eps)*t + eps/3)*logp).sum(), den + (w*t).sum()
    loss = num/den
    if 'distill' in names:
        answer, soft = teacher()(x).detach(), 0.
        if 'to_bf16' in names:
            with torch.autocast('cpu', torch.bfloat16): answer = teacher()(x).detach().float()
        for i in range(len(y)):
            p, q = (answer[i]/T).softmax(0), (logits[i]/T).softmax(0)
            soft = soft + T*T*(p*(p.log()-q.log())).sum()/len(y)
        loss = (1-ALPHA)*loss + ALPHA*soft
    if 'weight_penalty' in names: loss = loss + L2*sum(p.square().sum() for p in model.parameters() if p.ndim > 1)
    return loss


class Catch(Callback):
    "What the first batch looked like once its gradient was there; then the fit is over."
    order = 5.5                                 # after the losses are made up, before loss scaling
    def after_loss(self):
        if not self.learn.training: return
        o = getattr(self.learn, 'objective_cb', None)
        self.x, self.y, self.loss = self.learn.xb[0], self.learn.yb[0], self.learn.loss_grad.detach()
        self.partner, self.share = (o.partner, o.share) if o else (None, None)
        self.before = deepcopy(self.learn.model)
    def after_backward(self):
        self.grads = [p.grad.clone() for p in self.learn.model.parameters()]
        raise CancelFitException('caught')


@pytest.mark.parametrize('names', PAIRS, ids='+'.join)
def test_one_batch_of_a_pair_equals_the_value_by_hand(names):
    learn = learner()
    learn.use(**{n: ON[n](learn) if callable(ON[n]) else ON[n] for n in names})
    learn.fit(1, cbs=(catch := Catch()))

    model = getattr(catch.before, 'module', catch.before)
    with torch.autocast('cpu', torch.bfloat16, enabled='to_bf16' in names): logits = model(catch.x)
    expected = by_hand(model, logits.float(), catch.x, catch.y, names, catch.partner, catch.share)
    assert float(catch.loss) == pytest.approx(float(expected), rel=1e-4)
    grads = torch.autograd.grad(expected, list(model.parameters()))
    for mine, theirs in zip(catch.grads, grads): assert torch.allclose(mine, theirs, rtol=1e-3, atol=2e-5 if 'to_bf16' not in names else 2e-3)


@pytest.mark.parametrize('names', PAIRS, ids='+'.join)
def test_a_pair_trains_and_reports_the_datas_own_validation_loss(names):
    learn = learner()
    learn.use(**{n: ON[n](learn) if callable(ON[n]) else ON[n] for n in names})
    learn.fit(2, 1e-2)
    x, y = learn.dls.valid_ds.dataset.tensors
    with torch.autocast('cpu', torch.bfloat16, enabled='to_bf16' in names), torch.no_grad(): logits = learn.model.eval()(x)
    assert learn.recorder.values[-1][1] == pytest.approx(float(nn.functional.cross_entropy(logits.float(), y)), rel=1e-4)
    assert all(learn.techniques[n].effect for n in names)
