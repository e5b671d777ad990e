"""The table of what fastai 2.8.12 does wrong and what is seen here instead, measured anew.

`python bench/defects.py [--write]`"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from results import write

ROOT = Path(__file__).parent.parent


def seen(where: str) -> dict:
    "What each scenario of tests/contract/defects.py shows, 'plain' or 'here', in a process of its own: name → (wrong, seen)."
    env = {k: v for k, v in os.environ.items() if k != 'FASTRECIPES_REPAIRS'}
    run = subprocess.run([sys.executable, '-W', 'ignore', ROOT/'tests/contract/defects.py', where], stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(run.stdout)


def table() -> str:
    "The scenarios as rows of Markdown: the defect, plain fastai, here; bold what is wrong."
    plain, here = seen('plain'), seen('here')
    rows = [(name.replace('_', ' '), *(('**{}**' if wrong else '{}').format(what.replace('|', r'\|')) for wrong, what in (plain[name], here[name]))) for name in plain]
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [('defect', 'plain fastai', 'here'), ('---',)*3, *rows])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--write', action='store_true')
    to_write = parser.parse_args().write
    print(rows := table())
    if to_write: write('defects', f'## Defects of fastai 2.8.12\n\n`python bench/defects.py`; bold: wrong. Each is a test in tests/contract/test_defects.py.\n\n{rows}')
