"""Noisy Student on CIFAR-10: 2,000 labelled and 10,000 unlabelled images, beside a student that is trained as long, with the same noise, on the labelled ones alone.

    python bench/self_training.py [--data DIR] [--out DIR] [--seeds 3] [--labelled 2000] [--unlabelled 10000] [--ratio 3] [--steps 1200] [--bs 64] [--lr .01] [--write]

Which images are labelled is drawn by seed, as are weights, order and augmentation; the arms of a seed share them. Every arm has `STEPS` steps of `BS` images: the teacher
without noise, the control with that of the recipe, two rounds of students with it too, each taught by the one before (soft labels, balanced, at a probability of .3
or more). No round is chosen: both are shown. Tested on `DIR/test/<class>/*`. A run that is done is a line of OUT/runs.jsonl and is not run again.
`--data`: where CIFAR-10 is unpacked (.png or .jpg), and unpacked to if it is not."""
import argparse
import os
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np                                              # noqa: E402
import torch                                                    # noqa: E402
from fastai.basics import Learner                               # noqa: E402
from fastcore.xdg import xdg_cache_home                         # noqa: E402
from imbalance import Budget, done, note, paired, ready, resnet9        # noqa: E402
from PIL import Image                                           # noqa: E402
from results import write                                       # noqa: E402
from torch.utils.data import TensorDataset                      # noqa: E402

from fastrecipes.data.keyed import keyed                        # noqa: E402
from fastrecipes.data.loaders import as_dataloaders             # noqa: E402
from fastrecipes.data.pseudo import labelled_alone, pseudo_label        # noqa: E402
from fastrecipes.recipes.self_training import NOISE             # noqa: E402
from fastrecipes.report.intervals import accuracy               # noqa: E402

ARMS = ('teacher', 'control', 'round 1', 'round 2')


def pictures(folder: Path, *per_class, rng=None) -> list[TensorDataset]:
    "Images of `folder/<class>/` in [0, 1] `(n, 3, 32, 32)` with their classes, a dataset for each of `per_class`, no image in two of them; drawn by `rng`. None: all, once."
    parts = [([], []) for _ in per_class or (None,)]
    for c, sub in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
        files = sorted(f for f in sub.iterdir() if f.suffix in ('.png', '.jpg'))
        files = iter([files[i] for i in rng.permutation(len(files))] if per_class else files)
        for (x, y), n in zip(parts, per_class or (None,)):
            for _, f in zip(range(n or 10**9), files):
                with Image.open(f) as im: x.append(np.asarray(im.convert('RGB')))
                y.append(c)
    return [TensorDataset(torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).float()/255, torch.tensor(y)) for x, y in parts]


