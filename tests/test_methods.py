"""The comparison: recipes composed from two tables, the generative task, and what a kill
leaves of each method.
"""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import each

from dfkd_nb.dreams.inversion import DeepInversion
from dfkd_nb.dreams.inversion_settings import inversion_keywords
from dfkd_nb.foundations.method_tables import method_head, method_tables
from dfkd_nb.generators.methods import distiller_keywords, read_method
from dfkd_nb.lab.recipes import SHIPPED, Recipe, compared, compose, find_task, recipe_names
from dfkd_nb.lab.results import Result, read_history
from dfkd_nb.lab.runs import Run
from dfkd_nb.lab.tasks.common import open_teacher
from dfkd_nb.toolbox.core import load_tensors
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.errors import DFKDError, RunStopped

PAIRS, METHODS = method_tables()
NAMES = [name for name in METHODS if not name.startswith('common-')]
# those of every scale
GENERATIVE = sorted(
    name
    for name in NAMES
    if method_head(name)['task'] == 'generative' and 'scales' not in METHODS[name]
)
SAME = {'fast-2', 'fast-10', 'ssd-kd-100'}  # differ in numbers from others that are here
DIFFERENT = [
    *(name for name in GENERATIVE if name not in SAME),
    'deepinversion',
    'adaptive',
    'vanilla',
    'scratch',
]
TINY: dict[str, object] = {'picture': 2, 'evaluations': 1, 'test_limit': 100}
TINY |= {
    'rounds': 4,
    'warmup_rounds': 1,
    'steps_per_round': 3,
    'synthesis_batch_size': 16,
    'batch_size': 16,
}


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder of runs with a quickly trained teacher of digits."
    out = tmp_path_factory.mktemp('runs')
    Run(
        Recipe.load('digits-teacher'),
        'quick',
        {'epochs': 2.0, 'evaluations': 1},
        out=out,
        device='cpu',
        quiet=True,
    ).start()
    return out


def tiny(name: str) -> dict[str, object]:
    "Settings that make a recipe end in a second or two."
    if method_head(name)['task'] == 'generative':
        extra = {'pool_size': 40} if 'ssd' in name else {}
        return (
            TINY
            | extra
            | ({'warmup_rounds': 0} if name.startswith('zskt') else {})
            | {'synthesis_steps': 2}
        )
    changes: dict[str, object] = {
        'picture': 2,
        'evaluations': 1,
        'test_limit': 100,
        'steps': 8,
        'batch_size': 16,
        'images': 32,
    }
    if name == 'adaptive':
        changes |= {'rounds': 2, 'steps_per_round': 4}
    return changes | (
        {'synthesis_batch_size': 16, 'synthesis_steps': 6}
        if name in ('adaptive', 'deepinversion')
        else {}
    )


def test_every_combination_is_a_recipe() -> None:
    names = set(compared())
    # those of one scale belong to the pairs that have it
    single = [name for name, method in METHODS.items() if 'scales' in method]
    hourly = [name for name, pair in PAIRS.items() if 'hour' in pair]
    assert len(names) == len(PAIRS) * (len(NAMES) - len(single)) + len(hourly) * len(single)
    # of the papers, and those that came later
    assert len(NAMES) - len(single) == 13 + 6
    assert names <= set(recipe_names())
    for name in names:
        recipe = Recipe.load(name)
        for scale in recipe.scales:
            settings = recipe.resolve(scale)
            assert f'{settings.pair}-{settings.method}' == name


def test_the_papers_pairs_and_methods_are_there() -> None:
    data = ('cifar10', 'cifar100')
    pairs = (
        'resnet34-resnet18',
        'vgg11-resnet18',
        'wrn40-2-wrn16-1',
        'wrn40-2-wrn40-1',
        'wrn40-2-wrn16-2',
    )
    assert {f'{d}-{p}' for d in data for p in pairs} < set(PAIRS)
    for d in data:
        for p in pairs:
            settings = Recipe.load(f'{d}-{p}-ssd-kd-10').resolve('full')
            assert (
                settings.teacher.startswith(f'run:{d}-teacher-') and settings.test_data == d
            )
            assert (
                Recipe.load(settings.teacher.removeprefix('run:')).resolve('full').data == d
            )


def test_settings_of_the_public_code() -> None:
    "A few numbers of the field's code, as they come out of the tables."
    fast = Recipe.load('cifar10-wrn40-2-wrn16-1-fast-5').resolve('full')
    assert (
        fast.synthesis_steps,
        fast.synthesis_learning_rate,
        fast.latent_learning_rate,
    ) == (5, 3e-3, 0.01)
    assert (
        fast.class_weight,
        fast.feature_weight,
        fast.adversarial_weight,
        fast.feature_momentum,
    ) == (0.4, 10.0, 1.1, 0.1)
    assert fast.momentum == 0.9  # the student's
    assert (fast.rounds - fast.warmup_rounds) * fast.steps_per_round == 80_000
    assert (
        Recipe.load('cifar10-resnet34-resnet18-fast-5').resolve('full').adversarial_weight
        == 1.33
    )
    assert (
        Recipe.load('cifar10-wrn40-2-wrn16-1-ssd-kd-10').resolve('full').pool_size == 5000
    )


