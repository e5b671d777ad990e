"What is recommended, on folders in which the reason was planted."
import csv
import re
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw, ImageFont

from fastrecipes.cli import function_of, COMMANDS, main
from fastrecipes.data.samples import digits
from fastrecipes.errors import BadValue
from fastrecipes.flags import CommandLine
from fastrecipes.recipes import facts, looks, recommend as module
from fastrecipes.recipes.classify import image_classifier
from fastrecipes.recipes.facts import Machine, facts_of
from fastrecipes.recipes.recommend import Recommendation, recommend
from fastrecipes.training.transfer import packaged_weights

ARCH = 'tf_efficientnet_lite0'
WEIGHTS = pytest.mark.skipif(not packaged_weights(ARCH), reason='the weights extra is not installed')


def some_digits(folder, each: int = 40, classes=range(10), every=None):
    "`each` images of some digits; of the digits in `every`, so many as it says."
    whole = digits(folder/'all')
    for c in classes:
        (folder/'some'/str(c)).mkdir(parents=True)
        for file in sorted((whole/str(c)).iterdir())[:(every or {}).get(c, each)]: shutil.copy(file, folder/'some'/str(c))
    shutil.rmtree(whole)
    return folder/'some'


def letters(folder, text: str, each: int = 60):
    "Letters of several sizes, places and colours, a little turned: `folder/<letter>/<i>.png`."
    rng = np.random.default_rng(0)
    for c in text:
        (folder/c).mkdir(parents=True)
        for i in range(each):
            im = Image.new('RGB', (32, 32), tuple(rng.integers(150, 255, 3).tolist()))
            place, colour = tuple(rng.integers((6, 2), (12, 6)).tolist()), tuple(rng.integers(0, 100, 3).tolist())
            ImageDraw.Draw(im).text(place, c, fill=colour, font=ImageFont.load_default(size=int(rng.integers(18, 24))))
            im.rotate(rng.uniform(-5, 5)).save(folder/c/f'{i}.png')
    return folder


def mislabel(folder, share: float, seed: int = 0) -> dict:
    "Put a share of the images into the folder of another class; returns the new name → the class that it is."
    rng, classes, moved = np.random.default_rng(seed), sorted(d.name for d in folder.iterdir()), {}
    for file in sorted(folder.rglob('*.png')):
        if rng.random() >= share: continue
        other = rng.choice([c for c in classes if c != file.parent.name])
        file.rename(folder/other/f'moved-{file.name}')
        moved[f'{other}/moved-{file.name}'] = file.parent.name
    return moved


@pytest.fixture
def pixels_alone(monkeypatch):
    "As if the extra with the weights were not installed."
    monkeypatch.setattr(facts, 'packaged_weights', lambda arch: None)


