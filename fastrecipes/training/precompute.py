"What a frozen body makes of the data, worked out once and kept on disk: later epochs train the head alone."
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from fastai.basics import Learner, get_model, nn
from fastai.data.core import TfmdDL
from fastai.layers import AdaptiveConcatPool2d, Flatten
from fasttransform.cast import retain_type

from fastrecipes.data.decoded import NoRoom
from fastrecipes.data.keyed import Keyed, KeyedDL, keyed, keyed_kind
from fastrecipes.errors import BadValue
from fastrecipes.files import in_bytes
from fastrecipes.repairs import fitting
from fastrecipes.technique import TECHNIQUES, TechniqueCallback, applied, put, say, technique
from fastrecipes.training.activations import Stored, as_keyed, store
from fastrecipes.training.freezing import FreezeBN, freeze_norms

__all__ = ['Precompute', 'StoredDL', 'body_of']

STEADY = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
          nn.Flatten, nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Mish, AdaptiveConcatPool2d, Flatten)   # no weights, no draws


# where the body ends

def body_of(learn: Learner) -> list[str]:
    """The names of the layers that nothing trains, from the first one on: what they give depends on the sample only.

    Norm layers in frozen groups count as frozen whatever train_bn says. Pools and activations behind the last frozen layer belong to it, so
    that little is to be stored. Empty where the first layer trains. Raises `ValueError` for a network that is no `nn.Sequential`."""
    if not isinstance(model := get_model(learn.model), nn.Sequential):
        raise BadValue('precompute: the body must be the first layers of an nn.Sequential, as vision_learner makes it, '
                       f'and {type(model).__name__} is none; put body and head into one')
    lists, frozen = (learn.opt.param_lists, learn.opt.frozen_idx) if learn.opt is not None else ((), 0)
    still = {p for ps in list(lists)[:frozen] for p in ps}  # pyright: ignore[reportGeneralTypeIssues]
    body, last = [], 0
    for name, m in _chain(model):
        kind = _kind(m, still)
        if kind == 'trained': break
        body.append(name)
        if kind == 'frozen': last = len(body)
    steady = next((i for i, n in enumerate(body[last:]) if not isinstance(model.get_submodule(n), STEADY)), len(body)-last)
    return body[:last+steady] if last else []


def _chain(m: nn.Module, prefix: str = ''):
    "The layers that run one behind the other, by name: sequences within the sequence are opened."
    for name, child in m.named_children():
        if type(child) is nn.Sequential: yield from _chain(child, f'{prefix}{name}.')
        else: yield f'{prefix}{name}', child


def _kind(m: nn.Module, still: set) -> str:
    "'frozen', 'trained' or, without parameters, 'plain'. In a frozen layer the norms within may have been left to train."
    norm = nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm
    own = [(p, isinstance(o, norm)) for o in m.modules() for p in o.parameters(recurse=False)]
    if not own: return 'plain'
    fixed = [p in still or not p.requires_grad for p, _ in own]
    weights = [f for f, (_, of_norm) in zip(fixed, own) if not of_norm]
    return 'frozen' if all(weights or fixed) else 'trained'


# the loader of what is stored

