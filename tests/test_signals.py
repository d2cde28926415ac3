"Inputs of one dimension: signals `(C, L)` are synthesised, kept and learned from."

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfkd_nb.applications.filters import ConvShape, conv_shapes
from dfkd_nb.applications.quantization import quantize
from dfkd_nb.dreams.inversion import DeepInversion
from dfkd_nb.dreams.priors import clip_to_domain, jitter, total_variation
from dfkd_nb.dreams.statistics import Statistics, measure_moments
from dfkd_nb.foundations.distillation import Distiller, train
from dfkd_nb.foundations.image_store import ImageStore
from dfkd_nb.foundations.loop import GrowingPool
from dfkd_nb.lab.commands import main
from dfkd_nb.toolbox.augmentation import Augment
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import DOMAINS, Domain, resize_images
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.evaluation import evaluate
from dfkd_nb.toolbox.image_exports import export_images
from dfkd_nb.toolbox.teachers import Teacher

LENGTH = 64
TONES = Domain('tones', (2, LENGTH), (0.5, -3.0), (2.0, 0.5), ('low', 'middle', 'high'))


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    "Sine waves of three frequencies with noise, in two channels of unequal units."
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    cycles = 2.0 * 2 ** labels[:, None]
    phase = 2 * torch.pi * torch.rand(count, 1, generator=rng)
    wave = (2 * torch.pi * cycles * torch.arange(LENGTH) / LENGTH + phase).sin()
    signals = torch.stack([wave, wave], 1)
    signals += 0.5 * torch.randn(count, 2, LENGTH, generator=rng)
    return TONES.denormalize(signals), labels


