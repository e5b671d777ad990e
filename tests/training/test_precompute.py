"Activations stored once: the head trains on them as it would behind the body, and nothing else notices."
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, L, Learner, load_learner, nn, params
from fastai.data.transforms import Normalize
from fastai.vision.all import ImageDataLoaders, Resize, vision_learner
from torch.utils.data import TensorDataset

from fastrecipes.data import augment, balance, mixing  # noqa: F401  their techniques
from fastrecipes.data.folders import image_folder
from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.data.loaders import Indexed
from fastrecipes.production.export import export_learner
from fastrecipes.training import activations
from fastrecipes.training.activations import store
from fastrecipes.training.precompute import StoredDL, body_of
from fastrecipes.training.resume import resumable
from fastrecipes.training.transfer import backbone, classifier

N, VALID = 70, 30


def network(seed=1):
    "A body with batch norm and dropout in front of a head with a dropout of its own."
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(.5), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8))
    body[1].running_mean.fill_(.3)
    body[5].running_var.fill_(.2)
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.2), nn.Linear(8, 3)))


def learner(freeze=True, bs=16, **kwargs) -> Learner:
    g = torch.Generator().manual_seed(0)
    sets = [Indexed(TensorDataset(torch.rand(n, 3, 12, 12, generator=g), torch.randint(3, (n,), generator=g)), vocab=range(3)) for n in (N, VALID)]
    kw = dict(seed=3, num_workers=0, after_batch=[Normalize.from_stats([.5]*3, [.25]*3, cuda=False)])
    dls = DataLoaders(KeyedDL(sets[0], bs, shuffle=True, drop_last=True, **kw), KeyedDL(sets[1], bs, **kw), device=torch.device('cpu'))
    learn = quiet(Learner(dls, network(), CrossEntropyLossFlat(), splitter=lambda m: L(params(m[0]), params(m[1])), **kwargs))
    keyed(learn, 3)
    if freeze: learn.freeze()
    return learn


def quiet(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


class EvalBody(Callback):
    "The slow way: the body in evaluation mode in every training batch."
    def before_batch(self): self.learn.model[0].eval()


def slowly(learn):
    "What `precompute` is to equal: the same Learner, without."
    learn.train_bn = False
    learn.create_opt()
    learn.freeze()
    return learn.add_cb(EvalBody())


class Batches(Callback):
    "What goes in and who is in it."
    order = 50
    def before_fit(self): self.train, self.valid = [], []
    def before_batch(self):
        l = self.learn
        (self.train if l.training else self.valid).append((l.xb[0].clone(), l.yb[0].clone(), l.dl.draws(l.iter).tolist()))


def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]
def assert_equal(a, b): assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def test_the_head_is_trained_as_behind_the_body_bit_for_bit(tmp_path):
    "Weights, losses, metrics, order, dropout of the head."
    fast, slow = learner().precompute(str(tmp_path)), slowly(learner())
    for learn in (fast, slow): learn.fit(3, 1e-2, cbs=Batches() if learn is fast else None)
    assert_equal(weights(fast), weights(slow))
    assert fast.recorder.values == slow.recorder.values and fast.recorder.losses == slow.recorder.losses
    assert_equal([fast.get_preds()[0]], [slow.get_preds()[0]])


def test_what_goes_in_is_the_bodys_answer_for_the_samples_that_were_drawn(tmp_path):
    learn = learner().precompute(str(tmp_path))
    learn.fit(1, 1e-2, cbs=(seen := Batches()))
    x, y = learn.dls.train_ds.dataset.tensors
    body = network()[0].eval()
    for xb, yb, draws in seen.train:
        with torch.no_grad(): assert torch.allclose(xb.flatten(1), body((x[draws]-.5)/.25).mean((2, 3)), atol=1e-6)
        assert torch.equal(yb, y[draws])
    assert len(seen.train) == 4 and sorted(d for _, _, draws in seen.valid for d in draws) == list(range(VALID))


class Counting(nn.Module):
    "A frozen layer that counts the samples that it sees."
    def __init__(self): super().__init__(); self.weight, self.seen = nn.Parameter(torch.ones(())), 0
    def forward(self, x):
        self.seen += len(x)
        return x*self.weight


def test_the_body_sees_each_sample_once_however_many_epochs(tmp_path):
    learn = learner(freeze=False)
    learn.model[0].add_module('count', Counting())
    learn.freeze()
    learn.precompute(str(tmp_path)).fit(1, 1e-2)
    count = learn.model[0].count
    before = count.seen
    assert before < N + VALID + 20                                              # a few more are looked at: preflight, the shape of the answer
    learn.fit(5, 1e-2)
    assert count.seen-before <= 4                                               # those of the shape
    learn.validate()
    assert count.seen-before >= VALID                                           # outside of a fit the network is whole


