"Balanced sampling, counted."
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastrecipes.data.balance import BalanceClassSampler, WeightedSampler
from fastrecipes.data.folders import image_folder
from fastrecipes.technique import discover

discover()
LABELS = [0]*10 + [1]*4 + [7]*3


@pytest.mark.parametrize('mode, n', [('upsampling', 10), ('downsampling', 3)])
def test_each_class_gets_n_draws_and_its_samples_their_share(mode, n):
    drawn = np.bincount(list(BalanceClassSampler(LABELS, mode, seed=1)), minlength=17)
    assert len(BalanceClassSampler(LABELS, mode)) == 3*n
    for m in (range(10), range(10, 14), range(14, 17)):
        counts = drawn[list(m)]
        assert counts.sum() == n and set(counts) <= {n//len(m), n//len(m)+1}        # ⌊n/m⌋ each, the rest without repetition


def test_epochs_differ_and_seeds_repeat_them():
    a, b = BalanceClassSampler(LABELS, seed=1), BalanceClassSampler(LABELS, seed=1)
    first = list(a)
    assert list(b) == first != list(a)


def test_it_works_as_a_plain_torch_sampler_on_todays_torch():
    x = torch.arange(17)
    drawn = torch.cat([b[0] for b in DataLoader(TensorDataset(x), batch_size=5, sampler=BalanceClassSampler(LABELS, seed=0))])
    assert len(drawn) == 30                     # catalyst 22.4's raises TypeError here


def test_weights_give_the_expected_class_shares():
    drawn = WeightedSampler(LABELS*100, [1., 2., 0, 0, 0, 0, 0, 4.]).draw(np.random.default_rng(0))
    shares = np.bincount(np.array(LABELS*100)[drawn], minlength=8)/len(drawn)
    assert shares[[0, 1, 7]] == pytest.approx(np.array([10, 8, 12])/30, abs=.03)


@pytest.mark.parametrize('weights', [[1., 2.], [-1.]*8, [0.]*8])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match='weights: one number ≥ 0 for each of the 8 classes'): WeightedSampler(LABELS, weights)


def drawn_labels(learn): return np.bincount([int(y) for _, y in (learn.dls.train.dataset[d % len(learn.dls.train.dataset)] for d in learn.dls.train.get_idxs())])


def test_the_technique_balances_training_and_leaves_validation(toy):
    learn = toy(labels=[0]*40 + [1]*20 + [2]*4)
    valid = learn.dls.valid
    learn.balance()
    assert drawn_labels(learn).tolist() == [40, 40, 40] and learn.dls.valid is valid
    assert learn.techniques['balance'].effect == '120 draws an epoch by upsampling (4 to 40 samples a class in the data)'
    learn.balance('downsampling')
    assert drawn_labels(learn).tolist() == [4, 4, 4]


def test_balanced_data_are_said_to_be_balanced(toy):
    assert 'balanced already: 21 samples each' in toy(n=63, labels=[0, 1, 2]*21).balance().techniques['balance'].effect


def test_weighted_draws_in_inverse_proportion(toy):
    learn = toy(n=640, labels=[0]*400 + [1]*200 + [2]*40).balance('weighted')
    assert drawn_labels(learn)/640 == pytest.approx(np.full(3, 1/3), abs=.06)


def test_a_weighted_loader_keeps_its_weights_through_new_as_fastais_does_not(toy):
    learn = toy(labels=[0]*60 + [1]*4).balance()
    assert learn.dls.train.new().sampler is learn.dls.train.sampler and len(learn.dls.train.new()) == 120//16


def test_predictions_on_the_training_set_cover_it_once(toy):
    learn = toy(labels=[0]*60 + [1]*4).balance()
    _, targets = learn.get_preds(ds_idx=0)
    assert torch.bincount(targets).tolist() == [60, 4]


def test_it_counts_the_labels_of_an_image_folder_without_decoding(digit_folder):
    from fastai.basics import Learner, nn
    dls = image_folder(digit_folder, size=8, bs=8, workers=0)
    learn = Learner(dls, nn.Flatten(), loss_func=nn.CrossEntropyLoss()).balance()
    n = {c: v['train'] for c, v in dls.holdings.counts.items()}
    assert len(learn.dls.train.sampler) == 10*max(n.values())


@pytest.mark.parametrize('kwargs, message', [(dict(mode='upsample'), "mode must be .* did you mean 'upsampling'"), (dict(weights=[1, 2]), "weights go with mode='weighted'")])
def test_bad_arguments(toy, kwargs, message):
    with pytest.raises(ValueError, match=message): toy().balance(**kwargs)


def test_targets_without_a_class_are_refused(toy):
    with pytest.raises(ValueError, match='each sample must have one class'): toy(labels=torch.rand(64, 3)).balance()
