"The optimizers of torch and timm on fastai's parameter groups: rates by layer, schedules, freezing, decay and checkpoints as with fastai's own."
import inspect
import random
import warnings
from functools import partial

import numpy as np
import torch
from fastai.basics import CancelBackwardException, L, Learner, OptimWrapper, nn
from fastai.optimizer import detuplify_pg, pytorch_hp_map, set_item_pg
from timm.optim import Adahessian, Lookahead, get_optimizer_class, list_optimizers
from timm.optim.kron import Kron
from torch.overrides import TorchFunctionMode

from fastrecipes.data.keyed import keyed
from fastrecipes.errors import BadName, BadValue, nearest
from fastrecipes.randomness import key_of
from fastrecipes.repairs import fitting
from fastrecipes.technique import TechniqueCallback, put, say, technique

__all__ = ['OptimizerStep', 'TorchOptimizer']

ELSEWHERE = dict(params='they are the Learner\'s', lr='give it to the fit', weight_decay='call weight_decay()') | {k: f'write {k}=…' for k in ('eps', 'betas', 'momentum')}
COUNTED = ('lookahead_step', 'max_lr_snapshot')                            # in the groups of an optimizer, but what it counts itself
LOOKAHEAD = dict(lookahead_alpha='alpha', lookahead_k='k')
REFUSED = dict(lbfgs='it asks for the loss many times a step, over all data, and a batch here has one; take kron, muon or adahessian, which know of curvature',
               schedulefree='neither torch nor timm has a schedule-free optimizer; take adamw with fit_flat_cos, or ema(), which averages weights as it does')


class TorchOptimizer(OptimWrapper):
    """An optimizer of torch or timm, made by `name` and `settings`, behind the face of fastai's own.

    fastai 2.8.12's wrapper decays norms and biases, whatever their `do_wd` says; raises KeyError for a momentum in the schedule that the optimizer
    lacks; reaches one of two momenta (muon); and when a freeze clears its state, leaves the inner one of Lookahead, and Adahessian without its counts."""
    hypers = param_lists = None                 # properties of fastai's, here lists as in its `Optimizer`

    def __init__(self, params, lr, name: str, settings: dict):
        groups = L(params)
        self.param_lists = L(list(g) for g in groups) if isinstance(groups[0], (L, list)) else L([list(groups)])
        self.make = partial(_make, name, settings)
        super().__init__(opt=self.make([dict(params=list(ps)) for ps in self.param_lists]))
        numbers = {k: v for k, v in detuplify_pg(self.opt.param_groups[0]).items() if k not in COUNTED and _is_number(v)}
        self.names = {k: k if k == 'betas__0' and 'momentum' in numbers else pytorch_hp_map.get(k, k) for k in numbers}
        self.hypers = [{self.names[k]: v for k, v in numbers.items()} for _ in self.param_lists]
        self.divided = False
        self.set_hyper('lr', lr)

    def _set_hyper(self, k, v):
        for hyper, value in zip(self.hypers, v): hyper[k] = value.item() if isinstance(value, np.generic) else value
        self._tell()

    def _tell(self):
        "Give the groups of the optimizer what `hypers` says; no decay to parameters that are to have none."
        if not self.divided: self._divide()
        for i, decays, pg in self.parts:
            for key, name in self.names.items(): set_item_pg(pg, key, 0. if name == 'wd' and not decays else self.hypers[i][name])

    def _divide(self):
        "One group of the optimizer for those of a group that decay, another for those that do not. A Learner says so once the optimizer is made."
        self.divided = any('do_wd' in s for s in self.state.values())
        groups, self.parts, bare = _inner(self.opt).param_groups, [], []
        for i, (ps, pg) in enumerate(zip(self.param_lists, groups)):  # pyright: ignore[reportGeneralTypeIssues]
            rest = [p for p in ps if self.state[p].get('do_wd', True)]
            self.parts.append((i, bool(rest), pg))
            if not rest or len(rest) == len(ps): continue
            pg['params'] = rest
            bare.append((i, False, {**pg, 'params': [p for p in ps if not self.state[p].get('do_wd', True)]}))
        groups.extend(pg for *_, pg in bare)                # not by `add_param_group`: that of Lookahead does nothing for the inner one
        self.parts += bare

    def step(self):
        self._tell()
        if isinstance(opt := _inner(self.opt), Adahessian):
            for p in opt.get_params():                      # also those that were frozen when it was made
                if not hasattr(p, 'hess'): p.hess = 0.
                opt.state[p].setdefault('hessian step', 0)
        if not isinstance(opt, Kron): return self.opt.step()
        with torch.compiler.set_stance('force_eager'), InPairs(): self.opt.step()           # timm compiles it, which takes minutes, and a C++ compiler

    def clear_state(self):
        self.opt = self.make([dict(params=list(ps)) for ps in self.param_lists])
        self.divided = False
        self._tell()

    def state_dict(self):
        self._tell()
        hess = [getattr(p, 'hess', None) for ps in self.param_lists for p in ps]        # Adahessian keeps it on the parameter
        return dict(self.opt.state_dict(), hypers=[dict(h) for h in self.hypers], hess=[h if isinstance(h, torch.Tensor) else None for h in hess])

    def load_state_dict(self, sd):
        if not {'param_groups', 'hypers', 'hess'} <= sd.keys():
            raise BadValue(f'optimizer: the saved state is not one of {type(_inner(self.opt)).__name__}; load the weights alone, with_opt=False')
        self._tell()
        self.opt.load_state_dict({k: v for k, v in sd.items() if k not in ('hypers', 'hess')})
        self.hypers = [dict(h) for h in sd['hypers']]
        self.divided = True
        self.parts = [(i, decays, pg) for (i, decays, _), pg in zip(self.parts, _inner(self.opt).param_groups, strict=True)]
        for p, h in zip((p for ps in self.param_lists for p in ps), sd['hess']):
            vars(p).pop('hess', None)
            if h is not None: p.hess = h.to(p.device)

    def __getstate__(self):                     # that of torch's optimizers leaves out what Lookahead and Adahessian need
        return {k: v for k, v in vars(self).items() if k not in ('opt', 'parts')} | dict(saved=self.state_dict())

    def __setstate__(self, state):
        vars(self).update({k: v for k, v in state.items() if k != 'saved'})
        self.clear_state()
        self.load_state_dict(state['saved'])


