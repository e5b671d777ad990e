"Arguments against the types their function declares: a wrong one is a sentence before any work, not a comparison that fails inside it."
import inspect
from collections.abc import Iterable, Sequence
from functools import lru_cache, wraps
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

from fastrecipes.errors import BadName, BadValue, nearest

__all__ = ['bound', 'check_names', 'check_types', 'checked']

KINDS = {float: (Real, 'a number'), int: (Integral, 'a whole number'), str: ((str, PathLike), 'text'), bool: (bool, 'True or False'), NoneType: (NoneType, 'None')}

LISTS = (list, tuple, Sequence)         # tensors, arrays and fastcore's L are welcome, too


def bound(who: str, f, *args, **kwargs) -> dict:
    "The arguments of the call `f(*args, **kwargs)` by name, checked. Raises `TypeError` naming `who` for one that is missing or unknown."
    takes = list(inspect.signature(f).parameters)[1:]
    check_names(who, kwargs, takes)
    return _bound(f, args, kwargs, who, takes, who)


def checked(f, techniques=None):
    """`f` with its arguments looked at before it runs: a keyword that it does not take and a value of another type are a sentence each, `TypeError` and `ValueError`.

    `techniques()`: the names that a function of `**techniques` takes beside its own. A method objects as `Class.method`, `__init__` as the class."""
    parameters = inspect.signature(f).parameters
    takes = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD and n != 'self']
    who = f.__qualname__.rpartition('<locals>.')[2].removesuffix('.__init__')
    @wraps(f)
    def call(*args, **kwargs):
        if not techniques: check_names(who, kwargs, takes)
        else:
            for name in set(kwargs) - {*takes, *(there := techniques())}:
                raise BadName(f'{who}: no argument and no technique named {name!r}{nearest(name, [*takes, *there]) or ";"} help({f.__name__}) and `fastrecipes ls` list them')
        _bound(f, args, kwargs, who, takes, who if 'self' in parameters else None)
        return f(*args, **kwargs)
    return call


def _bound(f, args, kwargs, who: str, takes: list[str], objects: str | None) -> dict:
    try: arguments = _signature(f).bind(*args, **kwargs).arguments
    except TypeError as e:
        by_place = [n for n, p in _signature(f).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and n in takes]
        way = f'{", ".join(by_place)} by position, the rest by name' if 'too many positional' in str(e) and by_place != takes else ', '.join(takes) or 'no arguments'
        raise BadName(f'{who}: {e}; it takes {way}') from None
    check_types(f, arguments, objects)
    return arguments


@lru_cache(maxsize=512)
def _signature(f) -> inspect.Signature: return inspect.signature(f, eval_str=True)


def check_names(who: str, given, takes: list[str]):
    "Raise `BadName` for one of `given` that `who` does not take."
    for name in given:
        if name not in takes: raise BadName(f'{who}: no argument {name!r}{nearest(name, takes) or "."} It takes {", ".join(takes) or "none"}.')


def check_types(f, values: dict, who: str | None = None):
    "Raise `BadValue` for a value of another type than `f` declares; parameters whose types are classes of ours or fastai's are not looked at."
    for name, p in _signature(f).parameters.items():
        if name not in values or _fits(values[name], p.annotation): continue
        raise BadValue(f'{who + ": " if who else ""}{name} must be {_words(p.annotation)}, got {values[name]!r}')


def _fits(value, kind) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType): return any(_fits(value, a) for a in args)
    if kind is Sequence or origin in LISTS: return isinstance(value, Iterable) and not isinstance(value, (str, dict))
    if kind not in KINDS: return True if origin is not Literal else isinstance(value, str)
    return isinstance(value, KINDS[kind][0]) and (kind is bool or not isinstance(value, bool))


def _words(kind) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType): return ' or '.join(dict.fromkeys(map(_words, args)))
    if origin is Literal: return ' or '.join(map(repr, args))
    return 'a list' if kind is Sequence or origin in LISTS else KINDS[kind][1] if kind in KINDS else getattr(kind, '__name__', str(kind))
