"AugMix: mixtures of chains of simple operations, and a network asked for the same answer to all versions of an image."
import numpy as np
import torch
from fastai.basics import Learner, TensorImage, Transform
from fastai.vision.core import TensorBBox, TensorPoint
from scipy.special import betaincinv, gammaincinv
from torch.nn import functional as F

from fastrecipes.data.albumentation import arriving, check_pixels, is_mask
from fastrecipes.data.keyed import Keyed, per_sample
from fastrecipes.data.loaders import shapes
from fastrecipes.data.ops import affine, autocontrast, equalize, posterize, rotate, solarize
from fastrecipes.data.transforms import check_images, on_batches
from fastrecipes.errors import BadValue
from fastrecipes.objective import Objective, cross_entropy_of
from fastrecipes.technique import TechniqueCallback, put, say, technique

__all__ = ['AugMix', 'AugMixViews', 'Consistency', 'augment_and_mix', 'jensen_shannon', 'mixing_weights']

DEPTH = 3                                       # the longest chain where `depth` is drawn


def _moved(x, a=1., b=0., c=0., d=0., e=1., f=0.):
    return affine(x, torch.stack(torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64, device=x.device) for v in (a, b, c, d, e, f))), -1), 'bilinear')


def _whole(level, most): return (level*most/10).trunc()


# name → f(x, level, sign): as the authors' `augmentations.py` takes a level of 10 at most, whole where it does
OPERATIONS = dict(
    autocontrast=lambda x, level, sign: autocontrast(x),
    equalize=lambda x, level, sign: equalize(x),
    posterize=lambda x, level, sign: posterize(x, 4-_whole(level, 4)),
    rotate=lambda x, level, sign: rotate(x, _whole(level, 30)*sign, 'bilinear'),
    solarize=lambda x, level, sign: solarize(x, 256-_whole(level, 256)),
    shear_x=lambda x, level, sign: _moved(x, b=level*.03*sign),
    shear_y=lambda x, level, sign: _moved(x, d=level*.03*sign),
    translate_x=lambda x, level, sign: _moved(x, c=_whole(level, x.shape[-1]/3)*sign),
    translate_y=lambda x, level, sign: _moved(x, f=_whole(level, x.shape[-2]/3)*sign))


def jensen_shannon(logits, axis: int = -1) -> torch.Tensor:
    """The Jensen–Shannon divergence of the distributions softmax(logits[0]), softmax(logits[1]), … `(n, c)`: the mean over them of KL(p ‖ their mean).

    In nats, 0 where all agree to the log of their number; the mean over samples, classes along `axis`. Computed in float32 at least."""
    logps = [F.log_softmax(z if z.dtype == torch.float64 else z.float(), axis) for z in logits]
    mean = torch.stack(logps).logsumexp(0) - np.log(len(logps))
    return torch.stack([(p.exp()*(p-mean)).sum(axis).mean() for p in logps]).mean()


