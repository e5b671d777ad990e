"A bundle made by hand, whose graph answers with the share of red, green and blue: what the predictor says can be worked out."
import hashlib
import io
import json
import shutil
import subprocess
import sys
from base64 import b85decode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from zlib import decompress

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fastrecipes.errors import BadValue, NotThere
from fastrecipes.production.predictor import PROBE, Graph, Predictor, overflows

LABELS, INPUT = ['red', 'green', 'blue'], dict(size=[4, 2], resize='crop', mode='RGB', dtype='uint8', layout='NHWC')


def write_shares(folder, **card):
    "mean over height and width, divided by the sum over channels"
    nodes = [helper.make_node('Cast', ['pixels'], ['x'], to=TensorProto.FLOAT),
             helper.make_node('ReduceMean', ['x', 'hw'], ['mean'], keepdims=0), helper.make_node('ReduceSum', ['mean', 'c'], ['sum'], keepdims=1),
             helper.make_node('Div', ['mean', 'sum'], ['probabilities'])]
    graph = helper.make_graph(nodes, 'shares', [helper.make_tensor_value_info('pixels', TensorProto.UINT8, ['n', 2, 4, 3])],
                              [helper.make_tensor_value_info('probabilities', TensorProto.FLOAT, ['n', 3])],
                              [helper.make_tensor('hw', TensorProto.INT64, [2], [1, 2]), helper.make_tensor('c', TensorProto.INT64, [1], [1])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)
    helper.set_model_props(model, dict(labels=json.dumps(LABELS), input=json.dumps(INPUT)))
    onnx.save(model, folder/'model.onnx')
    digest = hashlib.sha256((folder/'model.onnx').read_bytes()).hexdigest()
    (folder/'bundle.json').write_text(json.dumps(dict(schema=1, labels=LABELS, input=INPUT, files={'model.onnx': digest}) | card))
    return folder


@pytest.fixture(scope='module')
def shares(tmp_path_factory): return write_shares(tmp_path_factory.mktemp('shares'))


@pytest.fixture
def own(shares, tmp_path): return shutil.copytree(shares, tmp_path/'own')


def rewrite(folder, **changes):
    card = json.loads((folder/'bundle.json').read_text()) | changes
    (folder/'bundle.json').write_text(json.dumps({k: v for k, v in card.items() if v is not None}))


def test_labels_come_best_first_with_their_probabilities(shares):
    answer = Predictor(shares)(Image.new('RGB', (4, 2), (50, 10, 140)))
    assert list(answer) == ['blue', 'red', 'green']
    assert answer == pytest.approx(dict(blue=.7, red=.25, green=.05))
    assert all(type(p) is float for p in answer.values())


@pytest.mark.parametrize('k, labels', [(1, ['blue']), (2, ['blue', 'red']), (9, ['blue', 'red', 'green']), (None, ['blue', 'red', 'green'])])
def test_k_is_how_many(shares, k, labels): assert list(Predictor(shares)(Image.new('RGB', (4, 2), (50, 10, 140)), k)) == labels


def test_ties_come_in_the_order_of_the_labels(shares): assert list(Predictor(shares)(Image.new('RGB', (4, 2), (9, 9, 9)))) == LABELS


def test_k_below_one_is_refused(shares):
    with pytest.raises(BadValue, match='k: at least 1, got 0'): Predictor(shares)(Image.new('RGB', (4, 2)), k=0)


def test_an_image_is_cropped_to_the_size_of_the_bundle(shares):
    "4×6 px to 4×2: of red, green and blue bands the middle one remains."
    bands = np.zeros((6, 4, 3), np.uint8)
    for i in range(3): bands[2*i:2*i+2, :, i] = 200
    assert Predictor(shares)(bands) == pytest.approx(dict(green=1, red=0, blue=0))


def test_every_kind_of_image_gives_the_same_answer(shares, tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    Image.fromarray(a).save(p := tmp_path/'a.png')
    predictor = Predictor(shares)
    for x in (str(p), p.read_bytes(), io.BytesIO(p.read_bytes()), Image.open(p), a): assert predictor(x) == predictor(p)


def test_a_list_gives_a_list_whatever_its_length(shares):
    colours = np.random.default_rng(0).integers(1, 256, (70, 3))
    predictor = Predictor(shares)
    images = [np.full((5, 5, 3), c, np.uint8) for c in colours]
    p = predictor.probabilities(images)                 # 32 + 32 + 6
    assert p.shape == (70, 3) and np.allclose(p, colours/colours.sum(1, keepdims=True), atol=1e-6)
    assert [list(a)[0] for a in predictor(images, k=1)] == [LABELS[i] for i in colours.argmax(1)]
    assert predictor([]) == [] and predictor.probabilities([]).shape == (0, 3) and len(predictor(images[:1])) == 1


def test_one_predictor_serves_eight_threads(shares):
    images = [np.full((5, 5, 3), c, np.uint8) for c in np.random.default_rng(1).integers(1, 256, (400, 3))]
    predictor = Predictor(shares)
    with ThreadPoolExecutor(8) as pool: assert list(pool.map(predictor, images)) == [predictor(x) for x in images]


@pytest.mark.parametrize('a', [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((1, 4, 4, 3), np.uint8), np.zeros((4, 4, 4), np.uint8),
                               np.zeros((0, 4, 3), np.uint8)], ids=lambda a: f'{a.dtype}{a.shape}')
def test_other_arrays_are_refused(shares, a):
    with pytest.raises(BadValue, match=r'uint8 \(height, width, 3\), got'): Predictor(shares)(a)


def test_the_bad_image_of_a_list_is_named(shares, tmp_path):
    (tmp_path/'b.png').write_bytes(b'no')
    with pytest.raises(BadValue, match='b.png: not an image'): Predictor(shares)([Image.new('RGB', (4, 2)), tmp_path/'b.png'])


def test_card_labels_and_description(shares):
    predictor = Predictor(shares)
    assert predictor.labels == LABELS and predictor.card['schema'] == 1
    assert repr(predictor) == f"Predictor('{shares}'): 3 labels, images of 4×2 px"


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(NotThere, match='nowhere does not exist'): Predictor(tmp_path/'nowhere')
    with pytest.raises(NotThere, match='has no bundle.json'): Predictor(tmp_path)
    (tmp_path/'file').write_text('x')
    with pytest.raises(NotThere, match='is a file'): Predictor(tmp_path/'file')
    (tmp_path/'bundle.json').write_text('{')
    with pytest.raises(BadValue, match='is not JSON'): Predictor(tmp_path)


@pytest.mark.parametrize('changes, says', [
    (dict(schema=2), 'newer fastrecipes .schema 2, this one reads 1.; upgrade'),
    (dict(schema=None), 'no schema version'), (dict(schema='1'), 'no schema version'),
    (dict(labels=None, input=None), 'lacks labels, input'), (dict(files={}), 'names no model.onnx'),
    (dict(labels=['green', 'red', 'blue']), 'labels in .* is not what model.onnx was made with'),
    (dict(input=INPUT | dict(resize='squish')), 'input in .* is not what')])
def test_an_edited_card_is_refused(own, changes, says):
    rewrite(own, **changes)
    with pytest.raises(BadValue, match=says): Predictor(own)


def test_a_changed_file_is_refused(own):
    data = bytearray((own/'model.onnx').read_bytes())
    data[len(data)//2] ^= 1
    (own/'model.onnx').write_bytes(data)
    with pytest.raises(BadValue, match='model.onnx is not the file that was shipped'): Predictor(own)


def test_a_missing_file_is_refused(own):
    (own/'model.onnx').unlink()
    with pytest.raises(NotThere, match='model.onnx is missing'): Predictor(own)


def test_serving_imports_neither_torch_nor_the_rest_of_the_package(shares):
    code = f'''import sys
from fastrecipes.production.predictor import Predictor
import numpy as np
Predictor({str(shares)!r})(np.ones((3, 3, 3), np.uint8))
print([m for m in sys.modules if m.split('.')[0] in ('torch', 'fastai', 'timm', 'onnx', 'fastcore')],
      sorted(m for m in sys.modules if m.startswith('fastrecipes.')))'''
    answer = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert answer.stdout.strip() == ("[] ['fastrecipes.data', 'fastrecipes.data.pixels', 'fastrecipes.errors', 'fastrecipes.production', "
                                     "'fastrecipes.production.predictor']"), answer.stderr


def probe():
    "What PROBE holds: all values are the largest that bytes hold, so that 16 bits cannot hold two products."
    values = [numpy_helper.from_array(a, name) for name, a in (
        ('w', np.full((8, 64, 1, 1), 127, np.int8)), ('m', np.full((4, 8), 127, np.int8)), ('s', np.float32(1/255)), ('o', np.float32(64*127/255/200)), ('z', np.uint8(0)),
        ('zw', np.int8(0)))]
    nodes = [helper.make_node('QLinearConv', ['x', 's', 'z', 'w', 's', 'zw', 'o', 'z'], ['conv']), helper.make_node('MatMulInteger', ['x', 'm'], ['product'])]
    io = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, 'g', [io('x', TensorProto.UINT8, [1, 64, 4, 4])],
                                   [io('conv', TensorProto.UINT8, [1, 8, 4, 4]), io('product', TensorProto.INT32, [1, 64, 4, 8])], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 13)], ir_version=8)


