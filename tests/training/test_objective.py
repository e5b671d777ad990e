"Techniques of stage loss: the values are tested in tests/test_objective.py, here what they take and refuse."
import numpy as np
import pytest
import torch
from fastai.basics import nn
from sklearn.utils.class_weight import compute_class_weight

from fastrecipes.objective import objective


def test_default_weights_are_scikit_learns_balanced_ones(toy):
    labels = [0]*40 + [1]*16 + [2]*8
    learn = toy(labels=labels).class_weights()
    expected = compute_class_weight('balanced', classes=np.arange(3), y=labels)
    assert objective(learn).class_weight.numpy() == pytest.approx(expected, rel=1e-6)
    assert learn.techniques['class_weights'].effect == 'weights 0.533 to 2.67, from the shares of the classes'


def test_a_class_without_samples_weighs_nothing(toy):
    assert objective(toy(labels=[0]*32 + [2]*32).class_weights()).class_weight.tolist() == [1., 0., 1.]


def test_class_weights_leave_the_validation_loss_alone_whatever_the_batch_size(toy):
    learn = toy(labels=[0]*5 + [1]*20 + [2]*39)
    plain = learn.validate()[0]
    learn.class_weights([5., 1., .2])
    for bs in (64, 8):
        learn.dls.loaders[1] = learn.dls.valid.new(bs=bs)
        assert learn.validate()[0] == pytest.approx(plain, rel=1e-6)


def test_balance_and_class_weights_correct_twice_in_fastai_and_are_refused_here(toy):
    learn = toy(labels=[0]*40 + [1]*16 + [2]*8).balance()
    with pytest.raises(ValueError, match="'class_weights' and 'balance' do not go together: each makes up for rare classes"): learn.class_weights()
    assert 'class_weights' not in learn.techniques
    with pytest.raises(ValueError, match='do not go together'): toy().use(balance=True, class_weights=True)


@pytest.mark.parametrize('weights, message', [([1, 2], 'one weight for each of the 3 classes, got 2'), ([1, -1, 1], 'must be ≥ 0 and not all 0, got'),
                                              ([0, 0, 0], 'must be ≥ 0 and not all 0')])
def test_bad_weights_are_refused(toy, weights, message):
    learn = toy()
    learn.dls.c = 3
    with pytest.raises(ValueError, match=message): learn.class_weights(weights)


def test_what_has_no_classes_is_refused(toy):
    with pytest.raises(ValueError, match='class_weights: the loss must be a cross entropy'): toy(loss_func=nn.MSELoss(), labels=torch.randn(64, 3)).class_weights()


def test_equal_weights_are_said_to_change_nothing(toy, capsys):
    toy(n=48, labels=[0, 1, 2]*16).class_weights()
    assert 'class_weights: the classes weigh the same' in capsys.readouterr().out