def mixing_weights(u: torch.Tensor, v: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of the chains `(n, width)` from Dirichlet(alpha, …) and of their mixture `(n,)` from Beta(alpha, alpha).

    By the inverse of their distributions, from uniform numbers `u` `(n, width)` and `v` `(n,)`: keyed draws give keyed shares."""
    gamma = torch.from_numpy(gammaincinv(alpha, u.double().clamp(1e-12, 1-1e-12).numpy())).clamp(min=1e-300)
    return (gamma/gamma.sum(-1, keepdim=True)).float(), torch.from_numpy(betaincinv(alpha, alpha, v.double().numpy())).float()


def augment_and_mix(x: torch.Tensor, ops: torch.Tensor, levels: torch.Tensor, signs: torch.Tensor, weights: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """`(1−share)·x + share·Σ weights·chain(x)` of uint8 images `(n, c, h, w)`: floats in [0, 1].

    `ops`, `levels`, `signs` `(n, width, depth)`: the steps of each chain, by their number in `OPERATIONS`, none where that is −1;
    `weights` `(n, width)`, `share` `(n,)`."""
    n, width, depth = ops.shape
    chains = x.repeat_interleave(width, 0)
    for step in range(depth):
        op, level, sign = (t[..., step].flatten() for t in (ops, levels, signs))
        for i, f in enumerate(OPERATIONS.values()):
            if len(rows := (op == i).nonzero().flatten()): chains[rows] = f(chains[rows], level[rows], sign[rows])
    def each(share): return (share/255).to(x.device).view(-1, 1, 1, 1)
    mixed = x*each(1-share)
    for i in range(width): mixed.addcmul_(chains[i::width], each(share*weights[:, i]))
    return mixed


class AugMixViews(Transform):
    """Mix each training image; in its place, or, for the consistency loss, two mixtures behind it: the batch is three times as long until it
    is normalised like one, then `Apart` takes the views out."""
    order = 98                                  # after flips and whatever else both views are to share, before Normalize

    def __init__(self, severity: float, width: int, depth: int, alpha: float, views: int):
        super().__init__()
        self.severity, self.width, self.depth, self.alpha, self.views = severity, width, depth, alpha, views
        self.n = self.kept = None               # images in the batch that is under way; the views of the last one

    def __getstate__(self): return {**vars(self), 'n': None, 'kept': None}

    def __call__(self, b, split_idx=None, **kwargs):
        self.n = None
        if split_idx: return b                  # the training loader at validation, as in `tta`
        x, *rest = b
        views = [self.mixed(x, view) for view in range(max(1, self.views))]
        if self.views: self.n = len(x)
        return (type(x)(torch.cat([x, *views])) if self.views else views[0]), *rest

    def mixed(self, x, view: int):
        "One mixture of each image of the batch in hand; of one with values that are not finite, no number."
        pixels = x.detach().as_subclass(torch.Tensor)
        floating, bad = x.is_floating_point(), ~pixels.isfinite().flatten(1).all(1)
        if floating: pixels = (pixels.nan_to_num(0, 0, 0).clamp(0, 1)*255).round().to(torch.uint8)
        out = augment_and_mix(pixels, *self.drawn(len(x), view))
        if not floating: return type(x)((out*255).round().to(x.dtype))
        out[bad] = torch.nan
        return type(x)(out.to(x.dtype))

    def drawn(self, n: int, view: int):
        "ops, levels, signs, weights and share, as `augment_and_mix` takes them, of one view of each of the batch's `n` samples."
        def u(*name): return per_sample(n, 'augmix', view, *name)
        longest = self.depth if self.depth > 0 else DEPTH
        def steps(what): return torch.stack([torch.stack([u(what, chain, step) for step in range(longest)], -1) for chain in range(self.width)], 1)
        ops = (steps('op')*len(OPERATIONS)).long().clamp(max=len(OPERATIONS)-1)
        if self.depth <= 0:
            length = (torch.stack([u('depth', chain) for chain in range(self.width)], 1)*DEPTH).long().clamp(max=DEPTH-1) + 1
            ops[torch.arange(DEPTH) >= length[..., None]] = -1
        levels = .1 + steps('level').double()*(self.severity-.1)
        signs = torch.where(steps('sign') < .5, -1., 1.)
        return ops, levels, signs, *mixing_weights(torch.stack([u('weight', chain) for chain in range(self.width)], 1), u('share'), self.alpha)


class Apart(Transform):
    "Take the views out of the batch, when all that is done to pixels is done."
    order = 1000

    def __init__(self, of: AugMixViews):
        super().__init__()
        self.of = of

    def __call__(self, b, split_idx=None, **kwargs):
        if (n := self.of.n) is None: return b
        x, *rest = b
        self.of.n, self.of.kept = None, x[n:]
        return x[:n], *rest


class Split(TechniqueCallback):
    "After the forward pass give the batch its own inputs and predictions back, and keep the predictions for the views."
    order, run_valid = Keyed.order+.75, False   # before anyone who looks at predictions
    transient = ('own', 'answers')

    def __init__(self): self.own = self.answers = None

    def after_pred(self):
        if self.own is None: return
        n, pred = len(self.own[0]), self.learn.pred
        self.learn.pred, self.answers = pred[:n], pred[n:].split(n)
        self._restore()

    def after_cancel_batch(self): self.abort('batch')

    def abort(self, level):
        if self.own is not None: self._restore()
        self.answers = None

    def _restore(self): self.learn.xb, self.own = self.own, None


class AugMix(TechniqueCallback):
    "Put the views behind the images of a training batch, for the one forward pass."
    order, run_valid = 80, False                # when all others have seen the images and changed what they change

    def __init__(self, views: AugMixViews, split: Split): self.views, self.split = views, split

    def before_fit(self): self.split.abort('fit')       # what a fit that died left

    def before_batch(self):
        if not self.learn.training: return
        views, self.views.kept = self.views.kept, None
        (x,) = self.split.own = self.learn.xb
        if views is None or len(views) != self.views.views*len(x):
            self.split.own = None
            raise BadValue('augmix: this training loader makes no views, got a batch without; call augmix again where `learn.dls` was replaced')
        self.learn.xb = (torch.cat([x, views.to(x)]),)


class Consistency(TechniqueCallback):
    "Add `weight` times the divergence between the answers to an image and to its views to the loss that is differentiated."
    order, run_valid = Objective.order+.75, False       # after what a teacher is blended with, before accumulation scales

    def __init__(self, split: Split, weight: float): self.split, self.weight = split, weight

    def after_loss(self):
        answers, self.split.answers = self.split.answers, None
        if answers is None: return
        ce = cross_entropy_of(self.learn.loss_func)
        js = jensen_shannon([self.learn.pred, *answers], ce.axis)
        loss = self.learn.loss_grad + self.weight*js*(len(self.learn.pred) if ce.reduction == 'sum' else 1)
        if self.learn.iter == 0:
            say(self.learn, 'augmix', f'two mixtures beside each training image; answers to the three diverged by {float(js.detach()):.2g} nats in an epoch\'s first batch')
        self.learn.loss_grad, self.learn.loss = loss, loss.clone()


@technique('train', section='Data augmentation', source='arXiv:1912.02781', touches=('inputs', 'gradient'),
           refuses={other: 'AugMix asks for one answer to an image and to its own mixtures, and half of another image in it is to have another; keep one'
                    for other in ('mixup', 'cutmix')},
           formula=r'\tilde x = (1-m)\,x + m \sum_i w_i\,c_i(x), \qquad L = \mathrm{CE}(p, y) + \lambda\,\mathrm{JS}(p, \tilde p_1, \tilde p_2)')
def augmix(self: Learner, severity: float = 3., width: int = 3, depth: int = -1, alpha: float = 1., jsd: bool = True, weight: float = 12.) -> Learner:
    """Train on images and on mixtures of distorted copies of them, and ask for the same answer to all: for pictures worse than those trained on.

    A mixture has `width` ≥ 1 chains of `depth` operations (−1: 1 to 3, drawn), of autocontrast, equalize, posterize, rotate, solarize,
    shear and translate, as strong as `severity`, 0.1–10 (the paper's 3 for CIFAR, 1 for ImageNet), with shares from Dirichlet(alpha)
    and Beta(alpha, alpha), `alpha` > 0. `jsd`: keep the image, and add `weight` ≥ 0 times the Jensen–Shannon divergence between the
    answers to it and to two mixtures: three images a forward pass, so about three times the time and memory. Without, one mixture
    takes the image's place. Each image draws by (seed, epoch, sample). It pays where test images are blurred, noisy or of another
    camera; on clean ones it needs long training. Raises `ValueError` outside the ranges, for inputs that are no images in [0, 1], for
    masks, points and boxes, which would stay behind, and with `jsd` for a loss that is not a cross entropy."""
    for name, value, fine, domain in (('severity', severity, .1 <= severity <= 10, '0.1 to 10'), ('width', width, width >= 1, '≥ 1'),
                                      ('depth', depth, depth == -1 or depth >= 1, '≥ 1, or -1'), ('alpha', alpha, alpha > 0, '> 0'), ('weight', weight, weight >= 0, '≥ 0')):
        if not fine: raise BadValue(f'augmix: {name} must be {domain}, got {value}')
    check_images(self, 'augmix')
    xb, yb = arriving(self, AugMixViews.order)
    check_pixels('augmix', xb)
    if xb[0].shape[1] not in (1, 3): raise BadValue(f'augmix: needs images of 1 or 3 channels, got {shapes(xb)}; cutout and mixup take any number of them')
    for y in yb:
        if not is_mask(y, xb[0]) and not isinstance(y, (TensorPoint, TensorBBox, TensorImage)): continue
        raise BadValue(f'augmix: it turns and shifts images, and targets with a place in them, {type(y).__name__} {shapes([y])}, would stay behind; use augment, which moves both')
    if jsd and cross_entropy_of(self.loss_func) is None:
        raise BadValue(f'augmix: with jsd the loss must be a cross entropy over classes, got {self.loss_func}; use jsd=False, which trains on mixtures with any loss')
    views = AugMixViews(severity, width, depth, alpha, 2 if jsd else 0)
    on_batches(self, [views, Apart(views)] if jsd else [views], instead_of=lambda t: isinstance(t, (AugMixViews, Apart)))
    if jsd:
        put(self, split := Split())
        put(self, AugMix(views, split))
        put(self, Consistency(split, weight))
    else: self.remove_cbs([cb for cb in self.cbs if type(cb) in (Split, AugMix, Consistency)])
    chains = f'{width} chain{"s"*(width > 1)} of {depth if depth > 0 else "1 to 3"} operations'
    say(self, 'augmix', f'two mixtures of {chains} beside each training image' if jsd else f'each training image is a mixture of {chains}')
    return self
