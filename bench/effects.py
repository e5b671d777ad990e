"""What six techniques of the chapters Layers, Regularization and Loss do to accuracy, on digits and on a part of CIFAR-10: five paired seeds, whatever it says.

    python bench/effects.py [--data DIR] [--out DIR] [--seeds 5] [--write]

Arms of a seed share training images, weights to begin with, order and augmentation. Nothing is tuned for an arm: each technique's settings are
those of its line, the learning rate is the baseline's. A run that is done is a line of OUT/runs.jsonl and is not run again. `--data`: where
`cifar10.tar.xz` is unpacked, and unpacked to if it is not. `--write` puts the tables into bench/RESULTS.md."""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from fastcore.xdg import xdg_cache_home
from imbalance import Budget, done, note, paired, pictures, ready, resnet9
from results import write
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from fastai.basics import Learner, nn
from fastrecipes.data.keyed import keyed
from fastrecipes.data.loaders import as_dataloaders

ARMS = {'none': {}, "activation('mish')": dict(activation='mish'), "norm('group')": dict(norm=dict(kind='group', groups=8)), 'dropout(.3)': dict(dropout=.3),
        'coordconv()': dict(coordconv=True), "loss('focal')": dict(loss='focal'), 'weight_decay(.1)': dict(weight_decay=.1)}
LR, BS = .01, 64


def digits(seed: int):
    "500 digits of 16×16 px to train on and the other 1,297 to judge by."
    d = load_digits()
    x = nn.functional.interpolate(torch.tensor(d.images, dtype=torch.float32)[:, None]/16, scale_factor=2).expand(-1, 3, -1, -1).contiguous()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    y = torch.tensor(d.target)
    return [TensorDataset(x[i], y[i]) for i in (order[:500], order[500:])]


def cifar(seed: int, data: Path):
    "2,000 training images of CIFAR-10, 200 a class, and 2,000 of its test images, always the same."
    return [pictures(data/'train', [200]*10, np.random.default_rng(seed)), pictures(data/'test', [200]*10, np.random.default_rng(0))]


def trained(techniques: dict, seed: int, train, test, steps: int, augment) -> Learner:
    torch.manual_seed(seed)
    learn = Learner(as_dataloaders((train, test), bs=BS, seed=seed), resnet9(), wd=.01)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    keyed(learn, seed)
    learn.use(augment=augment, **techniques)
    learn.fit(math.ceil(steps/len(learn.dls.train)), LR, cbs=Budget(steps, LR))
    return learn


def judged(learn: Learner) -> dict:
    p, y = learn.get_preds()
    return dict(accuracy=float((p.argmax(1) == y).float().mean()), log_loss=float(nn.functional.nll_loss(p.clamp_min(1e-12).log(), y)))


def main(data: Path, out: Path, seeds: int) -> str:
    file = ready(data, out)
    runs = {(r['on'], r['arm'], r['seed']): r for r in done(file)}
    turned = dict(flip=False, rotate=8., zoom=1.1, warp=0., lighting=0.)
    mirrored = dict(flip=True, rotate=0., zoom=1.25, warp=0., lighting=0., p=1.)
    sets = {'500 digits, 150 steps': (digits, 150, turned), '2,000 CIFAR-10 images, 300 steps': (lambda seed: cifar(seed, data), 300, mirrored)}
    for on, (make, steps, augment) in sets.items():
        for seed in range(seeds):
            if all((on, arm, seed) in runs for arm in ARMS): continue
            train, test = make(seed)
            for arm, techniques in ARMS.items():
                if (on, arm, seed) in runs: continue
                start = time.process_time()
                learn = trained(techniques, seed, train, test, steps, augment)
                seconds = time.process_time()-start
                runs[on, arm, seed] = r = dict(on=on, arm=arm, seed=seed, **judged(learn), seconds=round(seconds, 1))
                note(file, r)
                print(f'{on}, seed {seed} {arm:20} {r["accuracy"]:.1%}, log loss {r["log_loss"]:.3f}, {seconds:.0f} s', flush=True)
    minutes = sum(r['seconds'] for r in runs.values())/60
    about = (f'ResNet-9 of widths 16 to 128 from scratch, AdamW, one cycle to {LR:g}, batches of {BS}; mean ± standard deviation of {seeds} seeds, test images that chose '
             f"nothing; intervals: Student's t of the seeds' paired differences, not corrected for {len(ARMS)-1} arms; {minutes:.0f} minutes of one core's time.")
    return '\n\n'.join([about, *(f'### {on}\n\n{table(on, runs, seeds)}' for on in sets)])


def table(on: str, runs: dict, seeds: int) -> str:
    "One set's outcome in Markdown, an arm a row."
    of = lambda arm, what: np.array([runs[on, arm, s][what] for s in range(seeds)])
    rows = ['| technique | accuracy, % | − none, points (95 % interval) | log loss | time against none |', '| --- | --- | --- | --- | --- |']
    for arm in ARMS:
        said = '–' if arm == 'none' else paired(100*(of(arm, 'accuracy')-of('none', 'accuracy')))
        a, l = 100*of(arm, 'accuracy'), of(arm, 'log_loss')
        slower = np.median(of(arm, 'seconds')/of('none', 'seconds'))
        rows.append(f'| `{arm}` | {a.mean():.1f} ± {a.std(ddof=1):.1f} | {said} | {l.mean():.3f} ± {l.std(ddof=1):.3f} | {slower:.2f}× |')
    return '\n'.join(rows)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--data', type=Path, default=xdg_cache_home()/'fastrecipes'/'cifar10')
    parser.add_argument('--out', type=Path, default=xdg_cache_home()/'fastrecipes'/'effects')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--write', action='store_true')
    asked = parser.parse_args()
    if asked.seeds < 2: parser.error('--seeds: at least 2, for there is no spread of one')
    said = main(asked.data, asked.out, asked.seeds)
    print(said)
    if asked.write: write('effects', f'## Six techniques of layers, regularization and loss\n\n`python bench/effects.py --seeds {asked.seeds}`\n\n{said}')
