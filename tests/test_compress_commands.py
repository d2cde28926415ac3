"`dfkd prune` and `dfkd quantize` on a network that nobody has seen, at the size of a toy."

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_distill_command import (
    DOMAIN,
    NETWORK,
    Killed,
    failure,
    here,
    result,
    stopped_after_each_phase,
    teacher,
)

from dfkd_nb.applications.integer_networks import load_integers
from dfkd_nb.applications.pruning import load_pruned
from dfkd_nb.lab.commands import STOPPED, main
from dfkd_nb.lab.runs import Run
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.evaluation import evaluate
from dfkd_nb.toolbox.models import count_parameters

__all__ = ['here']  # the fixture
SMALL = 'synthesis_steps=3 half_size_steps=0 synthesis_batch_size=16 held_out=12'
SMALL += ' held_out_steps=3 batch_size=16 evaluations=2 group_size=1'


def command(*more: str) -> list[str]:
    small = [word for value in SMALL.split() for word in ('--set', value)]
    return [*more, *NETWORK, '--images', '32', *small, '--out', 'out', '--device', 'cpu']


PRUNE = command('prune', '--keep', '0.5', '--steps', '6')
QUANTIZE = command('quantize')
TUNED = command('quantize', '--steps', '4')


def held_out(folder: Path) -> ImageSet:
    return ImageSet.load(folder / 'held-out.safetensors')


def test_prune_leaves_a_smaller_network_that_was_taught(here: Path) -> None:
    assert main(PRUNE) == 0
    folder, numbers = here / 'out', result(here / 'out')['numbers']
    whole = copy.deepcopy(teacher().model)
    student, about = load_pruned(folder / 'student.safetensors', whole, DOMAIN)
    assert student.conv.out_channels == 3 and numbers['filters_removed'] == 3
    assert len(json.loads(about['removed'])['conv']) == 3
    assert numbers['student_parameters'] == count_parameters(student)
    assert 0.3 < numbers['operations_left'] < 0.7
    agreement = evaluate(student, held_out(folder), domain=DOMAIN)
    assert numbers['agreement'] == pytest.approx(agreement)
    before, _ = load_pruned(folder / 'untrained.safetensors', whole, DOMAIN)
    assert not before.fc.weight.equal(student.fc.weight)
    card = (folder / 'model-card.md').read_text()
    assert 'load_pruned' in card and '50 % of its filters' in card
    assert 'operations that are left' in (folder / 'report.html').read_text()


def test_prune_by_operations_and_without_training(here: Path) -> None:
    words = [*command('prune', '--flops', '0.6', '--steps', '0'), '--export', 'pt2']
    assert main(words) == 0
    numbers = result(here / 'out')['numbers']
    assert 0.4 < numbers['operations_left'] <= 0.6
    assert numbers['agreement'] == numbers['agreement_first']
    whole = copy.deepcopy(teacher().model)
    student, _ = load_pruned(here / 'out' / 'student.safetensors', whole, DOMAIN)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    program = torch.export.load(here / 'out' / 'student.pt2').module()
    assert torch.allclose(program(x), student(x), atol=1e-4)


def test_quantize_leaves_integers(here: Path) -> None:
    assert main(QUANTIZE) == 0
    folder, numbers = here / 'out', result(here / 'out')['numbers']
    network = load_integers(folder / 'student.safetensors', teacher().model, DOMAIN)
    agreement = evaluate(network, held_out(folder), domain=DOMAIN)
    assert numbers['agreement'] == pytest.approx(agreement) and agreement > 0.7
    assert 'load_integers' in (folder / 'model-card.md').read_text()
    assert any(v.dtype == torch.int8 for v in network.state_dict().values())
    assert main([*QUANTIZE, '--bits', '2', '--out', 'two']) == 0
    coarse = load_integers(here / 'two' / 'student.safetensors', teacher().model, DOMAIN)
    # both of its layers are ends, which keep eight bits
    assert coarse.settings != network.settings


def test_prune_for_some_minutes_counts_once(here: Path) -> None:
    words = command('prune', '--keep', '0.5', '--minutes', '0.01')
    assert main([*words, '--max-minutes', '1e-9']) == STOPPED
    record = tomllib.loads((here / 'out' / 'recipe.toml').read_text())['hour']
    assert record['minutes'] == 0.01 and record['steps'] >= 1
    assert main([*words, '--resume']) == 0
    found = result(here / 'out')
    assert found['numbers']['steps'] == found['settings']['steps'] == record['steps']


