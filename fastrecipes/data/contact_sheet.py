"What a technique makes of images, to be looked at before it is trained with."
from collections.abc import Mapping
from inspect import unwrap

import numpy as np
import torch
from fastai.basics import Callback, CancelFitException, CrossEntropyLossFlat, DataLoaders, Learner, nn
from fastai.torch_core import TensorImage
from matplotlib.figure import Figure

from fastrecipes.data.keyed import keyed, with_train
from fastrecipes.data.statistics import normalizes
from fastrecipes.data.transforms import check_images
from fastrecipes.errors import BadName, BadValue
from fastrecipes.randomness import forked
from fastrecipes.technique import TECHNIQUES, plan

__all__ = ['show_augmented']


class _Look(Callback):
    "Take a training batch as the network is about to meet it, and end the fit."
    order = 90
    def before_batch(self):
        self.learn.looked = self.learn.xb[0].detach().cpu()
        raise CancelFitException('seen')


class _Chosen:
    "The order in which only some samples come up."
    def __init__(self, indices): self.indices = indices
    def __len__(self): return len(self.indices)
    def draw(self, rng): return self.indices


def show_augmented(dls_or_learn: DataLoaders | Learner, technique, *, n: int = 8, rows: int = 4, **arguments) -> Figure:
    """A figure of `rows` training images, each beside `n` versions of it as `technique` has a network meet them, in as many epochs.

    A notebook shows it; in a script, `show_augmented(…).savefig('sheet.png')`.

    `technique`: a name (with its `arguments`), several, or what `use` takes as a dict: `{'randaugment': dict(n=3), 'rotate': 20}`. Images
    are spread over the training set, and denormalised. What the loaders do to training images already is done too, but for the first
    column. Loaders, Learner and random streams stay as they are. Raises `TypeError` for an unknown name or argument, `ValueError` for
    a technique that changes no images, and where it refuses the data."""
    if n < 1 or rows < 1: raise BadValue(f'show_augmented: n and rows must be at least 1, got {n=}, {rows=}')
    if arguments and not isinstance(technique, str): raise BadName(f'show_augmented: {", ".join(arguments)}: arguments go with one name; give a dict of them otherwise')
    techniques = {technique: arguments or True} if isinstance(technique, str) else dict(technique) if isinstance(technique, Mapping) else dict.fromkeys(technique, True)
    for t, _ in (steps := plan(techniques)):
        if 'inputs' in t.touches and not all('inference' in o.touches for o, _ in steps): continue
        shown = ', '.join(sorted(o.name for o in TECHNIQUES.values() if 'inputs' in o.touches and 'inference' not in o.touches))
        raise BadValue(f'show_augmented: {t.name} does not change what images look like, got {t.name!r}; those that do are {shown}')
    given = dls_or_learn if isinstance(dls_or_learn, Learner) else None
    dls = given.dls if given else dls_or_learn
    with forked('look'):
        learn = Learner(dls, nn.Linear(1, 1), given.loss_func if given else getattr(dls.train_ds, 'loss_func', CrossEntropyLossFlat()))
        check_images(learn, 'show_augmented')
        seed = next((o.seed for o in given.cbs if hasattr(o, 'seed')), None) if given else None
        keyed(learn, seed)
        every, size = learn.dls.train, len(learn.dls.train.dataset)
        few = dict(sampler=_Chosen(np.linspace(0, size-1, min(rows, size)).astype(int)), shuffle=True, bs=min(rows, size), num_workers=0)
        clean = dls.valid.after_batch if len(dls.loaders) > 1 else every.after_batch
        sheet = [_seen(learn, every.new(after_batch=clean, **few), 0)]
        learn.dls = with_train(learn.dls, every.new(**few))
        learn.use(**techniques)
        sheet += [_seen(learn, learn.dls.train, epoch) for epoch in range(n)]
    return _figure(np.stack(sheet, 1), f'{", ".join(techniques)}: {n} versions')


def _seen(learn: Learner, dl, epoch: int) -> np.ndarray:
    "The first batch of `dl` in `epoch` as a network meets it, but denormalised: `(n, h, w, c)` in [0, 1]."
    learn.dls = with_train(learn.dls, dl)
    keyed(learn).done = epoch
    with learn.no_bar(), learn.no_logging(): unwrap(Learner.fit)(learn, 1, cbs=_Look())    # without what looks whether the network can train: this one cannot
    x = learn.looked[-dl.bs:]                   # augmix puts its views behind the images
    for t in dl.after_batch.fs:
        if normalizes(t): x = t.decodes(TensorImage(x)).as_subclass(torch.Tensor)
    x = x.float().clamp(0, 1) if x.is_floating_point() else x.float()/255
    return x.permute(0, 2, 3, 1).numpy()


def _figure(sheet: np.ndarray, title: str) -> Figure:
    "A row for each image of `sheet` `(rows, columns, h, w, c)`, the original first."
    rows, columns = sheet.shape[:2]
    fig = Figure((1.3*columns, 1.3*rows+.4), layout='constrained')
    for ax, image in zip(fig.subplots(rows, columns, squeeze=False).flat, sheet.reshape(-1, *sheet.shape[2:])):
        ax.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap='gray', vmin=0, vmax=1)
        ax.axis('off')
    fig.axes[0].set_title('original', fontsize='small')
    fig.suptitle(title, fontsize='medium')
    return fig
