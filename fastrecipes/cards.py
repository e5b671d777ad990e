"`fastrecipes ls`: the techniques there are, all that is known of one, and which go together."
import inspect
import json as jsonlib
import re
from importlib import import_module
from itertools import chain, combinations, groupby, repeat
from string import ascii_letters
from textwrap import fill

from fastai.basics import Learner

from fastrecipes.errors import BadName, nearest
from fastrecipes.flags import flags_of, section_of, sections_of
from fastrecipes.technique import STAGES, Technique, discover

__all__ = ['ls', 'card', 'company', 'composition', 'in_order', 'listing', 'others', 'pairs', 'record', 'ways']


def ls(name: str | None = None, *, matrix: bool = False, json: bool = False) -> None:
    """List the techniques, tell all about one, or show which go together.

    Args:
        name: a technique; or a method or recipe, of which it tells the arguments
        matrix: show which techniques go together, and say why others do not
        json: print records instead of text
    """
    techniques = discover()
    if name is not None and name not in techniques:
        known = others(techniques)
        if (other := name.replace('-', '_')) in known and not matrix: return print(jsonlib.dumps(known[other], indent=2, ensure_ascii=False) if json else _page(known[other]))
        found = nearest(name, techniques if matrix else [*techniques, *known]) or ';'
        raise BadName(f'ls: no technique named {name!r}{found} `fastrecipes ls` lists the {len(techniques)} there are')
    if matrix: records = pairs(techniques.values(), name)
    else: records = record(techniques[name]) if name else [record(t) for t in techniques.values()]
    if json: print(jsonlib.dumps(records, indent=2, ensure_ascii=False, default=str))
    elif matrix: print(company(techniques[name], techniques.values()) if name else composition(techniques.values()))
    else: print(card(techniques[name]) if name else listing(techniques.values()))


def others(techniques) -> dict[str, dict]:
    "What there is beside techniques: the methods that a Learner has of ours, and the functions that `fastrecipes.all` gives, as records by name."
    everything = vars(import_module('fastrecipes.all'))        # first: it gives Learners their methods
    ours = lambda f: callable(f) and getattr(f, '__module__', '').startswith('fastrecipes') and inspect.getdoc(f)
    room = lambda f: f.__module__.split('.')[1]
    methods = {n: dict(name=n, kind='method', room=room(f), call=f'learn.{n}{_signature(f, 1)}', doc=inspect.getdoc(f))
               for n, f in inspect.getmembers(Learner, inspect.isfunction) if ours(f) and not n.startswith('_') and n not in techniques}
    functions = {n: dict(name=n, kind='class' if inspect.isclass(f) else 'function', room=room(f), call=f'{n}{_signature(f)}', doc=inspect.getdoc(f))
                 for n, f in everything.items() if (inspect.isfunction(f) or inspect.isclass(f) and not issubclass(f, Exception)) and ours(f)}
    return {**functions, **methods}


def _signature(f, skip: int = 0) -> str:
    "How `f` is called, types by their own names."
    signature = inspect.signature(f)
    return _short(str(signature.replace(parameters=list(signature.parameters.values())[skip:], return_annotation=signature.empty)))


def _short(types: str) -> str:
    types = re.sub(r"<(?:module|class|function) '?([\w.]+)[^>]*>", r'\1', types)
    return re.sub(r'\b(?:[a-z_]\w*\.)+(?=[A-Z])', '', types)


def _page(other: dict) -> str: return f'{other["call"]}\n\n{other["doc"]}\n\na {other["kind"]}, and no technique: it is called, and recipes take no keyword for it'


def listing(techniques) -> str:
    "One line each, by section, sections in the order of their stages: call, stage, what it does."
    width, lines = 46, []                       # a longer call has a line of its own
    for section, group in groupby(in_order(techniques), section_of):
        lines.append(section)
        for t in group:
            call = f'  {_call(t):{width}}'
            lines += [f'{call}  {t.stage:5}  {t.summary}'] if len(call) == width+2 else [call, f'  {"":{width}}  {t.stage:5}  {t.summary}']
        lines.append('')
    return '\n'.join([*lines, '`fastrecipes ls NAME` tells all about one.'])


