"""How a run computes: precision, compilation, and whether it ends in the same bits."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfkd_nb.applications.continual import BinaryTrainer
from dfkd_nb.foundations.distillation import Distiller
from dfkd_nb.foundations.optimization import PAYS_FROM, compiling_pays
from dfkd_nb.lab.cards import model_card
from dfkd_nb.lab.recipes import TASKS, Recipe
from dfkd_nb.lab.reproducibility import deterministic, run_switches
from dfkd_nb.lab.runs import Run
from dfkd_nb.lab.settings import RunSettings, TeacherSettings, check_settings, toml_value
from dfkd_nb.lab.tasks.common import compile_notice, training_arguments, with_compile
from dfkd_nb.toolbox.augmentation import Augment, random_crop
from dfkd_nb.toolbox.core import autocast, computes_bfloat16, resolve_precision
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import Domain
from dfkd_nb.toolbox.errors import DFKDError, RunStopped
from dfkd_nb.toolbox.teachers import Teacher

CPU, CUDA = torch.device('cpu'), torch.device('cuda')
TOY = Domain('toy', (3, 8, 8), (0.5,) * 3, (0.25,) * 3, ('a', 'b', 'c'))
SHORT: dict[str, Any] = {
    'steps': 6,
    'batch_size': 8,
    'learning_rate': 0.05,
    'device': 'cpu',
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def images(count: int = 20) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(count) % 3, TOY)


# --- precision ----------------------------------------------------------------------------


def processor(
    monkeypatch: pytest.MonkeyPatch, bf16: bool = False, amx: bool = False
) -> None:
    "Another processor than this one."
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: bf16)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)


def test_auto_is_bfloat16_where_the_processor_computes_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for bf16, amx in ((False, False), (True, False), (False, True)):
        processor(monkeypatch, bf16, amx)
        word = 'bfloat16' if bf16 or amx else 'float32'
        assert computes_bfloat16(CPU) == (bf16 or amx)
        assert resolve_precision('auto', CPU) == word
        with autocast(CPU, 'auto'):
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == getattr(torch, word)
    # a version of PyTorch that does not tell
    monkeypatch.delattr(torch.cpu, '_is_avx512_bf16_supported')
    monkeypatch.delattr(torch.cpu, '_is_amx_tile_supported')
    assert resolve_precision('auto', CPU) == 'float32'
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _, c=capability: c)
        word = 'bfloat16' if capability >= (8, 0) else 'float32'
        assert resolve_precision('auto', CUDA) == word
    assert resolve_precision('auto', torch.device('mps')) == 'float32'
    assert resolve_precision('float16', CUDA) == 'float16'
    with pytest.raises(DFKDError, match="or 'auto'"):
        resolve_precision('float8', CPU)


def test_a_distiller_resolves_auto_once(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, bf16=True)
    learner = Distiller(None, network(), images(), precision='auto', **SHORT)
    assert learner.precision == 'bfloat16'
    processor(monkeypatch)
    state = learner.run(until=2).state_dict()
    other = Distiller(None, network(), images(), precision='auto', **SHORT)
    assert other.precision == 'float32'
    with pytest.raises(DFKDError, match='precision .was bfloat16, now float32'):
        other.load_state_dict(state)
    # what is kept in memory and what the loss is made of is float32 in both
    again = Distiller(None, network(), images(), precision='bfloat16', **SHORT)
    again.load_state_dict(state)
    losses = again.step()
    assert {v.dtype for v in losses.values()} == {torch.float32}
    tensors = [*again.student.parameters(), *again.student.buffers()]
    assert {v.dtype for v in tensors if v.is_floating_point()} == {torch.float32}


@dataclasses.dataclass(frozen=True)
class SomeSettings(TeacherSettings):
    "Of a task that only tells how it computes."


def told(run: Run) -> dict[str, Any]:
    "What a task sees."
    run.tick('tell', dict)
    arguments = training_arguments(run.settings, run.device)
    return {
        'precision': run.settings.precision,
        'argument': arguments['precision'],
        'deterministic': torch.are_deterministic_algorithms_enabled(),
        'benchmark': torch.backends.cudnn.benchmark,
        'tf32': torch.backends.cudnn.allow_tf32,
        'products': torch.backends.cuda.matmul.allow_tf32,
    }


@pytest.fixture
def telling(tmp_path: Any) -> Any:
    from dfkd_nb.lab.recipes import Task

    TASKS['tell'] = Task('tell', SomeSettings, told)
    text = 'title = "Tell"\ntask = "tell"\n[quick]\nprecision = "auto"\n'
    recipe = Recipe.parse(text, 'tell')
    yield lambda **changes: Run(
        recipe, 'quick', changes, tmp_path / 'runs', tmp_path / 'results', 'cpu', quiet=True
    )
    del TASKS['tell']


def test_a_run_keeps_the_precision_it_began_with(
    telling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, bf16=True)
    with pytest.raises(RunStopped):
        telling().start(max_minutes=1e-9)
    processor(monkeypatch)  # the rest on another machine
    result = telling().start(resume=True)
    assert result.numbers['precision'] == result.numbers['argument'] == 'bfloat16'
    assert result.environment['resolved'] == {'precision': 'bfloat16'}
    # the recipe is what it was, and nothing of it was changed
    assert result.settings['precision'] == 'auto' and result.changed == []
    assert telling().start(fresh=True).numbers['precision'] == 'float32'
    # a word that was chosen stays
    named = telling(precision='bfloat16').start(fresh=True)
    assert named.numbers['precision'] == 'bfloat16'
    assert named.environment['resolved'] == {} and named.changed == ['precision']


# --- the same bits again ------------------------------------------------------------------


def switches() -> dict[str, bool]:
    return {
        'deterministic': torch.are_deterministic_algorithms_enabled(),
        'benchmark': torch.backends.cudnn.benchmark,
        'tf32': torch.backends.cudnn.allow_tf32,
        'products': torch.backends.cuda.matmul.allow_tf32,
    }


@pytest.mark.parametrize('given', [{}, {'deterministic': False}, {'tf32': True}])
def test_a_run_computes_as_it_was_told(telling: Any, given: dict[str, bool]) -> None:
    before = switches()
    result = telling(**given).start()
    same, tf32 = given.get('deterministic', True), given.get('tf32', False)
    expected = {
        'deterministic': same,
        'benchmark': not same,
        'tf32': tf32,
        'products': tf32,
    }
    assert {k: result.numbers[k] for k in expected} == expected
    about = result.environment
    assert (about['deterministic'], about['tf32']) == (same, tf32)
    assert switches() == before
    assert result.changed == sorted(given)
    # and the card says so where it matters
    document = json.loads(result.to_json())
    text = model_card(document)
    assert ('not deterministic' in text) == (not same) and ('TF32' in text) == tf32
    assert "'auto' was float32" in text or computes_bfloat16(CPU)


def test_a_resumed_run_keeps_its_switches(telling: Any) -> None:
    with pytest.raises(RunStopped):
        telling(deterministic=False).start(max_minutes=1e-9)
    with pytest.raises(DFKDError, match="'deterministic' was false, now true"):
        telling().start(resume=True)
    resumed = telling(deterministic=False).start(resume=True)
    assert not resumed.numbers['deterministic']


def test_a_run_of_an_earlier_version_goes_on_as_it_began(telling: Any) -> None:
    "Its environment names no switch: deterministic, and TF32 as PyTorch has it."
    with pytest.raises(RunStopped):
        telling().start(max_minutes=1e-9)
    noted = telling().folder / 'environment.json'
    about = json.loads(noted.read_text())
    for name in ('deterministic', 'tf32'):
        del about[name]
    noted.write_text(json.dumps(about))
    usual = switches()
    numbers = telling().start(resume=True).numbers
    assert numbers['deterministic'] and numbers['tf32'] == usual['tf32']


def test_without_a_word_tf32_stays_as_it_is() -> None:
    before = switches()
    with deterministic(1):
        assert switches()['tf32'] == before['tf32']
    assert run_switches(SomeSettings(), CPU) == {
        'deterministic': True,
        'tf32': False,
        'resolved': {},
    }


# --- compilation --------------------------------------------------------------------------


def test_a_setting_is_true_false_or_a_word() -> None:
    for given in (True, False, 'auto'):
        found = check_settings(SomeSettings, {'compile': given}, 'a recipe')
        assert found.compile is given or found.compile == given
        assert toml_value(found.compile) in ('true', 'false', '"auto"')
    for wrong in ('always', 1, 0.5):
        with pytest.raises(DFKDError, match="'compile' is .*(true, false|auto)"):
            check_settings(SomeSettings, {'compile': wrong}, 'a recipe')
    assert RunSettings().compile is False


def test_auto_compiles_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = PAYS_FROM['cpu'] - 1, PAYS_FROM['cpu']
    assert not compiling_pays(few, CPU) and compiling_pays(many, CPU)
    assert not compiling_pays(10**9, torch.device('mps'))
    for steps in (few, many):
        learner = Distiller(
            None, network(), images(), compile='auto', **SHORT | {'steps': steps}
        )
        assert learner.compile == (steps == many)
        line = compile_notice('training', steps, learner.compile, CPU)
        assert f'{steps} updates' in line and f'from {many} on' in line
        assert ('not compiled' in line) == (steps == few)
        chosen = with_compile(SomeSettings(compile='auto'), steps, CPU)
        assert chosen.compile is (steps == many)
    assert with_compile(SomeSettings(compile=True), few, CPU).compile is True
    assert training_arguments(SomeSettings(compile='auto'), CPU)['compile'] == 'auto'
    with pytest.raises(DFKDError, match="True, False or 'auto'"):
        Distiller(None, network(), images(), compile='never', **SHORT)


def test_a_loss_of_its_own_is_not_compiled() -> None:
    with pytest.raises(DFKDError, match='BinaryTrainer cannot be compiled'):
        BinaryTrainer(None, network(), images(), compile=True, **SHORT)
    settings = SHORT | {'steps': 10**6}
    assert not BinaryTrainer(None, network(), images(), compile='auto', **settings).compile


def test_student_teacher_and_loss_are_one_graph() -> None:
    learner = Distiller(
        Teacher(network(7), TOY),
        network(1),
        images(),
        label_weight=0.5,
        augment=Augment(1),
        compile=True,
        **SHORT,
    )
    learner.student.train()
    x, targets = learner.prepare(images().images[:8], torch.arange(8) % 3)
    inputs = x, learner.teacher_network(), learner.teacher_inputs(x), targets, None
    found = torch._dynamo.explain(learner.batch_forward)(*inputs)
    torch._dynamo.reset()
    assert found.graph_break_count == 0 and found.graph_count == 1, found.break_reasons


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_and_resumes_to_the_same_bits() -> None:
    def learner(compile: bool = True) -> Distiller:
        teacher = Teacher(network(7), TOY)
        return Distiller(teacher, network(1), images(), compile=compile, **SHORT)

    def weights(made: Distiller) -> torch.Tensor:
        state = made.student.state_dict().values()
        return torch.cat([v.flatten().float() for v in state])

    straight, plain = learner(), learner(False)
    half = copy.deepcopy(straight.run(until=3, log_every=2).state_dict())
    straight.run(log_every=2)
    plain.run(log_every=2)
    torch.testing.assert_close(weights(straight), weights(plain), rtol=1e-3, atol=1e-4)
    rest = learner()
    rest.load_state_dict(half)
    rest.run(log_every=2)
    assert weights(rest).equal(weights(straight))
    assert rest.history == straight.history
    with pytest.raises(DFKDError, match='compile .was True, now False'):
        plain.load_state_dict(half)


# --- augmentation -------------------------------------------------------------------------


def test_a_crop_is_a_padded_image_cut_out_and_mirrored() -> None:
    "By hand, image by image, from the same draws."
    given = torch.arange(2 * 3 * 5 * 6).view(2, 3, 5, 6).to(torch.uint8)
    made = random_crop(given, 2, torch.Generator().manual_seed(5), flip=True)
    rng = torch.Generator().manual_seed(5)
    top, left = torch.randint(0, 5, (2, 2, 1), generator=rng)
    mirrored = torch.rand(2, 1, generator=rng) < 0.5
    for i in range(2):
        padded = F.pad(given[i], (2,) * 4)
        cut = padded[:, top[i] : top[i] + 5, left[i] : left[i] + 6]
        assert made[i].equal(cut.flip(2) if mirrored[i] else cut)
