"""The server against what no client should send: uploads with bytes changed, and whatever Schemathesis makes of its description.

    python bench/serving_fuzz.py [--out DIR] [--requests 20000] [--examples 200] [--seed 0] [--write]

Files of every kind that Pillow writes, each with bytes flipped, cut off, doubled, spliced with another's or replaced by numbers that break parsers, sent as a form or as
they are; one in ten with the form's own framing changed as well. Over loopback, eight connections, to `fastrecipes serve`. No answer may be a 5xx but 503, no worker may die, nothing
may be said on stderr, and the memory of the workers must stay flat. Schemathesis runs where it is installed: `uv pip install schemathesis`, or --target a folder in PYTHONPATH."""
import argparse
import importlib.util
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from io import BytesIO
from pathlib import Path
from threading import local

import numpy as np
import psutil
from fastcore.xdg import xdg_cache_home
from PIL import Image
from results import write
from serving import ENV, bundles, started

KINDS = [('JPEG', 'RGB'), ('JPEG', 'L'), ('JPEG', 'CMYK'), ('PNG', 'RGB'), ('PNG', 'RGBA'), ('PNG', 'P'), ('PNG', 'I;16'), ('GIF', 'P'), ('WEBP', 'RGB'), ('TIFF', 'RGB'),
         ('BMP', 'RGB'), ('ICO', 'RGBA'), ('PPM', 'RGB'), ('TGA', 'RGB'), ('PCX', 'RGB'), ('JPEG2000', 'RGB'), ('AVIF', 'RGB'), ('DDS', 'RGBA'),
         ('SGI', 'RGB'), ('IM', 'RGB'), ('MPO', 'RGB')]
NUMBERS = [b'\0\0\0\0', b'\xff\xff\xff\xff', b'\x7f\xff\xff\xff', b'\x80\0\0\0', b'\xff\xfe', b'\0\x01', b'\x7f\xff']
ALLOWED = {200, 400, 408, 413, 415, 503}


def seeds() -> list[bytes]:
    "A small image of each kind that this Pillow writes."
    rng, found = np.random.default_rng(0), []
    image = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    for kind, mode in KINDS:
        im = Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16)*257) if mode == 'I;16' else image.convert(mode)
        try: im.save(b := BytesIO(), kind)
        except (KeyError, OSError, ValueError): continue
        found.append(b.getvalue())
    return found


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    "`data` with one to eight changes, each of a random kind, near the beginning more often than not: there are the headers."
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if not data: return b''
        at = rng.randrange(min(len(data), 64) if rng.random() < .6 else len(data))
        match rng.randrange(7):
            case 0: data[at] ^= 1 << rng.randrange(8)
            case 1: data[at] = rng.randrange(256)
            case 2: del data[at:at+rng.randint(1, 64)]
            case 3: data[at:at] = data[at:at+rng.randint(1, 64)]
            case 4: data[at:at+4] = rng.choice(NUMBERS)
            case 5: data[at:] = (other := rng.choice(others))[rng.randrange(len(other)):]
            case 6: data = data[:max(at, 1)]
    return bytes(data)


def framed(data: bytes, others, rng: random.Random) -> tuple[bytes, str]:
    "Body and content type: as they are, as a form, or as a form that is broken."
    if rng.random() < .4: return data, rng.choice(['application/octet-stream', 'image/jpeg', 'image/x', 'application/x-www-form-urlencoded'])
    body = b'--x\r\nContent-Disposition: form-data; name="my_img_file"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n' + data + b'\r\n--x--\r\n'
    return (mutated(body, others, rng) if rng.random() < .17 else body), 'multipart/form-data; boundary=x'


def memory(pid: int) -> float:
    "MB that the workers hold."
    return sum(p.memory_info().rss for p in psutil.Process(pid).children())/1e6


