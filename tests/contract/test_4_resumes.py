"""Clause 4, its second half: killed at any batch and run again, a program ends as the one that was never killed.

Here the kill is an exception that nobody catches, after which nothing of the first process is used but its checkpoint; `test_kill_9.py`
kills real processes."""
import itertools

import pytest
import torch
from fastai.basics import Callback

from fastrecipes.training.resume import resumable

from .conftest import NAMES, learner, use

# (fit, epoch, batch) where it dies: in mid-epoch, at its first and last batch, in the first batch and in the second fit
PLACES = [(0, 0, 0), (0, 1, 2), (0, 1, 3), (1, 0, 0), (1, 1, 1)]


class Killed(BaseException): pass


class Kill(Callback):
    "Die in a batch of the program: once its weights are changed, or once it is saved."
    order = 2000                                 # after the checkpoint of that batch
    def __init__(self, at, where): self.at, self.where, self.nth = at, where, -1
    def _die(self, event):
        if self.where == event and self.learn.training and (self.nth, self.learn.epoch, self.learn.iter) == self.at: raise Killed
    def before_fit(self): self.nth += 1
    def after_step(self): self._die('after_step')
    def after_batch(self): self._die('after_batch')


def program(names, folder=None, kill=None, every=2, workers=0, n=256):
    "Two fits of two epochs of four batches, resumable where there is a folder."
    learn = learner(n)
    learn.dls.train.fake_l.num_workers = workers
    use(learn, *names)
    if kill: learn.add_cb(kill)
    with resumable(folder, every=every):
        learn.fit_flat_cos(2, 3e-3)
        learn.fit_one_cycle(2, 2e-3)
    return learn


def flat(o):
    "Every tensor and number of nested lists and dicts, in order."
    if isinstance(o, dict): return [x for k in o for x in (k, *flat(o[k]))]
    if isinstance(o, (list, tuple)) or type(o).__name__ == 'L': return [x for v in o for x in flat(v)]
    return [o]


def outcome(learn):
    "All that a run ends with, but for the time it took."
    r = learn.recorder
    return flat([list(learn.model.state_dict().values()), learn.opt.state_dict(), r.values, r.losses, r.lrs, r.iters, [p.grad for p in learn.model.parameters()],
                 torch.get_rng_state(), {n: a.effect for n, a in learn.techniques.items()}])


def same(a, b): return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else type(a) is type(b) and (a == b or a != a and b != b)


def assert_same(one, other):
    a, b = outcome(one), outcome(other)
    assert len(a) == len(b) and all(map(same, a, b)), next((i, x, y) for i, (x, y) in enumerate(itertools.zip_longest(a, b)) if not same(x, y))


@pytest.mark.parametrize('name', NAMES)
def test_killed_anywhere_and_run_again_it_ends_as_if_never_killed(name, tmp_path):
    whole = program([name], tmp_path/'whole')
    for at, where in itertools.product(PLACES, ('after_step', 'after_batch')):
        folder = tmp_path/f'{at} {where}'
        with pytest.raises(Killed): program([name], folder, Kill(at, where))
        assert_same(whole, program([name], folder))
        assert not folder.exists()               # nothing is left of a block that came to its end
