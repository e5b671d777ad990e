"The application, asked in this process: every answer can be worked out by hand, every refusal is a sentence."
import json
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from threading import Event, Thread

import numpy as np
import pytest
from PIL import Image

from fastrecipes.production.predictor import Predictor
from fastrecipes.production.server import create_app, only_file, public_card

from .shares import LABELS, encoded, shares_of, write_shares

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8))


@pytest.fixture(scope='module')
def predictor(tmp_path_factory): return Predictor(write_shares(tmp_path_factory.mktemp('b')/'bundle'), threads=1)


@pytest.fixture(scope='module')
def client(predictor): return create_app(predictor, max_mb=1.).test_client()


def posted(client, data: bytes, query='', name='x'): return client.post(f'/predict{query}', data={'my_img_file': (BytesIO(data), name)})


def refused(answer, status, says):
    assert (answer.status_code, answer.content_type) == (status, 'application/json'), answer.text
    assert list(answer.json) == ['error'] and says in answer.json['error'] and '\n' not in answer.json['error'] and answer.json['error'][-1] != '.'
    return True


def test_labels_come_best_first_in_four_decimals_under_their_own_names(client):
    answer = posted(client, encoded((50, 10, 140)))
    assert answer.text == '{"blue": 0.6946, "rött": 0.2512, "green": 0.0542}\n'              # 141/203, 51/203, 11/203
    assert answer.content_type == 'application/json' and list(answer.json) == ['blue', 'rött', 'green']


@pytest.mark.parametrize('query, n', [('', 3), ('?k=1', 1), ('?k=2', 2), ('?k=99', 3), ('?other=1', 3)])
def test_k_is_how_many(client, query, n): assert list(posted(client, encoded((50, 10, 140)), query).json) == ['blue', 'rött', 'green'][:n]


@pytest.mark.parametrize('k', ['0', '-1', 'x', '1.5', '', '1&k=2', '²', '9999999'])
def test_another_k_is_refused(client, k): assert refused(posted(client, encoded((1, 2, 3)), f'?k={k}'), 400, 'k: one whole number, at least 1')


def test_five_labels_are_the_default(predictor):
    twenty = like(predictor, labels=[f'l{i}' for i in range(20)], run=lambda x: np.tile(np.arange(20, dtype=np.float32)/190, (len(x), 1)))
    assert list(posted(create_app(twenty).test_client(), encoded((1, 2, 3))).json) == ['l19', 'l18', 'l17', 'l16', 'l15']


def kinds():
    alpha, turned = PHOTO.copy(), Image.Exif()
    alpha.putalpha(Image.linear_gradient('L').resize(PHOTO.size))
    turned[0x0112] = 6
    yield 'png', encoded(PHOTO)
    yield 'jpeg', encoded(PHOTO, 'JPEG')
    yield 'turned', encoded(PHOTO, 'JPEG', exif=turned)
    yield 'cmyk', encoded(PHOTO.convert('CMYK'), 'JPEG')
    yield 'grey', encoded(PHOTO.convert('L'), 'JPEG')
    yield '16 bits', encoded(Image.fromarray(np.asarray(PHOTO.convert('L')).astype(np.uint16)*257))
    yield 'palette', encoded(PHOTO.quantize(16))
    yield 'alpha', encoded(alpha)
    yield 'webp', encoded(PHOTO, 'WEBP')
    yield 'tiff', encoded(PHOTO, 'TIFF')
    yield 'animated', encoded(PHOTO, 'GIF', save_all=True, append_images=[PHOTO.rotate(180)])


@pytest.mark.parametrize('name, data', kinds(), ids=lambda x: x if isinstance(x, str) else '')
def test_every_kind_of_image_is_answered_as_the_predictor_does(client, predictor, name, data):
    expected = {label: round(p, 4) for label, p in predictor(data).items()}
    for answer in (posted(client, data), client.post('/predict', data=data), client.post('/predict', data=data, content_type='image/png'),
                   client.post('/predict', data=data, content_type='application/x-www-form-urlencoded')):
        assert list(answer.json.items()) == list(expected.items())


