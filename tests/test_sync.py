"Notebooks and package agree, and notebooks are stored without noise."

from __future__ import annotations

import ast
import configparser
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import each

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))
from check_export import GENERATED, differences  # noqa: E402
from run_nbs import clean_notebook  # noqa: E402

NOTEBOOKS = sorted(
    path
    for path in (ROOT / 'nbs').rglob('*.ipynb')
    if '.ipynb_checkpoints' not in path.parts
)
NAMES = [str(path.relative_to(ROOT / 'nbs')) for path in NOTEBOOKS]
MACHINE_PATH = re.compile(
    r"(?:^|[\s\"'(=:])(/(?:home|Users|root|work|mnt|tmp)/\w[^\s\"'<]*|[A-Z]:\\\\Users)"
)


def load(path: Path) -> dict[str, Any]:
    "A notebook as it lies on disk."
    return json.loads(path.read_text(encoding='utf-8'))


def text(cell: dict[str, Any]) -> str:
    "A cell's source as one string."
    return ''.join(cell['source'])


# --- package and notebooks ----------------------------------------------------------------


def test_package_is_what_the_notebooks_export() -> None:
    found = differences()
    assert not found, '\n'.join(found)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    "A repository to spoil: one notebook and the module it exports."
    (tmp_path / 'nbs/part').mkdir(parents=True)
    cells = [
        {
            'cell_type': 'code',
            'id': f'cell{number}',
            'metadata': {},
            'execution_count': None,
            'outputs': [],
            'source': source,
        }
        for number, source in enumerate(
            [
                '#| default_exp part.thing',
                "#| export\ndef two() -> int:\n    'Two.'\n    return 2",
            ]
        )
    ]
    notebook = {'cells': cells, 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}
    (tmp_path / 'nbs/part/01_thing.ipynb').write_text(json.dumps(notebook))
    (tmp_path / 'dfkd_nb').mkdir()
    (tmp_path / 'dfkd_nb/__init__.py').write_text(
        (ROOT / 'dfkd_nb/__init__.py').read_text()
    )
    for name in ('settings.ini', 'setup.py'):
        shutil.copy(ROOT / name, tmp_path / name)
    from check_export import export_copy

    target = tmp_path.with_name(tmp_path.name + '-exported')
    export_copy(tmp_path, target)
    shutil.rmtree(tmp_path / 'dfkd_nb')
    shutil.copytree(target / 'dfkd_nb', tmp_path / 'dfkd_nb')
    return tmp_path


def test_agreement_is_seen(copy: Path) -> None:
    assert (copy / 'dfkd_nb/part/thing.py').exists()
    assert differences(copy) == []


def test_hand_edit_is_seen(copy: Path) -> None:
    path = copy / 'dfkd_nb/part/thing.py'
    path.write_text(path.read_text().replace('return 2', 'return 3'))
    found = differences(copy)
    assert (
        len(found) == 1 and 'part/thing.py differs' in found[0] and 'return 3' in found[0]
    )


def test_stale_module_is_seen(copy: Path) -> None:
    (copy / 'dfkd_nb/part/old.py').write_text(f'# {GENERATED}: ../nbs/part/00_old.ipynb\n')
    assert differences(copy) == ['dfkd_nb/part/old.py comes from no notebook: delete it']


def test_missing_module_is_seen(copy: Path) -> None:
    (copy / 'dfkd_nb/part/thing.py').unlink()
    assert differences(copy) == ['dfkd_nb/part/thing.py is missing: run `make export`']


def test_every_module_is_named_after_its_notebook() -> None:
    for path in NOTEBOOKS:
        source = '\n'.join(
            text(cell) for cell in load(path)['cells'] if cell['cell_type'] == 'code'
        )
        named = re.search(r'^#\|\s*default_exp\s+([\w.]+)', source, re.M)
        if named:
            folder = path.parent.relative_to(ROOT / 'nbs')
            stem = re.sub(r'^\d+_', '', path.stem)
            assert named[1] == f'{folder}.{stem}'.replace('/', '.').lstrip('.'), path.name


