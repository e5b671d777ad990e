"What happened in each fit of a Learner, kept for the report; and progress that reads well in a log."
import sys
import time

from fastai.basics import Callback, Learner
from fastai.callback.progress import ProgressCallback

from fastrecipes.repairs import fitting, is_trial

__all__ = ['History', 'history', 'Lines', 'lines_unless_terminal']


class History(Callback):
    "Copy the Recorder's rows, rates and losses after each fit, and add up the seconds that fits took; `lr_find` is not a fit."
    order, transient = 70, ('since',)            # after the Recorder and whoever judges its rows; a clock means nothing to a run that goes on

    def __init__(self): self.fits, self.title, self.found, self.seconds, self.since = [], 'training', None, 0., None

    @property
    def name(self): return 'history_cb'

    def before_fit(self): self.since = time.monotonic() if fitting(self.learn) and not is_trial(self.learn) else None

    def after_batch(self):
        if self.since is not None: self.seconds, self.since = self.seconds + time.monotonic() - self.since, time.monotonic()

    def after_fit(self):
        r = self.learn.recorder
        if self.since is None or not r.losses: return               # `validate()` comes here too, with nothing trained
        self.fits.append(dict(name=self.title, columns=list(r.metric_names[1:-1]), rows=[[float(v) for v in row] for row in r.values],
                              rates=[float(v) for v in r.lrs], losses=[float(v) for v in r.losses]))
        self.after_batch()
        self.since = None


def history(learn: Learner) -> History:
    "The `History` of `learn`; the first call adds it."
    if (cb := next((o for o in learn.cbs if type(o) is History), None)) is None: learn.add_cb(cb := History())
    return cb


class Lines:
    "A logger for fastai that prints one readable line an epoch."
    def __init__(self, recorder, title: str): self.recorder, self.title = recorder, title

    def __call__(self, row):
        cells = [f'{name} {v:.4f}' if isinstance(v, float) else f'{name} {v}' for name, v in zip(self.recorder.metric_names, row)]
        past = next((cb for cb in self.recorder.learn.cbs if type(cb) is History), None)
        act = f', {past.title}' if past and past.title != 'training' else ''
        print(f'  {self.title}{act}: ' + '  '.join(cells), flush=True)


def lines_unless_terminal(learn: Learner, title: str) -> Learner:
    "Bars in a terminal or a notebook, one line an epoch anywhere else: a bar redraws itself into thousands of characters of a log."
    if sys.stdout.isatty() or 'ipykernel' in sys.modules: return learn
    learn.remove_cb(ProgressCallback)
    learn.logger = Lines(learn.recorder, title)
    return learn
