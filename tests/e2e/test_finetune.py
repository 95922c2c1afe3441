"""The shipped fine-tuning, from a run of the shipped digits, as it shows from outside."""

import json
from pathlib import Path

import pytest
import safetensors.torch
from torch import Tensor

from cluster.run_directory import RunDirectory
from tests.e2e.command import JOBS, Ended, launcher

FINETUNE = JOBS / "finetune.yaml"
ONE_WORKER = ("workers.num=1", "tracking.mode=disabled")
CONV = {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"}
HIDDEN = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where digits has been trained, half as long as it is shipped."""
    home = tmp_path_factory.mktemp("finetune")
    ended = launcher("run", JOBS / "digits.yaml", "train.epochs=5", *ONE_WORKER, cwd=home)
    assert ended.exit_code == 0, ended.stderr
    return home


@pytest.fixture(scope="module")
def finetuned(home: Path) -> Ended:
    every_epoch = ("checkpoint.every_steps=22", "checkpoint.keep=4")
    return launcher("run", FINETUNE, *every_epoch, *ONE_WORKER, "--json", cwd=home)


def tensors(home: Path, run: str, step: int) -> dict[str, Tensor]:
    _, files = RunDirectory(f"{home}/runs/{run}").checkpoints.read(step)
    return safetensors.torch.load(files["model.safetensors"])


def test_plan_shows_what_is_loaded_and_what_is_not(home: Path) -> None:
    planned = launcher("plan", FINETUNE, cwd=home)
    assert planned.exit_code == 0, planned.stderr
    lines = [" ".join(line.split()) for line in planned.stdout.splitlines()]
    begin = lines.index(f"init_from {home}/runs/digits/checkpoints/step-00000110")
    assert lines[begin + 1 : begin + 4] == [
        "loaded 8 of 10 tensors: conv1.weight, conv1.bias, conv2.weight, conv2.bias, "
        "fc1.weight, fc1.bias, fc2.weight, fc2.bias",
        "not loaded fc3.weight, fc3.bias",
        "unused there fc3.bias, fc3.weight",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "init_from.exclude=[]",
            "finetune.yaml: init_from: 2 tensors of {home}/runs/digits/checkpoints/step-00000110 do not fit: "
            "fc3.weight is [2, 128] here and [10, 128] there, fc3.bias is [2] here and [10] there; "
            "to begin with random ones there, write init_from.exclude: [fc3.*]\n",
        ),
        (
            "init_from.url=runs/digit",
            "finetune.yaml: init_from.url: {home}/runs/digit: is no run, no checkpoint and no .safetensors file; "
            "check the URL\n",
        ),
    ],
    ids=["shapes", "no such run"],
)
def test_what_cannot_be_loaded_is_one_line(override: str, message: str, home: Path) -> None:
    refused = launcher("plan", FINETUNE, override, cwd=home)
    assert refused.exit_code == 2
    assert refused.stderr.endswith(message.format(home=home))
    assert len(refused.stderr.splitlines()) == 1


def test_it_learns_from_the_head_inwards(finetuned: Ended, home: Path) -> None:
    """Until their epochs come, hidden layers and convolutions have the very bits of the run they were taken from."""
    assert finetuned.exit_code == 0, finetuned.stderr
    source = tensors(home, "digits", 110)
    unchanged = {}
    for step in (22, 44, 66, 88):
        now = tensors(home, "finetune", step)
        assert now["fc3.weight"].shape == (2, 128)
        unchanged[step] = {name for name in CONV | HIDDEN if now[name].equal(source[name])}
    assert unchanged == {22: CONV | HIDDEN, 44: CONV, 66: set(), 88: set()}


def test_it_reaches_the_accuracy_it_promises(finetuned: Ended) -> None:
    assert finetuned.document["metrics"]["val/accuracy"] >= 0.97


def test_what_it_declares_is_measured_and_drawn(finetuned: Ended, home: Path) -> None:
    run = home / "runs/finetune"
    confusion = json.loads((run / "matrices/val-confusion.json").read_text())
    assert (confusion["step"], confusion["classes"]) == (88, ["even", "odd"])
    (even, wrong), (wrong_too, odd) = confusion["values"]
    assert even + wrong + wrong_too + odd == 360
    assert finetuned.document["metrics"]["val/accuracy"] == (even + odd) / 360
    assert 0.97 <= finetuned.document["metrics"]["val/f1"] <= 1

    drawn = (run / "val-confusion.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    (run / "val-confusion.png").unlink()
    plotted = launcher("plot", run, "--json", cwd=home)
    assert plotted.document["pictures"].keys() == {"curves", "val-confusion"}
    assert (run / "val-confusion.png").read_bytes() == drawn
