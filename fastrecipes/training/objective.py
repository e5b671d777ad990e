"Techniques that change what is asked of the network: the training loss, never the one that is reported on validation data."
import numpy as np
import torch
from fastai.basics import Learner
from fastai.data.transforms import get_c
from sklearn.utils.class_weight import compute_class_weight

from fastrecipes.data.loaders import labels_of
from fastrecipes.errors import BadValue
from fastrecipes.objective import cross_entropy_of, objective
from fastrecipes.technique import say, technique

__all__ = []


@technique('loss', section='Loss', source='arXiv:1512.00567', touches=('targets',))
def label_smoothing(self: Learner, eps: float = .1) -> Learner:
    """Ask for 1−eps+eps/c on the right class and eps/c on each of the others, instead of 1 and 0.

    `eps` in [0, 1). It keeps the network from over-confidence and from learning wrong labels by heart; with rare classes it can
    cost balanced accuracy. Validation loss stays that of the plain targets. The value is that of
    `torch.nn.CrossEntropyLoss(label_smoothing=eps)`, also with class weights and mixed targets.
    Raises `ValueError` outside the range and for a loss that is not a cross entropy."""
    if not 0 <= eps < 1: raise BadValue(f'label_smoothing: eps must be in [0, 1), got {eps}')
    if cross_entropy_of(self.loss_func) is None:
        raise BadValue(f'label_smoothing: the loss must be a cross entropy over classes, got {self.loss_func}; other targets can be smoothed in the data')
    objective(self).smoothing = eps
    c = get_c(self.dls)
    say(self, 'label_smoothing', f'targets {1-eps+eps/c:.3f} and {eps/c:.4f} instead of 1 and 0' if c else f'targets smoothed by {eps}')
    return self


@technique('loss', section='Balance', source='doi:10.1093/oxfordjournals.pan.a004868', touches=('targets',),
           refuses={'balance': 'each makes up for rare classes, and together they would do it twice; keep one'})
def class_weights(self: Learner, weights: list[float] | None = None) -> Learner:
    """Let each sample count in the training loss by the weight of its class.

    `weights`: a number ≥ 0 for each class, in the order of the vocabulary; default: n/(c·n_class) of the training set, so that every
    class has the same say. The loss is Σwl/Σw, so that only the ratios of the weights matter, also with mixed or smoothed targets.
    Unlike `balance` it draws every sample once an epoch. Validation loss stays unweighted. Raises `ValueError` for a wrong number of
    weights, negative ones or all 0, for a loss that is not a cross entropy, and where a default is asked for and samples have no single class."""
    if cross_entropy_of(self.loss_func) is None:
        raise BadValue(f'class_weights: the loss must be a cross entropy over classes, got {self.loss_func}; for several labels a sample, BCEWithLogitsLossFlat(pos_weight=…)')
    c, given = get_c(self.dls), weights is not None
    if not given:
        try: labels = labels_of(self.dls.train, 'class_weights')
        except BadValue as e: raise BadValue(f'{e}; give weights, one a class') from None
        c, present = c or int(labels.max())+1, np.unique(labels)
        weights = np.zeros(c)
        weights[present] = compute_class_weight('balanced', classes=present, y=labels)
        weights = weights.tolist()
    if min(weights) < 0 or not sum(weights) > 0: raise BadValue(f'class_weights: weights must be ≥ 0 and not all 0, got {list(weights)}')
    if c and len(weights) != c: raise BadValue(f'class_weights: one weight for each of the {c} classes, got {len(weights)}')
    objective(self).class_weight = torch.tensor(weights, dtype=torch.float32)
    if max(weights) == min(weights): say(self, 'class_weights', 'the classes weigh the same: nothing is changed', aloud=True)
    else: say(self, 'class_weights', f'weights {min(weights):.3g} to {max(weights):.3g}' + ('' if given else ', from the shares of the classes'))
    return self
