"Files that appear whole or not at all: a kill in the middle of writing leaves nothing under the name."
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

__all__ = ['whole', 'writes']


def writes() -> bool:
    "Whether this process may write: of those that `torchrun` starts, the first alone."
    return os.environ.get('RANK', '0') == '0'


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
