"The fast recipe: what it switches on, what its trial chooses, how long it takes; and memory that is kept."
import platform
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fastrecipes.data.samples import digits
from fastrecipes.errors import BadValue
from fastrecipes.recipes import fast, small_images
from fastrecipes.recipes.classify import image_classifier
from fastrecipes.recipes.facts import Machine, facts_of
from fastrecipes.recipes.fast import fast_classifier
from fastrecipes.recipes.recommend import Recommendation, recommend
from fastrecipes.recipes.small_images import SMALL_IMAGES, fastest_layout, moved
from fastrecipes.training.memory import keep_freed_memory


@pytest.fixture(autouse=True)
def as_usual(monkeypatch): monkeypatch.setattr(fast, 'keep_freed_memory', lambda: True)        # other tests measure memory in this process


@pytest.fixture(scope='module')
def some(tmp_path_factory): return digits(tmp_path_factory.mktemp('fast'))


def test_a_network_in_seconds(some, tmp_path):
    "Digits, from scratch: half a minute of training, by the clock, is enough on a slow machine that is busy besides."
    learn = fast_classifier(some, minutes=.5, bs=64, valid=.2, out=tmp_path/'run', near_duplicates='together')
    assert set(learn.techniques) == {n for n in SMALL_IMAGES if n not in ('bs', 'lr', 'schedule')} | {'augment'} | (learn.techniques.keys() & {'to_channelslast', 'to_bf16'})
    assert learn.recorder.values[-1][2] > .9 and type(learn.model[0].model).__name__ == 'ResNet9' and learn.recorder.lrs[-1] < .002
    recipe = yaml.safe_load((tmp_path/'run'/'recipe.yaml').read_text())
    assert recipe['arch'] == 'resnet9_w16' and recipe['minutes'] == .5 and recipe['schedule'] == 'one_cycle' and recipe['pretrained'] is False


def test_what_the_caller_says_wins(some, monkeypatch):
    asked = {}
    monkeypatch.setattr(fast, 'image_classifier', lambda path, arch, **kwargs: asked.update(kwargs, arch=arch))
    monkeypatch.setattr(fast, 'fastest_layout', lambda arch, size, bs, switched: dict(to_channelslast=True, to_bf16=True))
    fast_classifier(some, 'resnet18', ema=False, mixup=.4, size=64, bs=32, to_bf16=False)
    assert asked['arch'] == 'resnet18' and asked['ema'] is False and asked['mixup'] == .4 and asked['bs'] == 32 and asked['augment'] == moved(64) and moved(64)['crop'] == 4
    assert asked['to_channelslast'] is True and asked['to_bf16'] is False and asked['minutes'] == 5. and asked['optimizer']['name'] == 'muon'


def test_a_run_that_goes_on_keeps_its_layout(some, tmp_path, monkeypatch):
    "A trial might come out otherwise, and be another recipe."
    def cut(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(fast, 'fastest_layout', lambda *args: dict(to_bf16=True))
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr('fastrecipes.recipes.classify.train', cut)
        fast_classifier(some, minutes=.02, bs=64, out=tmp_path/'run')
    monkeypatch.setattr(fast, 'fastest_layout', lambda *args: dict(to_channelslast=True))
    learn = fast_classifier(some, minutes=.02, bs=64, out=tmp_path/'run')
    assert 'to_bf16' in learn.techniques and 'to_channelslast' not in learn.techniques


BOTH = {'to_channelslast', 'to_bf16'}


@pytest.mark.parametrize('usual, last, both, chosen', [(10, 8, 5, BOTH), (10, 8, 7.6, {'to_channelslast'}), (8, 10, 12, set()), (10, 11, 8, BOTH)])
def test_the_trial_takes_the_fastest(monkeypatch, usual, last, both, chosen):
    "Steps of so many seconds by a clock of the test's own; 16 bits must be a tenth faster than what else there is."
    now = [0.]
    def step(model, x, y, channels_last, bf16):
        def run(): now[0] += both if bf16 else last if channels_last else usual
        return run
    monkeypatch.setattr(small_images, '_step', step)
    monkeypatch.setattr(small_images.time, 'perf_counter', lambda: now[0])
    assert fastest_layout('resnet9_w16', 32, 4) == {n: True for n in chosen}


def test_the_trial_drops_what_is_far_slower_at_once_and_says_what_it_took(monkeypatch, capsys):
    "A step of 16 bits takes a minute here: one is enough to know. Four steps of the others, of 10 and 8 s."
    now, steps = [0.], Counter()
    def step(model, x, y, channels_last, bf16):
        def run():
            steps[channels_last, bf16] += 1
            now[0] += 60 if bf16 else 8 if channels_last else 10
        return run
    monkeypatch.setattr(small_images, '_step', step)
    monkeypatch.setattr(small_images.time, 'perf_counter', lambda: now[0])
    fastest_layout('resnet9_w16', 32, 40, device='cpu')
    assert steps == {(False, False): 4, (True, False): 4, (True, True): 1}
    assert capsys.readouterr().out == ('images/s, forward and backward: as usual 4, to_channelslast 5, to_channelslast and to_bf16 1; taken: to_channelslast\n')


@pytest.mark.parametrize('path, wrong, said', [('nowhere', {}, 'nowhere'), ('empty', {}, 'no images in empty'),
                                               (None, dict(minutes=0), 'fast_classifier: minutes must be a number above 0'),
                                               (None, dict(mixpu=.4), "fast_classifier: .*did you mean 'mixup'"), (None, dict(mixup=dict(alpa=1)), "mixup: .*did you mean 'alpha'")])
def test_what_is_wrong_is_said_before_the_trial(some, tmp_path, monkeypatch, path, wrong, said):
    monkeypatch.setattr(fast, 'fastest_layout', lambda *args: pytest.fail('the trial ran'))
    if path == 'empty': (tmp_path/'empty'/'cats').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=said): fast_classifier(path or some, **wrong)


