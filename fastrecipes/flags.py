"""A function's signature as a command line: what must be given is positional, the rest are options, techniques are flags.

jsonargparse checks the types and reads recipe.yaml; here is what it lacks: flags for `**techniques`, and errors in one line."""
import argparse
import ast
import inspect
import re
from argparse import SUPPRESS
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, TypedDict, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from fastrecipes.errors import BadName, BadValue, NotThere, nearest

__all__ = ['CommandLine', 'carried', 'domain', 'flags_of', 'section_of', 'sections_of', 'shown']

WORDS = {int: 'a whole number', float: 'a number', str: 'text', Path: 'a path', NoneType: 'null', list: 'a list [a, b]',
         tuple: 'a list [a, b]', dict: 'a mapping {name: value}'}
HOW = ('Bare, a flag takes the defaults shown; --mixup .4 sets its first argument, --mixup.alpha .4 any of them, --mixup false switches '
       'it off. In recipe.yaml: "mixup: 0.4" or "mixup: {alpha: 0.4}". `fastrecipes ls NAME` tells all about one.')


def carried(annotation):
    "The part of a type that text can carry, or None: `Learner | str` is `str`, `Learner` is None."
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        parts = [part for a in args if (part := carried(a)) is not None]
        return Union[tuple(parts)] if set(parts) - {NoneType} else None
    if origin in (list, tuple, dict): return annotation if all(carried(a) for a in args if a is not ...) else None
    return annotation if origin is Literal or annotation is bool or annotation in WORDS else None


def domain(kind) -> str:
    "What a value of this type may be, in words."
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType): return ' or '.join(dict.fromkeys(domain(a) for a in args))
    if origin is Literal: return ' or '.join(map(str, args))
    if origin in (list, tuple) and args: return f'a list of {" and ".join(dict.fromkeys(domain(a) for a in args if a is not ...))}'
    return 'true or false' if kind is bool else WORDS.get(origin or kind, str(kind))


def shown(value) -> str:
    "A default as it is typed: `true`, `null`, `0.4`, `find`, `[1,2]`."
    if isinstance(value, (list, tuple)): return f'[{",".join(map(shown, value))}]'
    return {True: 'true', False: 'false', None: 'null'}[value] if value is None or isinstance(value, bool) else str(value)


def _type(p: inspect.Parameter):
    "The type of a parameter that text can carry, or None; without an annotation, that of its default."
    if p.annotation is not p.empty: return carried(p.annotation)
    return carried(type(p.default)) if p.default not in (p.empty, None) else None


def _variadic(p: inspect.Parameter) -> bool: return p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)


def _documented(fn) -> dict[str, str]:
    "What is said of each parameter: the docstring's `Args:`, else the comments that trail them (docments)."
    _, found, args = (inspect.getdoc(fn) or '').partition('\nArgs:\n')
    if found: return {m[1]: ' '.join(m[2].split()) for m in re.finditer(r'^ {4}(\w+): (.*(?:\n {5,}.*)*)', args, re.M)}
    from fastcore.docments import docments
    return {name: ' '.join(said.split()) for name, said in docments(fn).items() if said}


class _Help(argparse.HelpFormatter):
    "Argparse's own page, not jsonargparse's: no Python types, no `--mixup.help` for every technique, paragraphs kept."

    def __init__(self, *args, **kwargs): super().__init__(*args, **{'max_help_position': 28, **kwargs})

    def _fill_text(self, text, width, indent):
        return '\n\n'.join(super(_Help, self)._fill_text(paragraph, width, indent) for paragraph in text.split('\n\n'))

    def add_argument(self, action):
        if action.dest == 'print_config': action.help, action.metavar = 'print all arguments as a recipe.yaml and exit', ''
        if not action.dest.endswith('.help'): super().add_argument(action)


