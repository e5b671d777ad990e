"Compression that has to prove itself: each stage is measured beside the original, and kept only if it costs little and gains something."
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from fastai.basics import Learner
from matplotlib.figure import Figure

from fastrecipes.data.loaders import labels_of
from fastrecipes.errors import BadValue
from fastrecipes.production.bundle import answers
from fastrecipes.production.export import graph_of, input_contract, served
from fastrecipes.production.predictor import Graph
from fastrecipes.production.search import Targets
from fastrecipes.production.timing import image_times, medians, surely
from fastrecipes.report import intervals
from fastrecipes.report.intervals import Difference, Estimate
from fastrecipes.report.plots import draw_tradeoff
from fastrecipes.report.run_folder import GRAPH, STAGES
from fastrecipes.report.tables import aligned
from fastrecipes.training.resume import remember

__all__ = ['Candidate', 'Considered', 'Stage', 'Compressed', 'Gate']

LESS = .98          # of the size or the time before: what counts as smaller or faster


@dataclass(frozen=True)
class Candidate:
    "What a stage offers: a graph, how it is known to have taken effect, the Learner it was made from (None: as before), and whether it is in 8 bits."
    graph: bytes
    proof: str
    learn: Learner | None = None
    quantized: bool = False


@dataclass(frozen=True)
class Considered:
    "A network that a search has tried: its place in the table, what it is, how far it is from the targets (≤ 1: within), and whether it keeps the accuracy."
    at: int
    candidate: Candidate
    excess: float
    fine: bool


@dataclass(frozen=True)
class Stage:
    """One row of the table: a stage by name, whether it was kept and why, and how the model did after it.

    `valid` and `test`: accuracy on those images, None where it never came to a model; `change`: its accuracy on the validation images minus
    the original's, image by image, which it was judged by; `size_bytes` of the .onnx; `latency_ms`: one image, one thread."""
    name: str
    kept: bool
    reason: str
    proof: str = ''
    valid: Estimate | None = None
    change: Difference | None = None
    test: Estimate | None = None
    balanced: Estimate | None = None
    size_bytes: int | None = None
    latency_ms: float | None = None

    def record(self) -> dict: return {k: v for k, v in asdict(self).items() if v is not None}

    @classmethod
    def of(cls, record: dict) -> 'Stage':
        kinds = dict(valid=Estimate, test=Estimate, balanced=Estimate, change=Difference)
        return cls(**{k: kinds[k](**v) if k in kinds else v for k, v in record.items()})


class Onnx(bytes):
    "An ONNX graph, to write to a file or run; shown, it says how large it is."
    def __repr__(self): return f'<an ONNX graph of {len(self)/1e3:,.1f} kB>'
    __str__ = __repr__