def test_imbalanced(tmp_path, pixels_alone):
    uneven = recommend(some_digits(tmp_path/'uneven', 100, every={8: 15, 9: 12}))
    assert uneven.techniques['balance'] == 'upsampling' and uneven.facts.ratio == pytest.approx(100*.7/(12*.7), rel=.15)
    assert "'8' and '9': fewer than 20 images to train on" in ' '.join(str(uneven).split())
    steps = int(re.search(r'some ([\d,]+) steps', str(uneven))[1].replace(',', ''))
    assert steps == uneven.settings['epochs']*(10*max(uneven.facts.counts.values())//uneven.settings['bs'])       # each class as often as the commonest
    assert 'balance' not in recommend(some_digits(tmp_path/'even', 30)).techniques


@WEIGHTS
def test_tiny_data_get_a_trained_network_whose_body_stays(tmp_path):
    said = recommend(some_digits(tmp_path, 12))
    assert said.settings | dict(arch=ARCH, pretrained=True, freeze=True, bs=8) == said.settings and said.techniques['freeze_bn'] is True
    assert not recommend(some_digits(tmp_path/'more', 60, classes=range(3))).settings.get('freeze')


@WEIGHTS
def test_a_network_that_sees_less_than_the_pixels_show_is_not_frozen(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, 'deep_features', lambda x, arch: np.random.default_rng(0).normal(size=(len(x), 8)))
    said = recommend(some_digits(tmp_path, 12))
    assert said.settings['pretrained'] and 'freeze' not in said.settings


def test_without_weights_a_small_network_from_scratch(tmp_path, pixels_alone):
    said = recommend(some_digits(tmp_path, 12))
    assert said.settings | dict(arch='resnet10t', pretrained=False, size=32) == said.settings and 'freeze' not in said.settings
    assert 'pip install "fastrecipes[weights]"' in ' '.join(str(said).split())


def test_noisy_labels(tmp_path, pixels_alone):
    folder = some_digits(tmp_path, 150)
    moved = mislabel(folder, .4)
    said = recommend(folder)
    noise = said.facts.noise
    assert noise.lo <= .4 <= noise.hi and said.techniques | dict(label_smoothing=.1, early_stop=True) == said.techniques
    surest = said.suspects[:50]
    found = [s.name in moved for s in surest]
    assert np.mean(found) > .9                                 # where 40 % would be found by chance
    assert np.mean([moved[s.name] == s.likely for s, f in zip(surest, found) if f]) > .9 and all(s.name.startswith(f'{s.label}/') for s in said.suspects)


def test_clean_labels(tmp_path, pixels_alone):
    said = recommend(some_digits(tmp_path, 60))
    assert said.facts.noise.value < .05 and said.techniques['label_smoothing'] == .1 and 'early_stop' not in said.techniques


@pytest.mark.parametrize('features', ['pixels', pytest.param('both', marks=WEIGHTS)])
def test_mirror_images(tmp_path, features, monkeypatch, request):
    if features == 'pixels': request.getfixturevalue('pixels_alone')
    assert recommend(some_digits(tmp_path/'digits', 60)).techniques['augment'] == dict(flip=False)
    assert recommend(letters(tmp_path/'bd', 'bd')).techniques['augment'] == dict(flip=False)
    assert recommend(letters(tmp_path/'same', 'AHOX')).techniques['augment'] is True


def test_look_alikes(tmp_path, pixels_alone):
    folder = letters(tmp_path/'letters', 'AH', 40)
    for k in (20, 24): Image.new('RGB', (32, 32)).save(tmp_path/f'{k}.png')
    rng = np.random.default_rng(5)
    photo = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    photo.save(folder/'A'/'photo.png')
    photo.resize((60, 60)).save(folder/'H'/'again.png')
    said = recommend(folder)
    assert said.settings['near_duplicates'] == 'together' and said.facts.alike >= 2 and said.facts.torn >= 1 and 'have two labels' in str(said)
    assert 'near_duplicates' not in recommend(some_digits(tmp_path/'digits', 20)).settings


def test_the_machine(tmp_path, pixels_alone):
    f = facts_of(some_digits(tmp_path, 20), progress=lambda said: None)
    def machine(**changes): return {n: v for a in module._machine(replace(f, **changes)) for n, v in a.settings.items()}
    small, large = dict(widths=np.full(9, 8), heights=np.full(9, 8)), dict(widths=np.full(9, 600), heights=np.full(9, 400))
    cpu, gpu, old, many = Machine(2, 2*10**10, None), Machine(8, 10**11, 'H100', True), Machine(8, 10**11, 'T4', False), Machine(32, None, None)
    assert machine(**small, machine=cpu) == dict(size=32, cache=True)
    assert machine(**large, machine=cpu) == dict(size=128, cache=True)
    assert machine(**large, machine=gpu) == dict(size=224, cache=True, to_bf16=True) and machine(**large, machine=old)['to_fp16'] is True
    assert machine(**large, machine=many)['size'] == 224
    assert 'cache' not in machine(**large, machine=Machine(2, 10**6, None))
    assert machine(widths=np.full(9, 100), heights=np.full(9, 70), machine=cpu)['size'] == 64
    here = Machine.here()
    assert here.cores >= 1 and here.memory > 2**28


def test_the_order_and_the_page(tmp_path, pixels_alone):
    said = recommend(some_digits(tmp_path, 20))
    steps = list(dict.fromkeys(a.step for a in said.advice))
    assert steps == ['more data', 'augmentation', 'regularization', 'a smaller model', 'ensembles', 'this machine'] and all(a.reason for a in said.advice)
    page = str(said)
    assert [page.index(f'\n{s}\n') for s in steps] == sorted(page.index(f'\n{s}\n') for s in steps)
    assert '8×8 px, grey' in page and all(len(line) <= 120 for line in page.split('with all of that')[0].splitlines() if not line.startswith('  fastrecipes '))


def test_the_commands_are_understood(tmp_path, pixels_alone):
    folder = some_digits(tmp_path, 150)
    mislabel(folder, .4)
    said = recommend(folder, test=.15, suspects=tmp_path/'suspects.csv')
    assert list(csv.DictReader((tmp_path/'suspects.csv').open()))[:2] == [dict(file=s.name, label=s.label, likely=s.likely) for s in said.suspects[:2]]
    for line in (said.command, said.check, *(a.command for a in said.advice if a.command and 'RUN' not in a.command)):
        _, command, *argv = shlex.split(line)
        asked = CommandLine(function_of(COMMANDS[command]), command).parse(argv)
        assert asked['path'] == str(folder)
        assert asked['arch'] == 'resnet10t' and asked['pretrained'] is False and asked['size'] == 32 and asked['test'] == .15 and asked['bs'] <= said.settings['bs']
        if command == 'image-classifier': assert {n: asked[n] for n in said.settings} == said.settings and asked['augment'] == {'flip': False}
        if command == 'learning-curve': assert asked['bs'] <= said.facts.images/8


def test_what_validates_and_tests_is_not_read(tmp_path, pixels_alone):
    "Other labels there change nothing of what is told, but the number of images."
    folder = some_digits(tmp_path/'x', 60, classes=range(4))
    def given(name, turned):
        for i, file in enumerate(sorted(folder.rglob('*.png'))):
            side = ('test', 'valid', 'train', 'train')[i % 4]
            label = str((int(file.parent.name)+1) % 4) if turned and side != 'train' else file.parent.name
            (tmp_path/name/side/label).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path/name/side/label)
        return facts_of(tmp_path/name, progress=lambda said: None)
    a, b = given('a', False), given('b', True)
    assert a.noise == b.noise and a.looks[0].mirror == b.looks[0].mirror and a.counts == b.counts and np.array_equal(a.looks[0].sureness, b.looks[0].sureness)


