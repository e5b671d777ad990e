"What `compress` does to a network: distil it, cut it, compute it in 8 bits; and the search for how much of that it takes."
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from fastai.basics import Learner, nn
from fastai.callback.hook import total_params

from fastrecipes.data.keyed import keyed
from fastrecipes.data.statistics import PixelMap, normalization_of, normalized_by
from fastrecipes.errors import BadValue, few
from fastrecipes.production.export import graph_of, input_contract
from fastrecipes.production.gate import Candidate, Considered, Gate
from fastrecipes.production.graphs import compact
from fastrecipes.production.predictor import Graph, batched, pixels_of
from fastrecipes.production.quantization import quantize_dynamic, quantize_static, quantize_within, quantized_share
from fastrecipes.production.search import MOST, Budget, least_cut
from fastrecipes.production.slimming import slimmed, widths
from fastrecipes.production.timing import image_times, medians
from fastrecipes.randomness import stream
from fastrecipes.recipes.classify import train
from fastrecipes.report.history import history, lines_unless_terminal
from fastrecipes.technique import TECHNIQUES, applied
from fastrecipes.training.resume import remember
from fastrecipes.training.transfer import Backbone, classifier

__all__ = ['Work', 'distilled', 'in_8_bits', 'pruned', 'search']

CALIBRATION = 128       # training images that the ranges of activations are measured on
SAMPLE = 256            # validation images that tell which layers can lose channels, by these ratios
RATIOS = (.3, .6, .8, .95)


@dataclass(frozen=True)
class Work:
    "What all stages have in common: the original, the student's body, how long and how fast is trained, the seed, and the teaching."
    learn: Learner
    net: Backbone | None
    epochs: int
    lr: float | str
    seed: int
    how: dict

    def distilled(self, teach: bool = True) -> Learner:
        "The student, trained on the original's images, and its answers if `teach`; normalised as its own weights want them."
        theirs, stats = normalization_of(self.learn), self.net.statistics
        same = stats is None or theirs is not None and theirs.same_as(PixelMap.standard(*stats))
        student = classifier(self.learn.dls if same else normalized_by(self.learn.dls, None), self.net, metrics=self.learn.metrics)
        if total_params(student.model)[0] >= total_params(self.learn.model)[0]:
            print(f'  {self.net.arch} is no smaller than what it is to replace: {_change(self.learn, student)}')
        self._teach(student, self.net.arch, teach)
        train(student, self.epochs, self.lr, pretrained=stats is not None, title='distillation' if teach else 'alone')
        return student

    def tuned(self, base: Learner, thin: nn.Module) -> Learner:
        "What was cut out of the network of `base`, fine-tuned."
        student = Learner(base.dls, thin, base.loss_func, metrics=base.metrics)
        history(student).fits = list(history(base).fits)
        self._teach(student, 'pruned')
        return self.trained_on(student)

    def trained_on(self, student: Learner) -> Learner:
        train(student, self.epochs, self.lr, title='fine-tuning')
        return student

    def _teach(self, student: Learner, title: str, teach: bool = True):
        "Give the student the original's training: its techniques (those of the data lie in its loaders), its seed, and its answers if `teach`."
        lines_unless_terminal(student, title)
        keyed(student, self.seed)
        inherited = {n: a.arguments for n, a in applied(self.learn).items() if TECHNIQUES[n].stage in ('loss', 'optim', 'train')}
        student.use(**{**inherited, **({'distill': self.how} if teach else {})})

    @cached_property
    def calibration(self) -> list[np.ndarray]:
        "Pixels of training images that ranges are measured on, batch by batch."
        items = list(self.learn.dls.train.items)
        some = [items[i] for i in sorted(stream(self.seed, 'calibration').permutation(len(items))[:CALIBRATION])]
        return list(batched(some, lambda x: pixels_of(x, input_contract(self.learn))))


def _offer(student: Learner, before: Learner) -> Candidate: return Candidate(graph_of(student), _change(before, student), student)


def distilled(work: Work, teach: bool = True) -> Candidate:
    "The student, with its teacher or, as a control, without."
    student = work.distilled(teach)
    return _offer(student, work.learn)


def pruned(work: Work, base: Learner, ratio: float) -> Candidate:
    "The network without its least important channels, fine-tuned."
    student = work.tuned(base, slimmed(base.model, ratio, *base.dls.one_batch()[:1]))
    return _offer(student, base)


