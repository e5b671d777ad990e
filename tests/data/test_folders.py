"A folder of images: classes, splits, bad files, and what a user may get wrong."
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from fastai.vision.all import PILImage

from fastrecipes.data import scan as scan_module
from fastrecipes.data.folders import Fit, image_folder
from fastrecipes.data.scan import verdicts
from fastrecipes.data.splits import split


def folder(path, **kwargs): return image_folder(path, **{**dict(size=16, bs=4, workers=0), **kwargs})


def test_counts_shares_and_loaders_agree(digit_folder):
    dls = folder(digit_folder, valid=.2, test=.3)
    counts = dls.holdings.counts
    assert {c: sum(n.values()) for c, n in counts.items()} == {p.name: len(list(p.iterdir())) for p in digit_folder.iterdir()}
    assert [len(dl.dataset) for dl in dls.loaders] == [sum(n[s] for n in counts.values()) for s in ('train', 'valid', 'test')]
    assert all(abs(n['valid']/sum(n.values()) - .2) < .06 and n['test'] > 0 for n in counts.values())
    assert list(dls.vocab) == list('0123456789')


def test_pixels_are_pillows(photos):
    dls = folder(photos, size=8)
    x = dls.valid.one_batch()[0][0]
    expected = np.asarray(ImageOps.fit(Image.open(dls.valid.items[0]), (8, 8), Image.Resampling.BILINEAR))
    assert np.array_equal((x.permute(1, 2, 0).numpy()*255).round(), expected)


@pytest.mark.parametrize('resize, first_row_is_black', [('crop', False), ('squish', False), ('pad', True)])
def test_each_resize_gives_the_size(resize, first_row_is_black):
    im = Fit((8, 8), resize)(PILImage.create(np.full((6, 12, 3), 200, dtype=np.uint8)))
    assert im.size == (8, 8) and (np.asarray(im)[0].max() == 0) == first_row_is_black


def test_the_same_seed_is_the_same_split_and_another_is_not(photos):
    def valid(seed): return sorted(p.name+p.parent.name for p in folder(photos, seed=seed).valid.items)
    assert valid(1) == valid(1) != valid(2)


