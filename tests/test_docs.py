"Notebooks, README and guide hold what they promise: all techniques, code that runs, links that lead somewhere, nothing from elsewhere."
import ast
import json
import re
import shlex
from contextlib import suppress
from pathlib import Path
from urllib.parse import urldefrag, urljoin

import notebooks as books
import pytest
import results
from mentions import blocks, bound, passages, techniques_in

ROOT = Path(__file__).parents[1]
NBS = sorted((ROOT/'nbs').glob('*.ipynb'))
WRITTEN = [ROOT/'README.md', ROOT/'CONTRIBUTING.md', *sorted((ROOT/'docs'/'pages').glob('*.md'))]


def prose(file: Path) -> str:
    "A page, or the text of a notebook."
    text = file.read_text(encoding='utf8')
    return text if file.suffix != '.ipynb' else '\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')


def test_every_technique_is_in_a_notebook():
    from fastrecipes.technique import discover
    assert set(discover()) == set().union(*(techniques_in(books.read(f)) for f in NBS))


def test_pages_count_right():
    from fastrecipes.technique import discover
    rows = len(re.findall(r'(?m)^\|', results.read('defects'))) - 2
    readme, changes = ((ROOT/n).read_text(encoding='utf8') for n in ('README.md', 'CHANGELOG.md'))
    assert f'| {len(discover())}, one form |' in readme
    assert f'{len(discover())} techniques' in changes
    assert f'{rows} things that fastai' in readme
    assert f'{rows} defects of fastai' in changes


@pytest.mark.parametrize('file', NBS, ids=lambda f: f.stem)
def test_what_a_notebook_shows_belongs_to_its_code_and_to_no_machine(file):
    nb = books.read(file)
    assert nb['metadata'].get('executed') == books.fingerprint(nb), f'python docs/notebooks.py nbs/{file.name}'
    assert all(c.get('execution_count') is None for c in nb['cells'])
    assert not re.search(r'/tmp/|/root/|/home/|/work/', json.dumps([c.get('outputs') for c in nb['cells']]))
    assert any(k.startswith('image/') for c in nb['cells'] for o in c.get('outputs', []) for k in o.get('data', {}))


@pytest.mark.parametrize('file', WRITTEN, ids=lambda f: f.stem)
def test_commands_of_a_page_are_commands(file):
    from fastrecipes.cli import COMMANDS, function_of
    from fastrecipes.flags import CommandLine
    for line in (li for block in blocks(file, 'sh') for li in block.splitlines()):
        words = shlex.split(line, comments=True)
        for name in ('fastrecipes', '.venv/bin/fastrecipes'):
            if name not in words[-1:] and name in words:
                command, *rest = words[words.index(name)+1:]
                CommandLine(function_of(COMMANDS[command]), command).parse(rest)


@pytest.mark.parametrize('file', [*WRITTEN, *NBS], ids=lambda f: f.stem)
def test_links_within_the_repository_lead_somewhere(file):
    links = [link for link in re.findall(r'\]\(([^)\s]+)\)', prose(file)) if not re.match(r'https?:|#|mailto:', link)]
    assert [link for link in links if not (file.parent/urldefrag(link).url).exists()] == []


@pytest.mark.parametrize('file', [*WRITTEN, *NBS], ids=lambda f: f.stem)
def test_what_a_docstring_says_no_page_says_again(file, said):
    "The site takes it from the docstring: a page would be the second place to mend."
    assert [' '.join(p) for p in passages(prose(file)) & said] == []


