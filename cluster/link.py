"""The training process's end of the wire to its agent: small messages out, orders in, nobody waits.

A message is a dict of plain values with a ``kind``. Messages leave in batches, a few times a second, so
that a run of short steps does not spend them on messages; they arrive complete and in order.
"""

import os
import queue
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

_BATCH_INTERVAL_S = 0.2
_BEAT_INTERVAL_S = 1.0


DOING = ("start", "data", "forward", "backward", "validation", "storage")
"""What a training process can be at; within a step, in this order."""


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life, and of progress.

    Attributes:
        marks: How often the work has told where it is.
        doing: What it does since the last mark, one of ``DOING``.
        step: The optimizer steps completed by then.
        for_s: Seconds since the last mark, when the beat left.
    """

    marks: int
    doing: str
    step: int
    for_s: float


class Link:
    """Sends messages to the driver and hears its orders.

    The process ends at once when its agent is gone: nobody would hear of what it does.
    """

    def __init__(self, connection: Connection) -> None:
        self.stop_wanted = threading.Event()
        self._connection = connection
        self._outbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._meeting_place: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._mark = (0, DOING[0], 0, time.monotonic())
        self._spent = dict.fromkeys(DOING, 0.0)
        self._sender = threading.Thread(target=self._send_batches, name="link-send", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive, name="link-receive", daemon=True).start()

    def send(self, kind: str, **content: Any) -> None:
        """Queues a message for the driver; returns at once."""
        self._outbox.put({"kind": kind, **content})

    def mark(self, doing: str, step: int) -> None:
        """Tells what the work does from now on; costs next to nothing. A beat carries it to the agent."""
        now = time.monotonic()
        marks, was_doing, _, since = self._mark
        self._spent[was_doing] += now - since
        self._mark = (marks + 1, doing, step, now)

    def spent(self) -> dict[str, float]:
        """Seconds since the link was made, by what the work did; for the thread that marks."""
        _, doing, _, since = self._mark
        return self._spent | {doing: self._spent[doing] + time.monotonic() - since}

    def wait_for_meeting_place(self, timeout_s: float) -> tuple[str, int]:
        """The address and port where rank 0 waits for the others.

        Raises:
            TimeoutError: Rank 0 did not announce one in time.
        """
        try:
            return self._meeting_place.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"worker 0 announced no meeting place within {timeout_s:.0f} s") from None

    def close(self) -> None:
        """Sends what is queued and returns when it is on its way."""
        self._closing.set()
        self._sender.join()

    def _send_batches(self) -> None:
        beat_at = 0.0
        while True:
            is_last = self._closing.wait(_BATCH_INTERVAL_S)
            batch: list[Beat | dict[str, Any]] = []
            now = time.monotonic()
            if now - beat_at >= _BEAT_INTERVAL_S:
                beat_at = now
                marks, doing, step, marked_at = self._mark
                batch.append(Beat(marks, doing, step, now - marked_at))
            while not self._outbox.empty():
                batch.append(self._outbox.get())
            if batch:
                try:
                    self._connection.send(batch)
                except OSError:
                    os._exit(1)
            if is_last:
                return

    def _receive(self) -> None:
        while True:
            try:
                order = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)
            match order:
                case "stop":
                    self.stop_wanted.set()
                case ("meet", host, port):
                    self._meeting_place.put((host, port))
