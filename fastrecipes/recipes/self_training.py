"A classifier that learns from images without labels: a teacher labels them, a noised student learns from its labels and the true ones, and teaches the next."
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from fastai.callback.hook import total_params
from torch.utils.data import Dataset

from fastrecipes.arguments import checked
from fastrecipes.data.folders import NearDuplicates
from fastrecipes.data.loaders import as_dataloaders
from fastrecipes.data.pixels import Resize
from fastrecipes.data.pseudo import SoftCrossEntropy, labelled_alone, new_images, pseudo_label
from fastrecipes.data.statistics import normalized_by
from fastrecipes.errors import BadValue, NotThere
from fastrecipes.randomness import key_of
from fastrecipes.recipes.classify import USUAL, Schedule, check_recipe, image_classifier
from fastrecipes.report import intervals
from fastrecipes.report.evidence import Row, Scored, differences, gather, keep_run
from fastrecipes.report.history import history
from fastrecipes.report.intervals import Difference, Estimate
from fastrecipes.report.run_folder import RunFolder
from fastrecipes.report.tables import aligned
from fastrecipes.technique import discover, plan
from fastrecipes.training.distributed import one_process
from fastrecipes.training.resume import remember
from fastrecipes.training.transfer import backbone

__all__ = ['noisy_student', 'Round', 'SelfTrained']

NOISE = dict(randaugment=True, dropout=.5)                          # what students have on unless told otherwise
NOISES = ('randaugment', 'dropout', 'stochastic_depth')             # what students alone have
OF_CLASSES = dict.fromkeys(('class_weights', 'logit_adjustment'), 'it counts the classes of the training images, and soft labels have none')
SOFT_LOSSES = ('ce', 'nll', 'label_smoothing', 'focal')


@dataclass(frozen=True)
class Round:
    """One network of the table: the teacher, the student of a round, or the control; whether it was kept and why, and how well it does.

    `valid`, `test`: accuracy on those images (`test` None where there are none); `change`: on the validation images, minus the teacher's of that
    round, image by image; `balanced`: balanced accuracy on the images held out; `labels`: what it was taught of the unlabelled ones; `seconds` of training."""
    name: str
    kept: bool
    reason: str
    valid: Estimate
    test: Estimate | None
    balanced: Estimate
    change: Difference | None = None
    labels: str = ''
    seconds: float = 0.

    def record(self) -> dict: return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(repr=False)
class SelfTrained:
    "What `noisy_student` made: `.learn`, the best network, `.rounds`, the table (teacher first, control last), and `.path`, the run folder. Printed, it is the table."
    learn: Learner
    rounds: list[Round]
    difference: Difference | None = None        # of the result minus the control, on the images held out
    path: Path | None = field(default=None)

    @property
    def accepted(self) -> Round: return [r for r in self.rounds if r.kept][-1]

    @property
    def control(self) -> Round | None: return next((r for r in self.rounds if r.name == CONTROL), None)

    @property
    def _worth(self) -> str:
        "What to make of the difference: the unlabelled images are worth it only where the control does worse."
        d = self.difference
        if d.lo > 0: return f': {self.accepted.name} is better than training on the labelled images alone'
        if d.hi < 0: return ': the CONTROL IS BETTER; train longer on the labelled images alone, with that noise'
        return ': no difference is certain between it and training as long on the labelled images alone'

    def __str__(self):
        rows = [('', 'validation', 'test', 'training', ''), *((r.name, str(r.valid), str(r.test or '–'), f'{r.seconds:.0f} s', r.reason) for r in self.rounds)]
        lines = aligned(rows)
        if self.difference: lines.append(f'{self.accepted.name} − {CONTROL}: {self.difference} on the images held out{self._worth}')
        return '\n'.join(['', *lines, *(['', f'report: {self.path/"report.html"}'] if self.path else [])])

    __repr__ = __str__


CONTROL = 'control'


