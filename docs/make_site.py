"""Build the site: pages that are written, and those that follow from the registry, the notebooks and the benchmarks.

    python docs/make_site.py [--out build/site]

Nothing is fetched. What is said of a technique, a method or a recipe is its docstring; what was measured is bench/RESULTS.md; the landing page is README.md."""
import argparse
import inspect
import json
import logging
import re
import shutil
import sys
import time
import warnings
from itertools import groupby
from pathlib import Path
from textwrap import fill

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'bench'))
import results                                      # noqa: E402

COLUMNS = {'Data': ('Balance', 'Data augmentation', 'Loading', 'Normalization'), 'Layers': ('Layers', 'Regularization'), 'Loss': ('Loss',), 'Metrics': (), 'Training': ('Training',),
           'Production': ('Distillation', 'Pruning')}
ROOMS = {'data': 'Data', 'layers': 'Layers', 'losses': 'Loss', 'metrics': 'Metrics', 'training': 'Training', 'production': 'Production', 'report': 'Production'}


# What there is to tell

def registry():
    "Techniques by name, and records of all other public methods and functions."
    warnings.simplefilter('ignore')
    import fastrecipes.all                      # noqa: F401
    from fastrecipes import cards
    from fastrecipes.technique import TECHNIQUES
    return TECHNIQUES, cards.others(TECHNIQUES)


def column_of(section: str) -> str:
    return next((c for c, sections in COLUMNS.items() if section in sections), 'Training')


def link(source: str) -> str:
    "A paper or page as a link."
    if source.startswith('arXiv:'): return f'[{source}](https://arxiv.org/abs/{source[6:]})'
    if source.startswith('doi:'): return f'[{source}](https://doi.org/{source[4:]})'
    return f'[{source.split("://")[-1].split("/")[0]}]({source})'


def prose(doc: str) -> str:
    "A docstring as Markdown: its lines are paragraphs already; `Args:` becomes a list."
    text, _, args = doc.partition('\nArgs:\n')
    text, args = (re.sub(r'(`[^`]*`)|<', lambda m: m[1] or '&lt;', t) for t in (text, args))
    if not args: return text
    items = re.sub(r'\n {8,}', ' ', inspect.cleandoc(args)).splitlines()
    return text + '\n\n' + '\n'.join(f'- `{n.strip()}`: {what.strip()}' for n, _, what in (i.partition(':') for i in items))


def shown_in(notebooks: dict) -> dict[str, list[str]]:
    "Technique → the notebooks whose code uses it."
    from mentions import techniques_in
    found = {}
    for name, nb in notebooks.items():
        for t in techniques_in(nb): found.setdefault(t, []).append(name)
    return found


EFFECTS = ('effects', 'ablation_cifar', 'imbalance')       # the parts of RESULTS.md that hold effects of techniques


def measured() -> dict[str, list[str]]:
    "Technique → what bench/RESULTS.md has of it: the rows that begin with its name, under their head, with command and date."
    found = {}
    for part in map(results.read, EFFECTS):
        title, _, text = part.strip().removeprefix('## ').partition('\n')
        command, date = re.search(r'`[^`\n]+`', text)[0], re.search(r'Written ([\d-]+)', text)[1]
        for below in re.split(r'(?m)^### ', text):
            table = re.search(r'(?m)^\|.*\|\n\| *-.*\|\n', below)
            head = table[0] if table else re.search(r'(?m)^baseline.*\n.*\n', below)[0] if 'baseline:' in below else ''
            under = below.partition('\n')[0] if below is not text and table and not below.startswith('\n') else ''
            names = dict.fromkeys(re.findall(r'(?m)^(?:\| `)?(\w+)(?:\([^|]*\))?(?:` \|| {2,})', below))
            for name in names:
                rows = '\n'.join(re.findall(rf'(?m)^(?:\| `)?{name}(?:\(.*?\))?(?:` \|| {{2,}}).*$', below))
                rows = head+rows if table else f'```\n{head}{rows}\n```'
                what = f'{title}{": "*bool(under)}{under}. {command}, {date}; machine and protocol in [the benchmarks](../benchmarks.md).'
                found.setdefault(name, []).append(f'{what}\n\n{rows}\n')
    return found


# Pages

