"""What needs a CUDA GPU, or data that need a download: ready to run; where there is none, the rows say so.

    python bench/gpu.py [--data CIFAR10] [--airbench DIR] [--imagenette DIR] [--seeds 10] [--epochs 16] [--write]

- CIFAR-10 through the Learner: `image_classifier` with ResNet-9 and the settings of `fast_classifier`, all 50,000 training images but 1 in 50, `epochs` epochs; seconds of the fit
  alone, mean accuracy on the 10,000 test images.
- Beside it, on the same card and by turns, the record of https://github.com/KellerJordan/cifar10-airbench, from a clone in `--airbench`: `train94()` after `warmup94()`; it asks
  for 94 % on the mean, with test images mirrored and shifted, and so do we here, by fastai's `tta`.
- Imagenette (https://github.com/fastai/imagenette), unpacked in `--imagenette`: 128 px, resnext50_32x4d with Mish, from scratch, 5 and 20 epochs, five seeds, against its
  leaderboard: 87.43 and 91.57 %, by xse_resnext50."""
import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch                                                    # noqa: E402
from fastai.metrics import accuracy                             # noqa: E402
from fastcore.xdg import xdg_cache_home                         # noqa: E402
from results import write                                       # noqa: E402

from fastrecipes.recipes.classify import image_classifier       # noqa: E402
from fastrecipes.recipes.small_images import SMALL_IMAGES, fastest_layout, moved        # noqa: E402
from fastrecipes.report.history import history                  # noqa: E402

LEADERBOARD = {5: .8743, 20: .9157}


def ours(data: Path, seed: int, epochs: int, layout: dict) -> tuple[float, float]:
    "Accuracy and seconds of one fit."
    learn = image_classifier(data, 'resnet9', epochs=epochs, valid=.02, size=32, pretrained=False, seed=seed, augment=moved(32), **layout, **SMALL_IMAGES)
    with learn.no_bar(): p, y = learn.tta(ds_idx=2)
    return float(accuracy(p, y)), history(learn).seconds


def airbench(folder: Path):
    "A call that trains as the record does, and returns accuracy and seconds."
    sys.path.insert(0, str(folder))
    import airbench as theirs
    theirs.warmup94()
    test = theirs.CifarLoader('cifar10', train=False)
    def once(seed: int) -> tuple[float, float]:
        torch.manual_seed(seed)
        torch.cuda.synchronize()
        since = time.perf_counter()
        net = theirs.train94(verbose=False)
        torch.cuda.synchronize()
        return float(theirs.evaluate(net, test, tta_level=2)), time.perf_counter()-since
    return once


def row(name: str, found: list[tuple[float, float]]) -> str:
    if not found: return f'| {name} | not run: no CUDA GPU here, or no data | |'
    accuracies, seconds = zip(*found)
    half = 1.96*statistics.stdev(accuracies)/len(found)**.5 if len(found) > 1 else float('nan')
    return f'| {name} | {100*statistics.mean(accuracies):.2f} ± {100*half:.2f} %, {len(found)} seeds | {statistics.median(seconds):.2f} s |'


def main(data: Path, theirs: Path | None, imagenette: Path | None, seeds: int, epochs: int) -> str:
    gpu = torch.cuda.is_available()
    ready = gpu and (data/'test').is_dir()
    layout = fastest_layout('resnet9', 32, SMALL_IMAGES['bs']) if ready else {}
    contestants = {'CIFAR-10, fastrecipes': lambda seed: ours(data, seed, epochs, layout)} if ready else {}
    if ready and theirs: contestants['CIFAR-10, airbench94'] = airbench(theirs)
    if ready: ours(data, 0, 1, layout)                                  # kernels chosen, pixels decoded
    found = {name: [] for name in ('CIFAR-10, fastrecipes', 'CIFAR-10, airbench94', *(f'Imagenette, {n} epochs (leaderboard {v:.2%})' for n, v in LEADERBOARD.items()))}
    for seed in range(seeds):
        for name, once in contestants.items(): found[name].append(once(seed))
    if gpu and imagenette:
        for n, (name, _) in zip(LEADERBOARD, list(found.items())[2:]):
            for seed in range(5):
                learn = image_classifier(imagenette, 'resnext50_32x4d', epochs=n, size=128, pretrained=False, seed=seed, lr=4e-3, test=0., to_bf16=True, to_channelslast=True,
                                         cache=True, activation='mish', optimizer='lookahead_radam', label_smoothing=.1, mixup=.4)
                found[name].append((float(learn.recorder.values[-1][2]), history(learn).seconds))
    ratio = ''
    if all(found[n] for n in list(found)[:2]):
        mine, record = (statistics.median(s for _, s in found[n]) for n in list(found)[:2])
        ratio = f'\n\nTime of ours / time of the record: {mine/record:.2f}.'
    card = torch.cuda.get_device_name() if gpu else 'no GPU'
    return '\n'.join([f'On {card}.', '', '| | accuracy | time of the fit |', '|---|---:|---:|', *(row(n, f) for n, f in found.items())]) + ratio


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--data', type=Path, default=xdg_cache_home()/'fastrecipes'/'cifar10')
    for name in ('airbench', 'imagenette'): parser.add_argument(f'--{name}', type=Path)
    parser.add_argument('--seeds', type=int, default=10)
    parser.add_argument('--epochs', type=int, default=16)
    parser.add_argument('--write', action='store_true')
    asked = parser.parse_args()
    print(said := main(asked.data, asked.airbench, asked.imagenette, asked.seeds, asked.epochs))
    if asked.write: write('gpu', f'## On a GPU\n\n`python bench/gpu.py --seeds {asked.seeds} --epochs {asked.epochs}`\n\n{said}')
