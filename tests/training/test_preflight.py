"Before the first batch everything wrong is said at once; in a batch that is not finite the fit stops, weights as they were."
import multiprocessing
import pickle
import random
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler, SchedNo
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.tabular.all import Categorify, CategoryBlock as Categories, TabularPandas, tabular_learner
from fastai.vision.all import (BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, DataBlock, DataLoaders, ImageBlock, L1LossFlat, Learner, MSELossFlat,
                               MultiCategoryBlock, RandomSplitter, RegressionBlock, TfmdDL, accuracy, accuracy_multi, get_image_files, mse, nn)
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastrecipes.data.folders import image_folder
from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.data.loaders import Indexed
from fastrecipes.technique import discover
from fastrecipes.training.finite import FiniteLoss
from fastrecipes.training.preflight import problems

discover()
LABELS = [0, 1, 2]*8


def quiet(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def over(x, y, model, loss_func, bs=4, metrics=None, valid=None, cls=KeyedDL):
    "A Learner over tensors; validation on the same samples, or on `valid` (x, y)."
    dls = DataLoaders(*(cls(ds, bs=bs, shuffle=i == 0, num_workers=0) for i, ds in enumerate((TensorDataset(x, y), TensorDataset(*(valid or (x, y)))))), device='cpu')
    return quiet(Learner(dls, model, loss_func, metrics=metrics))


def pictures(n=8, c=3, size=8): return torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(0))


# what is wrong, a sentence each

def test_a_batch_that_is_larger_than_the_training_set(toy):
    assert problems(toy(n=24, bs=32, labels=LABELS)) == ['bs: 32 is more than the 24 training samples, which leaves no batch; use bs=24 or less']


def test_a_training_set_of_nothing(toy):
    assert problems(toy(n=0, labels=[]))[0].startswith('dls: there are no training samples;')


def test_validation_samples_are_missed_by_those_who_need_them(toy):
    learn = toy(n=24, labels=LABELS)
    learn.dls.loaders[1] = learn.dls.valid.new(Indexed(TensorDataset(torch.zeros(0, 4), torch.zeros(0).long()), vocab=range(3)))
    learn.early_stop()
    assert problems(learn) == ['valid: there are no validation samples, and accuracy, early_stop (valid_loss) cannot do without; hold some out (valid=.2), or take them off']
    learn.metrics = []
    learn.early_stop('train_loss')
    assert problems(learn) == []
    learn.dls.loaders.pop()
    assert problems(learn) == ['valid: there is no loader to validate on, and each epoch ends with it; give DataLoaders(train, valid)']


@pytest.mark.parametrize('labels, sentence', [
    ([1]*24, 'labels: all 24 training samples are of class 1: there is nothing to tell it from; add samples of another class'),
    ([0, 2]*12, 'labels: no training sample of class 1: it cannot be learnt; add samples, or leave it out of the vocabulary')])
def test_classes_that_cannot_be_learnt(toy, labels, sentence):
    assert problems(toy(n=24, labels=labels)) == [sentence]


def test_classes_that_only_validation_has():
    x, y = torch.randn(24, 4), torch.tensor(LABELS)
    learn = over(x, y.clamp(max=1), nn.Linear(4, 3), F.cross_entropy, valid=(x, y))
    assert problems(learn) == ['labels: no training sample of class 2 (8 in validation): it cannot be learnt; add samples, or leave it out of the vocabulary']


def test_a_label_of_validation_that_fastais_vocabulary_lacks(photos):
    block = DataBlock((ImageBlock, Categories), get_items=get_image_files, get_y=lambda f: 'cow' if f.name == '9.png' else f.parent.name,
                      splitter=lambda fs: ([i for i, f in enumerate(fs) if f.name != '9.png'], [i for i, f in enumerate(fs) if f.name == '9.png']))
    found = problems(Learner(block.dataloaders(photos, bs=4, num_workers=0), nn.Sequential(nn.Flatten(), nn.Linear(12*16*3, 2))))
    assert found == ["labels: Label 'cow' was not included in the training dataset, but validation has it: it cannot be learnt; "
                     'put samples of it into the training set, or leave it out']


