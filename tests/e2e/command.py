"""The command line as a person has it: a process, its exit code, its two streams.

Verbs that plan or train do it without Ray (``tests.launcher_without_ray``) unless a test asks for Ray.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import launcher_without_ray
from tests.faults.injection import fired, release

CHECKOUT = Path(__file__).parents[2]
JOBS = CHECKOUT / "jobs"
LIMIT_S = 300.0
"""How long anything is waited for: at least ten times what it takes on a machine with nothing else to do."""
_ON_RAY = [str(Path(sys.executable).parent / "launcher")]
_WITHOUT_RAY = [sys.executable, "-P", "-m", "tests.launcher_without_ray"]
_VERBS_THAT_PLAN = ("data", "plan", "run", "resume", "submit")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.stdout)


def launcher(*arguments: object, cwd: Path, on_ray: bool = False) -> Ended:
    """Runs ``launcher ARGUMENTS`` to its end."""
    return Running(arguments, cwd, on_ray=on_ray).wait()


_unfinished: list["Running"] = []


def end_all() -> None:
    """Kills the commands that nobody has waited for."""
    for running in tuple(_unfinished):
        running.signal_group(signal.SIGKILL)
        running.wait()


class Running:
    """A command in a session of its own, so that a signal reaches all that a terminal's would.

    Without Ray, its agents and their training processes are in the session of the test and end with the driver.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        cwd: Path,
        wrap: Callable[[list[str]], list[str]] = list,
        *,
        on_ray: bool = False,
    ) -> None:
        """``wrap``: turns the command into one that runs elsewhere."""
        is_of_cluster = "--cluster" in arguments  # which is one of ours, without Ray
        is_without_ray = (arguments[0] in _VERBS_THAT_PLAN or is_of_cluster) and not on_ray
        program, environment = (_WITHOUT_RAY, launcher_without_ray.environment()) if is_without_ray else (_ON_RAY, {})
        # Files and not pipes, which what a killed command leaves behind would keep open.
        self._said = Path(tempfile.mkdtemp(prefix="said-"))
        self._ended: Ended | None = None
        with (self._said / "stdout").open("wb") as stdout, (self._said / "stderr").open("wb") as stderr:
            self._process = subprocess.Popen(
                wrap([*program, *map(str, arguments)]),
                cwd=cwd,
                env={**os.environ, "WANDB_DIR": str(cwd), "PYTHONPATH": str(CHECKOUT), **environment},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        _unfinished.append(self)

    def wait(self, timeout_s: float = LIMIT_S) -> Ended:
        """Waits for the end of the command, and kills it if that does not come in time."""
        if self._ended is None:
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.signal_group(signal.SIGKILL)
                self._process.wait()
                raise AssertionError(f"no end within {timeout_s:.0f} s\n{self.stderr}") from None
            self._ended = Ended(self._process.returncode, (self._said / "stdout").read_text(), self.stderr)
            shutil.rmtree(self._said)
            _unfinished.remove(self)
        return self._ended

    @property
    def stderr(self) -> str:
        """What it has said by now; it has not been waited for yet."""
        return (self._said / "stderr").read_text()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Returns when something has happened while the command still runs."""
        deadline = time.monotonic() + LIMIT_S
        while not happened():
            assert self._process.poll() is None, f"ended before it happened: {self.wait()}"
            if time.monotonic() > deadline:
                self.signal_group(signal.SIGKILL)
                raise AssertionError(f"has not happened within {LIMIT_S:.0f} s: {self.wait()}")
            time.sleep(0.02)

    def signal_group(self, number: signal.Signals) -> None:
        """What a terminal does: every process of the group gets the signal."""
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self._process.pid, number)

    @property
    def pid(self) -> int:
        return self._process.pid


def rows(run: Path) -> bytes:
    """The metrics of a run that has ended, byte by byte."""
    return (run / "metrics.jsonl").read_bytes()


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind, from the parts of a live run too."""
    from cluster.run.run_directory import RunDirectory

    return [event for event in RunDirectory(str(run)).events().read() if event["kind"] == kind]


def checkpointed(run: Path, step: int) -> Callable[[], bool]:
    """Whether a checkpoint of this step, or of a later one, is committed."""

    def is_committed() -> bool:
        manifests = (run / "checkpoints").glob("step-*/manifest-*.json")
        return any(int(manifest.parent.name.removeprefix("step-")) >= step for manifest in manifests)

    return is_committed


def interrupt(running: Running, run: Path, plan: Path, *, saved_at: int) -> None:
    """Presses Ctrl-C while a command's run is held, lets it go, and waits until it has saved and stopped.

    Args:
        running: With ``--json``.
        run: The directory of its run.
        plan: Of faults, whose first holds the run.
        saved_at: The step of a checkpoint that is waited for before.
    """
    running.wait_until(lambda: checkpointed(run, saved_at)() and 0 in fired(plan))
    running.signal_group(signal.SIGINT)
    running.wait_until(lambda: len(events(run, "stop_requested")) == 1)
    release(plan, 0)
    stopped = running.wait()
    assert stopped.exit_code == 130, stopped.stderr
    assert stopped.document["status"] == "stopped"
    assert checkpointed(run, stopped.document["step"])(), "it saves before it stops"
