"""Weights & Biases as a tracker: the driver's side of the recorder, the process in which wandb runs."""

import base64
import contextlib
import dataclasses
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster.tracking import wandb_recorder
from cluster.tracking.wandb_recorder import ABORT, Row, TrackerSettings, how_to_sync, one_line, write

_QUEUE_ROWS = 20_000
"""Rows that may wait for a recorder that is busy for ``connect_timeout_s``; some MiB at most."""


class WandbTracker:
    """The driver's side of a recorder.

    Thread: the driver's thread calls the methods; one thread sends to the recorder, one receives from it.
    """

    def __init__(self, settings: TrackerSettings, warn: Callable[[str], None], past: Iterable[Row]) -> None:
        self.url: str | None = None
        self._settings = settings
        self._warn = warn
        self._warned = threading.Lock()  # acquired by the first warning and never released
        self._folder: str | None = None
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue(_QUEUE_ROWS)
        self._settled = threading.Event()  # the recorder records, or has ended
        self._is_finished = False
        self._is_delivered = False  # the recorder has sent its last message
        self._pid: int | None = None  # the recorder's, once it has sent it
        self._ended = threading.Event()  # set once the recorder has ended
        # Starts the recorder as a process that is no child of this one, and ends at once.
        self._starter = subprocess.Popen(
            # -P: else the file's neighbours are found as top-level modules.
            [sys.executable, "-P", wandb_recorder.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "WANDB_ERROR_REPORTING": "false"},  # no telemetry to wandb's Sentry
            start_new_session=True,  # Ctrl-C must reach the driver only, which then finishes the run in order
        )
        self._listener = threading.Thread(target=self._listen, name="tracker-listen", daemon=True)
        self._listener.start()
        threading.Thread(target=self._feed, args=(past,), name="tracker-feed", daemon=True).start()

    @property
    def sync_command(self) -> str | None:
        if self._folder is None or not Path(self._folder).name.startswith("offline-"):
            return None
        records = sorted(Path(self._folder).parent.glob(f"offline-run-*-{self._settings.run_id}"))
        unsynced = [str(record) for record in records if not any(record.glob("*.wandb.synced"))]
        return shlex.join(["wandb", "sync", *unsynced]) if unsynced else None

    def log(self, row: Row) -> None:
        if self._is_finished:
            return
        try:
            self._messages.put_nowait({"row": dict(row)})
        except queue.Full:
            self._warn_once("cannot keep up, rows are missing there; all of them are in the run directory")

    def finish(self, summary: Mapping[str, Any], images: Mapping[str, bytes], *, succeeded: bool = True) -> None:
        if self._is_finished:
            return
        self._is_finished = True
        timeout_s = self._settings.finish_timeout_s
        deadline = time.monotonic() + timeout_s
        if not self._settled.wait(timeout_s / 3):
            self._send_signal(signal.SIGINT)  # it still waits for W&B: make it record offline
        encoded = {name: base64.b64encode(image).decode() for name, image in images.items()}
        message = {"summary": dict(summary), "images": encoded, "succeeded": succeeded}
        try:
            if not self._ended.is_set():
                self._messages.put({"finish": message}, timeout=deadline - time.monotonic())
            has_ended = self._ended.wait(deadline - time.monotonic())
        except queue.Full:
            has_ended = False
        if not has_ended:
            if not self._is_delivered:
                self._warn_once(f"did not end within {timeout_s:g} s; {how_to_sync(self._folder)}")
            self._end_recorder()
        self._listener.join(timeout=1.0)  # a warning may be in flight

    def _end_recorder(self) -> None:
        self._send_signal(ABORT)
        if not self._ended.wait(1.0):
            self._send_signal(signal.SIGKILL)
            self._ended.wait(1.0)

    def _send_signal(self, number: signal.Signals) -> None:
        if self._ended.is_set():  # its pid may be reused by now
            return
        if self._pid is None:  # not sent yet: stop its starter
            self._starter.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def _feed(self, past: Iterable[Row]) -> None:
        assert self._starter.stdin is not None
        try:
            with self._starter.stdin as lines:
                write(lines, dataclasses.asdict(self._settings))
                for row in past:
                    write(lines, {"row": dict(row)})
                finished = False
                while not finished:
                    message = self._messages.get()
                    write(lines, message)
                    finished = "finish" in message
        except BrokenPipeError:
            pass  # the recorder ended: the listener knows why
        except Exception as error:  # the border of a thread: the past comes from a store, the summary from anywhere
            self._warn_once(f"recording stopped: {one_line(error)}; metrics are in the run directory")

    def _listen(self) -> None:
        assert self._starter.stdout is not None
        with self._starter.stdout as lines:
            for line in lines:
                message = json.loads(line)
                if "pid" in message:
                    self._pid = message["pid"]
                    self._starter.wait()
                elif "warning" in message:
                    self._warn_once(message["warning"])
                elif "folder" in message:
                    self.url, self._folder = message["url"] or message["folder"], message["folder"]
                    self._settled.set()
                self._is_delivered |= "done" in message
        self._ended.set()
        self._settled.set()
        self._starter.wait()
        if not self._is_delivered:
            self._warn_once(f"its recorder ended early; {how_to_sync(self._folder)}")

    def _warn_once(self, problem: str) -> None:
        if self._warned.acquire(blocking=False):
            self._warn(f"W&B: {problem}")
