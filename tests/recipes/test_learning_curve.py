"Would more images help: the power law recovered, parts that lie in each other, runs that are kept."
import csv

import numpy as np
import pytest

from fastrecipes.cli import main
from fastrecipes.errors import BadValue
from fastrecipes.recipes.folder_recipe import FolderRecipe
from fastrecipes.recipes.learning_curve import LearningCurve, learning_curve, power_law

SMALL = dict(arch='test_resnet', pretrained=False, size=16, bs=16, epochs=1, lr=.01, augment=False)


def test_a_power_law_is_found_again():
    n = np.array([100, 200, 400, 800])
    c, twice = power_law(n, np.array([s*n**-.5 for s in (2., 2., 2.)]))
    assert c == pytest.approx(.5) and twice.value == pytest.approx(2*800**-.5 - 2*1600**-.5) and twice.lo == pytest.approx(twice.value) and twice.hi == pytest.approx(twice.value)


def test_the_interval_of_twice_as_many_holds_the_truth_as_often_as_it_says():
    rng, n = np.random.default_rng(0), np.array([100, 200, 400, 800])
    truth = 2*800**-.5 - 2*1600**-.5
    held = [e.lo <= truth <= e.hi for e in (power_law(n, 2*n**-.5*np.exp(rng.normal(0, .05, (4, 4))))[1] for _ in range(500))]
    assert .92 <= np.mean(held) <= .98


def test_the_line_goes_on_as_the_law_says():
    n = [100, 200, 400]
    errors = np.array([2*np.array(n)**-.5]*2)
    ax = LearningCurve(None, n, [], errors, .5).plot().axes[0]
    x, y = ax.lines[-1].get_data()
    assert x[-1] == pytest.approx(800) and np.allclose(y, 200*x**-.5) and np.allclose(ax.lines[0].get_ydata(), 100*errors[0])


@pytest.mark.parametrize('images, errors', [([10, 20], [[.1, .2]]), ([20, 10], [[.1, .2]]*2), ([10, 20], [[.1, .2, .3]]*2), ([10], [[.1]]*2)])
def test_what_is_no_curve_is_refused(images, errors):
    with pytest.raises(BadValue, match='errors: .seeds, sizes. of at least 2 each'): power_law(images, np.array(errors))


def test_parts_lie_in_each_other_have_all_classes_and_the_same_test_images(digit_folder):
    whole = FolderRecipe.of(digit_folder, None, 'warn', .2, .2, 0, {}, {}, {})
    parts = [whole.on(f, 0) for f in (.25, .5, 1.)]
    of = lambda p, side: {f for f, s in zip(p.found.files, p.sides) if s == side}
    small, half, full = (of(p, 'train') for p in parts)
    assert small < half < full and abs(len(half)/len(full) - .5) < .06 and parts[2] is whole
    assert all(of(p, s) == of(whole, s) for p in parts for s in ('valid', 'test')) and {f.parent.name for f in small} == {f.parent.name for f in full}


def test_digits(digit_folder, tmp_path, capsys):
    "The command, the page, equally many steps for all, and that what was cut off goes on."
    how = ['--arch', 'test_resnet', '--pretrained', 'false', '--size', '16', '--bs', '16', '--epochs', '2', '--seeds', '2', '--lr', '.01', '--augment', 'false',
           '--fractions', '[.25,1]', '--processes', '1', '--out', str(tmp_path/'run')]
    assert main(['learning-curve', str(digit_folder), *how]) == 0
    said = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path/'run'/'curve.csv').open(encoding='utf8')))
    sizes = sorted({int(r['images']) for r in rows})
    assert len(rows) == 4 and 3.5 < sizes[1]/sizes[0] < 4.5 and f'twice as many images ({2*sizes[1]:,}) would bring about' in said and 'seed 2, ' in said
    assert 'Would more images help?' in (tmp_path/'run'/'report.html').read_text(encoding='utf8')
    for r in np.load(next((tmp_path/'run'/'runs').glob('+--1.npz')))['curve'], np.load(next((tmp_path/'run'/'runs').glob('-+-1.npz')))['curve']: assert len(r) in (2, 8)
    assert len(np.load(tmp_path/'run'/'runs'/'+--1.npz')['curve']) == 8


@pytest.mark.parametrize('change, says', [(dict(fractions=[1.]), 'fractions: two or more'), (dict(fractions=[.5, 1.5]), 'fractions: two or more'), (dict(fractions=[0., 1.]), 'above 0'),
                                          (dict(seeds=1), 'seeds: at least 2'), (dict(processes=0), 'processes: at least 1'), (dict(test=0.), 'test: hold some images out'),
                                          (dict(fractions=[.01, 1.]), r'fractions: 0.01 leaves \d+ training images, less than a batch of 16')])
def test_mistakes_are_said_before_any_training(digit_folder, change, says):
    with pytest.raises(BadValue, match=says): learning_curve(digit_folder, **SMALL | change)
