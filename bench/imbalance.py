"""Long-tailed CIFAR-10, 100 to 1, trained from scratch with each way of making up for rare classes; equally many steps, three seeds.

    python bench/imbalance.py [--data DIR] [--out DIR] [--seeds 3] [--most 2000] [--steps 700] [--bs 64] [--lr .01] [--write]

Class i of 0…9 has most·100^(−i/9) training images (arXiv:1901.05555, section 5.1), drawn by seed, as are weights, order and augmentation: the arms of a
seed share them. Tested on all 10,000 test images, 1,000 a class, so that accuracy is balanced accuracy. A run that is done is a line of OUT/runs.jsonl and
is not run again. `--data`: where `cifar10.tar.xz` is unpacked, and unpacked to if it is not. `--write` puts the table into bench/RESULTS.md."""
import argparse
import json
import math
import os
import sys
import tarfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np                                              # noqa: E402
import torch                                                    # noqa: E402
from fastai.basics import Callback, CancelFitException, CancelValidException, Learner, nn        # noqa: E402
from fastai.callback.schedule import SchedCos, combine_scheds   # noqa: E402
from fastcore.xdg import xdg_cache_home                         # noqa: E402
from PIL import Image                                           # noqa: E402
from results import write                                       # noqa: E402
from scipy import stats                                         # noqa: E402
from sklearn.metrics import f1_score, recall_score              # noqa: E402
from torch.utils.data import TensorDataset                      # noqa: E402

from fastrecipes.data.keyed import keyed                        # noqa: E402
from fastrecipes.data.loaders import as_dataloaders             # noqa: E402
from fastrecipes.technique import discover                      # noqa: E402

ARCHIVE = ROOT.parent/'shared'/'data'/'cifar10.tar.xz'
ARMS = {
    'none': {},
    "balance('upsampling')": dict(balance='upsampling'),
    "balance('downsampling')": dict(balance='downsampling'),
    "balance('weighted')": dict(balance='weighted'),
    "class_weights('inverse')": dict(class_weights='inverse'),
    "class_weights('effective')": dict(class_weights='effective'),
    'logit_adjustment()': dict(logit_adjustment=True),
    'label_smoothing(.1)': dict(label_smoothing=.1),
}
RATIO, RARE = 100, 3


def pictures(folder: Path, per_class=None, rng=None) -> TensorDataset:
    "The images of `folder/<class>/` in [0, 1] `(n, 3, 32, 32)` with their classes; of each class as many as `per_class` says, drawn by `rng`."
    x, y = [], []
    for c, sub in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
        files = sorted(sub.glob('*.jpg'))
        for i in range(len(files)) if per_class is None else sorted(rng.permutation(len(files))[:per_class[c]]):
            with Image.open(files[i]) as im: x.append(np.asarray(im.convert('RGB')))
            y.append(c)
    return TensorDataset(torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).float()/255, torch.tensor(y))


def ready(data: Path, out: Path) -> Path:
    "One thread, CIFAR-10 unpacked to `data`, and the file in `out` that has a line for each run that is done."
    discover()
    torch.set_num_threads(1)
    if not (data/'test').is_dir():
        data.mkdir(parents=True, exist_ok=True)
        with tarfile.open(ARCHIVE) as tar: tar.extractall(data, filter='data')
    out.mkdir(parents=True, exist_ok=True)
    return out/'runs.jsonl'


def done(file: Path) -> list[dict]: return [json.loads(line) for line in file.read_text(encoding='utf8').splitlines()] if file.exists() else []


def note(file: Path, run: dict):
    with file.open('a', encoding='utf8') as f: f.write(json.dumps(run) + '\n')


def paired(d) -> str:
    "The mean of the seeds' paired differences `d`, with Student's 95 % interval."
    half = stats.t.ppf(.975, len(d)-1)*d.std(ddof=1)/len(d)**.5
    return f'{d.mean():+.1f} ({d.mean()-half:+.1f} to {d.mean()+half:+.1f})'.replace('-', '−')


def counts(most: int) -> list[int]: return [int(most*RATIO**(-i/9)) for i in range(10)]


class Residual(nn.Sequential):
    def forward(self, x): return x + super().forward(x)


def conv(ni, nf, *more): return nn.Sequential(nn.Conv2d(ni, nf, 3, padding=1, bias=False), nn.BatchNorm2d(nf), nn.ReLU(), *more)


def resnet9(widths=(16, 32, 64, 128)):
    "The nine-layer network of the fast CIFAR-10 entries, a quarter as wide, with its first pooling moved before the second convolution."
    a, b, c, d = widths
    return nn.Sequential(conv(3, a, nn.MaxPool2d(2)), conv(a, b), Residual(conv(b, b), conv(b, b)), conv(b, c, nn.MaxPool2d(2)),
                         conv(c, d, nn.MaxPool2d(2)), Residual(conv(d, d), conv(d, d)), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(d, 10))


