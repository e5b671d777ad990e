"Each metric against scikit-learn, a closed form or a sum by hand, over the whole set, for any size of batches and in two processes."
import math
import os
import pickle
import socket
import warnings
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as skm
import torch
from accelerate import PartialState
from fastai.basics import (BCELossFlat, BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, DataLoaders, Learner, Metric, MSELossFlat,
                           load_learner, nn)
from fastai.data.block import DataBlock
from fastai.learner import mk_metric
from fastai.metrics import BrierScore, Dice, DiceMulti, F1Score, RocAuc, accuracy, rmse
from fastai.vision.data import ImageBlock, MaskBlock
from sklearn.calibration import calibration_curve
from torch.utils.data import TensorDataset

from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import Indexed
from fastrecipes.metrics.counted import OVERLAPS
from fastrecipes.metrics.kinds import METRICS, metric
from fastrecipes.metrics.regression import ERRORS
from fastrecipes.technique import discover
from fastrecipes.training.state import state_of
from fastrecipes.training.stopping import cost

discover()
N = 61                                          # no batch of 7 divides it
rng = np.random.default_rng(0)


def normal(*shape): return torch.tensor(rng.normal(size=shape)*2, dtype=torch.float32)


def whole(*shape, c): return torch.tensor(rng.integers(0, c, shape))


def void(y):
    y = y.clone()
    y[rng.random(y.shape) < .2] = 255
    return y


# kind of targets → outputs, targets, the Learner's loss
DATA = dict(two=(normal(N, 2), whole(N, c=2), CrossEntropyLossFlat()),
            three=(normal(N, 3), whole(N, c=3), nn.CrossEntropyLoss()),
            rows=(normal(N, 3), whole(N, 1, c=3), CrossEntropyLossFlat()),                          # as tables have them
            words=(normal(N, 5, 3), whole(N, 5, c=3), CrossEntropyLossFlat(axis=-1)),               # the classes last
            masks=(normal(N, 3, 4, 6), void(whole(N, 4, 6, c=3)), CrossEntropyLossFlat(axis=1, ignore_index=255)),
            labels=(normal(N, 4), whole(N, 4, c=2).float(), BCEWithLogitsLossFlat()),
            one=(normal(N, 1), whole(N, 1, c=2).float(), BCEWithLogitsLossFlat()),
            sure=(normal(N, 1).sigmoid(), whole(N, 1, c=2).float(), BCELossFlat()),                 # probabilities, by its loss
            numbers=(normal(N, 2), normal(N, 2), MSELossFlat()))
CLASSES = [k for k in DATA if k != 'numbers']


def flat(kind):
    "Outputs in 64 bits, classes last, a row for each target that counts; and the targets."
    z, y, _ = DATA[kind]
    z, y = z.double(), y.numpy()
    if kind == 'masks':
        z, kept = z.movedim(1, -1).reshape(-1, 3), y.flatten() != 255
        return z[kept], y.flatten()[kept].astype(int)
    if kind in ('labels', 'numbers'): return z, y
    return z.reshape(-1, z.shape[-1]), y.flatten().astype(int)


def probabilities(kind):
    z, _ = flat(kind)
    if kind == 'labels': return z.sigmoid().numpy()
    if kind in ('one', 'sure'): return np.concatenate([1-(p := (z.sigmoid() if kind == 'one' else z).numpy()), p], 1)
    return z.softmax(-1).numpy()


def answers(kind):
    p = probabilities(kind)
    return (p > .5).astype(int) if kind == 'labels' else p.argmax(1)


def ece(confidence, right, bins):
    "By scikit-learn's reliability curve, and a histogram for the numbers of its bins, which are those that are not empty."
    shares, means = calibration_curve(right, confidence, n_bins=bins, strategy='uniform')
    n = np.histogram(-confidence, -np.linspace(0, 1, bins+1)[::-1])[0][::-1]       # (a, b], as the paper has them
    return float((n[n > 0]*np.abs(shares-means)).sum()/len(confidence))


