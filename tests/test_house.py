"The house in order: arrows point down, rooms are quick to enter, public names are documented."
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastrecipes

ROOT = Path(fastrecipes.__file__).parent
FLOORS = [{'cli', 'flags', 'cards', '__main__', 'all'}, {'recipes'}, {'report', 'production'}, {'training'}, {'layers'}, {'data'}, {'objective'},
          {'losses', 'metrics'}, {'technique'}, {'loop', 'repairs', 'randomness'}, {'arguments'}, {'errors', 'files'}]
FILES = sorted(ROOT.rglob('*.py'))


def floor(room: str) -> int: return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_arrows_point_down(file):
    room = file.relative_to(ROOT).parts[0].removesuffix('.py')
    if room == '__init__': return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('fastrecipes.'):
            assert floor(room) <= floor(node.module.split('.')[1]), f'{file.name} imports {node.module}'


def test_packages_are_empty_and_stars_stay_in_all():
    assert all(f.read_text() == '' for f in ROOT.glob('*/__init__.py'))
    starred = {f.name for f in FILES for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.ImportFrom) and n.names[0].name == '*'}
    assert starred == {'all.py'}


def test_every_public_name_is_documented():
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'): assert ast.get_docstring(node), f'{file.name}: {node.name}'


def test_techniques_are_methods_only_and_stay_out_of_all():
    import fastrecipes.all as everything
    from fastrecipes.technique import discover
    import fastai.vision.all as theirs              # whose optimizers have a function weight_decay
    assert not {n for n in discover() if n in vars(everything) and vars(everything)[n] is not vars(theirs).get(n)}


def test_importing_the_package_costs_nothing():
    code = 'import sys, fastrecipes; print(sorted(m for m in ("torch", "numpy", "fastai") if m in sys.modules))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_our_names_do_not_shadow_fastais_for_the_user():
    import fastai.vision.all as theirs
    import fastrecipes.all as ours
    assert {n for n in vars(theirs) if not n.startswith('_') and vars(ours).get(n) is not vars(theirs)[n]} == set()