def test_five_bad_files_are_set_aside_and_the_rest_is_unchanged(photos):
    before = [sorted(map(str, dl.items)) for dl in folder(photos).loaders]
    good = (photos/'cat'/'0.png').read_bytes()
    (photos/'cat'/'truncated.png').write_bytes(good[:len(good)//2])
    (photos/'cat'/'empty.png').touch()
    (photos/'dog'/'text.png').write_text('not a picture')
    (photos/'dog'/'photo.txt').write_bytes(good)
    Image.new('RGB', (1, 1)).save(photos/'dog'/'dot.png')
    dls = folder(photos)
    assert [sorted(map(str, dl.items)) for dl in dls.loaders] == before
    reasons = {os.path.basename(p): why for p, why in dls.holdings.set_aside}
    assert reasons.keys() == {'truncated.png', 'empty.png', 'text.png', 'photo.txt', 'dot.png'}
    assert 'truncated' in reasons['truncated.png'] and 'empty' in reasons['empty.png'] and 'not an image' in reasons['text.png']
    assert reasons['dot.png'].startswith('1×1 px') and '.txt' in reasons['photo.txt']


def test_a_wrong_extension_of_a_good_image_is_read(photos):
    Image.new('RGB', (9, 9), 'red').save(photos/'cat'/'really_jpeg.png', format='JPEG')
    assert not folder(photos).holdings.set_aside


def test_verdicts_are_remembered_until_the_file_changes(photos, monkeypatch):
    files = sorted((photos/'cat').iterdir())
    verdicts(files)
    looked = []
    look = scan_module._look
    monkeypatch.setattr(scan_module, '_look', lambda p: looked.append(p.name) or look(p))
    verdicts(files)
    assert looked == []
    Image.new('RGB', (5, 5)).save(files[3])
    assert verdicts(files)[files[3]].width == 5 and looked == [files[3].name]


def test_copies_of_an_image_stay_on_one_side(photos):
    for i in range(8): shutil.copy(photos/'cat'/'1.png', photos/'cat'/f'copy{i}.png')
    dls = folder(photos, valid=.3, test=.3)
    assert dls.holdings.duplicates == 8
    sides = [{p.name for p in dl.items if p.parent.name == 'cat' and (p.name == '1.png' or 'copy' in p.name)} for dl in dls.loaders]
    assert sum(bool(s) for s in sides) == 1


def test_given_train_and_valid_folders_are_kept_and_test_is_taken_from_train(tmp_path, photos):
    for side, numbers in (('train', range(7)), ('val', range(7, 10))):
        for label in ('cat', 'dog'):
            (tmp_path/'split'/side/label).mkdir(parents=True)
            for i in numbers: shutil.copy(photos/label/f'{i}.png', tmp_path/'split'/side/label)
    dls = folder(tmp_path/'split', test=.2)
    assert sorted(int(p.stem) for p in dls.valid.items) == [7, 7, 8, 8, 9, 9]
    assert dls.holdings.counts['cat'] == dict(train=6, valid=3, test=1) and list(dls.vocab) == ['cat', 'dog']


def test_an_image_that_lies_on_two_given_sides_is_noted(tmp_path, photos):
    for side in ('train', 'valid'): shutil.copytree(photos, tmp_path/'both'/side)
    assert '20 images lie in more than one of train, valid and test' in folder(tmp_path/'both', test=0).holdings.notes


def test_empty_root(tmp_path):
    with pytest.raises(ValueError, match='path: no images in'): folder(tmp_path)


def test_no_such_folder_and_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='path: .*nowhere does not exist'): folder(tmp_path/'nowhere')
    (tmp_path/'f').touch()
    with pytest.raises(ValueError, match='is a file'): folder(tmp_path/'f')


def test_one_class(photos):
    shutil.rmtree(photos/'dog')
    with pytest.raises(ValueError, match="only one class, 'cat'"): folder(photos)


def test_an_empty_class_folder(photos):
    (photos/'bird').mkdir()
    with pytest.raises(ValueError, match="class 'bird' of .* has no readable image"): folder(photos)


def test_a_class_only_in_valid(tmp_path, photos):
    for side in ('train', 'valid'): shutil.copytree(photos, tmp_path/'s'/side)
    shutil.copytree(photos/'cat', tmp_path/'s'/'valid'/'bird')
    with pytest.raises(ValueError, match="class 'bird' is in .* but not in its train folder"): folder(tmp_path/'s')


def test_an_argument_that_it_does_not_take_is_answered_with_the_nearest(photos):
    with pytest.raises(TypeError, match="image_folder: no argument 'sise'; did you mean 'size'"): image_folder(photos, sise=64)
    with pytest.raises(ValueError, match='size must be a whole number'): image_folder(photos, size=(80, 72))


def test_a_batch_larger_than_the_data(photos):
    with pytest.raises(ValueError, match='bs: 64 is more than the 14 training images; use bs=7 or less'): folder(photos, bs=64)


@pytest.mark.parametrize('kwargs, message', [(dict(resize='corp'), "resize: .*did you mean 'crop'"), (dict(valid=1.2), r'valid: a share of the images in \[0, 1\), got 1.2'),
                                             (dict(valid=.6, test=.5), 'must leave images to train on'), (dict(size=0), 'size: at least 8'), (dict(bs=0), 'bs: at least 1')])
def test_values_outside_their_domain(photos, kwargs, message):
    with pytest.raises(ValueError, match=message): folder(photos, **kwargs)


def test_the_split_by_hand():
    sides = split([f'd{i}' for i in range(20)], ['a']*10 + ['b']*10, valid=.2, test=.1, seed=0)
    assert [sides[:10].count(s) for s in ('train', 'valid', 'test')] == [7, 2, 1] == [sides[10:].count(s) for s in ('train', 'valid', 'test')]


def test_a_new_image_moves_only_those_at_the_boundaries():
    digests = [f'd{i}' for i in range(1000)]
    a, b = split(digests, ['x']*1000), split([*digests, 'new'], ['x']*1001)
    assert sum(u != v for u, v in zip(a, b)) <= 2


@pytest.mark.parametrize('n, sides', [(1, {'train'}), (2, {'train', 'valid'}), (3, {'train', 'valid', 'test'})])
def test_small_classes_train_first(n, sides):
    assert set(split([f'd{i}' for i in range(n)], ['a']*n)) == sides


def test_predict_takes_a_path_as_text_or_path_bytes_an_image_or_an_array(photos):
    import numpy as np
    from fastai.basics import Learner, nn
    dls = image_folder(photos, size=8, bs=4)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 2)))
    file = photos/'cat'/'0.png'
    with learn.no_bar():
        answers = [learn.predict(x)[2] for x in (file, str(file), file.read_bytes(), Image.open(file), np.asarray(Image.open(file)))]
    assert all(torch.allclose(a, answers[0]) for a in answers)
