"Labels by a network: which are kept, what a batch is made of, what must never get in, and the loss of probabilities."
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, nn
from fastai.vision.all import Normalize
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from fastrecipes.data.folders import image_folder
from fastrecipes.data.keyed import keyed
from fastrecipes.data.loaders import as_dataloaders, labels_of
from fastrecipes.data.pseudo import MixedSampler, SoftCrossEntropy, labelled_alone, picked, pseudo_label
from fastrecipes.data.samples import digits
from fastrecipes.technique import discover

discover()


def test_picked_by_hand():
    p = np.array([[.9, .1, 0], [.6, .4, 0], [.8, .1, .1], [.3, .5, .2], [.34, .33, .33], [.7, .2, .1]])
    assert picked(p, .5, balance=False).tolist() == [0, 1, 2, 3, 5]
    assert picked(p, .5).tolist() == [0, 2, 3, 3]       # 5 of two classes: round(2.5) = 2 of each; row 3 again
    assert picked(p, .95).tolist() == []
    assert picked(p, .0).tolist() == [0, 2, 3, 3, 3, 5]  # 6 of two classes: 3 of each


def test_picked_repeats_the_surest_first():
    p = np.array([[.9, .1]]*7 + [[.4, .6], [.2, .8]])
    assert Counter(picked(p, .5).tolist()) == {**{i: 1 for i in range(4)}, 8: 2, 7: 2}
    p = np.array([[.9, .1]]*8 + [[.4, .6], [.2, .8]])
    assert Counter(picked(p, .5).tolist()) == {**{i: 1 for i in range(5)}, 9: 3, 8: 2}


def test_a_soft_cross_entropy_is_torchs_and_on_classes_fastais():
    z, t, y = torch.randn(6, 4), torch.rand(6, 4).softmax(1), torch.randint(4, (6,))
    w = torch.tensor([1., 2., 3., 4.])
    assert float(SoftCrossEntropy()(z, t)) == pytest.approx(float(F.cross_entropy(z, t)), rel=1e-6)
    assert float(SoftCrossEntropy(label_smoothing=.2)(z, t)) == pytest.approx(float(F.cross_entropy(z, t, label_smoothing=.2)), rel=1e-6)
    assert float(SoftCrossEntropy(weight=w)(z, F.one_hot(y, 4).float())) == pytest.approx(float(F.cross_entropy(z, y, w)), rel=1e-6)
    for own in ({}, dict(weight=w), dict(label_smoothing=.1), dict(reduction='sum')): assert torch.equal(SoftCrossEntropy(**own)(z, y), CrossEntropyLossFlat(**own)(z, y))


def test_a_batch_is_made_up_of_its_shares_and_an_epoch_sees_the_larger_pool_once():
    s = MixedSampler([range(10), [10, 11, 11, 12, 13, 14, 15]], [2, 1], seed=0)
    drawn = s.draw(np.random.default_rng(0)).reshape(-1, 3)
    assert len(s) == 21 and len(drawn) == 7 and (drawn[:, :2] < 10).all() and (drawn[:, 2] >= 10).all()
    assert Counter(drawn[:, 2].tolist()) == {10: 1, 11: 2, 12: 1, 13: 1, 14: 1, 15: 1}
    assert set(Counter(drawn[:, :2].ravel().tolist()).values()) == {1, 2}        # 14 draws of ten: each once, four again
    assert list(s) != list(s) and len(list(s)) == 21


def test_an_epoch_comes_to_the_end_of_the_longest_pool_though_its_share_does_not_divide_it():
    drawn = MixedSampler([range(3), range(10, 17)], [1, 2]).draw(np.random.default_rng(0)).reshape(-1, 3)
    assert len(drawn) == 4 and {*drawn[:, 1:].ravel().tolist()} == {*range(10, 17)}


