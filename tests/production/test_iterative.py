"Pruning step by step: when it goes on, when it goes back, and what a kill or an interrupt leaves."
import gzip

import numpy as np
import pytest
import torch
from fastai.basics import Callback, DataLoaders, Metric, nn
from torch.nn.utils import prune as torch_prune

from fastrecipes.data.keyed import KeyedDL
from fastrecipes.production.iterative import Pruned, PruningStep, amounts_of, gzipped
from fastrecipes.production.pruning import Prune
from fastrecipes.repairs import fitting
from fastrecipes.training.resume import resumable

from ..contract.conftest import learner
from ..contract.test_4_resumes import Kill, Killed, assert_same


def zeros(learn): return 1 - float(torch.cat([m.weight.detach().flatten() for m in learn.model.modules() if hasattr(m, 'weight')]).ne(0).float().mean())


class Until(Metric):
    "1 while less than `most` of the weights are 0, then .9."
    name = 'accuracy'
    def __init__(self, most): self.most = most
    def reset(self): pass
    def accumulate(self, learn): self.share = zeros(learn)
    @property
    def value(self): return 1. if self.share < self.most else .9


def scripted(most, n=256, **kwargs):
    learn = learner(n, **kwargs)
    learn.metrics = [Until(most)]
    return learn


def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]


@pytest.mark.parametrize('step, until, amounts', [(.15, .9, [.15, .3, .45, .6, .75, .9]), (.2, .9, [.2, .4, .6, .8, .9]), (.5, .3, [.3]), (.1, .3, [.1, .2, .3])])
def test_steps_are_of_the_original_weights_and_end_at_until(step, until, amounts): assert amounts_of(step, until) == pytest.approx(amounts)


def test_digits_keep_their_accuracy_and_later_fits_their_zeros():
    learn = learner()
    done = learn.iterative_prune(6, 3e-3, step=.35, until=.7, first=4, floor=.97)
    assert [s.amount for s in done.steps[1:]] == [.35, .7] and done.accepted is done.steps[-1] and done.original.valid > .9
    assert all(s.valid >= .97*done.original.valid - 1e-9 and s.zeros == pytest.approx(s.amount, abs=1e-3) and 1 <= s.epochs <= 6 for s in done.steps[1:])
    assert learn.validate()[1] == pytest.approx(done.accepted.valid) and done.steps[-1].before < done.steps[-1].valid
    learn.fit(1, 3e-3)
    assert zeros(learn) == pytest.approx(.7, abs=1e-3) and not any(type(cb).__name__ == 'Floor' for cb in learn.cbs)


def test_a_step_takes_no_more_epochs_than_it_needs_and_what_fails_is_taken_back(capsys):
    learn, after = scripted(.5), {}
    class Watch(Callback):
        order = 200
        def after_fit(self):
            if len(self.learn.recorder.values): after[round(zeros(self.learn), 2)] = weights(self.learn)
    learn.add_cb(Watch())
    done = learn.iterative_prune(3, 1e-3)
    assert [(s.epochs, s.accepted) for s in done.steps[1:]] == [(1, True)]*3 + [(3, False)]
    assert zeros(learn) == pytest.approx(.45, abs=1e-3) and all(torch.equal(p, w) for p, w in zip(learn.model.parameters(), after[.45]))
    assert done.accepted is done.steps[3] and '60.0 % did not come back to 99.5 % in 3 epochs, and was taken back' in done.verdict
    assert learn.prune_cb.share == pytest.approx(.45, abs=1e-3) and '45.0 %' in learn.techniques['prune'].effect and 'taken back' in capsys.readouterr().out
    learn.remove_cb(Watch).fit(1)
    assert zeros(learn) == pytest.approx(.45, abs=1e-3)


def test_it_gives_up_when_a_step_gets_no_better_for_long():
    assert scripted(.2).iterative_prune(9, 1e-3, patience=2).steps[-1].epochs == 3                      # the first is better than none


def test_where_the_first_step_fails_the_network_is_as_it_was():
    learn = scripted(.1)
    learn.fit(1, 3e-3)
    before = weights(learn)
    done = learn.iterative_prune(2, 1e-3)
    assert done.accepted is done.original and done.verdict.startswith('No weight was pruned; 15.0 %')
    assert all(torch.equal(p, w) for p, w in zip(learn.model.parameters(), before)) and 'prune' not in learn.techniques and not any(type(cb) is Prune for cb in learn.cbs)


