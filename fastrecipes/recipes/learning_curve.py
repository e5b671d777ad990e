"Would more images help? The error by how many there are to train on, and what twice as many would bring."
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from fastrecipes.arguments import checked
from fastrecipes.data.folders import NearDuplicates
from fastrecipes.data.pixels import Resize
from fastrecipes.errors import BadValue
from fastrecipes.randomness import key_of
from fastrecipes.recipes.ablating import Kept, Training, pool_of
from fastrecipes.recipes.arms import Arm
from fastrecipes.recipes.classify import USUAL, Schedule
from fastrecipes.recipes.folder_recipe import FolderRecipe, check_runs, cores
from fastrecipes.report.effect_plots import draw_error
from fastrecipes.report.effects import crossed
from fastrecipes.report.evidence import data_of
from fastrecipes.report.intervals import LEVEL, Difference, Estimate
from fastrecipes.report.page import Report, write_page
from fastrecipes.report.plots import PLAIN
from fastrecipes.report.run_folder import RunFolder
from fastrecipes.technique import discover, plan
from fastrecipes.training.distributed import one_process

__all__ = ['LearningCurve', 'learning_curve', 'power_law']


@dataclass
class LearningCurve:
    """What `learning_curve` measured: `.images` trained on, `.estimates` of the accuracy on the test images, `.exponent` of the power law by which the error falls,
    `.twice`: how much more accuracy twice as many images would bring, if it goes on as it went; `.plot()`. Printed, it is a table."""
    path: Path | None
    images: list[int]
    estimates: list[Estimate]
    errors: np.ndarray = field(repr=False)      # (seeds, fractions), 0–1
    exponent: float = 0.
    twice: Difference | None = None

    def __str__(self):
        rows = [('images', 'accuracy'), *((f'{n:,}', str(e)) for n, e in zip(self.images, self.estimates))]
        width = max(len(r[0]) for r in rows)
        return '\n'.join(['', *(f'{n.rjust(width)}  {e}' for n, e in rows), '', self.advice, *(['', f'report: {self.path/"report.html"}'] if self.path else [])])

    def plot(self) -> Figure:
        "The error by the number of images, both on logarithmic scales, and the line that goes on to twice as many. Returns the figure."
        fig = Figure(figsize=(5.3, 3.3), layout='constrained')
        draw_error(fig.add_subplot(), self.images, self.errors, self.exponent, PLAIN)
        return fig

    @property
    def advice(self) -> str:
        told = f'twice as many images ({2*self.images[-1]:,}) would bring about {self.twice}, if the error goes on falling as n^−{max(0., self.exponent):.2f}'
        if self.twice.lo > 0: return f'more images help: {told}'
        return f'nothing shows that more images would help: {told}' if self.twice.hi < .01 else f'not resolved whether more images would help: {told}; more seeds would tell'


def power_law(images, errors) -> tuple[float, Difference]:
    """The exponent c of error ~ n^−c, and how much accuracy twice the most images would bring: (e − e·2^−c), mean over seeds with Student's 95 % interval.

    `images` `(k,)`, k ≥ 2 and rising; `errors` `(seeds, k)`, 0–1, seeds ≥ 2. Each seed has its own line through log e over log n, by least squares: a law
    that held from thousands to millions of samples wherever it was looked for (arXiv:1712.00409), before the error that nothing takes away."""
    n, e = np.log(np.asarray(images, float)), np.asarray(errors, float)
    if e.ndim != 2 or e.shape[1] != len(n) or len(n) < 2 or len(e) < 2 or (np.diff(n) <= 0).any():
        raise BadValue(f'errors: (seeds, sizes) of at least 2 each, sizes rising, got {e.shape} for {len(n)} sizes')
    lines = np.polyfit(n, np.log(e.clip(1e-6)).T, 1)            # (2, seeds)
    last = np.exp(lines[0]*n[-1] + lines[1])
    gains = last*(1 - 2**lines[0])
    half = student.ppf((1+LEVEL)/2, len(e)-1)*gains.std(ddof=1)/len(e)**.5
    return float(-lines[0].mean()), Difference(float(gains.mean()), float(gains.mean()-half), float(gains.mean()+half), None)


