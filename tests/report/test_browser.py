"The report in a real browser: headless Chromium, desktop and phone, light and dark."

import re

import numpy as np
import pytest
from PIL import Image

from fastrecipes.report.intervals import Difference, Estimate
from fastrecipes.report.page import Report, write_page

LONG = 'a_class_with_a_very_long_name_and_no_space_at_all_'*2



@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "A full report with names that try to break the page: markup, and words that do not wrap."
    e, cols = Estimate(.95, .92, .97, 400), ['train_loss', 'valid_loss', 'accuracy']
    labels = ['<img src=https://example.org/x.png onerror=alert(1)>', LONG] + [f'class {i}' for i in range(14)]
    row = lambda name, s: dict(name=name, accuracy=e, balanced_accuracy=e, seconds=s)
    r = Report('resnet18 on photos', f'fastrecipes pipeline "{LONG*2}" --arch resnet18 --mixup 0.4',
               dict(path=LONG*3, classes=[dict(name=c, train=70, valid=20, test=10) for c in labels],
                    set_aside=[dict(path=f'{LONG}/{LONG}.jpg', reason='truncated')]*40),
               table=[row('plain fastai', 30.), row('recipe', 40.), row('bundle', None)], difference={'accuracy': Difference(.05, .01, .09, 400)},
               techniques=[dict(name='mixup', arguments=dict(alpha=.4), effect='mixed', summary='Blends.', source='arXiv:1710.09412')],
               fits=[dict(name='new head, body frozen', columns=cols, rows=[[1., .9, .5]]), dict(name='all layers', columns=cols, rows=[[.8, .7, .6]]*5)],
               lr_find=dict(lrs=[1e-5, 1e-3, 1e-1], losses=[2., 1., 9.], suggestion=1e-3), schedule=[.1, .2, .1], confusion=(np.eye(16, dtype=int)*9, labels),
               mistakes=[dict(image=Image.new('RGB', (300, 200), 'teal'), truth=labels[0], predicted=LONG, probability=.9)]*5,
               compression=dict(tolerance=.5, verdict='4.0 times smaller', stages=[
                   dict(name=n, kept=k, reason=LONG, proof=LONG, valid=e, test=e, size_bytes=b, latency_ms=b/1e6)
                   for n, k, b in (('original', True, 44_000_000), (LONG, True, 9_000_000), ('quantize (static)', False, 3_000_000))]),
               bundle=dict(path=LONG, size_bytes=13_400_000, parity=dict(n=840, max_diff=3e-7), latency_ms=2., eager_latency_ms=9.),
               provenance=dict(seed=42, versions=dict(fastrecipes='0.1.0', torch='2.15.0')))
    return write_page(r, tmp_path_factory.mktemp('report')/'report.html')


def opened(browser, report, width, scheme='light'):
    "A page that shows `report`, its requests and what it said on the console."
    page = browser.new_context(viewport=dict(width=width, height=850), color_scheme=scheme).new_page()
    page.requests, page.said = [], []
    page.on('request', lambda r: page.requests.append(r.url))
    page.on('console', lambda m: page.said.append(m.text))
    page.on('pageerror', lambda e: page.said.append(str(e)))
    page.on('dialog', lambda d: (page.said.append('dialog'), d.dismiss()))
    page.goto(report.as_uri())
    page.wait_for_load_state('networkidle')
    return page


@pytest.mark.parametrize('width', [1280, 390])
def test_it_loads_itself_and_nothing_else(browser, report, width):
    page = opened(browser, report, width)
    assert [u for u in page.requests if not u.startswith('data:')] == [report.as_uri()]
    assert page.said == []


@pytest.mark.parametrize('width', [1280, 390, 320])
def test_the_page_never_scrolls_sideways(browser, report, width):
    page = opened(browser, report, width)
    assert page.evaluate('document.documentElement.scrollWidth') == width
    wide = page.evaluate('''[...document.querySelectorAll('body *')].filter(e => !e.closest('svg') && !e.parentElement.closest('.scroll')
                            && e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80))''')
    assert wide == []


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_headline_is_seen_first_and_can_be_read(browser, report, scheme):
    page = opened(browser, report, 390, scheme)
    h1 = page.locator('h1')
    assert h1.inner_text() == '95.0 % of 400 untouched test images classified correctly, 5.0 points more than plain fastai.'
    assert h1.bounding_box()['y'] < 200
    dark = lambda rgb: sum(map(int, rgb[4:-1].split(','))) < 3*128
    ink, ground = page.evaluate('[getComputedStyle(document.querySelector("h1")).color, getComputedStyle(document.body).backgroundColor]')
    assert (dark(ink), dark(ground)) == ((True, False) if scheme == 'light' else (False, True))
    label = page.locator('#training svg text').first.evaluate('e => getComputedStyle(e).fill')      # figures follow the scheme
    assert dark(label) == (scheme == 'light')


def test_pictures_are_drawn(browser, report):
    page = opened(browser, report, 1280)
    assert all(page.evaluate('[...document.images].map(i => i.naturalWidth)'))
    sizes = page.evaluate('[...document.querySelectorAll("svg")].map(s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height])')
    assert len(sizes) == 8 and all(w > 250 and h > 100 for w, h in sizes)


def test_small_print_on_a_phone_stays_readable(browser, report):
    page = opened(browser, report, 390)
    scaled = page.evaluate('''[...document.querySelectorAll('#training svg, #result svg')].flatMap(s => [...s.querySelectorAll('text')].map(
                              t => parseFloat(getComputedStyle(t).fontSize)*s.getBoundingClientRect().width/s.viewBox.baseVal.width))''')
    assert min(scaled) >= 7


def test_the_command_can_be_copied(browser, report):
    from playwright.sync_api import expect    # here, for without playwright these tests are skipped

    page = opened(browser, report, 1280)
    page.locator('#again button').click()
    assert page.evaluate('getSelection().toString()').startswith('fastrecipes pipeline "a_class_with')
    expect(page.locator('#again button')).to_have_text(re.compile('Copied|Selected'))    # the clipboard answers when it likes


def test_markup_in_a_class_name_is_shown_as_text(browser, report):
    page = opened(browser, report, 1280)
    assert page.locator('#run tbody th').first.inner_text() == '<img src=https://example.org/x.png onerror=alert(1)>'
    assert page.locator('img[src^="https"]').count() == 0
