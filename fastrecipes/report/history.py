"What happened in each fit of a Learner, kept for the report; and progress that reads well in a log."
import sys

from fastai.basics import Callback, Learner
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import LRFinder

__all__ = ['History', 'history', 'Lines', 'lines_unless_terminal']


class History(Callback):
    "Copy the Recorder's rows, rates and losses after each fit; `lr_find` is not a fit."
    order = 70                                   # after the Recorder and whoever judges its rows

    def __init__(self): self.fits, self.title, self.found = [], 'training', None

    @property
    def name(self): return 'history_cb'

    def after_fit(self):
        r = self.learn.recorder
        if not r.losses or any(isinstance(cb, LRFinder) for cb in self.learn.cbs): return   # `validate()` comes here too, with nothing trained
        self.fits.append(dict(name=self.title, columns=list(r.metric_names[1:-1]), rows=[[float(v) for v in row] for row in r.values],
                              rates=[float(v) for v in r.lrs], losses=[float(v) for v in r.losses]))


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
