"""Loading: images per second of a training epoch as a network would meet it (float, normalised, augmented), beside fastai and torchvision.

    python bench/loading.py --data DIR [--rounds 5] [--write]

`DIR` holds CIFAR-10 as an image folder (`tar xf ../shared/data/cifar10.tar.xz -C DIR`); the folder of 300×300 JPEGs is made beside it, from
scikit-learn's two photographs. Every contestant makes its loader and its first epoch (for us: looking at every file, decoding all of them),
then all run their epochs in turns, each in a process of its own. Batches of 64, no network."""
import argparse
import os
import platform
import shutil
import statistics
import sys
import time
import warnings
from multiprocessing import get_context
from pathlib import Path

warnings.filterwarnings('ignore')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from fastai.vision.all import (FlipItem, ImageDataLoaders, Learner, Normalize, RandomCrop, Resize, aug_transforms,  # noqa: E402
                               imagenet_stats, nn)
from PIL import Image  # noqa: E402
from sklearn.datasets import load_sample_images  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from results import write  # noqa: E402
from fastrecipes.data.folders import image_folder  # noqa: E402
from fastrecipes.technique import discover  # noqa: E402

BS = 64


def photographs(root: Path, n: int = 2048) -> Path:
    "`n` JPEGs of 300×300 px in two classes: random parts of scikit-learn's two photographs."
    for name, image in zip(('china', 'flower'), load_sample_images().images):
        (root/'train'/name).mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for i in range(n//2):
            y, x = rng.integers(0, image.shape[0]-200), rng.integers(0, image.shape[1]-200)
            file = root/'train'/name/f'{i:04}.jpg'
            if not file.exists(): Image.fromarray(image[y:y+200, x:x+200]).resize((300, 300), Image.Resampling.BICUBIC).save(file, quality=90)
    return root


def some(cifar: Path, root: Path, n: int = 10_000) -> Path:
    "The first `n` training images of CIFAR-10, linked into a folder of their own."
    for d in sorted((cifar/'train').iterdir()):
        (root/'train'/d.name).mkdir(parents=True, exist_ok=True)
        for f in sorted(d.iterdir())[:n//10]:
            if not (to := root/'train'/d.name/f.name).exists(): shutil.copyfile(f, to)
    return root


def fastai(folder, size, workers, item_tfms, batch_tfms=()):
    dls = ImageDataLoaders.from_folder(folder, train='train', valid_pct=.02, seed=0, bs=BS, num_workers=workers, item_tfms=item_tfms,
                                       batch_tfms=[*batch_tfms, Normalize.from_stats(*imagenet_stats, cuda=False)])
    return dls.train


def torchvision(folder, size, workers, padding):
    tfms = v2.Compose([v2.Resize((size, size)), v2.RandomCrop(size, padding=padding, padding_mode='reflect'), v2.RandomHorizontalFlip(), v2.ToImage(),
                       v2.ToDtype(torch.float32, scale=True), v2.Normalize(*imagenet_stats)])
    return DataLoader(ImageFolder(folder/'train', tfms), BS, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)


def ours(folder, size, cache, **augment):
    "Nothing is remembered from earlier runs: the cache folder is new."
    os.environ['XDG_CACHE_HOME'] = str(cache)
    dls = image_folder(folder/'train', size=size, bs=BS, valid=.02, test=0.)
    learn = Learner(dls, nn.Flatten(), nn.CrossEntropyLoss())
    learn.dls.train.after_batch.add(Normalize.from_stats(*imagenet_stats, cuda=False))
    return learn.use(cache=str(cache/'pixels'), augment=augment or True).dls.train


def epoch(loader) -> float:
    "Images per second of one epoch."
    n, start = 0, time.perf_counter()
    for x, _ in loader: n += len(x)
    return n/(time.perf_counter()-start)


def contestants(folder: Path, size: int, padding: int, cache: Path) -> dict:
    crop_flip = dict(crop=padding, rotate=0, zoom=1, warp=0, lighting=0)
    theirs = [Resize(size+2*padding), RandomCrop(size), FlipItem()]
    return {
        'fastai, its crop + flip, no workers': lambda: fastai(folder, size, 0, theirs),
        'fastai, its crop + flip, 2 workers': lambda: fastai(folder, size, 2, theirs),
        'torchvision ImageFolder + v2 crop + flip, 2 workers': lambda: torchvision(folder, size, 2, padding),
        'cache + augment(crop + flip)': lambda: ours(folder, size, cache/'a', **crop_flip),
        'fastai, aug_transforms, no workers': lambda: fastai(folder, size, 0, Resize(size), aug_transforms()),
        'fastai, aug_transforms, 2 workers': lambda: fastai(folder, size, 2, Resize(size), aug_transforms()),
        'cache + augment(), the same transforms': lambda: ours(folder, size, cache/'b')}


def compete(name: str, pipe, *args):
    "One contestant, in a process of its own, so that none feels what another leaves behind: its first epoch at once, another for each word."
    discover()
    start = time.perf_counter()
    epoch(loader := contestants(*args)[name]())
    pipe.send(time.perf_counter()-start)
    while pipe.recv(): pipe.send(epoch(loader))


def contest(*args, rounds: int) -> list[tuple]:
    context, pipes, first, rest = get_context('spawn'), {}, {}, {}
    for name in contestants(*args):
        pipes[name], end = context.Pipe()
        context.Process(target=compete, args=(name, end, *args)).start()
        first[name], rest[name] = pipes[name].recv(), []
        print(f'{name}: first epoch {first[name]:.1f} s', flush=True)
    for i in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            rest[name].append(pipe.recv())
        print(f'round {i+1}: ' + ', '.join(f'{v[-1]:,.0f}' for v in rest.values()), flush=True)
    for pipe in pipes.values(): pipe.send(False)
    return [(name, first[name], statistics.median(v), min(v), max(v)) for name, v in rest.items()]


def table(title: str, rows: list[tuple]) -> str:
    speed, first = {r[0]: r[2] for r in rows}, {r[0]: r[1] for r in rows}
    best = lambda word: max(v for k, v in speed.items() if k.startswith('fastai') and word in k)
    soonest = lambda word: min(v for k, v in first.items() if k.startswith('fastai') and word in k)
    a, b = 'cache + augment(crop + flip)', 'cache + augment(), the same transforms'
    lines = [f'### {title}', '', '| loader | first epoch, with all that comes before, s | later epochs, images/s: median (range) |', '| --- | ---: | ---: |']
    lines += [f'| {name} | {f:.1f} | {m:,.0f} ({lo:,.0f}–{hi:,.0f}) |' for name, f, m, lo, hi in rows]
    torchs = next(v for k, v in speed.items() if k.startswith('torchvision'))
    return '\n'.join([*lines, '', f'Crop + flip: {speed[a]/best("crop"):.1f}× the faster of fastai\'s, {speed[a]/torchs:.1f}× torchvision\'s; '
                      f'first epoch {first[a]/soonest("crop"):.2f}× the time of the sooner of fastai\'s. '
                      f'The same `aug_transforms`: {speed[b]/best("aug_"):.1f}×; first epoch {first[b]/soonest("aug_"):.2f}×.'])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, required=True)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--write', action='store_true', help='put the tables into bench/RESULTS.md')
    a = p.parse_args()
    shutil.rmtree(cache := a.data/'bench-cache', ignore_errors=True)
    small, large = some(a.data, a.data/'some'), photographs(a.data/'photographs')
    tables = [table('10,000 images of 32×32 px', contest(small, 32, 4, cache/'small', rounds=a.rounds)),
              table('2,048 JPEGs of 300×300 px, resized to 224', contest(large, 224, 16, cache/'large', rounds=max(3, a.rounds//2)))]
    head = f'`python bench/loading.py --data DIR`: {os.cpu_count()} cores ({platform.machine()}), no GPU; batches of {BS}, float, normalised; epochs in turns, {a.rounds} or at least 3.'
    text = '\n\n'.join([head, *tables])
    print(text)
    if a.write: write('loading', f'## Loading\n\n{text}')


if __name__ == '__main__': main()
