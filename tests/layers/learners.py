"Learners for the tests of layers: digits in memory as in the contract, and sixteen pictures for any network."
import torch
from fastai.basics import Learner, nn
from torch.utils.data import TensorDataset

from fastrecipes.data.loaders import as_dataloaders

from ..contract.conftest import learner


def digits(net=None, n=128) -> Learner:
    "The contract's Learner, on `net` where one is given."
    learn = learner(n)
    if net is not None: learn.model = net
    return learn


def pictures(net, side=32, n=16, bs=8, **kwargs) -> Learner:
    "`n` pictures `(3, side, side)` of three classes."
    g = torch.Generator().manual_seed(0)
    ds = TensorDataset(torch.rand(n, 3, side, side, generator=g), torch.arange(n) % 3)
    learn = Learner(as_dataloaders([ds, ds], bs=bs), net, nn.CrossEntropyLoss(), **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn
