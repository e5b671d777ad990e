"Clause 2: in pairs, every two techniques train, in either order of keywords, or refuse in a sentence that names both."
import itertools

import pytest
import torch

from .conftest import NAMES, TECHNIQUES, arguments, learner, refusal, use

PAIRS = [*itertools.combinations(NAMES, 2)]


@pytest.mark.parametrize('names', PAIRS, ids='+'.join)
def test_a_pair_trains_or_refuses(names):
    if why := refusal(*names):
        with pytest.raises(ValueError, match='do not go together') as e: use(learner(128), *names)
        assert all(repr(n) in str(e.value) for n in names) and why in str(e.value)
        return
    runs = []
    for order in (names, names[::-1]):
        learn = learner(128)
        given = {n: arguments(n, learn) for n in names}
        learn.use(**{n: given[n] for n in order})
        before = [p.detach().clone() for p in learn.model.parameters()]
        learn.fit(2, 3e-3)
        loss = learn.recorder.values[-1]
        assert all(v == v and abs(v) < 100 for v in loss) and any(not torch.equal(p, b) for p, b in zip(learn.model.parameters(), before))
        assert all(learn.techniques[n].effect for n in names if n in learn.techniques)
        runs.append([p.detach().clone() for p in learn.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))                         # the order of keywords never matters


def test_a_refusal_is_declared_once_and_names_a_technique_that_there_is():
    for t in TECHNIQUES.values():
        for other, why in t.refuses.items():
            assert other in TECHNIQUES and t.name not in TECHNIQUES[other].refuses and len(why) > 20


@pytest.mark.parametrize('names', [p for p in PAIRS if refusal(*p)], ids='+'.join)
def test_a_refusal_holds_for_methods_in_either_order_and_leaves_the_first_in_place(names):
    for one, two in (names, names[::-1]):
        learn = use(learner(128), one)
        with pytest.raises(ValueError, match='do not go together'): getattr(learn, two)(**arguments(two, learn))
        assert list(learn.techniques) == [one]
        learn.fit(1)
