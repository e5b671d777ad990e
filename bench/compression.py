"""A small residual network on scikit-learn's digits made smaller, ours and fasterai in one run: the same data, networks, seeds, epochs and measurements.

    python bench/compression.py [--peer DIR] [--out DIR] [--seeds 3] [--write]
    python bench/compression.py --probes
    python bench/compression.py --choose

1,397 digits of 32×32 train, 400 test; the split is that of every run. A network of each seed is trained for 5 epochs, and is where both begin, and their teacher. Each makes
of it an fp32 graph, and one in 8 bits, half its channels pruned, in 4 epochs beside the teacher; ours goes on with less. The test images decide nothing: settings
(rate, share of channels) were chosen by `--choose`, on 200 training images held out; 45 epochs and widths of 8 were not. No layer is left in float by `tolerance`.
Every graph is judged by onnxruntime alone: right answers of 400, bytes of the file, and the time of one image on one thread, all graphs in turns in one process. A run that
is done is a line of OUT/runs.jsonl and is not run again. `--peer`: a folder with fasterai, `pip install --no-deps --target DIR fasterai==0.4.1 einops`.
`--probes`: what fasterai 0.4.1 was seen to fail at, tried on ours (compression_probes.py)."""
import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from functools import cache
from io import StringIO
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore')

import numpy as np                                              # noqa: E402
import torch                                                    # noqa: E402
from fastai.basics import Learner, accuracy, nn                 # noqa: E402
from fastcore.xdg import xdg_cache_home                         # noqa: E402
from imbalance import done, note, paired                        # noqa: E402
from results import write                                       # noqa: E402
from sklearn.datasets import load_digits                        # noqa: E402
from torch.nn import functional as F                            # noqa: E402
from torch.utils.data import TensorDataset                      # noqa: E402

from fastrecipes.data.keyed import keyed                        # noqa: E402
from fastrecipes.data.loaders import as_dataloaders             # noqa: E402
from fastrecipes.production.graphs import compact               # noqa: E402
from fastrecipes.production.predictor import Graph              # noqa: E402
from fastrecipes.production.quantized import network_graph      # noqa: E402
from fastrecipes.production.timing import interleaved           # noqa: E402
from fastrecipes.technique import discover                      # noqa: E402

TRAIN, TEST, HELD_OUT, BURST = slice(0, 1397), slice(1397, None), slice(1197, 1397), 50
EPOCHS, RATE, TUNED = 5, 3e-3, 4                # of the network that both begin with, and epochs of what they make of it


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    "The 1,797 digits `(n, 1, 32, 32)`, normalised, and their classes, shuffled once and for all."
    d = load_digits()
    order = np.random.RandomState(0).permutation(len(d.target))
    x = F.interpolate(torch.tensor(d.images/16, dtype=torch.float32)[:, None], size=32, mode='bilinear', align_corners=False)
    return ((x-.3)/.35)[order], torch.tensor(d.target)[order]


class Block(nn.Module):
    def __init__(self, ni, nf, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(ni, nf, 3, stride, 1, bias=False), nn.BatchNorm2d(nf)
        self.conv2, self.bn2 = nn.Conv2d(nf, nf, 3, 1, 1, bias=False), nn.BatchNorm2d(nf)
        self.short = nn.Identity() if stride == 1 and ni == nf else nn.Sequential(nn.Conv2d(ni, nf, 1, stride, bias=False), nn.BatchNorm2d(nf))

    def forward(self, x): return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))


