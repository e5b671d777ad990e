"""The same ablation of a folder of images in one process, on two Ray nodes, and on two of which one is killed in mid-run: the same table, bit for bit?

    python bench/ablation_ray.py [--techniques mixup,label_smoothing] [--seeds 3] [--epochs 3] [--write]

Scanned digits, timm's resnet10t from scratch at 32 px. Both nodes are of this machine (`ray.cluster_utils.Cluster`), one core each; the second is killed, without a word
to the first, as soon as four runs are done. Compared are `effects.csv` but for times and memory, and the probabilities of every run. One thread a run, some minutes."""
import argparse
import csv
import os
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

os.environ |= dict(OMP_NUM_THREADS='1', RAY_ENABLE_UV_RUN_RUNTIME_ENV='0')
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np                                              # noqa: E402
import ray                                                      # noqa: E402
from ray.cluster_utils import Cluster                           # noqa: E402
from results import write                                       # noqa: E402

from fastrecipes.data.samples import digits                     # noqa: E402
from fastrecipes.recipes.ablate import ablate                   # noqa: E402

KILLED_AFTER = 4        # runs


def table(out: Path) -> list[dict]: return [{k: v for k, v in row.items() if k not in ('times', 'mb')} for row in csv.DictReader((out/'effects.csv').open(encoding='utf8'))]


def on_two_nodes(data: Path, out: Path, how: dict, kill: bool):
    "The ablation, and how many nodes were left at its end."
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level='ERROR')
    def lose():
        while len(list(out.glob('runs/*.npz'))) < KILLED_AFTER: time.sleep(.1)
        cluster.remove_node(second, allow_graceful=False)
    try:
        if kill: Thread(target=lose, daemon=True).start()
        result = ablate(data, **how, ray=True, out=out)
        until = time.monotonic() + 60
        while kill and ray.cluster_resources().get('CPU') != 1 and time.monotonic() < until: time.sleep(.5)         # it takes a while to notice
        return result, int(ray.cluster_resources()['CPU'])
    finally:
        ray.shutdown()
        cluster.shutdown()


def main(techniques: str, seeds: int, epochs: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = digits(folder/'digits')
        how = dict(techniques=techniques, arch='resnet10t', pretrained=False, size=32, epochs=epochs, seeds=seeds, lr=.004, augment=False, valid=.3, test=.3)
        since = time.monotonic()
        one = ablate(data, **how, processes=1, out=folder/'one')
        rows = [('one process', 1, one, time.monotonic()-since)]
        for name, kill in (('two Ray nodes', False), (f'two Ray nodes, the second killed after {KILLED_AFTER} runs', True)):
            since, out = time.monotonic(), folder/name.replace(' ', '-')
            result, left = on_two_nodes(data, out, how, kill)
            rows.append((name, left, result, time.monotonic()-since))
            assert table(out) == table(folder/'one'), name
            for job, o in one.runs.items(): assert np.array_equal(o.test.probabilities, result.runs[job].test.probabilities), (name, job)
        return '\n'.join([f'{len(one.runs)} runs; `effects.csv` and the probabilities of each run are the same, bit for bit, in all three.', '',
                          '| | nodes at the end | runs | minutes |', '|---|---:|---:|---:|', *(f'| {n} | {k} | {len(r.runs)} | {t/60:.1f} |' for n, k, r, t in rows), '',
                          '```', str(one).strip().rpartition('\n\nreport:')[0].replace(str(data), 'digits'), '```'])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    defaults = dict(techniques='mixup,label_smoothing', seeds=3, epochs=3)
    for name, default in defaults.items(): parser.add_argument(f'--{name}', type=type(default), default=default)
    parser.add_argument('--write', action='store_true')
    asked = vars(parser.parse_args())
    to_write = asked.pop('write')
    said = main(**asked)
    print(said)
    if to_write: write('ablation_ray', f'## Ablation on Ray\n\n`python bench/ablation_ray.py {" ".join(f"--{k} {v}" for k, v in asked.items())}`\n\n{said}')
