"""Twenty kills at random moments, each resumed, and the same bits at the end.

The work is a small transfer on digits: dreams, then a student. One process imports everything and forks a child for
every attempt, so that most of a child's life is the run itself and the kills land inside it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

KILLS = 20
TINY = {
    "images": 60,
    "synthesis_batch_size": 20,
    "synthesis_steps": 60,
    "updates": 150,
    "evaluations": 5,
    "batch_size": 32,
    "test_limit": 100,
    "picture": 10,
}


def attempt(out: Path) -> int:
    "Fork a child that goes on with the run until it is done."
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        from dfkd_nb.lab.runs import Recipe, Run

        Run(
            Recipe.load("digits-transfer-deepinversion"),
            "quick",
            TINY,
            out=out,
            save_every=0.02,
            device="cpu",
            quiet=True,
        ).start(resume=True)
        code = 0
    finally:
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    "The exit code if the child ends within so long, else None."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def where(folder: Path) -> str:
    "What the killed process was doing, as far as its folder tells."
    from dfkd_nb.foundations.core import load_checkpoint

    if list(folder.glob("**/.*.tmp")):
        return "writing a file"
    if not (folder / "journal.jsonl").is_file():
        return "starting"
    phases = [
        json.loads(line)["phase"]
        for line in (folder / "journal.jsonl").read_text().splitlines()[1:]
        if line.endswith("}")
    ]
    checkpoint = folder / "checkpoint.pt"
    done = list(load_checkpoint(checkpoint)["phases"]) if checkpoint.is_file() else []
    return (
        f"in {phases[-1] if phases else 'the first phase'}"
        if not done or phases and phases[-1] not in done
        else f"after {done[-1]}"
    )


def main(root: Path) -> None:
    "Run undisturbed, then kill and resume, and print what happened as JSON."
    import matplotlib.pyplot  # noqa: F401 (children shall not spend their lives importing)
    import sklearn.datasets  # noqa: F401
    import torch

    from dfkd_nb.dreams import inversion  # noqa: F401
    from dfkd_nb.foundations.core import import_torchvision

    import_torchvision()
    import torchmetrics.classification  # noqa: F401

    from dfkd_nb.foundations.models import build_model, save_weights
    from tiny import stirred

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = stirred(build_model("digits-net", 10, 1))
    for chain in ("whole", *map(str, range(KILLS))):
        save_weights(
            root / chain / "digits-teacher/quick/weights.safetensors",
            model,
            {"model": "digits-net", "domain": "digits"},
            half=False,
        )
    begun = time.monotonic()
    assert ended(attempt(root / "whole"), 300) == 0
    length = time.monotonic() - begun
    draw, kills, chain, moments = random.Random(0), 0, 0, Counter()
    while True:
        folder = root / str(chain) / "digits-transfer-deepinversion/quick"
        child = attempt(root / str(chain))
        code = ended(child, draw.uniform(0.05, 0.4) * length if kills < KILLS else 300)
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            moments[where(folder)] += 1
            continue
        assert code == 0, code
        chain += 1
        if kills >= KILLS:
            break
    print(json.dumps({"kills": kills, "chains": chain, "moments": moments, "length": length}))


def left(folder: Path) -> dict:
    "All that a run left, without its timings."
    from dfkd_nb.lab.runs import read_history

    result = json.loads((folder / "result.json").read_text())
    return {
        "numbers": result["numbers"],
        "settings": result["settings"],
        "history": [{k: v for k, v in row.items() if k != "seconds"} for row in read_history(folder / "history.csv")],
        "tensors": {
            f"{name}/{k}": v
            for name in ("images", "weights")
            for k, v in load_file(folder / f"{name}.safetensors").items()
        },
        "picture": (folder / "images.png").read_bytes(),
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DFKD_PROGRESS": "0", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=580, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["kills"] == KILLS and report["chains"] >= 1
    inside = sum(n for moment, n in report["moments"].items() if moment != "starting")
    assert inside >= KILLS // 2, f"kills must land inside the run: {report}"
    whole = left(tmp_path / "whole/digits-transfer-deepinversion/quick")
    assert len(whole["history"]) > 10 and len(whole["tensors"]["images/images"]) == TINY["images"]
    for chain in range(report["chains"]):
        other = left(tmp_path / str(chain) / "digits-transfer-deepinversion/quick")
        for key in ("numbers", "settings", "history", "picture"):
            assert other[key] == whole[key], (chain, key)
        assert other["tensors"].keys() == whole["tensors"].keys()
        for name, tensor in whole["tensors"].items():
            assert tensor.equal(other["tensors"][name]), (chain, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