def test_a_pool_that_is_gone_through_again_comes_in_another_order():
    drawn = MixedSampler([range(50), range(50, 150)], [1, 1]).draw(np.random.default_rng(0)).reshape(-1, 2)[:, 0]
    first, again = drawn[:50].tolist(), drawn[50:].tolist()
    assert first != again and sorted(first) == sorted(again) == list(range(50))


# ---------------------------------------------------------------------------------------------------------------- files

def small_net(c=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8*64, c))


def hushed(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    keyed(learn, 0)
    return learn


def learner(dls, epochs=3):
    learn = hushed(Learner(dls, small_net(), metrics=[]))
    if epochs: learn.fit(epochs, 3e-3)
    return learn


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Digits: 40 of each class labelled, 24 more without labels, there named by class so that answers can be judged."
    root, rest = tmp_path_factory.mktemp('semi'), []
    for d in sorted(digits(root/'all').iterdir()):
        (root/'few'/d.name).mkdir(parents=True)
        for i, p in enumerate(sorted(d.iterdir())[:64]):
            if i < 40: shutil.copy(p, root/'few'/d.name)
            else: rest.append((p, f'{d.name}_{p.name}'))
    (root/'more'/'deep').mkdir(parents=True)
    for i, (p, name) in enumerate(rest): shutil.copy(p, root/'more'/('deep' if i % 2 else '.')/name)
    return root/'few', root/'more'


@pytest.fixture(scope='module')
def taught(folders):
    dls = image_folder(folders[0], size=16, bs=20, valid=.2, test=.2, workers=0, device=torch.device('cpu'))
    dls.add_tfms([Normalize.from_stats([.5]*3, [.5]*3, cuda=False)], 'after_batch')
    return learner(dls)


def truth(pseudo): return np.array([int(p.name[0]) for p in pseudo.items])


def test_what_a_folder_is_labelled_with_is_what_the_network_answers(taught, folders):
    pseudo = pseudo_label(taught, folders[1], threshold=.6, soft=True, balance=False)
    assert len(pseudo.items) == len(list(folders[1].rglob('*.png'))) and not pseudo.left_out
    p = taught.get_preds(dl=taught.dls.test_dl(pseudo.items))[0]
    assert np.allclose(pseudo.probabilities, p, atol=1e-6) and pseudo.rows.tolist() == np.flatnonzero(p.numpy().max(1) >= .6).tolist()
    assert torch.allclose(pseudo.targets, p, atol=1e-6) and pseudo.counts == {str(c): int((p.argmax(1)[pseudo.rows] == c).sum()) for c in range(10)}
    right = pseudo.probabilities.argmax(1) == truth(pseudo)
    assert right[pseudo.rows].mean() > right.mean() > .6            # the sure ones are right more often
    files = sorted(folders[1].rglob('*.png'))[:30]
    assert pseudo_label(taught, files, threshold=0.).items == files


def test_balanced_labels_come_up_equally_often(taught, folders):
    pseudo = pseudo_label(taught, folders[1])
    assert len(set(pseudo.counts.values())) == 1 and str(pseudo).startswith(f'{len(set(pseudo.rows.tolist())):,} of {len(pseudo.items):,} unlabelled images')


@pytest.mark.parametrize('soft', [True, False])
def test_a_batch_holds_both_kinds_with_their_targets(taught, folders, soft):
    pseudo = pseudo_label(taught, folders[1], soft=soft)
    dls = pseudo.loaders(taught.dls, ratio=3.)
    n, where = len(taught.dls.train.items), {p: i for i, p in enumerate(pseudo.items)}
    vocab, labels = list(taught.dls.vocab), labels_of(taught.dls.train)
    assert list(dls.vocab) == vocab and dls.c == 10 and dls.valid is taught.dls.valid and dls.loaders[2] is taught.dls.loaders[2]
    batches = list(dls.train)
    assert len(batches) == max(-(-n//5), -(-len(pseudo.rows)//15)) == len(dls.train)
    seen = Counter()
    for i, (x, y) in enumerate(batches):
        at = [d % len(dls.train.dataset) for d in dls.train._draws[20*i:20*i+20]]
        assert x.shape == (20, 3, 16, 16) and -1.01 < float(x.min()) < 0 and sum(k < n for k in at) == 5       # normalised as the others
        for k, t in zip(at, y):
            file = dls.train.items[k]
            own = torch.tensor(labels[k]) if k < n else pseudo.targets[where[file]]
            assert torch.allclose(t.as_subclass(torch.Tensor).float(), F.one_hot(own, 10).float() if soft and k < n else own.float(), atol=1e-6)
            if k < n: assert vocab[labels[k]] == file.parent.name
            else: seen[where[file]] += 1
    assert seen == Counter(pseudo.rows.tolist()) or set(seen) >= set(pseudo.rows.tolist())
    assert soft or (labels_of(dls.train)[:n] == labels).all()


def test_as_many_of_either_kind_as_there_are_by_default(taught, folders):
    pseudo = pseudo_label(taught, folders[1])
    n, true = len(taught.dls.train.items), pseudo.loaders(taught.dls).train.sampler.shares
    assert true == [round(20/(1+len(pseudo.rows)/n)), 20-round(20/(1+len(pseudo.rows)/n))]


@pytest.mark.parametrize('with_it', [{}, dict(label_smoothing=.1), dict(mixup=.4), dict(randaugment=True), dict(distill=lambda: dict(teacher=small_net()))], ids=lambda o: ' '.join(o))
def test_soft_targets_train_with_whatever_else_and_validation_stays(taught, folders, with_it):
    dls = pseudo_label(taught, folders[1], soft=True).loaders(taught.dls)
    learn = hushed(Learner(dls, small_net()))
    learn.use(**{k: v() if callable(v) else v for k, v in with_it.items()}).fit(1, 3e-3)
    p, y = learn.get_preds()
    assert learn.recorder.values[-1][1] == pytest.approx(float(F.nll_loss(p.log(), y)), rel=1e-4)
    assert learn.recorder.values[-1][1] < 2.3                           # it has learnt something: chance is log 10


def test_the_loss_of_a_mixed_batch_by_hand(taught, folders):
    from fastai.basics import Callback
    seen = {}
    class Keep(Callback):
        order = 5.9
        def after_loss(self):
            if self.learn.training and not seen: seen.update(loss=float(self.learn.loss_grad.detach()), pred=self.learn.pred.detach(), y=self.learn.yb[0])
    dls = pseudo_label(taught, folders[1], soft=True).loaders(taught.dls)
    for more, by_hand in (({}, lambda z, t: F.cross_entropy(z, t)), (dict(label_smoothing=.2), lambda z, t: F.cross_entropy(z, t, label_smoothing=.2))):
        seen.clear()
        hushed(Learner(dls, small_net(), cbs=Keep())).use(**more).fit(1)
        assert seen['y'].shape == (20, 10) and seen['loss'] == pytest.approx(float(by_hand(seen['pred'], seen['y'])), rel=1e-5)


def test_images_held_out_and_copies_never_get_in(taught, folders, tmp_path):
    train, valid, test = (list(dl.items) for dl in taught.dls.loaders)
    more = sorted(folders[1].rglob('*.png'))[:50]
    for name, p in [*((f'a{i}.png', p) for i, p in enumerate(test[:7])), *((f'b{i}.png', p) for i, p in enumerate(valid[:5])), *((f'c{i}.png', p) for i, p in enumerate(train[:3])),
                    *((p.name, p) for p in more), ('again.png', more[0])]: shutil.copy(p, tmp_path/name)
    (tmp_path/'broken.png').write_bytes(b'no image')
    (tmp_path/'.hidden.png').write_bytes(b'')
    pseudo = pseudo_label(taught, tmp_path, threshold=0.)
    assert pseudo.left_out == {'that are test images': 7, 'that are validation images': 5, 'that are training images': 3, 'that are copies of others': 1, 'that cannot be read': 1}
    kept = {p.read_bytes() for p in pseudo.items}
    assert kept == {p.read_bytes() for p in more} and '7 that are test images' in str(pseudo)
    inside = {p.read_bytes() for p in pseudo.loaders(taught.dls).train.items}
    assert not inside & {p.read_bytes() for p in test + valid}


def test_pictures_that_look_like_one_held_out_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    for c in 'ab':
        (tmp_path/'d'/c).mkdir(parents=True)
        for i in range(12): Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64), 3).save(tmp_path/'d'/c/f'{i}.png')
    dls = image_folder(tmp_path/'d', size=16, bs=4, valid=.25, test=.25, workers=0, device=torch.device('cpu'))
    (tmp_path/'more').mkdir()
    for i, p in enumerate((dls.valid.items[0], dls.loaders[2].items[0], dls.train.items[0])): Image.open(p).resize((48, 48), 3).save(tmp_path/'more'/f'{i}.jpg', quality=90)
    pseudo = pseudo_label(hushed(Learner(dls, small_net(2))), tmp_path/'more', threshold=0.)
    assert pseudo.left_out == {'that look like an image held out': 2} and [p.name for p in pseudo.items] == ['2.jpg']


def test_the_control_has_as_many_batches_of_labelled_images_alone(taught, folders):
    joint = pseudo_label(taught, folders[1]).loaders(taught.dls, ratio=2.)
    alone = labelled_alone(taught.dls, joint)
    n = len(taught.dls.train.items)
    assert len(alone.train) == len(joint.train) and alone.train.dataset is taught.dls.train.dataset
    times = Counter(d % n for d in alone.train.get_idxs())
    assert len(times) == n and max(times.values())-min(times.values()) <= 1 and sum(times.values()) == 20*len(joint.train)


def test_a_student_labels_the_same_images_anew(taught, folders):
    "What it was taught of them makes them no training images with true labels."
    first = pseudo_label(taught, folders[1], soft=True)
    student = learner(first.loaders(taught.dls), epochs=1)
    again = pseudo_label(student, folders[1])
    assert again.items == first.items and not again.left_out
    dls = again.loaders(student.dls)
    assert len(dls.train.dataset) == len(taught.dls.train.items) + len(set(again.rows.tolist()))
    plain = labelled_alone(student.dls)
    assert plain.train.items == taught.dls.train.items and plain.train.sampler is None and len(plain.train) == len(taught.dls.train)
    assert labels_of(plain.train).tolist() == labels_of(taught.dls.train).tolist()


def test_fastais_own_loaders_of_files_do_too(folders):
    from fastai.vision.data import ImageDataLoaders
    from fastai.vision.augment import Resize
    dls = ImageDataLoaders.from_folder(folders[0], valid_pct=.2, seed=0, item_tfms=Resize(16), bs=20, num_workers=0, device='cpu')
    learn = Learner(dls, small_net())
    learn.remove_cb(learn.progress)
    joint = pseudo_label(learn, folders[1], threshold=0., soft=True, balance=False).loaders(dls)
    x, y = joint.train.one_batch()
    assert x.shape == (20, 3, 16, 16) and y.shape == (20, 10) and len(joint.train.items) == len(dls.train.items) + len(list(folders[1].rglob('*.png')))


def test_the_learner_is_as_it_was(taught, folders):
    before, dls = [p.clone() for p in taught.model.parameters()], taught.dls
    fs = [len(dl.after_batch.fs) for dl in dls.loaders]
    joint = pseudo_label(taught, folders[1], soft=True).loaders(dls)
    hushed(Learner(joint, small_net())).use(randaugment=True, augment=True).fit(1)
    assert taught.dls is dls and all(map(torch.equal, before, taught.model.parameters())) and [len(dl.after_batch.fs) for dl in dls.loaders] == fs
    assert dls.train.sampler is None and len(dls.train.dataset) == len(dls.train.items)


# -------------------------------------------------------------------------------------------------------------- tensors

def noise(n, seed): return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


class Pictures(Dataset):
    "Without tensors to look into."
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]