def test_a_recipe_uses_them_where_the_call_says_nothing(tmp_path, pixels_alone, capsys):
    folder = some_digits(tmp_path, 40, every={9: 8})
    learn = image_classifier(folder, techniques='recommended', epochs=1, size=16, lr=.01, label_smoothing=False, out=tmp_path/'run')
    said = capsys.readouterr().out
    assert 'a smaller model' in said and 'whether it pays off' not in said and set(learn.techniques) == {'augment', 'balance', 'cache'}
    taken = said.partition('taken of it: ')[2].partition('\n')[0]
    assert 'balance upsampling' in taken and 'augment.flip false' in taken and 'size' not in taken and 'label_smoothing' not in taken
    recipe = yaml.safe_load((tmp_path/'run'/'recipe.yaml').read_text())
    assert recipe | dict(arch='resnet10t', pretrained=False, epochs=1, size=16, bs=8, balance='upsampling', augment={'flip': False}, label_smoothing=False) == recipe
    assert 'techniques' not in recipe
    swa = module._fitting(Recommendation(facts_of(folder, progress=print), [module.Advice('x', 'y', dict(ema=True, mixup=.2, arch='a', pretrained=False, freeze=True))]),
                          dict(swa=True, arch='mine'), module.inspect.signature(image_classifier).parameters)
    assert swa == dict(mixup=.2, freeze=True) and 'recommended, and left out: ema (' in capsys.readouterr().out


@pytest.mark.parametrize('run, says', [(lambda f: image_classifier(f, techniques='recomended'), "techniques: 'recommended', or .* got 'recomended'; did you mean 'recommended'"),
                                       (lambda f: image_classifier(f, techniques=['mixup']), r"switch them on by name, mixup=True or --mixup; got \['mixup'\]"),
                                       (lambda f: image_classifier(([1], [2]), techniques='recommended'), 'read from a folder of images, and path is tuple'),
                                       (lambda f: image_classifier(f, freeze=True, pretrained=False), 'freeze: the body would stay as it was drawn'),
                                       (lambda f: recommend(f, valid=0.), 'valid: no image is left to validate on')])
def test_mistakes(photos, run, says):
    with pytest.raises(BadValue, match=says): run(photos)


def test_a_folder_too_small_to_look_at(photos, capsys):
    assert main(['recommend', str(photos)]) == 0
    said = capsys.readouterr().out
    assert 'not looked at: fewer than 40 images' in said and 'if not, --augment.flip false' in said and 'fastrecipes image-classifier' in said


@WEIGHTS
def test_a_frozen_body_stays(tmp_path):
    import torch

    from fastrecipes.report.history import history
    from fastrecipes.training.transfer import backbone
    learn = image_classifier(some_digits(tmp_path, 12, classes=range(2)), ARCH, freeze=True, freeze_bn=True, epochs=2, size=32, bs=8, lr=.01)
    before = backbone(ARCH).body.state_dict()
    assert all(torch.equal(v, before[n]) for n, v in learn.model[0].state_dict().items()) and [f['name'] for f in history(learn).fits] == ['new head, body frozen']
    assert len(history(learn).fits[0]['rows']) == 2 and looks.FEW == 5
