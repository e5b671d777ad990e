"""The defects of fastai 2.8.12 that are mended here, each as a function `f(here) -> (wrong, seen)`: on plain fastai, or with this package.

Our repairs patch fastai in place, so plain fastai needs a process of its own: `python tests/contract/defects.py plain` prints a JSON object,
`… here` the same with the package. Techniques and mends are loaded by the first `toy(here=True)`."""
import io
import json
import sys
import tempfile
from contextlib import redirect_stdout
from textwrap import shorten

import fastai.callback.data         # noqa: F401  weighted_dataloaders
import fastai.callback.schedule     # noqa: F401  fit_one_cycle, lr_find
import fastai.distributed           # noqa: F401  to_parallel
import torch
from fastai.basics import SGD, Callback, Categorize, CrossEntropyLossFlat, Datasets, Learner, nn, set_seed
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders, TfmdDL
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy, mae
from torch.nn import functional as F

DEFECTS = {}
SCRATCH = tempfile.TemporaryDirectory()
W = torch.tensor([5., 1., .5])


def defect(f):
    DEFECTS[f.__name__] = f
    return f


class Of:
    "Item i is `values[i]`."
    def __init__(self, values): self.values = values
    def __call__(self, i): return self.values[int(i)]


class Dies(Callback):
    "Raise `error` in batch `batch` of the training, before its step."
    order = 60
    def __init__(self, error, batch=1): self.error, self.batch = error, batch
    def before_backward(self):
        if self.learn.train_iter == self.batch: raise self.error


class Says(Callback):
    "Report `values[i]` as the metric of epoch i."
    order = 51                                  # after the Recorder wrote its row, before it is judged
    def __init__(self, values): self.values = values
    def after_epoch(self): self.learn.recorder.values[-1][2] = self.values[self.learn.epoch]


class Watch(Callback):
    "Keep what `look(learn)` gives at each `event` of the training."
    order = 65
    def __init__(self, look, at='after_loss'):
        self.look, self.seen = look, []
        setattr(self, at, self._look)
    def _look(self):
        if self.learn.training: self.seen.append(self.look(self.learn))


def samples(n=48, c=3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=g)
    return x, (x[:, :c] + torch.randn(n, c, generator=g)).argmax(1)


def scenes(n=16):
    "Pictures `(n, 1, 8, 16)` of three grey levels, and the masks `(n, 8, 16)` that they are."
    masks = torch.randint(3, (n, 8, 16), generator=torch.Generator().manual_seed(0))
    return masks[:, None].float(), masks


def toy(here, x=None, y=None, bs=8, valid=None, loss_func=None, model=None, opt_func=SGD, wgts=None, dls=None, **kwargs) -> Learner:
    "A small seeded Learner in memory on samples `x`, `y`, of which `valid` (default: the second half) are validated on."
    if here:
        from fastrecipes.technique import discover
        discover()
    if x is None: x, y = samples()
    n = len(x)//2 if valid is None else len(x)-valid
    if dls is None:
        sets = Datasets(list(range(len(x))), [[Of(x)], [Of(y if y.ndim > 1 else y.tolist()), *([Categorize()] if y.ndim == 1 else [])]],
                        splits=[list(range(n)), list(range(n, len(x)))])
        kw = dict(bs=bs, device=torch.device('cpu'), num_workers=0)
        dls = sets.dataloaders(**kw) if wgts is None else sets.weighted_dataloaders(wgts, **kw)
    torch.manual_seed(0)
    learn = Learner(dls, model or nn.Linear(4, 3), loss_func or CrossEntropyLossFlat(), opt_func=opt_func, lr=.1, metrics=accuracy if y.ndim == 1 else None,
                    path=tempfile.mkdtemp(dir=SCRATCH.name), **kwargs)
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def error(f, *args, **kwargs) -> BaseException | None:
    "What `f` raises."
    try: f(*args, **kwargs)
    except (Exception, KeyboardInterrupt) as e: return e


def said(e) -> str:
    "An exception on one line, cut short: its kind and what it says in the end."
    lines = str(e).strip().splitlines() or ['']
    return shorten(f'{type(e).__name__}: {lines[-1]}', 140, placeholder=' …')


def fill(model, value):
    with torch.no_grad():
        for p in model.parameters(): p.fill_(value)