class StoredDL(KeyedDL):
    """A `KeyedDL` in whose batches the input is what the body made of it: the same samples in the same order, targets unchanged.

    `columns`: arrays of `views`·n rows, one for each element of a sample; `like`: an example of each; `source`: the loader of the inputs.
    In epoch e a sample's row is that of view e mod `views`."""
    def __init__(self, *args, columns=None, like=(), views: int = 1, source=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.columns, self.like, self.views, self.source = columns, like, views, source

    def new(self, dataset=None, cls=None, **kwargs):
        same = (dataset is None or dataset is self.dataset) and issubclass(cls or type(self), StoredDL)
        ours = {n: getattr(self, n) for n in ('columns', 'like', 'views', 'source')} if same else {}
        return super().new(dataset, cls or (type(self) if same else KeyedDL), **{**ours, **kwargs})

    def get_idxs(self):
        order = super().get_idxs()
        if isinstance(self.source, KeyedDL): self.source._draws = order     # whoever asks it which samples a batch has (FiniteLoss) learns of these
        return order

    def create_batches(self, samps):
        n = len(self.dataset)
        for draws in self.chunkify(samps):
            draws = np.asarray(draws)
            view = (self.epoch + draws//n) % self.views if self.views > 1 else 0        # a sample that comes up again shows another view
            yield tuple(_typed(c[view*n + draws % n], o) for c, o in zip(self.columns, self.like))


def _typed(rows: np.ndarray, like):
    t = torch.from_numpy(np.ascontiguousarray(rows))
    return t.float() if like is None else retain_type(t, like)


def _stored_loader(dl, stored: Stored, side: str) -> StoredDL:
    "`dl` over what is stored of its side."
    ours = dict(columns=stored.columns[side], like=stored.like, views=stored.views if side == 'train' else 1, source=dl)
    new = as_keyed(dl).new(cls=StoredDL, after_item=None, before_batch=None, after_batch=None, num_workers=0, **ours)
    new.seed, new.epoch = getattr(dl, 'seed', new.seed), getattr(dl, 'epoch', -1)
    return new


class Precompute(TechniqueCallback):
    "In a fit whose body is frozen, take what is stored in place of the inputs, and let the body's layers pass it on: for each batch, and only for that long."
    order = Keyed.order+.25                     # the epoch is known; `Distributed` has yet to share the loader out and to wrap the network

    def __init__(self, dir: Path, views: int, dtype: str):
        self.dir, self.views, self.dtype, self.told = dir, views, dtype, ''
        self.stored, self.body, self.passing = None, [], []

    def before_fit(self):
        self.stored = None
        if not fitting(self.learn): return
        _refuse_blind(self.learn, self.views)
        if not (body := body_of(self.learn)):
            unfrozen = 'no layer at the front is frozen as a whole, so nothing can be stored for it: the inputs themselves are used'
            if self.told: unfrozen = f'{self.told}; no layer at the front is frozen any more: the inputs themselves are used again'
            return say(self.learn, 'precompute', unfrozen, aloud=getattr(applied(self.learn).get('precompute'), 'effect', None) != unfrozen)
        try: stored, found = store(self.learn, body, self.dir, self.views, self.dtype)
        except NoRoom as e: return say(self.learn, 'precompute', f'{e}; nothing is stored, and the body works in every epoch', aloud=True)
        self.stored, self.body = stored, body
        self._tell(found)

    def _tell(self, found: bool):
        rows, views = self.stored.columns['train'][0], self.views
        varies = views == 1 or not np.array_equal(rows[:64], rows[len(rows)//views:][:64])
        others = sorted(p for p in self.dir.iterdir() if p.is_dir() and p != self.stored.folder and len(p.name) == len(self.stored.folder.name))
        said = f'{len(self.body)} frozen layer{"s"*(len(self.body) > 1)} answered {len(rows)//views:,} training samples{f" in {views} views each" if views > 1 else ""}: '
        said += f'{"×".join(map(str, rows.shape[1:]))} numbers each, {in_bytes(self.stored.size)}'
        if found: said += ', as stored before'
        elif others: said += f'; {len(others)} earlier set{"s"*(len(others) > 1)} there (of another body, other data or transforms) did not fit'
        if not varies: said += f'; the {views} views are alike, for the training loader varies no image'
        self.told = said
        say(self.learn, 'precompute', said, aloud=not varies or bool(others) and not found)

    def before_train(self):
        if self.stored: self.learn.dl = _stored_loader(self.learn.dl, self.stored, 'train')

    def before_validate(self):
        if self.stored and self.learn.dl is self.learn.dls.valid and 'valid' in self.stored.columns: self.learn.dl = _stored_loader(self.learn.dl, self.stored, 'valid')

    def before_batch(self):
        if not isinstance(self.learn.dl, StoredDL): return
        model = get_model(self.learn.model)
        self.passing = [model.get_submodule(n) for n in self.body]
        for m in self.passing: m.forward = _as_it_is

    def after_batch(self): self._work_again()
    def after_fit(self): self.stored = None
    def abort(self, level):
        self._work_again()
        if level == 'fit': self.stored = None

    def _work_again(self):
        for m in self.passing: vars(m).pop('forward', None)
        self.passing = []

    def __getstate__(self): return {**vars(self), 'stored': None, 'passing': []}


def _as_it_is(x): return x


def _refuse_blind(learn: Learner, views: int):
    "Raise for a technique that varies the inputs, which are not looked at any more."
    for n in applied(learn):
        t = TECHNIQUES[n]
        if 'inputs' not in t.touches or 'inference' in t.touches or t.stage == 'data' and views > 1: continue
        way = 'views=5 stores five varied views of each image, or' if t.stage == 'data' else 'to use both,'
        raise BadValue(f"'precompute' and {n!r} do not go together: {n} varies inputs, and with one stored view of each they are not looked at any more; {way} switch one of them off")


PIXELS = 'it works on the inputs of each batch, and stored activations take their place; train the head with precompute first, then go on without'


def _example(learn): return dict(dir=tempfile.mkdtemp(prefix='precompute'), views=2)


@technique('train', section='Training', source='https://docs.fast.ai/vision.learner.html', touches=('model', 'inference'), example=_example,
           refuses={**dict.fromkeys(('mixup', 'cutmix', 'cutout', 'augmix', 'distill', 'progressive_resize'), PIXELS),
                    'initialize': 'a frozen body was trained before, and new weights would be stored in place of what it knows; initialize, train, then precompute'})
def precompute(self: Learner, dir: str, views: int = 1, dtype: Literal['float32', 'float16'] = 'float32') -> Learner:
    """Work out once what the frozen body makes of each image, keep it on disk, and train the head alone on that: an epoch takes a moment.

    `dir`: the folder it is kept in (4 bytes a number: for an image 5 kB with 1,280 features; half with `dtype='float16'`, 3 digits), made
    whole or not at all, gone on with after a kill, and found again by any run with the same weights, data and transforms; else it is made
    anew beside the old, and a sentence says so. `views`: 1, images as in validation; n > 1, that many varied ones of each training image
    (`augment(…)`, item transforms), as the epochs 0 to n−1 would show them, then again from the first. The frozen body answers as in
    inference, so its norm layers are frozen (see `freeze_bn`) and dropouts in it are off; the rest is as without, to rounding. `validate`, `predict` and
    `export` use the whole network; after `unfreeze()` fits do, too. Raises `ValueError` for views below 1, networks that are no
    `nn.Sequential`, loaders that are not fastai's, and techniques that vary inputs in training (all but views > 1 make up for)."""
    if views < 1: raise BadValue(f'precompute: views must be ≥ 1, got {views}')
    if dtype not in ('float32', 'float16'): raise BadValue(f'precompute: dtype must be float32 or float16, got {dtype!r}')
    for dl in self.dls.loaders[:2]:
        if not isinstance(dl, TfmdDL) or not dl.indexed or not (isinstance(dl, KeyedDL) or keyed_kind(dl)):
            raise BadValue(f'precompute: needs fastai loaders over indexed datasets, got {type(dl).__name__}; give torch datasets and loaders to `as_dataloaders`')
    if getattr(self.dls, 'n_inp', 1) != 1: raise BadValue(f'precompute: needs samples of one input, got {self.dls.n_inp}; train on the inputs themselves')
    body_of(self)
    _refuse_blind(self, views)
    keyed(self)
    freeze_norms(self)
    put(self, FreezeBN())
    return put(self, Precompute(Path(dir), views, dtype))
