"""What each way to make and weigh an ensemble gains over its mean and its best member, on scanned digits and on a part of CIFAR-10.

    python bench/ensembles.py [--data DIR] [--out DIR] [--seeds 3] [--members 4] [--folds 3] [--train 2000] [--valid 1000] [--test 2000] [--epochs 4] [--bs 64] [--lr .01]
        [--on digits cifar] [--write]

Which images are trained on, chosen by and judged by is drawn by seed, as are weights, order and augmentation. The members of a seed are trained once: average, votes, weights and
blending combine the same networks; bagging, boosting and the folds of stacking train their own; a snapshot ensemble is one fit as long as all members together, as is 'one network, as
long'. All is judged on images that chose nothing. Digits: 300 to train on, 300 to choose by.
A run that is done is a line of OUT/runs.jsonl and is not run again. `--data`: where CIFAR-10 is unpacked, and unpacked to if it is not."""
import argparse
import contextlib
import io
import os
import time
from functools import partial
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np                                              # noqa: E402
import torch                                                    # noqa: E402
from fastai.basics import Learner, nn                           # noqa: E402
from fastcore.xdg import xdg_cache_home                         # noqa: E402
from imbalance import done, note, paired, ready, resnet9        # noqa: E402
from results import write                                       # noqa: E402
from self_training import pictures                              # noqa: E402
from sklearn.datasets import load_digits                        # noqa: E402
from torch.utils.data import TensorDataset                      # noqa: E402

from fastrecipes.data.keyed import keyed                        # noqa: E402
from fastrecipes.data.loaders import as_dataloaders             # noqa: E402
from fastrecipes.errors import BadValue                         # noqa: E402
from fastrecipes.production import tta                          # noqa: E402,F401
from fastrecipes.production.bagging import bagging              # noqa: E402
from fastrecipes.production.boosting import boosting            # noqa: E402
from fastrecipes.production.ensembles import Ensemble           # noqa: E402
from fastrecipes.production.snapshots import Snapshots          # noqa: E402,F401
from fastrecipes.production.stacking import out_of_fold         # noqa: E402

SHARED = ('average', 'majority', 'weighted', 'weighted_vote', 'blending')
DATA = ('digits', 'cifar')


def small():
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))


