"Arguments against their types: what passes, and the sentence for what does not."
from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import pytest
import torch
from fastai.basics import L, Learner, nn

from fastrecipes.arguments import bound, check_types, checked
from fastrecipes.technique import discover

discover()


def f(self, alpha: float = .4, n: int = 3, mode: Literal['a', 'b'] = 'a', ws: list[float] | None = None, on: bool = True, teacher: Learner | str = 'x',
      many: Sequence = ()): "Any."


@pytest.mark.parametrize('good', [dict(alpha=1), dict(alpha=np.float32(.2)), dict(n=np.int64(2)), dict(mode='c'), dict(ws=None), dict(ws=(1, 2)), dict(ws=torch.ones(2)),
                                  dict(on=False), dict(teacher=nn.Linear(1, 1)), dict(many=L(1, 2))])
def test_what_passes(good): assert bound('f', f, None, **good) == dict(self=None, **good)


@pytest.mark.parametrize('bad, message', [
    (dict(alpha='x'), "f: alpha must be a number, got 'x'"), (dict(alpha=None), 'f: alpha must be a number, got None'), (dict(alpha=True), 'a number, got True'),
    (dict(n=8.5), 'f: n must be a whole number, got 8.5'), (dict(mode=3), "f: mode must be 'a' or 'b', got 3"), (dict(ws={'a': 1}), "f: ws must be a list or None, got {'a': 1}"),
    (dict(many=Learner), 'f: many must be a list, got <class'), (dict(many='ab'), "f: many must be a list, got 'ab'"), (dict(on=1), 'f: on must be True or False, got 1')])
def test_what_does_not(bad, message):
    with pytest.raises(ValueError, match=message): bound('f', f, None, **bad)


def test_an_unknown_or_missing_argument_names_who_objects_and_the_nearest():
    with pytest.raises(TypeError, match="f: no argument 'alpa'; did you mean 'alpha'"): bound('f', f, None, alpa=.4)
    with pytest.raises(TypeError, match='f: missing a required argument'): bound('f', f)


def test_a_function_that_looks_at_its_arguments_first():
    ran = []
    @checked
    def compress(learn, epochs: int = 5): ran.append((learn, epochs))
    @partial(checked, techniques=lambda: {'mixup': None})
    def train(path, epochs: int = 5, **techniques): ran.append((path, epochs, techniques))
    @checked
    def shrink(learn, *, share: float = .5): ran.append((learn, share))
    for call, error, message in ((lambda: compress('l', epoch=3), TypeError, "^compress: no argument 'epoch'; did you mean 'epochs'.* It takes learn, epochs"),
                                 (lambda: compress('l', epochs='3'), ValueError, "^epochs must be a whole number, got '3'"),
                                 (lambda: compress(epochs=3), TypeError, "^compress: missing a required argument: 'learn'; it takes learn, epochs"),
                                 (lambda: compress('l', 3, 4), TypeError, '^compress: too many positional arguments; it takes learn, epochs$'),
                                 (lambda: shrink('l', .3), TypeError, '^shrink: too many positional arguments; it takes learn by position, the rest by name$'),
                                 (lambda: train('p', epoch=3), TypeError, "^train: no argument and no technique named 'epoch'; did you mean 'epochs'"),
                                 (lambda: train('p', mixap=3), TypeError, "named 'mixap'; did you mean 'mixup'"), (lambda: train('p', techniques=1), TypeError, "named 'techniques'")):
        with pytest.raises(error, match=message): call()
    assert not ran
    compress('l', epochs=3)
    train('p', mixup=.4)
    assert ran == [('l', 3), ('p', 5, dict(mixup=.4))]


def test_without_a_name_the_argument_objects_itself():
    with pytest.raises(ValueError, match="^n must be a whole number, got 'three'"): check_types(f, dict(n='three'))


@pytest.mark.parametrize('call, message', [
    (lambda learn: learn.mixup('x'), "mixup: alpha must be a number, got 'x'"), (lambda learn: learn.cutout(8.5), 'cutout: size must be a whole number, got 8.5'),
    (lambda learn: learn.mixup(alpa=.4), "mixup: no argument 'alpa'; did you mean 'alpha'"), (lambda learn: learn.distill(), 'distill: missing a required argument'),
    (lambda learn: learn.to_parallel('cuda'), "to_parallel: device_ids must be a list or None, got 'cuda'"),
    (lambda learn: learn.class_weights({'cat': 2}), 'class_weights: weights must be a list or None')])
def test_every_technique_answers_so(toy, call, message):
    learn = toy()
    with pytest.raises((ValueError, TypeError), match=message): call(learn)
    assert not learn.__dict__.get('techniques')
