"A classifier of small images in a minute or five: a small residual network, and all that makes a step faster or worth more."
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml
from fastai.basics import Learner

from fastrecipes.arguments import checked
from fastrecipes.data.folders import NearDuplicates
from fastrecipes.data.pixels import Resize
from fastrecipes.recipes.classify import check_recipe, image_classifier
from fastrecipes.recipes.small_images import LAYOUTS, SMALL_IMAGES, arch_for, fastest_layout, moved
from fastrecipes.report.run_folder import RECIPE
from fastrecipes.technique import discover, plan
from fastrecipes.training.memory import keep_freed_memory

__all__ = ['fast_classifier']


@partial(checked, techniques=discover)
def fast_classifier(path, arch: str = 'auto', *, minutes: float = 5., size: int = 32, bs: int = SMALL_IMAGES['bs'], lr: float | str = SMALL_IMAGES['lr'],
                    valid: float | list[str] | str | Callable = .1, test: float = .1, groups: str | Callable | None = None, near_duplicates: NearDuplicates = 'warn',
                    resize: Resize = 'crop', seed: int = 42, workers: int | None = None, out: str | None = None, overwrite: bool = False, **switched) -> Learner:
    """Train a small network on small images, from scratch and for `minutes`, and return the fitted Learner: the fastest way to a first result.

    It is `image_classifier` with a ResNet-9, Muon, one-cycle by the clock, label smoothing, an average of the weights (EMA), images decoded once,
    smaller at first, mirrored and shifted; pixels in the order, and numbers in the precision, that a trial of seconds finds faster here. Every technique
    is a keyword, and replaces or, with false, switches off what is chosen. For images of 32 to 64 px, some hundreds a class or more; of photographs
    a pretrained network makes more. Raises as `image_classifier` does.

    Args:
        path: the folder, `path/<class>/*`, or split into train/, valid/, test/
        arch: a network of timm or torchvision; 'auto' is resnet9 on a GPU and, for a CPU, resnet9_w16, a quarter as wide
        minutes: how long it trains; validation comes on top
        size: width and height of the images, in px
        bs: images a batch
        lr: the highest learning rate, or 'find'
        valid: share of each class held out to validate on, 0 to 1; or a CSV with the columns file and split (train, valid or test), or a list of files
        test: share of each class held out for the final test, 0 to 1
        groups: a regular expression that finds in a file's name who or what is in the picture, or a column of the CSV; no group lies on two sides
        near_duplicates: together keeps pictures that look the same on one side; warn only tells of them
        resize: how images get their size: crop, squish or pad
        seed: of the split and of every draw
        workers: processes that decode images
        out: the run folder; a run that was cut off there goes on
        overwrite: replace the run in that folder
    """
    settings = {k: v for k, v in locals().items() if k not in ('path', 'arch', 'switched')}
    if arch == 'auto': arch = arch_for(torch.cuda.is_available())
    chosen = {**SMALL_IMAGES, 'augment': moved(size), **settings, **switched}
    known = discover()
    plan({n: v for n, v in chosen.items() if n in known})
    check_recipe(path, arch, 1, lr, chosen['schedule'], groups, minutes=minutes, who='fast_classifier')
    keep_freed_memory()
    layout = _kept(out, overwrite)
    if layout is None: layout = fastest_layout(arch, size, bs, chosen)
    return image_classifier(path, arch, pretrained=False, **{**layout, **chosen})


def _kept(out, overwrite: bool) -> dict | None:
    "What an unfinished run in that folder began with: a trial would be another one."
    file = Path(out)/RECIPE if out else None
    if overwrite or file is None or not file.is_file(): return None
    return {n: v for n, v in yaml.safe_load(file.read_text()).items() if n in LAYOUTS}