def test_a_class_that_only_validation_lacks_is_no_mistake():
    x, y = torch.randn(24, 4), torch.tensor(LABELS)
    assert problems(over(x, y, nn.Linear(4, 3), F.cross_entropy, valid=(x, y.clamp(max=1)))) == []


def test_labels_that_the_loss_passes_over_are_no_class():
    x, y = torch.randn(24, 4), torch.tensor(LABELS)
    assert problems(over(x, y, nn.Linear(4, 3), F.cross_entropy, valid=(x, y.where(y < 2, torch.tensor(-100))))) == []
    assert problems(over(x, y.where(y < 2, torch.tensor(-100)), nn.Linear(4, 3), F.cross_entropy)) == []


@pytest.mark.parametrize('n', [2, 1000])
def test_as_many_outputs_as_classes(toy, n):
    assert problems(toy(n=24, labels=LABELS, model=nn.Linear(4, n))) == [f'model: {n} outputs for 3 classes (0, 1, 2); its last layer must have 3 (n_out=3)']


def test_a_metric_that_was_taken_off_after_it_was_to_be_watched(toy):
    learn = toy(n=24, labels=LABELS).early_stop('accuracy')
    learn.metrics = [mse]
    assert problems(learn) == ["early_stop: monitor must be one of train_loss, valid_loss, mse, got 'accuracy'; or add that metric to the Learner"]
    learn.remove_cb(learn.early_stop_cb)
    learn.add_cbs([EarlyStoppingCallback('valid_los'), SaveModelCallback('mse')])
    assert problems(learn) == ["EarlyStoppingCallback: monitor must be one of train_loss, valid_loss, mse, got 'valid_los'; did you mean 'valid_loss'? "
                               'Or add that metric to the Learner']


def test_metrics_of_training_can_be_watched_where_the_recorder_takes_them(toy):
    learn = toy(n=24, labels=LABELS)
    learn.recorder.train_metrics = True
    learn.add_cb(EarlyStoppingCallback('train_accuracy'))
    assert problems(learn) == []


def none_reduced(p, y): return F.cross_entropy(p, y, reduction='none')


@pytest.mark.parametrize('loss_func, y, n_out, sentence', [
    (CrossEntropyLossFlat(), torch.rand(8), 3, 'loss: CrossEntropyLossFlat cannot compare outputs (2, 3) float32, targets (2,) float32 ('),
    (nn.CrossEntropyLoss(), torch.rand(8), 3, 'make the targets class numbers (y.long()), or take a loss for numbers: MSELossFlat(), BCEWithLogitsLossFlat()'),
    (nn.BCEWithLogitsLoss(), torch.ones(8, 3).long(), 3, "make the targets floating point (y.float()), or take fastai's loss, which does"),
    (F.cross_entropy, torch.arange(8), 3, 'loss: cross_entropy takes classes 0 to 2, the outputs of the model, and the targets hold 3, 4, 5, 6, 7; '
                                          'give the last layer more outputs, or number the classes from 0'),
    (partial(F.cross_entropy, ignore_index=255), torch.tensor([-1, 255]*4), 3, 'loss: cross_entropy takes classes 0 to 2, the outputs of the model, and the targets hold -1;'),
    (nn.MSELoss(), torch.rand(8), 1, 'loss: MSELoss compares number by number, and the shapes differ (outputs (2, 1) float32, targets (2,) float32); '
                                     'flatten both (MSELossFlat()), or reshape one'),
    (F.l1_loss, torch.rand(8, 2), 1, 'the model must give as many numbers as a sample has targets, 2'),
    (MSELossFlat(), torch.rand(8, 2), 1, 'the model must give as many numbers as a sample has targets, 2'),
    (none_reduced, torch.tensor([0, 1, 2, 0]*2), 3, "loss: none_reduced returns (2,) float32, not one number; use reduction='mean'"),
    (lambda p, y: (p.argmax(1) == y).float().mean(), torch.tensor([0, 1, 2, 0]*2), 3, 'it may be a metric: argmax and comparisons have no gradient'),
    (lambda p, y: 0., torch.tensor([0, 1, 2, 0]*2), 3, 'returns float, not a tensor: there is nothing to differentiate')])
