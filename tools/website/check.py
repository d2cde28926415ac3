"Is everything that a built page points to there, and does nothing come from elsewhere?"

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag

LOADED = {
    'script': 'src',
    'img': 'src',
    'iframe': 'src',
    'source': 'src',
    'audio': 'src',
    'video': 'src',
}
LEFT_OVER = re.compile(
    r'\$\$|(?<![\w@.])@(?:fig|tbl|eq|sec)-[\w-]+|\[-?@\w|:::|\{#[\w-]+[^}]*\}'
)


def anchors(page: BeautifulSoup) -> set[str]:
    "Where a link into a page may point."
    return {
        str(tag[name])
        for tag in page.find_all(True)
        for name in ('id', 'name')
        if tag.has_attr(name)
    }


def loads(tag: Tag) -> str | None:
    "What the browser fetches for a tag by itself."
    if tag.name == 'link':
        kinds = tag.get('rel') or []
        return (
            str(tag.get('href'))
            if {'stylesheet', 'icon', 'preload', 'modulepreload'} & set(kinds)
            else None
        )
    name = LOADED.get(tag.name)
    return str(tag[name]) if name and tag.has_attr(name) else None


def foreign(address: str) -> bool:
    "Whether an address leads to another machine."
    return bool(re.match(r'(?:[a-z][a-z0-9+.-]*:)?//', address, re.I))


def check_styles(site: Path) -> list[str]:
    """Style sheets that fetch from elsewhere, or files that are not there (a font's older
    formats may be missing).
    """
    found = []
    for path in site.rglob('*.css'):
        text = re.sub(
            r'/\*.*?\*/', '', path.read_text(encoding='utf-8', errors='replace'), flags=re.S
        )
        for rule in re.findall(r"@import\s+(?:url\()?['\"]?([^'\")\s;]+)", text):
            if foreign(rule):
                found.append(f'{path.relative_to(site)}: imports {rule}')
        for block in re.findall(r'@font-face\s*\{.*?\}', text, re.S):
            first = re.search(r"url\(['\"]?([^'\")]+)", block)
            if first and not first[1].startswith('data:'):
                target = path.parent / unquote(urlsplit(first[1]).path)
                if foreign(first[1]) or not target.exists():
                    found.append(f'{path.relative_to(site)}: font {first[1]}')
        for address in re.findall(r"url\(['\"]?(https?:[^'\")]+)", text):
            found.append(f'{path.relative_to(site)}: fetches {address}')
    return found


def visible_text(page: BeautifulSoup) -> str:
    "What a page says outside code."
    for tag in page.find_all(['script', 'style', 'pre', 'code', 'textarea']):
        tag.decompose()
    return page.get_text(' ')


def check(site: Path) -> list[str]:
    "Everything that is wrong with a built site, one line each."
    files = sorted(site.rglob('*.html'))
    pages = {
        path.resolve(): BeautifulSoup(path.read_text(encoding='utf-8'), 'html.parser')
        for path in files
    }
    targets = {path: anchors(page) for path, page in pages.items()}
    found = check_styles(site)
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for tag in page.find_all(True):
            address = loads(tag)
            link = str(tag['href']) if tag.name == 'a' and tag.has_attr('href') else None
            for where, needed in ((address, True), (link, False)):
                if where is None or where.startswith(('data:', 'mailto:', 'javascript:')):
                    continue
                if foreign(where) or re.match(r'[a-z]+:', where):
                    if needed:
                        found.append(f'{name}: loads {where} from another machine')
                    continue
                parts = urlsplit(where)
                target = (
                    (path.parent / unquote(parts.path)).resolve() if parts.path else path
                )
                if target.is_dir():
                    target = target / 'index.html'
                if not target.exists():
                    found.append(f'{name}: {where} is not there')
                elif (
                    parts.fragment
                    and target in targets
                    and unquote(parts.fragment) not in targets[target]
                ):
                    found.append(f'{name}: {where} has no such anchor')
        for image in page.find_all('img'):
            if not image.has_attr('alt'):
                found.append(f'{name}: a picture without alternative text')
        maths = bool(page.select('.math'))
        if maths and not page.find('script', src=re.compile('katex')):
            found.append(f'{name}: mathematics without KaTeX')
        for left in sorted(set(LEFT_OVER.findall(visible_text(page)))):
            found.append(f'{name}: raw Markdown on the page: {left}')
    search = site / 'search.json'
    if not search.exists() or not json.loads(search.read_text(encoding='utf-8')):
        found.append('search.json: nothing to search')
    return found
