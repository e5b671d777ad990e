"""CIFAR-10 on the cores of this machine: what a network makes of the same minutes of training, for four ways to train one.

    python bench/cifar_time.py [--data DIR] [--out DIR] [--minutes 1 5] [--images 10000 50000] [--seeds 3] [--ours .25 .5 2] [--write]

From scratch; tested on all 10,000 test images by a plain forward pass. The minutes are of training: reading, imports, validation and test come on top. So that nobody has to
guess how many epochs fit into them, all four move the rate by the clock and stop with it, the peers by a callback of this script:

- fastrecipes: `fast_classifier(data, minutes=…)`;
- fastai: its defaults, `vision_learner(resnet18, pretrained=False)`, batches of 64, `aug_transforms()`, Adam and one-cycle at 3e-3;
- fastai, same network: the same with ResNet-9 of our width;
- timm style: what its train.py does with a model, on the same network: its transforms for training, SGD with Nesterov momentum, cosine with warm-up, label smoothing, --channels-last.

fastai and timm run in processes in which nothing of ours but the network is imported. The machine must have nothing else to do. Runs take turns, one at a time; one that is done is a
line of OUT/runs.jsonl and is not run again. `--ours`: further budgets for ours alone, 10,000 images, all seeds: how soon it has what the others have after 5 minutes."""
import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CHOSEN = ('The settings of ours were chosen by some 25 runs of a minute, one seed, on another 10,000 of the training images, and judged by the same test images, so that a part of the '
          'lead, some tenths of a point, is that choice; nobody tuned the others.')
WHO = ('fastrecipes', 'fastai', 'fastai, same network', 'timm style')


def part(data: Path, out: Path, n: int, seed: int) -> Path:
    "A folder with `n` of the training images, as many of each class, and all test images: links."
    classes = sorted(p.name for p in (data/'train').iterdir())
    each, rng, folder = n//len(classes), random.Random(seed), out/f'images_{n}_{seed}'
    if not folder.exists():
        making = folder.with_suffix('.part')
        for c in classes:
            files = sorted((data/'train'/c).iterdir())
            (making/'train'/c).mkdir(parents=True, exist_ok=True)
            for f in rng.sample(files, min(each, len(files))): (making/'train'/c/f.name).symlink_to(f)
        (making/'test').symlink_to(data/'test')
        making.rename(folder)
    return folder


def ours(data: Path, minutes: float, seed: int) -> tuple:
    from fastai.vision.all import accuracy
    from fastrecipes.recipes.fast import fast_classifier
    learn = fast_classifier(data, minutes=minutes, seed=seed, valid=.02)
    with learn.no_bar(): p, y = learn.get_preds(ds_idx=2)
    return float(accuracy(p, y)), len(learn.recorder.losses)*learn.dls.train.bs, 60*minutes


def by_clock(minutes: float):
    "fastai's callback that makes the share of a fit that is over that of the minutes, and ends it with them."
    from fastai.vision.all import Callback, CancelFitException
    class ByClock(Callback):
        order, run_valid, n = -9, False, 0
        def before_train(self):
            if self.epoch == 0: self.since = time.perf_counter()
        def before_batch(self):
            self.spent = time.perf_counter()-self.since
            self.learn.pct_train = min(1., self.spent/60/minutes)
            if self.spent >= 60*minutes: raise CancelFitException
            self.n += len(self.yb[0])
    return ByClock()