def test_losses_that_do_not_go_with_targets_or_outputs(loss_func, y, n_out, sentence):
    found = problems(over(torch.randn(8, 4), y, nn.Linear(4, n_out), loss_func))
    assert len(found) == 1 and sentence in found[0]


def test_masks_with_a_number_that_is_no_class():
    found = problems(over(pictures(), torch.full((8, 8, 8), 255), nn.Conv2d(3, 5, 1), CrossEntropyLossFlat(axis=1)))
    assert found == ['loss: CrossEntropyLossFlat takes classes 0 to 4, the outputs of the model, and the targets hold 255; '
                     'give the last layer more outputs, or number the classes from 0, or name those to be skipped (ignore_index)']


@pytest.mark.parametrize('x, model, sentence', [
    (pictures(c=1), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)),
     'model: it takes 3 channels, the images have 1 (inputs (4, 1, 8, 8)); build it for 1 (n_in=1), or load images with 3'),
    (torch.randn(8, 5), nn.Linear(4, 3), 'model: it takes 4 features, the samples have 5 (inputs (4, 5)); give its first layer 5'),
    (pictures(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(100, 3)),
     'mat1 and mat2 shapes cannot be multiplied (4x144 and 100x3)); give it others, or build it for these'),
    ((pictures()*255).byte(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)), 'model: it cannot take the inputs, (4, 3, 8, 8) uint8 (RuntimeError: ')])
def test_inputs_that_the_network_cannot_take(x, model, sentence):
    found = problems(over(x, torch.tensor([0, 1, 2, 0]*2), model, F.cross_entropy))
    assert len(found) == 1 and found[0].startswith('model: it ') and sentence in found[0]


@pytest.mark.parametrize('spoil, sentence', [
    (lambda learn: learn.add_cbs([MixUp(), MixUp()]), 'cbs: MixUp and MixUp would do the same thing twice; keep one'),
    (lambda learn: learn.mixup().add_cb(MixUp()), 'cbs: MixUp and mixup would do the same thing twice; keep one'),
    (lambda learn: learn.grad_accum(2).add_cb(GradientAccumulation(8)), 'cbs: GradientAccumulation and grad_accum would do the same thing twice; keep one'),
    (lambda learn: learn.label_smoothing().add_cb(MixUp()),
     "cbs: fastai's MixUp swaps the loss that label_smoothing would compute anew from targets that are not mixed; use the technique instead: learn.mixup()"),
    (lambda learn: learn.add_cbs([ParamScheduler({'lr': SchedNo(1, 1), 'mom': SchedNo(1, 1)}), ParamScheduler({'lr': SchedNo(1, 1)})]),
     'cbs: ParamScheduler and ParamScheduler both set lr, and the last one wins; keep one'),
    (lambda learn: learn.class_weights().techniques.update(balance=None), "'class_weights' and 'balance' do not go together: each makes up for rare classes")])
def test_callbacks_that_undo_or_repeat_one_another(toy, spoil, sentence):
    spoil(learn := toy(n=24, labels=[0, 0, 1, 2]*6))
    found = problems(learn)
    assert len(found) == 1 and found[0].startswith(sentence)


def test_a_disk_that_the_checkpoints_do_not_fit_on(toy, tmp_path):
    learn = toy(n=24, labels=LABELS, model=nn.Linear(10**8, 10**8, bias=False, device='meta'))              # 240 PB twice over, none of them allocated
    assert [p.split(', ')[0] for p in problems(learn, folder=tmp_path/'run'/'checkpoint')] == [f'checkpoints: {10**16*4*3*2/1e6:,.0f} MB are needed in {tmp_path}/run/checkpoint']
    assert problems(learn) == []
    learn.add_cb(SaveModelCallback(every_epoch=True, with_opt=True))
    learn.path = tmp_path
    assert [p.split(', ')[0] for p in problems(learn, n_epoch=7)] == [f'checkpoints: {10**16*4*3*7/1e6:,.0f} MB are needed in {tmp_path}/models']
    assert problems(toy(n=24, labels=LABELS), folder=tmp_path) == []


