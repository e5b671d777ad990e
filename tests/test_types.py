"What editors and type checkers know: the stub follows from the registry, and a wrong argument is seen before anything runs."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stub import FILE, stub

ROOT = Path(__file__).parents[1]

WRITTEN = """
from fastrecipes.all import *

def write(learn: Learner):
    learn.mixup(.4).balance('upsampling').label_smoothing(eps=.1).fit_flat_cos(5, 3e-3)
    learn.mixup(alpha='much')
    learn.balance('upsampled')
    learn.label_smoothing(epsilon=.1)

image_classifier('photos/', epochs=2).ema(.99)
image_classifier('photos/', resize='stretch')
"""
WRONG = {6: 'much', 7: 'upsampled', 8: 'epsilon', 11: 'stretch'}       # line → what is wrong in it


def test_the_stub_is_what_the_registry_says():
    assert FILE.read_text(encoding='utf8') == stub(), 'python docs/stub.py'


def test_a_type_checker_knows_the_techniques(tmp_path):
    if not shutil.which('pyright') or subprocess.run(['pyright', '--version'], capture_output=True).returncode: pytest.skip('pyright is not to be had (extra dev)')
    (tmp_path/'used.py').write_text(WRITTEN, encoding='utf8')
    settings = dict(include=['.'], typeCheckingMode='basic', extraPaths=[str(ROOT)])
    (tmp_path/'pyrightconfig.json').write_text(json.dumps(settings))
    said = subprocess.run(['pyright', '--outputjson', '--pythonpath', sys.executable, '-p', str(tmp_path)], capture_output=True, text=True)
    errors = [d for d in json.loads(said.stdout)['generalDiagnostics'] if d['severity'] == 'error']
    assert {d['range']['start']['line']+1 for d in errors} == set(WRONG)
    for d in errors: assert WRONG[d['range']['start']['line']+1] in d['message']
