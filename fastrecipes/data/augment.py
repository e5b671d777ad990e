"Flips, rotations, zooms, perspective and light, drawn for each sample by key and applied to whole batches by fastai's own transforms."
import numpy as np
import torch
from fastai.basics import Learner, TensorImage
from fastai.data.core import TfmdDL
from fastai.vision.augment import Brightness, Contrast, Flip, LightingTfm, AffineCoordTfm, Rotate, Warp, Zoom, setup_aug_tfms

from fastrecipes.data.keyed import keyed, per_sample, with_train
from fastrecipes.data.loaders import first_sample, shapes
from fastrecipes.errors import BadValue
from fastrecipes.technique import say, technique

__all__ = ['Draw']


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


@technique('data', section='Data augmentation', source='https://docs.fast.ai/vision.augment.html', touches=('inputs',))
def augment(self: Learner, flip: bool = True, rotate: float = 10., zoom: float = 1.1, warp: float = .2, lighting: float = .2,
            p: float = .75) -> Learner:
    """Vary the training images: mirrored, turned, enlarged, tilted, lit differently; the same kinds and defaults as fastai's `aug_transforms`.

    `flip`: mirror half of them left to right (false for digits and letters). `rotate`: up to so many degrees, 0–180. `zoom`: up to
    so many times, 1–2. `warp`: perspective, 0–0.5. `lighting`: brightness and contrast, 0–0.9. `p`: the share of images that each is
    applied to, 0–1. Each image draws by (seed, epoch, sample). Raises `ValueError` outside these ranges."""
    for name, value, lo, hi in (('rotate', rotate, 0, 180), ('zoom', zoom, 1, 2), ('warp', warp, 0, .5), ('lighting', lighting, 0, .9), ('p', p, 0, 1)):
        if not lo <= value <= hi: raise BadValue(f'augment: {name} must be {lo} to {hi}, got {value}')
    seen = first_sample(self.dls)
    if not seen or not isinstance(self.dls.train, TfmdDL) or not isinstance(x := seen[0][0], TensorImage) or x.ndim != 4:
        got = f'{type(seen[0][0]).__name__} {shapes(seen[0][:1])}' if seen else type(self.dls.train).__name__
        raise BadValue(f'augment: needs a loader of images (TensorImage), for its transforms pass over others, got {got}; '
                       'give torch datasets and loaders of images to `as_dataloaders`')
    keyed(self)
    tfms = []
    if flip: tfms.append(Flip(p=1., draw=Draw('flip', 1, 1, p=.5)))
    if rotate: tfms.append(Rotate(p=1., draw=Draw('rotate', -rotate, rotate, p)))
    if zoom > 1: tfms.append(Zoom(p=1., draw=Draw('zoom', 1, zoom, p, neutral=1.), draw_x=Draw('zoom x', 0, 1), draw_y=Draw('zoom y', 0, 1)))
    if warp: tfms.append(Warp(p=1., draw_x=Draw('warp x', -warp, warp, p), draw_y=Draw('warp y', -warp, warp, p)))
    if lighting:
        tfms.append(Brightness(p=1., draw=Draw('brightness', .5*(1-lighting), .5*(1+lighting), p, neutral=.5)))
        tfms.append(Contrast(p=1., draw=Draw('contrast', 1-lighting, 1/(1-lighting), p, neutral=1., log=True)))
    self.dls = with_train(self.dls, self.dls.train.new())
    own = self.dls.train.after_batch
    own.fs = own.fs.filter(lambda t: not isinstance(t, (AffineCoordTfm, LightingTfm)))
    for t in setup_aug_tfms(tfms): own.add(t)
    say(self, 'augment', f'{len(tfms)} random transforms on each training batch' if tfms else 'every part of it is switched off')
    return self
