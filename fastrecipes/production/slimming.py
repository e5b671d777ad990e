"Whole channels removed: a network that really is smaller and faster, on any hardware."
import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy

import torch
from fastai.basics import Learner, OptimWrapper, get_model, nn
from fastai.callback.hook import total_params

from fastrecipes.errors import BadValue, few, nearest
from fastrecipes.layers.surgery import CONVOLUTIONS, WEIGHTED, renew_optimizer
from fastrecipes.production.graphs import quiet_export
from fastrecipes.production.predictor import Graph
from fastrecipes.production.timing import interleaved
from fastrecipes.technique import say, technique
from fastrecipes.training.glance import glance
from fastrecipes.training.resume import remember

__all__ = ['slimmed', 'widths', 'channel_groups', 'one_image_ms', 'onnx_runner']

MOST, HALVINGS = .95, 7                         # a search for a latency ends at this ratio, and halves what is left so often
HEADS = ('num_heads', 'head_dim', 'scale')      # what attention layers of timm know of their heads


def slimmed(model: nn.Module, ratio: float, *example_inputs: torch.Tensor, round_to: int = 8, per_layer: dict[str, float] | None = None) -> nn.Module:
    """A copy of `model` on the CPU without the least important `ratio` of each layer's channels; fine-tune it before you use it.

    Importance is the L2 norm of the whole group of weights that goes with a channel, found by tracing (DepGraph, arXiv:2301.12900;
    torch-pruning). `ratio` in [0, 1): a convolution loses that share of its inputs and of its outputs, so parameters fall by about
    1−(1−ratio)². `per_layer`: ratios of some, by the name of any layer that is cut with them (see `channel_groups`); `ratio` for the rest. Widths
    are the nearest multiples of `round_to` ≥ 1; the layer that answers keeps its outputs; attention loses dimensions of each head (none
    where queries are normalised), and keeps its heads. `example_inputs`: one batch, as the model takes it. Raises `ValueError` outside the ranges, for names that are not there, and
    where the network cannot be cut or nothing of it could be removed."""
    return _slimmed('prune', model, ratio, example_inputs, round_to, per_layer)


def _slimmed(who, model, ratio, example_inputs, round_to=8, per_layer=None) -> nn.Module:
    _check(who, ratio, round_to, per_layer)
    net, xb, answer, pruner = _traced(who, model, example_inputs, ratio, round_to, per_layer)
    with _said_by(who), torch.enable_grad():
        pruner.step()
        for m in pruner.attention: _fit_heads(m)
        with torch.no_grad(): after = net(*xb)
    if after.shape != answer.shape: raise BadValue(f'{who}: cut, the network answers {tuple(after.shape)} instead of {tuple(answer.shape)}; leave {who} off')
    if widths(net) == widths(model):
        asked = f'{ratio:.0%}' if not per_layer else 'so much'
        raise BadValue(f'{who}: no layer is wide enough to lose {asked} of its channels and keep a multiple of {round_to}; round to fewer (round_to=…), or cut more')
    for m, fused in pruner.attention.items(): m.fused_attn = fused
    return net.train(model.training)


def _check(who, ratio, round_to, per_layer):
    for name, r in {'ratio': ratio, **(per_layer or {})}.items():
        what = 'the share of channels to remove' + f' of {name!r}'*(name != 'ratio')
        if not isinstance(r, (int, float)) or not 0 <= r < 1 or not (r or per_layer): raise BadValue(f'{who}: {what} must lie between 0 and 1, got {r}')
    if round_to < 1: raise BadValue(f'{who}: round_to must be ≥ 1 channel, got {round_to}')


def _traced(who, model, example_inputs, ratio=0., round_to=1, per_layer=None) -> tuple:
    "(a copy of `model`, its inputs, what it answers, the pruner that has traced it)."
    net = deepcopy(model).cpu().eval().requires_grad_(True)
    xb = tuple(x.detach().as_subclass(torch.Tensor).cpu() if isinstance(x, torch.Tensor) else x for x in example_inputs)
    attention = {m: getattr(m, 'fused_attn', False) for m in net.modules() if isinstance(getattr(m, 'qkv', None), nn.Linear) and all(hasattr(m, a) for a in HEADS)}
    for m in attention: m.fused_attn = False            # one operation, through which nothing can be traced
    with _said_by(who), torch.no_grad(): answer = net(*xb)
    with _said_by(who), torch.enable_grad(): pruner = _pruner()(net, xb, attention, _answering(who, net, answer), ratio, round_to)
    if per_layer: _set_ratios(who, net, pruner, per_layer)
    return net, xb, answer, pruner


