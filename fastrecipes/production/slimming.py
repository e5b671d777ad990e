"Whole channels removed: a network that really is smaller and faster, on any hardware."
import warnings
from copy import deepcopy

import torch
from fastai.basics import nn

from fastrecipes.errors import BadValue

__all__ = ['slimmed', 'widths']


def slimmed(model: nn.Module, ratio: float, *example_inputs: torch.Tensor, round_to: int = 8) -> nn.Module:
    """A copy of `model` on the CPU without the least important `ratio` of each layer's channels; fine-tune it before you use it.

    Importance is the L2 norm of the whole group of weights that goes with a channel, found by tracing (DepGraph, arXiv:2301.12900;
    torch-pruning). `ratio` in (0, 1): a convolution loses that share of its inputs and of its outputs, so parameters fall by about
    1−(1−ratio)². Widths are multiples of `round_to`; the layer that answers keeps its outputs. `example_inputs`: one batch, as the model
    takes it. Raises `ValueError` outside the range, and where the network cannot be cut or nothing of it could be removed."""
    if not 0 < ratio < 1: raise BadValue(f'prune: the share of channels to remove must lie between 0 and 1, got {ratio}')
    import torch_pruning as tp
    net = deepcopy(model).cpu().eval().requires_grad_(True)
    xb = tuple(x.detach().as_subclass(torch.Tensor).cpu() for x in example_inputs)
    with torch.no_grad(): answer = net(*xb)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter('ignore')
            pruner = tp.pruner.BasePruner(net, xb if len(xb) > 1 else xb[0], importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=ratio,
                                          ignored_layers=[_answering(net, answer.shape[1])], round_to=round_to)
            pruner.step()
        with torch.no_grad(): after = net(*xb)
    except Exception as e:      # a tracer meets whatever people write: shapes baked into reshapes, unknown operations, …
        raise BadValue(f'prune: torch-pruning cannot cut this network ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""})') from e
    if after.shape != answer.shape: raise BadValue(f'prune: cut, the network answers {tuple(after.shape)} instead of {tuple(answer.shape)}')
    if widths(net) == widths(model): raise BadValue(f'prune: no layer is wide enough to lose {ratio:.0%} of its channels and keep a multiple of {round_to}')
    return net.train(model.training)


def widths(model: nn.Module) -> list[int]:
    "The number of output channels of each convolution and linear layer, in the order of the modules."
    return [m.weight.shape[0] for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))]


def _answering(net: nn.Module, n_out: int) -> nn.Module:
    "The last layer as wide as the answer."
    wide = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.weight.shape[0] == n_out]
    if not wide: raise BadValue(f'prune: no layer of this network has the {n_out} outputs of its answer')
    return wide[-1]
