"The folder that is served: a graph, a card that says how to use it, what it needs; written only if it answers as the Learner does."
import json
import os
import platform
import shlex
import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from fastai.basics import Learner
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback

from fastrecipes import __version__
from fastrecipes.data.loaders import labels_of
from fastrecipes.errors import BadValue
from fastrecipes.files import in_bytes
from fastrecipes.production.export import activation_of, check_width, graph_of, input_contract, labels, served
from fastrecipes.production.parity import TOLERANCE, as_it_was, full_precision
from fastrecipes.production.predictor import CARD, MODEL, SCHEMA, Graph, Predictor, batched, pixels_of, sha256
from fastrecipes.production.timing import image_times, medians
from fastrecipes.production.zipapp import DOCKERFILE, PREDICTING, requirements, serve_pyz
from fastrecipes.randomness import default_seed
from fastrecipes.technique import applied

__all__ = ['Bundle', 'Parity', 'write_bundle', 'TOLERANCE', 'PUBLISHED']

PUBLISHED = 'the published network'
PROVENANCE = ('torch', 'fastai', 'timm', 'onnx', *PREDICTING)


@dataclass(frozen=True)
class Parity:
    """How a bundle compares with what it was made from: images compared, those with the same best label, the largest difference of a
    probability; `versus`: 'the Learner', 'the accepted graph' of a `Compressed`, or 'the published network'."""
    n: int
    agree: int
    max_diff: float
    versus: str = 'the Learner'

    @property
    def holds(self) -> bool: return self.agree == self.n and self.max_diff <= self.allowed

    @property
    def allowed(self) -> float: return 0. if self.versus == 'the accepted graph' else TOLERANCE

    def __str__(self):
        images = 'pictures made for it' if self.versus == PUBLISHED else 'validation images'
        return f'{self.versus}\'s label on {self.agree} of {self.n} {images}, probabilities within {self.max_diff:.1g}'


@dataclass(frozen=True)
class Bundle:
    "A bundle that was written: where, how it compares with its Learner, ms an image on one thread beside eager torch, the graph's bytes."
    path: Path
    parity: Parity
    latency_ms: float
    eager_latency_ms: float
    size_bytes: int

    def predictor(self, threads: int | None = None) -> Predictor:
        "The `Predictor` that reads it."
        return Predictor(self.path, threads)

    def __str__(self):
        return (f'bundle {self.path}: {in_bytes(self.size_bytes)}, {self.latency_ms:.2f} ms an image on one thread '
                f'(eager torch {self.eager_latency_ms:.2f} ms); {self.parity}')


def write_bundle(learn: Learner, path, *, overwrite: bool = False, accepted: bytes | None = None, compression: list | None = None) -> Bundle:
    """Write `learn` as a bundle to the folder `path`: model.onnx, bundle.json, and to serve it: requirements.txt, serve.pyz, Dockerfile.

    It takes its name only when it has answered, from the image files of the whole validation set, as the Learner does: the same best
    label on every image, probabilities within 1e-4. `accepted`: a graph made from `learn` to write instead; then it must answer exactly
    as that graph does. `compression`: what the card tells of how it came to be. Raises `ValueError`, and leaves nothing behind, where an
    answer differs; where `path` is there already and not `overwrite`, or is no bundle; and where the data are not those of `image_folder`."""
    _check_target(Path(path), overwrite)
    contract, items = input_contract(learn), list(learn.dls.valid.items)
    if not items: raise BadValue('ship: there is no validation image to verify the bundle on; set learn.dls to DataLoaders that have some, for an exported Learner has none')

    with new_bundle(path, overwrite) as tmp:
        model, targets = served(learn), labels_of(learn.dls.valid)
        expected = _answers(learn) if accepted is None else answers(Graph(accepted), items, contract)
        check_width(expected, labels(learn), 'ship')
        card = fill(tmp, graph_of(learn, model) if accepted is None else accepted, labels(learn), contract)
        got = Predictor(tmp).probabilities(items)
        parity = compared(got, expected, items, 'the Learner' if accepted is None else 'the accepted graph')
        more = dict(compression=compression, ensemble=vars(learn).get('ensemble'), calibration=(c := vars(learn).get('calibration')) and c.record())
        more = {k: v for k, v in more.items() if v}
        return finish(tmp, path, card, model, parity, metrics=_metrics(got, targets), **more, provenance=_provenance(learn))


@contextmanager
def new_bundle(path, overwrite: bool = False):
    "An empty folder to fill, which takes the name `path` when the block ends well, and goes when it does not. Raises for a `path` that must stay."
    path = Path(path)
    _check_target(path, overwrite)
    tmp = _beside(path)
    try:
        yield tmp
        _put_in_place(tmp, path.resolve())
    finally: shutil.rmtree(tmp, ignore_errors=True)


