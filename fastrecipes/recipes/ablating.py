"The runs of an ablation: in this process, in several, or on the nodes of a Ray cluster; each kept when it is done, and done again where a worker dies."
import contextlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fastai.basics import Learner
from joblib.externals.loky import get_reusable_executor       # scripts that call us need not hide behind __main__, and recipes may be closures
from joblib.externals.loky.process_executor import BrokenProcessPool, TerminatedWorkerError

from fastrecipes.errors import BadValue, NotThere
from fastrecipes.files import whole
from fastrecipes.recipes.arms import Arm, Outcome
from fastrecipes.report.evidence import Scored, held_out
from fastrecipes.report.history import history
from fastrecipes.training.reproducibility import clean_mem

__all__ = ['Kept', 'Training', 'pool_of', 'outcome_of']

RETRIES = 3             # how often the run of a worker that died is begun again: one that takes too much memory kills every worker
Job = tuple[Arm, int]


@dataclass(frozen=True)
class Training:
    "What a worker does for a job: `recipe(seed=…, **techniques)`, in silence and on one thread, so that the numbers are the same wherever it runs."
    recipe: Callable
    settings: dict              # name → what switches the technique on
    seeds: tuple[int, ...]

    def __call__(self, job: Job) -> Outcome:
        arm, i = job
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        highest = _high_water()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                since = time.monotonic()
                made = self.recipe(seed=self.seeds[i], **{n: on if n in arm else False for n, on in self.settings.items()})
                if isinstance(made, Outcome): return made
                outcome = outcome_of(made, time.monotonic()-since, highest)
        finally: torch.set_num_threads(threads)
        del made                                # the next run's memory is measured from where this one began
        clean_mem()
        return outcome


def outcome_of(learn: Learner, seconds: float, highest: Callable | None = None) -> Outcome:
    """A fitted Learner's answers for its validation and its test images, and what its training took: its fits where they were timed, else `seconds`.

    Raises `ValueError` where these are no probabilities of classes."""
    if not isinstance(learn, Learner): raise BadValue(f'recipe: must return the fitted Learner, got {type(learn).__name__}')
    i, side = held_out(learn.dls)
    answers = {}
    for k, name in {(1, 'validation'), (i, side)}:
        with learn.no_bar(): p, y = learn.get_preds(ds_idx=k)
        if p.ndim != 2 or y is None or y.ndim != 1 or y.is_floating_point(): raise BadValue(f'recipe: ablate measures classifiers; this one answers {tuple(p.shape)}')
        answers[name] = Scored(p.float().numpy(), y.long().numpy(), name)
    past = history(learn)
    last = past.fits[-1] if past.fits else dict(columns=[], rows=[])
    column = next((k for k, c in enumerate(last['columns']) if c == 'accuracy'), None)
    return Outcome(answers['validation'], answers[side], past.seconds or seconds, highest() if highest else None,
                   tuple(float(row[column]) for row in last['rows']) if column is not None else ())


def _high_water() -> Callable:
    "Starts to watch, and returns what tells, how much memory in MB was taken since at most: of the GPU where there is one, else of this process on Linux; else None."
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: (torch.cuda.max_memory_allocated()-before)/1e6
    try: Path('/proc/self/clear_refs').write_text('5')          # the mark goes down to what is taken now
    except OSError: return lambda: None
    before = _resident()
    return lambda: _resident()-before


def _resident() -> float:
    "The most memory in MB that this process held since the mark went down."
    return next(int(line.split()[1])*1.024e-3 for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM'))


class Kept:
    "Finished runs, a file each in `folder`; None: in memory only."
    def __init__(self, folder: Path | None, names: Sequence[str]):
        self.folder, self.names, self.runs = folder, list(names), {}
        for file in sorted(folder.glob('*.npz')) if folder and folder.is_dir() else ():
            with np.load(file) as o: self.runs[self._job(o)] = _outcome(o)

    def __setitem__(self, job: Job, o: Outcome):
        self.runs[job] = o
        if not self.folder: return
        self.folder.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, on=np.array([n in job[0] for n in self.names]), seed=job[1], seconds=o.seconds, mb=np.nan if o.mb is None else o.mb, curve=o.curve,
                 side=o.test.side, **{f'{s}_{part}': a for s in ('valid', 'test') for part, a in (('p', getattr(o, s).probabilities), ('y', getattr(o, s).targets))})
        with whole(self.folder/f'{self._slug(job[0])}-{job[1]+1}.npz') as tmp: tmp.write_bytes(buffer.getvalue())

    def _slug(self, arm: Arm) -> str: return ''.join('+' if n in arm else '-' for n in self.names)
    def _job(self, o) -> Job: return Arm(n for n, on in zip(self.names, o['on']) if on), int(o['seed'])