def finite(model) -> bool: return all(bool(p.isfinite().all()) for p in model.parameters())


def first_loss(learn) -> float:
    "The training loss of the first batch."
    learn.fit(1, cbs=(watch := Watch(lambda o: o.loss_grad.item())))
    return watch.seen[0]


def refused(learn, *words) -> tuple:
    "(wrong, seen) of a fit that is to raise a ValueError with these words and leave the weights as they are."
    before = learn.model.weight.detach().clone()
    e = error(learn.fit, 2)
    right = isinstance(e, ValueError) and all(w in str(e) for w in words) and torch.equal(before, learn.model.weight)
    rows = [['none' if v is None else round(v, 3) for v in row] for row in learn.recorder.values] if not e else []
    seen = said(e) if e else f'trained, last row {rows[-1]}' if rows else 'stopped'
    return not right, seen + ('' if finite(learn.model) else '; weights NaN')


# trackers

@defect
def validate_overwrites_the_best_model(here):
    learn = toy(here, cbs=SaveModelCallback())
    learn.fit(1)
    fill(learn.model, 7.)
    learn.validate()
    saved = torch.load(learn.path/'models/model.pth')['weight']
    wrong = bool((saved == 7).all())
    return wrong, 'best model overwritten by weights of 7.0' if wrong else 'best model kept'


@defect
def the_worst_model_by_mae_is_kept_as_the_best(here):
    x, _ = samples()
    learn = toy(here, x, x[:, :3], loss_func=nn.MSELoss(), cbs=SaveModelCallback('mae'))
    learn.metrics = mae
    learn.add_cb(Says([1., 3., 2.]))
    learn.fit(3)
    best = learn.save_model.best
    return best != 1, f'of errors 1, 3 and 2 the best is {best:g}'


@defect
def a_typo_in_monitor_says_tuple_index_out_of_range(here):
    e = error(toy(here, cbs=SaveModelCallback(monitor='acuracy')).fit, 1)
    return 'accuracy' not in str(e), said(e)


@defect
def nothing_better_loads_the_model_of_an_earlier_run(here):
    x, y = samples()
    x[24:] = float('nan')                       # the loss on validation data is never a number
    learn = toy(here, x, y, cbs=SaveModelCallback())
    trained = learn.model.weight.detach().clone()
    fill(learn.model, 9.)
    learn.save('model')
    with torch.no_grad(): learn.model.weight.copy_(trained)
    learn.fit(1)
    wrong = bool((learn.model.weight == 9).all())
    return wrong, 'weights of 9.0 from another run' if wrong else 'the weights that were trained'


@defect
def start_epoch_with_a_tracker_raises_index_error(here):
    e = error(toy(here).fit, 2, start_epoch=1, cbs=[SaveModelCallback(), EarlyStoppingCallback()])
    return e is not None, said(e) if e else 'one epoch trained'


# schedules and what a fit leaves behind

@defect
def fit_flat_cos_ignores_start_epoch(here):
    learn = toy(here)
    learn.fit_flat_cos(4, start_epoch=3)
    n = len(learn.recorder.losses)
    return n != 3, f'{n} batches trained where 3 were asked for'


@defect
def one_cycle_leaves_its_momentum(here):
    learn = toy(here)
    learn.create_opt()
    learn.opt.set_hypers(mom=.5)
    learn.fit_one_cycle(2)
    mom = float(learn.opt.hypers[-1]['mom'])
    return mom != .5, f'momentum .5 before, {mom:.3g} after'


@defect
def the_wd_of_one_fit_stays_for_the_next(here):
    learn = toy(here)
    learn.fit(1)
    before = learn.opt.hypers[-1]['wd']
    learn.fit(1, wd=.3)
    after = learn.opt.hypers[-1]['wd']
    return after != before, f'wd {before} before, {after} after'


@defect
def validate_empties_the_recorder(here):
    learn = toy(here)
    learn.fit(1)
    n = len(learn.recorder.losses)
    learn.validate()
    learn.get_preds()
    after = len(learn.recorder.losses)
    return after != n, f'{n} losses before, {after} after'