def _pruner() -> type:
    import torch_pruning as tp                          # takes a second to import

    class Pruner(tp.BasePruner):
        "Rounds so that each group of channels (of a grouped convolution, of a head) loses as many, and none loses all."
        def __init__(self, net, xb, attention, answering, ratio, round_to):
            self.attention, self.groups = attention, 1
            super().__init__(net, xb if len(xb) > 1 else xb[0], importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=_exactly(ratio),
                             round_to=round_to, ignored_layers=[answering, *(m.qkv for m in attention if _normed(m))],
                             num_heads={m.qkv: m.num_heads for m in attention}, in_channel_groups={}, out_channel_groups={})    # their defaults are shared

        def _is_atten_group(self, group):               # it asks this just before it rounds, which of the group knows nothing
            self.groups = self._get_channel_groups(group)
            return super()._is_atten_group(group)

        def _round_to(self, n_pruned, current_channels, round_to):
            each, unit = current_channels//self.groups, round_to//math.gcd(round_to, self.groups)
            kept = unit*math.ceil((each-n_pruned)/unit - .5)        # theirs rounds down: of 16 channels, a ratio of .01 leaves 8
            return each - min(each, max(kept, unit))

        def units(self, net) -> list[list[str]]:
            names = {m: name for name, m in net.named_modules()}
            found = []
            for group in self.DG.get_all_groups(ignored_layers=self.ignored_layers, root_module_types=self.root_module_types):
                layers = dict.fromkeys(d.target.module for d, _ in group if self.DG.is_out_channel_pruning_fn(d.handler) and isinstance(d.target.module, WEIGHTED))
                if layers and self._check_pruning_ratio(group): found.append([names[m] for m in sorted(layers, key=list(names).index)])
            return found
    return Pruner


def _exactly(ratio): return max(0., ratio - 1e-9)        # of 80 channels, int(80*(1-.8)) keeps 15


@contextmanager
def _said_by(who):
    "A block in which whatever a tracer stumbles over becomes a sentence: shapes baked into reshapes, unknown operations, …"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    except BadValue: raise
    except Exception as e:
        raise BadValue(f'{who}: torch-pruning cannot cut this network ({_said(e)}); `learn.prune` sets single weights to 0 in any') from e


def _said(e: Exception) -> str: return f'{type(e).__name__}: {(str(e).splitlines() or [""])[0]}'


def _set_ratios(who, net, pruner, per_layer):
    "Give each unit of layers that are cut together its ratio."
    units, named = pruner.units(net), dict(net.named_modules())
    unit_of = {name: i for i, unit in enumerate(units) for name in unit}
    given = {}
    for name, r in per_layer.items():
        if name not in unit_of:
            why = 'keeps its outputs, or has none of its own' if isinstance(named.get(name), WEIGHTED) else 'is no convolution or linear layer' if name in named else 'is not there'
            raise BadValue(f'{who}: layer {name!r} {why}{nearest(name, unit_of) or f"; there are {few(unit_of)}"}')
        other, before = given.setdefault(unit_of[name], (name, r))
        if before != r: raise BadValue(f'{who}: {other!r} and {name!r} are cut together, and cannot lose {before} and {r}; give one of them')
    for i, (_, r) in given.items():
        for name in units[i]:
            pruner.pruning_ratio_dict[named[name]] = [0., _exactly(r)]
            pruner._layer_to_scope[named[name]] = (f'unit {i}', [named[name]])


def _normed(m) -> bool:
    "Whether heads share a norm of their queries or keys: torch-pruning finds its way through none."
    return any(True for name in ('q_norm', 'k_norm') for _ in getattr(m, name, nn.Identity()).parameters())


def _fit_heads(m: nn.Module):
    "Tell an attention layer how wide its heads are now, and keep its answer: torch's fused attention divides by the root of that width, whatever `scale` says."
    old, m.head_dim = m.head_dim, m.qkv.out_features//(3*m.num_heads)
    if hasattr(m, 'attn_dim'): m.attn_dim = m.head_dim*m.num_heads
    with torch.no_grad():
        for p in m.qkv.parameters(): p[:m.head_dim*m.num_heads] *= (m.head_dim/old)**.5       # the queries
    m.scale *= (old/m.head_dim)**.5


