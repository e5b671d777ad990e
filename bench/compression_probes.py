"""What fasterai 0.4.1 was seen to fail at (F1 to F16 of our findings), tried on ours: `python bench/compression.py --probes`.

A probe is a function that says what it saw; it raises where that is not what it should be."""
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from compression import Net, digits, learner, quiet
from fastai.basics import AccumMetric, Callback, load_learner, nn
from fastai.callback.tracker import SaveModelCallback
from onnx import numpy_helper
from torch.nn import functional as F

import fastrecipes.all as everything
from fastrecipes.errors import BadValue
from fastrecipes.production.export import export_learner
from fastrecipes.production.pruning import pruned_info
from fastrecipes.production.quantized import Quantized, network_graph
from fastrecipes.production.slimming import slimmed, widths
from fastrecipes.technique import discover

SOME, OTHERS = slice(0, 400), slice(1197, 1397)


def fresh(model=None, epochs: int = 2, seed: int = 0):
    "A Learner on 400 digits, trained for `epochs`."
    torch.manual_seed(seed)
    learn = learner(Net(8, 16, 32, 32) if model is None else model, seed, SOME, OTHERS)
    learn.path = Path(tempfile.mkdtemp())
    if epochs: learn.fit_one_cycle(epochs, 1e-2)
    return learn


def expect(so, seen: str) -> str:
    if not so: raise AssertionError(seen)
    return seen


def refused(f, *words) -> str:
    "What the refusal says; it must name all of `words`."
    try: got = f()
    except BadValue as e: return expect(all(w in str(e) for w in words), f'BadValue: {e}')
    raise AssertionError(f'taken without a word: {type(got).__name__}')


def kernels(graph: bytes) -> list[np.ndarray]:
    "The weights of a graph in 8 bits: convolutions' and linear layers'."
    return [numpy_helper.to_array(t) for t in onnx.load_from_string(graph).graph.initializer if len(t.dims) > 1]


def outcome(learn) -> list[float]: return [float(v) for v in learn.validate()]


