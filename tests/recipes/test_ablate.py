"Which techniques help: found where planted, kept from run to run, the same in one process and in several."
import csv
import os
import shutil
import sys
import time
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest

from cloudpickle import register_pickle_by_value, unregister_pickle_by_value

from fastrecipes.cli import main
from fastrecipes.data.folders import image_folder
from fastrecipes.errors import BadName, BadValue
from fastrecipes.recipes import ablate as module
from fastrecipes.recipes.ablate import ablate
from fastrecipes.recipes.arms import Arm, Outcome
from fastrecipes.recipes.folder_recipe import FolderRecipe
from fastrecipes.report.evidence import Scored

PLANTED = dict(mixup=.1, ema=-.1, cutout=0.)


def answers(share: float, seed: int, side: str, images: int = 1000):
    "Answers of a network that is right on so many of the images, the same images for every seed."
    own = np.random.default_rng([seed, side == 'test'])
    y = np.random.default_rng(0).integers(0, 3, images)
    right = own.random(images) < share
    return Scored(np.eye(3, dtype=np.float32)[np.where(right, y, (y+1) % 3)]*.9 + .03, y, side)


def toy(seed: int, **techniques) -> Outcome:
    on = [n for n, v in techniques.items() if v]
    share = .6 + sum(PLANTED.get(n, 0) for n in on)
    return Outcome(answers(share, seed + len(on), 'validation'), answers(share, seed + len(on), 'test'), 1. + len(on))


def table(folder): return [{k: v for k, v in row.items() if k not in ('times', 'mb')} for row in csv.DictReader((folder/'effects.csv').open(encoding='utf8'))]


def test_what_is_planted_is_found_and_recommended(capsys):
    r = ablate(toy, techniques=['mixup', 'ema', 'cutout'], seeds=5, matters=8)
    words = {(f.comparison.technique, f.comparison.where): f.verdict.word for f in r.findings}
    assert {w for (n, _), w in words.items() if n == 'mixup'} == {'helped'} and {w for (n, _), w in words.items() if n == 'ema'} == {'hurt'}
    assert {w for (n, _), w in words.items() if n == 'cutout'} == {'no difference'}
    assert r.recommended == ['mixup'] and r.gain.lo > 0 and r.gain.lo < .1 < r.gain.hi and len(r.runs) == 8*5
    assert r.baseline.lo < .6 < r.baseline.hi and r.baseline.n == 1000
    text = str(r)
    assert 'mixup      alone       +' in text and 'recommended, chosen on the validation images: mixup: +' in text and '×2.00' in text
    assert 'seed 5, all but cutout: test accuracy 0.' in capsys.readouterr().out


def test_the_picture():
    r = ablate(toy, techniques=dict.fromkeys(PLANTED, True), seeds=4)
    forest, worth = r.plot().axes
    assert [t.get_text() for t in forest.get_yticklabels()] == list(PLANTED)
    drawn = [(line.get_xdata()[0], line.get_markerfacecolor() != 'none') for line in forest.lines if line.get_marker() in 'os']
    told = sorted(r.findings, key=lambda f: f.comparison.where != 'alone')
    assert drawn == [(100*f.effects['accuracy'].value, f.verdict.word in ('helped', 'hurt')) for f in told]
    assert {a.get_text() for a in worth.texts} == set(PLANTED)


def test_a_set_that_was_no_arm_is_trained_too():
    planted = PLANTED | dict(cutout=.1)
    def recipe(seed, **techniques):
        on = [n for n, v in techniques.items() if v]
        return Outcome(*[answers(.5 + sum(planted.get(n, 0) for n in on), seed + len(on), side) for side in ('validation', 'test')], 1.)
    r = ablate(recipe, techniques='mixup,ema,cutout,sam', seeds=4)
    assert r.recommended == ['mixup', 'cutout'] and r.gain.seeds == 4 and len(r.runs) == (10+1)*4 and r.gain.lo < .2 < r.gain.hi


