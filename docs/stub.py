"""Write fastrecipes/all.pyi: what an editor completes after `learn.` where `from fastrecipes.all import *` is above.

    python docs/stub.py

A stub cannot add methods to a class of another package, so that here `Learner` is fastai's with ours, and what makes one returns that. From the registry and from the signatures;
a test compares."""
import ast
import builtins
import inspect
import textwrap
import typing
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT/'fastrecipes'/'all.pyi'
THEIRS = ('vision_learner', 'unet_learner', 'load_learner')      # of fastai.vision.all: what makes a Learner


def definition(f) -> tuple[ast.FunctionDef, dict]:
    "How `f` was written, and what names mean where it was."
    f = inspect.unwrap(f)
    tree = ast.parse(textwrap.dedent(inspect.getsource(f)))
    return next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == f.__name__), f.__globals__


class Spelled(ast.NodeTransformer):
    "Put what a name means in the place of an alias, and collect the imports that the other names need."
    def __init__(self, meanings: dict, imports: set): self.meanings, self.imports = meanings, imports

    def visit_Name(self, node):
        name, value = node.id, self.meanings.get(node.id)
        if hasattr(builtins, name) or name == 'Learner': return node
        if inspect.ismodule(value): self.imports.add(f'import {value.__name__} as {name}')
        elif hasattr(typing, name): self.imports.add(f'from typing import {name}')
        elif isinstance(value, type): self.imports.add(f'from {value.__module__} import {name}')
        else: return ast.parse(repr(value).replace('typing.', ''), mode='eval').body       # an alias: Literal['crop', …]
        return node


def declared(f, imports: set, method: bool, returns: str | None = None, documented: bool = True) -> str:
    "`f` as a stub has it, defaults left out; what its types need goes into `imports`."
    node, meanings = definition(f)
    a = node.args
    for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg):
        if arg is None or arg.annotation is None: continue
        names = {n.id for n in ast.walk(arg.annotation) if isinstance(n, ast.Name)}
        known = all(hasattr(builtins, n) or n in meanings for n in names) and not any(isinstance(n, ast.Call) for n in ast.walk(arg.annotation))
        if method and arg is a.args[0] or not known: arg.annotation = None
        else: arg.annotation = Spelled(meanings, imports).visit(arg.annotation)
    if method: a.args[0].arg = 'self'
    a.defaults = [d if simple(d) else ast.Constant(...) for d in a.defaults]
    a.kw_defaults = [d if d is None or simple(d) else ast.Constant(...) for d in a.kw_defaults]
    doc = inspect.getdoc(f) or ''
    body = f'    {doc.partition(chr(10))[0]!r}\n    ...' if documented and doc else '    ...'
    return f'def {node.name}({ast.unparse(a)}){f" -> {returns}" if returns else ""}:\n{body}\n'


def simple(node) -> bool:
    "Whether a default can be read without the names of its module."
    return not any(isinstance(n, (ast.Name, ast.Attribute, ast.Call)) for n in ast.walk(node))


def stub() -> str:
    warnings.simplefilter('ignore')
    import fastrecipes.all as everything
    from fastai.basics import Learner
    from fastrecipes.cards import others
    from fastrecipes.technique import TECHNIQUES
    imports, methods, makers = set(), [], []
    for name in sorted(TECHNIQUES): methods.append(declared(TECHNIQUES[name].f, imports, True, 'Learner'))
    for name, o in sorted(others(TECHNIQUES).items()):
        f = getattr(Learner, name) if o['kind'] == 'method' else getattr(everything, name)
        if o['kind'] == 'method': methods.append(declared(f, imports, True, 'Learner' if name == 'use' else None))
        elif inspect.isfunction(f) and (made := definition(f)[0].returns) is not None and ast.unparse(made) == 'Learner': makers.append(declared(f, imports, False, 'Learner'))
    for name in THEIRS: makers.append(declared(getattr(everything, name), imports, False, 'Learner'))
    stars = [line for line in (ROOT/'fastrecipes'/'all.py').read_text(encoding='utf8').splitlines() if line.startswith('from fastrecipes')]
    return '\n'.join(['"What editors know of `from fastrecipes.all import *`: written by docs/stub.py from the registry, and not by hand."', '# ruff: noqa', *sorted(imports), '',
                      'from fastai.vision.all import *',
                      'from fastai.learner import Learner as _Learner', *stars, '', 'class Learner(_Learner):', textwrap.indent('\n'.join(methods), '    '), '\n'.join(makers)])


if __name__ == '__main__':
    FILE.write_text(stub(), encoding='utf8')
    print(FILE)
