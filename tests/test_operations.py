"""How many device operations an update takes, and that it never waits for the device.

`operations.py` says what counts. On a GPU each operation costs the processor some
microseconds, more than a small network's arithmetic takes; a wait costs all that were
queued. The networks are those of the papers' tables, WRN-40-2 and WRN-16-1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operations import MISSING, PARTS, count, register

pytestmark = pytest.mark.skipif(register is None, reason=MISSING)

HERE = Path(__file__).parent
# operations and waits of one update, at most
LIMITS = {
    'inversion': (500, 0),
    'generator': (640, 0),
    'generator-ssd-kd': (680, 0),
    'running': (10, 1),
    'measuring': (173, 1),
    'student': (243, 0),
    'student-ssd-kd': (288, 0),
}


@pytest.fixture(scope='module')
def counts() -> dict[str, dict[str, object]]:
    "Of all updates, counted in a process of their own: the device stays known to it."
    environment = os.environ | {
        'PYTHONPATH': os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')]),
        'OMP_NUM_THREADS': '1',
        'DFKD_PROGRESS': '0',
    }
    program = [sys.executable, str(HERE / 'operations.py')]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_counter_counts(counts: dict[str, dict[str, object]]) -> None:
    assert counts['known']['operations by name'] == {
        '_to_copy': 4,
        'gt': 2,
        'mul': 1,
        'sum': 1,
        'equal': 1,
        'nonzero': 1,
        'index': 1,
    }
    assert counts['known']['waits by name'] == {
        '_local_scalar_dense': 1,
        'equal': 1,
        '_to_copy': 1,
        'nonzero': 1,
        'boolean index': 1,
        'copy from the CPU': 2,
    }


@pytest.mark.parametrize('name', LIMITS)
def test_an_update_is_few_operations(
    counts: dict[str, dict[str, object]], name: str
) -> None:
    assert counts[name]['operations'] <= LIMITS[name][0], counts[name]  # type: ignore[operator]


@pytest.mark.parametrize('name', LIMITS)
def test_an_update_does_not_wait(counts: dict[str, dict[str, object]], name: str) -> None:
    assert counts[name]['waits'] <= LIMITS[name][1], counts[name]['waits by name']  # type: ignore[operator]


def test_the_device_computes_what_the_cpu_does(
    counts: dict[str, dict[str, object]],
) -> None:
    "Whatever path an update takes on a device, its losses are those of the CPU's path."
    here = count(PARTS['inversion'], torch.device('cpu'))['losses']
    assert counts['inversion']['losses'] == pytest.approx(here, rel=1e-4)
