"The one mechanism: a technique is defined once, registered, and is then a method, a keyword, a flag, a card and a test case."
import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import wraps
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

import fastai.callback.all    # noqa: F401  imported before we patch: a later import of theirs would undo ours
import fastai.distributed     # noqa: F401
import torch
from fastai.basics import Callback, Learner, camel2snake, patch

from fastrecipes import loop, repairs  # noqa: F401  the mends of fastai
from fastrecipes.arguments import bound, check_names, check_types
from fastrecipes.errors import BadName, BadValue, UserError, nearest
from fastrecipes.files import writes

__all__ = ['STAGES', 'TOUCHES', 'TECHNIQUES', 'RECIPE_PARAMETERS', 'Technique', 'Applied', 'TechniqueCallback', 'technique', 'put', 'say',
           'plan', 'discover', 'check_changeable']

STAGES = ('data', 'model', 'loss', 'optim', 'train')
TOUCHES = ('sampling', 'inputs', 'targets', 'model', 'weights', 'gradient', 'step', 'precision', 'inference')       # 'inference': it acts in validation and use, too
RECIPE_PARAMETERS = frozenset('path arch epochs lr size bs valid test pretrained weights freeze schedule techniques seed out workers overwrite'.split())
TECHNIQUES: dict[str, 'Technique'] = {}


@dataclass(frozen=True)
class Technique:
    "What is known of one technique: all that its method, keyword, flag, card, table row and tests are made from."
    name: str
    f: object
    stage: str
    section: str | tuple
    source: str
    touches: tuple = ()
    after: tuple = ()
    before: tuple = ()
    refuses: Mapping = field(default_factory=dict)
    example: Mapping | Callable | None = None
    replaces: str | None = None
    formula: str | None = None

    @property
    def parameters(self) -> dict:
        "Its arguments, without the Learner: name → `inspect.Parameter`."
        return dict(list(inspect.signature(self.f).parameters.items())[1:])

    @property
    def doc(self) -> str: return inspect.getdoc(self.f) or ''

    @property
    def summary(self) -> str: return self.doc.split('\n')[0]

    def arguments(self, value) -> dict | None:
        "What a keyword's `value` means: `None`/`False` off (None), `True` defaults, a dict all arguments, anything else the first."
        if value is None or value is False: return None
        names = list(self.parameters)
        if value is True: given = {}
        elif isinstance(value, Mapping): given = dict(value)
        elif not names: raise BadName(f'{self.name}: takes no arguments, only True or False, got {value!r}')
        else: given = {names[0]: value}
        check_names(self.name, given, names)
        check_types(self.f, given, self.name)
        missing = [n for n, p in self.parameters.items() if p.default is p.empty and n not in given]
        if missing: raise BadName(f'{self.name}: needs {", ".join(missing)}: {self.name}=dict({missing[0]}=…) in Python, --{self.name} {missing[0].upper()} at the command line')
        return given


@dataclass
class Applied:
    "A technique as it was applied to one Learner: its arguments and, once known, what it changed."
    arguments: dict
    effect: str | None = None


class TechniqueCallback(Callback):
    """A callback reachable as `learn.<name>_cb`: fastai's `add_cb` would otherwise overwrite the method `learn.<name>`.

    `abort(level)` is called when an exception ends a 'batch', 'train', 'validate', 'epoch' or 'fit' before its `after_…` could run: what
    was lent for that long goes back there. It may return an exception that says better what happened."""
    undoable = True

    @property
    def name(self): return super().name + '_cb'

    def abort(self, level: str): pass


def put(learn: Learner, cb: Callback) -> Learner:
    "Add `cb` in place of any callback of its class: calling a technique twice is calling it last."
    for old in [o for o in learn.cbs if type(o) is type(cb)]:
        if not getattr(old, 'undoable', True):
            raise BadValue(f'{cb.name}: already applied, and it cannot be undone: build the Learner again to change it')
        learn.remove_cb(old)
    return learn.add_cb(cb)


def say(learn: Learner, name: str, effect: str, aloud: bool = False):
    "Record in `learn.techniques` what technique `name` changed, or why it had nothing to change; `aloud`: print it, for it surprises."
    if name in applied(learn): applied(learn)[name].effect = effect
    if aloud and writes(): print(f'{name}: {effect}')