def expected(name, kind, **settings):
    "What scikit-learn makes of the whole set at once."
    z, y = flat(kind)
    if name in ERRORS:
        p = z.numpy()
        return dict(mbe=(y-p).mean(), mae=skm.mean_absolute_error(y, p), mse=skm.mean_squared_error(y, p), mape=skm.mean_absolute_percentage_error(y, p),
                    rmse=skm.root_mean_squared_error(y.ravel(), p.ravel()), mspe=np.mean(((y-p)/y)**2), rmspe=np.sqrt(np.mean(((y-p)/y)**2)))[name]
    labels, p, a = kind == 'labels', probabilities(kind), answers(kind)
    if name == 'accuracy': return (1-skm.hamming_loss(y, a)) if labels and not settings.get('subset') else skm.accuracy_score(y, a)
    if name == 'balanced_accuracy':
        return np.mean([skm.balanced_accuracy_score(y[:, k], a[:, k]) for k in range(4)]) if labels else skm.balanced_accuracy_score(y, a)
    if name in OVERLAPS:
        f = dict(precision=skm.precision_score, recall=skm.recall_score, f1=skm.f1_score, dice=skm.f1_score, iou=skm.jaccard_score)[name]
        return f(y, a, **{'average': 'binary' if p.shape[1] == 2 else 'macro', **settings})
    if name == 'roc_auc': return skm.roc_auc_score(y, p[:, 1] if p.shape[1] == 2 else p, **{**({} if labels else dict(multi_class='ovr')), **settings})
    if name == 'log_loss': return np.mean([skm.log_loss(y[:, k], p[:, k]) for k in range(4)]) if labels else skm.log_loss(y, p)
    if name == 'brier' and labels: return np.mean([skm.brier_score_loss(y[:, k], p[:, k]) for k in range(4)])
    if name == 'brier': return skm.brier_score_loss(y, p[:, 1] if p.shape[1] == 2 else p)
    if labels: return ece(p.ravel(), y.ravel().astype(int), settings.get('bins', 15))
    return ece(p.max(1), p.argmax(1) == y, settings.get('bins', 15))


SETTINGS = [*((name, kind, {}) for name in METRICS for kind in (['numbers'] if name in ERRORS else CLASSES)),
            *((name, kind, dict(average=a)) for name in OVERLAPS for kind in ('three', 'masks', 'labels') for a in ('macro', 'micro', 'weighted')),
            *((name, 'two', dict(average=a)) for name in OVERLAPS for a in ('macro', 'weighted')),
            ('accuracy', 'labels', dict(subset=True)), ('roc_auc', 'labels', dict(average='weighted')),
            *(('roc_auc', 'three', dict(multi_class=m, average=a)) for m in ('ovr', 'ovo') for a in ('macro', 'weighted')),
            *(('calibration_error', kind, dict(bins=b)) for kind in ('three', 'labels') for b in (1, 7))]


class Answers(nn.Module):
    "A network that answers what it is given."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
    def forward(self, x): return x*self.weight


def learner(z, y, loss_func=None, metrics=(), bs=7, vocab=()) -> Learner:
    "A Learner whose network answers the rows of `z`, to be validated on all of them, trained on the first 8."
    ds, first = (Indexed(TensorDataset(z[s], y[s]), vocab=vocab) for s in (slice(None), slice(8)))
    dls = DataLoaders(KeyedDL(first, 4, seed=0, num_workers=0, shuffle=True), KeyedDL(ds, bs, seed=0, num_workers=0), device=torch.device('cpu'))
    learn = Learner(dls, Answers(), loss_func or CrossEntropyLossFlat(), metrics=list(metrics))
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def reported(kind, named, bs, processes=1) -> list[float]:
    "What `validate` says of the metrics `named`, (name, settings)."
    learn = learner(*DATA[kind], [metric(n, **{**s, 'name': f'{n}_{i}'}) for i, (n, s) in enumerate(named)], bs)
    if processes > 1: learn.to_distributed(timeout=60)
    return list(learn.validate())[1:]


def asked(kind): return [(n, s) for n, k, s in SETTINGS if k == kind]


@pytest.mark.parametrize('bs', [1, 7, N])
@pytest.mark.parametrize('kind', DATA)
def test_each_metric_is_that_of_the_whole_set_whatever_the_batch_size(kind, bs):
    for (name, settings), got in zip(asked(kind), reported(kind, asked(kind), bs), strict=True):
        assert got == pytest.approx(expected(name, kind, **settings), rel=2e-6, abs=1e-7), (name, settings)


