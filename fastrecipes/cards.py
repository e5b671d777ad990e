"`fastrecipes ls`: the techniques there are, and all that is known of one."
import inspect
import json as jsonlib
import re
from itertools import groupby

from fastrecipes.errors import BadName, nearest
from fastrecipes.flags import flags_of, section_of
from fastrecipes.technique import STAGES, Technique, discover

__all__ = ['ls', 'card', 'listing', 'record']


def ls(name: str | None = None, *, json: bool = False) -> None:
    """List the techniques, or tell all about one.

    Args:
        name: a technique
        json: print records instead of text
    """
    techniques = discover()
    if name is not None and name not in techniques:
        found = nearest(name, techniques) or ';'
        raise BadName(f'ls: no technique named {name!r}{found} `fastrecipes ls` lists the {len(techniques)} there are')
    if json:
        records = record(techniques[name]) if name else [record(t) for t in techniques.values()]
        return print(jsonlib.dumps(records, indent=2, ensure_ascii=False, default=str))
    print(card(techniques[name]) if name else listing(techniques.values()))


def listing(techniques) -> str:
    "One line each, by section, sections in the order of their stages: call, stage, what it does."
    first = {}
    for t in techniques: first[section_of(t)] = min(first.get(section_of(t), len(STAGES)), STAGES.index(t.stage))
    techniques = sorted(techniques, key=lambda t: (first[section_of(t)], section_of(t), t.name))
    width, lines = 46, []                       # a longer call has a line of its own
    for section, group in groupby(techniques, section_of):
        lines.append(section)
        for t in group:
            call = f'  {_call(t):{width}}'
            lines += [f'{call}  {t.stage:5}  {t.summary}'] if len(call) == width+2 else [call, f'  {"":{width}}  {t.stage:5}  {t.summary}']
        lines.append('')
    return '\n'.join([*lines, '`fastrecipes ls NAME` tells all about one.'])


def card(t: Technique) -> str:
    "All that is known of `t`, for a terminal."
    signature = re.sub(r'\b(?:[a-z_]\w*\.)+(?=[A-Z])', '', ', '.join(str(p) for p in t.parameters.values()))
    first = next(iter(t.parameters.values()), None)
    value = first and (repr(first.default) if first.default not in (first.empty, None) else f'<{first.name}>')
    rows = [('section', section_of(t)), ('stage', t.stage), ('source', t.source), ('touches', ', '.join(t.touches)),
            ('after', ', '.join(t.after)), ('before', ', '.join(t.before)), ('replaces', t.replaces)]
    rows += [('refuses', f'{other}: {why}') for other, why in t.refuses.items()] + [('', '')]
    rows += [('method', f'learn.{t.name}({value})' if first else f'learn.{t.name}()'),
             ('keyword', f'{t.name}={value}' if first else f'{t.name}=True'),
             ('flags', '  '.join(flags_of(t)) or 'none: text cannot carry what it needs')]
    return '\n'.join([f'{t.name}({signature})', '', t.doc, '', *(f'{k:9} {v}'.rstrip() for k, v in rows if v or not k)])


def record(t: Technique) -> dict:
    "The same as plain data, for programs."
    return dict(name=t.name, section=section_of(t), stage=t.stage, source=t.source, summary=t.summary, doc=t.doc,
                arguments={n: None if p.default is p.empty else p.default for n, p in t.parameters.items()},
                required=[n for n, p in t.parameters.items() if p.default is p.empty],
                touches=list(t.touches), after=list(t.after), before=list(t.before), refuses=dict(t.refuses), replaces=t.replaces)


def _call(t: Technique) -> str:
    return f'{t.name}({", ".join(n if p.default is inspect.Parameter.empty else f"{n}={p.default!r}" for n, p in t.parameters.items())})'
