"The command line, driven with small recipes of this module: they answer with the arguments that reached them."
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import onnx
import onnx.parser
import pytest
import yaml
from fastai.basics import Learner
from PIL import Image

from fastrecipes import cli, flags
from fastrecipes.errors import BadValue
from fastrecipes.technique import TECHNIQUES, technique


def toy(path, arch: str = 'resnet18', *, epochs: int = 5, lr: float | str = 'find', pretrained: bool = True, workers: int | None = None,
        resize: Literal['crop', 'squish'] = 'crop', out: str | None = None, overwrite: bool = False, **techniques):
    """Answer with what came.

    Nothing is trained; 100 % of it is a test.

    Args:
        path: the folder
        epochs: passes over the data,
            at least 1
    """
    return json.dumps(dict(path=path, arch=arch, epochs=epochs, lr=lr, pretrained=pretrained, workers=workers, resize=resize, out=out,
                           overwrite=overwrite, **techniques))


def commented(learn: Learner | str,     # the run folder
              out: str = 'bundle',      # where to
              *, ks: list[int] | None = None):
    "Say where it went."
    return Path(out)


def leaves(path: str | None = None, *, out: str | None = None): return object()


def fails(path, *, out: str | None = None):
    if path == 'ctrl-c': raise KeyboardInterrupt
    if path == 'bug': raise ValueError('ours')
    raise BadValue('Exception occured in `Mix` when calling event `before_batch`:\n\tfails: path must be nice,\n   got x')


@pytest.fixture(autouse=True)
def commands(monkeypatch):
    for f in (toy, commented, leaves, fails): monkeypatch.setitem(cli.COMMANDS, f.__name__, f'{__name__}:{f.__name__}')


@pytest.fixture
def registered():
    "Four techniques whose arguments text carries in full, in part, or not at all."
    before = set(TECHNIQUES)
    declare = technique('train', section='Test bench', source='here')

    @declare
    def bench_choice(self: Learner, mode: Literal['soft', 'hard'] = 'soft', sizes: tuple[int, int] = (1, 2)) -> Learner:
        "Choose a mode, 50 % each."
    @declare
    def bench_teacher(self: Learner, teacher: Learner | str, T: float = 2.) -> Learner: "Learn from a teacher."
    @declare
    def bench_object(self: Learner, compose: object) -> Learner: "Needs what no text can carry."
    @declare
    def bench_half(self: Learner, hook: object = None, every: int = 3) -> Learner: "One argument of two."

    yield
    for name in set(TECHNIQUES) - before:
        del TECHNIQUES[name]
        delattr(Learner, name)


@pytest.fixture
def answer(capsys):
    "`answer('photos --mixup')`: the arguments that reached the recipe."
    def ask(line):
        assert cli.main(['toy', *line.split()]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)
    return ask


@pytest.fixture
def mistake(capsys):
    "`mistake('toy --epoch 3')`: the one line on stderr; exit code 2 and an empty stdout are checked."
    def ask(line):
        assert cli.main(line.split() if isinstance(line, str) else line) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith('fastrecipes: ') and err.count('\n') == 1, err
        return err.removeprefix('fastrecipes: ').strip()
    return ask


def test_what_is_not_given_is_the_default_of_the_function(answer):
    got = answer('photos')
    assert re.fullmatch(r'runs/toy-\d{8}-\d{6}', got.pop('out'))
    assert got == dict(path='photos', arch='resnet18', epochs=5, lr='find', pretrained=True, workers=None, resize='crop', overwrite=False)


@pytest.mark.parametrize('line, name, value', [
    ('--lr 1e-3', 'lr', .001), ('--lr=find', 'lr', 'find'), ('--workers 0', 'workers', 0), ('--workers null', 'workers', None),
    ('--pretrained false', 'pretrained', False), ('--resize squish', 'resize', 'squish'), ('--overwrite', 'overwrite', True),
    ('--overwrite false', 'overwrite', False), ('--arch 101', 'arch', '101'), ('--out 2024', 'out', '2024'), ('--lr -1', 'lr', -1.)])
def test_options_are_typed_by_the_signature(answer, line, name, value):
    got = answer(f'photos {line}')
    assert (got[name], type(got[name])) == (value, type(value))