@defect
def ctrl_c_in_lr_find_leaves_the_weights_of_the_trial(here):
    learn = toy(here, cbs=Dies(KeyboardInterrupt('Ctrl-C'), 90))
    before = learn.model.weight.detach().clone()
    error(learn.lr_find, show_plot=False)
    off = (learn.model.weight-before).abs().max().item()
    return off != 0 or any(learn.path.glob('models/*')), f'weights off by {off:.2g}'


@defect
def a_nan_in_lr_find_raises_about_an_index(here):
    x, y = samples()
    e = error(toy(here, x*float('nan'), y).lr_find, show_plot=False)
    return not isinstance(e, ValueError), said(e)


@defect
def an_exception_under_mixup_leaves_its_loss(here):
    left = []
    for mix in (lambda o: o.add_cb(MixUp()), *([lambda o: o.mixup()] if here else [])):
        learn = mix(toy(here))
        own = learn.loss_func
        error(learn.fit, 1, cbs=Dies(RuntimeError('dies')))
        if learn.loss_func is not own: left.append(f'loss_func is {learn.loss_func.__qualname__}')
        if e := error(learn.fit, 1): left.append(f'the next fit raises {said(e)}')
    return bool(left), '; '.join(left) or 'the loss is the own one, the next fit trains'


@defect
def an_exception_leaves_the_model_wrapped_by_to_parallel(here):
    learn = toy(here)
    learn.to_parallel(*([[0, 1]] if here else []))      # on one device ours has nothing to do
    error(learn.fit, 1, cbs=Dies(RuntimeError('dies')))
    name = type(learn.model).__name__
    return name != 'Linear', f'model is {name}'


@defect
def an_exception_without_a_message_becomes_an_index_error(here):
    e = error(toy(here, cbs=Dies(NotImplementedError())).fit, 1)
    return not isinstance(e, NotImplementedError), said(e)


@defect
def a_failed_export_empties_the_learner(here):
    learn = toy(here)
    learn.fit(1)
    opt, learn.unpicklable = learn.opt, (i for i in range(3))
    e = error(learn.export)
    wrong = not (e and len(learn.dls.train.dataset) == 24 and learn.opt is opt)
    del learn.unpicklable
    learn.fit(1)
    return wrong, f'{type(e).__name__}; then {len(learn.dls.train.dataset)} training samples, {len(learn.recorder.losses)} batches in the next fit'


@defect
def a_learner_that_writes_a_log_cannot_be_exported(here):
    learn = toy(here, cbs=CSVLogger())
    learn.fit(1)
    e = error(learn.export)
    return e is not None, said(e) if e else f'{(learn.path/"export.pkl").stat().st_size:,} bytes'


# losses

@defect
def plain_cross_entropy_predicts_logits(here):
    seen = []
    for loss in (nn.CrossEntropyLoss(), F.cross_entropy):
        learn = toy(here, loss_func=loss)
        sums = learn.get_preds()[0].sum(1)
        label = learn.predict(0)[0]
        seen.append((sums.min().item(), str(label)))
    wrong = any(abs(s-1) > 1e-5 or label not in '012' for s, label in seen)
    return wrong, f'probabilities sum to {seen[0][0]:.2f}, predict gives {seen[0][1]}'


@defect
def weighted_validation_loss_depends_on_the_batch_size(here):
    losses = [toy(here, bs=bs, loss_func=CrossEntropyLossFlat(weight=W)).validate()[0] for bs in (24, 7, 2)]
    return max(losses)-min(losses) > 1e-5, ', '.join(f'{v:.4f} at bs={bs}' for v, bs in zip(losses, (24, 7, 2)))


@defect
def mixup_makes_the_loss_follow_the_scale_of_class_weights(here):
    def loss(weight):
        learn = toy(here, bs=24, loss_func=CrossEntropyLossFlat(weight=weight))
        if here: learn.mixup()
        else: learn.add_cb(MixUp())
        return first_loss(learn)
    ratio = loss(W/100)/loss(W)
    return abs(ratio-1) > 1e-4, f'loss times {ratio:.3g} for weights times 0.01'


