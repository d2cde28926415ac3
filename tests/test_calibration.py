"""The task that compares calibrations: rows, widths, and the images that it takes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dfkd_nb.lab.application_settings import CalibrationSettings
from dfkd_nb.lab.tasks import calibration
from dfkd_nb.lab.tasks.calibration import (
    calibrated_network,
    check_calibration,
    row_parts,
    split_real_images,
    spread_classes,
    synthesis,
    width_bits,
    zeroq_batches,
)
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.models import build_model
from dfkd_nb.toolbox.teachers import Teacher

pytest.importorskip('torchao')
DIGITS = DOMAINS['digits']


def digits_teacher() -> Teacher:
    torch.manual_seed(0)
    network = build_model('digits-net', 10, 1).train()
    with torch.no_grad():  # running statistics that are not 0 and 1
        network(torch.randn(64, 1, 8, 8))
    return Teacher(network, DIGITS)


def test_names_of_rows_and_widths() -> None:
    assert row_parts('intraq') == ('intraq', {})
    expected = {'observer': 'min-max', 'granularity': 'per-tensor'}
    assert row_parts('noise/min-max/per-tensor') == ('noise', expected)
    assert width_bits('W4A8') == (4, 8)


@pytest.mark.parametrize('row', ['gdfq', 'zeroq/mean', 'noise/'])
def test_an_unknown_row(row: str) -> None:
    with pytest.raises(DFKDError, match=f"unknown row '{row}'"):
        check_calibration(CalibrationSettings(rows=(row,)))


@pytest.mark.parametrize('width', ['W4', '4/8', 'W1A8', 'W4A16'])
def test_an_unknown_width(width: str) -> None:
    with pytest.raises(DFKDError, match='both from 2 to 8'):
        check_calibration(CalibrationSettings(widths=(width,)))
    with pytest.raises(DFKDError, match='both from 2 to 8'):
        check_calibration(CalibrationSettings(finetuned=(width,)))


def test_nothing_to_compare() -> None:
    with pytest.raises(DFKDError, match='rows is empty'):
        check_calibration(CalibrationSettings(rows=()))


def test_rows_differ_in_what_their_names_say() -> None:
    teacher, settings = digits_teacher(), CalibrationSettings()
    images = ImageSet(torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8), None, DIGITS)
    for row, found in (
        ('noise/min-max', ('min-max', 'per-channel')),
        ('batchnorm/per-tensor', ('histogram', 'per-tensor')),
    ):
        given = images if row.startswith('noise') else None
        network = calibrated_network(settings, teacher, row, 'W4A8', given)
        made = network.settings
        assert (made['observer'], made['granularity']) == found
        assert (made['bits'], made['activation_bits'], made['end_bits']) == (4, 8, 8)


def test_classes_are_spread_and_the_same_in_each_batch() -> None:
    settings = CalibrationSettings(synthesis_batch_size=4)
    assert spread_classes(settings, 1000) == [0, 250, 500, 750]
    assert spread_classes(settings, 3) == [0, 1, 2]


def test_zeroq_has_the_steps_times_pixels_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = CalibrationSettings(
        images=5,
        synthesis_batch_size=2,
        synthesis_steps=10,
        half_size_steps=8,
        quarter_size_steps=32,
        seed=3,
    )
    asked: list[Any] = []

    def images(teacher: Teacher, count: int, *more: Any) -> Any:
        asked.append((count, *more))
        pixels = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
        return SimpleNamespace(images=pixels), []

    monkeypatch.setattr(calibration, 'zeroq_images', images)
    teacher = digits_teacher()
    assert sum(map(len, zeroq_batches(settings, teacher))) == 5
    assert [a[0] for a in asked] == [2, 2, 1]
    assert [a[1] for a in asked] == [14, 14, 14]  # 10 + 8 / 4 + 32 / 16
    assert [a[-1] for a in asked] == [3000, 3001, 3002]
    run: Any = SimpleNamespace(settings=settings, device=torch.device('cpu'))
    work = synthesis(run, teacher, 'deepinversion').pixel_steps()
    assert work == 14 * 64


def test_where_test_images_are_of_the_same_files_they_are_kept_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    numbers = torch.arange(50, dtype=torch.uint8)
    pixels = numbers.view(50, 1, 1, 1).expand(50, 1, 8, 8).contiguous()

    class Files:
        "Stands for a set of files on a disk, which can only be read."

        def in_memory(self) -> ImageSet:
            return ImageSet(pixels, None, DIGITS)

    monkeypatch.setattr(calibration, 'real_images', lambda *_: Files())
    same = {'test_data': 'imagenet-sample', 'real_data': 'imagenet-sample'}
    run: Any = SimpleNamespace(device=torch.device('cpu'))
    run.settings = CalibrationSettings(test_limit=20, **same)
    test, others = split_real_images(run)
    assert others is not None and len(test) == 20 and len(others) == 30
    shown = set(test.images[:, 0, 0, 0].tolist())
    rest = set(others.images[:, 0, 0, 0].tolist())
    assert len(shown) == 20 and not shown & rest and len(shown | rest) == 50
    run.settings = CalibrationSettings(seed=5, test_limit=20, **same)
    again, _ = split_real_images(run)  # every seed has the same test images
    assert torch.equal(again.images, test.images)
    run.settings = CalibrationSettings(test_limit=0, **same)
    with pytest.raises(DFKDError, match='set test_limit'):
        split_real_images(run)