def one_of_two(rank, port, folder):
    "What one of two processes reports, all metrics in one start."
    torch.set_num_threads(1)
    PartialState._reset_state()
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    Path(folder, str(rank)).write_bytes(pickle.dumps({kind: reported(kind, asked(kind), 4, processes=2) for kind in DATA}))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "Two copies of this process, which need not import anything again; validation has no gradients, whose threads a copy would lack."
    folder = tmp_path_factory.mktemp('two')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    started = [get_context('fork').Process(target=one_of_two, args=(rank, port, folder)) for rank in (0, 1)]
    for p in started: p.start()
    for p in started: p.join(60)
    assert [p.exitcode for p in started] == [0, 0]
    return [pickle.loads((folder/str(rank)).read_bytes()) for rank in (0, 1)]


@pytest.mark.parametrize('kind', DATA)
def test_two_processes_report_what_one_does(kind, ranks):
    "61 samples in batches of 2·4: the last one does not divide."
    assert ranks[0][kind] == ranks[1][kind] and len(ranks[0][kind]) == len(asked(kind))
    for (name, settings), got in zip(asked(kind), ranks[0][kind]):
        assert got == pytest.approx(expected(name, kind, **settings), rel=2e-6, abs=1e-7), (name, settings)


# the source's example

def test_five_diseased_and_twenty_normal_all_taken_for_normal():
    "Accuracy 80 %, and F1 .889, hide that no diseased one is found; F1 of the diseased, recall and balanced accuracy do not."
    z, y = torch.tensor([[-1., 1.]]*25), torch.tensor([0]*5 + [1]*20)
    learn = learner(z, y, vocab=['diseased', 'normal'], metrics=[
        metric('accuracy'), metric('f1', pos_label='normal'), metric('f1', pos_label='diseased'), metric('f1'), metric('f1', average='macro'),
        metric('recall', pos_label='diseased'), metric('balanced_accuracy'), metric('precision'), metric('iou')])
    got = dict(zip(learn.metrics.attrgot('name'), list(learn.validate())[1:]))
    assert got == pytest.approx(dict(accuracy=.8, f1_normal=2*20/(2*20+5), f1_diseased=0., f1=8/9, f1_macro=4/9,
                                     recall_diseased=0., balanced_accuracy=.5, precision=.8, iou=.8))
    assert round(got['f1_normal'], 3) == .889


# closed forms

def test_dice_and_iou_of_masks_by_counting_pixels():
    "4 pixels of road there, 3 answered, 2 of them right: Dice 4/7, IoU 2/5; a pixel that is skipped has no part."
    truth = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 255]])
    answer = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    z = nn.functional.one_hot(answer, 2).movedim(-1, 0).float()
    for name, value in (('dice', 4/7), ('iou', 2/5), ('precision', 2/3), ('recall', 2/4), ('accuracy', 5/8)):
        assert metric(name, ignore_index=255)(z[None], truth[None]) == pytest.approx(value)
        assert metric(name, ignore_index=255)((z[1]-z[0])[None, None], truth[None, None]) == pytest.approx(value)      # the same, one output a pixel


def test_bias_shows_in_which_direction_predictions_are_off():
    pred, y = torch.tensor([1., 2., 3.]), torch.tensor([2., 4., 3.])
    got = {n: metric(n)(pred, y) for n in ERRORS}
    assert got == pytest.approx(dict(mbe=1., mae=1., mse=5/3, rmse=math.sqrt(5/3), mape=1/3, mspe=1/6, rmspe=math.sqrt(1/6)))
    assert metric('mbe')(y, pred) == -1.


def test_a_target_near_0_is_taken_for_the_floor():
    pred, y = torch.tensor([.5, -2.]), torch.tensor([0., -4.])
    assert metric('mape', floor=.25)(pred, y) == pytest.approx((2 + .5)/2) and metric('rmspe', floor=.25)(pred, y) == pytest.approx(math.sqrt((4 + .25)/2))


