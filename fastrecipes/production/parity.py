"Whether what was written answers as the Learner does: on every validation sample, the Learner asked as `validate` asks it, in 32 bits."
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from fastai.basics import Callback, L, Learner
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback

from fastrecipes.data.statistics import normalization_of
from fastrecipes.errors import BadValue
from fastrecipes.production.entries import Entry, met_by, mismatch
from fastrecipes.production.export import check_width, input_contract, labels
from fastrecipes.production.predictor import pixels_of
from fastrecipes.randomness import forked

__all__ = ['Agreement', 'agreement', 'TOLERANCE']

TOLERANCE = 1e-4        # of a probability; of a number, as a share of the largest where that is above 1


@dataclass(frozen=True)
class Agreement:
    """How a file compares with its Learner on `n` validation samples: the largest difference of an output, what is `allowed`, and on how many
    samples all that is decided by it is the `same` (None where nothing is: numbers)."""
    n: int
    max_diff: float
    allowed: float
    same: int | None = None
    what: str = 'probabilities'

    @property
    def holds(self) -> bool: return self.max_diff <= self.allowed

    def __str__(self):
        decided = '' if self.same is None else f', the same answer on {self.same} of {self.n}'
        return f'{self.what} within {self.max_diff:.1g} of the Learner\'s on {self.n} validation samples{decided}'


class Compare(Callback):
    "Give each validation batch to `run`, and look how far what it answers is from the Learner."
    order = 1000                                # after whoever changes predictions

    def __init__(self, entry: Entry, run, who: str, files=None):
        self.entry, self.how, self.who, self.files, self.met = entry, run, who, files, None
        self.n, self.same, self.off, self.largest = 0, 0, 0., 0.

    def after_pred(self):
        expected = self.entry.activation(_plain(self.learn.pred).float())
        bs = len(expected)
        if self.files: xb = (torch.stack([self.files[0](x) for x in self.files[1][self.n:self.n+bs]]),)
        elif self.met is not None: xb, self.met = (_plain(self.met),), None
        else: xb = self.entry.given(tuple(map(_plain, self.learn.xb)))
        if any(a.shape[1:] != b.shape[1:] for a, b in zip(xb, self.entry.example)): raise mismatch(self.who, self.entry, xb)
        got = self.how(*xb)
        if got.shape != expected.shape: raise BadValue(f'{self.who}: gives {tuple(got.shape)} where the Learner gives {tuple(expected.shape)}')
        off = float((got-expected).abs().max())
        self.off, self.largest = max(self.off, off) if off == off else float('nan'), max(self.largest, float(expected.abs().max()))
        self.n += bs
        if self.entry.decide: self.same += int((self.entry.decide(got) == self.entry.decide(expected)).reshape(bs, -1).all(1).sum())


def _plain(x): return x.detach().as_subclass(torch.Tensor).cpu()


def agreement(learn: Learner, entry: Entry, run, who: str, allowed: float | None = None) -> Agreement:
    """How `run(*inputs)` compares with `learn` on its whole validation set; `learn` is left as it was.

    Image files are read anew, by `input_contract`. Raises `ValueError`, in the name of `who`, where there is no validation sample, and where an
    output differs by more than `allowed` (1e-4)."""
    dl = learn.dls.valid
    if not len(dl.dataset): raise BadValue(f'{who}: there is no validation sample to verify the file on; set learn.dls to DataLoaders that have some, for an exported Learner has none')
    files = None
    if entry.kind == 'pixels':
        contract = input_contract(learn)
        check_width(run(*entry.example), labels(learn), who)
        files = (lambda x: torch.from_numpy(pixels_of(x, contract).copy()), list(dl.items))
    compare = Compare(entry, run, who, files)
    if entry.kind == 'images' and normalization_of(learn) is not None: dl = met_by(dl, lambda x: setattr(compare, 'met', x))
    aside = [cb for cb in learn.cbs if isinstance(cb, (MixedPrecision, ProgressCallback))]
    with forked('parity'), as_it_was(learn), learn.removed_cbs(aside), full_precision(), learn.no_logging(): learn.validate(dl=dl, cbs=compare)
    limit = (TOLERANCE if allowed is None else allowed)*(max(1., compare.largest) if entry.output == 'predictions' else 1.)
    found = Agreement(compare.n, compare.off, limit, compare.same if entry.decide else None, entry.output)
    if not found.holds:
        raise BadValue(f'{who}: the file does not answer as the Learner does, so none was written: {found}, at most {limit:.1g} is allowed. '
                       'Do validation transforms do more than resize, scale and normalise?')
    return found


@contextmanager
def as_it_was(learn: Learner):
    "Undo what validation does to a Learner: it empties the Recorder, restarts the count of epochs, and leaves evaluation mode on."
    cbs, modes = list(learn.cbs), {m: m.training for m in learn.model.modules()}
    states = [(o, dict(vars(o))) for o in (learn, *cbs)]
    try: yield
    finally:
        for o, before in states:
            vars(o).clear()
            vars(o).update(before)
        learn.cbs = L(cbs)                       # `removed_cbs` puts them back at the end
        for m, training in modes.items(): m.training = training


@contextmanager
def full_precision():
    "No TF32 on a GPU: its 10 bits of mantissa move probabilities by more than a bundle may."
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [b.allow_tf32 for b in backends]
    for b in backends: b.allow_tf32 = False
    try: yield
    finally:
        for b, was in zip(backends, before): b.allow_tf32 = was
