"""What it costs to have the package in a process: seconds to import, and memory; in processes of their own, by turns.

    python bench/footprint.py [--rounds 5] [--write]

The imports of each contestant, beside torch and torchvision alone and fastai; what `fastrecipes --help` takes; what a server holds (the predictor, which knows no torch);
and the most memory that a fit takes: two epochs of resnet18 on 640 images in memory, 96 px, batches of 64, by fastai alone and with the package imported, whose loop, recorder
and preflight are then at work. Medians of all rounds; memory is what is resident (RSS)."""
import argparse
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIT = '''
import torch
from fastai.vision.all import *
from torch.utils.data import TensorDataset
torch.manual_seed(0)
data = TensorDataset(torch.rand(640, 3, 96, 96), torch.randint(10, (640,)))
dls = DataLoaders(DataLoader(data, 64, shuffle=True), DataLoader(data, 64))
dls.c = 10
learn = Learner(dls, resnet18(num_classes=10), CrossEntropyLossFlat(), metrics=accuracy)
learn.remove_cb(ProgressCallback)
with learn.no_logging(): learn.fit(2, 1e-3)
'''
IMPORTS = {
    'torch and torchvision': 'import torch, torchvision',
    'fastai.vision.all': 'from fastai.vision.all import *',
    'fastrecipes.all': 'from fastrecipes.all import *',
    'fastrecipes': 'import fastrecipes',
    'fastrecipes --help': 'from fastrecipes.cli import main\nmain(["--help"])',
    'the predictor of a bundle': 'import fastrecipes.production.predictor',
}
FITS = {'fit: fastai': FIT, 'fit: fastai with fastrecipes': 'from fastrecipes.all import *' + FIT}
TELL = '''
import resource as _r, sys as _s, time as _t
_since = _t.perf_counter()
{code}
_took = _t.perf_counter()-_since
_now = int(open('/proc/self/statm').read().split()[1])*_r.getpagesize()/1e6
print(_took, _now, _r.getrusage(_r.RUSAGE_SELF).ru_maxrss*1024/1e6, file=_s.stderr)
'''


def measured(code: str) -> tuple[float, float, float]:
    "Seconds, megabytes resident at the end, and the most there were."
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', TELL.format(code=code)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    return tuple(map(float, done.stderr.splitlines()[-1].split()))


def spread(values, unit: str) -> str: return f'{statistics.median(values):.4g} ({min(values):.4g}–{max(values):.4g}) {unit}'


def main(rounds: int) -> str:
    everyone = IMPORTS | FITS
    for code in everyone.values(): measured(code)               # files into the cache, bytecode written
    found = {name: [] for name in everyone}
    for _ in range(rounds):
        for name, code in everyone.items(): found[name].append(measured(code))
    lines = ['| | seconds, median (range) | resident, median (range) | the most |', '|---|---:|---:|---:|']
    for name, rows in found.items():
        took, now, most = zip(*rows)
        lines.append(f'| {name} | {spread(took, "s")} | {spread(now, "MB")} | {statistics.median(most):.0f} MB |')
    def ratio(a, b, i): return statistics.median(x[i]/y[i] for x, y in zip(found[a], found[b]))
    took, held = (ratio('fastrecipes.all', 'fastai.vision.all', i) for i in (0, 1))
    lines += ['', f'fastrecipes.all takes {took:.2f} times as long to import as fastai.vision.all and {held:.2f} times the memory; '
                  f'a fit {ratio("fit: fastai with fastrecipes", "fit: fastai", 2):.2f} times the memory of one by fastai alone, at its most.']
    return '\n'.join(lines)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--write', action='store_true')
    asked = parser.parse_args()
    print(said := main(asked.rounds))
    if asked.write:
        from results import write
        write('footprint', f'## Import and memory\n\n`python bench/footprint.py --rounds {asked.rounds}`, each in a process of its own, by turns.\n\n{said}')
