"""Metrics by name, exact over the whole set whatever the batch size: of counts or sums where they say all, of kept scores where nothing less will do.

fastai's own (`accuracy`, `mae`, `F1Score`, …) keep their names and what they do; those of the same name here also take masks with pixels to be
skipped, labels, one output for two classes, and classes that do not occur."""
import inspect

from fastai.basics import L, Learner, Metric

from fastrecipes.arguments import check_names, check_types
from fastrecipes.errors import BadName, nearest
from fastrecipes.metrics.base import Judge
from fastrecipes.metrics.counted import OVERLAPS, Accuracy, BalancedAccuracy, Overlap
from fastrecipes.metrics.regression import ERRORS, OfNumbers
from fastrecipes.metrics.scored import CalibrationError, OfProbabilities, RocAuc

__all__ = ['METRICS', 'metric']

METRICS = dict(accuracy=Accuracy, balanced_accuracy=BalancedAccuracy, **dict.fromkeys(OVERLAPS, Overlap), roc_auc=RocAuc,
               **dict.fromkeys(('log_loss', 'brier'), OfProbabilities), calibration_error=CalibrationError, **dict.fromkeys(ERRORS, OfNumbers))


def metric(name: str, /, **settings) -> Metric:
    """The metric `name`, to be reported after each epoch: `Learner(…, metrics=[metric('f1', pos_label='diseased'), metric('roc_auc')])`.

    accuracy, balanced_accuracy, precision, recall, f1, dice, iou, roc_auc, log_loss, brier, calibration_error; of numbers mbe, mae, mse, rmse,
    mape, mspe, rmspe. `METRICS[name].__doc__` has formula, range, which way is better, and settings. All take `name`, that of the column and for
    `monitor`; those of classes `axis`, where the classes lie in the outputs (found by the shapes), and `ignore_index`, targets to be left out
    (those that the loss ignores); those that count `thresh`, .5: a probability above it is a yes, for labels and one output. Each is exact over
    the validation set whatever the batch size, and over the processes of `to_distributed`; `early_stop(name)` knows which way is better.
    They take outputs `(n, c)` with class numbers `(n,)`, `(n, c, h, w)` with masks `(n, h, w)`, `(n, c)` with labels `(n, c)` of 0 and 1, and
    `(n, 1)` for two classes.
    Raises `TypeError` for an unknown name or setting, `ValueError` for a value outside its range and, before the first batch or at the first
    that is validated, for targets or classes that it cannot judge."""
    if name not in METRICS: raise BadName(f'metric: no metric named {name!r}{nearest(name, METRICS) or "."} There are {", ".join(METRICS)}')
    makes = [c.__init__ for c in METRICS[name].mro() if issubclass(c, Judge) and '__init__' in vars(c)]
    check_names(name, settings, [n for f in makes for n, p in inspect.signature(f).parameters.items() if p.kind is p.KEYWORD_ONLY])
    for f in makes: check_types(f, settings, name)
    return METRICS[name](name, **settings)


def _by_name():
    "Let `Learner(…, metrics=['f1', accuracy])` name metrics: fastai 2.8.12 takes a name for a function, and fails after the first epoch."
    of_fastai = Learner.metrics
    Learner.metrics = property(of_fastai.fget, lambda learn, ms: of_fastai.fset(learn, L(ms).map(lambda m: metric(m) if isinstance(m, str) else m)))


_by_name()