def card(t, techniques, where, effects) -> str:
    from fastrecipes.cards import pairs, ways
    from fastrecipes.flags import sections_of
    lines = [f'# {t.name}', '', t.summary, '']
    if t.formula: lines += ['$$', t.formula, '$$', '']
    if rest := prose(t.doc).partition('\n')[2].strip(): lines += [rest, '']
    called = ways(t)
    lines += ['## How it is called', '', '| | |', '| --- | --- |', f'| on a Learner | `{called["method"]}` |', f'| in a recipe | `{called["keyword"]}` |']
    if flags := called['flags']: lines += [f'| at the command line | `{"` `".join(flags)}` |']
    if t.parameters:
        lines += ['', '| argument | default | |', '| --- | --- | --- |']
        for n, p in t.parameters.items():
            kind = '' if p.annotation is p.empty else _plain(p.annotation)
            lines.append(f'| `{n}` | {"must be given" if p.default is p.empty else f"`{p.default!r}`"} | {kind} |')
    rows = {'chapter': ', '.join(sections_of(t)), 'applied at stage': t.stage, 'touches': ', '.join(t.touches) or 'nothing of data, network or loss',
            'after': _cards(t.after), 'before': _cards(t.before), 'in place of': t.replaces, 'source': link(t.source)}
    lines += ['', '## What it touches', '', '| | |', '| --- | --- |', *(f'| {k} | {v} |' for k, v in rows.items() if v)]
    refused = {o: p['why'] for p in pairs(techniques.values(), t.name) if not p['together'] for o in p['techniques'] if o != t.name}
    lines += ['', '## Composes with', '', f'{len(techniques)-1-len(refused)} of the {len(techniques)-1} others, in whatever order they are named; each pair is trained by the tests.']
    if refused: lines += ['', 'It is refused, before any work, beside', '', *(f'- [`{o}`]({o}.md): {why}' for o, why in refused.items())]
    lines += ['', '## Measured', '']
    if t.name in effects: lines += effects[t.name]
    else: lines += ['No effect of this one alone is in [the benchmarks](../benchmarks.md). On your data: ', '', f'```sh\nfastrecipes ablate photos/ --techniques {t.name}\n```', '']
    if t.name in where: lines += ['## Seen at work', '', ', '.join(f'[{n}](../notebooks/{n}.md)' for n in where[t.name])]
    return '\n'.join(lines)


def _plain(annotation) -> str:
    from fastrecipes.flags import carried, domain
    return domain(carried(annotation)).replace('|', '\\|') if carried(annotation) is not None else 'Python only'


def _cards(names) -> str: return ', '.join(f'[`{n}`]({n}.md)' for n in sorted(names))


def cheatsheet(techniques, others) -> str:
    "Six columns, each cell a link; a technique stands in every column that one of its chapters belongs to."
    from fastrecipes.flags import sections_of
    from fastrecipes.layers.activations import ACTIVATIONS
    from fastrecipes.layers.init import INITS
    from fastrecipes.losses.kinds import LOSSES
    from fastrecipes.metrics.kinds import METRICS
    from fastrecipes.training.schedules import SCHEDULES
    columns = {c: {s: [] for s in sections} for c, sections in COLUMNS.items()}
    for t in sorted(techniques.values(), key=lambda t: t.name):
        for s in sections_of(t): columns[column_of(s)].setdefault(s, []).append(f'[`{t.name}`](techniques/{t.name}.md)')
    columns['Layers']['Weights begin with'] = [f'[`{k}`](techniques/initialize.md)' for k in INITS]
    columns['Layers']['Activations'] = [f'[`{k}`](techniques/activation.md)' for k in ACTIVATIONS]
    columns['Loss']["`loss(…)`"] = [f'[`{k}`](techniques/loss.md)' for k in LOSSES]
    columns['Metrics']["`metric(…)`"] = [f'[`{k}`](api/metrics.md)' for k in METRICS]
    schedules = [f'fit_{k}' for k in SCHEDULES] + ['fit_for']
    columns['Training']['Schedules'] = [f'[`{n}`](methods.md#{anchor_of(n)})' if n in others else f'[`{n}`](https://docs.fast.ai/callback.schedule.html)' for n in schedules]
    for o in others.values():
        if o['kind'] != 'method' or o['name'] in schedules: continue
        columns[ROOMS.get(o['room'], 'Training')].setdefault('Methods', []).append(f'[`{o["name"]}`](methods.md#{anchor_of(o["name"])})')
    lines = ['---', 'hide: [navigation, toc]', '---', '', '# The cheatsheet', '', f'{len(techniques)} techniques, from the registry, with what belongs beside them; each is a link. '
             'The printed cheatsheet has errors: [errata](errata.md). Which one? [Pick a technique](pick.md).', '', '<div class="cheatsheet" markdown>', '']
    for column, groups in columns.items():
        lines += ['<div markdown>', '', f'## {column}', '']
        for group, items in groups.items(): lines += [f'### {group}', '', *(f'- {i}' for i in items), '']
        lines += ['</div>', '']
    return '\n'.join([*lines, '</div>'])


