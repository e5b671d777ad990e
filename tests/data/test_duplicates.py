"Near-duplicates: planted ones are found, different pictures are not; what is remembered of the scan."
import io
import json
import time
from base64 import b64decode, b64encode

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import dctn
from sklearn.datasets import load_digits, load_sample_images

from fastrecipes.data import scan as scan_module
from fastrecipes.data.duplicates import DISTANCE, LIKENESS, greys, near_pairs, phash, phashes
from fastrecipes.data.folders import image_folder
from fastrecipes.data.scan import verdicts


def pictures(n, side=96, seed=0):
    "Different scenes: the parts of two photographs with the most in them."
    rng, photos = np.random.default_rng(seed), [Image.fromarray(a) for a in load_sample_images().images]
    parts = [photos[p].crop((x, y, x+side, y+side)) for p in range(2) for x in range(0, 640-side, side*3//4) for y in range(0, 427-side, side*3//4)]
    full = sorted(parts, key=lambda im: -np.asarray(im.convert('L').resize((8, 8), Image.Resampling.BOX)).std())[:n]
    return [full[i] for i in rng.permutation(n)]


def jpeg(im, quality):
    im.save(buffer := io.BytesIO(), 'JPEG', quality=quality)
    return Image.open(buffer).convert('RGB')


CHANGES = dict(saved_again=lambda im: jpeg(im, 60), brighter=lambda im: ImageEnhance.Brightness(im).enhance(1.08), cut=lambda im: im.crop((1, 1, im.width, im.height)),
               halved=lambda im: im.resize((im.width//2, im.height//2)), doubled=lambda im: jpeg(im.resize((2*im.width, 2*im.height)), 80),
               grey=lambda im: im.convert('L').convert('RGB'))


@pytest.mark.parametrize('change', CHANGES)
def test_a_planted_near_duplicate_is_found_and_nothing_else(change):
    ims = pictures(40)
    found = near_pairs([phash(im) for im in [*ims, *(CHANGES[change](im) for im in ims[:20])]])
    assert sorted(map(tuple, found.tolist())) == [(i, 40+i) for i in range(20)]


def test_the_hash_is_that_of_the_cosine_transform_by_scipy():
    im = pictures(1, 32)[0]
    c = dctn(np.asarray(im.convert('L'), float), norm='ortho')[:8, :8].ravel()
    raw = np.frombuffer(b64decode(phash(im)), np.uint8)
    assert np.array_equal(np.unpackbits(raw[:8]), c > np.median(c[1:]))
    assert np.abs(raw[8:].view(np.int8)[1:] - 127*c[1:]/np.linalg.norm(c[1:])).max() < .51 and raw[8] == 0


def test_pairs_are_those_that_each_with_each_finds():
    "Against the definition, pair by pair: 300 hashes around 12 centres, at all distances."
    rng = np.random.default_rng(1)
    centres = rng.normal(0, 40, (12, 8, 8))
    looks = [np.kron(centres[i % 12] + rng.normal(0, rng.choice([1, 4, 8]), (8, 8)), np.ones((4, 4))) + 128 for i in range(300)]
    hashes = phashes([np.clip(o, 0, 255).astype(np.uint8).tobytes() for o in looks])
    raw = np.stack([np.frombuffer(b64decode(h), np.uint8) for h in hashes])
    bits, v = np.unpackbits(raw[:, :8], axis=1), raw[:, 8:].view(np.int8).astype(float)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    expected = {(i, j) for i in range(300) for j in range(i+1, 300) if (bits[i] != bits[j]).sum() <= DISTANCE and v[i] @ v[j] >= LIKENESS}
    found = list(map(tuple, near_pairs(hashes).tolist()))
    assert len(found) == len(set(found)) and set(found) == expected and 100 < len(expected) < 5000


@pytest.mark.parametrize('bits, angle, near', [(8, 0, True), (9, 0, False), (0, 7.5, True), (0, 8.9, False)])
def test_where_near_ends(bits, angle, near):
    "8 bits apart, wherever they are, and 8.11°, whose cosine is .99."
    for at in (0, 20, 64-bits):
        rows = np.zeros((2, 72), np.uint8)
        rows[1, :8] = np.packbits([at <= i < at+bits for i in range(64)])
        rows[0, 9:11], rows[1, 9:11] = (127, 0), np.rint(127*np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))]))
        assert len(near_pairs([b64encode(r.tobytes()).decode() for r in rows])) == near


def test_flat_and_tiny_pictures_are_like_nothing():
    flat = [Image.new('RGB', (40, 40), (i, i, i)) for i in (0, 0, 128, 255)]
    tiny = [Image.fromarray(np.arange(225, dtype=np.uint8).reshape(15, 15))]*2
    assert [phash(im) for im in flat+tiny] == ['']*6 and len(near_pairs(['']*6)) == 0 and greys(tiny[0]) == b''


