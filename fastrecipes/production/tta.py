"Test-time augmentation: the answer is the mean of those for several views of an image, drawn as in training or mirrored."
from contextlib import nullcontext
from copy import copy
from typing import Literal

import torch
from fastai.basics import Learner, Pipeline, patch
from fastai.data.core import TfmdDL
from fastai.vision.augment import RandTransform
from torch.utils.data import Sampler

from fastrecipes.arguments import checked
from fastrecipes.data.augmix import AugMixViews, Apart
from fastrecipes.data.keyed import Keyed, KeyedDL
from fastrecipes.data.statistics import normalizes
from fastrecipes.errors import BadValue
from fastrecipes.losses.classification import classes_of
from fastrecipes.production.export import activation_of
from fastrecipes.production.members import seen_by
from fastrecipes.randomness import default_seed, forked, key_of
from fastrecipes.repairs import REPAIRS

__all__ = ['Views']


class InOrder(Sampler):
    "Draw each of n samples once, in their order."
    def __init__(self, n: int): self.n = n
    def __len__(self): return self.n
    def draw(self, rng): return list(range(self.n))
    def __iter__(self): return iter(range(self.n))


class Views(KeyedDL):
    "A loader that gives its samples in their order, varied as in training, by draws keyed to (seed, sample)."
    def before_iter(self):
        super().before_iter()
        for name in ('after_item', 'before_batch', 'after_batch'): getattr(self, name).split_idx = 0


if REPAIRS:
    @patch
    @checked
    def tta(self: Learner, ds_idx=1, dl=None, n=4, item_tfms=None, batch_tfms=None, beta=0.25, use_max=False, views: Literal['flip'] | None = None):
        """Probabilities `(m, c)` averaged over views of each sample of `dl`, or of `dls[ds_idx]`, in order, and their targets.

        `n` ≥ 1 views vary as the training images do (`augment` and its like, fastai's `aug_transforms`), or by `item_tfms` and `batch_tfms`, beside the
        validation transforms; their mean, with `use_max` the largest, is mixed with the answer for the image itself, which weighs `beta` (0–1; None gives
        both). `views='flip'`: the mean for the image and for its mirror image instead, exactly, with no draws. It costs n + 1 passes, 2 for 'flip', and makes up
        for little training more than for much.

        fastai 2.8.12 varies by the validation loader's transforms: with `augment` and its like, which only the training loader has, all views are the same image, and
        the same answer comes out n times as late; transforms that are given replace those that scale and normalise; its draws follow torch's global
        state; datasets in memory have no `set_split_idx`. Raises `ValueError` where nothing varies, and outside these ranges."""
        if views not in (None, 'flip'): raise BadValue(f"tta: views must be 'flip' or None, got {views!r}")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1: raise BadValue(f'tta: n must be a whole number ≥ 1, got {n!r}')
        if beta is not None and not 0 <= beta <= 1: raise BadValue(f'tta: beta must be 0 to 1, or None for both answers, got {beta}')
        if dl is None:
            if ds_idx not in range(len(self.dls.loaders)): raise BadValue(f'tta: ds_idx is 0 (training), 1 (validation) … {len(self.dls.loaders)-1}, got {ds_idx!r}')
            dl = self.dls[ds_idx]
        act = activation_of(self.loss_func) if classes_of(self.loss_func) else None
        plain = seen_by(dl, self.dls.valid)
        if views: others = [seen_by(dl, self.dls.valid, flip=True)]
        else:
            tfms = _varying(self, item_tfms, batch_tfms)
            seed = next((cb.seed for cb in self.cbs if isinstance(cb, Keyed)), default_seed())
            others = [_view(dl, self.dls.valid, tfms, key_of(seed, 'tta', k)) for k in range(n)]
        with forked('tta'):
            seen = torch.stack([_answers(self, o, dl.dataset, 1 if views else 0, act)[0] for o in others])
            preds, targs = _answers(self, plain, dl.dataset, 1, act)
        if views: return (preds+seen[0])/2, targs
        seen = seen.amax(0) if use_max else seen.mean(0)
        if use_max: return torch.maximum(preds, seen), targs
        return ((seen, preds) if beta is None else torch.lerp(seen, preds, beta)), targs


def _varying(learn, item_tfms, batch_tfms) -> dict[str, list]:
    "The transforms of items and of batches that vary: those given, or those of training that validation lacks. Raises where there are none."
    given = lambda tfms: list(Pipeline(tfms).fs)
    if item_tfms is not None or batch_tfms is not None: return dict(after_item=given(item_tfms), before_batch=[], after_batch=given(batch_tfms))
    train, valid = learn.dls.train, learn.dls.valid
    if not isinstance(train, TfmdDL): raise BadValue(f'tta: varies as a fastai loader varies the training images, got {type(train).__name__}; give batch_tfms, or views="flip"')
    found = {}
    for name in ('after_item', 'before_batch', 'after_batch'):
        known = {type(t) for t in getattr(valid, name).fs}
        found[name] = [t for t in getattr(train, name).fs if not normalizes(t) and (type(t) not in known or isinstance(t, RandTransform) or t.split_idx == 0)]
        found[name] = [_mixed(t) for t in found[name] if not isinstance(t, Apart)]
    if not any(found.values()): raise BadValue("tta: training images are not varied, so all views would be one; call learn.augment() before training, or take views='flip'")
    return found


def _mixed(t):
    "For its consistency loss augmix shows the network the image itself, two mixtures beside it: here a mixture in its place."
    if not isinstance(t, AugMixViews) or not t.views: return t
    t = copy(t)
    t.views = 0
    return t


def _view(dl, valid, tfms: dict, seed: int) -> Views:
    new = dl.new(cls=Views, seed=seed, sampler=InOrder(len(dl.dataset)), shuffle=True, drop_last=False)
    for name, own in tfms.items():
        fixed = [t for t in getattr(valid, name).fs if not any(t is o for o in own)]
        setattr(new, name, Pipeline([*fixed, *own], split_idx=0))
    return new


def _answers(learn, dl, dataset, split_idx: int, act):
    with getattr(dataset, 'set_split_idx', lambda i: nullcontext())(split_idx), learn.no_logging():
        return learn.get_preds(dl=dl, act=act, reorder=False)              # it is in order; one that fastai renews forgets which side it is
