"Noisy Student end to end on scanned digits: who is kept and why, what students are taught, that a killed run goes on, what is refused."
import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from torch.utils.data import TensorDataset

from fastrecipes.data.pseudo import SoftCrossEntropy
from fastrecipes.data.samples import digits
from fastrecipes.recipes import self_training
from fastrecipes.recipes.self_training import noisy_student
from fastrecipes.report.intervals import Difference, Estimate
from fastrecipes.report.run_folder import load_run

from .dying import killed

RECIPE = dict(arch='test_resnet', pretrained=False, size=16, epochs=2, lr=3e-3, bs=16, valid=.25, test=.25, augment=dict(flip=False), rounds=2, threshold=0., balance=False)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Zeros, ones and sevens: 40 of each with labels, 30 without, and 2 of the labelled ones among these."
    root = tmp_path_factory.mktemp('semi')
    (root/'more').mkdir()
    for c in '017':
        (root/'few'/c).mkdir(parents=True)
        for i, p in enumerate(sorted((digits(root/'all')/c).iterdir())[:70]): shutil.copy(p, root/'few'/c if i < 40 else root/'more'/f'{c}_{p.name}')
    for i, p in enumerate(sorted((root/'few'/'0').iterdir())[:2]): shutil.copy(p, root/'more'/f'copy{i}.png')
    return root/'few', root/'more'


@pytest.fixture(scope='module')
def watched():
    "What each network was trained with: its name in the table is not known there, its order is."
    return []


@pytest.fixture(scope='module')
def run(data, watched, tmp_path_factory):
    make = self_training.image_classifier
    def watch(dls, arch, **kw):
        learn = make(dls, arch, **kw)
        watched.append(dict(kw, arch=arch, batches=len(dls.train), n=len(dls.train.dataset), loss=type(learn.loss_func), dls=dls))
        return learn
    with pytest.MonkeyPatch.context() as m:
        m.setattr(self_training, 'image_classifier', watch)
        return noisy_student(*data, **RECIPE, out=str(tmp_path_factory.mktemp('ns')/'run'))


def test_a_round_is_kept_if_and_only_if_it_is_better_on_validation(run):
    names = [r.name for r in run.rounds]
    assert names[0] == 'teacher' and names[-1] == 'control' and run.rounds[0].kept
    students = run.rounds[1:-1]
    assert [r.kept for r in students] == [r.change.value > 0 for r in students] and all(r.kept for r in students[:-1])
    for r, before in zip(students, run.rounds): assert r.change.value == pytest.approx(r.valid.value-before.valid.value)
    assert run.accepted.valid.value == max(r.valid.value for r in run.rounds[:-1])
    assert 'not better, the teacher stays' not in students[-1].reason or not students[-1].kept


def test_the_table_is_that_of_the_networks(run):
    learn = run.learn
    for i, e in ((1, run.accepted.valid), (2, run.accepted.test)):
        p, y = learn.get_preds(ds_idx=i)
        assert e.value == pytest.approx(accuracy_score(y, p.argmax(1))) and e.n == len(y)
    assert run.control.test.n == len(learn.dls.loaders[2].items)
    said = str(run)
    assert all(r.name in said and str(r.test) in said for r in run.rounds) and f'{run.accepted.name} − control: {run.difference}' in said


def test_students_have_noise_and_probabilities_the_teacher_neither_and_the_control_only_the_noise(run, watched):
    teacher, *students, control = watched
    assert not {'randaugment', 'dropout'} & teacher.keys() and teacher['loss'] is not SoftCrossEntropy
    assert teacher['augment'] == dict(flip=False) and teacher['label_smoothing'] == .1
    for s in (*students, control): assert s['randaugment'] is True and s['dropout'] == .5 and s['augment'] == dict(flip=False)
    assert all(s['loss'] is SoftCrossEntropy for s in students) and control['loss'] is not SoftCrossEntropy
    labelled = teacher['n']
    assert all(s['n'] == labelled+90 for s in students) and control['n'] == labelled        # the copies are left out
    assert control['batches'] == students[0]['batches'] > teacher['batches'] and control['seed'] == students[0]['seed']
    assert len({w['seed'] for w in watched[:-1]}) == len(watched)-1


def test_nothing_held_out_is_trained_on(run, watched):
    held = {p.read_bytes() for dl in run.learn.dls.loaders[1:] for p in dl.items}
    assert len(held) == sum(len(dl.items) for dl in run.learn.dls.loaders[1:])
    for w in watched: assert not held & {p.read_bytes() for p in w['dls'].train.items}


def test_what_is_left_behind(run, data):
    told = json.loads((run.path/'provenance.json').read_text())
    assert told['finished'] and [r['name'] for r in told['rounds']] == [r.name for r in run.rounds] and told['rounds'][1]['labels'].startswith('90 of 90 unlabelled images')
    page = (run.path/'report.html').read_text()
    assert 'control' in page and 'a student on the labelled images alone' in page and 'randaugment' in page
    again = load_run(run.path)
    assert list(again.validate()) == pytest.approx(list(run.learn.validate())) and len(again.dls.train.items) == len(run.learn.dls.train.items)
    assert type(run.learn.loss_func) is not SoftCrossEntropy and b'more/' not in (run.path/'learner.pkl').read_bytes()
    with pytest.raises(ValueError, match='holds a finished run'): noisy_student(*data, **RECIPE, out=str(run.path))


