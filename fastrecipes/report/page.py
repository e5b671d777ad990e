"The report: one HTML file that loads nothing, reads on a phone and in print, and says first how good the model is and how sure that is."
import base64
import hashlib
import io
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image, ImageOps

from fastrecipes.files import in_bytes, whole
from fastrecipes.report import effect_plots, plots
from fastrecipes.report.intervals import Difference, signed
from fastrecipes.report.plots import field_of

__all__ = ['Report', 'write_page', 'SECTIONS']

# What the page shows, in this order: the macro of sections.html, the heading, and when it is shown. A new section is a line here and a macro there.
SECTIONS = (('result', 'Result', lambda r: r.table),
            ('folds', 'Fold by fold', lambda r: r.folds),
            ('ablation', 'What each technique does', lambda r: r.ablation),
            ('learning_curve', 'Would more images help?', lambda r: r.learning_curve),
            ('run', 'What was run', lambda r: True),
            ('techniques', 'Techniques', lambda r: r.techniques),
            ('training', 'Training', lambda r: r.fits or r.lr_find or r.schedule),
            ('confusion', 'What is taken for what', lambda r: r.confusion),
            ('mistakes', 'Worst mistakes', lambda r: r.mistakes),
            ('compression', 'Compression', lambda r: r.compression),
            ('bundle', 'The bundle', lambda r: r.bundle),
            ('set_aside', 'Images set aside', lambda r: r.data.get('set_aside')),
            ('again', 'Run it again', lambda r: True))
THUMBNAIL = 192     # px, the longer side
COPY = """document.querySelectorAll('button[data-copy]').forEach(b => { b.hidden = false; b.onclick = () => {
  const code = b.parentElement.querySelector('code'), range = document.createRange();
  range.selectNodeContents(code); getSelection().removeAllRanges(); getSelection().addRange(range);
  const said = t => { b.textContent = t; setTimeout(() => b.textContent = 'Copy', 1600) };
  (navigator.clipboard ? navigator.clipboard.writeText(code.textContent) : Promise.reject()).then(() => said('Copied'), () => said('Selected'));
}})"""


@dataclass
class Report:
    """What is told of a run; whatever is missing is left out of the page. Shares and probabilities are 0–1; rows may be dicts or objects.

    Texts are escaped, so class names and paths may hold anything."""
    title: str                                  # 'resnet18 on photos'
    command: str                                # the shell command that runs it again
    data: dict                                  # path: str; classes: [dict(name, train, valid, test)] in images; set_aside: [dict(path, reason)];
                                                # duplicates: int, files that are copies of others; notes: [str]; match: how alike the classes
                                                # of valid and train are, a sentence
    created: str = field(default_factory=lambda: datetime.now().strftime('%Y-%m-%d %H:%M'))
    side: str = 'test'                          # the images that `table` is measured on: 'test', 'validation' (then they were chosen on), or 'out-of-fold'
    headline: str | None = None                 # one sentence; made from `table` and `difference` where missing
    table: list = field(default_factory=list)   # [dict(name, accuracy: Estimate, balanced_accuracy: Estimate, seconds: float | None, note: str)]:
                                                # the baseline first, then the recipe, then the bundle; or one row
    difference: dict | None = None              # {'accuracy': Difference, …}, of the second row minus the first
    folds: list = field(default_factory=list)   # [dict(number, n_train, n, accuracy, balanced_accuracy, log_loss, seconds)] of a cross-validation
    ablation: object = None                     # what `ablate` found: its `Ablation`
    learning_curve: object = None               # a `LearningCurve`
    techniques: list = field(default_factory=list)  # [dict(name, arguments: dict, effect: str | None, summary, source)] as applied
    fits: list = field(default_factory=list)    # [dict(name, columns: [str], rows: [[float]])], a row an epoch, one fit after another
    lr_find: dict | None = None                 # lrs: [float], losses: [float], suggestion: float
    schedule: list = field(default_factory=list)    # the learning rate of each training batch of all fits
    confusion: tuple | None = None              # (counts (c, c) with the truth in rows, [class name])
    mistakes: list = field(default_factory=list)    # [dict(image: PIL image or path, truth, predicted, probability)], the worst first
    compression: object = None                  # stages: [dict(name, kept, reason, proof, valid, change, test, size_bytes, latency_ms)], the original
                                                # first; tolerance: points; verdict: a sentence
    bundle: object = None                       # path, size_bytes, parity: dict(n: images, agree: of them, max_diff: of probabilities), latency_ms and
                                                # eager_latency_ms: one image, without and with torch
    provenance: dict = field(default_factory=dict)  # provenance.json


