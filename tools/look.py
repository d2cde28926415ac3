"""Open every page of the built site in headless Chromium and report problems.

    python tools/look.py [--site _site] [--out _look]

Each page is opened at desktop and phone width, light and dark. Screenshots of whole pages
go to `_look`; reported are errors on the console, requests to any other machine, formulas
that KaTeX cannot set, and pages wider than the window.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.server
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import websocket

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = (
    'chromium',
    'chromium-browser',
    'google-chrome',
    'google-chrome-stable',
    'chrome',
)
OPTIONS = (
    '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run'
    ' --disable-background-networking --disable-component-update --disable-sync'
    ' --hide-scrollbars --mute-audio --remote-debugging-port=0 --remote-allow-origins=*'
).split()
VIEWS = {'desktop': (1280, 'light'), 'phone': (390, 'light'), 'dark': (1280, 'dark')}
LOOK = """(() => {
  const scrolls = ['auto', 'scroll', 'hidden', 'clip'];
  const holds = e => scrolls.includes(getComputedStyle(e).overflowX)
    && e.tagName !== 'BODY' && e.id !== 'quarto-content';
  const sticksOut = e => {
    const box = e.getBoundingClientRect();
    if (box.width === 0 || box.right <= innerWidth + 1) return false;
    for (let p = e.parentElement; p; p = p.parentElement) if (holds(p)) return false;
    return true;
  };
  const classes = e =>
    typeof e.className === 'string' && e.className ? '.' + e.className : '';
  const name = e => e.tagName.toLowerCase() + classes(e);
  const all = query => [...document.querySelectorAll(query)];
  return JSON.stringify({
    width: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight,
    wide: all('main *').filter(sticksOut).slice(0, 3).map(name),
    formulas: all('.katex').length,
    bad: all('.katex-error').map(e => e.textContent.slice(0, 80)),
    raw: all('span.math').filter(e => !e.querySelector('.katex')).length,
    broken: [...document.images].filter(e => e.src && e.complete && !e.naturalWidth)
      .map(e => e.src.slice(0, 80)),
  });
})()"""

# the slider's figure without the slider itself: what the reader sees change
MOVE = """(() => {
  const input = document.querySelectorAll('input[type=range]')[%d];
  for (let p = input; p; p = p.parentElement) if (p.tagName === 'DETAILS') p.open = true;
  input.value = input.%s;
  input.dispatchEvent(new Event('input', {bubbles: true}));
  const figure = input.closest('.dfkd-slides, .dfkd-film');
  const picture = figure.querySelector('img, .dfkd-frame');
  const view = picture.tagName === 'IMG' ? picture.parentElement : picture;
  const box = view.getBoundingClientRect();
  return {
    words: figure.querySelector('output').textContent,
    box: {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height},
  };
})()"""


class Seen(NamedTuple):
    "What a page looked like in one view."

    page: str
    view: str
    problems: list[str]
    screenshot: Path | None
    formulas: int


def browser() -> str | None:
    "Chromium's path, if it is installed."
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    "Serve a folder on this machine; yields its address."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            "Say nothing."

    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_address[1]}/'
    finally:
        server.shutdown()
        server.server_close()


class Tab:
    "A page of Chromium, driven through its DevTools protocol."

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def call(
        self, method: str, session: str | None = None, **parameters: Any
    ) -> dict[str, Any]:
        "Send a command and wait for its answer; events on the way are kept."
        number = next(self.numbers)
        message = {'id': number, 'method': method, 'params': parameters} | (
            {'sessionId': session} if session else {}
        )
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get('id') == number:
                if 'error' in answer:
                    raise RuntimeError(f'{method}: {answer["error"]["message"]}')
                return answer['result']
            self.events.append(answer)

    def wait(self, event: str, seconds: float) -> None:
        "Read events until one of this name has come."
        end = time.time() + seconds
        while time.time() < end:
            if any(one.get('method') == event for one in self.events):
                return
            self.socket.settimeout(max(0.1, end - time.time()))
            try:
                self.events.append(json.loads(self.socket.recv()))
            except websocket.WebSocketTimeoutException:
                return
            finally:
                self.socket.settimeout(60)


@contextlib.contextmanager
def chromium(program: str) -> Iterator[Tab]:
    "A browser with a profile of its own that is gone afterwards."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *OPTIONS, f'--user-data-dir={profile}', 'about:blank'],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = Path(profile) / 'DevToolsActivePort'
            end = time.time() + 60
            while not (port.exists() and len(port.read_text().split()) == 2):
                if time.time() > end or process.poll() is not None:
                    raise RuntimeError(f'{program} does not start')
                time.sleep(0.1)
            number, path = port.read_text().split()
            tab = Tab(f'ws://127.0.0.1:{number}{path}')
            yield tab
            tab.socket.close()
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def complaints(events: list[dict[str, Any]], base: str) -> list[str]:
    "Errors on the console and requests to other machines."
    found = []
    for event in events:
        method, detail = event.get('method'), event.get('params', {})
        if method == 'Runtime.exceptionThrown':
            exception = detail['exceptionDetails']
            text = exception.get('exception', {}).get('description', exception['text'])
            found.append(f'exception: {text[:300]}')
        elif method == 'Runtime.consoleAPICalled' and detail['type'] in ('error', 'assert'):
            found.append(
                'console: '
                + ' '.join(
                    str(one.get('value', one.get('description', '')))
                    for one in detail['args']
                )[:300]
            )
        elif method == 'Log.entryAdded' and detail['entry']['level'] == 'error':
            entry = detail['entry']
            if not entry.get('url', '').endswith('/favicon.ico'):
                found.append(f'log: {entry["text"][:200]} {entry.get("url", "")}')
        elif method == 'Network.requestWillBeSent':
            address = detail['request']['url']
            if not address.startswith((base, 'data:', 'blob:', 'about:')):
                found.append(f'request to another machine: {address[:200]}')
    return found


def look_at(tab: Tab, base: str, page: str, view: str, out: Path | None) -> Seen:
    "Open one page in one view."
    width, scheme = VIEWS[view]
    target = tab.call('Target.createTarget', url='about:blank')['targetId']
    session = tab.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    tab.events.clear()
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
        tab.call(f'{domain}.enable', session)
    size = {
        'width': width,
        'height': 900,
        'deviceScaleFactor': 1,
        'mobile': view == 'phone',
    }
    tab.call('Emulation.setDeviceMetricsOverride', session, **size)
    tab.call(
        'Emulation.setEmulatedMedia',
        session,
        features=[{'name': 'prefers-color-scheme', 'value': scheme}],
    )
    tab.call('Page.navigate', session, url=base + page)
    tab.wait('Page.loadEventFired', 60)
    settled = (
        'new Promise(done => document.fonts.ready.then(() => setTimeout(() => done(1),'
        ' 400)))'
    )
    tab.call('Runtime.evaluate', session, expression=settled, awaitPromise=True)
    state = json.loads(
        tab.call('Runtime.evaluate', session, expression=LOOK, returnByValue=True)[
            'result'
        ]['value']
    )
    problems = complaints(tab.events, base)
    if state['width'] > width + 1 or state['wide']:
        problems.append(
            f'wider than the window: {state["width"]} > {width} {", ".join(state["wide"])}'
        )
    problems += [f'KaTeX cannot set: {one}' for one in state['bad']]
    problems += [f'picture not shown: {one}' for one in state['broken']]
    if state['raw']:
        problems.append(f'{state["raw"]} formulas are not set')
    screenshot = None
    if out is not None:
        height = min(state['height'], 16000)
        clip = {'x': 0, 'y': 0, 'width': width, 'height': height, 'scale': 1}
        picture = tab.call(
            'Page.captureScreenshot',
            session,
            format='png',
            captureBeyondViewport=True,
            clip=clip,
        )
        screenshot = out / f'{page.removesuffix(".html").replace("/", "-")}-{view}.png'
        screenshot.write_bytes(base64.b64decode(picture['data']))
    tab.call('Target.closeTarget', targetId=target)
    return Seen(page, view, problems, screenshot, state['formulas'])


def settle(tab: Tab, session: str, script: str) -> Any:
    "Evaluate a script, wait until the page is drawn again, and return what it gave."
    expression = (
        f'(async () => {{ const value = {script};'
        ' await new Promise(done => requestAnimationFrame(() => setTimeout(done, 60)));'
        ' return JSON.stringify(value); })()'
    )
    answer = tab.call(
        'Runtime.evaluate',
        session,
        expression=expression,
        awaitPromise=True,
        returnByValue=True,
    )
    return json.loads(answer['result']['value'])


def move_sliders(tab: Tab, base: str, page: str) -> list[str]:
    """Move each slider of a page from its first to its last place.

    Returns a line for each one whose picture or words do not change.
    """
    target = tab.call('Target.createTarget', url='about:blank')['targetId']
    session = tab.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    tab.events.clear()
    tab.call('Page.enable', session)
    tab.call('Page.navigate', session, url=base + page)
    tab.wait('Page.loadEventFired', 60)
    count = settle(tab, session, 'document.querySelectorAll("input[type=range]").length')
    stuck = []
    for number in range(count):
        seen = []
        for place in ('min', 'max'):
            state = settle(tab, session, MOVE % (number, place))
            box = state['box'] | {'scale': 1}
            picture = tab.call(
                'Page.captureScreenshot',
                session,
                format='png',
                captureBeyondViewport=True,
                clip=box,
            )
            seen.append((picture['data'], state['words']))
        (first, first_words), (last, last_words) = seen
        if first == last or first_words == last_words:
            stuck.append(f'{page}: slider {number + 1} of {count} changes nothing')
    tab.call('Target.closeTarget', targetId=target)
    return stuck


def sliders(site: Path) -> tuple[dict[str, int], list[str]]:
    "How many sliders each page of a built site has, and which of them change nothing."
    program = browser()
    if program is None:
        raise RuntimeError('Chromium is not installed')
    counts = {
        path.relative_to(site).as_posix(): path.read_text('utf-8').count('type="range"')
        for path in sorted(site.rglob('*.html'))
    }
    counts = {page: count for page, count in counts.items() if count}
    with serve(site) as base, chromium(program) as tab:
        stuck = [line for page in counts for line in move_sliders(tab, base, page)]
    return counts, stuck


def look(
    site: Path,
    out: Path | None = None,
    views: tuple[str, ...] = tuple(VIEWS),
    only: str = '',
) -> list[Seen]:
    "Open the pages of a built site; with `out`, leave screenshots there."
    program = browser()
    if program is None:
        raise RuntimeError('Chromium is not installed')
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob('*.html'))
    with serve(site) as base, chromium(program) as tab:
        return [
            look_at(tab, base, page, view, out)
            for page in pages
            if only in page
            for view in views
        ]


def main() -> int:
    "Command line; returns 1 if something is wrong."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--site', type=Path, default=ROOT / '_site')
    parser.add_argument('--out', type=Path, default=ROOT / '_look')
    parser.add_argument('--only', default='', help='pages whose address contains this')
    options = parser.parse_args()
    try:
        seen = look(options.site, options.out, only=options.only)
    except RuntimeError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    for one in seen:
        print(
            f'{one.page} ({one.view}): {"; ".join(one.problems) or "fine"}, {one.formulas}'
            f' formulas, {one.screenshot}'
        )
    return int(any(one.problems for one in seen))


if __name__ == '__main__':
    raise SystemExit(main())
