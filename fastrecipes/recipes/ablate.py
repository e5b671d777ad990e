"Which techniques help on your own data: each trained with and without, several seeds, the difference with its interval, and a verdict."
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path

from fastprogress.fastprogress import format_time
from matplotlib.figure import Figure

from fastrecipes.arguments import checked
from fastrecipes.data.folders import NearDuplicates
from fastrecipes.data.pixels import Resize
from fastrecipes.errors import BadValue, counted
from fastrecipes.files import writes
from fastrecipes.randomness import key_of
from fastrecipes.recipes.ablating import Kept, Training, pool_of
from fastrecipes.recipes.arms import METRICS, Arm, Comparison, Finding, arms, chosen, comparisons, effect, findings, named
from fastrecipes.recipes.classify import USUAL, Schedule, image_classifier
from fastrecipes.recipes.folder_recipe import FolderRecipe, check_runs, cores
from fastrecipes.report.effect_plots import draw_forest, draw_worth
from fastrecipes.report.effects import LEAST, Effect, crossed
from fastrecipes.report.evidence import data_of
from fastrecipes.report.intervals import Estimate
from fastrecipes.report.page import Report, write_page
from fastrecipes.report.plots import PLAIN
from fastrecipes.report.run_folder import RunFolder, command_line
from fastrecipes.report.tables import aligned
from fastrecipes.technique import discover, plan
from fastrecipes.training.distributed import one_process

__all__ = ['Ablation', 'ablate']


@dataclass
class Ablation:
    """What `ablate` found: `.findings`, two for each technique; `.recommended`, those that help on the validation images, with `.gain` on the test images over
    the baseline (None: not trained together, or none helps) and `.command` that trains with them; `.plot()`. `.stopped`: technique and place → why it was given up.
    `.runs`: (techniques that were on, number of the seed) → `Outcome`. Printed, it is a table."""
    path: Path | None
    names: list[str]
    findings: list[Finding]
    baseline: Estimate
    recommended: list[str]
    gain: Effect | None
    command: str | None
    stopped: dict[tuple[str, str], str]
    runs: dict = field(repr=False)

    def __str__(self):
        rows = [('technique', 'where', 'accuracy', 'log loss', 'time', 'verdict')]
        for f in self.findings:
            why = self.stopped.get((f.comparison.technique, f.comparison.where))
            rows.append((f.comparison.technique, f.comparison.where, str(f.effects['accuracy']), f'{-f.effects["log_loss"].value:+.3f}'.replace('-', '−'),
                         f'×{f.times:.2f}', str(f.verdict) + (f' ({why})' if why else '')))
        return '\n'.join(['', f'baseline: {self.baseline}', *aligned(rows), '', self.advice, *([self.command] if self.command else []),
                          *(['', f'report: {self.path/"report.html"}'] if self.path else [])])

    @property
    def curves(self) -> dict[str, list]:
        "The course of the accuracy on the validation images over the epochs, run by run, of the single techniques, of all, and of the baseline."
        shown = [*map(Arm, zip(self.names)), Arm(self.names), Arm()]
        return {named(arm, self.names): [o.curve for (a, _), o in self.runs.items() if a == arm and o.curve] for arm in dict.fromkeys(shown)}

    def plot(self) -> Figure:
        "The effects with their intervals, filled where they are resolved, and what each technique gains against the time it takes. Returns the figure."
        fig = Figure(figsize=(10, 1.6+.4*len(self.names)), layout='constrained')
        left, right = fig.subplots(1, 2)
        draw_forest(left, self.findings, PLAIN)
        draw_worth(right, self.findings, PLAIN)
        return fig

    @property
    def headline(self) -> str:
        by = {w: sorted({f.comparison.technique for f in self.findings if f.verdict.word == w}) for w in ('helped', 'hurt')}
        told = [f'{", ".join(names)} {word}' for word, names in by.items() if names]
        return f'{"; ".join(told)}.' if told else f'Nothing is resolved of {counted(len(self.names), "technique")}.'

    @property
    def advice(self) -> str:
        if not self.recommended: return 'recommended: the baseline; nothing that was tried was shown to help on the validation images'
        told = f': {self.gain} over the baseline' if self.gain else ''
        return f'recommended, chosen on the validation images: {", ".join(self.recommended)}{told}'


