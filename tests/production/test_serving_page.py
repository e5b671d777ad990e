"The page in headless Chromium: drop, paste, choose; by keyboard; on a phone; light and dark; nothing loaded from elsewhere."
import base64

import pytest


from .serving import in_process
from .shares import encoded, write_shares

IMAGE = encoded((50, 10, 140))
HAND_OVER = '''([kind, data]) => {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), moved = new DataTransfer()
    moved.items.add(new File([bytes], 'cat.png', {type: 'image/png'}))
    const event = kind == 'paste' ? new ClipboardEvent('paste', {clipboardData: moved, bubbles: true}) : new DragEvent('drop', {dataTransfer: moved, bubbles: true, cancelable: true})
    document.getElementById('drop').dispatchEvent(event)
}'''



@pytest.fixture(scope='module')
def url(tmp_path_factory):
    with in_process(write_shares(tmp_path_factory.mktemp('page')/'bundle')) as url: yield url + '/'


@pytest.fixture
def opened(browser, url):
    "`opened(width=…, scheme=…)`: the page, its requests and what it said on the console."
    contexts = []
    def open(width=1000, scheme='light'):
        contexts.append(context := browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme))
        page = context.new_page()
        page.requests, page.said = [], []
        page.on('request', lambda r: page.requests.append(r.url))
        page.on('console', lambda m: page.said.append(m.text))
        page.on('pageerror', lambda e: page.said.append(str(e)))
        page.goto(url)
        page.wait_for_selector('#card dt')
        return page
    yield open
    for c in contexts: c.close()


def bars(page):
    page.wait_for_selector('#bars li')
    return page.evaluate('''[...document.querySelectorAll('#bars li')].map(li => [li.children[0].textContent, li.children[1].textContent,
        Math.round(1000*new DOMMatrix(getComputedStyle(li.children[2], '::before').transform).a)/1000])''')


EXPECTED = [['blue', '69.5 %', .695], ['rött', '25.1 %', .251], ['green', '5.4 %', .054]]        # 141, 51 and 11 of 203


@pytest.mark.parametrize('kind', ['drop', 'paste'])
def test_an_image_that_is_dropped_or_pasted_shows_its_bars(opened, kind):
    page = opened()
    page.evaluate(HAND_OVER, [kind, base64.b64encode(IMAGE).decode()])
    assert bars(page) == EXPECTED and page.locator('#said').inner_text() == 'blue, 69.5 %'
    assert page.locator('#shown').evaluate('e => [e.naturalWidth, e.naturalHeight, e.alt]') == [8, 4, 'cat.png']
    assert page.said == []


def test_by_keyboard_alone(opened):
    page = opened()
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.id') == 'file'
    assert page.locator('#drop').evaluate('e => getComputedStyle(e).outlineStyle') == 'solid'          # where one is can be seen
    page.on('filechooser', lambda chooser: None)                    # from here on they are caught; asked for only below, the key may come first
    page.evaluate('0')
    with page.expect_file_chooser() as chooser: page.keyboard.press('Enter')
    chooser.value.set_files(dict(name='a.png', mimeType='image/png', buffer=IMAGE))
    assert bars(page) == EXPECTED


def test_a_refusal_is_read_in_the_servers_words(opened):
    page = opened()
    page.set_input_files('#file', dict(name='a.txt', mimeType='text/plain', buffer=b'no image'))
    page.wait_for_selector('#said.error')
    assert 'not an image' in page.locator('#said').inner_text() and page.locator('#bars li').count() == 0
    assert page.locator('#said').get_attribute('role') == 'status'


def test_the_card_tells_what_the_model_is(opened, url):
    page = opened()
    text = page.locator('#card').inner_text()
    for said in ('3 labels', 'rött · green · blue', '4 × 2 px', '92.5 % of 40 validation images', '0.5 ms an image', '2026-11-26'): assert said in text
    assert page.locator('#curl').inner_text() == f'curl -X POST -F my_img_file=@cardigan.jpg {url}predict'


@pytest.mark.parametrize('width', [400, 320])
def test_on_a_phone_nothing_scrolls_sideways(opened, width):
    page = opened(width)
    page.set_input_files('#file', dict(name='a.png', mimeType='image/png', buffer=IMAGE))
    assert bars(page) == EXPECTED and page.evaluate('document.documentElement.scrollWidth') == width


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_ink_and_ground_follow_the_scheme_with_contrast(opened, scheme):
    page = opened(scheme=scheme)
    def luminance(rgb):
        channel = [v/12.92 if v <= .03928 else ((v+.055)/1.055)**2.4 for v in (int(c)/255 for c in rgb[4:-1].split(','))]
        return .2126*channel[0] + .7152*channel[1] + .0722*channel[2]                                  # WCAG 2.2
    ground = luminance(page.evaluate('getComputedStyle(document.body).backgroundColor'))
    assert (ground > .5) == (scheme == 'light')
    for what in ('h1', '#drop small', '#card dt'):
        ink = luminance(page.locator(what).first.evaluate('e => getComputedStyle(e).color'))
        assert (max(ink, ground)+.05)/(min(ink, ground)+.05) >= 4.5, what


def test_it_loads_from_its_own_server_alone(opened, url):
    page = opened()
    page.set_input_files('#file', dict(name='a.png', mimeType='image/png', buffer=IMAGE))
    bars(page)
    assert {u for u in page.requests if not u.startswith(('data:', 'blob:'))} == {url, f'{url}card', f'{url}predict'} and page.said == []
