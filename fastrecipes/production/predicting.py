"Image files classified from the command line: a few on the screen, a million in a file that a kill does not spoil."
import csv
import io
import json as jsonlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from fastrecipes.errors import BadValue, UserError, few

__all__ = ['predict']

BATCH = 32
EVERY = dict(terminal=.5, log=15.)      # seconds between two lines of progress


def predict(bundle: str, images: list[str], *, k: int = 5, json: bool = False, out: str = '') -> int:
    """Classify images with a shipped bundle; exit code 2 if one of them could not be read.

    Folders are read as they are walked, sub-folders too, each file that has the extension of an image. A file that `--out` names is gone on with:
    what is in it is not done again. What could not be read is listed at the end, and tried again the next time.

    Args:
        bundle: the folder that `fastrecipes ship` wrote
        images: files, folders, or - for names from standard input
        k: labels an image, the most probable first
        json: print one object, {image: {label: probability}}
        out: a .csv or .jsonl file to write to, one line an image (default: print)
    """
    if k < 1: raise BadValue(f'--k: at least 1, got {k}')
    if out and json: raise BadValue('--json prints one object and --out writes a file: pick one')
    if out and Path(out).suffix not in SINKS: raise BadValue(f'--out: a file that ends in {" or ".join(SINKS)}, got {out!r}')
    from fastrecipes.production.predictor import Predictor
    predictor, told = Predictor(bundle), Progress(hidden=not (out or json))
    sink = SINKS[Path(out).suffix](Path(out), predictor, k) if out else Printed(json)

    unreadable = []
    with sink, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for names in _batches(name for name in _named(images) if name not in sink.done):
            read = [(name, x) for name, x in zip(names, pool.map(lambda name: _read(predictor, name), names))]
            unreadable += [x for _, x in read if isinstance(x, str)]
            good = [(name, x) for name, x in read if not isinstance(x, str)]
            if good: sink.write([name for name, _ in good], predictor.ranked([x for _, x in good], k))
            told.more(len(names), len(unreadable))
    told.end(sink, len(unreadable))
    for why in unreadable: print('fastrecipes:', ' '.join(why.split()), file=sys.stderr)
    return 2 if unreadable else 0


def _named(images: Iterable[str]) -> Iterator[str]:
    "The file names that the arguments stand for, in order; nothing is held in memory."
    from PIL import Image
    for given in images:
        if given == '-': yield from (line.rstrip('\r\n') for line in sys.stdin if line.strip())
        elif not os.path.isdir(given): yield given
        else:
            known = Image.registered_extensions()
            for folder, folders, files in os.walk(given):
                folders[:] = sorted(f for f in folders if not f.startswith('.'))
                yield from (os.path.join(folder, f) for f in sorted(files) if not f.startswith('.') and os.path.splitext(f)[1].lower() in known)


def _batches(names: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(names, BATCH)): yield batch


def _read(predictor, name: str):
    "The pixels of an image file, or why there are none."
    try: return predictor.pixels(name)
    except (UserError, OSError) as e: return str(e) if name in str(e) else f'{name}: {e}'


class Printed:
    "Answers on standard output: a line a label as they come, or one JSON object at the end."
    done = frozenset()
    def __init__(self, json: bool): self.json, self.answers = json, {}
    def __enter__(self): return self
    def __exit__(self, kind, *_):
        if self.json and kind is None: print(jsonlib.dumps(self.answers, indent=2, ensure_ascii=False))

    def write(self, names, answers):
        if self.json: self.answers |= dict(zip(names, answers))
        else:
            for name, answer in zip(names, answers): print('\n'.join(f'{name}  {label}  {p:.4f}' for label, p in answer.items()), flush=True)


