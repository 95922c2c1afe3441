"""The lease of a run: it tells which driver owns the run, on a store with neither locks nor compare-and-swap.

A driver that takes over a run writes a lease, ``drivers/00000002-1f3ac0de.json``. The id of the lease is the fencing
token: a number, one more than that of the newest lease, and a random suffix. The lease with the greatest token holds,
and only a later lease ends it. A driver checks its lease before it writes. That is no lock: the process can be paused
between the check and the write for any time. So objects that two drivers might write have the fencing token in their
names, and readers ignore what a superseded driver writes late; ``cluster.run.fences`` and ``cluster.run.row_log`` say
how. The lease also holds the newest status of its driver, so it is the heartbeat too.

A missing lease proves nothing: the store may not be mounted, or somebody deleted the object. The driver then looks for
the greatest fencing token in the names of the run's other objects. If that token is its own, the store is there and
nobody has taken over: the driver writes its lease again.
"""

import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from cluster.errors import ClusterError, StorageError
from cluster.host.batch_job import batch_job_id
from cluster.host.identity import place, started
from cluster.storage.documents import read_document, write_document
from cluster.storage.store import Store

STATUS_INTERVAL_S = 5.0
"""A live driver that reaches the store writes its status at least this often, in seconds."""

DRIVER_KEYS = ("host", "pid", "place", "started", "claimed", "batch_job")
"""Keys of a status that describe its driver, not the run."""

_FOLDER = "drivers"
_NAME = re.compile(rf"{_FOLDER}/([0-9]{{8}}-[0-9a-f]{{8}})\.json")


class SupersededError(ClusterError):
    """Another driver has taken over the run; this one writes nothing more."""


class Lease:
    """The lease of one driver on the run in a store."""

    def __init__(
        self,
        store: Store,
        status: Mapping[str, Any] | None,
        newest_writer: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes the run over from any current holder.

        Args:
            store: The run's store.
            status: The last known status of the run, if any.
            newest_writer: Returns the greatest fencing token in the names of the run's other objects, or ''. It is a
                lower bound for the new token, in case the lease objects were deleted by hand. The holder of this lease
                writes such an object before anything else.
            clock: A monotonic clock, in seconds.

        Raises:
            SupersededError: Another driver took the run over at the same moment and won.
        """
        earlier = _tokens(store)
        number = 1 + int(max([*earlier, newest_writer()]).partition("-")[0] or 0)
        self.id = f"{number:08d}-{secrets.token_hex(4)}"
        """The fencing token: a later driver's is greater."""
        self._store = store
        self._newest_writer = newest_writer
        self._clock = clock
        claimed, pid = round(time.time(), 3), os.getpid()
        who = (socket.gethostname(), pid, place(), started(pid), claimed, batch_job_id())
        self._identity = dict(zip(DRIVER_KEYS, who))
        self.write({**(status or {}), "status": "running"})
        self.check()
        store.delete(map(_object, earlier))

    def write(self, status: Mapping[str, Any]) -> None:
        """Overwrites the status of the run in the lease."""
        self._status = status
        document = {**status, **self._identity, "updated": round(time.time(), 3)}
        self._written_at = self._clock()
        write_document(self._store, _object(self.id), document)

    def renew(self) -> None:
        """Writes the newest status again if the last write began at least ``STATUS_INTERVAL_S`` ago."""
        if self._clock() - self._written_at >= STATUS_INTERVAL_S:
            self.write(self._status)

    def check(self) -> None:
        """Checks that this lease still holds, with one listing as a rule. Writes a lost lease again.

        Raises:
            SupersededError: Another driver has taken over the run.
            StorageError: The store does not answer, or holds nothing of this driver, like a store that is not mounted.
        """
        tokens = _tokens(self._store)
        is_lost = self.id not in tokens
        newest = max([*tokens, self._newest_writer() if is_lost else ""])
        if newest > self.id:
            takeover = self._takeover_text(newest)
            raise SupersededError(f"{self._store.url}: {takeover}; this one ends and writes nothing more")
        if newest < self.id:
            raise StorageError(
                f"{self._store.url}: holds nothing of this driver any more; mount the store again, or restore it"
            )
        if is_lost:
            self.write(self._status)

    def _takeover_text(self, token: str) -> str:
        found = read_document(self._store, _object(token))
        if found is None:
            return "another driver has taken the run over"
        when = datetime.fromtimestamp(found["claimed"], UTC).isoformat(" ", "seconds")
        return f"process {found['pid']} on {found['host']} has taken the run over at {when}"


def is_alive(status: Mapping[str, Any]) -> bool | None:
    """Returns whether the process that wrote a status still runs; None: on another machine or container.

    Host name and pid do not identify a process: pods and hosts share names, and pids are reused.
    """
    if status.get("place") is None or status["place"] != place():
        return None
    is_running: bool = started(status["pid"]) == status["started"]
    return is_running


def newest_status(store: Store) -> dict[str, Any] | None:
    """Returns the last status of the newest driver; None if the run never had a driver."""
    before: list[str] = []
    while (tokens := _tokens(store)) != before:  # list again: if all went meanwhile, there is a newer lease
        before = tokens
        for token in reversed(tokens):
            status = read_document(store, _object(token))
            if status is not None:
                return status
    return None


def _tokens(store: Store) -> list[str]:
    return sorted(match[1] for match in map(_NAME.fullmatch, store.names(_FOLDER)) if match)


def _object(token: str) -> str:
    return f"{_FOLDER}/{token}.json"
