"""Signals, a closed terminal, and streams that nobody reads any more: the run is saved, and the exit code says so."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.command import CHECKOUT, JOBS, LIMIT_S, Running, checkpointed, events, launcher
from tests.processes import descendants, state, wait_until

LONG = ("run", JOBS / "digits.yaml", "train.epochs=1000", "checkpoint.every_steps=10", "tracking.mode=disabled")
SHORT = ("run", JOBS / "digits.yaml", "train.max_steps=3", "tracking.mode=disabled")
SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


def newest_checkpoint(run: Path) -> int:
    manifests = (run / "checkpoints").glob("step-*/manifest-*.json")
    return max(int(manifest.parent.name.removeprefix("step-")) for manifest in manifests)


def shell(script: str, home: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Runs ``launcher ARGUMENTS`` as ``$@`` of a script of bash."""
    program = [sys.executable, "-P", "-m", "launcher", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = ["bash", "-c", f"set -o pipefail; {script}", "bash", *program]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "runs/digits"
    running = Running([*LONG, "--json"], tmp_path)
    running.wait_until(checkpointed(run, 10))
    running.signal_group(number)
    ended = running.wait()

    assert (ended.exit_code, ended.document["status"]) == (130, "stopped"), ended.stderr
    assert ended.document["step"] == newest_checkpoint(run)
    (event,) = events(run, "stop_requested")
    assert event["reason"] == f"stopping on {number.name}"


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_on_ray_all_processes_get_it_and_the_run_is_saved(tmp_path: Path, number: signal.Signals) -> None:
    """Ray has handlers of its own; SIGTERM, with which it ends its processes, goes to the command alone."""
    run = tmp_path / "runs/digits"
    running = Running([*LONG, "--json"], tmp_path, on_ray=True)
    running.wait_until(checkpointed(run, 10))
    processes = [each.pid for each in descendants(running.pid)]
    for pid in [running.pid] if number == signal.SIGTERM else [running.pid, *processes]:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    ended = running.wait()

    assert (ended.exit_code, ended.document["status"]) == (130, "stopped"), ended.stderr
    assert ended.document["step"] == newest_checkpoint(run)
    assert "logging.cc" not in ended.stderr
    wait_until(lambda: not any(map(state, processes)))


def test_nohup_is_respected(tmp_path: Path) -> None:
    run = tmp_path / "runs/digits"
    running = Running([*LONG, "train.max_steps=40", "--json"], tmp_path, lambda command: ["nohup", *command])
    running.wait_until(checkpointed(run, 10))
    running.signal_group(signal.SIGHUP)
    ended = running.wait()

    assert ended.exit_code == 0, ended.stderr
    assert events(run, "stop_requested") == []


@pytest.mark.parametrize("is_ignored", [False, True], ids=["SIGHUP", "nohup"])
def test_a_run_outlives_its_terminal(tmp_path: Path, *, is_ignored: bool) -> None:
    """A closed terminal sends SIGHUP, and fails every write."""
    run, closing = tmp_path / "runs/digits", tmp_path / "closing"
    ignoring = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"] if is_ignored else []
    terminal = [sys.executable, "-m", "tests.e2e.terminal", str(closing), *ignoring]
    running = Running([*LONG, "train.max_steps=200"], tmp_path, lambda command: [*terminal, *command])
    running.wait_until(checkpointed(run, 10))
    closing.touch()
    ended = running.wait()

    status = launcher("status", run, "--json", cwd=tmp_path).document
    assert (ended.exit_code, status["status"]) == (0 if is_ignored else 130, "stopped"), ended.stderr
    assert status["step"] == newest_checkpoint(run)
    assert (status["step"] == 200) == is_ignored


@pytest.mark.parametrize("redirection", ["2>&1 | head -1", ">&- 2>&-", ">/dev/null 2>/dev/full", "<&- 2>&1 | true"])
def test_a_run_outlives_the_readers_of_its_streams(tmp_path: Path, redirection: str) -> None:
    script = f'set -o pipefail; "$@" {redirection}'
    running = Running(SHORT, tmp_path, lambda command: ["bash", "-c", script, "bash", *command])
    ended = running.wait()

    assert ended.exit_code == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    status = launcher("status", "runs/digits", "--json", cwd=tmp_path).document
    assert (status["status"], status["step"]) == ("stopped", 3)


def test_a_verb_whose_result_nobody_reads_says_nothing(tmp_path: Path) -> None:
    read = shell('"$@" | true', tmp_path, "schema")
    assert (read.returncode, read.stderr) == (0, "")
    read = shell('"$@" >&-', tmp_path, "list", "runs")
    assert (read.returncode, read.stderr) == (0, "")


def test_a_result_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    read = shell('"$@" > /dev/full', tmp_path, "list", "runs", "--json")
    assert read.returncode == 4
    assert read.stderr.splitlines() == [
        "error: stdout: No space left on device: the result is not written; write it elsewhere"
    ]