@partial(checked, techniques=discover)
def noisy_student(path, unlabelled, arch: str = 'resnet18', *, student: str | None = None, rounds: int = 2, soft: bool = True, threshold: float = .3, balance: bool = True,
                  ratio: float | None = None, control: bool = True, epochs: int = 5, lr: float | str = 'find', size: int = 224, bs: int = 64,
                  valid: float | list[str] | str | Callable = .2, test: float = .1, groups: str | Callable | None = None, near_duplicates: NearDuplicates = 'warn',
                  resize: Resize = 'crop', pretrained: bool = True, schedule: Schedule = 'flat_cos', seed: int = 42, workers: int | None = None,
                  out: str | None = None, overwrite: bool = False, **techniques) -> SelfTrained:
    """Train on labelled images and on many without labels: Noisy Student (arXiv:1911.04252). A teacher labels them, a noised student learns from both.

    Worth it where labels are few and unlabelled images of the same kind are many. A round is kept, and its student teaches the next, only if it does
    better than its teacher on the validation images; else it is over, and the teacher stays. The control tells what the labels by the teacher are worth: a student trained
    as long, with the same noise, on the labelled images alone. Images that are held out never enter training, not even as copies among the unlabelled.

    Techniques are keywords as in `image_classifier`. `randaugment` and `dropout` (.5) are the noise of students, and on unless switched off; they
    and `stochastic_depth` are for students alone, all others for the teacher, too. Raises as `image_classifier` and `pseudo_label` do.

    Args:
        path: the folder of labelled images, one sub-folder a class; or what else `image_classifier` takes
        unlabelled: the folder of images without labels, or a list of files; a torch Dataset where path is one
        arch: the teacher, any network of timm or torchvision
        student: the students, as large as the teacher or larger (default: arch)
        rounds: of teaching at most, at least 1
        soft: students learn all probabilities; false: the most probable class alone
        threshold: the least probability of an answer that is taught, 0 to 1
        balance: teach as many images of each class
        ratio: unlabelled images for each labelled one in a batch (default: as many as there are)
        control: train the control as well
        epochs: passes over the training data, at least 1; for students over labelled and unlabelled images, whichever take longer
        lr: the highest learning rate, or 'find' (for each network)
        size: width and height of the images, in px
        bs: images a batch
        valid: share of each labelled class held out to choose on, 0 to 1; or a CSV with the columns file and split (train, valid or test), or a list of files
        test: share of each labelled class held out for the final test, 0 to 1
        groups: a regular expression that finds in a file's name who or what is in the picture, or a column of the CSV; no group lies on two sides
        near_duplicates: together keeps pictures that look the same on one side; warn only tells of them
        resize: how images get their size: crop, squish or pad
        pretrained: start each network from trained weights
        schedule: how the rate moves: constant, step, decay, cos, flat_cos, sgdr (warm restarts) or one_cycle
        seed: of the split and of every draw
        workers: processes that decode images
        out: the run folder; a run that was cut off there goes on
        overwrite: replace the run in that folder
    """
    asked = dict(locals())
    noise = {n: v for n, v in {**NOISE, **techniques}.items() if n in NOISES}
    usual = {**USUAL, **{n: v for n, v in techniques.items() if n not in NOISES}}
    todo = plan({**usual, **noise})
    check_recipe(path, arch, epochs, lr, schedule)
    check_self_training(unlabelled, rounds, soft, threshold, ratio, bs, todo)
    one_process('noisy_student')
    for what, name in (('arch', arch), ('student', student)):
        if name: backbone(name, pretrained, what)       # weights that cannot be fetched: say so before an hour of work

    data = as_dataloaders(path, size=size, bs=bs, valid=valid, test=test, groups=groups, near_duplicates=near_duplicates, resize=resize, seed=seed, workers=workers)
    if not len(data.valid_ds): raise BadValue('valid: there are no validation images, and rounds are judged by them; hold some out with valid=.2')
    with RunFolder.open('noisy-student', asked, out, overwrite, defaults=noisy_student).under_way() if out else nullcontext() as run:
        if run: run.note_data(data)

        new_images(data, unlabelled)                            # what it refuses, it refuses now
        def trained(title: str, name: str, dls: DataLoaders, own: int, **noise) -> Network:
            "A network of this recipe, its pixels normalised as its own weights want them."
            print(f'{title}: {name}, {len(dls.train)} batches an epoch …', flush=True)
            if pretrained and name != arch: dls = normalized_by(dls, None)
            learn = image_classifier(dls, name, epochs=epochs, lr=lr, pretrained=pretrained, schedule=schedule, seed=own, **usual, **noise)
            learn.dls = labelled_alone(learn.dls)               # what is exported knows no unlabelled file, and what goes on from here finds plain classes
            if isinstance(learn.loss_func, SoftCrossEntropy): learn.loss_func = CrossEntropyLossFlat()
            return Network(learn, history(learn).seconds, scores(learn))

        best = teacher = trained('teacher', arch, data, seed)
        table, networks = [teacher.row('teacher', True, 'trained on the labelled images')], {'teacher': teacher}
        like, own = None, [key_of(seed, 'round', k) % 2**32 for k in range(rounds)]
        for k in range(rounds):
            name = f'round {k+1}'
            try: said = remember(f'labels of {name}', lambda: replace(pseudo_label(best.learn, unlabelled, threshold, soft, balance), source=None))
            except BadValue as e:                               # no answer is sure enough: what was trained so far is not lost
                print(f'{name}: {e}', flush=True)
                break
            print(f'{name}: {said}', flush=True)
            joint = replace(said, source=unlabelled if isinstance(unlabelled, Dataset) else None).loaders(data, ratio)
            new = trained(name, student or arch, joint, own[k], **noise)
            if not k and new.size < teacher.size:
                print(f'  {student} is smaller than its teacher {arch} ({new.size:,} and {teacher.size:,} parameters); the paper takes one as large or larger')
            change, networks[name] = new.better_than(best), new
            better = change.value > 0
            like = joint if better or like is None else like
            table.append(new.row(name, better, f'{change} from its teacher on {change.n} validation images{"" if better else ": not better, the teacher stays"}', change, str(said)))
            print(f'  {"kept" if better else "not kept"}: {table[-1].reason}', flush=True)
            if not better: break
            best = new

        if control and like:
            alone = networks[CONTROL] = trained(CONTROL, student or arch, labelled_alone(data, like), own[0], **noise)
            table.append(alone.row(CONTROL, False, 'a student on the labelled images alone, as long and with the same noise', alone.better_than(teacher)))
        apart = differences(best.final, networks[CONTROL].final) if CONTROL in networks else None
        result = SelfTrained(best.learn, table, apart and apart['accuracy'], run and run.path)

        if run:
            run.note(rounds=[r.record() for r in table])
            keep_run(run, best.learn, gather(best.learn, run, best.final, f'{student or arch} on {Path(str(asked["path"])).name}, self-trained',
                                             table=report_rows(table, networks, result), side=best.final.side, difference=apart))
    return result