def wrapped(call: str) -> str: return fill(call, 84, subsequent_indent='    ', break_long_words=False, break_on_hyphens=False)


def anchor_of(name: str) -> str: return f'learn-{name}'


def methods(others) -> str:
    "What a Learner can do beside techniques, by room, as `fastrecipes ls NAME` has it."
    lines = ['# Methods of a Learner', '', 'Beside the [techniques](techniques/index.md), which are methods as well. With `from fastrecipes.all import *` every `Learner` has them.', '']
    rooms = sorted((o for o in others.values() if o['kind'] == 'method'), key=lambda o: (list(ROOMS).index(o['room']) if o['room'] in ROOMS else -1, o['name']))
    for room, group in groupby(rooms, lambda o: ROOMS.get(o['room'], 'All')):
        lines += [f'## {room}', '']
        for o in group: lines += [f'### learn.{o["name"]} {{ #{anchor_of(o["name"])} }}', '', f'```python\n{wrapped(o["call"])}\n```', '', prose(o['doc']), '']
    return '\n'.join(lines)


def recipes() -> str:
    "Every command is a function, and every recipe a command."
    from fastrecipes.cli import COMMANDS, function_of
    lines = ['# Recipes, and the command line', '', 'A command is a function of the same name, an option its keyword, a technique a flag: `fastrecipes COMMAND --help` lists them all, '
             '`--config recipe.yaml` runs one again. A mistake is one line and exit code 2; Ctrl-C is 130, and prints the command that goes on.', '']
    for command, target in COMMANDS.items():
        f = function_of(target)
        call = inspect.signature(f)
        plain = call.replace(parameters=[p.replace(annotation=p.empty) for p in call.parameters.values()], return_annotation=call.empty)
        lines += [f'## {command}', '', f'```python\n{wrapped(f.__name__+str(plain))}\n```', '', prose(inspect.getdoc(f)), '']
    return '\n'.join(lines)


def api() -> dict[str, str]:
    "A page for each room: what its modules' `__all__` names."
    pages = {}
    for room in ('recipes', 'report', 'production', 'training', 'layers', 'losses', 'metrics', 'data'):
        lines = [f'# fastrecipes.{room}', '']
        for file in sorted((ROOT/'fastrecipes'/room).glob('*.py')):
            text = file.read_text(encoding='utf8')
            if '__all__' not in text: continue
            lines += [f'::: fastrecipes.{room}.{file.stem}', '']
        pages[room] = '\n'.join(lines)
    core = [f'::: fastrecipes.{m}\n' for m in ('technique', 'objective', 'randomness', 'errors', 'repairs')]
    return pages | {'core': '\n'.join(['# fastrecipes', '', *core])}


def notebook(file: Path, images: Path) -> str:
    "A notebook as Markdown, its plots in `images`; links to notebooks lead to their pages."
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.read(file, as_version=4)
    nb.metadata.language_info = dict(name='python')         # which nbdev-clean leaves out, and by which code is coloured
    text, found = MarkdownExporter().from_notebook_node(nb, resources=dict(output_files_dir=images.name))
    images.mkdir(parents=True, exist_ok=True)
    for name, data in found['outputs'].items(): (images/Path(name).name).write_bytes(data)
    text = re.sub(r'<style scoped>.*?</style>', '', text, flags=re.S)
    return '---\nhide: [toc]\n---\n' + re.sub(r'\]\((\w+)\.ipynb\)', r'](\1.md)', text)         # width for its code


# Links of pages that are also read where they lie, in the repository
MOVED = {r'docs/pages/(\w+)\.md': r'\1.md', r'nbs/(\w+)\.ipynb': r'notebooks/\1.md', r'bench/RESULTS\.md': 'benchmarks.md', r'docs/assets/': 'assets/', r'README\.md': 'index.md',
         r'LICENSE': 'index.md', r'CONTRIBUTING\.md': 'contributing.md', r'CHANGELOG\.md': 'changelog.md'}


