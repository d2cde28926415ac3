"Networks that ship: their files, their domains, their accuracy, and the wheel."

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dfkd_nb.lab.cards import teacher_licence
from dfkd_nb.lab.commands import main
from dfkd_nb.lab.invert_settings import inversion_settings, trained_elsewhere
from dfkd_nb.lab.tasks.common import open_teacher
from dfkd_nb.toolbox.core import load_tensors
from dfkd_nb.toolbox.datasets import load_data
from dfkd_nb.toolbox.domains import DOMAINS, domain_metadata, named_domain
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.evaluation import evaluate
from dfkd_nb.toolbox.mlperf_tiny import pad_after
from dfkd_nb.toolbox.models import build_model, count_parameters
from dfkd_nb.toolbox.teachers import load_teacher, shipped_weights

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get('DFKD_DATA', 'no-such-folder'))
NAME = 'cifar10-mlperf-resnet8'


def test_two_teachers_ship() -> None:
    assert shipped_weights() == [NAME, 'cifar10-resnet20']


def test_the_public_resnet8_takes_pixels_as_they_are() -> None:
    teacher = load_teacher(NAME)
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert teacher.domain.normalize(white).allclose(torch.tensor(255.0))
    assert teacher.domain.classes == DOMAINS['cifar10'].classes
    assert count_parameters(teacher) == 78_186
    assert teacher.about['licence'] == 'Apache-2.0'
    assert 'MLCommons' in teacher_licence(NAME)


def test_its_accuracy_on_the_packed_test_images() -> None:
    # 1,712 of 2,000
    assert evaluate(load_teacher(NAME), load_data('cifar10-mini')) == pytest.approx(
        0.856, abs=1e-3
    )


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / 'cifar10').is_dir(), reason='needs DFKD_DATA/cifar10')
def test_its_accuracy_is_the_one_that_its_file_states() -> None:
    teacher = load_teacher(NAME)
    found = evaluate(teacher, load_data('cifar10', 'test'))
    assert f'{found:.4f}' == teacher.about['accuracy'] == '0.8719'


@pytest.mark.skipif(not (DATA / 'networks').is_dir(), reason='needs DFKD_DATA/networks')
def test_no_number_of_the_public_file_was_changed() -> None:
    original = load_tensors(DATA / 'networks/mlperf_tiny_resnet8.safetensors')[0]
    ours = load_teacher(NAME).model.state_dict()
    words = {'kernel': 'weight', 'gamma': 'weight', 'beta': 'bias', 'bias': 'bias'}
    words |= {'moving_mean': 'running_mean', 'moving_variance': 'running_var'}
    for key, value in original.items():
        layer, _, word = key.rpartition('.')
        assert ours[f'{layer}.{words[word]}'].equal(value), key
    assert len(original) == sum(not k.endswith('tracked') for k in ours)


def test_tensorflows_padding() -> None:
    "Of one missing pixel all is after: the first window begins at the first pixel."
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    found = F.conv2d(pad_after(x), torch.ones(1, 1, 3, 3), stride=2)
    # sums of rows and columns 0 to 2, and of 2 to 3 with one of zeros
    assert found[0, 0].tolist() == [[54.0, 45.0], [72.0, 54.0]]


def test_a_file_says_what_differs_from_the_domain_it_names() -> None:
    cifar = DOMAINS['cifar10']
    assert domain_metadata(cifar) == {'domain': 'cifar10'}
    other = replace(
        cifar, shape=(3, 48, 48), mean=(0.0,) * 3, std=(1 / 255,) * 3, classes=('a', 'b c')
    )
    about = domain_metadata(other)
    assert about.keys() == {'domain', 'shape', 'mean', 'std', 'classes'}
    assert named_domain(about | {'model': 'resnet8', 'recipe': 'x'}) == other
    assert domain_metadata(replace(cifar, name='own')) == {'domain': 'own'}
    with pytest.raises(DFKDError, match='not known: use digits'):
        named_domain({'domain': 'own'})


