"BibTeX, citations and lists of references."

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from . import SiteError
from .text import in_prose

ACCENTS = {
    "'": '\u0301',
    '`': '\u0300',
    '"': '\u0308',
    '^': '\u0302',
    '~': '\u0303',
    'c': '\u0327',
    'v': '\u030c',
}
KEY = r'[A-Za-z][\w]*(?:[:.-]\w+)*'
LABEL = r'(?:fig|tbl|eq|sec)-[\w-]+'
GROUP = re.compile(rf'\[(?=[^\[\]]*@)((?:[^\[\]@]*-?@{KEY}[^\[\]@]*)+)\](?!\()')
SINGLE = re.compile(rf'(?<![\w@./\\-])@(?!{LABEL}\b)({KEY})')


@dataclass(frozen=True)
class Reference:
    "One entry of a BibTeX file."

    key: str
    kind: str
    fields: dict[str, str]

    @property
    def authors(self) -> list[str]:
        "Each as 'Family, Given'."
        return re.split(r'\s+and\s+', self.fields['author'])

    @property
    def year(self) -> str:
        "Of publication."
        return self.fields['year']

    def short(self) -> str:
        "Whom a citation names."
        family = [author.split(',')[0].strip() for author in self.authors]
        return (
            family[0]
            if len(family) == 1
            else ' and '.join(family)
            if len(family) == 2
            else f'{family[0]} et al.'
        )

    def entry(self) -> str:
        "The entry of a list of references, in Markdown."
        people = [
            ' '.join(reversed([part.strip() for part in author.split(',', 1)]))
            for author in self.authors
        ]
        who = (
            people[0] if len(people) == 1 else ', '.join(people[:-1]) + ' and ' + people[-1]
        )
        if len(people) > 8:
            who = ', '.join(people[:7]) + ' and others'
        given = self.fields.get
        venue = next(
            (
                given(one)
                for one in ('booktitle', 'journal', 'institution', 'howpublished')
                if given(one)
            ),
            '',
        )
        detail = f'*{venue}*' if venue else ''
        if given('volume'):
            detail += f' {given("volume")}' + (
                f'({given("number")})' if given('number') else ''
            )
        if given('pages'):
            detail += f', {given("pages")}'
        link = given('url') or (f'https://doi.org/{given("doi")}' if given('doi') else '')
        title = f'[{given("title")}]({link})' if link else given('title')
        return f'{who} ({self.year}). {title}. {detail}'.rstrip() + '.'


def plain(value: str) -> str:
    "BibTeX's text without its braces, dashes and accents."
    value = re.sub(
        r"\{?\\(['`\"^~cv])\s*\{?(\w)\}?\}?",
        lambda m: unicodedata.normalize('NFC', m[2] + ACCENTS[m[1]]),
        value,
    )
    return re.sub(
        r'\s+', ' ', re.sub(r'[{}]', '', value).replace('---', '—').replace('--', '–')
    ).strip()


def read_bibliography(path: Path) -> dict[str, Reference]:
    "The entries of a BibTeX file by key."
    text, found = path.read_text(encoding='utf-8'), {}
    for entry in re.finditer(r'^@(\w+)\s*\{\s*([^,\s]+)\s*,(.*?)^\}', text, re.S | re.M):
        kind, key, body = entry.groups()
        fields = {
            name.lower(): plain(value)
            for name, value in re.findall(
                r'^\s*(\w+)\s*=\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}', body, re.M
            )
        }
        for needed in ('author', 'title', 'year'):
            if needed not in fields:
                raise SiteError(f'{path.name}: {key} has no {needed}')
        if key in found:
            raise SiteError(f'{path.name}: {key} stands there twice')
        found[key] = Reference(key, kind.lower(), fields)
    return found


class Citations:
    "The citations of one page."

    def __init__(self, bibliography: dict[str, Reference], page: str) -> None:
        self.bibliography, self.page = bibliography, page
        self.cited: set[str] = set()

    def reference(self, key: str) -> Reference:
        "The entry of a key; unknown: an error that names page and key."
        if key not in self.bibliography:
            raise SiteError(f'{self.page}: no reference `{key}` in references.bib')
        self.cited.add(key)
        return self.bibliography[key]

    def group(self, found: re.Match[str]) -> str:
        "`[see @a, p. 3; @b]` as '(see A 2020, p. 3; B 2021)'."
        if re.search(rf'@{LABEL}', found[1]):
            return found[0]
        parts = []
        for part in found[1].split(';'):
            one = re.fullmatch(rf'\s*(.*?)(-?)@({KEY})(.*?)\s*', part, re.S)
            if not one:
                raise SiteError(f'{self.page}: cannot read the citation {found[0]}')
            entry = self.reference(one[3])
            who = entry.year if one[2] else f'{entry.short()} {entry.year}'
            parts.append(f'{one[1]}[{who}](#ref-{entry.key}){one[4]}')
        return f'({"; ".join(parts)})'

    def single(self, found: re.Match[str]) -> str:
        "`@a` as 'A (2020)'."
        entry = self.reference(found[1])
        return f'{entry.short()} ([{entry.year}](#ref-{entry.key}))'

    def resolve(self, text: str) -> str:
        "Markdown with its citations written out."
        # groups may hold links and code between their brackets, single keys may not: two
        # passes
        text = in_prose(text, lambda part: GROUP.sub(self.group, part))
        return in_prose(text, lambda part: SINGLE.sub(self.single, part))

    def listing(self) -> str:
        "The list of what was cited, in alphabetical order."
        entries = sorted(
            (self.bibliography[key] for key in self.cited),
            key=lambda e: (e.authors[0].lower(), e.year),
        )
        return '\n\n'.join(
            f'::: {{#ref-{entry.key} .reference}}\n{entry.entry()}\n:::'
            for entry in entries
        )