def check_self_training(unlabelled, rounds, soft, threshold, ratio, bs, todo):
    "Raise for what can be told wrong before anything is trained."
    if rounds < 1: raise BadValue(f'rounds: at least 1, got {rounds}')
    if not 0 <= threshold < 1: raise BadValue(f'threshold: a probability in [0, 1), got {threshold}')
    if ratio is not None and not ratio > 0: raise BadValue(f'ratio: above 0, got {ratio}')
    if bs < 2: raise BadValue(f'bs: at least 2, a labelled image and one that is not, got {bs}')
    if isinstance(unlabelled, (str, Path)) and not Path(unlabelled).is_dir(): raise NotThere(f'unlabelled: no folder {unlabelled}')
    for t, arguments in todo:
        if t.name == 'precompute': raise BadValue('precompute: it keeps the answers of one set of images, and each round has another')
        if soft and t.name in OF_CLASSES: raise BadValue(f'{t.name}: {OF_CLASSES[t.name]}; take soft=False, or do without, for what is taught is balanced')
        if soft and t.name == 'loss' and arguments['kind'] not in SOFT_LOSSES:
            raise BadValue(f'loss: soft labels are probabilities over the classes, for {", ".join(SOFT_LOSSES)}, got {arguments["kind"]!r}; take soft=False')


@dataclass
class Network:
    "A Learner that came out of its training, the seconds that took, and its predictions by side."
    learn: Learner
    seconds: float
    said: dict[str, Scored]

    @property
    def size(self) -> int: return total_params(self.learn.model)[0]

    @property
    def final(self) -> Scored: return list(self.said.values())[-1]

    def better_than(self, other: 'Network') -> Difference:
        a, b = self.said['validation'], other.said['validation']
        return intervals.difference(a.targets, a.predicted, b.predicted)

    def row(self, name, kept, reason, change=None, labels='') -> Round:
        of = {side: intervals.accuracy(s.targets, s.predicted) for side, s in self.said.items()}
        balanced = intervals.balanced_accuracy(self.final.targets, self.final.predicted)
        return Round(name, kept, reason, of['validation'], of.get('test'), balanced, change, labels, self.seconds)


def scores(learn: Learner) -> dict[str, Scored]:
    "Its predictions for the images to choose by, and for those held out, where there are any."
    found = {}
    for i, side in ((1, 'validation'), (2, 'test')):
        if i >= len(learn.dls.loaders) or not len(learn.dls.loaders[i].dataset): continue
        with learn.no_bar(): p, y = learn.get_preds(ds_idx=i)
        found[side] = Scored(p.numpy(), y.numpy(), side)
    return found


def report_rows(table: list[Round], networks: dict[str, Network], result: SelfTrained) -> list[Row]:
    "The table of the report: what the result is compared with first, then the result, then the others."
    names = [r.name for r in table]
    base = CONTROL if result.control else 'teacher'
    order = dict.fromkeys([*([base] if base != result.accepted.name else []), result.accepted.name, *names])
    by_name = {r.name: r for r in table}
    return [Row.of(n, networks[n].final, networks[n].seconds, f'validation {by_name[n].valid}; {by_name[n].reason}') for n in order]
