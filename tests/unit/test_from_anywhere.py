"""What the command line does with nothing but the URL of a run, and what it costs the store."""

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from counting_file_system import CountingFileSystem, start_counting

from cluster.host import identity
from cluster.run.run_directory import RunDirectory
from launcher.cli import main
from tests import saved

JOB = """\
name: digits
store: count://runs
model: {_target_: jobs.models.Net}
data: {train: jobs.data.digits}
loss: CrossEntropyLoss
optimizer: SGD
"""
MODEL = {"fc.weight": torch.arange(12.0).reshape(3, 4), "fc.bias": torch.tensor([float("nan"), 0.0, -0.0])}
EMA = {"n_averaged": torch.tensor(7), **{f"module.{name}": tensor + 1 for name, tensor in MODEL.items()}}


@pytest.fixture(autouse=True)
def _empty_store():
    CountingFileSystem.store.clear()
    start_counting()


@pytest.fixture
def run() -> RunDirectory:
    """A run that has completed, with three checkpoints."""
    return make_run("digits", [5, 10, 15])


def make_run(name: str, steps: list[int], status: str = "completed") -> RunDirectory:
    run = RunDirectory(f"count://runs/{name}")
    run.take_lease()
    run.write_job(JOB.replace("digits", name, 1))
    run.write_environment({"data_fingerprint": "ab", "attempts": [{"packages": {"torch": "2.13.0"}}]})
    run.write_status(
        {
            "run": run.url, "status": status, "step": max(steps), "epoch": 1, "samples": 1, "metrics": {},
            "best": {"metric": "val/loss", "value": 0.1, "step": 15}, "workers": 1, "attempts": 1, "failure": None,
            "state_sha256": "ab", "seconds": 1.0, "error": None,
        }
    )  # fmt: skip
    for step in steps:
        files = {"model.safetensors": safetensors.torch.save(MODEL), "ema.safetensors": safetensors.torch.save(EMA)}
        saved.save(run.checkpoints, step, files | {"optimizer.bin": b"o" * step})
    metrics, events = run.metrics(), run.events()
    for step in range(1, max(steps) + 1):
        metrics.append({"step": step, "epoch": 1, "samples": step, "train/loss": 1 / step})
    metrics.flush()
    events.append({"kind": "attempt_started", "attempt": 0})
    events.flush()
    run.write_log(0, 0, b"hello\n")
    return run


