"""Run nbs/tour.ipynb from top to bottom without a browser: `python tools/tour.py`.

Leaves in `_tour` the page (tour.html), the executed notebook behind it and every picture it
drew; prints what it is doing, and at the end its table and where the files are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert.filters import markdown2html

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]
from readme import readme  # noqa: E402
from run_nbs import clean_notebook, skipped  # noqa: E402

from tools.website.citations import read_bibliography  # noqa: E402

KATEX = ROOT / 'tools/website/assets/katex'
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%s</title>
<link rel="stylesheet" href="katex/katex.min.css">
<style>
:root { color-scheme: light dark; }
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.55;
  font-family: system-ui, sans-serif; }
pre { overflow-x: auto; padding: .7rem; border: 1px solid #8886; border-radius: 6px;
  font-size: .82rem; line-height: 1.4; }
img { max-width: 100%%; background: white; }
table { border-collapse: collapse; }
td, th { padding: .25rem .8rem; border-bottom: 1px solid #8886; }
summary { cursor: pointer; opacity: .75; }
.katex-display { overflow-x: auto; overflow-y: hidden; }
</style>
</head>
<body>
%s
<script src="katex/katex.min.js"></script>
<script src="katex/contrib/auto-render.min.js"></script>
<script>renderMathInElement(document.body, {throwOnError: false,
delimiters: [{left: '$$', right: '$$', display: true},
             {left: '$', right: '$', display: false}]});</script>
</body>
</html>
"""


def heading(cells: list[Any], index: int) -> str:
    "The last heading at or above a cell."
    for cell in reversed(cells[: index + 1]):
        found = (
            re.findall(r'^#+\s+(.*)$', cell.source, re.M)
            if cell.cell_type == 'markdown'
            else []
        )
        if found:
            return re.sub(r'\s*\{.*\}|[*`]', '', found[-1])
    return ''


def execute(notebook: Any, folder: Path) -> None:
    "Run the cells, saying which; what they print is shown."
    client = NotebookClient(
        notebook,
        timeout=None,
        resources={'metadata': {'path': str(folder)}},
        extra_arguments=['--log-level=ERROR'],
    )
    cells = [
        (index, cell)
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == 'code'
    ]
    cells = [
        (index, cell)
        for index, cell in cells
        if cell.source.strip() and not skipped(cell.source, set())
    ]
    start, last = time.time(), ''
    with client.setup_kernel():
        for number, (index, cell) in enumerate(cells, 1):
            now = heading(notebook.cells, index)
            if now != last:
                print(
                    f'[{time.time() - start:4.0f} s, cell {number:2d} of {len(cells)}]'
                    f' {now}',
                    flush=True,
                )
                last = now
            client.execute_cell(cell, index)
            for output in cell.outputs:
                if output.output_type == 'stream' and output.name == 'stdout':
                    print('    ' + output.text.rstrip().replace('\n', '\n    '), flush=True)


def write_page(notebook: Any, path: Path) -> list[Path]:
    """The page, its pictures in a folder beside it and KaTeX for its formulas; it opens
    without a network. Returns the pictures.
    """
    folder, nbs = path.parent, '../nbs'
    text, pictures = readme(
        json.loads(nbformat.writes(notebook)),
        read_bibliography(ROOT / 'nbs/references.bib'),
        name='tour.ipynb',
        folder='./pictures',
        nbs=nbs,
    )
    for name, data in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    shutil.copytree(KATEX, folder / 'katex', dirs_exist_ok=True)
    title = text.strip().split('\n')[0].removeprefix('# ')
    # nbconvert's anchors lead nowhere on a page without contents
    body = re.sub(r'<a class="anchor-link".*?</a>', '', markdown2html(text))
    path.write_text(PAGE % (title, body), encoding='utf-8')
    return [folder / name for name in pictures]


def last_table(notebook: Any) -> str:
    "The table at the end of the tour, as it is printed."
    for cell in reversed(notebook.cells):
        for output in cell.get('outputs', []):
            table = output.get('data', {}).get('text/markdown', '')
            if table:
                lines = [line for line in table.split('\n') if set(line) - set('|-: ')]
                rows = [line.strip('| ').split(' | ') for line in lines]
                widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
                return '\n'.join(
                    '  ' + '  '.join(map(str.ljust, row, widths)).rstrip() for row in rows
                )
    return ''


def main() -> int:
    "Command line; returns 1 if the tour failed."
    source, out = ROOT / 'nbs/tour.ipynb', ROOT / '_tour'
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    os.environ.pop('IN_TEST', None)
    os.environ['DFKD_PROGRESS'] = '0'
    notebook, start, failed = nbformat.read(source, as_version=4), time.time(), False
    try:
        execute(notebook, source.parent)
    except CellExecutionError as error:
        print(
            f'the tour stopped: {error.ename}: {error.evalue}\n{error.traceback[-3000:]}',
            file=sys.stderr,
        )
        failed = True
    notebook = clean_notebook(notebook)
    nbformat.write(notebook, out / 'tour.ipynb')
    pictures = write_page(notebook, out / 'tour.html')
    if failed:
        print(f'what ran until then: {out / "tour.html"}', file=sys.stderr)
        return 1
    print(f'\nThe tour took {time.time() - start:.0f} s.\n{last_table(notebook)}')
    print(f'page:     {out / "tour.html"}')
    print(f'pictures: {out / "pictures"} ({len(pictures)})')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
