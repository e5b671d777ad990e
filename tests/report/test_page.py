"The report as text: what it says, what it leaves out, and that nothing a user named can break it."
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fastrecipes.report import plots
from fastrecipes.report.intervals import Difference, Estimate
from fastrecipes.recipes.ablate import Ablation
from fastrecipes.recipes.arms import METRICS, Arm, Finding, Outcome, comparisons
from fastrecipes.recipes.learning_curve import LearningCurve
from fastrecipes.report.effects import Effect, Verdict
from fastrecipes.report.page import SECTIONS, Report, write_page

EVIL = '<script>alert("1")</script>'
DATA = dict(path='photos', classes=[dict(name='cat', train=30, valid=10, test=20), dict(name='dog', train=90, valid=10, test=20)])
VOID = {'meta', 'link', 'img', 'br', 'input'}


class Page(HTMLParser):
    "Text, attributes, and whether every tag is closed in order."
    def __init__(self, html):
        super().__init__()
        self.open, self.words, self.tags = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f'not closed: {self.open}'

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID: self.open.append(tag)

    def handle_startendtag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data):
        if not {'style', 'script'} & set(self.open): self.words.append(data)

    @property
    def text(self): return ' '.join(' '.join(self.words).replace('\xa0', ' ').split())


def page(tmp_path, **fields) -> Page:
    fields = dict(title='resnet18 on photos', command='fastrecipes pipeline photos', data=DATA) | fields
    return Page(write_page(Report(**fields), tmp_path/'report.html').read_text())


def row(name, value, **more):
    return dict(name=name, accuracy=Estimate(value, value-.02, value+.02, 400), balanced_accuracy=Estimate(value-.1, value-.2, value), **more)


def ablated(name):
    "What `ablate` found of two techniques, one of which helps."
    effects = {m: Effect(.05, .01, .09, 400, 5, .02, 4., .03) for m in METRICS}
    words = [Verdict('helped', 'helped'), Verdict('no difference', 'no difference larger than 0.4 points'), Verdict('hurt', 'hurt'), Verdict('not resolved', name)]
    found = [Finding(c, effects, effects['accuracy'], v, 1.2, 3.) for c, v in zip(comparisons(['mixup', name]), words)]
    command = f'fastrecipes image-classifier {name} --mixup true'
    return Ablation(None, ['mixup', name], found, Estimate(.9, .8, .95, 400), ['mixup'], effects['accuracy'], command, {(name, 'alone'): name},
                    {(Arm(), 0): Outcome(None, None, 1., curve=(.5, .6))})


def full(name='cat', bs=3):
    "Every field, with `name` wherever a user names something."
    cols = ['train_loss', 'valid_loss', 'accuracy']
    return dict(
        title=f'resnet18 on {name}', command=f'fastrecipes pipeline {name}',
        data=dict(path=name, classes=[dict(name=name, train=8, valid=2, test=2)]*2, set_aside=[dict(path=f'{name}/1.jpg', reason=f'{name} is broken')],
                  duplicates=1, notes=[name], match=name),
        folds=[dict(number=i, n_train=20, n=10, accuracy=.9, balanced_accuracy=.8, log_loss=.25, seconds=1.) for i in (1, 2)],
        table=[row(name, .9, seconds=3.), row(f'{name} 2', .95, note=name)], difference={'accuracy': Difference(.05, .01, .09, 400)},
        techniques=[dict(name='mixup', arguments=dict(alpha=name), effect=name, summary=name, source='arXiv:1710.09412')],
        fits=[dict(name=name, columns=cols, rows=[[1., .9, .5]]), dict(name='all layers', columns=cols, rows=[[.8, math.nan, .6]]*bs)],
        lr_find=dict(lrs=[1e-5, 1e-3, 1e-1], losses=[2., 1., math.inf], suggestion=1e-3), schedule=[.1, .2, .1],
        confusion=(np.array([[9, 1], [0, 10]]), [name, name]),
        mistakes=[dict(image=Image.new('RGB', (8, 8)), truth=name, predicted=name, probability=.87),
                  dict(image='gone.jpg', truth=name, predicted=name, probability=.5)],
        compression=dict(tolerance=.5, verdict='4.0 times smaller', stages=[
            dict(name=name, kept=True, reason=name, valid=Estimate(.9, .8, .95, 400), test=Estimate(.9, .8, .95, 400), size_bytes=4000, latency_ms=2.),
            dict(name='cut', kept=False, reason=f'{name} failed'),
            dict(name='half', kept=False, reason='too much', proof=name, valid=Estimate(.8, .7, .85, 400), size_bytes=1000, latency_ms=1.)]),
        bundle=dict(path=name, size_bytes=13_400_000, parity=dict(n=840, max_diff=3.2e-7), latency_ms=2., eager_latency_ms=9.),
        learning_curve=LearningCurve(None, [100, 200], [Estimate(.8, .7, .9, 400)]*2, np.array([[.2, .1], [.21, .12]]), .9, Difference(.05, .01, .09)),
        ablation=ablated(name), provenance=dict(seed=42, versions=dict(torch='2.15.0', timm=None), platform=name))


