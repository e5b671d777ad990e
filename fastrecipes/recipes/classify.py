"From a folder of images to a trained classifier."
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from fastai.basics import Learner
from fastai.metrics import BalancedAccuracy, accuracy

from fastrecipes.arguments import checked
from fastrecipes.data.folders import NearDuplicates
from fastrecipes.data.keyed import keyed
from fastrecipes.data.loaders import as_dataloaders
from fastrecipes.data.pixels import Resize
from fastrecipes.data.scan import check_images
from fastrecipes.errors import BadValue, nearest
from fastrecipes.files import writes
from fastrecipes.recipes.recommend import takes_recommended
from fastrecipes.report.evidence import Row, gather, keep_run, score
from fastrecipes.report.history import history, lines_unless_terminal
from fastrecipes.report.run_folder import RunFolder
from fastrecipes.technique import discover, plan
from fastrecipes.training.clock import check_minutes
from fastrecipes.training.distributed import one_process
from fastrecipes.training.finders import find_lr
from fastrecipes.training.reproducibility import seed_everything
from fastrecipes.training.resume import remember
from fastrecipes.training.schedules import SCHEDULES, Schedule, fit_by
from fastrecipes.training.transfer import backbone, check_arch, classifier

__all__ = ['image_classifier', 'check_recipe', 'Schedule', 'USUAL']

USUAL = dict(augment=True, label_smoothing=.1)      # what the recipe switches on unless told otherwise
HEAD = 'new head, body frozen'                      # the title of a fit


@partial(checked, techniques=discover)
@takes_recommended
def image_classifier(path, arch: str = 'resnet18', *, epochs: int = 5, minutes: float | None = None, lr: float | str = 'find', size: int = 224, bs: int = 64,
                     valid: float | list[str] | str | Callable = .2, test: float = .1, groups: str | Callable | None = None, near_duplicates: NearDuplicates = 'warn',
                     resize: Resize = 'crop', pretrained: bool = True, weights: str | None = None, freeze: bool = False, schedule: Schedule = 'flat_cos',
                     techniques: list[str] | str | None = None, seed: int = 42, workers: int | None = None, out: str | None = None, overwrite: bool = False,
                     **switched) -> Learner:
    """Train a network on a folder of images, `path/<class>/*`, and return the fitted Learner.

    Every technique is a keyword: `mixup=.4`, `balance='upsampling'`, `augment=dict(flip=False)`; `augment` and `label_smoothing` are
    on unless switched off (`augment=False`). With `pretrained`, a new head is trained for one epoch, then everything for `epochs`,
    earlier layers at lower rates. `techniques='recommended'` uses what `recommend` says of the folder wherever the call says nothing else.
    Raises `TypeError` for an unknown technique or network, before any data are read.

    Args:
        path: the folder; or fastai `DataLoaders`, a torch `Dataset`, a tuple of torch datasets or loaders
        arch: any network of timm or torchvision
        epochs: passes over the training data, at least 1
        minutes: train for so long instead of `epochs`, with the schedule following the clock; on top come validation, finding a rate, and the epoch of a new head
        lr: the highest learning rate, or 'find'
        size: width and height of the images, in px
        bs: images a batch
        valid: share of each class held out to validate on, 0 to 1; or a CSV with the columns file and split (train, valid or test), or a list of files
        test: share of each class held out for the final test, 0 to 1
        groups: a regular expression that finds in a file's name who or what is in the picture, or a column of the CSV; no group lies on two sides
        near_duplicates: together keeps pictures that look the same on one side; warn only tells of them
        resize: how images get their size: crop, squish or pad
        pretrained: start from trained weights
        weights: a file of weights of `arch` to start from, instead of those that it comes with (.pth, .pt or .safetensors)
        freeze: train the new head alone, all `epochs`; the body stays as it came
        schedule: how the rate moves: constant, step, decay, cos, flat_cos, sgdr (warm restarts) or one_cycle
        techniques: recommended, for those and the settings that `fastrecipes recommend` prints; what is given here wins
        seed: of the split and of every draw
        workers: processes that decode images
        out: the run folder; a run that was cut off there goes on
        overwrite: replace the run in that folder
    """
    asked = {k: v for k, v in locals().items() if k not in ('techniques', 'switched')} | switched
    todo = plan({**USUAL, **switched})
    check_recipe(path, arch, epochs, lr, schedule, groups, freeze and not pretrained and weights is None, minutes)
    if 'to_distributed' not in {t.name for t, _ in todo}: one_process('image_classifier without to_distributed')

    seed_everything(seed)
    net = backbone(arch, pretrained, weights=weights)
    dls = as_dataloaders(path, size=size, bs=bs, valid=valid, test=test, groups=groups,
                         near_duplicates=near_duplicates, resize=resize, seed=seed, workers=workers)
    with RunFolder.open('image-classifier', asked, out, overwrite, defaults=image_classifier).under_way() if out else nullcontext() as run:
        if run: run.note_data(dls)
        learn = made(dls, arch, net, seed, todo)
        train(learn, epochs, lr, schedule, pretrained or weights is not None, freeze, minutes=minutes)

        if run:
            scored = score(learn)
            keep_run(run, learn, gather(learn, run, scored, f'{arch} on {path}', table=[Row.of(arch, scored)]))
    return learn