def fill(folder: Path, graph: bytes, labels: list[str], contract: dict) -> dict:
    "Write the graph and what serves it to `folder`, so that a `Predictor` can read it, and return the card so far."
    (folder/MODEL).write_bytes(graph)
    (folder/'requirements.txt').write_text(requirements(), encoding='utf8')
    (folder/'Dockerfile').write_text(DOCKERFILE, encoding='utf8')
    (folder/'serve.pyz').write_bytes(serve_pyz())
    card = dict(schema=SCHEMA, labels=labels, input=contract, files={f.name: sha256(f.read_bytes()) for f in sorted(folder.iterdir())})
    _write_card(folder, card)
    return card


def finish(folder: Path, path, card: dict, model, parity: Parity, *, provenance: dict, **more) -> Bundle:
    "Time the bundle in `folder` beside `model` in eager torch, and write the rest of its card."
    times = image_times(dict(bundle=Predictor(folder, threads=1).run, eager=lambda pixels: model(torch.from_numpy(pixels))), card['input']['size'])
    ms, size = medians(times), (folder/MODEL).stat().st_size
    _write_card(folder, card | dict(more, parity=asdict(parity), latency_ms=ms['bundle'], eager_latency_ms=ms['eager'],
                                    timing=dict(batch=1, threads=1, pairs=len(times['bundle']), machine=platform.machine(), cpus=os.cpu_count()),
                                    size_bytes=size, provenance=provenance))
    return Bundle(Path(path), parity, ms['bundle'], ms['eager'], size)


def _check_target(path: Path, overwrite: bool):
    "Raise where `path` holds what must stay: with `overwrite` a bundle goes, and nothing else does."
    if not path.exists(): return
    if not path.is_dir(): raise BadValue(f'out: {path} is a file; name a folder')
    ours = (path/CARD).is_file() or not any(path.iterdir())
    if not ours: raise BadValue(f'out: {path} holds files that are no bundle; name a new folder')
    if not overwrite: raise BadValue(f'out: {path} exists already; name another, or replace it: overwrite=True, --overwrite')


def _beside(path: Path) -> Path:
    "An empty folder next to `path`, where a rename is one step."
    target = path.resolve()
    tmp = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
    try: tmp.mkdir(parents=True)
    except OSError as e: raise BadValue(f'out: {path} cannot be created: {e.strerror.lower()}') from e
    return tmp


def _put_in_place(tmp: Path, path: Path):
    "Give the finished folder its name; what had it goes only then."
    old = tmp.with_suffix('.old')
    if path.exists(): os.rename(path, old)
    try: os.rename(tmp, path)
    except BaseException:
        if old.exists(): os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_card(folder: Path, card: dict): (folder/CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + '\n', encoding='utf8')


def _answers(learn: Learner) -> np.ndarray:
    "The Learner's own probabilities `(n, c)` on its validation set, in 32 bits throughout."
    aside = [cb for cb in learn.cbs if isinstance(cb, (MixedPrecision, ProgressCallback))]
    with as_it_was(learn), learn.removed_cbs(aside), full_precision():
        p, _ = learn.get_preds(act=activation_of(learn.loss_func))
    return np.asarray(p.float())


def answers(graph: Graph, items, contract: dict) -> np.ndarray:
    "The probabilities `(n, c)` that `graph` gives for image files, read by `contract`."
    return np.concatenate([graph(batch) for batch in batched(items, lambda x: pixels_of(x, contract))])


def compared(got, expected, items, versus: str) -> Parity:
    "The bundle's answers beside those of what it was made from; raises where they are not the same."
    off = np.abs(got-expected).max(1)
    differs = got.argmax(1) != expected.argmax(1)
    parity = Parity(len(items), int((~differs).sum()), float(off.max()), versus)
    if parity.holds: return parity
    advice = '' if versus == PUBLISHED else f' (worst: {items[int((off + differs).argmax())]}). Do the validation transforms do more than image_folder\'s, resize, scale and normalise?'
    raise BadValue(f'ship: the bundle does not answer as {versus} does, so none was written: {parity}, at most {parity.allowed:g} is allowed{advice}')


def _metrics(p, y) -> dict:
    "How right the bundle is on the validation set, overall and as the mean over the classes that occur."
    right = p.argmax(1) == y
    return dict(side='valid', n=len(y), accuracy=float(right.mean()),
                balanced_accuracy=float(np.mean([right[y == c].mean() for c in np.unique(y)])))


def _provenance(learn: Learner) -> dict:
    "What it was made with: versions, seed, data, techniques, command, date."
    keyed = getattr(learn, 'keyed_cb', None)
    return provenance(seed=keyed.seed if keyed else default_seed(), data=getattr(getattr(learn.dls, 'holdings', None), 'fingerprint', None), techniques=list(applied(learn)))


def provenance(**made_of) -> dict:
    "Versions, command and date, and what else is known of how a bundle was made."
    return dict(fastrecipes=__version__, python=platform.python_version(), versions={p: version(p) for p in PROVENANCE}, **made_of,
                command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), date=datetime.now().astimezone().isoformat(timespec='seconds'))
