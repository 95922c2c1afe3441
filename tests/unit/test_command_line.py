"""The border of the command line: what an interrupted or failed verb prints, and its streams and folders."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cluster.errors import Interrupted, StorageError
from launcher.cli import group, main, python_path, reading
from launcher.driver.stop_signals import StopSignals
from launcher.runs import driving

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stop_that_raises(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Result:
    def find_run(_: str) -> None:
        raise error

    monkeypatch.setattr(reading, "find_run", find_run)
    return CliRunner().invoke(main, ["stop", "runs/digits", "--json"])


def test_a_verb_that_is_interrupted_does_not_say_that_the_run_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = stop_that_raises(KeyboardInterrupt(), monkeypatch)
    assert (ended.exit_code, json.loads(ended.stdout)) == (130, {"status": "interrupted", "error": "interrupted"})


def test_a_run_that_was_abandoned_says_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    error = Interrupted("abandoned at step 3")
    error.document = {"status": "stopped", "step": 3}
    ended = stop_that_raises(error, monkeypatch)
    assert (ended.exit_code, json.loads(ended.stdout)) == (130, {**error.document, "error": "abandoned at step 3"})


def test_an_error_keeps_its_line_and_its_exit_code_where_stdout_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def show(*_: object, **__: object) -> None:
        raise StorageError("stdout: No space left on device")

    monkeypatch.setattr(group, "show", show)
    ended = stop_that_raises(Interrupted("no"), monkeypatch)
    assert (ended.exit_code, ended.stderr) == (130, "error: no\n")


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "<&- 1>&- 2>&-"])
def test_children_get_streams_in_place_of_closed_ones(closed: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess, sys\n"
        "from launcher.cli.streams import make_lasting\n"
        "make_lasting()\n"
        "sys.exit(subprocess.call([sys.executable, '-c', 'import os; [os.fstat(number) for number in range(3)]']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = ["sh", "-c", f'exec "$0" "$1" {closed}', sys.executable, str(program)]
    assert subprocess.run(command, env=environment, timeout=120, check=False).returncode == 0


def test_a_process_whose_server_had_no_streams_prints_to_its_log(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from cluster.process.fork_server import print_to\n"
        f"print_to({str(tmp_path / 'log')!r})\n"
        "print('out')\n"
        "print('error', file=sys.stderr)\n"
    )
    (tmp_path / "log").touch()
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = ["sh", "-c", 'exec "$0" -c "$1" 1>&- 2>&-', sys.executable, program]
    assert subprocess.run(command, env=environment, timeout=120, check=False).returncode == 0
    assert (tmp_path / "log").read_text() == "out\nerror\n"


def test_a_folder_of_pythonpath_that_cannot_be_listed_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listdir(folder: str) -> list[str]:
        if folder == str(closed):
            raise PermissionError(folder)
        return ["random.py"]

    closed = tmp_path / "closed"
    monkeypatch.setattr(os, "listdir", listdir)
    hidden = python_path._hidden([str(closed), str(tmp_path)], frozenset({"random"}), "Python's own", "")
    assert hidden.startswith(f"PYTHONPATH: {tmp_path}/random.py comes before Python's own random")


def test_ctrl_c_during_the_last_pictures_does_not_hide_that_the_run_is_complete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings, signals = list[str](), StopSignals()
    monkeypatch.setattr(driving, "_write_pictures", lambda *_: signal.raise_signal(signal.SIGINT))
    display: Any = SimpleNamespace(warn=warnings.append)
    run_log: Any = SimpleNamespace(display=display, state=SimpleNamespace(time={}, status="completed"))
    tracker: Any = SimpleNamespace(sync_command=None, finish=pytest.fail)
    with signals.caught():
        driving._finish(SimpleNamespace(), "digits", run_log, tracker, signals)  # type: ignore[arg-type]
    assert warnings == ["interrupted: pictures may be missing, and the tracker may lack the end of the run"]
