"""Clause 4, its second half: killed at any batch and run again, a program ends as the one that was never killed.

Here the kill is an exception that nobody catches, after which nothing of the first process is used but its checkpoint; `test_kill_9.py`
kills real processes."""
import gc
import itertools
from functools import partial

import pytest
import torch
from fastai.basics import SGD, Adam, Callback, OptimWrapper, TfmdDL, nn, ranger
from fastai.callback.tracker import ReduceLROnPlateau, SaveModelCallback

from fastrecipes.training.resume import remember, resumable

from .conftest import NAMES, TECHNIQUES, learner, refusal, use

# (fit, epoch, batch) where it dies, of two fits of two epochs of four batches, saved after every batch and at the start of an epoch: before
# there is anything, in mid-epoch (between two steps of grad_accum), between training and validation, between two fits, at the start of an epoch
PLACES = [((0, 0, 0), 'before'), ((0, 1, 3), 'before'), ((0, 1, 3), 'after'), ((1, 0, 0), 'before'), ((1, 1, 0), 'before')]


class Killed(BaseException): pass


class Kill(Callback):
    "Die at the end of a batch of the program, before or after a checkpoint of it would be written."
    def __init__(self, at, when): self.at, self.order, self.nth = at, dict(before=900, after=1100)[when], -1
    def before_fit(self): self.nth += 1
    def after_batch(self):
        if self.learn.training and (self.nth, self.learn.epoch, self.learn.iter) == self.at: raise Killed


def fits(learn):
    learn.fit_flat_cos(2, 3e-3)
    learn.fit_one_cycle(2, 2e-3)


def program(make, folder, kill=None, every=1):
    "Two fits of what `make()` gives, resumable."
    learn = make()
    if kill: learn.add_cb(Kill(*kill))
    with resumable(folder, every=every): fits(learn)
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
                 torch.get_rng_state(), {n: a.effect for n, a in vars(learn).get('techniques', {}).items()}])


def same(a, b): return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else type(a) is type(b) and (a == b or a != a and b != b)


def assert_same(one, other):
    a, b = outcome(one), outcome(other)
    assert len(a) == len(b) and all(map(same, a, b)), next((i, x, y) for i, (x, y) in enumerate(itertools.zip_longest(a, b)) if not same(x, y))


def check(make, tmp_path, places=PLACES):
    "Killed at each of `places` and run again, `make`'s Learner ends as if never killed: as the one that is returned."
    whole = program(make, tmp_path/'whole')
    for n, kill in enumerate(places):
        with pytest.raises(Killed): program(make, tmp_path/f'{n}', kill)
        assert_same(whole, program(make, tmp_path/f'{n}'))
        assert not (tmp_path/f'{n}').exists()    # nothing is left of a block that came to its end
    return whole


@pytest.mark.parametrize('name', NAMES)
def test_killed_anywhere_and_run_again_it_ends_as_if_never_killed(name, tmp_path):
    check(lambda: use(learner(256), name), tmp_path)


def with_workers(*names):
    learn = learner(256)
    learn.dls.train.fake_l.num_workers = 2
    return use(learn, *names)


LOADED = [n for n, t in TECHNIQUES.items() if t.stage == 'data' or {'sampling', 'inputs', 'targets'} & set(t.touches)]     # what workers can do to: the rest never sees a loader


@pytest.mark.parametrize('name', sorted(LOADED))
def test_with_worker_processes_too_and_the_same_as_without(name, tmp_path):
    assert_same(check(lambda: with_workers(name), tmp_path, [((0, 1, 1), 'before')]), program(lambda: use(learner(256), name), tmp_path/'none'))


PAIRS = [p for p in itertools.combinations(NAMES, 2) if not refusal(*p)]


@pytest.mark.parametrize('names', PAIRS[::36], ids='+'.join)         # of 36 one: each takes nearly two seconds
def test_in_pairs(names, tmp_path):
    check(lambda: use(learner(256), *names), tmp_path, [((0, 1, 1), 'before')])


def noisy(opt_func=Adam):
    "A network with batch statistics and dropout."
    learn = learner(256)
    torch.manual_seed(0)
    learn.model = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.3), nn.Flatten(), nn.Linear(8*7*7, 10))
    learn.opt_func = opt_func
    return learn


OPTIMIZERS = dict(adam=Adam, sgd=SGD, ranger=ranger, torch_adamw=partial(OptimWrapper, opt=torch.optim.AdamW), torch_sgd=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9))


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_batch_statistics_dropout_and_any_optimizer(name, tmp_path): check(lambda: noisy(OPTIMIZERS[name]), tmp_path)


