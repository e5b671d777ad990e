"""Events reach the callbacks that answer them, and no others.

fastai 2.8.12 asks every callback at each of the eleven events of a batch; one without a method of that name looks for it in the Learner, then in the model, to learn
that there is none: 1 ms a batch, half of all that the Learner costs beside a loop of one's own (`bench/loop.py`)."""
from operator import attrgetter

from fastai.basics import Callback, Learner, event, patch

from fastrecipes.repairs import REPAIRS

__all__ = ['answers']

ORDER = attrgetter('order')


def answers(cb: Callback, name: str) -> bool:
    "Whether `cb` does anything at the event `name`: by a method of its class or its own, or in a way of its own. After a fit each is made to run again."
    kind = type(cb)
    return hasattr(kind, name) or name in vars(cb) or name == 'after_fit' or kind.__call__ is not Callback.__call__ or kind.__getattr__ is not Callback.__getattr__


if REPAIRS:
    @patch
    def __call__(self: Learner, event_name):
        "Tell the callbacks of an event, or of several, in their order. A model that has a method of an event's name is not called, as fastai 2.8.12 does, by every callback."
        for name in (event_name,) if isinstance(event_name, str) else event_name:
            if not hasattr(event, name): raise Exception(f'missing {name}')
            for cb in sorted(self.cbs, key=ORDER):
                if answers(cb, name): cb(name)
