"Techniques that change what is asked of the network: the training loss, never the one that is reported on validation data."
from fastai.basics import Learner

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
        raise BadValue(f'label_smoothing: the loss must be a cross entropy over classes, got {self.loss_func}')
    objective(self).smoothing = eps
    c = getattr(self.dls, 'c', None)
    say(self, 'label_smoothing', f'targets {1-eps+eps/c:.3f} and {eps/c:.4f} instead of 1 and 0' if isinstance(c, int) else f'targets smoothed by {eps}')
    return self