@partial(checked, techniques=discover)
def ablate(path, *, techniques: list[str] | str | dict, arch: str = 'resnet18', seeds: int = 5, minutes: float | None = None, matters: float = 1., alone: bool = False,
           processes: int | None = None, ray: bool = False, epochs: int = 5, lr: float | str = 'find', size: int = 224, bs: int = 64, valid: float = .2, test: float = .2,
           groups: str | None = None, near_duplicates: NearDuplicates = 'warn', resize: Resize = 'crop', pretrained: bool = True, freeze: bool = False, schedule: Schedule = 'flat_cos',
           seed: int = 42, out: str | None = None, overwrite: bool = False, **settings) -> Ablation:
    """Tell which techniques help on your own data: train with and without each, with several seeds, and judge the differences.

    Each technique is added alone to the baseline, and taken alone from all of them. Runs of one seed share split, weights, order and draws. An effect is the mean
    difference in accuracy points on the test images, with a 95 % interval over seeds and images. The verdict allows for how many are told at once: 'helped', 'hurt', 'no
    difference larger than x', or how many more seeds would resolve it. Those that help on the validation images are recommended; what they gain together is told by the
    test images. The rest of `image_classifier`'s techniques are on or off in all runs, and arguments are set, by keyword: `mixup=.2`.
    Where `minutes` run short, the least promising by the validation images are given up first. A finished run is kept: the same call goes on, and with more `seeds` adds them.
    Raises as `image_classifier` does, and where two of the techniques do not go together.

    Args:
        path: the folder of images, one sub-folder a class; or a function `recipe(seed=…, **techniques)` that trains and returns a classifier's Learner
        techniques: their names, such as mixup,ema,label_smoothing; in Python a list, or a dict of names and arguments
        arch: any network of timm or torchvision
        seeds: trainings of each kind, 2 or more; verdicts take 3
        minutes: the most that the runs of this call may take; those of an earlier one are not counted
        matters: the smallest difference worth knowing, in points of accuracy
        alone: leave out the full set and the full set minus each
        processes: runs at a time on this machine (default: one a core, one on a GPU)
        ray: do the runs on the Ray cluster of RAY_ADDRESS, or on one of this machine
        epochs: passes over the training data, at least 1
        lr: the highest learning rate; 'find': found once, for the baseline, and used by all
        size: width and height of the images, in px
        bs: images a batch
        valid: share of each class to choose by, 0 to 1
        test: share of each class to report on, 0 to 1
        groups: a regular expression that finds in a file's name who or what is in the picture; no group lies on two sides
        near_duplicates: together keeps pictures that look the same on one side; warn only tells of them
        resize: how images get their size: crop, squish or pad
        pretrained: start from trained weights
        freeze: train the new head alone; the body stays as it came
        schedule: how the rate moves: constant, step, decay, cos, flat_cos, sgdr (warm restarts) or one_cycle
        seed: of the split, and of the seeds
        out: the run folder; what was cut off there goes on
        overwrite: replace the run in that folder
    """
    asked = {k: v for k, v in locals().items() if k not in ('settings', 'processes', 'ray')} | settings
    names, switched, always = _switched(techniques, settings)
    asked |= dict(techniques=','.join(names)) | {n: on for n, on in switched.items() if on is not True and on != USUAL.get(n)}
    plan({**(USUAL if not callable(path) else {}), **always, **switched})
    check_runs(seeds, processes)
    for name, value in dict(minutes=minutes, matters=matters).items():
        if value is not None and not value > 0: raise BadValue(f'{name}: more than 0, got {value:g}')
    of = comparisons(names, alone)
    own_seeds = tuple(key_of(seed, 'ablation', i) % 2**32 for i in range(seeds))
    one_process('ablate')
    loaders, fit = dict(size=size, bs=bs, resize=resize), dict(arch=arch, epochs=epochs, lr=lr, pretrained=pretrained, freeze=freeze, schedule=schedule)
    if not callable(path): FolderRecipe.check(path, valid, test, loaders, fit, 'ablate chooses by validation images and reports on test images; hold some out of both')
    with RunFolder.open('ablate', asked, out, overwrite, defaults=ablate, growing=('seeds', 'minutes')).under_way() if out else nullcontext() as run:
        kept = Kept(run and run.path/'runs', names)
        recipe = path
        if not callable(path):
            recipe = FolderRecipe.of(path, groups, near_duplicates, valid, test, seed, loaders, fit, always)
            if run: run.note_data(recipe)
            recipe = recipe.at_rate(own_seeds[0], dict.fromkeys(names, False))
        pool = pool_of(processes or cores(callable(path)), ray)
        try:
            train = Training(recipe, switched, own_seeds)
            few = f'; a verdict takes {LEAST}, for fewer do not tell how far seeds vary' if seeds < LEAST else ''
            if writes(): print(f'{len(arms(of))*seeds} runs: {len(arms(of))} arms, {seeds} seeds{few}', flush=True)
            clock = _Clock(minutes)
            stopped = _all_runs(kept, of, seeds, clock, pool, train, names)
            told = findings(kept.runs, of, matters/100)
            best = chosen(told)
            if best and best not in arms(of): _run(kept, [(best, i) for i in range(max(f.valid.seeds for f in told))], pool, train, names, clock)
        finally: pool.close()
        result = _result(run, kept, names, told, best, stopped, None if callable(path) else _command(asked, names, switched, always, best))
        if run:
            run.write_csv('effects.csv', _rows(result))
            write_page(_report(run, result, recipe), run.path/'report.html')
            run.finish()
    return result