def write_page(record: Report, path) -> Path:
    "Write `record` as one self-contained HTML file to `path` and return it."
    path = Path(path)
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= dict(arguments=_arguments, link=_link, size=in_bytes, sig=_sig, thumbnail=_thumbnail, verdict=_verdict, options=_options, points=signed,
                        words=lambda s: str(s).replace('_', ' '))
    html = env.get_template('template.html').render(
        r=record, headline=record.headline or _headline(record), tiles=_tiles(record), figures=_figures(record), facts=_facts(record.provenance),
        totals={s: sum(field_of(c, s, 0) for c in record.data.get('classes', ())) for s in ('train', 'valid', 'test')},
        shown=[(name, title) for name, title, wanted in SECTIONS if wanted(record)], script=Markup(COPY),
        script_hash=base64.b64encode(hashlib.sha256(COPY.encode()).digest()).decode())
    with whole(path) as tmp: tmp.write_text(html, encoding='utf8')
    return path


def _main(record: Report):
    "The row that the report is about: the second, where the first is a baseline."
    return record.table[min(1, len(record.table)-1)] if record.table else None


def _headline(record: Report) -> str:
    if (row := _main(record)) is None: return record.title
    a = field_of(row, 'accuracy')
    images = f'{a.n} ' if a.n else ''
    which = f'{images}untouched test images' if record.side == 'test' else f'{images}{record.side} images'
    text = f'{a.value:.1%} of {which} classified correctly'.replace('%', ' %', 1)
    if len(record.table) < 2 or not (d := (record.difference or {}).get('accuracy')): return text + '.'
    other = field_of(record.table[0], 'name')
    if not d.resolved: return f'{text}; too few images to tell it from {other} ({d.value:+.1%}).'.replace('%)', ' points)').replace('-', '−')
    return f'{text}, {abs(100*d.value):.1f} points {"more" if d.value > 0 else "fewer"} than {other}.'


def _verdict(d: Difference, a: str = 'the first', b: str = 'the second') -> str:
    "In words, whether a difference is resolved."
    if d.lo > 0: return f'Resolved: {a} is better than {b}.'
    if d.hi < 0: return f'Resolved: {a} is worse than {b}.'
    return f'Not resolved: 0 lies inside the interval; {f"these {d.n} images" if d.n else "these images"} cannot tell {a} from {b}.'


def _tiles(record: Report) -> list[tuple[str, str, str]]:
    "The numbers to remember: (label, value, small print)."
    tiles = []
    if row := _main(record):
        for name in ('accuracy', 'balanced_accuracy'):
            if e := field_of(row, name): tiles.append((name.replace('_', ' '), f'{100*e.value:.1f}\N{NO-BREAK SPACE}%', f'{100*e.lo:.1f}–{100*e.hi:.1f}'))
    if b := record.bundle:
        if n := field_of(b, 'size_bytes'): tiles.append(('bundle', in_bytes(n), 'to ship'))
        if t := field_of(b, 'latency_ms'):
            eager = field_of(b, 'eager_latency_ms')
            tiles.append(('one image', f'{_sig(t)}\N{NO-BREAK SPACE}ms', f'{_sig(eager)} ms in torch' if eager else 'without torch'))
    return tiles