def test_area_under_the_curve_is_the_share_of_pairs_in_order_ties_half():
    z, y = torch.tensor([0., 1., 1., 2., 3.]), torch.tensor([0, 0, 1, 1, 0])           # pairs in order: 1>0, 1=1, 2>0, 2>1; 1<3 and 2<3 are not
    assert metric('roc_auc')(z, y) == pytest.approx(3.5/6)
    assert metric('roc_auc')(torch.stack([torch.zeros(5), z], 1), y) == pytest.approx(3.5/6)
    assert metric('roc_auc', pos_label=0)(torch.stack([torch.zeros(5), z], 1), y) == pytest.approx(3.5/6)
    assert metric('roc_auc', pos_label=1)(torch.stack([torch.zeros(5), z, torch.full((5,), -9.)], 1), y) == pytest.approx(3.5/6, abs=1e-3)


def test_scores_of_a_sure_network_do_not_tie():
    "In 32 bits the probabilities of 20 and 25 are both 1."
    z = torch.tensor([20., 25., 30., 35.])
    for s in (z, torch.stack([torch.zeros(4), z], 1)): assert metric('roc_auc')(s, torch.tensor([0, 1, 0, 1])) == pytest.approx(.75)
    assert metric('roc_auc')(torch.stack([torch.zeros(4), z, torch.full((4,), -99.)], 1), torch.tensor([0, 1, 0, 1])) == pytest.approx(.75)


def test_log_loss_of_saturated_logits_is_exact_where_probabilities_have_a_floor():
    assert metric('log_loss')(torch.tensor([[0., 300.]]), torch.tensor([0])) == pytest.approx(300)
    assert metric('log_loss')(torch.tensor([[0., 300.]], dtype=torch.float16), torch.tensor([0])) == pytest.approx(300)
    assert metric('log_loss', logits=False)(torch.tensor([[0., 1.]]), torch.tensor([0])) == pytest.approx(-math.log(np.finfo(np.float32).eps))


def test_calibration_by_hand():
    "Bins of a half: confidence .6 and .8 are right in one of two, (.7−.5); .5 lies in the first bin, and is right, (1−.5)."
    p = torch.tensor([[.6, .4], [.2, .8], [.5, .5]])
    assert metric('calibration_error', bins=2, logits=False)(p, torch.tensor([0, 0, 0])) == pytest.approx((2*.2 + 1*.5)/3)
    assert metric('calibration_error', bins=1, logits=False)(p, torch.tensor([0, 0, 0])) == pytest.approx(abs((.6+.8+.5) - 2)/3)


def test_calibration_is_biased_by_chance_as_its_card_says():
    "Of 1,000 samples that are right as often as is said: the mean of |share − p| is √(2·p(1−p)/(π·n)), over 15 bins √15 as much."
    g = np.random.default_rng(1)
    def shown(bins, p):
        p = torch.tensor(np.resize(p, (500, 2)))
        return np.mean([metric('calibration_error', bins=bins, logits=False)(p, torch.tensor(g.random(p.shape) < p.numpy())) for _ in range(200)])
    def chance(n, p): return math.sqrt(2*p*(1-p)/(math.pi*n))
    assert chance(1000, .9) == pytest.approx(.008, abs=5e-4) and chance(1000/15, .9) == pytest.approx(.03, abs=1e-3)        # the card
    centres = (np.arange(15)+.5)/15
    assert shown(1, .9) == pytest.approx(chance(1000, .9), rel=.1)
    assert shown(15, centres) == pytest.approx(np.mean([chance(1000/15, p) for p in centres]), rel=.1)


# what cannot be computed

def test_one_class_alone_is_not_a_number_and_says_so_and_the_fit_goes_on(capsys):
    learn = learner(normal(N, 2), torch.zeros(N, dtype=torch.long), metrics=[metric('roc_auc'), metric('precision'), metric('balanced_accuracy')])
    learn.fit(2)
    assert len(learn.recorder.values) == 2 and math.isnan(learn.recorder.values[-1][2])
    said = 'roc_auc: the 61 targets are all on one side, and there is nothing to rank them against; it is not a number\n'
    assert capsys.readouterr().out == said                                          # once


