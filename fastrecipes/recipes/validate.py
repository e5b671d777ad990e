"How well a recipe does on images it has not seen, measured on all of them: k folds, each judged by a network trained on the others."
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from sklearn.metrics import confusion_matrix

from fastrecipes.arguments import checked
from fastrecipes.data.folders import Found, NearDuplicates, check_loaders, found_in, loaders_of
from fastrecipes.data.pixels import Resize
from fastrecipes.data.splits import check_shares, split
from fastrecipes.data.splits import folds as folds_of
from fastrecipes.errors import BadValue
from fastrecipes.production.evaluation import log_loss
from fastrecipes.randomness import key_of
from fastrecipes.recipes.classify import USUAL, Schedule, check_recipe, image_classifier
from fastrecipes.report import intervals
from fastrecipes.report.evidence import WORST, score
from fastrecipes.report.history import history
from fastrecipes.report.intervals import Estimate, Loss, over_folds
from fastrecipes.report.page import Report, write_page
from fastrecipes.report.run_folder import CHECKPOINT, RunFolder
from fastrecipes.report.tables import aligned
from fastrecipes.technique import applied, discover, plan
from fastrecipes.training.distributed import one_process
from fastrecipes.training.reproducibility import clean_mem, seed_everything
from fastrecipes.training.resume import remember, resumable

__all__ = ['cross_validate', 'CrossValidated', 'Fold', 'log_loss']

CHOOSERS = ('early_stop',)      # techniques that choose by the validation images


@dataclass(frozen=True)
class Fold:
    "One fold: images trained on and judged, the scores of the judged ones (accuracy and balanced accuracy 0–1, log loss in nats), seconds of training."
    number: int
    n_train: int
    n: int
    accuracy: float
    balanced_accuracy: float
    log_loss: float
    seconds: float


@dataclass
class CrossValidated:
    """What `cross_validate` measured: `.folds`, `.estimates` by metric with `.mean` and `.interval` for short, and `.predictions`, a dict for each
    image: file, label, predicted, p_<class>…, fold. Printed, it is a table."""
    path: Path | None
    folds: list[Fold]
    estimates: dict[str, Estimate]
    predictions: list[dict] = field(repr=False)

    @property
    def mean(self) -> dict[str, float]: return {m: e.value for m, e in self.estimates.items()}

    @property
    def interval(self) -> dict[str, tuple[float, float]]: return {m: (e.lo, e.hi) for m, e in self.estimates.items()}

    def __str__(self):
        rows = [('fold', 'images', 'accuracy', 'balanced accuracy', 'log loss'),
                *((str(f.number), str(f.n), f'{f.accuracy:.1%}'.replace('%', ' %'), f'{f.balanced_accuracy:.1%}'.replace('%', ' %'), f'{f.log_loss:.3f}') for f in self.folds),
                ('mean (95 %)', str(sum(f.n for f in self.folds)), *map(str, self.estimates.values()))]
        return '\n'.join(['', *aligned(rows), *(['', f'report: {self.path/"report.html"}'] if self.path else [])])


