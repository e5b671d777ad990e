"""A linear model of images that are held out in turn: how well the classes are told apart before anything is trained, whether a mirror
image is something else, and how many labels are wrong."""
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fastrecipes.data.pixels import fit_image, read_image
from fastrecipes.data.splits import folds
from fastrecipes.report.intervals import Estimate, accuracy
from fastrecipes.training.transfer import backbone

__all__ = ['Look', 'Mirror', 'Picture', 'deep_features', 'label_noise', 'look_at', 'picture', 'small_pixels']

SIDE, SMALL = 96, 16            # px a side that a network sees, and that count as they are
COMPONENTS, FOLDS = 128, 5
FEW = 5                         # images of a class, copies counted once, below which it is not looked at
SURE, CONSISTENT = .2, .5       # the share of images that a model is surest of; agreement from which its errors are the labels'
MISTAKEN = .6                   # of what is told right: if mirrored no more is, it is something else
GREY = 2.                       # levels between the channels of a grey picture, on average, after JPEG


@dataclass(frozen=True)
class Picture:
    "What is looked at of an image: `(96, 96, 3)` and `(16, 16, 3)` in 8 bits, and whether it is grey."
    large: np.ndarray
    small: np.ndarray
    grey: bool


def picture(file) -> Picture:
    "What is looked at of an image file."
    im = read_image(file)
    large = np.asarray(fit_image(im, (SIDE, SIDE)))
    spread = large.max(2).astype(int)-large.min(2)
    return Picture(large, np.asarray(fit_image(im, (SMALL, SMALL))), bool(spread.mean() < GREY))


def small_pixels(pictures: np.ndarray) -> np.ndarray:
    "`(n, 16, 16, 3)` in 8 bits as features `(n, 768)` in [0, 1]."
    return pictures.reshape(len(pictures), -1).astype(np.float32)/255


def deep_features(pictures: np.ndarray, arch: str, bs: int = 64) -> np.ndarray:
    "What the trained body of `arch` makes of `(n, h, w, 3)` in 8 bits: `(n, features)`."
    net, device = backbone(arch), 'cuda' if torch.cuda.is_available() else 'cpu'
    body = net.body.eval().to(device)
    mean, std = (torch.tensor(s, device=device)[:, None, None] for s in net.statistics)
    with torch.inference_mode():
        made = [body((torch.from_numpy(pictures[i:i+bs].copy()).to(device).permute(0, 3, 1, 2)/255-mean)/std) for i in range(0, len(pictures), bs)]
    return torch.cat([m.mean((2, 3)) if m.ndim == 4 else m for m in made]).cpu().numpy()


@dataclass(frozen=True)
class Mirror:
    """How a linear model answers for images held out: right as they are (`plain`), mirrored (`mirrored`), and as they are once it has learnt mirrored ones as
    well (`learnt`): means over classes, 0–1. `z`: by how many standard errors learning them harms."""
    plain: float
    mirrored: float
    learnt: float
    z: float

    @classmethod
    def of(cls, labels: np.ndarray, plain: np.ndarray, mirrored: np.ndarray, learnt: np.ndarray) -> 'Mirror':
        "From what was right `(n,)` each time. Only images that are right in one of `plain` and `learnt` tell: McNemar's test, doi:10.1007/BF02295996."
        lost, size = plain.astype(int)-learnt, np.bincount(labels)
        return cls(*(float((np.bincount(labels, right)/size).mean()) for right in (plain, mirrored, learnt)), float(lost.sum()/max(1., np.abs(lost).sum()**.5)))

    @property
    def harms(self) -> bool:
        "Whether mirroring makes something else of a picture: learning mirror images harms, or they are mistaken for others and learning them is of no clear use."
        return self.z > 2.3 or (self.mirrored < MISTAKEN*self.plain and self.z > -2)

    def __str__(self): return f'{percent(self.plain)} are told apart as they are, {percent(self.mirrored)} mirrored, and {percent(self.learnt)} where mirror images are learnt, too'


def percent(share: float) -> str:
    "A share in words: .4 is `40 %`."
    return f'{100*share:.0f} %'


@dataclass(frozen=True)
class Look:
    """What a linear model tells of images held out, by features of one kind. `predicted` `(n,)`: the class it says; `agreement`: the share of images of which two models,
    trained on different halves of the rest, say the same; `sureness` `(n,)`: the least probability, 0–1, that these two and the model itself give to what it says."""
    features: str
    predicted: np.ndarray
    sureness: np.ndarray
    accuracy: Estimate
    agreement: float
    mirror: Mirror


def look_at(features: str, x: np.ndarray, mirrored: np.ndarray, labels: np.ndarray, keys: list[str], seed: int = 42) -> Look:
    """Hold images out in turn, and let a linear model of the others tell their classes.

    `x`, `mirrored` `(n, d)`: features of the images and of their mirror images; `labels` `(n,)`: 0 to c−1; `keys`: equal for copies. The model:
    linear discriminant analysis of 128 principal components, its covariance shrunk as Ledoit and Wolf say (doi:10.1016/S0047-259X(03)00096-4):
    there is nothing to tune, and wrong labels move the means of classes little."""
    n, named = max(labels)+1, [str(y) for y in labels]
    p = np.zeros((3, len(x), n))                # the model's, and of two of half of the images each
    right = {k: np.zeros(len(x), bool) for k in ('plain', 'mirrored', 'learnt')}
    fold = np.array(folds(keys, named, min(FOLDS, min(len({k for k, y in zip(keys, labels) if y == c}) for c in range(n))), seed))
    for k in range(max(fold)+1):
        out, rest = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        model = _fitted(x[rest], labels[rest])
        half = np.array(folds([keys[i] for i in rest], [named[i] for i in rest], 2, seed))
        for q, m in zip(p, (model, *(_fitted(x[rest[half == h]], labels[rest[half == h]]) for h in range(2)))): q[np.ix_(out, m.classes_)] = m.predict_proba(x[out])
        right['plain'][out], right['mirrored'][out] = model.predict(x[out]) == labels[out], model.predict(mirrored[out]) == labels[out]
        both = _fitted(np.concatenate([x[rest], mirrored[rest]]), np.concatenate([labels[rest]]*2))
        right['learnt'][out] = both.predict(x[out]) == labels[out]
    whole, *halves = p.argmax(2)
    return Look(features, whole, p[:, np.arange(len(x)), whole].min(0), accuracy(labels, whole), float((halves[0] == halves[1]).mean()), Mirror.of(labels, **right))


def _fitted(x, y):
    model = make_pipeline(StandardScaler(), PCA(min(COMPONENTS, len(x)//2, x.shape[1]), random_state=0), LinearDiscriminantAnalysis(solver='lsqr', shrinkage='auto'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')         # of pixels that never change, and classes of one image
        return model.fit(x, y)


def label_noise(look: Look, labels: np.ndarray) -> Estimate | None:
    """The share of labels that are wrong, by those that differ among the fifth of the images that the model is surest of; None where two halves of the data
    agree on less than half of the images: then a model of them errs by itself.

    Where a class is plain to see, a label that contradicts is a wrong one, and wrong labels lie on plain images as often as on others; what is hard to
    tell is not among the surest. It counts labels that are wrong by chance; where one class is always taken for another, the model learns that."""
    if look.agreement < CONSISTENT: return None
    surest = np.argsort(-look.sureness, kind='stable')[:max(1, round(SURE*len(labels)))]
    right = accuracy(labels[surest], look.predicted[surest])
    return Estimate(1-right.value, 1-right.hi, 1-right.lo, right.n)