def pairs(techniques, name: str | None = None) -> list[dict]:
    "Every two techniques, or those with `name`: whether they go together, and the sentence that says why not."
    return [dict(techniques=[a.name, b.name], together=why is None, why=why) for a, b in combinations(in_order(techniques), 2)
            if name in (None, a.name, b.name) for why in [a.refuses.get(b.name) or b.refuses.get(a.name)]]


def composition(techniques) -> str:
    "Which techniques go together: a table with a letter for each sentence that says why not, and the sentences."
    ordered = in_order(techniques)
    refused = {frozenset(p['techniques']): p['why'] for p in pairs(ordered) if not p['together']}
    marks = dict(zip(dict.fromkeys(refused.values()), chain(ascii_letters, repeat('#'))))
    width, numbers = max(len(t.name) for t in ordered), range(1, len(ordered)+1)
    lines = [' '*(width+4) + ' '.join(digits) for digits in zip(*(f'{i:2}' for i in numbers))]
    for i, a in zip(numbers, ordered):
        cells = (' ' if a is b else marks.get(refused.get(frozenset((a.name, b.name))), '·') for b in ordered)
        lines.append(f'{a.name:{width}} {i:2} {" ".join(cells)}')
    lines += ['', '· they go together, in whatever order they are given' + ('; elsewhere they are refused before any work:' if refused else '')]
    for why, mark in marks.items():
        who = ', '.join(' + '.join(t.name for t in ordered if t.name in names) for names, w in refused.items() if w == why)
        lines.append(fill(f'{mark} {who}: {why}', 100, subsequent_indent='  '))
    return '\n'.join(line.rstrip() for line in lines)


def company(t: Technique, techniques) -> str:
    "The row of `t` in words: what it goes together with, and what not, and why."
    others = {next(n for n in p['techniques'] if n != t.name): p['why'] for p in pairs(techniques, t.name)}
    together = [n for n, why in others.items() if why is None]
    lines = [f'{t.name} does not go together with {n}: {why}' for n, why in others.items() if why]
    lines.append(f'{t.name} goes together with {"every other technique" if not lines else "all others" if together else "no other"}: {", ".join(together)}')
    return '\n'.join(fill(line, 100, subsequent_indent='  ') for line in lines)


def in_order(techniques) -> list[Technique]:
    "By section, sections in the order of their stages."
    first = {}
    for t in techniques: first[section_of(t)] = min(first.get(section_of(t), len(STAGES)), STAGES.index(t.stage))
    return sorted(techniques, key=lambda t: (first[section_of(t)], section_of(t), t.name))


def ways(t: Technique) -> dict:
    "How `t` is switched on: as a method, as a keyword and by its flags, the first argument at its default."
    first = next(iter(t.parameters.values()), None)
    value = first and (repr(first.default) if first.default not in (first.empty, None) else f'<{first.name}>')
    return dict(method=f'learn.{t.name}({value or ""})', keyword=f'{t.name}={value or True}', flags=flags_of(t))


def card(t: Technique) -> str:
    "All that is known of `t`, for a terminal."
    signature = _short(', '.join(map(str, t.parameters.values())))
    rows = [('section', ', '.join(sections_of(t))), ('stage', t.stage), ('source', t.source), ('touches', ', '.join(t.touches)),
            ('after', ', '.join(t.after)), ('before', ', '.join(t.before)), ('replaces', t.replaces)]
    rows += [('refuses', f'{other}: {why}') for other, why in t.refuses.items()] + [('', '')]
    called = ways(t)
    rows += list((called | dict(flags='  '.join(called['flags']) or 'none: text cannot carry what it needs')).items())
    return '\n'.join([f'{t.name}({signature})', '', t.doc, '', *(f'{k:9} {v}'.rstrip() for k, v in rows if v or not k)])


def record(t: Technique) -> dict:
    "The same as plain data, for programs."
    return dict(name=t.name, section=section_of(t), sections=list(sections_of(t)), stage=t.stage, source=t.source, summary=t.summary, doc=t.doc, formula=t.formula,
                arguments={n: None if p.default is p.empty else p.default for n, p in t.parameters.items()},
                required=[n for n, p in t.parameters.items() if p.default is p.empty],
                touches=list(t.touches), after=list(t.after), before=list(t.before), refuses=dict(t.refuses), replaces=t.replaces)


def _call(t: Technique) -> str:
    return f'{t.name}({", ".join(n if p.default is inspect.Parameter.empty else f"{n}={p.default!r}" for n, p in t.parameters.items())})'
