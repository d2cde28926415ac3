"""The first commands of somebody with a file of weights and no more."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from dfkd_nb.lab import distill_plan
from dfkd_nb.lab.arguments import add_network_options
from dfkd_nb.lab.commands import main
from dfkd_nb.lab.network_options import own_teacher
from dfkd_nb.toolbox.domains import DOMAINS
from dfkd_nb.toolbox.errors import DFKDWarning
from dfkd_nb.toolbox.models import MODELS, build_model


def teacher_of(*words: str):
    "The network that options describe."
    parser = argparse.ArgumentParser()
    add_network_options(parser)
    return own_teacher(parser.parse_args(words, argparse.Namespace(teacher='')))


@pytest.mark.parametrize('name', ['resnet8', 'wrn16-1', 'mobilenetv2', 'digits-net'])
@pytest.mark.parametrize('channels', [1, 3])
def test_a_networks_name_gives_size_and_normalisation(
    name: str, channels: int, tmp_path: Path
) -> None:
    path = tmp_path / 'weights.pth'
    torch.save(build_model(name, 7, channels).state_dict(), path)
    with pytest.warns(DFKDWarning, match='numbers are assumed') as said:
        domain = teacher_of('--model', name, '--checkpoint', str(path)).domain
    digits = name == 'digits-net' and channels == 1
    assert domain.shape == (channels, *([8, 8] if digits else [32, 32]))
    assert domain.num_classes == 7
    if channels == 3:
        assert domain.mean == DOMAINS['imagenet'].mean
    else:
        assert domain.mean == ((0.3053,) if digits else (0.449,))
    text = str(said[0].message)
    assert '--size' not in text
    assert "the digits' numbers" in text if digits else "ImageNet's numbers" in text


def test_what_is_given_wins(tmp_path: Path) -> None:
    path = tmp_path / 'weights.pth'
    torch.save(build_model('resnet8').state_dict(), path)
    words = '--model resnet8 --size 48x64 --mean .5 --std .25 --channels 3'.split()
    domain = teacher_of(*words, '--checkpoint', str(path)).domain
    assert domain.shape == (3, 48, 64) and domain.mean == (0.5,) * 3


def test_the_usual_images_fit_every_network_of_the_package() -> None:
    from dfkd_nb.lab.network_options import usual_domain

    for name in MODELS:
        with torch.device('meta'):
            network = build_model(name).eval()
        shape = usual_domain(name, network).shape
        assert shape == (3, 32, 32)
        assert network(torch.empty(2, *shape, device='meta')).shape == (2, 10)


def test_a_network_is_described_before_there_are_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(build_model('resnet8').state_dict(), 'weights.pth')
    words = ['inspect', '--model', 'resnet8', '--checkpoint', 'weights.pth']
    assert main(words) == 0
    said = capsys.readouterr()
    assert 'images:     3 x 32 x 32, mean 0.485,0.456,0.406' in said.out
    assert '7 BatchNorm layers' in said.out and 'not trained' in said.out
    assert len(said.err.splitlines()) == 1 and 'warning' in said.err
    assert main(['inspect']) == 2
    assert 'nothing to inspect' in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ['weights.pth']


@pytest.mark.parametrize('command', ['distill --student resnet8', 'prune --keep 0.5'])
def test_a_plan_needs_no_folder(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill_plan, 'TIMED', 2)
    torch.manual_seed(3)
    torch.save(build_model('digits-net', 10, 1).state_dict(), 'weights.pth')
    words = f'{command} --model digits-net --checkpoint weights.pth --device cpu'
    words = words.replace('resnet8', 'digits-net').split()
    words += ['--set', 'held_out=10', '--set', 'batch_size=8']
    assert main([*words, '--plan']) == 0
    assert 'results:  in the folder of --out' in capsys.readouterr().out
    assert main(words) == 2
    assert 'give --out DIR' in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ['weights.pth']


def test_a_missing_package_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    torch.save(build_model('digits-net', 10, 1).state_dict(), 'weights.pth')
    words = 'distill --model digits-net --checkpoint weights.pth --student digits-net'
    assert main([*words.split(), '--export', 'onnx', '--out', 'run']) == 2
    assert 'pip install onnxruntime' in capsys.readouterr().err
    gone = {'torch_pruning', 'torchao', 'torchao.quantization.pt2e'}
    # parts that another test has imported are gone as well
    gone |= {name for name in sys.modules if name.split('.')[0] in gone}
    for name in gone:
        monkeypatch.setitem(sys.modules, name, None)
    for command, package in {
        'prune --keep 0.5': 'torch-pruning',
        'quantize': 'torchao',
    }.items():
        words = f'{command} --model digits-net --checkpoint weights.pth --out run'
        assert main(words.split()) == 2
        assert f'pip install {package}' in capsys.readouterr().err
    assert not Path('run').exists()
