"Cross entropy against probabilities, compared with torch's own and with a sum by hand."
import pytest
import torch
from torch.nn import functional as F

from fastrecipes.losses.classification import soft_cross_entropy, soft_targets


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(50, 7, generator=g, dtype=torch.float64)*3, torch.randint(7, (50,), generator=g), torch.rand(7, generator=g, dtype=torch.float64)+.1


@pytest.mark.parametrize('smoothing', [0., .1])
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_one_hot_targets_give_torchs_cross_entropy(batch, smoothing, weighted, reduction):
    logits, y, w = batch
    y[::9] = -100
    expected = F.cross_entropy(logits, y, w if weighted else None, label_smoothing=smoothing, reduction=reduction)
    got = soft_cross_entropy(logits, soft_targets(y, 7), w if weighted else None, smoothing, reduction)
    assert torch.allclose(got, expected, rtol=1e-12)


def test_weights_are_normalised_by_each_class_share_of_a_soft_target():
    logits, target, w = torch.tensor([[0., 0.], [0., 0.]]), torch.tensor([[1., 0.], [.25, .75]]), torch.tensor([1., 3.])
    # both classes cost log 2, so whatever the weights the weighted mean is log 2; a plain mean of weighted losses would be 1.75 log 2
    assert soft_cross_entropy(logits, target, w).item() == pytest.approx(.693147, abs=1e-6)
    assert soft_cross_entropy(logits, target, w, reduction='sum').item() == pytest.approx(3.5*.693147, abs=1e-5)


def test_saturated_half_precision_logits_stay_finite():
    logits = torch.tensor([[6e4, -6e4]], dtype=torch.float16)
    assert soft_cross_entropy(logits, torch.tensor([[0., 1.]])).item() == pytest.approx(119_936, rel=1e-3)
