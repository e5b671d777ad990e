"""The contract that every registered technique keeps, one module a clause, driven by the registry.

The Learner: scikit-learn's digits in memory, imbalanced, 16×16 px, a small network without batch statistics or dropout of its own."""
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, L, Learner, nn, params
from fastai.data.transforms import Normalize
from fastai.layers import ResBlock
from fastai.metrics import accuracy
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.data.loaders import Indexed
from fastrecipes.randomness import forked
from fastrecipes.technique import discover

TECHNIQUES = discover()
NAMES = sorted(TECHNIQUES)


def pictures():
    "Digits `(n, 1, 16, 16)` in [0, 1] with their labels; the classes 5 to 9 come up half as often."
    d = load_digits()
    x, y = torch.tensor(d.images, dtype=torch.float32)[:, None]/16, torch.tensor(d.target)
    kept = [i for i in range(len(y)) if y[i] < 5 or i % 2]
    return nn.functional.interpolate(x[kept], scale_factor=2), y[kept]


X, Y = pictures()


def learner(n=1024, bs=64, seed=0, n_valid=192) -> Learner:
    "A new Learner on the first `n` digits; equal seeds give equal Learners."
    train, valid = (Indexed(TensorDataset(X[s], Y[s]), vocab=range(10)) for s in (slice(0, n), slice(1024, 1024+n_valid)))
    kw = dict(seed=seed, num_workers=0, after_batch=[Normalize.from_stats([.5], [.5], cuda=False)])
    dls = DataLoaders(KeyedDL(train, bs, shuffle=True, drop_last=True, **kw), KeyedDL(valid, bs, **kw), device=torch.device('cpu'))
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
                        nn.Flatten(), nn.Linear(512, 10))
    learn = Learner(dls, net, CrossEntropyLossFlat(), metrics=accuracy)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    keyed(learn, seed)
    return learn


def residual(learn: Learner):
    "A residual block behind the first activation, for what acts on nothing else."
    net = learn.model
    at = next((i for i, m in enumerate(net) if isinstance(m, nn.ReLU)), None) if isinstance(net, nn.Sequential) else None
    if at is None or any(isinstance(m, ResBlock) for m in net): return
    c = net[at-1].out_channels
    with forked('residual'): net.insert(at+1, ResBlock(1, c, c, norm_type=None))
    learn.opt = None


def frozen(learn: Learner, norm: bool = False):
    "The first convolution frozen, behind a batch norm of the inputs if `norm`: for what acts on frozen layers only."
    net = learn.model
    if not isinstance(net, nn.Sequential) or not any(isinstance(m, nn.Conv2d) for m in net[:2]): return
    if norm and isinstance(net[0], nn.Conv2d): net.insert(0, nn.BatchNorm2d(net[0].in_channels))
    learn.splitter = lambda m: L(params(m[:first]), params(m[first:]))
    first = next(i for i, m in enumerate(net) if isinstance(m, nn.Conv2d)) + 1
    learn.opt = None
    learn.freeze()


def arguments(name: str, learn: Learner) -> dict:
    "What a technique is called with: the example of its record where it has one, else its defaults."
    if name == 'stochastic_depth': residual(learn)
    if name == 'initialize' and not all(p.requires_grad for p in learn.model.parameters()): return dict(layers='last')
    if name in ('freeze_bn', 'precompute'): frozen(learn, norm=name == 'freeze_bn')
    example = TECHNIQUES[name].example
    return example(learn) if callable(example) else dict(example or {})


def use(learn: Learner, *names) -> Learner: return learn.use(**{n: arguments(n, learn) for n in names})


def refusal(*names) -> str | None:
    "The sentence by which one of two techniques refuses the other."
    return next((why for a, b in (names, names[::-1]) if (why := TECHNIQUES[a].refuses.get(b))), None)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "On networks this small a second thread costs more than it gives, thirty times more where something else wants the core."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def quiet(recwarn): yield
