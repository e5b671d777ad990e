"""Break techniques one at a time, each by one line, and see which clause of the contract notices.

    python bench/mutations.py [NAME …] [--write]

Each mutant is a copy of the package with one piece of text replaced; the contract runs on it for that technique (`-k NAME`, without `to_`). A mutant that no
clause notices is a hole in the contract, and the exit code says so. `--write` puts the table into bench/RESULTS.md."""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from results import write

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = [     # technique, what is broken, file, before, after
    ('label_smoothing', 'divides by c−1 instead of c', 'losses/classification.py',
     'keepdim=True)/target.shape[-1]', 'keepdim=True)/(target.shape[-1]-1)'),
    ('class_weights', 'no normalisation: Σwl/n instead of Σwl/Σw', 'losses/classification.py',
     'loss.sum()/(w*target).sum()', 'loss.sum()/target.sum()'),
    ('mixup', 'the shares the wrong way round', 'data/mixing.py',
     'return torch.lerp(x[partner], x, share', 'return torch.lerp(x, x[partner], share'),
    ('cutmix', 'what the border cuts off is not counted', 'data/mixing.py',
     'share = 1-box.float().mean((1, 2))', 'share = lam'),
    ('cutout', 'a dropped seed', 'data/erasing.py',
     'keyed(self.learn).per_sample', 'lambda n, *_: torch.rand(n, generator=GENERATOR)'),
    ('balance', 'a dropped seed', 'data/keyed.py',
     'self.sampler.draw(rng)', 'self.sampler.draw(np.random.default_rng())'),
    ('augment', 'validation images are varied too', 'data/transforms.py',
     'for t in tfms: own.add(t)', 'for t in tfms:\n        learn.dls.valid.after_batch.add(t)\n        own.add(t)'),
    ('logit_adjustment', 'a sign', 'objective.py',
     'logits + self.adjustment', 'logits - self.adjustment'),
    ('cache', 'a sample of another row', 'data/cache.py',
     'self._array[self.rows[idx]]', 'self._array[self.rows[idx]-1]'),
    ('prune', 'the mask is not applied after a step', 'production/pruning.py',
     'def after_step(self): self.apply()', 'def after_step(self): pass'),
    ('distill', 'T² left out', 'production/distillation.py',
     'return T*T*F.kl_div', 'return F.kl_div'),
    ('weight_penalty', 'a sign', 'layers/regularization.py',
     'self.learn.loss_grad = self.learn.loss_grad + penalty', 'self.learn.loss_grad = self.learn.loss_grad - penalty'),
    ('grad_accum', 'the last batches of an epoch are never stepped', 'training/accumulation.py',
     ' and self.learn.iter < self.learn.n_iter-1', ''),
    ('grad_clip', 'clips before the gradient is accumulated', 'training/accumulation.py',
     'order, run_valid = MixedPrecision.order+1, False            #', 'order, run_valid = GradientAccumulation.order-1, False            #'),
    ('early_stop', 'the best weights are not copied, and train on', 'training/stopping.py',
     'v.detach().clone() for k, v', 'v.detach() for k, v'),
    ('to_bf16', 'autocast stays on when a batch dies', 'training/precision.py',
     'def abort(self, level): self._leave()', 'def abort(self, level): pass'),
    ('to_distributed', 'the last validation batch keeps its repeated sample', 'training/distributed.py',
     'return torch.cat(parts)[:n]', 'return torch.cat(parts)'),
]


def caught(name: str, file: str, before: str, after: str) -> Counter:
    "The clauses that fail on this mutant, with the number of their tests that do."
    with tempfile.TemporaryDirectory() as folder:
        for part in ('fastrecipes', 'tests'): shutil.copytree(ROOT/part, Path(folder)/part, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(ROOT/'pyproject.toml', folder)
        target = Path(folder)/'fastrecipes'/file
        text = target.read_text(encoding='utf8')
        if text.count(before) != 1: sys.exit(f'{name}: {before!r} is {text.count(before)} times in {file}: the mutant must be written anew')
        if 'GENERATOR' in after: text = text.replace('\nclass ', '\nGENERATOR = torch.Generator()\nGENERATOR.seed()\n\n\nclass ', 1)
        target.write_text(text.replace(before, after), encoding='utf8')
        run = subprocess.run([sys.executable, '-m', 'pytest', 'tests/contract', '-k', f'{name.removeprefix("to_")} and not kill', '--tb=no', '-rfE', '-p', 'no:cacheprovider', '-W', 'ignore'],
                             cwd=folder, env=os.environ | dict(PYTHONPATH=folder), capture_output=True, text=True)
    failed = re.findall(r'^(?:FAILED|ERROR) tests/contract/test_(\w+)\.py', run.stdout, re.M)
    if run.returncode not in (0, 1) or run.returncode and not failed: sys.exit(run.stdout[-2000:] + run.stderr[-2000:])
    return Counter(failed)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('names', nargs='*')
    parser.add_argument('--write', action='store_true')
    asked = parser.parse_args()
    rows, missed = ['| technique | broken | caught by |', '| --- | --- | --- |'], 0
    for name, what, *change in MUTANTS:
        if asked.names and name not in asked.names: continue
        clauses = caught(name, *change)
        missed += not clauses
        rows.append(f'| {name} | {what} | {", ".join(f"{c} ({n})" for c, n in sorted(clauses.items())) or "**nothing**"} |')
        print(rows[-1], flush=True)
    if asked.write: write('mutations', '## Techniques broken on purpose\n\n`python bench/mutations.py --write`; in brackets: tests of that module that fail.\n\n' + '\n'.join(rows))
    sys.exit(missed > 0)
