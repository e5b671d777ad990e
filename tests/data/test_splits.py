"Who goes where: shares and folds by hand, groups on one side, splits that the user gives."
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from fastrecipes.data.folders import image_folder
from fastrecipes.data.splits import belonging, class_match, folds, split


def folder(path, **kwargs): return image_folder(path, **{**dict(size=16, bs=2, workers=0), **kwargs})


def names(dls): return [sorted(f'{p.parent.name}/{p.name}' for p in dl.items) for dl in dls.loaders]


def test_what_belongs_together_by_hand():
    keys = belonging(['a', 'b', 'a', 'c', 'd', 'e'], [None, 'p', None, 'p', None, None], [(0, 4)])
    assert keys == ['a', 'group p', 'a', 'group p', 'a', 'e']           # equal digests, one group, a pair; and one that is alone
    assert belonging(['a', 'b'], ['q', 'p'], [(0, 1)]) == ['group p']*2 and belonging(['b', 'a']) == ['b', 'a']


def test_groups_of_many_classes_lie_on_one_side_and_classes_keep_their_shares():
    rng = np.random.default_rng(0)
    who = [f'p{i}' for i in rng.integers(0, 120, 3000)]
    labels = [str(c) for c in rng.choice(3, 3000, p=[.6, .3, .1])]
    sides = split(who, labels, .2, .1)
    assert all(len(s) == 1 for s in [{b for a, b in zip(who, sides) if a == g} for g in set(who)])
    for c in '012':
        n = Counter(s for s, own in zip(sides, labels) if own == c)
        assert abs(n['valid']/n.total()-.2) < .03 and abs(n['test']/n.total()-.1) < .03


def test_a_group_too_large_for_its_share_is_passed_over():
    "10 images, .2 to validate: the group of 7 brings valid from 2 missing to 5 too many; the single ones fill it."
    for seed in range(20):
        sides = split(['big']*7 + ['x', 'y', 'z'], ['a']*10, .2, 0, seed)
        assert sides.count('valid') == 2 and set(sides[:7]) == {'train'}


def test_every_class_trains_and_validates_where_it_has_two_groups():
    for seed in range(20):
        who, labels = ['p', 'p', 'p', 'q', 'q', 'q', 'r', 'r'], ['a', 'a', 'b', 'a', 'b', 'b', 'a', 'b']
        sides = split(who, labels, .1, 0, seed)
        assert {c: {s for s, own in zip(sides, labels) if own == c} for c in 'ab'} == dict.fromkeys('ab', {'train', 'valid'})


def test_folds_by_hand():
    fold = folds([f'd{i}' for i in range(35)], ['a']*20 + ['b']*15, 5)
    assert sorted(Counter(fold[:20]).values()) == [4]*5 and sorted(Counter(fold[20:]).values()) == [3]*5
    assert fold == folds([f'd{i}' for i in range(35)], ['a']*20 + ['b']*15, 5) != folds([f'd{i}' for i in range(35)], ['a']*20 + ['b']*15, 5, seed=1)


