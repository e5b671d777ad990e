"What a bundle needs to be served where fastrecipes is not: serve.pyz (predictor and server as one file), a Dockerfile, requirements."
import ast
import io
import zipfile
from importlib.metadata import version
from pathlib import Path

__all__ = ['requirements', 'serve_pyz', 'DOCKERFILE']

PREDICTING = ('onnxruntime', 'numpy', 'Pillow')
SERVING = ('Flask>=3.1', 'gunicorn>=23; platform_system != "Windows"', 'waitress>=3.0; platform_system == "Windows"')
MAIN = 'import sys\n\nfrom fastrecipes.production.serving import main\n\nsys.exit(main())\n'
ENTRY, DATA = 'fastrecipes.production.serving', ('fastrecipes/production/page.html',)
ROOT = Path(__file__).parents[2]

DOCKERFILE = """\
# docker build -t classifier . && docker run -p 5000:5000 classifier
FROM python:3.12-slim
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /bundle
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
USER 10001
EXPOSE 5000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s \\
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:5000/healthz', timeout=4)"]
CMD ["python", "serve.pyz", "--host", "0.0.0.0"]
"""


def requirements() -> str:
    "What serving installs: the predictor's packages, at least in the versions that the bundle was verified with, and a web server."
    return ''.join(f'{line}\n' for line in (*(f'{p}>={version(p)}' for p in PREDICTING), *SERVING))


def serve_pyz() -> bytes:
    "A zipapp of the server and all of fastrecipes that it imports: the same bytes from the same sources, whenever and wherever it is made."
    content = {'__main__.py': MAIN.encode()} | {name: (ROOT/name).read_bytes() for name in sorted(_sources(ENTRY) | set(DATA))}
    buffer = io.BytesIO(b'#!/usr/bin/env python3\n')
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, 'a', zipfile.ZIP_STORED) as z:        # deflated bytes depend on the version of zlib
        for name, data in content.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            z.writestr(info, data.replace(b'\r\n', b'\n'))
    return buffer.getvalue()


def _sources(module: str, found: frozenset = frozenset()) -> set[str]:
    "The files of `module` and of all of this package that it imports, packages included, relative to the root."
    name = module.replace('.', '/')
    file = f'{name}.py' if (ROOT/f'{name}.py').is_file() else f'{name}/__init__.py'
    if file in found: return set(found)
    files = set(found) | {file} | {f'{p.as_posix()}/__init__.py' for p in Path(file).parents if p.as_posix() != '.'}
    for node in ast.walk(ast.parse((ROOT/file).read_text(encoding='utf8'))):
        if isinstance(node, ast.ImportFrom) and (node.module or '').partition('.')[0] == 'fastrecipes': files |= _sources(node.module, frozenset(files))
    return files