def _switched(techniques, settings: dict) -> tuple[list[str], dict, dict]:
    "The names to tell about, what switches each on, and what is on or off in all runs."
    asked = dict(techniques) if isinstance(techniques, Mapping) else dict.fromkeys([n.strip() for n in techniques.split(',')] if isinstance(techniques, str) else techniques, True)
    asked.pop('', None)
    if not asked: raise BadValue('techniques: name at least one, such as mixup; `fastrecipes ls` lists them')
    switched = {n: settings.get(n, USUAL.get(n, True) if on is True else on) for n, on in asked.items()}
    if off := [n for n, on in switched.items() if on is False or on is None]: raise BadValue(f'techniques: {off[0]} is to be told about and is switched off; leave it out')
    return list(asked), switched, {n: on for n, on in settings.items() if n not in asked}


def _all_runs(kept: Kept, of: list[Comparison], seeds: int, clock: '_Clock', pool, train: Training, names) -> dict[tuple[str, str], str]:
    "Seed by seed, every arm that a live comparison needs; which were given up, and why."
    live, stopped = list(of), {}
    def missing(which: range) -> int: return sum((arm, j) not in kept.runs for arm in arms(live) for j in which)
    for i in range(seeds):
        if i > 1:
            ahead = range(i, i+1 if i < LEAST else seeds)       # as long as it can be, all get the seeds that a verdict takes
            while len(live) > 1 and not clock.room_for(missing(ahead) + len(ahead)):
                short = [c for c in live if any((arm, j) not in kept.runs for arm in (c.having, c.lacking) for j in ahead)]
                worst = min(short or live, key=lambda c: _promise(kept.runs, c))
                live.remove(worst)
                stopped[worst.technique, worst.where] = 'given up, for want of time'
        _run(kept, [(arm, i) for arm in arms(live)], pool, train, names, clock, missing(range(i+1, seeds)))
    return stopped