def test_the_headline_gives_the_recipe_and_what_it_gained(tmp_path):
    p = page(tmp_path, table=[row('plain fastai', .9), row('recipe', .95), row('bundle', .95)], difference={'accuracy': Difference(.05, .01, .09, 400)})
    assert '95.0 % of 400 untouched test images classified correctly, 5.0 points more than plain fastai.' in p.text
    assert 'Accuracy: +5.0 points (+1.0 to +9.0). Resolved: the recipe is better than plain fastai.' in p.text


@pytest.mark.parametrize('d, says', [(Difference(-.05, -.09, -.01, 400), '5.0 points fewer than plain fastai'),
                                     (Difference(-.01, -.04, .02, 400), 'too few images to tell it from plain fastai (−1.0 points)')])
def test_the_headline_does_not_flatter(tmp_path, d, says):
    p = page(tmp_path, table=[row('plain fastai', .9), row('recipe', .85)], difference={'accuracy': d})
    assert says in p.text
    assert ('the recipe is worse than plain fastai' if d.hi < 0 else 'these 400 images cannot tell the recipe from plain fastai') in p.text


def test_validation_images_are_not_called_untouched(tmp_path):
    p = page(tmp_path, table=[row('resnet18', .9)], side='validation')
    assert '90.0 % of 400 validation images' in p.text and 'untouched' not in p.text and 'which choices were made on' in p.text


def test_what_is_missing_is_left_out(tmp_path):
    p = page(tmp_path)
    assert [a['id'] for t, a in p.tags if t == 'section'] == ['run', 'again'] and not [t for t, _ in p.tags if t in ('svg', 'img')]
    assert [a['href'] for t, a in p.tags if t == 'a'] == ['#run', '#again']


def test_the_full_report_has_every_section_and_an_alt_for_every_picture(tmp_path):
    p = page(tmp_path, **full())
    assert [a['id'] for t, a in p.tags if t == 'section'] == [name for name, *_ in SECTIONS]
    assert all(a.get('alt') for t, a in p.tags if t == 'img')
    assert sum(t == 'svg' for t, _ in p.tags) == sum(a.get('role') == 'img' and bool(a.get('aria-label')) for _, a in p.tags) == 12
    assert [a for t, a in p.tags if t == 'html'] == [{'lang': 'en'}] and sum(t == 'h1' for t, _ in p.tags) == 1


def test_an_ablation_is_told_with_its_verdicts_and_what_to_do(tmp_path):
    text = page(tmp_path, ablation=ablated('cat')).text
    for said in ('mixup alone helped', 'cat alone no difference larger than 0.4 points; cat', 'mixup in the set hurt', '+5.0 (+1.0 to +9.0)', '×1.20', '+3 MB', '−0.050',
                 'Without any of them: 90.0 % (80.0–95.0)', 'chosen on the validation images: mixup: +5.0 points (+1.0 to +9.0) over the baseline', '--mixup true'):
        assert said in text, said


def test_a_learning_curve_is_told_by_its_numbers(tmp_path):
    text = page(tmp_path, **full()).text
    assert '100 80.0 % (70.0–90.0) 200 80.0 % (70.0–90.0)' in text and 'over 2 seeds' in text and 'Would more images help?' in text


def test_shares_of_each_class_by_split(tmp_path):
    assert 'cat 30 10 20 25.0 % 50.0 % dog 90 10 20 75.0 % 50.0 %' in page(tmp_path).text