@pytest.mark.parametrize('line, expected', [
    ('photos --mixup', dict(mixup=True)), ('photos --mixup .4', dict(mixup=.4)), ('--mixup=.4 photos', dict(mixup=.4)),
    ('--epochs 5 photos --mixup false', dict(mixup=False)), ('photos --mixup null', dict(mixup=None)),
    ('photos --mixup --epochs 5', dict(mixup=True)),
    ('photos --mixup.alpha 3e-1', dict(mixup=dict(alpha=.3))), ('photos --early-stop', dict(early_stop=True)),
    ('photos --early_stop accuracy', dict(early_stop='accuracy')),
    ('photos --early_stop.patience 2 --early-stop.restore false', dict(early_stop=dict(patience=2, restore=False))),
    ('photos --balance weighted --balance.weights [1,2]', dict(balance=dict(mode='weighted', weights=[1, 2]))),
    ('--overwrite photos --balance', dict(balance=True))])
def test_a_technique_is_a_flag(answer, line, expected):
    got = answer(line)
    assert got['path'] == 'photos' and got['epochs'] == 5
    assert {n: v for n, v in got.items() if n in TECHNIQUES} == expected


def test_what_text_cannot_carry_has_no_flag(registered, answer, mistake, capsys):
    assert answer('p --bench_choice hard')['bench_choice'] == 'hard'
    assert answer('p --bench_choice.sizes [3,4]')['bench_choice'] == dict(sizes=[3, 4])
    assert answer('p --bench_teacher runs/big --bench_teacher.T 4')['bench_teacher'] == dict(teacher='runs/big', T=4.)
    assert answer('p --bench_half --bench_half.every 5')['bench_half'] == dict(every=5)
    assert mistake('toy p --bench_object x').startswith('no option --bench_object in toy')
    assert mistake('toy p --bench_choice sot') == "--bench_choice: soft or hard (mode), true or false, got 'sot'; did you mean 'soft'?"
    assert mistake('toy p --bench_half 5') == "--bench_half: true or false, got '5'"
    assert mistake('toy p --bench_half.hook 5') == '--bench_half.hook: no such argument; bench_half takes every'


def test_recipe_yaml_gives_arguments_and_what_is_typed_wins(answer, tmp_path):
    recipe = tmp_path/'recipe.yaml'
    recipe.write_text('path: cats\nlr: 1e-3\nmixup: 0.4\nbalance: {mode: weighted}\naugment: null\nlabel_smoothing: true\nout: there\n')
    got = answer(f'--config {recipe}')
    assert got['path'] == 'cats' and got['lr'] == .001 and got['out'] == 'there'
    on = dict(mixup=.4, balance=dict(mode='weighted'), augment=None, label_smoothing=True)
    assert {n: v for n, v in got.items() if n in TECHNIQUES} == on
    got = answer(f'dogs --lr 2 --mixup.alpha .1 --config={recipe}')
    assert (got['path'], got['lr'], got['mixup']) == ('dogs', 2., dict(alpha=.1))


def test_print_config_writes_a_recipe_that_runs_again(answer, capsys, tmp_path):
    assert cli.main('toy photos --mixup.alpha .3 --epochs 7 --balance --print_config'.split()) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text) == dict(path='photos', arch='resnet18', epochs=7, lr='find', pretrained=True, workers=None, resize='crop',
                                        out=None, overwrite=False, mixup=dict(alpha=.3), balance=True)
    (tmp_path/'r.yaml').write_text(text)
    got = answer(f'--config {tmp_path/"r.yaml"}')
    assert got['epochs'] == 7 and got['mixup'] == dict(alpha=.3) and got['balance'] is True and got['out'].startswith('runs/toy-')


