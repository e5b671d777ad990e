"Memory that is used again: never while somebody looks at it, and with the same results."
import gc

import pytest
import torch
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.torch_core import TensorCategory, TensorImage
from fastai.vision.core import TensorMask
from fasttransform import Pipeline, Transform

from fastrecipes.data import memory
from fastrecipes.data.memory import SMALL, InPlace, recycled

BIG = (SMALL//4, 2)


@pytest.fixture(autouse=True)
def none_spare():
    memory._spare.clear()
    yield


def test_memory_is_used_again_once_it_is_free():
    a = recycled(BIG, torch.float32)
    at = a.data_ptr()
    del a
    for shape, dtype in ((BIG, torch.float32), ((SMALL*2,), torch.uint8)): assert recycled(shape, dtype).data_ptr() == at


@pytest.mark.parametrize('hold', [lambda x: x[3:], lambda x: x.view(-1)[:1], lambda x: x.detach(), lambda x: TensorImage(x), lambda x: x.numpy(), lambda x: x.numpy()[5],
                                  lambda x: (x.requires_grad_()*x).grad_fn])
def test_what_somebody_holds_a_part_of_is_not(hold):
    a = recycled(BIG, torch.float32)
    at, held = a.data_ptr(), hold(a)
    del a
    gc.collect()
    assert recycled(BIG, torch.float32).data_ptr() != at
    del held
    gc.collect()
    assert at in {b.ctypes.data for b in memory._spare[SMALL*2]}


def test_no_more_is_kept_than_a_few_blocks_of_a_few_sizes():
    some = [recycled(BIG, torch.float32) for _ in range(10)]
    del some
    assert len(memory._spare[SMALL*2]) == memory.SPARE
    for i in range(20): recycled((SMALL+i,), torch.uint8)
    assert len(memory._spare) <= 9


class Half(Transform):
    order = 20
    def encodes(self, x: TensorImage): return x/2


@pytest.mark.parametrize('fs', [[IntToFloatTensor()], [IntToFloatTensor(), Normalize.from_stats([.4, .5, .6], [.2, .3, .1], cuda=False)], [Normalize.from_stats([.4], [.3], cuda=False)],
                                [IntToFloatTensor(), Half(), Normalize.from_stats([.4, .5, .6], [.2, .3, .1], cuda=False)], [IntToFloatTensor(div=100.), Half()], []])
@pytest.mark.parametrize('kind', ['bytes', 'floats'])
def test_what_comes_out_is_the_same_to_the_bit(fs, kind):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (8, 3, 120, 100), dtype=torch.uint8, generator=g)
    batch = (TensorImage(x if kind == 'bytes' else x/255), TensorCategory(torch.arange(8)), TensorMask(x[:, 0]))
    before = [o.clone() for o in batch]
    if kind == 'bytes' and fs and type(fs[0]) is Normalize: return         # which nobody does
    theirs, ours = Pipeline(fs)(tuple(o.clone() for o in batch)), InPlace(fs)(batch)
    assert all(type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs))
    if kind == 'bytes': assert all(torch.equal(a, b) for a, b in zip(batch, before))        # what came in is left alone
