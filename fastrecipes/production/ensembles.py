"Several classifiers that answer as one: combined, measured against the best of them, and, where they are networks, one network that is shipped."
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, nn
from fastai.data.core import DataLoaders, TfmdDL
from fastai.metrics import accuracy

from fastrecipes.arguments import checked
from fastrecipes.data.loaders import Indexed
from fastrecipes.data.statistics import normalization_of, normalized_by
from fastrecipes.errors import BadValue, few, nearest
from fastrecipes.production.bundle import TOLERANCE
from fastrecipes.production.calibration import Calibration, calibrated
from fastrecipes.production.entries import Images
from fastrecipes.production.evaluation import Evaluation, judged
from fastrecipes.production.export import activation_of, contract_if_any
from fastrecipes.production.formats import to_onnx
from fastrecipes.production.members import Estimator, Network, member_of, pixels_in
from fastrecipes.production.quantized import Quantized
from fastrecipes.production.voting import LEAST, Mean, Vote, meta_learner, mixture_weights, vote_weights
from fastrecipes.report.evidence import held_out

__all__ = ['Ensemble', 'Joint']

Kind = Literal['average', 'weighted', 'majority', 'weighted_vote', 'blending', 'stacking']
FITTED = dict(weighted=lambda p, y: Mean(mixture_weights(p, y)), weighted_vote=lambda p, y: Vote(vote_weights(p, y)), blending=meta_learner, stacking=meta_learner)
SIDES = ('train', 'validation', 'test')