@pytest.mark.parametrize('scale', ['quick', 'full'])
@pytest.mark.parametrize('name', ['deepinversion', 'adaptive'])
def test_a_row_says_what_its_recipe_says(name: str, scale: str) -> None:
    pair = {'quick': 'cifar10-resnet20-resnet14', 'full': 'cifar10-resnet34-resnet18'}
    recipe = vars(Recipe.load(f'{pair[scale]}-{name}').resolve(scale))
    settings, row = read_method(name, scale)
    own = {k: v.default for k, v in inspect.signature(DeepInversion).parameters.items()}
    asked = inversion_keywords(recipe, (32, 32))
    assert own | inversion_keywords(row, (32, 32)) == own | asked
    loop = 'rounds', 'images', 'competition_weight', 'competition_temperature', 'steps'
    device = torch.device('cpu')
    assert {k: getattr(settings, k) for k in loop} == {k: recipe[k] for k in loop}
    assert distiller_keywords(settings, device) == distiller_keywords(
        read_method(recipe | {'synthesizer': 'inversion'})[0], device
    )


def test_a_wrong_entry_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PAIRS['digits'], 'generative', {'latnt_size': 3})
    with pytest.raises(
        DFKDError, match="unknown key 'latnt_size', did you mean 'latent_size'"
    ):
        Recipe.check(compose('digits-dafl'), 'digits-dafl')
    with pytest.raises(
        DFKDError, match="unknown task 'generativ', did you mean 'generative'"
    ):
        find_task('generativ', 'here')


@pytest.mark.parametrize('pair', [pair for pair in PAIRS if 'quick' in PAIRS[pair]])
def test_one_budget_for_all_methods(pair: str) -> None:
    """Quick runs: as many updates of synthesis and of the student for each, as many images
    in each.
    """
    found = {
        name: Recipe.load(f'{pair}-{name}').resolve('quick')
        for name in NAMES
        if 'scales' not in METHODS[name]
    }
    generative = [found.pop(name) for name in GENERATIVE]
    assert {s.rounds * s.synthesis_steps for s in generative} == {80}
    assert {(s.rounds - s.warmup_rounds) * s.steps_per_round for s in generative} == {120}
    assert {(s.synthesis_batch_size, s.batch_size) for s in generative} == {(64, 64)}
    assert {(s.steps, s.batch_size) for s in found.values()} == {(120, 64)}
    assert {
        found[name].images * found[name].synthesis_steps
        for name in ('deepinversion', 'adaptive')
    } == {80 * 64}


@pytest.mark.parametrize('name', DIFFERENT)
def test_stopped_and_resumed_and_still_the_same_bits(
    root: Path, tmp_path: Path, name: str
) -> None:
    recipe, changes = Recipe.load(f'digits-{name}'), tiny(name)
    whole = Run(recipe, 'quick', changes, out=root, device='cpu', quiet=True)
    expected = whole.start()
    (tmp_path / 'digits-teacher').symlink_to(root / 'digits-teacher')
    broken = Run(recipe, 'quick', changes, out=tmp_path, device='cpu', quiet=True)
    stops = 0
    # first at every opportunity, in the middle of a batch or a round
    for minutes in (1e-6, 1e-6, 1e-6, 1e-3, math.inf):
        broken = Run(recipe, 'quick', changes, out=tmp_path, device='cpu', quiet=True)
        try:
            result = broken.start(resume=True, max_minutes=minutes)
        except RunStopped:
            stops += 1
    assert stops > 0 and result.numbers == expected.numbers
    tables = [read_history(run.folder / 'history.csv') for run in (whole, broken)]
    rows = [
        [{k: v for k, v in row.items() if 'seconds' not in k} for row in table]
        for table in tables
    ]
    assert rows[0] == rows[1]
    first, second = (
        load_tensors(run.folder / 'weights.safetensors')[0] for run in (whole, broken)
    )
    assert all(first[k].equal(second[k]) for k in first)
    assert expected.numbers['images'] > 0 and 0 <= expected.numbers['student_accuracy'] <= 1
    assert (
        set(expected.seconds) >= {'distillation', 'total'}
        and min(expected.seconds.values()) >= 0
    )
    if method_head(name)['task'] == 'generative':
        assert (
            expected.seconds['synthesis'] > 0
            and len(ImageSet.load(whole.folder / 'images.safetensors')) > 0
        )


SCENES: dict[str, object] = {
    'limit': 20,
    'test_limit': 4,
    'teacher_steps': 2,
    'steps': 4,
    'sources': 'labels, real, dreams',
}
SCENES |= {
    'rounds': 3,
    'warmup_rounds': 1,
    'synthesis_steps': 2,
    'synthesis_batch_size': 4,
    'generator_width': 4,
}
SCENES |= {'latent_size': 8, 'batch_size': 8, 'evaluations': 1, 'picture': 2}


