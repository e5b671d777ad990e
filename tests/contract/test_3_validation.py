"Clause 3: validation and inference see nothing of what is meant for training."
import pytest
import torch
from fastai.basics import Callback
from torch.nn import functional as F

from .conftest import NAMES, TECHNIQUES, learner, use

TRAINING_ONLY = [n for n in NAMES if 'inference' not in TECHNIQUES[n].touches]


class Seen(Callback):
    "The validation batches as the model meets them."
    order = 60
    def before_fit(self): self.batches = []
    def before_batch(self):
        if not self.learn.training: self.batches.append((self.learn.xb[0].clone(), self.learn.yb[0].clone()))


def plainly(learn):
    "The validation data as a network without techniques meets them: normalised to [−1, 1]."
    x, y = learn.dls.valid_ds.dataset.tensors
    return (x-.5)/.5, y


@pytest.mark.parametrize('name', NAMES)
def test_validation_loss_is_the_datas_own_whatever_the_batch_size(name):
    learn = use(learner(128), name)
    learn.fit(1, 3e-3, cbs=(seen := Seen()))
    if name not in TRAINING_ONLY: return
    x, y = (torch.cat(t) for t in zip(*seen.batches))
    plain = plainly(learn)
    assert torch.equal(x, plain[0]) and torch.equal(y, plain[1])
    with torch.no_grad(): expected = F.cross_entropy(learn.model.eval()(plain[0]), plain[1]).item()
    assert learn.recorder.values[-1][1] == pytest.approx(expected, rel=1e-4)
    learn.dls.loaders[1] = learn.dls.valid.new(bs=7)
    assert learn.validate()[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('name', TRAINING_ONLY)
def test_predictions_are_those_of_the_bare_network(name):
    learn = use(learner(128), name)
    learn.fit(1, 3e-3)
    x, plain_y = plainly(learn)
    with torch.no_grad(): expected = learn.model.eval()(x).softmax(1)
    p, y = learn.get_preds()
    assert torch.allclose(p, expected, atol=1e-6) and torch.equal(y, plain_y)