def applied(learn: Learner) -> dict[str, Applied]:
    "The techniques of `learn`, in the order they were applied."
    return learn.__dict__.setdefault('techniques', {})


Learner.techniques = MappingProxyType({})       # of one that has none


def technique(stage: str, *, section, source: str, touches=(), after=(), before=(), refuses=None, example=None, replaces=None,
              formula: str | None = None):
    """Register `f(learn, …) -> learn` as a technique, patch it onto `Learner` and return it. Raises `ValueError` at import: for a name that is taken, and for words it does not know.

    Args:
        stage: 'data' changes `learn.dls`, 'model' the network, 'loss' what is asked for, 'optim' the step, 'train' is a callback; techniques are applied in that order
        section: the chapter it is listed under, or a tuple of several
        source: the paper it is from, as arXiv:… or doi:…, or a page
        touches: some of 'sampling', 'inputs', 'targets', 'model', 'weights', 'gradient', 'step', 'precision'; and 'inference', if it acts in validation and use, too
        after: names of techniques of the same stage that are applied before it
        before: names of techniques of the same stage that are applied after it
        refuses: another technique's name → the sentence that says why the two do not go together
        example: small arguments where one has no default, for tests and ablations; or a function that makes them from a Learner
        replaces: the version of fastai whose method of this name it replaces
        formula: TeX, for its card
    """
    if stage not in STAGES: raise ValueError(f'technique: stage must be one of {STAGES}, got {stage!r}')
    if isinstance(touches, str) or not set(touches) <= set(TOUCHES): raise ValueError(f'technique: touches must be a tuple of {TOUCHES}, got {touches!r}')

    def register(f):
        name = f.__name__
        again = name in TECHNIQUES and f.__module__ == TECHNIQUES[name].f.__module__ == '__main__'      # a cell of a notebook that is run once more
        if name in TECHNIQUES and not again: raise ValueError(f'technique {name!r} is registered twice')
        if (why := _reserved(name)) and not replaces and not again: raise ValueError(f'technique {name!r} clashes with {why}')

        @wraps(f)
        def method(self, *args, **kwargs):
            arguments = bound(name, f, self, *args, **kwargs)
            check_changeable(self, name)
            for other in applied(self): _refuse(name, other)
            previous = applied(self).pop(name, None)
            applied(self)[name] = Applied(dict(list(arguments.items())[1:]))
            try: f(self, *args, **kwargs)
            except BaseException:
                del applied(self)[name]
                if previous: applied(self)[name] = previous
                raise
            return self
        method.__signature__ = inspect.signature(f)

        TECHNIQUES[name] = Technique(name, method, stage, section, source, tuple(touches), tuple(after), tuple(before),
                                     refuses or {}, example, replaces, formula)
        setattr(Learner, name, SharedName(method) if name in SHARED else method)
        return method
    return register


def check_changeable(learn: Learner, who: str):
    "Raise the sentence of a network that says it is `fixed`, as one in 8 bits is."
    if why := getattr(vars(learn).get('model'), 'fixed', None): raise BadValue(f'{who}: {why}')


SHARED = ('loss', 'normalize')  # attributes that fastai gives a Learner, and that would hide a method for good


class BatchLoss(torch.Tensor):
    "A batch's loss that answers a call as the technique of its name; whatever is computed from it is a plain tensor."
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    def __call__(self, *args, **kwargs): return self.method(*args, **kwargs)
    def __deepcopy__(self, memo): return deepcopy(self.view(self.shape), memo)                             # plain, and without the Learner
    def __reduce_ex__(self, protocol): return self.view(self.shape).__reduce_ex__(protocol)


class SharedName:
    """A technique under a name that is also an attribute of the Learner: a tensor while that is one, and callable all the same.

    fastai sets `learn.loss` in each batch, and leaves it after `validate()` and a fit that died; `vision_learner` keeps its argument `normalize`."""
    def __init__(self, method): self.method, self.name = method, method.__name__

    def __get__(self, learn, owner=None):
        if learn is None: return self.method
        method, value = self.method.__get__(learn), vars(learn).get(self.name)
        if not isinstance(value, torch.Tensor): return method
        value = value.as_subclass(BatchLoss)
        value.__dict__ = vars(value) | dict(method=method)      # fastai's as_subclass shares it: the loss itself would hold the Learner, and a tensor with a view is not collected
        return value

    def __set__(self, learn, value): vars(learn)[self.name] = value
    def __delete__(self, learn): vars(learn).pop(self.name, None)


