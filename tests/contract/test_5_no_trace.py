"Clause 5: after a fit, a cancelled one, one that died anywhere and Ctrl-C, the Learner is as it was; it trains on, and exports."
import pytest
import torch
from fastai.basics import Callback, CancelBatchException, CancelFitException, load_learner

from fastrecipes.production.export import export_learner

from .conftest import NAMES, learner, use

ENDS = dict(dies=RuntimeError('dies'), ctrl_c=KeyboardInterrupt(), cancelled=CancelFitException('enough'), batch_cancelled=CancelBatchException('skip'))
EVENTS = ('before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step', 'after_batch')


class End(Callback):
    "Raise `error` at `event` of the second training batch, after everyone else had that event."
    order = 90
    def __init__(self, event, error): self.at, self.error = event, error
    def __call__(self, name):
        if name == self.at and self.learn.training and self.learn.iter == 1: raise self.error
        return super().__call__(name)


def state(learn):
    "What must not change: everything but weights, optimizer and the records of what happened."
    return dict(loss=learn.loss_func, model=type(learn.model), keys=list(learn.model.state_dict()), cbs=[type(cb) for cb in learn.cbs], dls=learn.dls,
                hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules()], autocast=torch.is_autocast_enabled('cpu'),
                requires=[p.requires_grad for p in learn.model.parameters()], grad=torch.is_grad_enabled(), techniques=list(learn.techniques))


@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('how', ENDS)
@pytest.mark.parametrize('name', NAMES)
def test_whatever_ends_a_fit_leaves_the_learner_as_it_was(name, how, event):
    learn = use(learner(192), name)
    before = state(learn)
    try: learn.fit(1, 3e-3, cbs=End(event, ENDS[how]))
    except (RuntimeError, KeyboardInterrupt, CancelBatchException): pass         # fastai does not catch the last in after_batch
    assert state(learn) == before
    learn.fit(1, 3e-3)
    assert state(learn) == before and all(v == v for v in learn.recorder.values[-1])


@pytest.mark.parametrize('name', NAMES)
def test_it_exports_and_loads_and_answers_the_same(name, tmp_path):
    learn = use(learner(128), name)
    learn.fit(1, 3e-3)
    again = load_learner(export_learner(learn, tmp_path/'learner.pkl'))
    x = learn.dls.valid_ds.dataset.tensors[0]
    with torch.no_grad(): assert torch.equal(again.model.eval()(x), learn.model.eval()(x))
    assert again.techniques.keys() == learn.techniques.keys() and (tmp_path/'learner.pkl').stat().st_size < 200_000