def by_fastai(data: Path, minutes: float, seed: int, same: bool) -> tuple:
    import timm
    from fastai.callback.schedule import ParamScheduler, combined_cos
    from fastai.vision.all import CrossEntropyLossFlat, ImageDataLoaders, Learner, Normalize, accuracy, aug_transforms, imagenet_stats, np, resnet18, set_seed, torch, vision_learner
    import fastrecipes.layers.resnet9                           # noqa: F401  the network alone
    set_seed(seed)
    torch.manual_seed(seed)
    dls = ImageDataLoaders.from_folder(data, train='train', valid='test', batch_tfms=[*aug_transforms(), *([Normalize.from_stats(*imagenet_stats)] if same else [])], num_workers=2)
    if same: learn = Learner(dls, timm.create_model('resnet9_w16', num_classes=10), CrossEntropyLossFlat(), metrics=accuracy)
    else: learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    clock = by_clock(minutes)
    learn.create_opt()
    learn.opt.set_hyper('lr', 3e-3)
    rates = np.array([h['lr'] for h in learn.opt.hypers])
    cycle = dict(lr=combined_cos(.25, rates/25, rates, rates/1e5), mom=combined_cos(.25, .95, .85, .95))       # what fit_one_cycle makes
    learn.dls.loaders, test = [dls.train, dls.valid.new(bs=256)], dls.valid
    learn._do_epoch_validate = lambda *args, **kwargs: None     # it would cost time that nobody counts
    with learn.no_bar(), learn.no_logging(): learn.fit(10_000, 3e-3, cbs=[ParamScheduler(cycle), clock])
    del learn._do_epoch_validate
    with learn.no_bar(): p, y = learn.get_preds(dl=test)
    return float(accuracy(p, y)), clock.n, clock.spent


def by_timm(data: Path, minutes: float, seed: int) -> tuple:
    import timm
    import torch
    from timm.data import create_dataset, create_loader
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import random_seed
    import fastrecipes.layers.resnet9                           # noqa: F401  the network alone
    random_seed(seed)
    model = timm.create_model('resnet9_w16', num_classes=10).to(memory_format=torch.channels_last)      # its flag --channels-last
    sets = {split: create_dataset('', root=str(data), split=split, is_training=split == 'train', class_map='') for split in ('train', 'test')}
    usual = dict(input_size=(3, 32, 32), num_workers=2, use_prefetcher=False, mean=(.49, .48, .45), std=(.25, .24, .26), persistent_workers=False)
    train = create_loader(sets['train'], batch_size=128, is_training=True, scale=(.35, 1.), hflip=.5, color_jitter=.4, interpolation='random', **usual)
    test = create_loader(sets['test'], batch_size=256, is_training=False, interpolation='bilinear', crop_pct=1., **usual)
    opt, peak = create_optimizer_v2(model, opt='sgd', lr=.1, weight_decay=5e-4, momentum=.9), .1
    loss, n, spent, since = LabelSmoothingCrossEntropy(.1), 0, 0., time.perf_counter()
    model.train()
    while spent < 60*minutes:
        for x, y in train:
            spent = time.perf_counter()-since
            if spent >= 60*minutes: break
            pct = spent/60/minutes
            rate = peak*pct/.1 if pct < .1 else peak*(1+math.cos(math.pi*(pct-.1)/.9))/2
            for group in opt.param_groups: group['lr'] = rate
            loss(model(x.contiguous(memory_format=torch.channels_last)), y).backward()
            opt.step()
            opt.zero_grad()
            n += len(y)
    model.eval()
    with torch.no_grad(): right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test)
    return right/len(sets['test']), n, spent


def run(who: str, data: Path, minutes: float, seed: int) -> dict:
    ways = dict(zip(WHO, (ours, lambda *a: by_fastai(*a, same=False), lambda *a: by_fastai(*a, same=True), by_timm)))
    acc, seen, spent = ways[who](data, minutes, seed)
    return dict(accuracy=acc, images=seen, seconds=spent)


def spread(values) -> str:
    return f'{100*statistics.mean(values):.1f}' + (f' ({100*min(values):.1f}–{100*max(values):.1f})' if len(values) > 1 else '')


def table(done: list[dict]) -> str:
    asked = sorted({(r['n'], r['minutes']) for r in done})
    lines = ['| training images | minutes | ' + ' | '.join(WHO) + ' |', '|---:|---:|' + '---:|'*len(WHO)]
    for n, minutes in asked:
        cells = []
        for who in WHO:
            own = [r for r in done if (r['n'], r['minutes'], r['who']) == (n, minutes, who)]
            cells.append(f'{spread([r["accuracy"] for r in own])}, {statistics.mean(r["images"] for r in own)/n:.1f} epochs' if own else '')
        lines.append(f'| {n:,} | {minutes:g} | ' + ' | '.join(cells) + ' |')
    runs = max(Counter((r['n'], r['minutes'], r['who']) for r in done).values())
    return '\n'.join([*lines, '', f'Test accuracy in %, mean and range of up to {runs} seeds; passes over the training images.'])