def test_alpha_is_on_white_turned_is_upright_and_the_first_frame_counts(client):
    clear = Image.new('RGBA', (8, 4), (255, 0, 0, 0))
    assert posted(client, encoded(clear)).json == shares_of(255, 255, 255)
    two = Image.new('RGB', (8, 4), (0, 200, 0))
    assert posted(client, encoded(two, 'GIF', save_all=True, append_images=[Image.new('RGB', (8, 4), (200, 0, 0))])).json == shares_of(0, 200, 0)
    tall, turned = Image.new('RGB', (4, 16)), Image.Exif()             # upright 4×16: its middle, where there is green, remains of it; lying: all but the middle's sides
    tall.paste((0, 255, 0), (0, 7, 4, 9))
    turned[0x0112] = 8
    assert posted(client, encoded(tall.rotate(-90, expand=True), 'PNG', exif=turned)).json == shares_of(0, 255, 0)


def png_of(width: int, height: int) -> bytes:
    "A PNG that claims to be large."
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'\0'*99)) + chunk(b'IEND', b'')


@pytest.mark.parametrize('data, status, says', [
    (b'', 400, 'the file is empty'), (b'hello, I am no image', 415, 'not an image, or of an unknown kind'), (b'%PDF-1.7 ...', 415, 'not an image'),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415, 'not an image'), (encoded(PHOTO, 'JPEG')[:-200], 400, 'truncated'), (encoded(PHOTO)[:300], 400, 'image'),
    (png_of(30_000, 30_000), 400, 'too many pixels'), (png_of(10_000, 10_000), 400, 'too many pixels'), (encoded(PHOTO.convert('F'), 'TIFF'), 400, 'floating point'),
    (encoded(PHOTO, 'EPS'), 400, 'EPS is a program'), (bytes(1_000_001), 413, 'the upload is larger than 1 MB')], ids=lambda x: str(x)[:24])
def test_a_bad_image_is_refused_in_one_sentence(client, data, status, says):
    assert refused(posted(client, data), status, says)
    if data: assert refused(client.post('/predict', data=data, content_type='image/jpeg'), status, says)


@pytest.mark.parametrize('sent, status, says', [
    (dict(data=b'', content_type='image/png'), 400, 'the upload is empty'), (dict(), 400, 'the upload is empty'),
    (dict(data={'other': (BytesIO(b'x'), 'x')}), 400, 'no file my_img_file: curl -F my_img_file=@'),
    (dict(data={'my_img_file': 'text'}, content_type='multipart/form-data'), 400, 'no file my_img_file'),
    (dict(data={'my_img_file': [(BytesIO(b'x'), 'x'), (BytesIO(b'y'), 'y')]}), 400, 'the form has 2 files my_img_file; send one'),
    (dict(data=b'garbage', content_type='multipart/form-data; boundary=x'), 400, 'no file'), (dict(data=b'garbage', content_type='multipart/form-data'), 400, 'no file'),
    (dict(data={f'f{i}': 'x' for i in range(30)}, content_type='multipart/form-data'), 413, 'too many or too large fields'),
    (dict(json={'image': 'x'}), 415, 'send a form'), (dict(data=b'x', content_type='text/plain'), 415, 'send a form')], ids=lambda x: str(x)[:40])
def test_a_bad_request_is_refused_in_one_sentence(client, sent, status, says): assert refused(client.post('/predict', **sent), status, says)


def part(data=b'\xff\xd8 \r\n --data-- \r\n', head=b'Content-Disposition: form-data; name="my_img_file"; filename="a.jpg"\r\nContent-Type: image/jpeg'):
    return b'--b12\r\n' + head + b'\r\n\r\n' + data + b'\r\n'


FORM = b'Content-Disposition: form-data; name="my_img_file"'