def trained(dls, seed: int, noise: dict, *, steps: int, lr: float) -> Learner:
    torch.manual_seed(seed)
    learn = Learner(dls, resnet9().to(memory_format=torch.channels_last), wd=.05)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    keyed(learn, seed)
    learn.use(augment=dict(flip=True, rotate=0., zoom=1.25, warp=0., lighting=0., p=1.), **noise)
    learn.fit(-(-steps//len(learn.dls.train)), lr, cbs=Budget(steps, lr))
    learn.remove_cb(Budget)
    return learn


def measured(learn: Learner) -> dict:
    p, y = learn.get_preds()
    return dict(accuracy=accuracy(y.numpy(), p.argmax(1).numpy()).value)


def taught(pseudo, truth: np.ndarray) -> dict:
    "How many unlabelled images are taught, and how often rightly."
    own = np.unique(pseudo.rows)
    return dict(taught=len(own), right=float((pseudo.probabilities[own].argmax(1) == truth[np.array(pseudo.items)[own]]).mean()))


def main(data: Path, out: Path, seeds: int, **settings) -> str:
    file = ready(data, out)
    runs = {(r['arm'], r['seed']): r for r in done(file) if r['settings'] == settings}
    test = None
    for seed in range(seeds):
        if all((arm, seed) in runs for arm in ARMS): continue
        test = test or pictures(data/'test')[0]
        few, more = pictures(data/'train', settings['labelled']//10, settings['unlabelled']//10, rng=np.random.default_rng(seed))
        dls = as_dataloaders((few, test), bs=settings['bs'], seed=seed)
        last = None                                     # who teaches; the arms of a seed are run anew together, for a student needs its teacher
        for arm in ARMS:
            start, said, noise = time.process_time(), {}, {} if arm == 'teacher' else NOISE
            if arm in ('teacher', 'control'): own = dls if arm == 'teacher' else labelled_alone(dls)
            else:
                pseudo = pseudo_label(last, more, threshold=.3, soft=True)
                own, said = pseudo.loaders(dls, settings['ratio']), taught(pseudo, more.tensors[1].numpy())
            learn = trained(own, seed, noise, steps=settings['steps'], lr=settings['lr'])
            if arm != 'control': last = learn
            if (arm, seed) in runs: continue
            runs[arm, seed] = r = dict(arm=arm, seed=seed, settings=settings, **measured(learn), **said, seconds=round(time.process_time()-start, 1))
            note(file, r)
            print(f'seed {seed} {arm:8} {r["accuracy"]:.1%}{", taught {taught:,} images, {right:.1%} rightly".format(**said) if said else ""}, {r["seconds"]:.0f} s', flush=True)
    return table({k: r for k, r in runs.items() if k[1] < seeds}, seeds, settings)


def table(runs: dict, seeds: int, settings: dict) -> str:
    "The outcome in Markdown, an arm a row."
    of = lambda arm, what: np.array([runs[arm, s][what] for s in range(seeds)])
    rows = ['| network | test accuracy, % | − teacher, points (95 % interval) | − control, points (95 % interval) | taught, rightly |', '| --- | --- | --- | --- | --- |']
    for arm in ARMS:
        a = 100*of(arm, 'accuracy')
        apart = ['–' if arm == other else paired(a-100*of(other, 'accuracy')) for other in ('teacher', 'control')]
        some = f'{of(arm, "taught").mean():,.0f}, {of(arm, "right").mean():.1%}' if arm.startswith('round') else ''
        rows.append(f'| {arm} | {a.mean():.1f} ± {a.std(ddof=1):.1f} | {" | ".join(apart)} | {some} |')
    s, seconds = settings, sum(r['seconds'] for r in runs.values())
    about = (f'{s["labelled"]:,} labelled and {s["unlabelled"]:,} unlabelled images of CIFAR-10, {s["ratio"]:g} unlabelled ones for each labelled one in a batch; {s["steps"]:,} steps '
             f'of {s["bs"]} images in every arm; ResNet-9 of widths 16 to 128 from scratch, flips and zooms, students and control with {" and ".join(NOISE)}, AdamW, one cycle '
             f"to {s['lr']:g}; mean ± standard deviation of {seeds} seeds; intervals: Student's t of the seeds' paired differences; {seconds/60:.0f} minutes of one core's time.")
    return '\n'.join([about, '', *rows])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--data', type=Path, default=xdg_cache_home()/'fastrecipes'/'cifar10')
    parser.add_argument('--out', type=Path, default=xdg_cache_home()/'fastrecipes'/'self_training')
    settings = dict(seeds=3, labelled=2000, unlabelled=10000, ratio=3., steps=1200, bs=64, lr=.01)
    for name, default in settings.items(): parser.add_argument(f'--{name}', type=type(default), default=default)
    parser.add_argument('--write', action='store_true')
    asked = vars(parser.parse_args())
    to_write = asked.pop('write')
    if asked['seeds'] < 2: parser.error('--seeds: at least 2, for there is no spread of one')
    said = main(**asked)
    print(said)
    how = ' '.join(f'--{k} {asked[k]:g}' for k in settings)
    if to_write: write('self_training', f'## Noisy Student\n\n`python bench/self_training.py {how}`\n\n{said}')
