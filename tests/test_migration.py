"""Results of finished runs have the present names of settings.

Their numbers are those that were measured: nobody touched them.
"""

import dataclasses
import importlib.util
import json

import pytest
from conftest import ROOT

from dfkd_nb.lab.recipes import task_settings

RESULTS = [
    path
    for path in sorted((ROOT / 'results').glob('*/*/result.json'))
    if 'task' in json.loads(path.read_text(encoding='utf-8'))
]


@pytest.fixture(scope='module')
def tool():
    path = ROOT / 'tools' / 'migrate_results.py'
    spec = importlib.util.spec_from_file_location('migrate_results', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_further_pass_changes_nothing(tool):
    assert RESULTS
    for path in RESULTS:
        for name, convert in (
            ('result.json', tool.new_result),
            ('recipe.toml', tool.new_recipe),
            ('history.csv', tool.new_history),
        ):
            text = (path.parent / name).read_text(encoding='utf-8')
            assert convert(text) == text, path.parent / name


def test_every_setting_of_a_result_is_one_of_its_task():
    for path in RESULTS:
        document = json.loads(path.read_text(encoding='utf-8'))
        fields = {f.name for f in dataclasses.fields(task_settings(document['task'], ''))}
        assert set(document['settings']) <= fields, path


def test_names_change_and_numbers_do_not(tool):
    old = {
        'task': 'continual',
        'settings': {'falls': 'fifths', 'schedule': 'cosine', 'methods': 'lwf, lwf-mc'},
        'numbers': {'steps': {'lwf': [{'crossed': [[0.5, 0.25]]}]}, 'share': 0.75},
        'seconds': {'total': 1.5},
        'environment': {},
    }
    new = json.loads(tool.new_result(json.dumps(old)))
    assert new['settings'] == {
        'schedule': 'step',
        'old_schedule': 'cosine',
        'methods': ['lwf', 'lwf-mc'],
    }
    assert new['numbers'] == {
        'steps': {'lwf': [{'confusion': [[0.5, 0.25]]}]},
        'fraction': 0.75,
    }
    text = json.dumps(new, indent=1, ensure_ascii=False) + '\n'
    assert tool.new_result(text) == text
