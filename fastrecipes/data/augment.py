"Flips, shifts, rotations, zooms, perspective and light, drawn for each sample by key and applied to whole batches in one resampling."
import cv2
import numpy as np
import torch
from fastai.basics import Learner, TensorImage
from fastai.vision.augment import AffineCoordTfm, LightingTfm, RandTransform, find_coeffs
from fastai.vision.core import TensorBBox, TensorMask, TensorPoint

from fastrecipes.data.loaders import first_sample
from fastrecipes.data.memory import recycled
from fastrecipes.data.transforms import Draw, check_images, on_batches
from fastrecipes.errors import BadValue
from fastrecipes.technique import say, technique

__all__ = ['Cut', 'Homography', 'Vary']

CORNERS = torch.tensor([[-1., -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.float64)


class Homography:
    """`matrix` `(n, 3, 3)`: where each point of an output is taken from in its input; both axes run from −1 to 1, pixel centre to pixel centre.

    What lies outside is the picture mirrored at its border, which is not repeated. Called, it moves points `(n, …, 2)`, as fastai's
    `affine_coord` has its `coord_tfm` do."""
    def __init__(self, matrix: torch.Tensor): self.matrix = matrix.double()

    def __call__(self, points, invert: bool = False):
        m = self.matrix.inverse() if invert else self.matrix
        flat = points.reshape(len(points), -1, 2).double()
        moved = flat @ m[:, :, :2].mT.to(flat) + m[:, None, :, 2].to(flat)
        return (moved[..., :2]/moved[..., 2:]).to(points.dtype).view(points.shape)

    def pixels(self, h: int, w: int) -> np.ndarray:
        "The same for coordinates in pixels."
        s = np.array([[2/max(w-1, 1), 0, -1], [0, 2/max(h-1, 1), -1], [0, 0, 1]])
        return np.linalg.inv(s) @ self.matrix.cpu().numpy() @ s

    def image(self, x: torch.Tensor) -> torch.Tensor:
        "`x` `(n, c, h, w)`, uint8 or floating point, resampled bilinearly: on a CPU by OpenCV, ten times as fast as torch."
        if x.device.type == 'cpu' and x.dtype in (torch.uint8, torch.float32): return self._by_opencv(x)
        y = TensorImage(x.float()).affine_coord(coord_tfm=self)
        return y.round_().clamp_(0, 255).to(x.dtype) if x.dtype == torch.uint8 else y.to(x.dtype)

    def _by_opencv(self, x):
        out = recycled(x.shape, x.dtype)
        for planes, to, m in zip(np.ascontiguousarray(x.numpy()), out.numpy(), self.pixels(*x.shape[-2:])):
            if len(planes) == 3: cv2.split(_moved(cv2.merge(list(planes)), m), list(to))
            else:
                for plane, one in zip(planes, to): _moved(plane, m, one)
        return out


def _moved(picture, m, out=None):
    return cv2.warpPerspective(picture, m, picture.shape[1::-1], out, cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, cv2.BORDER_REFLECT_101)


class Cut(Homography):
    "A homography that only mirrors, where `mirrored` `(n,)`, and shifts by `dx`, `dy` `(n,)` whole pixels of a picture of `h`×`w`: cut out, not resampled."
    def __init__(self, mirrored, dx, dy, h: int, w: int):
        one, zero = torch.ones(len(dx), dtype=torch.float64), torch.zeros(len(dx), dtype=torch.float64)
        super().__init__(_matrix(torch.where(mirrored, -one, one), zero, 2*dx/max(w-1, 1), zero, one, 2*dy/max(h-1, 1)))
        self.mirrored, self.dx, self.dy = mirrored.numpy(), dx.numpy().astype(int), dy.numpy().astype(int)

    def image(self, x: torch.Tensor) -> torch.Tensor:
        "`x` `(n, c, h, w)`, cut."
        if x.device.type != 'cpu' or x.dtype not in (torch.uint8, torch.float32): return super().image(x)
        (h, w), c, out = x.shape[-2:], int(max(np.abs(self.dx).max(), np.abs(self.dy).max())), recycled(x.shape, x.dtype)
        for picture, to, mirrored, i, j in zip(x.numpy(), out.numpy(), self.mirrored, self.dy+c, self.dx+c):
            for plane, one in zip(picture, to):
                cut = cv2.copyMakeBorder(plane, c, c, c, c, cv2.BORDER_REFLECT_101)[i:i+h, j:j+w] if c else plane
                if mirrored: cv2.flip(cut, 1, one)
                else: one[:] = cut
        return out


def light(x: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """`x` `(n, …)`, uint8 or in [0, 1]: its logit, as fastai's `Brightness` and `Contrast` have it, times `contrast` `(n,)` plus the logit of `brightness` `(n,)`.

    Values of 8 bits are looked up in a table for each image, and rounded."""
    if x.dtype != torch.uint8: return _lit(x, brightness, contrast)
    tables = _lit((torch.arange(256, device=x.device)/255).expand(len(x), 256), brightness, contrast).mul_(255).round_().byte()
    if x.device.type != 'cpu': return tables.gather(1, x.flatten(1).long()).view(x.shape)
    out = recycled(x.shape, torch.uint8)
    for picture, table, to in zip(np.ascontiguousarray(x.numpy()), tables.numpy(), out.numpy()): cv2.LUT(picture.reshape(-1, x.shape[-1]), table, to.reshape(-1, x.shape[-1]))
    return out


def _lit(x, brightness, contrast):
    shaped = lambda v: v.to(x).view(-1, *[1]*(x.ndim-1))
    return (torch.logit(x, 1e-7)+torch.logit(shaped(brightness))).mul_(shaped(contrast)).sigmoid_()


class Vary(RandTransform):
    "Move, mirror and light each image of a training batch by draws of its own; masks, points and boxes move with it."
    order, split_idx = 5, None                  # before IntToFloatTensor: pixels of 8 bits are moved as such; datasets in memory have no split_idx

    def __init__(self, flip: bool, rotate: float, zoom: float, warp: float, lighting: float, crop: int, p: float):
        super().__init__(p=1.)
        self.moves = dict(flip=flip, rotate=rotate, zoom=zoom > 1, warp=warp, crop=crop)
        self.flip, self.rotate = Draw('flip', 1, 1, p=.5), Draw('rotate', -rotate, rotate, p)
        self.zoom, self.centre = Draw('zoom', 1, zoom, p, neutral=1.), (Draw('zoom x', 0, 1), Draw('zoom y', 0, 1))
        self.warp, self.shift = (Draw('warp x', -warp, warp, p), Draw('warp y', -warp, warp, p)), (Draw('crop x', 0, 1), Draw('crop y', 0, 1))
        self.lights = lighting > 0 and (Draw('brightness', .5*(1-lighting), .5*(1+lighting), p, neutral=.5), Draw('contrast', 1-lighting, 1/(1-lighting), p, neutral=1., log=True))

    def before_call(self, b, split_idx):
        while isinstance(b, tuple): b = b[0]
        self.do, self.drawn = True, self.draw(b) if any(self.moves.values()) else None
        self.light = tuple(d(b) for d in self.lights) if self.lights else None  # pyright: ignore[reportGeneralTypeIssues]

    def draw(self, x) -> Homography:
        "How the images `x` are moved: mirrored, turned and enlarged about their middle, then tilted, then shifted by whole pixels."
        (h, w), n = x.shape[-2:], len(x)
        m, one = torch.eye(3, dtype=torch.float64).repeat(n, 1, 1), torch.ones(n, dtype=torch.float64)
        value = lambda d: d(x).double().cpu()
        c = self.moves['crop']
        shift = [(value(d)*(2*c+1)).floor()-c if c else 0*one for d in self.shift]
        if not any(self.moves[k] for k in ('rotate', 'zoom', 'warp')): return Cut(value(self.flip) > 0 if self.moves['flip'] else one < 0, *shift, h, w)
        if self.moves['flip']: m[:, 0, 0] = 1-2*value(self.flip)
        if self.moves['rotate']:
            angle = value(self.rotate).deg2rad()
            m = m @ _matrix(angle.cos(), angle.sin(), 0*one, -angle.sin(), angle.cos(), 0*one)
        if self.moves['zoom']:
            s = 1/value(self.zoom)
            m = m @ _matrix(s, 0*one, (1-s)*(2*value(self.centre[0])-1), 0*one, s, (1-s)*(2*value(self.centre[1])-1))
        m[:, 0, 1] *= h/w                       # angles are those of the picture, not of the square that it is taken for
        m[:, 1, 0] *= w/h
        if self.moves['warp']: m = _tilted(value(self.warp[0]), value(self.warp[1])) @ m
        return Homography(_matrix(one, 0*one, 2*shift[0]/max(w-1, 1), 0*one, one, 2*shift[1]/max(h-1, 1)) @ m)

    def encodes(self, x: TensorImage):
        y = self.drawn.image(x) if self.drawn else x
        return TensorImage(light(y, *self.light) if self.light else y)

    def encodes(self, x: TensorMask | TensorPoint | TensorBBox): return x.affine_coord(coord_tfm=self.drawn) if self.drawn else x   # noqa: F811


def _matrix(*six) -> torch.Tensor:
    "Affine matrices `(n, 3, 3)` from the six vectors of their first two rows."
    zero = torch.zeros_like(six[0])
    return torch.stack([*six, zero, zero, zero+1], 1).view(-1, 3, 3)


def _tilted(x, y) -> torch.Tensor:
    "The perspective in which two corners come nearer by `x`, or `y`, and the other two go away by as much; half of the side is 1."
    to = torch.stack([torch.stack([-1-y, -1-x], 1), torch.stack([-1+y, 1+x], 1), torch.stack([1+y, -1+x], 1), torch.stack([1-y, 1-x], 1)], 1)
    eight = find_coeffs(CORNERS.expand(len(x), 4, 2), to)
    return torch.cat([eight.view(len(x), 8), torch.ones(len(x), 1, dtype=eight.dtype)], 1).view(-1, 3, 3)


@technique('data', section='Data augmentation', source='https://docs.fast.ai/vision.augment.html', touches=('inputs',),
           formula=r"p' \sim M_\text{flip}\,M_\text{rotate}\,M_\text{zoom}\,M_\text{warp}\;p")
def augment(self: Learner, flip: bool = True, rotate: float = 10., zoom: float = 1.1, warp: float = .2, lighting: float = .2,
            p: float = .75, crop: int = 0) -> Learner:
    """Vary the training images: mirrored, turned, enlarged, tilted, lit differently; the same kinds and defaults as fastai's `aug_transforms`.

    `flip`: mirror half of them left to right (false for digits and letters). `rotate`: up to so many degrees, 0–180. `zoom`: up to
    so many times, 1–2. `warp`: perspective, 0–0.5. `lighting`: brightness and contrast, 0–0.9. `p`: the share of images that each of
    these four is applied to, 0–1. `crop`: pad by so many px, mirrored at the border, and cut anywhere from there: a shift (4 for
    images of 32 px). Each image draws by (seed, epoch, sample); it is resampled once, in 8 bits where it has 8 bits.
    Raises `ValueError` outside these ranges and for data that are no images."""
    for name, value, lo, hi in (('rotate', rotate, 0, 180), ('zoom', zoom, 1, 2), ('warp', warp, 0, .5), ('lighting', lighting, 0, .9), ('p', p, 0, 1)):
        if not lo <= value <= hi: raise BadValue(f'augment: {name} must be {lo} to {hi}, got {value}')
    check_images(self, 'augment')
    side = min(first_sample(self.dls)[0][0].shape[-2:])
    if not 0 <= crop < side: raise BadValue(f'augment: crop must be 0 to {side-1} px for these images, got {crop}')
    kinds = [word for word, on in (('mirrored', flip), ('turned', rotate), ('enlarged', zoom > 1), ('tilted', warp), ('shifted', crop), ('lit anew', lighting)) if on]
    on_batches(self, [Vary(flip, rotate, zoom, warp, lighting, crop, p)] if kinds else [], instead_of=lambda t: isinstance(t, (Vary, AffineCoordTfm, LightingTfm)))
    say(self, 'augment', f'training images {", ".join(kinds)} at random' if kinds else 'every part of it is switched off')
    return self
