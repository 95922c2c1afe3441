"""Reports that a store of data does not answer, from the processes that read samples to the driver.

A worker that waits for such a store makes no progress, as one that hangs. The reports say so while it waits.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from jobs.images import data_stores

_SHORT_S = 10.0
"""A store that answers within this time is not worth a report; nor within its patience, if that is shorter."""
_LOOK_INTERVAL_S = 1.0
_MOST_BYTES = 4096
_AGAIN_S = 60.0
"""Shortest time between two reports of one read."""

_to_training: socket.socket | None = None
"""In a training process: where its loader processes send their reports."""


def report_to(tell: Callable[[str], None]) -> None:
    """Has this process, and its loader processes, report the store's URL and what it answers, in one line.

    Thread: ``tell`` is called in threads of its own.
    """
    global _to_training
    # Datagrams: loader processes share the socket without a lock, which one that is killed would keep.
    incoming, _to_training = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    threading.Thread(target=_pass_on, args=(incoming, tell), name="store-reports", daemon=True).start()
    _start_watch(tell)


class LoaderStart:
    """What a loader process does first: it reads with the patience of its training process, and reports to it."""

    def __init__(self) -> None:
        """Takes both from this process, the training process."""
        self._patience_s = data_stores.patience_s()
        self._outgoing = _to_training

    def __call__(self, _: int) -> None:
        """Thread: the main thread of the loader process."""
        data_stores.use_patience(self._patience_s)
        if self._outgoing is not None:
            _start_watch(self._tell)

    def _tell(self, text: str) -> None:
        assert self._outgoing is not None
        with contextlib.suppress(BlockingIOError):  # the training process has more of them than it reads
            self._outgoing.send(text.encode(errors="replace")[:_MOST_BYTES], socket.MSG_DONTWAIT)


def _start_watch(tell: Callable[[str], None]) -> None:
    threading.Thread(target=_watch, args=(tell,), name="store-watch", daemon=True).start()


def _pass_on(incoming: socket.socket, tell: Callable[[str], None]) -> None:
    """Thread: one of the training process."""
    while True:
        tell(incoming.recv(_MOST_BYTES).decode(errors="replace"))


def _watch(tell: Callable[[str], None]) -> None:
    """Thread: one of each process that reads."""
    told_at, told_of = -_AGAIN_S, 0.0
    while True:
        time.sleep(_LOOK_INTERVAL_S)
        late, now = data_stores.oldest_read(), time.monotonic()
        if late is None or now - late.since < min(_SHORT_S, data_stores.patience_s()):
            continue
        if late.since != told_of or now - told_at >= _AGAIN_S:
            told_at, told_of = now, late.since
            tell(late.text)