@dataclass(repr=False)
class Compressed:
    """What `compress` accepted: `.learn`, the float student; `.onnx`, the graph, as bytes; `.stages`, the table, the original first.

    `eager_ms`: one image through the original in eager torch, timed beside the graphs. `control`: the student trained without its teacher, where
    that was asked for, never kept. `targets`: those that were searched for; the stages after the original are then the networks that were tried, each from
    the original. Printed, it is the table."""
    learn: Learner
    onnx: bytes
    stages: list[Stage]
    tolerance: float
    eager_ms: float
    quantized: bool = False
    control: Stage | None = None
    targets: Targets = Targets()

    def __post_init__(self): self.onnx = Onnx(self.onnx)

    @property
    def original(self) -> Stage: return self.stages[0]

    def word(self, stage: Stage) -> str:
        "What became of a stage."
        return ('delivered' if stage.kept else 'tried') if self.targets else 'kept' if stage.kept else 'rolled back'

    @property
    def accepted(self) -> Stage: return [s for s in self.stages if s.kept][-1]

    @property
    def gains(self) -> dict[str, float]:
        "How many times smaller the accepted graph is than the original's, and faster than the original in eager torch and in onnxruntime."
        a, o = self.accepted, self.original
        return dict(smaller=o.size_bytes/a.size_bytes, faster_than_torch=self.eager_ms/a.latency_ms, faster_than_onnx=o.latency_ms/a.latency_ms)

    def save(self, run):
        "Write the graph and the table into a run folder."
        run.write_bytes(GRAPH, self.onnx)
        run.write_json(STAGES, dict(stages=[s.record() for s in self.stages], tolerance=self.tolerance, eager_ms=self.eager_ms, quantized=self.quantized, targets=vars(self.targets),
                                   **({'control': self.control.record()} if self.control else {})))

    @classmethod
    def load(cls, learn: Learner, folder) -> 'Compressed':
        "What `save` wrote, around the Learner of that run."
        told = json.loads((folder/STAGES).read_text(encoding='utf8'))
        control = told.pop('control', None)
        targets = Targets(**told.pop('targets', {}))
        return cls(learn, (folder/GRAPH).read_bytes(), [Stage.of(s) for s in told.pop('stages')], control=control and Stage.of(control), targets=targets, **told)

    def __str__(self):
        head = ('stage', 'valid', 'test', '.onnx', 'one image', '')
        rows = [head] + [(s.name, _share(s.valid), _share(s.test), f'{s.size_bytes/1e3:,.0f} kB' if s.size_bytes else '–',
                          f'{s.latency_ms:.2f} ms' if s.latency_ms else '–', f'{self.word(s)}: {s.reason}' if i else s.reason)
                         for i, s in enumerate(self.stages)]
        if c := self.control: rows.append((c.name, _share(c.valid), _share(c.test), f'{c.size_bytes/1e3:,.0f} kB', '', c.reason))
        return '\n'.join([*aligned(rows), self.verdict])

    @property
    def verdict(self) -> str:
        "What came of it, in one sentence."
        if self.accepted is self.original: return 'Nothing was kept: the network is as it was' + (f', and {self.targets} were asked for' if self.targets else '')
        g = self.gains
        return (self._aim + f'{g["smaller"]:.1f} times smaller than the original as .onnx; {_speed(g["faster_than_onnx"])} the original in onnxruntime, '
                f'{_speed(g["faster_than_torch"])} in eager torch ({self.eager_ms:.2f} ms)')

    @property
    def _aim(self) -> str:
        if not self.targets: return ''
        return f'{self.accepted.name}: within {self.targets}. ' if self.targets.met(self.accepted.size_bytes, self.accepted.latency_ms) else \
            f'{self.accepted.name}: the nearest to {self.targets} that loses no more than {self.tolerance:g} points. '

    def plot(self) -> Figure:
        """Accuracy against the size of the .onnx and the time of one image, every network that was tried: what is delivered is filled, and the line joins those
        that none beats in both (the Pareto front). Returns the figure."""
        fig = Figure(figsize=(10, 3.8), layout='constrained')
        for ax, (cost, most) in zip(fig.subplots(1, 2), (('size_bytes', self.targets.max_mb), ('latency_ms', self.targets.max_ms))):
            draw_tradeoff(ax, self.stages, cost, most, [f'C{i}' for i in range(10)], '.5')
        fig.legend(handles=fig.axes[0].get_legend_handles_labels()[0], loc='outside lower center', ncols=3, fontsize='small')
        return fig

    __repr__ = __str__                           # a notebook shows the table too


def _speed(times: float) -> str:
    "How many times as fast, or loudly that it is not."
    return f'{times:.1f} times as fast as' if times >= LESS else f'SLOWER, {1/times:.2f} times the time of'


def costs_too_much(change: Difference | None, tolerance: float) -> bool:
    "Whether an accuracy fell by more than `tolerance` points."
    return change is not None and 100*change.value < -tolerance - 1e-9


def _share(e) -> str: return f'{e.value:.1%}'.replace('%', ' %') if e else '–'