@defect
def smoothing_weighs_only_the_right_class(here):
    pred = toy(here, bs=24).get_preds(ds_idx=0, act=lambda o: o, reorder=False)
    expected = F.cross_entropy(*pred, W, label_smoothing=.1).item()
    if here: got = first_loss(toy(here, bs=24, loss_func=CrossEntropyLossFlat(weight=W)).class_weights(W.tolist()).label_smoothing(.1))
    else: got = first_loss(toy(here, bs=24, loss_func=LabelSmoothingCrossEntropyFlat(.1, weight=W)))
    return abs(got/expected-1) > 1e-5, f'{got:.4f}; torch {expected:.4f}'


@defect
def smoothing_counts_targets_that_are_ignored(here):
    x, masks = scenes()
    x[:, :, :2], masks[:, :2] = 20., -100
    model = nn.Conv2d(1, 3, 1)
    expected = F.cross_entropy(model(x[:8]), masks[:8], label_smoothing=.1).item()
    if here: got = first_loss(toy(here, x, masks, model=model, loss_func=CrossEntropyLossFlat(axis=1)).label_smoothing(.1))
    else: got = first_loss(toy(here, x, masks, model=model, loss_func=LabelSmoothingCrossEntropyFlat(.1, axis=1)))
    return abs(got/expected-1) > 1e-5, f'{got:.4f}; torch {expected:.4f}'


@defect
def smoothing_of_masks_takes_probabilities_over_the_width(here):
    learn = toy(here, *scenes(), model=nn.Conv2d(1, 3, 1), loss_func=LabelSmoothingCrossEntropyFlat(axis=1))
    p, masks, decoded = learn.get_preds(with_decoded=True)
    off = (p.sum(1)-1).abs().max().item()
    return off > 1e-5 or decoded.shape != masks.shape, f'probabilities of a pixel sum to 1±{off:.2g}; a mask {tuple(masks.shape[1:])} is decoded as {tuple(decoded.shape[1:])}'


# data

@defect
def cutmix_pastes_the_picture_and_not_the_mask(here):
    learn = toy(here, *scenes(), model=nn.Conv2d(1, 3, 1), loss_func=CrossEntropyLossFlat(axis=1))
    if here: learn.cutmix()
    else: learn.add_cb(CutMix())
    learn.fit(1, cbs=(watch := Watch(lambda o: (o.xb[0][:, 0] != o.yb[0]).float().mean().item())))
    return watch.seen[0] > 0, f'{watch.seen[0]:.0%} of the pixels beside their mask'