# when it is said

def spoilt(toy):
    learn = toy(n=24, bs=32, labels=[0, 2]*12).early_stop('accuracy')
    learn.metrics = []
    return learn


def test_everything_is_said_at_once(toy):
    with pytest.raises(ValueError) as e: spoilt(toy).preflight()
    assert str(e.value) == '''3 things are wrong before the first batch:
  - bs: 32 is more than the 24 training samples, which leaves no batch; use bs=24 or less
  - labels: no training sample of class 1: it cannot be learnt; add samples, or leave it out of the vocabulary
  - early_stop: monitor must be one of train_loss, valid_loss, got 'accuracy'; or add that metric to the Learner'''


def test_one_thing_is_just_its_sentence_and_none_returns_the_learner(toy):
    with pytest.raises(ValueError, match='^labels: all 24'): toy(n=24, labels=[0]*24).preflight()
    learn = toy(n=24, labels=LABELS)
    assert learn.preflight() is learn


@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle', 'fit_flat_cos', 'lr_find'])
def test_fits_begin_with_it_and_nothing_has_moved(toy, fit):
    learn = spoilt(toy)
    before = [p.clone() for p in learn.model.parameters()], list(learn.cbs)
    with pytest.raises(ValueError, match='3 things are wrong'): getattr(learn, fit)(*([] if fit == 'lr_find' else [1]))
    assert all(torch.equal(a, b) for a, b in zip(before[0], learn.model.parameters())) and list(learn.cbs) == before[1]


def test_callbacks_of_one_fit_are_looked_at_too(toy):
    with pytest.raises(ValueError, match="^EarlyStoppingCallback: monitor must be one of train_loss, valid_loss, accuracy, got 'loss'"):
        toy(n=24, labels=LABELS).label_smoothing().fit(1, cbs=EarlyStoppingCallback('loss'))
    with pytest.raises(ValueError, match='^cbs: ParamScheduler and ParamScheduler both set lr'):
        toy(n=24, labels=LABELS).label_smoothing().fit_one_cycle(1, cbs=ParamScheduler({'lr': SchedNo(1, 1)}))


def test_a_learner_of_fastais_own_is_left_alone(toy):
    toy(n=24, bs=32, labels=LABELS).fit(1)                          # not one batch, which fastai lets pass
    with pytest.raises(ValueError, match='^bs: 32'): keyed(toy(n=24, bs=32, labels=LABELS)).learn.fit(1)


def test_validation_and_predictions_are_left_alone(toy):
    learn = spoilt(toy)
    learn.validate()
    learn.get_preds()
    learn.fit(0)


def test_it_can_be_switched_off(toy, monkeypatch):
    monkeypatch.setenv('FASTRECIPES_PREFLIGHT', '0')
    toy(n=24, bs=32, labels=LABELS).label_smoothing().fit(1)


class Counted(Dataset):
    "Samples that count how often they are read."
    def __init__(self): self.targets, self.reads = LABELS, 0
    def __len__(self): return 24
    def __getitem__(self, i):
        self.reads += 1
        return torch.ones(4)*i, LABELS[i]


def test_data_and_network_are_looked_at_once_for_each_state_of_a_learner():
    def counted():
        before = ds.reads
        learn.fit(1)
        return ds.reads-before-48                                   # 24 for training, 24 for validation
    ds = Counted()
    dls = DataLoaders(*(KeyedDL(Indexed(ds, range(3)), bs=4, shuffle=s, num_workers=0) for s in (True, False)), device='cpu')
    learn = quiet(Learner(dls, nn.Linear(4, 3), nn.CrossEntropyLoss()))
    keyed(learn)
    learn.fit(1)
    assert counted() == 0
    learn.label_smoothing()
    assert counted() == 2 and counted() == 0
    learn.model = nn.Linear(4, 3)
    learn.opt = None
    assert counted() == 2 and counted() == 0
    learn.loss_func = F.cross_entropy
    assert counted() == 2 and counted() == 0
    learn.dls.loaders[1] = learn.dls.valid.new(bs=2)
    assert counted() == 2 and counted() == 0


