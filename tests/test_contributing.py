"""CONTRIBUTING.md, CITATION.cff and CHANGELOG.md: examples run, the rest can be read."""

import math
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dfkd_nb import __version__
from dfkd_nb.dreams.priors import TERMS, class_loss
from dfkd_nb.foundations.loop import NoiseSynthesizer
from dfkd_nb.generators.methods import POOLS, SYNTHESIZERS
from dfkd_nb.lab.recipes import TASKS, Recipe
from dfkd_nb.lab.results import Result
from dfkd_nb.lab.runs import Run
from dfkd_nb.lab.tasks.generative import save_generated_images
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.errors import DFKDError, RunStopped
from dfkd_nb.toolbox.teachers import load_teacher

ROOT = Path(__file__).resolve().parents[1]
# a run of a second, from a teacher that ships
TINY: dict[str, Any] = {
    'teacher': 'cifar10-resnet20',
    'student': 'resnet14',
    'test_data': 'cifar10-mini',
    'test_limit': 50,
    'generator_width': 8,
    'synthesis_batch_size': 16,
    'pool_size': 20,
    'batch_size': 8,
    'rounds': 3,
    'steps_per_round': 2,
    'picture': 2,
    'evaluations': 1,
}


def blocks(language: str) -> list[str]:
    "The fenced blocks of CONTRIBUTING.md in a language."
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.M | re.S)


@pytest.fixture
def registered() -> Iterator[None]:
    "What the examples register is taken back."
    yield
    tables: list[dict[str, Any]] = [SYNTHESIZERS, POOLS, TERMS, TASKS]
    for table in tables:
        for name in ('smooth-noise', 'reservoir', 'seeded-reservoir', 'entropy'):
            table.pop(name, None)


@pytest.fixture
def folder(registered: None, tmp_path: Path) -> Iterator[Path]:
    "The file and the recipe of the examples, side by side."
    parts = [block for block in blocks('python') if block.startswith('# my_method.py\n')]
    assert len(parts) == 4
    (tmp_path / 'my_method.py').write_text('\n\n'.join(parts), encoding='utf-8')
    (recipe,) = blocks('toml')
    (tmp_path / 'my-recipe.toml').write_text(recipe, encoding='utf-8')
    sys.modules.pop('my_method', None)
    yield tmp_path
    sys.modules.pop('my_method', None)


def tiny_run(folder: Path, out: str = 'runs', **changes: Any) -> Run:
    "The recipe of the examples in a few steps, not yet begun."
    recipe = Recipe.load(str(folder / 'my-recipe.toml'))
    options: dict[str, Any] = {'out': folder / out, 'device': 'cpu', 'quiet': True}
    run = Run(recipe, 'quick', TINY | changes, **options)
    run.check()
    return run


def images_of(run: Run) -> torch.Tensor:
    return ImageSet.load(run.folder / 'images.safetensors').images


