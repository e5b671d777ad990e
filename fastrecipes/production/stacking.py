"A meta-learner on what members say of samples that they had not seen."
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from fastai.data.core import DataLoaders

from fastrecipes.data.splits import folds as folds_of
from fastrecipes.errors import BadValue
from fastrecipes.production.ensembles import Ensemble
from fastrecipes.production.members import check_makes, made, told
from fastrecipes.randomness import key_of

__all__ = ['out_of_fold', 'stacking']


def out_of_fold(makes: Sequence, dls: DataLoaders, folds: int = 5, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `(n, m, c)` for the training samples by members that had not seen them: each of `makes` is trained once for each fold, without it. And the folds `(n,)`.

    Folds hold each class in equal parts, and copies of a file in one. Raises `ValueError` for fewer folds than 2 or more than the smallest class can fill."""
    y, vocab = check_makes(makes, dls), list(dls.vocab)
    fold = np.array(folds_of(_keys(dls.train, len(y)), [str(k) for k in y], folds, seed))
    p = np.zeros((len(y), len(makes), len(vocab)), np.float32)
    for j, make in enumerate(makes):
        for k in range(folds):
            m = told(f'member {j+1} of {len(makes)}, without fold {k+1} of {folds}', lambda: made(make, dls, key_of(seed, 'fold', j, k) % 2**32, np.flatnonzero(fold != k)))
            p[fold == k, j] = m.answers(dls.train, vocab)[0].numpy()[fold == k]
    return p, fold


def stacking(makes: Sequence, dls: DataLoaders, *, folds: int = 5, seed: int = 42, names: Sequence[str] | None = None) -> Ensemble:
    """Train each of `makes` on all training samples, and a logistic regression on what they say of samples they had not seen: stacking (doi:10.1016/S0893-6080(05)80023-1).

    `makes`: functions `(dls, seed)` that train a Learner, or scikit-learn classifiers, two or more. What a member says of its own training samples is far too sure, so the
    meta-learner is fitted to out-of-fold answers (see `out_of_fold`). It costs `folds` + 1 trainings a member; `Ensemble(members, 'blending').fit()` costs none, and
    takes the validation images for it. Raises `ValueError` as `out_of_fold` does."""
    if len(makes) < 2: raise BadValue(f'makes: at least 2, got {len(makes)}')
    y = check_makes(makes, dls)
    p, _ = out_of_fold(makes, dls, folds, seed)
    whole = np.arange(len(y))
    members = [told(f'member {j+1} of {len(makes)}, on all', lambda: made(make, dls, key_of(seed, 'whole', j) % 2**32, whole)) for j, make in enumerate(makes)]
    return Ensemble(members, 'stacking', dls=dls, names=names).fit_to(p, y)


def _keys(dl, n: int) -> list[str]:
    "What must lie in one fold has one key: files of the same content; samples in memory are all different."
    items = getattr(dl, 'items', None)
    if items is None or not all(isinstance(o, (str, Path)) and Path(o).is_file() for o in items): return [str(i) for i in range(n)]
    return [blake2b(Path(o).read_bytes(), digest_size=16).hexdigest() for o in items]