def test_whether_sums_of_bytes_overflow_is_tried_out(monkeypatch):
    assert onnx.load_from_string(decompress(b85decode(PROBE))) == probe()
    flags = Path('/proc/cpuinfo')
    words = set(flags.read_text().split()) if flags.exists() else set()
    if words & {'avx512_vnni', 'avx_vnni'}: assert not overflows()
    elif 'avx2' in words: assert overflows()
    for said in (True, False):
        monkeypatch.setattr('fastrecipes.production.predictor.overflows', lambda: said)
        asked = []
        class Options(ort.SessionOptions):
            def add_session_config_entry(self, *entry): asked.append(entry)
        monkeypatch.setattr(ort, 'SessionOptions', Options)
        Graph(probe().SerializeToString())
        monkeypatch.undo()
        assert asked == ([('session.x64quantprecision', '1')] if said else [])


def test_sums_that_overflow_are_told_from_exact_ones(monkeypatch):
    overflows.cache_clear()
    for conv, product, says in ((200, 4*255*127, False), (101, 4*255*127, True), (200, 2*32767, True)):
        monkeypatch.setattr('onnxruntime.InferenceSession', lambda *a, **kw: SimpleNamespace(run=lambda *a: (np.full(8, conv), np.full(8, product))))
        assert overflows() is says
        overflows.cache_clear()