def _promise(runs, c: Comparison) -> float:
    "How much the technique may help, by the validation images: the upper end of what is likely."
    e = effect(runs, c.having, c.lacking, side='valid')
    return math.inf if e is None else e.value + e.se


class _Clock:
    "What time is left, and whether so many more runs fit into it, by what those before took."
    def __init__(self, minutes: float | None): self.end, self.since, self.done = minutes and time.monotonic() + 60*minutes, time.monotonic(), 0
    @property
    def each(self) -> float: return (time.monotonic()-self.since)/self.done if self.done else 0.
    def room_for(self, runs: int) -> bool: return self.end is None or time.monotonic() + runs*self.each <= self.end
    def left(self, runs: int) -> str: return f', about {format_time(runs*self.each)} for the rest' if runs and self.done else ''


def _run(kept: Kept, jobs, pool, train: Training, names, clock: _Clock, later: int = 0):
    "Do those of `jobs` that are not done, while there is time; `later` more are to come."
    todo = [job for job in jobs if job not in kept.runs]
    def in_time():
        for k, job in enumerate(todo):
            if not clock.room_for(1): return print(f'{counted(len(todo)-k, "run")} of this seed left out: the time is up', flush=True)
            yield job
    for k, (job, outcome) in enumerate(pool.run(train, in_time()), 1):
        kept[job] = outcome
        clock.done += 1
        score = (outcome.test.predicted == outcome.test.targets).mean()
        print(f'seed {job[1]+1}, {named(job[0], names)}: test accuracy {score:.4f} in {outcome.seconds:.1f} s{clock.left(len(todo)-k+later)}', flush=True)


def _result(run, kept: Kept, names, told: list[Finding], best: Arm, stopped, command: str | None) -> Ablation:
    if not told: raise BadValue('minutes: not enough for one comparison; give more, or ask for less: smaller images, fewer epochs')
    seeds = sorted(i for arm, i in kept.runs if not arm)
    right = crossed([kept.runs[Arm(), i].test.predicted == kept.runs[Arm(), i].test.targets for i in seeds])
    baseline = Estimate(right.value, max(0., right.lo), min(1., right.hi), right.n)
    return Ablation(run and run.path, names, told, baseline, [n for n in names if n in best], effect(kept.runs, best, Arm()) if best else None, command, stopped, kept.runs)


def _command(asked: dict, names, switched: dict, always: dict, best: Arm) -> str:
    "What trains with the recommended techniques: `image_classifier`, told what it does not do by itself."
    usual = {k: p.default for k, p in signature(image_classifier).parameters.items()} | USUAL
    wanted = {k: v for k, v in asked.items() if k in usual and k not in ('techniques', 'out', 'overwrite')} | always | {n: switched[n] if n in best else False for n in names}
    return command_line('image-classifier', {k: v for k, v in wanted.items() if v != usual.get(k, False)})


def _rows(result: Ablation) -> list[dict]:
    "effects.csv: a row for each comparison and metric."
    return [dict(technique=f.comparison.technique, where=f.comparison.where, side=side, metric=metric, effect=e.value, low=e.lo, high=e.hi, p=e.p, seeds=e.seeds, images=e.n,
                 verdict=f.verdict.why if (side, metric) == ('test', 'accuracy') else '', times=f.times, mb=f.mb)
            for f in result.findings for side, metric, e in [*(('test', m, f.effects[m]) for m in METRICS), ('validation', 'accuracy', f.valid)]]


def _report(run, result: Ablation, recipe) -> Report:
    "The page: what was found, the forest of effects, cost against gain, how the arms learned."
    arch = run.arguments['arch']
    return Report(f'{arch}: {counted(len(result.names), "technique")}', run.command, data_of(recipe), headline=result.headline, ablation=result, provenance=run.provenance)
