"""The whole site: processed notebooks, then Quarto or smalldocs, then everything from the
network replaced by what lies here.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from . import SiteError
from .citations import Citations, Reference, read_bibliography
from .figures import lift
from .labels import Labels
from .notebook import exported, markdown, process, read, url
from .symbols import Index
from .text import joined, source

ASSETS = Path(__file__).parent / 'assets'
KATEX = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[^/\"']+/dist/?")
WIDE = 560  # pixels of a picture that a phone shows in a box that scrolls
NOT_COPIED = {'.ipynb_checkpoints', '_quarto.yml', 'nbdev.yml', 'runs', '.data'}


def notebooks(nbs: Path) -> list[PurePosixPath]:
    "The book's notebooks, as paths under nbs."
    found = (path.relative_to(nbs) for path in nbs.rglob('*.ipynb'))
    return sorted(
        PurePosixPath(path.as_posix())
        for path in found
        if not any(part[0] in '._' for part in path.parts)
    )


def sidebar(config: dict[str, Any]) -> list[PurePosixPath]:
    "The notebooks that the sidebar lists."
    found: list[PurePosixPath] = []

    def visit(entry: Any) -> None:
        if isinstance(entry, str):
            found.append(PurePosixPath(entry))
        elif isinstance(entry, list):
            for one in entry:
                visit(one)
        elif isinstance(entry, dict):
            if 'href' in entry:
                found.append(PurePosixPath(entry['href']))
            visit(entry.get('contents', []))

    visit(config['website']['sidebar']['contents'])
    return found


def check_sidebar(config: dict[str, Any], nbs: Path) -> None:
    "The sidebar lists every notebook once and nothing else."
    listed, present = sidebar(config), notebooks(nbs)
    wrong = [f'{name} is not in the sidebar' for name in present if name not in listed]
    wrong += [
        f'{name} is in the sidebar and not under nbs'
        for name in listed
        if name not in present
    ]
    wrong += [
        f'{name} is in the sidebar twice' for name in set(listed) if listed.count(name) > 1
    ]
    if wrong:
        raise SiteError('_quarto.yml: ' + '; '.join(sorted(wrong)))


def prepare(nbs: Path, target: Path) -> dict[PurePosixPath, dict[str, Any]]:
    """Fill `target` with what the notebooks need beside them, and return the notebooks as
    readers see them.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in sorted(nbs.rglob('*')):
        name = path.relative_to(nbs)
        if path.is_file() and path.suffix != '.ipynb' and not NOT_COPIED & set(name.parts):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / name)
    contents = {name: read(nbs / name) for name in notebooks(nbs)}
    index = Index()
    for name, notebook in contents.items():
        index.add(name, exported(notebook))
    return {name: process(notebook, name, index) for name, notebook in contents.items()}


def write(pages: dict[PurePosixPath, dict[str, Any]], target: Path) -> None:
    "Write notebooks below `target`."
    for name, notebook in pages.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(
            json.dumps(notebook, ensure_ascii=False), encoding='utf-8'
        )


def add_references(cells: list[dict[str, Any]], citations: Citations) -> None:
    """Put the list of references where the page has its `::.

    {#refs}`, else under its heading References, else at the end.
    """
    listing = citations.listing()
    if not listing:
        return
    for cell in cells:
        if cell['cell_type'] == 'markdown' and re.search(
            r'^:::+\s*\{#refs[^}]*\}', source(cell), re.M
        ):
            cell['source'] = re.sub(
                r'^:::+\s*\{#refs[^}]*\}\s*\n+:::+',
                lambda _: listing,
                source(cell),
                flags=re.M,
            )
            return
    for cell in reversed(cells):
        heading = cell['cell_type'] == 'markdown' and re.search(
            r'^##\s+References[^\n]*\n?', source(cell), re.M
        )
        if heading:
            cell['source'] = (
                source(cell)[: heading.end()].rstrip()
                + '\n\n'
                + listing
                + '\n\n'
                + source(cell)[heading.end() :]
            )
            return
    cells.append(markdown('## References {.unnumbered}\n\n' + listing))


def adapt(
    notebook: dict[str, Any], page: str, bibliography: dict[str, Reference]
) -> dict[str, Any]:
    """What Quarto does and smalldocs does not.

    Numbers, references, citations, labelled figures.
    """
    labels, citations = Labels(page), Citations(bibliography, page)
    labels.collect(notebook['cells'])
    cells = [
        made
        for cell in notebook['cells']
        for made in (lift(cell, labels) if cell['cell_type'] == 'code' else [cell])
    ]

    def resolve(text: str) -> str:
        return citations.resolve(labels.resolve(text))

    for cell in cells:
        if cell['cell_type'] == 'markdown':
            cell['source'] = resolve(source(cell))
        for output in cell.get('outputs', []):
            if 'text/markdown' in output.get('data', {}):
                output['data']['text/markdown'] = resolve(
                    joined(output['data']['text/markdown'])
                )
    add_references(cells, citations)
    for number, cell in enumerate(cells):
        cell['id'] = f'cell-{number}'
    return {**notebook, 'cells': cells}


