"The server as users start it: real processes, real sockets, the cheatsheet's own lines."
import importlib.util
import json
import os
import re
import signal
import socket
import struct
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from fastrecipes.errors import BadValue, NotThere
from fastrecipes.production import serving
from fastrecipes.production.predictor import Predictor
from fastrecipes.production.serving import cores, run_server

from .serving import ENV, served
from .shares import encoded, shares_of, write_shares

if os.name == 'nt': pytest.skip('gunicorn is for Unix', allow_module_level=True)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    folder = write_shares(tmp_path_factory.mktemp('served')/'bundle')
    (folder/'cardigan.jpg').write_bytes(encoded((50, 10, 140), 'JPEG'))
    return folder


@pytest.fixture(scope='module')
def server(bundle):
    with served(bundle, '--workers', '2', '--threads', '6', '--timeout', '2', '--max_mb', '1') as s: yield s


def workers_of(process) -> set[int]:
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    if children.exists(): return set(map(int, children.read_text().split()))
    return set(map(int, subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()))


def exchange(port, *parts, wait=0., timeout=20.) -> bytes:
    "Send the parts, `wait` seconds apart; all that comes back until the server closes."
    with socket.create_connection(('localhost', port), timeout=timeout) as s:
        for i, part in enumerate(parts):
            if i: time.sleep(wait)
            s.sendall(part)
        got = b''
        while more := s.recv(65536): got += more
        return got


def head(n: int, more='') -> bytes: return f'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {n}\r\nConnection: close\r\n{more}\r\n'.encode()


def test_the_cheatsheets_own_lines_run(server, bundle):
    expected = {label: round(p, 4) for label, p in Predictor(bundle)(bundle/'cardigan.jpg', k=5).items()}
    at = lambda line: line.replace(':5000', f':{server.port}')
    curl = subprocess.run(at('curl -X POST -F my_img_file=@cardigan.jpg http://localhost:5000/predict'), shell=True, cwd=bundle, capture_output=True, text=True)
    assert curl.returncode == 0 and list(json.loads(curl.stdout).items()) == list(expected.items())
    here = Path.cwd()
    os.chdir(bundle)
    try: answer = eval(at("requests.post('http://localhost:5000/predict', files={'my_img_file': open('cardigan.jpg','rb')}).json()"), dict(requests=requests))
    finally: os.chdir(here)
    assert list(answer.items()) == list(expected.items()) and list(answer) == ['blue', 'rött', 'green']


def test_metrics_are_of_all_workers_whoever_answers(server):
    count = lambda: int((re.search(r'requests_total\{route="/predict",status="200"\} (\d+)', requests.get(f'{server.url}/metrics').text) or [0, 0])[1])
    before = count()
    with ThreadPoolExecutor(4) as pool:                             # fewer than one worker takes at once: none is turned away
        got = list(pool.map(lambda i: requests.post(f'{server.url}/predict', encoded((i, 10, 140)), headers={'Content-Type': 'image/png'}).json(), range(60)))
    assert got == [shares_of(i, 10, 140) for i in range(60)]
    assert [count() for _ in range(10)] == [before+60]*10           # new connections: either worker answers


def test_a_killed_worker_is_replaced_and_the_others_answer(server):
    before = workers_of(server)
    assert len(before) == 2
    os.kill(victim := min(before), signal.SIGKILL)
    for _ in range(20): assert requests.post(f'{server.url}/predict', encoded((9, 8, 7)), headers={'Content-Type': 'image/png'}, timeout=10).json() == shares_of(9, 8, 7)
    until = time.monotonic()+20
    while len(now := workers_of(server) - {victim}) < 2 and time.monotonic() < until: time.sleep(.05)
    assert len(now) == 2 and now & before
    assert requests.get(f'{server.url}/readyz', timeout=10).json() == dict(status='ready')


def test_an_upload_that_is_too_large_is_told_so(server):
    answer = requests.post(f'{server.url}/predict', files={'my_img_file': b'x'*1_100_000})
    assert (answer.status_code, answer.json()) == (413, {'error': 'the upload is larger than 1 MB'})
    chunked = requests.post(f'{server.url}/predict', data=(b'x'*100_000 for _ in range(12)), headers={'Content-Type': 'image/png'})       # no Content-Length to go by
    assert (chunked.status_code, chunked.json()) == (413, {'error': 'the upload is larger than 1 MB'})


def test_what_pillow_logs_of_an_upload_is_not_printed(server):
    tiff = encoded((50, 10, 140), 'TIFF')
    many = tiff.replace(struct.pack('<HHIH', 277, 3, 1, 3), struct.pack('<HHIH', 277, 3, 1, 34307))      # samples per pixel
    assert many != tiff and requests.post(f'{server.url}/predict', files={'my_img_file': tiff}).status_code == 200
    assert requests.post(f'{server.url}/predict', files={'my_img_file': many}).status_code == 415
    time.sleep(.1)
    assert 'samples per pixel' not in ''.join(server.said), server.said