def _outcome(o) -> Outcome:
    mb, side = float(o['mb']), str(o['side'])
    return Outcome(Scored(o['valid_p'], o['valid_y'], 'validation'), Scored(o['test_p'], o['test_y'], side), float(o['seconds']), None if np.isnan(mb) else mb,
                   tuple(map(float, o['curve'])))


def pool_of(processes: int, ray: bool):
    "Where runs are done: on a Ray cluster, in `processes` of this machine, or, of one, here."
    return Ray() if ray else Processes(processes) if processes > 1 else Here()


class Here:
    "One run after another, in this process."
    width = 1
    def run(self, train: Training, jobs: Iterator[Job]) -> Iterator[tuple[Job, Outcome]]:
        for job in jobs: yield job, train(job)
    def close(self): pass


class Processes:
    "Processes of this machine. They outlive a worker that dies: its run, and none that is done, is begun again."
    def __init__(self, width: int): self.width = width

    def run(self, train, jobs):
        jobs, died, again = iter(jobs), {}, []
        under_way = {}
        def fill(pool):
            while len(under_way) < self.width and (job := again.pop() if again else next(jobs, None)) is not None: under_way[pool.submit(train, job)] = job
        pool = self._pool()
        fill(pool)
        while under_way:
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            broken = False
            for future in done:
                job = under_way.pop(future)
                try: outcome = future.result()
                except TerminatedWorkerError as e:
                    broken = True
                    again.append(job)
                    died[job] = died.get(job, 0) + 1
                    if died[job] > RETRIES: raise BadValue(f'ablate: the worker of one run died {died[job]} times; too little memory? Try a smaller bs, or processes=1') from e
                except BrokenProcessPool as e: raise BadValue('recipe: it cannot be sent to other processes, where its module is not found; use processes=1') from e
                else: yield job, outcome
            if broken:
                again += under_way.values()
                under_way.clear()
                pool = self._pool(kill_workers=True, reuse=False)
            fill(pool)

    def close(self): self._pool().shutdown(wait=True, kill_workers=True)

    def _pool(self, **how):
        return get_reusable_executor(self.width, timeout=600, env=dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore::FutureWarning,ignore::DeprecationWarning'), **how)


class Ray:
    "The nodes of the Ray cluster that `RAY_ADDRESS` names, else of one that is started on this machine; a run whose worker or node is lost is done elsewhere."
    def __init__(self):
        try: import ray
        except ImportError: raise NotThere('ray: not installed; pip install "fastrecipes[ray]", or leave ray off') from None
        self.ray = ray
        if not ray.is_initialized(): ray.init(log_to_driver=False, include_dashboard=False, logging_level='ERROR')
        self.gpus = int(ray.cluster_resources().get('GPU', 0))

    @property
    def width(self) -> int: return int(self.gpus or self.ray.cluster_resources().get('CPU', 1))

    def run(self, train, jobs):
        remote = self.ray.remote(num_cpus=0 if self.gpus else 1, num_gpus=1 if self.gpus else 0, max_retries=-1)(_done)
        shared, under_way, jobs = self.ray.put(train), {}, iter(jobs)
        def fill():
            while len(under_way) < max(1, self.width) and (job := next(jobs, None)) is not None: under_way[remote.remote(shared, job)] = job
        fill()
        while under_way:
            ready, _ = self.ray.wait(list(under_way), num_returns=1)
            for ref in ready: yield under_way.pop(ref), self.ray.get(ref)
            fill()

    def close(self): pass


def _done(train: Training, job: Job) -> Outcome: return train(job)
