"Techniques of stage loss: the values are tested in tests/test_objective.py, here what they take and refuse."
import numpy as np
import pytest
import torch
from fastai.basics import nn
from sklearn.utils.class_weight import compute_class_weight

from fastrecipes.objective import objective
from fastrecipes.technique import discover
from fastrecipes.training.objective import effective_number_weights

discover()


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


# effective numbers: arXiv:1901.05555

@pytest.mark.parametrize('beta', [0., .9, .99, .999, .9999])
def test_effective_numbers_are_the_papers_sum(beta):
    "Proposition 1: E_n = (1−βⁿ)/(1−β) = Σ β^(i−1), i = 1…n; the weights are 1/E_n, scaled to a mean of 1 (section 4)."
    counts = [5000, 400, 50, 1]
    E = [sum(beta**i for i in range(n)) for n in counts]
    expected = np.array([1/e for e in E])*4/sum(1/e for e in E)
    assert effective_number_weights(counts, beta) == pytest.approx(expected, rel=1e-9)


def test_the_limits_of_effective_numbers_are_equal_weights_and_the_inverse():
    counts = np.array([5000, 400, 50])
    assert effective_number_weights(counts, 0.).tolist() == [1., 1., 1.]
    inverse = (1/counts)*3/(1/counts).sum()
    assert effective_number_weights(counts, 1e-9) == pytest.approx(np.ones(3), rel=1e-8)
    for gap, tolerance in ((1e-7, 1e-3), (1e-12, 1e-8), (1e-15, 1e-8)):
        assert effective_number_weights(counts, 1-gap) == pytest.approx(inverse, rel=tolerance)
    assert effective_number_weights([8, 0, 2], .5) == pytest.approx([2*.75/(.75+.99609375), 0, 2*.99609375/(.75+.99609375)])       # 1−.5² and 1−.5⁸: 1/E in proportion


@pytest.mark.parametrize('counts, beta, message', [
    ([3, 1], 1., r'beta: must be in \[0, 1\), got 1.0'), ([3, 1], -.1, 'got -0.1'), ([0, 0], .9, r'counts: .* not all 0, got \[0.0, 0.0\]'), ([3, -1], .9, r'got \[3.0, -1.0\]'),
    (5, .9, 'got 5.0'), ([3., float('nan')], .9, 'got .*nan')])
def test_effective_numbers_outside_their_domain(counts, beta, message):
    with pytest.raises(ValueError, match=message): effective_number_weights(counts, beta)


def test_class_weights_by_effective_numbers_and_by_name(toy):
    labels = [0]*40 + [1]*16 + [2]*8
    learn = toy(labels=labels).class_weights('effective', beta=.9)
    E = np.array([(1-.9**n)/.1 for n in (40, 16, 8)])
    assert objective(learn).class_weight.numpy() == pytest.approx(3/E/(1/E).sum(), rel=1e-6)
    assert learn.techniques['class_weights'].effect == 'weights 0.762 to 1.32, from the effective numbers of samples at β = 0.9'
    default = objective(toy(labels=labels).class_weights('effective')).class_weight.numpy()
    assert default == pytest.approx(effective_number_weights([40, 16, 8], .999), rel=1e-6)
    for same in (None, 'inverse'): assert torch.equal(objective(learn.class_weights(same)).class_weight, objective(toy(labels=labels).class_weights()).class_weight)
    assert learn.techniques['class_weights'].effect == 'weights 0.533 to 2.67, from the shares of the classes'


def test_at_beta_0_effective_numbers_are_said_to_change_nothing(toy, capsys):
    toy(labels=[0]*40 + [1]*16 + [2]*8).class_weights('effective', beta=0.)
    assert 'class_weights: the classes weigh the same: nothing is changed' in capsys.readouterr().out


def test_class_weights_do_not_count_what_the_loss_ignores(toy):
    learn = toy(n=80, labels=[0]*40 + [1]*16 + [2]*8 + [-100]*16).class_weights()
    assert objective(learn).class_weight.tolist() == pytest.approx([64/3/40, 64/3/16, 64/3/8])


@pytest.mark.parametrize('args, kwargs, message', [
    (('effectiv',), {}, "class_weights: weights must be numbers, one a class, or one of inverse, effective, got 'effectiv'; did you mean 'effective'"),
    (('effective',), dict(beta=1.), r"class_weights: beta must be in \[0, 1\), got 1.0; what it comes to near 1 is weights='inverse'"), (('effective',), dict(beta=-.5), 'got -0.5'),
    ((), dict(beta=.9), "class_weights: beta goes with weights='effective', got weights='inverse', beta=0.9"), (([1., 1., 2.],), dict(beta=.9), "beta goes with weights='effective'")])