def test_what_was_looked_at_does_not_travel_with_the_learner(toy):
    learn = toy(n=6000, c=3).label_smoothing()
    learn.fit(1)
    assert len(pickle.dumps(learn._checked)) < 200 and pickle.loads(pickle.dumps(learn._checked)).state == ()


# no false alarms

def images(photos, y_block, get_y, **kw):
    return DataBlock((ImageBlock, y_block), get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(.4, seed=0)).dataloaders(photos, bs=4, num_workers=0, **kw)


def single_label(photos): return image_folder(photos, size=8, bs=4, workers=0), nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten()), None, accuracy
def multi_label(photos): return images(photos, MultiCategoryBlock, lambda f: [f.parent.name, 'pet']), nn.Sequential(nn.Flatten(), nn.Linear(576, 3)), None, accuracy_multi
def regression(photos): return images(photos, RegressionBlock, lambda f: float(f.stem)), nn.Sequential(nn.Flatten(), nn.Linear(576, 1)), None, mse
def one_output(photos): return images(photos, Categories, lambda f: f.parent.name), nn.Sequential(nn.Flatten(), nn.Linear(576, 1)), BCEWithLogitsLossFlat(), None


def segmentation(_):
    x, y = pictures(), torch.randint(5, (8, 8, 8))
    y[:, 0] = 255
    dls = DataLoaders(*(TfmdDL(TensorDataset(x, y), bs=4, num_workers=0) for _ in range(2)), device='cpu')
    return dls, nn.Conv2d(3, 5, 3, padding=1), CrossEntropyLossFlat(axis=1, ignore_index=255), None


def counts(_):
    "Whole numbers that are no classes."
    x, y = torch.randn(24, 4), torch.tensor([7, 9, 40]*8)
    return DataLoaders(*(TfmdDL(TensorDataset(x, y), bs=4, num_workers=0) for _ in range(2)), device='cpu'), nn.Linear(4, 1), L1LossFlat(), None


def torch_loaders(_):
    ds = TensorDataset(pictures(24), torch.tensor(LABELS))
    return DataLoaders(DataLoader(ds, 4, shuffle=True), DataLoader(ds, 4)), nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten()), nn.CrossEntropyLoss(), accuracy


def made_for_its_batch(_):
    class Fixed(nn.Linear):
        def forward(self, x): return super().forward(x.reshape(4, 4))
    ds = TensorDataset(torch.randn(24, 4), torch.tensor(LABELS))
    return DataLoaders(*(TfmdDL(ds, bs=4, num_workers=0) for _ in range(2)), device='cpu'), Fixed(4, 3), nn.CrossEntropyLoss(), accuracy


@pytest.mark.parametrize('make', [single_label, multi_label, regression, one_output, segmentation, counts, torch_loaders, made_for_its_batch])
def test_no_false_alarm(make, photos):
    dls, model, loss_func, metrics = make(photos)
    learn = quiet(Learner(dls, model, loss_func, metrics=metrics))
    assert problems(learn) == []
    learn.weight_penalty()
    learn.fit(1, 1e-4)
    learn.validate()


@pytest.mark.parametrize('target, loss_func', [('kind', None), ('size', None)])
def test_no_false_alarm_on_tables(target, loss_func):
    df = pd.DataFrame(dict(kind=list('abc')*10, size=np.linspace(0, 1, 30), colour=list('rgrb')*7 + ['r', 'g'], weight=np.random.default_rng(0).random(30)))
    to = TabularPandas(df, [Categorify], ['colour'], ['weight'], y_names=target, y_block=Categories() if target == 'kind' else RegressionBlock(),
                       splits=(list(range(24)), list(range(24, 30))))
    learn = quiet(tabular_learner(to.dataloaders(bs=8), layers=[8]))
    assert problems(learn) == []
    learn.weight_penalty().fit(1)