def test_outputs_that_are_not_finite_are_not_a_number(capsys):
    z = torch.tensor([[0., float('nan')], [1., 0.]])
    for name in ('roc_auc', 'log_loss', 'brier', 'calibration_error'): assert math.isnan(metric(name)(z, torch.tensor([0, 1])))
    assert 'not finite' in capsys.readouterr().out


def test_classes_that_do_not_occur_are_left_out():
    z, y = DATA['three'][0], DATA['three'][1] % 2
    p = z.double().softmax(-1).numpy()
    assert metric('roc_auc')(z, y) == pytest.approx(np.mean([skm.roc_auc_score(y == k, p[:, k]) for k in (0, 1)]))
    assert metric('roc_auc', multi_class='ovo')(z, y) == pytest.approx(np.mean([skm.roc_auc_score(y == k, p[:, k]) for k in (0, 1)]))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert metric('balanced_accuracy')(z, y) == pytest.approx(skm.balanced_accuracy_score(y, z.argmax(1)))
    few = torch.tensor([[9., 0., 0.], [0., 9., 0.]])                                # the third class is neither there nor answered
    assert metric('f1')(few, torch.tensor([0, 0])) == pytest.approx(skm.f1_score([0, 0], [0, 1], average='macro')) == pytest.approx(1/3)


@pytest.mark.parametrize('name', OVERLAPS)
@pytest.mark.parametrize('zero', [0., 1., math.nan])
def test_nothing_of_nothing_is_what_zero_division_says(name, zero):
    none = torch.tensor([[9., 0.], [9., 0.]]), torch.tensor([0, 0])                # class 1 is neither there nor answered
    assert metric(name, zero_division=zero)(*none) == pytest.approx(zero, nan_ok=True)
    labels = torch.tensor([[9., -9.], [9., -9.]]), torch.tensor([[1, 0], [1, 0]])
    assert metric(name, zero_division=zero)(*labels) == pytest.approx(1 if math.isnan(zero) else (1+zero)/2)


@pytest.mark.parametrize('name', METRICS)
def test_nothing_to_judge_is_not_a_number(name):
    assert math.isnan(metric(name).value)
    if name not in ERRORS: assert math.isnan(metric(name)(torch.randn(3, 2), torch.full((3,), -100)))


# classes by name or number

def test_classes_are_named_by_words_numbers_and_sets_of_them():
    z, y, loss = DATA['masks']
    zs, ys = flat('masks')
    a = zs.argmax(1).numpy()
    learn = learner(z, y, loss, vocab=['sky', 'road', 'car'], metrics=[
        metric('iou', pos_label='car'), metric('iou', labels=['road', 'car']), metric('iou', pos_label=0), metric('roc_auc', pos_label='road')])
    assert learn.metrics.attrgot('name') == ['iou_car', 'iou', 'iou_0', 'roc_auc_road']
    each = skm.jaccard_score(ys, a, average=None)
    assert list(learn.validate())[1:] == pytest.approx([each[2], each[1:].mean(), each[0], skm.roc_auc_score(ys == 1, zs.softmax(1)[:, 1])])


def test_the_words_of_masks_are_those_of_their_block():
    pixels, masks = rng.integers(0, 256, (8, 6, 6, 3), dtype=np.uint8), rng.integers(0, 3, (8, 6, 6), dtype=np.uint8)
    data = DataBlock((ImageBlock, MaskBlock(['sky', 'road', 'car'])), get_x=lambda i: pixels[i], get_y=lambda i: masks[i], splitter=lambda items: ([0, 1], [*range(2, 8)]))
    dls = data.dataloaders(range(8), bs=2, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Conv2d(3, 3, 1), CrossEntropyLossFlat(axis=1), metrics=[metric('iou', pos_label='car'), metric('accuracy')])
    learn.remove_cb(learn.progress)
    p, y = learn.get_preds()
    a = p.argmax(1).flatten()
    assert list(learn.validate())[1:] == pytest.approx([skm.jaccard_score(y.flatten(), a, labels=[2], average='macro'), skm.accuracy_score(y.flatten(), a)])


def test_labels_are_averaged_over_those_that_are_named():
    z, y, _ = DATA['labels']
    each = skm.f1_score(y, answers('labels'), average=None)
    assert metric('f1', labels=[1, 3])(z, y) == pytest.approx(each[[1, 3]].mean()) and metric('f1', pos_label=2)(z, y) == pytest.approx(each[2])
    assert metric('precision', thresh=.9)(z, y) == pytest.approx(skm.precision_score(y, z.double().sigmoid() > .9, average='macro'))