def test_the_bundle_speaks_of_parity_size_and_speed(tmp_path):
    text = page(tmp_path, **full()).text
    assert 'on all 840 validation images; probabilities differ by at most 3.2e-07' in text
    assert '13.4 MB' in text and '2 ms from the bundle, 9 ms in torch: 4.5 times as fast' in text


def test_a_bundle_that_disagrees_is_not_called_verified(tmp_path):
    text = page(tmp_path, bundle=dict(parity=dict(n=840, agree=838, max_diff=.2))).text
    assert 'Not the same: it names the class that the trained network names on 838 of 840' in text and 'Verified' not in text


def test_sources_become_links_only_where_they_are(tmp_path):
    sources = ('arXiv:1710.09412', 'doi:10.1/x', 'https://a.b/c', 'javascript:alert(1)', 'a book')
    p = page(tmp_path, techniques=[dict(name='t', arguments={}, effect=None, summary='', source=s) for s in sources])
    assert [a['href'] for t, a in p.tags if t == 'a' and 'rel' in a] == ['https://arxiv.org/abs/1710.09412', 'https://doi.org/10.1/x', 'https://a.b/c']
    assert 'javascript:alert(1)' in p.text


def test_names_are_text_and_never_markup(tmp_path):
    p = page(tmp_path, **full(EVIL))
    assert sum(t == 'script' for t, _ in p.tags) == 1 and EVIL in p.text
    assert not [a for _, a in p.tags if any(k.startswith('on') for k in a)]


def test_names_with_dollars_quotes_and_colours_are_drawn_as_they_are():
    svg = plots.confusion([[1, 0], [0, 1]], ['$x$', '#050505 "é"'])
    assert [t for t in re.findall('>([^<>]+)</text>', svg) if 'x$' in t or '#05' in t] == ['$x$', '#050505 "é"']*2


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    p = page(tmp_path, **full())
    loads = [a.get(k, '') for t, a in p.tags if t != 'a' for k in ('src', 'href', 'xlink:href', 'srcset', 'data') if a.get(k)]
    assert loads and all(u.startswith(('data:', '#')) for u in loads)
    html = (tmp_path/'report.html').read_text()
    assert '@import' not in html and not re.search(r'url\((?!#)', html)


def test_figures_do_not_share_ids(tmp_path):
    ids = [a['id'] for _, a in page(tmp_path, **full()).tags if 'id' in a]
    assert len(ids) == len(set(ids))


def test_a_confusion_matrix_prints_counts_while_they_can_be_read():
    counts = lambda c: re.findall(r'>(\d+)</text>', plots.confusion(np.full((c, c), 7), [f'class {i}.' for i in range(c)]))
    assert counts(20) == ['7']*400 and counts(21) == []
    assert len(plots.confusion(np.eye(100, dtype=int), range(100))) < 100_000


def test_a_bundle_and_rows_may_be_objects(tmp_path):
    from types import SimpleNamespace as O
    p = page(tmp_path, table=[O(**row('resnet18', .9), seconds=None, note='')], bundle=O(size_bytes=2_500_000, path='b', parity=None, latency_ms=None))
    assert '2.5 MB' in p.text and '90.0 %' in p.text


def test_writing_leaves_one_whole_file(tmp_path):
    page(tmp_path, **full())
    assert [p.name for p in tmp_path.iterdir()] == ['report.html']


def test_compression_is_told_stage_by_stage_with_its_verdict(tmp_path):
    p = page(tmp_path, **full())
    assert 'Rolled back: cat failed' in p.text and 'Rolled back: too much' in p.text and 'it cost at most 0.5 points' in p.text
    assert '4.0 times smaller. Times are medians' in p.text and 'Valid' in p.text
    alts = [a['aria-label'] for _, a in p.tags if 'aria-label' in a]
    assert any('Accuracy against size of the .onnx by stage: cat: 4000; half: 1000' in a for a in alts)


def test_a_compressed_bundle_is_verified_against_the_accepted_graph(tmp_path):
    assert 'Verified: it names the class that the accepted graph names on all 840' in page(tmp_path, bundle=dict(parity=dict(n=840, max_diff=0., versus='the accepted graph'))).text
