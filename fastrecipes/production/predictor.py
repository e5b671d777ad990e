"A bundle put to use: images in, probabilities by label out. Needs onnxruntime, NumPy and Pillow; no torch."
import hashlib
import json
from base64 import b85decode
from functools import cache
from pathlib import Path
from zlib import decompress

import numpy as np
from PIL import Image

from fastrecipes.data.pixels import fit_to, read_image
from fastrecipes.errors import BadValue, NotThere

__all__ = ['Predictor', 'Graph', 'overflows', 'SCHEMA', 'CARD', 'MODEL', 'sha256']

SCHEMA = 1                              # of bundle.json: a reader refuses what is newer than itself
CARD, MODEL = 'bundle.json', 'model.onnx'
BATCH = 32
# A convolution and a product of the largest bytes there are, as ONNX: 200s, and 4·255·127s (`tests/production/test_predictor.py` has its source).
PROBE = ('c-rIOuv);zrNhNo!Npk2#aP9~SPo(^RRO7dAYX_jIX|yVi966IGcPr<$Qj7tk^`&G6=E+a%1<dxE>Yt3O)T*(&GF1DNli~J5@Jl(n!v)r!QsHc$iXPU?8I2^)xc6e3Pv>0(&'
         'hlB2~cXt^->_Hm|K9+iLuy=rLm#G8p6r<V(B+hw$tJeU~*!t@?vDr;shE7Os7C*lr%6!3W;%va4-o8a4~T(0<i-Svw(1t92YnZqseo?<rTSL2^p+}4Z{cyCl)RS0bT&rJ38k')


@cache
def overflows() -> bool:
    "Whether onnxruntime adds the products of bytes in 16 bits on this CPU, where they overflow in silence: so it is on x86 without VNNI."
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    conv, product = ort.InferenceSession(decompress(b85decode(PROBE)), options, providers=['CPUExecutionProvider']).run(None, {'x': np.full((1, 64, 4, 4), 255, np.uint8)})
    return bool((conv != 200).any() or (product != 4*255*127).any())


class Graph:
    "An ONNX graph as a function on the CPU: what it takes, as one array, gives what it answers. `threads`: default a physical core each."
    def __init__(self, model: bytes, threads: int | None = None):
        import onnxruntime as ort               # late: it has threads of its own from its import on, which do not survive a server's fork
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads or 0, 3
        if overflows(): options.add_session_config_entry('session.x64quantprecision', '1')      # exact sums; where they are anyway, it takes twice the time
        self.session = ort.InferenceSession(model, options, providers=['CPUExecutionProvider'])
        self.input = self.session.get_inputs()[0].name

    def __call__(self, x: np.ndarray) -> np.ndarray: return self.session.run(None, {self.input: x})[0]

    @property
    def metadata(self) -> dict[str, str]: return self.session.get_modelmeta().custom_metadata_map


class Predictor:
    """The model of a bundle. `Predictor(dir)(image, k=5)` gives `{label: probability}`, best first; a list gives a list.

    `threads`: how many compute one answer (default: a physical core each). One Predictor may serve many threads at once. Raises
    `FileNotFoundError` and `ValueError`: no bundle, a file of it missing or changed, written by a newer version.
    `.labels` in the order of the columns of `.probabilities`; `.card`: all of bundle.json."""
    def __init__(self, dir, threads: int | None = None):
        self.path = Path(dir)
        self.card, files = opened(self.path)
        if MODEL not in files: raise BadValue(f'bundle: {self.path/CARD} names no {MODEL}; ship it again')
        self.labels, self.input = self.card['labels'], self.card['input']
        self.run = Graph(files[MODEL], threads)     # uint8 pixels (n, h, w, 3) as `.pixels` makes them → probabilities (n, c)
        self._check_graph()

    def __repr__(self): return f'Predictor({str(self.path)!r}): {len(self.labels)} labels, images of {"×".join(map(str, self.input["size"]))} px'

    def __call__(self, x, k: int | None = None):
        "`{label: probability}`, best first, the `k` best or all, for a path, bytes, Pillow image or uint8 array `(h, w, 3)`; a list gives a list."
        if k is not None and k < 1: raise BadValue(f'k: at least 1, got {k}')
        many = isinstance(x, (list, tuple))
        answers = [self._ranked(p, k) for p in self.probabilities(x if many else [x])]
        return answers if many else answers[0]

    def probabilities(self, images) -> np.ndarray:
        "The probabilities `(n, c)` of the labels for `n` images, read and run 32 at a time."
        parts = [self.run(batch) for batch in batched(images, self.pixels)]
        return np.concatenate([np.empty((0, len(self.labels)), np.float32), *parts])

    def ranked(self, pixels, k: int | None = None) -> list[dict[str, float]]:
        "`{label: probability}`, best first, for each of a list of what `.pixels` gave; all of it is run as one batch."
        return [self._ranked(p, k) for p in self.run(np.stack(pixels))]

    def pixels(self, x) -> np.ndarray:
        "What the graph takes for one image: uint8 `(h, w, 3)` of the bundle's size."
        return pixels_of(x, self.input)

    def _ranked(self, p, k) -> dict[str, float]:
        return {self.labels[i]: float(p[i]) for i in np.argsort(-p, kind='stable')[:k]}

    def _check_graph(self):
        "The card may have been edited where no checksum sees it: the graph carries its own labels and input."
        own = {k: json.loads(v) for k, v in self.run.metadata.items() if k in ('labels', 'input')}
        for k, v in own.items():
            if v != self.card[k]: raise BadValue(f'bundle: {k} in {self.path/CARD} is not what {MODEL} was made with; ship it again')


