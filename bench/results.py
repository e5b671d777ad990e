"bench/RESULTS.md: one section a benchmark, replaced when it is run again."
import re
from pathlib import Path

FILE = Path(__file__).parent/'RESULTS.md'


def write(name: str, section: str):
    "Put `section` between the marks of `name`, at the end where there are none yet."
    start, end = f'<!-- {name} -->', f'<!-- /{name} -->'
    old = FILE.read_text(encoding='utf8') if FILE.exists() else '# Measured\n'
    if start not in old: old = f'{old.rstrip()}\n\n{start}\n{end}\n'
    FILE.write_text(re.sub(f'{start}.*{end}', lambda m: f'{start}\n{section}\n{end}', old, flags=re.S), encoding='utf8')


def read(name: str) -> str:
    "What stands between the marks of `name`: nothing where it was never written."
    return FILE.read_text(encoding='utf8').partition(f'<!-- {name} -->')[2].partition(f'<!-- /{name} -->')[0] if FILE.exists() else ''
