"The mends of fastai in detail; that each defect is there without its mend is shown by tests/contract/test_defects.py."
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import SGD, BaseLoss, Callback, CancelFitException, CrossEntropyLossFlat, MSELossFlat, nn
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.losses import LabelSmoothingCrossEntropyFlat
from torch.nn import functional as F

from fastrecipes.report.history import history
from fastrecipes.technique import discover

discover()
W = torch.tensor([5., 1., .5])


def rates(learn, n, **kwargs):
    learn.fit_flat_cos(n, 1., **kwargs)
    return learn.recorder.lrs


def test_fit_flat_cos_is_flat_then_a_cosine(toy):
    lrs = rates(toy(), 4, pct_start=.5)
    t = np.arange(16)/16
    expected = [1. if p < .5 else 1e-5 + (1+math.cos(math.pi*(p-.5)/.5))/2*(1-1e-5) for p in t]
    assert lrs == pytest.approx(expected, rel=1e-5)


def test_fit_flat_cos_ignores_start_epoch_in_fastai_and_not_here(toy):
    assert rates(toy(), 4, start_epoch=3) == pytest.approx(rates(toy(), 4)[-4:])


class Raises(Callback):
    "Raise `error` before the first step."
    order = 60
    def __init__(self, error): self.error = error
    def before_step(self): raise self.error


def outputs(learn): return learn.get_preds(act=lambda o: o)


# the mean of a weighted loss

@pytest.mark.parametrize('bs', [64, 16, 7, 1])
@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(W), CrossEntropyLossFlat(weight=W), partial(F.cross_entropy, weight=W), nn.CrossEntropyLoss(W, label_smoothing=.2),
                                  nn.CrossEntropyLoss(ignore_index=1), nn.CrossEntropyLoss(W, ignore_index=1), nn.CrossEntropyLoss()], ids=lambda f: str(f).split(" at 0x")[0])
def test_the_validation_loss_is_torchs_over_the_whole_set(toy, loss, bs):
    learn = toy(loss_func=loss, bs=bs)              # at bs=1 some batches consist of nothing but what is ignored: their own mean is 0/0
    assert learn.validate()[0] == pytest.approx(float(loss(*outputs(learn))), rel=1e-5)


def test_masks_count_by_their_pixels(toy):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 12)
        def forward(self, x): return self.layer(x).view(-1, 3, 4)
    g = torch.Generator().manual_seed(0)
    masks = torch.randint(3, (64, 4), generator=g)
    masks[:20, :3] = -100
    learn = toy(loss_func=CrossEntropyLossFlat(axis=1), model=Net(), labels=masks, bs=16)
    learn.metrics = []
    p, y = outputs(learn)
    assert learn.validate()[0] == pytest.approx(F.cross_entropy(p, y).item(), rel=1e-5)


def test_other_losses_and_soft_targets_are_averaged_as_before(toy):
    learn = toy(loss_func=LabelSmoothingCrossEntropyFlat())
    assert learn.validate()[0] == pytest.approx(learn.loss_func(*outputs(learn)).item(), rel=1e-5)
    y = torch.rand(64, 3, generator=torch.Generator().manual_seed(0))
    for loss in (nn.CrossEntropyLoss(W), MSELossFlat()):
        learn = toy(loss_func=loss, labels=y)
        learn.metrics = []
        assert learn.validate()[0] == pytest.approx(float(loss(*outputs(learn))), rel=1e-5)


def test_class_weights_leave_the_validation_loss_unweighted(toy):
    learn = toy().class_weights([5., 1., .5])
    assert learn.validate()[0] == pytest.approx(F.cross_entropy(*outputs(learn)).item(), rel=1e-5)


def test_losses_of_single_samples_are_still_to_be_had(toy):
    learn = toy(loss_func=CrossEntropyLossFlat(weight=W))
    _, _, losses = learn.get_preds(with_loss=True)
    assert torch.allclose(losses, F.cross_entropy(*outputs(learn), W, reduction='none'), rtol=1e-5)


# what losses are asked for

@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), F.cross_entropy])
def test_torchs_cross_entropies_know_their_probabilities_and_classes(toy, loss):
    learn = toy(loss_func=loss)
    p, _, classes = learn.get_preds(with_decoded=True)
    logits, _ = outputs(learn)
    assert torch.allclose(p, logits.softmax(1)) and torch.equal(classes, logits.argmax(1))


