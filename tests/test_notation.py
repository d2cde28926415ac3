"""The page "Notation and terms": every name in code that its table lists exists.

`name` is defined in some module; `name(parameter)` takes that parameter; `Name.attribute`
is a method, a field or something that `Name` sets on itself.
"""

import importlib
import inspect
import json
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cases import each

import dfkd_nb

PAGE = Path(__file__).resolve().parents[1] / 'nbs/notation.ipynb'
HEADER = '| symbol | name in code | in the papers | meaning | chapter |'


def page() -> str:
    "The page's prose."
    cells = json.loads(PAGE.read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def rows() -> list[list[str]]:
    "The cells of the table of symbols, a list a row."
    lines = page().split(HEADER)[1].strip().split('\n\n')[0].splitlines()[1:]
    return [re.split(r'(?<!\\)\|', line)[1:-1] for line in lines]


NAMES = sorted({name for row in rows() for name in re.findall('`(.+?)`', row[1])})


@cache
def public() -> dict[str, Any]:
    "Every public name of the package, by its last part."
    found: dict[str, Any] = {}
    for module in pkgutil.walk_packages(dfkd_nb.__path__, 'dfkd_nb.'):
        if not module.name.startswith(('dfkd_nb.lab', 'dfkd_nb._')):
            made = importlib.import_module(module.name)
            found |= {name: getattr(made, name) for name in getattr(made, '__all__', [])}
    return found


def holds(owner: Any, name: str) -> bool:
    "Whether a class has, declares or sets an attribute."
    return any(
        hasattr(kind, name)
        or name in getattr(kind, '__annotations__', {})
        or re.search(rf'\bself\.{name}\b[^=\n]*=', inspect.getsource(kind))
        for kind in owner.__mro__[:-1]
        if kind.__module__.startswith('dfkd_nb')
    )


def exists(name: str) -> bool:
    "Whether a name of the table is in the code."
    base, parameter, attribute = re.fullmatch(
        r'(\w+)(?:\((\w+)\))?(?:\.(\w+))?', name
    ).groups()
    if base not in public():
        return False
    thing = public()[base]
    if parameter:
        kinds = thing.__mro__ if inspect.isclass(thing) else [thing]
        return any(
            parameter in inspect.signature(kind).parameters
            for kind in kinds
            if kind is not object and callable(kind) and _has_signature(kind)
        )
    return not attribute or holds(thing, attribute)


def _has_signature(kind: Any) -> bool:
    try:
        inspect.signature(kind)
    except (TypeError, ValueError):
        return False
    return True


@each('name', NAMES)
def test_a_name_of_the_table_exists(name: str) -> None:
    assert exists(name), f'{name} is in nbs/notation.ipynb, but not in the package'


def test_names_that_do_not_exist_are_noticed() -> None:
    for name in ('soften(heat)', 'Domain.colour', 'nothing_of_the_kind'):
        assert not exists(name)


def test_the_table_covers_the_parts_of_the_loop() -> None:
    assert len(NAMES) > 60
    for row in rows():
        assert len(row) == 5, row


def test_links_lead_to_chapters() -> None:
    links = re.findall(r'\]\(([\w/]+\.ipynb)\)', page())
    assert len(links) > 60
    for link in set(links):
        assert (PAGE.parent / link).is_file(), link


@pytest.mark.parametrize('word', ['**batch**', '**round**', '**step**', '**pool**'])
def test_the_glossary_has_the_words_of_the_loop(word: str) -> None:
    assert f'| {word} |' in page()