def sooner(done: list[dict]) -> str:
    "How much earlier ours has what each of the others has at last: the least of the budgets that were run after which it is as good, on average."
    lines = []
    for n in sorted({r['n'] for r in done}):
        mean = {key: statistics.mean(r['accuracy'] for r in done if (r['n'], r['who'], r['minutes']) == (n, *key)) for key in {(r['who'], r['minutes']) for r in done if r['n'] == n}}
        ours = sorted((m, a) for (who, m), a in mean.items() if who == WHO[0])
        for who in WHO[1:]:
            last = max((m for w, m in mean if w == who), default=None)
            if last is None or last <= 1: continue
            had = next(((m, a) for m, a in ours if a >= mean[who, last]), None)
            found = f'ours {100*had[1]:.1f} % after {had[0]:g}: {had[0]/last:.2g} of the time' if had else 'ours in none of its budgets'
            lines.append(f'- {n:,} images, {who}: {100*mean[who, last]:.1f} % after {last:g} minutes; {found}.')
    return '\n'.join(['', 'How soon ours has what the others have at last, by the budgets that were run:', '', *lines]) if lines else ''


def main(data: Path, out: Path, minutes: list[float], images: list[int], seeds: int, more: list[float]) -> str:
    from imbalance import done as done_in
    from imbalance import note, ready
    file = ready(data, out)
    done = done_in(file)
    todo = [(n, m, seed, who) for m in sorted(minutes) for n in images for seed in range(seeds) for who in WHO] + [(images[0], m, seed, WHO[0]) for m in more for seed in range(seeds)]
    environment = {k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'}         # all cores, for everybody
    for n, m, seed, who in todo:
        key = dict(n=n, minutes=m, seed=seed, who=who)
        if any(key.items() <= r.items() for r in done): continue
        one = [sys.executable, '-W', 'ignore', __file__, '--one', json.dumps([who, str(part(data, out, n, seed)), m, seed])]
        answer = subprocess.run(one, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        done.append(key | json.loads(answer.stdout.splitlines()[-1]))
        note(file, done[-1])
        print(f'{who}, {n:,} images, {m:g} minutes, seed {seed}: {100*done[-1]["accuracy"]:.2f} %, {done[-1]["images"]/done[-1]["seconds"]:.0f} images/s', flush=True)
    return '\n'.join(filter(None, [table(done), sooner(done)]))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    cache = Path(os.environ.get('XDG_CACHE_HOME', Path.home()/'.cache'))/'fastrecipes'
    parser.add_argument('--data', type=Path, default=cache/'cifar10')
    parser.add_argument('--out', type=Path, default=cache/'cifar_time')
    parser.add_argument('--minutes', type=float, nargs='+', default=[1., 5.])
    parser.add_argument('--images', type=int, nargs='+', default=[10_000, 50_000])
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--ours', type=float, nargs='*', default=[.25, .5, 2.])
    parser.add_argument('--write', action='store_true')
    parser.add_argument('--one', help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        who, data, minutes, seed = json.loads(asked.one)
        print(json.dumps(run(who, Path(data), minutes, seed)))
    else:
        from results import write
        command = ' '.join(f'--{n} {" ".join(map(str, v)) if isinstance(v, list) else v}'.strip() for n, v in vars(asked).items() if n in ('minutes', 'images', 'seeds', 'ours'))
        print(said := main(asked.data, asked.out, asked.minutes, asked.images, asked.seeds, asked.ours))
        how = f'`python bench/cifar_time.py {command}`, one run at a time; rows that are missing were not run. {CHOSEN}'
        if asked.write: write('cifar_time', f'## CIFAR-10, the same minutes for all\n\n{how}\n\n{said}')
