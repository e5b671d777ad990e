"Files of pixels: what lies in them, that they are whole, that what was done is not done again, that a full disk is no end."
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fastrecipes.data import decoded
from fastrecipes.data.decoded import NoRoom, decode_once
from fastrecipes.errors import BadValue
from fastrecipes.files import in_bytes


@pytest.fixture
def files(tmp_path):
    "300 pictures of 5×4 px, each of one colour of its own."
    (tmp_path/'in').mkdir()
    for i in range(300): Image.new('RGB', (5, 4), (i % 256, i//256, 7)).save(tmp_path/'in'/f'{i:03}.png')
    return sorted((tmp_path/'in').iterdir())


def pixels(file): return np.asarray(Image.open(file)).transpose(2, 0, 1)


def test_every_picture_lies_in_its_row(files, tmp_path, capsys):
    a = np.load(decode_once(files, 'as it is', pixels, tmp_path/'out'), mmap_mode='r')
    assert a.dtype == np.uint8 and a.shape == (300, 3, 4, 5) and np.array_equal(a, np.stack([pixels(f) for f in files]))
    assert capsys.readouterr().out == f'cache: 300 images to decode once, 5×4 px, 18.0 kB in {tmp_path/"out"}\n' and [f.suffix for f in (tmp_path/'out').iterdir()] == ['.npy']


def test_the_same_is_found_again_and_what_changed_is_not(files, tmp_path):
    seen = Counter()
    def once(f): seen[f] += 1; return pixels(f)
    first = decode_once(files, 'a', once, tmp_path/'out')
    seen.clear()
    assert decode_once(files, 'a', once, tmp_path/'out') == first and not seen
    others = decode_once(files, 'b', once, tmp_path/'out'), decode_once(files[1:], 'a', once, tmp_path/'out')
    Image.new('RGB', (5, 4), 'white').save(files[3])
    changed = decode_once(files, 'a', once, tmp_path/'out')
    assert len({first, *others, changed}) == 4 and np.load(changed)[3].min() == 255


def test_one_that_cannot_be_decoded_leaves_no_file_and_the_others_are_not_decoded_again(files, tmp_path):
    seen = Counter()
    def most(f, broken=files[299]):
        seen[f] += 1
        if f == broken: raise BadValue('broken')
        return pixels(f)
    with pytest.raises(BadValue, match='broken'): decode_once(files, 'a', most, tmp_path/'out', workers=1)
    assert not list((tmp_path/'out').glob('*.npy')) and sum(seen.values()) > 200
    seen.clear()
    a = np.load(decode_once(files, 'a', lambda f: most(f, None), tmp_path/'out', workers=1))
    assert sum(seen.values()) < 100 and np.array_equal(a, np.stack([pixels(f) for f in files]))


def test_pictures_of_different_sizes_are_refused_by_name(files, tmp_path):
    Image.new('RGB', (6, 4)).save(files[9])
    with pytest.raises(ValueError, match=r'cache: images must come out in one size, got 6×4 px for .*009\.png and 5×4 px for .*000\.png; resize them'):
        decode_once(files, 'a', pixels, tmp_path/'out')


KILLED = '''
import sys, time, numpy as np
from pathlib import Path
from fastrecipes.data import decoded
decoded.FLUSH = 0.
files = sorted(Path(sys.argv[1]).iterdir())
def slow(f):
    time.sleep(.005)
    return np.full((1, 2, 2), int(f.stem) % 256, np.uint8)
decoded.decode_once(files, 'slow', slow, Path(sys.argv[2]), workers=2)
'''


def test_killed_at_any_moment_it_goes_on_where_it_was(files, tmp_path):
    run = [sys.executable, '-c', KILLED, str(tmp_path/'in'), str(tmp_path/'out')]
    child = subprocess.Popen(run, stdout=subprocess.DEVNULL)
    while not any((tmp_path/'out').glob('*.done')) or not np.fromfile(next((tmp_path/'out').glob('*.done')), np.uint8).any(): time.sleep(.01)
    child.kill()
    child.wait()
    assert not list((tmp_path/'out').glob('*.npy'))
    there = np.fromfile(next((tmp_path/'out').glob('*.done')), np.uint8)
    asked = []
    def rest(f): asked.append(f); return np.full((1, 2, 2), int(f.stem) % 256, np.uint8)
    a = np.load(decode_once(files, 'slow', rest, tmp_path/'out', workers=1))
    assert 0 < there.sum() < 300 and asked[1:] == [f for f, t in zip(files, there) if not t]       # the first tells the shape
    assert (a[:, 0, 0, 0] == np.arange(300) % 256).all()


def test_two_who_ask_at_once_decode_once(files, tmp_path):
    seen, got = Counter(), []
    def once(f): seen[f] += 1; return pixels(f)
    threads = [threading.Thread(target=lambda: got.append(decode_once(files, 'a', once, tmp_path/'out'))) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(set(got)) == 1 and len(got) == 4 and sum(seen.values()) == 301


def test_a_disk_that_is_too_full_is_told_before_anything_is_decoded(files, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded.shutil, 'disk_usage', lambda p: type('U', (), dict(free=15_000)))
    with pytest.raises(NoRoom, match=r'18\.0 kB are needed and 15\.0 kB are free in'): decode_once(files, 'a', pixels, tmp_path/'out')
    assert not list((tmp_path/'out').glob('*.part'))


@pytest.mark.skipif(os.name == 'nt', reason='the room is not taken beforehand there')
def test_the_room_is_taken_before_it_is_written_to(files, tmp_path, monkeypatch):
    def full(fd, offset, n): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(decoded.os, 'posix_fallocate', full)
    with pytest.raises(NoRoom, match='No space left on device'): decode_once(files, 'a', pixels, tmp_path/'out')
    assert not list((tmp_path/'out').glob('*.part'))


def test_a_folder_that_cannot_be_written_is_told(files, tmp_path):
    (tmp_path/'out').write_text('a file')
    with pytest.raises(NoRoom, match='out cannot be written'): decode_once(files, 'a', pixels, tmp_path/'out')


@pytest.mark.parametrize('n, words', [(0, '0.0 kB'), (1_234, '1.2 kB'), (153_600_000, '153.6 MB'), (7_526_400_000, '7.5 GB')])
def test_sizes_in_words(n, words): assert in_bytes(n) == words