@pytest.mark.parametrize('name', ['dafl', 'cmi', 'ssd-kd-10', 'scenes'])
def test_stopped_after_every_phase_and_still_the_same_bytes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What a phase leaves in memory does not outlive its process.

    All that comes later has only files.
    """
    recipe, changes = (
        ('scenes-segmentation', SCENES)
        if name == 'scenes'
        else (f'digits-{name}', tiny(name))
    )
    for folder in ('whole', 'broken'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'digits-teacher').symlink_to(root / 'digits-teacher')
    whole = Run(
        Recipe.load(recipe),
        'quick',
        changes,
        out=tmp_path / 'whole',
        device='cpu',
        quiet=True,
    )
    expected, phase, stops = whole.start(), Run.phase, 0

    def stopping(self: Run, name: str, work: Any) -> dict[str, Any]:
        known = name in self.state['phases']
        found = phase(self, name, work)
        if not known:
            self.stop()
        return found

    monkeypatch.setattr(Run, 'phase', stopping)
    while stops < 20:
        torch.manual_seed(stops)
        broken = Run(
            Recipe.load(recipe),
            'quick',
            changes,
            out=tmp_path / 'broken',
            device='cpu',
            quiet=True,
        )
        try:
            result = broken.start(resume=True)
            break
        except RunStopped:
            stops += 1
    assert 2 <= stops < 20 and result.numbers == expected.numbers
    files = sorted(
        p.name
        for p in whole.folder.iterdir()
        if p.suffix in ('.safetensors', '.png', '.toml')
    )
    assert files == sorted(
        p.name
        for p in broken.folder.iterdir()
        if p.suffix in ('.safetensors', '.png', '.toml')
    )
    for file in files:
        assert (whole.folder / file).read_bytes() == (broken.folder / file).read_bytes(), (
            file
        )


def test_seeds_stand_side_by_side(root: Path, tmp_path: Path) -> None:
    "Runs of two seeds keep apart, and neither hides the other's result."
    (tmp_path / 'digits-teacher').symlink_to(root / 'digits-teacher')
    where = {
        'out': tmp_path,
        'results': tmp_path / 'results',
        'device': 'cpu',
        'quiet': True,
    }
    found = {}
    for seed in (0, 1):
        changes = tiny('dafl') | {
            'rounds': 2,
            'warmup_rounds': 0,
            'steps_per_round': 2,
            'seed': seed,
        }
        run = Run(Recipe.load('digits-dafl'), 'quick', changes, **where)
        found[run.folder.name] = run.start()
    assert set(found) == {'quick', 'quick-seed1'} and [
        r.settings['seed'] for r in found.values()
    ] == [0, 1]
    assert found['quick'].numbers != found['quick-seed1'].numbers
    for name, result in found.items():
        assert Result.load(tmp_path / 'digits-dafl' / name) == result
    # other settings were changed as well: not a result of the recipe
    assert not (tmp_path / 'results').exists()


def test_a_seed_alone_is_published(tmp_path: Path) -> None:
    changes = {'seed': 3}
    run = Run(
        Recipe.load('digits-teacher'),
        'quick',
        changes,
        out=tmp_path,
        results=tmp_path / 'results',
        device='cpu',
        quiet=True,
    )
    run.start()
    assert (
        Result.load(tmp_path / 'results' / 'digits-teacher' / 'quick-seed3').settings[
            'seed'
        ]
        == 3
    )


def test_modulation_without_a_replay_buffer_is_refused(root: Path) -> None:
    with pytest.raises(DFKDError, match="set pool to 'replay'"):
        changes = tiny('ssd-kd-10') | {'pool': 'grows', 'seed': 9}
        Run(
            Recipe.load('digits-ssd-kd-10'),
            'quick',
            changes,
            out=root,
            device='cpu',
            quiet=True,
        ).start()


def test_an_untrained_teacher_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        DFKDError, match='train it with `dfkd run digits-teacher --scale quick`'
    ):
        open_teacher('run:digits-teacher', tmp_path, 'quick')


@each('name', [*SHIPPED])
def test_no_two_parts_of_a_task_mean_different_things_by_one_word(name: str) -> None:
    """A word that two bases define would be one field, and one of them would get the
    other's value.
    """
    kind = find_task(name, 'a test').settings
    seen: dict[str, type] = {}
    for part in kind.__mro__[1:-1]:
        for word in part.__dict__.get('__annotations__', {}):
            owner = seen.setdefault(word, part)
            assert owner is part or issubclass(owner, part), (
                f"{owner.__name__} and {part.__name__} both have '{word}'"
            )


def test_no_recipe_has_a_weight_of_one_norm_over_a_whole_batch() -> None:
    """The paper's 2.5e-5 and 3e-8 are of norms over 256 images; ours are means of norms.

    Quick recipes have settings of their own, found for few updates.
    """
    for name in recipe_names():
        recipe = Recipe.load(name)
        for scale in {'hour', 'full'} & recipe.scales.keys():
            settings = recipe.resolve(scale)
            if hasattr(settings, 'l2') and getattr(settings, 'source', '') != 'real':
                assert settings.tv_l2 == 0 or settings.tv_l2 >= 4e-4, (name, scale)
                assert settings.l2 == 0 or settings.l2 >= 4.8e-7, (name, scale)
