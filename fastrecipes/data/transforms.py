"How a technique varies the training images: one transform on whole batches, its draws keyed by (seed, epoch, sample)."
import numpy as np
import torch
from fastai.basics import Learner, TensorImage
from fastai.data.core import TfmdDL

from fastrecipes.data.keyed import keyed, per_sample, with_train
from fastrecipes.data.loaders import first_sample, shapes
from fastrecipes.errors import BadValue

__all__ = ['Draw', 'check_images', 'on_batches']


class Draw:
    "A value in [lo, hi] for each sample of a batch with probability `p`, else `neutral`: what fastai's transforms take as `draw`."
    def __init__(self, name: str, lo: float, hi: float, p: float = 1., neutral: float = 0., log: bool = False):
        self.name, self.lo, self.hi, self.p, self.neutral, self.log = name, lo, hi, p, neutral, log

    def __call__(self, x):
        u = per_sample(len(x), self.name)
        lo, hi = (np.log(self.lo), np.log(self.hi)) if self.log else (self.lo, self.hi)
        value = lo + u*(hi-lo)
        if self.log: value = value.exp()
        return torch.where(per_sample(len(x), self.name, 'do') < self.p, value, torch.full_like(value, self.neutral)).to(x.device)


def check_images(learn: Learner, who: str):
    "Raise, in the name of `who`, unless the training loader is fastai's and gives images `(n, c, h, w)` that its transforms see."
    seen = first_sample(learn.dls)
    if not seen or not isinstance(learn.dls.train, TfmdDL) or not isinstance(x := seen[0][0], TensorImage) or x.ndim != 4:
        got = f'{type(seen[0][0]).__name__} {shapes(seen[0][:1])}' if seen else type(learn.dls.train).__name__
        raise BadValue(f'{who}: needs a loader of images (TensorImage), for its transforms pass over others, got {got}; '
                       'give torch datasets and loaders of images to `as_dataloaders`')


def on_batches(learn: Learner, tfms: list, instead_of):
    "Give the training loader `tfms` for its whole batches, in place of those for which `instead_of(tfm)`; other Learners keep theirs."
    keyed(learn)
    learn.dls = with_train(learn.dls, learn.dls.train.new())
    own = learn.dls.train.after_batch
    own.fs = own.fs.filter(lambda t: not instead_of(t))
    for t in tfms: own.add(t)
