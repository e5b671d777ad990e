"Run folders: what they hold, whom they refuse, and that a run can be loaded again."
import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from fastrecipes.errors import BadValue, NotThere
from fastrecipes.report.run_folder import RunFolder, command_line, load_run

ARGS = dict(path='photos', arch='resnet18', epochs=5, lr='find', mixup=.4, augment=dict(flip=False))


def names(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())


def test_a_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = RunFolder.open('pipeline', ARGS), RunFolder.open('pipeline', ARGS)
    assert re.fullmatch(r'runs/pipeline-\d{8}-\d{6}', a.path.as_posix()) and a.path != b.path
    assert names(a.path) == ['provenance.json', 'recipe.yaml']


def test_recipe_yaml_holds_the_arguments_only(tmp_path):
    given = dict(path=Path('photos'), lr=np.float32(.5), epochs=np.int64(3), out=tmp_path, overwrite=True, techniques=dict(mixup=.4, balance=True))
    RunFolder.open('pipeline', given, out=tmp_path/'run')
    assert yaml.safe_load((tmp_path/'run'/'recipe.yaml').read_text()) == dict(path='photos', lr=.5, epochs=3, mixup=.4, balance=True)


def test_provenance_tells_versions_and_ends_with_finished(tmp_path):
    import torch
    run = RunFolder.open('pipeline', ARGS | dict(seed=7), out=tmp_path/'run', command='fastrecipes pipeline photos --seed 7')
    read = lambda: json.loads((tmp_path/'run'/'provenance.json').read_text())
    assert read()['finished'] is False and read()['finished_at'] is None
    run.note(fingerprint='abc')
    run.finish()
    p = read()
    assert p['finished'] is True and p['finished_at'] >= p['started_at']
    assert (p['recipe'], p['seed'], p['fingerprint'], p['command']) == ('pipeline', 7, 'abc', 'fastrecipes pipeline photos --seed 7')
    assert p['versions']['python'] == sys.version.split()[0] and p['versions']['torch'].split('+')[0] == torch.__version__.split('+')[0]


def test_a_folder_in_which_another_process_is_at_work_is_refused(tmp_path):
    with RunFolder.open('pipeline', ARGS, out=tmp_path/'run').under_way():
        for overwrite in (False, True):
            with pytest.raises(BadValue, match='out: another process is at work in .*run; wait for it, or name another --out'):
                RunFolder.open('pipeline', ARGS, out=tmp_path/'run', overwrite=overwrite)
    assert names(tmp_path/'run') == ['provenance.json', 'recipe.yaml']
    RunFolder.open('pipeline', ARGS, out=tmp_path/'run')


def test_a_run_that_goes_on_remembers_when_it_began_and_on_what_images(tmp_path, capsys):
    from types import SimpleNamespace
    images = lambda fingerprint: SimpleNamespace(holdings=SimpleNamespace(fingerprint=fingerprint))
    first = RunFolder.open('pipeline', ARGS, out=tmp_path/'run')
    first.note_data(images('abc'))
    again = RunFolder.open('pipeline', ARGS, out=tmp_path/'run')
    assert again.provenance['started_at'] == first.provenance['started_at'] and len(again.provenance['went_on_at']) == 1
    again.note_data(images('abc'))
    with pytest.raises(BadValue, match='path: the images have changed since the run'): again.note_data(images('abd'))


@pytest.mark.parametrize('extra, way', [({}, 'fastrecipes pipeline photos --arch resnet18 --epochs 5 --lr find --mixup 0.4 --augment.flip false --out'),
                                        (dict(path='<DataLoaders>'), "call pipeline again with the same arguments and out='")])
def test_ctrl_c_says_how_to_go_on(tmp_path, extra, way):
    with pytest.raises(KeyboardInterrupt, match=re.escape(f'interrupted; to go on: {way}')):
        with RunFolder.open('pipeline', ARGS | extra, out=tmp_path/'run').under_way(): raise KeyboardInterrupt


