"""What two processes do, all of it in one `torchrun --nproc-per-node 2 two.py FOLDER`: each rank leaves `<rank>.pt`.

The same functions in one process, with twice the batch, give what is expected."""
import os
import sys
from pathlib import Path

import torch
from fastai.basics import Callback

from fastrecipes.technique import TECHNIQUES

N, VALID, BS = 250, 191, 64             # neither the training set nor the validation set divides


class Watch(Callback):
    "The samples and the mixing of each training batch."
    order = 60
    def before_fit(self): self.samples, self.shares = [], []
    def after_batch(self):
        if not self.learn.training: return
        self.samples.append([int(i) for i in self.learn.dl.draws(self.learn.iter)])
        o = getattr(self.learn, 'objective_cb', None)
        if o is not None and o.share is not None: self.shares.append(o.share.clone())


def trained(names, learner, use, processes: int):
    "Two epochs with `names`, on `processes` processes; what came of it."
    learn = learner(N, BS//processes, n_valid=VALID)
    use(learn, *names)
    if processes > 1: learn.to_distributed(timeout=60)
    learn.fit(2, 1e-3, cbs=(watch := Watch()))
    p, y = learn.get_preds()
    return dict(weights=[w.detach().clone() for w in learn.model.parameters()], values=[list(row) for row in learn.recorder.values], samples=watch.samples,
                shares=watch.shares, preds=p, targets=y, validated=list(learn.validate()), model=type(learn.model).__name__,
                effects={n: a.effect for n, a in vars(learn).get('techniques', {}).items()})


def matched(learner, processes: int):
    "A fit with `distill(…, features=1)`, on `processes` processes: the weights of the student, and the regressors."
    learn = learner(N, BS//processes, n_valid=VALID).distill(learner(seed=1).model, features=1.)
    if processes > 1: learn.to_distributed(timeout=60)
    learn.fit(1, 1e-3)
    return dict(weights=[w.detach().clone() for w in learn.model.parameters()], regressors=learn.match_cb.regressors)


def cases():
    alone = [n for n in sorted(TECHNIQUES) if n not in ('to_distributed', 'to_parallel')]
    return [(), *((n,) for n in alone), ('class_weights', 'grad_accum'), ('balance', 'mixup'), ('augment', 'cutout', 'label_smoothing')]


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.contract.conftest import learner, use
    torch.set_num_threads(1)
    torch.save({names: trained(names, learner, use, 2) for names in cases()} | dict(matched=matched(learner, 2)), Path(sys.argv[1])/f'{os.environ["RANK"]}.pt')
