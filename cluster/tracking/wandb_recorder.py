"""The process in which wandb runs: ``wandb_tracker`` runs this file as a script. It imports nothing of ours.

wandb writes to the terminal whatever its settings, delays the interpreter's exit until its uploads end or time out, and
interrupts the main thread when someone presses Stop on its page. In a process of its own, none of that reaches the
driver. The recorder reads JSON lines (settings, rows, the end) and answers with JSON lines (its pid, where the run is,
a warning). If the driver is killed, the recorder reads the end of its input and still delivers every row it was given.

The recorder is no child of the driver: what stops a job, such as Ray, sends a signal, SIGTERM by default, to the driver
and all its descendants. The driver then saves and finishes the run, for which it needs the recorder and wandb's own
process, which ends at SIGTERM whatever the recorder does.

Steps: W&B counts rows in its own ``_step``, renumbers it when records are merged, and drops rows whose ``_step`` goes
back. So our step is an ordinary column, ``step``, and the x-axis of all others. A row whose step is recorded already is
skipped: each step is there once, however often a run was killed.
"""

import base64
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

Row = Mapping[str, float | int]
"""Metrics of one step; the key ``step`` is always present."""

ABORT = signal.SIGQUIT
"""The signal by which the driver ends a recorder that is late; no scheduler sends it."""
_IGNORED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What may be sent to all processes of a job. The recorder ends when its input ends, with the driver."""

_DISK_FULL_BYTES = 64 * 1024
"""Less free space than this counts as a full disk: wandb-core writes in blocks of 32 KiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackerSettings:
    """The settings of a tracker. None is secret: W&B's key and host come from the environment or netrc."""

    mode: Literal["online", "offline", "disabled"]
    project: str
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    name: str
    """The run's display name."""
    run_id: str
    """W&B's id of the run; the same id continues the same run. At most 128 characters, none of ``/ \\ # ? % :``."""
    directory: str
    """A local folder, best the same for every attempt; wandb's own records go to ``directory/wandb``."""
    config: Mapping[str, Any]
    """The resolved job description, shown with the run."""
    connect_timeout_s: float = 60.0
    """Seconds to wait for W&B before recording offline instead."""
    finish_timeout_s: float = 15.0
    """Time limit of ``finish`` in seconds, uploads included."""


