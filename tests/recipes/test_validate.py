"k folds: what is measured against what scikit-learn and a calculator say, what is kept, what goes on after a kill, what is refused."
import csv
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.metrics import log_loss as sklearns_log_loss

from fastrecipes.cli import main
from fastrecipes.data.folders import found_in, image_folder
from fastrecipes.data.samples import digits
from fastrecipes.randomness import key_of
from fastrecipes.recipes import validate
from fastrecipes.recipes.classify import image_classifier
from fastrecipes.recipes.validate import check_folds, cross_validate, log_loss
from fastrecipes.report.intervals import Loss, accuracy, over_folds

from .dying import killed

RECIPE = dict(arch='resnet10t', pretrained=False, size=16, epochs=2, lr=3e-3, bs=16, augment=dict(flip=False))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Scanned digits: 48 zeros, 48 ones and 3 nines."
    root = tmp_path_factory.mktemp('d')
    for c, n in dict(zip('019', (48, 48, 3))).items():
        (root/'digits'/c).mkdir(parents=True)
        for p in sorted((digits(root/'all')/c).iterdir())[:n]: shutil.copy(p, root/'digits'/c)
    return root/'digits'


@pytest.fixture(scope='module')
def measured(data, tmp_path_factory):
    "Three folds of the digits, in a run folder."
    return cross_validate(data, folds=3, **RECIPE, out=str(tmp_path_factory.mktemp('cv')/'run'))


def test_the_interval_by_hand():
    "Scores .8, .9, 1: s² = .01, (1/3 + 1/2)·.01 = .00833, its root .09129, times t(.975; 2) = 4.30265: .39278."
    e = over_folds([.8, .9, 1.])
    assert e.value == pytest.approx(.9) and e.lo == pytest.approx(.9-.39278, abs=1e-5) and e.hi == 1.
    scores = [.5, .7, .6, .65, .55]
    e = over_folds(scores, kind=Loss)
    half = student.ppf(.975, 4)*np.sqrt((1/5+1/4)*np.var(scores, ddof=1))     # Nadeau and Bengio's section 3, J = 5, n2/n1 = 1/4
    assert (e.lo, e.hi) == pytest.approx((.6-half, .6+half)) and str(e) == f'0.600 ({.6-half:.3f}–{.6+half:.3f})'


def test_folds_that_agree_by_luck_are_not_exact():
    pooled = accuracy([1]*20, [1]*20)
    e = over_folds([1., 1.], pooled)
    assert (e.value, e.lo, e.hi, e.n) == (1., pooled.lo, 1., 20) and pooled.lo < .84
    with pytest.raises(ValueError, match='scores: of at least 2 folds, got 1'): over_folds([.5])


def test_log_loss_is_scikit_learns():
    p = np.random.default_rng(0).dirichlet(np.ones(4), 50)
    y = np.arange(50) % 4
    assert log_loss(y, p) == pytest.approx(sklearns_log_loss(y, p)) and log_loss([0], [[0., 1.]]) == pytest.approx(-np.log(1e-7))


def test_each_image_is_judged_once_and_scores_are_those_of_the_predictions(data, measured):
    rows = measured.predictions
    assert [r['file'] for r in rows] == sorted(p.relative_to(data).as_posix() for p in data.rglob('*.png'))
    assert all(r['label'] == r['file'].split('/')[0] for r in rows)
    assert [f.n_train for f in measured.folds] == [len(rows)-f.n for f in measured.folds]
    for f in measured.folds:
        mine = [r for r in rows if r['fold'] == f.number]
        y, p = [r['label'] for r in mine], np.array([[r[f'p_{c}'] for c in '019'] for r in mine])
        assert f.n == len(mine) and [r['predicted'] for r in mine] == ['019'[i] for i in p.argmax(1)] and np.allclose(p.sum(1), 1, atol=1e-5)
        assert f.accuracy == pytest.approx(accuracy_score(y, [r['predicted'] for r in mine]))
        assert f.balanced_accuracy == pytest.approx(balanced_accuracy_score(y, [r['predicted'] for r in mine]))
        assert f.log_loss == pytest.approx(sklearns_log_loss(y, p/p.sum(1, keepdims=True), labels=['0', '1', '9']), rel=1e-4)
    for m in ('accuracy', 'balanced_accuracy', 'log_loss'):
        scores = [getattr(f, m) for f in measured.folds]
        lo, hi = measured.interval[m]
        assert measured.mean[m] == pytest.approx(np.mean(scores)) and lo < measured.mean[m] < hi
    assert measured.mean['accuracy'] > .7                               # it has learnt something: chance is at most .49
    by_class = {c: Counter(r['fold'] for r in rows if r['label'] == c) for c in '019'}
    assert all(len(n) == 3 and max(n.values())-min(n.values()) <= 1 for n in by_class.values())