def f1():
    "slim, distill and qat, composed"
    calls, teacher, learn = [], fresh(seed=1), fresh()
    before = widths(learn.model)
    teacher.model.register_forward_hook(lambda *o: calls.append(1))         # its copies have it too
    learn.slim(.5, round_to=1).distill(teacher).fit_one_cycle(2, 1e-2)
    taught = len(calls)
    q = learn.quantize('qat', epochs=1)
    delivered = sorted(len(w) for w in kernels(q.model.graph))
    halved = [w//2 for w in before[:-1]] + before[-1:]
    return expect(delivered == sorted(halved) and q.model.told.share == 1 and taught and len(calls) > taught,
                  f'widths delivered {delivered} of {sorted(before)}, {q.model.told.share:.0%} in 8 bits; the teacher was asked {taught} times, and {len(calls)-taught} in qat')


def f2():
    "zeros survive: a fit, qat, static"
    learn = fresh().prune(.9)
    shares = []
    for _ in range(2):
        learn.fit(1, 1e-3)
        shares.append(pruned_info(learn.model)['Total'])
    for kind, kwargs in (('qat', dict(epochs=1)), ('static', dict(tolerance=100))):
        ws = kernels(learn.quantize(kind, **kwargs).model.graph)
        shares.append(100*sum(int((w == 0).sum()) for w in ws)/sum(w.size for w in ws))
    return expect(min(shares) >= 89.99, 'zeros, %: {:.1f} after a fit, {:.1f} after another, {:.1f} in the graph of qat, {:.1f} in that of static'.format(*shares))


def best_is_first(learn):
    "A metric that is best in the first epoch."
    def early(p, t): return torch.tensor(1/(1+learn.epoch))
    learn.metrics = [AccumMetric(early, flatten=False)]
    return SaveModelCallback(monitor='early')


def f3():
    "prune with SaveModelCallback"
    learn = fresh().prune(.9)
    names, path = set(learn.model.state_dict()), learn.path/'models'/'model.pth'
    tensors = sum(t.nbytes for t in learn.model.state_dict().values())/1024
    learn.fit(2, 1e-3, cbs=best_is_first(learn))
    kb, zeros = path.stat().st_size/1024, pruned_info(learn.model)['Total']
    held = torch.load(path, weights_only=False)
    return expect(set(held.get('model', held)) == names and zeros >= 89.99, f'{zeros:.1f} % zeros in the best epoch; a checkpoint of {kb:.0f} KB for {tensors:.0f} of tensors')


def f4():
    "slim with SaveModelCallback, an early epoch the best"
    learn = fresh()
    learn.slim(.5, round_to=1).fit(3, 1e-3, cbs=best_is_first(learn))
    return expect(np.isfinite(outcome(learn)[0]), f'epoch 0 of 3 loaded into widths {widths(learn.model)}')


def f5():
    "one channel, by default"
    learn = fresh().slim()
    return expect(learn.model[0][0].weight.shape[1] == 1, f'widths {widths(learn.model)}, input of {learn.model[0][0].weight.shape[1]} channel')


def f6():
    "steps of pruning happen when and as far as they say"
    done = fresh().iterative_prune(epochs=2, step=.3, until=.6, floor=.5)
    zeros = [s.zeros for s in done.steps]
    return expect(np.allclose(zeros, [0, .3, .6], atol=1e-3), f'zeros after each step {[f"{z:.3f}" for z in zeros]}; there is no schedule within a fit')


def f7():
    "valid_loss under a teacher is the data's own"
    seen = []
    for alpha in (.5, .9):
        learn = fresh().distill(fresh(seed=1), alpha=alpha)
        learn.fit(1, 1e-3)
        reported, (p, y) = learn.recorder.values[-1][1], learn.get_preds()
        seen += [reported, float(F.nll_loss(p.log(), y))]
    return expect(np.allclose(seen[::2], seen[1::2], atol=1e-5), 'reported {:.4f}, cross entropy {:.4f} at alpha .5; {:.4f}, {:.4f} at .9'.format(*seen))


def f8():
    "the teacher: no gradients, asked on training batches alone"
    calls, teacher, learn = [], fresh(seed=1), fresh()
    teacher.model.zero_grad()
    teacher.model.register_forward_hook(lambda *o: calls.append(torch.is_grad_enabled()))
    learn.distill(teacher)                      # which asks it once, for what it has to teach
    calls.clear()
    learn.fit(2, 1e-3)
    grads = sum(p.grad is not None for m in (teacher.model, learn.distill_cb.teacher) for p in m.parameters())
    batches = 2*len(learn.dls.train)
    return expect(not grads and not any(calls) and len(calls) == batches, f'{grads} tensors with gradients; {len(calls)} passes, none of them recorded, in {batches} training batches')


def f9():
    "batch norm before its convolution"
    before = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), before, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    learn, x = fresh(net, 1), digits()[0][OTHERS]
    with torch.no_grad(): expected = learn.model.eval()(x)
    off = float((Quantized(network_graph(learn))(x)-expected).abs().max())
    q = learn.quantize('qat', epochs=1)
    return expect(off < 1e-4, f'the graph is off by {off:.1g} of {float(expected.abs().max()):.2f}; qat answers as the network trained for it on {q.model.told.agreement:.0%}')


def f10():
    "a quantized Learner goes on working"
    q, seen = fresh().quantize('static', tolerance=100), []
    for learn in (q, fresh().quantize('qat', epochs=1)):
        loss, acc = outcome(learn)
        p, y = learn.get_preds()
        one = learn.predict(learn.dls.valid.dataset[0])
        again = load_learner(export_learner(learn, learn.path/'q.pkl'))
        same = torch.equal(again.model(digits()[0][OTHERS]), learn.model(digits()[0][OTHERS]))
        learn.export('theirs.pkl')
        seen.append(same and abs(float((p.argmax(1) == y).float().mean())-acc) < 1e-6 and len(one) == 3)
    return expect(all(seen), 'static and qat: validate, get_preds, predict, export, load_learner')


