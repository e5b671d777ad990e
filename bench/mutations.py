"""Break techniques one at a time, each by one line, and see which clause of the contract notices, or else which of its room's own tests.

    python bench/mutations.py [NAME …] [--quick] [--write]

Each mutant is a copy of the package with one piece of text replaced; the contract runs on it for that technique (`-k NAME`, without `to_`), and
where no clause notices the tests of its room (`tests/layers`, …): a formula is theirs to know. A function that is no technique has its room's tests alone.
A mutant that nothing notices is a hole, and the exit code says so. `--quick` asks the tests of its own module first (which must pass without it), then the
contract, stops at the first that fails and leaves out the rest of the room. `--write` puts the table into bench/RESULTS.md; of a run for some NAMEs, their rows alone."""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

from results import read, write

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = [     # technique, what is broken, file, before, after
    ('label_smoothing', 'divides by c−1 instead of c', 'losses/classification.py',
     'keepdim=True)/target.shape[-1]', 'keepdim=True)/(target.shape[-1]-1)'),
    ('class_weights', 'no normalisation: Σwl/n instead of Σwl/Σw', 'losses/classification.py',
     "'sum' else loss.sum()/w.sum()", "'sum' else loss.mean()"),
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
    ('logit_adjustment', 'τ is left out', 'training/objective.py',
     'torch.tensor(tau*np.log(p)', 'torch.tensor(np.log(p)'),
    ('cache', 'a sample of another row', 'data/cache.py',
     'np.take(self._array, self.rows[idx], 0', 'np.take(self._array, self.rows[idx]-1, 0'),
    ('cache', 'pixels of another resize are found again', 'data/cache.py',
     "{_name(t)} {plain}'", "{_name(t)}'"),
    ('cache', 'a random crop, kept for good', 'data/cache.py',
     'finish.split_idx = 1 ', 'finish.split_idx = 0 '),
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
    ('prune', 'the optimizer remembers what is masked', 'production/pruning.py',
     'grad.mul_(mask.to(grad))', 'None'),
    ('slim', 'widths are rounded down', 'production/slimming.py',
     'unit*math.ceil((each-n_pruned)/unit - .5)', 'unit*math.floor((each-n_pruned)/unit)'),
    ('slim', 'heads cut, and the scale of their queries left as it was', 'production/slimming.py',
     '*= (m.head_dim/old)**.5', '*= 1.'),
    ('slim', 'the optimizer keeps its memory of the wider layers', 'production/slimming.py',
     'if self.opt is not None: renew_optimizer(self)', 'pass'),
    ('slim', 'importance by the sum of absolute weights', 'production/slimming.py',
     'GroupMagnitudeImportance(p=2)', 'GroupMagnitudeImportance(p=1)'),
    ('slim', 'frozen layers train on', 'production/slimming.py',
     'nn.Parameter(t, requires_grad=was.requires_grad)', 'nn.Parameter(t)'),
    ('ThresholdPruning', 'what is at the threshold stays', 'production/pruning.py',
     't.abs() > self.threshold', 't.abs() >= self.threshold'),
    ('distill', 'the shares of teacher and label the wrong way round', 'production/distillation.py',
     '(1-self.alpha)*self.learn.loss_grad + self.alpha*soft', 'self.alpha*self.learn.loss_grad + (1-self.alpha)*soft'),
    ('distill', 'attention by absolute values, not squares', 'production/matching.py',
     'wide(x).square().sum(1)', 'wide(x).abs().sum(1)'),
    ('distill', 'attention summed over the pairs of layers', 'production/matching.py',
     'attention_distance(*p) for p in pairs)/len(pairs)', 'attention_distance(*p) for p in pairs)'),
    ('distill', 'the regressors step in both passes of sam', 'production/matching.py',
     'if step != self.last and', 'if'),
    ('distill', 'the regressors step in a trial fit', 'production/matching.py',
     ' and not is_trial(self.learn)', ''),
    ('distill', 'each process has regressors of its own', 'production/matching.py',
     'if distributed.is_initialized():', 'if False:'),
    ('distill', 'the regressors are judged as they are after their step', 'production/matching.py',
     'return distance(now, pairs)', 'return distance([r.clone() for r in self.regressors], pairs)'),
    ('quantize_static', 'one scale a tensor', 'production/quantization.py',
     'quant_format=QuantFormat.QDQ, per_channel=True', 'quant_format=QuantFormat.QDQ, per_channel=False'),
    ('quantize_static', 'activations in int8', 'production/quantization.py',
     'activation_type=QuantType.QUInt8', 'activation_type=QuantType.QInt8'),
    ('quantize_static', 'the normalisation of pixels in 8 bits', 'production/quantization.py',
     '[*_normalizing(model), *exclude]', '[*exclude]'),
    ('calibration_batches', 'ranges measured on varied images', 'production/quantizing.py',
     'new = in_order(dl, valid)', 'new = in_order(dl, dl)'),
    ('calibration_batches', 'the first samples, not a draw', 'production/quantizing.py',
     "stream(seed, 'calibration').permutation(len(dl.dataset))[:n].tolist()", 'list(range(len(dl.dataset)))[:n]'),
    ('qat', 'ranges move in validation', 'production/qat.py',
     'fq.enable_observer(mode)', 'fq.enable_observer(True)'),
    ('qat', 'rounds before the clip, not behind it', 'production/qat.py',
     'self._ask(_last(n), output=ACTIVATION)', 'self._ask(n, output=ACTIVATION)'),
    ('qat', 'the scales of the weights before the last step', 'production/qat.py',
     'with torch.no_grad(): net(*xb)    ', 'pass    '),
    ('qat', 'pruned weights come back', 'production/qat.py',
     'if masks := _masks(learn, net): student', 'if False: student'),
    ('equal_harm', 'a narrow layer counts as much as a wide one', 'production/sensitivity.py',
     '@ channels/channels.sum()', '@ np.ones_like(channels)/len(channels)'),
    ('equal_harm', 'a cut that does good by chance is paid for by others', 'production/sensitivity.py',
     'np.maximum.accumulate(np.concatenate([np.zeros((len(harm), 1)), np.maximum(harm, 0)], 1), 1)', 'np.concatenate([np.zeros((len(harm), 1)), np.maximum(harm, 0)], 1)'),
    ('gate', 'losses of the stages add up', 'production/gate.py',
     'if kept: self.graph, self.learn, self.quantized = candidate', 'if kept: self.predicted, self.graph, self.learn, self.quantized = predicted, candidate'),
    ('iterative_prune', 'shares of the weights that are left', 'production/iterative.py',
     'round(i*step, 6)', 'round(1-(1-step)**i, 6)'),
    ('iterative_prune', 'what is taken back leaves its momentum', 'production/iterative.py',
     'if self.learn.opt is not None: self.learn.opt.clear_state()', 'pass'),
    ('iterative_prune', 'one epoch more of patience', 'production/iterative.py',
     'self.waited >= self.patience', 'self.waited > self.patience'),
    ('picked', 'of a class with more the least probable', 'data/pseudo.py',
     'np.argsort(-confidence[kept]', 'np.argsort(confidence[kept]'),
    ('picked', 'the mean over all classes, answered or not', 'data/pseudo.py',
     'round(len(kept)/len(classes))', 'round(len(kept)/probabilities.shape[1])'),
    ('pseudo_label', 'the end of the longest pool is never drawn', 'data/pseudo.py',
     'max(-(-len(p)//s)', 'max(len(p)//s'),
    ('pseudo_label', 'a pool is gone through in the same order again', 'data/pseudo.py',
     '[rng.permutation(pool) for _ in range(-(-n//len(pool)))]', '[rng.permutation(pool)]*-(-n//len(pool))'),
    ('optimizer', 'norms and biases decay too', 'training/optimizers.py',
     "0. if name == 'wd' and not decays else self.hypers", 'self.hypers'),
    ('optimizer', 'what is drawn is not keyed', 'training/optimizers.py',
     'opt.rng = random.Random(self._key())', 'opt.rng = random.Random()'),
    ('optimizer', 'the largest rate so far is the last', 'training/optimizers.py',
     "max(pg['max_lr_snapshot'], pg['lr'])", "pg['lr']"),
    ('optimizer', 'frozen layers train on', 'training/optimizers.py',
     'self.opt.frozen_idx = frozen', 'pass'),
    ('sam', 'down instead of up', 'training/sharpness.py',
     'return [g*t*(rho/norm)', 'return [g*t*(-rho/norm)'),
    ('sam', 'adaptive: T·g instead of T²·g', 'training/sharpness.py',
     'return [g*t*(rho/norm)', 'return [g*(rho/norm)'),
    ('sam', 'batch statistics move twice', 'training/sharpness.py',
     '(*there, *get_model(learn.model).buffers())', 'there'),
    ('sam', 'the second pass mixes what the first one mixed', 'training/sharpness.py',
     'return t.clone() if isinstance(t, torch.Tensor) else t', 'return t'),
    ('ema', 'warm-up one step ahead', 'training/averaging.py',
     'ema_decay(max(self.n, 1), self.decay, self.warmup))', 'ema_decay(self.n+1, self.decay, self.warmup))'),
    ('ema', 'skipped steps count', 'training/averaging.py',
     'if not self.on or self.skipped: return', 'if not self.on: return'),
    ('ema', 'the next epoch trains the average', 'training/averaging.py',
     'def before_train(self): self._lend(False)', 'def before_train(self): self.lent = False'),
    ('ema', 'batch statistics are the last ones', 'training/averaging.py',
     'self.warmup)), buffers=True)', 'self.warmup)), buffers=False)'),
    ('swa', 'the weights at the start are left out', 'training/averaging.py',
     'self._begun(self.learn.n_iter): self._take()', 'self._begun(0): self._take()'),
    ('swa', 'batch statistics of the last weights', 'training/averaging.py',
     'if not self.fresh: self.has_bn = _restate(self.learn)', 'pass'),
    ('swa', 'all layers at the rate of the last', 'training/averaging.py',
     'self.rate*r/top if top else self.rate', 'self.rate'),
    ('swa', 'statistics drawn from the stream', 'training/averaging.py',
     "with forked('swa', age), torch.random", "with torch.random"),
    ('grad_clip', 'adaptive: the last layer is clipped too', 'training/accumulation.py',
     ' if p not in self.spared]', ']'),
    ('grad_clip', 'a gradient that is not finite is shortened', 'training/accumulation.py',
     'if not math.isfinite(size): return', 'if False: return'),
    ('grad_accum', 'a mean of means', 'training/accumulation.py',
     'self.learn.loss_grad*(own/self.unit)', 'self.learn.loss_grad'),
    ('grad_accum', 'what a dead fit accumulated goes on', 'training/accumulation.py',
     "if level == 'train': self._drop()", "pass"),
    ('progressive_resize', 'grows as if there were no last part', 'training/resizing.py',
     '/(1-finetune-delay)', '/(1-delay)'),
    ('progressive_resize', 'pixels are left out, not averaged', 'training/resizing.py',
     'antialias=True', 'antialias=False'),
    ('progressive_resize', 'masks move by half a pixel', 'training/resizing.py',
     "mode='nearest-exact'", "mode='nearest'"),
    ('progressive_resize', 'sides are rounded down', 'training/resizing.py',
     'int(share*full/multiple + .5)', 'int(share*full/multiple)'),
    ('compile', 'the trial moves batch statistics', 'training/compiling.py',
     'for b, before in buffers: b.copy_(before)', 'pass'),
    ('compile', 'the trial draws from the stream', 'training/compiling.py',
     'with torch.random.fork_rng(devices): yield', 'yield'),
    ('compile', 'the compiled call stays when a batch dies', 'training/compiling.py',
     'def abort(self, level): self._return()', 'def abort(self, level): pass'),
    ('to_channelslast', 'weights stay laid out', 'training/compiling.py',
     'def after_fit(self): self._undo()', 'def after_fit(self): pass'),
    ('to_channelslast', 'weights stay laid out when a fit dies', 'training/compiling.py',
     "if level in ('validate', 'fit'): self._undo()", "pass"),
    ('to_channelslast', 'images keep their layout', 'training/compiling.py',
     'return put(put(self, ChannelsLastFormat()), ChannelsLastImages())', 'return put(self, ChannelsLastFormat())'),
    ('freeze_bn', 'weight and bias train on', 'training/freezing.py',
     'if forced and i < opt.frozen_idx: p.requires_grad_(False)', 'pass'),
    ('freeze_bn', 'statistics follow the batch', 'training/freezing.py',
     'for m in self.still: m.eval()', 'pass'),
    ('freeze_bn', 'what was frozen stays in evaluation mode', 'training/freezing.py',
     'for m in self.still: m.train()', 'pass'),
    ('precompute', 'a sample that comes up again shows the same view', 'training/precompute.py',
     '(self.epoch + draws//n) % self.views', 'self.epoch % self.views'),
    ('precompute', 'the views are shown one epoch late', 'training/precompute.py',
     '(self.epoch + draws//n) % self.views', '(self.epoch - 1 + draws//n) % self.views'),
    ('precompute', 'the order of the first epoch, whatever was trained before', 'training/precompute.py',
     "getattr(dl, 'epoch', -1)", "-1"),
    ('precompute', 'the body stays out of the way when a batch dies', 'training/precompute.py',
     "def abort(self, level):\n        self._work_again()", "def abort(self, level):"),
    ('to_bf16', 'gradients that are left unwritten are taken', 'training/precision.py',
     'if f not in CONVOLUTIONS or not _skips(*args, **kwargs): return', 'if True: return'),
    ('to_bf16', 'a picture narrower than a 3D kernel is taken', 'training/precision.py',
     'n < s or len(size) == 3 and n < k', 'n < s'),
    ('to_bf16', 'the loss in 16 bits', 'training/precision.py',
     '        self._leave()\n        super().after_pred()', '        self._leave()'),
    ('fit_flat_cos', 'flat for the share that falls', 'training/schedules.py',
     'combined_cos(pct_start, lr', 'combined_cos(1-pct_start, lr'),
    ('fit_step', 'a milestone one batch late', 'training/schedules.py',
     'm <= pct*n_epoch + NEARLY', 'm <= pct*n_epoch - NEARLY'),
    ('fit_decay', 'inverse: ends above its last rate', 'training/schedules.py',
     'lr/(1 + (div-1)*pct)', 'lr/(1 + div*pct)'),
    ('fit_sgdr', 'each cycle as long as the first', 'training/schedules.py',
     '0.)/cycles[i])', '0.)/cycles[0])'),
    ('noise_scale', 'the mean of ratios', 'training/batch_size.py',
     'float(ratio(s.mean(), g.mean()))', 'float(ratio(s, g).mean())'),
    ('noise_scale', 'the gradient without its correction', 'training/batch_size.py',
     '(big*of_big - small*of_small)/(big-small)', 'of_big'),
    ('find_batch_size', 'the largest that fits is never tried', 'training/batch_size.py',
     'good, bad, n = 0, most+1, min(start, most)', 'good, bad, n = 0, most, min(start, most)'),
]