def with_smalldocs(work: Path) -> tuple[Path, list[str]]:
    "Render in pure Python; returns the folder of pages and what the builder complains of."
    from smalldocs.config import load
    from smalldocs.site import Page, Site

    class BookSite(Site):
        "Pages are called what their notebooks' heads say (`output-file`)."

        def read(self, src: PurePosixPath) -> Page:
            page = super().read(src)
            page.out = page.out.with_name(str(page.front.get('output-file', page.out.name)))
            return page

    site = BookSite(load(work), quiet=True)
    site.build()
    expected = ('bibliography', 'output-file', 'html-math-method', 'lightbox')
    return site.out, [
        warning
        for warning in site.warnings
        if not any(name in warning for name in expected)
    ]


def with_quarto(work: Path, quarto: str) -> Path:
    "Render with Quarto, which runs nothing: the notebooks carry their outputs."
    subprocess.run([quarto, 'render', str(work), '--no-execute'], check=True)
    config = yaml.safe_load((work / '_quarto.yml').read_text(encoding='utf-8'))
    return work / config['project']['output-dir']


def localise(site: Path) -> None:
    """Put KaTeX beside the pages and point them to it, so that nothing comes from the
    network; refine the pages.
    """
    shutil.copytree(ASSETS / 'katex', site / 'site_libs/katex', dirs_exist_ok=True)
    for path in site.rglob('*.html'):
        up = '../' * (len(path.relative_to(site).parts) - 1)
        page = path.read_text(encoding='utf-8')
        page = KATEX.sub(f'{up}site_libs/katex/', page).replace(
            'site_libs/katex//', 'site_libs/katex/'
        )
        path.write_text(refine(page), encoding='utf-8')


def refine(page: str) -> str:
    """Mark what the style sheet cannot tell by itself.

    Inline commands, printed text that is set in columns, and pictures that are too wide for
    a phone.
    """

    def columns(found: re.Match[str]) -> str:
        aligned = sum(bool(re.search(r'\S {2,}\S', line)) for line in found[2].splitlines())
        return f'{found[1]}<pre class="columns">{found[2]}' if aligned > 2 else found[0]

    def framed(found: re.Match[str]) -> str:
        width = int.from_bytes(base64.b64decode(found[1])[16:20], 'big')
        if width < WIDE:
            return found[0]
        # the style sheet derives from it how far a phone may scale the picture down
        return f'<div class="wide-picture" style="--natural: {width}px">{found[0]}</div>'

    page = re.sub(
        r'(<div class=\"cell-output cell-output-stdout\">\s*)<pre>(.*?</pre>)',
        columns,
        page,
        flags=re.S,
    )
    page = re.sub(
        r'<img src="data:image/png;base64,([\w+/]{32})[^>]*class="img-fluid">', framed, page
    )
    # a mean and its spread stay on one line of a table
    page = re.sub(
        r'<td[^>]*>[^<]* ± [^<]*',
        lambda found: re.sub(r'(?<=\d) ± (?=\d)', '\u00a0±\u00a0', found[0]),
        page,
    )
    return page.replace('<code>dfkd ', '<code class="command">dfkd ')


def build(root: Path, out: Path, builder: str = 'auto', work: Path | None = None) -> str:
    """Build the site of the repository `root` into `out`, by way of the folder `work`;
    returns the builder's name.
    """
    config = yaml.safe_load((root / '_quarto.yml').read_text(encoding='utf-8'))
    check_sidebar(config, root / 'nbs')
    quarto = shutil.which('quarto')
    if builder == 'auto':
        builder = 'quarto' if quarto else 'smalldocs'
    work = work or root / '_proc'
    pages = prepare(root / 'nbs', work)
    shutil.copy(root / '_quarto.yml', work / '_quarto.yml')
    if builder == 'quarto':
        if not quarto:
            raise SiteError(
                'Quarto is not on the PATH: install it, or use --builder smalldocs'
            )
        write(pages, work)
        made = with_quarto(work, quarto)
    else:
        bibliography = read_bibliography(work / config['bibliography'])
        write(
            {
                name: adapt(notebook, str(name), bibliography)
                for name, notebook in pages.items()
            },
            work,
        )
        made, complaints = with_smalldocs(work)
        if complaints:
            raise SiteError('\n'.join(complaints))
    localise(made)
    for name in pages:
        if not (made / url(name)).exists():
            raise SiteError(f'{builder} made no page of {name}')
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out.parent, exist_ok=True)
    shutil.move(made, out)
    return builder