class Ensemble:
    """Several `members` that answer as one: fastai Learners, of any architectures; scikit-learn classifiers; functions (see `Estimator`).

    `kind`: 'average' (the mean of the probabilities), 'weighted' (by weights ≥ 0 of sum 1), 'majority' (a vote each), 'weighted_vote', 'blending' (a logistic
    regression on all probabilities), 'stacking' (the same, fitted to out-of-fold answers: see the function `stacking`). `weights`, one a member, for those two
    kinds; else, and for blending, `.fit()` finds them on validation images. `dls`: the data that it is asked about (default: those of the first Learner); every
    member sees them by its own transforms, at its own size, normalised by its own numbers. `flip`: each answer is the mean of those for the image and for
    its mirror image; then one member will do.

    `.get_preds(ds_idx=1, dl=None)`, `.predict(item)` as a Learner has them, `.probabilities(items)`; `.evaluate()` compares it with its members;
    `.as_learner()`, `.to_onnx(path)` and `ship(ensemble, dir)` for members that are networks on the same pixels. Raises `ValueError`: fewer than two members, other
    classes, an unknown kind, members that were trained on images that the ensemble is measured on."""
    @checked
    def __init__(self, members: Sequence, kind: Kind = 'average', *, weights: Sequence[float] | None = None, dls: DataLoaders | None = None,
                 names: Sequence[str] | None = None, flip: bool = False):
        check_kind(kind)
        self.members, self.kind, self.flip = [member_of(o) for o in members], kind, flip
        if len(self.members) < (1 if flip else 2): raise BadValue(f'members: at least 2, got {len(self.members)}')
        learners = [m.learn for m in self.members if isinstance(m, Network)]
        if dls is None and not learners: raise BadValue('dls: none of the members is a Learner, so give the data: dls=…')
        self.dls = dls if dls is not None else learners[0].dls
        self.names = list(names) if names else [str(m) if isinstance(m, Estimator) else f'network {i+1}' for i, m in enumerate(self.members)]
        if len(self.names) != len(self.members): raise BadValue(f'names: one for each of the {len(self.members)} members, got {len(self.names)}')
        self._check(learners)
        if weights is not None:
            if kind not in ('weighted', 'weighted_vote'): raise BadValue(f"weights: go with kind='weighted' or 'weighted_vote', got {kind=}")
            if len(weights) != len(self.members): raise BadValue(f'weights: one for each of the {len(self.members)} members, got {len(weights)}')
        self.fitted_on, self.calibration = None, None
        self.combine = Mean() if kind == 'average' else Vote() if kind == 'majority' else None if weights is None else (Mean if kind == 'weighted' else Vote)(weights)

    def _check(self, learners: list[Learner]):
        held = {o for dl in self.dls.loaders[1:] for o in getattr(dl, 'items', ()) if isinstance(o, (str, Path))}
        for i, m in enumerate(self.members):
            if not isinstance(m, Network): continue
            if (own := list(m.learn.dls.vocab)) != self.vocab: raise BadValue(f'members: must know the same classes, {self.names[i]} has {few(own)}, the data have {few(self.vocab)}')
            if seen := held & {o for o in getattr(m.learn.dls.train, 'items', ()) if isinstance(o, (str, Path))}:
                raise BadValue(f'members: {self.names[i]} was trained on {len(seen)} of the {len(held)} images that the ensemble is measured on; train all members on the same loaders')

    @property
    def name(self) -> str: return f'ensemble ({self.kind}{", flip" if self.flip else ""})'

    @property
    def vocab(self) -> list: return list(self.dls.vocab)

    @property
    def weights(self) -> np.ndarray | None:
        "How much each member counts `(m,)`, of sum 1; None where a meta-learner decides."
        if not isinstance(c := self._ready(), (Mean, Vote)): return None
        return np.full(len(self.members), 1/len(self.members)) if c.weights is None else c.weights.numpy()

    def _ready(self) -> nn.Module:
        if self.combine is not None: return self.combine
        if self.kind == 'stacking': raise BadValue("stacking: its meta-learner is fitted to out-of-fold answers, made by stacking(makes, dls); kind='blending' takes validation images")
        raise BadValue(f'{self.kind}: call fit() first' + ('' if self.kind == 'blending' else ', or give weights'))

    def fit(self, ds_idx: int = 1) -> 'Ensemble':
        "Fit the weights, or the meta-learner, to the answers for the validation images (`ds_idx` 1), on which it then looks too good. Kinds that have none stay as they are."
        if self.kind not in FITTED: return self
        if self.kind == 'stacking':
            self._ready()
            return self
        p, y = self.answers(self._side(ds_idx))
        return self.fit_to(p, y, SIDES[ds_idx])

    def fit_to(self, p, y, side: str | None = None) -> 'Ensemble':
        "Fit to the members' probabilities `(n, m, c)` for samples of classes `(n,)`, those of `side`."
        p, y = np.asarray(p), np.asarray(y)
        if p.ndim != 3 or p.shape[1:] != (len(self.members), len(self.vocab)): raise BadValue(f'fit_to: probabilities (n, {len(self.members)}, {len(self.vocab)}), got {p.shape}')
        if self.kind in FITTED: self.combine, self.fitted_on = FITTED[self.kind](p, y), side
        self.calibration = None
        return self

    def _side(self, ds_idx: int) -> TfmdDL:
        if not 0 <= ds_idx < len(self.dls.loaders) or not len(self.dls.loaders[ds_idx].dataset): raise BadValue(f'ds_idx: there are no images at {ds_idx} (1 validation, 2 test)')
        return self.dls.loaders[ds_idx]

    def answers(self, dl: TfmdDL) -> tuple[torch.Tensor, torch.Tensor | None]:
        "What each member says: probabilities `(n, m, c)` for the samples of `dl`, in order; and their classes `(n,)`, None where `dl` has none."
        said, views = [], (False, True) if self.flip else (False,)
        seen = {flip: pixels_in(dl, flip=flip) for flip in views} if any(isinstance(m, Estimator) for m in self.members) else {}
        for m in self.members:
            each = [m.answers(dl, self.vocab, flip=flip, seen=seen.get(flip)) for flip in views]
            said.append((torch.stack([p for p, _ in each]).mean(0), each[0][1]))
        return torch.stack([p for p, _ in said], 1), said[0][1]

    def get_preds(self, ds_idx: int = 1, dl: TfmdDL | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        "Probabilities `(n, c)` for the samples of `dl`, or of `dls[ds_idx]`, in order, and their classes."
        self._ready()
        p, y = self.answers(self._side(ds_idx) if dl is None else dl)
        return self.combined(p), y

    def combined(self, p: torch.Tensor) -> torch.Tensor:
        "The answer `(n, c)` that the members' probabilities `(n, m, c)` come to, in 32 bits."
        p = self._ready()(torch.as_tensor(p).double())
        return (p if self.calibration is None else tempered(p, self.calibration.T)).float()

    def probabilities(self, items) -> np.ndarray:
        "Probabilities `(n, c)` for a list of what the data are made of, such as image files; or for a tensor of inputs `(n, …)`, where the data are torch's."
        if isinstance(items, torch.Tensor): return self.get_preds(dl=self.dls.valid.new(Indexed(_Unlabelled(items), self.vocab)))[0].numpy()
        return self.get_preds(dl=self.dls.test_dl(list(items)))[0].numpy()

    def predict(self, item) -> tuple[str, torch.Tensor, torch.Tensor]:
        "`(label, its number, the probabilities (c,))` for one item, as `learn.predict` has it."
        p = torch.from_numpy(self.probabilities(item[None] if isinstance(item, torch.Tensor) else [item])[0])
        return str(self.vocab[int(p.argmax())]), p.argmax(), p

    @checked
    def evaluate(self, ds_idx: int | None = None) -> Evaluation:
        "How well it and each member do on the test images, or those of `ds_idx`; the best member is the one that does best on the validation images."
        ds_idx = held_out(self.dls)[0] if ds_idx is None else ds_idx
        (p, y), side = self.answers(self._side(ds_idx)), SIDES[ds_idx]
        chosen = self.answers(self._side(1)) if side == 'test' else (p, y)
        joint = self.combined(p)
        votes = self.combine.votes(p.double()) if isinstance(self.combine, Vote) else None
        ties = 0 if votes is None else int((self.combine.tied(votes).sum(1) > 1).sum())
        return judged(self.name, self.kind, side, self.names, p.numpy(), joint.numpy(), y, chosen[0].numpy(), chosen[1],
                      None if self.kind in ('average', 'majority') else self.weights, ties, self.fitted_on == side)

    def calibrate(self, ds_idx: int = 1) -> Calibration:
        "Fit one temperature to the ensemble's own answers for the validation images (see `learn.calibrate`): p^(1/T), over their sum. The label stays."
        self.calibration = None
        p, y = self.get_preds(ds_idx)
        self.calibration = calibrated(p.double().clamp(LEAST).log(), y)
        return self.calibration

    def as_learner(self) -> Learner:
        """One Learner, whose network holds all members and how they are combined: it validates, predicts, is exported, shipped, distilled from.

        Its outputs are log-probabilities, its pixels come in [0, 1], each member normalises them by itself. Raises `ValueError` where a member is no
        network, or sees other pixels than the others: another size or way to resize."""
        combine = self._ready()
        named = list(zip(self.names, self.members))
        if no := [n for n, m in named if not isinstance(m, Network)]:
            raise BadValue(f'members: {few(no)} is no network, and one graph cannot hold it; export an ensemble of the networks alone, or serve this one in Python')
        if no := [n for n, m in named if isinstance(m.learn.model, Quantized)]:
            raise BadValue(f'members: {few(no)} is in 8 bits; make the ensemble of the float Learners, and quantize what as_learner gives')
        contracts = [contract_if_any(m.learn) for m in self.members]
        if len({str(c) for c in contracts}) > 1:
            told = [f'{n} takes {"×".join(map(str, c["size"]))} px ({c["resize"]})' if c else f'{n} no files of image_folder' for n, c in zip(self.names, contracts)]
            raise BadValue(f'members: in one graph all must read images alike, and {", ".join(told)}')
        branches = [Images(deepcopy(m.learn.model).cpu().float(), activation_of(m.learn.loss_func), normalization_of(m.learn)) for m in self.members]
        model = Joint(branches, deepcopy(combine).float(), self.flip, self.calibration.T if self.calibration else 1.).eval()
        learn = Learner(normalized_by(self.dls, None), model, CrossEntropyLossFlat(), metrics=[accuracy])
        learn.ensemble = dict(kind=self.kind, members=list(self.names), flip=self.flip, **({} if self.weights is None else dict(weights=[round(float(w), 6) for w in self.weights])))
        if self.calibration: learn.calibration = self.calibration
        return self._checked(learn)

    def _checked(self, learn: Learner) -> Learner:
        "Raise where the network does not answer as the ensemble does: then a member's transforms do something that the network cannot know."
        dl = self.dls.valid
        if not len(dl.dataset): return learn
        p, q = self.get_preds(1)[0], Network(learn).answers(dl)[0]
        if (off := float((p-q).abs().max())) > TOLERANCE:
            raise BadValue(f'members: as one network they answer otherwise, by up to {off:.2g}: the validation transforms of some do more than resize, scale and normalise')
        return learn

    def to_onnx(self, path) -> Path:
        "Write all members and how they are combined as one graph: uint8 pixels `(n, h, w, 3)` in, probabilities out, labels and input as metadata. Raises as `as_learner` does."
        return to_onnx(self.as_learner(), path).path

    def __repr__(self): return f'Ensemble({self.kind}{", flip" if self.flip else ""}) of {", ".join(self.names)}'


class Joint(nn.Module):
    "The members of an ensemble as one network: inputs, pixels in [0, 1] where they are images, → log-probabilities `(n, c)`, divided by the temperature `T`."
    def __init__(self, branches, combine: nn.Module, flip: bool = False, T: float = 1.):
        super().__init__()
        self.branches, self.combine, self.flip, self.T = nn.ModuleList(branches), combine, flip, T

    def forward(self, x):
        p = torch.stack([b(x) for b in self.branches], 1)
        if self.flip: p = (p + torch.stack([b(x.flip(-1)) for b in self.branches], 1))/2
        return self.combine(p).clamp_min(1e-30).log()/self.T


def tempered(p: torch.Tensor, T: float) -> torch.Tensor:
    "Probabilities to the power of 1/T, over their sum."
    return (p.clamp_min(1e-30).log()/T).softmax(1)


def check_kind(kind):
    "Raise for a kind that there is not."
    if kind not in get_args(Kind): raise BadValue(f'kind: one of {", ".join(get_args(Kind))}, got {kind!r}{nearest(kind, get_args(Kind))}')


class _Unlabelled(torch.utils.data.Dataset):
    "Inputs without classes."
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], 0
