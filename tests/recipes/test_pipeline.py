"The recipes end to end, on real images, small."
import json
import re

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from fastrecipes.cli import main
from fastrecipes.production.export import input_contract
from fastrecipes.production.predictor import Graph, Predictor, batched, pixels_of
from fastrecipes.recipes.classify import image_classifier
from fastrecipes.recipes.pipeline import pipeline, plain_fastai
from fastrecipes.recipes.ship import ship
from fastrecipes.report.run_folder import load_run

SMALL = dict(arch='resnet10t', epochs=4, size=32, pretrained=False, lr=3e-3, bs=32, test=.3, augment=dict(flip=False, warp=.1))


@pytest.fixture(scope='module')
def made(digit_folder, tmp_path_factory):
    "One pipeline run on the digits, five bad files among them."
    import shutil
    root = tmp_path_factory.mktemp('pipeline')
    photos = shutil.copytree(digit_folder, root/'digits')
    good = (photos/'0'/sorted(p.name for p in (photos/'0').iterdir())[0]).read_bytes()
    (photos/'1'/'truncated.png').write_bytes(good[:len(good)//2])
    (photos/'1'/'empty.png').touch()
    (photos/'2'/'text.png').write_text('no picture')
    (photos/'2'/'photo.txt').write_bytes(good)
    Image.new('L', (1, 1)).save(photos/'3'/'dot.png')
    return pipeline(photos, **SMALL, out=str(root/'run'), balance='upsampling', label_smoothing=.05)


def test_the_run_folder_holds_what_the_design_says(made):
    assert {p.name for p in made.path.iterdir()} == {'recipe.yaml', 'provenance.json', 'history.csv', 'learner.pkl', 'report.html', 'bundle', 'compressed.json', 'compressed.onnx'}
    assert json.loads((made.path/'provenance.json').read_text())['finished'] is True
    recipe = yaml.safe_load((made.path/'recipe.yaml').read_text())
    assert recipe['balance'] == 'upsampling' and recipe['augment'] == dict(flip=False, warp=.1) and 'out' not in recipe
    assert len((made.path/'history.csv').read_text().splitlines()) == 1 + SMALL['epochs']


def test_it_learns_and_the_bundle_scores_as_the_learner(made):
    plain, recipe, bundle = made.rows
    assert recipe.accuracy.value > .8 and recipe.balanced_accuracy.value > plain.balanced_accuracy.value
    assert bundle.accuracy.value == pytest.approx(recipe.accuracy.value, abs=.02)


def test_uncompressed_the_bundle_equals_the_learner_on_every_validation_image(made, tmp_path):
    with made.learn.no_bar(): p, _ = made.learn.get_preds()
    served = ship(made.learn, tmp_path/'bundle').predictor().probabilities(list(made.learn.dls.valid.items))
    assert np.abs(served - p.numpy()).max() <= 1e-4 and (served.argmax(1) == p.numpy().argmax(1)).all()


def test_by_default_it_ships_8_bits_that_answer_as_the_accepted_graph(made):
    small, items = made.compressed, list(made.learn.dls.valid.items)
    assert [(s.name, s.kept) for s in small.stages] == [('original', True), ('quantize (static)', True)] and small.gains['smaller'] > 3.5
    accepted = np.concatenate([Graph(small.onnx)(b) for b in batched(items, lambda x: pixels_of(x, input_contract(made.learn)))])
    assert np.array_equal(Predictor(made.path/'bundle').probabilities(items), accepted)
    assert small.accepted.change.value >= -.005             # up is no harm: which way one image of 147 falls depends on the processor


def test_the_report_lists_the_bad_files_and_their_reasons(made):
    page = re.sub(r'<[^>]*>', ' ', (made.path/'report.html').read_text())
    for name, why in (('truncated.png', 'truncated'), ('empty.png', 'empty'), ('text.png', 'not an image'), ('photo.txt', 'extension'), ('dot.png', '1×1 px')):
        assert re.search(f'{name}.*?{why}', page, re.S)


def test_printed_it_is_the_table(made):
    text = str(made)
    assert all(part in text for part in ('plain fastai', 'recipe', 'bundle', 'balanced accuracy', 'report:', 'one image, by the bundle'))


def test_a_run_loads_with_its_data_and_answers_the_same(made):
    learn = load_run(made.path)
    with learn.no_bar(), made.learn.no_bar(): a, b = learn.get_preds()[0], made.learn.get_preds()[0]
    assert torch.allclose(a, b, atol=1e-6)


def test_its_own_command_and_its_recipe_yaml_are_what_the_command_line_takes(made, capsys):
    assert main(['pipeline', '--config', str(made.path/'recipe.yaml'), '--print_config']) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    recipe = yaml.safe_load((made.path/'recipe.yaml').read_text())
    assert {k: v for k, v in printed.items() if v is not None and k in recipe} == {k: v for k, v in recipe.items() if v is not None}


def test_the_same_folder_again_is_refused(made):
    with pytest.raises(ValueError, match='finished run'):
        pipeline(yaml.safe_load((made.path/'recipe.yaml').read_text())['path'], **SMALL, out=str(made.path), balance='upsampling', label_smoothing=.05)


def test_the_command_predicts_from_the_bundle(made, capsys):
    image = made.learn.dls.loaders[2].items[0]
    assert main(['predict', str(made.path/'bundle'), str(image), '--k', '1']) == 0
    path, label, p = capsys.readouterr().out.split()
    assert path == str(image) and {label: float(p)} == {k: pytest.approx(v, abs=1e-4) for k, v in made.bundle.predictor()(image, k=1).items()}


def test_an_unknown_technique_is_refused_before_any_data_are_read(tmp_path):
    with pytest.raises(TypeError, match="no argument and no technique named 'mixpu'; did you mean 'mixup'"): image_classifier(tmp_path/'nowhere', mixpu=.4)


@pytest.mark.parametrize('kwargs, message', [(dict(epochs=0), 'epochs: at least 1'), (dict(lr=-1), "lr: a number above 0, or 'find', got -1"), (dict(lr='fnd'), 'lr: '),
                                             (dict(schedule='flat'), "schedule: .*did you mean 'flat_cos'"), (dict(arch='resent18'), 'did you mean')])
def test_bad_arguments_of_a_recipe(photos, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message): image_classifier(photos, **kwargs)


def test_a_technique_that_refuses_leaves_no_run_folder(photos, tmp_path):
    for recipe in (pipeline, image_classifier):
        with pytest.raises(ValueError, match='mixup: alpha must be > 0, got 0'):
            recipe(photos, arch='resnet10t', pretrained=False, size=16, bs=4, mixup=0, out=str(tmp_path/'run'))
        assert not (tmp_path/'run').exists()


def test_what_cannot_be_shipped_is_refused_before_training():
    data = torch.utils.data.TensorDataset(torch.rand(60, 3, 32, 32), torch.arange(60) % 2)
    with pytest.raises(ValueError, match='path: pipeline ships what reads image files'): pipeline(data, arch='resnet10t', pretrained=False, bs=8)


def test_weights_that_cannot_be_fetched_name_the_way_out(photos, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'ENDPOINT', 'https://unreachable.invalid')
    with pytest.raises(FileNotFoundError, match='the trained weights of resnet26t cannot be fetched .*--pretrained false.*--arch tf_efficientnet_lite0'):
        image_classifier(photos, arch='resnet26t')


def test_the_seed_reaches_the_first_weights_of_body_and_head(photos, monkeypatch):
    class Reached(Exception): pass
    def reached(learn, *args, **kwargs): raise Reached(learn)
    monkeypatch.setattr('fastrecipes.recipes.classify.train', reached)
    def first(seed, draws):
        torch.rand(draws)
        with pytest.raises(Reached) as e: image_classifier(photos, arch='resnet10t', pretrained=False, size=16, bs=4, epochs=1, lr=1e-3, seed=seed)
        return torch.cat([p.detach().flatten() for p in e.value.args[0].model.parameters()])
    one = first(1, 3)
    assert torch.equal(one, first(1, 5)) and not torch.equal(one, first(2, 5))


def test_with_a_file_of_weights_none_are_fetched_and_it_is_looked_at_before_the_data(photos, tmp_path, monkeypatch):
    class Reached(Exception): pass
    def reached(*args, **kwargs): raise Reached
    monkeypatch.setattr('fastrecipes.recipes.pipeline.as_dataloaders', reached)
    torch.save(timm.create_model('resnet18').state_dict(), tmp_path/'mine.pth')
    with pytest.raises(Reached): pipeline(photos, 'resnet18', weights=str(tmp_path/'mine.pth'))
    with pytest.raises(FileNotFoundError, match='weights: no file .*none.pth'): pipeline(photos, 'resnet18', weights=str(tmp_path/'none.pth'))


def test_pretrained_weights_fine_tune_in_two_fits(photos):
    from fastrecipes.report.history import history
    learn = image_classifier(photos, arch='tf_efficientnet_lite0', size=32, bs=4, epochs=1, lr=1e-3)
    assert [f['name'] for f in history(learn).fits] == ['new head, body frozen', 'all layers']
    assert all(p.requires_grad for p in learn.model.parameters())
    top = [max(f['rates']) for f in history(learn).fits]
    assert top == pytest.approx([1e-3, 5e-4]) and [h['lr'] for h in learn.opt.hypers][0] < [h['lr'] for h in learn.opt.hypers][-1]


def test_loaders_given_in_python_train_too():
    x, y = torch.rand(60, 3, 32, 32), torch.arange(60) % 2
    x[y == 1] += 1
    learn = image_classifier(torch.utils.data.TensorDataset(x, y), arch='resnet10t', pretrained=False, epochs=12, lr=3e-3, bs=8, augment=False)
    assert learn.validate()[1] > .8


def test_plain_fastai_does_not_depend_on_who_used_the_loaders_before(photos):
    from fastrecipes.data.folders import image_folder
    runs = []
    for used in (0, 3):
        dls = image_folder(photos, size=16, bs=4)
        for _ in range(used): dls.one_batch()
        runs.append([p.detach().clone() for p in plain_fastai(dls, 'resnet10t', 1, pretrained=False).model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize('asked, passed', [(dict(max_mb=.5, minutes=3.), dict(prune=True, max_mb=.5, max_ms=None, minutes=3., control=False)),
                                           (dict(max_ms=2, prune=False, quantize='qat'), dict(prune=False, max_ms=2, quantize='qat')),
                                           (dict(student='test_resnet', control=True), dict(prune=None, control=True, max_mb=None))])
def test_targets_and_the_control_reach_compress(photos, tmp_path, monkeypatch, asked, passed):
    class Enough(Exception): pass
    def compress(learn, student, **how): raise Enough(how)
    monkeypatch.setattr('fastrecipes.recipes.pipeline.compress', compress)
    with pytest.raises(Enough) as e: pipeline(photos, **{**SMALL, 'arch': 'test_resnet', 'epochs': 1, 'bs': 4, 'baseline': False}, out=str(tmp_path/'run'), **asked)
    how = e.value.args[0]
    assert {k: how[k] for k in passed} == passed


@pytest.mark.parametrize('asked, message', [(dict(control=True), 'control: it trains the student without its teacher'), (dict(max_mb=0.), 'max_mb: above 0'),
                                            (dict(minutes=3.), 'minutes: the time of a search'),
                                            (dict(max_ms=1., prune=.3), 'prune: 1 ms an image are searched for')])
def test_what_compress_would_refuse_is_refused_before_any_training(photos, asked, message):
    with pytest.raises(ValueError, match=message): pipeline(photos, **SMALL, **asked)