def test_labels_that_are_skipped_have_no_part():
    z, y, _ = DATA['labels']
    skipped = y.clone()
    skipped[::3, 1] = -1
    kept = skipped[:, 1] != -1
    for name, f in (('f1', skm.f1_score), ('balanced_accuracy', skm.balanced_accuracy_score), ('roc_auc', None), ('log_loss', None)):
        p = z.double().sigmoid().numpy()
        if f: each = [f(*(o[kept] if k == 1 else o for o in (y[:, k], p[:, k] > .5))) for k in range(4)]
        elif name == 'roc_auc': each = [skm.roc_auc_score(*(o[kept] if k == 1 else o for o in (y[:, k], p[:, k]))) for k in range(4)]
        else: each = [skm.log_loss((y.numpy()*np.ones(4))[skipped != -1].ravel(), p[skipped != -1].ravel())]
        assert metric(name, ignore_index=-1)(z, skipped) == pytest.approx(np.mean(each), rel=1e-6), name
    right = (answers('labels') == y.numpy()) | (skipped.numpy() == -1)
    assert metric('accuracy', ignore_index=-1)(z, skipped) == pytest.approx(right[skipped != -1].mean())
    assert metric('accuracy', ignore_index=-1, subset=True)(z, skipped) == pytest.approx(right.all(1).mean())


# refusals

@pytest.mark.parametrize('name, settings, said', [
    ('auc', {}, r"metric: no metric named 'auc'; did you mean 'roc_auc'\? There are accuracy"), ('f1_score', {}, r"'f1_score'\. There are"),
    ('balanced_acuracy', {}, "did you mean 'balanced_accuracy'"), ('f1', dict(averge='macro'), "f1: no argument 'averge'; did you mean 'average'"),
    ('mae', dict(axis=1), "mae: no argument 'axis'"), ('f1', dict(axis='1'), 'axis must be a whole number'), ('f1', dict(average=3), "must be 'auto' or"),
    ('f1', dict(average='makro'), "f1: average must be one of auto, macro, micro, weighted, got 'makro'; did you mean 'macro'"),
    ('f1', dict(thresh=1.), r'thresh must be in \(0, 1\), got 1.0'), ('f1', dict(zero_division=.5), 'zero_division must be 0, 1 or nan, got 0.5'),
    ('f1', dict(pos_label=1, average='macro'), 'pos_label=1 is one class alone, and leaves nothing for average'),
    ('f1', dict(labels=[]), 'labels must name at least one class'), ('roc_auc', dict(average='micro'), 'average must be one of macro, weighted'),
    ('roc_auc', dict(multi_class='ova'), "multi_class must be one of ovr, ovo, got 'ova'; did you mean"),
    ('calibration_error', dict(bins=0), 'bins must be ≥ 1, got 0'), ('mape', dict(floor=0), 'floor must be > 0')])
def test_unknown_names_and_settings_are_refused(name, settings, said):
    with pytest.raises((TypeError, ValueError), match=said): metric(name, **settings)


@pytest.mark.parametrize('name, pred, y, said', [
    ('f1', (4, 3), torch.randn(4), 'f1: targets must be classes 0 to 2'),
    ('f1', (4, 3), torch.tensor([0, 1, 2, 3]), 'targets must be classes 0 to 2, got 3 .*ignore_index=3'),
    ('accuracy', (4, 3), torch.tensor([0, 1]), r'outputs \(4, 3\), targets \(2,\) do not go together'),
    ('iou', (2, 3, 4, 4), torch.zeros(2, 8, 8).long(), 'do not go together'),
    ('roc_auc', (4, 2), torch.rand(4, 2), 'targets shaped as the outputs must be 0 or 1'),
    ('mae', (4, 3), torch.tensor([0, 1, 2, 2]), 'must hold as many numbers'),
    ('f1', (4, 3), [0, 1, 2, 2], 'judges one tensor of outputs by one of targets, got Tensor, list')])
