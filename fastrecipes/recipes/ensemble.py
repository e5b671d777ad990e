"Several networks instead of one, trained to differ, and an answer from all of them: is it worth it?"
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from fastai.basics import DataLoaders, Learner
from fastai.metrics import BalancedAccuracy, accuracy

from fastrecipes.arguments import checked
from fastrecipes.data.folders import NearDuplicates
from fastrecipes.data.keyed import keyed
from fastrecipes.data.loaders import as_dataloaders
from fastrecipes.data.pixels import Resize
from fastrecipes.data.statistics import normalized_by
from fastrecipes.errors import BadValue, nearest
from fastrecipes.production.bagging import bagging
from fastrecipes.production.boosting import boosting
from fastrecipes.production.ensembles import Ensemble
from fastrecipes.production.evaluation import Evaluation
from fastrecipes.production.members import told
from fastrecipes.production.stacking import stacking
from fastrecipes.randomness import key_of
from fastrecipes.recipes.classify import USUAL, Schedule, begun, check_recipe, image_classifier
from fastrecipes.report.evidence import Row, differences, gather, keep_run
from fastrecipes.report.history import History, history, lines_unless_terminal
from fastrecipes.report.run_folder import RunFolder
from fastrecipes.technique import applied, discover, plan
from fastrecipes.training.distributed import one_process
from fastrecipes.training.reproducibility import seed_everything
from fastrecipes.training.transfer import backbone, classifier

__all__ = ['Assembled', 'HowTrained', 'ensemble']

HowTrained = Literal['average', 'weighted', 'majority', 'weighted_vote', 'blending', 'stacking', 'bagging', 'boosting', 'snapshot']
OF_ONE = ('bagging', 'boosting', 'snapshot')            # members of one architecture, that differ by what they are trained on, or when they are taken
DRAWN = ('bagging', 'boosting', 'stacking')             # members whose loaders draw a part of the training images


@dataclass(repr=False)
class Assembled:
    """What `ensemble` made: `.ensemble`; `.learn`, the same as one Learner, to ship or compress; `.evaluation`, the table; `.path`, the run folder.

    `made`: what bagging or boosting has to tell of its members. Printed, it is the table."""
    ensemble: Ensemble
    learn: Learner
    evaluation: Evaluation
    made: str = ''
    path: Path | None = field(default=None)

    def __str__(self):
        calibration = self.ensemble.calibration
        more = [*([self.made] if self.made else []), *([str(calibration)] if calibration else []), *(['', f'report: {self.path/"report.html"}'] if self.path else [])]
        return '\n'.join(['', str(self.evaluation), *more])

    __repr__ = __str__


@partial(checked, techniques=discover)
def ensemble(path, arch: str = 'resnet18', *, members: list[str] | int = 3, kind: HowTrained = 'average', folds: int = 5, flip: bool = False, calibrate: bool = False,
             epochs: int = 5, lr: float | str = 'find', size: int = 224, bs: int = 64, valid: float | list[str] | str | Callable = .2, test: float = .1,
             groups: str | Callable | None = None, near_duplicates: NearDuplicates = 'warn', resize: Resize = 'crop', pretrained: bool = True,
             schedule: Schedule = 'flat_cos', seed: int = 42, workers: int | None = None, out: str | None = None, overwrite: bool = False, **techniques) -> Assembled:
    """Train several networks on a folder of images and let them answer together; tell how much better that is than the best of them.

    Members differ by architecture, or by seed: weights, order and augmentation. They share the split. What is kept is one network with one graph, that
    `ship` takes; it costs as much time an image as all its members together, and `compress` can distil it. Measure it on test images: weights that are fitted to the
    validation images look good on these. Techniques are keywords as in `image_classifier`, for every member. Raises as `image_classifier` does.

    Args:
        path: the folder of images, one sub-folder a class; or what else `image_classifier` takes
        arch: any network of timm or torchvision, where members is a number
        members: how many, 2 or more; or their networks, such as resnet18 and convnext_atto
        kind: how they answer together (average, weighted, majority, weighted_vote, blending, stacking), or how they are made (bagging, boosting, snapshot: the cycles of one fit)
        folds: of stacking, which trains each member so many times more
        flip: each member answers for the image and its mirror image
        calibrate: fit a temperature to the ensemble's answers for the validation images
        epochs: passes over the training data for each member, at least 1; of a snapshot ensemble for all of them together
        lr: the highest learning rate, or 'find' (for each network)
        size: width and height of the images, in px
        bs: images a batch
        valid: share of each class held out to choose by, 0 to 1; or a CSV with the columns file and split (train, valid or test), or a list of files
        test: share of each class held out for the final test, 0 to 1
        groups: a regular expression that finds in a file's name who or what is in the picture, or a column of the CSV; no group lies on two sides
        near_duplicates: together keeps pictures that look the same on one side; warn only tells of them
        resize: how images get their size: crop, squish or pad
        pretrained: start each network from trained weights
        schedule: how the rate moves: constant, step, decay, cos, flat_cos, sgdr (warm restarts) or one_cycle
        seed: of the split and of every draw
        workers: processes that decode images
        out: the run folder; a run that was cut off there goes on
        overwrite: replace the run in that folder
    """
    asked = dict(locals())
    usual = {**USUAL, **techniques}
    archs = check_ensemble(arch, members, kind, folds, epochs, plan(usual))
    for name in dict.fromkeys(archs): check_recipe(path, name, epochs, lr, schedule)
    one_process('ensemble')
    for name in dict.fromkeys(archs): backbone(name, pretrained, 'members')     # weights that cannot be fetched: say so before an hour of work

    data = as_dataloaders(path, size=size, bs=bs, valid=valid, test=test, groups=groups, near_duplicates=near_duplicates, resize=resize, seed=seed, workers=workers)
    if not len(data.valid_ds): raise BadValue('valid: there are no validation images, and the best member is chosen by them; hold some out with valid=.2')
    with RunFolder.open('ensemble', asked, out, overwrite, defaults=ensemble).under_way() if out else nullcontext() as run:
        if run: run.note_data(data)

        def trained(dls: DataLoaders, own: int, name: str) -> Learner:
            "A member, its pixels normalised as its own weights want them, its order drawn by its own seed."
            dls = normalized_by(dls, None)
            dls.train.seed = own
            return image_classifier(dls, name, epochs=epochs, lr=lr, pretrained=pretrained, schedule=schedule, seed=own, **usual)

        makes, names, made = [partial(trained, name=name) for name in archs], names_of(archs), ''
        if kind == 'stacking': joint = stacking(makes, data, folds=folds, seed=seed, names=names)
        elif kind == 'bagging': joint = (bag := bagging(makes[0], data, len(archs), seed=seed)).ensemble
        elif kind == 'boosting': joint = (boost := boosting(makes[0], data, len(archs), seed=seed)).ensemble
        elif kind == 'snapshot': joint = snapshots(normalized_by(data, None), arch, len(archs), epochs, lr, pretrained, seed, usual)
        else:
            own = [key_of(seed, 'member', i) % 2**32 for i in range(len(archs))]
            joint = Ensemble([told(f'{n} ({i+1} of {len(archs)})', lambda: makes[i](data, own[i])) for i, n in enumerate(names)], kind, dls=data, names=names).fit()
        if kind == 'bagging': made = str(bag)
        if kind == 'boosting': made = str(boost)
        joint.flip = flip
        if flip and kind in ('weighted', 'weighted_vote', 'blending'): joint.fit()      # to what they answer with it
        if calibrate: joint.calibrate()

        evaluation, learn = joint.evaluate(), joint.as_learner()
        learn.techniques = dict(applied(joint.members[0].learn))
        if run:
            told_of = {m.name: m.accuracy for m in (*evaluation.members, evaluation.ensemble)}
            run.note(members=joint.names, kind=joint.kind, accuracy={n: e.value for n, e in told_of.items()})
            scored = evaluation.scored
            keep_run(run, learn, gather(learn, run, scored[joint.name], f'{len(joint.members)} networks on {Path(str(asked["path"])).name}', table=report_rows(joint, evaluation),
                                        side=evaluation.side, difference=differences(scored[joint.name], scored[evaluation.best])))
    return Assembled(joint, learn, evaluation, made, run and run.path)