def _reserved(name: str) -> str | None:
    "Why `name` cannot name a technique, or None."
    if name in dir(Learner) or name in inspect.signature(Learner.__init__).parameters: return f'Learner.{name}'
    if name in RECIPE_PARAMETERS: return 'a parameter of the recipes'
    if name in dir(Callback): return f'Callback.{name}'
    taken = {camel2snake(cls.__name__.removesuffix('Callback') or 'callback'): cls for cls in _subclasses(Callback) if not issubclass(cls, TechniqueCallback)}
    if name in taken: return f'the attribute that {taken[name].__name__} sets on a Learner'


def _subclasses(cls):
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _refuse(a: str, b: str):
    "Raise the sentence by which either record refuses the other."
    for one, two in ((a, b), (b, a)):
        if why := TECHNIQUES[one].refuses.get(two): raise BadValue(f'{one!r} and {two!r} do not go together: {why}')


def plan(techniques: Mapping) -> list[tuple[Technique, dict]]:
    """The techniques that these keywords switch on, with their arguments, in the order they are applied.

    By stage, within a stage by the records' after/before, ties by name. Raises `TypeError` for an unknown name or argument and
    `ValueError` for a pair that does not go together: recipes call it before they touch any data."""
    discover()
    for name in techniques:
        if name not in TECHNIQUES:
            raise BadName(f'no technique named {name!r}{nearest(name, TECHNIQUES) or "."} `fastrecipes ls` lists the {len(TECHNIQUES)} there are')
    on = {n: args for n, v in techniques.items() if (args := TECHNIQUES[n].arguments(v)) is not None}
    for a in on:
        for b in on:
            if a < b: _refuse(a, b)
    ordered = []
    for stage in STAGES:
        here = sorted(n for n in on if TECHNIQUES[n].stage == stage)
        graph = TopologicalSorter({n: {o for o in here if o in TECHNIQUES[n].after or n in TECHNIQUES[o].before} for n in here})
        try: graph.prepare()
        except CycleError as e: raise ValueError(f'techniques ordered in a circle: {e.args[1]}') from None
        while graph.is_active():
            ready = sorted(graph.get_ready())
            ordered += ready
            graph.done(*ready)
    return [(TECHNIQUES[n], on[n]) for n in ordered]


@patch
def use(self: Learner, *names: str, **techniques) -> Learner:
    """Apply techniques by keyword, in their own order whatever the order of the keywords.

    `True` defaults, a dict all arguments, anything else the first; `None`/`False`: not; `use('ema', 'sam')`: those by their defaults. Raises
    `TypeError` for an unknown one, and `ValueError` where one that is on is asked to be off: what was done to network, data or loss is not
    taken back. Where one is refused, the error tells which were applied before it."""
    if bad := next((n for n in names if not isinstance(n, str)), None): raise BadName(f'use: the names of techniques, such as use("ema", mixup=.4), got {bad!r}')
    techniques = dict.fromkeys(names, True) | techniques
    todo, done = plan(techniques), []
    if on := [n for n in techniques if n in self.techniques and n not in {t.name for t, _ in todo}]:
        raise BadValue(f'{on[0]}: it is on, and {on[0]}={techniques[on[0]]} does not take it back; build the Learner again without it')
    for t, arguments in todo:
        try: t.f(self, **arguments)
        except UserError as e:
            if done: e.args = (f'{e}. On this Learner already: {", ".join(done)}; build it again for another choice',)
            raise
        done.append(t.name)
    return self


def discover() -> dict[str, Technique]:
    "Import every module that registers techniques or gives Learners a method, and return `TECHNIQUES`."
    root = Path(__file__).parent
    for file in sorted(root.glob('*/*.py')):
        text = file.read_text(encoding='utf8')
        if '\n@technique(' in text or '\n@patch\n' in text: import_module(f'fastrecipes.{file.parent.name}.{file.stem}')
    return TECHNIQUES