def test_targets_that_cannot_be_judged_are_refused(name, pred, y, said):
    with pytest.raises(ValueError, match=said): metric(name)(torch.zeros(pred), y)


def test_a_class_that_there_is_not_is_refused_before_the_first_batch():
    for m, said in ((metric('f1', pos_label='deseased'), "f1_deseased: the classes are 'diseased', 'normal'; got 'deseased'; did you mean 'diseased'"),
                    (metric('roc_auc', pos_label=2), 'got 2'), (metric('mae'), 'mae: is for numbers, and by CrossEntropyLossFlat these targets are one class a sample')):
        learn = learner(normal(N, 2), whole(N, c=2), vocab=['diseased', 'normal'], metrics=[m]).early_stop('valid_loss')
        with pytest.raises(ValueError, match=said): learn.fit(1)
        assert not getattr(learn.recorder, 'losses', [])


# in a Learner

@pytest.mark.parametrize('name', METRICS)
def test_a_learner_with_it_is_exported_and_validates_as_before(name, tmp_path):
    kind = 'numbers' if name in ERRORS else 'two'
    learn = learner(*DATA[kind], [metric(name)])
    assert learn.metrics.attrgot('name') == [name]
    value = list(learn.validate())[1]
    learn.export(tmp_path/'l.pkl')
    back = load_learner(tmp_path/'l.pkl')
    assert back.metrics[0].name == name and not back.metrics[0].kept
    assert list(back.validate(dl=learn.dls.valid))[1] == value
    assert pickle.loads(pickle.dumps(metric(name))).better == metric(name).better


@pytest.mark.parametrize('name', METRICS)
def test_early_stopping_knows_which_way_is_better(name):
    "Of perfect answers and poor ones it keeps the perfect."
    kind = 'numbers' if name in ERRORS else 'two'
    z, y, loss = DATA[kind]
    perfect = y if kind == 'numbers' else 20*nn.functional.one_hot(y, 2).float()-10
    learn = learner(perfect, y, loss, [metric(name)])
    good = list(learn.validate())[1]
    learn.model.weight.data.fill_(-1.)
    poor = list(learn.validate())[1]
    m = learn.metrics[0]
    assert cost(name, good, [m]) < cost(name, poor, [m]) and good != poor
    if name == 'mbe': assert cost(name, -.1, [m]) < cost(name, .5, [m]) and cost(name, .1, [m]) < cost(name, -.5, [m])
    learn = learner(perfect, y, loss, [metric(name)]).early_stop(name, patience=2)
    class Worsen(Callback):
        order = 0
        def before_validate(self): self.learn.model.weight.data.fill_((1., -1., -1.5, -2.)[self.learn.epoch])
    learn.fit(4, 0., cbs=Worsen())
    assert len(learn.recorder.values) == 3 and learn.model.weight.item() == 1. and learn.early_stop_cb.best == pytest.approx(good)


def test_a_name_tells_what_was_asked_unless_another_is_given():
    ms = [metric('f1'), metric('f1', average='macro'), metric('f1', pos_label='cat'), metric('f1', labels=[0]),
          metric('roc_auc', multi_class='ovo', average='weighted'), metric('mae', name='off by')]
    assert [m.name for m in ms] == ['f1', 'f1_macro', 'f1_cat', 'f1', 'roc_auc_ovo_weighted', 'off by']


def test_counts_of_masks_keep_no_predictions():
    z, y, loss = DATA['masks']
    learn = learner(z, y, loss, [metric(n) for n in METRICS if n not in ERRORS and n != 'roc_auc'])
    learn.validate()
    for m in learn.metrics: assert sum(o.nbytes for o in vars(m).values() if isinstance(o, (np.ndarray, torch.Tensor))) < 500 and not m.kept


def test_a_checkpoint_holds_no_predictions():
    learn = learner(*DATA['two'], [metric('roc_auc'), metric('f1')])
    learn.fit(1)
    auc, f1 = state_of(learn)['metrics']
    assert learn.metrics[0].kept and 'kept' not in auc and f1['n'] == N


def test_training_can_be_judged_too():
    z, y, loss = DATA['three']
    learn = learner(z, y, loss, [metric('f1'), metric('roc_auc')])
    learn.recorder.train_metrics = True
    learn.fit(1, 0.)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['train_f1'] == pytest.approx(skm.f1_score(y[:8], z[:8].argmax(1), average='macro')) and row['valid_f1'] == pytest.approx(expected('f1', 'three'))