def check_ensemble(arch, members, kind, folds, epochs, todo) -> list[str]:
    "The networks to train; raises for what can be told wrong before anything is trained."
    if kind not in get_args(HowTrained): raise BadValue(f'kind: one of {", ".join(get_args(HowTrained))}, got {kind!r}{nearest(kind, get_args(HowTrained))}')
    archs = [arch]*members if isinstance(members, int) else list(map(str, members))
    if len(archs) < 2: raise BadValue(f'members: at least 2, got {members if isinstance(members, int) else len(archs)}')
    if kind in OF_ONE and not isinstance(members, int): raise BadValue(f'members: {kind} makes them of one network, arch; give their number, got {", ".join(archs)}')
    if folds < 2: raise BadValue(f'folds: at least 2, got {folds}')
    if kind == 'snapshot' and epochs % len(archs): raise BadValue(f'epochs: those of {len(archs)} equal cycles, such as {len(archs)*max(1, round(epochs/len(archs)))}, got {epochs}')
    for t, _ in todo:
        if t.name == 'balance' and kind in DRAWN: raise BadValue(f'balance: it draws the training images, and so does {kind}; take class_weights or logit_adjustment')
        if t.name == 'precompute': raise BadValue('precompute: it keeps the answers of one network, and each member has its own')
    return archs


def names_of(archs: list[str]) -> list[str]:
    "A name for each member: its network, numbered where there are several of one."
    return [a if archs.count(a) == 1 else f'{a} {archs[:i+1].count(a)}' for i, a in enumerate(archs)]


def snapshots(dls: DataLoaders, arch: str, n: int, epochs: int, lr, pretrained: bool, seed: int, techniques: dict) -> Ensemble:
    "One network, trained in `n` cycles of equal length, and the weights that they end with."
    seed_everything(seed)
    learn = lines_unless_terminal(classifier(dls, backbone(arch, pretrained), metrics=[accuracy, BalancedAccuracy()]), arch)
    keyed(learn, seed)
    for t, arguments in plan(techniques): t.f(learn, **arguments)
    rates = begun(learn, lr, 'flat_cos', pretrained)
    history(learn).title = 'all layers'
    return learn.fit_snapshots(n, epochs//n, rates)


def report_rows(joint: Ensemble, evaluation: Evaluation) -> list[Row]:
    "The table of the report: the best member, the ensemble, the others."
    seconds = {n: cb.seconds if (cb := next((o for o in m.learn.cbs if isinstance(o, History)), None)) else None for n, m in zip(joint.names, joint.members)}
    notes = {m.name: f'log loss {m.log_loss:.3f}' + (f', weight {m.weight:.2f}' if m.weight is not None else '') for m in (*evaluation.members, evaluation.ensemble)}
    total = None if None in seconds.values() else sum(seconds.values())
    return [Row.of(n, evaluation.scored[n], seconds.get(n, total), notes[n]) for n in dict.fromkeys([evaluation.best, joint.name, *joint.names])]
