"""The names that `dfkd_nb` hands out: imported when used, described in full, their examples
run.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import re
import subprocess
import sys
import typing
from types import ModuleType
from typing import Any

import pytest

import dfkd_nb

NAMES = [name for name in dfkd_nb.__all__ if not name.isupper()]
# values and errors explain themselves; interfaces have nothing to run
NO_EXAMPLE = {'DFKDError', 'DFKDWarning', 'ImageSource', 'Pool', 'Sampler', 'Synthesizer'}
# where there is no paper behind it
PAPERS = {
    'ContrastiveSynthesizer',
    'DeepInversion',
    'Distiller',
    'MetaSynthesizer',
    'ReplayPool',
    'add_classes',
    'build_method',
    'deepinversion_preset',
    'distill',
    'distillation_loss',
    'dream_distillation',
    'ssd_kd',
}


def python(code: str) -> str:
    "What a fresh Python prints."
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def documented(name: str) -> str:
    return inspect.getdoc(getattr(dfkd_nb, name)) or ''


def missing_paragraphs(name: str) -> list[str]:
    "What the docstring of one of the names should have, and has not."
    text = documented(name)
    if name in NO_EXAMPLE:
        return [] if text else ['a docstring']
    missing = []
    if len(text.splitlines()[0] if text else '') not in range(1, 93):
        missing.append('a summary of one line')
    if 'Raises:' not in text and not re.search(r'\bNo .* error', text, re.S):
        missing.append('Raises')
    if name in PAPERS and 'Source:' not in text:
        missing.append('Source')
    if '>>>' not in text:
        missing.append('Example')
    return missing


def test_the_package_loads_nothing_before_it_is_used() -> None:
    heavy = ('torch', 'numpy', 'PIL', 'tqdm', 'matplotlib', 'dfkd_nb.toolbox')
    code = f'import sys, dfkd_nb; print([m for m in {heavy} if m in sys.modules])'
    assert python(code) == '[]\n'


def test_errors_need_no_pytorch() -> None:
    code = 'import sys; from dfkd_nb import DFKDError; print("torch" in sys.modules)'
    assert python(code) == 'False\n'


def test_every_name_is_there_and_listed() -> None:
    for name in dfkd_nb.__all__:
        assert name in dir(dfkd_nb)
        value = getattr(dfkd_nb, name)
        home = getattr(value, '__module__', 'dfkd_nb.')
        assert home.startswith('dfkd_nb.'), (name, home)
        assert (
            getattr(importlib.import_module(f'dfkd_nb.{dfkd_nb._HOME[name]}'), name)
            is value
        )


def test_type_checkers_see_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typing, 'TYPE_CHECKING', True)
    copy = ModuleType('copy_of_dfkd_nb')
    with open(dfkd_nb.__file__, encoding='utf-8') as file:
        exec(compile(file.read(), dfkd_nb.__file__, 'exec'), copy.__dict__)
    assert all(copy.__dict__[name] is getattr(dfkd_nb, name) for name in dfkd_nb.__all__)
    assert '__getattr__' not in copy.__dict__  # so that a misspelt name is an error


@pytest.mark.parametrize(
    'wrong, right', [('DeepInversoin', 'DeepInversion'), ('load_teachers', 'load_teacher')]
)
def test_a_misspelt_name_tells_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(AttributeError, match=f"no name '{wrong}', did you mean '{right}'"):
        getattr(dfkd_nb, wrong)
    assert not hasattr(dfkd_nb, wrong)


@pytest.mark.parametrize('name', [name for name in NAMES if '>>>' in documented(name)])
def test_example_runs(name: str) -> None:
    text = documented(name)
    examples: dict[str, Any] = {}
    test = doctest.DocTestParser().get_doctest(text, examples, name, None, None)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed
    assert not failed, printed.getvalue()


def test_every_entry_point_is_described_in_full() -> None:
    missing = {name: words for name in NAMES if (words := missing_paragraphs(name))}
    listing = '\n'.join(f'{name}: {", ".join(words)}' for name, words in missing.items())
    assert not missing, f'paragraphs are missing in {len(missing)} docstrings:\n{listing}'


def test_no_example_is_too_long_to_read() -> None:
    for name in NAMES:
        lines = re.findall(r'^ *(?:>>>|\.\.\.) .*$', documented(name), re.MULTILINE)
        assert len(lines) <= 24, name
        assert all(len(line) <= 88 for line in lines), name