def test_what_is_taken_back_leaves_the_optimizer_nothing_to_remember():
    learn = scripted(.1)
    learn.fit(1, 1e-3)
    assert all('grad_avg' in learn.opt.state[p] for p in learn.model.parameters())
    learn.iterative_prune(1, 1e-3)
    assert not any({'grad_avg', 'sqr_avg', 'step'} & {*learn.opt.state[p]} for p in learn.model.parameters())


def test_masks_that_were_there_come_back(capsys):
    learn = scripted(.3).prune(.2, layers=['0'])
    masks = [m.clone() for m in learn.prune_cb.kept]
    learn.iterative_prune(1, 1e-3, step=.5)
    assert len(learn.prune_cb.kept) == 1 and all(map(torch.equal, learn.prune_cb.kept, masks)) and learn.techniques['prune'].arguments['layers'] == ['0']


def test_what_is_pruned_already_is_not_pruned_again():
    learn = scripted(2.).prune(.5)
    assert [s.amount for s in learn.iterative_prune(1, 1e-3).steps[1:]] == pytest.approx([.6, .75, .9])
    with pytest.raises(ValueError, match='90.0% of the weights are pruned already; raise until=0.9'): learn.iterative_prune(1)


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_interrupted_it_holds_the_last_network_that_was_accepted(error):
    learn, nth = scripted(2.), []
    class Die(Callback):
        def before_fit(self): nth.append(1) if fitting(self.learn) else None
        def after_batch(self):
            if len(nth) == 3 and self.learn.training and self.learn.iter == 1: raise error('now')
    with pytest.raises(error), learn.added_cbs(Die()): learn.iterative_prune(2, 1e-3)
    assert zeros(learn) == pytest.approx(.3, abs=1e-3) and not hasattr(learn, 'floor_cb')
    learn.fit(1)
    assert zeros(learn) == pytest.approx(.3, abs=1e-3)
    assert [s.amount for s in learn.iterative_prune(1, 1e-3, until=.6).steps[1:]] == pytest.approx([.45, .6])


def killed_and_run_again(program, make, tmp_path, places):
    def run(folder, kill=None):
        learn = make()
        if kill: learn.add_cb(Kill(*kill))
        with resumable(folder, every=1): done = program(learn)
        return learn, done
    whole, said = run(tmp_path/'whole')
    for n, kill in enumerate(places):
        with pytest.raises(Killed): run(tmp_path/f'{n}', kill)
        again, told = run(tmp_path/f'{n}')
        assert_same(whole, again)
        assert said == told and all(map(torch.equal, whole.prune_cb.kept, again.prune_cb.kept))
        assert not (tmp_path/f'{n}').exists()


class KillFit(Kill):
    def before_fit(self): self.nth += fitting(self.learn)


def test_killed_in_any_step_it_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr('tests.production.test_iterative.Kill', KillFit)
    def program(learn):
        learn.fit(1, 3e-3)
        done = learn.iterative_prune(2, 1e-3, step=.25, until=.5, first=1)
        learn.fit(1, 1e-3)
        return done
    killed_and_run_again(program, lambda: scripted(.4), tmp_path, [((1, 0, 2), 'after'), ((3, 1, 1), 'after'), ((4, 0, 0), 'before')])


def test_plain_pruning_between_fits_goes_on_with_its_masks(tmp_path):
    def program(learn):
        learn.fit(1, 3e-3)
        learn.prune(.5).fit(1, 3e-3)
        learn.prune(.7).fit(1, 3e-3)
    killed_and_run_again(program, lambda: learner(256), tmp_path, [((1, 0, 1), 'after'), ((2, 0, 0), 'before'), ((2, 0, 2), 'after')])


