"Layers of any network found by running it once, and others put in their place, before or behind them: what techniques that change a network share."
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import torch
from fastai.basics import Learner, get_model, nn
from torch.overrides import TorchFunctionMode

from fastrecipes.data.keyed import Keyed
from fastrecipes.data.loaders import first_sample
from fastrecipes.errors import BadValue
from fastrecipes.randomness import default_seed, forked

__all__ = ['Call', 'Inserted', 'Trace', 'operate', 'trace', 'uninsert', 'CONVOLUTIONS', 'WEIGHTED']

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, nn.Linear)
FUNCTIONS = {'relu', 'relu_', 'relu6', 'leaky_relu', 'leaky_relu_', 'elu', 'elu_', 'selu', 'gelu', 'silu', 'mish', 'hardswish', 'prelu', 'tanh', 'tanh_'}
FORWARD = ('_forward_hooks', '_forward_hooks_with_kwargs', '_forward_hooks_always_called')
BEFORE = ('_forward_pre_hooks', '_forward_pre_hooks_with_kwargs')


@dataclass
class Call:
    "One layer as a sample met it: its name, the shapes of what it took and gave, when it was first entered and last left, and how often."
    name: str
    takes: tuple
    gives: tuple
    entered: int
    left: int
    times: int = 1


@dataclass
class Trace:
    "The layers of a network in the order in which they were left, and the activations that are functions in some `forward`, by name and number."
    calls: dict[nn.Module, Call] = field(default_factory=dict)
    functions: Counter = field(default_factory=Counter)

    @property
    def answering(self) -> nn.Module | None:
        "The last layer with a weight: what comes behind it is the answer."
        return next((m for m in reversed(self.calls) if isinstance(m, WEIGHTED)), None)

    @property
    def hidden(self) -> dict[nn.Module, Call]:
        "The layers that had been left before the answering one was entered."
        end = self.calls[self.answering].entered if self.answering else float('inf')
        return {m: c for m, c in self.calls.items() if c.left < end}

    def entered(self, atoms=()) -> list[nn.Module]:
        "The layers that called no other, and those of the classes `atoms` with nothing of what they hold, in the order in which they were first entered."
        within = {o for m in self.calls if isinstance(m, atoms) for o in m.modules() if o is not m}
        return sorted((m for m in self.calls if m not in within and (isinstance(m, atoms) or not any(o in self.calls for o in m.modules() if o is not m))),
                      key=lambda m: self.calls[m].entered)


class Inserted(nn.Sequential):
    "A layer (number `at`) with what the technique `by` put before or behind it."
    def __init__(self, by: str, at: int, *layers):
        super().__init__(*layers)
        self.by, self.at = by, at


