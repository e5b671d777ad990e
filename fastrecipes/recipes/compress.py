"From a trained classifier to a small, fast one: distil, prune, quantize, each kept only if it proves itself."
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from fastai.basics import Learner

from fastrecipes.arguments import checked
from fastrecipes.errors import BadValue, nearest
from fastrecipes.production.gate import Compressed, Gate
from fastrecipes.production.quantized import Quantized
from fastrecipes.production.search import Budget, Targets
from fastrecipes.recipes.classify import check_fit
from fastrecipes.recipes.compressing import Work, distilled, in_8_bits, pruned, search
from fastrecipes.recipes.ship import ship
from fastrecipes.report.evidence import Row, gather, keep_run, score
from fastrecipes.report.run_folder import STAGES, RunFolder, load_run
from fastrecipes.training.distributed import one_process
from fastrecipes.training.reproducibility import seed_everything
from fastrecipes.training.transfer import backbone

__all__ = ['compress', 'check_compression', 'Quantize']

Quantize = Literal['static', 'qat', 'dynamic']
MINUTES = 30.           # of a search, unless told otherwise


@checked
def compress(learn: Learner | str, student: str | None = None, *, max_mb: float | None = None, max_ms: float | None = None, prune: float | bool | None = True,
             quantize: Quantize | bool | None = 'static', tolerance: float = .5, minutes: float | None = None, epochs: int = 5, lr: float | str = 'find',
             T: float = 4., alpha: float = .9, control: bool = False, pretrained: bool = True, seed: int = 42, out: str | None = None, overwrite: bool = False) -> Compressed:
    """Make a trained classifier small and fast, step by step, and keep each step only if it costs little and gains something.

    Distil it to a smaller network, remove whole channels and fine-tune, then compute in 8 bits. After each stage: accuracy on the
    validation images, paired with the original's, the size of the .onnx, the time for one image. A stage that loses more than `tolerance`
    points, or is neither smaller nor faster, is rolled back, and the table says why. Accuracy on the test images is reported, never chosen by.

    With `max_mb` or `max_ms` it searches instead: for the network, and for the student, the least share of channels that must go, then with what training,
    and in 8 bits by which means, it keeps its accuracy; the most accurate that is within both and within `tolerance` is delivered.

    Args:
        learn: a fitted Learner on data of `image_folder`, or the run folder that it was left in
        student: a smaller network to distil to, any of timm or torchvision (default: none, the network stays)
        max_mb: megabytes (10⁶ bytes) that the .onnx may have
        max_ms: milliseconds that one image may take in onnxruntime, on one thread of this machine: the median of up to 50 rounds, so let it have little else to do
        prune: share of the channels of each layer to remove, between 0 and 1; true: half of them, or what the search finds; false: none
        quantize: static (weights and activations in 8 bits), qat (trained for it) or dynamic (linear layers alone); false: not
        tolerance: points of accuracy that it may cost, 0 to 100
        minutes: that a search may begin something new in, above 0 (default: 30)
        epochs: passes over the training data for the student, and again to fine-tune what was pruned
        lr: the highest learning rate, or 'find'
        T: temperature of the teacher's answers, above 0
        alpha: weight of the teacher beside the labels, 0 to 1
        control: train the student on the labels alone as well, as long, to tell what the teacher gave; it is never kept
        pretrained: start the student from trained weights
        seed: of every draw
        out: the run folder; a run that was cut off there goes on
        overwrite: replace the run in that folder
    """
    asked = dict(locals())
    one_process('compress')
    prune, quantize, targets, budget = check_compression(student, prune, quantize, max_mb=max_mb, max_ms=max_ms, minutes=minutes, control=control, tolerance=tolerance)  # pyright: ignore[reportAssignmentType]
    if not (student or prune or quantize): raise BadValue('compress: student, prune and quantize are all off: nothing to do')
    if student or prune: check_fit(epochs, lr)
    seed_everything(seed)
    net = backbone(student, pretrained, 'student') if student else None
    same = deepcopy(net) if control else None
    learn = _to_compress(learn, out)

    with RunFolder.open('compress', asked, out, overwrite, defaults=compress).under_way() if out else nullcontext() as run:
        if run: run.note_data(learn.dls)
        gate, work = Gate(learn, tolerance, targets), Work(learn, net, epochs, lr, seed, dict(teacher=learn, T=T, alpha=alpha))
        if targets: search(gate, work, budget, prune, quantize)
        else:
            if student: gate.attempt(f'distil to {student}', lambda: distilled(work))
            if control: gate.compare(f'{student} alone', lambda: distilled(replace(work, net=same), teach=False))
            if prune: gate.attempt(f'prune {prune:.0%}', lambda: pruned(work, gate.learn, prune))
            if quantize: gate.attempt(f'quantize ({quantize})', lambda: in_8_bits(gate, work, gate.learn, gate.graph, quantize))
        small = gate.compressed()

        if run:
            bundle = ship(small, run.path/'bundle', overwrite=True)
            rows = [Row(s.name, s.test or s.valid, s.balanced) for s in dict.fromkeys((small.original, small.accepted, *([small.control] if control and small.control else [])))]
            keep_run(run, small.learn, gather(small.learn, run, scored := score(small.learn), f'{Path(str(asked["learn"])).name}, compressed', table=rows,
                                              side=scored.side, bundle=bundle, compression=small))
    return small


def _to_compress(learn, out) -> Learner:
    "The Learner to start from."
    if isinstance(learn, Learner) and isinstance(learn.model, Quantized): raise BadValue('learn: its network is in 8 bits already; give the float Learner that it was made from')
    if isinstance(learn, Learner): return learn
    if not isinstance(learn, (str, Path)): raise BadValue(f'learn: a fitted Learner or a run folder, got {type(learn).__name__}; what compress gave holds its Learner in .learn')
    if out and Path(out).resolve() == Path(learn).resolve(): raise BadValue(f'out: {out} is the run to compress; name another folder')
    if (Path(learn)/STAGES).is_file(): print(f'{learn} was compressed already: starting from its float network')
    return load_run(learn)


def check_compression(student, prune, quantize, *, max_mb, max_ms, minutes, control, tolerance) -> tuple[float | bool | None, str | None, Targets, Budget]:
    "`prune` and `quantize`, None where they are off, the targets, and the time to search for them. Raises for what can be told wrong before any work."
    targets, budget = Targets(max_mb, max_ms), Budget(MINUTES if minutes is None else minutes)
    if targets and prune not in (True, False, None): raise BadValue(f'prune: {targets} are searched for, and the share of channels with them: true or false, got {prune}')
    if minutes is not None and not targets: raise BadValue(f'minutes: the time of a search, and nothing is searched for; name max_mb or max_ms, or leave it out, got {minutes:g}')
    if control and not student: raise BadValue('control: it trains the student without its teacher, and no student is named')
    if control and targets: raise BadValue('control: it is for a student by itself, not for a search; leave out max_mb and max_ms')
    prune, quantize = {True: .5, False: None}.get(prune, prune), {True: 'static', False: None}.get(quantize, quantize)
    if prune is not None and not 0 < prune < 1: raise BadValue(f'prune: a share of the channels between 0 and 1, or false, got {prune}')
    kinds = get_args(Quantize)
    if quantize not in (None, *kinds): raise BadValue(f'quantize: one of {", ".join(kinds)}, or false, got {quantize!r}{nearest(quantize, kinds)}')
    if not 0 <= tolerance <= 100: raise BadValue(f'tolerance: 0 to 100 points of accuracy, got {tolerance}')
    return prune, quantize, targets, budget
