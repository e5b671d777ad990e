"What a run leaves behind: a folder that says how to run it again, with what it was run, and whether it came to its end."
import csv
import inspect
import io
import json
import os
import platform
import shlex
from collections.abc import Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from fastrecipes import __version__
from fastrecipes.errors import BadValue, NotThere, PeerGone, UserError
from fastrecipes.files import whole, writes

__all__ = ['RunFolder', 'load_run', 'command_line']

RECIPE, PROVENANCE, LEARNER, STAGES, GRAPH, CHECKPOINT, LOCK = ('recipe.yaml', 'provenance.json', 'learner.pkl', 'compressed.json',
                                                                         'compressed.onnx', 'checkpoint', '.lock')
OURS = (RECIPE, PROVENANCE, LEARNER, STAGES, GRAPH, 'history.csv', 'predictions.csv', 'effects.csv', 'curve.csv', 'runs/*.npz', 'report.html', f'{CHECKPOINT}/*.pt',       # all that
        f'{CHECKPOINT}/fold-*/*.pt', *(f'bundle/{n}' for n in ('model.onnx', 'bundle.json', 'requirements.txt', 'serve.pyz', 'Dockerfile')))                # overwrite removes
PACKAGES = ('torch', 'torchvision', 'fastai', 'timm', 'onnxruntime', 'onnx', 'numpy', 'pillow')
POSITIONAL = ('path', 'unlabelled', 'learn', 'run', 'bundle')


class RunFolder:
    "The folder of one run; every file in it is written to a temporary name first, so that a kill never leaves half of one."
    def __init__(self, path: Path, recipe: str, arguments: dict, provenance: dict, shown: dict):
        self.path, self.recipe, self.arguments, self.provenance, self.shown = path, recipe, arguments, provenance, shown

    @classmethod
    def open(cls, recipe: str, arguments: Mapping, out=None, overwrite: bool = False, *, defaults=None, command: str | None = None,
             growing: tuple = ()) -> 'RunFolder':
        """Make `out`, or `runs/<recipe>-<date-time>`, and write recipe.yaml and provenance.json into it.

        `arguments`: those of the recipe, its `techniques` nested or not; `out` and `overwrite` stay out of recipe.yaml. `defaults`: the
        recipe's function, whose defaults are then left out of `.command`. `command`: what was typed, as one string. An unfinished run of
        the same recipe and arguments is gone on with, and a finished one where an argument that may be
        `growing` asks for more. Raises `ValueError`: `out` is a file, or a folder with other things in
        it; it holds a finished run, or one with other arguments, and not `overwrite`. Of several processes the first alone writes."""
        arguments = _plain_arguments(arguments)
        path = Path(out) if out else _fresh(Path('runs'), recipe)
        provenance = _provenance(recipe, arguments)
        if writes():
            if path.is_dir():
                with _held(path): pass
            provenance |= _take(path, recipe, arguments, overwrite, growing)
            try: path.mkdir(parents=True, exist_ok=True)
            except OSError as e: raise BadValue(f'out: {path} cannot be created: {e.strerror.lower()}') from e
        usual = {k: p.default for k, p in inspect.signature(defaults).parameters.items()} if defaults else {}
        shown = {k: v for k, v in arguments.items() if k not in usual or v != _plain(usual[k])}
        run = cls(path, recipe, arguments, provenance, shown)
        run.note(command=command or run.command)    # provenance first: by it a folder is known as ours
        run.write_text(RECIPE, yaml.safe_dump(arguments, sort_keys=False, allow_unicode=True))
        return run

    @property
    def command(self) -> str:
        "The shell command that runs it again."
        return command_line(self.recipe, self.shown)

    def note(self, **facts):
        "Add facts to provenance.json, such as `fingerprint` of the data."
        self.provenance |= facts
        self.write_json(PROVENANCE, self.provenance)

    def note_data(self, dls):
        "Note the fingerprint of the images. Raises `ValueError` where a run that goes on began with others."
        now, before = getattr(getattr(dls, 'holdings', None), 'fingerprint', None), self.provenance['fingerprint']
        if before and before != now: raise BadValue(f'path: the images have changed since the run in {self.path} began; add --overwrite to begin again')
        self.note(fingerprint=now)

    @contextmanager
    def under_way(self):
        """A block that can be killed at any moment: the same recipe with the same `out` goes on from its last checkpoint. Ctrl-C says so.

        A user's mistake ends it, too; a folder in which nothing has happened yet then goes again."""
        from fastrecipes.training.resume import resumable
        try:
            with _held(self.path), resumable(self.path/CHECKPOINT): yield self
        except PeerGone as e: raise PeerGone(f'{e}; to go on: {self.way_on}') from e
        except UserError:
            if writes() and {p.name for p in self.path.iterdir()} <= {RECIPE, PROVENANCE}:
                for p in self.path.iterdir(): p.unlink()
                self.path.rmdir()
            raise
        except KeyboardInterrupt: raise KeyboardInterrupt(f'interrupted; to go on: {self.way_on}') from None

    @property
    def way_on(self) -> str:
        "The command that goes on with this run, or, where its data were given in Python, what to do there."
        if any(str(v).startswith('<') for v in self.shown.values()): return f'call {self.recipe.replace("-", "_")} again with the same arguments and out={str(self.path)!r}'
        line, n = command_line(self.recipe, self.shown | dict(out=str(self.path))), os.environ.get('LOCAL_WORLD_SIZE', os.environ.get('WORLD_SIZE', '1'))
        return line if n == '1' else f'torchrun --nproc-per-node {n} -m {line}'

    def finish(self, **facts):
        "Say that the run came to its end; the last thing that is written."
        self.note(**facts, finished_at=_now(), finished=True)

    def write_bytes(self, name: str, content: bytes):
        with whole(self.path/name) as tmp: tmp.write_bytes(content)

    def write_text(self, name: str, text: str): self.write_bytes(name, text.encode('utf8'))

    def write_json(self, name: str, content): self.write_text(name, json.dumps(_plain(content), indent=2, ensure_ascii=False) + '\n')

    def write_csv(self, name: str, rows: list[Mapping]):
        "`rows` as dicts; a column for each key of any of them, in the order they come up, empty where a row lacks it."
        columns = list(dict.fromkeys(k for row in rows for k in row))
        table = csv.DictWriter(buffer := io.StringIO(), columns, lineterminator='\n')
        table.writeheader()
        table.writerows(rows)
        self.write_text(name, buffer.getvalue())


