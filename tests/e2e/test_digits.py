"""The shipped digits, as the README runs them, everything that reads what they left, and the fine-tuning from them."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import yaml
from torch import Tensor

from cluster.run.run_directory import RunDirectory
from tests.e2e.command import JOBS, Ended, events, launcher

FINETUNE = JOBS / "finetune.yaml"
CONV = {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"}
HIDDEN = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}

RESULT_KEYS = {
    "run", "status", "step", "epoch", "samples", "metrics", "best", "workers", "attempts", "state_sha256", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def ended(home: Path) -> Ended:
    return launcher("run", "digits", "--json", cwd=home, on_ray=True)


def test_trains_to_the_accuracy_it_promises(ended: Ended, home: Path) -> None:
    assert ended.exit_code == 0, ended.stderr
    result = ended.document
    assert result.keys() >= RESULT_KEYS
    assert result["status"] == "completed"
    assert result["step"] == 220
    assert result["samples"] == 220 * 64
    assert result["workers"] == 2
    assert result["metrics"]["val/accuracy"] >= 0.97
    assert result["best"]["value"] >= result["metrics"]["val/accuracy"]
    assert result["run"] == str(home / "runs" / "digits")


def test_its_time_is_accounted_for(ended: Ended) -> None:
    result = ended.document
    assert sum(result["time"].values()) == pytest.approx(result["seconds"], rel=0.02)
    assert {"startup", "compute", "validation"} <= {part for part, seconds in result["time"].items() if seconds > 0.1}
    assert result["time"]["lost"] == result["time"]["recovery"] == 0
    assert 0 < result["goodput"] < 1


def test_leaves_a_run_directory(ended: Ended, home: Path) -> None:
    run = home / "runs" / "digits"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    steps = {"step-00000220", f"step-{ended.document['best']['step']:08d}"}
    expected = {"job.yaml", "environment.json", "metrics.jsonl", "events.jsonl", "curves.png"}
    expected |= {f"logs/attempt-000-worker-{rank:03d}.log" for rank in range(2)}
    assert expected <= names
    kept = {path.parent.name for path in run.glob("checkpoints/*/manifest-*.json")}
    assert steps <= kept
    assert len(kept) in (3, 4)  # the newest three, and the best if it is older
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((run / "job.yaml").read_text())["train"]["shards"] == 4
    steps_in_rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps_in_rows == list(range(1, 221))
    environment = json.loads((run / "environment.json").read_text())
    assert environment["attempts"][0]["packages"]["torch"]
    (told,) = events(run, "environment")
    (workers,) = told["workers"]
    assert (workers["ranks"], workers["data"]) == ([0, 1], environment["data_fingerprint"])


def test_progress_is_plain_lines_without_a_terminal(ended: Ended) -> None:
    lines = ended.stderr.splitlines()
    assert any("epoch 10/10" in line and "val/accuracy" in line for line in lines)
    assert "\x1b" not in ended.stderr
    assert not [line for line in lines if "pid=" in line or "WARNING" in line]


def test_w_and_b_has_a_record_and_the_end_says_how_to_upload_it(ended: Ended, home: Path) -> None:
    (record,) = home.glob("wandb/offline-run-*/run-*.wandb")
    assert f"W&B: recorded offline; upload it with: wandb sync {record.parent}" in ended.stderr.splitlines()


def test_a_second_run_does_nothing(ended: Ended, home: Path) -> None:
    again = launcher("run", JOBS / "digits.yaml", "--json", cwd=home)
    assert again.exit_code == 0
    assert "nothing to do" in again.stderr
    assert again.document["state_sha256"] == ended.document["state_sha256"]
    assert "starting Ray" in ended.stderr
    assert "starting Ray" not in again.stderr
    assert "nothing to do" in launcher("resume", "runs/digits", cwd=home).stderr


@pytest.mark.usefixtures("ended")
def test_another_description_of_the_same_name_is_refused(home: Path) -> None:
    refused = launcher("run", JOBS / "digits.yaml", "optimizer.lr=0.1", "seed=3", cwd=home)
    assert refused.exit_code == 2
    assert "optimizer.lr: 0.05 -> 0.1" in refused.stderr
    assert "seed: 0 -> 3" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_the_bucket_tells_all(ended: Ended, home: Path) -> None:
    status = launcher("status", "runs/digits", "--json", cwd=home).document
    assert {key: status[key] for key in RESULT_KEYS} == {key: ended.document[key] for key in RESULT_KEYS}
    listed = launcher("list", "runs", "--json", cwd=home).document
    assert [run["run"] for run in listed] == [str(home / "runs" / "digits")]
    verified = launcher("checkpoints", "runs/digits", "--verify", "--json", cwd=home).document
    assert all(checkpoint["good"] for checkpoint in verified)
    assert verified[-1]["state_sha256"] == ended.document["state_sha256"]
    assert "completed" in launcher("status", "runs/digits", cwd=home).stdout
    assert "digits" in launcher("list", cwd=home).stdout
    assert "220" in launcher("checkpoints", "runs/digits", cwd=home).stdout


@pytest.mark.usefixtures("ended")
def test_logs_of_a_worker(home: Path) -> None:
    shown = launcher("logs", "runs/digits", "--worker", 1, cwd=home)
    assert "worker 1 of 2, attempt 0" in shown.stdout
    assert "worker 0 of 2" not in shown.stdout


@pytest.mark.usefixtures("ended")
def test_plot_draws_anew(home: Path) -> None:
    curves = home / "runs" / "digits" / "curves.png"
    before = curves.read_bytes()
    curves.unlink()
    assert launcher("plot", "runs/digits", cwd=home).exit_code == 0
    assert curves.read_bytes() == before


def test_plan_shows_what_follows(home: Path) -> None:
    planned = launcher("plan", JOBS / "digits.yaml", "store=elsewhere", "--json", cwd=home).document
    assert planned["total_steps"] == 220
    assert planned["steps_per_epoch"] == 22
    assert planned["most_shards"] == 2
    assert [group["pattern"] for group in planned["groups"]] == ["*.bias", "(rest)"]
    assert planned["memory"]["weights"] == planned["memory"]["optimizer"] == 4 * planned["parameters"]
    text = launcher("plan", JOBS / "digits.yaml", "store=elsewhere", cwd=home).stdout
    assert "*.bias" in text
    assert "220" in text
    assert not (home / "elsewhere" / "digits").exists(), "a plan leaves no run behind"


def test_schema_lists_the_language(home: Path) -> None:
    assert "train.shards" in launcher("schema", "--json", cwd=home).document
    assert "shards" in launcher("schema", cwd=home).stdout


# Fine-tuning -----------------------------------------------------------------


@pytest.fixture(scope="module")
def finetuned(ended: Ended, home: Path) -> Ended:
    assert ended.exit_code == 0, ended.stderr
    overrides = ("checkpoint.every_steps=22", "checkpoint.keep=4", "workers.num=1", "tracking.mode=disabled")
    return launcher("run", FINETUNE, *overrides, "--json", cwd=home)


def tensors(home: Path, run: str, step: int) -> dict[str, Tensor]:
    _, files = RunDirectory(f"{home}/runs/{run}").checkpoints.read(step)
    return safetensors.torch.load(files["model.safetensors"])


@pytest.mark.usefixtures("ended")
def test_plan_shows_what_is_loaded_and_what_is_not(home: Path) -> None:
    planned = launcher("plan", FINETUNE, cwd=home)
    assert planned.exit_code == 0, planned.stderr
    lines = [" ".join(line.split()) for line in planned.stdout.splitlines()]
    begin = lines.index(f"init_from {home}/runs/digits/checkpoints/step-00000220")
    assert lines[begin + 1 : begin + 4] == [
        "loaded 8 of 10 tensors: conv1.weight, conv1.bias, conv2.weight, conv2.bias, "
        "fc1.weight, fc1.bias, fc2.weight, fc2.bias",
        "not loaded fc3.weight, fc3.bias",
        "unused there fc3.bias, fc3.weight",
    ]


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "init_from.exclude=[]",
            "finetune.yaml: init_from: 2 tensors of {home}/runs/digits/checkpoints/step-00000220 do not fit: "
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
    source = tensors(home, "digits", 220)
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
