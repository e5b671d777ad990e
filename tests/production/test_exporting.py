"`learn.export()` after whatever was done to a Learner: what is loaded answers the same to the bit, holds no data and no teacher; the Learner trains on."
import warnings

import pytest
import torch
from fastai.basics import Callback, Learner, get_model, load_learner, nn
from fastai.callback.progress import CSVLogger
from fastai.callback.rnn import ModelResetter, RNNCallback
from fastai.callback.tracker import SaveModelCallback
from fastai.distributed import DataParallel
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, RandomSplitter, Resize, get_image_files

from fastrecipes.data import cache  # noqa: F401  for their methods
from fastrecipes.production import distillation  # noqa: F401
from fastrecipes.production.export import export_learner
from fastrecipes.repairs import with_own_memory
from fastrecipes.technique import discover
from fastrecipes.training import averaging, precision, precompute, stopping  # noqa: F401

from .conftest import small_net

discover()


def theirs(learn, path):
    learn.export(path)
    return path


WAYS = (theirs, export_learner)


def loaded(path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return load_learner(path)


def answers(learn, items):
    with learn.no_bar(): return learn.get_preds(dl=learn.dls.test_dl(items))[0]


class Dies(Callback):
    def after_loss(self): raise KeyboardInterrupt


def parallel(learn, tmp_path): learn.model = DataParallel(learn.model)
def compiled(learn, tmp_path): learn.model = torch.compile(learn.model, backend='eager')
def interrupted(learn, tmp_path):
    with pytest.raises(KeyboardInterrupt): learn.ema(.9).fit(1, cbs=[CSVLogger(tmp_path/'h.csv'), Dies()])


DONE = dict(plain=lambda learn, _: None, ours=lambda learn, _: learn.use(mixup=.4, label_smoothing=.1, ema=.9, early_stop=True).fit(1), parallel=parallel, compiled=compiled,
            interrupted=interrupted, cached=lambda learn, _: learn.cache().fit(1), distilled=lambda learn, _: learn.distill(nn.Sequential(small_net(), nn.Linear(3, 3))).fit(1),
            precomputed=lambda learn, tmp_path: learn.precompute(str(tmp_path/'stored')), csv=lambda learn, tmp_path: learn.add_cb(CSVLogger(tmp_path/'history.csv')),
            tracked=lambda learn, _: learn.add_cb(SaveModelCallback()))


@pytest.mark.parametrize('write', WAYS)
@pytest.mark.parametrize('done', DONE)
def test_what_is_loaded_answers_the_same_to_the_bit_and_the_learner_trains_on(make_learn, tmp_path, done, write):
    learn = make_learn(path=tmp_path)
    plain = export_learner(learn, tmp_path/'plain.pkl').stat().st_size
    with learn.no_bar(), learn.no_logging(): DONE[done](learn, tmp_path)
    before, cbs, opt, modes = dict(vars(learn)), list(learn.cbs), learn.opt, [m.training for m in learn.model.modules()]
    path = write(learn, tmp_path/'learner.pkl')
    assert vars(learn) == before and list(learn.cbs) == cbs and all(cb.learn is learn for cb in cbs) and learn.opt is opt and [m.training for m in learn.model.modules()] == modes
    assert path.stat().st_size < plain + 5_000          # 21 images of 768 values alone are 16,000; a teacher has as many weights as the network
    again, items = loaded(path), list(learn.dls.valid.items)
    assert torch.equal(answers(again, items), answers(learn, items)) and type(again.model) is type(get_model(getattr(learn.model, '_orig_mod', learn.model)))
    assert again.opt is None and len(again.dls.train_ds) == 0 and again.predict(items[0])[0] == learn.predict(items[0])[0]
    if done not in ('compiled', 'parallel'):
        with learn.no_bar(), learn.no_logging(): learn.fit(1)


@pytest.mark.parametrize('write', WAYS)
def test_in_16_bits_what_is_loaded_answers_as_after_to_fp32(make_learn, tmp_path, write):
    learn = make_learn().to_fp16()
    again, items = loaded(write(learn, tmp_path/'l.pkl')), list(learn.dls.valid.items)
    assert learn.autocast_cb in learn.cbs and not torch.equal(answers(again, items), low := answers(learn, items)) and torch.allclose(answers(again, items), low, atol=.02)
    assert torch.equal(answers(again, items), answers(learn.to_fp32(), items))


@pytest.mark.parametrize('write', WAYS)
def test_a_teacher_stays_behind(make_learn, tmp_path, write):
    learn = make_learn()
    alone = write(learn, tmp_path/'alone.pkl').stat().st_size
    teacher = nn.Sequential(small_net(), nn.Linear(3, 100_000), nn.Linear(100_000, 3))
    learn.distill(teacher)
    assert write(learn, tmp_path/'taught.pkl').stat().st_size < alone + 5_000 < 4*100_000 and learn.distill_cb.teacher[1].out_features == 100_000
    assert loaded(tmp_path/'taught.pkl').techniques['distill'].arguments['teacher'] == '<Sequential>'


@pytest.mark.parametrize('write', WAYS)
def test_data_by_lambdas_go_along_and_no_data(mixed_photos, tmp_path, write):
    label = lambda f: f.parent.name[0]                                                          # noqa: E731
    dls = DataBlock((ImageBlock, CategoryBlock), get_y=label, splitter=RandomSplitter(seed=0), item_tfms=Resize(16)).dataloaders(
        get_image_files(mixed_photos), bs=8, num_workers=0, device=torch.device('cpu'))
    torch.manual_seed(0)
    learn = Learner(dls, small_net())
    again, items = loaded(write(learn, tmp_path/'l.pkl')), get_image_files(mixed_photos)[:9]
    assert torch.equal(answers(again, items), answers(learn, items)) and list(again.dls.vocab) == ['b', 'g', 'r'] and (tmp_path/'l.pkl').stat().st_size < 60_000


class Scaled(Callback):
    "Takes part in predictions, as those of text Learners do."
    def __init__(self, by): self.by = by
    def after_pred(self): self.learn.pred = self.pred*self.by


class Counts(Callback):
    "Looks at training only."
    def after_step(self): self.n = getattr(self, 'n', 0) + 1


class Reset(nn.Sequential):
    def reset(self): pass
    def forward(self, x): return super().forward(x), x, x


@pytest.mark.parametrize('write', WAYS)
def test_callbacks_that_take_part_in_predictions_go_along_and_others_do_not(make_learn, tmp_path, write):
    learn = make_learn(cbs=[Scaled(3.), Counts()])
    again, items = loaded(write(learn, tmp_path/'l.pkl')), list(learn.dls.valid.items)
    assert [type(cb) for cb in again.cbs if type(cb) in (Scaled, Counts)] == [Scaled] and again.scaled.learn is again and learn.scaled.learn is learn
    assert torch.equal(answers(again, items), answers(learn, items))

    learn = make_learn(model=Reset(*small_net()), cbs=[ModelResetter(), RNNCallback()])
    again = loaded(write(learn, tmp_path/'rnn.pkl'))
    assert torch.equal(answers(again, items), answers(learn, items))


@pytest.mark.parametrize('write', WAYS)
def test_of_a_view_only_what_is_seen_is_stored(make_learn, tmp_path, write):
    learn = make_learn()
    small = write(learn, tmp_path/'a.pkl').stat().st_size
    learn.model[-1].weight = nn.Parameter(torch.cat([learn.model[-1].weight.detach(), torch.zeros(100_000, 32)])[:3])
    assert write(learn, tmp_path/'b.pkl').stat().st_size < small + 2_000 and learn.model[-1].weight.untyped_storage().nbytes() > 12e6
    items = list(learn.dls.valid.items)
    assert torch.equal(answers(loaded(tmp_path/'b.pkl'), items), answers(learn, items))


def test_tensors_that_own_their_memory_are_left_and_tied_ones_stay_tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert with_own_memory(net) is net
    net[0].weight = net[1].weight = nn.Parameter(torch.arange(90.).view(30, 3)[:3])
    own = with_own_memory(net)
    assert own is not net and own[0].weight is own[1].weight and torch.equal(own[0].weight, net[0].weight) and own[0].weight.untyped_storage().nbytes() == 36