def command_line(recipe: str, arguments: Mapping) -> str:
    "`fastrecipes pipeline photos/ --arch resnet18 --augment.flip false`: the shell command for these arguments."
    words = ['fastrecipes', recipe]
    for k in POSITIONAL:
        if k in arguments: words.append(str(arguments[k]))
    for k, v in arguments.items():
        if v is None or k in POSITIONAL: continue
        if isinstance(v, Mapping) and v:
            for name, inner in v.items(): words += [f'--{k}.{name}', _word(inner)]
        else: words += [f'--{k}', _word(v if v != {} else True)]
    return shlex.join(words)


def _word(v) -> str: return v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)


def _plain_arguments(arguments: Mapping) -> dict:
    flat = {k: v for k, v in arguments.items() if k not in ('out', 'overwrite')}
    if isinstance(flat.get('techniques'), Mapping): flat |= flat.pop('techniques')      # what `**techniques` took; `ablate` has names by this name
    return _plain(flat)  # pyright: ignore[reportReturnType]


def _plain(v):
    "What YAML and JSON can hold; an object that only Python can give stays as the name of its type."
    if isinstance(v, Mapping): return {str(k): _plain(o) for k, o in v.items()}
    if isinstance(v, (list, tuple)): return [_plain(o) for o in v]
    if isinstance(v, os.PathLike): return os.fspath(v)
    if v is None or type(v) in (bool, int, float, str): return v
    if callable(getattr(v, 'item', None)) and getattr(v, 'ndim', 1) == 0: return v.item()
    if isinstance(v, str): return str(v)
    return f'<{type(v).__name__}>'


