"Maps of hidden layers as a second lesson of a teacher: where it looks, and what it sees there."
from functools import partial
from types import SimpleNamespace

import torch
from fastai.basics import Learner, get_model, nn
from torch import distributed
from torch.nn import functional as F
from torch.optim.adam import adam

from fastrecipes.data.keyed import keyed
from fastrecipes.errors import BadValue, few, nearest
from fastrecipes.layers.surgery import trace
from fastrecipes.losses.base import wide
from fastrecipes.objective import Objective
from fastrecipes.randomness import forked
from fastrecipes.repairs import is_trial
from fastrecipes.technique import TechniqueCallback

__all__ = ['Match', 'attention_distance', 'attention_map', 'hint_distance', 'layer_pairs', 'maps_of']

RATE = 1e-2         # of the regressors' Adam: a least-squares fit of one layer, whatever the network's own rate and optimizer


def attention_map(x: torch.Tensor) -> torch.Tensor:
    "Where the maps `x` `(n, c, h, w)` are strong: their squares summed over channels, a vector of length 1 for each sample `(n, h·w)`. arXiv:1612.03928"
    return F.normalize(wide(x).square().sum(1).flatten(1), dim=1)


def attention_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    "The squared distance of two `attention_map`s, the mean over samples: 0 (they look at the same) to 2; channels may differ in number, and the larger maps are averaged down."
    a, b = map(attention_map, _aligned(student, teacher))
    return (a-b).square().sum(1).mean()


