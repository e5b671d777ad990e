"The mends of fastai, each named after its defect."
import math

import numpy as np
import pytest


def rates(learn, n, **kwargs):
    learn.fit_flat_cos(n, 1., **kwargs)
    return learn.recorder.lrs


def test_fit_flat_cos_is_flat_then_a_cosine(toy):
    lrs = rates(toy(), 4, pct_start=.5)
    t = np.arange(16)/16
    expected = [1. if p < .5 else 1e-5 + (1+math.cos(math.pi*(p-.5)/.5))/2*(1-1e-5) for p in t]
    assert lrs == pytest.approx(expected, rel=1e-5)


def test_fit_flat_cos_ignores_start_epoch_in_fastai_and_not_here(toy):
    assert rates(toy(), 4, start_epoch=3) == pytest.approx(rates(toy(), 4)[-4:])
