"What a user did wrong, in one sentence: who objects, to what, what is allowed, the nearest valid choice."
from difflib import get_close_matches

__all__ = ['UserError', 'BadValue', 'BadName', 'NotThere', 'PeerGone', 'counted', 'few', 'nearest']


class UserError(Exception):
    "A mistake of the user's: the command line prints it as one line and exits with 2; anything else is our bug."


class BadValue(UserError, ValueError):
    "An argument outside its domain."


class BadName(UserError, TypeError):
    "A keyword, technique or flag that does not exist."


class NotThere(UserError, FileNotFoundError):
    "A file, folder, package or set of weights that cannot be found."


class PeerGone(UserError, RuntimeError):
    "Another of the processes that train together is no more."


def nearest(name, choices, n: int = 1) -> str:
    "`'; did you mean 'mixup'?'` for the closest of `choices`, or an empty string where nothing is close."
    close = get_close_matches(str(name), [str(c) for c in choices], n=n, cutoff=.5 if len(str(name)) < 4 else .6)       # of 'f2' half is right, and it is near 'f1'
    return f'; did you mean {" or ".join(repr(c) for c in close)}?' if close else ''


def few(things, most: int = 5) -> str:
    "The first of `things`, and how many there are: `17, 23, 41, 5, 8, … (64)`."
    things = list(map(str, things))
    return ', '.join(things[:most]) + (f', … ({len(things)})' if len(things) > most else '')


def counted(n: int, what: str) -> str:
    "`1 run`, `2 runs`."
    return f'{n:,} {what}{"s"*(n != 1)}'