class Gate:
    """Measure the original, then admit stages: `attempt(name, make)` calls `make() -> Candidate` and keeps what it gives, or does not.

    Kept: within `tolerance` points of the original's accuracy on the validation images, and smaller or faster than what was there before.
    `make` may raise `ValueError`: the stage is then rolled back with that reason. `.learn` and `.graph` are those accepted so far."""
    def __init__(self, learn: Learner, tolerance: float, targets: Targets = Targets()):
        self.tolerance, self.targets, self.contract = tolerance, targets, input_contract(learn)
        loaders = learn.dls.loaders
        if not len(loaders[1].items): raise BadValue('compress: there is no validation image to judge a stage by; set learn.dls to DataLoaders that have some')
        self.sides = {name: (list(dl.items), labels_of(dl)) for name, dl in zip(('valid', 'test'), loaders[1:]) if len(dl.items)}
        self.learn, self.eager = learn, served(learn)
        self.graph = graph_of(learn, self.eager)
        self.graphs = [self.graph]
        self.predicted = self._predict(self.graph)          # the original's, by side
        self.stages = [self._stage('original', self.graph, self.predicted, True, 'the float network as it came')]
        self.quantized, self.control, self.tried = False, None, None

    def attempt(self, name: str, make: Callable[[], Candidate]) -> bool:
        print(f'{name} …', flush=True)
        self.tried = None
        try: candidate = make()
        except BadValue as e:
            self._add(Stage(name, False, str(e)), None)
            return False
        predicted = self.tried = self._predict(candidate.graph)
        change = self._change(predicted)
        ms = self._time({'before': self.graph, 'after': candidate.graph})
        kept, reason = self._judge(change, len(candidate.graph)/len(self.graph), surely(**ms))
        self._add(self._stage(name, candidate.graph, predicted, kept, reason, candidate.proof, change), candidate.graph)
        if kept: self.graph, self.learn, self.quantized = candidate.graph, candidate.learn or self.learn, candidate.quantized
        return kept

    def consider(self, name: str, make: Callable[[], Candidate]) -> 'Considered | None':
        "Measure what `make` gives against the original and the targets; None where it comes to nothing. What is delivered is for `choose` to say."
        print(f'{name} …', flush=True)
        try: candidate = make()
        except BadValue as e: return self._add(Stage(name, False, str(e)), None)
        predicted = self._predict(candidate.graph)
        change = self._change(predicted)
        ms = medians(self._time({'it': candidate.graph}))['it']
        excess = self.targets.excess(len(candidate.graph), ms)
        self._add(self._stage(name, candidate.graph, predicted, False, f'{change} from the original' + (f'; {excess:.2f} times what is asked for' if excess > 1 else ''),
                              candidate.proof, change), candidate.graph)
        return Considered(len(self.stages)-1, candidate, excess, not costs_too_much(change, self.tolerance))

    def note(self, name: str, why: str):
        "Put into the table that nothing came of it, and why."
        self._add(Stage(name, False, why), None)

    def points_lost(self, graph: bytes) -> float:
        "Points of accuracy on the validation images that `graph` has less than the original."
        return -100*self._change(self._predict(graph, 'valid')).value

    def _change(self, predicted: dict[str, np.ndarray]) -> Difference:
        return intervals.difference(self.sides['valid'][1], predicted['valid'], self.predicted['valid'])

    def choose(self, considered: list['Considered']):
        "Deliver the most accurate of those that cost no more than the tolerance and meet the targets; where none does, of those that cost no more, the nearest to the targets."
        fine = [c for c in considered if c.fine]
        if not fine: return
        best = max([c for c in fine if c.excess <= 1], key=lambda c: (self.stages[c.at].valid.value, -c.excess), default=min(fine, key=lambda c: c.excess))
        self.stages[best.at] = replace(self.stages[best.at], kept=True)
        self.graph, self.learn, self.quantized = best.candidate.graph, best.candidate.learn, best.candidate.quantized

    def compare(self, name: str, make: Callable[[], Candidate]):
        "Measure what `make` gives beside what the last stage came to, and keep it out of what is delivered."
        if self.tried is None: return                       # the stage came to nothing
        print(f'{name} …', flush=True)
        candidate, tried, last = make(), self.tried, list(self.tried)[-1]
        predicted = self._predict(candidate.graph)
        change = intervals.difference(self.sides[last][1], tried[last], predicted[last])
        said = f'control: the teacher gave {change} on {change.n} {"validation" if last == "valid" else last} images'
        self.control = self._stage(name, candidate.graph, predicted, False, said, candidate.proof, change)
        print(f'  {said}', flush=True)

    def compressed(self) -> Compressed:
        "What was accepted, with the latencies of all stages taken anew in one run."
        graphs = {i: g for i, g in enumerate(self.graphs) if g is not None}
        ms = medians(self._time(graphs, eager=lambda pixels: self.eager(torch.from_numpy(pixels))))
        stages = [replace(s, latency_ms=ms.get(i)) for i, s in enumerate(self.stages)]
        return Compressed(self.learn, self.graph, stages, self.tolerance, ms['eager'], self.quantized, self.control, self.targets)

    def _judge(self, change: Difference, size: float, time: float) -> tuple[bool, str]:
        if costs_too_much(change, self.tolerance):
            return False, f'{change} on {change.n} validation images, at most −{self.tolerance:g} is allowed'
        gains = [f'{1/r:.1f} times {word}' for r, word in ((size, 'smaller'), (time, 'faster')) if r < LESS]
        if not gains: return False, f'neither smaller nor faster than before ({1/size:.2f} and {1/time:.2f} times)'
        return True, f'{" and ".join(gains)} than before; {change} from the original'

    def _add(self, stage: Stage, graph):
        self.stages.append(stage)
        self.graphs.append(graph)
        print(f'  {"tried" if self.targets else "kept" if stage.kept else "rolled back"}: {stage.reason}', flush=True)

    def _stage(self, name, graph, predicted, kept, reason, proof='', change=None) -> Stage:
        scores = {side: intervals.accuracy(self.sides[side][1], p) for side, p in predicted.items()}
        last = list(predicted)[-1]
        return Stage(name, kept, reason, proof, scores['valid'], change, scores.get('test'), intervals.balanced_accuracy(self.sides[last][1], predicted[last]), len(graph))

    def _predict(self, graph: bytes, *sides: str) -> dict[str, np.ndarray]:
        run = Graph(graph)
        return {side: answers(run, self.sides[side][0], self.contract).argmax(1) for side in sides or self.sides}

    def _time(self, graphs: dict, **others) -> dict[str, list[float]]:
        "The ms of one image through each graph and each of `others`; in a run that goes on, what was measured before: it decides."
        runs = {name: Graph(g, threads=1) for name, g in graphs.items()} | others
        return dict(remember('times of one image', lambda: image_times(runs, self.contract['size'])))
