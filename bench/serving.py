"""Serving: requests a second, latency and the server's CPU, the cheatsheet's own server beside `fastrecipes serve`.

    python bench/serving.py [--out DIR] [--clients 16] [--rounds 5] [--seconds 4] [--write]

ResNet-18 at 64 px; 16 clients that keep their connections (the cheatsheet's server closes them) post JPEGs of 320×240 px over loopback, each the next as soon as it has its answer, from
one process without threads on the same cores. Servers: torch behind Flask's development server, as the cheatsheet has it; `fastrecipes serve` with the same network in 8 bits; with half
its channels removed, in 8 bits. All are started first and then asked in turns, so that whatever else the machine does falls on all. The weights are random: how fast a network is does
not depend on them. At last a worker of the second is killed under load."""
import argparse
import json
import os
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
from fastcore.xdg import xdg_cache_home
from PIL import Image
from results import write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ENV = {k: v for k, v in os.environ.items() if not k.startswith('OMP_')} | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), PYTHONUNBUFFERED='1')
CHEATSHEET = '''
import sys, io, json, torch, torchvision.transforms as T
from flask import Flask, request, jsonify
from PIL import Image
from torchvision.models import resnet18
labels = json.load(open(sys.argv[1]))
model = resnet18(num_classes=len(labels)).eval()
preprocess = T.Compose([T.Resize((64, 64)), T.ToTensor(), T.Normalize([.485, .456, .406], [.229, .224, .225])])
app = Flask(__name__)
@app.route('/predict', methods=['POST'])
def predict():
    image = Image.open(io.BytesIO(request.files['my_img_file'].read())).convert('RGB')
    with torch.no_grad(): p = model(preprocess(image)[None]).softmax(1)[0]
    best = p.topk(5)
    return jsonify({labels[i]: float(v) for v, i in zip(best.values, best.indices)})
import socket, logging
logging.getLogger('werkzeug').setLevel('ERROR')
with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
print(f'serving http://127.0.0.1:{port}', flush=True)
app.run(port=port)
'''


def photos(n: int = 64) -> list[bytes]:
    "JPEGs of 320×240 px: parts of scikit-learn's two photographs."
    from sklearn.datasets import load_sample_images
    rng, found = np.random.default_rng(0), []
    for i in range(n):
        image = load_sample_images().images[i % 2]
        y, x = rng.integers(0, image.shape[0]-240), rng.integers(0, image.shape[1]-320)
        Image.fromarray(image[y:y+240, x:x+320]).save(b := BytesIO(), 'JPEG', quality=90)
        found.append(b.getvalue())
    return found


def bundles(out: Path) -> dict[str, Path]:
    "ResNet-18 in 8 bits, and with half its channels; shipped once and kept in `out`."
    made = {name: out/name for name in ('int8', 'compressed')}
    if all((p/'bundle.json').exists() for p in made.values()): return made
    import torch
    from fastai.basics import Learner, accuracy
    from torchvision.models import resnet18

    from fastrecipes.data.folders import image_folder
    from fastrecipes.recipes.ship import ship
    from fastrecipes.technique import discover
    discover()
    for i, data in enumerate(photos(120)):
        (out/'photos'/f'label {i % 10}').mkdir(parents=True, exist_ok=True)
        (out/'photos'/f'label {i % 10}'/f'{i}.jpg').write_bytes(data)
    for name, path in made.items():
        torch.manual_seed(0)
        dls = image_folder(out/'photos', size=64, bs=16, valid=.3, test=0, workers=0, device=torch.device('cpu'))
        learn = Learner(dls, resnet18(num_classes=10), metrics=accuracy)
        if name == 'compressed': learn.slim(.5)
        with learn.no_bar(), learn.no_logging(): print(ship(learn.quantize('static', tolerance=100), path, overwrite=True))
    return made


@contextmanager
def started(*command):
    "A server in a process of its own: its port and its pid."
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, env=ENV)
    try:
        while not (found := re.search(r'serving http://\S+:(\d+)', line := process.stdout.readline())): assert line or process.poll() is None, command
        Thread(target=process.stdout.read, daemon=True).start()
        yield int(found[1]), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try: process.wait(20)
        except subprocess.TimeoutExpired: process.kill()


def form(data: bytes) -> bytes:
    "The request of `curl -F my_img_file=@cardigan.jpg`, connection kept."
    body = b'--x\r\nContent-Disposition: form-data; name="my_img_file"; filename="cardigan.jpg"\r\nContent-Type: image/jpeg\r\n\r\n' + data + b'\r\n--x--\r\n'
    return b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: %d\r\n\r\n' % len(body) + body


class Asker:
    "One client: a connection, the request under way, what it has received of the answer."
    def __init__(self, port, requests, selector, seen):
        self.port, self.requests, self.selector, self.seen, self.n, self.socket = port, requests, selector, seen, 0, None

    def ask(self):
        if self.socket is None:
            self.socket = socket.create_connection(('127.0.0.1', self.port))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(self.socket, selectors.EVENT_READ, self)
        self.got, self.start, self.n = b'', time.perf_counter(), self.n+1
        try: self.socket.sendall(self.requests[self.n % len(self.requests)])
        except OSError: self.over()

    def over(self):
        self.selector.unregister(self.socket)
        self.socket.close()
        self.socket = None

    def readable(self) -> str | None:
        "Read on; 'ok', the status, or 'lost' once the answer is there or cannot come any more."
        try: more = self.socket.recv(65536)
        except OSError: more = b''
        self.got += more
        head, there, body = self.got.partition(b'\r\n\r\n')
        whole = there and len(body) >= int(re.search(rb'content-length: (\d+)', head.lower())[1])
        if more and not whole: return None
        if not more or b'connection: close' in head.lower(): self.over()
        if not whole: return 'lost'
        status = head.split(b' ', 2)[1].decode()
        self.seen.append(time.perf_counter()-self.start)
        return 'ok' if status == '200' else status


