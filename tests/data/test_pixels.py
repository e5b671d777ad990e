"Every mode, orientation and way to be broken that an image file can have, against values worked out by hand."
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from fastrecipes.data.pixels import fit_image, read_image
from fastrecipes.errors import BadValue


def encoded(im, format='PNG', **kwargs):
    im.save(buffer := io.BytesIO(), format, **kwargs)
    return buffer.getvalue()


def palette(im_mode='P'):
    im = Image.new(im_mode, (3, 2), 1)
    im.putpalette([9, 9, 9, 10, 20, 30])
    return im


def deep(value, dtype=np.uint16): return Image.fromarray(np.full((2, 3), value, dtype))


CASES = {                                           # what is in the file → the RGB that it means
    'black and white': (encoded(Image.new('1', (3, 2), 1)), (255, 255, 255)),
    'grey': (encoded(Image.new('L', (3, 2), 100)), (100, 100, 100)),
    'palette': (encoded(palette()), (10, 20, 30)),
    'palette, one entry half transparent': (encoded(palette(), transparency=bytes([255, 51])), (206, 208, 210)),    # 255 − .2·(255−v)
    'GIF with a transparent entry': (encoded(palette(), 'GIF', transparency=1), (255, 255, 255)),
    'grey with alpha': (encoded(Image.new('LA', (3, 2), (100, 51))), (224, 224, 224)),                              # 255 − .2·155
    'RGB with alpha': (encoded(Image.new('RGBA', (3, 2), (200, 0, 50, 51))), (244, 204, 214)),
    'RGB, one colour transparent': (encoded(Image.new('RGB', (3, 2), (10, 20, 30)), transparency=(10, 20, 30)), (255, 255, 255)),
    'RGB, another colour transparent': (encoded(Image.new('RGB', (3, 2), (10, 20, 30)), transparency=(1, 2, 3)), (10, 20, 30)),
    '16 bits, white': (encoded(deep(65535)), (255, 255, 255)),
    '16 bits, mid grey': (encoded(deep(128*257)), (128, 128, 128)),
    '16 bits, dark: clipped it would be white': (encoded(deep(1000)), (4, 4, 4)),                                   # 1000/257 = 3.89
    '16 bits, just below 128.5': (encoded(deep(33023)), (128, 128, 128)),                                           # 33023/257 = 128.49
    '16 bits, big-endian TIFF': (encoded(deep(40*257, '>u2'), 'TIFF'), (40, 40, 40)),
    '32-bit integers': (encoded(deep(77*257, np.int32), 'TIFF'), (77, 77, 77)),
    'CMYK': (encoded(Image.new('CMYK', (3, 2), (100, 150, 200, 50)), 'TIFF'), (125, 84, 44)),                       # (255−c)·(255−k)/255
}


@pytest.mark.parametrize('data, colour', CASES.values(), ids=CASES)
def test_every_mode_becomes_8_bit_rgb(data, colour):
    im = read_image(data)
    assert im.mode == 'RGB' and im.size == (3, 2)
    assert np.array_equal(np.asarray(im), np.full((2, 3, 3), colour))


@pytest.mark.parametrize('mode, value, colour', [('La', (20, 51), (224, 224, 224)), ('RGBa', (40, 0, 10, 51), (244, 204, 214)),
                                                 ('RGBX', (1, 2, 3, 0), (1, 2, 3)), ('I;16B', 40*257, (40, 40, 40))])
def test_modes_that_only_pillow_images_have(mode, value, colour):
    assert read_image(Image.new(mode, (1, 1), value)).getpixel((0, 0)) == colour


def test_a_16_bit_png_may_declare_one_grey_transparent():
    data = encoded(Image.fromarray(np.array([[1000, 2570]], np.uint16)))
    chunk, at = b'tRNS' + struct.pack('>H', 1000), data.index(b'IDAT')-4
    data = data[:at] + struct.pack('>I', 2) + chunk + struct.pack('>I', zlib.crc32(chunk)) + data[at:]
    assert np.asarray(read_image(data))[0, :, 0].tolist() == [255, 10]


@pytest.mark.parametrize('orientation, turn', [
    (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud), (5, lambda a: a.transpose(1, 0, 2)),
    (6, lambda a: np.rot90(a, -1)), (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)), (8, lambda a: np.rot90(a, 1))])
def test_images_stand_upright(orientation, turn):
    a = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)*10
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(read_image(encoded(Image.fromarray(a), exif=exif))), turn(a))


def test_a_photo_taken_sideways_stands_upright(tmp_path):
    a = np.zeros((16, 32, 3), np.uint8)
    a[:, :16] = 255                                 # white on the left; turned clockwise it is on top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(a).save(tmp_path/'a.jpg', exif=exif, quality=100)
    b = np.asarray(read_image(tmp_path/'a.jpg'))
    assert b.shape == (32, 16, 3) and b[:15].min() > 250 and b[17:].max() < 5


def test_unreadable_exif_data_do_not_cost_the_image():
    assert read_image(encoded(Image.new('RGB', (8, 8), (200, 200, 200)), 'JPEG', exif=b'Exif\0\0garbage')).getpixel((4, 4)) == (200, 200, 200)