def test_an_error_of_the_networks_own_is_left_to_training(toy):
    class Dies(nn.Linear):
        def forward(self, x): raise RuntimeError('dies')
    learn = toy(n=24, labels=LABELS, model=Dies(4, 3))
    assert problems(learn) == []
    with pytest.raises(RuntimeError, match='^dies$'): learn.label_smoothing().fit(1)


def test_a_loss_that_needs_what_only_training_has_is_left_to_training(toy):
    def loss(p, y): return F.cross_entropy(p, y)*learn.share
    class Share(Callback):
        def before_fit(self): self.learn.share = .5
    learn = toy(n=24, labels=LABELS, loss_func=loss)
    assert problems(learn) == []
    keyed(learn)
    learn.fit(1, cbs=Share())


def test_batches_that_a_callback_reshapes_are_not_judged(toy):
    class Pad(Callback):
        def before_batch(self): self.learn.xb = (F.pad(self.x, (0, 1)),)
    learn = toy(n=24, labels=LABELS, model=nn.Linear(5, 3))
    assert problems(learn)[0].startswith('model: it takes 5 features')
    learn.add_cb(Pad())
    assert problems(learn) == []
    learn.weight_penalty().fit(1)


def test_networks_that_are_not_there_yet_are_not_judged(toy):
    for model in (nn.LazyLinear(3), nn.Linear(5, 3, device='meta')): assert problems(toy(n=24, labels=LABELS, model=model)) == []


# nothing is felt of it

class Net(nn.Sequential):
    "All that draws or counts: dropout, batch statistics, a spectral norm's vectors."
    def __init__(self): super().__init__(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Dropout(.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def test_network_draws_and_modes_are_as_they_were(photos):
    learn = Learner(image_folder(photos, size=8, bs=4, workers=0), Net())
    learn.augment()
    learn.model.train()
    learn.model[1].eval()
    def state(): return [v.clone() for v in learn.model.state_dict().values()], [m.training for m in learn.model.modules()], [p.grad for p in learn.model.parameters()]
    draws = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), learn.dls.train.epoch, learn.dls.train.rng.getstate()
    (before, modes, grads) = state()
    assert problems(learn) == []
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), learn.dls.train.epoch, learn.dls.train.rng.getstate()
    assert all(torch.equal(a, b) for a, b in zip(before, state()[0])) and (modes, grads) == state()[1:]
    assert draws[:2] == after[:2] and torch.equal(draws[2], after[2]) and draws[3:] == after[3:]


def test_datasets_that_draw_and_layers_that_count_or_merge_as_they_go_are_as_they_were():
    class Drawn(TensorDataset):
        def __getitem__(self, i): return self.tensors[0][i] + random.random() + np.random.rand() + torch.rand(1), self.tensors[1][i]
    class Merging(nn.Linear):
        "Counts its calls, and adds a part to its weight while it is not in training, as LoRA does."
        def __init__(self):
            super().__init__(4, 3)
            self.register_buffer('calls', torch.zeros(()))
        def train(self, mode=True):
            if mode != self.training: self.weight.data += -1 if mode else 1
            return super().train(mode)
        def forward(self, x):
            self.calls += 1
            return super().forward(x)
    model = Merging()
    learn = over(torch.randn(24, 4), torch.tensor(LABELS), model, F.cross_entropy, cls=TfmdDL)
    learn.dls.train.dataset = Drawn(*learn.dls.train_ds.tensors)
    before, weight = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()), model.weight.clone()
    assert problems(learn) == []
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert torch.allclose(model.weight, weight, atol=1e-6) and model.training and model.calls == 0


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('cls', [KeyedDL, TfmdDL])
def test_training_is_the_same_to_the_bit_with_it_and_without(photos, monkeypatch, workers, cls):
    started = []
    class Count(Callback):
        def before_fit(self): started.append(len(multiprocessing.active_children()))
    def trained(on):
        monkeypatch.setenv('FASTRECIPES_PREFLIGHT', on)
        for seed in (random.seed, np.random.seed, torch.manual_seed): seed(0)
        dls = image_folder(photos, size=8, bs=4, workers=workers)
        if cls is TfmdDL: dls.loaders[0] = dls.train.new(cls=TfmdDL)
        learn = quiet(Learner(dls, Net(), opt_func=partial(torch_sgd, momentum=.9)))
        if cls is KeyedDL: learn.augment()
        learn.label_smoothing().fit(2, 1e-2, cbs=Count())
        return list(learn.model.state_dict().values()), learn.recorder.values
    (a, rows), (b, again) = trained('1'), trained('0')
    assert all(torch.equal(p, q) for p, q in zip(a, b)) and rows == again and started == [0, 0]


