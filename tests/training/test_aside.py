"After a block aside, a Learner is as it was, to the last random stream."
import random

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Callback, DataLoaders, OptimWrapper, TfmdDL, nn
from torch.utils.data import TensorDataset

from fastrecipes.technique import discover
from fastrecipes.training.aside import Trial, aside

discover()


def net(): return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.3), nn.Linear(8, 3))


def frozen(o):
    "All that `o` is made of, as text: bits and the identity of what holds them."
    if isinstance(o, torch.Tensor): return (id(o) if o.is_leaf else 0), o.detach().tolist(), o.requires_grad, None if not o.is_leaf or o.grad is None else (id(o.grad), o.grad.tolist())
    if isinstance(o, nn.Module): return id(o), o.training, [(n, frozen(p)) for n, p in (*o.named_parameters(), *o.named_buffers())], [m.training for m in o.modules()]
    if isinstance(o, dict): return [(k if isinstance(k, str) else id(k), frozen(v)) for k, v in o.items()]
    if isinstance(o, (list, tuple)) or type(o).__name__ == 'L': return [frozen(v) for v in o]
    if isinstance(o, random.Random): return o.getstate()
    return o if isinstance(o, (int, float, str, type(None))) else id(o)


def everything(learn):
    opt = learn.opt and [frozen(dict(s)) for s in learn.opt.state.values()], [dict(h) for h in learn.opt.hypers] if learn.opt else None
    return dict(model=frozen(learn.model), opt=(id(learn.opt), opt), learn={k: id(v) for k, v in vars(learn).items()},
                cbs=[(id(cb), {k: frozen(v) for k, v in vars(cb).items() if k not in ('learn', 'loss', 'smooth_loss')}) for cb in learn.cbs],
                effects={n: a.effect for n, a in vars(learn).get('techniques', {}).items()}, loaders=[{k: frozen(v) for k, v in vars(dl).items()} for dl in learn.dls.loaders],
                smooth=(learn.recorder.smooth_loss.count, float(learn.recorder.smooth_loss.val)),
                streams=(random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))


class Ends(Callback):
    "End the fit in this way, in this batch."
    order = 80
    def __init__(self, error, batch, event): self.error, self.batch, self.at = error, batch, event
    def __call__(self, name):
        if name == self.at and self.learn.training and self.learn.train_iter == self.batch: raise self.error
        return super().__call__(name)


WAYS = {'': None, 'ctrl_c in the first batch': Ends(KeyboardInterrupt(), 0, 'after_pred'), 'ctrl_c': Ends(KeyboardInterrupt(), 5, 'after_step'),
        'error': Ends(RuntimeError('dies'), 3, 'after_backward')}
MAKE = dict(fresh=lambda toy: toy(model=net()), fitted=lambda toy: fit(toy(model=net())),
            techniques=lambda toy: fit(toy(model=net()).mixup(.4).label_smoothing(.1).grad_accum(3).grad_clip(.1)),
            torch_sgd=lambda toy: fit(toy(model=net(), opt_func=lambda ps, **kw: OptimWrapper(ps, torch.optim.SGD, momentum=.9, **kw))),
            sgd=lambda toy: fit(toy(model=net(), opt_func=SGD)))


def fit(learn):
    learn.fit(1, .01)
    return learn


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('make', MAKE)
def test_a_fit_aside_is_felt_nowhere_however_it_ends(toy, make, way):
    learn = MAKE[make](toy)
    before = everything(learn)
    try:
        with aside(learn, 'test'): learn.fit(2, .5, cbs=[Trial(), *([WAYS[way]] if way else [])])
    except (KeyboardInterrupt, RuntimeError): assert way
    after = everything(learn)
    for part in before: assert after[part] == before[part], part


def test_what_the_block_did_is_seen_inside_it(toy):
    learn = toy(model=net())
    start = learn.model[0].weight.detach().clone()
    with aside(learn, 'test'):
        learn.fit(1, .5)
        assert not torch.equal(learn.model[0].weight, start) and learn.opt is not None
    assert learn.opt is None


def test_fastais_own_loader_and_torchs_go_on_with_the_order_they_would_have_had(toy):
    data = TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
    for make in (lambda: TfmdDL(toy().dls.train.dataset, 16, shuffle=True, num_workers=0),
                 lambda: torch.utils.data.DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(3))):
        orders = []
        for trial in (False, True):
            random.seed(3)
            learn = toy()
            learn.dls = DataLoaders(make(), learn.dls.valid, device=torch.device('cpu'))
            if trial:
                with aside(learn, 'test'): learn.fit(1)
            orders.append(torch.cat([y for _, y in learn.dls.train]).tolist())
        assert orders[0] == orders[1]


def test_draws_of_the_block_are_its_own(toy):
    learn, drawn = toy(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with aside(learn, 'test'): drawn.append((torch.rand(1), random.random(), np.random.rand()))
        with aside(learn, 'other'): assert torch.rand(1) != drawn[0][0]
    assert drawn[0] == drawn[1]


def test_a_tensor_that_others_hold_is_restored_in_place_also_where_it_grew(toy):
    learn = toy()
    class Holds(Callback):
        def __init__(self): self.seen, self.array, self.rows = torch.zeros(2), np.zeros(2), [1]
    learn.add_cb(cb := Holds())
    seen, array, rows = cb.seen, cb.array, cb.rows
    with aside(learn, 'test'):
        cb.seen.data, cb.rows = torch.ones(3), [3]
        rows.append(2)
        array += 1
    assert cb.seen is seen and seen.tolist() == [0, 0] and cb.rows is rows == [1] and array.tolist() == [0, 0]


def test_metrics_and_validation_are_no_part_of_a_trial(toy):
    learn = toy()
    learn.fit(1)
    row = learn.recorder.values[-1]
    with aside(learn, 'test'): learn.fit(1, cbs=Trial())
    assert learn.recorder.values == [row]