def _fresh(root: Path, recipe: str) -> Path:
    "A folder for this second that no other run has taken."
    name = f'{recipe}-{datetime.now():%Y%m%d-%H%M%S}'
    return next(p for i in range(1, 10**6) if not (p := root/(name if i == 1 else f'{name}-{i}')).exists())


@contextmanager
def _held(path: Path):
    "A block during which no other process works in `path`; its lock goes with the process that holds it, however that ends."
    if not writes():
        yield
        return
    lock = FileLock(path/LOCK, timeout=0)
    try: lock.acquire()
    except Timeout: raise BadValue(f'out: another process is at work in {path}; wait for it, or name another --out') from None
    except OSError: lock = None                  # a folder that cannot be written to says so itself, some file systems have no locks
    try: yield
    finally:
        if lock:
            (path/LOCK).unlink(missing_ok=True)
            lock.release()


def _take(path: Path, recipe: str, arguments: dict, overwrite: bool, growing: tuple = ()) -> dict:
    "Raise where `path` holds what must stay; clear it where it may go; where a run is gone on with, say so and give what is known of its beginning."
    if path.exists() and not path.is_dir(): raise BadValue(f'out: {path} is a file; name a folder')
    if not path.is_dir() or all(_temporary(p) for p in path.iterdir()): return {}
    found = _read(path/PROVENANCE)
    if 'recipe' not in found: raise BadValue(f'out: {path} holds files that are no run of ours; name a new or an empty folder')
    if overwrite: return _clear(path)
    way_out = 'name another, or replace it: overwrite=True, --overwrite'
    there = _read(path/RECIPE) or arguments      # killed between the two: nothing but the recipe's name is known
    grows = any(there.get(k) != arguments.get(k) for k in growing)
    if differs := _differences(found['recipe'], there | {k: arguments.get(k) for k in growing}, recipe, arguments):
        raise BadValue(f'out: {path} holds a run of another recipe ({differs}); {way_out}')
    if found.get('finished') and not grows: raise BadValue(f'out: {path} holds a finished run of this recipe; {way_out}')
    started = any((path/CHECKPOINT).rglob('*.pt'))
    way = 'what it lacks is added' if grows else 'going on from its last checkpoint' if started else 'starting it again'
    print(f'{path} holds {"a smaller" if grows else "an unfinished"} run of this recipe: {way}', flush=True)
    then, now = found.get('versions', {}), _versions()
    if started and (other := [f'{p} {then.get(p)}, now {v}' for p, v in now.items() if v != then.get(p)]):
        print(f'  it began with {"; ".join(other)}: the rest may differ in the last digits', flush=True)
    return {k: found[k] for k in ('fingerprint', 'started_at') if k in found} | dict(went_on_at=[*found.get('went_on_at', []), _now()])


def _differences(recipe_there, there: dict, recipe: str, here: dict) -> str:
    if recipe_there != recipe: return f'{recipe_there} there, {recipe} here'
    return ', '.join(f'{k}: {there.get(k)!r} there, {here.get(k)!r} here' for k in dict.fromkeys([*there, *here]) if there.get(k) != here.get(k))


def _clear(path: Path) -> dict:
    "Remove the files that runs write, and folders of theirs that are empty then; what else lies there stays."
    for pattern in OURS:
        for p in path.glob(pattern):
            if not p.parent.is_symlink(): p.unlink()
    for p in path.rglob('.*.tmp'):
        if _temporary(p): p.unlink()
    for d in sorted({d for o in OURS if '/' in o for d in path.glob(o.rpartition('/')[0])}, reverse=True):     # the inner ones first
        if d.is_dir() and not d.is_symlink() and not any(d.iterdir()): d.rmdir()
    return {}


def _temporary(p: Path) -> bool:
    "A half-written file of a run that was killed, `.name.pid.tmp`, or its lock."
    parts = p.name.split('.')
    return p.name == LOCK or len(parts) > 3 and parts[0] == '' and parts[-1] == 'tmp' and parts[-2].isdigit()


def _read(file: Path) -> dict:
    "A YAML or JSON mapping; empty where there is none."
    try: content = yaml.safe_load(file.read_text(encoding='utf8'))
    except (OSError, ValueError, yaml.YAMLError): return {}
    return content if isinstance(content, dict) else {}


