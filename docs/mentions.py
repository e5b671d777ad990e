"What pages and notebooks hold in code: blocks, calls, techniques."
import ast
import inspect
import re
from pathlib import Path
from textwrap import dedent


def blocks(file: Path, language: str, titled: bool = False) -> list[str]:
    "The blocks of code of a page in `language`: those that are to be run as they are, or those whose title says what they need."
    found = re.findall(rf'(?ms)^ *```{language}( title="[^"]*")?\n(.*?)^ *```', file.read_text(encoding='utf8'))
    return [dedent(code) for title, code in found if bool(title) == titled]


def bound(call: ast.Call) -> inspect.BoundArguments | None:
    """The arguments of a call by the signature of what it names, `None` where there is no such thing. Raises `TypeError` where they do not fit.

    It is a name of `fastrecipes.all`, a method of what one of them makes, or of a Learner; after `A.` one of albumentations."""
    import albumentations as A

    import fastrecipes.all as everything
    of = getattr(call.func, 'value', None)
    if isinstance(call.func, ast.Name): f, given = getattr(everything, call.func.id, None), []
    elif isinstance(of, ast.Name) and of.id == 'A': f, given = getattr(A, call.func.attr, None), []
    else:
        owner = getattr(everything, of.func.id, None) if isinstance(of, ast.Call) and isinstance(of.func, ast.Name) else everything.Learner
        f, given = getattr(owner, call.func.attr, None), [None]
    if f is None: return None
    return inspect.signature(f).bind(*given, *[None]*len(call.args), **{k.arg: None for k in call.keywords})


def _code(nb: dict) -> ast.AST:
    "The code cells, without lines for IPython or the shell."
    text = '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code')
    return ast.parse('\n'.join(line for line in text.splitlines() if not line.lstrip().startswith(('%', '!'))))


def techniques_in(nb: dict) -> set[str]:
    "The techniques that a notebook's code applies: a method that is called, a keyword, or a word of a string."
    from fastrecipes.technique import discover
    known, found = discover(), set()
    for node in ast.walk(_code(nb)):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute): found.add(node.func.attr)
            found |= {k.arg for k in node.keywords}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200: found |= set(re.findall(r'\w+', node.value))
    return found & set(known)


def passages(text: str, n: int = 13) -> set[tuple]:
    "Every `n` words in a row, of prose."
    words = re.findall(r"[\w’']+", re.sub(r'(?ms)^```.*?^```', '', text).lower())
    return {tuple(words[i:i+n]) for i in range(len(words)-n+1)}