class _Recorder:
    """Records one attempt with wandb; it may block, and it may die."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._cores = _collect_child_processes()
        self._connecting = False
        self._must_not_connect = False
        self._folder = ""  # of wandb's record of this attempt
        self._step_path = Path()  # holds the last step that any attempt recorded below ``directory``
        self._last_step = -1

    def record(self, lines: Iterable[str]) -> None:
        """Record what the lines say until they end."""
        messages = map(json.loads, lines)
        settings = TrackerSettings(**next(messages))
        run = self._open(settings)
        self._folder = str(Path(run.dir).parent)
        if not Path(self._folder).is_relative_to(os.path.abspath(settings.directory)):
            self._send(warning=f"cannot write in {settings.directory}; recording in {self._folder}")
        sys.stderr = _UploadErrorListener(
            lambda: self._send(warning=f"not everything was uploaded; {how_to_sync(self._folder)}")
        )
        self._send(url=run.url, folder=self._folder)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._step_path = Path(self._folder).with_name(f"{settings.run_id}.step")
        # Online the server has the last step; offline each attempt makes its own record, to be merged later.
        self._last_step = self._read_step() if run.offline else run.summary.get("step", -1)
        outcome: dict[str, Any] = {"summary": {}, "images": {}, "succeeded": False}  # if the driver sends none
        for message in messages:
            if "finish" in message:
                outcome = message["finish"]
            else:
                self._log(run, message["row"])
        self._finish(run, outcome)

    def give_up_connecting(self, *_signal: object) -> None:
        """Stop waiting for W&B, now or as soon as the wait begins."""
        self._must_not_connect = True
        if self._connecting:
            raise KeyboardInterrupt

    def kill_cores(self) -> None:
        """Kill the wandb-core processes: they outlive their parent while they retry an upload."""
        for core in self._cores:
            core.kill()

    def abort(self, *_signal: object) -> None:
        """End at once; what is on disk can be uploaded later."""
        self.kill_cores()
        os._exit(1)

    def introduce(self) -> None:
        """Send the pid of this process."""
        self._send(pid=os.getpid())

    def fail(self, error: Exception) -> None:
        """Send the error that ended the recording."""
        self._send(warning=f"recording stopped: {one_line(error)}; metrics are in the run directory")

    def _open(self, settings: TrackerSettings) -> Any:
        """Open a wandb run: online if wanted and possible, else offline, so that nothing is lost."""
        import wandb

        def init(mode: Literal["online", "offline"]) -> Any:
            return wandb.init(
                mode=mode,
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                tags=tuple(settings.tags),
                name=settings.name,
                id=settings.run_id,
                resume="allow",
                dir=settings.directory,
                config=dict(settings.config),
                allow_val_change=True,  # a resumed run may have other workers
                settings=wandb.Settings(
                    silent=False,  # its warnings on stderr are the only sign of a failed upload
                    show_info=False,
                    console="off",
                    save_code=False,
                    disable_git=True,
                    disable_code=True,
                    x_disable_meta=True,
                    x_disable_stats=True,  # the driver's machine does not do the work
                    x_save_requirements=False,
                    init_timeout=settings.connect_timeout_s,
                    finish_timeout=settings.finish_timeout_s / 2,  # the rest is for the work before and after
                    x_transaction_log_flush_interval=1.0,  # by default a dying machine loses 15 s of rows
                ),
            )

        if settings.mode == "offline":
            return init("offline")
        try:
            self._connecting = True
            signal.setitimer(signal.ITIMER_REAL, settings.connect_timeout_s)  # init_timeout does not cover the login
            if self._must_not_connect:
                raise KeyboardInterrupt
            return init("online")
        except (Exception, KeyboardInterrupt) as error:  # wandb raises a dozen types here
            self._connecting = False
            self.kill_cores()  # else the failed run keeps its id, and the teardown waits for its retries
            with contextlib.suppress(Exception, SystemExit):  # "the service was killed"
                wandb.teardown()
            run = init("offline")
            self._send(warning=f"recording offline: {one_line(error)}; {how_to_sync(str(Path(run.dir).parent))}")
            return run
        finally:
            self._connecting = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _read_step(self) -> int:
        try:
            return int(self._step_path.read_text())
        except (OSError, ValueError):  # there is no file, or a full disk has cut it
            return -1

    def _log(self, run: Any, row: Row) -> None:
        if row["step"] > self._last_step:
            self._last_step = int(row["step"])
            run.log(dict(row))
            with contextlib.suppress(OSError):
                self._step_path.write_text(str(self._last_step))
            if shutil.disk_usage(self._folder).free < _DISK_FULL_BYTES:  # wandb-core reports it only in its own log
                self._send(warning=f"no space left in {self._folder}: rows may be missing; make room on that disk")

    def _finish(self, run: Any, outcome: Mapping[str, Any]) -> None:
        import wandb

        try:
            run.summary.update(outcome["summary"])
            with tempfile.TemporaryDirectory() as folder:
                for name, image in outcome["images"].items():
                    path = Path(folder, f"{name}.png")
                    path.write_bytes(base64.b64decode(image))
                    run.log({name: wandb.Image(str(path))})  # wandb copies the file, at the last step
        finally:
            run.finish(exit_code=0 if outcome["succeeded"] else 1)
        self._send(done=True)

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the driver is gone: go on with what it has sent
            write(self._answers, message)


class _UploadErrorListener(io.TextIOBase):
    """A stderr that detects wandb's message about a failed upload; wandb has no call that reports one."""

    def __init__(self, upload_failed: Callable[[], None]) -> None:
        self._upload_failed = upload_failed

    def write(self, text: str) -> int:
        if "Fatal error while uploading" in text or "Timed out finishing" in text:
            self._upload_failed()
        return len(text)


def _collect_child_processes() -> list[subprocess.Popen[Any]]:
    """Return a list that grows by every process this one starts from now on; wandb does not expose its own."""
    started: list[subprocess.Popen[Any]] = []

    class CollectedPopen(subprocess.Popen[Any]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    subprocess.Popen = CollectedPopen  # type: ignore[misc]
    return started


def write(lines: IO[str], message: Mapping[str, Any]) -> None:
    """Send a message to the other process, as a line of JSON."""
    lines.write(json.dumps(message, default=_plain) + "\n")
    lines.flush()


def _plain(value: Any) -> float | str:
    """Return a number of NumPy or torch as a float, anything else as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def one_line(error: BaseException) -> str:
    """Return wandb's error text, for people to read."""
    if isinstance(error, KeyboardInterrupt):
        return "no answer from W&B in time"
    text = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
    return text[:300] or type(error).__name__


def how_to_sync(folder: str | None) -> str:
    """Return what to do with a record that W&B does not have yet, for people to read."""
    if folder is None:
        return "metrics are in the run directory"
    offline = Path(folder).name.startswith("offline-")
    return f"upload it later with: wandb sync {'' if offline else '--no-skip-online '}{shlex.quote(folder)}"


def _main() -> None:
    if os.fork():  # the driver must not be the parent, see above
        os._exit(0)
    # Only answers go to stdout: what wandb prints there goes to stderr.
    answers = open(os.dup(1), "w", encoding="utf-8")  # noqa: SIM115  (open until the process ends)
    os.dup2(2, 1)
    recorder = _Recorder(answers)
    signal.signal(signal.SIGINT, recorder.give_up_connecting)
    signal.signal(signal.SIGALRM, recorder.give_up_connecting)
    signal.signal(ABORT, recorder.abort)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    recorder.introduce()
    try:
        recorder.record(sys.stdin)
    except Exception as error:  # the border of a process
        recorder.fail(error)
        sys.exit(1)


if __name__ == "__main__":
    _main()
