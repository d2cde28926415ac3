"""The set-up behind `make tour` and `make test`: once, one at a time, and never half."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))
import environment  # noqa: E402


class Pip:
    """Stands in for venv and pip.

    Notes the commands, makes an interpreter, and may be cut short.
    """

    def __init__(self, venv: Path) -> None:
        self.venv, self.interrupt, self.pause = venv, False, 0.0
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> int:
        self.commands.append(command)
        time.sleep(self.pause)
        if 'venv' in command:
            (self.venv / 'bin').mkdir(parents=True)
            (self.venv / 'bin/python').symlink_to(sys.executable)
        elif self.interrupt:
            (self.venv / 'half').touch()
            raise KeyboardInterrupt
        return 0


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    "A place to install to, where nothing is really installed."
    fake = Pip(tmp_path / '.venv')
    monkeypatch.setattr(environment.subprocess, 'check_call', fake)
    return fake


def run(monkeypatch: pytest.MonkeyPatch, venv: Path, *arguments: str) -> None:
    "The command line."
    monkeypatch.setattr(sys, 'argv', ['environment.py', *arguments, '--venv', str(venv)])
    environment.main()


def test_second_call_does_nothing(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, pip.venv, 'dev')
    assert (
        len(pip.commands) == 2
        and '.[dev]' in pip.commands[1]
        and 'constraints.txt' in pip.commands[1]
    )
    run(monkeypatch, pip.venv, 'dev')
    run(monkeypatch, pip.venv, 'book')  # dev contains it
    assert len(pip.commands) == 2


def test_more_is_added_to_what_is_there(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, pip.venv, 'book')
    run(monkeypatch, pip.venv, 'dev')
    assert [command[-1] for command in pip.commands[1:]] == ['.[book]', '.[dev]']
    run(monkeypatch, pip.venv, 'book')
    assert len(pip.commands) == 3


def test_changed_requirements_install_again(
    pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, pip.venv, 'dev')
    monkeypatch.setattr(environment, 'fingerprint', lambda: 'other requirements')
    assert not environment.ready(str(pip.venv), 'dev')
    run(monkeypatch, pip.venv, 'dev')
    assert len(pip.commands) == 3 and environment.ready(str(pip.venv), 'dev')


def test_interrupted_set_up_is_begun_afresh(
    pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip.interrupt = True
    with pytest.raises(SystemExit, match='interrupted; the next call starts afresh'):
        run(monkeypatch, pip.venv, 'dev')
    assert (pip.venv / 'half').exists() and not environment.ready(str(pip.venv), 'dev')
    pip.interrupt = False
    run(monkeypatch, pip.venv, 'dev')
    assert not (pip.venv / 'half').exists() and environment.ready(str(pip.venv), 'dev')


def test_environment_whose_python_is_gone_is_made_again(
    pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, pip.venv, 'dev')
    (pip.venv / 'bin/python').unlink()
    assert not environment.ready(str(pip.venv), 'dev')
    run(monkeypatch, pip.venv, 'dev')
    assert environment.ready(str(pip.venv), 'dev')


@pytest.mark.skipif(os.name == 'nt', reason='no lock on Windows')
def test_two_at_once_install_once(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    pip.pause = 0.3
    monkeypatch.setattr(sys, 'argv', ['environment.py', 'dev', '--venv', str(pip.venv)])
    both = [threading.Thread(target=environment.main) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(pip.commands) == 2 and environment.ready(str(pip.venv), 'dev')


def test_old_python_is_told_in_one_line() -> None:
    with pytest.raises(
        SystemExit, match='Python 3.11 or newer is needed.*PYTHON=python3.12'
    ) as stop:
        environment.check_python((3, 9, 2))
    assert '\n' not in str(stop.value)


def test_missing_venv_module_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'ensurepip', None)
    with pytest.raises(SystemExit, match='install its venv package'):
        environment.check_python()


def test_failing_pip_says_what_to_do(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> int:
        raise environment.subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(environment.subprocess, 'check_call', fail)
    with pytest.raises(
        SystemExit, match="read pip's message above, then run the same command again"
    ):
        run(monkeypatch, pip.venv, 'dev')
    assert not environment.ready(str(pip.venv), 'dev')