def trace(learn: Learner, who: str) -> Trace:
    """Which layers a sample of the training data goes through, in evaluation mode; nothing is drawn, trained or left behind.

    Raises `ValueError`, in the name of `who`, where the network cannot be run on it."""
    model, found, inside, clock = get_model(learn.model), Trace(), [], 0
    names = {m: n for n, m in model.named_modules()}
    b = first_sample(learn.dls)
    with forked('trace'): xb = b[0] if b else tuple(x[:1] for x in learn.dls.one_batch()[:getattr(learn.dls, 'n_inp', 1)])
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    modes = {m: m.training for m in model.modules()}

    def enter(m, args):
        nonlocal clock
        clock += 1
        inside.append((m, clock))

    def leave(m, args, out):
        nonlocal clock
        clock += 1
        _, entered = inside.pop()
        old = found.calls.pop(m, None)                      # to the end: in the order of leaving
        found.calls[m] = Call(names[m], _shape(args), _shape(out), old.entered if old else entered, clock, old.times+1 if old else 1)

    class Functions(TorchFunctionMode):
        def __torch_function__(self, f, types, args=(), kwargs=None):
            name = getattr(f, '__name__', '')
            if name in FUNCTIONS and inside and any(True for _ in inside[-1][0].children()): found.functions[name.rstrip('_')] += 1
            return f(*args, **(kwargs or {}))

    hooks = [h for m in names for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        model.eval()
        with torch.no_grad(), Functions(), forked('trace'): model(*(x.as_subclass(torch.Tensor).to(device) if isinstance(x, torch.Tensor) else x for x in xb))
    except Exception as e:
        raise BadValue(f'{who}: the network cannot be run on a sample of its data ({type(e).__name__}: {(str(e).splitlines() or [""])[0]}); `learn.preflight()` tells more') from e
    finally:
        for h in hooks: h.remove()
        for m, mode in modes.items(): m.training = mode
    return found


def _shape(o) -> tuple:
    "The shape of the first tensor in `o`; empty where there is none."
    if isinstance(o, torch.Tensor): return tuple(o.shape)
    values = o.values() if isinstance(o, dict) else o if isinstance(o, (tuple, list)) else ()
    return next((s for v in values if (s := _shape(v))), ())


def operate(learn: Learner, changes: dict[nn.Module, nn.Module], who: str):
    """Put each new layer of `changes` in the place of the old one: wherever it is, as often as it is there.

    Device, mode and hooks (fastai's U-Net looks into its encoder by them) come along; the optimizer is made anew with its groups and
    frozen ones, and remembers what it did of the parameters that stay. Raises `ValueError` where weights that go are pruned."""
    model = get_model(learn.model)
    kept = {p for new in changes.values() for p in new.parameters()}
    held = {m for m, *_ in getattr(getattr(learn, 'prune_cb', None), 'masks', ())}
    if any(m in held and not set(m.parameters()) <= kept for m in changes): raise BadValue(f'{who}: it would replace layers whose weights are pruned; prune after {who}')
    device = next((p.device for p in model.parameters()), None)
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child in changes]
    for old, new in changes.items():
        for m in set(new.modules()) - set(old.modules()): m.training = old.training
        if device is not None: new.to(device)
        for hooks in FORWARD if old in new.modules() or new in old.modules() else (*FORWARD, *BEFORE): vars(new)[hooks], vars(old)[hooks] = vars(old)[hooks], OrderedDict()
    for parent, name in places: parent._modules[name] = changes[parent._modules[name]]
    for m in model.modules():                   # torch computes these by a formula of their own where no gradient is asked for: with the old layers
        if isinstance(m, nn.TransformerEncoderLayer) and not set(m.modules()).isdisjoint(changes.values()): m.activation_relu_or_gelu = 0
    if model in changes: learn.model = changes[model]
    if learn.opt is not None: renew_optimizer(learn)


def renew_optimizer(learn: Learner):
    "Make the optimizer anew over the network's parameters as they are now, with the rates, the frozen groups and what it remembers of those that stayed."
    old, hypers, frozen = learn.opt, [dict(h) for h in learn.opt.hypers], getattr(learn.opt, 'frozen_idx', 0)
    learn.create_opt()
    if learn.opt is not old:
        for p, *_ in learn.opt.all_params():
            if p in old.state: learn.opt.state[p] = {**old.state[p], **learn.opt.state[p]}
        if len(hypers) == len(learn.opt.hypers):
            for k in hypers[0]: learn.opt.set_hyper(k, [h[k] for h in hypers])
    if frozen: learn.opt.freeze_to(frozen)


def uninsert(learn: Learner, who: str):
    "Take out what an earlier call of technique `who` put in, so that the last call wins."
    model = get_model(learn.model)
    if changes := {m: m[m.at] for m in model.modules() if isinstance(m, Inserted) and m.by == who}: operate(learn, changes, who)


def seeded(learn: Learner, *key):
    "`forked` by the seed of `learn`: new weights depend on it and on `key`, and what is drawn elsewhere does not depend on them."
    cb = next((o for o in learn.cbs if type(o) is Keyed), None)
    return forked(cb.seed if cb else default_seed(), *key)