@partial(checked, techniques=discover)
def cross_validate(path, arch: str = 'resnet18', *, folds: int = 10, groups: str | None = None, near_duplicates: NearDuplicates = 'warn', valid: float = 0.,
                   epochs: int = 5, lr: float | str = 'find', size: int = 224, bs: int = 64, resize: Resize = 'crop', pretrained: bool = True,
                   schedule: Schedule = 'flat_cos', seed: int = 42, workers: int | None = None, out: str | None = None, overwrite: bool = False,
                   **techniques) -> CrossValidated:
    """Measure a recipe by k-fold cross-validation: train `image_classifier` k times, each time on all folds but one, and judge it on that one.

    Folds hold each class in equal parts; copies of an image, and the images of one group, lie in one fold. Accuracy, balanced accuracy
    and log loss, mean over the folds with 95 % intervals that allow for folds that share training images (Nadeau and Bengio, see
    `over_folds`). It costs k trainings and measures how well the recipe does, not one network: train that on everything afterwards. The run
    folder gets `predictions.csv`, each image as the network that had not seen it judged it, and `report.html`; folds that came to their
    end before a kill are not trained again. Images of a folder `test`, where there is one beside `train`, are left alone.
    Raises as `image_classifier` does, and for fewer folds than 2 or more than the smallest class can fill.

    Args:
        path: the folder of images, one sub-folder a class
        arch: any network of timm or torchvision
        folds: how many, from 2 to the images of the smallest class
        groups: a regular expression that finds in a file's name who or what is in the picture; no group lies in two folds
        near_duplicates: together keeps pictures that look the same in one fold; warn only tells of them
        valid: share of the other folds to choose on, 0 to 1, as early stopping does; 0: nothing is chosen, all of them train
        epochs: passes over the training data, at least 1
        lr: the highest learning rate, or 'find' (in each fold)
        size: width and height of the images, in px
        bs: images a batch
        resize: how images get their size: crop, squish or pad
        pretrained: start from trained weights
        schedule: how the rate moves: constant, step, decay, cos, flat_cos, sgdr (warm restarts) or one_cycle
        seed: of the folds and of every draw
        workers: processes that decode images
        out: the run folder; a run that was cut off there goes on
        overwrite: replace the run in that folder
    """
    asked = dict(locals())
    todo = plan({**USUAL, **techniques})
    if not isinstance(path, (str, Path)): raise BadValue(f'path: cross_validate makes folds of a folder of images, got {type(path).__name__}')
    check_recipe(path, arch, epochs, lr, schedule)
    check_loaders(size, bs, resize)
    check_shares(valid, 0)
    if folds < 2: raise BadValue(f'folds: at least 2, got {folds}')
    if not valid and (choosers := [t.name for t, _ in todo if t.name in CHOOSERS]):
        raise BadValue(f'valid: {choosers[0]} chooses by validation images, and the fold that measures must not be chosen on; hold out others with valid=.1')
    one_process('cross_validate')

    found = found_in(path, None, groups, near_duplicates)
    found = found.part([s != 'test' for s in found.sides])
    fold = np.array(folds_of(found.keys, found.labels, folds, seed))
    check_folds(found, fold, bs, valid, seed)
    vocab = sorted(set(found.labels))
    with RunFolder.open('cross-validate', asked, out, overwrite, defaults=cross_validate).under_way() if out else nullcontext() as run:
        if run: run.note_data(SimpleNamespace(holdings=found.holdings(['train']*len(fold))))

        def judged(k: int) -> dict:
            "The probabilities that the network trained without fold `k` gives to its images."
            own = key_of(seed, 'fold', k) % 2**32       # the networks of two folds start from other weights: that is part of how far scores vary
            with resumable(run.path/CHECKPOINT/f'fold-{k+1}') if run else nullcontext():
                dls = loaders_of(found, sides_of(found, fold, k, valid, seed), size=size, bs=bs, resize=resize, seed=own, workers=workers)
                seed_everything(own)
                learn = image_classifier(dls, arch, epochs=epochs, lr=lr, pretrained=pretrained, schedule=schedule, seed=own, **techniques)
                scored = score(learn)
                said = dict(probabilities=scored.probabilities, seconds=history(learn).seconds, effects={n: a.effect for n, a in applied(learn).items()}, n_train=len(dls.train_ds))
            del learn, dls
            clean_mem()
            return said

        answers, rows, done = [], [], []
        for k in range(folds):
            answers.append(remember(f'fold {k+1}', lambda: judged(k)))
            mine = np.flatnonzero(fold == k)
            done.append(_scored(k, answers[k], np.array([vocab.index(found.labels[i]) for i in mine]), len(vocab)))
            rows += [(i, p, k) for i, p in zip(mine, answers[k]['probabilities'])]
            print(f'fold {k+1} of {folds}: accuracy {done[-1].accuracy:.4f}  balanced accuracy {done[-1].balanced_accuracy:.4f}  log loss {done[-1].log_loss:.4f}', flush=True)

        rows.sort(key=lambda r: r[0])
        predictions = [dict(file=found.files[i].relative_to(found.path).as_posix(), label=found.labels[i], predicted=vocab[p.argmax()],
                            **{f'p_{c}': float(q) for c, q in zip(vocab, p)}, fold=k+1) for i, p, k in rows]
        result = CrossValidated(run and run.path, done, _estimates(done, predictions), predictions)
        if run:
            run.write_csv('predictions.csv', predictions)
            write_page(_report(run, result, found, fold, vocab, todo, answers), run.path/'report.html')
            run.finish()
    return result


