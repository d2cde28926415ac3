"The command line: what each command prints, and how a run is begun, stopped, resumed and shown."

import json
import subprocess
import sys

import pytest
import torch

from dfkd_nb.foundations.core import save_tensors
from dfkd_nb.foundations.models import build_model
from dfkd_nb.lab.commands import main
from dfkd_nb.lab.runs import Recipe, recipe_names

TINY = ["--set", "epochs=1", "--set", "evaluations=1"]


@pytest.fixture
def dfkd(tmp_path, monkeypatch, capsys):
    "Run a command in an empty folder; returns exit code, stdout and stderr."
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code = main([str(w) for w in words])
        out = capsys.readouterr()
        return code, out.out, out.err

    call.folder = tmp_path
    return call


def test_looking_does_not_load_torch():
    code = (
        "import sys\n"
        "from dfkd_nb.lab.commands import main\n"
        "main(['list']), main(['show', 'digits-teacher'])\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_list_is_in_order_and_whole(dfkd):
    code, out, _ = dfkd("list")
    names = [line.split()[0] for line in out.splitlines()]
    assert (
        code == 0
        and sorted(names) == recipe_names()
        and names == sorted(names, key=lambda n: (Recipe.load(n).order, n))
    )


def test_list_missing_full(dfkd):
    _, out, _ = dfkd("list", "--missing-full")
    assert sorted(line.split()[0] for line in out.splitlines()) == [
        n for n in recipe_names() if "full" in Recipe.load(n).scales
    ]
    folder = dfkd.folder / "results/digits-teacher/full"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    _, out, _ = dfkd("list", "--missing-full")
    assert "digits-teacher" not in [line.split()[0] for line in out.splitlines()]


def test_show_is_a_recipe_again(dfkd):
    code, out, _ = dfkd("show", "digits-teacher", "--scale", "full")
    (dfkd.folder / "again.toml").write_text(out)
    assert code == 0 and Recipe.load("again.toml").resolve("full") == Recipe.load("digits-teacher").resolve("full")


def test_a_run_from_begin_to_end(dfkd):
    run = ["run", "digits-teacher", *TINY]
    code, _, err = dfkd(*run, "--max-minutes", "1e-9")
    assert code == 3 and "--resume" in err and len(err.splitlines()) == 1
    code, _, err = dfkd(*run)
    assert code == 2 and "--resume" in err and "--fresh" in err
    code, out, err = dfkd(*run, "--resume")
    assert code == 0 and not err and "resuming" in out and "accuracy" in out
    code, out, _ = dfkd(*run)
    assert code == 0 and "finished" in out and "--fresh" in out
    code, out, _ = dfkd(*run, "--fresh")
    assert code == 0 and "starting" in out
    code, out, _ = dfkd("results", "--folder", "runs")
    assert code == 0 and out.startswith("digits-teacher") and "accuracy" in out


def test_results_are_published_where_a_folder_is(dfkd):
    (dfkd.folder / "results").mkdir()
    text = dfkd("show", "digits-teacher", "--scale", "quick")[1].replace("epochs = 20.0", "epochs = 1.0")
    (dfkd.folder / "mine.toml").write_text(text)
    assert dfkd("run", "mine.toml")[0] == 0
    assert json.loads((dfkd.folder / "results/mine/quick/result.json").read_text())["settings"]["epochs"] == 1.0
    assert dfkd("results")[1].startswith("mine")


def test_debug_shows_where(dfkd):
    assert "Traceback" in dfkd("--debug", "show", "nothing")[2] and "Traceback" not in dfkd("show", "nothing")[2]


@pytest.mark.parametrize("kind", ["safetensors", "pt", "wrapped"])
def test_invert_a_network_of_ones_own(dfkd, kind):
    torch.manual_seed(0)
    model = build_model("digits-net", 10, 1)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    path = dfkd.folder / f"mine.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_tensors(path, model.state_dict())
    else:
        torch.save(
            model.state_dict()
            if kind == "pt"
            else {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
            path,
        )
    code, out, err = dfkd(
        "invert",
        "--checkpoint",
        path,
        "--model",
        "digits-net",
        "--num-classes",
        10,
        "--mean",
        "0.3",
        "--std",
        "0.4",
        "--size",
        8,
        "--classes",
        "1,7",
        "--n",
        6,
        "--out",
        "dreams",
        "--set",
        "synthesis_steps=5",
        "--device",
        "cpu",
    )
    assert code == 0 and "6 images" in out, err
    manifest = json.loads((dfkd.folder / "dreams/manifest.json").read_text())
    assert [entry["class"] for entry in manifest["images"]] == [1, 7] * 3
    assert all((dfkd.folder / "dreams" / entry["file"]).is_file() for entry in manifest["images"])


def test_help_is_quick():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dfkd_nb.lab.commands", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "invert" in done.stdout and " torch" not in done.stderr


def test_bench_gets_its_own_words(dfkd, monkeypatch):
    from dfkd_nb.lab import speed

    heard = []
    monkeypatch.setattr(speed, "bench", lambda words: heard.append(words) or 0)
    assert dfkd("bench", "--batch", "64", "more")[0] == 0 and heard == [["--batch", "64", "more"]]
    assert dfkd("bench", "--help")[0] == 0 and heard[1] == ["--help"]