def widths(model: nn.Module) -> list[int]:
    "The number of output channels of each convolution and linear layer, in the order of the modules."
    return [m.weight.shape[0] for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))]


def channel_groups(model: nn.Module, *example_inputs: torch.Tensor) -> list[list[str]]:
    """The layers of `model` whose output channels can be cut, in its order; those that must lose the same ones (a residual sum) in one list.

    `example_inputs`: one batch. The layer that answers is not among them. Raises `ValueError` where the network cannot be traced."""
    net, *_, pruner = _traced('channel_groups', model, example_inputs)
    order = {name: i for i, (name, _) in enumerate(net.named_modules())}
    return sorted(pruner.units(net), key=lambda unit: order[unit[0]])


def _answering(who, net: nn.Module, answer: torch.Tensor) -> nn.Module:
    "The last layer as wide as the answer."
    n_out = answer.shape[1]
    wide = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.weight.shape[0] == n_out]
    if not wide: raise BadValue(f'{who}: no layer of this network has the {n_out} outputs of its answer')
    return wide[-1]


def onnx_runner(model: nn.Module, *example_inputs: torch.Tensor) -> Callable[[], list]:
    "A function that sends the first of `example_inputs` through `model` in onnxruntime, on one thread of the CPU: what is to be timed, by itself or beside others."
    xb = tuple(x[:1].detach().as_subclass(torch.Tensor).cpu() for x in example_inputs)
    net = deepcopy(model).cpu().float().eval().requires_grad_(False)
    with quiet_export(): program = torch.onnx.export(net, xb, dynamo=True, external_data=False, verbose=False)
    session = Graph(program.model_proto.SerializeToString(), threads=1).session
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), xb, strict=True)}
    return lambda: session.run(None, feed)


def one_image_ms(model: nn.Module, *example_inputs: torch.Tensor) -> float:
    "The ms that onnxruntime takes for the first of `example_inputs` on one thread of the CPU: the least of up to 50 rounds, for whatever else the machine does only adds."
    return min(interleaved({'image': onnx_runner(model, *example_inputs)})['image'])


def _within(cut: Callable[[float], nn.Module], time: Callable[[nn.Module], float], max_ms: float, before: float) -> tuple[nn.Module, float, float]:
    "(the network, its ratio, its ms) that loses least and takes at most `max_ms`, by bisection over the ratio."
    seen = {}
    def tried(ratio):
        net = cut(ratio)
        key = tuple(widths(net))                        # rounded, many ratios are one network
        if key not in seen: seen[key] = time(net)
        return net, ratio, seen[key]
    best, low, high = tried(MOST), 0., MOST
    if best[2] > max_ms:
        raise BadValue(f'slim: max_ms={max_ms:g}: an image takes {before:.2f} ms, and {best[2]:.2f} ms without {MOST:.0%} of the channels; take a smaller network, or allow more')
    for _ in range(HALVINGS):
        try: now = tried(ratio := (low+high)/2)
        except BadValue:                                # too little to lose a channel
            low = ratio
            continue
        if now[2] <= max_ms: best, high = now, ratio
        else: low = ratio
    return best


def _adopt(model: nn.Module, thin: nn.Module) -> int:
    "Give the layers of `model` the tensors and numbers of those of `thin`, its cut copy, and leave the rest: who holds a layer, holds the cut one. How many layers changed."
    changed = 0
    for old, new in zip(model.modules(), thin.modules(), strict=True):
        before = changed
        for kind in ('_parameters', '_buffers'):
            for name, t in vars(new)[kind].items():
                was = vars(old)[kind][name]
                if t is None or t.shape == was.shape: continue
                t = t.detach().to(was)
                vars(old)[kind][name] = nn.Parameter(t, requires_grad=was.requires_grad) if isinstance(was, nn.Parameter) else t
                changed = before + 1
        for name, v in vars(new).items():
            if name not in ('training', 'fused_attn') and isinstance(v, (int, float, tuple)): vars(old)[name] = v
    return changed


@technique('model', section='Pruning', source='arXiv:2301.12900', touches=('model', 'inference'),
           before=('activation', 'coordconv', 'initialize', 'norm', 'prune', 'self_attention'), example=dict(ratio=.5, round_to=4),    # for small networks
           formula=r'\text{importance of a channel} = \Big\|\big(w \text{ of all layers that go with it}\big)\Big\|_2')