def test_where_the_body_ends():
    learn = learner()
    assert body_of(learn) == [*(f'0.{i}' for i in range(6)), '1.0', '1.1']      # up to the head's dropout: 8 numbers a sample
    learn.unfreeze()
    assert body_of(learn) == []
    for p in learn.model[0][0].parameters(): p.requires_grad_(False)            # by hand
    assert body_of(learn) == ['0.0']                                            # the norm behind it trains
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    assert body_of(learn)[-1] == '1.1'


def test_the_files_hold_a_row_a_sample_and_are_written_whole(tmp_path):
    learn = learner().precompute(str(tmp_path), dtype='float16')
    learn.fit(1, 1e-2)
    folder, = tmp_path.iterdir()
    assert {f.name: (np.load(f).dtype.name, np.load(f).shape) for f in folder.iterdir()} == {
        'train.0.npy': ('float16', (N, 8)), 'train.1.npy': ('int64', (N,)), 'valid.0.npy': ('float16', (VALID, 8)), 'valid.1.npy': ('int64', (VALID,))}
    full = learner().precompute(str(tmp_path))
    full.fit(1, 1e-2)
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(weights(learn), weights(full)))      # 11 bits


def test_float16_that_would_overflow_is_refused(tmp_path):
    learn = learner()
    learn.model[0][5].weight.data.fill_(1e6)
    with pytest.raises(ValueError, match='dtype float16 holds values up to 65,504.*use float32'): learn.precompute(str(tmp_path), dtype='float16').fit(1)
    assert not any(p.is_dir() and not p.name.endswith('.part') for p in tmp_path.iterdir())


@pytest.mark.parametrize('what', ['weights', 'statistics', 'data', 'labels', 'transforms', 'nothing'])
def test_what_is_stored_is_used_again_only_where_all_is_the_same(what, tmp_path, capsys):
    learner().precompute(str(tmp_path)).fit(1, 1e-2)
    learn = learner()
    if what == 'weights': learn.model[0][4].weight.data[0, 0, 0, 0] += 1e-3
    if what == 'statistics': learn.model[0][1].running_var[0] += 1e-3
    if what == 'data': learn.dls.train_ds.dataset.tensors[0][41, 0, 5, 5] += .01
    if what == 'labels': learn.dls.valid_ds.dataset.tensors[1][7] = (learn.dls.valid_ds.dataset.tensors[1][7]+1) % 3
    if what == 'transforms':
        for dl in learn.dls.loaders: dl.after_batch.fs[-1].mean += .01
    capsys.readouterr()
    learn.precompute(str(tmp_path)).fit(1, 1e-2)
    effect, out = learn.techniques['precompute'].effect, capsys.readouterr().out
    again = len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1
    assert again == (what == 'nothing') == effect.endswith('as stored before')
    if not again: assert '1 earlier set there (of another body, other data or transforms) did not fit' in effect and effect in out


def test_files_that_changed_are_read_again(digit_folder, tmp_path):
    shutil.copytree(digit_folder, tmp_path/'digits')
    dls = image_folder(tmp_path/'digits', size=16, bs=32, workers=0)
    def stored():
        learn = quiet(classifier(dls, backbone('resnet10t', pretrained=False)))
        torch.manual_seed(0)
        for p in learn.model.parameters(): p.data = torch.randn_like(p)*.1
        learn.freeze()
        return store(learn.precompute(str(tmp_path/'acts')), body_of(learn), tmp_path/'acts', 1, 'float32')
    assert [stored()[1], stored()[1]] == [False, True]
    os.utime(dls.train.items[-1], (1, 1))
    assert not stored()[1]


def test_a_kill_in_the_middle_costs_what_was_not_yet_on_disk(tmp_path, monkeypatch):
    "Killed in the third batch of 16: the second session begins with it."
    monkeypatch.setattr(activations, 'FLUSH', -1.)
    whole = learner().precompute(str(tmp_path/'whole'))
    whole.fit(2, 1e-2)
    seen, answer = [], activations._answer
    def dying(learn, body, x):
        seen.append(len(x))
        if len(seen) == 4: raise KeyboardInterrupt                              # the first call is for the shape
        return answer(learn, body, x)
    monkeypatch.setattr(activations, '_answer', dying)
    with pytest.raises(KeyboardInterrupt): learner().precompute(str(tmp_path/'run')).fit(2, 1e-2)
    assert [p.suffix for p in (tmp_path/'run').iterdir() if p.is_dir()] == ['.part']
    again = learner().precompute(str(tmp_path/'run'))
    again.fit(2, 1e-2)
    assert sum(seen[4:]) == 2 + (N-32) + VALID
    assert_equal(weights(again), weights(whole))


