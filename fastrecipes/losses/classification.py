"Cross entropy against probabilities: what mixing, smoothing, class weights and teachers all come down to."
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ['soft_cross_entropy', 'soft_targets']


def soft_targets(target: Tensor, n_classes: int, ignore_index: int = -100) -> Tensor:
    "Class indices `(n,)` as probabilities `(n, c)`; a row of zeros where the target is `ignore_index`."
    kept = target != ignore_index
    return F.one_hot(torch.where(kept, target, 0), n_classes)*kept.unsqueeze(-1)


def soft_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None, smoothing: float = 0., reduction: str = 'mean') -> Tensor:
    """Cross entropy of `logits` `(n, c)` against probabilities `target` `(n, c)`; lower is better, 0 at best without smoothing.

    `weight` `(c,)` weighs each class' share of a target, and the mean is Σwl/Σw: for one-hot targets the value of
    `torch.nn.functional.cross_entropy(weight=…, label_smoothing=…)`. `smoothing` in [0, 1]. Rows of zeros are left out.
    `reduction`: 'mean', 'sum' or 'none' `(n,)`. Computed in float32 at least."""
    logp = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    target = target.to(logp.dtype)
    w = torch.ones_like(logp[0]) if weight is None else weight.to(logp)
    smoothed = (1-smoothing)*target + smoothing*target.sum(-1, keepdim=True)/target.shape[-1]
    loss = -(w*smoothed*logp).sum(-1)
    return loss if reduction == 'none' else loss.sum() if reduction == 'sum' else loss.sum()/(w*target).sum()
