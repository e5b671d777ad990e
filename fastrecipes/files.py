"Files that appear whole or not at all: a kill in the middle of writing leaves nothing under the name."
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from fastrecipes.errors import BadValue

__all__ = ['check_file', 'in_bytes', 'whole', 'writes']


def writes() -> bool:
    "Whether this process may write: of those that `torchrun` starts, the first alone."
    return os.environ.get('RANK', '0') == '0'


def in_bytes(n: int) -> str:
    "A size in words: 1,234 bytes are `1.2 kB`."
    return next(f'{n/unit:,.1f} {name}' for unit, name in ((1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')) if n >= unit or name == 'kB')


def check_file(path, who: str):
    "Raise, in the name of `who`, where no file can be written to `path`: before the work whose result it is to hold."
    path = Path(path)
    if path.is_dir(): raise BadValue(f'{who}: {path} is a folder; name a file in it')
    there = next(p for p in path.absolute().parents if p.exists())
    if not there.is_dir(): raise BadValue(f'{who}: {path} cannot be written, for {there} is a file')
    if not os.access(there, os.W_OK | os.X_OK): raise BadValue(f'{who}: {path} cannot be written: {there} is not yours to write to')


@contextmanager
def whole(path):
    "A temporary path beside `path` to write to; it takes the name `path` when the block ends well, and goes when it does not."
    path = Path(path)
    if not writes():
        with tempfile.TemporaryDirectory() as nowhere: yield Path(nowhere)/path.name
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield tmp
        os.replace(tmp, path)
    finally: tmp.unlink(missing_ok=True)
