"A batch over several devices: on this machine the wrapping and unwrapping; the split itself is torch's."
import pytest
import torch
from fastai.basics import nn
from fastai.distributed import DataParallel, ParallelTrainer


class Spy(nn.Linear):
    owner = None
    def forward(self, x):
        self.wrapped = isinstance(type(self).owner.model, DataParallel)
        if getattr(self, 'dies', False): raise RuntimeError('dies')
        return super().forward(x)


@pytest.fixture
def two(toy):
    "A Learner that was told of two devices; without any, torch's DataParallel calls the model itself."
    Spy.owner = toy(model=Spy(4, 3))
    return Spy.owner.to_parallel([0, 1])


def test_the_model_is_wrapped_for_the_forward_pass_only(two):
    inner = two.model
    two.fit(1)
    assert inner.wrapped and two.model is inner and list(two.model.state_dict()) == ['weight', 'bias']
    assert two.techniques['to_parallel'].effect == 'each batch split over 2 GPUs'


def test_a_model_stays_wrapped_when_a_fit_dies_in_fastai_and_not_here(two, toy):
    theirs = toy(model=Spy(4, 3))
    Spy.owner = theirs
    theirs.model.dies = True
    with pytest.raises(RuntimeError): theirs.add_cb(ParallelTrainer([0, 1])).fit(1)
    assert isinstance(theirs.model, DataParallel)                # fastai 2.8.12 unwraps in after_fit, which is not called
    Spy.owner, inner = two, two.model
    inner.dies = True
    with pytest.raises(RuntimeError): two.fit(1)
    assert two.model is inner


def test_it_trains_as_the_plain_learner_does(toy):
    one, other = toy(), toy()
    one.fit(2)
    other.to_parallel([0, 1]).fit(2)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters()))


def test_on_one_device_it_says_so_and_changes_nothing(toy, capsys):
    learn = toy()
    before = list(learn.cbs)
    assert learn.to_parallel() is learn and list(learn.cbs) == before
    assert 'nothing to split a batch over' in capsys.readouterr().out and 'nothing to split' in learn.techniques['to_parallel'].effect


def test_fastais_own_ways_to_leave_it_still_work(two):
    two.detach_parallel()
    assert not [cb for cb in two.cbs if isinstance(cb, ParallelTrainer)]
    with two.parallel_ctx([0, 1]): assert [cb for cb in two.cbs if isinstance(cb, ParallelTrainer)]
    assert not [cb for cb in two.cbs if isinstance(cb, ParallelTrainer)]