def made(dls, arch: str, net, seed: int, todo) -> Learner:
    "The Learner before it is trained: `net` with a new head, its draws keyed by `seed`, the techniques of the plan `todo` applied."
    learn = lines_unless_terminal(classifier(dls, net, metrics=[accuracy, BalancedAccuracy()]), arch)
    keyed(learn, seed)
    for t, arguments in todo: t.f(learn, **arguments)
    return learn


def train(learn: Learner, epochs: int, lr: float | str = 'find', schedule: Schedule = 'flat_cos', pretrained: bool = False, freeze: bool = False, title: str = 'all layers',
          minutes: float | None = None):
    """Find a rate if asked, then fit: from scratch all at once; `pretrained`, one epoch of the new head first, then earlier layers at lower rates; with `freeze` the head
    alone. `minutes`: so long, and not `epochs`."""
    rates = rate_of(learn, lr) if freeze else begun(learn, lr, schedule, pretrained)
    history(learn).title = HEAD if freeze else title
    if minutes is None: fit_by(learn, schedule, epochs, rates)
    else: learn.fit_for(minutes, rates, schedule)


def rate_of(learn: Learner, lr: float | str) -> float:
    "The rate that was given, or the one that is found."
    if not isinstance(lr, str): return lr
    history(learn).found = remember('learning rate', lambda: find_lr(learn))
    if writes(): print(f'learning rate: {history(learn).found.lr:.2g}, found')
    return history(learn).found.lr


def begun(learn: Learner, lr: float | str, schedule: str, pretrained: bool) -> float | slice:
    "The rates of a fit of all layers: found if asked; of a pretrained network lower ones for earlier layers, after an epoch in which its new head was trained."
    lr = rate_of(learn, lr)
    if not pretrained: return lr
    history(learn).title = HEAD
    fit_by(learn, schedule, 1, lr)
    learn.unfreeze()
    return slice(lr/10, lr/2)


def check_fit(epochs: int, lr: float | str):
    "Raise for a number of epochs or a rate that cannot be trained with."
    if epochs < 1: raise BadValue(f'epochs: at least 1, got {epochs}')
    if lr != 'find' and (isinstance(lr, str) or not lr > 0): raise BadValue(f"lr: a number above 0, or 'find', got {lr!r}")


def check_recipe(path, arch, epochs, lr, schedule, groups=None, drawn_and_frozen: bool = False, minutes=None, who: str = 'image_classifier'):
    "Raise for what can be told wrong before any data are read and any weights fetched."
    if groups is not None and not isinstance(path, (str, Path)): raise BadValue(f'groups: found in the names of files, and path is {type(path).__name__}; give a folder of images')
    if drawn_and_frozen: raise BadValue('freeze: the body would stay as it was drawn; start from trained weights (pretrained or weights)')
    if isinstance(path, (str, Path)): check_images(path)
    check_arch(arch)
    check_fit(epochs, lr)
    if minutes is not None: check_minutes(who, minutes)
    if minutes is not None and schedule == 'sgdr': raise BadValue("schedule: 'sgdr' counts epochs, and this fit goes by minutes; take cos or one_cycle")
    if schedule not in SCHEDULES: raise BadValue(f'schedule: one of {", ".join(SCHEDULES)}, got {schedule!r}{nearest(schedule, SCHEDULES)}')