def test_a_full_disk_is_said_and_the_body_works_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(activations.shutil, 'disk_usage', lambda p: namedtuple('usage', 'total used free')(9, 9, 100))
    learn, slow = learner().precompute(str(tmp_path)), learner().freeze_bn()
    for o in (learn, slow): o.fit(1, 1e-2)
    assert 'are needed and 0.1 kB are free' in learn.techniques['precompute'].effect and 'nothing is stored' in capsys.readouterr().out
    assert_equal(weights(learn), weights(slow))
    assert not list(tmp_path.glob('*/*'))


def test_a_folder_that_cannot_be_written_is_said_and_the_body_works_on(tmp_path, capsys):
    (tmp_path/'file').write_text('no folder')
    learn = learner().precompute(str(tmp_path/'file'))
    learn.fit(1, 1e-2)
    assert f'{tmp_path}/file cannot be written: ' in capsys.readouterr().out and len(learn.recorder.losses) == 4


def test_an_image_that_cannot_be_read_is_no_matter_of_the_disk(tmp_path, monkeypatch):
    learn = learner().precompute(str(tmp_path))
    monkeypatch.setattr(activations, '_pass', lambda *args: (_ for _ in ()).throw(OSError('image file is truncated')))
    with pytest.raises(OSError, match='image file is truncated'): learn.fit(1)


def varied(learn): return learn.augment(rotate=0., zoom=1., warp=0., lighting=0., flip=True, crop=3)