@pytest.fixture(scope='module')
def said():
    "The passages of all docstrings."
    trees = [ast.parse(f.read_text(encoding='utf8')) for f in (ROOT/'fastrecipes').rglob('*.py')]
    docs = [ast.get_docstring(n) for t in trees for n in ast.walk(t) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    return set().union(*(passages(d) for d in docs if d))


def test_the_names_of_the_migration_page_are_names_here():
    nb = books.read(ROOT/'nbs'/'14_from_fastxtend.ipynb')
    rows = [line.split(' | ')[1] for c in nb['cells'] if c['cell_type'] == 'markdown' for line in ''.join(c['source']).splitlines() if line.startswith('| ') and ' | ' in line]
    calls = [ast.parse(code, mode='eval').body for row in rows for code in re.findall(r'`([^`]+)`', row) if '(' in code]
    assert len(calls) > 40
    for call in (n for c in calls for n in ast.walk(c) if isinstance(n, ast.Call)): assert bound(call), ast.unparse(call)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built as `make docs` builds it, behind a server of its own."
    pytest.importorskip('mkdocs', reason='mkdocs is not installed (extra docs)')
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    import make_site
    out = tmp_path_factory.mktemp('site')/'site'
    make_site.build(out)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(out)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield out, f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


def test_the_site_has_a_card_for_each_technique_and_every_registry_in_the_cheatsheet(site):
    from fastrecipes.losses.kinds import LOSSES
    from fastrecipes.metrics.kinds import METRICS
    from fastrecipes.technique import discover
    sheet = (site[0]/'cheatsheet.html').read_text(encoding='utf8')
    for name in discover():
        assert (site[0]/'techniques'/f'{name}.html').exists()
        assert f'techniques/{name}.html' in sheet
    for name in (*LOSSES, *METRICS, 'fit_flat_cos', 'to_onnx', 'lr_find'): assert f'<code>{name}</code>' in sheet


def test_pages_are_whole_at_both_widths_and_ask_nobody_else(site, browser):
    from playwright.sync_api import TimeoutError
    out, url = site
    files = sorted(f.relative_to(out).as_posix() for f in out.rglob('*.html') if f.name != '404.html')
    anchors, links, wrong = {}, {}, []
    page = browser.new_page()
    page.on('request', lambda r: r.url.startswith((url, 'data:', 'blob:')) or wrong.append(f'{page.url} asks {r.url}'))
    page.on('response', lambda r: r.status < 400 or wrong.append(f'{page.url}: {r.status} for {r.url}'))
    page.on('pageerror', lambda e: wrong.append(f'{page.url}: {e}'))
    page.on('console', lambda m: m.type != 'error' or wrong.append(f'{page.url}: {m.text}'))
    for file in files:
        page.goto(url+file)
        for width in (1280, 390):
            page.set_viewport_size(dict(width=width, height=900))
            with suppress(TimeoutError): page.wait_for_function('document.documentElement.scrollWidth - document.documentElement.clientWidth <= 1', timeout=2000)     # menus slide
            seen = page.evaluate("""() => ({ids: [...document.querySelectorAll('[id]')].map(e => e.id), links: [...document.querySelectorAll('a[href]')].map(a => a.href),
                wide: document.documentElement.scrollWidth - document.documentElement.clientWidth, bad: document.querySelectorAll('.katex-error').length,
                raw: [...document.querySelectorAll('.arithmatex')].filter(e => !e.querySelector('.katex')).length})""")
            anchors[url+file], links[file] = set(seen['ids']), seen['links']
            bad = f'{seen["wide"]} px too wide, {seen["bad"]} formulas that cannot be set, {seen["raw"]} that were not'
            if seen['wide'] > 1 or seen['bad'] or seen['raw']: wrong.append(f'{file} at {width} px: {bad}')
    for file, found in links.items():
        for link in found:
            target, anchor = urldefrag(urljoin(url+file, link))
            if not target.startswith(url): continue
            if target.endswith('/'): target += 'index.html'
            if not (out/target.removeprefix(url)).exists(): wrong.append(f'{file}: {link} is not there')
            elif anchor and target in anchors and anchor not in anchors[target] and not anchor.startswith('__'): wrong.append(f'{file}: no {anchor} in {target}')
    assert not wrong, '\n'.join(sorted(set(wrong))[:40])