@partial(checked, techniques=discover)
def learning_curve(path, arch: str = 'resnet18', *, fractions: list[float] = (.125, .25, .5, 1.), seeds: int = 3, processes: int | None = None, ray: bool = False,
                   epochs: int = 5, lr: float | str = 'find', size: int = 224, bs: int = 64, valid: float = .1, test: float = .2, groups: str | None = None,
                   near_duplicates: NearDuplicates = 'warn', resize: Resize = 'crop', pretrained: bool = True, freeze: bool = False, schedule: Schedule = 'flat_cos', seed: int = 42,
                   out: str | None = None, overwrite: bool = False, **techniques) -> LearningCurve:
    """Tell whether more images would help: train on parts of them, judge each network on the same test images, and go on with the line.

    All are trained for equally many steps: where there are half the images, for twice the epochs. Techniques are keywords as in `image_classifier`. A finished run is
    kept: the same call goes on, and with more `seeds` adds them. Raises as `image_classifier` does, for fractions outside 0 to 1, and where one leaves less than a batch.

    Args:
        path: the folder of images, one sub-folder a class
        arch: any network of timm or torchvision
        fractions: shares of the training images, 2 or more, above 0 to 1
        seeds: trainings with each, 2 or more
        processes: runs at a time on this machine (default: one a core, one on a GPU)
        ray: do the runs on the Ray cluster of RAY_ADDRESS, or on one of this machine
        epochs: passes over the largest part, at least 1; as many steps over the others
        lr: the highest learning rate; 'find': found once, with all images, and used by all
        size: width and height of the images, in px
        bs: images a batch
        valid: share of each class that is looked at while training, 0 to 1
        test: share of each class to measure on, 0 to 1
        groups: a regular expression that finds in a file's name who or what is in the picture; no group lies on two sides
        near_duplicates: together keeps pictures that look the same on one side; warn only tells of them
        resize: how images get their size: crop, squish or pad
        pretrained: start from trained weights
        freeze: train the new head alone; the body stays as it came
        schedule: how the rate moves: constant, step, decay, cos, flat_cos, sgdr (warm restarts) or one_cycle
        seed: of the split, of the parts, and of the seeds
        out: the run folder; what was cut off there goes on
        overwrite: replace the run in that folder
    """
    asked = {k: v for k, v in locals().items() if k not in ('processes', 'ray')}
    plan({**USUAL, **techniques})
    fractions = sorted(set(fractions))
    if len(fractions) < 2 or not 0 < fractions[0] or fractions[-1] > 1: raise BadValue(f'fractions: two or more above 0 and up to 1, got {list(asked["fractions"])}')
    check_runs(seeds, processes)
    loaders, fit = dict(size=size, bs=bs, resize=resize), dict(arch=arch, epochs=epochs, lr=lr, pretrained=pretrained, freeze=freeze, schedule=schedule)
    FolderRecipe.check(path, valid, test, loaders, fit, 'hold some images out of the training')
    one_process('learning_curve')
    own = tuple(key_of(seed, 'learning curve', i) % 2**32 for i in range(seeds))
    names = [f'{f:.4g}' for f in fractions]
    with RunFolder.open('learning-curve', asked, out, overwrite, defaults=learning_curve, growing=('seeds',)).under_way() if out else nullcontext() as run:
        whole = FolderRecipe.of(path, groups, near_duplicates, valid, test, seed, loaders, fit, techniques)
        if run: run.note_data(whole)
        parts = {n: whole.on(f, seed) for n, f in zip(names, fractions)}
        images = [p.sides.count('train') for p in parts.values()]
        if images[0] < bs: raise BadValue(f'fractions: {fractions[0]:g} leaves {images[0]} training images, less than a batch of {bs}; use a smaller bs or a larger fraction')
        fit = whole.at_rate(own[0], {}).fit
        parts = {n: replace(p, fit=fit | dict(epochs=max(1, round(epochs*images[-1]/k)))) for (n, p), k in zip(parts.items(), images)}      # as many steps as on the most
        kept, pool = Kept(run and run.path/'runs', names), pool_of(processes or cores(), ray)
        todo = [job for i in range(seeds) for n in names if (job := (Arm([n]), i)) not in kept.runs]
        try:
            for job, outcome in pool.run(Training(Parts(parts), dict.fromkeys(names, True), own), iter(todo)):
                kept[job] = outcome
                n = images[names.index(next(iter(job[0])))]
                print(f'seed {job[1]+1}, {n:,} images: test accuracy {(outcome.test.predicted == outcome.test.targets).mean():.4f} in {outcome.seconds:.1f} s', flush=True)
        finally: pool.close()
        right = np.stack([[kept.runs[Arm([n]), i].test.predicted == kept.runs[Arm([n]), i].test.targets for n in names] for i in range(seeds)])      # (seeds, fractions, images)
        estimates = [Estimate(e.value, max(0., e.lo), min(1., e.hi), e.n) for e in (crossed(right[:, k]) for k in range(len(names)))]
        errors = 1-right.mean(2)
        result = LearningCurve(run and run.path, images, estimates, errors, *power_law(images, errors))
        if run:
            run.write_csv('curve.csv', [dict(images=n, seed=i+1, accuracy=float(1-errors[i, k])) for k, n in enumerate(images) for i in range(seeds)])
            headline = f'{result.advice[0].upper()}{result.advice[1:]}.'
            write_page(Report(f'{arch} on {whole.found.path.name}: would more images help?', run.command, data_of(whole), headline=headline, learning_curve=result,
                              provenance=run.provenance), run.path/'report.html')
            run.finish()
    return result


@dataclass(frozen=True)
class Parts:
    "Trains on the part whose name is on."
    parts: dict[str, FolderRecipe]

    def __call__(self, seed: int, **on): return self.parts[next(n for n, v in on.items() if v)](seed)