@pytest.mark.parametrize('format', ['GIF', 'PNG'])
def test_the_first_frame_of_an_animation(format):
    frames = [Image.new('RGB', (4, 4), c) for c in ('red', 'blue')]
    assert read_image(encoded(frames[0], format, save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


def test_all_sources_give_the_same_pixels(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(a).save(p := tmp_path/'a.png')
    data = p.read_bytes()
    with p.open('rb') as file:
        for source in (p, str(p), data, bytearray(data), memoryview(data), io.BytesIO(data), file, Image.open(p), Image.fromarray(a)):
            assert np.array_equal(np.asarray(read_image(source)), a)


def test_what_comes_back_is_a_copy():
    im = Image.new('RGB', (2, 2), 'black')
    read_image(im).putpixel((0, 0), (255, 0, 0))
    assert im.getpixel((0, 0)) == (0, 0, 0)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize('content, says', [
    (b'', 'the file is empty'),
    (b'hello, I am text', 'not an image'),
    (encoded(NOISE)[:2000], 'image file is truncated'),
    (encoded(NOISE, 'JPEG')[:900], 'image file is truncated'),
    (encoded(NOISE, 'GIF')[:1500], 'image file is truncated'),
    (encoded(NOISE, 'BMP')[:1500], 'image file is truncated'),
    (encoded(Image.fromarray(np.full((2, 2), .5, np.float32)), 'TIFF'), 'floating point'),
    (encoded(NOISE, 'EPS'), 'EPS is a program')], ids=lambda v: v if isinstance(v, str) else '')
def test_a_bad_file_is_one_sentence_with_its_name(tmp_path, content, says):
    (p := tmp_path/'holiday.png').write_bytes(content)
    with pytest.raises(BadValue, match=says) as e: read_image(p)
    assert str(e.value).startswith(f'{p}: ') and '\n' not in str(e.value)
    with pytest.raises(BadValue, match=f'^image: .*{says}'): read_image(content)
    with p.open('rb') as file, pytest.raises(BadValue, match='holiday.png: '): read_image(file)


@pytest.mark.parametrize('source, says', [('nowhere/a.png', r'^nowhere.a\.png: no such file'), (io.StringIO('abc'), 'open as text'), (None, 'not NoneType')])
def test_what_is_no_image_source_is_refused(source, says):
    with pytest.raises(BadValue, match=says): read_image(source)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(BadValue, match='^' + str(tmp_path)): read_image(tmp_path)


def test_truncated_images_stay_refused_for_everybody(): assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('side', [32, 40, 100])
def test_decompression_bombs_are_refused(monkeypatch, side):
    "Pillow warns from its limit to twice that, and raises above."
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(BadValue, match='too many pixels'): read_image(encoded(Image.new('L', (side, side))))
    assert read_image(encoded(Image.new('L', (30, 30)))).size == (30, 30)


@pytest.mark.filterwarnings('ignore')
def test_no_bare_error_of_a_decoder_gets_out():
    "Pillow 13's AVIF decoder, for one, raises RuntimeError."
    rng, refused = np.random.default_rng(0), 0
    for format in ['PNG', 'JPEG', 'GIF', 'BMP', 'WEBP', *['AVIF']*features.check('avif')]:
        whole = encoded(NOISE.resize((16, 16)), format)
        for _ in range(100):
            data = bytearray(whole)
            for at in rng.integers(0, min(len(data), 200), 4): data[at] = rng.integers(256)
            try: assert read_image(data).mode == 'RGB'
            except BadValue: refused += 1
    assert refused > 50


ROW = Image.fromarray(np.array([[[10]*3, [20]*3, [30]*3, [40]*3]]*2, np.uint8))     # 4 wide, 2 high


@pytest.mark.parametrize('size, resize, centering, expected', [
    ((2, 2), 'crop', (.5, .5), [[20, 30]]*2),
    ((2, 2), 'crop', (0., .5), [[10, 20]]*2),
    ((4, 1), 'crop', (.5, 0.), [[10, 20, 30, 40]]),
    ((4, 4), 'pad', (.5, .5), [[0]*4, [10, 20, 30, 40], [10, 20, 30, 40], [0]*4]),
    ((4, 4), 'pad', (.5, 1.), [[0]*4, [0]*4, [10, 20, 30, 40], [10, 20, 30, 40]]),
    ((4, 2), 'squish', (.5, .5), [[10, 20, 30, 40]]*2)])
def test_fit_image_cuts_pads_or_distorts(size, resize, centering, expected):
    fitted = fit_image(ROW, size, resize, centering)
    assert fitted.size == size and np.asarray(fitted)[..., 0].tolist() == expected


@pytest.mark.parametrize('resize', ['crop', 'squish'])
def test_shrinking_is_bilinear_over_all_pixels(resize):
    "Pillow's triangle is as wide as two target pixels: weights .75, .75, .25 and .25, .75, .75 over their sum."
    a = np.repeat(np.array([[0, 0, 140, 140]], np.uint8).T, 4, 1)
    im = fit_image(Image.fromarray(np.stack([a]*3, -1)), (2, 2), resize)
    assert np.asarray(im)[..., 0].tolist() == [[20, 20], [120, 120]]


def test_an_unknown_resize_is_refused_with_the_nearest():
    with pytest.raises(BadValue, match="'cropp'; did you mean 'crop'"): fit_image(ROW, (2, 2), 'cropp')


def test_pixels_need_pillow_and_numpy_only():
    code = "import sys, fastrecipes.data.pixels; print(sorted(m for m in ('torch', 'fastai', 'timm', 'onnxruntime') if m in sys.modules))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ).stdout.strip() == '[]'
