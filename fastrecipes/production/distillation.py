"Learn from a bigger network: its probabilities say more of an image than one label does."
import warnings
from copy import deepcopy
from pathlib import Path

import torch
from fastai.basics import Learner, load_learner, nn, to_detach, to_device
from fastai.callback.hook import total_params
from torch.nn import functional as F

from fastrecipes.data.loaders import samples
from fastrecipes.data.statistics import PixelMap, normalization_of
from fastrecipes.errors import BadValue, NotThere, few
from fastrecipes.objective import Objective, cross_entropy_of, objective
from fastrecipes.production.export import contract_if_any
from fastrecipes.production.matching import Match, match
from fastrecipes.randomness import forked
from fastrecipes.technique import TechniqueCallback, put, say, technique
from fastrecipes.training.precision import device_of

__all__ = ['Distill', 'Renormalize', 'soft_divergence']

SOME, FEW = 64, 20      # validation samples that a teacher is tried on; below so many an accuracy says nothing


def soft_divergence(student: torch.Tensor, teacher: torch.Tensor, T: float = 4., axis: int = -1) -> torch.Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), the mean over samples, of logits with classes along `axis`; ≥ 0, lower is better.

    T² keeps its gradient on the scale of a cross entropy, whatever T. Computed in float32 at least."""
    logits = [x if x.dtype == torch.float64 else x.float() for x in (student, teacher)]
    logp, logq = (F.log_softmax(x.movedim(axis, -1)/T, -1) for x in logits)
    return T*T*F.kl_div(logp, logq, reduction='none', log_target=True).sum(-1).mean()


class Renormalize(nn.Module):
    "Undo the normalisation of one Learner's pixels and apply another's; None: pixels in [0, 1] as they are."
    def __init__(self, theirs: PixelMap | None, ours: PixelMap | None):
        super().__init__()
        self.undo, self.do = theirs.inverse() if theirs else nn.Identity(), ours or nn.Identity()

    def forward(self, x): return self.do(self.undo(x))


class Distill(TechniqueCallback):
    "Ask the teacher about each training batch, and blend the loss that is differentiated with the divergence from its answer."
    order, run_valid = Objective.order+.5, False        # after the loss that it blends with, before penalties, which are not to be blended

    def __init__(self, teacher: nn.Module, T: float, alpha: float, pixels: PixelMap | None = None):
        self.teacher, self.T, self.alpha, self.pixels, self.answer = teacher, T, alpha, pixels, None

    def before_fit(self):
        if not _same(self.pixels, normalization_of(self.learn)): raise BadValue('distill: pixels are normalised otherwise than when it was called; call normalize first, then distill')
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
           example=lambda learn: dict(teacher=deepcopy(learn.model)),
           formula=r'L = (1-\alpha)\,\ell(z_s, y) + \alpha\,T^2\,\mathrm{KL}\big(\mathrm{softmax}(z_t/T)\,\big\|\,\mathrm{softmax}(z_s/T)\big)')
def distill(self: Learner, teacher: Learner | nn.Module | str, T: float = 4., alpha: float = .9, features: float | None = None, attention: float | None = None,
            layers: dict[str, str] | None = None) -> Learner:
    """Train a network on what a teacher says of each image, beside its label.

    `teacher`: a Learner, a network, or the run folder or file of an exported Learner (a pickle: load those of your own only); it is copied, frozen, in evaluation mode, and
    sees the same (mixed, augmented) batch, normalised as it was trained. `T` > 0 softens both answers. `alpha` in [0, 1] is the
    weight of the teacher; the rest is the training loss as it was. A small student becomes a faster model of nearly the teacher's
    accuracy, given epochs enough: at equal epochs the gain is near zero. Validation loss stays the data's own.

    `features` > 0 adds, with that weight, the squared error of the teacher's hidden maps as a 1×1 convolution, trained along and then gone, makes
    them of the student's (FitNets, arXiv:1412.6550): try 1. `attention` > 0 adds the squared distance of where both look (arXiv:1612.03928),
    0 to 2, without parameters: try 10. Layers are paired by themselves, the last at each size of map, or by `layers`, {'layer3': 'layer4'}: the
    student's, the teacher's. Raises `ValueError` outside the ranges, for a loss that is not a cross entropy, for a teacher of other classes, and
    for layers that are not there; `FileNotFoundError` for no such teacher."""
    if not T > 0: raise BadValue(f'distill: T must be > 0, got {T}')
    if not 0 <= alpha <= 1: raise BadValue(f'distill: alpha must be in [0, 1], got {alpha}')
    for name, weight in (('features', features), ('attention', attention)):
        if weight is not None and not 0 < weight < float('inf'): raise BadValue(f'distill: {name} must be > 0, or None for none, got {weight}')
    if layers is not None and not (features or attention): raise BadValue('distill: layers are paired for features or attention, and both are off; give one a weight')
    if cross_entropy_of(self.loss_func) is None:
        raise BadValue(f"distill: the loss must be a cross entropy over classes, got {self.loss_func}; elsewhere train on the teacher's answers as targets")
    net = _teacher(self, teacher)
    paired = match(self, net[1] if _renormalized(net) else net, features or 0., attention or 0., layers) if features or attention else None
    objective(self)
    put(self, Distill(net, T, alpha, normalization_of(self)))
    self.remove_cb(Match)
    if paired: self.add_cb(paired)
    sizes = [total_params(m)[0] for m in (net, self.model)]
    effect = f'a teacher of {sizes[0]:,} parameters for a student of {sizes[1]:,}'
    said, doubt = _standing(self, net)
    effect += said + (_other_size(self, teacher) if doubt else '')
    if paired: effect += '; maps matched: ' + ', '.join(f'{b} → {a}' for a, b in paired.pairs)
    say(self, 'distill', effect, aloud=doubt)
    return self


def _standing(student: Learner, net: nn.Module) -> tuple[str, bool]:
    "How often the teacher is right on some of the student's validation samples, in words, and whether that is no better than one class for all."
    loaders, axis = student.dls.loaders, cross_entropy_of(student.loss_func).axis
    with forked('distill'), torch.no_grad():
        if len(loaders) < 2 or (batch := samples(loaders[1], SOME, spread=True)) is None: return '', False
        batch = to_detach(to_device(batch, device_of(student)), cpu=False)
        n_inp = getattr(student.dls, 'n_inp', max(1, len(batch)-1))
        xb, yb = batch[:n_inp], batch[n_inp:]
        try: said = net.to(device_of(student)).eval()(*xb)
        except RuntimeError as e: raise BadValue(f"distill: the teacher cannot take the student's batches: {str(e).splitlines()[0]}") from e
    if len(yb) != 1 or yb[0].is_floating_point() or said.ndim < 2 or said.argmax(axis).numel() != yb[0].numel(): return '', False
    y = yb[0].as_subclass(torch.Tensor).flatten()
    right, most = float((said.as_subclass(torch.Tensor).argmax(axis).flatten() == y).float().mean()), float(y.bincount().max()/len(y))
    poor = right <= most and len(batch[0]) >= FEW
    return f'; the teacher is right on {right:.1%} of {len(batch[0])} validation samples' + (f', and one class for all on {most:.1%}: it has little to teach' if poor else ''), poor


def _other_size(student: Learner, teacher) -> str:
    "That the teacher was trained on images of another size, where both say theirs."
    ours, theirs = (contract_if_any(o) if isinstance(o, Learner) else None for o in (student, teacher))
    if not ours or not theirs or ours['size'] == theirs['size']: return ''
    return '. Its images were {}×{} px, these are {}×{}'.format(*theirs['size'], *ours['size'])


def _renormalized(net) -> bool: return isinstance(net, nn.Sequential) and len(net) == 2 and isinstance(net[0], Renormalize)


def _teacher(student: Learner, teacher) -> nn.Module:
    "A frozen copy of the teacher's network that takes the student's batches."
    if isinstance(teacher, (str, Path)): teacher = _loaded(Path(teacher))
    net = deepcopy(teacher.model if isinstance(teacher, Learner) else teacher)
    if not isinstance(net, nn.Module): raise BadValue(f'distill: teacher must be a Learner, a network or the path of an exported Learner, got {type(teacher).__name__}')
    if isinstance(teacher, Learner):
        ours, theirs = (list(map(str, getattr(o.dls, 'vocab', None) or [])) for o in (student, teacher))
        if ours and theirs and ours != theirs: raise BadValue(f'distill: the teacher knows the classes {few(theirs)}, the student is to learn {few(ours)}')
        one, two = normalization_of(student), normalization_of(teacher)
        if not _same(one, two): net = nn.Sequential(Renormalize(one, two), net)
    return net.eval().requires_grad_(False)


def _same(one: PixelMap | None, two: PixelMap | None) -> bool: return one is two or one is not None and two is not None and one.same_as(two)


def _loaded(path: Path) -> Learner:
    file = path/'learner.pkl' if path.is_dir() else path
    if not file.is_file(): raise NotThere(f'distill: no exported Learner {file}; give a run folder, or the file that `learn.export` wrote')
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*load_learner.* uses Python', UserWarning)       # of pickles of others: who names a teacher trusts it
        return load_learner(file)
