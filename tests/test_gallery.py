"Networks that nobody here trained: signals and networks of one size; the gallery."

from __future__ import annotations

import argparse
import importlib.util
import json
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dfkd_nb.lab.commands import main
from dfkd_nb.lab.invert_settings import inversion_settings, trained_elsewhere
from dfkd_nb.lab.tasks.synthesis import usable_stages
from dfkd_nb.toolbox.data import ImageSet
from dfkd_nb.toolbox.domains import Domain
from dfkd_nb.toolbox.teachers import Teacher

ROOT = Path(__file__).resolve().parent.parent
GALLERY = ROOT / 'tools/gallery'


def gallery_module(name: str) -> ModuleType:
    about: Any = importlib.util.spec_from_file_location(name, GALLERY / f'{name}.py')
    module = importlib.util.module_from_spec(about)
    about.loader.exec_module(module)
    return module


NET = """
from torch import nn


def net(width=6):
    return nn.Sequential(
        nn.Conv1d(2, width, 5, 2, 2, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 3),
    )


def whole(size=8):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * size * size, 3),
    )
"""
SIGNALS = ['--model', 'mine.py:net', '--length', '32', '--mean', '1,-2', '--std', '3,0.5']
SMALL = 'synthesis_steps=3 synthesis_batch_size=8 held_out=10 held_out_steps=3'
SET = [word for value in SMALL.split() for word in ('--set', value)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine.py').write_text(NET)
    return tmp_path


def numbers_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'result.json').read_text())['numbers']


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_signals_are_inverted_to_arrays(here: Path) -> None:
    words = ['invert', *SIGNALS, '--n', '6', '--set', 'synthesis_steps=3', '--out', 'made']
    assert main([*words, '--device', 'cpu']) == 0
    lines = json.loads((here / 'made/manifest.json').read_text())['images']
    arrays = [np.load(here / 'made' / line['file']) for line in lines]
    assert {a.shape for a in arrays} == {(2, 32)} and arrays[0].dtype == np.float32
    found = np.stack(arrays).mean((0, 2))
    # in the units of the domain: around its means, 1 and -2
    assert abs(found[0] - 1) < 2 and abs(found[1] + 2) < 0.5
    assert [line['class'] for line in lines] == [0, 1, 2, 0, 1, 2]