def network(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, width, 9, 2, 4, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Conv1d(width, width, 9, 2, 4, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(width, 3),
    )


LEARNING: dict[str, Any] = {'batch_size': 32, 'learning_rate': 0.05, 'device': 'cpu'}


@pytest.fixture(scope='module')
def teacher() -> Teacher:
    torch.manual_seed(0)
    model = network()
    train(model, ImageSet(*tones(300, 0), TONES), steps=60, **LEARNING)
    return Teacher(model, TONES, 'tones')


def inversion(teacher: Teacher, **settings: Any) -> DeepInversion:
    usual = {'steps': 20, 'batch_size': 24, 'jitter': 4, 'tv_l2': 0.01, 'device': 'cpu'}
    return DeepInversion(teacher, **usual | settings)


def test_a_domain_of_signals_has_no_range() -> None:
    assert TONES.is_signal and TONES.size == (LENGTH,) and TONES.storage == torch.float32
    x = 100 * torch.randn(3, 2, LENGTH, generator=torch.Generator().manual_seed(0))
    stored = TONES.to_stored(x)
    assert stored.dtype == torch.float32
    torch.testing.assert_close(TONES.normalize(stored), x)
    by_hand = (stored[:, 1] + 3) / 0.5
    torch.testing.assert_close(TONES.normalize(stored)[:, 1], by_hand)
    assert TONES.from_pixels(x) is x and TONES.to_pixels(x) is x
    torch.testing.assert_close(TONES.check(stored), stored)
    assert Domain.from_values((1, 8), 2, -4.0, 9.0).mean == (-4.0,)
    again = Domain.from_metadata(TONES.to_metadata(), TONES.shape)
    assert again == TONES


def test_images_are_what_they_were() -> None:
    digits = DOMAINS['digits']
    assert not digits.is_signal and digits.storage == torch.uint8
    x = torch.randn(2, 1, 8, 8)
    assert digits.to_stored(x).equal(digits.to_uint8(x))


def test_total_variation_of_neighbouring_samples() -> None:
    x = torch.tensor([[[0.0, 3.0, 3.0], [0.0, 0.0, 4.0]]])
    assert total_variation(x).tolist() == [5.0]
    assert total_variation(x, 'l1').tolist() == [7 / 4]
    x = torch.randn(3, 2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total_variation, (x,))


def test_jitter_rolls_time() -> None:
    x = torch.arange(7.0).expand(2, 1, 7)
    rng = torch.Generator().manual_seed(1)
    seen = {int(jitter(x, 2, rng)[0, 0, 0]) for _ in range(60)}
    assert seen == {0, 1, 2, 5, 6}
    moved = jitter(x, 2, rng)
    assert moved[0].equal(moved[1]) and moved.sort(-1).values.equal(x)


def test_signals_are_kept_as_floats(tmp_path: Path) -> None:
    signals, labels = tones(6, 3)
    kept = ImageSet(signals, labels, TONES)
    kept.save(tmp_path / 'tones.safetensors')
    again = ImageSet.load(tmp_path / 'tones.safetensors')
    assert again.images.equal(signals) and again.domain == TONES
    torch.testing.assert_close(kept[2][0], TONES.normalize(signals)[2])
    collected = ImageSet.collect([(s.numpy(), int(y)) for s, y in zip(*tones(6, 3))], TONES)
    assert collected.images.equal(signals) and collected.labels.equal(labels)
    pool = GrowingPool(TONES)
    pool.add(signals, labels)
    assert pool.images.equal(signals)
    export_images(kept, tmp_path / 'tones.npy', 'npy')
    assert np.array_equal(np.load(tmp_path / 'tones.npy'), signals.numpy())


def test_batchnorm_of_one_dimension_is_measured(teacher: Teacher) -> None:
    stored = Statistics.from_batchnorm(teacher)
    assert [len(mean) for mean, _ in stored.values()] == [8, 8]
    images = ImageSet(*tones(300, 0), TONES)
    measured = measure_moments(teacher, images, list(stored))
    for name in stored:
        torch.testing.assert_close(measured[name][0], stored[name][0], atol=0.3, rtol=0.3)


def test_a_student_learns_from_dreams_and_not_from_noise(teacher: Teacher) -> None:
    fresh = ImageSet(*tones(150, 9), TONES)
    assert evaluate(teacher, fresh) > 0.95
    dreams = inversion(teacher, steps=60, batch_size=96).synthesize(96)
    assert dreams.images.dtype == torch.float32 and dreams.images.shape[1:] == TONES.shape
    assert teacher.predict(dreams).argmax(1).eq(dreams.labels).float().mean() > 0.9
    noise = TONES.denormalize(torch.randn(96, 2, LENGTH))
    accuracies = []
    for source in (dreams, ImageSet(noise, None, TONES)):
        torch.manual_seed(1)
        student = network(6)
        Distiller(teacher, student, source, steps=120, **LEARNING).run()
        accuracies.append(evaluate(student, fresh))
    assert accuracies[0] > 0.8 > accuracies[1] + 0.2, accuracies


def test_dreams_of_signals_resume_to_the_same_bits(teacher: Teacher) -> None:
    stages = [(LENGTH // 2, 6), ((LENGTH,), 6)]
    whole = inversion(teacher, stages=stages).synthesize(12)
    first = inversion(teacher, stages=stages)
    first.start(12)
    for _ in range(7):
        first.step()
    second = inversion(teacher, stages=stages)
    second.load_state_dict(first.state_dict())
    assert second.run().images.equal(whole.images)
    # beyond what bytes of an image could hold, and not mirrored
    assert whole.images[:, 1].min() < -4.01
    assert second.pixel_steps() == 6 * LENGTH // 2 + 6 * LENGTH


def test_the_loop_teaches_on_signals(teacher: Teacher) -> None:
    from dfkd_nb.foundations.loop import AlternatingTrainer

    pool = GrowingPool(TONES)
    student = network(6)
    distiller = Distiller(teacher, student, pool, steps=8, **LEARNING)
    maker = inversion(teacher, steps=3, batch_size=16)
    AlternatingTrainer(maker, distiller, rounds=2, steps_per_round=4).run()
    assert len(pool) == 32 and pool.images.dtype == torch.float32 and distiller.done == 8


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    'bytes': (
        lambda: ImageSet(torch.zeros(1, 2, LENGTH, dtype=torch.uint8), None, TONES),
        'give float32',
    ),
    'another length': (
        lambda: ImageSet(torch.zeros(1, 2, 9), None, TONES),
        'do not fit',
    ),
    'another number of channels': (
        lambda: TONES.normalize(torch.zeros(1, 3, LENGTH)),
        r'give \(N, 2, L\)',
    ),
    'integers': (
        lambda: TONES.normalize(torch.zeros(1, 2, LENGTH, dtype=torch.long)),
        'give floats',
    ),
    'infinity': (
        lambda: TONES.check(torch.full((1, 2, LENGTH), float('inf'))),
        'NaN or infinity',
    ),
    'no number': (lambda: ImageSet.collect(['a'], TONES), 'tensors or arrays'),
    'a mean without an end': (
        lambda: Domain('x', (1, 8), (float('nan'),), (1.0,), ('a',)),
        'finite ones',
    ),
    'one number': (lambda: Domain('x', (8,), (0.0,), (1.0,), ('a',)), 'give shape'),
    'four numbers': (
        lambda: Domain('x', (1, 2, 3, 4), (0.0,), (1.0,), ('a',)),
        'give shape',
    ),
    'as bytes': (lambda: TONES.to_uint8(torch.zeros(1, 2, LENGTH)), 'use to_stored'),
    'limits': (lambda: clip_to_domain(torch.zeros(1, 2, LENGTH), TONES), 'no limits'),
    'resized': (
        lambda: resize_images(torch.zeros(1, 1, 8, 8), TONES),
        'a domain of images',
    ),
    'pictures': (lambda: ImageSet(*tones(3, 0), TONES).to_folder('x'), 'no pictures'),
    'a table': (lambda: ImageSet(*tones(3, 0), TONES).to_parquet('x'), 'no pictures'),
    'shards': (
        lambda: export_images(ImageSet(*tones(3, 0), TONES), 'x', 'webdataset'),
        "write 'npy'",
    ),
    'augmentation': (
        lambda: Augment()(torch.zeros(1, 2, LENGTH), torch.Generator()),
        'augment=None',
    ),
    'a store of bytes': (
        lambda: ImageStore((2, LENGTH), 'cpu').append(torch.zeros(1, 2, LENGTH)),
        'keeps torch.uint8',
    ),
    'one sample': (lambda: total_variation(torch.zeros(1, 2, 1)), r'signals \(N, C, L\)'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_signals_are_told(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    attempt, words = BAD[name]
    with pytest.raises(DFKDError, match=words) as found:
        attempt()
    assert len(str(found.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_stages_of_signals(teacher: Teacher) -> None:
    with pytest.raises(DFKDError, match='a stage of 5 steps at 1 pixels'):
        inversion(teacher, stages=[(1, 5), (LENGTH, 5)])
    with pytest.raises(DFKDError, match='make them agree'):
        inversion(teacher, stages=[(LENGTH // 2, 5)])


NETWORKS = """
import torch
from torch import nn


def net():
    return nn.Sequential(
        nn.Conv1d(2, 8, 5, 2, 2, bias=False), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Conv1d(8, 48, 5, padding=2, bias=False), nn.BatchNorm1d(48), nn.ReLU(),
        nn.Conv1d(48, 48, 5, padding=2), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(48, 3),
    )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 8, 7, 2, 3), nn.BatchNorm1d(8)
        self.gru, self.last = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.last(self.gru(x.transpose(1, 2))[0][:, -1])
"""


@pytest.fixture
def one_dimensional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine.py').write_text(NETWORKS)
    words = '--model mine.py:net --length 32 --mean 1,-2 --std 3,0.5 --images 20'
    words += ' --set synthesis_steps=3 --set held_out=20 --set held_out_steps=3'
    return f'{words} --device cpu'.split()


def card_code(folder: Path) -> tuple[dict[str, Any], str]:
    "What the code of a model card leaves, with the domain that it asks for."
    card = (folder / 'model-card.md').read_text()
    code = card.partition('```python\n')[2].partition('```')[0]
    given = "Domain('own', (2, 32), (1.0, -2.0), (3.0, 0.5), ('0', '1', '2'))"
    scope: dict[str, Any] = {'Domain': Domain}
    exec(code.replace('domain = ...', f'domain = {given}'), scope)
    return scope, card


def test_a_network_of_signals_gets_eight_bits(
    one_dimensional: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'bits'
    assert main(['quantize', *one_dimensional, '--steps', '2', '--out', str(out)]) == 0
    numbers = json.loads((out / 'result.json').read_text())['numbers']
    assert numbers['bytes_student'] < 0.4 * numbers['bytes_teacher']
    assert numbers['agreement'] == 1
    shutil.copyfile('mine.py', out / 'mine.py')
    monkeypatch.chdir(out)
    scope, card = card_code(out)
    assert '2 x 32, minus 1, -2, divided by 3, 0.5' in card
    student = scope['student']
    integers = [v for v in student.state_dict().values() if v.dtype == torch.int8]
    assert sorted(v.ndim for v in integers if v.ndim > 1) == [2, 3, 3, 3]
    assert student(torch.randn(5, 2, 32)).shape == (5, 3)


def test_a_network_of_signals_loses_filters(
    one_dimensional: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'pruned'
    words = ['prune', *one_dimensional, '--keep', '0.5', '--steps', '2']
    assert main([*words, '--out', str(out)]) == 0
    shutil.copyfile('mine.py', out / 'mine.py')
    monkeypatch.chdir(out)
    student = card_code(out)[0]['student']
    layers = [m for m in student.modules() if isinstance(m, nn.Conv1d)]
    kept = sum(layer.out_channels for layer in layers)
    assert 45 <= kept <= 60 and layers[1].in_channels == layers[0].out_channels
    assert student(torch.randn(5, 2, 32)).shape == (5, 3)


def test_rows_of_samples_have_shapes_of_convolutions() -> None:
    scope: dict[str, Any] = {}
    exec(NETWORKS, scope)
    domain = Domain('own', (2, 32), (0.0, 0.0), (1.0, 1.0), ('a', 'b', 'c'))
    shapes = conv_shapes(scope['net'](), domain)
    assert shapes['0'] == ConvShape(2, 8, '1x5', '1x2', '1x32')
    layer, size = shapes['3'].build()
    assert layer(torch.zeros(1, 8, *size)).shape == (1, 48, 1, 16)


def test_ranges_of_signals_come_from_batchnorm() -> None:
    scope: dict[str, Any] = {}
    exec(NETWORKS, scope)
    torch.manual_seed(0)
    domain = Domain('own', (2, 32), (1.0, -2.0), (3.0, 0.5), ('a', 'b', 'c'))
    teacher = Teacher(scope['net'](), domain)
    network = quantize(teacher, None)
    x = torch.randn(64, 2, 32)
    error = (network(x) - teacher(x)).abs().max() / teacher(x).abs().max()
    assert 0 < error < 0.05


def test_layers_that_cannot_lose_filters_are_named_before_the_work(
    one_dimensional: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ['prune', *one_dimensional, '--model', 'mine.py:Recurrent', '--keep', '0.5']
    assert main([*words, '--out', 'no']) == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if 'error' in s]
    assert 'Recurrent' in line and 'cannot be removed' in line
    assert not (tmp_path / 'no').exists()
