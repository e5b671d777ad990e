"Flat minima: a step that looks at the loss around the weights, not at the weights alone."
import torch
from fastai.basics import CancelBackwardException, Learner, apply, get_model, nn

from fastrecipes.data.augmix import AugMix
from fastrecipes.data.keyed import keyed
from fastrecipes.errors import BadValue
from fastrecipes.technique import TechniqueCallback, put, say, technique

__all__ = ['SAM', 'ascent']

ETA = .01           # what ASAM's authors add to |w|, so that a weight of 0 can move


def ascent(grads: list[torch.Tensor], rho: float, scales: list) -> list[torch.Tensor] | None:
    """The step that raises the loss most, ρ·T²g/‖T·g‖ for gradients g and scales T (tensors or numbers); None where g is 0 or not finite.

    T = 1 is SAM: a step of length ρ. T = |w| is ASAM: two networks that answer the same, one with its weights scaled, are equally sharp."""
    tilted = [g*t for g, t in zip(grads, scales)]
    norm = nn.utils.get_total_norm(tilted)
    return [g*t*(rho/norm) for g, t in zip(tilted, scales)] if norm.isfinite() and norm > 0 else None


class SAM(TechniqueCallback):
    """Before a step move the weights to where the loss is worst near by, take the batch through all its events once more, and move them back: `.grad` is the gradient from there.

    What is drawn is keyed to the batch, so that mixing and dropout come out as they did. Predictions and losses that others read stay those
    at the weights themselves, and buffers, such as running statistics, those of one pass."""
    order, run_valid = -20, False               # ahead of all others: before anyone changes a batch, or scales, masks, clips or judges the gradient of a step
    transient = ('batch', 'views', 'kept', 'again')

    def __init__(self, rho: float, adaptive: bool):
        self.rho, self.adaptive, self.batch, self.views, self.kept, self.again = rho, adaptive, None, [], [], False
        self._reset()

    def _reset(self): self.steps, self.rise = 0, 0.

    def before_train(self): self._reset()

    def before_batch(self):
        if self.again or not self.learn.training: return
        self.batch = apply(_copied, (self.learn.xb, self.learn.yb))    # fastai's CutMix writes into it
        self.views = [(cb.views, cb.views.kept) for cb in self.learn.cbs if isinstance(cb, AugMix)]         # taken once from where the loader left them

    def before_step(self):
        if (there := self._there()) is None: return             # flat, or a scaled gradient that overflowed: its step is skipped
        learn = self.learn
        seen = {n: getattr(learn, n) for n in ('xb', 'yb', 'pred', 'loss', 'loss_grad')}
        self.kept = [(t, t.detach().clone()) for t in (*there, *get_model(learn.model).buffers())]
        with torch.no_grad():
            for p, e in there.items(): p.add_(e)
        learn.opt.zero_grad()
        self.again = True
        self._pass()
        self.rise = self.rise + (learn.loss.detach() - seen['loss'].detach()).float()
        self.steps += 1
        self._back()
        for n, v in seen.items(): setattr(learn, n, v)

    def _there(self) -> dict | None:
        "Weight → the way it goes."
        learn, matrices = self.learn, set()
        for cb in learn.cbs:
            if vars(cb).get('masks'): cb.before_step()     # `Prune` and its like: what is masked stays at 0, and has no say in the norm
        if self.adaptive: matrices = {p for n, p in get_model(learn.model).named_parameters() if 'weight' in n.rpartition('.')[2]}
        ps = [p for p, *_ in learn.opt.all_params(with_grad=True)]
        found = ascent([p.grad.detach() for p in ps], self.rho, [p.detach().abs() + ETA if p in matrices else 1. for p in ps])
        return found and dict(zip(ps, found))  # pyright: ignore[reportReturnType]

    def _pass(self):
        "What a Learner does with a batch, up to its step."
        learn = self.learn
        learn.xb, learn.yb = self.batch         # pyright: ignore[reportGeneralTypeIssues]
        for holder, views in self.views: holder.kept = views
        learn('before_batch')
        learn.pred = learn.model(*learn.xb)
        learn('after_pred')
        learn.loss_grad = learn.loss_func(learn.pred, *learn.yb)
        learn.loss = learn.loss_grad.clone()
        learn('after_loss')
        learn._with_events(learn._backward, 'backward', CancelBackwardException)

    def _back(self):
        with torch.no_grad():
            for t, before in self.kept: t.copy_(before)
        self.batch, self.views, self.kept, self.again = None, [], [], False

    def after_batch(self): self._back()                         # also where the second pass was cancelled
    def abort(self, level): self._back()

    def after_train(self):
        if not self.steps: return                               # at the bottom of something flat
        away = f'{self.rho:g}{", by the size of each weight," if self.adaptive else ""} away'
        say(self.learn, 'sam', f'{self.steps} steps by the gradient {away}, where the loss was {float(self.rise)/self.steps:.3g} higher on average')


def _copied(t): return t.clone() if isinstance(t, torch.Tensor) else t


@technique('train', section=('Training', 'Regularization'), source='arXiv:2010.01412', touches=('gradient',),
           refuses={'grad_accum': 'where sam takes its gradient depends on that of the whole step, which accumulation has only when the first batches are gone; take a larger bs'},
           formula=r'g = \nabla L\left(w + \rho\,\frac{\nabla L(w)}{\|\nabla L(w)\|}\right)')
def sam(self: Learner, rho: float = .05, adaptive: bool = False) -> Learner:
    """Take each step by the gradient from where the loss is worst within `rho` of the weights: it leads to flat minima, which generalise better.

    `rho` > 0: how far to look, the Euclidean length over all weights together: .05 to .2. `adaptive` (ASAM, arXiv:2102.11600) measures each weight by
    its own size, so that the scale of layers does not matter: take a rho ten times as large. Each batch goes forward and back twice, so an
    epoch takes about twice the time. Both passes have the same mixing and dropout; reported losses are those at the weights; batch statistics
    are updated once; pruned weights stay 0. Raises `ValueError` unless rho > 0."""
    if not 0 < rho < float('inf'): raise BadValue(f'sam: rho must be > 0, got {rho}')
    keyed(self)                                 # the second pass draws what the first one drew
    say(self, 'sam', f'each step by the gradient {rho:g} away: two passes a batch')
    return put(self, SAM(rho, adaptive))