@pytest.mark.parametrize('body, quick', [
    (part() + b'--b12--\r\n', True), (part() + b'--b12--', True), (part(head=FORM.lower() + b'; filename=""') + b'--b12--\r\n', True), (part(b'') + b'--b12--\r\n', False),
    (part() + part() + b'--b12--\r\n', False), (part(head=b'Content-Disposition: form-data; name="other"') + part() + b'--b12--\r\n', False), (part(), False),
    (part(head=FORM) + b'--b12--\r\n', False), (b'preamble\r\n' + part() + b'--b12--\r\n', False), (part() + b'--b12--\r\nmore', False), (b'--b12\r\n\r\n--b12--', False), (b'', False),
    (part(head=FORM + b";\r\n filename=x") + b'--b12--\r\n', False), (part(b'x\r\n--b12x') + b'--b12--\r\n', False)])
def test_the_quick_way_through_a_form_finds_what_werkzeugs_parser_finds(body, quick):
    from werkzeug.formparser import MultiPartParser
    found = only_file(body, 'b12')
    assert (found is not None) == quick or not found
    try: files = MultiPartParser().parse(BytesIO(body), b'b12', len(body))[1].getlist('my_img_file')
    except ValueError: files = []
    if found: assert [f.read() for f in files] == [found]


def test_other_pages_and_methods_are_json_too(client):
    assert refused(client.get('/nope'), 404, 'no such page') and refused(client.post('/card'), 405, 'POST is not allowed here, GET is')
    answer = client.get('/predict')
    assert refused(answer, 405, 'GET is not allowed here, POST is') and 'POST' in answer.headers['Allow']


def like(predictor, **changes):
    "The predictor with some of it replaced."
    return type('Like', (), dict(labels=predictor.labels, input=predictor.input, card=predictor.card, run=predictor.run, pixels=predictor.pixels) |
                {name: staticmethod(f) if callable(f) else f for name, f in changes.items()})


def test_our_own_bug_is_a_500_that_tells_nothing(predictor, caplog):
    def broken(x): raise RuntimeError('secret pixels')
    answer = posted(create_app(like(predictor, pixels=broken)).test_client(), encoded((1, 2, 3)))
    assert refused(answer, 500, 'the server failed') and 'secret' not in answer.text and 'RuntimeError on /predict' in caplog.text


def test_a_full_queue_is_a_503_with_retry_after_and_empties_again(predictor):
    entered, go = Event(), Event()
    def slow(x):
        if x.max(): entered.set(), go.wait(10)
        return predictor.run(x)
    app = create_app(like(predictor, run=slow), queue=1)
    answers = []
    t = Thread(target=lambda: answers.append(posted(app.test_client(), encoded((50, 10, 140)))))
    t.start()
    assert entered.wait(10)
    busy = posted(app.test_client(), encoded((1, 2, 3)))
    assert refused(busy, 503, 'too many images are waiting') and busy.headers['Retry-After'] == '1'
    assert 'fastrecipes_predictions_in_flight 1\n' in app.test_client().get('/metrics').text
    go.set()
    t.join()
    assert answers[0].status_code == 200 and posted(app.test_client(), encoded((1, 2, 3))).status_code == 200
    assert 'fastrecipes_predictions_in_flight 0\n' in app.test_client().get('/metrics').text


def test_a_refused_image_frees_its_place(predictor):
    client = create_app(predictor, queue=1, decoders=1).test_client()
    assert [posted(client, b'no').status_code for _ in range(3)] == [415]*3 and posted(client, encoded((1, 2, 3))).status_code == 200


def test_an_upload_of_a_megabyte_stays_in_memory(predictor, monkeypatch):
    "werkzeug writes what is larger than 500 kB to disk."
    import tempfile
    for name in ('SpooledTemporaryFile', 'TemporaryFile', 'NamedTemporaryFile'):
        monkeypatch.setattr(f'tempfile.{name}', lambda *a, **k: pytest.fail('a file'))
    from werkzeug import formparser
    monkeypatch.setattr(formparser, 'SpooledTemporaryFile', tempfile.SpooledTemporaryFile)
    noise = Image.fromarray(RNG.integers(0, 256, (700, 700, 3), dtype=np.uint8))
    assert len(data := encoded(noise)) > 1e6
    client = create_app(predictor).test_client()
    assert posted(client, data).status_code == 200
    assert client.post('/predict', data={'other': 'x', 'my_img_file': (BytesIO(data), 'x')}).status_code == 200         # by werkzeug's parser


