"""Break techniques one at a time, each by one line, and see which clause of the contract notices, or else which of its room's own tests.

    python bench/mutations.py [NAME …] [--write]

Each mutant is a copy of the package with one piece of text replaced; the contract runs on it for that technique (`-k NAME`, without `to_`), and
where no clause notices the tests of its room (`tests/layers`, …): a formula is theirs to know. A mutant that nothing notices is a hole, and the
exit code says so. `--write` puts the table into bench/RESULTS.md; of a run for some NAMEs, their rows alone."""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from results import read, write

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
    ('activation', 'nothing is exchanged', 'layers/activations.py',
     'operate(self, {m: cls() for m in old}', 'operate(self, {}'),
    ('norm', 'the weights that the old norms learned are lost', 'layers/normalization.py',
     'getattr(inner, name).data = old.detach().clone()', 'pass'),
    ('coordconv', 'the weights of the new channels are not 0', 'layers/coordconv.py',
     'w.new_zeros(', 'w.new_ones('),
    ('self_attention', 'drawn from the stream, not by the seed', 'layers/attention.py',
     "with seeded(self, 'self_attention', c): new", "new"),
    ('initialize', 'what the optimizer remembers stays', 'layers/init.py',
     'self.opt.clear_state()', 'None'),
    ('dropout', 'no draw of its own for each sample', 'layers/dropping.py',
     'return torch.from_numpy(own).long().repeat(n//len(own)) + copies*2**40', 'return torch.zeros(n, dtype=torch.long)'),
    ('dropout', 'what is left is not scaled', 'layers/dropping.py',
     'else x*(keep.to(x.dtype)/(1-self.p))', 'else x*keep.to(x.dtype)'),
    ('dropconnect', 'other weights in each process', 'layers/dropping.py',
     "'dropconnect', i, *cb.step[:2])", "'dropconnect', i, *cb.step)"),
    ('dropconnect', 'the whole weights are not put back', 'layers/dropping.py',
     "if m in self.lent: m._parameters['weight'] = self.lent.pop(m)", "self.lent.pop(m, None)"),
    ('stochastic_depth', 'every block at the rate of the last', 'layers/dropping.py',
     'self.p*i/len(ends)', 'self.p'),
    ('loss', 'γ is 0', 'losses/classification.py',
     '**gamma       #', '**0       #'),
    ('weight_decay', 'the rate is left out', 'layers/regularization.py',
     "p.mul_(1 - h['lr']*wd)", "p.mul_(1 - wd)"),
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
        return failed(folder, 'tests/contract', '-k', f'{name.removeprefix("to_")} and not kill') or failed(folder, f'tests/{file.split("/")[0].removesuffix(".py")}')


def failed(folder: str, tests: str, *more) -> Counter:
    "The files of `tests` with tests that fail, and how many; nothing where there are no such tests."
    if not (Path(folder)/tests).exists(): return Counter()
    run = subprocess.run([sys.executable, '-m', 'pytest', tests, *more, '--tb=no', '-rfE', '-p', 'no:cacheprovider', '-W', 'ignore'],
                         cwd=folder, env=os.environ | dict(PYTHONPATH=folder), capture_output=True, text=True)
    found = re.findall(r'^(?:FAILED|ERROR) tests/(?:contract/)?([\w/]+)\.py', run.stdout, re.M)
    if run.returncode not in (0, 1) or run.returncode and not found: sys.exit(run.stdout[-2000:] + run.stderr[-2000:])
    return Counter(f.replace('test_', '') for f in found)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('names', nargs='*')
    parser.add_argument('--write', action='store_true')
    asked = parser.parse_args()
    missed, rows = 0, dict(re.findall(r'^(\| \w+ \| [^|]+) \| (.+ \|)$', read('mutations'), re.M))
    for name, what, *change in MUTANTS:
        if asked.names and name not in asked.names: continue
        found = caught(name, *change)
        missed += not found
        rows[f'| {name} | {what}'] = ", ".join(f"{c} ({n})" for c, n in sorted(found.items())) + ' |' if found else '**nothing** |'
        print(f'| {name} | {what}', '|', rows[f'| {name} | {what}'], flush=True)
    known = [f'| {name} | {what}' for name, what, *_ in MUTANTS]
    table = '\n'.join(['| technique | broken | caught by |', '| --- | --- | --- |', *(f'{k} | {rows[k]}' for k in known if k in rows)])
    if asked.write: write('mutations', f'## Techniques broken on purpose\n\n`python bench/mutations.py --write`; in brackets: tests of that module that fail.\n\n{table}')
    sys.exit(missed > 0)
