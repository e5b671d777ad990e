"serve.pyz: from a folder, without torch, fastai or fastrecipes; the same bytes each time."
import configparser
import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import requests

import fastrecipes
from fastrecipes.production import zipapp
from fastrecipes.production.zipapp import DOCKERFILE, requirements, serve_pyz

from .serving import served
from .shares import encoded, shares_of, write_shares

# What is not installed where a bundle is served: finding it is an error.
WITHOUT = '''import sys
class No:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'torch', 'fastai', 'fastcore', 'timm', 'onnx', 'scipy', 'pandas', 'matplotlib'}: raise ImportError(f'{name} is not installed')
sys.meta_path.insert(0, No())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')'''


def test_it_serves_the_folder_it_lies_in_with_its_own_code(tmp_path):
    bundle = write_shares(tmp_path/'bundle')
    marked = io.BytesIO(serve_pyz())
    with zipfile.ZipFile(marked) as old, zipfile.ZipFile(bundle/'serve.pyz', 'w') as new:      # an error that only this copy says: the installed package is not used
        for name in old.namelist(): new.writestr(name, old.read(name).replace(b'there is no such page', b'the copy has no such page'))
    with served(bundle, '--workers', '1', command=('-c', WITHOUT, str(bundle/'serve.pyz'))) as s:
        assert requests.post(f'{s.url}/predict', files={'my_img_file': encoded((50, 10, 140))}).json() == shares_of(50, 10, 140)
        assert requests.get(f'{s.url}/nope').json()['error'].startswith('the copy has no such page')
        assert 'my_img_file' in requests.get(s.url).text
    (bundle/'model.onnx').write_bytes(b'x')
    done = subprocess.run([sys.executable, str(bundle/'serve.pyz'), '--port', '0'], capture_output=True, text=True, timeout=60)        # without a name: its own folder
    assert done.returncode == 2 and re.fullmatch(f'serve.pyz: bundle: {re.escape(str(bundle.resolve()))}/model.onnx is not the file.*\n', done.stderr), done


def test_the_same_bytes_each_time_and_nothing_of_torch():
    data = serve_pyz()
    assert data == serve_pyz() and data.startswith(b'#!/usr/bin/env python3\n')
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        assert {i.date_time for i in z.infolist()} == {(1980, 1, 1, 0, 0, 0)} and {i.compress_type for i in z.infolist()} == {zipfile.ZIP_STORED}
        below = {'errors.py', '__init__.py', 'data/__init__.py', 'data/pixels.py'}
        assert {n for n in z.namelist() if 'production' not in n} == {'__main__.py', *(f'fastrecipes/{n}' for n in below)}
        assert not re.search(rb'^\s*(from|import) (torch|fastai|fastcore|timm|onnx)\b', b'\n'.join(map(z.read, z.namelist())), re.M)
        for name in z.namelist()[1:]: assert z.read(name) == (Path(fastrecipes.__file__).parents[1]/name).read_bytes()


def test_requirements_are_what_was_verified_and_the_servers_that_setup_names():
    lines = requirements().splitlines()
    assert lines[:3] == [f'{p}>={version(p)}' for p in ('onnxruntime', 'numpy', 'Pillow')] and len(lines) == 6
    setup = configparser.ConfigParser()
    setup.read(Path(fastrecipes.__file__).parents[1]/'setup.cfg')
    assert lines[3:] == [line.replace('flask', 'Flask') for line in setup['options.extras_require']['serve'].splitlines() if line]


def test_the_dockerfile_runs_as_nobody_in_particular_and_gets_its_signals():
    steps = [line.partition(' ') for line in DOCKERFILE.replace('\\\n', '').splitlines() if line and not line.startswith('#')]
    of = {name: rest for name, _, rest in steps}
    assert of['USER'] == '10001' and of['EXPOSE'] == '5000' and '/healthz' in of['HEALTHCHECK'] and of['FROM'].endswith('-slim')
    assert json.loads(of['CMD']) == ['python', 'serve.pyz', '--host', '0.0.0.0']       # exec form: SIGTERM reaches the server, not a shell


def test_a_shipped_bundle_holds_them_under_its_checksums(shipped):
    folder = shipped[1].path
    card = json.loads((folder/'bundle.json').read_text())
    assert (folder/'serve.pyz').read_bytes() == serve_pyz() and (folder/'Dockerfile').read_text() == DOCKERFILE and (folder/'requirements.txt').read_text() == requirements()
    assert card['files'] == {f: hashlib.sha256((folder/f).read_bytes()).hexdigest() for f in ('Dockerfile', 'model.onnx', 'requirements.txt', 'serve.pyz')}
    assert zipapp.ENTRY == 'fastrecipes.production.serving'