def hint_distance(student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Mean squared error of `teacher` `(n, t, h, w)` as a 1×1 convolution, `weight` `(t, s)` and `bias` `(t,)`, makes it of `student` `(n, s, h, w)`.

    The larger maps are averaged down. arXiv:1412.6550"""
    a, b = _aligned(student, teacher)
    return F.mse_loss(F.conv2d(a, weight[:, :, None, None], bias), b)


def _aligned(a, b) -> list[torch.Tensor]:
    "Both at the smaller of their heights and widths."
    size = tuple(map(min, a.shape[-2:], b.shape[-2:]))
    return [x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in map(wide, (a, b))]


def maps_of(net: nn.Module, dls) -> dict[str, tuple]:
    "The layers of `net` that give maps of more than one pixel for a sample of `dls`, in the order in which they end: name → (channels, height, width)."
    seen = trace(SimpleNamespace(model=net, dls=dls), 'distill').hidden.values()
    return {c.name: c.gives[1:] for c in seen if c.name and len(c.gives) == 4 and c.gives[2]*c.gives[3] > 1}


def layer_pairs(student: dict[str, tuple], teacher: dict[str, tuple], named: dict[str, str] | None = None) -> list[tuple[str, str]]:
    """Which layer of the student learns from which of the teacher, both as `maps_of` gives them: those `named`, else the last at each size that both have.

    A name may lack what stands before it: 'layer3' for '0.model.layer3'. Raises `ValueError` for one that is not there, or that several have, and where no size is common."""
    if named is not None:
        if not named: raise BadValue("distill: layers must name at least one pair, {'layer3': 'layer4'}, got {}")
        return [(_known('student', a, student), _known('teacher', b, teacher)) for a, b in named.items()]
    ours, theirs = ({shape[1:]: name for name, shape in maps.items()} for maps in (student, teacher))
    if not (common := [size for size in ours if size in theirs]):
        raise BadValue(f"distill: no layer of the student ({_sizes(ours)}) gives maps as large as one of the teacher's ({_sizes(theirs)}); name pairs, layers={{'student': 'teacher'}}")
    return [(ours[size], theirs[size]) for size in common]


def _sizes(sizes) -> str: return few([f'{h}×{w}' for h, w in sizes]) or 'none at all'


def _known(who: str, name: str, maps: dict[str, tuple]) -> str:
    if name in maps: return name
    if len(same := [n for n in maps if n.endswith(f'.{name}')]) == 1: return same[0]
    if same: raise BadValue(f'distill: layers: the {who} has several layers {name!r}: {few(same)}; write one of them out')
    parts = {'.'.join(p[i:]) for n in maps for p in (n.split('.'),) for i in range(len(p))}
    raise BadValue(f'distill: layers: no layer {name!r} that gives maps in the {who}{nearest(name, sorted(parts)) or ";"} it has {few(maps, 12) or "none"}')


class Match(TechniqueCallback):
    """Add to the loss that is differentiated how far the maps of pairs of layers are apart; layers have hooks from before the forward pass to the teacher's answer.

    `hints` and `attention` weigh the two distances, each the mean over the pairs. The regressors of `hints` live here, as plain tensors: a step
    of Adam in each batch, by the gradient at the weights that the student is judged with, as if they were part of the network. So neither
    network, optimizer nor what is exported knows them, and a checkpoint has them."""
    order, run_valid = Objective.order+.6, False        # after the teacher's answer and what is blended with it

    def __init__(self, teacher: nn.Module, pairs: list[tuple[str, str]], hints: float, attention: float, regressors: list[torch.Tensor]):
        self.teacher, self.pairs, self.hints, self.attention, self.regressors = teacher, pairs, hints, attention, regressors
        self.moments = [[torch.zeros_like(r) for r in regressors] for _ in range(2)]
        self.steps, self.last = [torch.zeros(()) for _ in regressors], None     # `last`: the batch of their last step, for sam passes each twice
        self.handles, self.maps = [], {}

    def before_batch(self):
        if not self.learn.training or not len(self.learn.yb): return
        self._forget()
        for i, names in enumerate(self.pairs):
            for net, name in zip((get_model(self.learn.model), self.teacher), names):
                try: layer = net.get_submodule(name)
                except AttributeError: raise BadValue(f'distill: the layer {name} is not there any more; call distill after what changes the network') from None
                self.handles.append(layer.register_forward_hook(partial(self._keep, (i, net is self.teacher))))

    def _keep(self, key, layer, args, out):
        self.maps.setdefault(key, out)                  # the first: further views of a batch go through the network later

    def after_pred(self): self._unhook()

    def after_loss(self):
        if not self.maps: return
        pairs, n = [(self.maps.get((i, False)), self.maps.get((i, True))) for i in range(len(self.pairs))], len(self.learn.pred)
        for names, pair in zip(self.pairs, pairs):
            for name, x in zip(names, pair):
                if not isinstance(x, torch.Tensor) or x.ndim != 4 or len(x) != n:
                    raise BadValue(f'distill: features and attention need the maps of a whole batch, and {name} gave {tuple(x.shape) if isinstance(x, torch.Tensor) else "none"}; '
                                   'over several devices take to_distributed, not to_parallel')
        self._forget()
        loss = self.learn.loss_grad
        with torch.autocast(loss.device.type, enabled=False):
            if self.attention: loss = loss + self.attention*sum(attention_distance(*p) for p in pairs)/len(pairs)
            if self.hints: loss = loss + self.hints*self._hinted(pairs)
        self.learn.loss_grad, self.learn.loss = loss, loss.detach().clone()

    def _hinted(self, pairs) -> torch.Tensor:
        "How far what the regressors make of the student's maps is from the teacher's, for the student to learn from; they make their own step."
        def distance(rs, pairs): return sum(hint_distance(s, t, *rs[2*i:2*i+2]) for i, (s, t) in enumerate(pairs))/len(pairs)
        self.regressors, *self.moments = ([t.to(self.learn.pred.device) for t in ts] for ts in (self.regressors, *self.moments))
        now, step = [r.clone() for r in self.regressors], keyed(self.learn).step       # the student's backward pass goes through these, which must not move before it
        if step != self.last and not is_trial(self.learn):
            leaves = [r.clone().requires_grad_() for r in now]
            grads = torch.autograd.grad(self.hints*distance(leaves, [(s.detach(), t) for s, t in pairs]), leaves)
            if distributed.is_initialized():
                for g in grads: distributed.all_reduce(g.div_(distributed.get_world_size()))
            adam(self.regressors, list(grads), *self.moments, [], self.steps, amsgrad=False, beta1=.9, beta2=.999, lr=RATE, weight_decay=0., eps=1e-8, maximize=False)
            self.last = step
        return distance(now, pairs)  # pyright: ignore[reportReturnType]

    def after_cancel_batch(self): self._forget()
    def abort(self, level): self._forget()

    def _unhook(self):
        for h in self.handles: h.remove()
        self.handles = []

    def _forget(self):
        self._unhook()
        self.maps = {}

    def __getstate__(self): return {**vars(self), 'handles': [], 'maps': {}}


def match(learn: Learner, teacher: nn.Module, hints: float, attention: float, layers: dict[str, str] | None) -> Match:
    "A `Match` for `learn`, its layers found and its regressors drawn: the identity where widths are equal, else as a linear layer begins."
    ours, theirs = maps_of(get_model(learn.model), learn.dls), maps_of(teacher, learn.dls)
    pairs, regressors = layer_pairs(ours, theirs, layers), []
    for i, (a, b) in enumerate(pairs if hints else ()):
        with forked(keyed(learn).seed, 'regressor', i): layer = nn.Linear(ours[a][0], theirs[b][0])
        if ours[a][0] == theirs[b][0]:
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        regressors += [layer.weight.detach(), layer.bias.detach()]
    return Match(teacher, pairs, hints, attention, regressors)