def test_views_are_those_that_the_epochs_would_show(tmp_path):
    "As many views as epochs: the fit equals one on augmented images; then they come round again."
    fast, slow = (varied(o) for o in (learner(), learner()))
    fast.precompute(str(tmp_path), views=3).fit(3, 1e-2)
    slowly(slow).fit(3, 1e-2)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(fast), weights(slow)))
    fast.fit(2, 0., cbs=(seen := Batches()))                                    # epochs 3 and 4: views 0 and 1
    rows = np.load(next(tmp_path.iterdir())/'train.0.npy').reshape(3, N, -1)
    for b, (xb, _, draws) in enumerate(seen.train): assert torch.equal(xb, torch.from_numpy(rows[b//4, draws]).view(xb.shape))
    assert not np.array_equal(rows[0], rows[1])


def test_a_sample_that_is_drawn_again_shows_another_view(tmp_path):
    learn = varied(learner()).balance('upsampling').precompute(str(tmp_path), views=2)
    learn.fit(1, 1e-2, cbs=(seen := Batches()))
    rows = np.load(next(p for p in tmp_path.iterdir() if p.is_dir())/'train.0.npy').reshape(2, N, -1)
    assert any(d >= N for *_, draws in seen.train for d in draws)
    for xb, _, draws in seen.train: assert torch.equal(xb.flatten(1), torch.from_numpy(np.stack([rows[d//N % 2, d % N] for d in draws])))


def test_views_of_images_that_nothing_varies_are_called_alike(tmp_path, capsys):
    learner().precompute(str(tmp_path), views=2).fit(1, 1e-2)
    assert 'the 2 views are alike, for the training loader varies no image' in capsys.readouterr().out


def test_augmentation_of_one_view_is_refused_by_both_names(tmp_path):
    for one in (lambda: varied(learner()).precompute(str(tmp_path)), lambda: varied(learner().precompute(str(tmp_path))).fit(1)):
        with pytest.raises(ValueError, match="'precompute' and 'augment' do not go together: .*views=5 stores five"): one()
    with pytest.raises(ValueError, match="'precompute' and 'mixup' do not go together"): learner().mixup().precompute(str(tmp_path), views=2)


def test_after_unfreezing_the_inputs_are_used_again_and_it_is_said(tmp_path, capsys):
    fast, slow = learner().precompute(str(tmp_path)), slowly(learner())
    for learn in (fast, slow): learn.fit(1, 1e-2)
    slow.remove_cb(EvalBody)
    for learn in (fast, slow):
        learn.unfreeze()
        learn.fit(1, 1e-3)
    assert_equal(weights(fast), weights(slow))
    said = 'samples: 8 numbers each, 4.5 kB; no layer at the front is frozen any more: the inputs themselves are used again'
    assert said in capsys.readouterr().out and fast.techniques['precompute'].effect.endswith(said)


def test_a_network_of_which_nothing_is_frozen_is_trained_on_the_inputs_and_it_is_said(tmp_path, capsys):
    learn = learner(freeze=False).precompute(str(tmp_path))
    learn.fit(1, 1e-2)
    assert 'so nothing can be stored for it: the inputs themselves are used' in capsys.readouterr().out and not any(tmp_path.iterdir())


class Die(Callback):
    order = 60
    def after_pred(self):
        if self.learn.training and self.learn.iter == 2: raise RuntimeError('dies')


def test_a_fit_that_dies_leaves_the_network_whole(tmp_path):
    learn = learner().precompute(str(tmp_path))
    with pytest.raises(RuntimeError, match='dies'): learn.fit(1, 1e-2, cbs=Die())
    assert not any('forward' in vars(m) for m in learn.model.modules()) and not isinstance(learn.dls.train, StoredDL)
    x = torch.rand(4, 3, 12, 12)
    with torch.no_grad(): assert torch.equal(learn.model[0].eval()(x), network()[0].eval()(x))


def test_it_answers_exports_and_loads_as_a_whole(tmp_path):
    learn = learner().precompute(str(tmp_path/'acts'))
    learn.fit(1, 1e-2)
    x, y = learn.dls.valid_ds.dataset.tensors
    with torch.no_grad(): expected = learn.model.eval()((x-.5)/.25).softmax(1)
    assert torch.allclose(learn.get_preds()[0], expected, atol=1e-6)
    assert learn.validate()[0] == pytest.approx(float(-expected.log()[range(VALID), y].mean()), abs=1e-5) == pytest.approx(learn.recorder.values[-1][1], abs=1e-5)
    again = load_learner(export_learner(learn, tmp_path/'l.pkl'))
    with torch.no_grad(): assert torch.allclose(again.model.eval()((x-.5)/.25).softmax(1), expected)


def test_a_learner_of_fastais_vision_learner_with_workers(digit_folder, tmp_path):
    dls = ImageDataLoaders.from_folder(digit_folder, valid_pct=.3, seed=0, item_tfms=Resize(16), bs=32, num_workers=2, device='cpu')
    def make():
        torch.manual_seed(0)
        learn = quiet(vision_learner(dls, 'resnet10t', pretrained=False, normalize=False))
        learn.freeze()
        keyed(learn, 0)
        return learn
    fast, slow = make().precompute(str(tmp_path)), slowly(make())
    for learn in (fast, slow): learn.fit(2, 1e-2)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights(fast), weights(slow)))      # stored in other batches than they are trained in
    assert list(fast.recorder.values[-1]) == pytest.approx(list(slow.recorder.values[-1]), abs=1e-5)
    assert torch.allclose(fast.predict(dls.valid.items[0])[2], slow.predict(dls.valid.items[0])[2], atol=1e-5) and fast.dls.train.fake_l.num_workers == 2


def test_cached_pixels_and_files_give_the_same(digit_folder, tmp_path):
    def make(cache):
        learn = classifier(image_folder(digit_folder, size=16, bs=32, workers=0, cache=cache), backbone('resnet10t', pretrained=False))
        torch.manual_seed(0)
        for p in learn.model.parameters(): p.data = torch.randn_like(p)*.1
        learn.freeze()
        keyed(learn, 0)
        return quiet(learn).precompute(str(tmp_path/'acts'))
    runs = [make(cache) for cache in (False, str(tmp_path/'pixels'))]
    for learn in runs: learn.fit(1, 1e-2)
    assert_equal(weights(runs[0]), weights(runs[1]))
    assert runs[1].techniques['precompute'].effect.endswith('as stored before')


def test_killed_in_training_it_goes_on(tmp_path):
    def program(folder, kill=False):
        learn = learner().precompute(str(tmp_path/'acts'))
        with resumable(folder, every=1): learn.fit(2, 1e-2, cbs=Die() if kill else None)
        return learn
    whole = program(tmp_path/'whole')
    with pytest.raises(RuntimeError): program(tmp_path/'run', kill=True)
    assert_equal(weights(program(tmp_path/'run')), weights(whole))


def test_what_makes_no_sense_is_refused(tmp_path):
    for given, said in ((dict(views=0), 'precompute: views must be ≥ 1, got 0'), (dict(dtype='int8'), "dtype must be .*got 'int8'")):
        with pytest.raises(ValueError, match=said): learner().precompute(str(tmp_path), **given)
    learn = learner()
    learn.model = torch.nn.ModuleDict()
    with pytest.raises(ValueError, match='precompute: the body must be the first layers of an nn.Sequential.*ModuleDict is none'): learn.precompute(str(tmp_path))
