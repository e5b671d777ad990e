"""Beyond pictures of one class: on every kind of Learner a technique works, or refuses in a sentence before it changes anything.

`WORKS` says by hand what must not refuse; whatever else is registered may do either."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat, RegressionBlock, nn
from fastai.data.block import DataBlock, MultiCategoryBlock
from fastai.metrics import accuracy, accuracy_multi, mae
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.vision.data import ImageBlock, MaskBlock, PointBlock
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fastrecipes.data.keyed import keyed
from fastrecipes.data.loaders import as_dataloaders
from fastrecipes.errors import UserError

from .conftest import NAMES, TECHNIQUES, arguments, refusal
from .test_2_loss import Batches

N, TRAIN, BS, SIDE = 40, 24, 8, 16
rng = np.random.default_rng(0)
PIXELS = rng.integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)
CLASSES = np.arange(N) % 7 % 3                                                      # 10, 7 and 7 of the first 24
SIDES = slice(0, TRAIN), slice(TRAIN, N)


def learner(dls, net, loss_func=None, metrics=()) -> Learner:
    return hushed(Learner(dls, net, loss_func, metrics=metrics))


def hushed(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def pictures(block, targets):
    data = DataBlock((ImageBlock, block), get_x=lambda i: PIXELS[i], get_y=lambda i: targets[i], splitter=lambda items: (list(range(TRAIN)), list(range(TRAIN, N))))
    return data.dataloaders(range(N), bs=BS, num_workers=0, device='cpu')           # text, as users write it


def convolutions(n_out):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, n_out))


def pixelwise(n_out):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, n_out, 1))


def table(y_names, **kwargs):
    r = np.random.default_rng(1)
    df = pd.DataFrame(dict(colour=r.choice(['red', 'green', 'blue'], N), size=r.normal(size=N), weight=r.normal(size=N), kind=np.array(['p', 'q', 'r'])[CLASSES],
                           price=r.normal(size=N).astype(np.float32)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['colour'], cont_names=['size', 'weight'], y_names=y_names,
                                     valid_idx=list(range(TRAIN, N)), bs=BS, num_workers=0, device='cpu', **kwargs)
    torch.manual_seed(0)
    return hushed(tabular_learner(dls, layers=[8], metrics=mae if kwargs else accuracy))


def vectors():
    x, y = (torch.randn(N, d, generator=torch.Generator().manual_seed(d)) for d in (5, 2))
    dls = DataLoaders.from_dsets(*(TensorDataset(x[s], y[s]) for s in SIDES), bs=BS, num_workers=0, device='cpu')
    return learner(dls, nn.Linear(5, 2), MSELossFlat(), mae)


def in_memory(): return [TensorDataset(torch.from_numpy(PIXELS[s]).permute(0, 3, 1, 2)/255, torch.from_numpy(CLASSES[s])) for s in SIDES]


def of_torch():
    train, valid = in_memory()
    return learner(DataLoaders(DataLoader(train, BS, shuffle=True, drop_last=True), DataLoader(valid, BS)), convolutions(3), nn.CrossEntropyLoss(), accuracy)


LABELS = [[c for j, c in enumerate('abc') if i % (j+2) == 0] for i in range(N)]
MASKS = rng.integers(0, 3, (N, SIDE, SIDE)).astype(np.uint8)
KINDS = dict(
    multi_label=lambda: learner(pictures(MultiCategoryBlock, LABELS), convolutions(3), BCEWithLogitsLossFlat(), accuracy_multi),
    regression=lambda: learner(pictures(RegressionBlock(1), np.linspace(0, 1, N, dtype=np.float32)), convolutions(1), MSELossFlat(), mae),
    several_outputs=lambda: learner(pictures(RegressionBlock(3), rng.random((N, 3)).astype(np.float32)), convolutions(3), MSELossFlat(), mae),
    points=lambda: learner(pictures(PointBlock, [SIDE*rng.random((2, 2)).astype(np.float32) for _ in range(N)]), convolutions(4), MSELossFlat()),
    vectors=vectors,
    segmentation=lambda: learner(pictures(MaskBlock(['sky', 'road', 'car']), list(MASKS)), pixelwise(3), CrossEntropyLossFlat(axis=1)),
    table=lambda: table('kind'),
    table_of_prices=lambda: table('price', y_block=RegressionBlock()),
    torch_loaders=of_torch,
    as_dataloaders=lambda: learner(as_dataloaders(in_memory(), bs=BS), convolutions(3), metrics=accuracy))

ANYWHERE = 'dropout early_stop grad_accum grad_clip prune to_bf16 to_fp16 to_fp32 to_parallel weight_decay weight_penalty'.split()
PICTURES = 'activation augment coordconv cutmix cutout dropconnect initialize mixup norm self_attention'.split()
OF_CLASSES = 'class_weights distill label_smoothing logit_adjustment loss'.split()
WORKS = dict(multi_label=[*PICTURES, 'loss'], regression=PICTURES, several_outputs=PICTURES, points=PICTURES, vectors=['mixup'],
             segmentation=[*PICTURES, 'distill', 'label_smoothing', 'loss'], table=[*OF_CLASSES, 'activation', 'balance', 'dropconnect', 'norm'],
             table_of_prices=['activation', 'initialize'], torch_loaders=[*OF_CLASSES, 'cutmix', 'cutout', 'mixup'], as_dataloaders=NAMES)


def trace(learn):
    "All that a refusal must leave alone."
    return (list(learn.cbs), learn.dls, [*learn.dls.loaders], learn.loss_func, list(learn.__dict__.get('techniques') or ()), [type(m) for m in learn.model.modules()],
            [(p.requires_grad, p.detach().clone().tolist()) for p in learn.model.parameters()], [len(m._forward_hooks) for m in learn.model.modules()], torch.get_rng_state().tolist())


def own_loss(learn) -> float:
    "The mean over all validation samples of the loss that the Learner was made with."
    total = n = 0
    learn.model.eval()
    for *xb, yb in learn.dls.valid:
        with torch.no_grad(): total, n = total + float(learn.loss_func(learn.model(*xb), yb))*len(yb), n + len(yb)
    return total/n


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('kind', KINDS)
def test_a_technique_works_or_refuses_in_a_sentence_and_leaves_no_trace(kind, name):
    learn = KINDS[kind]()
    given, before = arguments(name, learn), trace(learn)
    try: learn.use(**{name: given})
    except UserError as e:
        assert name not in [*ANYWHERE, *WORKS[kind]], e
        assert str(e).startswith(f'{name}: ') and '; ' in str(e) and len(str(e)) > 60   # who, why, and what instead
        assert trace(learn) == before
        return
    weights = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1, 1e-2)
    assert len(learn.recorder.losses) >= 2 and all(math.isfinite(v) for v in learn.recorder.values[-1])
    assert any(not torch.equal(p, w) for p, w in zip(learn.model.parameters(), weights)) and learn.techniques[name].effect
    if 'inference' not in TECHNIQUES[name].touches: assert learn.recorder.values[-1][1] == pytest.approx(own_loss(learn), rel=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_all_that_work_train_together(kind):
    learn, names = KINDS[kind](), []
    for n in [*ANYWHERE, *WORKS[kind]]:
        if n not in names and n != 'to_fp32' and not any(refusal(n, other) for other in names): names.append(n)
    learn.use(**{n: arguments(n, learn) for n in names})
    learn.fit(2, 1e-2)
    assert all(math.isfinite(v) for v in learn.recorder.values[-1]) and all(learn.techniques[n].effect for n in names)


# what works is right: a first batch against torch's own loss of it

def first_loss(learn):
    "Of the first batch: the loss that was differentiated, what the network answered, the targets, who was mixed with whom."
    learn.fit(1, 0., cbs=(seen := Batches()))
    x, y, partner, share = seen.seen[0]
    return float(seen.losses[0]), *(o.as_subclass(torch.Tensor) for o in (seen.before.train()(x), y)), partner, share


W = [2., 1., .5]


def test_weights_and_smoothing_of_masks_are_those_of_torch():
    loss, pred, y, *_ = first_loss(KINDS['segmentation']().class_weights(W).label_smoothing(.1))
    assert loss == pytest.approx(float(F.cross_entropy(pred, y, torch.tensor(W), label_smoothing=.1)), rel=1e-5)


def test_blended_masks_are_soft_targets():
    loss, pred, y, partner, share = first_loss(KINDS['segmentation']().mixup(1.))
    soft = torch.zeros_like(pred)
    for i in range(BS):
        for c in range(3): soft[i, c] = share[i]*(y[i] == c) + (1-share[i])*(y[partner[i]] == c)
    assert loss == pytest.approx(float(F.cross_entropy(pred, soft)), rel=1e-5)


@pytest.mark.parametrize('kind, loss_func', [('multi_label', F.binary_cross_entropy_with_logits), ('several_outputs', F.mse_loss)])
@pytest.mark.parametrize('name', ['mixup', 'cutmix'])
def test_targets_that_are_numbers_are_blended(kind, loss_func, name):
    loss, pred, y, partner, share = first_loss(KINDS[kind]().use(**{name: 1.}))
    assert loss == pytest.approx(float(loss_func(pred, share[:, None]*y + (1-share[:, None])*y[partner])), rel=1e-5)


def test_class_weights_of_another_number_than_the_masks_have_classes_are_refused():
    with pytest.raises(ValueError, match='class_weights: one weight for each of the 3 classes, got 2'): KINDS['segmentation']().class_weights([1., 2.])


def test_the_classes_of_a_table_are_balanced():
    learn = KINDS['table']().balance()
    drawn = np.array(learn.dls.train.get_idxs()) % TRAIN
    assert np.bincount(CLASSES[:TRAIN]).tolist() == [10, 7, 7] and np.bincount(CLASSES[drawn]).tolist() == [10, 10, 10]
    assert all(y in range(3) for *_, yb in learn.dls.train for y in yb.flatten())
    assert KINDS['table']().class_weights().objective_cb.class_weight.tolist() == pytest.approx([24/3/10, 24/3/7, 24/3/7])


def test_a_table_is_drawn_with_replacement_in_fastai_and_row_by_row_once_keyed():
    "fastai 2.8.12 loads tables by `TabWeightedDL`, whose weights are equal and whose draws repeat."
    learn = KINDS['table']()
    assert len(set(map(int, learn.dls.train.get_idxs()))) < TRAIN
    keyed(learn)
    assert sorted(learn.dls.train.get_idxs()) == list(range(TRAIN))
    again = keyed(KINDS['table'](), learn.keyed_cb.seed).learn
    for dl in (learn.dls.train, again.dls.train): dl.set_epoch(3)
    assert all(torch.equal(p, q) for a, b in zip(learn.dls.train, again.dls.train) for p, q in zip(a, b))


def test_prices_are_no_classes(): assert_refused(lambda: KINDS['table_of_prices']().balance(), 'balance: each sample must have one class')


def test_a_loss_without_a_form_for_each_sample_cannot_be_mixed():
    def loss_func(pred, target): return F.nll_loss(pred.log_softmax(1), target)
    for name in ('mixup', 'cutmix'):
        learn = learner(as_dataloaders(in_memory(), bs=BS), convolutions(3), loss_func)
        assert_refused(lambda: learn.use(**{name: True}), f'{name}: cannot mix the targets of .*reduction')
        assert not hasattr(learn, 'mix_cb')


def test_a_network_without_layers_to_prune_is_refused():
    learn = learner(as_dataloaders(in_memory(), bs=BS), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768)))
    assert_refused(lambda: learn.prune(), 'prune: the network has no convolution and no linear layer; ')


def assert_refused(f, said):
    with pytest.raises(ValueError, match=said): f()