def test_classes_that_do_not_divide_fill_folds_evenly():
    fold = folds([str(i) for i in range(230)], [str(i // 23) for i in range(230)], 10)
    for c in range(10): assert sorted(Counter(fold[23*c:23*c+23]).values()) == [2]*7 + [3]*3
    assert max(Counter(fold).values()) <= 28                            # not 30: what is over goes to other folds in other classes


def test_folds_are_as_stable_as_splits():
    keys = [f'd{i}' for i in range(1000)]
    a, b = folds(keys, ['x']*1000, 10), folds([*keys, 'new'], ['x']*1001, 10)
    assert sum(u != v for u, v in zip(a, b)) <= 10                      # one at each boundary


def test_folds_of_groups_are_as_even_as_scikit_learns():
    from sklearn.model_selection import StratifiedGroupKFold
    rng = np.random.default_rng(0)
    who, labels = rng.integers(0, 80, 2000), rng.choice(3, 2000, p=[.6, .3, .1])
    ours = np.array(folds([f'p{g}' for g in who], [str(c) for c in labels], 5))
    theirs = np.empty(2000, int)
    for k, (_, i) in enumerate(StratifiedGroupKFold(5, shuffle=True, random_state=0).split(who, labels, who)): theirs[i] = k
    def uneven(fold): return max(np.std([((fold == k) & (labels == c)).sum()/(labels == c).sum() for k in range(5)]) for c in range(3))
    assert all(len(set(ours[who == g])) == 1 for g in range(80)) and uneven(ours) < 2*uneven(theirs) + .01


@pytest.mark.parametrize('n, message', [(1, 'folds: at least 2, got 1'), (4, "folds: 4, but class 'b' has 3 images, copies and groups counted once, .*; use folds=3 or less")])
def test_folds_outside_their_domain(n, message):
    with pytest.raises(ValueError, match=message): folds(list('abcdefgh'), list('aaaaabbb'), n)


def test_the_match_of_classes_is_pearsons():
    counts = dict(cat=dict(train=90, valid=10), dog=dict(train=60, valid=40), owl=dict(train=50, valid=50))
    said, differs = class_match(counts)
    expected = chi2_contingency([[90, 60, 50], [10, 40, 50]], correction=False)
    assert differs and f'χ² = {expected.statistic:.1f}, p = {expected.pvalue:.2g}' in said and "'cat' is 10.0 % of valid, 45.0 % of train" in said
    said, differs = class_match({c: dict(train=80+i, valid=20) for i, c in enumerate('abc')})
    assert not differs and 'The classes of valid match those of train' in said


def test_few_images_are_no_difference_by_chance_alone():
    "2 of 2 against 5 of 10: χ² of the distribution says p = .19; nothing to warn of. 9 of 9 against none of 9 is."
    assert not class_match(dict(a=dict(train=5, valid=2), b=dict(train=5, valid=0)))[1]
    assert class_match(dict(a=dict(train=9, valid=0), b=dict(train=0, valid=9)))[1]
    assert class_match(dict(a=dict(train=9, valid=0), b=dict(train=9, valid=0))) == ('', False)


def test_a_list_of_files_validates(photos):
    wanted = ['cat/1.png', str(photos/'dog'/'3.png'), photos/'dog'/'4.png']
    for test, n in ((0, 0), (.2, 4)):
        train, valid, held = names(folder(photos, valid=wanted, test=test))
        assert valid == ['cat/1.png', 'dog/3.png', 'dog/4.png'] and len(held) == n and len(train) == 17-n


@pytest.mark.parametrize('valid, message', [
    (['cat/11.png', 'cat/1.png'], "valid: .*photos has no image 'cat/11.png'; did you mean 'cat/1.png'"),
    (['dogs/3.png'], "has no image 'dogs/3.png'; did you mean 'dog/3.png'"),
   ([], 'valid: a list of files, got an empty one'), ([3], 'valid: a list of files, got 3 in it'),
    (None, r'valid: a share in \[0, 1\), a list of files, a CSV .*, got None'),
    (True, 'got True'), ('splits.csv', "valid: no file splits.csv; did you mean 'split.csv'"),
    (lambda p: 'vaild', "valid: <lambda>.*cat/0.png.*: train, valid, test, got 'vaild'; did you mean 'valid'"),
    (lambda p: None, 'train, valid, test, True or False, got None'), (lambda p: False, 'valid: no image is left to validate on'),
    (lambda p: p.parent.name == 'cat', "valid: it leaves no image of class 'cat' to train on")])
def test_splits_that_cannot_be(photos, valid, message):
    (photos/'split.csv').touch()
    with pytest.raises((ValueError, FileNotFoundError), match=message): folder(photos, valid=valid)


def test_a_function_says_who_validates(photos):
    assert names(folder(photos, valid=lambda p: int(p.stem) < 2, test=0))[1] == ['cat/0.png', 'cat/1.png', 'dog/0.png', 'dog/1.png']
    assert names(folder(photos, valid=lambda p: {'0': 'val', '1': 'test'}.get(p.stem, 'train')))[1:] == [['cat/0.png', 'dog/0.png'], ['cat/1.png', 'dog/1.png']]


def csv(photos, rows, header='file,split', name='split.csv'):
    (photos/name).write_text('\n'.join([header, *rows]))
    return str(photos/name)


def listed(photos): return [f'{c}/{i}.png,{"valid" if i < 2 else "test" if i < 4 else "train"}' for c in ('cat', 'dog') for i in range(10)]


def test_a_csv_says_who_goes_where(photos):
    train, valid, test = names(folder(photos, valid=csv(photos, listed(photos))))
    assert valid == ['cat/0.png', 'cat/1.png', 'dog/0.png', 'dog/1.png'] and test == ['cat/2.png', 'cat/3.png', 'dog/2.png', 'dog/3.png'] and len(train) == 12
    assert names(folder(photos, valid='split.csv'))[1] == valid         # in the folder, too


@pytest.mark.parametrize('change, message', [
    (lambda rows: rows[1:], 'valid: .*split.csv does not list 1 of the 20 images of .*, such as cat/0.png'),
    (lambda rows: [*rows, 'cat/x1.png,train'], "valid: line 22 of .*split.csv: .* has no image 'cat/x1.png'; did you mean 'cat/1.png'"),
    (lambda rows: [*rows[1:], 'cat/0.png,trian'], "valid: line 21 of .*: split: train, valid, test, got 'trian'; did you mean 'train'"),
    (lambda rows: [*rows, 'cat/0.png,train'], 'valid: line 22 of .*: cat/0.png was in valid, and is in train now')])
def test_a_csv_that_cannot_be(photos, change, message):
    with pytest.raises(ValueError, match=message): folder(photos, valid=csv(photos, change(listed(photos))))


def test_a_csv_without_a_column(photos):
    with pytest.raises(ValueError, match="valid: .*split.csv has no column 'split'; did you mean 'splits'.*its columns are file, splits"):
        folder(photos, valid=csv(photos, listed(photos), 'file,splits'))


def test_a_csv_decides_alone_also_that_nothing_tests(photos):
    assert [len(side) for side in names(folder(photos, valid=csv(photos, [r.replace(',test', ',train') for r in listed(photos)]), test=.3))] == [16, 4, 0]


def test_a_misspelt_column_is_told_with_those_there_are(photos):
    with pytest.raises(ValueError, match="groups: 'patien' finds no group in any name, .*or name a column of .*split.csv: file, split, patient; did you mean 'patient'"):
        folder(photos, valid=csv(photos, [f'{r},p' for r in listed(photos)], 'file,split,patient'), groups='patien')


def test_a_copy_under_another_class_is_told(photos):
    import shutil
    shutil.copy(photos/'cat'/'0.png', photos/'dog'/'zero.png')
    assert '1 image in more than one class, such as one in cat and dog: remove the copies that are wrong' in folder(photos).holdings.notes


def test_folders_and_a_list_are_one_too_many(tmp_path, photos):
    import shutil
    for side in ('train', 'valid'): shutil.copytree(photos, tmp_path/'s'/side)
    with pytest.raises(ValueError, match='valid: .* has folders train, valid, which say who validates'): folder(tmp_path/'s', valid=['cat/0.png'])


@pytest.mark.parametrize('groups', [r'/(\d)', r'(?<=/)\d', lambda p: int(p.stem[0])])
def test_no_group_lies_on_two_sides(photos, groups):
    "0.png … 9.png of both classes: ten groups of two, one of each class."
    sides = [{int(n.split('/')[1][0]) for n in side} for side in names(folder(photos, groups=groups, valid=.3, test=.2))]
    assert [len(s) for s in sides] == [5, 3, 2] and len(set.union(*sides)) == 10


def test_groups_from_a_column_of_the_csv_that_are_torn(photos):
    rows = [f'{r},p{i % 10 if i % 10 < 9 else 0}' for i, r in enumerate(listed(photos))]
    with pytest.raises(ValueError, match="groups: 'p0' is on two sides: cat/0.png in valid, cat/9.png in train"):
        folder(photos, valid=csv(photos, rows, 'file,split,patient'), groups='patient')
    rows = [f'{r},p{i % 10}' for i, r in enumerate(listed(photos))]
    assert names(folder(photos, valid=csv(photos, rows, 'file,split,patient'), groups='patient'))[1] == ['cat/0.png', 'cat/1.png', 'dog/0.png', 'dog/1.png']


def test_files_that_a_pattern_misses_are_alone_and_told(photos):
    assert '16 images are of no group, such as cat/2.png' in folder(photos, groups='/([01])').holdings.notes


@pytest.mark.parametrize('groups, message', [('(', r"groups: '\(' is no regular expression"), ('(a)(b)', 'groups: a regular expression with one group, got 2'),
                                             ('xyz', "groups: 'xyz' finds no group in any name, such as cat/0.png")])
def test_patterns_that_cannot_be(photos, groups, message):
    with pytest.raises(ValueError, match=message): folder(photos, groups=groups)


def test_classes_of_valid_that_do_not_match_are_told(photos):
    wanted = [f'cat/{i}.png' for i in range(9)]
    holdings = folder(photos, valid=wanted, test=0).holdings
    assert holdings.match in holdings.notes and "'cat' is 100.0 % of valid, 9.1 % of train" in holdings.match
    even = folder(photos).holdings
    assert even.match.startswith('The classes of valid match') and even.match not in even.notes


def test_a_split_by_files_needs_a_folder():
    import torch
    from fastrecipes.data.loaders import as_dataloaders
    ds = torch.utils.data.TensorDataset(torch.zeros(20, 3), torch.arange(20) % 2)
    with pytest.raises(ValueError, match=r"valid: a share of the images in \[0, 1\), got 'split.csv'; .*a folder of images only"): as_dataloaders(ds, valid='split.csv', bs=4)
