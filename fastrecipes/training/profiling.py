"Where the time of a fit goes: data, forward, backward, step, and each callback; how busy the device was meanwhile."
import os
import time
from collections import Counter
from functools import partial

import torch
from fastai.basics import Learner
from matplotlib.figure import Figure

from fastrecipes.errors import BadValue
from fastrecipes.files import writes
from fastrecipes.repairs import REPAIRS, fitting, is_trial
from fastrecipes.technique import TechniqueCallback, put, say, technique
from fastrecipes.training.precision import device_of

__all__ = ['Profile', 'Profiled']

# what has just been done when an event begins; between the others there is only the loop
BEFORE = dict(before_batch='data', after_train='data', after_validate='data', after_pred='forward', after_loss='loss', after_backward='backward', after_step='step', after_batch='step')
PHASES = ('data', 'forward', 'loss', 'backward', 'step')
MUCH, IDLE, EVERY = .25, .7, .5                 # a share of the time worth a word; of a GPU's; seconds between two looks at it


class Profiled:
    """What `profile` measured of one fit. `.seconds[mode, what]`: of 'train' and 'valid', in 'data', 'forward', 'loss', 'backward', 'step', each callback by its class, and 'rest'.

    `.batches[mode]`: how many. `.start`: seconds until the first training batch was done, which are in none of the others. `.busy`: the share of the time that
    the GPU was at work, or the cores of a CPU. Printed, it is a table with a word about what takes more than it should; `.plot()` draws it."""
    def __init__(self): self.seconds, self.batches, self.start, self.busy, self.device = Counter(), Counter(), 0., None, ''

    @property
    def total(self) -> float: return sum(self.seconds.values())

    def parts(self, mode: str) -> dict[str, float]:
        "Seconds of `mode` by what they went to: the phases in their order, callbacks by time, and the rest."
        own = {what: s for (m, what), s in self.seconds.items() if m == mode}
        callbacks = sorted((w for w in own if w not in PHASES and w != 'rest'), key=lambda w: -own[w])
        return {w: own[w] for w in (*PHASES, *callbacks, 'rest') if own.get(w)}

    @property
    def words(self) -> list[str]:
        "What takes more of the training than it should, and what helps."
        said, train = [], self.parts('train')
        whole = sum(train.values()) or 1.
        if self.busy is not None and self.device.startswith('cuda') and self.busy < IDLE:
            said.append(f'the GPU was at work {self.busy:.0%} of the time: larger batches, to_bf16() and compile() give it more to do at once')
        if train.get('data', 0)/whole > MUCH: said.append(f'training waits for data {train["data"]/whole:.0%} of the time: cache() decodes images once; else more workers')
        slow = [w for w, s in train.items() if w not in PHASES and w != 'rest' and s/whole > MUCH]
        if slow: said.append(f'{slow[0]} takes {train[slow[0]]/whole:.0%} of the training')
        return said

    def __str__(self):
        lines = []
        for mode, title in (('train', 'training'), ('valid', 'validation')):
            parts, n = self.parts(mode), self.batches[mode]
            if not n: continue
            whole, wide = sum(parts.values()), max(map(len, parts))
            lines += [f'{title}: {n:,} batches, {1e3*whole/n:.2f} ms each', *(f'  {w.ljust(wide)}  {1e3*s/n:9.3f} ms  {s/whole:6.1%}' for w, s in parts.items())]
        lines.append(f'until the first batch was done: {self.start:.2f} s' + ('' if self.busy is None else f'; {self.device} busy {self.busy:.0%} of the time'))
        return '\n'.join([*lines, *self.words])

    def plot(self) -> Figure:
        "A bar for training and one for validation: seconds by what they went to."
        fig = Figure(figsize=(9, 2.6), layout='constrained')
        ax, modes = fig.subplots(), [m for m in ('valid', 'train') if self.batches[m]]
        names = list(dict.fromkeys(w for m in reversed(modes) for w, s in self.parts(m).items() if s > .01*self.total or w in PHASES))
        colours = dict(zip(names, ['#4477aa', '#66ccee', '#228833', '#ccbb44', '#ee6677', '#aa3377', '#999933', '#882255', '#44aa99', '#117733']*3))      # Paul Tol's, for all eyes
        left = Counter()
        for name in [*names, 'all else']:
            widths = [self.parts(m).get(name, 0) if name in names else sum(s for w, s in self.parts(m).items() if w not in names) for m in modes]
            if not any(widths): continue
            ax.barh([dict(train='training', valid='validation')[m] for m in modes], widths, left=[left[m] for m in modes], color=colours.get(name, '#bbbbbb'), label=name)
            left.update(dict(zip(modes, widths)))
        ax.set_xlabel('seconds')
        ax.legend(ncols=4, loc='lower center', bbox_to_anchor=(.5, 1.), frameon=False)
        for side in ('top', 'right'): ax.spines[side].set_visible(False)
        return fig