def _make(name: str, settings: dict, params) -> torch.optim.Optimizer:
    "The optimizer `name` of `list_optimizers()`, 'lookahead_' before it or not, over `params`."
    ahead = {LOOKAHEAD[k]: v for k, v in settings.items() if k in LOOKAHEAD}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*opt_einsum')                           # see `InPairs`
        opt = get_optimizer_class(name.removeprefix('lookahead_'))(params, lr=1e-3, **{k: v for k, v in settings.items() if k not in LOOKAHEAD})
    if isinstance(opt, Adahessian):
        opt.defaults['decoupled_weight_decay'] = True       # it is, and must do it by itself: weights that move before the step are not those of the graph
        for p in opt.get_params(): del p.hess               # put there by its constructor; `step` sees to it
    return Lookahead(opt, **ahead) if name.startswith('lookahead_') else opt


class InPairs(TorchFunctionMode):
    "Sum products of many tensors two at a time, from the last: timm's Kron leaves the order to opt_einsum, and without it a weight of n numbers takes n² for a moment."
    def __torch_function__(self, f, types, args=(), kwargs=None):
        if f is not torch.einsum or len(args) < 4: return f(*args, **(kwargs or {}))
        ins, out = args[0].replace(' ', '').split('->')
        ins, tensors = ins.split(','), list(args[1:])
        t, has = tensors.pop(), ins.pop()
        while tensors:
            other = ins.pop()
            left = ''.join(c for c in dict.fromkeys(has + other) if c in out or any(c in o for o in ins)) if ins else out
            t, has = torch.einsum(f'{has},{other}->{left}', t, tensors.pop()), left
        return t


def _inner(opt): return getattr(opt, '_base_optimizer', opt)
def _is_number(v) -> bool: return isinstance(v, (int, float)) and not isinstance(v, bool)


