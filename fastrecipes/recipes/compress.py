"From a trained classifier to a small, fast one: distil, prune, quantize, each kept only if it proves itself."
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from fastai.basics import Learner, nn
from fastai.callback.hook import total_params

from fastrecipes.arguments import check_types
from fastrecipes.data.keyed import keyed
from fastrecipes.data.statistics import PixelMap, normalization_of, normalized_by
from fastrecipes.errors import BadValue
from fastrecipes.production.export import graph_of
from fastrecipes.production.gate import Candidate, Compressed, Gate
from fastrecipes.production.predictor import batched, pixels_of
from fastrecipes.production.quantization import quantize_static, quantized_share
from fastrecipes.production.slimming import slimmed
from fastrecipes.randomness import stream
from fastrecipes.recipes.classify import check_fit, train
from fastrecipes.recipes.ship import ship
from fastrecipes.report.evidence import Row, gather, keep_run, score
from fastrecipes.report.history import history, lines_unless_terminal
from fastrecipes.report.run_folder import STAGES, RunFolder, load_run
from fastrecipes.technique import TECHNIQUES, applied
from fastrecipes.training.distributed import one_process
from fastrecipes.training.reproducibility import seed_everything
from fastrecipes.training.transfer import Backbone, backbone, classifier

__all__ = ['compress', 'check_compression', 'Quantize']

Quantize = Literal['static']
CALIBRATION = 128       # training images that the ranges of activations are measured on


def compress(learn: Learner | str, student: str | None = None, *, prune: float | bool | None = .5, quantize: Quantize | bool | None = 'static',
             tolerance: float = .5, epochs: int = 5, lr: float | str = 'find', T: float = 4., alpha: float = .9, pretrained: bool = True,
             seed: int = 42, out: str | None = None, overwrite: bool = False) -> Compressed:
    """Make a trained classifier small and fast, step by step, and keep each step only if it costs little and gains something.

    Distil it to a smaller network, remove whole channels and fine-tune, then compute in 8 bits. After each stage: accuracy on the
    validation images, paired with the original's, the size of the .onnx, the time for one image. A stage that loses more than `tolerance`
    points, or is neither smaller nor faster, is rolled back, and the table says why. Accuracy on the test images is reported, never chosen by.

    Args:
        learn: a fitted Learner on data of `image_folder`, or the run folder that it was left in
        student: a smaller network to distil to, any of timm or torchvision (default: none, the network stays)
        prune: share of the channels of each layer to remove, between 0 and 1; false: none
        quantize: static (weights and activations in 8 bits); false: not
        tolerance: points of accuracy that it may cost, 0 to 100
        epochs: passes over the training data for the student, and again to fine-tune what was pruned
        lr: the highest learning rate, or 'find'
        T: temperature of the teacher's answers, above 0
        alpha: weight of the teacher beside the labels, 0 to 1
        pretrained: start the student from trained weights
        seed: of every draw
        out: the run folder; a run that was cut off there goes on
        overwrite: replace the run in that folder
    """
    asked = dict(locals())
    check_types(compress, asked)
    one_process('compress')
    prune, quantize = check_compression(prune, quantize, tolerance)
    if not (student or prune or quantize): raise BadValue('compress: student, prune and quantize are all off: nothing to do')
    if student or prune: check_fit(epochs, lr)
    seed_everything(seed)
    net = backbone(student, pretrained, 'student') if student else None
    learn = _to_compress(learn, out)

    with RunFolder.open('compress', asked, out, overwrite, defaults=compress).under_way() if out else nullcontext() as run:
        if run: run.note_data(learn.dls)
        gate, how = Gate(learn, tolerance), dict(teacher=learn, T=T, alpha=alpha)
        if student: gate.attempt(f'distil to {student}', lambda: _distilled(learn, net, epochs, lr, seed, how))
        if prune: gate.attempt(f'prune {prune:.0%}', lambda: _pruned(gate.learn, prune, epochs, lr, seed, how))
        if quantize: gate.attempt(f'quantize ({quantize})', lambda: _quantized(gate, seed))
        small = gate.compressed()

        if run:
            bundle = ship(small, run.path/'bundle', overwrite=True)
            rows = [Row(s.name, s.test or s.valid, s.balanced) for s in dict.fromkeys((small.original, small.accepted))]
            keep_run(run, small.learn, gather(small.learn, run, scored := score(small.learn), f'{Path(str(asked["learn"])).name}, compressed', table=rows,
                                              side=scored.side, bundle=bundle, compression=small))
    return small