def sets_of(data: str, folder: Path, seed: int, train: int, valid: int, test: int) -> list[TensorDataset]:
    "(train, valid, test), drawn by seed, no image on two sides."
    rng = np.random.default_rng(seed)
    if data == 'cifar':
        few, chosen = pictures(folder/'train', train//10, valid//10, rng=rng)
        return [few, chosen, pictures(folder/'test', test//10, rng=rng)[0]]
    d, order = load_digits(), rng.permutation(1797)
    x, y = torch.tensor(d.images[order]).float()[:, None]/16, torch.tensor(d.target[order]).long()
    return [TensorDataset(x[s], y[s]) for s in (slice(0, 300), slice(300, 600), slice(600, None))]


def trained(dls, seed: int, *, data: str, epochs: int, lr: float) -> Learner:
    torch.manual_seed(seed)
    net = resnet9().to(memory_format=torch.channels_last) if data == 'cifar' else small()
    learn = Learner(dls, net, wd=.05)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    keyed(learn, seed)
    learn.use(augment=dict(flip=data == 'cifar', rotate=0. if data == 'cifar' else 10., zoom=1.25 if data == 'cifar' else 1.1, warp=0., lighting=0., p=1.))
    if epochs: learn.fit_one_cycle(epochs, lr)
    return learn


def accuracy(p, y) -> float: return float((p.argmax(1) == y).float().mean())


def measured(data: str, folder: Path, seed: int, settings: dict) -> dict:
    "The test accuracy of each arm, the members' own among them, for one seed."
    n, s = settings['members'], settings
    dls = as_dataloaders(tuple(sets_of(data, folder, seed, s['train'], s['valid'], s['test'])), bs=s['bs'] if data == 'cifar' else 20, seed=seed)
    make = partial(trained, data=data, epochs=s['epochs'] if data == 'cifar' else 2*s['epochs'], lr=s['lr'])
    long = partial(make, epochs=n*make.keywords['epochs'])
    own = [1000*seed+i for i in range(n)]
    members = [make(dls, k) for k in own]
    y = dls.loaders[2].dataset.dataset.tensors[1]
    e = Ensemble(members)
    p = e.answers(dls.loaders[2])[0]
    said = dict(members=[accuracy(p[:, i], y) for i in range(n)], valid=[accuracy(q, dls.valid.dataset.dataset.tensors[1]) for q in e.answers(dls.valid)[0].unbind(1)])
    for kind in SHARED: said[kind] = accuracy(Ensemble(members, kind).fit().get_preds(2)[0], y)
    said['tta of a member'] = float(np.mean([accuracy(m.tta(2, n=n)[0], y) for m in members]))
    if data == 'cifar': said['flip of a member'] = float(np.mean([accuracy(m.tta(2, views='flip')[0], y) for m in members]))
    said['one network, as long'] = accuracy(long(dls, own[0]).get_preds(ds_idx=2, act=partial(torch.softmax, dim=1))[0], y)
    said['snapshot'] = accuracy(make(dls, own[0], epochs=0).fit_snapshots(n, make.keywords['epochs'], s['lr']).get_preds(2)[0], y)
    said['bagging'] = accuracy(bagging(make, dls, n, seed=seed).ensemble.get_preds(2)[0], y)
    try: said['boosting'] = accuracy(boosting(make, dls, n, seed=seed).ensemble.get_preds(2)[0], y)
    except BadValue as error: said['boosting'], said['why'] = None, str(error)
    q, _ = out_of_fold([make]*n, dls, s['folds'], seed)
    said['stacking'] = accuracy(Ensemble(members, 'stacking').fit_to(q, dls.train.dataset.dataset.tensors[1]).get_preds(2)[0], y)
    return said


def main(data: Path, out: Path, seeds: int, on: list[str], **settings) -> str:
    file = ready(data, out)
    runs = {(r['data'], r['seed']): r for r in done(file) if r['settings'] == settings}
    for name in on:
        for seed in range(seeds):
            if (name, seed) in runs: continue
            start = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()): said = measured(name, data, seed, settings)
            runs[name, seed] = r = dict(data=name, seed=seed, settings=settings, said=said, seconds=round(time.process_time()-start, 1))
            note(file, r)
            print(f'{name} seed {seed}: members {np.mean(said["members"]):.1%}, average {said["average"]:.1%}, {r["seconds"]:.0f} s', flush=True)
    return '\n\n'.join(table(name, [runs[name, s]['said'] for s in range(seeds)], sum(runs[name, s]['seconds'] for s in range(seeds)), settings) for name in on)


def table(name: str, said: list[dict], seconds: float, settings: dict) -> str:
    "The outcome on one data set in Markdown, an arm a row."
    mean = np.array([100*np.mean(r['members']) for r in said])
    best = np.array([100*r['members'][int(np.argmax(r['valid']))] for r in said])
    rows = ['| what answers | test accuracy, % | − mean member, points (95 % interval) | − best member by validation |', '| --- | --- | --- | --- |',
            f'| a member, on average | {mean.mean():.1f} ± {mean.std(ddof=1):.1f} | – | {paired(mean-best)} |',
            f'| the best member | {best.mean():.1f} ± {best.std(ddof=1):.1f} | {paired(best-mean)} | – |']
    for arm in [k for k in said[0] if k not in ('members', 'valid', 'why')]:
        if any(r[arm] is None for r in said):
            rows.append(f'| {arm} | – | {next(r["why"] for r in said if r[arm] is None)} | – |')
            continue
        a = np.array([100*r[arm] for r in said])
        rows.append(f'| {arm} | {a.mean():.1f} ± {a.std(ddof=1):.1f} | {paired(a-mean)} | {paired(a-best)} |')
    s = settings
    what = (f'{s["train"]:,} images of CIFAR-10 to train on, {s["valid"]:,} to choose by, {s["test"]:,} to judge by; ResNet-9 of widths 16 to 128 from scratch, {s["epochs"]} epochs '
            f'of batches of {s["bs"]}' if name == 'cifar' else
            f'Scanned digits, 300 to train on, 300 to choose by, 1,197 to judge by; two convolutions from scratch, {2*s["epochs"]} epochs of batches of 20')
    about = (f'{what}, AdamW, one cycle to {s["lr"]:g}; {s["members"]} members, {s["folds"]} folds; mean ± standard deviation of {len(said)} seeds; intervals: '
             f'Student\'s t of the seeds\' paired differences, not corrected for the number of arms; {seconds/60:.0f} minutes of one core\'s time.')
    return '\n'.join([about, '', *rows])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--data', type=Path, default=xdg_cache_home()/'fastrecipes'/'cifar10')
    parser.add_argument('--out', type=Path, default=xdg_cache_home()/'fastrecipes'/'ensembles')
    settings = dict(seeds=3, members=4, folds=3, train=2000, valid=1000, test=2000, epochs=4, bs=64, lr=.01)
    for name, default in settings.items(): parser.add_argument(f'--{name}', type=type(default), default=default)
    parser.add_argument('--on', nargs='+', choices=DATA, default=DATA)
    parser.add_argument('--write', action='store_true')
    asked = vars(parser.parse_args())
    to_write = asked.pop('write')
    for name in ('seeds', 'members', 'folds'):
        if asked[name] < 2: parser.error(f'--{name}: at least 2')
    said = main(**asked)
    print(said)
    how = ' '.join(f'--{k} {asked[k]:g}' for k in settings) + f' --on {" ".join(asked["on"])}'
    if to_write: write('ensembles', f'## Ensembles\n\n`python bench/ensembles.py {how}`\n\n{said}')