def test_arguments_reach_every_arm():
    asked = []
    def recipe(seed, **techniques):
        asked.append(techniques)
        return toy(seed)
    ablate(recipe, techniques=dict(mixup=.2, ema=True), seeds=2, sam=.1)
    assert [{k: v for k, v in a.items() if v} for a in asked[:4]] == [{}, dict(mixup=.2), dict(ema=True), dict(mixup=.2, ema=True)]
    assert len({tuple(a) for a in asked}) == 1


def test_a_learner_of_ones_own_is_timed_by_the_clock(request):
    make = request.getfixturevalue('toy')         # the one of conftest
    def recipe(seed, **techniques):
        learn = make(n=128).use(**techniques)
        learn.fit(1, .1)
        return learn
    r = ablate(recipe, techniques=dict(ema=True), seeds=2)
    assert all(o.seconds > 0 for o in r.runs.values()) and r.findings[0].times > 0 and len(r.runs) == 4


def test_what_was_cut_off_goes_on(tmp_path):
    whole = ablate(toy, techniques='mixup,ema', seeds=3, out=str(tmp_path/'whole'))
    calls = []
    def recipe(seed, **techniques):
        calls.append(1)
        if len(calls) == 6: raise KeyboardInterrupt
        return toy(seed, **techniques)
    with pytest.raises(KeyboardInterrupt, match='call ablate again'): ablate(recipe, techniques='mixup,ema', seeds=3, out=str(tmp_path/'cut'))
    again = ablate(recipe, techniques='mixup,ema', seeds=3, out=str(tmp_path/'cut'))
    assert len(calls) == 4*3+1 and table(tmp_path/'cut') == table(tmp_path/'whole') and str(again).split('report:')[0] == str(whole).split('report:')[0]
    with pytest.raises(BadValue, match='holds a finished run'): ablate(toy, techniques='mixup,ema', seeds=3, out=str(tmp_path/'cut'))


def test_seeds_are_added_to_a_finished_run(tmp_path, capsys):
    times = []
    def recipe(seed, **techniques):
        times.append(seed)
        return toy(seed, **techniques)
    ablate(recipe, techniques='mixup', seeds=2, out=tmp_path/'run')
    with pytest.raises(BadValue, match='holds a finished run'): ablate(recipe, techniques='mixup', seeds=2, out=tmp_path/'run')
    with pytest.raises(BadValue, match='run of another recipe .matters'): ablate(recipe, techniques='mixup', seeds=3, matters=3., out=tmp_path/'run')
    more = ablate(recipe, techniques='mixup', seeds=4, out=tmp_path/'run')
    whole = ablate(toy, techniques='mixup', seeds=4)
    assert len(times) == 2*4 and len(set(times)) == 4 and [f.effects for f in more.findings] == [f.effects for f in whole.findings] and more.baseline == whole.baseline
    assert 'a smaller run of this recipe: what it lacks is added' in capsys.readouterr().out


@pytest.fixture
def carried():
    "What is defined here goes along to other processes, as what a notebook defines does."
    register_pickle_by_value(sys.modules[__name__])
    yield
    unregister_pickle_by_value(sys.modules[__name__])


def test_a_worker_that_dies_loses_its_run_only(tmp_path, carried):
    def recipe(seed, **techniques):
        (tmp_path/f'{os.getpid()}-{len(list(tmp_path.glob("*.call")))}-{os.urandom(4).hex()}.call').touch()
        flag = tmp_path/'died'
        if techniques['ema'] and techniques['mixup'] and not flag.exists():
            flag.touch()
            os._exit(1)
        return toy(seed, **techniques)
    here = ablate(toy, techniques='mixup,ema', seeds=2)
    there = ablate(recipe, techniques='mixup,ema', seeds=2, processes=2)
    assert {k: o.test.predicted.tolist() for k, o in here.runs.items()} == {k: o.test.predicted.tolist() for k, o in there.runs.items()}
    assert (tmp_path/'died').exists() and len(list(tmp_path.glob('*.call'))) <= 4*2 + 2         # the one that died, and at most the other that was under way


