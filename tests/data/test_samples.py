"The embedded digits."
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fastrecipes.data.samples import digits


def test_every_scan_is_there_pixel_for_pixel(tmp_path):
    files = sorted(digits(tmp_path).rglob('*.png'))
    data = load_digits()
    assert len(files) == 1797
    for f in files[::97]:
        i = int(f.stem)
        assert f.parent.name == str(data.target[i]) and np.array_equal(np.asarray(Image.open(f)), (data.images[i]*255/16).round())


def test_imbalance_is_the_ratio_of_commonest_to_rarest(digit_folder):
    counts = [len(list((digit_folder/str(d)).iterdir())) for d in range(10)]
    assert counts[0]/counts[9] == pytest.approx(10, rel=.1) and counts == sorted(counts, reverse=True)


def test_an_imbalance_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match='imbalance: 1 to 100, got 0.5'): digits(tmp_path, .5)