class Net(nn.Sequential):
    "Nine convolutions and two linear layers; 86,714 parameters."
    def __init__(self, a=16, b=32, c=64, hidden=128):
        super().__init__(nn.Sequential(nn.Conv2d(1, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU()), Block(a, a, 1), Block(a, b, 2), Block(b, c, 2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def learner(model: nn.Module, seed: int, train=TRAIN, valid=HELD_OUT, bs: int = 50) -> Learner:
    "A Learner on the training images `train`; the test images are never among its data."
    x, y = digits()
    learn = Learner(as_dataloaders(tuple(TensorDataset(x[s], y[s]) for s in (train, valid)), bs=bs, seed=seed), model, metrics=accuracy)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    keyed(learn, seed)
    learn.side = train
    return learn


def trained(seed: int, train=TRAIN) -> Learner:
    torch.manual_seed(seed)
    learn = learner(Net(), seed, train)
    learn.fit_one_cycle(EPOCHS, RATE)
    return learn


class Ours:
    name = 'fastrecipes'

    def fp32(self, learn) -> bytes: return compact(network_graph(learn))
    def int8(self, learn) -> bytes: return learn.quantize('static', tolerance=100).model.graph
    def qat(self, learn) -> bytes: return learn.quantize('qat', epochs=4, lr=1e-3).model.graph

    def half(self, learn, teacher, lr=1e-2):
        learn.slim(.5, round_to=1).distill(teacher, T=5., alpha=.5).fit_one_cycle(TUNED, lr)

    def less(self, learn, teacher, budget=.7, epochs=45, lr=1e-2):
        "`budget` of the channels removed, most from the layers that bear it best, and a longer lesson. Widths of 13 or 15 took 8 to 20 % longer in int8 than those of 16."
        learn.slim(per_layer=teacher.sensitivity().ratios(budget), round_to=8).distill(teacher).fit_one_cycle(epochs, lr)


class Fasterai:
    "fasterai 0.4.1, as its documentation uses it."
    name = 'fasterai'

    def __init__(self):
        from fasterai.core.all import agp, large_final
        from fasterai.distill.all import KnowledgeDistillationCallback, SoftTarget
        from fasterai.export.all import export_onnx
        from fasterai.prune.all import PruneCallback
        self.sample, self.export = digits()[0][:100], export_onnx
        self.prune = lambda: PruneCallback(.5, agp, 'local', large_final, example_inputs=self.sample[:1])
        self.teach = lambda teacher: KnowledgeDistillationCallback(deepcopy(teacher.model).eval(), SoftTarget, weight=.5)

    def half(self, learn, teacher, lr=3e-3): learn.fit_one_cycle(TUNED, lr, cbs=[self.prune(), self.teach(teacher)])
    def int8(self, learn) -> bytes: return self.fp32(learn, quantize=True, quantize_mode='static', calibration_data=[(x[None], 0) for x in self.sample])

    def fp32(self, learn, **kwargs) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.export(deepcopy(learn.model).eval(), self.sample[:1], f'{folder}/model.onnx', **kwargs)).read_bytes()


def changed(base: Learner, seed: int, how, **kwargs) -> Learner:
    "What `how` makes of a copy of the network of `base`."
    torch.manual_seed(seed)
    learn = learner(deepcopy(base.model), seed, base.side)
    how(learn, base, **kwargs)
    return learn


def right(graph: bytes, side=TEST) -> float:
    "The share of images of `side` that the graph answers rightly, in %, one by one."
    x, y = (t[side].numpy() for t in digits())
    session = Graph(graph, 1).session
    name = session.get_inputs()[0].name
    return 100*float(np.mean([session.run(None, {name: a[None]})[0].argmax() == b for a, b in zip(x, y)]))


def milliseconds(graphs: dict) -> dict[object, list[float]]:
    "The ms that one image takes through each graph on one thread, in bursts, all in turns: the least and the median."
    def run(graph):
        session = Graph(graph, 1).session
        feed = {session.get_inputs()[0].name: digits()[0][:1].numpy()}
        return lambda: [session.run(None, feed) for _ in range(BURST)]
    return {k: [min(t)/BURST, statistics.median(t)/BURST] for k, t in interleaved({k: run(g) for k, g in graphs.items()}).items()}


def quiet(f, *args, **kwargs):
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()): return f(*args, **kwargs)


def contestants(peer: Path | None) -> list:
    if peer: sys.path.append(str(peer))
    try: return [Fasterai(), Ours()]
    except ImportError as e:
        print(f'fasterai: not installed ({e}); see --peer')
        return [Ours()]


def main(peer: Path | None, out: Path, seeds: int) -> str:
    discover()
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    file, whos = out/'runs.jsonl', contestants(peer)
    ours = whos[-1]
    runs = {(r['who'], r['what'], r['seed']): r for r in done(file)}
    arms = [(w.name, what) for what in ('fp32', 'half, int8') for w in whos] + [(ours.name, 'less, int8')]
    for seed in range(seeds):
        base = None
        for who in whos:
            for what, how, export in (('fp32', None, who.fp32), ('half, int8', who.half, who.int8), *((('less, int8', who.less, who.int8),) if who is ours else ())):
                if (key := (who.name, what, seed)) in runs: continue
                base = base or trained(seed)
                start = time.process_time()
                learn = quiet(changed, base, seed, how) if how else base
                graph = quiet(export, learn)
                (out/f'{who.name}-{what}-{seed}.onnx').write_bytes(graph)
                runs[key] = r = dict(who=who.name, what=what, seed=seed, accuracy=right(graph), bytes=len(graph), parameters=sum(p.numel() for p in learn.model.parameters()),
                                     seconds=round(time.process_time()-start, 1))
                note(file, r)
                print(f'seed {seed} {who.name:12} {what:10} {r["accuracy"]:6.2f} %, {r["bytes"]/1024:6.1f} KB, {r["parameters"]:,} parameters, {r["seconds"]:.0f} s', flush=True)
    times = milliseconds({(*arm, s): (out/f'{arm[0]}-{arm[1]}-{s}.onnx').read_bytes() for arm in arms for s in range(seeds)})
    return table(arms, runs, times, seeds)


def table(arms, runs, times, seeds: int) -> str:
    of = lambda arm, what: np.array([runs[(*arm, s)][what] for s in range(seeds)])
    rows = ['| | accuracy on 400, %: mean (seeds) | .onnx, KB | parameters | one image, ms: least (median) |', '| --- | --- | ---: | ---: | --- |']
    for arm in arms:
        acc, (least, median) = of(arm, 'accuracy'), np.array([times[(*arm, s)] for s in range(seeds)]).T
        rows.append(f'| {arm[0]}: {NAMES[arm[1]]} | {acc.mean():.2f} ({", ".join(f"{a:.2f}" for a in acc)}) | {of(arm, "bytes").mean()/1024:.1f} | '
                    f'{of(arm, "parameters").mean():,.0f} | {least.mean():.4f} ({median.mean():.4f}) |')
    said = []
    if ('fasterai', 'fp32') in arms:
        peer = ('fasterai', 'half, int8')
        for arm in (('fastrecipes', 'half, int8'), ('fastrecipes', 'less, int8')):
            ratio = np.array([times[(*arm, s)][0]/times[(*peer, s)][0] for s in range(seeds)])
            said.append(f'{NAMES[arm[1]]}, against fasterai: {paired(of(arm, "accuracy")-of(peer, "accuracy"))} points of accuracy (95 % interval of the seeds\' paired differences), '
                        f'{(of(arm, "bytes")/of(peer, "bytes")).mean():.2f} of its bytes, {ratio.mean():.2f} of its time.')
    return '\n'.join([*rows, '', *said])


NAMES = {'fp32': 'fp32', 'half, int8': 'half the channels, taught for 4 epochs, int8', 'less, int8': 'a third of the channels, by sensitivity, taught for 45 epochs, int8'}


def choose(peer: Path | None):
    "Settings, tried on 200 training images that are held out from training: the mean of two seeds."
    discover()
    torch.set_num_threads(1)
    whos = contestants(peer)
    bases = [trained(s, slice(0, 1197)) for s in range(2)]
    tried = [(w, w.half, [w.int8], dict(lr=lr)) for w in whos for lr in (3e-3, 1e-2)]
    tried += [(whos[-1], whos[-1].less, [whos[-1].int8, whos[-1].qat], dict(budget=b, epochs=n)) for b, n in ((.6, 30), (.7, 30))]
    for who, how, exports, kwargs in tried:
        learners = [quiet(changed, b, s, how, **kwargs) for s, b in enumerate(bases)]
        for export in exports:
            graphs = [quiet(export, learn) for learn in learners]
            acc = [right(g, HELD_OUT) for g in graphs]
            print(f'{who.name} {how.__name__} {export.__name__} {kwargs}: {np.mean(acc):.2f} % {acc}, {np.mean([len(g) for g in graphs])/1024:.1f} KB', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--peer', type=Path)
    parser.add_argument('--out', type=Path, default=xdg_cache_home()/'fastrecipes'/'compression')
    parser.add_argument('--seeds', type=int, default=3)
    for flag in ('probes', 'choose', 'write'): parser.add_argument(f'--{flag}', action='store_true')
    asked = parser.parse_args()
    if asked.seeds < 2: parser.error('--seeds: at least 2, for there is no spread of one')
    if asked.choose: sys.exit(choose(asked.peer))
    if asked.probes:
        from compression_probes import report
        sys.exit(report())
    print(said := main(asked.peer, asked.out, asked.seeds))
    if asked.write: write('compression', f'## Compression, beside fasterai\n\n`python bench/compression.py --peer DIR --seeds {asked.seeds}`\n\n{said}')
