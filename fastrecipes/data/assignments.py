"Who goes where, as the user tells it: a list of files, a CSV, a function; and who belongs to whom."
import csv
import re
from collections.abc import Callable
from numbers import Real
from pathlib import Path

import numpy as np

from fastrecipes.data.splits import SIDES
from fastrecipes.errors import BadValue, NotThere, nearest

__all__ = ['Assignment', 'GIVEN', 'assigned', 'grouped']

GIVEN = {'train': 'train', 'training': 'train', 'valid': 'valid', 'val': 'valid', 'validation': 'valid', 'test': 'test'}


def assigned(valid) -> bool:
    "Whether `valid` says who validates, and not how many. Raises `ValueError` for what is neither."
    if isinstance(valid, Real) and not isinstance(valid, bool): return False
    if isinstance(valid, (str, Path)) or callable(valid): return True
    if isinstance(valid, (list, tuple, set, frozenset)):
        if not valid: raise BadValue('valid: a list of files, got an empty one')
        if wrong := next((o for o in valid if not isinstance(o, (str, Path))), None): raise BadValue(f'valid: a list of files, got {wrong!r} in it')
        return True
    raise BadValue(f'valid: a share in [0, 1), a list of files, a CSV with the columns file and split, or a function of the file, got {valid!r}')


class Assignment:
    """What `valid` says of `files`, all under `path`: `.side(file)` is 'train', 'valid' or 'test', or '' where it says nothing (None, a share).

    `.rows`: those of a CSV by file. Raises `ValueError` for files that are not there, sides that there are not, images that a CSV does not list."""

    def __init__(self, path: Path, files: list[Path], valid=None):
        self.path, self.files, self.rows = path, files, {}
        self.known = {self.name(p): p for p in files}
        if valid is None: self.sides = {}
        elif callable(valid): self.sides = {p: _side(valid(p), f'valid: {getattr(valid, "__name__", "the function")}({self.name(p)})') for p in files}
        elif isinstance(valid, (str, Path)): self._read(valid)
        else: self.sides = dict.fromkeys(files, 'train') | {self.find(name, 'valid'): 'valid' for name in valid}

    def side(self, file: Path) -> str: return self.sides.get(file, '')

    def name(self, file: Path) -> str:
        "How messages call it."
        return file.relative_to(self.path).as_posix()

    def find(self, name, who: str) -> Path:
        "The image of that name, relative to the folder or to where we are. Raises `ValueError` in the name of `who`, with the nearest."
        p = Path(name)
        for q in (p, Path.cwd()/p):
            if q.is_relative_to(self.path): p = q.relative_to(self.path)
            elif q.is_absolute() and q.is_relative_to(self.path.resolve()): p = q.relative_to(self.path.resolve())
        if (found := self.known.get(p.as_posix())) is not None: return found
        near = [k for k in self.known if k.endswith(f'/{p.name}')] or [k for k in self.known if k.startswith(f'{p.parent.as_posix()}/')] or list(self.known)
        raise BadValue(f'{who}: {self.path} has no image {str(name)!r}{nearest(p.as_posix(), near[:5000])}')

    def _read(self, file):
        "The sides that a CSV gives."
        table = next((p for p in (Path(file), self.path/file) if p.is_file()), None)
        if table is None:
            close = nearest(Path(file).name, [p.name for p in (*self.path.glob('*.csv'), *Path(file).parent.glob('*.csv'))])
            raise NotThere(f'valid: no file {file}{close or ";"} give a share in [0, 1), or a CSV with the columns file and split')
        try: rows = list(csv.DictReader(table.read_text(encoding='utf-8-sig').splitlines()))
        except (UnicodeDecodeError, csv.Error) as e: raise BadValue(f'valid: {file} is no CSV ({e})') from None
        columns = list(rows[0]) if rows else []
        for c in ('file', 'split'):
            if c not in columns: raise BadValue(f'valid: {file} has no column {c!r}{nearest(c, columns) or ";"} its columns are {", ".join(map(str, columns)) or "none"}')
        self.sides = {}
        for n, row in enumerate(rows, 2):
            p, side = self.find(row['file'], f'valid: line {n} of {file}'), _side(row['split'], f'valid: line {n} of {file}: split')
            if self.sides.setdefault(p, side) != side: raise BadValue(f'valid: line {n} of {file}: {row["file"]} was in {self.sides[p]}, and is in {side} now')
            self.rows[p] = row
        if lacking := [self.name(p) for p in self.files if p not in self.sides]:
            raise BadValue(f'valid: {file} does not list {len(lacking)} of the {len(self.files)} images of {self.path}, such as {lacking[0]}; give each its split')


def _side(said, who: str) -> str:
    "A side by any of its names, or True for valid and False for train."
    if isinstance(said, (bool, np.bool_)): return 'valid' if said else 'train'
    if isinstance(said, str) and (side := GIVEN.get(said.strip().lower())): return side
    raise BadValue(f'{who}: {", ".join(SIDES)}{"" if isinstance(said, str) else ", True or False"}, got {said!r}{nearest(said, SIDES)}')


def grouped(groups: str | Callable | None, told: Assignment) -> Callable:
    "A function of a file: the name of its group, or None. Raises `ValueError` for a regular expression that is none."
    if groups is None: return lambda p: None
    if callable(groups): return lambda p: None if (g := groups(p)) is None else str(g)
    if any(groups in row for row in told.rows.values()): return lambda p: told.rows[p][groups] or None
    try: pattern = re.compile(groups)
    except re.error as e: raise BadValue(f'groups: {groups!r} is no regular expression ({e})') from None
    if pattern.groups > 1: raise BadValue(f'groups: a regular expression with one group, got {pattern.groups} in {groups!r}; write (?:…) for those that name nobody')
    return lambda p: m[pattern.groups] if (m := pattern.search(told.name(p))) else None