def test_an_unfinished_run_of_the_same_recipe_starts_again(tmp_path, capsys):
    RunFolder.open('pipeline', ARGS, out=tmp_path/'run').write_text('history.csv', 'old\n')
    again = RunFolder.open('pipeline', ARGS, out=tmp_path/'run')
    assert 'unfinished run of this recipe: starting it again' in capsys.readouterr().out
    assert again.provenance['finished'] is False


@pytest.mark.parametrize('recipe, args, says', [
    ('pipeline', ARGS | dict(epochs=8), 'epochs: 5 there, 8 here'),
    ('pipeline', {k: v for k, v in ARGS.items() if k != 'mixup'}, 'mixup: 0.4 there, None here'),
    ('image-classifier', ARGS, 'pipeline there, image-classifier here')])
def test_another_recipe_is_refused_and_says_what_differs(tmp_path, recipe, args, says):
    RunFolder.open('pipeline', ARGS, out=tmp_path/'run')
    with pytest.raises(BadValue, match=says): RunFolder.open(recipe, args, out=tmp_path/'run')


def test_a_finished_run_is_refused_unless_overwritten(tmp_path):
    RunFolder.open('pipeline', ARGS, out=tmp_path/'run').finish()
    with pytest.raises(BadValue, match='finished run.*--overwrite'): RunFolder.open('pipeline', ARGS, out=tmp_path/'run')
    assert RunFolder.open('pipeline', ARGS, out=tmp_path/'run', overwrite=True).provenance['finished'] is False


def test_overwriting_removes_ours_and_no_foreign_file(tmp_path):
    run = RunFolder.open('pipeline', ARGS, out=tmp_path/'run')
    for name in ('report.html', 'learner.pkl', 'bundle/model.onnx', 'checkpoint/last.pt', 'notes.txt', 'bundle/my.jpg', '.report.html.12.tmp'):
        run.write_text(name, 'x')
    RunFolder.open('pipeline', ARGS | dict(epochs=9), out=tmp_path/'run', overwrite=True)
    assert names(tmp_path/'run') == ['bundle/my.jpg', 'notes.txt', 'provenance.json', 'recipe.yaml']
    assert not (tmp_path/'run'/'checkpoint').exists()


def test_overwriting_does_not_follow_a_linked_folder(tmp_path):
    elsewhere = tmp_path/'served'
    elsewhere.mkdir()
    (elsewhere/'model.onnx').write_text('precious')
    run = RunFolder.open('pipeline', ARGS, out=tmp_path/'run')
    (run.path/'bundle').symlink_to(elsewhere)
    RunFolder.open('pipeline', ARGS, out=tmp_path/'run', overwrite=True)
    assert (elsewhere/'model.onnx').read_text() == 'precious'


@pytest.mark.parametrize('overwrite', [False, True])
def test_what_is_no_run_is_refused_and_kept(tmp_path, overwrite):
    (tmp_path/'thesis').mkdir()
    (tmp_path/'thesis'/'recipe.yaml').write_text('cake: 1\n')
    (tmp_path/'file').write_text('x')
    with pytest.raises(BadValue, match='no run of ours'): RunFolder.open('pipeline', ARGS, out=tmp_path/'thesis', overwrite=overwrite)
    with pytest.raises(BadValue, match='is a file'): RunFolder.open('pipeline', ARGS, out=tmp_path/'file', overwrite=overwrite)
    with pytest.raises(BadValue, match='cannot be created'): RunFolder.open('pipeline', ARGS, out=tmp_path/'file'/'run', overwrite=overwrite)
    assert (tmp_path/'thesis'/'recipe.yaml').read_text() == 'cake: 1\n'


def test_an_empty_folder_will_do(tmp_path):
    assert RunFolder.open('pipeline', ARGS, out=tmp_path).path == tmp_path


def test_a_failed_write_leaves_the_old_file(tmp_path):
    run = RunFolder.open('pipeline', ARGS, out=tmp_path/'run')
    run.write_text('report.html', 'whole')
    with pytest.raises(UnicodeEncodeError): run.write_text('report.html', 'half\ud800')
    assert (run.path/'report.html').read_text() == 'whole' and names(run.path) == ['provenance.json', 'recipe.yaml', 'report.html']


