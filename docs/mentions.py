"What the code of a notebook uses."
import ast
import re


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
