"Files and random streams: equal content, equal bytes; every stream resumes."

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dfkd_nb.toolbox import core
from dfkd_nb.toolbox.errors import DFKDError
from dfkd_nb.toolbox.networks import load_weights

NAMES = 'stem head a b c d e f g h i j k l m n'.split()


def test_equal_content_makes_equal_files(tmp_path: Path) -> None:
    tensors = {name: torch.arange(n + 1.0) for n, name in enumerate(NAMES)} | {
        'short': torch.ones(3).half()
    }
    for i, names in enumerate(
        [NAMES, NAMES[::-1], NAMES]
    ):  # 16 names: safetensors itself orders them anew each time
        core.save_tensors(
            tmp_path / f'{i}.safetensors', tensors, {name: name.upper() for name in names}
        )
        core.save_checkpoint(tmp_path / f'{i}.pt', {'weights': tensors, 'step': 3})
    for kind in ('safetensors', 'pt'):
        assert len({path.read_bytes() for path in tmp_path.glob(f'*.{kind}')}) == 1, kind
    assert list(core.load_tensors(tmp_path / '0.safetensors')[1]) == sorted(NAMES)


def test_a_sorted_header_is_read_by_the_format_itself(tmp_path: Path) -> None:
    path, text = (
        tmp_path / 't.safetensors',
        {'z': 'quo"te\\ \n\x01', 'ä': 'é ü 漢字 😀', 'a': ''},
    )
    tensors = {'x': torch.randn(7), 'b': torch.randn(3).bfloat16(), '': torch.zeros(0, 4)}
    core.save_tensors(path, tensors, text)
    with safe_open(path, 'pt') as file:
        assert file.metadata() == text and set(file.keys()) == set(tensors)
        assert all(file.get_tensor(name).equal(value) for name, value in tensors.items())
    assert list(core.load_tensors(path)[1]) == sorted(text)
    with pytest.raises(DFKDError, match="metadata 'epochs' of .* is no text: give str"):
        core.save_tensors(path, tensors, {'epochs': 3})  # type: ignore[dict-item]
    assert core.load_tensors(path)[1] == text, 'what was there is untouched'


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'pickle'])
def test_a_pytorch_checkpoint_is_called_one(tmp_path: Path, legacy: bool) -> None:
    path, model = tmp_path / 'net.pth', nn.Linear(2, 2)
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    words = r'is an? .*PyTorch checkpoint.*torch\.load\(path, weights_only.*load_state_dict'
    with pytest.raises(DFKDError, match=words) as error:
        load_weights(path, model)
    assert 'truncated' not in str(error.value) and '\n' not in str(error.value)


def test_other_files_are_not_taken_for_pytorchs(tmp_path: Path) -> None:
    path = tmp_path / 't.safetensors'
    for length in (0x0280, 0x0480):  # a header whose length begins like a pickle
        path.write_bytes(length.to_bytes(8, 'little') + b'{"x":')
        with pytest.raises(DFKDError, match='is truncated or no safetensors file'):
            core.load_tensors(path)
    core.save_tensors(path, {'x': torch.ones(2)})
    with pytest.raises(
        DFKDError,
        match='is a safetensors file, not a checkpoint: use load_weights or load_tensors',
    ):
        core.load_checkpoint(path)


def test_dropout_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    dropout, x = nn.Dropout(0.5), torch.ones(1000)
    core.seed_everything(0)
    dropout(x)
    core.save_checkpoint(tmp_path / 'c.pt', {'random': core.random_state()})
    expected = dropout(x)
    core.seed_everything(9)
    core.restore_random_state(core.load_checkpoint(tmp_path / 'c.pt')['random'])
    assert dropout(x).equal(expected)


class Device:
    "Random streams of accelerators that this machine may not have."

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool) -> None:
        self.states = [torch.full((4,), i, dtype=torch.uint8) for i in range(gpus)]
        self.mps_state = torch.full((3,), 9, dtype=torch.uint8)
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
        monkeypatch.setattr(
            torch.cuda, 'get_rng_state_all', lambda: [s.clone() for s in self.states]
        )
        monkeypatch.setattr(torch.cuda, 'set_rng_state_all', self.set_all)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
        own = SimpleNamespace(
            get_rng_state=lambda: self.mps_state.clone(), set_rng_state=self.set_mps
        )
        for name, function in vars(own).items():
            monkeypatch.setattr(torch.mps, name, function)

    def set_all(self, states: list[Tensor]) -> None:
        self.states = states

    def set_mps(self, state: Tensor) -> None:
        self.mps_state = state

    def draw(self) -> None:
        self.states = [s + 1 for s in self.states]
        self.mps_state = self.mps_state + 1


@pytest.mark.parametrize('gpus, mps', [(2, False), (0, True), (0, False)])
def test_the_streams_of_all_devices_are_kept(
    monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool
) -> None:
    device = Device(monkeypatch, gpus, mps)
    state: dict[str, Any] = core.random_state()
    before = [*device.states, device.mps_state] if mps else device.states
    assert ('cuda' in state, 'mps' in state) == (gpus > 0, mps)
    device.draw()
    core.restore_random_state(state)
    after = [*device.states, device.mps_state] if mps else device.states
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))
    with core.seeded(3):
        device.draw()
    again = [*device.states, device.mps_state] if mps else device.states
    assert all(a.equal(b) for a, b in zip(before, again, strict=True)), (
        '`seeded` leaves no trace on any device'
    )


def test_streams_of_another_machine_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    state = core.random_state() | {
        'cuda': [torch.zeros(4, dtype=torch.uint8)] * 3,
        'mps': torch.zeros(3),
    }
    device = Device(monkeypatch, gpus=2, mps=False)
    device.draw()
    standing = [s.clone() for s in device.states]
    core.restore_random_state(state)
    assert all(a.equal(b) for a, b in zip(standing, device.states, strict=True))


def test_a_full_disk_is_told_in_plain_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError(
            '[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0'
        )

    path = tmp_path / 'c.pt'
    core.save_checkpoint(path, {'step': 1})
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(DFKDError, match='No space left on device') as found:
        core.save_checkpoint(path, {'step': 2})
    assert 'enforce' not in str(found.value) and 'untouched' in str(found.value)
    assert core.load_checkpoint(path) == {'step': 1}
