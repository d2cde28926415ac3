"""Every setting of a recipe reaches what is made with it.

Each is changed alone, and what comes out must differ.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import DIGITS, network

from dfkd_nb.dreams.inversion import DeepInversion
from dfkd_nb.dreams.priors import LossInputs, register_term
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.generators.contrastive import ContrastiveSynthesizer
from dfkd_nb.generators.ema import EmaSynthesizer
from dfkd_nb.generators.meta import MetaSynthesizer
from dfkd_nb.generators.method_rows import MethodSettings
from dfkd_nb.generators.methods import build_method
from dfkd_nb.generators.mirror import MirrorSynthesizer
from dfkd_nb.generators.nayer import NayerSynthesizer
from dfkd_nb.generators.synthesizer import KEYWORDS, keywords_of
from dfkd_nb.lab.settings import (
    GenerativeSettings,
    GeneratorSettings,
    PoolSettings,
    RunSettings,
    SynthesisSettings,
    TrainingSettings,
    TransferSettings,
)
from dfkd_nb.lab.tasks.common import training_arguments
from dfkd_nb.lab.tasks.synthesis import build_inversion, recipe_classes
from dfkd_nb.toolbox.augmentation import Augment
from dfkd_nb.toolbox.teachers import Teacher

CPU = torch.device('cpu')
# how a run computes, whatever it does: see `tests/test_run_switches.py`
OF_THE_RUN = 'deterministic', 'tf32'


@register_term('small')
def small_term(inputs: LossInputs) -> torch.Tensor:
    "A term that a plugin might register."
    return inputs.x.abs().mean()


@pytest.fixture(scope='module')
def teacher() -> Teacher:
    return Teacher(network(), DIGITS, 'tiny')


def other(field: dataclasses.Field[Any]) -> Any:
    "Another value that the setting may have."
    value, rules = field.default, field.metadata
    if rules['names'] == 'term':
        return {'small': 0.5}
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return next(choice for choice in rules['choices'] if choice != value)
    changed = value + 1 if isinstance(value, int) else value / 2 + 0.01
    return (
        changed if rules['high'] is None or changed <= rules['high'] else rules['high'] / 2
    )


def ignored(
    kind: type, base: Any, names: set[str], make: Callable[[Any], Any]
) -> list[str]:
    "Settings of `kind` that change nothing in what `make` makes of them."
    fields = {f.name: f for f in dataclasses.fields(kind)}
    assert names <= fields.keys()
    plain = make(base)
    assert plain == make(base), 'the same settings, the same outcome'
    changes = {name: other(fields[name]) for name in sorted(names)}
    changes = {
        name: value for name, value in changes.items() if value != getattr(base, name)
    }
    assert changes.keys() == names, f'nothing was changed: {names - changes.keys()}'
    return [
        name
        for name, value in changes.items()
        if make(dataclasses.replace(base, **{name: value})) == plain
    ]


def own(kind: type, *without: str) -> set[str]:
    "The names of all settings but these."
    return {f.name for f in dataclasses.fields(kind)} - set(without)


def test_a_student_learns_as_the_recipe_says() -> None:
    # of the run, not of the student
    names = own(TrainingSettings, 'evaluations', 'test_data', 'test_limit', *OF_THE_RUN)
    assert (
        ignored(
            TrainingSettings,
            TrainingSettings(),
            names,
            lambda settings: repr(training_arguments(settings, CPU)),
        )
        == []
    )


def test_dreams_are_made_as_the_recipe_says(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    real = DeepInversion.__init__

    def note(self: DeepInversion, teacher: Teacher, **keywords: Any) -> None:
        asked.clear()
        asked.update(keywords)
        real(self, teacher, **keywords | {'compile': False})

    monkeypatch.setattr(DeepInversion, '__init__', note)

    def made(settings: Any) -> tuple[str, str]:
        synthesizer = build_inversion(settings, teacher, CPU, 0)
        return repr(synthesizer.settings), repr(asked['compile'])

    elsewhere = {
        'teacher',
        'source',
        'real_data',
        'images_from',
        'images',
        'classes',
        'single_fraction',
        'single_size_steps',
    }
    # real images; a size too small here
    elsewhere |= {'statistics_images', 'statistics_data', 'quarter_size_steps', *OF_THE_RUN}
    elsewhere |= {
        name
        for name in own(SynthesisSettings)
        if name.startswith(('metadata', 'embedding'))
    }
    assert (
        ignored(
            SynthesisSettings, TransferSettings(), own(SynthesisSettings, *elsewhere), made
        )
        == []
    )


def known_of(pool: Any) -> tuple[Any, ...]:
    names = 'size', 'prioritised', 'alpha', 'beta', 'epsilon', 'newest_first'
    return type(pool).__name__, *(getattr(pool, name, None) for name in names)


# settings that one synthesizer, or the filter behind it, alone has
OF_SYNTHESIZERS = {
    'meta': {'meta_update', 'feature_momentum', 'reset_round'},
    'contrastive': {'contrastive_weight', 'contrastive_temperature', 'keep_head'},
    'ema': {'ema_decay', 'ema_share'},  # see test_newer.py
    'nayer': {'label_vectors', 'generator_life'},  # likewise
    'mirror': {'alignment_weight'},  # likewise
    'a filter': {'acceptance', 'acceptance_attempts'},  # likewise
}


@pytest.mark.parametrize('kind', ['meta', 'contrastive'])
def test_a_generator_learns_as_the_recipe_says(teacher: Teacher, kind: str) -> None:
    student, logits = network(1), 3 * torch.eye(10)[:4]
    inputs = LossInputs(
        torch.zeros(4, 1, 8, 8), logits, logits.argmax(1), student_logits=-logits
    )

    def made(settings: GenerativeSettings) -> tuple[Any, ...]:
        trainer = build_method(settings, teacher, student, device=CPU)
        pool, synthesizer = trainer.pool, trainer.synthesizer
        if hasattr(pool, 'insert'):
            pool.insert(
                torch.zeros(6, 1, 8, 8, dtype=torch.uint8),
                torch.arange(6) // 2,
                torch.full((6,), 0.5),
            )
        shapes = [tuple(v.shape) for v in synthesizer.weights.values()]
        terms = {
            name: float(synthesizer.objective.terms[name][1](inputs))
            for name in ('modulated', 'adversarial')
        }
        extra = synthesizer._made_with | {
            'augment': synthesizer.augment,
            'seed': synthesizer.seed,
            'shapes': shapes,
            'scale': synthesizer.extractor.precision,
        }
        features = synthesizer.objective.terms['features'][1].__qualname__
        return (
            known_of(pool),
            repr(extra),
            repr(terms),
            features,
            repr(getattr(synthesizer, 'meta_update', None)),
        )

    base = GenerativeSettings(
        synthesizer=kind,
        pool='replay',
        modulated=True,
        class_weight=1.0,
        feature_weight=1.0,
        adversarial_weight=1.0,
    )
    base = dataclasses.replace(
        base, latent_size=8, generator_width=4, activation_weight=1.0
    )
    names = own(
        GenerativeSettings,
        *(
            name
            for name in own(TrainingSettings)
            if name not in ('padding', 'flip', 'seed')
        ),
    )
    # of the run
    names -= {
        'pair',
        'method',
        'teacher',
        'student',
        'student_init',
        'temperature',
        'attention_weight',
        'picture',
    }
    names -= {'rounds', 'warmup_rounds', 'steps_per_round'}  # of the alternation
    names -= {'synthesizer', 'pool', 'modulated'}  # decide what is made at all
    for other, those in OF_SYNTHESIZERS.items():
        names -= those if other != kind else set()
    assert ignored(GenerativeSettings, base, names, made) == []


def test_few_images_show_the_first_classes_or_evenly_spread_ones() -> None:
    few = {'images': 5, 'classes': 'spread'}
    assert recipe_classes(SynthesisSettings(**few), 100).tolist() == [0, 20, 40, 60, 80]
    assert recipe_classes(
        SynthesisSettings(**few | {'classes': 'in-turn'}), 100
    ).tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert (
        recipe_classes(SynthesisSettings(**few), 3).tolist()
        == recipe_classes(SynthesisSettings(images=5), 3).tolist()
        == [0, 1, 2, 0, 1]
    )


def keywords(*functions: Any) -> set[str]:
    "The names of all parameters."
    return {name for f in functions for name in inspect.signature(f).parameters}


def test_every_setting_of_synthesis_is_one_keyword() -> None:
    """A setting is called as the keyword that it becomes.

    Where synthesis and the student's training share a keyword, that of synthesis has the
    prefix `synthesis_` in a recipe; no other setting has it.
    """
    training = keywords(Distiller, Augment) & own(TrainingSettings)
    assert {'batch_size', 'learning_rate', 'momentum', 'schedule', 'flip'} <= training
    synthesis = own(SynthesisSettings) | own(GeneratorSettings)
    for name in synthesis - own(RunSettings):  # which both share
        plain = name.removeprefix('synthesis_')
        if name == plain:
            assert name not in training, f"'{name}' is a keyword of training: prefix it"
        else:
            assert plain in keywords(Distiller, Augment) | own(TrainingSettings), name
        if name != plain and name in own(SynthesisSettings):
            assert plain in keywords(DeepInversion), name


def test_a_setting_of_a_generator_is_declared_once() -> None:
    "Rows and recipes have the same fields, and a synthesizer takes each of them."
    for kind in (GeneratorSettings, PoolSettings):
        for each in dataclasses.fields(kind):
            assert each in dataclasses.fields(MethodSettings), each.name
            assert each in dataclasses.fields(GenerativeSettings), each.name
    kinds = (
        MetaSynthesizer,
        ContrastiveSynthesizer,
        EmaSynthesizer,
        NayerSynthesizer,
        MirrorSynthesizer,
    )
    taken = set().union(*map(keywords_of, kinds))
    assert set(KEYWORDS.values()) <= taken
    assert KEYWORDS['synthesis_steps'] == 'steps' and 'latent_size' not in KEYWORDS