def sides_of(found: Found, fold: np.ndarray, k: int, valid: float, seed: int) -> list[str]:
    "Who trains while fold `k` is measured: all others, but for the share `valid` of them; without it the fold itself is looked at each epoch."
    sides, rest = np.full(len(fold), 'test' if valid else 'valid', object), np.flatnonzero(fold != k)
    sides[rest] = split([found.keys[i] for i in rest], [found.labels[i] for i in rest], valid, 0, seed) if valid else 'train'
    return sides.tolist()


def check_folds(found: Found, fold: np.ndarray, bs: int, valid: float, seed: int):
    "Raise where a fold would leave a class without training images, or fewer than a batch."
    labels = np.array(found.labels)
    for k in range(fold.max()+1):
        sides = np.array(sides_of(found, fold, k, valid, seed), object)
        if not (fold == k).any(): raise BadValue(f'folds: nothing is left for fold {k+1}, for there are fewer groups than folds; use fewer')
        if (n := int((sides == 'train').sum())) < bs: raise BadValue(f'bs: {bs} is more than the {n} training images of fold {k+1}; use bs={max(1, n//2)} or less')
        if gone := sorted({*found.labels} - {*labels[sides == 'train'].tolist()}):
            raise BadValue(f'folds: class {gone[0]!r} lies in fold {k+1} only, for its groups hold other classes, too; use fewer folds, or add groups with it')


def _scored(k: int, answer: dict, targets: np.ndarray, c: int) -> Fold:
    p = answer['probabilities']
    right = intervals.accuracy(targets, p.argmax(1)).value, intervals.balanced_accuracy(targets, p.argmax(1)).value
    return Fold(k+1, answer['n_train'], len(targets), *right, log_loss(targets, p), answer['seconds'])


def _estimates(done: list[Fold], predictions: list[dict]) -> dict[str, Estimate]:
    "Mean and interval over the folds of each metric."
    labels, predicted = [r['label'] for r in predictions], [r['predicted'] for r in predictions]
    return dict(accuracy=over_folds([f.accuracy for f in done], intervals.accuracy(labels, predicted)),
                balanced_accuracy=over_folds([f.balanced_accuracy for f in done], intervals.balanced_accuracy(labels, predicted)),
                log_loss=over_folds([f.log_loss for f in done], kind=Loss))


def _report(run, result: CrossValidated, found: Found, fold, vocab, todo, answers) -> Report:
    "The page: the mean, the folds, what is taken for what."
    labels, predicted = [r['label'] for r in result.predictions], [r['predicted'] for r in result.predictions]
    wrong = sorted((r for r in result.predictions if r['label'] != r['predicted']), key=lambda r: -r[f'p_{r["predicted"]}'])[:WORST]
    arch, e = run.arguments['arch'], result.estimates
    apart = [(i, j) for i, j in found.near.tolist() if fold[i] != fold[j]]
    notes = [*found.notes, *([f'leakage: {len(apart)} pairs of near-duplicates lie in two folds, such as {found.name(apart[0][0])} and {found.name(apart[0][1])}'] if apart else [])]
    return Report(f'{arch} on {found.path.name}, {len(result.folds)} folds', run.command, side='out-of-fold', folds=[asdict(f) for f in result.folds],
                  data=dict(path=str(found.path), classes=[], set_aside=[dict(path=p, reason=r) for p, r in found.set_aside],
                            duplicates=len(found.digests)-len(set(found.digests)), notes=notes),
                  table=[dict(name=arch, accuracy=e['accuracy'], balanced_accuracy=e['balanced_accuracy'], seconds=sum(f.seconds for f in result.folds),
                              note=f'log loss {e["log_loss"]}')],
                  techniques=[dict(name=t.name, arguments=a, effect=answers[-1]['effects'].get(t.name), summary=t.summary, source=t.source) for t, a in todo],
                  confusion=(confusion_matrix(labels, predicted, labels=vocab), vocab), provenance=run.provenance,
                  mistakes=[dict(image=found.path/r['file'], truth=r['label'], predicted=r['predicted'], probability=r[f'p_{r["predicted"]}']) for r in wrong])