def test_ways_of_weighing_that_do_not_exist(toy, args, kwargs, message):
    learn = toy()
    with pytest.raises(ValueError, match=message): learn.class_weights(*args, **kwargs)
    assert not learn.__dict__.get('techniques') and not hasattr(learn, 'objective_cb')


def test_labels_that_are_no_classes_are_refused(toy):
    with pytest.raises(ValueError, match='class_weights: classes are numbers from 0 on, got -1; give weights, one a class'): toy(labels=[0]*32 + [-1]*32).class_weights()
    with pytest.raises(ValueError, match='logit_adjustment: classes are numbers from 0 on, got none; give shares'): toy(labels=[-100]*64).logit_adjustment()


@pytest.mark.parametrize('word, expected', [('', [.533333, 1.333333, 2.666667]), ('inverse', [.533333, 1.333333, 2.666667]), ('[3,2,1]', [3, 2, 1]),
                                            ('effective', effective_number_weights([40, 16, 8]).tolist())])
def test_class_weights_at_the_command_line(toy, word, expected):
    from fastrecipes.flags import CommandLine
    def recipe(path: str, **techniques): pass
    given = CommandLine(recipe, 'recipe').parse(['photos', '--class-weights', *([word] if word else [])])
    given.pop('path')
    learn = toy(labels=[0]*40 + [1]*16 + [2]*8).use(**given)
    assert objective(learn).class_weight.tolist() == pytest.approx(expected, rel=1e-5)


# moved logits: what they take and refuse; their values are tested in tests/test_objective.py

def test_logits_are_moved_by_tau_times_the_log_of_the_shares(toy):
    learn = toy(labels=[0]*40 + [1]*16 + [2]*8).logit_adjustment(2.)
    assert objective(learn).adjustment.tolist() == pytest.approx([2*np.log(.625), 2*np.log(.25), 2*np.log(.125)], rel=1e-6)
    assert learn.techniques['logit_adjustment'].effect == 'training logits moved by -4.16 to -0.94, for shares of 12.50% to 62.50%'
    learn.logit_adjustment(shares=[3, 1, 4])                # the last call wins
    assert objective(learn).adjustment.tolist() == pytest.approx(np.log([.375, .125, .5]).tolist(), rel=1e-6)


def test_equally_many_samples_are_said_to_change_nothing(toy, capsys):
    learn = toy(n=48, labels=[0, 1, 2]*16).logit_adjustment(shares=[3, 1, 4]).logit_adjustment()
    assert 'logit_adjustment: the classes come up equally often' in capsys.readouterr().out and objective(learn).adjustment is None and not objective(learn).acts


@pytest.mark.parametrize('other', ['balance', 'class_weights'])
def test_what_makes_up_for_rare_classes_does_it_once(toy, other):
    labels = [0]*40 + [1]*16 + [2]*8
    for one, two in ((other, 'logit_adjustment'), ('logit_adjustment', other)):
        learn = getattr(toy(labels=labels), one)()
        with pytest.raises(ValueError, match=f"'logit_adjustment' and '{other}' do not go together: each makes up for rare classes"): getattr(learn, two)()
        assert list(learn.techniques) == [one]
    with pytest.raises(ValueError, match='do not go together'): toy(labels=labels).use(**{other: True, 'logit_adjustment': True})


@pytest.mark.parametrize('labels, kwargs, message', [
    (None, dict(tau=0.), 'logit_adjustment: tau must be > 0 and finite, got 0.0'), (None, dict(tau=-1.), 'got -1.0'), (None, dict(tau=float('nan')), 'got nan'),
    (None, dict(tau=float('inf')), 'got inf'),
    ([0]*32 + [2]*32, {}, 'logit_adjustment: class 1 has no training samples, and its logit would be moved without limit; add some, or give shares'),
    (None, dict(shares=[.5, .5]), 'logit_adjustment: one share for each of the 3 classes, got 2'),
    (None, dict(shares=[.5, .5, 0.]), r'shares must be > 0 and finite, got \[0.5, 0.5, 0.0\]'),
    (None, dict(shares=[]), r'shares must be > 0 and finite, got \[\]'), (None, dict(shares=[1., 2., float('inf')]), 'shares must be > 0 and finite'),
    (torch.randn(64), {}, 'logit_adjustment: each sample must have one class .*; give shares, one a class')])
def test_logits_that_cannot_be_moved(toy, labels, kwargs, message):
    learn = toy(labels=labels)
    with pytest.raises(ValueError, match=message): learn.logit_adjustment(**kwargs)
    assert not learn.__dict__.get('techniques') and not hasattr(learn, 'objective_cb')


def test_only_a_cross_entropy_has_logits_to_move(toy):
    learn = toy(loss_func=nn.MSELoss(), labels=torch.randn(64, 3))
    with pytest.raises(ValueError, match='logit_adjustment: the loss must be a cross entropy over classes, got MSELoss'): learn.logit_adjustment()