def test_a_torch_loss_is_still_pickled_by_torch_alone():
    assert b'fastrecipes' not in pickle.dumps([nn.CrossEntropyLoss(), F.cross_entropy])
    assert BaseLoss(nn.CrossEntropyLoss).activation(torch.zeros(1, 2)).tolist() == [[0., 0.]]      # a loss that says so itself is left alone


# trackers

@pytest.mark.parametrize('tracker', [SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau])
def test_trackers_stand_aside_outside_a_fit_and_are_back_in_the_next(toy, tmp_path, tracker, capsys):
    learn = toy(cbs=tracker(), path=tmp_path)
    learn.validate()
    learn.get_preds()
    assert not list(tmp_path.glob('models/*')) and capsys.readouterr().out == ''
    learn.fit(2, 1e-9)
    cb = next(cb for cb in learn.cbs if isinstance(cb, tracker))
    assert cb.best == pytest.approx(min(row[1] for row in learn.recorder.values), abs=1e-6)


@pytest.mark.parametrize('monitor, hint', [('acuracy', "did you mean 'accuracy'"), ('time', 'train_loss, valid_loss, accuracy'), ('f1', 'train_loss, valid_loss, accuracy, got')])
def test_a_monitor_that_is_not_reported_is_refused_with_the_names_that_are(toy, monitor, hint):
    with pytest.raises(ValueError, match=hint): toy().fit(1, cbs=EarlyStoppingCallback(monitor))


def test_the_best_model_of_a_fit_is_loaded_and_another_fits_is_not(toy, tmp_path, capsys):
    learn = toy(path=tmp_path)
    learn.fit(3, .1, cbs=SaveModelCallback())
    assert 'never got better' not in capsys.readouterr().out
    best = min(row[1] for row in learn.recorder.values)
    assert learn.validate()[0] == pytest.approx(best, rel=1e-5)
    learn.fit(1, 1e3, cbs=SaveModelCallback('accuracy', comp=lambda new, old: False))
    assert "SaveModelCallback: accuracy never got better than" in capsys.readouterr().out
    assert learn.validate()[0] > best + 1           # the weights that this fit came to


def test_a_best_that_is_kept_over_fits_is_loaded_after_a_fit_that_was_worse(toy, tmp_path):
    learn = toy(path=tmp_path, cbs=SaveModelCallback(reset_on_fit=False))
    learn.fit(3, .1)
    best = learn.validate()[0]
    learn.fit(1, 1e3)
    assert learn.validate()[0] == pytest.approx(best, rel=1e-6)


# the record of a fit

def test_validation_leaves_the_record_of_the_fit(toy):
    learn = toy()
    past = history(learn)
    learn.fit(2)
    before = [list(getattr(learn.recorder, k)) for k in ('lrs', 'iters', 'losses', 'values')]
    learn.validate()
    learn.get_preds()
    assert [list(getattr(learn.recorder, k)) for k in ('lrs', 'iters', 'losses', 'values')] == before
    learn.fit(1)
    assert len(learn.recorder.losses) == 4 and [len(f['losses']) for f in past.fits] == [8, 4]


def test_validation_that_dies_leaves_the_record_of_the_fit(toy):
    learn = toy()
    learn.fit(1)
    class Dies(Callback):
        def before_validate(self): raise RuntimeError('dies')
    with pytest.raises(RuntimeError): learn.validate(cbs=Dies())
    assert len(learn.recorder.losses) == 4


# exceptions

@pytest.mark.parametrize('error, seen', [(NotImplementedError(), 'NotImplementedError without a message in `Raises` when calling event `before_step`'), (ValueError('mine'), 'mine'),
                                         (IndexError('tuple index out of range'), 'tuple index out of range'), (KeyError('x'), 'x'), (AssertionError(), 'AssertionError')])
def test_an_exception_in_a_callback_stays_what_it_is(toy, error, seen):
    with pytest.raises(type(error), match=seen) as caught: toy().fit(1, cbs=Raises(error))
    assert caught.type is type(error)


def test_an_index_error_that_follows_a_handled_exception_stays_an_index_error(toy):
    class Twice(Callback):
        def before_step(self):
            try: raise StopIteration
            except StopIteration: return ()[0]
    with pytest.raises(IndexError, match='tuple index out of range'): toy().fit(1, cbs=Twice())


def test_a_cancelled_fit_is_still_cancelled(toy):
    toy().fit(1, cbs=Raises(CancelFitException()))