@pytest.mark.parametrize('line, said', [
    ('toy', 'toy: needs PATH (the folder): fastrecipes toy PATH'),
    ('toy a b', "unexpected 'b': fastrecipes toy PATH [--option value …]"),
    ('toy p --epochs abc', "--epochs: a whole number, got 'abc'"),
    ('toy p --epochs 2.5', "--epochs: a whole number, got '2.5'"),
    ('toy p --epochs', '--epochs: a whole number, got nothing'),
    ('toy p --epoch 3', "no option --epoch in toy; did you mean '--epochs'?"),
    ('toy p --resize crap', "--resize: crop or squish, got 'crap'; did you mean 'crop'?"),
    ('toy p --pretrained maybe', "--pretrained: true or false, got 'maybe'"),
    ('toy p --workers x', "--workers: a whole number or null, got 'x'"),
    ('toy p --mixup abc', "--mixup: a number (alpha), true or false, got 'abc'"),
    ('toy p --mixup.alpha x', "--mixup.alpha: a number, got 'x'"),
    ('toy p --mixup.alpa 1', "--mixup.alpa: no such argument; did you mean 'alpha'? mixup takes alpha"),
    ('toy p --mixp .4', "no option --mixp in toy; did you mean '--mixup'?"),
    ('ls --config x', 'no option --config in ls')])
def test_a_mistake_is_one_line_with_what_is_allowed(mistake, line, said):
    assert mistake(line).startswith(said)


def test_a_bare_flag_before_the_folder_is_explained(mistake, photos):
    said = f"--mixup: a number (alpha), true or false, got '{photos}'; write fastrecipes toy {photos} --mixup"
    assert mistake(f'toy --mixup {photos}') == said


@pytest.mark.parametrize('text, said', [
    ('mixp: 1', "--config: toy has no argument 'mixp'; did you mean 'mixup'?"),
    ('mixup: {alpa: 1}', "--mixup.alpa: no such argument; did you mean 'alpha'? mixup takes alpha"),
    ('early_stop: {patience: soon}', "--early_stop.patience: a whole number, got 'soon'"),
    ('early_stop: {patience: soon, monitor: accuracy}', '--early_stop: monitor: text, patience: a whole number, '),
    ('epochs: many', "--epochs: a whole number, got 'many'"),
    ('mixup: [', '--config: while parsing a flow node')])
def test_a_mistake_in_recipe_yaml_is_one_line(mistake, tmp_path, text, said):
    (tmp_path/'r.yaml').write_text(text)
    assert mistake(f'toy p --config {tmp_path/"r.yaml"}').startswith(said)


def test_a_missing_recipe_yaml_is_named(mistake, tmp_path):
    assert mistake(f'toy --config {tmp_path/"none.yaml"}') == f'--config: no file {tmp_path/"none.yaml"}'


def test_an_unknown_command_names_the_nearest(mistake):
    assert mistake('predit x').startswith("no command 'predit'; did you mean 'predict'?")
    assert mistake('--versio').startswith("no option '--versio'; did you mean '--version'?")
    assert mistake('xyzzy') == "no command 'xyzzy'; `fastrecipes --help` lists them"


def test_a_users_mistake_inside_a_recipe_is_one_line_a_bug_is_not(mistake):
    assert mistake('fails x') == 'fails: path must be nice, got x'
    with pytest.raises(ValueError, match='ours'): cli.main(['fails', 'bug'])


def test_ctrl_c_is_one_line(capsys):
    assert cli.main(['fails', 'ctrl-c']) == 130
    assert capsys.readouterr().err == 'fastrecipes: interrupted\n'


def test_help_of_a_command_groups_techniques_by_section(capsys, registered, monkeypatch):
    monkeypatch.setenv('COLUMNS', '120')
    assert cli.main(['toy', '--help']) == 0
    page = capsys.readouterr().out
    assert page.startswith('usage: fastrecipes toy PATH [')
    for line in (r'Nothing is trained; 100 % of it is a test.', r'PATH +the folder',
                 r'--epochs EPOCHS +passes over the data, at least 1 \(default: 5\)',
                 r'--pretrained true\|false +\(default: true\)', r'--resize crop\|squish', r'--out OUT +\(default: runs/toy-<date-time>\)',
                 r'Data augmentation:\n(.*\n)*?  --mixup \[ALPHA\] +Train on convex .*\n? *.*\(alpha=0.4\)',
                 r'Test bench:\n  --bench_choice \[soft\|hard\]\n? +Choose a mode, 50 % each. \(mode=soft, sizes=\[1,2\]\)\n',
                 r'--bench_half \[true\|false\]\n? +One argument of two. \(every=3\)'):
        assert re.search(line, page), line
    assert '--mixup.help' not in page and 'bench_object' not in page


