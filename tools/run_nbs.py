"""Execute notebooks from top to bottom and store their outputs.

    python tools/run_nbs.py nbs/dreams/03_priors.ipynb ...
    python tools/run_nbs.py --run slow nbs/...                  # runs `#| slow` cells too

A notebook is written only after all of its cells have run. Cells marked `#| eval: false`,
and `#| slow` and `#| gpu` cells without their flag, keep the outputs they have. What a
second run would change is not stored, nor is standard error, which is shown.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

FLAGS = ('slow', 'gpu')
LARGE = 150_000  # bytes of a picture
WIDGET = 'application/vnd.jupyter.widget-view+json'
ADDRESS = re.compile(r' at 0x[0-9a-fA-F]{6,16}')
# what matplotlib's animations and pandas' tables make up anew each time
RANDOM_ID = re.compile(
    r'(?<=_anim_img)[0-9a-f]{32}\b|(?<![0-9a-zA-Z+/=])[0-9a-f]{32}(?![0-9a-zA-Z+/=])'
)


def skipped(source: str, run: set[str]) -> bool:
    "Whether a cell is left as it is: `#| eval: false`, or a flag that is not in `run`."
    directives = {line[2:].strip() for line in source.splitlines() if line.startswith('#|')}
    if any(re.fullmatch(r'eval:\s*false', directive) for directive in directives):
        return True
    return bool(directives & (set(FLAGS) - run))


def small_picture(encoded: str) -> str:
    """A PNG in base64, with a palette of 256 colours if it is too large to be stored as it
    is.
    """
    if len(encoded) * 3 / 4 < LARGE:
        return encoded
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    if picture.mode == 'P':  # done before: cleaning twice changes nothing
        return encoded
    picture.convert('RGB').quantize(256, dither=Image.Dither.NONE).save(
        buffer, 'PNG', optimize=True
    )
    return base64.b64encode(buffer.getvalue()).decode() + '\n'


def clean_outputs(outputs: list[Any]) -> list[Any]:
    """Outputs without standard error, live widgets, execution counts and memory addresses;
    neighbouring streams joined.
    """
    kept: list[Any] = []
    for output in outputs:
        if output['output_type'] == 'stream':
            if output['name'] == 'stderr':
                continue
            if kept and kept[-1]['output_type'] == 'stream':
                kept[-1]['text'] += output['text']
                continue
        data = output.get('data', {})
        if WIDGET in data:
            continue
        if 'image/png' in data:
            data['image/png'] = small_picture(data['image/png'])
        if 'text/plain' in data:
            data['text/plain'] = ADDRESS.sub('', data['text/plain'])
        if output['output_type'] == 'execute_result':
            output['execution_count'] = None
        if 'metadata' in output:
            output['metadata'] = {}
        kept.append(output)
    return kept


def clean_notebook(notebook: Any) -> Any:
    """The same notebook as it is stored.

    No execution counts, no metadata of an editor, ids numbered in order.
    """
    language = {
        'display_name': 'Python 3 (ipykernel)',
        'language': 'python',
        'name': 'python3',
    }
    notebook['metadata'] = nbformat.from_dict({'kernelspec': language})
    for cell in notebook['cells']:
        tags = cell['metadata'].get('tags')
        cell['metadata'] = nbformat.from_dict({'tags': tags} if tags else {})
        if cell['cell_type'] == 'code':
            cell['execution_count'] = None
            cell['outputs'] = clean_outputs(cell['outputs'])
    # animations and tables get random ids: number them in order of appearance, so that a
    # second run changes nothing
    numbers: dict[str, str] = {}
    for cell in notebook['cells']:
        for output in cell.get('outputs', []):
            page = output.get('data', {}).get('text/html')
            for name in RANDOM_ID.findall(page or ''):
                numbers.setdefault(name, f'{len(numbers) + 1:032x}')
                output['data']['text/html'] = output['data']['text/html'].replace(
                    name, numbers[name]
                )
    return notebook


def run_notebook(path: Path, run: set[str], timeout: int) -> None:
    "Execute one notebook in its own folder and write it back."
    notebook, start = nbformat.read(path, as_version=4), time.time()
    client = NotebookClient(
        notebook,
        timeout=timeout,
        resources={'metadata': {'path': str(path.parent)}},
        extra_arguments=['--log-level=ERROR'],
    )
    cells = [
        (index, cell)
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == 'code'
    ]
    with client.setup_kernel():
        for number, (index, cell) in enumerate(cells, 1):
            if skipped(cell.source, run) or not cell.source.strip():
                continue
            print(f'\r{path}: cell {number}/{len(cells)} ', end='', flush=True)
            client.execute_cell(cell, index)
            for output in cell.outputs:
                if output.get('name') == 'stderr':
                    print(f'\n  cell {number}, stderr: {output["text"].strip()[-1500:]}')
    nbformat.write(clean_notebook(notebook), path)
    print(
        f'\r{path}: {len(cells)} cells, {time.time() - start:.1f} s,'
        f' {path.stat().st_size / 1e3:.0f} kB'
    )


def main(arguments: list[str] | None = None) -> int:
    "Command line; returns 1 if a notebook failed (it is then left as it was)."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('notebooks', nargs='*', type=Path, help='default: all under nbs/')
    parser.add_argument(
        '--run',
        action='append',
        choices=FLAGS,
        default=[],
        help='also run cells with this flag',
    )
    parser.add_argument(
        '--clean', action='store_true', help='do not execute, only take the noise out'
    )
    parser.add_argument(
        '--cell-timeout', type=int, default=3600, help='seconds a cell may take'
    )
    options = parser.parse_args(arguments)

    # stored outputs come from the real settings, not the tests' quick ones
    os.environ.pop('IN_TEST', None)
    os.environ['DFKD_PROGRESS'] = '0'
    failed = False
    for path in options.notebooks or sorted(Path('nbs').rglob('*.ipynb')):
        if options.clean:
            nbformat.write(clean_notebook(nbformat.read(path, as_version=4)), path)
            continue
        try:
            run_notebook(path, set(options.run), options.cell_timeout)
        except CellExecutionError as error:
            print(f'\n{path}: {error}', file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == '__main__':
    raise SystemExit(main())