def mutations(port: int, pid: int, n: int, seed: int) -> str:
    originals, mine, statuses, sizes = seeds(), local(), Counter(), []
    workers = {p.pid for p in psutil.Process(pid).children()}

    def send(i: int) -> int:
        rng = random.Random(f'{seed}/{i}')
        body, kind = framed(mutated(rng.choice(originals), originals, rng), originals, rng)
        for _ in range(2):                  # a server may close a connection that it has kept
            connection = getattr(mine, 'connection', None) or HTTPConnection('127.0.0.1', port, timeout=60)
            mine.connection = connection
            try:
                connection.request('POST', f'/predict?k={rng.choice([1, 5, 5, 0])}', body, {'Content-Type': kind})
                response = connection.getresponse()
                response.read()
                return response.status
            except (HTTPException, ConnectionError):
                connection.close()
                mine.connection = None
        raise AssertionError(f'request {i} was not answered')

    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        for i in range(0, n, 500):
            statuses.update(pool.map(send, range(i, min(n, i+500))))
            sizes.append(memory(pid))
            print(f'{min(n, i+500):,} requests, {sizes[-1]:.0f} MB, {dict(sorted(statuses.items()))}', flush=True)
    assert set(statuses) <= ALLOWED, statuses
    assert {p.pid for p in psutil.Process(pid).children()} == workers, 'a worker died'
    quarter = max(1, len(sizes)//4)
    second, last = statistics.median(sizes[quarter:2*quarter] or sizes), statistics.median(sizes[-quarter:])
    assert last <= 1.1*second + 5, f'memory grows: {second:.0f} MB in the second quarter, {last:.0f} MB in the last'
    of = ', '.join(f'{k}: {v:,}' for k, v in sorted(statuses.items()))
    return (f'{n:,} mutated uploads of {len(originals)} kinds of files in {time.perf_counter()-start:.0f} s (seed {seed}): answers {of}; no worker died; '
            f'the workers\' memory was {sizes[0]:.0f} MB after {min(n, 500)} requests, {second:.0f} MB in the second quarter, {last:.0f} MB in the last.')


def described(out: Path, port: int, examples: int, seed: int) -> str:
    "Schemathesis on the server's own description."
    if importlib.util.find_spec('schemathesis') is None: return 'Schemathesis is not installed: it did not run.'
    command = ['run', f'http://127.0.0.1:{port}/openapi.json', '--checks', 'all', '--max-examples', str(examples), '--seed', str(seed), '--no-color',
               '--exclude-checks', 'positive_data_acceptance']        # its images are random bytes: that they are refused is right
    done = subprocess.run([sys.executable, '-c', 'from schemathesis.cli import schemathesis; schemathesis()', *command], capture_output=True, text=True,
                          env=ENV, cwd=out)         # where it leaves its notes
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, 'Schemathesis found something'
    cases = re.search(r'(\d[\d,]*) generated', done.stdout)
    return f'Schemathesis, all checks but that random bytes are accepted as an image, {examples} examples an operation: {cases[1] if cases else "all"} cases, no failure.'


def main(out: Path, requests: int, examples: int, seed: int) -> str:
    out.mkdir(parents=True, exist_ok=True)
    bundle, errors = bundles(out)['compressed'], out/'stderr.txt'
    command = 'import os, sys; os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2); from fastrecipes.cli import main; sys.exit(main(sys.argv[2:]))'
    with started('-c', command, errors, 'serve', bundle, '--port', '0', '--max_mb', '1') as (port, pid):
        said = [mutations(port, pid, requests, seed), described(out, port, examples, seed)]
    lines = errors.read_text(errors='replace').splitlines()
    noise = [line for line in lines if not line.startswith(('TIFF', 'libpng', 'Fax'))]      # C libraries
    assert not noise, noise[:20]
    return '\n\n'.join([*said, f'{os.cpu_count()} hardware threads; nothing on stderr.'])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', type=Path, default=xdg_cache_home()/'fastrecipes'/'serving')
    for name, default in (('requests', 20_000), ('examples', 200), ('seed', 0)): parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--write', action='store_true')
    asked = vars(parser.parse_args())
    to_write = asked.pop('write')
    said = main(**asked)
    print(said)
    how = f'python bench/serving_fuzz.py --requests {asked["requests"]} --examples {asked["examples"]}'
    if to_write: write('serving_fuzz', f'## Serving what no client should send\n\n`{how}`\n\n{said}')