class CommandLine:
    """The command line of `fn`, called `command`: `.parse(argv)` gives the keyword arguments to call it with.

    What has no default, and the first parameter, is positional. Where `fn` takes `**techniques`, each that text can carry is a flag."""

    def __init__(self, fn, command: str):
        self.command, self.said = command, _documented(fn)
        parameters = list(inspect.signature(fn, eval_str=True).parameters.values())
        self.named = {p.name: p for p in parameters if not _variadic(p)}
        self.positional = [p.name for i, p in enumerate(self.named.values())
                           if p.kind is not p.KEYWORD_ONLY and (i == 0 or p.default is p.empty)]
        self.types = {name: _type(p) or str for name, p in self.named.items()}
        self.techniques = {n: t for n, t in _techniques().items() if n not in self.named} if any(p.kind is p.VAR_KEYWORD for p in parameters) else {}
        self.bare = {name for name, p in self.named.items() if p.default is False} | self.techniques.keys()

        words = [f'{name.upper()}…' if get_origin(self.types[name]) is list else name.upper() for name in self.positional]
        self.usage = f'fastrecipes {command} ' + ' '.join(w if self._required(n) else f'[{w}]' for n, w in zip(self.positional, words))
        self.parser = ArgumentParser(prog=f'fastrecipes {command}', usage=f'{self.usage} [--option value …]', formatter_class=_Help,
                                     description=(inspect.getdoc(fn) or '').partition('\nArgs:\n')[0],
                                     exit_on_error=False, allow_abbrev=False)
        if 'out' in self.named:
            self.parser.add_argument('--config', action='config', help='take arguments from a recipe.yaml; those typed here win')
        for p in self.named.values(): self._add(p)
        self._add_techniques()

    def _required(self, name: str) -> bool: return self.named[name].default is inspect.Parameter.empty

    def _add(self, p: inspect.Parameter):
        "Declare one parameter. Positionals have no default here, so that those of a recipe.yaml are not overwritten."
        kind, said = self.types[p.name], self.said.get(p.name, '').replace('%', '%%')
        if p.name in self.positional:
            kind, nargs = (get_args(kind)[0], '*') if get_origin(kind) is list else (kind, '?')
            return self.parser.add_argument(p.name, type=kind, nargs=nargs, default=SUPPRESS, metavar=p.name.upper(), help=said)
        default = f'runs/{self.command}-<date-time>' if p.name == 'out' and p.default is None else shown(p.default)
        if not self._required(p.name) and default != 'null' and 'default' not in said: said += f' (default: {default})'
        extra = dict(nargs='?', const=True) if p.name in self.bare else {}
        self.parser.add_argument(f'--{p.name}', type=kind, default=SUPPRESS if self._required(p.name) else p.default,
                                 metavar=_metavar(p.name, kind), help=said.strip(), **extra)

    def _add_techniques(self):
        if self.techniques: self.parser.add_argument_group('techniques', HOW)
        groups = {}
        for t in sorted(self.techniques.values(), key=lambda t: (section_of(t), t.name)):
            group = groups.get(section_of(t)) or groups.setdefault(section_of(t), self.parser.add_argument_group(section_of(t)))
            kinds = _argument_types(t)
            defaults = ', '.join(n if p.default is p.empty else f'{n}={shown(p.default)}' for n, p in t.parameters.items() if n in kinds)
            group.add_argument(f'--{t.name}', type=_flag_type(t), nargs='?', const=True, default=SUPPRESS,
                               metavar=_metavar(_first(t), kinds.get(_first(t), bool)),
                               help=(f'{t.summary} ({defaults})' if defaults else t.summary).replace('%', '%%'))

    def parse(self, argv) -> dict:
        "The arguments to call the function with: its own, and the techniques asked for. Raises a `UserError` for any mistake."
        try: given = self.parser.parse_args(self._spelled(argv)).as_dict()
        except argparse.ArgumentError as e: raise self._explained(str(e)) from None
        given.pop('config', None)
        for name in self.named:
            if not self._required(name) or given.get(name) not in (None, []): continue
            said = f' ({self.said[name]})' if name in self.said else ''
            needs = f'{name.upper()}{said}: {self.usage}' if name in self.positional else f'--{name}{said}'
            raise BadValue(f'{self.command}: needs {needs}')
        return given

    def _spelled(self, argv) -> list[str]:
        """`argv` in one order and one spelling: `--config=…` first, so that the rest wins; then what is positional; then `--name=value`.

        Argparse itself would let a bare flag take a folder's name for its value, and forget positionals that follow an option."""
        config, positional, options, tokens = [], [], [], list(argv)
        while tokens:
            token = tokens.pop(0)
            if token == '--': positional, tokens = positional + tokens, []
            elif token == '-' or not token.startswith('-'): positional.append(token)
            else:
                name, eq, value = token.partition('=')
                name = '--' + name[2:].replace('-', '_') if name.startswith('--') else name
                if not eq and tokens and self._takes(name, tokens[0]): eq, value = '=', tokens.pop(0)
                elif not eq and name[2:] in self.bare: eq, value = '=', 'true'
                (config if name == '--config' else options).append((name, eq + value))
        dotted = {name[2:].partition('.')[0] for name, _ in options if '.' in name}
        first = {f'--{n}': f'--{n}.{_first(t)}' for n, t in self.techniques.items() if n in dotted and _first(t)}
        # --x .4 --x.b 2: both count, where jsonargparse would let the second replace the first
        options = [(name if value in ('=true', '=false') else first.get(name, name), value) for name, value in options]
        return [''.join(o) for o in config] + positional + [''.join(o) for o in options]

    def _takes(self, name: str, following: str) -> bool:
        "Whether an option takes the word that follows it; `--overwrite photos/` does not."
        if following.startswith('--') or name in ('-h', '--help', '--print_config') or name.endswith('.help'): return False
        return following in ('true', 'false') if self.types.get(name[2:]) is bool and name[2:] in self.bare else True

    def _explained(self, message: str) -> Exception:
        "What jsonargparse objects to, as who, what is allowed, what came."
        options = [n for n in self.named if n not in self.positional] + [*self.techniques]
        if 'out' in self.named: options += ['config', 'print_config']
        if m := re.match(r'unrecognized arguments: (\S+)', message):
            name = m[1].partition('=')[0]
            if not name.startswith('-'): return BadValue(f'unexpected {name!r}: {self.usage} [--option value …]')
            return BadName(f'no option {name} in {self.command}{nearest(name.partition(".")[0], [f"--{o}" for o in options])}')
        if m := re.match(r"Option '(.+?)' is not accepted", message):
            return BadName(f'--config: {self.command} has no argument {m[1]!r}{nearest(m[1], [*options, *self.positional])}')
        if m := re.match(r'Parser key "config": File does not exist: \'?(.+?)\'?$', message): return NotThere(f'--config: no file {m[1]}')
        if m := re.match(r'argument (--\S+): expected', message): return BadValue(f'{m[1]}: {domain(self._kind(m[1][2:]))}, got nothing')
        m = re.match(r'Parser key "(\w+)":.*(?:Got|Given) value: (.*)', message, re.S)
        if m and (m[1] in self.types or m[1] in self.techniques): return self._refused(m[1], m[2].strip())
        return BadValue(message.replace('Problems parsing config', '--config'))

    def _kind(self, dest: str):
        "The type of the option `dest`, which may be an argument of a technique: `mixup.alpha`."
        name, _, argument = dest.partition('.')
        return _argument_types(self.techniques[name]).get(argument, bool) if name in self.techniques else self.types.get(name, Path)

    def _refused(self, name: str, value: str) -> Exception:
        "Why `--name value` is not accepted; jsonargparse gives the value as text, or as `NestedArg(key='alpha', val='x')`."
        if name not in self.techniques: return BadValue(_wrong(f'--{name}', self.types[name], value))
        t, kinds = self.techniques[name], _argument_types(self.techniques[name])
        given = {m[1]: m[2]} if (m := re.fullmatch(r"NestedArg\(key='(.*?)', val=(.*)\)", value, re.S)) else _literal(value)
        if isinstance(given, dict):
            for argument in given:
                if argument in kinds: continue
                takes = f'{name} takes {", ".join(kinds) or "none"}'
                return BadName(f'--{name}.{argument}: no such argument{nearest(argument, kinds) or ";"} {takes}')
            if len(given) == 1: return BadValue(_wrong(f'--{name}.{argument}', kinds[argument], str(given[argument]).strip("'")))
            return BadValue(f'--{name}: {", ".join(f"{n}: {domain(k)}" for n, k in kinds.items())}, got {value}')
        allowed = 'true or false' if kinds.get(_first(t), bool) is bool else f'{domain(kinds[_first(t)])} ({_first(t)}), true or false'
        instead = f'; write fastrecipes {self.command} {value} --{name}' if Path(value).exists() else ''
        return BadValue(_wrong(f'--{name}', kinds.get(_first(t)), value, allowed) + instead)


