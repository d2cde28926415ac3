"""Every notebook runs from top to bottom: one case each, in a process of its own, at quick scale, with a time limit.

nbdev's rules hold: cells marked `#| eval: false`, `#| slow` or `#| gpu` are left out, and outputs are not written. The
processes run beside each other, as many as there are cores (`DFKD_JOBS` sets another number).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    str(path.relative_to(ROOT / "nbs"))
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if not any(part[0] in "._" for part in path.relative_to(ROOT).parts)
)
LIMIT = int(os.environ.get("DFKD_NOTEBOOK_SECONDS", 400))
JOBS = int(os.environ.get("DFKD_JOBS", min(4, os.cpu_count() or 1)))
PROGRAM = "import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1])"


class Outcome(NamedTuple):
    "What became of a notebook."

    passed: bool
    seconds: float
    text: str


def run(name: str, directory: Path) -> Outcome:
    "Run one notebook in a process that works in `directory` for everything it keeps."
    threads = str(max(1, (os.cpu_count() or 1) // JOBS))
    environment = {
        **os.environ,
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": threads,
        "IN_TEST": "1",
        "DFKD_PROGRESS": "0",
        "TMPDIR": str(directory),
    }
    start = time.time()
    try:
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(ROOT / "nbs" / name)],
            cwd=ROOT,
            env=environment,
            timeout=LIMIT,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        text = b"".join(part for part in (error.stdout, error.stderr) if isinstance(part, bytes)).decode(
            errors="replace"
        )
        return Outcome(False, time.time() - start, f"took more than {LIMIT} s\n{text[-2000:]}")
    text = result.stdout + result.stderr
    return Outcome(result.returncode == 0, time.time() - start, f"exit {result.returncode}\n{text[-6000:]}")


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Outcome]]]:
    "All notebooks that were asked for, begun at once."
    asked = [item.callspec.params["name"] for item in request.session.items if item.get_closest_marker("notebook")]
    pool = ThreadPoolExecutor(JOBS)
    yield {name: pool.submit(run, name, tmp_path_factory.mktemp(Path(name).stem)) for name in asked}
    pool.shutdown(cancel_futures=True)


@pytest.mark.notebook
@pytest.mark.timeout(LIMIT * max(1, len(NOTEBOOKS)))
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name: str, outcomes: dict[str, Future[Outcome]], capsys: pytest.CaptureFixture[str]) -> None:
    outcome = outcomes[name].result()
    with capsys.disabled():
        print(f" {outcome.seconds:.0f} s ", end="", flush=True)
    if not outcome.passed:
        pytest.fail(f"{name}: {outcome.text}", pytrace=False)