def test_the_trial_leaves_alone_what_was_said():
    assert fastest_layout('resnet9_w16', 32, 4, dict(to_channelslast=False, to_bf16=True)) == {}
    assert set(fastest_layout('resnet9_w16', 32, 4, dict(to_fp16=True), batches=1)) <= {'to_channelslast'}


def test_a_step_of_the_trial_is_a_training_step():
    "Gradients, in the layout that it was asked for."
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10))
    small_images._step(net, torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), True, True)()
    assert net[0].weight.grad.any() and net[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('wrong, said', [(dict(minutes=0), 'minutes must be a number above 0'), (dict(minutes=1., schedule='sgdr'), 'counts epochs')])
def test_image_classifier_by_minutes_refuses(some, wrong, said):
    with pytest.raises(BadValue, match=said): image_classifier(some, 'resnet9_w16', pretrained=False, lr=.01, **wrong)


def test_it_is_recommended_where_it_fits(some, monkeypatch):
    "Small images, and enough of them; not for fewer, not for larger ones. What is recommended is what the recipe trains with."
    few = facts_of(some, .2, .1, None, 0, progress=lambda said: None)
    def like(side: int, each: int):
        facts = replace(few, widths=np.full(9, side), heights=np.full(9, side), counts=Counter({c: each for c in few.counts}), machine=Machine(2, 8*10**9, None))
        monkeypatch.setattr('fastrecipes.recipes.recommend.facts_of', lambda *args, **kwargs: facts)
        return recommend(some)
    said = like(32, 900)
    assert isinstance(said, Recommendation)
    assert {n: said.settings[n] for n in ('arch', 'minutes', 'pretrained', 'size')} == dict(arch='resnet9_w16', minutes=5., pretrained=False, size=32)
    assert {n: v for n, v in (said.settings | said.techniques).items() if n in SMALL_IMAGES} == SMALL_IMAGES
    assert said.techniques['augment'] == moved(32, flip=said.techniques['augment']['flip']) and 'fast-classifier' in said.page
    assert 'minutes' not in like(96, 900).settings and 'minutes' not in like(32, 90).settings


RESIDENT = '''
import sys
import numpy as np
from fastrecipes.training.memory import keep_freed_memory
def resident(): return int(open('/proc/self/statm').read().split()[1])*4096
if sys.argv[1] == 'keep': assert keep_freed_memory()
before = resident()
block = np.ones(64*2**20, np.uint8)
del block
print(resident()-before)
'''


@pytest.mark.skipif(not Path('/proc/self/statm').exists() or platform.libc_ver()[0] != 'glibc', reason='needs glibc on Linux')
def test_freed_memory_is_kept():
    "64 MB that were used and freed: still the process's own after the call, gone back without it."
    grown = {how: int(subprocess.run([sys.executable, '-c', RESIDENT, how], capture_output=True, text=True, check=True).stdout) for how in ('keep', 'usual')}
    assert grown['keep'] > 60*2**20 and grown['usual'] < 10*2**20


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert keep_freed_memory() is False