def test_trailing_comments_are_help_and_a_type_may_be_carried_in_part(capsys):
    assert cli.main(['commented', '--help']) == 0
    page = capsys.readouterr().out
    assert re.search(r'LEARN +the run folder', page) and re.search(r'--out OUT +where to \(default: bundle\)', page)
    assert cli.main('commented runs/x --ks [1,2] --out b'.split()) == 0
    assert capsys.readouterr().out == 'b\n'


def test_a_result_without_words_is_answered_with_the_run_folder(capsys):
    assert cli.main(['leaves', '--out', 'here']) == 0 and cli.main(['leaves']) == 0
    assert re.fullmatch(r'run folder: here\nrun folder: runs/leaves-\d{8}-\d{6}\n', capsys.readouterr().out)


@pytest.mark.parametrize('kind, part', [
    (int, int), (Learner, None), (Learner | str, str), (Learner | None, None), (list[int], list[int]), (list[Learner], None), (dict, dict),
    (tuple[int, ...], tuple[int, ...]), (Literal['a'], Literal['a']), (float | None, float | None), (Path, Path)])
def test_the_part_of_a_type_that_text_can_carry(kind, part): assert flags.carried(kind) == part


def test_ls_lists_every_technique_under_its_section(capsys):
    assert cli.main(['ls']) == 0
    page = capsys.readouterr().out
    assert re.search(r'Data augmentation\n(  .*\n)*?  mixup\(alpha=0.4\) +train +Train on convex blends', page)
    assert all(f'\n  {name}(' in page for name in TECHNIQUES)
    assert cli.main(['ls', '--json']) == 0
    records = {r['name']: r for r in json.loads(capsys.readouterr().out)}
    assert records.keys() == TECHNIQUES.keys() and records['early_stop']['arguments']['patience'] == 3


def test_ls_of_a_name_is_its_card(capsys, mistake):
    assert cli.main(['ls', 'mixup']) == 0
    page = capsys.readouterr().out
    assert page.startswith('mixup(alpha: float = 0.4)\n') and 'Raises `ValueError` unless alpha > 0.' in page
    for row in (r'stage +train', r'source +arXiv:1710.09412', r'touches +inputs, targets', r'method +learn.mixup\(0.4\)',
                r'keyword +mixup=0.4', r'flags +--mixup  --mixup 0.4  --mixup.alpha 0.4'): assert re.search(f'^{row}$', page, re.M), row
    assert mistake('ls mixap').startswith("ls: no technique named 'mixap'; did you mean 'mixup'?")


def test_a_card_gives_order_and_refusals(capsys):
    @technique('train', section='Test bench', source='here', after=('mixup',), refuses={'balance': 'one is enough'})
    def bench_alone(self: Learner, other: str) -> Learner: "Stands alone."
    try: assert cli.main(['ls', 'bench_alone']) == 0
    finally:
        del TECHNIQUES['bench_alone']
        del Learner.bench_alone
    page = capsys.readouterr().out
    assert re.search(r'^after +mixup$', page, re.M) and re.search(r'^refuses +balance: one is enough$', page, re.M)
    assert "learn.bench_alone(<other>)" in page and re.search(r'^flags +--bench_alone OTHER  --bench_alone.other OTHER$', page, re.M)


@pytest.fixture
def bundle(tmp_path):
    "A bundle whose probabilities are known: the softmax of an image's mean red, green and blue, each 0 to 1."
    graph = onnx.parser.parse_graph("""colours (uint8[n, 8, 8, 3] pixels) => (float[n, 3] probabilities) {
        axes = Constant<value_ints = [1, 2]>()
        full = Constant<value_float = 255.0>()
        x = Cast<to = 1>(pixels)
        mean = ReduceMean<keepdims = 0>(x, axes)
        share = Div(mean, full)
        probabilities = Softmax<axis = 1>(share)
    }""")
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 18)], ir_version=10)
    (tmp_path/'bundle').mkdir()
    onnx.save(model, tmp_path/'bundle'/'model.onnx')
    card = dict(schema=1, labels=['red', 'green', 'blue'], input=dict(size=[8, 8], resize='squish'),
                files={'model.onnx': hashlib.sha256((tmp_path/'bundle'/'model.onnx').read_bytes()).hexdigest()})
    (tmp_path/'bundle'/'bundle.json').write_text(json.dumps(card))
    for name, colour in (('red', (255, 0, 0)), ('cyan', (0, 255, 255))): Image.new('RGB', (20, 10), colour).save(tmp_path/f'{name}.png')
    return tmp_path/'bundle'


