"The least cut that meets a target, against a closed form; a budget that a run which goes on has in common with those before it."
import pytest

from fastrecipes.production import search
from fastrecipes.production.search import MOST, Budget, Targets, least_cut
from fastrecipes.training.resume import resumable


def mb(share): return int(1e6*(1-share)**2), 8*(1-share)              # a network of 1 MB and 8 ms, of which channels are removed


@pytest.mark.parametrize('targets, exact', [(Targets(max_mb=.25), .5), (Targets(max_ms=2.), .75), (Targets(.25, 2.), .75), (Targets(.04, 4.), .8)])
def test_it_is_the_least_share_to_a_64th(targets, exact):
    asked = []
    share = least_cut(lambda s: (asked.append(s), mb(s))[1], targets)
    assert exact <= share <= exact + MOST/64 and len(asked) == 8
    assert targets.met(*mb(share)) and not targets.met(*mb(share - MOST/64 - 1e-9))


def test_nothing_goes_where_it_is_small_enough_and_too_much_is_refused():
    assert least_cut(mb, Targets(max_mb=1.)) == 0.
    said = 'without 95% of its channels it has 0.0025 MB and takes 0.4 ms an image, where 0.3 ms an image are asked for'
    with pytest.raises(ValueError, match=said): least_cut(mb, Targets(max_ms=.3))
    with pytest.raises(ValueError, match='with all its channels it has 1 MB'): least_cut(mb, Targets(max_mb=.5), most=0.)


def test_how_far_a_network_is_from_its_targets():
    assert Targets(2., 10.).excess(3_000_000, 5.) == 1.5 and Targets(2., 10.).excess(1_000_000, 12.) == 1.2
    assert Targets(2., 10.).met(2_000_000, 10.) and not Targets(2.).met(2_000_001, 1e9) and Targets(max_ms=1.).met(10**12, 1.)
    assert not Targets() and Targets(max_ms=1.) and str(Targets(.5, 2.)) == '0.5 MB and 2 ms an image'
    for bad in (dict(max_mb=0), dict(max_ms=-1.)):
        with pytest.raises(ValueError, match=f'{next(iter(bad))}: above 0'): Targets(**bad)


def test_a_budget_says_what_it_leaves_out_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    clock = [0.]
    monkeypatch.setattr(search.time, 'monotonic', lambda: clock[0])
    def program(*waits):
        budget, told = Budget(1), []
        for i, seconds in enumerate(waits):
            clock[0] += seconds
            told.append(budget.allows(f'step {i}', 5.))
        return told
    with pytest.raises(RuntimeError), resumable(tmp_path):
        assert program(20., 30.) == [True, True]
        raise RuntimeError('killed')
    clock[0] += 1e6
    with resumable(tmp_path): assert program(1., 1., 4., 2.) == [True, True, True, False]       # 20, 50, 54 and 56 s are gone; 5 more would be too many
    assert 'step 3: left out, 0.9 of 1 minutes are gone' in capsys.readouterr().out