@pytest.mark.parametrize('soft', [True, False])
@pytest.mark.parametrize('kind', [TensorDataset, Pictures], ids=lambda o: o.__name__)
def test_datasets_too(kind, soft):
    x, y = noise(60, 0), torch.arange(60) % 10
    learn = learner(as_dataloaders((TensorDataset(x[:40], y[:40]), TensorDataset(x[40:], y[40:])), bs=10), epochs=1)
    more = torch.cat([noise(30, 1), x[40:44], x[:2], noise(1, 1)])
    pseudo = pseudo_label(learn, kind(more), threshold=0., soft=soft, balance=False)
    assert pseudo.left_out == {'that are validation images': 4, 'that are training images': 2, 'that are copies of others': 1} and pseudo.items == list(range(30))
    with torch.no_grad(): assert np.allclose(pseudo.probabilities, learn.model(more[:30]).softmax(1), atol=1e-5)
    dls = pseudo.loaders(learn.dls)
    assert dls.train.dataset.whole == (kind is TensorDataset)
    for i, (xb, yb) in enumerate(dls.train):
        for d, a, t in zip(dls.train.draws(i), xb, yb):
            k = int(d) % 70
            assert torch.equal(a.as_subclass(torch.Tensor), x[k] if k < 40 else more[k-40])
            own = y[k] if k < 40 else pseudo.targets[k-40]
            assert torch.allclose(t.float(), F.one_hot(own, 10).float() if soft and k < 40 else own.float())
    student = hushed(Learner(dls, small_net()))
    student.label_smoothing(.1).fit(1, 1e-3)
    assert np.isfinite(student.recorder.values[-1]).all()


