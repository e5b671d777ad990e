"""Execute notebooks, and keep what they show: plots, tables, what they print.

    python docs/notebooks.py [--all] [nbs/01_data.ipynb …]

By default those whose code has changed since they were executed. Plots are stored small; folders of temporary files are left out, and so is what went to stderr. A test asks
that what is kept belongs to the code beside it (`fingerprint`)."""
import argparse
import io
import json
import os
import re
import sys
import time
from base64 import b64decode, b64encode
from hashlib import sha256
from pathlib import Path

NBS = Path(__file__).resolve().parents[1]/'nbs'
SHOWN = ('image/png', 'text/html', 'text/plain')


def fingerprint(nb: dict) -> str:
    "Of the code of all cells."
    return sha256('\0'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code').encode()).hexdigest()[:16]


def read(file: Path) -> dict: return json.loads(file.read_text(encoding='utf8'))


def small(png: str) -> dict[str, str]:
    "A plot by its kind of file, at most 1,000 px wide: in 256 colours, or, where that is large still, for it is of photographs, a JPEG."
    from PIL import Image
    image = Image.open(io.BytesIO(b64decode(png))).convert('RGB')
    image.thumbnail((1000, 2000))
    image.quantize(256, dither=Image.Dither.NONE).save(b := io.BytesIO(), 'PNG', optimize=True)
    if photographs := b.tell() > 60_000: image.save(b := io.BytesIO(), 'JPEG', quality=80)
    return {'image/jpeg' if photographs else 'image/png': b64encode(b.getvalue()).decode()}


def scrubbed(text: str) -> str:
    "Without the folder of this machine that temporary files are in, and without the control characters of a progress bar."
    text = re.sub(r'(?:/\w+)*/tmp\w{8}/?', '', text)
    return re.sub(r'.*\r(?!\n)|\x1b\[[0-9;]*m', '', text)


def kept(outputs: list) -> list:
    "What a reader needs of what a cell gave."
    out = []
    for o in outputs:
        if o['output_type'] == 'stream':
            if o['name'] == 'stdout' and (text := scrubbed(''.join(o['text']))).strip(): out.append(dict(name='stdout', output_type='stream', text=text.splitlines(keepends=True)))
            continue
        if o['output_type'] == 'error': raise RuntimeError('\n'.join(o['traceback']))
        data = {k: ''.join(v) for k, v in o['data'].items() if k in SHOWN}
        if 'image/png' in data: data = small(data['image/png'])
        data = {k: v if k.startswith('image') else scrubbed(v).splitlines(keepends=True) for k, v in data.items()}
        if data: out.append(dict(o, data=data, metadata={}) | ({'execution_count': None} if o['output_type'] == 'execute_result' else {}))
    return out


def execute(file: Path) -> float:
    "Run all cells of `file`, store what they gave, and return the seconds it took."
    from execnb.shell import CaptureShell
    nb, shell, start = read(file), CaptureShell(path=file.parent), time.perf_counter()
    for c in nb['cells']:
        if c['cell_type'] != 'code': continue
        try: c['outputs'] = kept(shell.run(''.join(c['source'])))
        except RuntimeError as e: sys.exit(f'{file.name}: {e}')
        c['execution_count'] = None
    nb['metadata']['executed'] = fingerprint(nb)
    part = file.with_suffix('.part')
    part.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True)+'\n', encoding='utf8')
    part.rename(file)
    return time.perf_counter()-start


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('files', type=Path, nargs='*')
    parser.add_argument('--all', action='store_true', help='those, too, whose code is as it was')
    asked = parser.parse_args()
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    for file in asked.files or sorted(NBS.glob('*.ipynb')):
        if not asked.all and read(file)['metadata'].get('executed') == fingerprint(read(file)): continue
        if (pid := os.fork()) == 0:             # each in a process of its own: what one registers or patches is not there for the next
            print(f'{file.name}: {execute(file.resolve()):.0f} s', flush=True)
            os._exit(0)
        if os.waitpid(pid, 0)[1]: sys.exit(1)
