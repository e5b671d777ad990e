"""What the Learner costs beside a plain loop of torch, a batch: the same network, fused optimizer and pre-sliced batches on all sides.

    python bench/loop.py [--rounds 15] [--batches 100] [--epochs 3] [--write]

A tiny convnet on 8×8 px, and a batch of validation an epoch. Three contestants in one run: the loop by hand, fastai as it is (another process, in which nothing of ours is
imported), and fastai with this package imported. Rounds are interleaved, each in its turn trains on all batches; the ratio is the median over rounds. One thread."""
import argparse
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch                                                    # noqa: E402
from torch import nn                                            # noqa: E402
from torch.nn import functional as F                            # noqa: E402

SIZES = (16, 64)
FUSED = partial(torch.optim.AdamW, fused=True)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))


class Batches:
    "A loader whose batches lie in memory."
    def __init__(self, bs: int, n: int):
        g = torch.Generator().manual_seed(0)
        self.batches = [(torch.randn(bs, 1, 8, 8, generator=g), torch.randint(10, (bs,), generator=g)) for _ in range(n)]
        self.dataset = range(bs*n)
    def __iter__(self): return iter(self.batches)
    def __len__(self): return len(self.batches)
    def to(self, device): return self


def by_hand(bs: int, n: int, epochs: int) -> tuple[float, float]:
    "Milliseconds a batch, and the sum of the weights at the end."
    net, dl = network(), Batches(bs, n)
    opt = FUSED(net.parameters(), lr=1e-3, weight_decay=.01)
    since = time.perf_counter()
    for _ in range(epochs):
        net.train()
        for x, y in dl:
            F.cross_entropy(net(x), y).backward()
            opt.step()
            opt.zero_grad()
        net.eval()
        with torch.no_grad():
            for x, y in Batches(bs, 1): pred = net(x)
            F.cross_entropy(pred, y).item(), (pred.argmax(1) == y).float().mean().item()
    return 1e3*(time.perf_counter()-since)/n/epochs, sum(float(p.detach().double().sum()) for p in net.parameters())


def by_learner(bs: int, n: int, epochs: int) -> tuple[float, float]:
    "The same through a Learner, all that comes before and after the fit included."
    from fastai.vision.all import DataLoaders, Learner, OptimWrapper, ProgressCallback, accuracy, noop
    net = network()
    learn = Learner(DataLoaders(Batches(bs, n), Batches(bs, 1)), net, nn.CrossEntropyLoss(), metrics=accuracy, opt_func=partial(OptimWrapper, opt=FUSED))
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    since = time.perf_counter()
    learn.fit(epochs, 1e-3, wd=.01)
    return 1e3*(time.perf_counter()-since)/n/epochs, sum(float(p.detach().double().sum()) for p in net.parameters())


def serve(ours: bool):
    "A contestant in a process of its own: reads `bs n epochs`, answers the time and the sum."
    torch.set_num_threads(1)
    if ours: import fastrecipes.all                             # noqa: F401
    for line in sys.stdin:
        print(*by_learner(*map(int, line.split())), flush=True)


class Contestant:
    def __init__(self, name: str):
        self.process = subprocess.Popen([sys.executable, '-W', 'ignore', __file__, '--serve', name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def __call__(self, *asked) -> tuple[float, float]:
        print(*asked, file=self.process.stdin, flush=True)
        return tuple(map(float, self.process.stdout.readline().split()))


def main(rounds: int, batches: int, epochs: int) -> str:
    torch.set_num_threads(1)
    who = {'a loop by hand': by_hand, 'fastai': Contestant('fastai'), 'fastai with fastrecipes': Contestant('ours')}
    lines = ['| batch of | | ms a batch, median (range) | × the loop by hand, median (range) |', '|---:|---|---:|---:|']
    for bs in SIZES:
        for f in who.values(): f(bs, batches, 1)
        times = {name: [] for name in who}
        for _ in range(rounds):
            ends = set()
            for name, f in who.items():
                ms, end = f(bs, batches, epochs)
                times[name].append(ms)
                ends.add(round(end, 6))
            assert len(ends) == 1, f'they did not train the same: {ends}'
        for name, ts in times.items():
            ratios = [t/b for t, b in zip(ts, times['a loop by hand'])]
            lines.append(f'| {bs} | {name} | {statistics.median(ts):.2f} ({min(ts):.2f}–{max(ts):.2f}) | {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) |')
    return '\n'.join([*lines, '', 'All three end with the same weights.'])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    for name, default in dict(rounds=15, batches=100, epochs=3).items(): parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--write', action='store_true')
    parser.add_argument('--serve', choices=['fastai', 'ours'], help=argparse.SUPPRESS)
    asked = vars(parser.parse_args())
    to_write, name = asked.pop('write'), asked.pop('serve')
    if name: serve(name == 'ours')
    else:
        from results import write
        print(said := main(**asked))
        if to_write: write('loop', f'## The loop\n\n`python bench/loop.py {" ".join(f"--{k} {v}" for k, v in asked.items())}`: tiny convnet, 8×8 px, fused AdamW, one thread.\n\n{said}')