def load(port: int, requests: list[bytes], clients: int, seconds: float, after=None) -> tuple[list[float], dict[str, int], float]:
    "Latencies in s, answers by kind, seconds it took; `after` = (seconds, what to do then). Raises where any client waits for more than 10 s."
    selector, seen, kinds, start = selectors.DefaultSelector(), [], {}, time.perf_counter()
    askers = [Asker(port, requests[i:] + requests[:i], selector, seen) for i in range(clients)]
    for a in askers: a.ask()
    while (now := time.perf_counter()-start) < seconds:
        if after and now > after[0]: after = after[1]()
        ready = selector.select(.2)
        for key, _ in ready:
            a = key.data
            if kind := a.readable():
                kinds[kind] = kinds.get(kind, 0)+1
                a.ask()
        assert all(time.perf_counter()-a.start < 10 for a in askers), 'a client waits'
    for a in askers:
        if a.socket: a.over()
    return seen, kinds, now


def cpu(pid: int) -> float:
    "Seconds of CPU that a process and its children have used."
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(sum(p.cpu_times()[:2]) for p in tree)


def compare(servers: dict, requests, clients: int, rounds: int, seconds: float) -> dict[str, list[dict]]:
    found = {name: [] for name in servers}
    for port, _ in servers.values(): load(port, requests, clients, 1.)
    for i in range(rounds):
        for name, (port, pid) in servers.items():
            before = cpu(pid)
            seen, kinds, took = load(port, requests, clients, seconds)
            assert set(kinds) == {'ok'}, (name, kinds)
            found[name].append(dict(rate=len(seen)/took, p50=1e3*statistics.median(seen), p99=1e3*float(np.quantile(seen, .99)), cpu=1e3*(cpu(pid)-before)/len(seen)))
        print(f'round {i+1}: ' + ', '.join(f'{name} {v[-1]["rate"]:.0f}/s' for name, v in found.items()), flush=True)
    return found


def killed(port: int, pid: int, requests, clients: int, seconds: float) -> str:
    "A worker killed under load: what was lost, and the longest that anybody waited."
    victim = psutil.Process(pid).children()[0]
    seen, kinds, took = load(port, requests, clients, max(seconds, 3.), after=(1., victim.kill))
    lost = kinds.pop('lost', 0)
    assert set(kinds) == {'ok'} and lost <= clients, (kinds, lost)
    return (f'A worker of `fastrecipes serve` killed under load: {lost} requests that it had under way were lost, of {lost+sum(kinds.values()):,}; '
            f'all others were answered, the slowest in {1e3*max(seen):.0f} ms; it was replaced: {len(psutil.Process(pid).children())} workers at the end.')


def table(found: dict[str, list[dict]]) -> str:
    of = {name: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for name, rows in found.items()}
    base = next(iter(of.values()))
    lines = ['| server | requests/s: median (range) | p50, ms | p99, ms | server CPU, ms a request | requests/s × |', '| --- | ---: | ---: | ---: | ---: | ---: |']
    for name, m in of.items():
        rates = [r['rate'] for r in found[name]]
        lines.append(f'| {name} | {m["rate"]:.0f} ({min(rates):.0f}–{max(rates):.0f}) | {m["p50"]:.0f} | {m["p99"]:.0f} | {m["cpu"]:.2f} | {m["rate"]/base["rate"]:.1f} |')
    return '\n'.join(lines)


def main(out: Path, clients: int, rounds: int, seconds: float) -> str:
    out.mkdir(parents=True, exist_ok=True)
    made, requests = bundles(out), [form(data) for data in photos()]
    (out/'cheatsheet.py').write_text(CHEATSHEET)
    (out/'labels.json').write_text(json.dumps([f'label {i}' for i in range(10)]))
    with ExitStack() as stack:
        servers = {'torch, Flask\'s development server': stack.enter_context(started(out/'cheatsheet.py', out/'labels.json'))}
        for name, what in (('int8', 'fastrecipes serve, 8 bits'), ('compressed', 'fastrecipes serve, half the channels, 8 bits')):
            servers[what] = stack.enter_context(started('-m', 'fastrecipes', 'serve', made[name], '--port', '0'))
        found = compare(servers, requests, clients, rounds, seconds)
        port, pid = servers['fastrecipes serve, 8 bits']
        dead = killed(port, pid, requests, clients, seconds) if len(psutil.Process(pid).children()) > 1 else 'One core, one worker: none was killed.'
    return f'{clients} clients, {rounds} rounds of {seconds:g} s in turns, {os.cpu_count()} hardware threads shared with the clients.\n\n{table(found)}\n\n{dead}'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', type=Path, default=xdg_cache_home()/'fastrecipes'/'serving')
    for name, default in (('clients', 16), ('rounds', 5), ('seconds', 4.)): parser.add_argument(f'--{name}', type=type(default), default=default)
    parser.add_argument('--write', action='store_true')
    asked = vars(parser.parse_args())
    to_write = asked.pop('write')
    said = main(**asked)
    print(said)
    if to_write: write('serving', f'## Serving\n\n`python bench/serving.py --clients {asked["clients"]} --rounds {asked["rounds"]} --seconds {asked["seconds"]:g}`\n\n{said}')
