"The web server asked from Python: `Client('http://localhost:5000').predict('cat.jpg')`. Nothing but the standard library."
import io
import json
import os
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from threading import local
from urllib.parse import urlsplit

from fastrecipes.arguments import checked
from fastrecipes.errors import BadValue, NotThere, UserError

__all__ = ['Client', 'Unavailable']


class Unavailable(UserError, ConnectionError):
    "No server, none that is ready, or one that failed."


class Client:
    """A server started by `fastrecipes serve` or `serve.pyz`; one Client may be used by many threads, each keeps its connection.

    `timeout`: seconds to wait for an answer; `retries`: how often to come back to a server that is busy (503), after as many seconds as it asks for.
    Raises `ValueError` for a `url` that is no http address, and for numbers below 0."""
    @checked
    def __init__(self, url: str = 'http://localhost:5000', timeout: float = 30., retries: int = 5):
        parts = urlsplit(url)
        if parts.scheme not in ('http', 'https') or not parts.hostname: raise BadValue(f'url: http://HOST:PORT, got {url!r}')
        if timeout <= 0: raise BadValue(f'timeout: more than 0 s, got {timeout:g}')
        if retries < 0: raise BadValue(f'retries: at least 0, got {retries}')
        self.url, self.timeout, self.retries, self.base = url.rstrip('/'), timeout, retries, parts.path.rstrip('/')
        self._open = lambda: (HTTPSConnection if parts.scheme == 'https' else HTTPConnection)(parts.hostname, parts.port, timeout=timeout)
        self._mine = local()

    def __repr__(self): return f'Client({self.url!r})'

    @checked
    def predict(self, x, k: int = 5):
        """`{label: probability}` of the `k` best labels, best first, for a path, bytes, binary file or Pillow image; a list gives a list.

        Raises `ValueError` with the server's sentence where it refuses the image, `ConnectionError` where it does not answer or is still busy."""
        if isinstance(x, (list, tuple)): return [self.predict(one, k) for one in x]
        return self._asked('POST', f'/predict?k={k}', _bytes(x))

    def ready(self) -> bool:
        "Whether the server answers, and has its model."
        try: return self._answer('GET', '/readyz')[0] == 200
        except Unavailable: return False

    def card(self) -> dict:
        "What the server tells of its model: labels, input, metrics, size, date."
        return self._asked('GET', '/card')

    def _asked(self, method: str, path: str, body: bytes | None = None):
        for left in range(self.retries, -1, -1):
            status, wait, text = self._answer(method, path, body)
            if status != 503 or not left: break
            time.sleep(wait)
        try: answer = json.loads(text)
        except ValueError: raise Unavailable(f'{self.url}: status {status}, and no JSON; is it a fastrecipes server?') from None
        if status == 200: return answer
        why = answer.get('error', f'status {status}') if isinstance(answer, dict) else f'status {status}'
        raise (BadValue if status < 500 else Unavailable)(f'{self.url}: {why}')

    def _answer(self, method: str, path: str, body: bytes | None = None) -> tuple[int, float, bytes]:
        "Status, seconds to wait, body; over the connection of this thread, or a new one where the server has closed that meanwhile."
        kept = getattr(self._mine, 'connection', None)
        for connection in ([kept] if kept else []) + [self._open()]:
            try:
                connection.request(method, self.base + path, body, {'Content-Type': 'application/octet-stream'} if body is not None else {})
                response = connection.getresponse()
                text = response.read()
            except (OSError, HTTPException) as e:
                connection.close()
                self._mine.connection = None
                if connection is kept and not isinstance(e, TimeoutError): continue
                raise Unavailable(f'{self.url} does not answer ({e or type(e).__name__})') from None
            self._mine.connection = None if response.will_close else connection
            if response.will_close: connection.close()
            return response.status, _seconds(response.getheader('Retry-After')), text
        raise AssertionError('a connection of our own answers or raises')


def _seconds(retry_after: str | None) -> float:
    try: return min(60., max(0., float(retry_after or 1)))
    except ValueError: return 1.        # a date, as a proxy may send


def _bytes(x) -> bytes:
    "What is sent for an image; a Pillow image as PNG, which loses nothing."
    if isinstance(x, (bytes, bytearray, memoryview)): return bytes(x)
    if isinstance(x, (str, os.PathLike)):
        try: return Path(x).read_bytes()
        except OSError as e: raise NotThere(f'{x}: {(e.strerror or str(e)).lower()}') from None
    if hasattr(x, 'read'): return x.read()
    if hasattr(x, 'save'):
        x.save(buffer := io.BytesIO(), 'PNG')
        return buffer.getvalue()
    raise BadValue(f'image: a path, bytes, a binary file or a Pillow image, got {type(x).__name__}')
