"The command line: a command is a function, found by name; a user's mistake is one line on stderr and exit code 2."
import ast
import os
import re
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from signal import SIGINT, SIGTERM, raise_signal, signal
from threading import current_thread, main_thread

from fastrecipes import __version__
from fastrecipes.errors import BadName, UserError, nearest
from fastrecipes.files import writes

__all__ = ['COMMANDS', 'function_of', 'main']

COMMANDS = {
    'demo': 'fastrecipes.recipes.pipeline:demo',
    'pipeline': 'fastrecipes.recipes.pipeline:pipeline',
    'image-classifier': 'fastrecipes.recipes.classify:image_classifier',
    'fast-classifier': 'fastrecipes.recipes.fast:fast_classifier',
    'cross-validate': 'fastrecipes.recipes.validate:cross_validate',
    'recommend': 'fastrecipes.recipes.recommend:recommend',
    'ablate': 'fastrecipes.recipes.ablate:ablate',
    'learning-curve': 'fastrecipes.recipes.learning_curve:learning_curve',
    'noisy-student': 'fastrecipes.recipes.self_training:noisy_student',
    'ensemble': 'fastrecipes.recipes.ensemble:ensemble',
    'compress': 'fastrecipes.recipes.compress:compress',
    'ship': 'fastrecipes.recipes.ship:ship',
    'serve': 'fastrecipes.recipes.serve:serve',
    'predict': 'fastrecipes.production.predicting:predict',
    'ls': 'fastrecipes.cards:ls',
}


def main(argv=None) -> int:
    "Run one command; return its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C. Our own bugs keep their traceback."
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')     # torch's threads spin while they wait: beside other work on the same cores, 30 times slower
    if current_thread() is main_thread(): signal(SIGTERM, lambda *_: raise_signal(SIGINT))     # what a scheduler sends ends a run as Ctrl-C does
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning): warnings.simplefilter('ignore', category)   # torch and fastai, at import
            code = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return code
    except UserError as e: return _complain(e, 2)
    except KeyboardInterrupt as e: return _complain(e if e.args else 'interrupted', 130)
    except BrokenPipeError:                     # `fastrecipes ls | head`: nobody reads on; keep the interpreter's last flush quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _complain(what, code: int) -> int:
    "One line on stderr, without what fastai prepends to the message of an exception raised in a callback."
    text = re.sub(r'Exception occured in `.*?` when calling event `.*?`:', '', str(what))
    print('fastrecipes:', ' '.join(text.split()), file=sys.stderr)
    return code


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ('-h', '--help'): return print(overview()) or 0
    if argv[0] == '--version': return print(f'fastrecipes {__version__}') or 0
    command, *rest = argv
    if command not in COMMANDS:
        what = 'option' if command.startswith('-') else 'command'
        raise BadName(f'no {what} {command!r}{nearest(command, [*COMMANDS, "--help", "--version"]) or ";"} `fastrecipes --help` lists them')

    fn = function_of(COMMANDS[command])
    from fastrecipes.flags import CommandLine
    line = CommandLine(fn, command)
    try: arguments = line.parse(rest)
    except SystemExit as e: return int(e.code or 0)  # --help and --print_config have printed
    if 'out' in arguments and arguments['out'] is None: arguments['out'] = f'runs/{command}-{time.strftime("%Y%m%d-%H%M%S")}'
    return _show(fn(**arguments), arguments.get('out'))


def function_of(target: str):
    "What a command calls: `module:name`."
    module, name = target.split(':')
    return getattr(import_module(module), name)


def _show(result, out) -> int:
    "Print what a command returned, or where it left its files; an int is its exit code."
    if isinstance(result, int): return result
    if result is None or not writes(): return 0
    if type(result).__str__ is not object.__str__ or type(result).__repr__ is not object.__repr__: print(result)
    elif out: print(f'run folder: {out}')
    return 0


def overview() -> str:
    "The commands, each with the first line of its docstring, read without importing it: fastai takes seconds."
    width = max(map(len, COMMANDS))
    return '\n'.join(['usage: fastrecipes COMMAND [--option value …]', '',
                      'From a folder of images to a small, verified model behind a web server.', '',
                      'commands:', *(f'  {name.ljust(width)}  {_summary(target)}' for name, target in COMMANDS.items()), '',
                      '`fastrecipes COMMAND --help` lists its options, `fastrecipes ls` the techniques; --version tells the version.'])


def _summary(target: str) -> str:
    module, name = target.split(':')
    file = Path(__file__).parents[1].joinpath(*module.split('.')).with_suffix('.py')
    node = next(n for n in ast.parse(file.read_text(encoding='utf8')).body if isinstance(n, ast.FunctionDef) and n.name == name)
    return (ast.get_docstring(node) or '').partition('\n')[0]
