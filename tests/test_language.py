"""The book speaks the field's language: no metaphors in place of terms.

Each phrase of the list stood in an earlier version and has a plain equivalent.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# a pattern, and what to write
BANNED = {
    r'paint(s|ed|ing|er)?': 'generate, make',
    r'pupils?': 'student',
    r'lessons?': 'update, example',
    r'diar(y|ies)': 'running statistics',
    r'islands?': 'group, cluster',
    r'purse|tolls?|the dearest': 'cost, the most expensive',
    r'verdicts?|jury|umpire|courtroom': 'prediction, metric',
    r'opinions?': 'prediction',
    r'gossip|whispers?|hungry|loudest': 'name the quantity',
    r'the wish\.': 'Motivation.',
    r'what we now know': 'Summary',
}
PAGES = [
    *(
        p
        for p in sorted((ROOT / 'nbs').rglob('*.ipynb'))
        if '.ipynb_checkpoints' not in p.parts
    ),
    ROOT / 'README.md',
]


def prose(path: Path) -> list[tuple[str, str]]:
    "Cells of text by their ids, code and links left out."
    if path.suffix == '.md':
        cells = [('', path.read_text(encoding='utf-8'))]
    else:
        notebook = json.loads(path.read_text(encoding='utf-8'))
        cells = [
            (cell['id'], ''.join(cell['source']))
            for cell in notebook['cells']
            if cell['cell_type'] == 'markdown'
        ]
    hidden = r'```.*?```|`[^`]*`|\]\([^)]*\)'
    return [(name, re.sub(hidden, ' ', text, flags=re.S)) for name, text in cells]


def metaphors(text: str) -> list[str]:
    "Each banned phrase with its equivalent."
    return [
        f"'{found.group(0)}' (write: {plain})"
        for pattern, plain in BANNED.items()
        for found in re.finditer(rf'(?<![\w-])({pattern})(?!\w)', text, re.I)
    ]


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_terms_not_metaphors(page: Path) -> None:
    found = [f'cell {name}: {m}' for name, text in prose(page) for m in metaphors(text)]
    assert not found, '\n'.join(found)


def test_the_list_is_read() -> None:
    assert metaphors('A pupil paints.') == [
        "'paints' (write: generate, make)",
        "'pupil' (write: student)",
    ]
    assert not metaphors('a student of repainted, pupillary things')
