"Flips, rotations, zooms, perspective and light, drawn for each sample by key and applied to whole batches by fastai's own transforms."
from fastai.basics import Learner
from fastai.vision.augment import AffineCoordTfm, Brightness, Contrast, Flip, LightingTfm, Rotate, Warp, Zoom, setup_aug_tfms

from fastrecipes.data.transforms import Draw, check_images, on_batches
from fastrecipes.errors import BadValue
from fastrecipes.technique import say, technique

__all__ = []


@technique('data', section='Data augmentation', source='https://docs.fast.ai/vision.augment.html', touches=('inputs',))
def augment(self: Learner, flip: bool = True, rotate: float = 10., zoom: float = 1.1, warp: float = .2, lighting: float = .2,
            p: float = .75) -> Learner:
    """Vary the training images: mirrored, turned, enlarged, tilted, lit differently; the same kinds and defaults as fastai's `aug_transforms`.

    `flip`: mirror half of them left to right (false for digits and letters). `rotate`: up to so many degrees, 0–180. `zoom`: up to
    so many times, 1–2. `warp`: perspective, 0–0.5. `lighting`: brightness and contrast, 0–0.9. `p`: the share of images that each is
    applied to, 0–1. Each image draws by (seed, epoch, sample). Raises `ValueError` outside these ranges."""
    for name, value, lo, hi in (('rotate', rotate, 0, 180), ('zoom', zoom, 1, 2), ('warp', warp, 0, .5), ('lighting', lighting, 0, .9), ('p', p, 0, 1)):
        if not lo <= value <= hi: raise BadValue(f'augment: {name} must be {lo} to {hi}, got {value}')
    check_images(self, 'augment')
    tfms = []
    if flip: tfms.append(Flip(p=1., draw=Draw('flip', 1, 1, p=.5)))
    if rotate: tfms.append(Rotate(p=1., draw=Draw('rotate', -rotate, rotate, p)))
    if zoom > 1: tfms.append(Zoom(p=1., draw=Draw('zoom', 1, zoom, p, neutral=1.), draw_x=Draw('zoom x', 0, 1), draw_y=Draw('zoom y', 0, 1)))
    if warp: tfms.append(Warp(p=1., draw_x=Draw('warp x', -warp, warp, p), draw_y=Draw('warp y', -warp, warp, p)))
    if lighting:
        tfms.append(Brightness(p=1., draw=Draw('brightness', .5*(1-lighting), .5*(1+lighting), p, neutral=.5)))
        tfms.append(Contrast(p=1., draw=Draw('contrast', 1-lighting, 1/(1-lighting), p, neutral=1., log=True)))
    on_batches(self, setup_aug_tfms(tfms), instead_of=lambda t: isinstance(t, (AffineCoordTfm, LightingTfm)))
    say(self, 'augment', f'{len(tfms)} random transforms on each training batch' if tfms else 'every part of it is switched off')
    return self