def moved(text: str, up: str = '') -> str:
    "Links within the repository as links within the site; `up` is where the page lies below the root."
    def new(m):
        target = m[1].removeprefix(up)
        for old, to in MOVED.items():
            if re.match(old, target): return f']({re.sub(old, to, target)})'
        return m[0]
    return re.sub(r'\]\((?!https?:|#)([^)]+)\)', new, text)


def pages(out: Path) -> list:
    "Write all pages below `out`; return the navigation."
    techniques, others = registry()
    books = {f.stem: json.loads(f.read_text(encoding='utf8')) for f in sorted((ROOT/'nbs').glob('*.ipynb'))}
    where, effects = shown_in(books), measured()
    from fastrecipes.cards import composition, in_order
    from fastrecipes.flags import section_of
    shutil.copytree(ROOT/'docs'/'assets', out/'assets')

    def put(name: str, text: str) -> str:
        file = out/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding='utf8')
        return name

    alone = '---\nhide: [navigation]\n---\n'               # in its tab: there is nothing to list beside it
    ordered = in_order(techniques.values())
    table = ['# Techniques', '']
    for section, group in groupby(ordered, section_of):
        table += [f'## {section}', '', '| | |', '| --- | --- |', *(f'| [`{t.name}`]({t.name}.md) | {t.summary} |' for t in group), '']
    table += ['## Which go together', '', f'```\n{composition(techniques.values())}\n```']
    tree = [{section: [{t.name: put(f'techniques/{t.name}.md', card(t, techniques, where, effects))} for t in group]} for section, group in groupby(ordered, section_of)]
    titles = {n: next(line[2:] for c in nb['cells'] for line in ''.join(c['source']).splitlines() if line.startswith('# ')).replace('*', '') for n, nb in books.items()}
    chapters = [{f'{n[:2]} {titles[n].split(":")[0]}': put(f'notebooks/{n}.md', notebook(ROOT/'nbs'/f'{n}.ipynb', out/'notebooks'/f'{n}_files'))} for n in books]
    linked = lambda text: re.sub(r'(?<!\[)`(\w+)`', lambda m: f'[{m[0]}](techniques/{m[1]}.md)' if m[1] in techniques else m[0], text)
    own = dict(guide=lambda text: alone+text, pick=linked)
    written = {f.stem: put(f.name, own.get(f.stem, str)(moved(f.read_text(encoding='utf8'), '../../'))) for f in sorted((ROOT/'docs'/'pages').glob('*.md'))}
    top = {n: put(f'{n.lower()}.md', moved((ROOT/f'{n}.md').read_text(encoding='utf8'))) for n in ('CONTRIBUTING', 'CHANGELOG')}
    return [
        {'Home': put('index.md', alone+moved((ROOT/'README.md').read_text(encoding='utf8')))},
        {'Guide': written['guide']},
        {'Cheatsheet': [put('cheatsheet.md', cheatsheet(techniques, others)), {'Pick a technique': written['pick']}, {'Errata': written['errata']}]},
        {'Notebooks': [put('notebooks/index.md', '\n'.join(['# Notebooks', '', 'Each runs in a minute or two on two cores, on data that come along; the tests run them all.', '',
                                                          *(f'- [{n}]({n}.md): {titles[n]}' for n in books)])), *chapters]},
        {'Techniques': [put('techniques/index.md', '\n'.join(table)), *tree]},
        {'Reference': [{'Recipes and commands': put('recipes.md', recipes())}, {'Methods of a Learner': put('methods.md', methods(others))},
                       {'API': [{room: put(f'api/{room}.md', text)} for room, text in api().items()]}]},
        {'About': [{'Architecture': written['architecture']}, {'Benchmarks': put('benchmarks.md', re.sub(r'<!--.*?-->\n?', '', (ROOT/'bench'/'RESULTS.md').read_text(encoding='utf8')))},
                   {'Contributing': top['CONTRIBUTING']}, {'Changes': top['CHANGELOG']}]}]


def build(out: Path) -> float:
    "Make the site in `out`; return the seconds it took. Raises on a broken link."
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    start, source = time.perf_counter(), out.with_name('docs')
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    config = load_config(str(ROOT/'docs'/'mkdocs.yml'), nav=pages(source), docs_dir=str(source), site_dir=str(out), strict=True)
    build(config)
    return time.perf_counter()-start


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', type=Path, default=ROOT/'build'/'site')
    asked = parser.parse_args()
    print(f'{asked.out}: built in {build(asked.out.resolve()):.0f} s; its search needs a server: python -m http.server -d {asked.out}')