def test_mixup_gives_back_a_loss_and_not_one_that_was_chosen_since(toy):
    learn = toy(loss_func=CrossEntropyLossFlat(), cbs=MixUp())
    with pytest.raises(RuntimeError): learn.fit(1, cbs=Raises(RuntimeError('dies')))
    learn.loss_func = mine = CrossEntropyLossFlat(label_smoothing=.1)
    class Early(Callback):
        def before_fit(self): raise RuntimeError('dies before training')
    with pytest.raises(RuntimeError): learn.fit(1, cbs=Early())
    assert learn.loss_func is mine


def test_an_lr_find_that_is_interrupted_leaves_no_trace(toy, tmp_path):
    learn = toy(path=tmp_path)
    learn.fit(1, .1)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    momenta = [s['grad_avg'].clone() for s in learn.opt.state_dict()['state']]
    class Late(Callback):
        def after_batch(self):
            if self.learn.train_iter == 80: raise KeyboardInterrupt
    learn.add_cb(Late())
    with pytest.raises(KeyboardInterrupt): learn.lr_find(show_plot=False)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert all(torch.equal(s['grad_avg'], m) for s, m in zip(learn.opt.state_dict()['state'], momenta))
    assert learn.opt.hypers[-1]['lr'] == .1                 # that of the fit before
    assert not list(tmp_path.glob('models/*'))


@pytest.mark.parametrize('fails', [True, False])
def test_export_gives_the_learner_back_as_it_was(toy, tmp_path, fails):
    learn = toy(path=tmp_path)
    learn.fit(1)
    dls, opt, state = learn.dls, learn.opt, learn.opt.state_dict()['state'][0]['grad_avg'].clone()
    if fails:
        learn.unpicklable = (i for i in range(3))
        with pytest.raises(TypeError, match='generator'): learn.export()
    else: learn.export()
    assert learn.dls is dls and learn.opt is opt and torch.equal(opt.state_dict()['state'][0]['grad_avg'], state)


@pytest.mark.parametrize('kwargs, message', [(dict(), 'it is not a number from batch 0 on; look at the data'),
                                             (dict(start_lr=1e3, end_lr=1e4, num_it=60), 'it rose at once; lower start_lr')])
def test_an_lr_find_that_finds_nothing_says_why(toy, tmp_path, kwargs, message):
    learn = toy(path=tmp_path, opt_func=SGD)
    if not kwargs: learn.loss_func = lambda p, y: p.sum()*float('nan')
    before = learn.model.weight.detach().clone()
    with pytest.raises(ValueError, match=message): learn.lr_find(show_plot=False, **kwargs)
    assert torch.equal(learn.model.weight, before)


def test_an_index_error_of_the_users_own_suggestion_stays_one(toy, tmp_path):
    def broken(lrs, losses, num_it): return [][1]
    with pytest.raises(IndexError): toy(path=tmp_path).lr_find(show_plot=False, suggest_funcs=broken)


def test_an_attribute_that_is_not_there_is_the_learners_and_the_nearest_is_named(toy):
    learn = toy()
    with pytest.raises(AttributeError, match="neither this Learner nor its Linear has an attribute 'label_smoothingg'; did you mean 'label_smoothing'"): learn.label_smoothingg(.1)
    assert learn.parameters and not hasattr(learn, 'nothing')        # the model's are still reached


def test_a_fit_that_is_interrupted_leaves_the_logger_and_the_learner_can_be_exported(toy, tmp_path):
    learn = toy(path=tmp_path)
    learn.add_cb(ProgressCallback())
    before = learn.logger
    class Late(Callback):
        def after_batch(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Late())
    assert learn.logger == before and not hasattr(learn.progress, 'mbar')
    learn.export()
    assert (tmp_path/'export.pkl').stat().st_size


def test_an_export_that_fails_leaves_the_file_that_was_there(toy, tmp_path):
    learn = toy(path=tmp_path)
    learn.export()
    before = (tmp_path/'export.pkl').read_bytes()
    learn.unpicklable = (i for i in range(3))
    with pytest.raises(TypeError): learn.export()
    assert (tmp_path/'export.pkl').read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ['export.pkl']


def test_weights_of_another_network_are_refused_in_a_sentence(toy, tmp_path):
    toy(path=tmp_path, model=nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))).save('wide')
    learn = toy(path=tmp_path, model=nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)))
    with pytest.raises(ValueError, match=r'^load: wide holds the weights of another network: size mismatch for 0.weight.*\(slim, ') as e: learn.load('wide')
    assert len(str(e.value).splitlines()) == 1
    learn.save('own')
    assert learn.load('own') is learn