def test_the_examples_run_one_after_another(
    registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType('contributing')
    monkeypatch.setitem(sys.modules, 'contributing', module)
    assert len(blocks('python')) == 8
    for block in blocks('python'):
        exec(compile(block, 'CONTRIBUTING.md', 'exec'), module.__dict__)


def test_a_recipe_runs_with_parts_of_a_plugin(folder: Path) -> None:
    run, without = tiny_run(folder), tiny_run(folder, 'without', terms={})
    result: Result = run.start()
    assert result.settings['terms'] == {'entropy': 0.1}
    assert result.settings['pool'] == 'reservoir' and result.numbers['images'] == 48
    without.start()
    assert len(images_of(run)) == len(images_of(without)) == 20
    assert not torch.equal(images_of(run), images_of(without))
    # stopped at every opportunity and resumed
    stops = 0
    while stops < 100:
        again = tiny_run(folder, 'again')
        try:
            again.start(resume=True, max_minutes=1e-6 if stops < 20 else math.inf)
            break
        except RunStopped:
            stops += 1
    assert stops > 3 and torch.equal(images_of(again), images_of(run))


@pytest.mark.parametrize(
    'changes',
    [
        {'synthesizer': 'smooth-noise', 'terms': {}},
        {'synthesizer': 'noise', 'terms': {}},
    ],
    ids=lambda changes: '-'.join(map(str, changes.values())),
)
def test_a_recipe_takes_any_synthesizer(folder: Path, changes: dict[str, Any]) -> None:
    run = tiny_run(folder, **changes)
    run.start()
    images = images_of(run)
    assert images.dtype == torch.uint8 and images.float().std() > 30


def test_images_that_no_pool_keeps_are_drawn_as_bytes_or_intensities(
    tmp_path: Path,
) -> None:
    teacher = load_teacher('cifar10-resnet20')
    run: Any = types.SimpleNamespace(
        folder=tmp_path, settings=types.SimpleNamespace(seed=0)
    )
    noise = NoiseSynthesizer(teacher.domain)
    for draw in (
        noise.sample_images,
        lambda n, generator: noise.sample_images(n, generator) / 255,
    ):
        maker = types.SimpleNamespace(sample_images=draw)
        trainer = types.SimpleNamespace(pool=None, synthesizer=maker)
        save_generated_images(run, trainer, teacher, limit=4)
        expected = noise.sample_images(256, torch.Generator().manual_seed(0))[:4]
        assert torch.equal(images_of(run), expected)


def test_a_term_serves_images_by_inversion_too(folder: Path) -> None:
    text = (folder / 'my-recipe.toml').read_text(encoding='utf-8').split('[settings]')[0]
    text = text.replace('"generative"', '"dream"') + '[quick]\n'
    (folder / 'dream.toml').write_text(text, encoding='utf-8')
    recipe, found = Recipe.load(str(folder / 'dream.toml')), []
    few = {'images': 4, 'synthesis_steps': 2, 'synthesis_batch_size': 4, 'picture': 2}
    for terms in ({}, {'entropy': 10.0}):
        run = Run(
            recipe,
            'quick',
            few | {'terms': terms},
            out=folder / str(len(terms)),
            device='cpu',
            quiet=True,
        )
        run.start()
        found.append(images_of(run))
    assert not torch.equal(*found)


def test_a_task_of_ones_own_has_further_settings(folder: Path) -> None:
    path, found = folder / 'my-recipe.toml', []
    text = path.read_text(encoding='utf-8').replace('"generative"', '"reservoir"')
    path.write_text(text.replace('pool = "reservoir"\n', ''), encoding='utf-8')
    for seed in (0, 0, 1):
        run = tiny_run(folder, f'out{len(found)}', pool_seed=seed, seed=0)
        run.start()
        found.append(images_of(run))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'terms': {'entropi': 1.0}}, "unknown term 'entropi', did you mean 'entropy'"),
        ({'pool': 'reservor'}, "unknown pool 'reservor', did you mean 'reservoir'?"),
        ({'pool': 'x'}, "(one of your own: @register_pool('x') in a module that the"),
        ({'synthesizer': 'smoothnoise'}, "did you mean 'smooth-noise'"),
        ({'terms': {'entropy': 'much'}}, 'entropy, is "much": give a number'),
        ({'terms': 0.1}, 'give { NAME = 0.1, ... }'),
        ({'modulated': True, 'pool': 'grows'}, "set pool to 'replay'"),
    ],
)
def test_wrong_parts_are_told_before_the_run_begins(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DFKDError, match=re.escape(message)):
        tiny_run(folder, **changes)
    assert not (folder / 'runs').exists()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'synthesizer': 'smooth-noise', 'pool': 'none', 'terms': {}}, 'choose a pool'),
        ({'modulated': True}, 'counts the images of a replay buffer'),
        ({'terms': {'class': 1.0}}, "there is a term 'class' already"),
        (
            {'terms': {}, 'class_weight': 0.0, 'balance_weight': 0.0}
            | {'feature_weight': 0.0},
            'give at least one (of class, balance',
        ),
    ],
)
def test_parts_that_do_not_go_together_are_told(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    TERMS['class'] = class_loss
    try:
        with pytest.raises(DFKDError, match=re.escape(message)):
            tiny_run(folder, **changes).start()
    finally:
        del TERMS['class']


@pytest.mark.parametrize(
    ('plugins', 'message'),
    [
        ('["my_method.py"]', 'without .py'),
        ('[3]', "'plugins' has 3: give names of modules"),
        ('"my_method"', 'give a list'),
    ],
)
def test_a_wrong_plugin_is_told(folder: Path, plugins: str, message: str) -> None:
    path = folder / 'my-recipe.toml'
    text = path.read_text(encoding='utf-8').replace('["my_method"]', plugins)
    path.write_text(text, encoding='utf-8')
    with pytest.raises(DFKDError, match=re.escape(message)):
        Recipe.load(str(path))


def test_the_front_page_numbers_chapters_as_their_files() -> None:
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    told = re.findall(r'\[(\d\d)[^\]]*\]\((nbs/\w+/(\d\d)_\w+\.ipynb)\)', text)
    assert all(number == in_file for number, _, in_file in told)
    chapters = {f'nbs/{p.parent.name}/{p.name}' for p in ROOT.glob('nbs/*/[0-9]*.ipynb')}
    assert {path for _, path, _ in told} == chapters


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
