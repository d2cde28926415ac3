"""Every notebook runs from top to bottom.

One case each, in a process of its own, at quick scale, with a time limit. nbdev's rules
hold: cells marked `#| eval: false`, `#| slow` or `#| gpu` are left out, and outputs are not
written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from notebook_server import LIMIT, ROOT

if TYPE_CHECKING:
    from conftest import Notebooks

NOTEBOOKS = sorted(
    str(path.relative_to(ROOT / 'nbs'))
    for path in (ROOT / 'nbs').rglob('*.ipynb')
    if not any(part[0] in '._' for part in path.relative_to(ROOT).parts)
)


@pytest.mark.notebook
@pytest.mark.timeout(LIMIT * max(1, len(NOTEBOOKS)))
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebook(
    name: str, outcomes: Notebooks, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = outcomes.outcome(name)
    with capsys.disabled():
        print(f' {outcome.seconds:.0f} s ', end='', flush=True)
    if not outcome.passed:
        pytest.fail(f'{name}: {outcome.text}', pytrace=False)