def test_two_ray_nodes_give_the_same_table_and_a_lost_node_costs_its_runs_only(tmp_path, monkeypatch):
    ray = pytest.importorskip('ray', reason='ray is not installed (extra ray)')
    from ray.cluster_utils import Cluster
    monkeypatch.setenv('RAY_ENABLE_UV_RUN_RUNTIME_ENV', '0')
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    def recipe(seed, **techniques):
        time.sleep(.5)
        out = toy(seed, **techniques)
        (tmp_path/f'{os.getpid()}-{os.urandom(4).hex()}.call').touch()
        return out
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    second = cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level='ERROR')
        assert ray.cluster_resources()['CPU'] == 2
        def lose():
            while len(list(tmp_path.glob('*.call'))) < 4: time.sleep(.05)
            cluster.remove_node(second, allow_graceful=False)
        losing = Thread(target=lose)
        losing.start()
        there = ablate(recipe, techniques='mixup,ema', seeds=3, ray=True)
        losing.join()
        until = time.monotonic() + 60
        while ray.cluster_resources()['CPU'] > 1 and time.monotonic() < until: time.sleep(.2)        # the cluster takes a while to notice
        assert ray.cluster_resources()['CPU'] == 1 and len({f.name.split('-')[0] for f in tmp_path.glob('*.call')}) > 1
    finally:
        ray.shutdown()
        cluster.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    here = ablate(toy, techniques='mixup,ema', seeds=3)
    assert str(here) == str(there) and len(there.runs) == 4*3 and len(list(tmp_path.glob('*.call'))) <= 4*3 + 1


def test_a_worker_that_dies_again_and_again_is_said(carried, monkeypatch):
    monkeypatch.setattr('fastrecipes.recipes.ablating.RETRIES', 1)
    def recipe(seed, **techniques): os._exit(1)
    with pytest.raises(BadValue, match='the worker of one run died 2 times; too little memory'): ablate(recipe, techniques='mixup', seeds=2, processes=2)


def test_of_too_little_time_the_least_promising_are_given_up(monkeypatch, capsys, tmp_path):
    now = [0.]
    monkeypatch.setattr(module, 'time', SimpleNamespace(monotonic=lambda: now[0]))
    def recipe(seed, **techniques):
        now[0] += 60
        return toy(seed, **techniques)
    r = ablate(recipe, techniques='mixup,ema,cutout', seeds=5, minutes=40)
    assert now[0] <= 40*60 and r.stopped and {n for n, _ in r.stopped} == {'ema'} and all('want of time' in why for why in r.stopped.values())
    assert {f.comparison.technique for f in r.findings} == {'mixup', 'ema', 'cutout'} and max(f.effects['accuracy'].seeds for f in r.findings) > 2
    now[0] = 0.
    r = ablate(recipe, techniques='mixup,ema,cutout', seeds=5, minutes=5)
    assert now[0] <= 5*60 and len(r.runs) == 5 and 'the time is up' in capsys.readouterr().out
    assert {f.verdict.why for f in r.findings} == {'not resolved: 1 seed does not tell how far seeds vary, 3 do'}
    now[0] = 0.
    ablate(recipe, techniques='mixup,ema,cutout', seeds=4, out=tmp_path/'run')
    now[0] = 0.
    r = ablate(recipe, techniques='mixup,ema,cutout', seeds=5, minutes=12, out=tmp_path/'run')
    assert now[0] == 8*60 and not r.stopped                    # what was done before takes no time
    now[0] = 0.
    with pytest.raises(BadValue, match='minutes: not enough for one comparison'): ablate(recipe, techniques='mixup', seeds=5, minutes=1)


