"""Bring results of finished runs to the present names of settings.

    python tools/migrate_results.py [FOLDER ...]

Only names change (settings, keys of results, columns of histories) and words that settings
choose from; lists that were words with commas become lists. No measured number does: that
is checked for every file. A second pass changes nothing.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dfkd_nb.lab.settings import toml_value

Convert = Callable[[Any], Any]


def words(value: Any) -> Any:
    "'a, b' as a list; what is a list already stays."
    if not isinstance(value, str):
        return value
    return [word.strip() for word in value.split(',') if word.strip()]


def numbers_in(kind: type) -> Convert:
    "'8, 4' as a list of numbers."
    return lambda value: [kind(word) for word in words(value)]


def table(value: Any) -> Any:
    "'a=x, b=y' as a table."
    if not isinstance(value, str):
        return value
    pairs = (word.split('=', 1) for word in words(value))
    return {name.strip(): entry.strip() for name, entry in pairs}


def chosen(pairs: dict[str, str]) -> Convert:
    "Old words of a choice to new ones."
    return lambda value: pairs.get(value, value)


SYNTHESIS = {
    'single_share': 'single_fraction',
    'measured_images': 'statistics_images',
    'measured_data': 'statistics_data',
    'goal_weight': 'embedding_weight',
}
# of each task: old names of settings to new ones
NAMES: dict[str, dict[str, str]] = {
    'dream': SYNTHESIS,
    'transfer': (
        SYNTHESIS
        | {
            'updates': 'steps',
            'updates_between_rounds': 'steps_per_round',
            'student_start': 'student_init',
        }
    ),
    'generative': {
        'updates_per_round': 'steps_per_round',
        'student_start': 'student_init',
        'reuse': 'init',
        'meta': 'meta_update',
    },
    'pruning': {
        'shares': 'fractions',
        'measure': 'fraction_of',
        'table': 'latency_table',
        'table_step': 'latency_table_step',
        'judged_images': 'importance_images',
        'per_removal': 'filters_per_removal',
        'every': 'removal_interval',
        'labelled': 'labelled_data',
        'updates': 'steps',
    },
    'continual': (
        SYNTHESIS
        | {
            'rename': 'new_class_prefix',
            'updates': 'steps',
            'falls': 'schedule',
            'schedule': 'old_schedule',
            'rows': 'row_init',
            'gradient_clip': 'max_grad_norm',
            'binary_updates': 'binary_tuning_steps',
            'binary_tuning_rate': 'binary_tuning_learning_rate',
            'binary_decay': 'row_init_decay',
            'old_network': 'old_model',
        }
    ),
    'quantization': {
        'calibration': 'calibration_images',
        'mended_bits': 'finetuned_bits',
        'updates': 'steps',
        'looked_at': 'diagnosed_images',
        'latency_batch': 'latency_batch_size',
    },
    'segmentation': {
        'teacher_updates': 'teacher_steps',
        'arms': 'sources',
        'updates': 'steps',
        'layouts': 'layout_images',
    },
}
ranking = chosen({'error and latency': 'error-and-latency'})
in_turn = chosen({'in turn': 'in-turn'})
student_init = chosen({'random weights': 'random', "teacher's blocks": 'teacher-blocks'})
# of each task and new name: old values to new ones
VALUES: dict[tuple[str, str], Convert] = {
    ('dream', 'classes'): in_turn,
    ('transfer', 'classes'): in_turn,
    ('continual', 'classes'): in_turn,
    ('dream', 'verifiers'): words,
    ('generative', 'init'): chosen({'continue': 'sequential', 'restart': 'scratch'}),
    ('generative', 'meta_update'): chosen({'last': 'fomaml', 'sum': 'fomaml-sum'}),
    ('generative', 'labels'): chosen({'answers': 'teacher', 'wishes': 'sampled'}),
    ('pruning', 'fractions'): numbers_in(float),
    ('pruning', 'sources'): table,
    ('pruning', 'rankings'): lambda value: [ranking(word) for word in words(value)],
    ('pruning', 'criterion'): chosen(
        {'labels': 'cross-entropy', 'answers': 'fisher', 'divergence': 'kl'}
    ),
    ('continual', 'methods'): words,
    ('continual', 'new_data'): words,
    ('continual', 'new_tests'): words,
    ('continual', 'dreams_from'): table,
    ('continual', 'schedule'): chosen({'fifths': 'step'}),
    ('quantization', 'bits'): numbers_in(int),
    ('quantization', 'images_from'): words,
    ('segmentation', 'sources'): words,
    ('transfer', 'student_init'): student_init,
    ('generative', 'student_init'): student_init,
}
# of measured numbers, at any depth
NUMBERS = {
    'updates': 'steps',
    'synthesis_updates': 'synthesis_steps',
    'goal_distance': 'embedding_distance',
    'share': 'fraction',
    'share_recovered': 'fraction_recovered',
    'mended': 'finetuned',
    'crossed': 'confusion',
}
COLUMNS = {'goal': 'embedding'}
PHASES = {'prices': 'costs'}


def new_settings(task: str, settings: dict[str, Any]) -> dict[str, Any]:
    "Settings by their present names, with their present words."
    names = NAMES.get(task, {})
    # 'falls' became 'schedule', and 'schedule' 'old_schedule': only together
    if 'falls' not in settings:
        names = {old: new for old, new in names.items() if old not in ('schedule', 'falls')}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        key = names.get(key, key)
        convert = VALUES.get((task, key))
        found[key] = value if convert is None else convert(value)
    return found


def new_number_name(key: str) -> str:
    "The present name of a measured number."
    if key in NUMBERS:
        return NUMBERS[key]
    if key.endswith('_updates'):
        return key.removesuffix('updates') + 'steps'
    if key.startswith('mended_'):
        return 'finetuned_' + key.removeprefix('mended_')
    return key


def new_numbers(value: Any) -> Any:
    "Measured numbers by their present names."
    if isinstance(value, dict):
        return {
            new_number_name(k): ranking(v) if k == 'ranking' else new_numbers(v)
            for k, v in value.items()
        }
    return [new_numbers(v) for v in value] if isinstance(value, list) else value


def leaves(value: Any) -> Iterator[Any]:
    "All numbers in a value."
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from leaves(entry)
    elif isinstance(value, (int, float)):
        yield repr(value)


def new_result(text: str) -> str:
    "The text of a result.json."
    document = json.loads(text)
    task = document['task']
    after = document | {
        'settings': new_settings(task, document['settings']),
        'numbers': new_numbers(document['numbers']),
        'seconds': {PHASES.get(k, k): v for k, v in document['seconds'].items()},
        'changed': [
            NAMES.get(task, {}).get(key, key) for key in document.get('changed', [])
        ],
    }
    if 'changed' not in document:
        del after['changed']
    for part in ('numbers', 'seconds', 'environment'):
        assert Counter(leaves(document[part])) == Counter(leaves(after[part]))
    return json.dumps(after, indent=1, ensure_ascii=False) + '\n'


def new_recipe(text: str) -> str:
    "The text of a run's recipe.toml."
    document = tomllib.loads(text)
    scale, settings = next((k, v) for k, v in document.items() if isinstance(v, dict))
    head = [f'{k} = {toml_value(v)}' for k, v in document.items() if k != scale]
    after = new_settings(document['task'], settings)
    lines = [f'{k} = {toml_value(v)}' for k, v in after.items()]
    return '\n'.join([*head, '', f'[{scale}]', *lines]) + '\n'


def new_history(text: str) -> str:
    "The text of a history.csv: the first line alone changes."
    first, newline, rest = text.partition('\n')
    columns = next(csv.reader(io.StringIO(first)))
    return ','.join(COLUMNS.get(c, c) for c in columns) + newline + rest


def migrate(folder: Path) -> list[Path]:
    "All runs under a folder; returns the files that changed."
    changed = []
    for path in sorted(folder.glob('*/*/result.json')):
        if 'task' not in json.loads(path.read_text(encoding='utf-8')):
            continue
        for name, convert in (
            ('recipe.toml', new_recipe),
            ('history.csv', new_history),
            ('result.json', new_result),
        ):
            file = path.parent / name
            if not file.is_file():
                continue
            before = file.read_text(encoding='utf-8')
            after = convert(before)
            if after != before:
                file.write_text(after, encoding='utf-8')
                changed.append(file)
    return changed


if __name__ == '__main__':
    for place in sys.argv[1:] or ['results']:
        print(f'{place}: {len(migrate(Path(place)))} files changed')
