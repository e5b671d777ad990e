"The web server's application: images in, the best labels and their probabilities out, as JSON. Needs Flask and what the predictor needs; no torch."
import hashlib
import json
import re
import time
from base64 import b64encode
from importlib.resources import files
from io import BytesIO
from threading import BoundedSemaphore, Event

import numpy as np
from flask import Flask, Request, Response, g, request
from PIL import UnidentifiedImageError
from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge

from fastrecipes import __version__
from fastrecipes.errors import BadValue
from fastrecipes.production.predictor import Predictor
from fastrecipes.production.serving_batches import Batcher
from fastrecipes.production.serving_metrics import Metrics
from fastrecipes.production.serving_openapi import openapi

__all__ = ['create_app', 'public_card', 'FIELD', 'K', 'DIGITS', 'MAX_MB', 'QUEUE']

FIELD, K, DIGITS = 'my_img_file', 5, 4          # the form's field; labels an answer; digits of a probability
MAX_MB, QUEUE = 16., 48                         # of one upload; predictions in one process at once: three batches
AS_BYTES = ('', 'application/octet-stream', 'application/x-www-form-urlencoded')        # the last: what `curl --data-binary` says
HEADERS = {'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer', 'X-Frame-Options': 'DENY', 'Cross-Origin-Resource-Policy': 'same-origin',
           'Cache-Control': 'no-store', 'Content-Security-Policy': "default-src 'none'; frame-ancestors 'none'"}
SENTENCES = {400: 'this is no request that the server understands', 404: 'there is no such page; POST an image to /predict',
             500: 'the server failed; it has been logged', 503: 'too many images are waiting; try again in a second'}
DISPOSITION = re.compile(rb'\r\ncontent-disposition: form-data; name="?%s"?; filename="[^"\\\r\n]*"\r\n' % FIELD.encode(), re.I)
ENCODED = re.compile(rb'\r\n(content-transfer-encoding:|[ \t])', re.I)       # or a header of several lines
LATE = 'the upload did not arrive whole in time'


class Refused(Exception):
    "An upload that is not answered with a prediction: HTTP status, and why."
    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status, self.why = status, why


class _InMemory(Request):
    def _get_file_stream(self, *args, **kwargs): return BytesIO()       # werkzeug would write uploads of more than 500 kB to disk


class _App(Flask):
    request_class = _InMemory


def create_app(predictor: Predictor, *, max_mb: float = MAX_MB, queue: int = QUEUE, decoders: int = 2, metrics: Metrics | None = None) -> Flask:
    """The WSGI application that answers with `predictor`.

    `max_mb`: the largest upload, MB; `queue`: predictions that are under way at once, all others are told to come back (503); `decoders`: images
    that are decoded at once, which bounds memory. `POST /predict` (a form with a file `my_img_file`, or an image's bytes) → `{label: probability}`
    of the `?k=5` best, best first, rounded to 4 decimals; `/`, `/card`, `/healthz`, `/readyz`, `/metrics`, `/openapi.json`; whatever goes wrong is
    `{"error": sentence}`. Nothing of an upload is written to disk or logged."""
    app = _App('fastrecipes', static_folder=None)
    metrics = metrics or Metrics()
    app.config.update(MAX_CONTENT_LENGTH=int(max_mb*1e6), MAX_FORM_MEMORY_SIZE=100_000, MAX_FORM_PARTS=20)
    run, slots, decoding = Batcher(predictor.run, seen=metrics.batch), BoundedSemaphore(queue), BoundedSemaphore(decoders)
    card, (page, policy), ending = public_card(predictor.card), _page(), Event()
    app.extensions['fastrecipes'] = dict(predictor=predictor, metrics=metrics, ending=ending)

    @app.before_request
    def _start(): g.start = time.perf_counter()

    @app.after_request
    def _finish(response: Response):
        route = request.url_rule.rule if request.url_rule else 'other'
        metrics.request(route, response.status_code, time.perf_counter() - g.get('start', time.perf_counter()))
        for name, value in HEADERS.items(): response.headers.setdefault(name, value)
        return response

    @app.post('/predict')
    def predict():
        k = _k(request.args)
        if not slots.acquire(blocking=False): raise Refused(503, SENTENCES[503])
        metrics.in_flight(1)
        try:
            data = _upload(max_mb)
            with decoding: pixels = _pixels(predictor, data)
            p = run(pixels)
        finally:
            metrics.in_flight(-1)
            slots.release()
        return _json({predictor.labels[i]: round(float(p[i]), DIGITS) for i in np.argsort(-p, kind='stable')[:k]})

    @app.get('/')
    def index(): return Response(page, content_type='text/html; charset=utf-8', headers={'Content-Security-Policy': policy})

    @app.get('/card')
    def its_card(): return _json(card)

    @app.get('/healthz')
    def healthz(): return _json({'status': 'alive'})

    @app.get('/readyz')
    def readyz(): return _json({'status': 'ready'}) if not ending.is_set() else _error(503, 'the server is about to end')

    @app.get('/metrics')
    def counters(): return Response(metrics.text(), content_type='text/plain; version=0.0.4; charset=utf-8')

    @app.get('/openapi.json')
    def description(): return _json(openapi(predictor.labels, max_mb, K, __version__))

    @app.errorhandler(Refused)
    def refused(e): return _error(e.status, e.why)

    @app.errorhandler(HTTPException)
    def http_error(e):
        if e.code == 405:
            allowed = ', '.join(sorted(set(e.valid_methods or ()) - {'HEAD', 'OPTIONS'}))
            return _error(405, f'{request.method if request.method.isalpha() else "this method"} is not allowed here, {allowed} is', Allow=', '.join(sorted(e.valid_methods or ())))
        return _error(e.code or 500, SENTENCES.get(e.code, f'{e.name.lower()}'))

    @app.errorhandler(Exception)
    def bug(e):
        app.logger.exception('%s on %s', type(e).__name__, request.url_rule)
        return _error(500, SENTENCES[500])

    predictor.run(np.zeros((1, *predictor.input['size'][::-1], 3), np.uint8))   # the first request is as fast as the second; a graph that cannot run says so now
    return app


