"Where the time goes, by a clock that stands still but for what each part says that it takes."
import pytest
import torch
from fastai.basics import Callback, Learner, nn
from fasttransform import ItemTransform

from fastrecipes.errors import BadValue
from fastrecipes.training import profiling as module
from fastrecipes.training.profiling import Profile, Profiled

DATA, FORWARD, LOSS, BACKWARD, STEP, CALLBACK = 11., 5., 2., 3., 7., 13.


@pytest.fixture
def clock(monkeypatch):
    now = [0.]
    monkeypatch.setattr(module.time, 'perf_counter', lambda: now[0])
    return now


@pytest.fixture
def slow(toy, clock):
    "A Learner of which each part moves the clock by its own number of seconds."
    def takes(seconds): clock[0] += seconds

    class Back(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g):
            takes(BACKWARD)
            return g

    class Net(nn.Linear):
        def forward(self, x):
            takes(FORWARD)
            return Back.apply(super().forward(x))

    class Loss(nn.CrossEntropyLoss):
        def forward(self, p, y):
            takes(LOSS)
            return super().forward(p, y)

    class Slow(Callback):
        order = 5
        def after_batch(self): takes(CALLBACK)

    learn = toy(model=Net(4, 3), loss_func=Loss(), cbs=Slow())
    class Takes(ItemTransform):
        def encodes(self, b):
            takes(DATA)
            return b

    for dl in learn.dls.loaders: dl.after_batch.add(Takes())
    learn.create_opt()
    step = learn.opt.step
    learn.opt.step = lambda *args: (takes(STEP), step(*args))
    return learn


def test_each_part_has_its_own_time(slow):
    "Two epochs of four batches, the first of which is the start; two of four in validation. What was not said to take time takes none."
    found = slow.profile().profile_cb
    slow.fit(2, .1)
    found = found.found
    assert found.batches == dict(train=7, valid=8)
    assert {w: s/7 for w, s in found.parts('train').items()} == pytest.approx(dict(data=DATA, forward=FORWARD, loss=LOSS, backward=BACKWARD, step=STEP, Slow=CALLBACK))
    assert {w: s/8 for w, s in found.parts('valid').items()} == pytest.approx(dict(data=DATA, forward=FORWARD, loss=LOSS, Slow=CALLBACK))
    assert found.start == pytest.approx(DATA+FORWARD+LOSS+BACKWARD+STEP+CALLBACK)
    assert list(found.parts('train'))[:5] == ['data', 'forward', 'loss', 'backward', 'step']


def test_the_table_and_its_words(slow, capsys):
    slow.profile().fit(2, .1)
    said = capsys.readouterr().out
    assert 'training: 7 batches, 41000.00 ms each' in said and 'Slow' in said and f'{CALLBACK/41:6.1%}' in said
    assert 'training waits for data 27% of the time: cache()' in said and 'Slow takes 32% of the training' in said


def test_a_callback_that_validates_in_the_middle_is_charged_for_it(slow, clock):
    class Asks(Callback):
        order = 6
        def after_epoch(self):
            since = clock[0]
            if self.learn.epoch == 0: self.learn.get_preds(inner=True)
            took[0] += clock[0]-since
    took = [0.]
    slow.profile().fit(2, .1, cbs=Asks())
    found = slow.profile_cb.found
    assert sum(s for (_, w), s in found.seconds.items() if w == 'Asks') == pytest.approx(took[0]) and took[0] > 4*(FORWARD+LOSS+CALLBACK)
    assert found.parts('train')['forward'] == pytest.approx(7*FORWARD) and found.parts('valid')['forward'] == pytest.approx(8*FORWARD)


def test_nothing_else_changes(toy):
    torch.manual_seed(0)
    plain, watched = toy(), toy().profile()
    plain.fit_one_cycle(2, .1)
    watched.fit_one_cycle(2, .1)
    assert torch.equal(plain.model.weight, watched.model.weight)
    assert [list(r)[:3] for r in plain.recorder.values] == [list(r)[:3] for r in watched.recorder.values]


def test_it_looks_at_fits_alone_and_lets_go(slow):
    slow.profile()
    slow.validate()
    assert slow.profile_cb.found is None and '_watch' not in vars(slow)
    class Dies(Callback):
        def after_pred(self): raise RuntimeError('here')
    with pytest.raises(RuntimeError): slow.fit(1, .1, cbs=Dies())
    assert '_watch' not in vars(slow)
    slow.fit(1, .1)
    assert slow.profile_cb.found.batches['train'] == 3


def test_busy_is_the_share_of_the_cores(slow, clock, monkeypatch):
    monkeypatch.setattr(module.time, 'process_time', lambda: clock[0]*1.5)
    monkeypatch.setattr(module.os, 'cpu_count', lambda: 2)
    slow.profile().fit(1, .1)
    assert slow.profile_cb.found.busy == pytest.approx(.75) and 'cores busy 75% of the time' in str(slow.profile_cb.found)


def test_a_gpu_that_has_too_little_to_do():
    found = Profiled()
    found.device, found.busy, found.batches['train'], found.seconds['train', 'forward'] = 'cuda:0', .4, 1, 1.
    assert found.words == ['the GPU was at work 40% of the time: larger batches, to_bf16() and compile() give it more to do at once']
    found.busy = .9
    assert found.words == []


def test_a_gpu_is_waited_for_and_looked_at(slow, clock, monkeypatch):
    "With stand-ins for what only a GPU has: it waits before each look at the clock, and asks how busy it is at most twice a second."
    waits, asked = [], []
    monkeypatch.setattr(module, 'device_of', lambda learn: torch.device('cuda', 0))
    monkeypatch.setattr(module.torch.cuda, 'synchronize', lambda *a: waits.append(clock[0]))
    monkeypatch.setattr(module.torch.cuda, 'utilization', lambda device: asked.append(device) or 40)
    slow.profile().fit(1, .1)
    assert slow.profile_cb.found.busy == pytest.approx(.4) and 'the GPU was at work 40%' in str(slow.profile_cb.found)
    assert len(asked) == 8 and len(waits) > 50


def test_without_the_package_that_asks_the_gpu(slow, monkeypatch):
    def missing(device): raise ModuleNotFoundError('pynvml')
    monkeypatch.setattr(module, 'device_of', lambda learn: torch.device('cuda', 0))
    monkeypatch.setattr(module.torch.cuda, 'synchronize', lambda *a: None)
    monkeypatch.setattr(module.torch.cuda, 'utilization', missing)
    slow.profile().fit(1, .1)
    assert slow.profile_cb.found.busy is None


def test_the_plot_is_of_these_numbers(slow):
    slow.profile().fit(2, .1)
    ax = slow.profile_cb.found.plot().axes[0]
    bars = {c.get_label(): [b.get_width() for b in c] for c in ax.containers}
    assert bars['forward'] == pytest.approx([8*FORWARD, 7*FORWARD]) and bars['step'] == pytest.approx([0, 7*STEP])
    assert sum(w for bar in bars.values() for w in bar) == pytest.approx(slow.profile_cb.found.total)


def test_a_fit_of_one_batch_says_so(toy, capsys):
    toy(n=16).profile().fit(1, .1)
    assert 'a fit of one batch' in capsys.readouterr().out


def test_it_needs_the_mends(toy, monkeypatch):
    monkeypatch.setattr(module, 'REPAIRS', False)
    with pytest.raises(BadValue, match='FASTRECIPES_REPAIRS'): toy().profile()


def test_it_is_reached_and_replaced(toy):
    learn = toy().profile().profile()
    assert isinstance(learn, Learner) and sum(type(cb) is Profile for cb in learn.cbs) == 1
