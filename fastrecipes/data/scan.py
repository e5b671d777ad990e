"Every image of a folder looked at once: what it holds, whether it can be read, and where the same bytes come up again."
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from fastai.vision.all import image_extensions
from fastcore.xdg import xdg_cache_home

from fastrecipes.data.duplicates import greys, phashes
from fastrecipes.data.pixels import read_image
from fastrecipes.data.processes import each_chunk
from fastrecipes.errors import BadValue, NotThere, nearest
from fastrecipes.files import whole

__all__ = ['Verdict', 'check_images', 'check_root', 'scan', 'verdicts']

SMALLEST = 2            # px a side: a 1×1 picture shows nothing
SCHEMA = 2              # of what is remembered: verdicts of another kind are looked for again


@dataclass(frozen=True)
class Verdict:
    "What one look at a file told: its content's digest, its size in pixels, why it cannot be used (None: it can), and what it looks like."
    digest: str
    width: int
    height: int
    reason: str | None = None
    phash: str = ''


def check_root(root) -> Path:
    "`root` as a path. Raises `NotThere` and `BadValue` unless it is a folder."
    root = Path(root)
    if not root.exists():
        near = nearest(root.name, [p.name for p in root.parent.iterdir() if p.is_dir()]) if root.parent.is_dir() else ''
        raise NotThere(f'path: {root} does not exist{near}')
    if not root.is_dir(): raise BadValue(f'path: {root} is a file; give the folder that holds one folder of images per class')
    return root


def check_images(root) -> Path:
    "`root` as a path. Raises `NotThere` and `BadValue` unless it is a folder with an image in one of its folders; it looks no further than the first."
    root = check_root(root)
    images = (p for d in root.iterdir() if d.is_dir() for p in d.rglob('*') if _is_image(p) and not _hidden(p, root))
    if next(images, None) is None: raise no_images(root)
    return root


def no_images(root) -> BadValue:
    "What is raised for a folder without one."
    return BadValue(f'path: no images in {root}; it should hold one folder of images per class, like {root}/cats/1.jpg')


def scan(root: Path, skip=()) -> tuple[dict[str, list[Path]], list[tuple[Path, str]]]:
    """`{class: files}` for the sub-folders of `root`, sorted, and the files that lie where no class can be read from.

    Hidden files and folders, and the folders named in `skip`, do not count. Raises `NotThere` and `BadValue`."""
    root = check_root(root)
    entries = sorted(p for p in root.iterdir() if not p.name.startswith('.') and p.name not in skip)
    stray = [(p, 'not inside a class folder') for p in entries if p.is_file() and _is_image(p)]
    classes = {d.name: [] for d in entries if d.is_dir()}
    for name, files in classes.items():
        for p in sorted(q for q in (root/name).rglob('*') if q.is_file()):
            if _hidden(p, root): continue
            if _is_image(p): files.append(p)
            else: stray.append((p, f'{p.suffix or "no extension"} is not an image extension'))
    return classes, stray


def _hidden(p: Path, root: Path) -> bool: return any(part.startswith('.') for part in p.relative_to(root).parts)


def _is_image(p: Path) -> bool: return p.suffix.lower() in image_extensions


def verdicts(files: list[Path], workers: int | None = None, progress=None) -> dict[Path, Verdict]:
    """A verdict on each file, decoded in full once; remembered by path, size and modification time in the user's cache folder.

    `progress(done, total)` is told of the files that had to be opened."""
    memory = _memory(files)
    known = json.loads(memory.read_text()) if memory.exists() else {}
    stamp = {p: _stamp(p) for p in files}
    new = [p for p in files if known.get(str(p), [None])[0] != stamp[p]]
    for some, looks in each_chunk(_look, new, workers):
        for p, (v, _), h in zip(new[some], looks, phashes([picture for _, picture in looks])): known[str(p)] = [stamp[p], {**vars(v), 'phash': h}]
        if progress: progress(min(some.stop, len(new)), len(new))
    if new: _write(memory, {str(p): known[str(p)] for p in files})
    return {p: Verdict(**known[str(p)][1]) for p in files}


def _look(p: Path) -> tuple[Verdict, bytes]:
    "Read and decode one file: the verdict, and the greys that its perceptual hash is made of."
    data = p.read_bytes()
    digest = blake2b(data, digest_size=16).hexdigest()
    try: im = read_image(data)
    except BadValue as e: return Verdict(digest, 0, 0, str(e).removeprefix('image: ')), b''
    if min(im.size) < SMALLEST: return Verdict(digest, *im.size, f'{im.width}×{im.height} px: nothing to see'), b''
    return Verdict(digest, *im.size), greys(im)


def _stamp(p: Path) -> str:
    s = p.stat()
    return f'{SCHEMA}-{s.st_size}-{s.st_mtime_ns}'


def _memory(files: list[Path]) -> Path:
    "Where the verdicts on these files' folder are remembered."
    root = os.path.commonpath([str(p.resolve().parent) for p in files]) if files else ''
    return xdg_cache_home()/'fastrecipes'/'verdicts'/f'{blake2b(root.encode(), digest_size=12).hexdigest()}.json'


def _write(path: Path, content):
    "A cache that cannot be written is no error: the files are looked at again next time."
    with suppress(OSError), whole(path) as tmp: tmp.write_text(json.dumps(content))
