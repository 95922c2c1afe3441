"""Who drives a run: one process at a time, on a store that has neither locks nor compare-and-swap.

Whoever begins to drive writes a claim, ``drivers/00000002-1f3ac0de.json``: its number is one more than the newest's,
its token is random. The claim that is last by number and token holds, and nobody can take that back but a later one.
A driver makes sure that its claim holds before it writes. That is no lock: it can be stopped between the two for as
long as the machine likes. So what two drivers write has the claim in its name, and what the older one writes late is
passed over by whoever reads: ``cluster.run.checkpoints`` and ``cluster.run.row_log`` tell how. A claim holds the newest
status of its driver, and so is its sign of life too.

A claim that is missing proves nothing: the store may not be mounted, or somebody has removed it. Other objects of the
run have the claims of their writers in their names. If the latest of these is this driver's own, the store is there and
nobody has taken the run over: the driver writes its claim again.
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
from cluster.host.identity import place, started
from cluster.storage.documents import read_document, write_document
from cluster.storage.store import Store

STATUS_INTERVAL_S = 5.0
"""A driver that lives, and reaches the store, writes how the run stands at least as often."""

DRIVER_KEYS = ("host", "pid", "place", "started", "claimed")
"""What a status says of its driver, and not of the run."""

_FOLDER = "drivers"
_NAME = re.compile(rf"{_FOLDER}/([0-9]{{8}}-[0-9a-f]{{8}})\.json")


class SupersededError(ClusterError):
    """Another driver has taken the run over; this one writes nothing more."""


class Lease:
    """A driver's hold on the run in a store."""

    def __init__(
        self,
        store: Store,
        status: Mapping[str, Any] | None,
        newest_writer: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Claims the run, whoever holds it now.

        Args:
            store: The run's.
            status: How the run stands so far, if that is known.
            newest_writer: Looks for the latest claim in the names of the run's other objects; empty if none has one.
                This claim comes after it too, should a person have removed it. The owner of this claim writes such an
                object before anything else.
            clock: Seconds that only grow.

        Raises:
            SupersededError: Another driver has claimed it at the same moment, and has won.
        """
        earlier = _ids(store)
        number = 1 + int(max([*earlier, newest_writer()]).partition("-")[0] or 0)
        self.id = f"{number:08d}-{secrets.token_hex(4)}"
        """Orders what drivers write: a later driver's is greater."""
        self._store = store
        self._newest_writer = newest_writer
        self._clock = clock
        claimed, pid = round(time.time(), 3), os.getpid()
        self._identity = dict(zip(DRIVER_KEYS, (socket.gethostname(), pid, place(), started(pid), claimed)))
        self.write({**(status or {}), "status": "running"})
        self.check()
        store.delete(map(_object, earlier))

    def write(self, status: Mapping[str, Any]) -> None:
        """Overwrites how the run stands, as this driver knows it."""
        self._status = status
        document = {**status, **self._identity, "updated": round(time.time(), 3)}
        self._written_at = self._clock()
        write_document(self._store, _object(self.id), document)

    def renew(self) -> None:
        """Writes the newest status again if it was written ``STATUS_INTERVAL_S`` ago or earlier."""
        if self._clock() - self._written_at >= STATUS_INTERVAL_S:
            self.write(self._status)

    def check(self) -> None:
        """Makes sure that the claim holds; one listing, while the claim is there. One that was lost is written again.

        Raises:
            SupersededError: Another driver holds the run.
            StorageError: The store does not answer, or shows nothing of this driver, as one that is not mounted does.
        """
        ids = _ids(self._store)
        is_lost = self.id not in ids
        newest = max([*ids, self._newest_writer() if is_lost else ""])
        if newest > self.id:
            raise SupersededError(f"{self._store.url}: {self._holder(newest)}; this one ends and writes nothing more")
        if newest < self.id:
            raise StorageError(
                f"{self._store.url}: holds nothing of this driver any more; mount the store again, or restore it"
            )
        if is_lost:
            self.write(self._status)

    def _holder(self, token: str) -> str:
        found = read_document(self._store, _object(token))
        if found is None:
            return "another driver has taken the run over"
        when = datetime.fromtimestamp(found["claimed"], UTC).isoformat(" ", "seconds")
        return f"process {found['pid']} on {found['host']} has taken the run over at {when}"


def is_alive(status: Mapping[str, Any]) -> bool | None:
    """Whether the process that wrote a status has not ended; none if it belongs to another machine or container.

    Neither a host's name nor a process's number says whose it is: pods, and hosts, share names, and numbers come again.
    """
    if status.get("place") is None or status["place"] != place():
        return None
    return started(status["pid"]) == status["started"]


def newest_status(store: Store) -> dict[str, Any] | None:
    """What the newest driver wrote last; none if there never was one."""
    before: list[str] = []
    while (ids := _ids(store)) != before:  # again, if all of them went meanwhile: then there is a newer one
        before = ids
        for token in reversed(ids):
            status = read_document(store, _object(token))
            if status is not None:
                return status
    return None


def _ids(store: Store) -> list[str]:
    return sorted(match[1] for match in map(_NAME.fullmatch, store.names(_FOLDER)) if match)


def _object(token: str) -> str:
    return f"{_FOLDER}/{token}.json"
