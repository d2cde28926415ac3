"""CONTRIBUTING.md, CITATION.cff and CHANGELOG.md: examples run, the rest can be read."""

import re
import sys
import types
from pathlib import Path

import yaml

from dfkd_nb import __version__
from dfkd_nb.lab.recipes import Recipe

ROOT = Path(__file__).resolve().parents[1]


def blocks(language: str) -> list[str]:
    "The fenced blocks of CONTRIBUTING.md in a language."
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.M | re.S)


def test_the_examples_run_one_after_another(monkeypatch):
    from dfkd_nb.generators import methods

    for table in ('SYNTHESIZERS', 'POOLS'):  # what the examples register is taken back
        monkeypatch.setattr(methods, table, dict(getattr(methods, table)))
    module = types.ModuleType('contributing')
    monkeypatch.setitem(sys.modules, 'contributing', module)
    assert len(blocks('python')) == 4
    for block in blocks('python'):
        exec(compile(block, 'CONTRIBUTING.md', 'exec'), module.__dict__)


def test_the_recipe_is_one():
    (text,) = blocks('toml')
    assert Recipe.parse(text, 'my-recipe').resolve('quick').images == 200


def test_targets_of_make_exist():
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    wanted = set(re.findall(r'(?:^|`)make ([a-z-]+)', text, re.M))
    assert len(wanted) > 8
    assert wanted <= set(re.findall(r'^([a-z-]+):', makefile, re.M))


def test_the_citation_is_of_this_version():
    about = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert about['cff-version'] == '1.2.0' and about['version'] == __version__
    assert {'message', 'title', 'authors', 'license', 'type'} <= about.keys()
    assert about['authors'] == [{'name': 'The dfkd_nb authors'}]


def test_the_changelog_has_this_version():
    text = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.search(rf'^## \[(Unreleased|{re.escape(__version__)})\]', text, re.M)