def slim(self: Learner, ratio: float | None = None, max_ms: float | None = None, round_to: int = 8, per_layer: dict[str, float] | None = None) -> Learner:
    """Remove whole channels, the least important of each layer, now and for good: a network that is smaller and faster anywhere.

    `ratio` between 0 and 1 (default .5): the share of each layer's channels; parameters and multiplications fall by about 1−(1−ratio)². Or
    `max_ms` > 0: as few as it takes for one image in so many milliseconds, in onnxruntime on one thread of this CPU, which should have little else to do. Or `per_layer`: a ratio
    for each layer named (`learn.sensitivity().ratios(…)` gives them), `ratio` or 0 for the rest. Widths become the nearest multiples of `round_to`. Importance
    is the L2 norm of all weights that go with a channel: call it on a trained network, and fit again, for it has forgotten something.
    Residual sums keep their channels in common, attention its heads; groups, frozen layers and the optimizer's memory of layers that stay are
    kept. A second call cuts what is left again. To load weights saved later, slim a new Learner the same way first. Raises
    `ValueError` outside the ranges, for two goals at once, for layers that are not there (and names the nearest), where weights are pruned, and for
    networks that cannot be cut."""
    if max_ms is not None and (ratio is not None or per_layer is not None):
        raise BadValue(f'slim: max_ms finds the ratio by itself; give it or ratio and per_layer, got {max_ms=}, {ratio=}, {per_layer=}')
    if max_ms is not None and not max_ms > 0: raise BadValue(f'slim: max_ms must be > 0 ms, got {max_ms}')
    if per_layer is not None and not per_layer: raise BadValue('slim: per_layer names no layer; leave it out to cut all')
    if ratio is None and max_ms is None: ratio = 0. if per_layer else .5
    if ratio is not None: _check('slim', ratio, round_to, per_layer)
    if masked := [cb.name.removesuffix('_cb') for cb in self.cbs if vars(cb).get('masks')]:
        raise BadValue(f'slim: weights are held at 0 by {masked[0]}, and its masks are for the layers as they are; slim first, then prune')
    if (match := getattr(self, 'match_cb', None)) and match.hints:
        raise BadValue('slim: distill matches features of the layers as they are (features=…); slim first, then distill')
    if isinstance(self.opt_func, OptimWrapper): raise BadValue('slim: opt_func is an optimizer that holds the weights of today; give the Learner a function that makes one')
    model = get_model(self.model)
    if (seen := glance(self, ())) is None: raise BadValue('slim: it takes a sample of the training data to trace the network; give the data to `as_dataloaders`')
    if seen.error is not None: raise BadValue(f'slim: the network cannot be run on a sample of its data ({_said(seen.error)}); `learn.preflight()` tells more')
    n, wide, took = total_params(model)[0], _channels(model), ''
    if max_ms is None: thin = _slimmed('slim', model, ratio, seen.xb, round_to, per_layer)
    else:
        def ms(net): return remember('slim: ms of one image', lambda: one_image_ms(net, *seen.xb))
        if (before := ms(model)) <= max_ms: return say(self, 'slim', f'an image takes {before:.2f} ms as it is, and {max_ms:g} are allowed: nothing is cut', aloud=True) or self
        thin, ratio, after = _within(lambda r: _slimmed('slim', model, r, seen.xb, round_to), ms, max_ms, before)
        took = f'; an image takes {after:.2f} ms instead of {before:.2f} (ratio {ratio:.3f})'
    changed = _adopt(model, thin)
    if self.opt is not None: renew_optimizer(self)
    frozen = [m for m in model.modules() if isinstance(m, WEIGHTED) and not m.weight.requires_grad]
    warn = f'; {len(frozen)} of its layers are frozen, and cannot make up for what is gone: unfreeze and fit' if frozen else ''
    say(self, 'slim', f'{wide-_channels(model):,} of {wide:,} channels removed in {changed} layers: {n:,} → {total_params(model)[0]:,} parameters{took}{warn}',
        aloud=bool(frozen) or max_ms is not None)
    return self


def _channels(model) -> int:
    return sum(m.weight.shape[1 if isinstance(m, CONVOLUTIONS) and m.transposed else 0] for m in model.modules() if isinstance(m, WEIGHTED))