def test_an_upload_that_ends_early_is_told_so(server):
    data = encoded((1, 2, 3))
    with socket.create_connection(('localhost', server.port), timeout=20) as s:
        s.sendall(head(len(data)) + data[:20])
        s.shutdown(socket.SHUT_WR)
        got = b''.join(iter(lambda: s.recv(65536), b''))
    assert b' 408 ' in got.split(b'\r\n')[0] and b'did not arrive whole' in got


def test_slow_clients_time_out_and_hold_nobody_up(server):
    "More than there are threads in both workers: headers that never end, bodies that never end, bodies that trickle."
    data, start = encoded((1, 2, 3)), time.monotonic()
    with ThreadPoolExecutor(18) as pool:
        headers = [pool.submit(exchange, server.port, b'POST /predict HTTP/1.1\r\nHost: x\r\n') for _ in range(6)]
        bodies = [pool.submit(exchange, server.port, head(len(data)), data[:10]) for _ in range(6)]
        drips = [pool.submit(exchange, server.port, head(9999), *[b'x']*8, wait=.4) for _ in range(6)]
        time.sleep(.3)
        assert requests.post(f'{server.url}/predict', data, headers={'Content-Type': 'image/png'}, timeout=15).status_code in (200, 503)
        got = [f.result() for f in bodies]
        assert all(b'200 OK' not in f.result() for f in headers)
        assert all(f.exception() or b'200 OK' not in f.result() for f in drips)
    assert time.monotonic()-start < 14
    assert any(b' 408 ' in g.split(b'\r\n')[0] for g in got) and all(b' 200 ' not in g for g in got)
    assert requests.post(f'{server.url}/predict', data, headers={'Content-Type': 'image/png'}, timeout=5).status_code == 200


def test_sigterm_lets_a_request_under_way_finish_and_takes_no_other(bundle):
    with served(bundle, '--workers', '1') as s, ThreadPoolExecutor(1) as pool:
        data = encoded((50, 10, 140))
        under_way = pool.submit(exchange, s.port, head(len(data)), data[:30], data[30:], wait=2.5)
        time.sleep(1.)
        s.send_signal(signal.SIGTERM)             # half of the upload is there
        time.sleep(.5)
        assert not under_way.done() and s.poll() is None
        assert json.loads(under_way.result(10).partition(b'\r\n\r\n')[2]) == shares_of(50, 10, 140)
        assert s.wait(15) == 0
        with pytest.raises(OSError): socket.create_connection(('localhost', s.port), timeout=2)
    assert 'terminate' not in ''.join(s.said) and len(s.said) == 1, s.said      # onnxruntime's threads, forked or left to the end, abort the process


@pytest.mark.skipif(importlib.util.find_spec('waitress') is None, reason='waitress is not installed (it is for Windows)')
def test_waitress_answers_the_same_and_ends_on_sigterm(bundle):
    with served(bundle, '--waitress') as s:
        answer = requests.post(f'{s.url}/predict', files={'my_img_file': (bundle/'cardigan.jpg').read_bytes()})
        assert answer.json() == {label: round(p, 4) for label, p in Predictor(bundle)(bundle/'cardigan.jpg').items()}
        assert requests.post(f'{s.url}/predict', files={'my_img_file': b'no'}).status_code == 415
        s.send_signal(signal.SIGTERM)
        assert s.wait(15) == 0


def test_what_cannot_be_served_is_said_before_anything_is(bundle, tmp_path, monkeypatch):
    for changes, says in ((dict(port=70000), 'port: at most 65535'), (dict(port=-1), 'port: at least 0, got -1'), (dict(workers=0), 'workers: at least 1'),
                          (dict(threads=1), 'threads: at least 2'), (dict(timeout=0), 'timeout: at least 1'), (dict(max_mb=0), 'max_mb: at least 0.001'),
                          (dict(host='no such host'), "host: 'no such host' is not an address"), (dict(waitress=True, workers=2), 'waitress is one process')):
        with pytest.raises(BadValue, match=re.escape(says)): run_server(bundle, **changes)
    with pytest.raises(NotThere, match='does not exist'): run_server(tmp_path/'none')
    with socket.create_server(('127.0.0.1', 0)) as s:
        with pytest.raises(BadValue, match=f'port: {s.getsockname()[1]} on 127.0.0.1 cannot be had .*in use.*another --port'): run_server(bundle, port=s.getsockname()[1])
    broken = write_shares(tmp_path/'broken')
    (broken/'model.onnx').write_bytes(b'x')
    done = subprocess.run([*serving_command(), str(broken), '--port', '0'], capture_output=True, text=True, env=ENV, timeout=60)
    assert (done.returncode, done.stdout) == (2, '') and re.fullmatch(r'fastrecipes: bundle: .*model.onnx is not the file that was shipped.*\n', done.stderr)


def serving_command():
    import sys
    return sys.executable, '-m', 'fastrecipes', 'serve'


def test_cores_are_what_the_container_grants(monkeypatch, tmp_path):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(8)), raising=False)
    for text, n in (('max 100000', 8), ('150000 100000', 2), ('50000 100000', 1), ('9900000 100000', 8), ('garbage', 8)):
        monkeypatch.setattr(serving.Path, 'read_text', lambda self, text=text: text)
        assert cores() == n