def torch_sgd(params, lr, momentum):
    from fastai.optimizer import SGD
    return SGD(params, lr=lr, mom=momentum)


# the guard

def poisoned(where, value=float('nan'), **kwargs):
    "A Learner with batch statistics, sample 17 of whose inputs or targets is not a number."
    x, y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
    {'x': x, 'y': y}[where][17, 1] = value
    torch.manual_seed(0)
    return over(x, y, nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), MSELossFlat(), **kwargs)


class Before(Callback):
    "Keep the state before each training batch."
    order = -20
    run_valid = False
    def before_batch(self): self.state, self.at = [v.clone() for v in self.learn.model.state_dict().values()], self.learn.iter


def stopped(learn, *args, **kwargs) -> str:
    "The message by which a fit stopped; weights and statistics are those of before that batch, and no gradient is left."
    before = Before()
    with pytest.raises(ValueError) as e: learn.fit(*args, cbs=[before, *kwargs.pop('cbs', [])], **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(before.state, learn.model.state_dict().values()))
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    assert not [cb for cb in learn.cbs if isinstance(cb, FiniteLoss)] and not hasattr(learn, 'finite_loss_cb')
    assert f'in batch {before.at} of epoch 0' in str(e.value)
    return str(e.value)


@pytest.mark.parametrize('where', ['x', 'y'])
@pytest.mark.parametrize('cls', [KeyedDL, TfmdDL])
def test_a_sample_that_is_not_a_number_is_named_and_costs_no_weight(where, cls):
    said = stopped(poisoned(where, cls=cls).weight_penalty(), 1)
    assert said.startswith('the loss is nan in batch ') and f': {where} has values that are not finite in sample 17: mend or remove it. The weights are as they were before.' in said
    assert ' (samples ' in said and ' 17' in said.split(')')[0]


def test_under_mixup_which_spreads_it_the_sample_is_named_all_the_same():
    assert ': x has values that are not finite in sample 17: mend' in stopped(poisoned('x').mixup(), 1)


def test_samples_of_torchs_loaders_are_named_by_their_place_in_the_batch():
    learn = poisoned('x')
    learn.dls.loaders = [DataLoader(dl.dataset, 4) for dl in learn.dls.loaders]
    said = stopped(learn.weight_penalty(), 1)
    assert said.startswith('the loss is nan in batch 4 of epoch 0: x has values that are not finite in sample 1 of the batch: look at it and its transforms.')


def test_images_are_named_by_their_files(photos):
    class Dark(Callback):
        "A division by the brightness of an image that has none."
        def before_batch(self): self.learn.xb = (self.x/0*0,) if self.learn.training and self.learn.iter == 1 else self.xb
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 2))
    learn = quiet(Learner(image_folder(photos, size=8, bs=4, workers=0), net)).weight_penalty()
    said = stopped(learn, 1, cbs=[Dark()])
    file = learn.dls.train_ds.items[i := int(learn.dls.train.draws(1)[0]) % len(learn.dls.train_ds)]
    assert said.startswith(f'the loss is nan in batch 1 of epoch 0 (samples {i} ({file.parent.name}/{file.name}), ') and 'x has values that are not finite in sample' in said