def launcher(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def objects_of(run: RunDirectory, step: int) -> list[str]:
    return sorted(run.checkpoints.manifest(step).objects())


def write_to(run: RunDirectory, name: str, data: bytes = b"x") -> None:
    run.store.at("checkpoints").write(name, data)


def tear_manifest(run: RunDirectory, step: int) -> None:
    write_to(run, saved.manifest_name(run.store.at("checkpoints"), step), b"{")


def everything() -> dict[str, bytes]:
    return {path: file.getvalue() for path, file in CountingFileSystem.store.items()}


def drive(run: RunDirectory, **status: Any) -> None:
    """Writes what a driver would, from wherever."""
    (name,) = run.store.names("drivers")
    run.store.write(name, json.dumps((run.read_status() or {}) | status).encode())


class TestWhatItCosts:
    @pytest.mark.parametrize("verb", ["status", "plot", "logs", "list", "resume"])
    def test_does_not_grow_with_the_number_of_checkpoints(self, verb):
        calls: list[Counter] = []
        for number, steps in enumerate([[5, 10, 15], [*range(1, 61)]]):
            CountingFileSystem.store.clear()
            run = make_run(f"run{number}", steps)
            start_counting()
            ended = launcher(verb, "count://runs" if verb == "list" else run.url)
            assert ended.exit_code == 0, ended.output
            calls.append(Counter(CountingFileSystem.calls))
        assert calls[0] == calls[1]
        # To go on, a process keeps how the run stands, for it must not have changed by the time it is claimed.
        assert 0 < calls[0].total() <= (15 if verb == "resume" else 12)

    def test_checkpoints_are_two_listings_and_the_manifests_several_at_a_time(self):
        run = make_run("digits", [*range(1, 61)])
        start_counting(latency_s=0.002)
        assert len(json.loads(launcher("checkpoints", run.url, "--json").stdout)) == 60
        assert CountingFileSystem.calls == {"look": 1, "list": 2, "read": 60}
        assert 4 <= CountingFileSystem.most["read"] <= 8

    def test_runs_are_looked_at_several_at_a_time(self):
        for number in range(20):
            make_run(f"run{number:02}", [5])
        start_counting(latency_s=0.002)
        documents = json.loads(launcher("list", "count://runs", "--json").stdout)
        assert [document["run"][-5:] for document in documents] == [f"run{number:02}" for number in range(20)]
        assert CountingFileSystem.calls == {"look": 20, "list": 21, "read": 20}
        assert all(4 <= CountingFileSystem.most[verb] <= 8 for verb in ("look", "read"))


class TestCheckpoints:
    def test_the_manifests_tell_of_them(self, run):
        ended = launcher("checkpoints", run.url, "--json")
        first = json.loads(ended.stdout)[0]
        manifest = run.checkpoints.manifest(5)
        assert (ended.exit_code, first) == (
            0,
            {
                "step": 5, "good": None, "bytes": manifest.size, "created": manifest.created,
                "state_sha256": manifest.state_sha256, "metrics": {"val/loss": 0.5, "train/loss": None},
            },
        )  # fmt: skip
        assert "not read" in launcher("checkpoints", run.url).stdout

    def test_verified(self, run):
        ended = launcher("checkpoints", run.url, "--verify", "--json")
        assert [(d["step"], d["good"]) for d in json.loads(ended.stdout)] == [(5, True), (10, True), (15, True)]
        assert ended.exit_code == 0

    @pytest.mark.parametrize(
        ("spoil", "seen_in_manifest"),
        [
            (lambda run: run.store.at("checkpoints").delete(objects_of(run, 10)[:1]), True),
            (lambda run: tear_manifest(run, 10), True),
            (lambda run: write_to(run, objects_of(run, 10)[0], b"others"), False),
        ],
        ids=["an object is gone", "a torn manifest", "other bytes"],
    )
    def test_a_bad_one_is_named_and_stays(self, run, spoil, seen_in_manifest):
        spoil(run)
        before = everything()
        for option, found in (([], seen_in_manifest), (["--verify"], True), (["--repair", "--verify"], True)):
            ended = launcher("checkpoints", run.url, *option)
            assert ended.exit_code == (3 if found else 0)
            assert ("step-00000010: " in ended.stdout) == found
        assert everything() == before

    def test_orphans_are_told_and_removed(self, run):
        notes = ["notes.txt", "step-00000005/notes.txt", "step-00000005/model-1.bin"]
        orphans = ["step-00000005/model-0a1b2c3d-00000.bin", "step-00000020/model-0a1b2c3d-00001.bin"]
        good = everything()
        for name in notes + orphans:
            write_to(run, name)
        ended = launcher("checkpoints", run.url, "--repair", "--json")
        document = json.loads(ended.stdout)
        assert (ended.exit_code, document["orphans_removed"]) == (0, orphans)
        assert [checkpoint["step"] for checkpoint in document["checkpoints"]] == [5, 10, 15]
        assert everything().keys() == good.keys() | {f"/runs/digits/checkpoints/{name}" for name in notes}
        assert "no orphans" in launcher("checkpoints", run.url, "--repair").stdout

    def test_beside_a_bad_one_nothing_is_an_orphan_up_to_its_step(self, run):
        older, newer = "step-00000005/model-0a1b2c3d-00000.bin", "step-00000015/model-0a1b2c3d-00001.bin"
        for name in (older, newer):
            write_to(run, name)
        tear_manifest(run, 10)
        ended = launcher("checkpoints", run.url, "--repair", "--json")
        assert (ended.exit_code, json.loads(ended.stdout)["orphans_removed"]) == (3, [newer])

    def test_nothing_is_removed_while_it_runs(self, run):
        write_to(run, "step-00000020/model-0a1b2c3d-00001.bin")
        drive(run, status="running", updated=4e9, place="elsewhere")
        before = everything()
        ended = launcher("checkpoints", run.url, "--repair")
        assert (ended.exit_code, everything()) == (5, before)
        assert "is running" in ended.stderr
        drive(run, updated=1.7e9)  # silent for long: its driver is gone
        assert launcher("checkpoints", run.url, "--repair").exit_code == 0

    def test_one_that_a_live_run_deletes_meanwhile_is_not_bad(self, run, monkeypatch):
        read = CountingFileSystem.cat_file

        def cat_file(fs, path, **kwargs):
            if path.rpartition("/")[0].endswith("step-00000005"):
                CountingFileSystem.store.pop(path, None)
            return read(fs, path, **kwargs)

        monkeypatch.setattr(CountingFileSystem, "cat_file", cat_file)
        ended = launcher("checkpoints", run.url, "--json")
        assert (ended.exit_code, [d["step"] for d in json.loads(ended.stdout)]) == (0, [10, 15])


class TestBadInputCostsNothing:
    @pytest.mark.parametrize(
        ("arguments", "exit_code", "message"),
        [
            (["--at", 7], 3, "has no checkpoint of step 7; there are those of steps 5, 10, 15"),
            (["--at", 10, "optimizer.lr=0.1"], 2, "optimizer.lr: (absent) -> 0.1"),
            (["--at", 10, "no.such=1"], 2, "no"),
            (["--as", "other"], 2, "is a run already"),
            (["--as", "count://runs/filled"], 2, "is not empty, it holds x"),
            (["--as", "new", "--at", 7], 3, "has no checkpoint of step 7"),
            (["--as", "new", "optimizer.lr=0.1"], 2, "branch with --force"),
            (["--as", "new", "store=elsewhere"], 2, "leave out name and store"),
            (["--as", "new", "no.such=1"], 2, "no"),
        ],
    )
    def test_refused(self, run, arguments, exit_code, message):
        make_run("other", [5])
        RunDirectory("count://runs/filled").store.write("x", b"")
        before = everything()
        ended = launcher("resume", run.url, *arguments)
        assert ended.exit_code == exit_code, ended.output
        assert message in ended.stderr
        assert len(ended.stderr.strip().splitlines()) == 1
        assert everything() == before

    def test_back_to_a_bad_one(self, run):
        write_to(run, objects_of(run, 10)[0], b"others")
        before = everything()
        ended = launcher("resume", run.url, "--at", 10)
        assert (ended.exit_code, everything()) == (3, before)
        assert "there are those of steps 5, 10, 15" in ended.stderr

    @pytest.mark.parametrize("option", [[], ["--take-over"]])
    def test_back_while_it_runs(self, run, option):
        with subprocess.Popen(["sleep", "60"]) as driver:
            drive(run, status="running", pid=driver.pid, started=identity.started(driver.pid))
            before = everything()
            ended = launcher("resume", run.url, "--at", 10, *option)
            driver.kill()
        assert (ended.exit_code, everything()) == (2 if option else 5, before)
        assert f"launcher stop {run.url}" in ended.stderr or "launcher stop it" in ended.stderr


class TestExport:
    @pytest.mark.parametrize(("which", "expected"), [("model", MODEL), ("ema", {n: t + 1 for n, t in MODEL.items()})])
    def test_safetensors(self, run, tmp_path, which, expected):
        file = tmp_path / "deep" / "weights.safetensors"
        start_counting()
        ended = launcher("export", run.url, "--at", 10, "--weights", which, "--to", file, "--json")
        assert ended.exit_code == 0, ended.output
        assert CountingFileSystem.calls == {"look": 1, "list": 4, "read": 2}, "the manifest and one file"
        tensors = safetensors.torch.load_file(file)
        assert tensors.keys() == expected.keys()
        assert all(tensors[name].numpy().tobytes() == expected[name].numpy().tobytes() for name in expected)
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert metadata == {
            "run": run.url, "step": "10", "weights": which, "format": "pt",
            "state_sha256": run.checkpoints.manifest(10).state_sha256,
        }  # fmt: skip
        assert json.loads(ended.stdout)["to"] == str(file)

    def test_the_newest_good_one_to_a_store(self, run):
        tear_manifest(run, 15)
        ended = launcher("export", run.url, "--to", "count://exports/a.safetensors", "--json")
        assert (ended.exit_code, json.loads(ended.stdout)["step"]) == (0, 10)
        assert "/exports/a.safetensors" in everything()

    def test_by_default_it_lies_here_under_the_name_of_the_run(self, run, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        ended = launcher("export", run.url)
        assert "digits.safetensors: the weights of step 15, 2 tensors" in ended.stdout
        assert (tmp_path / "digits.safetensors").exists()

    def test_a_file_that_exists_is_overwritten_only_with_force(self, run, tmp_path):
        file = tmp_path / "a.safetensors"
        file.write_bytes(b"mine")
        ended = launcher("export", run.url, "--to", file)
        assert (ended.exit_code, file.read_bytes()) == (2, b"mine")
        assert "--force" in ended.stderr
        assert launcher("export", run.url, "--to", file, "--force").exit_code == 0
        assert file.read_bytes() != b"mine"

    def test_what_is_read_back_is_compared(self, run, monkeypatch):
        write = CountingFileSystem.pipe_file

        def pipe_file(fs, path, value, **kwargs):
            data = bytes(value)
            write(fs, path, data[:-1] + bytes([data[-1] ^ 1]) if "exports" in path else data, **kwargs)

        monkeypatch.setattr(CountingFileSystem, "pipe_file", pipe_file)
        ended = launcher("export", run.url, "--to", "count://exports/a.safetensors")
        assert ended.exit_code == 4
        assert "holds other bytes than were written" in ended.stderr

    @pytest.mark.parametrize(
        ("arguments", "exit_code", "message"),
        [
            (["--to", "a.pt"], 2, "must end in .safetensors or .onnx"),
            (["--at", 7], 3, "there are those of steps 5, 10, 15"),
        ],
    )
    def test_refused(self, run, tmp_path, monkeypatch, arguments, exit_code, message):
        monkeypatch.chdir(tmp_path)
        ended = launcher("export", run.url, *arguments)
        assert (ended.exit_code, list(tmp_path.iterdir())) == (exit_code, [])
        assert message in ended.stderr

    def test_a_run_without_an_average(self, run, tmp_path):
        saved.save(run.checkpoints, 20, {"model.safetensors": safetensors.torch.save(MODEL)})
        ended = launcher("export", run.url, "--weights", "ema", "--to", tmp_path / "a.safetensors")
        assert ended.exit_code == 2
        assert "keeps no averaged weights" in ended.stderr

    def test_onnx_names_the_extra_that_it_needs(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.startswith("onnx") else name)
        ended = launcher("export", run.url, "--to", Path(tmp_path) / "a.onnx")
        assert ended.exit_code == 2
        assert "pip install 'launcher[onnx]'" in ended.stderr