class Rows:
    """A file of one line an image, appended to and flushed after each batch; `done`: the images that are in it.

    A last line that a kill has torn is cut off. Raises `ValueError` where the file holds something else, or answers of another model or `k`."""
    def __init__(self, path: Path, predictor, k: int):
        self.path, self.k, self.model = path, min(k, len(predictor.labels)), predictor.card['files']['model.onnx'][:12]
        if path.exists() and not path.is_file(): raise BadValue(f'--out: {path} is no file')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, 'ab+')
        except OSError as e: raise BadValue(f'--out: {path} cannot be written: {(e.strerror or str(e)).lower()}') from None
        try: self.done = self._resume()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()

    def _resume(self) -> set[str]:
        self.file.seek(0)
        done, whole = set(), 0
        for i, (row, end) in enumerate(self._rows()):
            if (name := self._image(row, first=i == 0)) is not None: done.add(name)
            whole = end
        self.file.truncate(whole)
        if not whole: self._append(self.header())
        return done

    def _foreign(self, why: str):
        return BadValue(f'--out: {self.path} holds {why}; name another file')

    def write(self, names, answers):
        self._append(''.join(self.line(name, answer) for name, answer in zip(names, answers)))

    def _append(self, text: str):
        self.file.write(text.encode('utf8', 'surrogateescape'))
        self.file.flush()

    def _lines(self) -> Iterator[tuple[str, int]]:
        "The whole lines of the file, with where each ends."
        at = 0
        for line in self.file:
            at += len(line)
            if line.endswith(b'\n'): yield line.decode('utf8', 'surrogateescape'), at


class CSV(Rows):
    "image, model, label, probability, label_2, probability_2, …"
    def columns(self): return ['image', 'model', *(f'{name}_{i}' if i > 1 else name for i in range(1, self.k+1) for name in ('label', 'probability'))]
    def header(self): return _csv(self.columns())
    def line(self, name, answer): return _csv([name, self.model, *(cell for label, p in answer.items() for cell in (label, f'{p:.6f}'))])

    def _rows(self):
        ends = [0]
        def lines():
            for line, end in self._lines():
                ends[0] = end
                yield line
        try:
            for row in csv.reader(lines(), strict=True): yield row, ends[0]
        except csv.Error: return        # torn within quotes: a name may hold a line break

    def _image(self, row, first: bool):
        if first:
            if row == self.columns(): return None
            raise self._foreign(f'other columns ({few(row, 6)}) than --k {self.k} gives' if row[:2] == ['image', 'model'] else 'something else')
        if len(row) != len(self.columns()): raise self._foreign('something else')
        if row[1] != self.model: raise self._foreign('answers of another model')
        return row[0]


class JSONL(Rows):
    'One `{"image": …, "model": …, "predictions": {label: probability}}` a line.'
    def header(self): return ''
    def line(self, name, answer):
        answer = dict(image=name, model=self.model, predictions={label: round(p, 6) for label, p in answer.items()})
        return jsonlib.dumps(answer, ensure_ascii=any('\udc80' <= c <= '\udcff' for c in name)) + '\n'

    def _rows(self):
        for line, end in self._lines():
            try: yield jsonlib.loads(line), end
            except ValueError: raise self._foreign('something else') from None

    def _image(self, row, first: bool):
        if not isinstance(row, dict) or not {'image', 'model', 'predictions'} <= row.keys(): raise self._foreign('something else')
        if row['model'] != self.model: raise self._foreign('answers of another model')
        if len(row['predictions']) != self.k: raise self._foreign(f'{len(row["predictions"])} labels an image, not --k {self.k}')
        return row['image']


SINKS = {'.csv': CSV, '.jsonl': JSONL}


def _csv(cells) -> str:
    csv.writer(text := io.StringIO(), lineterminator='\n').writerow(cells)
    return text.getvalue()


class Progress:
    "How far it is, on stderr, once there are more images than a batch; hidden where the answers themselves come on the screen."
    def __init__(self, hidden: bool): self.hidden, self.n, self.start, self.said, self.terminal = hidden, 0, time.monotonic(), time.monotonic(), sys.stderr.isatty()

    def more(self, n: int, unreadable: int):
        self.n += n
        now = time.monotonic()
        if self.hidden or self.n <= BATCH or now-self.said < EVERY['terminal' if self.terminal else 'log']: return
        self.said = now
        self._say(f'{self.n:,} images, {self.n/(now-self.start):,.0f}/s' + (f', {unreadable:,} unreadable' if unreadable else ''), '' if self.terminal else '\n')

    def end(self, sink, unreadable: int):
        if not isinstance(sink, Rows): return
        before = f', {len(sink.done):,} were there' if sink.done else ''
        self._say(f'{self.n-unreadable:,} images in {time.monotonic()-self.start:.1f} s → {sink.path}{before}', '\n')

    def _say(self, text: str, end: str): print(f'\r{text}\033[K' if self.terminal else text, end=end, file=sys.stderr, flush=True)