def _to_compress(learn, out) -> Learner:
    "The Learner to start from."
    if isinstance(learn, Learner): return learn
    if not isinstance(learn, (str, Path)): raise BadValue(f'learn: a fitted Learner or a run folder, got {type(learn).__name__}; what compress gave holds its Learner in .learn')
    if out and Path(out).resolve() == Path(learn).resolve(): raise BadValue(f'out: {out} is the run to compress; name another folder')
    if (Path(learn)/STAGES).is_file(): print(f'{learn} was compressed already: starting from its float network')
    return load_run(learn)


def check_compression(prune, quantize, tolerance) -> tuple[float | None, str | None]:
    "`prune` and `quantize`, None where they are off. Raises for what can be told wrong before any work."
    prune, quantize = {True: .5, False: None}.get(prune, prune), {True: 'static', False: None}.get(quantize, quantize)
    if prune is not None and not 0 < prune < 1: raise BadValue(f'prune: a share of the channels between 0 and 1, or false, got {prune}')
    if quantize not in (None, 'static'): raise BadValue(f"quantize: 'static' or false, got {quantize!r}")
    if not 0 <= tolerance <= 100: raise BadValue(f'tolerance: 0 to 100 points of accuracy, got {tolerance}')
    return prune, quantize


def _distilled(teacher: Learner, net: Backbone, epochs, lr, seed, how) -> Candidate:
    "The student, trained on the teacher's images, normalised as its own weights want them."
    theirs = normalization_of(teacher)
    same = net.statistics is None or theirs is not None and theirs.same_as(PixelMap.standard(*net.statistics))
    student = classifier(teacher.dls if same else normalized_by(teacher.dls, None), net, metrics=teacher.metrics)
    if total_params(student.model)[0] >= total_params(teacher.model)[0]:
        print(f'  {net.arch} is no smaller than what it is to replace: {_size(teacher.model)} → {_size(student.model)} parameters')
    _teach(student, teacher, seed, how, net.arch)
    train(student, epochs, lr, pretrained=net.statistics is not None, title='distillation')
    return Candidate(graph_of(student), f'{_size(teacher.model)} → {_size(student.model)} parameters', student)


def _pruned(learn: Learner, ratio: float, epochs, lr, seed, how) -> Candidate:
    "The network without its least important channels, fine-tuned."
    thin = slimmed(learn.model, ratio, *learn.dls.one_batch()[:1])
    student = Learner(learn.dls, thin, learn.loss_func, metrics=learn.metrics)
    history(student).fits = list(history(learn).fits)
    _teach(student, how['teacher'], seed, how, 'pruned')
    train(student, epochs, lr, title='fine-tuning')
    return Candidate(graph_of(student), f'{_size(learn.model)} → {_size(student.model)} parameters', student)


def _quantized(gate: Gate, seed) -> Candidate:
    "The accepted graph in 8 bits, its ranges measured on training images."
    items = list(gate.learn.dls.train.items)
    some = [items[i] for i in sorted(stream(seed, 'calibration').permutation(len(items))[:CALIBRATION])]
    graph = quantize_static(gate.graph, batched(some, lambda x: pixels_of(x, gate.contract)))
    return Candidate(graph, f'{quantized_share(graph):.1%} of the weights in 8 bits')


def _teach(student: Learner, teacher: Learner, seed, how, title: str):
    "Give the student the teacher's training: its techniques (those of the data lie in its loaders), its seed, and its answers."
    lines_unless_terminal(student, title)
    keyed(student, seed)
    inherited = {n: a.arguments for n, a in applied(teacher).items() if TECHNIQUES[n].stage in ('loss', 'optim', 'train')}
    student.use(**{**inherited, 'distill': how})


def _size(model: nn.Module) -> str: return f'{total_params(model)[0]:,}'