def test_csv_rows_with_different_keys(tmp_path):
    run = RunFolder.open('pipeline', ARGS, out=tmp_path/'run')
    run.write_csv('history.csv', [dict(fit='a, b', loss=.5), dict(fit='c', accuracy=1)])
    with open(run.path/'history.csv', newline='') as f: assert list(csv.reader(f)) == [['fit', 'loss', 'accuracy'], ['a, b', '0.5', ''], ['c', '', '1']]


def test_the_command_line():
    assert command_line('pipeline', ARGS) == 'fastrecipes pipeline photos --arch resnet18 --epochs 5 --lr find --mixup 0.4 --augment.flip false'
    words = shlex.split(command_line('pipeline', dict(path="my dog's photos", balance=True, workers=None)))
    assert words == ['fastrecipes', 'pipeline', "my dog's photos", '--balance', 'true']


def test_defaults_stay_out_of_the_command_but_not_of_the_recipe(tmp_path):
    def recipe(path, arch='resnet18', *, epochs=5, lr='find', out=None, **techniques): pass
    run = RunFolder.open('pipeline', ARGS | dict(epochs=7), out=tmp_path/'run', defaults=recipe)
    assert run.command == 'fastrecipes pipeline photos --epochs 7 --mixup 0.4 --augment.flip false' == run.provenance['command']
    assert yaml.safe_load((run.path/'recipe.yaml').read_text())['arch'] == 'resnet18'


def test_importing_it_imports_no_torch():
    code = 'import sys, fastrecipes.report.run_folder, fastrecipes.report.intervals; print({"torch", "fastai"} & set(sys.modules))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == 'set()\n'


@pytest.fixture
def trained(tmp_path):
    "A run folder as a recipe leaves it: two classes of small PNGs, a linear model, `Normalize` by odd statistics."
    from fastai.basics import Learner
    from fastai.vision.all import Normalize
    from PIL import Image
    from torch import nn

    from fastrecipes.data.folders import image_folder
    rng = np.random.default_rng(0)
    for i in range(24):
        (d := tmp_path/'photos'/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(d/f'{i}.png')
    args = dict(path=str(tmp_path/'photos'), size=8, bs=4, seed=3, valid=.25, test=.25, mixup=.4)
    run = RunFolder.open('pipeline', args, out=tmp_path/'run')
    dls = image_folder(**{k: v for k, v in args.items() if k != 'mixup'}, device='cpu')
    dls.add_tfms([Normalize.from_stats([.1]*3, [.7]*3)], 'after_batch')
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), nn.CrossEntropyLoss(), path=run.path)
    learn.export()
    (run.path/'export.pkl').rename(run.path/'learner.pkl')
    return run.path, learn


def test_a_loaded_run_predicts_as_before_on_the_same_images(trained, recwarn):
    import torch
    path, learn = trained
    again = load_run(path)
    for i in range(3):
        with learn.no_bar(), again.no_bar():
            (p, y), (q, z) = learn.get_preds(ds_idx=i), again.get_preds(ds_idx=i)
        assert len(p) and torch.equal(p, q) and torch.equal(y, z)
        assert [str(o) for o in again.dls.loaders[i].items] == [str(o) for o in learn.dls.loaders[i].items]
    assert not [w for w in recwarn if 'pickle' in str(w.message)]


def test_runs_that_cannot_be_loaded_say_why(trained):
    path, _ = trained
    with pytest.raises(NotThere, match='nowhere does not exist'): load_run(path.parent/'nowhere')
    (path.parent/'photos'/'a').rename(path.parent/'photos'/'c')
    with pytest.raises(BadValue, match='a, b then, b, c now'): load_run(path)
    (path.parent/'photos').rename(path.parent/'moved')
    with pytest.raises(NotThere, match='its data folder .*photos is not there'): load_run(path)
    (path/'learner.pkl').unlink()
    with pytest.raises(NotThere, match='has no learner.pkl'): load_run(path)
