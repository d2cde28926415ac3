"""A notebook as readers see it, in plain Quarto Markdown and cells; nothing is executed.

| in the notebook | on the page |
|---|---|
| `#| hide`, `#| default_exp`, imports and private helpers under `#| export` | nothing |
| `#| export` with public definitions | a card for each, and the source, folded |
| `#| exports` | the source, at the address of what it defines |
| first cell: `# Title`, `> promise` | the page's head |
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from . import SiteError
from .symbols import Index, anchor, card, definitions, names
from .text import joined, outside_code, source

Cell = dict[str, Any]
FLAGS = {
    'slow',
    'gpu',
    'export',
    'exports',
    'exporti',
    'hide',
    'hide_input',
    'hide_output',
    'collapse_output',
    'eval',
}
FONT_AWESOME = re.compile(r'<link[^>]*font-awesome[^>]*>\s*', re.I)
WIDGET = 'application/vnd.jupyter.widget-view+json'


def read(path: Path) -> dict[str, Any]:
    "A notebook from disk."
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise SiteError(f'{path}: not a notebook ({error})') from error


def split_options(code: str) -> tuple[dict[str, str], str]:
    "The `#|` lines at the head of a cell, name to value, and the code below them."
    options, lines = {}, code.split('\n')
    while lines and re.match(r'#\s*\|', lines[0]):
        name, _, value = lines.pop(0).split('|', 1)[1].strip().partition(' ')
        options[name.rstrip(':')] = value.strip()
    return options, '\n'.join(lines).strip('\n')


def url(name: PurePosixPath) -> PurePosixPath:
    "The page of a notebook: without the number that orders it, as nbdev writes it."
    return name.with_name(re.sub(r'^\d+[a-z]?_', '', name.stem) + '.html')


def markdown(text: str) -> Cell:
    "A Markdown cell."
    return {'cell_type': 'markdown', 'metadata': {}, 'source': text}


def exported(notebook: dict[str, Any]) -> list[str]:
    "The public names that a notebook exports."
    found: list[str] = []
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code':
            options, code = split_options(source(cell))
            if options.keys() & {'export', 'exports'}:
                found += names(code)
    return found


def head(cell: Cell, name: PurePosixPath) -> tuple[dict[str, str], str]:
    "Title and promise of the first cell, and what else stands in it."
    text = source(cell).strip()
    found = re.match(
        r'#\s+(?P<title>[^\n]+)\n*(?P<promise>(?:>[^\n]*\n?)*)(?P<rest>.*)', text, re.S
    )
    if cell['cell_type'] != 'markdown' or not found:
        raise SiteError(f'{name}: the first cell must begin with `# Title`')
    about = {'title': found['title'].strip(), 'output-file': url(name).name}
    promise = ' '.join(
        line.lstrip('> ').strip() for line in found['promise'].splitlines()
    ).strip()
    if promise:
        about['description'] = promise
    return about, found['rest'].strip()


def outputs(cell: Cell) -> list[dict[str, Any]]:
    """A cell's outputs for a page.

    No live widgets, no style sheets from elsewhere, tables in the site's style.
    """
    kept = []
    for output in json.loads(json.dumps(cell.get('outputs', []))):
        data = output.get('data', {})
        if WIDGET in data or output.get('name') == 'stderr':
            continue
        if 'text/html' in data:
            page = FONT_AWESOME.sub('', joined(data['text/html']))
            page = page.replace(' border="1"', '').replace(
                'class="dataframe"', 'class="dataframe table table-sm"'
            )
            data['text/html'] = page
        kept.append(output)
    return kept


def code_cells(cell: Cell) -> list[Cell]:
    "What a code cell becomes on the page."
    options, code = split_options(source(cell))
    if 'hide' in options or 'default_exp' in options or 'exporti' in options:
        return []
    results = [] if 'hide_output' in options else outputs(cell)
    shown = {key: value for key, value in options.items() if key not in FLAGS}
    before: list[Cell] = []
    if 'export' in options:
        public = definitions(code)
        if not public:
            return []
        before = [markdown('\n\n'.join(card(node, code) for node in public))]
        shown |= {'code-fold': 'true', 'code-summary': '"Source"'}
    elif 'exports' in options and names(code):
        anchors = ''.join(
            f'<a id="{anchor(name)}" class="definition"></a>'
            for name in dict.fromkeys(names(code))
        )
        before = [markdown('```{=html}\n' + anchors + '\n```')]
    if 'hide_input' in options:
        shown['echo'] = 'false'
    if not code and not results:
        return before
    lines = [f'#| {key}: {value}' for key, value in shown.items()]
    return [
        *before,
        {**cell, 'metadata': {}, 'source': '\n'.join([*lines, code]), 'outputs': results},
    ]


def process(notebook: dict[str, Any], name: PurePosixPath, index: Index) -> dict[str, Any]:
    "The notebook as readers see it; `name` is its path under nbs."
    about, rest = head(notebook['cells'][0], name)
    front = (
        '---\n'
        + yaml.safe_dump(about, sort_keys=False, allow_unicode=True, width=1000)
        + '---'
    )
    cells: list[Cell] = [{'cell_type': 'raw', 'metadata': {}, 'source': front}]
    if rest:
        cells.append(markdown(index.link(rest, name)))
    for cell in notebook['cells'][1:]:
        if cell['cell_type'] == 'code':
            made = code_cells(cell)
            for one in made:
                if one['cell_type'] == 'markdown':
                    one['source'] = index.link(one['source'], name)
                for output in one.get('outputs', []):
                    if 'text/markdown' in output.get('data', {}):
                        output['data']['text/markdown'] = index.link(
                            joined(output['data']['text/markdown']), name
                        )
            cells += made
        elif cell['cell_type'] == 'markdown':
            text = outside_code(
                source(cell), lambda part: re.sub(r'<!--.*?-->', '', part, flags=re.S)
            )
            if text.strip():
                cells.append({**cell, 'metadata': {}, 'source': index.link(text, name)})
    for number, cell in enumerate(cells):
        cell['id'] = f'cell-{number}'
    return {**notebook, 'cells': cells}