def test_a_killed_run_goes_on_and_ends_the_same(run, data, tmp_path, monkeypatch):
    "Killed in the teacher's training, once it has labelled, in the first student's, in the control's."
    again = lambda: noisy_student(*data, **RECIPE, out=str(tmp_path/'run'))
    last = f'{len(run.rounds)}.pt'
    for name, n in (('1.pt', 2), ('journal.pt', 1), ('2.pt', 3), (last, 2)): killed(monkeypatch, again, name, n)
    there = again()
    plain = lambda r: {k: v for k, v in r.record().items() if k != 'seconds'}
    assert list(map(plain, there.rounds)) == list(map(plain, run.rounds)) and there.difference == run.difference
    assert all(map(torch.equal, there.learn.model.state_dict().values(), run.learn.model.state_dict().values()))


def test_a_student_that_is_no_better_is_not_kept(data, monkeypatch):
    "Labels that are wrong: each digit is called the next class."
    label = self_training.pseudo_label
    def wrong(*args):
        pseudo = label(*args)
        pseudo.probabilities = np.roll(np.eye(3, dtype=np.float32)[pseudo.probabilities.argmax(1)], 1, 1)
        return pseudo
    monkeypatch.setattr(self_training, 'pseudo_label', wrong)
    r = noisy_student(*data, **{**RECIPE, 'control': False, 'epochs': 3, 'randaugment': False, 'dropout': False, 'ratio': 7.})
    assert [o.name for o in r.rounds] == ['teacher', 'round 1'] and not r.rounds[1].kept and r.accepted.name == 'teacher'
    assert r.control is None and r.difference is None and 'not better, the teacher stays' in str(r)
    p, y = r.learn.get_preds(ds_idx=1)
    assert accuracy_score(y, p.argmax(1)) == r.rounds[0].valid.value and 'randaugment' not in r.learn.techniques


@pytest.mark.parametrize('interval, said', [((.02, .01, .03), 'round 1 is better than training on the labelled images alone'), ((-.02, -.03, -.01), 'the CONTROL IS BETTER'),
                                            ((.02, -.01, .05), 'no difference is certain')])
def test_what_the_difference_to_the_control_comes_to_is_said(interval, said):
    rounds = [self_training.Round(name, kept, '', Estimate(.9, .8, 1., 30), None, Estimate(.9, .8, 1., 30)) for name, kept in (('teacher', True), ('round 1', True), ('control', False))]
    assert said in str(self_training.SelfTrained(None, rounds, Difference(*interval, 100)))


def test_when_no_answer_is_sure_enough_the_teacher_stays(data, capsys):
    r = noisy_student(*data, **{**RECIPE, 'threshold': .9999, 'epochs': 1})
    assert [o.name for o in r.rounds] == ['teacher'] and 'round 1: threshold: no answer has a probability of 0.9999 or more' in capsys.readouterr().out


def test_datasets_hard_labels_and_a_larger_student():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(180) % 3
    x = torch.rand(180, 3, 16, 16, generator=g)*.5 + torch.eye(3)[y][:, :, None, None]*.3
    sets = [TensorDataset(x[s], y[s]) for s in (slice(0, 60), slice(60, 120))]
    r = noisy_student(tuple(sets), TensorDataset(x[120:]), **{**RECIPE, 'rounds': 1, 'soft': False, 'student': 'resnet10t', 'augment': False, 'epochs': 1})
    assert [o.name for o in r.rounds] == ['teacher', 'round 1', 'control'] and r.rounds[1].test is None
    assert r.rounds[1].labels.startswith('60 of 60 unlabelled images')


@pytest.mark.parametrize('change, message', [
    (dict(rounds=0), 'rounds: at least 1, got 0'), (dict(threshold=1.), r'threshold: a probability in \[0, 1\), got 1.0'), (dict(ratio=0.), 'ratio: above 0, got 0.0'),
    (dict(bs=1), 'bs: at least 2'), (dict(unlabelled='nowhere'), 'unlabelled: no folder nowhere'), (dict(class_weights=True), 'class_weights: it counts the classes.*take soft=False'),
    (dict(loss='bce'), "loss: soft labels are probabilities over the classes, .* got 'bce'"),
    (dict(student='resnet10'), "student: neither timm nor torchvision has a network 'resnet10'"),
    (dict(randaugmen=True), "no argument and no technique named 'randaugmen'; did you mean 'randaugment'"), (dict(epochs=0), 'epochs: at least 1'), (dict(valid=0.), 'valid: '),
    (dict(precompute='x'), 'precompute: it keeps the answers'), (dict(soft=1), 'soft must be True or False, got 1')])
def test_what_is_wrong_is_refused_before_any_training(data, monkeypatch, change, message):
    monkeypatch.setattr(self_training, 'image_classifier', None)
    asked = dict(unlabelled=data[1]) | RECIPE | change
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message): noisy_student(data[0], **asked)


def test_unlabelled_images_that_are_all_held_out_are_refused_before_any_training(data, monkeypatch):
    monkeypatch.setattr(self_training, 'image_classifier', None)
    with pytest.raises(ValueError, match='unlabelled: no image is left: .* that are training images'): noisy_student(data[0], data[0], **RECIPE)
