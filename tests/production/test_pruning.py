"Weights set to 0: which, how many, and that they stay."
import pytest
import torch
from fastai.basics import SGD, Adam, nn
from fastai.callback.tracker import SaveModelCallback
from torch.nn.utils import prune as torch_prune

from fastrecipes.production.pruning import ThresholdPruning, pruned_info


def net(): return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Sequential(nn.Linear(16, 8), nn.ReLU()), nn.Linear(8, 3))


def weights(model): return [m.weight for m in model.modules() if isinstance(m, nn.Linear)]


def zeros(model): return float(torch.cat([w.detach().flatten() for w in weights(model)]).eq(0).float().mean())


def test_the_smallest_of_all_weights_together_go(toy):
    learn = toy(model=net())
    before = [w.detach().clone() for w in weights(learn.model)]
    learn.prune(.25)
    everything = torch.cat([w.abs().flatten() for w in before])
    cut = everything.sort().values[round(.25*len(everything))]
    for w, b in zip(weights(learn.model), before): assert torch.equal(w, b*(b.abs() >= cut))
    assert zeros(learn.model) == pytest.approx(.25, abs=1/len(everything))


@pytest.mark.parametrize('opt', [SGD, Adam])
def test_F2_zeros_survive_later_fine_tuning(toy, opt):
    learn = toy(model=net(), opt_func=opt)
    learn.fit(1, .1)
    learn.prune(.9)
    for _ in range(2): learn.fit(2, .1)
    learn.lr_find(num_it=10, show_plot=False)
    assert zeros(learn.model) == pytest.approx(.9, abs=.01)
    assert torch_prune.is_pruned(learn.model) is False


def test_F3_masks_stay_out_of_checkpoints_and_the_best_one_loads(toy, tmp_path):
    learn = toy(model=net(), path=tmp_path)
    names, size = list(learn.model.state_dict()), learn.save('before').stat().st_size
    learn.prune(.5).fit(3, .1, cbs=SaveModelCallback())
    assert list(learn.model.state_dict()) == names and (tmp_path/'models'/'model.pth').stat().st_size <= size*3      # plus Adam's two averages
    assert learn.save('after', with_opt=False).stat().st_size <= size
    net().load_state_dict(torch.load(tmp_path/'models'/'after.pth', weights_only=True))
    assert zeros(learn.model) == pytest.approx(.5, abs=.01)


def test_a_fit_that_dies_leaves_no_trace_in_the_model(toy):
    learn = toy(model=net()).prune(.5)
    buffers, keys = dict(learn.model.named_buffers()).keys(), list(learn.model.state_dict())
    def die(*args): raise KeyboardInterrupt
    learn.loss_func = die
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    assert dict(learn.model.named_buffers()).keys() == buffers and list(learn.model.state_dict()) == keys and zeros(learn.model) == pytest.approx(.5, abs=.01)


def test_momentum_gathers_nothing_for_pruned_weights(toy):
    learn = toy(model=net(), opt_func=Adam).prune(.5)
    learn.fit(1, .1)
    for w in weights(learn.model): assert (learn.opt.state[w]['grad_avg'][w == 0] == 0).all()


def test_steps_of_the_original_weights_add_up(toy):
    learn = toy(model=net())
    for amount in (.15, .3, .45):
        learn.prune(amount).fit(1, .1)
        assert zeros(learn.model) == pytest.approx(amount, abs=.01)
    with pytest.raises(ValueError, match='44.9% of these weights are pruned already, and 30.0% would bring some back'): learn.prune(.3)


def test_a_threshold_cuts_at_a_value(toy):
    learn = toy(model=net())
    before = [w.detach().clone() for w in weights(learn.model)]
    learn.prune(threshold=.1)
    for w, b in zip(weights(learn.model), before): assert torch.equal(w, torch.where(b.abs() > .1, b, 0.))


def test_what_lies_at_the_threshold_goes():
    w = torch.tensor([[-.5, -.25, 0., .25, .5]])
    assert ThresholdPruning(.25).compute_mask(w, torch.ones_like(w)).tolist() == [[1, 0, 0, 0, 1]]


def test_threshold_pruning_is_a_method_of_torch():
    m = nn.Linear(3, 1, bias=False)
    m.weight.data = torch.tensor([[.5, -.01, .02]])
    ThresholdPruning.apply(m, 'weight', threshold=.015)
    assert m.weight_mask.tolist() == [[1, 0, 1]] and m.weight.tolist() == [[.5, 0, pytest.approx(.02)]]


def test_layers_by_name_by_module_and_by_pair(toy):
    for layers, touched in ((['0'], [0]), (['3'], [1]), (lambda m: [m[4]], [2]), (lambda m: [(m[0], 'bias'), (m[4], 'weight')], [2])):
        learn = toy(model=net())
        learn.prune(.5, layers=layers(learn.model) if callable(layers) else layers)
        assert [i for i, w in enumerate(weights(learn.model)) if (w == 0).any()] == touched
    assert (learn.model[0].bias == 0).any()


def test_other_layers_keep_their_masks(toy):
    learn = toy(model=net()).prune(.5, layers=['0']).prune(.5, layers=['4'])
    learn.fit(1, .1)
    assert [float((w == 0).float().mean()) for w in weights(learn.model)] == [.5, 0, .5]


def test_the_info_walks_nested_modules_and_prints(capsys):
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Sequential(nn.Linear(2, 1, bias=False)))
    model[0].weight.data, model[1][0].weight.data = torch.tensor([[0., 1, 2, 0]]), torch.tensor([[0., 1]])
    assert pruned_info(model) == {'0': 50., '1.0': 50., 'Total': 50.}
    torch_prune.l1_unstructured(model[0], 'weight', 3)
    assert pruned_info(model) == {'0': 75., '1.0': 50., 'Total': pytest.approx(100*4/6)}
    assert capsys.readouterr().out.splitlines()[3:] == ['0 75.00%', '1.0 50.00%', 'Total 66.67%']


@pytest.mark.parametrize('kwargs, message', [
    (dict(amount=1), r'amount must be in \[0, 1\), got 1'), (dict(amount=.2, threshold=.1), 'amount or threshold, not both'), (dict(threshold=-1), 'threshold must be ≥ 0'),
    (dict(layers=['5']), "no layer '5'"), (dict(layers='0'), "layers must be a list or None, got '0'"), (dict(layers=['2']), "'2' has no parameter 'weight'"),
    (dict(layers=[]), 'layers must be a list')])
def test_what_makes_no_sense_is_refused(toy, kwargs, message):
    with pytest.raises(ValueError, match=f'prune: {message}'): toy(model=net()).prune(**kwargs)
