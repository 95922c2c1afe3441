"""The training process's end of the wire to its agent: small messages out, orders in, nobody waits.

A message is a dict of plain values with a ``kind``. Messages leave in batches, a few times a second, so
that a run of short steps does not spend them on messages; they arrive complete and in order. Among them are
beats, for the agent alone: what the process is at, and what its time has gone into.
"""

import math
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

_BATCH_INTERVAL_S = 0.2
_BEAT_INTERVAL_S = 1.0

DOING = ("start", "restore", "data", "forward", "backward", "validation", "storage", "exchange")
"""What a training process can be at; within a step, in this order. Whoever is in an exchange waits for the others,
wherever they are, and so comes last."""


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life, and of progress.

    Attributes:
        doing: What it does since the last mark, one of ``DOING``.
        step: The optimizer steps completed by then.
        is_first_step: This process has not completed a step yet.
        for_s: Seconds since the last mark, when the beat left.
        spent: Seconds by what was done, since the process began.
    """

    doing: str
    step: int
    is_first_step: bool
    for_s: float
    spent: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Mark:
    """Since when something is done, and what was spent until then; whole, so that any thread can read it."""

    doing: str
    step: int
    at: float
    spent: dict[str, float]


class Activity:
    """What a training process does, step by step, and what it has spent its time on.

    One thread at a time tells it; any other may ask.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mark = _Mark(DOING[0], 0, clock(), dict.fromkeys(DOING, 0.0))
        self._first_step: int | None = None
        self._before_exchange = DOING[0]

    def mark(self, doing: str, step: int) -> None:
        """Tells what is done from now on, and the steps completed; costs next to nothing."""
        if self._first_step is None and doing == "data":  # which every step begins with
            self._first_step = step
        now = self._clock()
        self._mark = _Mark(doing, step, now, _spent_until(now, self._mark))

    def begin_exchange(self) -> None:
        """From now on the process waits for what others have to give."""
        self._before_exchange = self._mark.doing
        self.mark("exchange", self._mark.step)

    def end_exchange(self) -> None:
        """It goes on with what it did before."""
        self.mark(self._before_exchange, self._mark.step)

    def exchanged(self, seconds: float) -> None:
        """So much of what counts as ``backward`` was an exchange: a GPU tells of it when it is long over.

        What the GPU waited while the process waited for something else has no share in the process's time.
        """
        mark = self._mark
        seconds = min(seconds, mark.spent["backward"])
        spent = dict(mark.spent)
        spent["backward"] -= seconds
        spent["exchange"] += seconds
        self._mark = replace(mark, spent=spent)

    def spent(self) -> dict[str, float]:
        """Seconds by what was done, since the process began."""
        return _spent_until(self._clock(), self._mark)

    def beat(self) -> Beat:
        """This moment, for a watcher."""
        mark, now = self._mark, self._clock()
        is_first_step = self._first_step is None or mark.step == self._first_step
        return Beat(mark.doing, mark.step, is_first_step, now - mark.at, _spent_until(now, mark))


def _spent_until(now: float, mark: _Mark) -> dict[str, float]:
    return mark.spent | {mark.doing: mark.spent[mark.doing] + now - mark.at}


class Link:
    """Sends messages to the driver and hears its orders; its beats tell of ``activity``.

    The process ends at once when its agent is gone: nobody would hear of what it does.
    """

    def __init__(self, connection: Connection, activity: Activity) -> None:
        self.stop_wanted = threading.Event()
        self.activity = activity
        self._connection = connection
        self._outbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._meeting_place: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._sender = threading.Thread(target=self._send_batches, name="link-send", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive, name="link-receive", daemon=True).start()

    def send(self, kind: str, **content: Any) -> None:
        """Queues a message for the driver; returns at once."""
        self._outbox.put({"kind": kind, **content})

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
        beat_at, was_first_step = -math.inf, True
        while True:
            is_last = self._closing.wait(_BATCH_INTERVAL_S)
            batch: list[Beat | dict[str, Any]] = []
            now, beat = time.monotonic(), self.activity.beat()
            # The end of the first step is told at once: from then on the agent watches every step for a hang.
            if now - beat_at >= _BEAT_INTERVAL_S or beat.is_first_step != was_first_step:
                beat_at, was_first_step = now, beat.is_first_step
                batch.append(beat)
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