@pytest.mark.parametrize('kwargs, message', [
    (dict(threshold=1.), r'threshold: a probability in \[0, 1\), got 1.0'),
    (dict(threshold=.999), r'threshold: no answer has a probability of 0.999 or more, the surest has 0\.\d+; lower it'),
    (dict(unlabelled='nowhere'), 'unlabelled: no folder nowhere'), (dict(unlabelled=['gone.png']), 'unlabelled: no file gone.png'),
    (dict(unlabelled=TensorDataset(torch.zeros(1))), 'unlabelled: the labelled images are read from files; give a folder or a list of files, got TensorDataset')])
def test_what_cannot_be_labelled_is_refused(folders, kwargs, message):
    dls = image_folder(folders[0], size=16, bs=20, workers=0, device=torch.device('cpu'))
    with pytest.raises((ValueError, FileNotFoundError), match=message): pseudo_label(learner(dls, 0), **{'unlabelled': folders[1], **kwargs})


def test_other_refusals(taught, folders, tmp_path):
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='unlabelled: no images in'): pseudo_label(taught, tmp_path/'empty')
    with pytest.raises(ValueError, match='unlabelled: no image is left: 3 that are test images'): pseudo_label(taught, list(taught.dls.loaders[2].items[:3]))
    with pytest.raises(ValueError, match='ratio: above 0, got 0'): pseudo_label(taught, folders[1]).loaders(taught.dls, ratio=0)
    with pytest.raises(ValueError, match='needs a Learner that tells classes apart'): pseudo_label(hushed(Learner(taught.dls, small_net(), nn.MSELoss())), folders[1])
    x = TensorDataset(noise(20, 0), torch.arange(20) % 10)
    plain = learner(as_dataloaders((x, x), bs=10), 0)
    with pytest.raises(ValueError, match='the labelled images come from a torch Dataset; give another, got PosixPath'): pseudo_label(plain, folders[1])
