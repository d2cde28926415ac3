"""Runs notebooks one after another, each in a process of its own.

A process that has imported what notebooks need of other packages forks one for each
notebook: on a processor's core, the imports take longer than most notebooks. Nothing of
the book itself is imported before. Where forking is not safe, a new process runs each.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = int(os.environ.get('DFKD_NOTEBOOK_SECONDS', 400))
ENVIRONMENT = {
    'MPLBACKEND': 'agg',
    'OMP_NUM_THREADS': '1',
    'IN_TEST': '1',
    'DFKD_PROGRESS': '0',
    # a look for a GPU must not open it: a forked process could not use it any more
    'PYTORCH_NVML_BASED_CUDA_CHECK': '1',
}
# PyTorch imports the second when an optimiser first runs
IMPORTED = 'nbdev.test', 'torch', 'torch._dynamo', 'matplotlib.pyplot', 'PIL.Image'
OPTIONAL = 'seaborn', 'safetensors.torch', 'tqdm.auto'
FORKS = sys.platform == 'linux'  # elsewhere a system's libraries may not survive it


class Outcome(NamedTuple):
    "What became of a notebook."

    passed: bool
    seconds: float
    text: str


class Server:
    "This program in a process of its own, started when it is first needed."

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(
        self,
        name: str,  # of a notebook, below `nbs`
        directory: Path,  # for everything it keeps
        limit: float = LIMIT,  # seconds
    ) -> Outcome:
        "Run one notebook to its end, or to the limit on its time."
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        start, heard = time.time(), directory / 'heard.txt'
        assert self.process.stdin and self.process.stdout
        order = json.dumps([name, str(directory), limit])
        print(order, file=self.process.stdin, flush=True)
        code = self.process.stdout.readline().strip() or 'the process has ended'
        if not FORKS:
            self.process.wait()
        text = heard.read_text(errors='replace') if heard.is_file() else ''
        return Outcome(code == '0', time.time() - start, f'exit {code}\n{text[-6000:]}')

    def close(self) -> None:
        "End it."
        if self.process is not None and self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()


def work(name: str, directory: str) -> int:
    "Run a notebook in this process, which it has to itself; returns the exit code."
    heard = os.open(Path(directory, 'heard.txt'), os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # not the server's orders
    os.dup2(heard, 1)
    os.dup2(heard, 2)
    os.environ['TMPDIR'] = tempfile.tempdir = directory
    code = 1
    try:
        from nbdev.test import nbdev_test

        nbdev_test(path=str(ROOT / 'nbs' / name))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def fork(name: str, directory: str, limit: float) -> str:  # exit code, or what happened
    "Run a notebook in a process that is forked from this one."
    child = os.fork()
    if not child:
        os.setsid()  # with whatever it starts, it can be ended as a group
        os._exit(work(name, directory))
    end, found = time.monotonic() + limit, 0
    try:
        while time.monotonic() < end:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return str(os.waitstatus_to_exitcode(status))
            time.sleep(0.02)
        return f'took more than {limit:g} s'
    finally:  # also when this process is interrupted
        if not found:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)


def main() -> None:
    "Run what is asked for on standard input; an exit code a line answers."
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    for name in IMPORTED if FORKS else ():
        importlib.import_module(name)
    for name in OPTIONAL if FORKS else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        name, directory, limit = json.loads(line)
        if not FORKS:
            print(work(name, directory), file=answers)
            break
        print(fork(name, directory, limit), file=answers)
    answers.flush()
    os._exit(0)  # nothing to tidy up: that would take seconds


if __name__ == '__main__':
    main()
