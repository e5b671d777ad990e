"`fastrecipes predict` on folders, standard input and into files: every line can be worked out; a kill spoils nothing."
import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastrecipes.cli import main
from fastrecipes.errors import BadValue
from fastrecipes.production import predicting
from fastrecipes.production.predicting import predict

from .serving import ENV
from .shares import LABELS, encoded, shares_of, write_shares


@pytest.fixture(scope='module')
def bundle(tmp_path_factory): return str(write_shares(tmp_path_factory.mktemp('p')/'bundle'))


@pytest.fixture
def folder(tmp_path):
    "Seventy images in two levels, a text, a hidden file, and two that are broken."
    for i in range(70):
        f = tmp_path/'in'/('a' if i < 40 else 'b/c')/f'{i:02}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes(encoded((i, 10, 140)))
    (tmp_path/'in'/'a'/'notes.txt').write_text('x')
    (tmp_path/'in'/'.hidden.png').write_bytes(b'x')
    for name in ('a/broken.png', 'b/empty.jpg'): (tmp_path/'in'/name).write_bytes(b'no' if 'broken' in name else b'')
    return tmp_path/'in'


def colour_of(name): return int(Path(name).stem), 10, 140


def rows(file): return list(csv.reader(io.StringIO(Path(file).read_text(encoding='utf8', errors='surrogateescape'), newline='')))


def right(file, names):
    "Each of `names` once, with the labels and shares of its colour."
    head, *body = rows(file)
    assert head == ['image', 'model', 'label', 'probability', 'label_2', 'probability_2', 'label_3', 'probability_3']
    assert sorted(r[0] for r in body) == sorted(map(str, names)) and len({r[1] for r in body}) == 1
    for name, _, *cells in body: assert {label: round(float(p), 4) for label, p in zip(cells[::2], cells[1::2])} == pytest.approx(shares_of(*colour_of(name)), abs=1e-4)
    return True


def good(folder): return [f for f in folder.rglob('[0-9]*.png')]


def test_a_folder_is_walked_and_the_unreadable_are_listed_at_the_end(bundle, folder, capsys):
    assert main(['predict', bundle, str(folder), '--k', '1']) == 2
    out, err = capsys.readouterr()
    said = [line.split('  ') for line in out.splitlines()]
    assert [s[0] for s in said] == [str(f) for f in sorted(good(folder))]
    assert all((label, float(p)) == next(iter(shares_of(*colour_of(name)).items())) for name, label, p in said)
    assert [re.fullmatch('fastrecipes: .*?(broken.png|empty.jpg): .*', line)[1] for line in err.splitlines()] == ['broken.png', 'empty.jpg']


def test_json_is_one_object(bundle, folder, capsys):
    assert main(['predict', bundle, '--json', str(folder/'a'/'05.png'), str(folder/'a'/'06.png')]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {Path(n).name: {label: round(p, 4) for label, p in a.items()} for n, a in answer.items()} == {'05.png': shares_of(5, 10, 140), '06.png': shares_of(6, 10, 140)}


@pytest.mark.parametrize('words', [['-'], ['-', '--k', '2'], ['--k', '2', '-']])
def test_names_come_from_standard_input(bundle, folder, words):
    text = f'{folder}/a/05.png\n\n{folder}/b/c/41.png\r\n'
    done = subprocess.run([sys.executable, '-m', 'fastrecipes', 'predict', bundle, *words], input=text, capture_output=True, text=True, env=ENV, timeout=60)
    assert done.returncode == 0, done.stderr
    assert list(dict.fromkeys(line.split('  ')[0] for line in done.stdout.splitlines())) == [f'{folder}/a/05.png', f'{folder}/b/c/41.png']


def test_a_csv_has_a_line_an_image(bundle, folder, tmp_path):
    assert main(['predict', bundle, str(folder), '--out', str(tmp_path/'x.csv')]) == 2
    assert right(tmp_path/'x.csv', good(folder))


def test_a_jsonl_has_an_object_a_line(bundle, folder, tmp_path):
    assert main(['predict', bundle, str(folder), '--out', str(tmp_path/'new'/'x.jsonl'), '--k', '2']) == 2
    lines = [json.loads(line) for line in (tmp_path/'new'/'x.jsonl').read_text().splitlines()]
    assert [o['image'] for o in lines] == [str(f) for f in sorted(good(folder))]
    for o in lines: assert {label: round(p, 4) for label, p in o['predictions'].items()} == pytest.approx(dict(list(shares_of(*colour_of(o['image'])).items())[:2]), abs=1e-4)


@pytest.mark.parametrize('suffix', ['.csv', '.jsonl'])
@pytest.mark.parametrize('torn', [0, 1, 7, 40])
def test_what_is_there_is_not_done_again_and_a_torn_line_is_mended(bundle, folder, tmp_path, suffix, torn, monkeypatch):
    whole, part = tmp_path/f'whole{suffix}', tmp_path/f'part{suffix}'
    predict(bundle, [str(folder)], out=str(whole))
    lines = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b''.join(lines[:30]) + lines[30][:torn])
    read = []
    real = predicting._read
    monkeypatch.setattr(predicting, '_read', lambda predictor, name: read.append(name) or real(predictor, name))
    assert predict(bundle, [str(folder)], out=str(part)) == 2
    assert part.read_bytes() == whole.read_bytes() and len(read) == 72 - (29 if suffix == '.csv' else 30)
    again = len(read)
    assert predict(bundle, [str(folder)], out=str(part)) == 2 and part.read_bytes() == whole.read_bytes() and len(read) == again+2        # the unreadable, tried again