class Budget(Callback):
    "One cycle of the learning rate over `steps` steps, however many make an epoch; then the fit is over. Nothing is validated on the way."
    def __init__(self, steps: int, lr: float): self.steps, self.rate, self.done = steps, combine_scheds([.25, .75], [SchedCos(lr/25, lr), SchedCos(lr, lr/1e4)]), 0
    def before_batch(self):
        if self.learn.training: self.learn.opt.set_hypers(lr=self.rate(self.done/self.steps))
    def after_batch(self):
        if not self.learn.training: return
        self.done += 1
        if self.done == self.steps: raise CancelFitException('the budget is spent')
    def before_validate(self): raise CancelValidException('nothing is validated on the way')


def trained(techniques: dict, seed: int, train, test, *, steps: int, bs: int, lr: float) -> Learner:
    torch.manual_seed(seed)
    dls = as_dataloaders((train, test), bs=bs, seed=seed)
    learn = Learner(dls, resnet9().to(memory_format=torch.channels_last), wd=.05)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    keyed(learn, seed)
    learn.use(augment=dict(flip=True, rotate=0., zoom=1.25, warp=0., lighting=0., p=1.), **techniques)
    learn.fit(math.ceil(steps/len(learn.dls.train)), lr, cbs=Budget(steps, lr))
    return learn


def measured(learn: Learner) -> dict:
    p, y = learn.get_preds()
    y, p = y.numpy(), p.argmax(1).numpy()
    recalls = recall_score(y, p, average=None)
    return dict(balanced_accuracy=float(recalls.mean()), macro_f1=float(f1_score(y, p, average='macro')), rare_recall=float(recalls[-RARE:].mean()), recalls=recalls.tolist())


def main(data: Path, out: Path, seeds: int, **settings) -> str:
    file = ready(data, out)
    runs = {(r['arm'], r['seed']): r for r in done(file) if r['settings'] == settings}
    test = None

    for seed in range(seeds):
        train = None
        for arm, techniques in ARMS.items():
            if (arm, seed) in runs: continue
            test = test or pictures(data/'test')
            train = train or pictures(data/'train', counts(settings['most']), np.random.default_rng(seed))
            start = time.process_time()
            learn = trained(techniques, seed, train, test, **{k: settings[k] for k in ('steps', 'bs', 'lr')})
            runs[arm, seed] = r = dict(arm=arm, seed=seed, settings=settings, **measured(learn), seconds=round(time.process_time()-start, 1))
            note(file, r)
            print(f'seed {seed} {arm:28} {r["balanced_accuracy"]:.1%} balanced, {r["rare_recall"]:.1%} of the rare, {r["seconds"]:.0f} s', flush=True)
    return table({k: r for k, r in runs.items() if k[1] < seeds}, seeds, settings)


def table(runs: dict, seeds: int, settings: dict) -> str:
    "The outcome in Markdown, an arm a row."
    of = lambda arm, what: np.array([runs[arm, s][what] for s in range(seeds)])
    spread = lambda v: f'{100*v.mean():.1f} ± {100*v.std(ddof=1):.1f}'
    rows = [f'| technique | balanced accuracy, % | − none, points (95 % interval) | macro-F1, % | recall of the {RARE} rarest, % |', '| --- | --- | --- | --- | --- |']
    for arm in ARMS:
        said = '–' if arm == 'none' else paired(100*(of(arm, 'balanced_accuracy')-of('none', 'balanced_accuracy')))
        rows.append(f'| `{arm}` | {spread(of(arm, "balanced_accuracy"))} | {said} | {spread(of(arm, "macro_f1"))} | {spread(of(arm, "rare_recall"))} |')
    n, seconds = counts(settings['most']), sum(r['seconds'] for r in runs.values())
    said = [f'{sum(n):,} training images, {n[0]:,} to {n[-1]} a class; {settings["steps"]:,} steps of {settings["bs"]} images in every arm, whatever an epoch is to it '
            f'({settings["steps"]*settings["bs"]/sum(n):.0f} epochs of the data as they are); ResNet-9 of widths 16 to 128 from scratch, flips and zooms, AdamW, one cycle to '
            f'{settings["lr"]:g}; mean ± standard deviation of {seeds} seeds; intervals: Student\'s t of the seeds\' paired differences; {seconds/60:.0f} minutes of one core\'s time.']
    return '\n'.join([*said, '', *rows])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--data', type=Path, default=xdg_cache_home()/'fastrecipes'/'cifar10')
    parser.add_argument('--out', type=Path, default=xdg_cache_home()/'fastrecipes'/'imbalance')
    for name, default in dict(seeds=3, most=2000, steps=700, bs=64, lr=.01).items(): parser.add_argument(f'--{name}', type=type(default), default=default)
    parser.add_argument('--write', action='store_true')
    asked = vars(parser.parse_args())
    to_write = asked.pop('write')
    if asked['seeds'] < 2: parser.error('--seeds: at least 2, for there is no spread of one')
    said = main(**asked)
    print(said)
    how = ' '.join(f'--{k} {asked[k]:g}' for k in ('seeds', 'most', 'steps', 'bs', 'lr'))
    if to_write: write('imbalance', f'## Long-tailed CIFAR-10\n\n`python bench/imbalance.py {how}`\n\n{said}')