class OptimizerStep(TechniqueCallback):
    """Before a step key what the optimizer draws to (seed, epoch, batch), and tell a decay that asks for it the largest rate so far; keep the graph
    of the backward pass for an optimizer that differentiates gradients."""
    order, run_valid = 900, False               # after all who scale a loss, and all who have a part in the gradient
    told = False

    @property
    def acts_on(self):
        "The optimizer itself; None where somebody put another in its place."
        return _inner(self.learn.opt.opt) if isinstance(self.learn.opt, TorchOptimizer) else None

    def before_fit(self):
        if not fitting(self.learn) or (opt := self.acts_on) is None: return
        for pg in opt.param_groups:
            if pg.get('corrected_weight_decay'): pg['max_lr_snapshot'] = 0.
        if not isinstance(opt, Adahessian): return
        for name, why in (('grad_accum', 'it would hold the graphs of all batches of a step, and accumulation is there to hold one; take a larger bs'),
                          ('sam', 'sam moves the weights back before the step, and the graph to differentiate once more is that of the other place'),
                          ('distributed', 'processes share gradients, not the graphs behind them')):
            if f'{name}_cb' in vars(self.learn): raise BadValue(f"optimizer: 'adahessian' and {name!r} do not go together: {why}, or another optimizer (kron, muon)")

    def before_train(self):
        opt, scaler = self.acts_on, vars(self.learn).get('scaler')
        if opt is not None and not self.told and all('trust_clip' in pg and not pg['weight_decay'] and not pg['always_adapt'] for pg in opt.param_groups):
            kind = type(opt).__name__
            say(self.learn, 'optimizer', f'{kind} adapts the rate of each layer only where weights decay, as timm has it, and none does: '
                "call weight_decay(…), or give args={'always_adapt': True}", aloud=True)
        self.told = True
        if isinstance(self.acts_on, Adahessian) and scaler is not None and scaler.is_enabled():
            raise BadValue("optimizer: 'adahessian' and 'to_fp16' do not go together: the loss that it differentiates twice is a scaled one; take to_bf16()")

    def before_backward(self):
        if not isinstance(self.acts_on, Adahessian): return
        ps = [p for p, *_ in self.learn.opt.all_params() if p.requires_grad]
        for p, g in zip(ps, torch.autograd.grad(self.learn.loss_grad.as_subclass(torch.Tensor), ps, create_graph=True, allow_unused=True)): p.grad = g
        raise CancelBackwardException('done')

    def before_step(self):
        if (opt := self.acts_on) is None: return
        for pg in opt.param_groups:
            if pg.get('corrected_weight_decay'): pg['max_lr_snapshot'] = max(pg['max_lr_snapshot'], pg['lr'])
        if isinstance(opt, Kron): opt.rng = random.Random(self._key())
        if isinstance(opt, Adahessian): opt.generator = torch.Generator(self.learn.opt.param_lists[0][0].device).manual_seed(self._key())

    def _key(self) -> int: return key_of((cb := keyed(self.learn)).seed, 'optimizer', *cb.step[:2]) % 2**63     # not by rank: all processes take one step

    def after_fit(self):
        if fitting(self.learn): self._forget()
    def abort(self, level):
        if level == 'batch' and isinstance(self.acts_on, Adahessian): self.learn.opt.zero_grad()                # graphs
        if level == 'fit': self._forget()

    def _forget(self):
        if isinstance(self.acts_on, Adahessian):
            for p, *_ in self.learn.opt.all_params(): vars(p).pop('hess', None)             # it would be copied and saved with the weights


@technique('optim', section='Training', source='https://huggingface.co/docs/timm/reference/optimizers', touches=('step',),
           example=dict(name='lookahead_nadamw', eps=1e-5))     # counts in its groups, slow weights beside its state