def _figures(record: Report) -> dict[str, tuple[Markup, str]]:
    "SVG and what it shows, in words, by name."
    figures = {}
    def add(name, svg, alt):
        if svg: figures[name] = Markup(svg), alt
    rows = [(field_of(r, 'name'), {k.replace('_', ' '): e for k in ('accuracy', 'balanced_accuracy') if (e := field_of(r, k))}) for r in record.table]
    if any(by_metric for _, by_metric in rows):
        add('intervals', plots.intervals(rows), 'Estimates and 95 % intervals: ' + '; '.join(f'{n}: {k} {e}' for n, m in rows for k, e in m.items()))
    if any(f['rows'] for f in record.fits):
        last = next(f for f in reversed(record.fits) if f['rows'])
        end = ', '.join(f'{c.replace("_", " ")} {v:.3g}' for c, v in zip(last['columns'], last['rows'][-1]))
        add('losses', plots.losses(record.fits), f'Training and validation loss by epoch; at the end {end}')
        add('metrics', plots.metrics(record.fits), f'Metrics on the validation images by epoch; at the end {end}')
    if f := record.lr_find:
        add('lr_find', plots.lr_find(f['lrs'], f['losses'], s := f.get('suggestion')), 'Loss by learning rate' + (f'; {s:.1e} was chosen' if s else ''))
    if s := record.schedule: add('schedule', plots.schedule(s), f'Learning rate by batch: {len(s)} batches, at most {max(s):.1e}')
    if record.confusion:
        matrix, labels = record.confusion
        right, n = sum(int(matrix[i][i]) for i in range(len(labels))), sum(int(k) for row in matrix for k in row)
        add('confusion', plots.confusion(matrix, labels), f'Confusion matrix of {len(labels)} classes; {right} of {n} on the diagonal')
    if (a := record.ablation) and a.findings:
        told = '; '.join(f'{f.comparison.technique} {f.comparison.where}: {f.effects["accuracy"]}' for f in a.findings)
        add('forest', effect_plots.forest(a.findings), f'Effects and 95 % intervals: {told}')
        times = '; '.join(f'{f.comparison.technique}: ×{f.times:.2f}' for f in a.findings if f.comparison.where == 'alone')
        add('worth', effect_plots.worth(a.findings), f'Gain against training time: {times}')
        add('curves', effect_plots.curves(a.curves), 'Validation accuracy by epoch, the mean over seeds, of ' + ', '.join(a.curves))
    if c := record.learning_curve:
        said = '; '.join(f'{n:,} images: {e}' for n, e in zip(c.images, c.estimates))
        add('error', effect_plots.error(c.images, c.errors, c.exponent), f'Error by training images, both on a logarithmic scale: accuracy {said}')
    if record.compression:
        stages = [s for s in field_of(record.compression, 'stages') if field_of(s, 'size_bytes')]
        targets = field_of(record.compression, 'targets')
        for name, most, words in (('size_bytes', 'max_mb', 'size of the .onnx'), ('latency_ms', 'max_ms', 'time for one image')):
            add(name, plots.tradeoff(stages, name, field_of(targets, most) if targets else None),
                f'Accuracy against {words} by stage: ' + '; '.join(f'{field_of(s, "name")}: {field_of(s, name):.4g}' for s in stages))
    return figures


def _facts(provenance: dict) -> list[tuple[str, str]]:
    "Provenance as (name, text), one level deep; the command has a place of its own, and the report is written before the end."
    return [(k.replace('_', ' '), ' · '.join(f'{n} {o}' for n, o in v.items() if o is not None) if isinstance(v, dict) else str(v))
            for k, v in provenance.items() if v is not None and k not in ('command', 'cwd', 'finished', 'finished_at')]


def _thumbnail(image) -> str | None:
    "A picture, or the path of one, as a data URI; None where it cannot be read."
    try:
        im = image if isinstance(image, Image.Image) else Image.open(image)
        im = ImageOps.exif_transpose(im).convert('RGB')
    except OSError: return None
    im.thumbnail((THUMBNAIL, THUMBNAIL))
    kind = 'png' if max(im.size) <= 64 else 'jpeg'
    im.save(buffer := io.BytesIO(), kind, **({'quality': 82} if kind == 'jpeg' else {}))
    return f'data:image/{kind};base64,' + base64.b64encode(buffer.getvalue()).decode()


def _options(command: str) -> list[str]:
    "A command cut before each option: the pieces that should not be torn at the end of a line."
    return re.split(' (?=--)', command)


def _arguments(arguments: dict) -> str:
    def shown(v): return f'a {type(v).__name__}' if repr(v).startswith('<') else repr(v)        # an address says nothing
    return ', '.join(f'{k}={shown(v)}' for k, v in arguments.items()) or 'defaults'


def _link(source: str) -> Markup | str:
    "A source as a link, where it is one."
    kind, _, rest = source.partition(':')
    url = {'arXiv': f'https://arxiv.org/abs/{rest}', 'doi': f'https://doi.org/{rest}', 'http': source, 'https': source}.get(kind)
    if not url: return source
    return Markup('<a href="{}" rel="noreferrer">{}</a>').format(url, source.removeprefix('https://').removeprefix('http://'))


def _sig(x: float) -> str:
    "Three digits that count."
    return f'{x:.3g}' if x < 1000 else f'{x:.0f}'