def test_signals_teach_a_student(here: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    domain = Domain('tones', (2, 32), (1.0, -2.0), (3.0, 0.5), ('a', 'b', 'c'))
    signals = domain.denormalize(torch.randn(30, 2, 32, generator=generator))
    ImageSet(signals, torch.arange(30) % 3, domain).save(here / 'test.safetensors')
    common = [*SIGNALS, '--images', '16', *SET, '--test', 'test.safetensors']
    student = ['--student', 'mine.py:net(width=3)', '--method', 'deepinversion']
    words = ['distill', *common, *student, '--steps', '10', '--out', 'student']
    assert main([*words, '--device', 'cpu']) == 0
    numbers = numbers_of(here / 'student')
    assert numbers['steps'] == 10 and numbers['test_images'] == 30
    made = ImageSet.load(here / 'student/images.safetensors')
    assert made.images.shape == (16, 2, 32) and made.images.dtype == torch.float32
    assert (here / 'student/images.png').stat().st_size > 1000
    assert 'alt="waveforms"' in (here / 'student/report.html').read_text()


def test_what_signals_do_not_have_is_refused_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ['--out', 'x', '--device', 'cpu']
    invert = ['invert', *SIGNALS, '--n', '2', *out]
    assert 'use npy' in refusal([*invert, '--format', 'png'], capsys)
    assert 'leave it out' in refusal([*invert, '--grid', '2'], capsys)
    assert 'leave --size out' in refusal([*invert, '--size', '32'], capsys)
    assert 'leave --range out' in refusal([*invert, '--range', '0..1'], capsys)
    distill = ['distill', *SIGNALS, '--student', 'mine.py:net', *out]
    line = refusal([*distill, '--method', 'fast-5'], capsys)
    assert 'these are signals: use deepinversion' in line
    other = Domain('tones', (2, 31), (0.0, 0.0), (1.0, 1.0), ('a', 'b', 'c'))
    ImageSet(torch.zeros(3, 2, 31), torch.arange(3), other).save(here / 'odd.safetensors')
    words = [*distill, '--method', 'deepinversion', '--test', 'odd.safetensors']
    assert 'shape (2, 32)' in refusal(words, capsys)
    images = [
        '--model',
        'mine.py:whole',
        '--channels',
        '1',
        '--size',
        '8',
        '--format',
        'npy',
    ]
    images += ['--mean', '0.5', '--std', '0.5']
    assert 'is for signals' in refusal(['invert', *images, *out], capsys)
    assert not (here / 'x').exists()


def test_stages_that_a_network_refuses_are_added_to_the_next() -> None:
    domain = Domain('own', (1, 8, 8), (0.5,), (0.5,), ('a', 'b', 'c'))
    scope: dict[str, Any] = {}
    exec(NET, scope)
    rigid = Teacher(scope['whole'](), domain)
    stages = [((2, 2), 7), ((4, 4), 5), ((8, 8), 3)]
    assert usable_stages(stages, rigid) == [((8, 8), 15)]
    assert usable_stages(stages[:2], rigid) == [((8, 8), 12)]
    free = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    # a kernel of three pixels does not fit into two
    assert usable_stages(stages, Teacher(free, domain)) == [((4, 4), 12), ((8, 8), 3)]


def test_a_network_of_one_size_is_inverted(here: Path) -> None:
    words = ['--model', 'mine.py:whole', '--channels', '1', '--size', '8', '--mean', '0.5']
    words += ['--std', '0.5', '--set', 'half_size_steps=2', '--set', 'synthesis_steps=2']
    assert main(['invert', *words, '--n', '4', '--out', 'made', '--device', 'cpu']) == 0
    assert len(list((here / 'made').rglob('*.png'))) == 4


def test_networks_of_the_user_get_relative_statistics() -> None:
    arguments = argparse.Namespace(set=[], n=4, memory=None, model='', teacher='mine')
    teacher = SimpleNamespace(about={})
    assert not trained_elsewhere(arguments, teacher)
    assert inversion_settings(arguments, 32).feature_scale == 'absolute'
    arguments.model = 'mine.py:Net'
    assert trained_elsewhere(arguments, teacher)
    found = inversion_settings(arguments, 32, True)
    assert (found.feature_scale, found.feature_weight) == ('relative', 2.0)
    arguments.set = ['feature_scale=absolute']
    assert inversion_settings(arguments, 32, True).feature_scale == 'absolute'


def test_tones_have_the_pitch_of_their_class() -> None:
    networks = gallery_module('networks')
    assert float(networks.pitch(torch.tensor(228.0))) == pytest.approx(440, rel=0.006)
    signals, labels = networks.tones(20)
    again, _ = networks.tones(20)
    assert signals.equal(again) and signals.shape == (20, 1, 1024)
    spectrum = torch.fft.rfft(signals[:, 0] * torch.hann_window(1024)).abs()
    found = spectrum.argmax(1) * 16000 / 1024
    ratio = found / networks.pitch(labels)
    # the fundamental is the loudest; a bin of the spectrum is 15.6 Hz wide
    assert ((ratio - 1).abs() * networks.pitch(labels) < 16).all()


def test_every_published_run_of_the_gallery_has_floor_and_ceiling() -> None:
    known = tomllib.loads((GALLERY / 'gallery.toml').read_text())
    folders = sorted((ROOT / 'results').glob('gallery-*/hour'))
    assert folders
    for folder in folders:
        name, _, what = folder.parent.name.removeprefix('gallery-').rpartition('-')
        assert name in known and what in ('8bit', 'student', 'pruned')
        text = (folder / 'result.json').read_text()
        assert '"recipe": "' + folder.parent.name + '"' in text
        for path in folder.glob('*.*'):
            if path.suffix in ('.json', '.toml', '.csv'):
                found = path.read_text()
                assert not any(f'{part}/' in found for part in ('/var', '/work', '/tmp'))
        numbers = json.loads(text)['numbers']
        if known[name].get('test'):
            chance = 1 / numbers.get('classes', 10)
            assert chance < numbers['teacher_accuracy'] <= 1
            assert 0 <= numbers['student_accuracy'] <= 1
        if what == 'student':
            assert {'agreement_first', 'agreement'} <= set(numbers)
        if what == '8bit' or name.startswith('crepe'):
            for judge in known[name].get('judges', ()):
                assert 0 <= numbers[f'recognition_by_{judge}'] <= 1


def test_layers_that_stay_in_float_raise_an_alarm(here: Path) -> None:
    code = """
from torch import nn


class Padded(nn.Conv2d):
    pass


def net(kind='plain'):
    layer = Padded if kind == 'derived' else nn.Conv2d
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), layer(8, 256, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 3),
    )
"""
    (here / 'mine.py').write_text(code)
    for kind in ('plain', 'derived'):
        words = ['quantize', '--model', f"mine.py:net(kind='{kind}')", '--images', '16']
        words += ['--size', '8', '--channels', '1', '--mean', '0.5', '--std', '0.5', *SET]
        assert main([*words, '--out', kind, '--device', 'cpu']) == 0
    assert 'alarm' not in numbers_of(here / 'plain')
    assert 'stay in float' in numbers_of(here / 'derived')['alarm']
    assert 'stay in float' in (here / 'derived/report.html').read_text()


@pytest.mark.parametrize(('size', 'pixels'), [('r', 24), ('o', 48)])
def test_the_face_networks_return_boxes_and_probabilities(size: str, pixels: int) -> None:
    network = gallery_module('networks').Faces(size)
    boxes, probabilities = network(torch.zeros(2, 3, pixels, pixels))
    assert boxes.shape == (2, 4) and probabilities.sum(1).allclose(torch.ones(2))
    last = {'r': 'dense5_1.weight', 'o': 'dense6_3.weight'}[size]
    assert last in network.state_dict()


def test_the_note_about_names_shows_one_that_differs(tmp_path: Path) -> None:
    from dfkd_nb.toolbox.network_specs import load_network

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 3)

    state = Net().state_dict()
    renamed = {k.replace('last', 'head'): v for k, v in state.items()}
    torch.save(renamed, tmp_path / 'net.pt')
    (note,) = load_network(Net(), tmp_path / 'net.pt').notes
    assert "'head.weight' in the file, 'last.weight' in the network" in note