def test_networks_of_others_get_relative_statistics() -> None:
    arguments = argparse.Namespace(set=[], n=4, memory=None, model='', teacher=NAME)
    foreign = trained_elsewhere(arguments, load_teacher(NAME))
    assert inversion_settings(arguments, 32, foreign).feature_scale == 'relative'
    foreign = trained_elsewhere(arguments, load_teacher('cifar10-resnet20'))
    assert inversion_settings(arguments, 32, foreign).feature_scale == 'absolute'


def test_a_student_of_a_run_is_opened_with_its_teachers_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ['run', 'cifar10-transfer-noise', '--scale', 'quick', '--device', 'cpu']
    changes = f'teacher={NAME} student=resnet8 images=16 steps=4 synthesis_steps=1'
    changes += ' batch_size=8 test_limit=20 synthesis_batch_size=8 rounds=1'
    sets = [word for change in changes.split() for word in ('--set', change)]
    assert main([*words, *sets]) == 0
    found = open_teacher('run:cifar10-transfer-noise/quick', tmp_path / 'runs')
    assert found.domain == load_teacher(NAME).domain


@pytest.mark.slow
def test_its_student_and_its_pruned_network_are_made_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = 'synthesis_steps=2 half_size_steps=2 synthesis_batch_size=8'
    inversion = [word for change in small.split() for word in ('--set', change)]
    words = [*inversion, '--set', 'held_out=10', '--set', 'held_out_steps=2']
    words += ['--images', '10', '--device', 'cpu', '--teacher', NAME]
    student = ['--student', 'mlperf-resnet8', '--method', 'deepinversion', '--steps', '10']
    test = ['--test', 'cifar10-mini']
    assert main(['distill', *words, *student, *test, '--out', 'student']) == 0
    numbers = json.loads((tmp_path / 'student/result.json').read_text())['numbers']
    assert numbers['teacher_accuracy'] == pytest.approx(0.856, abs=1e-3)
    card = (tmp_path / 'student/model-card.md').read_text()
    assert "Licence: Apache-2.0, MLCommons' MLPerf Tiny" in card
    assert main(['prune', *words, '--keep', '0.7', '--steps', '0', '--out', 'pruned']) == 0
    card = (tmp_path / 'pruned/model-card.md').read_text()
    code = card.partition('```python\n')[2].partition('```')[0]
    monkeypatch.chdir(tmp_path / 'pruned')
    scope: dict = {}
    exec(code, scope)  # what the card says
    assert count_parameters(scope['student']) < 60_000
    assert (
        main(['invert', '--teacher', NAME, '--n', '2', '--out', 'dreams', *inversion]) == 0
    )


def test_data_sets_by_name_are_tests(capsys: pytest.CaptureFixture[str]) -> None:
    words = ['distill', '--teacher', NAME, '--student', 'resnet8', '--plan']
    assert main([*words, '--test', 'digits', '--out', 'no']) == 2
    assert 'images of shape (1, 8, 8)' in capsys.readouterr().err
    assert main([*words, '--test', 'cifar10-maxi', '--out', 'no']) == 2
    assert 'nor a data set: cifar10-mini' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('build') is None, reason='needs build')
def test_the_wheel_has_weights_and_notices(tmp_path: Path) -> None:
    for path in (ROOT / 'dfkd_nb', *ROOT.glob('*.*'), ROOT / 'LICENSE'):
        target = tmp_path / path.name
        if path.is_dir() and path.name == 'dfkd_nb':
            shutil.copytree(path, target)
        elif path.is_file():
            shutil.copyfile(path, target)
    words = [sys.executable, '-m', 'build', '--wheel', '--no-isolation', str(tmp_path)]
    subprocess.run(words, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = (tmp_path / 'dist').glob('*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / 'dfkd_nb/weights').iterdir():
        assert f'dfkd_nb/weights/{path.name}' in names
    licences = [name for name in names if 'dist-info/licenses/' in name]
    assert {Path(name).name for name in licences} == {'LICENSE', f'{NAME}.NOTICE.txt'}


def test_each_network_of_others_has_a_notice() -> None:
    for name in shipped_weights():
        about = load_teacher(name).about
        notice = ROOT / f'dfkd_nb/weights/{name}.NOTICE.txt'
        assert ('source' in about) == notice.is_file()
        if notice.is_file():
            text = notice.read_text()
            assert 'Apache License, Version 2.0' in text and 'Changes:' in text
            assert build_model(about['model']) is not None