def test_package_imports_only_what_it_requires() -> None:
    """Only the standard library and settings.ini's `requirements`.

    At the head of a module and inside of functions. Jupyter may be asked for where a widget
    is shown; `import_extra` fetches what is optional.
    """
    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    required = {
        re.split(r'[<>=!~\[]', one)[0]
        for one in shlex.split(config['DEFAULT']['requirements'])
    }
    modules = {
        {'pillow': 'PIL', 'scikit-learn': 'sklearn'}.get(one, one) for one in required
    } | {'dfkd_nb'}
    for path in sorted((ROOT / 'dfkd_nb').rglob('*.py')):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        for node in ast.walk(tree):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            )
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or '']
            for name in {one.split('.')[0] for one in names}:
                shown = name in ('IPython', 'ipywidgets') and node not in tree.body
                known = name in modules or name in sys.stdlib_module_names or shown
                assert known, (
                    f'{path.relative_to(ROOT)} imports {name}, which settings.ini does not'
                    ' require'
                )


# --- notebooks as they are stored ---------------------------------------------------------


@each('name', NAMES)
def test_notebook_is_stored_clean(name: str) -> None:
    """No execution counts, errors, standard error, widgets or metadata of an editor.

    What `make run` writes.
    """
    import nbformat

    path = ROOT / 'nbs' / name
    stored = nbformat.read(path, as_version=4)
    for number, cell in enumerate(stored.cells):
        for output in cell.get('outputs', []):
            assert output.output_type != 'error', f'cell {number} stores an error'
    before = nbformat.writes(stored)
    assert nbformat.writes(clean_notebook(stored)) == before, (
        f'run: python tools/run_nbs.py --clean nbs/{name}'
    )


@each('name', NAMES)
def test_notebook_is_small(name: str) -> None:
    "Less than 1 MB in all, less than 200 kB a picture."
    path = ROOT / 'nbs' / name
    assert path.stat().st_size < 1_000_000, f'{path.stat().st_size / 1e6:.2f} MB'
    for number, cell in enumerate(load(path)['cells']):
        for output in cell.get('outputs', []):
            for kind, data in output.get('data', {}).items():
                if kind.startswith('image/'):
                    size = (
                        len(''.join(data)) * 3 / 4
                        if kind != 'image/svg+xml'
                        else len(''.join(data))
                    )
                    assert size < 200_000, (
                        f'cell {number}: a picture of {size / 1e3:.0f} kB'
                    )


@each('name', NAMES)
def test_notebook_names_no_machine(name: str) -> None:
    for number, cell in enumerate(load(ROOT / 'nbs' / name)['cells']):
        outputs = json.dumps(
            [output.get('text', output.get('data')) for output in cell.get('outputs', [])]
        )
        for kind, content in (
            ('source', text(cell)),
            ('output', re.sub(r'base64,[^\"]*', '', outputs)),
        ):
            found = MACHINE_PATH.search(content)
            assert not found, f'{kind} of cell {number} names {found[1]}'


@each('name', NAMES)
def test_figures_have_captions_and_alternative_text(name: str) -> None:
    for number, cell in enumerate(load(ROOT / 'nbs' / name)['cells']):
        source = text(cell)
        label = re.search(r'^#\|\s*label:\s*(fig-[\w-]+)', source, re.M)
        if cell['cell_type'] == 'code' and label:
            for option in ('fig-cap', 'fig-alt'):
                assert re.search(rf'^#\|\s*{option}:\s*\S', source, re.M), (
                    f'cell {number}: {label[1]} has no {option}'
                )


@each('name', NAMES)
def test_title_cell(name: str) -> None:
    """`# Title`, and a promise of one line in a quotation.

    The page's head and the module's docstring.
    """
    first = load(ROOT / 'nbs' / name)['cells'][0]
    lines = [line for line in text(first).splitlines() if line.strip()]
    assert first['cell_type'] == 'markdown' and lines[0].startswith('# ')
    if name != 'index.ipynb':
        assert len(lines) == 2 and lines[1].startswith('> '), (
            'title and promise stand alone in the first cell'
        )


def test_requirements_are_pinned() -> None:
    "constraints.txt pins everything that settings.ini names, within its bounds."
    from packaging.requirements import Requirement

    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    lines = [
        line.split('#')[0].strip()
        for line in (ROOT / 'constraints.txt').read_text().splitlines()
    ]
    pins = dict(line.split('==') for line in lines if line)
    keys = (
        'requirements',
        'book_requirements',
        'imagenet_requirements',
        'dev_requirements',
    )
    for requirement in map(
        Requirement, sum((shlex.split(config['DEFAULT'][key]) for key in keys), [])
    ):
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), requirement
    for name in (
        'torch',
        'torchvision',
        'nbdev',
        'fastcore',
        'execnb',
        'ghapi',
        'smalldocs',
    ):
        assert name in pins, name


def test_readme_is_made_from_the_front_page() -> None:
    from readme import outdated

    assert outdated() == [], 'run `make readme`'