def test_predict_prints_the_most_probable_labels_of_each_image(bundle, capsys):
    red, cyan = str(bundle.parent/'red.png'), str(bundle.parent/'cyan.png')
    assert cli.main(['predict', str(bundle), red, cyan, '--k', '2']) == 0
    # softmax(1, 0, 0) = e/(e+2), 1/(e+2);  softmax(0, 1, 1) = 1/(1+2e), e/(1+2e)
    assert capsys.readouterr().out == f'{red}  red  0.5761\n{red}  green  0.2119\n{cyan}  green  0.4223\n{cyan}  blue  0.4223\n'
    assert cli.main(['predict', str(bundle), '--json', cyan]) == 0
    assert json.loads(capsys.readouterr().out) == {cyan: pytest.approx(dict(green=.42232, blue=.42232, red=.15536), abs=1e-5)}


def test_predict_answers_the_readable_images_and_names_the_others(bundle, capsys):
    red, empty, none = (str(bundle.parent/n) for n in ('red.png', 'empty.png', 'none.png'))
    Path(empty).touch()
    assert cli.main(['predict', str(bundle), empty, red, none, '--k=1']) == 2
    out, err = capsys.readouterr()
    assert out == f'{red}  red  0.5761\n'
    assert [re.match('fastrecipes: .*?(empty|none).png', line)[1] for line in err.splitlines()] == ['empty', 'none']


def test_predict_without_a_bundle_images_or_labels_is_a_mistake(bundle, mistake):
    assert 'nowhere does not exist' in mistake(['predict', 'nowhere', 'a.png'])
    assert mistake(['predict', str(bundle)]) == 'predict: needs IMAGES (files, folders, or - for names from standard input): fastrecipes predict BUNDLE IMAGES…'
    assert mistake(['predict', str(bundle), 'a.png', '--k', '0']) == '--k: at least 1, got 0'


def test_predict_needs_no_torch(bundle):
    code = 'import sys; from fastrecipes.cli import main; main(sys.argv[1:]); print([m for m in ("torch", "fastai") if m in sys.modules])'
    done = _python('-c', code, 'predict', str(bundle), str(bundle.parent/'red.png'), '--k', '1')
    assert done.returncode == 0 and done.stdout.endswith('red  0.5761\n[]\n'), done


def _python(*args, **kwargs): return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120, **kwargs)


def test_help_is_instant_and_imports_neither_torch_nor_fastai():
    code = ('import sys; from fastrecipes.cli import main; main(["--help"]); main(["--version"]); main(["predict", "--help"]);'
            'print([m for m in ("torch", "fastai", "fastrecipes.recipes") if m in sys.modules])')
    started = time.monotonic()
    done = _python('-c', code)
    assert done.returncode == 0 and done.stdout.endswith('[]\n'), done
    assert time.monotonic() - started < 5           # a second where nothing else runs; importing fastai takes ten here
    for name, target in cli.COMMANDS.items():
        if not target.startswith(__name__): assert re.search(rf'^  {name} +[A-Z].*\.$', done.stdout, re.M), name
    assert re.search(r'^fastrecipes \d+\.\d+', done.stdout, re.M)


def test_a_mistake_typed_in_a_shell_leaves_one_line_and_code_2():
    done = _python('-m', 'fastrecipes', 'image-classifier', 'photos', '--mixp', '.4')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == "fastrecipes: no option --mixp in image-classifier; did you mean '--mixup'?\n"


def test_a_reader_that_stops_reading_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, '-m', 'fastrecipes', '--help'], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, '')