def _wrong(flag: str, kind, value: str, allowed: str | None = None) -> str:
    choices = [c for k in (kind, *get_args(kind)) if get_origin(k) is Literal for c in get_args(k)]
    return f'{flag}: {allowed or domain(kind)}, got {value!r}{nearest(value, choices)}'


def _metavar(name: str | None, kind) -> str:
    if kind is bool: return 'true|false'
    return '|'.join(map(str, get_args(kind))) if get_origin(kind) is Literal else name.upper()


def _literal(text: str):
    try: return ast.literal_eval(text)
    except (ValueError, SyntaxError): return text


def sections_of(t) -> tuple[str, ...]:
    "The chapters a technique belongs to, the one that lists it first."
    return (t.section,) if isinstance(t.section, str) else tuple(t.section)


def section_of(t) -> str:
    "The chapter that lists a technique."
    return sections_of(t)[0]


def _argument_types(t) -> dict:
    "The arguments of a technique that text can carry, with their types."
    return {n: kind for n, p in t.parameters.items() if not _variadic(p) and (kind := _type(p)) is not None}


def _first(t) -> str | None:
    "The argument that `--name value` sets, if text can carry it."
    return next((n for n in list(t.parameters)[:1] if n in _argument_types(t)), None)


def _flag_type(t):
    "What a technique's keyword may be: true, false, null, its first argument, or its arguments by name."
    kinds = _argument_types(t)
    first, named = [kinds[_first(t)]] if _first(t) else [], [TypedDict(t.name, kinds, total=False)] if kinds else []
    return Union[tuple([bool, NoneType, *first, *named])]


def flags_of(t) -> list[str]:
    "How a technique is typed: bare, with its first argument, with each by name; nothing where it needs what text cannot carry."
    kinds, needed = _argument_types(t), [n for n, p in t.parameters.items() if p.default is p.empty and not _variadic(p)]
    if set(needed) - kinds.keys(): return []
    value = {n: _metavar(n, kind) if t.parameters[n].default in (inspect.Parameter.empty, None) else shown(t.parameters[n].default)
             for n, kind in kinds.items()}
    first = [f'--{t.name} {value[_first(t)]}'] if kinds.get(_first(t), bool) is not bool else []
    return [*([] if needed else [f'--{t.name}']), *first, *(f'--{t.name}.{n} {v}' for n, v in value.items())]


def _techniques() -> dict:
    from fastrecipes.technique import discover
    return {n: t for n, t in discover().items() if flags_of(t)}
