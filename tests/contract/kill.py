"""Processes that can be killed by the dozen: each is forked from one that has imported everything and computed nothing.

(Importing takes seconds; a fork of a process in which torch has computed hangs.)"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

__all__ = ['Zygote', 'kept', 'same']


class Zygote:
    "`run(argv, log)`: the command line in a process of its own, its output appended to `log`; `after`: kill it that many seconds later, or once that file is there."
    def __enter__(self):
        env = os.environ | dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', PYTHONPATH=str(Path(__file__).parents[2]), PYTHONWARNINGS='ignore')
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def run(self, argv, log, after: float | Path | None = None, signal_=signal.SIGKILL) -> tuple[int, float]:
        "The exit code, −9 when killed in time, and the seconds that it took."
        pid, started = self.start(argv, log), time.monotonic()
        if after is not None:
            if isinstance(after, Path):
                while not after.exists() and time.monotonic() < started + 120: time.sleep(.02)
            else: time.sleep(after)
            os.kill(pid, signal_)               # one that is done already is a zombie until it is waited for
        return self.wait(), time.monotonic()-started

    def start(self, argv, log, **env) -> int:
        "The number of the process; `env` is added to its environment."
        self._tell(json.dumps(dict(argv=[str(a) for a in argv], log=str(log), env=env)))
        return int(self._read())

    def wait(self) -> int:
        self._tell('wait')
        return int(self._read())

    def _tell(self, line): print(line, file=self.process.stdin, flush=True)

    def _read(self): return self.process.stdout.readline().strip()


def kept(run: Path) -> dict:
    "What a run ended with: the last checkpoint of each Learner (parameters, optimizer, draws, records) and its history without the time."
    import torch
    return {p.name: torch.load(p, weights_only=False) for p in sorted((run/'checkpoint').glob('[0-9].pt'))} | dict(history=(run/'history.csv').read_text())


def same(a, b) -> bool:
    "Whether nested dicts, lists and tensors are equal, bit by bit; but for the seconds that training took."
    import numpy as np
    import torch
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != 'seconds')
    if isinstance(a, (list, tuple)) or type(a).__name__ == 'L': return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    return type(a) is type(b) and (a == b or a != a and b != b)


def _child(argv, log, env):
    "Run one command, and keep the last checkpoints when it is done: they hold the optimizer."
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)        # what a shell starts with & ignores Ctrl-C, and so would this
    from fastrecipes.cli import main
    from fastrecipes.training import resume
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    resume._Run.clear = lambda self: None
    code = 1
    try: code = main(argv)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _zygote():
    import fastrecipes.recipes.pipeline  # noqa: F401
    import fastrecipes.technique as technique
    technique.discover()
    for line in sys.stdin:
        if not (pid := os.fork()): _child(**json.loads(line))
        print(pid, flush=True)
        next(sys.stdin)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == '__main__': _zygote()