def test_alive_ready_and_no_more(predictor):
    app = create_app(predictor)
    client = app.test_client()
    assert client.get('/healthz').json == dict(status='alive') and client.get('/readyz').json == dict(status='ready')
    app.extensions['fastrecipes']['ending'].set()
    assert refused(client.get('/readyz'), 503, 'about to end') and client.get('/healthz').status_code == 200


def test_the_card_tells_what_anybody_may_know(client, predictor):
    card = client.get('/card').json
    assert card['labels'] == LABELS and card['metrics']['accuracy'] == .925 and card['date'] == '2026-11-26T10:00:00+00:00'
    assert 'secret' in json.dumps(predictor.card) and 'secret' not in json.dumps(card) and card == public_card(predictor.card)


def test_the_page_runs_its_own_script_and_nothing_else(client):
    answer = client.get('/')
    assert answer.content_type == 'text/html; charset=utf-8' and 'my_img_file' in answer.text and 'http' not in answer.text.replace('http://localhost:5000/predict', '')
    assert "default-src 'none'" in (policy := answer.headers['Content-Security-Policy']) and 'unsafe' not in policy and policy.count('sha256-') == 2


@pytest.mark.parametrize('path', ['/', '/card', '/nope', '/metrics'])
def test_every_answer_has_the_security_headers(client, path):
    headers = client.get(path).headers
    assert headers['X-Content-Type-Options'] == 'nosniff' and headers['X-Frame-Options'] == 'DENY' and "default-src 'none'" in headers['Content-Security-Policy']


def test_the_description_lists_what_there_is(client):
    described = client.get('/openapi.json').json
    app = client.application
    assert {(r.rule, m.lower()) for r in app.url_map.iter_rules() for m in r.methods - {'HEAD', 'OPTIONS'}} == {(p, m) for p, ms in described['paths'].items() for m in ms}
    assert set(described['paths']['/predict']['post']['responses']) == {'200', '400', '408', '413', '415', '503'}


def test_a_jpeg_is_decoded_in_full_for_at_reduced_scale_it_is_another_image(predictor):
    "Image.draft, on a photograph of 640×427 px for 80×53: three pixels in four differ, by up to half the range."
    from sklearn.datasets import load_sample_images
    differ = []
    for photo in load_sample_images().images:
        data = encoded(Image.fromarray(photo), 'JPEG', quality=90)
        full, draft = Image.open(BytesIO(data)), Image.open(BytesIO(data))
        draft.draft('RGB', (80, 53))
        assert draft.size == (80, 54)
        a, b = (np.asarray(im.convert('RGB').resize((80, 53), Image.Resampling.BILINEAR)).astype(int) for im in (full, draft))
        differ.append((float((a != b).mean()), int(abs(a-b).max())))
    assert all(share > .7 and most > 50 for share, most in differ), differ


def test_serving_imports_neither_torch_nor_fastai(tmp_path):
    code = f'''import sys
import fastrecipes.production.server, fastrecipes.production.serving, fastrecipes.production.client, fastrecipes.recipes.serve, fastrecipes.production.predicting
print([m for m in sys.modules if m.split('.')[0] in ('torch', 'fastai', 'fastcore', 'timm', 'onnx', 'onnxruntime')])
from fastrecipes.production.predictor import Predictor
fastrecipes.production.server.create_app(Predictor({str(write_shares(tmp_path/'b'))!r})).test_client().get('/')
print([m for m in sys.modules if m.split('.')[0] in ('torch', 'fastai', 'fastcore', 'timm', 'onnx')])'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == '[]\n[]\n', done.stderr      # nor onnxruntime before a fork