def test_digits_that_look_alike_are_no_near_duplicates():
    "1,797 scans of ten shapes, as large as MNIST's: the worst case of pictures that are alike and not the same."
    data = load_digits()
    pairs = near_pairs([phash(Image.fromarray((a*255/16).round().astype(np.uint8)).resize((28, 28), Image.Resampling.BICUBIC)) for a in data.images])
    assert len(pairs) <= 5 and (data.target[pairs[:, 0]] == data.target[pairs[:, 1]]).all()


def test_fifty_thousand_take_seconds():
    "Frequencies that fall as those of photographs do, so that some bits are much commoner together than others."
    rng, f = np.random.default_rng(0), np.hypot(*np.mgrid[:8, :8]).ravel()
    c = rng.normal(size=(50_000, 64))/np.maximum(f, 1)**1.5
    bits = np.packbits(c > np.median(c[:, 1:], axis=1, keepdims=True), axis=1)
    c[:, 0] = 0
    rows = np.hstack([bits, np.rint(127*c/np.linalg.norm(c, axis=1, keepdims=True)).astype(np.int8).view(np.uint8)])
    rows[-1] = rows[7]
    hashes, began = [b64encode(r.tobytes()).decode() for r in rows], time.process_time()
    assert (7, 49_999) in set(map(tuple, near_pairs(hashes).tolist()))
    assert time.process_time()-began < 10


def folder_of(root, side_by_side):
    "`root/<class>/<name>.png` of `{class/name: image}`."
    for name, im in side_by_side.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        im.save(root/f'{name}.png')
    return root


@pytest.fixture
def leaky(tmp_path):
    "Two classes of 20 pictures, each once more, saved again: 40 pairs."
    ims = pictures(40)
    return folder_of(tmp_path/'leaky', {f'{"ab"[i//20]}/{i}{kind}': f(im) for i, im in enumerate(ims) for kind, f in (('', lambda im: im), ('_again', CHANGES['saved_again']))})


def test_near_duplicates_on_two_sides_are_told_with_an_example_or_kept_together(leaky):
    def split_pairs(dls):
        side = {p.stem: n for n, dl in enumerate(dls.loaders) for p in dl.items}
        return [s for s in side if f'{s}_again' in side and side[s] != side[f'{s}_again']]
    dls = image_folder(leaky, size=16, bs=8)
    told = next(n for n in dls.holdings.notes if n.startswith('leakage'))
    apart, side = split_pairs(dls), {p.stem: n for n, dl in enumerate(dls.loaders) for p in dl.items}
    held = {s for a in apart for s in (a, f'{a}_again') if side[s]}
    assert apart and f'leakage: {len(held)} of the {len(dls.valid_ds)+len(dls.loaders[2].dataset)} images held out look like one on another side' in told
    assert any(f'{a}.png' in told and f'{a}_again.png' in told for a in apart) and "near_duplicates='together'" in told

    dls = image_folder(leaky, size=16, bs=8, near_duplicates='together')
    assert not split_pairs(dls) and not any(n.startswith('leakage') for n in dls.holdings.notes)
    assert [sum(n[s] for n in dls.holdings.counts.values()) for s in ('train', 'valid', 'test')] == [56, 16, 8]


def test_near_duplicates_with_two_labels_are_told(tmp_path):
    ims = pictures(20)
    root = folder_of(tmp_path/'torn', {f'{"ab"[i//10]}/{i}': im for i, im in enumerate(ims)} | {'b/wrong': CHANGES['brighter'](ims[3])})
    assert '1 pairs of images look alike and have different labels, such as a/3.png and b/wrong.png' in image_folder(root, size=16, bs=4).holdings.notes


def test_a_folder_without_them_is_told_nothing(digit_folder, photos):
    for folder in (digit_folder, photos): assert not [n for n in image_folder(folder, size=16, bs=4).holdings.notes if 'look' in n]


def test_a_wrong_choice_is_refused(photos):
    with pytest.raises(ValueError, match="near_duplicates: one of warn, together, got 'togehter'; did you mean 'together'"):
        image_folder(photos, size=16, bs=4, near_duplicates='togehter')


def test_verdicts_of_another_schema_are_looked_for_again(photos):
    files = sorted((photos/'cat').iterdir())
    now = verdicts(files)
    memory = scan_module._memory(files)
    old = {str(p): [f'{p.stat().st_size}-{p.stat().st_mtime_ns}', dict(digest='x', width=1, height=1, reason='old')] for p in files}         # as the first schema had it
    assert json.loads(memory.read_text()).keys() == old.keys()
    memory.write_text(json.dumps(old))
    assert verdicts(files) == now and all(v.phash == phash(Image.open(p)) for p, v in now.items())
