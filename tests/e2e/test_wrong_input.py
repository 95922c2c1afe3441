"""Wrong input costs nothing: one line that says where, what and what to do, exit code 2, before Ray starts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray.train  # noqa: F401  # else a thread of `run` imports it, while pytest changes the filters of warnings
from click.testing import CliRunner

from launcher.cli import main
from tests.e2e.command import JOBS, launcher

DIGITS = str(JOBS / "digits.yaml")

WITHOUT_TORCH = {
    "unknown key": (["train.epoch=3"], "train.epoch is not a known key.*did you mean 'epochs'"),
    "wrong type": (["train.epochs=ten"], "train.epochs must be a whole number, got 'ten'"),
    "not a number": (["optimizer.lr=.nan"], "optimizer.lr must be .*finite.*got nan"),
    "infinite": (["train.clip_norm=.inf"], "train.clip_norm must be finite and above 0, got inf"),
    "negative": (["train.epochs=-1"], "train.epochs must be at least 1, got -1"),
    "zero": (["train.global_batch=0"], "train.global_batch must be at least 1, got 0"),
    "indivisible batch": (["train.global_batch=65"], "train.global_batch must divide by train.shards=4, got 65; write 68 or 64"),
    "more workers than shards": (["workers.num=5"], "workers.num must be at most train.shards=4, got 5"),
    "more workers than cores": (["train.shards=64", "train.global_batch=64", "workers.num=64"], "workers.num must be at most .* cores"),
    "unknown metric": (["checkpoint.best.metric=val/f1"], "checkpoint.best.metric must be val/loss, val/accuracy, train/loss or train/accuracy, got 'val/f1'"),
    "no key=value": (["workers.num"], "workers.num"),
}  # fmt: skip

WITH_TORCH = {
    "unknown loss": (["loss._target_=CrossEntropyLos"], "loss._target_ names nothing in torch.nn, got 'CrossEntropyLos'.*did you mean 'CrossEntropyLoss'"),
    "unknown optimizer": (["optimizer._target_=SDG"], "optimizer._target_ names nothing in torch.optim, got 'SDG'.*did you mean 'SGD'"),
    "unknown model": (["model._target_=jobs.models.Nett"], "model._target_ 'jobs.models.Nett': jobs.models has no 'Nett'.*did you mean 'Net'"),
    "unknown module": (["model._target_=nowhere.Net"], "model._target_ 'nowhere.Net': there is no module 'nowhere'"),
    "unknown argument": (["model.num_clases=10"], "model.num_clases is no argument of Net.*did you mean 'num_classes'"),
    "unknown argument of a group": (["optimizer.groups[0].weight_deca=0"], r"optimizer.groups\[0\].weight_deca is no argument of SGD.*did you mean 'weight_decay'"),
    "missing argument": (["scheduler={_target_: StepLR}"], "scheduler.step_size is missing: StepLR needs it"),
    "senseless argument": (["optimizer.momentum=-1"], "optimizer: SGD raised ValueError: Invalid momentum value: -1"),
    "pattern matches nothing": (["optimizer.groups[0].match=*.bais"], r"optimizer.groups\[0\].match matches no parameter, got '\*.bais'"),
    "dataset smaller than a batch": (["train.global_batch=2048"], "train.global_batch must be at most the 1437 samples of data.train, got 2048"),
    "labels outside the classes": (["model.num_classes=5"], "data.train: the label of sample .* must lie between 0 and 4, the model's classes"),
    "output does not fit the loss": (["loss={_target_: MSELoss}"], r"loss: MSELoss takes output and target of one shape, got \[16, 10\] and \[16\]; write loss.target: one_hot"),
    "logits where probabilities are meant": (["loss={_target_: KLDivLoss, target: one_hot}"], "loss: KLDivLoss takes log-probabilities.*write loss.output: log_softmax"),
    "weights for other classes": (["loss.weight=[1, 2]"], "loss.weight must be 10 numbers, one per class of the model's output, got 2"),
    "schedule shorter than the run": (["scheduler={_target_: CosineAnnealingLR, T_max: 5}"], r"scheduler.T_max must be at least 10.*write \$\{train.epochs\}"),
    "rate that the schedule overrides": (["optimizer.groups[0].lr_scale=2", "scheduler={_target_: OneCycleLR, max_lr: 1, total_steps: 220, interval: step}"], r"optimizer.groups\[0\].lr_scale has no effect"),
    "warm start from nothing": (["init_from=runs/nothing"], "init_from.url: .*runs/nothing: is no run"),
    "metric that is never measured": (["train.early_stop={metric: val/recall/11, mode: max, patience: 2}", "metrics={recall: {_target_: MulticlassRecall, num_classes: 10, average: none}}"], "train.early_stop.metric must be one number that is measured, got 'val/recall/11' .did you mean 'val/recall/1'"),
    "unknown metric of torchmetrics": (["metrics={f1: F2Score}"], "metrics.f1._target_ names nothing in torchmetrics.*did you mean"),
    "input does not fit the model": (["model.in_channels=3"], r"model: forward on inputs of shape \[16, 1, 32, 32\] raised"),
    "accelerator that is not here": (["workers.accelerator=H10000"], "workers.accelerator=H10000: this machine has .*; remove it, or run on a cluster"),
    "store cannot be written": (["store=/proc/nowhere"], "store: .*/proc/nowhere"),
    "store of one process": (["store=memory://runs"], "store 'memory://runs' is seen by one process alone"),
    "wrong plan value": (["data.train.length=${plan.total_steps}"], "data.train.length"),
}  # fmt: skip


HEAVY = {"torch", "ray", "wandb", "fsspec", "numpy", "matplotlib", "rich"}
"""What takes long to import; without any of it a command ends within a quarter of a second on a quiet machine."""


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_said_before_anything_heavy_is_imported(name: str, tmp_path: Path) -> None:
    overrides, expected = WITHOUT_TORCH[name]
    command = [sys.executable, "-X", "importtime", str(Path(sys.executable).parent / "launcher"), "run", DIGITS]
    ended = subprocess.run([*command, *overrides], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    traced, said = [], []
    for line in ended.stderr.splitlines():
        (traced if line.startswith("import time:") else said).append(line)
    assert_refused(ended.returncode, ended.stdout, "\n".join(said), expected)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in traced}
    assert "omegaconf" in imported, "the trace must show imports"
    assert not imported & HEAVY
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WITH_TORCH)
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_said_before_ray_starts(verb: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, expected = WITH_TORCH[name]
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(main, [verb, DIGITS, *overrides])
    assert_refused(ended.exit_code, ended.stdout, ended.stderr, expected)
    assert not (tmp_path / "runs" / "digits").exists()
    assert not is_ray_running()


def test_with_json_the_error_is_a_document(tmp_path: Path) -> None:
    ended = launcher("run", DIGITS, "train.epochs=0", "--json", cwd=tmp_path)
    assert ended.exit_code == 2
    assert ended.document["status"] == "failed"
    assert "train.epochs must be at least 1, got 0" in ended.document["error"]


def test_missing_file(tmp_path: Path) -> None:
    ended = launcher("run", "nowhere.yaml", cwd=tmp_path)
    assert_refused(ended.exit_code, ended.stdout, ended.stderr, "nowhere.yaml: there is no such file")


def test_bad_yaml_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("model: {_target_: a.B}\nloss: [1, 2\n")
    ended = launcher("plan", "job.yaml", cwd=tmp_path)
    assert_refused(ended.exit_code, ended.stdout, ended.stderr, "job.yaml: .*line [23]")


@pytest.mark.parametrize("verb", ["status", "resume", "plot", "checkpoints"])
def test_no_such_run(verb: str, tmp_path: Path) -> None:
    ended = launcher(verb, "runs/nothing", cwd=tmp_path)
    assert_refused(ended.exit_code, ended.stdout, ended.stderr, "runs/nothing is no run")


def assert_refused(exit_code: int, stdout: str, stderr: str, expected: str) -> None:
    assert exit_code == 2, stderr
    assert stdout == ""
    (line,) = stderr.strip().splitlines()
    assert re.search(expected, line), line


def is_ray_running() -> bool:
    is_initialized = getattr(sys.modules.get("ray"), "is_initialized", None)  # Ray may be half imported
    return is_initialized is not None and is_initialized()


@pytest.mark.parametrize(("verb", "exit_code"), [("plan", 2), ("run", 5)])
def test_a_temporary_folder_whose_path_is_too_long(
    verb: str, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("RAY_TMPDIR")

    ended = launcher(verb, DIGITS, cwd=tmp_path, on_ray=True)  # it is refused before Ray starts

    assert ended.exit_code == exit_code, ended.stderr
    assert re.search(r"^error: TMPDIR: must be a path of at most 39 bytes.*; set it to", ended.stderr, re.MULTILINE)
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "runs").exists()
