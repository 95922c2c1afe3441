"""The process in which wandb works: this file, run as a script by ``wandb_tracker``. It imports nothing of ours.

wandb writes to our terminal whatever its settings say, holds the interpreter's exit until its uploads end or time out,
and interrupts the main thread when someone presses Stop on its page; none of that can reach the driver from here. The
recorder reads JSON lines (settings, rows, the end) and answers with JSON lines (which process it is, where the
run is, a warning). When the driver is killed it sees the end of its input and still delivers every row it was given.

The recorder is no child of the driver: what stops a job, as Ray does, sends a signal, SIGTERM by default, to the driver
and to all processes that descend from it. The driver then saves and finishes the run, and needs the recorder for that;
and wandb's own process, which ends at SIGTERM whatever the recorder does.

Steps. W&B counts rows in a ``_step`` of its own, renumbers it when records are merged, and drops rows that
go back in it. So ours is an ordinary column, ``step``, against which all others are drawn, and a row
whose step is recorded already is left out: each of our steps is there once, however often a run was killed.
"""

import base64
import contextlib
import io
import json
import os
import re
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
"""Metrics of one step; the key ``step`` is always there."""

ABORT = signal.SIGUSR1
"""By this the driver ends a recorder that is late."""

_DISK_FULL_BYTES = 64 * 1024
"""wandb-core writes in blocks of 32 KiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackerSettings:
    """What a tracker must know. Nothing secret: W&B's key and host come from the environment or netrc."""

    mode: Literal["online", "offline", "disabled"]
    project: str
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    name: str
    """The run's display name."""
    run_id: str
    """W&B's id of the run; the same one continues the same run. None of ``/ \\ # ? % :``, at most 128 characters."""
    directory: str
    """A local folder, best the same one for every attempt; wandb's own records are made in ``directory/wandb``."""
    config: Mapping[str, Any]
    """The resolved job description, shown beside the run."""
    connect_timeout_s: float = 60.0
    """Seconds to wait for W&B before recording offline instead."""
    finish_timeout_s: float = 15.0
    """Seconds that ``finish`` may take, uploads included."""


