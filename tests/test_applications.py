"""Applications as tasks: images by the name of their maker, runs that end, and runs that
are stopped and go on to the same bits.
"""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import each

from dfkd_nb.lab.recipes import Recipe
from dfkd_nb.lab.results import read_history
from dfkd_nb.lab.runs import Run
from dfkd_nb.lab.tasks.sources import application_images
from dfkd_nb.toolbox.core import load_tensors
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.datasets import load_data
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDError, RunStopped
from dfkd_nb.toolbox.teachers import load_teacher

SMALL: dict[str, object] = {'evaluations': 1, 'picture': 2, 'batch_size': 16}
DIGITS = SMALL | {'teacher': 'run:digits-teacher', 'test_limit': 60}
PRUNED = {'images': 40, 'importance_images': 40, 'timed_networks': 0}
PARTS = {
    'old_data': 'digits:0-4',
    'test_data': 'digits:0-4',
    'new_data': 'digits:5-9',
    'new_tests': 'digits:5-9',
}
TASKS: dict[str, tuple[str, dict[str, object]]] = {
    'pruning': (
        'digits-pruning',
        DIGITS
        | PRUNED
        | {
            'fractions': '0.3',
            'steps': 6,
            'sources': {'noise': 'noise', 'real': 'digits'},
        },
    ),
    'pruning while learning': (
        'digits-pruning',
        DIGITS
        | PRUNED
        | {
            'fractions': '0.2',
            'steps': 8,
            'sources': {'noise': 'noise'},
            'removal_interval': 2,
        },
    ),
    'continual': (
        'cifar10-continual-split',
        SMALL
        | PARTS
        | {
            'old_model': 'digits-net',
            'old_epochs': 1.0,
            'old_limit': 100,
            'methods': 'lwf-mc, deepinversion',
        }
        | {
            'images': 20,
            'synthesis_steps': 3,
            'half_size_steps': 0,
            'synthesis_batch_size': 20,
            'steps': 6,
            'binary_tuning_steps': 2,
        },
    ),
    'quantization': (
        'digits-quantization',
        DIGITS | {'images': 40, 'images_from': 'noise, none', 'bits': '4', 'steps': 50},
    ),
    'calibration': (
        'cifar10-calibration',
        DIGITS
        | {
            'test_data': 'digits',
            'real_data': 'digits',
            'rows': 'noise/min-max, zeroq, intraq, real, dfq, batchnorm/per-tensor',
            'widths': 'W8A8, W4A4',
            'images': 20,
            'synthesis_steps': 6,
            'synthesis_batch_size': 10,
            'synthesis_flip': False,
            'steps': 30,
        },
    ),
    'distilled-data': (
        'cifar10-distilled-data',
        DIGITS
        | {
            'test_data': 'digits',
            'student': 'digits-net',
            'images_from': 'crops, real',
            'real_data': 'digits',
            'images_per_class': '1, 2',
            'recovery_steps': 6,
            'views': 3,
            'epochs': 8,
            'flip': False,
            'precision': 'float32',
            'synthesis_precision': 'float32',
        },
    ),
    'segmentation': (
        'scenes-segmentation',
        SMALL
        | {
            'limit': 40,
            'test_limit': 10,
            'sources': 'noise, dreams',
            'teacher_steps': 4,
            'steps': 6,
        }
        | {
            'rounds': 3,
            'warmup_rounds': 1,
            'synthesis_steps': 2,
            'synthesis_batch_size': 8,
            'generator_width': 4,
            'latent_size': 8,
        },
    ),
}


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder of runs with a quickly trained teacher of digits, and the images of a run."
    out = tmp_path_factory.mktemp('runs')
    Run(
        Recipe.load('digits-teacher'),
        'quick',
        {'epochs': 1.0, 'evaluations': 1},
        out=out,
        device='cpu',
        quiet=True,
    ).start()
    digits = load_data('digits', 'train', limit=40)
    assert isinstance(digits, ImageSet)
    digits.save(out / 'digits-transfer-deepinversion/quick/images.safetensors')
    return out


def some_run(root: Path, seed: int = 0) -> SimpleNamespace:
    "What `application_images` asks of a run."
    return SimpleNamespace(
        root=root,
        scale='quick',
        device=torch.device('cpu'),
        settings=SimpleNamespace(seed=seed),
    )


def test_images_by_run_by_name_and_noise(root: Path) -> None:
    teacher = load_teacher('cifar10-resnet20')
    of_run = application_images(
        some_run(root), teacher, 'run:digits-transfer-deepinversion', 8
    )
    assert of_run.images.shape == (8, 3, 32, 32) and of_run.images.dtype == torch.uint8, (
        'grey 8 x 8 becomes what the teacher takes'
    )
    assert torch.equal(of_run.labels, teacher.predict(of_run.images).argmax(1)), (
        'foreign classes: the teacher says what it sees'
    )
    noise, again, other = (
        application_images(some_run(root, seed), teacher, 'noise', 8) for seed in (0, 0, 1)
    )
    assert torch.equal(noise.images, again.images) and not torch.equal(
        noise.images, other.images
    )
    assert noise.images.float().std() > 70, 'bytes of noise spread evenly'


def test_images_keep_the_labels_of_the_teachers_classes(root: Path) -> None:
    made = SimpleNamespace(domain=DOMAINS['digits'])  # nobody is asked for labels
    found = application_images(some_run(root), made, 'digits', 12)
    digits = load_data('digits', 'train', limit=12)
    assert torch.equal(found.labels, digits.labels) and torch.equal(
        found.images, digits.images
    )