def test_a_folder_of_images(digit_folder, tmp_path, capsys):
    "The real thing, small: the command line, the page, and that two processes give the same table."
    how = ['--techniques', 'label_smoothing,mixup', '--arch', 'test_resnet', '--pretrained', 'false', '--size', '16', '--bs', '32', '--epochs', '2', '--seeds', '2',
           '--lr', '.01', '--augment', 'false', '--valid', '.3', '--test', '.3']
    assert main(['ablate', str(digit_folder), *how, '--processes', '1', '--out', str(tmp_path/'one')]) == 0
    said = capsys.readouterr().out
    assert 'label_smoothing  alone' in said and 'recommended' in said and 'fastrecipes image-classifier' in said and '--augment false' in said
    page = (tmp_path/'one'/'report.html').read_text(encoding='utf8')
    assert 'What each technique does' in page and 'mixup in the set' in page and page.count('<svg') == 3
    assert main(['ablate', str(digit_folder), *how, '--processes', '2', '--out', str(tmp_path/'two')]) == 0
    assert table(tmp_path/'one') == table(tmp_path/'two') and len(table(tmp_path/'one')) == 4*4
    assert len(list((tmp_path/'one'/'runs').glob('*.npz'))) == 4*2


def test_arms_of_a_seed_share_split_weights_and_order(digit_folder):
    r = ablate(digit_folder, techniques='early_stop', arch='test_resnet', pretrained=False, size=16, bs=32, epochs=1, seeds=2, lr=.01, augment=False)
    assert all(np.array_equal(r.runs[Arm(), s].test.probabilities, r.runs[Arm(['early_stop']), s].test.probabilities) for s in range(2))    # of one epoch it does nothing
    assert not np.array_equal(r.runs[Arm(), 0].test.probabilities, r.runs[Arm(), 1].test.probabilities)
    assert np.array_equal(r.runs[Arm(), 0].test.targets, r.runs[Arm(), 1].test.targets)
    assert {f.effects['accuracy'].value for f in r.findings} == {0.}


def test_a_folder_that_is_split_in_part_is_split_as_image_folder_does(digit_folder, tmp_path):
    "Given train and test, what validates is taken from train."
    for i, file in enumerate(sorted(digit_folder.rglob('*.png'))):
        there = tmp_path/('test' if i % 4 == 0 else 'train')/file.parent.name
        there.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, there)
    how = dict(size=16, bs=16, resize='crop')
    mine = FolderRecipe.of(tmp_path, None, 'warn', .3, .2, 42, how, dict(epochs=1), {})._loaders(seed=1)
    theirs = image_folder(tmp_path, valid=.3, test=.2, seed=42, **how)
    assert [len(d.items) for d in mine.loaders] == [len(d.items) for d in theirs.loaders] and all(len(d.items) for d in mine.loaders)
    assert [set(d.items) for d in mine.loaders] == [set(d.items) for d in theirs.loaders]


@pytest.mark.parametrize('change, error, says', [
    (dict(techniques='mixap'), BadName, "'mixap'; did you mean 'mixup'"), (dict(techniques=''), BadValue, 'techniques: name at least one'),
    (dict(techniques='ema,swa'), BadValue, 'do not go together'), (dict(seeds=1), BadValue, 'seeds: at least 2, got 1'),
    (dict(minutes=0.), BadValue, 'minutes: more than 0'), (dict(matters=-1.), BadValue, 'matters: more than 0'), (dict(processes=0), BadValue, 'processes: at least 1'),
    (dict(mixup=False), BadValue, 'mixup is to be told about and is switched off'), (dict(test=0.), BadValue, 'test: ablate chooses by validation images'),
    (dict(valid=0.), BadValue, 'valid: ablate chooses by'), (dict(epochs=0), BadValue, 'epochs: at least 1'), (dict(seed_s=1), TypeError, "named 'seed_s'; did you mean 'seeds'")])
def test_mistakes_are_said_before_any_work(digit_folder, change, error, says):
    with pytest.raises(error, match=says): ablate(digit_folder, **dict(techniques='mixup', arch='test_resnet', pretrained=False, size=16) | change)


def test_a_recipe_of_something_else_is_refused(toy):
    def numbers(seed, **techniques): return toy(c=1, labels=[0.]*64, loss_func=lambda p, y: p.mean())
    with pytest.raises(BadValue, match='recipe: must return the fitted Learner, got int'): ablate(lambda seed, **techniques: 3, techniques='ema', seeds=2)
    with pytest.raises(BadValue, match='ablate measures classifiers'): ablate(numbers, techniques='ema', seeds=2)
