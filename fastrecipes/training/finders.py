"Settings found by a short trial instead of a guess."
from dataclasses import dataclass

import torch
from fastai.basics import Learner
from fastai.callback.schedule import valley

__all__ = ['FoundRate', 'find_lr']

FALLBACK = 1e-3


@dataclass(frozen=True)
class FoundRate:
    "A learning rate, and the losses of the trial that it was read from."
    lr: float
    lrs: list[float]
    losses: list[float]


def find_lr(learn: Learner, num_it: int = 60) -> FoundRate:
    """Raise the rate exponentially from 1e-6 to 1 over at most `num_it` batches and take the valley of the losses (`lr_find`).

    Weights, optimizer and the draws of later fits are as if it had not run. Where the trial breaks off too early to tell, 1e-3."""
    learn.lr_find(start_lr=1e-6, end_lr=1, num_it=num_it, show_plot=False, suggest_funcs=None)
    lrs, losses = [float(v) for v in learn.recorder.lrs], [float(v) for v in learn.recorder.losses]
    usable = [i for i, loss in enumerate(losses) if loss == loss][num_it//10:-5]
    if len(usable) < 10: return FoundRate(FALLBACK, lrs, losses)
    lr, _ = valley(torch.tensor([lrs[i] for i in usable]), torch.tensor([losses[i] for i in usable]), num_it)
    return FoundRate(float(lr), lrs, losses)