def test_the_test_set_is_measured_and_decides_nothing():
    learn = learner(512)
    x, y = learn.dls.valid_ds.dataset.tensors
    wrong = type(learn.dls.valid_ds)(torch.utils.data.TensorDataset(x, (y+1) % 10), vocab=range(10))
    learn.dls = DataLoaders(*learn.dls.loaders, learn.dls.valid.new(dataset=wrong), device=torch.device('cpu'))
    assert isinstance(learn.dls[2], KeyedDL)
    done = learn.iterative_prune(3, 3e-3, first=4, step=.4, until=.4, floor=.95)
    assert done.accepted is done.steps[1] and all(s.test < .2 < s.valid for s in done.steps)
    assert done.steps[1].test == pytest.approx(learn.validate(dl=learn.dls[2])[1])


def test_an_early_stop_of_the_learner_stands_aside_and_is_there_afterwards():
    learn = scripted(2.).early_stop('valid_loss', patience=1, min_delta=9.)
    cb = learn.early_stop_cb
    done = learn.iterative_prune(2, 1e-3, until=.3)
    assert done.accepted.amount == .3 and learn.early_stop_cb is cb and cb in learn.cbs and cb.best is None


def test_bytes_are_those_of_gzip():
    net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    raw = {k: v.numpy() for k, v in net.state_dict().items()}
    assert gzipped(net) == len(gzip.compress(b''.join(v.tobytes() for v in raw.values()), 6, mtime=0))
    w = raw['0.weight']
    raw['0.weight'] = np.rint(np.float32(127)*w/np.abs(w).max()).astype(np.int8)
    assert np.abs(raw['0.weight'].astype(int)).max() == 127 and gzipped(net, 8) == len(gzip.compress(b''.join(v.tobytes() for v in raw.values()), 6, mtime=0))
    dense = gzipped(net)
    torch_prune.l1_unstructured(net[0], 'weight', .9)
    torch_prune.remove(net[0], 'weight')
    assert gzipped(net) < .35*dense and gzipped(nn.Linear(4, 4), 8) < gzipped(nn.Linear(4, 4))
    with pytest.raises(ValueError, match='bits must be 8 or 32, got 4'): gzipped(net, 4)


def test_the_table_the_sentence_and_the_plot():
    rows = [PruningStep(0., 0., None, .99, .98, 0, 1000, 250), PruningStep(.5, .5, .7, .99, .97, 2, 500, 125), PruningStep(.9, .9, .2, .5, .5, 5, 100, 50, False)]
    done = Pruned(rows, .995)
    assert done.least == pytest.approx(.98505) and done.smaller(rows[1]) == (2, 8) and done.accepted is rows[1]
    lines = str(done).splitlines()
    assert lines[2].split() == '50.0 % 70.0 % 99.0 % 97.0 % 2 0 kB (2.0×) 0 kB (8.0×)'.split() and lines[3].endswith('taken back')
    assert lines[4] == ('50.0 % of the weights are 0 at 99.0 % accuracy in validation (99.0 % before); 90.0 % did not come back to 98.5 % in 5 epochs, and was taken back; '
                        '2.0 times smaller under gzip, 8.0 in int8; no faster')
    left, right = done.plot().axes
    assert list(left.lines[1].get_ydata()) == pytest.approx([99, 99, 50]) and list(right.lines[1].get_ydata()) == [4, 8]


@pytest.mark.parametrize('kwargs, message', [
    (dict(step=0), 'step must be above 0 and below 1, got 0'), (dict(until=1), 'until must be above 0 and below 1, got 1'), (dict(floor=1.5), 'floor must be above 0 and at most 1'),
    (dict(epochs=0), 'epochs must be a whole number ≥ 1, got 0'), (dict(first=-1), 'first must be a whole number ≥ 0'), (dict(patience=.5), 'patience must be a whole number ≥ 1'),
    (dict(monitor='acuracy'), r"monitor must be one of the metrics \(accuracy\), got 'acuracy'; did you mean 'accuracy'")])
def test_what_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=f'iterative_prune: {message}'): learner(128).iterative_prune(**kwargs)


def test_a_metric_of_which_less_is_better_and_a_network_without_layers(toy):
    class Error(Until): name = 'error_rate'
    learn = learner(128)
    learn.metrics = [Error(1.)]
    with pytest.raises(ValueError, match="iterative_prune: of 'error_rate' less is better"): learn.iterative_prune(monitor='error_rate')
    with pytest.raises(ValueError, match='iterative_prune: the network has no convolution and no linear layer'): toy(model=nn.BatchNorm1d(4)).iterative_prune()