def test_it_is_printed_kept_and_reported(data, measured):
    assert re.search(r'fold +images +accuracy +balanced accuracy +log loss\n1 .*\n2 .*\n3 .*\nmean \(95 %\)', str(measured))
    with (measured.path/'predictions.csv').open() as f: kept = list(csv.DictReader(f))
    assert [{k: str(v) for k, v in r.items()} for r in measured.predictions] == kept and list(kept[0]) == ['file', 'label', 'predicted', *(f'p_{c}' for c in '019'), 'fold']
    page = (measured.path/'report.html').read_text()
    assert 'Fold by fold' in page and 'out-of-fold images classified correctly' in page and 'one of 3 networks that had not seen it' in page
    assert not (measured.path/'checkpoint').exists()
    with pytest.raises(ValueError, match='out: .* holds a finished run of this recipe'): cross_validate(data, folds=3, **RECIPE, out=str(measured.path))


def test_a_fold_is_what_image_classifier_trains_on_the_others(data, measured):
    "The second fold anew, from files: the same probabilities."
    from fastrecipes.report.evidence import score
    from fastrecipes.training.reproducibility import seed_everything
    fold = {r['file']: r['fold'] for r in measured.predictions}
    seed = key_of(42, 'fold', 1) % 2**32
    dls = image_folder(data, size=16, bs=16, seed=seed, test=0, valid=lambda p: fold[p.relative_to(data).as_posix()] == 2)
    seed_everything(seed)
    learn = image_classifier(dls, **{k: v for k, v in RECIPE.items() if k not in ('size', 'bs')}, seed=seed)
    judged = [[r[f'p_{c}'] for c in '019'] for r in measured.predictions if r['fold'] == 2]
    assert np.allclose(score(learn).probabilities, judged, atol=1e-6)


def test_a_killed_run_goes_on_and_finished_folds_are_not_trained_again(data, measured, tmp_path, monkeypatch):
    "Killed in the middle of the first fold, right after it came to its end, and in the second."
    trained, make = [], validate.image_classifier
    monkeypatch.setattr(validate, 'image_classifier', lambda *a, **kw: (trained.append(kw['seed']), make(*a, **kw))[1])
    again = lambda: cross_validate(data, folds=3, **RECIPE, out=str(tmp_path/'run'))
    for name, n in (('1.pt', 3), ('journal.pt', 1), ('1.pt', 5)): killed(monkeypatch, again, name, n)
    result = again()
    own = [key_of(42, 'fold', k) % 2**32 for k in range(3)]
    assert trained == [own[0], own[0], own[1], own[1], own[2]]
    assert result.predictions == measured.predictions and not (tmp_path/'run'/'checkpoint').exists()


def test_overwrite_clears_what_a_killed_run_left(data, tmp_path):
    run = tmp_path/'run'
    (run/'checkpoint'/'fold-2').mkdir(parents=True)
    torch.save({}, run/'checkpoint'/'fold-2'/'1.pt')
    (run/'provenance.json').write_text('{"recipe": "cross-validate"}')
    from fastrecipes.report.run_folder import RunFolder
    RunFolder.open('cross-validate', dict(path=str(data)), str(run), True)
    assert not (run/'checkpoint').exists()


def test_groups_and_copies_lie_in_one_fold(tmp_path, monkeypatch):
    "60 files of each class by sixes: ten groups of both classes; one file is there twice."
    for c in '01':
        (tmp_path/'d'/c).mkdir(parents=True)
        for i, p in enumerate(sorted((digits(tmp_path/'all')/c).iterdir())[:60]): shutil.copy(p, tmp_path/'d'/c/f'p{i//6}_{i}.png')
    shutil.copy(tmp_path/'d'/'0'/'p3_18.png', tmp_path/'d'/'0'/'copy.png')
    r = cross_validate(tmp_path/'d', folds=2, groups=r'p(\d)_', **{**RECIPE, 'epochs': 1}, valid=.2)
    where = {}
    for row in r.predictions: where.setdefault(m[1] if (m := re.search(r'p(\d)_', row['file'])) else '3', set()).add(row['fold'])
    assert len(where) == 10 and all(len(f) == 1 for f in where.values()) and {1, 2} == set.union(*where.values())
    assert all(f.n_train < 121-f.n for f in r.folds)                    # a share of the others is chosen on