@pytest.mark.parametrize('suffix', ['.csv', '.jsonl'])
def test_names_with_line_breaks_quotes_and_bytes_that_are_no_text_come_back(bundle, tmp_path, suffix):
    names = ['a\nb.png', 'q"uo,te.png', 'ü.png', b'\xff.png'.decode('utf8', 'surrogateescape')]
    for n in names: (tmp_path/n).write_bytes(encoded((50, 10, 140)))
    given = [str(tmp_path/n) for n in names]
    out = tmp_path/f'x{suffix}'
    assert predict(bundle, given, out=str(out)) == 0
    whole = out.read_bytes()
    if suffix == '.csv': assert [r[0] for r in rows(out)[1:]] == given
    else: assert [json.loads(line)['image'] for line in whole.decode().splitlines()] == given
    assert predict(bundle, given, out=str(out)) == 0 and out.read_bytes() == whole
    at = whole.index(b'a\nb.png')+2 if suffix == '.csv' else whole.index(b'b.png')          # torn within the name, after its line break
    out.write_bytes(whole[:at])
    assert predict(bundle, given, out=str(out)) == 0 and out.read_bytes() == whole


def test_a_file_of_something_else_is_left_alone(bundle, folder, tmp_path):
    one, other = [str(folder/'a'/'05.png')], str(write_shares(tmp_path/'other', metrics={}))
    (tmp_path/'mine.csv').write_text('precious,data\n1,2\n')
    (tmp_path/'mine.jsonl').write_text('precious\n')
    for name in ('mine.csv', 'mine.jsonl'):
        before = (tmp_path/name).read_text()
        with pytest.raises(BadValue, match='holds something else; name another'): predict(bundle, one, out=str(tmp_path/name))
        assert (tmp_path/name).read_text() == before
    for suffix in ('.csv', '.jsonl'):
        out = tmp_path/f'x{suffix}'
        predict(bundle, one, out=str(out))
        with pytest.raises(BadValue, match='--k 2'): predict(bundle, one, k=2, out=str(out))
        out.write_text(re.sub('"[0-9a-f]{12}"|,[0-9a-f]{12},', lambda m: m[0][0] + '0'*12 + m[0][-1], out.read_text()))
        with pytest.raises(BadValue, match='answers of another model'): predict(other, one, out=str(out))


@pytest.mark.parametrize('more, says', [(dict(k=0), '--k: at least 1'), (dict(out='x.txt'), r"--out: a file that ends in .csv or .jsonl, got 'x.txt'"),
                                        (dict(out='x.csv', json=True), 'pick one')])
def test_mistakes_are_said_before_any_work(more, says):
    with pytest.raises(BadValue, match=says): predict('no bundle', ['x'], **more)


def test_an_out_that_cannot_be_written_is_said(bundle, tmp_path):
    (tmp_path/'f').write_text('')
    with pytest.raises(BadValue, match='cannot be written'): predict(bundle, ['x'], out=str(tmp_path/'f'/'x.csv'))
    (tmp_path/'d.csv').mkdir()
    with pytest.raises(BadValue, match='is no file'): predict(bundle, ['x'], out=str(tmp_path/'d.csv'))


def test_progress_is_told_of_many(bundle, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predicting, 'EVERY', dict(terminal=0, log=0))
    predict(bundle, [str(folder)], out=str(tmp_path/'x.csv'))
    err = capsys.readouterr().err
    assert re.search(r'64 images, [\d,]+/s, 2 unreadable\n72 images, .*2 unreadable\n70 images in [\d.]+ s → .*x.csv\n', err)
    predict(bundle, [str(folder)], out=str(tmp_path/'x.csv'))
    assert re.search(r'0 images in [\d.]+ s → .*x.csv, 70 were there\n', capsys.readouterr().err)
    assert LABELS[0] == 'rött'
