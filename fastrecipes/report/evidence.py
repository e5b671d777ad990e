"What the report says of a trained Learner, gathered: its data, techniques, fits, and how well it does on images it never saw."
from dataclasses import dataclass

import numpy as np
from fastai.basics import Learner
from sklearn.metrics import confusion_matrix

from fastrecipes.production.export import export_learner
from fastrecipes.report import intervals
from fastrecipes.report.history import history
from fastrecipes.report.intervals import Estimate
from fastrecipes.report.page import Report, write_page
from fastrecipes.technique import TECHNIQUES, applied

__all__ = ['Scored', 'Row', 'score', 'differences', 'held_out', 'gather', 'keep_run']

WORST = 12      # mistakes shown


@dataclass(frozen=True)
class Scored:
    "Probabilities `(n, c)` for the images of one side, with their true classes `(n,)` and the side's name."
    probabilities: np.ndarray
    targets: np.ndarray
    side: str

    @property
    def predicted(self) -> np.ndarray: return self.probabilities.argmax(1)


@dataclass(frozen=True)
class Row:
    "One line of the report's table: a model by name, how right it is with its intervals, and what its training took in seconds."
    name: str
    accuracy: Estimate
    balanced_accuracy: Estimate
    seconds: float | None = None
    note: str = ''

    @classmethod
    def of(cls, name: str, scored: Scored, seconds: float | None = None, note: str = '') -> 'Row':
        y, p = scored.targets, scored.predicted
        return cls(name, intervals.accuracy(y, p), intervals.balanced_accuracy(y, p), seconds, note)


def differences(a: Scored, b: Scored) -> dict[str, Estimate]:
    "By how much `a` is better than `b` on the same images, metric by metric."
    return {m: intervals.difference(a.targets, a.predicted, b.predicted, m) for m in ('accuracy', 'balanced_accuracy')}


def held_out(dls) -> tuple[int, str]:
    "The loader that nothing was chosen on, and its name: the test set, or the validation set where there is no other."
    return (2, 'test') if len(dls.loaders) > 2 and len(dls.loaders[2].dataset) else (1, 'validation')


def score(learn: Learner) -> Scored:
    "The Learner's predictions on its held-out side."
    i, side = held_out(learn.dls)
    with learn.no_bar(): probabilities, targets = learn.get_preds(ds_idx=i)
    return Scored(probabilities.numpy(), targets.numpy(), side)


def gather(learn: Learner, run, scored: Scored, title: str, **more) -> Report:
    "The `Report` on `learn`; `more` adds fields or replaces them."
    past = history(learn)
    return Report(**dict(title=title, command=run.command, data=data_of(learn.dls), techniques=_techniques(learn),
                fits=[dict(name=f['name'], columns=f['columns'], rows=f['rows']) for f in past.fits],
                lr_find=past.found and dict(lrs=past.found.lrs, losses=past.found.losses, suggestion=past.found.lr),
                schedule=[r for f in past.fits for r in f['rates']],
                confusion=(confusion_matrix(scored.targets, scored.predicted, labels=range(len(learn.dls.vocab))), list(map(str, learn.dls.vocab))),
                mistakes=_mistakes(learn.dls, scored), provenance=run.provenance) | more)


def data_of(dls) -> dict:
    "What the report says of the data."
    h = getattr(dls, 'holdings', None)
    if h is None: return dict(path='(given as loaders)', classes=[], set_aside=[], duplicates=0, notes=[])
    return dict(path=h.path, classes=[dict(name=c, **n) for c, n in h.counts.items()],
                set_aside=[dict(path=p, reason=r) for p, r in h.set_aside], duplicates=h.duplicates, notes=h.notes, match=h.match if h.match not in h.notes else '')


def _techniques(learn) -> list[dict]:
    return [dict(name=n, arguments=a.arguments, effect=a.effect, summary=TECHNIQUES[n].summary, source=TECHNIQUES[n].source)
            for n, a in applied(learn).items()]


def _mistakes(dls, scored: Scored) -> list[dict]:
    "The images that were wrong with the most confidence, where images are files."
    items = getattr(dls.loaders[held_out(dls)[0]], 'items', None)
    if items is None: return []
    p, predicted, vocab = scored.probabilities, scored.predicted, list(map(str, dls.vocab))
    wrong = np.flatnonzero(predicted != scored.targets)
    return [dict(image=items[i], truth=vocab[scored.targets[i]], predicted=vocab[predicted[i]], probability=float(p[i, predicted[i]]))
            for i in sorted(wrong, key=lambda i: -p[i, predicted[i]])[:WORST]]


def keep_run(run, learn: Learner, report) -> None:
    "Write what a run leaves behind: history.csv, learner.pkl, what was compressed, report.html."
    if report.compression: report.compression.save(run)
    run.write_csv('history.csv', [dict(fit=f['name'], epoch=i, **dict(zip(f['columns'], row)))
                                  for f in history(learn).fits for i, row in enumerate(f['rows'])])
    export_learner(learn, run.path/'learner.pkl')
    write_page(report, run.path/'report.html')
    run.finish()