# what of fastai 2.8.12 does otherwise, each a defect that these do not have

class Batch:
    def __init__(self, pred, y): self.pred, self.y, self.yb = pred, y, (y,)
    def to_detach(self, b, cpu=True, gather=True): return b


def theirs(m, pred, y):
    (m := mk_metric(m)).reset()
    m.accumulate(Batch(pred, y))
    return m.value


def test_fastais_brier_score_is_the_error_rate_of_answers_not_the_error_of_probabilities():
    z, y, _ = DATA['two']
    assert theirs(BrierScore(), z, y) == pytest.approx((z.argmax(1) != y).float().mean().item()) != metric('brier')(z, y)
    assert metric('brier')(z, y) == pytest.approx(skm.brier_score_loss(y, z.double().softmax(1)[:, 1]), rel=1e-6)


def test_fastais_f1_and_auc_end_a_fit_on_three_classes_or_where_one_is_missing():
    z, y, _ = DATA['three']
    with pytest.raises(ValueError, match='multiclass'): theirs(F1Score(), z, y)
    with pytest.raises(ValueError, match='Number of classes'): theirs(RocAuc(), z, y % 2)
    assert 0 < metric('f1')(z, y) < 1 and 0 < metric('roc_auc')(z, y % 2) < 1


def test_fastais_dice_multiplies_the_numbers_of_classes():
    z, y = DATA['masks'][0], whole(N, 4, 6, c=3)
    right = skm.f1_score(y.flatten(), z.argmax(1).flatten(), average='macro')
    assert abs(theirs(Dice(), z, y)-right) > .2 and metric('dice')(z, y) == pytest.approx(right) == pytest.approx(theirs(DiceMulti(), z, y))


def test_fastais_dice_and_accuracy_count_pixels_that_the_loss_skips():
    z, y, _ = DATA['masks']
    zs, ys = flat('masks')
    assert theirs(DiceMulti(), z, y) < .9*skm.f1_score(ys, zs.argmax(1), average='macro')
    assert theirs(partial(accuracy, axis=1), z, y) < .9*skm.accuracy_score(ys, zs.argmax(1))


def test_fastais_dice_of_nothing_is_none_which_no_history_can_hold():
    z, y = torch.tensor([[9., 0.]]*4), torch.zeros(4, dtype=torch.long)
    assert theirs(Dice(), z, y) is None and metric('dice')(z, y) == 0.


def test_fastais_accuracy_takes_one_output_for_class_0():
    z, y, _ = DATA['one']
    assert theirs(accuracy, z, y.long()) == pytest.approx((y == 0).float().mean().item()) != metric('accuracy')(z, y)


def test_fastais_rmse_is_one_object_for_all_learners():
    assert mk_metric(rmse) is mk_metric(rmse) and rmse.name == '_rmse' and metric('rmse') is not metric('rmse')


def test_fastais_accumulating_metrics_are_exported_with_the_predictions():
    z, y, _ = DATA['three']
    m, ours = F1Score(average='macro'), metric('roc_auc')
    theirs(m, z, y)
    learn = learner(z, y)
    learn.pred, learn.yb = z, (y,)
    ours.accumulate(learn)
    assert len(pickle.loads(pickle.dumps(m)).preds[0]) == N and len(ours.kept) == 1 and not pickle.loads(pickle.dumps(ours)).kept


def test_they_are_metrics_of_fastai(): assert all(isinstance(metric(n), Metric) for n in METRICS)


def test_a_learner_takes_metrics_by_their_names():
    learn = learner(normal(N, 2), whole(N, c=2), metrics=['brier', accuracy, 'f1'])
    assert learn.metrics.attrgot('name') == ['brier', 'accuracy', 'f1'] and isinstance(learn.metrics[2], METRICS['f1'])
    learn.metrics = 'roc_auc'
    assert learn.metrics.attrgot('name') == ['roc_auc']
    with pytest.raises(TypeError, match="no metric named 'f2'; did you mean 'f1'"): learn.metrics = 'f2'
