"The composition matrix, as it is printed, against the records."
import json
import re
import subprocess
import sys

import pytest
from fastai.basics import Learner

from fastrecipes import cli
from fastrecipes.cards import composition
from fastrecipes.technique import TECHNIQUES, discover, technique

discover()


def parsed(page):
    "Name → name → the letter in that cell, and letter → (pairs, sentence)."
    table, said = page.split('\n\n')
    head, rows = table.split('\n')[:2], table.split('\n')[2:]
    names = [row.split()[0] for row in rows]
    at = {int((head[0].ljust(400)[i] + head[1][i]).strip()): i for i in range(len(head[1])) if head[1][i] != ' '}       # numbers are read downwards
    cells = {a: {b: row.ljust(400)[at[i+1]] for i, b in enumerate(names)} for a, row in zip(names, rows)}
    assert [int(row.split()[1]) for row in rows] == list(at) == [*range(1, len(names)+1)]
    sentences = re.sub(r'\n  ', ' ', said).split('\n')[1:]
    return cells, {s[0]: (s[2:].split(': ', 1)[0].split(', '), s.split(': ', 1)[1]) for s in sentences}


def test_the_printed_matrix_is_what_the_records_refuse_in_both_directions(capsys):
    assert cli.main(['ls', '--matrix']) == 0
    cells, sentences = parsed(capsys.readouterr().out.rstrip())
    assert cells.keys() == TECHNIQUES.keys()
    for a in TECHNIQUES:
        for b in TECHNIQUES:
            why = TECHNIQUES[a].refuses.get(b) or TECHNIQUES[b].refuses.get(a)
            assert cells[a][b] == cells[b][a]
            if a == b: assert cells[a][b] == ' '
            elif why is None: assert cells[a][b] == '·'
            else:
                pairs, said = sentences[cells[a][b]]
                assert said == why and (f'{a} + {b}' in pairs) != (f'{b} + {a}' in pairs)
    assert sum(len(pairs) for pairs, _ in sentences.values()) == sum(len(t.refuses) for t in TECHNIQUES.values())


@pytest.fixture
def forty():
    "Techniques to make forty, some of which refuse others, twice by the same sentence."
    before = set(TECHNIQUES)
    for i in range(max(4, 40-len(before))):
        def f(self: Learner) -> Learner: "Do nothing."
        f.__name__ = f'bench_{i:02}'
        technique('train', section='Test bench', source='here', refuses={f'bench_{i-1:02}': f'they differ by one, {i//2}'} if i else {})(f)
    yield
    for name in set(TECHNIQUES)-before:
        del TECHNIQUES[name]
        delattr(Learner, name)


def test_forty_techniques_fit_on_a_hundred_columns(forty):
    page = composition(TECHNIQUES.values())
    longest = max(map(len, TECHNIQUES))
    assert len(TECHNIQUES) >= 40 and max(map(len, page.split('\n'))) <= max(100, longest + 3 + 2*len(TECHNIQUES))
    cells, sentences = parsed(page)
    assert sentences[cells['bench_02']['bench_03']] == (['bench_01 + bench_02', 'bench_02 + bench_03'], 'they differ by one, 1')
    assert cells['bench_01']['bench_03'] == '·' and cells['bench_01']['bench_02'] == cells['bench_02']['bench_03']


def test_a_name_with_the_matrix_is_its_row_in_words(capsys):
    assert cli.main(['ls', 'class_weights', '--matrix']) == 0
    page = ' '.join(capsys.readouterr().out.split())
    assert page.startswith('class_weights does not go together with ') and f'balance: {TECHNIQUES["class_weights"].refuses["balance"]}' in page
    assert TECHNIQUES['logit_adjustment'].refuses['class_weights'] in page
    assert set(page.split('all others: ')[1].split(', ')) == TECHNIQUES.keys() - {'class_weights', 'balance', 'logit_adjustment'}
    assert cli.main(['ls', 'mixup', '--matrix']) == 0
    others = {b for b in TECHNIQUES if b in TECHNIQUES['mixup'].refuses or 'mixup' in TECHNIQUES[b].refuses}
    page = capsys.readouterr().out
    assert len(others) > 1 and all(b in page for b in others)


def test_the_matrix_as_records_has_every_pair_once(capsys):
    assert cli.main(['ls', '--matrix', '--json']) == 0
    records = json.loads(capsys.readouterr().out)
    n = len(TECHNIQUES)
    assert len({frozenset(r['techniques']) for r in records}) == len(records) == n*(n-1)//2
    refused = {frozenset(r['techniques']): r['why'] for r in records if not r['together']}
    assert refused == {frozenset((a, b)): why for a, t in TECHNIQUES.items() for b, why in t.refuses.items()}
    assert cli.main(['ls', 'balance', '--matrix', '--json']) == 0
    assert len(json.loads(capsys.readouterr().out)) == n-1


@pytest.mark.parametrize('name, first, kind', [('quantize', "learn.quantize(kind: Literal['static', 'dynamic', 'qat'] = 'static', *, tolerance", 'method'),
                                               ('noisy-student', 'noisy_student(path, unlabelled, arch: str = ', 'function'), ('fit_sgdr', 'learn.fit_sgdr(n_cycles, ', 'method'),
                                               ('tta', 'learn.tta(ds_idx', 'method'), ('Ensemble', 'Ensemble(members', 'class'), ('Client', 'Client(url', 'class')])
def test_methods_and_recipes_have_a_page_too(capsys, name, first, kind):
    assert cli.main(['ls', name]) == 0
    said = capsys.readouterr().out
    assert said.startswith(first) and f'a {kind}, and no technique' in said and 'Raises' in said
    assert cli.main(['ls', name, '--json']) == 0
    assert json.loads(capsys.readouterr().out)['kind'] == kind


def test_the_nearest_method_is_named(capsys):
    assert cli.main(['ls', 'sensitivty']) == 2
    assert "did you mean 'sensitivity'" in capsys.readouterr().err


def test_a_method_has_a_page_in_a_process_that_knows_nothing_yet():
    "What Learners have depends on what was imported: here it is all in the tests' own process, and in a shell only what `ls` asks for."
    done = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'fastrecipes', 'ls', 'tta'], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith('learn.tta(') and 'a method, and no technique' in done.stdout, done.stderr