class Profile(TechniqueCallback):
    "Look at the clock at the begin and the end of each event, and around each callback; on a GPU wait for it each time, so that its work counts where it was asked for."
    transient = ('mark', 'inside', 'looked', 'looks', 'used')

    def __init__(self): self.found, self.mark, self.inside = None, None, False

    def before_fit(self):
        if not fitting(self.learn) or is_trial(self.learn): return
        self.found, self.inside, self.looks, self.device = Profiled(), False, [], device_of(self.learn)
        self.found.device = 'cores' if self.device.type == 'cpu' else str(self.device)
        self.learn._watch, self.mark = self._around, self._now()
        self.begun, self.looked, self.used = False, self.mark, time.process_time()

    def _now(self) -> float:
        if self.device.type == 'cuda': torch.cuda.synchronize()
        return time.perf_counter()

    def _around(self, cbs: list, name: str) -> list:
        "Who is told of the event `name`: the clock first and last, and each callback by it."
        return [self._starts, *(partial(self._timed, cb) for cb in cbs), self._ends]

    def _count(self, what: str, mode=None):
        now, mode = self._now(), mode or ('train' if self.learn.training else 'valid')
        if self.begun: self.found.seconds[mode, what] += now-self.mark
        else: self.found.start += now-self.mark
        self.mark = now

    def _starts(self, name):
        if not self.inside: self._count(BEFORE.get(name, 'rest') if self.learn.training or name != 'after_batch' else 'rest')

    def _timed(self, cb, name):
        if self.inside: return cb(name)         # an event of what a callback does, such as a validation of its own
        self.inside, self.mark, mode = True, self._now(), 'train' if self.learn.training else 'valid'
        try: cb(name)
        finally:
            self.inside = False
            if vars(self.learn).get('_watch'): self._count('rest' if cb is self else type(cb).__name__, mode)

    def _ends(self, name):
        if self.inside: return
        self.mark = self._now()
        if name != 'after_batch': return
        if self.begun: self.found.batches['train' if self.learn.training else 'valid'] += 1
        self.begun = True
        if self.device.type == 'cuda' and self.mark-self.looked > EVERY:
            self.looked = self.mark
            try: self.looks.append(torch.cuda.utilization(self.device)/100)
            except Exception: self.looked = float('inf')        # it takes NVIDIA's package pynvml

    def after_fit(self):
        if self._stop() is None: return
        if writes(): print(self.found if self.found.batches['train'] else 'profile: a fit of one batch, nothing to tell')

    def abort(self, level):
        if level == 'fit': self._stop()

    def _stop(self):
        "No longer watch; what was found, where a fit was."
        if vars(self.learn).pop('_watch', None) is None: return None
        if self.device.type == 'cuda': self.found.busy = sum(self.looks)/len(self.looks) if self.looks else None
        elif (wall := self.found.total + self.found.start) > 0: self.found.busy = min(1., (time.process_time()-self.used)/wall/(os.cpu_count() or 1))
        return self.found


@technique('train', section='Training', source='https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html')
def profile(self: Learner) -> Learner:
    """Measure where the time of each fit goes: data, forward, loss, backward, step, and every callback; nothing else changes.

    After the fit it prints a table, with a word where training waits for data, a callback takes a quarter of it, or a GPU has too little to do (seen by
    NVIDIA's own count, where the package pynvml is installed). `learn.profile_cb.found` holds the numbers, `.found.plot()` draws them. On a GPU it waits for
    each phase to end, which takes some time itself. `lr_find` is not measured. Raises `ValueError` where the mends of fastai are switched off."""
    if not REPAIRS: raise BadValue('profile: needs the mends of fastai; unset FASTRECIPES_REPAIRS')
    say(self, 'profile', 'the time of each fit, part by part, is printed after it, and kept in learn.profile_cb.found')       # no figures: no two runs have the same
    return put(self, Profile())
