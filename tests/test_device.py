"""Every task of `dfkd run` on a device that is not the CPU: one made in C++, for machines without a GPU.

Its tensors lie apart from the CPU's and must not be mixed with them, as on a GPU.
Its arithmetic is the CPU's, so that the numbers have to agree.
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


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    "What each run left on the CPU, and elsewhere."
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the other device needs g++ on Linux")
    folder, home = tmp_path_factory.mktemp("device"), Path(torch.__file__).parent
    library = folder / "elsewhere.so"
    words = ["-O0", "-std=c++17", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    words += [f"-I{home / 'include'}", str(HERE / "elsewhere.cpp"), "-o", str(library), f"-L{home / 'lib'}"]
    words += ["-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{home / 'lib'}"]
    built = subprocess.run([compiler, *words], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(HERE / "elsewhere.py"), str(library), str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def close(a: object, b: object) -> bool:
    "Equal but for the last bits of what is not a count, a name or a time."
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return b == pytest.approx(a, abs=0.1, rel=0.1)
    return a == b


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_same_on_another_device(outcomes: dict[str, dict[str, object]], name: str) -> None:
    here, there = outcomes[name]["cpu"], outcomes[name]["elsewhere"]
    assert isinstance(here, dict), here
    assert isinstance(there, dict), there
    assert close(untimed(here), untimed(there))