def test_a_given_test_folder_is_left_alone(tmp_path, data):
    for side in ('train', 'valid', 'test'):
        for c in '01':
            (tmp_path/'s'/side/c).mkdir(parents=True)
            for p in sorted((data/c).iterdir())[dict(train=slice(0, 24), valid=slice(24, 36), test=slice(36, 48))[side]]: shutil.copy(p, tmp_path/'s'/side/c)
    files = [r['file'] for r in cross_validate(tmp_path/'s', folds=2, **{**RECIPE, 'epochs': 1}).predictions]
    assert len(files) == 72 and {f.split('/')[0] for f in files} == {'train', 'valid'}


@pytest.mark.parametrize('change, message', [
    (dict(folds=1), 'folds: at least 2, got 1'), (dict(folds=4), "folds: 4, but class '9' has 3 images, .* use folds=3 or less"),
    (dict(folds=2, bs=5000), r'bs: 5000 is more than the \d+ training images of fold 1'), (dict(folds=2, valid=1.), r'valid: a share of the images in \[0, 1\), got 1.0'),
    (dict(folds=2, early_stop=True), 'valid: early_stop chooses by validation images.*hold out others with valid=.1'), (dict(folds=2, epochs=0), 'epochs: at least 1, got 0'),
    (dict(folds=2, groups='nobody'), "groups: 'nobody' finds no group in any name"), (dict(folds=2, mixpu=.4), "no argument and no technique named 'mixpu'"),
    (dict(folds=2, near_duplicates='apart'), "near_duplicates: one of warn, together, got 'apart'"), (dict(folds=2, groups='^.'), "folds: 2, but class '0' has 1 image, copies")])
def test_what_cannot_be_measured_is_refused_before_any_training(data, monkeypatch, change, message):
    monkeypatch.setattr(validate, 'image_classifier', None)
    with pytest.raises((ValueError, TypeError), match=message): cross_validate(data, **{**RECIPE, **change})


def test_a_class_of_one_fold_only_is_refused(data):
    found = found_in(data)
    fold = np.array([0 if c == '9' else i % 2 for i, c in enumerate(found.labels)])
    with pytest.raises(ValueError, match="folds: class '9' lies in fold 1 only"): check_folds(found, fold, 16, 0., 42)
    with pytest.raises(ValueError, match='folds: nothing is left for fold 2'): check_folds(found, np.arange(len(fold)) % 2*2, 16, 0., 42)


def test_other_data_than_a_folder_are_refused():
    with pytest.raises(ValueError, match='path: cross_validate makes folds of a folder of images, got Tensor'): cross_validate(torch.zeros(3))


def test_the_command_line_says_what_is_wrong(data, tmp_path, capsys):
    assert main(['cross-validate', str(data), '--folds', '500', '--out', str(tmp_path/'r'), '--arch', 'resnet10t']) == 2
    assert capsys.readouterr().err.startswith("fastrecipes: folds: 500, but class '9' has 3 images")
    assert main(['image-classifier', str(data), '--valid', 'nowhere.csv', '--arch', 'resnet10t', '--pretrained', 'false', '--out', str(tmp_path/'r')]) == 2
    assert 'valid: no file nowhere.csv' in capsys.readouterr().err


def test_a_csv_and_groups_from_the_command_line(tmp_path, data, capsys):
    "A run made so can be loaded again with its split."
    from fastrecipes.report.run_folder import load_run
    for c in '01':
        (tmp_path/'d'/c).mkdir(parents=True)
        for p in sorted((data/c).iterdir())[:40]: shutil.copy(p, tmp_path/'d'/c)
    files = sorted(p.relative_to(tmp_path/'d').as_posix() for p in (tmp_path/'d').rglob('*.png'))
    (tmp_path/'s.csv').write_text('file,split\n' + '\n'.join(f'{f},{["valid", "test", "train", "train"][i % 4]}' for i, f in enumerate(files)))
    assert main(['image-classifier', str(tmp_path/'d'), '--valid', str(tmp_path/'s.csv'), '--test', '.1', '--arch', 'resnet10t', '--pretrained', 'false', '--size', '16', '--bs', '16',
                 '--epochs', '1', '--lr', '.003', '--groups', r'(\d+)\.png', '--out', str(tmp_path/'run')]) == 0
    learn = load_run(tmp_path/'run')
    assert sorted(p.relative_to(tmp_path/'d').as_posix() for p in learn.dls.valid.items) == files[::4]
    assert sorted(p.relative_to(tmp_path/'d').as_posix() for p in learn.dls.loaders[2].items) == files[1::4]