@pytest.mark.filterwarnings('ignore')
def test_quantize_fine_tunes_and_exports(here: Path) -> None:
    pytest.importorskip('onnxruntime.quantization')
    pytest.importorskip('onnxscript')
    words = [*QUANTIZE, '--updates', '4', '--export', 'onnx']
    assert main(words) == 0
    folder, found = here / 'out', result(here / 'out')
    numbers = found['numbers']
    assert numbers['steps'] == 4 and found['settings']['learning_rate'] == 3e-4
    assert numbers['agreement_first'] > 0.7 and numbers['agreement_onnx'] > 0.7
    assert numbers['bytes_onnx'] == (folder / 'student.onnx').stat().st_size
    assert '`student.onnx`' in (folder / 'model-card.md').read_text()
    assert main([*QUANTIZE, '--out', 'plain']) == 0
    tuned, plain = (load_file(f / 'student.safetensors') for f in (folder, here / 'plain'))
    assert any(not tuned[name].equal(value) for name, value in plain.items())


@pytest.mark.parametrize('words', [PRUNE, TUNED], ids=['prune', 'quantize'])
def test_killed_and_resumed_to_the_same_bits(
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*words, '--out', 'whole']) == 0
    tick, left, kills = Run.tick, 0, 0

    def dies(self: Run, *given: Any, **more: Any) -> bool:
        nonlocal left
        found = tick(self, *given, **more)
        left -= 1
        if left == 0:
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Run, 'tick', dies)
        for left in (2, 4, 5, 1000):  # noqa: B007 - `dies` counts it down
            try:
                assert main([*words, '--resume', '--save-every', '1e-9']) == 0
                break
            except Killed:
                kills += 1
    assert kills >= 2
    for name in ('student', 'images', 'held-out'):
        files = [(here / n / f'{name}.safetensors').read_bytes() for n in ('whole', 'out')]
        assert files[0] == files[1], name
    assert result(here / 'out')['numbers'] == result(here / 'whole')['numbers']


@pytest.mark.parametrize('words', [PRUNE, TUNED], ids=['prune', 'quantize'])
def test_stopped_after_each_phase(
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*words, '--out', 'whole']) == 0
    assert stopped_after_each_phase(words, monkeypatch) >= 3
    assert result(here / 'out')['numbers'] == result(here / 'whole')['numbers']


def test_a_plan_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (PRUNE, QUANTIZE):
        assert main([*words, '--plan']) == 0
        said = capsys.readouterr().out
        assert 'becomes:  nets.py:Net, ' in said and 'time:     about' in said
        assert not (here / 'out').exists()


BAD: dict[str, tuple[list[str], str]] = {
    'nothing to keep': ([*PRUNE, '--keep', '0'], '--keep 0'),
    'less than a filter': ([*PRUNE, '--keep', '0.01'], 'give --keep 0.17 or more'),
    'less than a group': (
        [*PRUNE, '--keep', '0.2', '--set', 'group_size=3'],
        'or --set group_size=1',
    ),
    'fewer operations': (command('prune', '--flops', '0.01'), 'give --flops'),
    'a test that is damaged': ([*PRUNE, '--test', 'taken'], '--test taken'),
    'bits of a seed': ([*QUANTIZE, '--seed', '-3'], "'-3' is not a seed"),
    'all of it': ([*PRUNE, '--keep', '1'], '--keep 1'),
    'two fractions': ([*PRUNE, '--flops', '0.5'], 'not allowed with'),
    'no fraction': (command('prune'), 'required'),
    'minutes and steps': ([*PRUNE, '--minutes', '1'], 'not allowed with'),
    'negative updates': ([*QUANTIZE, '--updates', '-1'], '--steps -1'),
    'ONNX of four bits': (
        [*QUANTIZE, '--bits', '4', '--export', 'onnx'],
        'ONNX Runtime has 8 bits',
    ),
    'negative steps': ([*PRUNE, '--steps', '-1'], '--steps -1'),
    'one bit': ([*QUANTIZE, '--bits', '1'], '--bits 1'),
    'few images': ([*QUANTIZE, '--images', '3'], '--images 3'),
    'a setting with an option': ([*PRUNE, '--set', 'images=5'], 'use --images'),
    'an unknown setting': ([*PRUNE, '--set', 'keeep=0.5'], 'keep'),
    'no network': ([*QUANTIZE, '--model', ''], 'no network is named'),
    'another run': ([*QUANTIZE, '--out', 'taken'], 'dfkd quantize'),
}


def test_prune_takes_the_least_that_it_names(here: Path) -> None:
    assert main([*PRUNE, '--keep', '0.17', '--steps', '0']) == 0
    assert result(here / 'out')['numbers']['filters_removed'] == 5  # of six


def test_fine_tuning_that_diverges_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUANTIZE, '--updates', '60', '--set', 'learning_rate=1000']
    line = failure(capsys, [*words, '--set', 'momentum=0.999', '--set', 'weight_decay=9'])
    assert 'learning_rate' in line, line


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / 'taken').mkdir()
    (here / 'taken' / 'note.txt').write_text('mine')
    words, message = BAD[name]
    assert message in failure(capsys, words)
    assert not (here / 'out').exists()
