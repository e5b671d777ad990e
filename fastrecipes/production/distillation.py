"Learn from a bigger network: its probabilities say more of an image than one label does."
from copy import deepcopy
from pathlib import Path

import torch
from fastai.basics import Learner, load_learner, nn
from fastai.callback.hook import total_params
from torch.nn import functional as F

from fastrecipes.data.statistics import PixelMap, normalization_of
from fastrecipes.errors import BadValue, NotThere
from fastrecipes.objective import Objective, cross_entropy_of, objective
from fastrecipes.technique import TechniqueCallback, put, say, technique
from fastrecipes.training.precision import device_of

__all__ = ['Distill', 'Renormalize', 'soft_divergence']


def soft_divergence(student: torch.Tensor, teacher: torch.Tensor, T: float = 4., axis: int = -1) -> torch.Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), the mean over samples, of logits with classes along `axis`; ≥ 0, lower is better.

    T² keeps its gradient on the scale of a cross entropy, whatever T. Computed in float32 at least."""
    logits = [x if x.dtype == torch.float64 else x.float() for x in (student, teacher)]
    logp, logq = (F.log_softmax(x.movedim(axis, -1)/T, -1) for x in logits)
    return T*T*F.kl_div(logp, logq, reduction='none', log_target=True).sum(-1).mean()


class Renormalize(nn.Module):
    "Undo the normalisation of one Learner's pixels and apply another's."
    def __init__(self, theirs: PixelMap, ours: PixelMap):
        super().__init__()
        self.undo, self.do = theirs.inverse(), ours

    def forward(self, x): return self.do(self.undo(x))


class Distill(TechniqueCallback):
    "Ask the teacher about each training batch, and blend the loss that is differentiated with the divergence from its answer."
    order, run_valid = Objective.order+.5, False        # after the loss that it blends with, before penalties, which are not to be blended

    def __init__(self, teacher: nn.Module, T: float, alpha: float): self.teacher, self.T, self.alpha, self.answer = teacher, T, alpha, None

    def before_fit(self):
        self.teacher.eval().to(device_of(self.learn))

    def after_pred(self):                               # here and not after the loss: low precision holds for the teacher too
        if not self.learn.training or not len(self.learn.yb): return
        with torch.no_grad(): self.answer = self.teacher(*self.learn.xb)
        if self.answer.shape != self.learn.pred.shape:
            raise BadValue(f'distill: the teacher answers {tuple(self.answer.shape)} where the student answers {tuple(self.learn.pred.shape)}')

    def after_loss(self):
        if self.answer is None: return
        axis = cross_entropy_of(self.learn.loss_func).axis
        soft = soft_divergence(self.learn.pred, self.answer, self.T, axis)
        loss = (1-self.alpha)*self.learn.loss_grad + self.alpha*soft
        self.learn.loss_grad, self.learn.loss, self.answer = loss, loss.detach().clone(), None


@technique('loss', section=('Distillation', 'Regularization'), source='arXiv:1503.02531', touches=('targets',),
           example=lambda learn: dict(teacher=deepcopy(learn.model)))
def distill(self: Learner, teacher: Learner | nn.Module | str, T: float = 4., alpha: float = .9) -> Learner:
    """Train a network on what a teacher says of each image, beside its label.

    `teacher`: a Learner, a network, or the run folder or file of an exported Learner; it is copied, frozen, in evaluation mode, and
    sees the same (mixed, augmented) batch, normalised as it was trained. `T` > 0 softens both answers. `alpha` in [0, 1] is the
    weight of the teacher; the rest is the training loss as it was. A small student becomes a faster model of nearly the teacher's
    accuracy, given epochs enough: at equal epochs the gain is near zero. Validation loss stays the data's own. Raises `ValueError`
    outside the ranges, for a loss that is not a cross entropy, and for a teacher of other classes; `FileNotFoundError` for no such teacher."""
    if not T > 0: raise BadValue(f'distill: T must be > 0, got {T}')
    if not 0 <= alpha <= 1: raise BadValue(f'distill: alpha must be in [0, 1], got {alpha}')
    if cross_entropy_of(self.loss_func) is None:
        raise BadValue(f"distill: the loss must be a cross entropy over classes, got {self.loss_func}; elsewhere train on the teacher's answers as targets")
    objective(self)
    net = _teacher(self, teacher)
    put(self, Distill(net, T, alpha))
    sizes = [total_params(m)[0] for m in (net, self.model)]
    say(self, 'distill', f'a teacher of {sizes[0]:,} parameters for a student of {sizes[1]:,}')
    return self


def _teacher(student: Learner, teacher) -> nn.Module:
    "A frozen copy of the teacher's network that takes the student's batches."
    if isinstance(teacher, (str, Path)): teacher = _loaded(Path(teacher))
    net = deepcopy(teacher.model if isinstance(teacher, Learner) else teacher)
    if not isinstance(net, nn.Module): raise BadValue(f'distill: teacher must be a Learner, a network or the path of an exported Learner, got {type(teacher).__name__}')
    if isinstance(teacher, Learner):
        ours, theirs = (list(map(str, getattr(o.dls, 'vocab', None) or [])) for o in (student, teacher))
        if ours != theirs: raise BadValue(f'distill: the teacher knows the classes {theirs}, the student is to learn {ours}')
        one, two = normalization_of(student), normalization_of(teacher)
        if one is not None and two is not None and not one.same_as(two): net = nn.Sequential(Renormalize(one, two), net)
    return net.eval().requires_grad_(False)


def _loaded(path: Path) -> Learner:
    file = path/'learner.pkl' if path.is_dir() else path
    if not file.is_file(): raise NotThere(f'distill: no exported Learner {file}; give a run folder, or the file that `learn.export` wrote')
    return load_learner(file)