@each(
    ('source', 'count', 'message'),
    [
        ('run:digits-dream', 4, 'make them with `dfkd run digits-dream --scale quick`'),
        (
            'run:digits-transfer-deepinversion',
            41,
            'holds 40 images: set images to that or less',
        ),
        ('digits', 5000, 'has 1297 images: set images to that or less'),
        ('no-such-data', 4, 'unknown data set'),
    ],
)
def test_missing_images_are_named(
    root: Path, source: str, count: int, message: str
) -> None:
    with pytest.raises(DFKDError, match=message):
        application_images(
            some_run(root), SimpleNamespace(domain=DOMAINS['digits']), source, count
        )


def untimed(numbers: object) -> object:
    "Numbers without what a stopwatch said."
    if isinstance(numbers, list):
        return [untimed(part) for part in numbers]
    if not isinstance(numbers, dict):
        return numbers
    return {
        key: untimed(part)
        for key, part in numbers.items()
        if not any(word in key for word in ('latency', 'milliseconds', 'seconds'))
    }


def timed_once(call: Callable[[], object], *_: object) -> float:
    """In place of `shortest_call`, which takes a tenth of a second for each network.

    That is not needed to see whether a run goes on.
    """
    call()
    return 1.0


def check_pruning(run: Run, numbers: dict) -> None:
    # not above: `elsewhere.py` imports this file first
    from dfkd_nb.applications.pruning import load_pruned

    rows = numbers['rows']
    assert [row['source'] for row in rows] == ['none', *run.settings.sources]
    assert all(row['filters_removed'] >= run.settings.fractions[0] for row in rows)
    accuracy = {row['source']: row['accuracy'] for row in rows}
    if accuracy.get('real', 0.0) > accuracy['none']:
        gain = accuracy['noise'] - accuracy['none']
        assert rows[1]['fraction_recovered'] == pytest.approx(
            gain / (accuracy['real'] - accuracy['none'])
        )
    network, about = load_pruned(next(run.folder.glob('student-*-error-noise.safetensors')))
    size = sum(p.numel() for p in network.parameters())
    assert (
        size == rows[-1]['parameters'] < numbers['teacher_parameters']
        and about['model'] == 'digits-net'
    )


def check_quantization(run: Run, numbers: dict) -> None:
    rows = {row['source']: row for row in numbers['rows']}
    assert (
        'finetuned' in rows['noise']
        and 'finetuned' not in rows['none']
        and len(rows['noise']['layers']) == 4
    )
    assert (run.folder / '4-bits.safetensors').stat().st_size == numbers['bytes_4']


def check_calibration_run(run: Run, numbers: dict) -> None:
    rows = {(row['row'], row['width']): row for row in numbers['rows']}
    assert len(rows) == 12 and rows['zeroq', 'W4A4']['activation_bits'] == 4
    tuned = {key for key, row in rows.items() if 'finetuned' in row}
    # plain rows with images, at the width that the recipe names
    assert tuned == {('zeroq', 'W4A4'), ('intraq', 'W4A4'), ('real', 'W4A4')}
    images = ImageSet.load(run.folder / 'intraq.safetensors')
    assert images.labels is not None and images.labels.tolist() == [*range(10)] * 2
    assert set(numbers['sources']) == {'noise', 'zeroq', 'intraq', 'real'}
    assert 0 <= numbers['sources']['intraq']['class_spread'] <= 2


CHECKS = {
    'calibration': check_calibration_run,
    'pruning': check_pruning,
    'pruning while learning': check_pruning,
    'quantization': check_quantization,
}


@pytest.mark.parametrize('name', TASKS)
def test_stopped_and_resumed_and_still_the_same_bits(
    root: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('dfkd_nb.applications.latency.shortest_call', timed_once)
    recipe, changes = TASKS[name]
    where = {'device': 'cpu', 'quiet': True}
    whole = Run(Recipe.load(recipe), 'quick', changes, out=tmp_path / 'whole', **where)
    for folder in ('whole', 'broken'):
        (tmp_path / folder).mkdir()
        for needed in ('digits-teacher', 'digits-transfer-deepinversion'):
            (tmp_path / folder / needed).symlink_to(root / needed)
    expected = whole.start()
    stops = 0
    for minutes in (*[1e-6] * 12, 2e-3, math.inf):
        broken = Run(
            Recipe.load(recipe), 'quick', changes, out=tmp_path / 'broken', **where
        )
        try:
            result = broken.start(resume=True, max_minutes=minutes)
            break
        except RunStopped:
            stops += 1
    assert stops > 1 and untimed(result.numbers) == untimed(expected.numbers)
    files = sorted(path.name for path in whole.folder.glob('*.safetensors'))
    assert (
        files == sorted(path.name for path in broken.folder.glob('*.safetensors')) and files
    )
    for file in files:
        first, second = (load_tensors(run.folder / file)[0] for run in (whole, broken))
        assert first.keys() == second.keys() and all(
            first[k].equal(second[k]) for k in first
        ), file
    assert len(read_history(whole.folder / 'history.csv')) == len(
        read_history(broken.folder / 'history.csv')
    )
    assert (whole.folder / 'model-card.md').is_file()
    if name in CHECKS:
        CHECKS[name](whole, expected.numbers)
