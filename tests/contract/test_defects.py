"The defects of fastai 2.8.12: each is there on plain fastai, and not with this package."
import json
import os
import subprocess
import sys

import pytest

from . import defects


@pytest.fixture(scope='module')
def plain():
    "What plain fastai does, in a process that knows nothing of this package: name → (wrong, seen)."
    env = {k: v for k, v in os.environ.items() if k != 'FASTRECIPES_REPAIRS'}
    run = subprocess.run([sys.executable, '-W', 'ignore', defects.__file__, 'plain'], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize('name', defects.DEFECTS)
def test_is_there_in_fastai_and_not_here(plain, name):
    wrong, seen = plain[name]
    assert wrong, f'plain fastai: {seen}'
    wrong, seen = defects.DEFECTS[name](here=True)
    assert not wrong, f'here: {seen}'
