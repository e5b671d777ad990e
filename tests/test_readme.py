"The code of README and guide runs, for one epoch and on small images; where its title says that it takes minutes or the hub, its calls fit."
import ast
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from mentions import blocks, bound
from PIL import Image

ROOT = Path(__file__).parents[1]
GUIDE, README, PICK, CONTRIBUTING = ROOT/'docs'/'pages'/'guide.md', ROOT/'README.md', ROOT/'docs'/'pages'/'pick.md', ROOT/'CONTRIBUTING.md'


def hurried(code: str) -> str:
    "For one epoch, and seconds, on small images."
    for long, short in ((r'minutes=\d+', 'minutes=.05'), (r'epochs=\d+', 'epochs=1'),
                        (r'seeds=\d+', 'seeds=2'), (r'size=\d+', 'size=48'), (r'(fit_(?:flat_cos|constant|cos|step|decay|gradual_unfreeze))\(\d+', r'\1(1')):
        code = re.sub(long, short, code)
    return code


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with what the pages name: photos of three classes in three colours, two of each patient, and one image more."
    rng = np.random.default_rng(0)
    for k, label in enumerate(('bird', 'cat', 'dog')):
        (tmp_path/'photos'/label).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 160, (72, 80, 3))
            pixels[..., k] += 90
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path/'photos'/label/f'patient{20*k+i//2}-{i}.png')
    (tmp_path/'some.jpg').write_bytes((tmp_path/'photos'/'cat'/'patient20-0.png').read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tour_of_the_readme_runs(here):
    names = {}
    for code in blocks(README, 'python'): exec(compile(hurried(code), str(README), 'exec'), names)
    assert names['small'].stages
    assert set(names['bundle'].predictor()('some.jpg')) == {'bird', 'cat', 'dog'}


def statements(file: Path):
    for code in blocks(file, 'python'): yield from (ast.unparse(node) for node in ast.parse(code).body)


def learners():
    "Makes Learners for the lines of the guide, each with a frozen body and a new head."
    from fastrecipes.all import accuracy, backbone, classifier, image_folder
    net = backbone('resnet10t', pretrained=False)
    return lambda: classifier(image_folder('photos', size=32, bs=16, workers=0), deepcopy(net), metrics=accuracy)


def classifier_for(seed):
    from fastrecipes.all import Learner, accuracy, image_folder, nn, seed_everything
    seed_everything(seed)
    dls = image_folder('photos', size=16, bs=16, test=.25, workers=0)
    return Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), metrics=accuracy)


def test_every_line_of_the_guide_runs(here):
    import fastrecipes.all as everything
    fresh = learners()
    one, other = fresh(), fresh()
    names = dict(vars(everything), classifier_for=classifier_for, other=other, dls=one.dls, net=one.model)
    for line in statements(GUIDE):
        line = hurried(line)
        uses = {n.id for n in ast.walk(ast.parse(line)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        if 'learn' in uses and "normalize('standardize')" not in line and 'found.plot' not in line:
            names['learn'] = fresh()
            if 'fit_gradual' not in line and 'precompute' not in line: names['learn'].unfreeze()
        try: exec(line, names)
        except Exception as e: raise AssertionError(f'{line}: {e}') from e


def test_what_takes_minutes_or_the_hub_can_be_called_so():
    calls = [n for file in (GUIDE, PICK) for code in blocks(file, 'python', titled=True) for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)]
    assert sum(bound(call) is not None for call in calls) > 6


def test_the_technique_of_contributing_does_what_it_says(toy):
    "Gradients whose mean over the inputs of each unit is 0: no step of SGD changes the sum of a unit's weights."
    from fastai.basics import SGD, Learner

    from fastrecipes.technique import TECHNIQUES
    code, = blocks(CONTRIBUTING, 'python', titled=True)
    exec(compile(code, str(CONTRIBUTING), 'exec'), dict(__name__='centralize'))
    try:
        learn = toy(opt_func=SGD)
        units = [p for p in learn.model.parameters() if p.ndim > 1]
        before = [p.detach().clone() for p in units]
        learn.centralize().fit(2, .1, wd=0.)
        for was, p in zip(before, units):
            assert not torch.allclose(was, p) and torch.allclose(was.flatten(1).sum(1), p.flatten(1).sum(1), atol=1e-5)
        assert learn.techniques['centralize'].effect == f'gradients of {len(units)} layers lose the mean of each unit'
    finally:
        TECHNIQUES.pop('centralize', None)
        if 'centralize' in vars(Learner): del Learner.centralize
