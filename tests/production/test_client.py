"The Python client against the application on a socket, and against servers that misbehave."
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from fastrecipes.errors import BadName, BadValue, NotThere
from fastrecipes.production import client as module
from fastrecipes.production.client import Client, Unavailable

from .serving import in_process
from .shares import LABELS, encoded, shares_of, write_shares


@pytest.fixture(scope='module')
def url(tmp_path_factory):
    with in_process(write_shares(tmp_path_factory.mktemp('c')/'bundle')) as url: yield url


@contextmanager
def scripted(*answers):
    "A server that gives these answers, (status, headers, body), one a connection, and keeps what it was asked; a None closes without a word."
    listening, asked = socket.create_server(('127.0.0.1', 0)), []
    def run():
        for answer in answers:
            try: s, _ = listening.accept()
            except OSError: return
            with s:
                s.settimeout(10)
                got = s.recv(65536)
                asked.append(got)
                if answer is None: continue
                status, headers, body = answer
                s.sendall(f'HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n'.encode() + body)
    Thread(target=run, daemon=True).start()
    try: yield f'http://127.0.0.1:{listening.getsockname()[1]}', asked
    finally: listening.close()


def test_a_path_bytes_a_file_and_an_image_give_the_same(url, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8))
    (tmp_path/'a.png').write_bytes(data := encoded(image))
    client = Client(url)
    got = [client.predict(x) for x in (tmp_path/'a.png', str(tmp_path/'a.png'), data, BytesIO(data), image)]
    assert got[0] and all(g == got[0] for g in got) and client.predict([data, data]) == got[:2]
    assert list(client.predict(encoded((50, 10, 140)), k=2).items()) == list(shares_of(50, 10, 140).items())[:2]


def test_ready_and_card(url):
    assert Client(url + '/').ready() and Client(url).card()['labels'] == LABELS


def test_one_client_serves_many_threads(url):
    client = Client(url)
    with ThreadPoolExecutor(8) as pool: assert list(pool.map(lambda i: client.predict(encoded((i, 9, 9))), range(60))) == [shares_of(i, 9, 9) for i in range(60)]


def test_a_refusal_is_raised_in_the_servers_words(url):
    with pytest.raises(BadValue, match='not an image, or of an unknown kind'): Client(url).predict(b'no')
    with pytest.raises(BadValue, match='k: one whole number'): Client(url).predict(encoded((1, 2, 3)), k=0)


def test_a_file_that_is_not_there_is_named(url):
    with pytest.raises(NotThere, match='none.png: no such file'): Client(url).predict('none.png')
    with pytest.raises(BadValue, match='got int'): Client(url).predict(3)


def test_a_keyword_that_there_is_not_is_named(url):
    with pytest.raises(BadName, match="^Client.predict: no argument 'kk'; did you mean 'k'"): Client(url).predict(b'no', kk=3)
    with pytest.raises(BadName, match="^Client: no argument 'time_out'; did you mean 'timeout'"): Client(url, time_out=3)


BUSY, GOOD = (503, 'Retry-After: 7\r\n', b'{"error": "busy"}'), (200, '', b'{"cat": 0.9}')


def test_a_busy_server_is_asked_again_after_as_long_as_it_says(monkeypatch):
    slept = []
    monkeypatch.setattr(module.time, 'sleep', slept.append)
    with scripted(BUSY, (503, 'Retry-After: soon\r\n', b'{"error": "busy"}'), GOOD) as (url, asked): assert Client(url).predict(b'abc', k=3) == dict(cat=.9)
    assert slept == [7., 1.] and len(asked) == 3 and all(a.startswith(b'POST /predict?k=3 HTTP/1.1\r\n') for a in asked)


def test_a_server_that_stays_busy_is_unavailable(monkeypatch):
    slept = []
    monkeypatch.setattr(module.time, 'sleep', slept.append)
    with scripted(BUSY, BUSY, BUSY) as (url, _):
        with pytest.raises(Unavailable, match='busy'): Client(url, retries=2).predict(b'abc')
    assert slept == [7., 7.]


def test_a_connection_that_was_closed_meanwhile_is_made_anew():
    keep = lambda body: f'HTTP/1.1 200 X\r\nContent-Length: {len(body)}\r\n\r\n{body}'.encode()
    listening, n = socket.create_server(('127.0.0.1', 0)), []
    def run():
        for _ in range(2):
            s, _ = listening.accept()
            with s:
                s.recv(65536)
                n.append(1)
                s.sendall(keep(json.dumps(dict(cat=len(n)))))
    Thread(target=run, daemon=True).start()
    client = Client(f'http://127.0.0.1:{listening.getsockname()[1]}', timeout=10)
    assert client.predict(b'a') == dict(cat=1) and client.predict(b'a') == dict(cat=2)
    listening.close()


@pytest.mark.parametrize('answer, says', [((500, '', b'{"error": "the server failed"}'), 'the server failed'), ((200, '', b'<html>'), 'no JSON; is it'), (None, 'does not answer'),
                                          ((502, '', b'["x"]'), 'status 502')])
def test_other_answers_are_unavailable(answer, says):
    with scripted(answer) as (url, _), pytest.raises(Unavailable, match=says): Client(url, retries=0).card()


def test_no_server_is_unavailable_and_not_ready():
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    client = Client(f'http://127.0.0.1:{port}')
    assert not client.ready()
    with pytest.raises(ConnectionError, match=f'http://127.0.0.1:{port} does not answer'): client.card()


@pytest.mark.parametrize('kwargs, says', [(dict(url='localhost:5000'), 'url: http://HOST:PORT'), (dict(url='ftp://x'), 'url'), (dict(timeout=0), 'timeout'),
                                          (dict(retries=-1), 'retries')])
def test_bad_settings_are_refused(kwargs, says):
    with pytest.raises(BadValue, match=says): Client(**kwargs)
