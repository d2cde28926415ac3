"Numbers for a page's figures, tables, equations and sections, and references to them."

from __future__ import annotations

import re
from typing import Any

from . import SiteError
from .citations import LABEL
from .notebook import split_options
from .text import in_prose, joined, outside_code, source

NAMES = {'fig': 'Figure', 'tbl': 'Table', 'eq': 'Equation', 'sec': 'Section'}
MARK = re.compile(
    r'^(?P<level>\#{2,6})['
    r' ]+(?P<heading>[^\n]*)$|\{\#(?P<label>(?:fig|tbl|eq)-[\w-]+)[^}\n]*\}',
    re.M,
)
REFERENCE = re.compile(
    rf'\[((?:-?@{LABEL}(?:\s*[;,]\s*)?)+)\](?!\()|(?<![\w@./\\\[-])@({LABEL})'
)
EQUATION = re.compile(
    r'\$\$(?P<tex>(?:(?!\$\$).)+?)\$\$[ \t]*\{#(?P<label>eq-[\w-]+)\}', re.S
)
CAPTION = re.compile(
    r'^(?P<head>(?::|Table:)\s+)(?P<text>[^\n]*?)(?P<label>['
    r' \t]*\{#(?P<name>tbl-[\w-]+)[^}\n]*\})',
    re.M,
)
PICTURE = re.compile(
    r'!\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\](?P<link>\([^)\s]*\))'
    r'\{(?P<label>#(?P<name>fig-[\w-]+)[^}\n]*)\}'
)


class Labels:
    "The numbers of one page: label to what a reference to it says."

    def __init__(self, page: str) -> None:
        self.page = page
        self.numbers: dict[str, str] = {}
        self._counts = dict.fromkeys(NAMES, 0)
        self._heading = [0] * 7
        self._first: int | None = None

    def collect(self, cells: list[dict[str, Any]]) -> None:
        "Number everything that carries a label, in order."
        for cell in cells:
            if cell['cell_type'] == 'code':
                options, _ = split_options(source(cell))
                label = options.get('label', '')
                if re.fullmatch(r'(fig|tbl)-[\w-]+', label):
                    self.add(label)
            elif cell['cell_type'] == 'markdown':
                self.collect_text(source(cell))
            for output in cell.get('outputs', []):
                if 'text/markdown' in output.get('data', {}):
                    self.collect_text(joined(output['data']['text/markdown']))

    def collect_text(self, text: str) -> None:
        "Number the labels of a piece of Markdown."

        def visit(part: str) -> str:
            for found in MARK.finditer(part):
                if found['label']:
                    self.add(found['label'])
                else:
                    self.heading(len(found['level']), found['heading'])
            return part

        outside_code(text, visit)

    def add(self, label: str) -> None:
        "Give a figure, table or equation the next number of its kind."
        if label in self.numbers:
            raise SiteError(f'{self.page}: the label {label} stands there twice')
        kind = label.split('-')[0]
        self._counts[kind] += 1
        self.numbers[label] = str(self._counts[kind])

    def heading(self, level: int, text: str) -> None:
        """Count a heading as the site's builder does, and note its number if it carries a
        label.
        """
        if re.search(r'\{[^}]*\.unnumbered[^}]*\}\s*$', text):
            return
        self._heading[level] += 1
        self._heading[level + 1 :] = [0] * (6 - level)
        self._first = self._first or level
        found = re.search(r'\{[^}]*#(sec-[\w-]+)', text)
        if found:
            self.numbers[found[1]] = '.'.join(
                map(str, self._heading[self._first : level + 1])
            )

    def number(self, label: str) -> str:
        "A label's number; unknown: an error that names page and label."
        if label not in self.numbers:
            raise SiteError(
                f'{self.page}: nothing here is labelled `{label}` (references reach only'
                ' their own page)'
            )
        return self.numbers[label]

    def link(self, label: str, short: bool = False) -> str:
        "A link that says 'Figure 2', or only '2'."
        name = '' if short else NAMES[label.split('-')[0]] + '\u00a0'
        return f'[{name}{self.number(label)}](#{label})'

    def reference(self, found: re.Match[str]) -> str:
        "`@fig-a`, `[@fig-a; @fig-b]` or `[-@fig-a]` as links."
        if found[2]:
            return self.link(found[2])
        return ', '.join(
            self.link(name, dash == '-')
            for dash, name in re.findall(rf'(-?)@({LABEL})', found[1])
        )

    def resolve(self, text: str) -> str:
        "Markdown with its labels numbered and its references resolved."

        def number(part: str) -> str:
            part = EQUATION.sub(
                lambda m: (
                    f'::: {{#{m["label"]} .equation}}\n$$\n{m["tex"].strip()}'
                    f' \\tag{{{self.number(m["label"])}}}\n$$\n:::'
                ),
                part,
            )
            part = CAPTION.sub(
                lambda m: (
                    f'{m["head"]}Table\u00a0{self.number(m["name"])}:'
                    f' {m["text"]}{m["label"]}'
                ),
                part,
            )
            return PICTURE.sub(
                lambda m: (
                    f'![Figure\u00a0{self.number(m["name"])}:'
                    f' {m["text"]}]{m["link"]}{{{m["label"]}}}'
                ),
                part,
            )

        return in_prose(
            outside_code(text, number), lambda part: REFERENCE.sub(self.reference, part)
        )