def _now() -> str: return datetime.now().astimezone().isoformat(timespec='seconds')


def _versions() -> dict:
    def installed(name):
        try: return version(name)
        except PackageNotFoundError: return None
    return dict(fastrecipes=__version__, python=platform.python_version(), **{p: installed(p) for p in PACKAGES})


def _provenance(recipe: str, arguments: dict) -> dict:
    return dict(recipe=recipe, seed=arguments.get('seed'), fingerprint=None, versions=_versions(),
                platform=platform.platform(), cpus=os.cpu_count(), cwd=os.getcwd(), started_at=_now(), finished_at=None, finished=False)


def load_run(path):
    """The fitted Learner of the run folder `path`, with the data it was trained on rebuilt from the folder its recipe.yaml names.

    Pixels are normalised by the statistics it was trained with. learner.pkl is a pickle: load runs of your own only. Raises
    `FileNotFoundError` where the run, its Learner or its data are not there, and `ValueError` where the data's classes are others."""
    import warnings

    from fastai.learner import load_learner
    from torch.cuda import is_available

    from fastrecipes.data.folders import image_folder
    from fastrecipes.data.keyed import keyed
    from fastrecipes.technique import TECHNIQUES, applied, discover

    discover()
    path = Path(path)
    if path.is_file(): raise NotThere(f'run: {path} is a file; give the folder of the run, {path.parent}')
    if not path.is_dir(): raise NotThere(f'run: {path} does not exist; give the folder that a run left behind, like runs/pipeline-…')
    for name in (RECIPE, LEARNER):
        if not (path/name).is_file(): raise NotThere(f'run: {path} has no {name}; give the folder of a run that came to its end')
    recipe = _data_of(path)
    if not (data := _from_there(path, recipe.get('path'))).is_dir():
        why = 'its data were given in Python, not as a folder' if str(data).startswith('<') else f'its data folder {data} is not there (seen from here)'
        raise NotThere(f'run: {path} cannot be rebuilt: {why}; fastai\'s load_learner gives its Learner without data')

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')          # fastai warns of every pickle
        learn = load_learner(path/LEARNER, cpu=not is_available())
    arguments = {k: recipe[k] for k in inspect.signature(image_folder).parameters if k in recipe} | dict(path=data)
    for k in ('valid', 'groups'):
        if str(arguments.get(k)).startswith('<'):
            raise NotThere(f"run: {path} cannot be rebuilt: its {k} was a function given in Python; fastai's load_learner gives its Learner without data")
    if isinstance(csv_file := arguments.get('valid'), str) and (there := _from_there(path, csv_file)).is_file(): arguments['valid'] = str(there)
    dls = image_folder(**arguments)
    if list(dls.vocab) != list(learn.dls.vocab):
        raise BadValue(f'run: the classes of {data} have changed since {path} was trained: {", ".join(map(str, learn.dls.vocab))} then, '
                       f'{", ".join(map(str, dls.vocab))} now')
    for i, dl in enumerate(dls.loaders): dl.after_batch = learn.dls.loaders[min(i, len(learn.dls.loaders)-1)].after_batch
    learn.dls = dls.to(learn.dls.device)
    keyed(learn, recipe.get('seed'))
    for name, a in list(applied(learn).items()):        # what acts on the training loader must act on the new one; what acts on all came with learner.pkl
        if TECHNIQUES[name].stage == 'data' and 'inference' not in TECHNIQUES[name].touches: TECHNIQUES[name].f(learn, **a.arguments)
    return learn


def _from_there(run: Path, path) -> Path:
    "A path of a recipe, as it was meant where the run was started."
    return Path(_read(run/PROVENANCE).get('cwd', '.'))/str(path)


def _data_of(path: Path) -> dict:
    "The arguments by which the data of a run were made: its own, or, for a compressed one, those of the run it started from."
    recipe = _read(path/RECIPE)
    if 'path' in recipe or 'learn' not in recipe: return recipe
    if not (first := _from_there(path, recipe['learn'])).is_dir():
        raise NotThere(f'run: {path} cannot be rebuilt: the run it was compressed from, {first}, is not there (seen from here)')
    return _data_of(first)