def caught(name: str, file: str, before: str, after: str, quick: bool) -> Counter:
    "The clauses that fail on this mutant, with the number of their tests that do; if `quick`, the first that does alone, whose name goes to stderr."
    with tempfile.TemporaryDirectory() as folder:
        for part in ('fastrecipes', 'tests'): shutil.copytree(ROOT/part, Path(folder)/part, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(ROOT/'pyproject.toml', folder)
        target = Path(folder)/'fastrecipes'/file
        text = target.read_text(encoding='utf8')
        if text.count(before) != 1: sys.exit(f'{name}: {before!r} is {text.count(before)} times in {file}: the mutant must be written anew')
        if 'GENERATOR' in after: text = text.replace('\nclass ', '\nGENERATOR = torch.Generator()\nGENERATOR.seed()\n\n\nclass ', 1)
        target.write_text(text.replace(before, after), encoding='utf8')
        own = tests_of(file)
        room = f'tests/{file.split("/")[0]}' if '/' in file else own
        clauses = 'tests/contract', '-k', f'{name.removeprefix("to_")} and not kill'
        return failed(folder, own, '-x') or failed(folder, *clauses, '-x') if quick else failed(folder, *clauses) or failed(folder, room)


def tests_of(file: str) -> str: return 'tests/' + re.sub(r'([^/]+)$', r'test_\1', file)


@cache
def check(tests: str):
    "End where `tests` fail on the package as it is: they would be said to notice anything."
    if broken := failed(str(ROOT), tests, '-x'): sys.exit(f'{", ".join(broken)}: fails by itself')


def failed(folder: str, tests: str, *more) -> Counter:
    "The files of `tests` with tests that fail, and how many; nothing where there are no such tests."
    if not (Path(folder)/tests).exists(): return Counter()
    run = subprocess.run([sys.executable, '-m', 'pytest', tests, *more, '--tb=no', '-rfE', '-p', 'no:cacheprovider', '-W', 'ignore'],
                         cwd=folder, env=os.environ | dict(PYTHONPATH=folder), capture_output=True, text=True)
    found = re.findall(r'^(?:FAILED|ERROR) tests/(?:contract/)?([\w/]+)\.py(.*)', run.stdout, re.M)
    if run.returncode not in (0, 1, 5) or run.returncode == 1 and not found: sys.exit(run.stdout[-2000:] + run.stderr[-2000:])       # 5: none is about this name
    if '-x' in more and found: print(found[0][1].removeprefix('::'), file=sys.stderr, flush=True)
    return Counter(f.replace('test_', '') for f, _ in found)


def keep(rows: dict[str, str]):
    "Write the table, in the order of `MUTANTS`."
    known = [f'| {name} | {what}' for name, what, *_ in MUTANTS]
    table = '\n'.join(['| technique | broken | caught by |', '| --- | --- | --- |', *(f'{k} | {rows[k]}' for k in known if k in rows)])
    write('mutations', '## Techniques broken on purpose\n\n`python bench/mutations.py --write`; in brackets: tests of that module that fail; '
                       f'without, by `--quick`: the first that was found.\n\n{table}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('names', nargs='*')
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--write', action='store_true')
    asked = parser.parse_args()
    missed, rows = 0, dict(re.findall(r'^(\| \w+ \| [^|]+) \| (.+ \|)$', read('mutations'), re.M))
    for name, what, *change in MUTANTS:
        if asked.names and name not in asked.names: continue
        if asked.quick: check(tests_of(change[0]))
        found = caught(name, *change, quick=asked.quick)
        missed += not found
        said, key = ', '.join(c if asked.quick else f'{c} ({n})' for c, n in sorted(found.items())) + ' |' if found else '**nothing** |', f'| {name} | {what}'
        print(key, '|', said, flush=True)
        if not (asked.quick and found and '(' in rows.get(key, '')): rows[key] = said        # a full run has told more
        if asked.write: keep(rows)
    sys.exit(missed > 0)