class _Recorder:
    """The other end: what the process made by ``WandbTracker`` does. It may block, and it may die."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._cores = _note_processes()
        self._connecting = False
        self._hurry = False
        self._folder = ""  # wandb's record of this attempt
        self._step_path = Path()  # the last step recorded below ``directory``, by any attempt
        self._last_step = -1

    def record(self, lines: Iterable[str]) -> None:
        """Record what the lines say until they end."""
        messages = map(json.loads, lines)
        settings = TrackerSettings(**next(messages))
        run = self._open(settings)
        self._folder = str(Path(run.dir).parent)
        if not Path(self._folder).is_relative_to(os.path.abspath(settings.directory)):
            self._tell(warning=f"cannot write in {settings.directory}; recording in {self._folder}")
        sys.stderr = _Ear(lambda: self._tell(warning=f"not everything was uploaded; {how_to_sync(self._folder)}"))
        self._tell(url=run.url, folder=self._folder)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._step_path = Path(self._folder).with_name(f"{settings.run_id}.step")
        # online the server knows what it has; offline each attempt makes a record of its own, to be merged later
        self._last_step = self._read_step() if run.offline else run.summary.get("step", -1)
        outcome: dict[str, Any] = {"summary": {}, "images": {}, "succeeded": False}  # unless the driver says better
        for message in messages:
            if "finish" in message:
                outcome = message["finish"]
            else:
                self._log(run, message["row"])
        self._finish(run, outcome)

    def give_up_connecting(self, *_signal: object) -> None:
        """Stop waiting for W&B, now or as soon as that would begin."""
        self._hurry = True
        if self._connecting:
            raise KeyboardInterrupt

    def kill_cores(self) -> None:
        """Kill the wandb-core processes: they outlive their parent while they retry an upload."""
        for core in self._cores:
            core.kill()

    def abort(self, *_signal: object) -> None:
        """End at once; what is on the disk can be uploaded later."""
        self.kill_cores()
        os._exit(1)

    def introduce(self) -> None:
        """Say which process this is."""
        self._tell(pid=os.getpid())

    def fail(self, error: Exception) -> None:
        """Say what ended the recording."""
        self._tell(warning=f"recording stopped: {one_line(error)}; metrics are in the run directory")

    def _open(self, settings: TrackerSettings) -> Any:
        """A wandb run: online if that is wanted and possible, else offline, so that nothing is lost."""
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
                    silent=False,  # its warnings on stderr are the only word of a failed upload
                    show_info=False,
                    console="off",
                    save_code=False,
                    disable_git=True,
                    disable_code=True,
                    x_disable_meta=True,
                    x_disable_stats=True,  # the driver's machine is not where the work is done
                    x_save_requirements=False,
                    init_timeout=settings.connect_timeout_s,
                    finish_timeout=settings.finish_timeout_s / 2,  # the rest is for what comes before and after
                    x_transaction_log_flush_interval=1.0,  # by default a dying machine takes 15 s of rows along
                ),
            )

        if settings.mode == "offline":
            return init("offline")
        try:
            self._connecting = True
            signal.setitimer(
                signal.ITIMER_REAL, settings.connect_timeout_s
            )  # its own init_timeout leaves the login out
            if self._hurry:
                raise KeyboardInterrupt
            return init("online")
        except (Exception, KeyboardInterrupt) as error:  # wandb raises a dozen types here
            self._connecting = False
            self.kill_cores()  # else the failed run holds its id, and the teardown waits for its retries
            with contextlib.suppress(Exception, SystemExit):  # "the service was killed"
                wandb.teardown()
            run = init("offline")
            self._tell(warning=f"recording offline: {one_line(error)}; {how_to_sync(str(Path(run.dir).parent))}")
            return run
        finally:
            self._connecting = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _read_step(self) -> int:
        try:
            return int(self._step_path.read_text())
        except (OSError, ValueError):  # there is none, or a full disk has cut it
            return -1

    def _log(self, run: Any, row: Row) -> None:
        if row["step"] > self._last_step:
            self._last_step = int(row["step"])
            run.log(dict(row))
            with contextlib.suppress(OSError):
                self._step_path.write_text(str(self._last_step))
            if shutil.disk_usage(self._folder).free < _DISK_FULL_BYTES:  # wandb-core says so in its own log only
                self._tell(warning=f"no space left in {self._folder}: rows may be missing; make room on that disk")

    def _finish(self, run: Any, outcome: Mapping[str, Any]) -> None:
        import wandb

        try:
            run.summary.update(outcome["summary"])
            with tempfile.TemporaryDirectory() as folder:
                for name, image in outcome["images"].items():
                    path = Path(folder, f"{name}.png")
                    path.write_bytes(base64.b64decode(image))
                    run.log({name: wandb.Image(str(path))})  # wandb copies the file, and gives it the last step
        finally:
            run.finish(exit_code=0 if outcome["succeeded"] else 1)
        self._tell(done=True)

    def _tell(self, **message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the driver is gone: deliver what it has sent
            write(self._answers, message)


class _Ear(io.TextIOBase):
    """A stderr that listens for wandb's word that an upload failed; wandb has no call that tells."""

    def __init__(self, upload_failed: Callable[[], None]) -> None:
        self._upload_failed = upload_failed

    def write(self, text: str) -> int:
        if "Fatal error while uploading" in text or "Timed out finishing" in text:
            self._upload_failed()
        return len(text)


def _note_processes() -> list[subprocess.Popen[Any]]:
    """A list to which every process that this one starts from now on is added; wandb does not name its own."""
    started: list[subprocess.Popen[Any]] = []

    class NotedPopen(subprocess.Popen):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    subprocess.Popen = NotedPopen  # type: ignore[misc]
    return started


def write(lines: IO[str], message: Mapping[str, Any]) -> None:
    """Sends a message to the other end, as a line of JSON."""
    lines.write(json.dumps(message, default=_plain) + "\n")
    lines.flush()


def _plain(value: Any) -> float | str:
    """A number of NumPy or torch as a float, anything else as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def one_line(error: BaseException) -> str:
    """What an error of wandb says, for people."""
    if isinstance(error, KeyboardInterrupt):
        return "no answer from W&B in time"
    text = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
    return text[:300] or type(error).__name__


def how_to_sync(folder: str | None) -> str:
    """What to do with a record that W&B does not have yet, for people."""
    if folder is None:
        return "metrics are in the run directory"
    offline = Path(folder).name.startswith("offline-")
    return f"upload it later with: wandb sync {'' if offline else '--no-skip-online '}{folder}"


def _main() -> None:
    if os.fork():  # who has started this process must not be its parent
        os._exit(0)
    # stdout is ours alone: what wandb prints there goes where stderr goes
    answers = open(os.dup(1), "w", encoding="utf-8")  # noqa: SIM115  (open until the process ends)
    os.dup2(2, 1)
    recorder = _Recorder(answers)
    signal.signal(signal.SIGINT, recorder.give_up_connecting)
    signal.signal(signal.SIGALRM, recorder.give_up_connecting)
    signal.signal(ABORT, recorder.abort)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends when its driver has, which its input tells
    recorder.introduce()
    try:
        recorder.record(sys.stdin)
    except Exception as error:  # the border of a process
        recorder.fail(error)
        sys.exit(1)


if __name__ == "__main__":
    _main()
