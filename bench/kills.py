"""Kill a run of six techniques at random moments, run the same command again, and compare with the run that was never killed.

    python bench/kills.py [--kills 50] [--seed 0] [--write]

Each run is the command line's, `image-classifier` on a folder of digits; every third is killed a second time while it goes on. Equal means
bit for bit: parameters, optimizer, draws, records and history. `--write` puts the outcome into bench/RESULTS.md."""
import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests'/'contract')]

from kill import Zygote, kept, same                             # noqa: E402
from results import write                                       # noqa: E402

from fastrecipes.data.samples import digits                     # noqa: E402

TECHNIQUES = '--augment.flip false --label_smoothing .1 --balance upsampling --mixup .4 --cutout 8 --early_stop.patience 2'.split()
RUN = '--arch resnet10t --pretrained false --size 32 --bs 32 --epochs 3 --valid .3 --test .2 --lr .003'.split()


def main(kills: int, seed: int) -> str:
    folder, rng = Path(tempfile.mkdtemp(prefix='kills-')), random.Random(seed)
    data = digits(folder/'digits', imbalance=100)
    said = [f'fastrecipes image-classifier DIGITS {" ".join([*RUN, *TECHNIQUES])} --out RUN', '']
    tell = lambda line: (said.append(line), print(line, flush=True))

    with Zygote() as zygote:
        run = lambda name, after=None: zygote.run(['image-classifier', data, *RUN, *TECHNIQUES, '--out', folder/name], folder/f'{name}.log', after)
        code, seconds = run('whole')
        if code: sys.exit((folder/'whole.log').read_text())
        whole, equal, in_time = kept(folder/'whole'), 0, 0
        tell(f'never killed: {seconds:.1f} s; seed {seed}')
        for i in range(kills):
            moments = [rng.uniform(0, seconds) for _ in range(1 + (i % 3 == 2))]
            codes = [run(str(i), t)[0] for t in moments]
            in_time += -9 in codes
            if codes[-1]: codes.append(run(str(i))[0])          # it went on to its end, unless it was there already
            ok = codes[-1] in (0, 2) and same(whole, kept(folder/str(i)))
            equal += ok
            tell(f'{i+1:3} killed after {" and ".join(f"{t:.2f} s" for t in moments)}, exits {codes}: {"equal" if ok else "DIFFERENT"}')
            if ok: shutil.rmtree(folder/str(i))
    tell(f'{equal} of {kills} equal, {in_time} of them killed before they were done')
    if equal < kills: sys.exit(f'what differs lies in {folder}')
    shutil.rmtree(folder)
    return '\n'.join(said)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--write', action='store_true')
    asked = parser.parse_args()
    said = main(asked.kills, asked.seed)
    if asked.write: write('kills', f'## Killed and run again\n\n`python bench/kills.py --kills {asked.kills} --seed {asked.seed}`\n\n```\n{said}\n```')
