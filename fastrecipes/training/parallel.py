"Several devices for one Learner."
import torch
from fastai.basics import Learner
from fastai.distributed import DataParallel, ParallelTrainer

from fastrecipes.technique import TechniqueCallback, put, say, technique

__all__ = ['Parallel']


class Parallel(TechniqueCallback, ParallelTrainer):
    "Wrap the model in `DataParallel` for each forward pass, and only for that long: checkpoints, hooks and dead fits see the plain model."
    order = 20          # around the forward pass, after whoever looks at the model in before_batch
    run_after = run_before = None

    def __init__(self, device_ids=None): self.device_ids, self.inner = device_ids, None

    def before_fit(self): pass
    def after_fit(self): pass

    def before_batch(self):
        self.inner = self.learn.model
        self.learn.model = DataParallel(self.inner, device_ids=self.device_ids)

    def after_pred(self): self._unwrap()
    def after_cancel_batch(self): self._unwrap()
    def abort(self, level): self._unwrap()

    def _unwrap(self):
        if self.inner is not None: self.learn.model, self.inner = self.inner, None


@technique('train', section='Training', source='https://docs.pytorch.org/docs/stable/generated/torch.nn.DataParallel.html', touches=('model', 'inference'),
           replaces='fastai 2.8.12')
def to_parallel(self: Learner, device_ids: list[int] | None = None) -> Learner:
    """Split each batch over several GPUs of this machine, and gather what they answer.

    `device_ids`: which GPUs (default: all). The batch size is that of all together. Batch norm sees each GPU's part. On one device it
    says so and changes nothing; for more speed, or several machines, use `to_distributed`."""
    n = torch.cuda.device_count() if device_ids is None else len(device_ids)
    self.remove_cb(ParallelTrainer)
    if n < 2:
        say(self, 'to_parallel', f'{"one GPU" if n else "no GPU"} here: nothing to split a batch over, training goes on as it was', aloud=True)
        return self
    say(self, 'to_parallel', f'each batch split over {n} GPUs')
    return put(self, Parallel(device_ids))