def test_a_rate_that_is_too_high_says_so_and_not_the_data():
    learn = poisoned('x', value=0.).weight_penalty()
    before = Before()
    with pytest.raises(ValueError) as e: learn.fit(20, 1e30, cbs=before)
    assert 'its inputs, targets and the weights are finite; try a lower lr (now 1e+30), grad_clip(), or look at these samples' in str(e.value)
    assert all(torch.equal(a, b) for a, b in zip(before.state, learn.model.state_dict().values()))


def test_weights_that_were_lost_before_are_told_from_what_loses_them():
    learn = poisoned('x', value=0.).weight_penalty()
    with torch.no_grad(): learn.model[0].weight[0] = float('nan')
    with pytest.raises(ValueError, match='0.weight held values that are not finite already; build the network again, or load weights that are'): learn.fit(1)


class Root(nn.Module):
    "√x: finite at 0, where its slope is not."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
    def forward(self, x): return (x*self.weight).sqrt()


def test_a_gradient_that_is_not_finite_where_the_loss_is(toy):
    x = torch.ones(24, 1)
    x[5] = 0
    said = stopped(over(x, torch.zeros(24, 1), Root(), nn.L1Loss()).early_stop(), 1)
    assert said.startswith('the gradient of weight is not finite, though the loss is 0.7') and ' 5' in said.split(')')[0]


def test_a_gradient_that_is_only_long_is_no_reason_to_stop():
    learn = over(torch.full((8, 100), 1e25), torch.zeros(8, 1), nn.Linear(100, 1), nn.L1Loss())     # its square overflows, the step does not
    learn.early_stop().fit(1, 1e-30)


def test_batches_that_share_a_step_are_named_together():
    x = torch.ones(24, 1)
    x[5] = 0
    learn = over(x, torch.zeros(24, 1), Root(), nn.L1Loss())
    learn.dls.train.shuffle = False
    with pytest.raises(ValueError, match=r'in batches 0 to 2 of epoch 0 \(samples 0, 1, 2, 3, 4, … \(12\)\)'): learn.grad_accum(3).fit(1)


def test_overflow_is_left_to_a_loss_scaler(toy):
    class Scaled(Callback):
        order = 9
        def before_step(self):
            self.learn.model.weight.grad[:] = float('inf')
            self.learn.scaler = torch.amp.GradScaler('cpu', enabled=True)
        def after_step(self): self.learn.scaler = None
    toy(n=24, labels=LABELS).weight_penalty().fit(1, 0., cbs=Scaled())


def test_with_a_loss_scaler_the_other_16_bits_are_a_way_out(toy):
    learn = toy(n=24, labels=LABELS).weight_penalty()
    learn.scaler = torch.amp.GradScaler('cpu', enabled=True)
    with pytest.raises(ValueError, match=r'try a lower lr \(now 1e\+30\), grad_clip\(\), to_bf16\(\) instead of to_fp16\(\), or look at these samples'): learn.fit(9, 1e30)


def test_lr_find_may_leave_the_finite(toy):
    toy(n=24, labels=LABELS).weight_penalty().lr_find(start_lr=1e10, end_lr=1e30, num_it=12, stop_div=False, show_plot=False, suggest_funcs=None)


def test_validation_losses_may_be_what_they_like():
    x, y = torch.randn(24, 4), torch.randn(24, 2)
    learn = over(x, y, nn.Linear(4, 2), MSELossFlat(), valid=(x*float('nan'), y))
    learn.early_stop(patience=2).fit(5)
    assert len(learn.recorder.values) == 2 and learn.techniques['early_stop'].effect.endswith('it never was a number')


def test_a_learner_of_fastais_own_has_no_guard():
    learn = poisoned('x')
    learn.fit(1)
    assert any(not p.isfinite().all() for p in learn.model.parameters())        # what fastai 2.8.12 makes of it


