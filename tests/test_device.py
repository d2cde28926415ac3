"""Every task of `dfkd run` on a device that is not the CPU.

The device is made in C++, for machines without a GPU. Its tensors lie apart from the CPU's
and must not be mixed with them, as on a GPU. Its arithmetic is the CPU's, so that the
numbers have to agree.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from elsewhere import RUNS
from test_applications import untimed

HERE = Path(__file__).parent


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    "What each run left on the CPU, and elsewhere."
    compiler = shutil.which('g++')
    if compiler is None or sys.platform != 'linux':
        pytest.skip('the other device needs g++ on Linux')
    folder, home = tmp_path_factory.mktemp('device'), Path(torch.__file__).parent
    library = folder / 'elsewhere.so'
    words = [
        '-O0',
        '-std=c++17',
        '-shared',
        '-fPIC',
        f'-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}',
    ]
    words += [
        f'-I{home / "include"}',
        str(HERE / 'elsewhere.cpp'),
        '-o',
        str(library),
        f'-L{home / "lib"}',
    ]
    words += ['-ltorch', '-ltorch_cpu', '-lc10', f'-Wl,-rpath,{home / "lib"}']
    built = subprocess.run([compiler, *words], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    environment = os.environ | {
        'PYTHONPATH': os.pathsep.join([str(HERE), os.environ.get('PYTHONPATH', '')]),
        'OMP_NUM_THREADS': '1',
    }
    program = [sys.executable, str(HERE / 'elsewhere.py'), str(library), str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


ONE_IMAGE = 1 / 60  # of the smallest test set: a last bit may turn one answer, no more


def differences(a: object, b: object, name: str = '') -> list[str]:
    """What is not equal.

    Names and counts are equal; measured numbers are but for the order of some sums. Losses
    agree to a thousandth. Fractions of test images may differ by one image, those of pixels
    by a few.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        odd = [f'{name}: {key}' for key in a.keys() ^ b.keys()]
        return odd + [
            d
            for key in a.keys() & b.keys()
            for d in differences(a[key], b[key], f'{name} {key}')
        ]
    if isinstance(a, list) and isinstance(b, list):
        odd = [f'{name}: {len(a)} and {len(b)}'] * (len(a) != len(b))
        return odd + [
            d
            for i, (x, y) in enumerate(zip(a, b))
            for d in differences(x, y, f'{name} {i}')
        ]
    near = {'rel': 1e-3, 'abs': 1e-6}
    if name.endswith('bytes'):  # of compressed numbers
        near = {'rel': 1e-2}
        a, b = (float(v) if isinstance(v, int) else v for v in (a, b))
    elif 'iou' in name:
        near = {'abs': 2e-3}
    elif any(
        word in name
        for word in (
            'accuracy',
            'combined',
            'precision',
            'recall',
            'coverage',
            'recognition',
        )
    ):
        near = {'abs': ONE_IMAGE}
    same = (
        b == pytest.approx(a, **near)
        if isinstance(a, float) and isinstance(b, float)
        else a == b
    )
    return [] if same else [f'{name}: {a} and {b}']


def test_what_counts_as_a_difference() -> None:
    one: dict[str, object] = {
        'accuracy': 0.5,
        'loss': 1.0,
        'images': 20,
        'rows': [{'miou': 0.1}],
        'name': 'x',
    }
    assert not differences(
        one, one | {'loss': 1.0005, 'accuracy': 0.51, 'rows': [{'miou': 0.101}]}
    )
    for change in (
        {'loss': 1.002},
        {'accuracy': 0.52},
        {'images': 21},
        {'rows': [{'miou': 0.11}]},
        {'name': 'y'},
        {'new': 1},
    ):
        assert len(differences(one, one | change)) == 1, change


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_the_same_on_another_device(
    outcomes: dict[str, dict[str, object]], name: str
) -> None:
    here, there = outcomes[name]['cpu'], outcomes[name]['elsewhere']
    assert isinstance(here, dict), here
    assert isinstance(there, dict), there
    assert not differences(untimed(here), untimed(there))
