"""Run nbs/tour.ipynb from top to bottom without a browser: `python tools/tour.py`.

Leaves in `_tour` the executed page (tour.html), the notebook behind it, every picture it
drew, and `summary.json` with the numbers it measured; prints what it is doing, and at the
end the student's accuracy and where the files are. The notebook writes `summary.json`
(teacher_accuracy, student_accuracy, ...) into the folder named by DFKD_TOUR_OUT.
"""

from __future__ import annotations

import base64
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
from nbconvert import HTMLExporter

sys.path.insert(0, str(Path(__file__).resolve().parent))
from run_nbs import clean_notebook, skipped  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
KATEX = ROOT / 'tools/website/assets/katex'
MATHS = """<link rel="stylesheet" href="katex/katex.min.css">
<script src="katex/katex.min.js"></script>
<script src="katex/contrib/auto-render.min.js"></script>
<script>renderMathInElement(document.body, {throwOnError: false,
delimiters: [{left: '$$', right: '$$', display: true},
             {left: '$', right: '$', display: false}]});</script></body>"""


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


def save_pictures(notebook: Any, folder: Path) -> list[Path]:
    """Write each PNG among the outputs into `folder`, named by its figure label or its
    number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for cell in notebook.cells:
        label = re.search(r'^#\|\s*label:\s*([\w-]+)', cell.source, re.M)
        for output in cell.get('outputs', []):
            picture = output.get('data', {}).get('image/png')
            if picture:
                name = f'{len(written) + 1:02d}-{label[1] if label else "picture"}.png'
                (folder / name).write_bytes(base64.b64decode(picture))
                written.append(folder / name)
    return written


def write_page(notebook: Any, path: Path) -> None:
    """One HTML page with its pictures inside and KaTeX beside it; it opens without a
    network.
    """
    exporter = HTMLExporter(
        mathjax_url='', require_js_url='', mermaid_js_url='', jquery_url=''
    )
    page, _ = exporter.from_notebook_node(notebook)
    foreign = (
        r'<link[^>]*font-awesome[^>]*>|<script type=\"module\">.*?</script>|<script'
        r' src=\"\">\s*</script>'
    )
    page = re.sub(foreign, '', page, flags=re.S)
    shutil.copytree(KATEX, path.parent / 'katex', dirs_exist_ok=True)
    path.write_text(page.replace('</body>', MATHS), encoding='utf-8')


def main() -> int:
    "Command line; returns 1 if the tour failed."
    source, out = ROOT / 'nbs/tour.ipynb', ROOT / '_tour'
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    os.environ.pop('IN_TEST', None)
    os.environ['DFKD_PROGRESS'], os.environ['DFKD_TOUR_OUT'] = '0', str(out)
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
    write_page(notebook, out / 'tour.html')
    pictures = save_pictures(notebook, out / 'pictures')
    if failed:
        print(f'what ran until then: {out / "tour.html"}', file=sys.stderr)
        return 1
    summary = json.loads((out / 'summary.json').read_text())
    print(f'\nThe tour took {time.time() - start:.0f} s.')
    for key, value in summary.items():
        if isinstance(value, (int, float)) and key not in (
            'teacher_accuracy',
            'student_accuracy',
        ):
            print(f'  {key.replace("_", " ")}: {value:.4g}')
    print(f"  teacher's accuracy: {summary['teacher_accuracy']:.2%}")
    print(
        f"  student's accuracy: {summary['student_accuracy']:.2%}  (real test images; it"
        ' never saw a real one before)'
    )
    print(f'  executed page:      {out / "tour.html"}')
    print(f'  pictures:           {out / "pictures"} ({len(pictures)})')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