def test_trackers_of_fastai_and_metrics_on_training_batches(tmp_path):
    def make():
        learn = learner(256)
        learn.path = tmp_path
        learn.recorder.train_metrics = True
        return learn.add_cbs([SaveModelCallback(monitor='valid_accuracy', fname='best'), ReduceLROnPlateau(monitor='train_loss', min_delta=9)])
    check(make, tmp_path)


def test_a_fit_that_stopped_early_is_passed_over(tmp_path):
    make = lambda: learner(256).early_stop('accuracy', patience=1, min_delta=1.)
    whole = program(make, tmp_path/'whole')
    assert len(whole.recorder.values) == 2
    check(make, tmp_path, [((0, 1, 3), 'after'), ((1, 0, 2), 'before')])


def test_learners_in_one_block_have_checkpoints_of_their_own(tmp_path):
    def both(folder, kill=None):
        first, second = use(learner(256), 'mixup'), noisy()
        if kill: second.add_cb(Kill(*kill))
        with resumable(folder, every=2):
            first.fit(1, 3e-3)
            fits(second)
            first.fit(1, 1e-3)
        return first, second
    whole = both(tmp_path/'whole')
    with pytest.raises(Killed): both(tmp_path/'run', ((1, 0, 1), 'before'))
    assert sorted(p.name for p in (tmp_path/'run').iterdir()) == ['1.pt', '2.pt']        # and no second copy of any
    for a, b in zip(whole, both(tmp_path/'run')): assert_same(a, b)


def test_a_learner_that_is_gone_leaves_its_number_to_nobody(tmp_path):
    with pytest.raises(Killed), resumable(tmp_path/'run', every=1):
        for make in (lambda: learner(256), noisy):
            learn = make()
            learn.fit(1, 3e-3)
            del learn
            gc.collect()
        raise Killed
    assert sorted(p.name for p in (tmp_path/'run').iterdir()) == ['1.pt', '2.pt']


def test_a_fastai_learner_without_any_technique(tmp_path):
    def make():
        learn = learner(256)
        learn.remove_cb(learn.keyed_cb)
        learn.dls.loaders[0] = learn.dls.train.new(cls=TfmdDL)
        torch.manual_seed(3)
        return learn
    check(make, tmp_path)


def test_what_is_remembered_is_worked_out_once(tmp_path):
    drawn = []
    def draw(): drawn.append(len(drawn)); return drawn[-1]
    with pytest.raises(Killed), resumable(tmp_path/'run'):
        assert (remember('draw', draw), remember('draw', draw)) == (0, 1)
        raise Killed
    with resumable(tmp_path/'run'): assert (remember('draw', draw), remember('draw', draw), remember('draw', draw)) == (0, 1, 2)
    assert remember('draw', draw) == 3           # outside of a block nothing is


def test_lr_find_is_no_fit_and_is_not_checkpointed(tmp_path):
    learn = learner(256)
    with resumable(tmp_path/'run', every=1):
        learn.lr_find(num_it=6, show_plot=False)
        assert not (tmp_path/'run').exists()


def test_checkpoints_of_another_program_are_refused(tmp_path):
    with pytest.raises(Killed): program(lambda: learner(256), tmp_path/'run', ((1, 0, 2), 'before'))
    with pytest.raises(ValueError, match='of another network'): program(noisy, tmp_path/'run')
    with pytest.raises(ValueError, match='every must be ≥ 1 batch, got 0'):
        with resumable(tmp_path/'run', every=0): pass


def test_a_loader_whose_order_cannot_be_gone_on_with_is_refused(tmp_path):
    learn = learner(256)
    learn.dls.loaders[0] = torch.utils.data.DataLoader(learn.dls.train_ds, 64, shuffle=True)
    with pytest.raises(ValueError, match='resumable: a DataLoader draws its order anew.*give the data to `as_dataloaders`'):
        with resumable(tmp_path/'run'): learn.fit(1)


def test_writing_takes_a_bounded_share_of_the_time(tmp_path, monkeypatch):
    "With a clock of our own: a batch takes 1 s, writing 2 s: a checkpoint every 40 batches is 5 %."
    now, saves = [0.], []
    monkeypatch.setattr('fastrecipes.training.resume.time', type('Clock', (), dict(monotonic=lambda: now[0])))
    def write(file, state): now[0] += 2; saves.append(state['place'])
    monkeypatch.setattr('fastrecipes.training.resume._write', write)
    class Tick(Callback):
        def after_batch(self): now[0] += 1
    learn = learner(1024, bs=8)
    with resumable(tmp_path/'run'): learn.fit(1, 1e-4, cbs=Tick())
    batches = [b for _, e, b in saves if e == 0 and b]
    assert batches == [1, 42, 83, 124]
