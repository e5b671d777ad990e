"All of a Learner that its next batch depends on, and all that its records show: taken out, and put back bit for bit."
import random
from collections import Counter, defaultdict
from dataclasses import is_dataclass
from pathlib import Path

import numpy as np
import torch
from fastai.basics import L, Learner, Metric, Optimizer, get_model, nn
from fastai.learner import Recorder

from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.technique import applied

__all__ = ['state_of', 'restore']


def state_of(learn: Learner) -> dict:
    "The state of `learn`, as tensors and plain data."
    params = list(get_model(learn.model).parameters())
    state = dict(model=get_model(learn.model).state_dict(), optimizer=learn.opt.state_dict(),
                 gradients=[p.grad if p.grad is None or p.grad.any() else 0 for p in params],
                 learner={n: vars(learn)[n] for n in ('train_iter', 'pct_train', 'smooth_loss', 'final_record') if n in vars(learn)},
                 effects={n: a.effect for n, a in applied(learn).items()}, metrics=[_attributes(m) for m in learn.metrics],
                 callbacks=[(name, _attributes(cb)) for name, cb in _named(learn)], random=_random_state())
    if isinstance(dl := getattr(learn, 'dl', None), KeyedDL): state['loader'] = dl.seed
    if (scaler := vars(learn).get('scaler')) is not None: state['scaler'] = scaler.state_dict()
    return state


def restore(learn: Learner, state: dict):
    "Put back what `state_of` took."
    model = get_model(learn.model)
    model.load_state_dict(state['model'])
    if learn.opt is None: learn.create_opt()
    params = list(model.parameters())
    for p, g in zip(params, state['gradients']): p.grad = torch.zeros_like(p) if isinstance(g, int) else g if g is None else g.to(p.device)
    learn.opt.load_state_dict(_on(params[0].device, state['optimizer']))
    if isinstance(learn.opt, Optimizer): learn.opt.state = defaultdict(dict, learn.opt.state)    # fastai's own gives back a dict that lacks new parameters
    vars(learn).update(state['learner'])
    for n, effect in state['effects'].items():
        if n in applied(learn): applied(learn)[n].effect = effect
    for m, saved in zip(learn.metrics, state['metrics']): _put_back(m, saved)
    here = dict(_named(learn))
    for name, saved in state['callbacks']:
        if name in here: _put_back(here[name], saved)
    if 'loader' in state and isinstance(learn.dl, KeyedDL):
        learn.dl.seed = state['loader']
        learn.dl.set_epoch(keyed(learn).age)
    if 'scaler' in state and vars(learn).get('scaler') is not None: learn.scaler.load_state_dict(state['scaler'])
    _set_random_state(state['random'])


def _named(learn):
    "The callbacks by class and count: `('ParamScheduler 1', cb)`."
    seen = Counter()
    for cb in learn.cbs:
        seen[type(cb).__name__] += 1
        yield f'{type(cb).__name__} {seen[type(cb).__name__]}', cb


class _Inside(dict):
    "The attributes of an object that is kept, not replaced: a metric within a callback, a network that is averaged."


def _attributes(o) -> dict:
    """What of `o` is state: its attributes that are plain data, tensors or metrics; networks that it names in `stateful`.

    All else (the Learner, progress bars, contexts, teachers) is made anew by the program. `transient` names what is not to come back."""
    left_out = {'learn', *getattr(type(o), 'transient', ()), *(('start_epoch', 'log') if isinstance(o, Recorder) else ())}     # the epoch's clock and row
    found = {}
    for name, v in vars(o).items():
        if name in left_out: continue
        if isinstance(v, Metric): found[name] = _Inside(_attributes(v))
        elif isinstance(v, nn.Module) and name in getattr(type(o), 'stateful', ()): found[name] = _Inside(v.state_dict())
        elif _plain(v): found[name] = v
    return found


def _put_back(o, saved: dict):
    for name, v in saved.items():
        if not isinstance(v, _Inside): vars(o)[name] = v
        elif isinstance(inside := vars(o).get(name), nn.Module): inside.load_state_dict(v)
        elif inside is not None: _put_back(inside, v)


def _plain(v) -> bool:
    if isinstance(v, (list, tuple, set, frozenset, L)): return all(map(_plain, v))
    if isinstance(v, dict): return all(_plain(k) and _plain(o) for k, o in v.items())
    if is_dataclass(v) and not isinstance(v, type): return all(map(_plain, vars(v).values()))
    return v is None or isinstance(v, (bool, int, float, str, bytes, Path, np.ndarray, np.generic, torch.dtype, torch.device)) or (
        isinstance(v, torch.Tensor) and not isinstance(v, nn.Parameter) and not v.requires_grad)


def _on(device, o):
    "Tensors inside dicts and lists on `device`; a torch optimizer's step counts stay where they are, its own loading sees to them."
    if isinstance(o, torch.Tensor): return o.to(device)
    if isinstance(o, dict): return {k: _on(device, v) for k, v in o.items()}
    return type(o)(_on(device, v) for v in o) if isinstance(o, (list, L)) else o


def _random_state() -> dict:
    return dict(python=random.getstate(), numpy=np.random.get_state(), torch=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def _set_random_state(state: dict):
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'])
    if state['cuda'] and torch.cuda.device_count() == len(state['cuda']): torch.cuda.set_rng_state_all(state['cuda'])
