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