def pixels_of(x, contract: dict) -> np.ndarray:
    "One image (path, bytes, Pillow image, uint8 array) as a bundle's graph takes it by its `contract` (`input` of bundle.json): uint8 `(h, w, 3)`."
    im = Image.fromarray(_checked(x)) if isinstance(x, np.ndarray) else read_image(x)
    return np.asarray(fit_to(im, contract))


def batched(images, pixels, n: int = BATCH):
    "`pixels(image)` of all images, stacked `n` at a time."
    for i in range(0, len(images), n): yield np.stack([pixels(x) for x in images[i:i+n]])


def sha256(data: bytes) -> str:
    "The checksum of a file's bytes, in hexadecimal."
    return hashlib.sha256(data).hexdigest()


def opened(path) -> tuple[dict, dict[str, bytes]]:
    "The card of a bundle and the content of its files by name, each as it was shipped; raises as `Predictor` does."
    path = Path(path)
    card = _read_card(path)
    return card, {name: _verified(path/name, digest) for name, digest in card['files'].items()}


def _read_card(path: Path) -> dict:
    if not path.is_dir(): raise NotThere(f'bundle: {path} {"is a file" if path.exists() else "does not exist"}; give the folder that `ship` wrote')
    if (path/'bundle'/CARD).is_file(): raise NotThere(f'bundle: {path} is a run; did you mean its bundle, {path/"bundle"}?')
    if not (path/CARD).is_file(): raise NotThere(f'bundle: {path} has no {CARD}; give the folder that `ship` wrote')
    try: card = json.loads((path/CARD).read_text(encoding='utf8'))
    except ValueError as e: raise BadValue(f'bundle: {path/CARD} is not JSON ({e})') from None
    if not isinstance(card, dict): raise BadValue(f'bundle: {path/CARD} holds no card; ship it again')
    if not isinstance(schema := card.get('schema'), int) or schema < 1: raise BadValue(f'bundle: {path/CARD} tells no schema version; ship it again')
    if schema > SCHEMA: raise BadValue(f'bundle: {path} was written by a newer fastrecipes (schema {schema}, this one reads {SCHEMA}); upgrade fastrecipes')
    if missing := [k for k, kind in (('labels', list), ('input', dict), ('files', dict)) if not isinstance(card.get(k), kind)]:
        raise BadValue(f'bundle: {path/CARD} lacks {", ".join(missing)}; ship it again')
    return card


def _verified(file: Path, digest: str) -> bytes:
    "The content of a file of the bundle, if it is what was shipped."
    if not file.is_file(): raise NotThere(f'bundle: {file} is missing; ship it again')
    data = file.read_bytes()
    if sha256(data) != digest: raise BadValue(f'bundle: {file} is not the file that was shipped (its sha256 differs); ship it again')
    return data


def _checked(a: np.ndarray) -> np.ndarray:
    if a.dtype == np.uint8 and a.ndim == 3 and a.shape[2] == 3 and a.size: return a
    raise BadValue(f'image: an array must be uint8 (height, width, 3), got {a.dtype} {a.shape}; pass several images as a list')
