"A bundle made by hand for the tests of serving: its graph answers with the share of red, green and blue, so what is said can be worked out."
import hashlib
import io
import json

import numpy as np
import onnx.parser
from onnx import helper
from PIL import Image

LABELS, INPUT = ['rött', 'green', 'blue'], dict(size=[4, 2], resize='crop', mode='RGB', dtype='uint8', layout='NHWC')
GRAPH = """shares (uint8[n, 2, 4, 3] pixels) => (float[n, 3] probabilities) {
    hw = Constant<value_ints = [1, 2]>()
    c = Constant<value_ints = [1]>()
    x = Cast<to = 1>(pixels)
    mean = ReduceMean<keepdims = 0>(x, hw)
    one = Constant<value_float = 1.0>()
    more = Add(mean, one)
    sum = ReduceSum<keepdims = 1>(more, c)
    probabilities = Div(more, sum)
}"""


def write_shares(folder, **card):
    "(mean + 1)/(sum of the means + 3), colour by colour."
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(onnx.parser.parse_graph(GRAPH), opset_imports=[helper.make_opsetid('', 20)], ir_version=10)
    helper.set_model_props(model, dict(labels=json.dumps(LABELS), input=json.dumps(INPUT)))
    onnx.save(model, folder/'model.onnx')
    digest = hashlib.sha256((folder/'model.onnx').read_bytes()).hexdigest()
    card = dict(schema=1, labels=LABELS, input=INPUT, files={'model.onnx': digest}, metrics=dict(side='valid', n=40, accuracy=.925), size_bytes=1234, latency_ms=.5,
                provenance=dict(date='2026-11-26T10:00:00+00:00', fastrecipes='0.1.0', command='fastrecipes ship /home/me/secret')) | card
    (folder/'bundle.json').write_text(json.dumps(card))
    return folder


def shares_of(r, g, b) -> dict[str, float]:
    "What the bundle says of an image of one colour: 4 decimals, best first."
    of = {label: float(np.float32(v+1)/np.float32(r+g+b+3)) for label, v in zip(LABELS, (r, g, b))}
    return {label: round(p, 4) for label, p in sorted(of.items(), key=lambda o: -o[1])}


def encoded(image, kind='PNG', **kwargs) -> bytes:
    "An image, or the colour of one of 8×4 px, as the bytes of a file."
    if isinstance(image, tuple): image = Image.new('RGB', (8, 4), image)
    image.save(buffer := io.BytesIO(), kind, **kwargs)
    return buffer.getvalue()