@defect
def cutmix_writes_into_the_dataset(here):
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 3
    before = x.clone()
    def sliced(batch): return x[batch[0]:batch[-1]+1], y[batch[0]:batch[-1]+1]      # views, as loaders of whole tensors yield
    dls = DataLoaders(*[TfmdDL(list(range(16)), bs=8, create_batch=sliced, num_workers=0) for _ in range(2)], device=torch.device('cpu'))
    learn = toy(here, x, y, dls=dls, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    if here: learn.cutmix()
    else: learn.add_cb(CutMix())
    learn.fit(1)
    changed = (x != before).float().mean().item()
    return changed > 0, f'{changed:.0%} of the pixels of the dataset overwritten'


def classes_of(dl) -> set: return {int(v) for *_, y in dl for v in y}


@defect
def a_new_loader_forgets_the_sampling_weights(here):
    x, y = samples()
    learn = toy(here, x, y, wgts=None if here else (y[:24] == 0).float().numpy())
    if here: learn.balance('weighted', [1, 0, 0])
    drawn = classes_of(learn.dls.train), classes_of(learn.dls.train.new())
    return drawn[1] != {0}, f'classes {drawn[0]} by the loader, {drawn[1]} by a new one'


@defect
def sampling_weights_may_be_too_many(here):
    y = samples()[1]
    if here: e = error(toy(here).balance, 'weighted', [1, 1, 1, 1])
    else: e = error(DataBlock((None, CategoryBlock), get_y=Of(y.tolist())).weighted_dataloaders, list(range(48)), [1.]*60, num_workers=0)
    return not isinstance(e, ValueError), said(e) if e else 'taken'


@defect
def tta_of_weighted_training_data_is_out_of_order(here):
    x, y = samples()
    learn = toy(here, x, y, wgts=None if here else (1+9*(y[:24] == 0)).float().numpy())
    if here: learn.balance('weighted', [10, 1, 1])
    _, targets = learn.tta(ds_idx=0, n=1, **(dict(batch_tfms=[]) if here else {}))     # ours asks what is to vary
    n = int((targets != y[:24]).sum()) if len(targets) == 24 else 24
    return n > 0, f'{n} of 24 targets are those of another sample'


@defect
def a_seed_set_after_the_loaders_changes_nothing(here):
    def run():
        learn = toy(here)
        set_seed(1)
        if here: learn.mixup()
        with torch.no_grad(): learn.model.weight.fill_(.1), learn.model.bias.zero_()
        learn.fit(1)
        return learn.model.weight.detach().clone()
    off = (run()-run()).abs().max().item()
    return off > 0, f'weights of two runs of one seed differ by {off:.2g}'


# what nothing warns of

@defect
def a_batch_larger_than_the_data_trains_nothing(here):
    learn = toy(here, bs=64)
    if here: learn.label_smoothing()
    return refused(learn, 'bs')


@defect
def a_single_class_trains_to_an_accuracy_of_1(here):
    x, y = samples()
    learn = toy(here, x, y*0, model=nn.Linear(4, 1))
    if here: learn.label_smoothing()
    return refused(learn, 'class')


@defect
def an_empty_validation_set_reports_none(here):
    learn = toy(here, valid=0)
    if here: learn.label_smoothing()
    return refused(learn, 'valid')


def with_nan(here, **kwargs) -> Learner:
    "A Learner with a sample that is not a number."
    x, y = samples()
    x[3] = float('nan')
    learn = toy(here, x, y, bs=24, **kwargs)
    return learn.label_smoothing() if here else learn


@defect
def a_loss_that_is_nan_trains_on(here): return refused(with_nan(here), 'batch 0', 'sample 3')


@defect
def terminate_on_nan_stops_after_the_weights_are_nan(here): return refused(with_nan(here, cbs=TerminateOnNaNCallback()), 'batch 0', 'sample 3')


# gradients

@defect
def sixteen_bits_on_a_cpu_are_thirty_two(here):
    learn = toy(here).to_bf16()
    types = []
    learn.model.register_forward_hook(lambda m, i, o: types.append(o.dtype) if m.training else None)
    learn.fit(1)
    return types[0] != torch.bfloat16, f'forward pass in {types[0]}'


def accumulating(here, n, bs, **kwargs):
    "A Learner that takes a step every `n` batches of `bs`."
    learn = toy(here, bs=bs, **kwargs)
    return learn.grad_accum(n) if here else learn.add_cb(GradientAccumulation(n*bs))


@defect
def gradient_accumulation_keeps_the_last_batches_for_the_next_fit(here):
    learn = accumulating(here, 2, 8)            # three batches an epoch
    learn.fit(1, cbs=(steps := Watch(lambda o: 1, 'after_step')))
    left = any(p.grad is not None and bool(p.grad.any()) for p in learn.model.parameters())
    return left, f'{len(steps.seen)} steps for 3 batches, ' + ('a gradient left over' if left else 'no gradient left over')


@defect
def gradient_accumulation_counts_samples_not_batches(here):
    learn = toy(here)
    if here: learn.grad_accum(3)
    else: learn.add_cb(GradientAccumulation(3))
    learn.fit(1, cbs=(steps := Watch(lambda o: 1, 'after_step')))
    return len(steps.seen) != 1, f'n=3: {len(steps.seen)} steps for 3 batches'


@defect
def accumulated_class_weights_give_another_gradient(here):
    weights = dict(loss_func=CrossEntropyLossFlat(weight=W))
    def step(learn):
        before = learn.model.weight.detach().clone()
        learn.fit(1)
        return learn.model.weight.detach()-before
    whole, parts = step(toy(here, bs=24, **weights)), step(accumulating(here, 3, 8, **weights))
    off = ((whole-parts).norm()/whole.norm()).item()
    return off > 1e-4, f'the gradient of one big batch off by {off:.1%}'


if __name__ == '__main__':
    here = sys.argv[1:] == ['here']
    with redirect_stdout(io.StringIO()): found = {name: f(here) for name, f in DEFECTS.items()}
    if not here and any(m.startswith('fastrecipes') for m in sys.modules): sys.exit('fastrecipes was imported: this is not plain fastai')
    print(json.dumps(found))