class Dynamic(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net(8, 16, 32, 32)

    def forward(self, x): return self.net(x) if x.sum() > -1e9 else self.net(-x)


def f11():
    "a network that cannot be traced"
    learn = fresh(Dynamic(), 1)
    return '; '.join(refused(lambda kind=kind: learn.quantize(kind), 'quantize') for kind in ('static', 'qat'))


def f12():
    "typos"
    learn = fresh(epochs=0)
    return '; '.join([refused(lambda: learn.slim(per_layer={'1.conv11': .5}), "did you mean '1.conv1'"), refused(lambda: learn.prune(layers=['1.conv11']), "did you mean '1.conv1'"),
                      refused(lambda: learn.quantize('statik'), "did you mean 'static'")])


def f13():
    "counts are exact"
    def net(n): return nn.Sequential(nn.Conv2d(3, n, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 10))
    left = [len(slimmed(net(n), .5, torch.rand(2, 3, 8, 8), round_to=1)[0].weight) for n in (4, 8, 16, 64)]
    learn = fresh(epochs=0).prune(.5)
    ws = [m.weight for m in learn.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    zeros, n = sum(int((w == 0).sum()) for w in ws), sum(w.numel() for w in ws)
    return expect(left == [2, 4, 8, 32] and zeros == round(n/2), f'of 4, 8, 16 and 64 filters {left} stay; {zeros:,} of {n:,} weights are 0')


class CtrlC(Callback):
    def after_batch(self):
        if self.training and self.pct_train > .7: raise KeyboardInterrupt


def f14():
    "an interrupted fit leaves nothing"
    learn = fresh().prune(.5).distill(fresh(seed=1), attention=10.)
    names, loss = list(learn.model.state_dict()), learn.loss_func
    try: learn.fit(1, 1e-3, cbs=CtrlC())
    except KeyboardInterrupt: pass
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules())
    fits = quiet(learn.fit, 1, 1e-3) is None
    return expect(list(learn.model.state_dict()) == names and learn.loss_func is loss and not hooks and fits and pruned_info(learn.model)['Total'] >= 49.9,
                  f'{len(names)} tensors as before, {hooks} hooks, the loss function as before; the next fit trains')


def f15():
    "factorised layers that save nothing"
    ours = [n for n in dir(everything) if 'decompos' in n.lower() and getattr(getattr(everything, n), '__module__', '').startswith('fastrecipes')]
    return expect(not ours, 'not offered: channels are removed (slim), which always saves; nothing of ours decomposes')


def f16():
    "a slimmed network, saved and loaded"
    learn = fresh()
    learn.slim(.5, round_to=1).fit(1, 1e-3)
    x, file = digits()[0][OTHERS], learn.save('thin')
    with torch.no_grad(): expected = learn.model.eval()(x)
    other = fresh().slim(.5, round_to=1)
    other.load(Path(file).with_suffix(''))
    alone = load_learner(export_learner(learn, learn.path/'thin.pkl'))
    try: fresh(epochs=0).load(Path(file).with_suffix(''))
    except Exception as e: plain = f'{type(e).__name__}: {str(e).splitlines()[0][:110]}'
    with torch.no_grad(): same = [torch.equal(o.model.eval()(x), expected) for o in (other, alone)]
    return expect(all(same), f'equal after load into one slimmed the same way, and after load_learner; into one that was not: {plain}')


PROBES = (f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, f11, f12, f13, f14, f15, f16)


def report() -> int:
    "Run them all, a line for each; how many fail."
    discover()
    torch.set_num_threads(1)
    failed = 0
    for probe in PROBES:
        try: ok, seen = True, quiet(probe)
        except Exception as e: ok, seen = False, f'{"" if isinstance(e, AssertionError) else type(e).__name__ + ": "}{e}'
        failed += not ok
        print(f'{"pass" if ok else "FAIL"} {probe.__name__.upper():4}{probe.__doc__}: {seen}', flush=True)
    return failed
