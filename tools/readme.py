"""README.md from nbs/index.ipynb: `python tools/readme.py`, with `--check` only compared.

The same text as the site's front page, in Markdown that GitHub reads: links lead to the
notebooks, citations to the papers, pictures that cells drew are stored in nbs/pictures.
"""

from __future__ import annotations

import argparse
import base64
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools.website.citations import Citations, Reference, read_bibliography  # noqa: E402
from tools.website.figures import unquoted  # noqa: E402
from tools.website.labels import Labels  # noqa: E402
from tools.website.notebook import process, read, split_options  # noqa: E402
from tools.website.symbols import Index  # noqa: E402
from tools.website.text import joined, outside_code, source  # noqa: E402

NOTE = '<!-- Made from nbs/index.ipynb by `make readme`: change it there. -->\n'
PICTURES = 'nbs/pictures'


class PaperLinks(Citations):
    "Citations that lead to the papers themselves."

    def resolve(self, text: str) -> str:
        text = super().resolve(text)
        for key in self.cited:
            fields = self.bibliography[key].fields
            address = fields.get('url') or f'https://doi.org/{fields.get("doi", "")}'
            text = text.replace(f'](#ref-{key})', f']({address})')
        return text


def plain(text: str, nbs: str = 'nbs') -> str:
    """Markdown without Quarto's divs and attributes; its links lead to the notebooks, whose
    folder is `nbs` as seen from the page.
    """

    def change(part: str) -> str:
        part = re.sub(r'^:::.*\n?', '', part, flags=re.M)
        part = re.sub(r'^:\s+(\S[^\n]*?)\s*\{#tbl-[^}]*\}', r'*\1*', part, flags=re.M)
        part = re.sub(r'\[([^\]]*)\]\(#(?:fig|tbl|eq|sec)-[\w-]+\)', r'\1', part)
        part = re.sub(r'(?<=[\])`\w])[ \t]*\{[#.][^{}\n]*\}', '', part)
        return re.sub(
            rf'\]\((?!https?:|#|mailto:|/|\./|{nbs}/)([^)\s]+)\)', rf']({nbs}/\1)', part
        ).replace('](/', f']({nbs}/')

    return outside_code(text, change)


def code_cell(
    cell: dict[str, Any],
    number: int,
    pictures: dict[str, bytes],
    folder: str = PICTURES,
) -> list[str]:
    "A code cell and its outputs; pictures are put into `pictures`, to be kept in `folder`."
    options, code = split_options(source(cell))
    shown = f'```python\n{code}\n```'
    if options.get('code-fold') == 'true':
        summary = unquoted(options.get('code-summary', '')) or 'Code'
        shown = f'<details><summary>{summary}</summary>\n\n{shown}\n\n</details>'
    parts = [] if options.get('echo') == 'false' or not code else [shown]
    caption = unquoted(options.get('fig-cap', ''))
    alternative = unquoted(options.get('fig-alt', '')) or caption
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        if output['output_type'] == 'stream':
            parts.append('```text\n' + joined(output['text']).rstrip() + '\n```')
        elif 'image/png' in data or 'image/svg+xml' in data:
            kind = 'png' if 'image/png' in data else 'svg'
            name = f'{folder}/{options.get("label", f"index-{number}")}.{kind}'
            if kind == 'png':
                pictures[name] = base64.b64decode(joined(data['image/png']))
            else:
                pictures[name] = joined(data['image/svg+xml']).encode()
            parts.append(
                f'![{alternative}]({name})' + (f'\n\n*{caption}*' if caption else '')
            )
        elif 'text/markdown' in data:
            parts.append(joined(data['text/markdown']))
        elif '<script' in joined(data.get('text/html', '')):
            continue  # an animation: on the site
        elif 'text/html' in data:
            parts.append(
                re.sub(
                    r'<style.*?</style>', '', joined(data['text/html']), flags=re.S
                ).strip()
            )
        elif 'text/plain' in data:
            parts.append('```text\n' + joined(data['text/plain']) + '\n```')
    return parts


def readme(
    notebook: dict[str, Any],
    bibliography: dict[str, Reference],
    name: str = 'index.ipynb',
    folder: str = PICTURES,
    nbs: str = 'nbs',
) -> tuple[str, dict[str, bytes]]:
    "A notebook as Markdown, the README by default, and by path the pictures it shows."
    made = process(notebook, PurePosixPath(name), Index())
    labels, citations = Labels(name), PaperLinks(bibliography, name)
    labels.collect(made['cells'])
    first = source(notebook['cells'][0]).strip().split('\n')
    promise = [line for line in first[1:] if line.startswith('>')]
    note = NOTE if name == 'index.ipynb' else ''
    parts, pictures = [note, first[0], '\n'.join(promise)], {}
    for number, cell in enumerate(made['cells'][1:]):
        if cell['cell_type'] == 'markdown':
            parts.append(plain(citations.resolve(labels.resolve(source(cell))), nbs))
        elif cell['cell_type'] == 'code':
            parts += [
                plain(citations.resolve(labels.resolve(part)), nbs)
                for part in code_cell(cell, number, pictures, folder)
            ]
    text = '\n\n'.join(part.strip('\n') for part in parts if part.strip())
    return re.sub(r'\n{3,}', '\n\n', text) + '\n', pictures


def outdated(root: Path = ROOT) -> list[str]:
    "Which files differ from what nbs/index.ipynb makes."
    text, pictures = readme(
        read(root / 'nbs/index.ipynb'), read_bibliography(root / 'nbs/references.bib')
    )
    wanted = {'README.md': text.encode(), **pictures}
    return [
        name
        for name, data in wanted.items()
        if not (root / name).exists() or (root / name).read_bytes() != data
    ]


def main() -> int:
    "Command line; with `--check`, returns 1 if something is out of date."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--check', action='store_true', help='write nothing')
    if parser.parse_args().check:
        old = outdated()
        print(
            f'out of date: {", ".join(old)}; run `make readme`'
            if old
            else 'README.md is up to date'
        )
        return int(bool(old))
    text, pictures = readme(
        read(ROOT / 'nbs/index.ipynb'), read_bibliography(ROOT / 'nbs/references.bib')
    )
    (ROOT / 'README.md').write_text(text, encoding='utf-8')
    for name, data in pictures.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(data)
    print(f'README.md: {len(text.splitlines())} lines, {len(pictures)} pictures')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
