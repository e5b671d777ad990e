"A recipe that dies as it writes a checkpoint."
import pytest

from fastrecipes.training import resume


class Killed(BaseException): pass


def killed(monkeypatch, run, name, n):
    "`run()` dies right after the `n`-th time that the file `name` is written among its checkpoints."
    write, times = resume._write, []
    def die(file, state):
        write(file, state)
        times.extend([1]*(file.name == name))
        if len(times) == n: raise Killed
    with monkeypatch.context() as m:
        m.setattr(resume, '_write', die)
        m.setattr(resume, 'BUDGET', 1e9)         # after every batch
        with pytest.raises(Killed): run()