def optimizer(self: Learner, name: str, eps: float | None = None, betas: list[float] | None = None, momentum: float | None = None, args: dict | None = None) -> Learner:
    """Take the steps of another optimizer: any of timm's by its name, such as 'adamw', 'lamb', 'lion', 'adopt', 'muon', 'kron'.

    `name`: one of `timm.optim.list_optimizers()`, most of torch's among them; with 'lookahead_' before it, averaged with its past every 6 steps (arXiv:1907.08610). 'sgd' has
    Nesterov momentum, 'momentum' plain. `eps` ≥ 0, `betas` and `momentum` in [0, 1): what the library has unless given (a momentum of .9 where
    that is 0); `args`: what else its constructor takes. Rates, also by layer, schedules of rate and momentum, freezing, `wd` and checkpoints work
    as with fastai's own: norms and biases do not decay. Lion wants a rate some 5 times lower than AdamW, lamb and muon a higher one. 'adahessian' and 'kron'
    follow curvature, for two or more times the time a step; what they draw is keyed. 'muon' is for matrices and convolutions, the rest gets AdamW.
    'lamb', 'lars' and 'larc' adapt rates by layer only for weights that decay. State that an optimizer had is lost. Raises `ValueError` for
    other names, for what a constructor refuses, and for 'lbfgs' and schedule-free ones."""
    name = name.lower()
    base, known = name.removeprefix('lookahead_'), list_optimizers()
    if why := next((v for k, v in REFUSED.items() if k in base.replace('_', '').replace('-', '')), None): raise BadValue(f'optimizer: {name!r}: {why}')
    if base not in known: raise BadValue(f'optimizer: no optimizer {name!r}{nearest(base, known)}; there are {len(known)}: timm.optim.list_optimizers()')
    settings = _settings(name, base, dict(eps=eps, betas=betas, momentum=momentum), args or {})
    frozen = self.opt.frozen_idx if self.opt is not None else 0
    self.opt_func, self.opt = partial(TorchOptimizer, name=name, settings=settings), None
    if frozen:
        self.create_opt()
        self.opt.frozen_idx = frozen
    keyed(self)
    kind, ps = get_optimizer_class(base, bind_defaults=False), [p for p in self.model.parameters() if p.requires_grad]
    say(self, 'optimizer', f'{name} ({kind.__name__} of {kind.__module__.partition(".")[0]}) takes the steps of {sum(p.numel() for p in ps):,} weights in {len(ps)} tensors')
    return put(self, OptimizerStep())


def _settings(name: str, base: str, given: dict, args: dict) -> dict:
    "What the constructor is called with; raises for what it does not know, or does not take."
    try: kind = get_optimizer_class(base, bind_defaults=False)
    except (ImportError, AssertionError) as e: raise BadValue(f'optimizer: {name!r} is not to be had here ({e}); take one of plain torch, such as adamw or lion') from None
    takes = inspect.signature(kind).parameters
    if bad := next((k for k, v in given.items() if v is not None and k not in takes), None):
        raise BadName(f'optimizer: {name!r} takes no {bad}; it takes {", ".join(k for k in takes if k not in ("params", "lr", "weight_decay"))}')
    others = [k for k in takes if k not in ELSEWHERE] + (list(LOOKAHEAD) if name != base else [])
    if bad := next((k for k in args if k not in others), None):
        if bad in ELSEWHERE: raise BadName(f'optimizer: {bad!r} is not for args; {ELSEWHERE[bad]}')
        raise BadName(f'optimizer: {name!r} takes no argument {bad!r}{nearest(bad, others)}; args may have {", ".join(others)}')
    settings = {k: tuple(v) if k == 'betas' else v for k, v in given.items() if v is not None} | args
    if 'momentum' in takes and not takes['momentum'].default: settings = {'momentum': .9} | settings
    if kind is Kron: settings = {'deterministic': True} | settings
    n = len(b) if isinstance(b := takes['betas'].default if 'betas' in takes else None, tuple) else None
    if n and 'betas' in settings and len(settings['betas']) != n: raise BadValue(f'optimizer: {name!r} has {n} betas, got {list(settings["betas"])}')
    try: _make(name, settings, [nn.Parameter(torch.zeros(2, 2))])
    except Exception as e: raise BadValue(f'optimizer: {name!r} refuses {settings}: {e}') from None
    return settings
