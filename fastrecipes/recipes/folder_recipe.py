"`image_classifier` again and again on one folder and one split: with other seeds, techniques, or fewer images."
import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from fastai.basics import Learner

from fastrecipes.data.folders import Found, Holdings, check_loaders, found_in, loaders_of
from fastrecipes.data.splits import check_shares, split
from fastrecipes.errors import BadValue
from fastrecipes.recipes.classify import USUAL, check_recipe, image_classifier, made
from fastrecipes.technique import plan
from fastrecipes.training.finders import find_lr
from fastrecipes.training.reproducibility import seed_everything
from fastrecipes.training.resume import remember
from fastrecipes.training.transfer import backbone

__all__ = ['FolderRecipe', 'check_runs', 'cores']


@dataclass(frozen=True)
class FolderRecipe:
    "A function `recipe(seed=…, **techniques)` of images that were found and split before, so that seeds vary weights, order and draws and nothing else."
    found: Found
    sides: tuple[str, ...]
    loaders: dict               # size, bs, resize
    fit: dict                   # arch, epochs, lr, pretrained, freeze, schedule
    always: dict                # techniques of every run; those of a call win

    @classmethod
    def of(cls, path, groups, near_duplicates, valid: float, test: float, seed: int, loaders: dict, fit: dict, always: dict) -> 'FolderRecipe':
        "Of the folder `path`, decoded once; split as it is given, else by `seed`."
        found = found_in(path, None, groups, near_duplicates)
        return cls(found, tuple(found.split(valid, test, seed)), loaders, fit, dict(cache=True) | always)

    @staticmethod
    def check(path, valid: float, test: float, loaders: dict, fit: dict, why: str):
        "Raise for what can be told wrong before any data are read; `why` images must be held out for validation and test."
        check_recipe(path, fit['arch'], fit['epochs'], fit['lr'], fit['schedule'], drawn_and_frozen=fit['freeze'] and not fit['pretrained'])
        check_loaders(**loaders)
        check_shares(valid, test)
        if not valid or not test: raise BadValue(f'{"test" if valid else "valid"}: {why}')
        backbone(fit['arch'], fit['pretrained'])        # weights that cannot be fetched

    def __call__(self, seed: int, **techniques) -> Learner:
        return image_classifier(self._loaders(seed), seed=seed, **self.fit, **{**self.always, **techniques})

    @property
    def holdings(self) -> Holdings: return self.found.holdings(list(self.sides))

    def at_rate(self, seed: int, techniques: dict) -> 'FolderRecipe':
        "The same, with the learning rate that a run with these techniques finds, where one is to be found."
        if self.fit['lr'] != 'find': return self
        def find():
            seed_everything(seed)
            net = backbone(self.fit['arch'], self.fit['pretrained'])
            return find_lr(made(self._loaders(seed), self.fit['arch'], net, seed, plan({**USUAL, **self.always, **techniques}))).lr
        return replace(self, fit=self.fit | dict(lr=remember('learning rate', find)))

    def on(self, fraction: float, seed: int) -> 'FolderRecipe':
        "The same with a share of the training images, drawn by `seed`: of each class alike, and smaller shares lie in larger ones."
        if fraction == 1: return self
        train = [i for i, s in enumerate(self.sides) if s == 'train']
        few = split([self.found.keys[i] for i in train], [self.found.labels[i] for i in train], 0., 1-fraction, seed)
        keep = np.ones(len(self.sides), bool)
        keep[[i for i, s in zip(train, few) if s != 'train']] = False
        return replace(self, found=self.found.part(keep.tolist()), sides=tuple(s for s, k in zip(self.sides, keep) if k))

    def _loaders(self, seed: int): return loaders_of(self.found, list(self.sides), seed=seed, workers=0, **self.loaders)


def check_runs(seeds: int, processes: int | None):
    "Raise for numbers of seeds and processes that there cannot be."
    if seeds < 2: raise BadValue(f'seeds: at least 2, got {seeds}')
    if processes is not None and processes < 1: raise BadValue(f'processes: at least 1, got {processes}')


def cores(own_recipe: bool = False) -> int:
    "Runs at a time: one a core; one on a GPU, and of a function of the user's, which may not bear company."
    return 1 if own_recipe or torch.cuda.is_available() else os.cpu_count() or 1