def public_card(card: dict) -> dict:
    "What of a bundle's card anybody may know: no paths, no command line."
    own = {k: card[k] for k in ('labels', 'input', 'metrics', 'parity', 'size_bytes', 'latency_ms') if k in card}
    made = card.get('provenance', {})
    return own | {k: made[k] for k in ('date', 'fastrecipes', 'techniques') if k in made}


def _json(answer, status: int = 200) -> Response:
    return Response(json.dumps(answer, ensure_ascii=False) + '\n', status, content_type='application/json')


def _error(status: int, why: str, **headers) -> Response:
    response = _json({'error': why}, status)
    if status == 503: headers['Retry-After'] = '1'
    response.headers.update(headers)
    return response


def _k(args) -> int:
    given = args.getlist('k')
    if not given: return K
    if len(given) > 1 or not re.fullmatch('[0-9]{1,6}', given[0]) or int(given[0]) < 1: raise Refused(400, 'k: one whole number, at least 1: /predict?k=5')
    return int(given[0])


def _upload(max_mb: float) -> bytes:
    "The bytes of the image that was sent; all of the body is read first, into memory, and must be there."
    kind = request.mimetype
    if kind != 'multipart/form-data' and kind not in AS_BYTES and not kind.startswith('image/'):
        raise Refused(415, f'send a form (multipart/form-data) with a file {FIELD}, or the bytes of an image')
    try: body = request.get_data(cache=True)
    except RequestEntityTooLarge: raise Refused(413, f'the upload is larger than {max_mb:g} MB') from None
    except (ClientDisconnected, OSError): raise Refused(408, LATE) from None
    if len(body) < (request.content_length or 0): raise Refused(408, LATE)
    if request.content_length is None and len(body) >= request.max_content_length: raise Refused(413, f'the upload is larger than {max_mb:g} MB')      # in chunks: werkzeug cuts it off
    if kind != 'multipart/form-data':
        if not body: raise Refused(400, 'the upload is empty')
        return body

    if image := only_file(body, request.mimetype_params.get('boundary', '')): return image
    try: sent = request.files.getlist(FIELD)
    except RequestEntityTooLarge: raise Refused(413, f'the form has too many or too large fields; send one file {FIELD}') from None
    if not sent: raise Refused(400, f'the form has no file {FIELD}: curl -F {FIELD}=@cat.jpg')
    if len(sent) > 1: raise Refused(400, f'the form has {len(sent)} files {FIELD}; send one')
    if not (data := sent[0].read()): raise Refused(400, 'the file is empty')
    return data


def only_file(body: bytes, boundary: str) -> bytes | None:
    "The image of a form that holds it and nothing else, as nearly all do, without werkzeug's parser, which takes as long as the network; None of any other form."
    start, end = f'--{boundary}\r\n'.encode(), f'\r\n--{boundary}'.encode()
    if not boundary or not body.startswith(start): return None
    at, until = body.find(b'\r\n\r\n', len(start)), body.find(end, len(start)-2)
    alone = 0 <= at < until and body[until+len(end):].rstrip(b'\r\n') == b'--'
    return body[at+4:until] if alone and DISPOSITION.search(body[len(start)-2:at+2]) and ENCODED.search(body[len(start)-2:at+2]) is None else None


def _pixels(predictor: Predictor, data: bytes) -> np.ndarray:
    "As training would have seen it: the same calls. JPEGs are decoded in full: at reduced scale they would be quicker, and other pixels."
    try: return predictor.pixels(data)
    except BadValue as e: raise Refused(415 if isinstance(e.__context__, UnidentifiedImageError) else 400, str(e)) from None


def _page() -> tuple[str, str]:
    "The page, and the policy by which a browser runs nothing but what it holds."
    page = (files('fastrecipes.production')/'page.html').read_text(encoding='utf8')
    digest = lambda tag: b64encode(hashlib.sha256(re.search(f'<{tag}>(.*?)</{tag}>', page, re.S)[1].encode()).digest()).decode()
    return page, (f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; img-src 'self' blob: data:; "
                  "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