def in_8_bits(gate: Gate, work: Work, learn: Learner, graph: bytes, kind: str) -> Candidate:
    "`graph`, that of `learn`, in 8 bits; layers that cost too much stay in float, or are trained for it."
    if kind == 'qat':
        q = learn.quantize('qat', epochs=max(1, work.epochs//2), seed=work.seed)
        return Candidate(graph_of(q), f'trained for it, {quantized_share(q.model.graph):.1%} of the weights in 8 bits', learn, True)
    if kind == 'dynamic': made, in_float = quantize_dynamic(graph, .5), []
    else: made, in_float = _static(gate, graph, work.calibration)
    made = compact(made)
    return Candidate(made, f'{quantized_share(made):.1%} of the weights in 8 bits' + (f'; in float stayed {few(in_float)}' if in_float else ''), learn, True)


def _static(gate: Gate, graph: bytes, batches: list[np.ndarray]) -> tuple[bytes, list[str]]:
    "In 8 bits with the layers that cost too much left in float; with none left where that is not enough, for the gate to judge."
    if gate.points_lost(graph) <= gate.tolerance:
        try: return quantize_within(graph, batches, gate.points_lost, gate.tolerance)
        except BadValue as e: print(f'  {e}', flush=True)
    return quantize_static(graph, batches), []


def _change(before: Learner, after: Learner) -> str: return f'{total_params(before.model)[0]:,} → {total_params(after.model)[0]:,} parameters'


def search(gate: Gate, work: Work, budget: Budget, prune: bool, quantize: str | None):
    "Try to meet the targets of `gate` with the network itself, then with the student, while there is time; deliver what is best."
    tried = Route(gate, work, budget, prune, quantize, work.learn, '').tried()
    if work.net and budget.allows(work.net.arch): tried += Route(gate, work, budget, prune, quantize, work.distilled(), work.net.arch).tried()
    gate.choose(tried)


@dataclass
class Route:
    "What may come of the network of `base`, called `name`."
    gate: Gate
    work: Work
    budget: Budget
    prune: bool
    quantize: str | None
    base: Learner
    name: str

    def tried(self) -> list[Considered]:
        "Cut as little as will do, fine-tuned, in 8 bits; where that costs too much: cut in two steps, trained for 8 bits, cut where it is felt least."
        began, tried = time.monotonic(), []
        try: share, net = self._least(self.base, self._everywhere, MOST if self.prune else 0.)
        except BadValue as e:
            self.gate.note(self.title(), str(e))
            return tried
        if self._does(tried, self.title(share), lambda: self.work.tuned(self.base, net) if share else self.base): return tried
        took = time.monotonic()-began
        if share and self.budget.allows(title := self.title(share, 'in two steps'), 2*took):
            half = self.work.tuned(self.base, slimmed(self.base.model, 1-(1-share)**.5, *self.xb))
            if self._does(tried, title, lambda: self.work.tuned(half, self._least(half, self._everywhere, MOST)[1])): return tried
        if self.quantize == 'static' and tried and self.budget.allows(title := self.title(share, kind='qat'), took):
            best = max(tried, key=lambda c: self.gate.stages[c.at].valid.value).candidate.learn
            if self._does(tried, title, lambda: best, 'qat'): return tried
        if share and self.budget.allows(title := self.title(how='prune where it is felt least'), 2*took):
            self._does(tried, title, lambda: self.work.tuned(self.base, self._least(self.base, self._by_layer, max(RATIOS))[1]))
        return tried

    def _everywhere(self, base: Learner, share: float) -> nn.Module: return slimmed(base.model, share, *self.xb)

    def _by_layer(self, base: Learner, share: float) -> nn.Module: return slimmed(base.model, 0., *self.xb, per_layer=self.felt.ratios(share))

    @cached_property
    def felt(self): return remember('sensitivity', lambda: self.base.sensitivity(RATIOS, SAMPLE))

    @cached_property
    def xb(self) -> tuple: return tuple(self.base.dls.one_batch()[:1])

    def title(self, share: float = 0., how: str = '', kind: str | None = None) -> str:
        cut = f'prune {share:.0%} {how}'.strip() if share else how
        return ', '.join(filter(None, (self.name, cut, self.quantize and f'quantize ({kind or self.quantize})'))) or 'as it is'

    def _least(self, base: Learner, cut: Callable, most: float) -> tuple[float, nn.Module]:
        "The least share of channels that must go, by what is left before any training, and the network of `base` without them."
        nets, costs = {}, {}
        def cost(share):
            try: net = cut(base, share) if share else base.model
            except BadValue:                                # too little to lose a channel
                if share >= most: raise
                net = base.model
            nets[share] = net
            if (key := tuple(widths(net))) not in costs: costs[key] = remember('cost of a cut', lambda: self._cost(net))
            return costs[key]
        share = least_cut(cost, self.gate.targets, most)
        print(f'{self.title()}: {share:.0%} of the channels must go for {self.gate.targets}', flush=True)
        return share, nets[share]

    def _cost(self, net: nn.Module) -> tuple[int, float]:
        "Bytes and ms of a network that is not trained yet."
        graph = graph_of(Learner(self.base.dls, net, self.base.loss_func))
        if self.quantize: graph = compact(quantize_dynamic(graph) if self.quantize == 'dynamic' else quantize_static(graph, self.work.calibration))
        return len(graph), medians(image_times({'it': Graph(graph, threads=1)}, self.gate.contract['size']))['it']

    def _does(self, tried: list, title: str, student: Callable[[], Learner], kind: str | None = None) -> bool:
        "Whether what `student()` gives, in 8 bits, is good enough; what it came to goes to `tried`."
        kind = kind or self.quantize
        def make():
            graph = graph_of(learn := student())
            return in_8_bits(self.gate, self.work, learn, graph, kind) if kind else Candidate(graph, _change(self.work.learn, learn), learn)
        if one := self.gate.consider(title, make): tried.append(one)
        return one is not None and one.fine and one.excess <= 1
