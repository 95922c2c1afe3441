"""The check that a cluster's nodes reach the very store that a run is submitted to, and not one of the same name.

A local folder exists on every host, and is another one on each. So the submitter writes an object with a secret text;
each node reads it, and writes it to an object of its own; the submitter reads those. All of them lie in one folder of
the store, which is deleted at the end. A node writes only where the submitter has written, so it creates no store.
What stays all the same, of a submitter that was killed or a node that wrote after the end, is deleted by a later check.

The cost is one write, two listings, a read for each node and a deletion for each object here, and six requests on each
node.
"""

import re
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace

from cluster.errors import StorageError, one_line
from cluster.run.checkpoints import CONCURRENT_REQUESTS
from cluster.scheduler import ClusterReport, Needs, NodeReport, Scheduler
from cluster.storage.store import MissingObject, Store

_SUBMITTER = "submitter"
_FOLDER = re.compile("launcher-check-([0-9]+)-[0-9a-f]{16}")
"""The folder of a check; its name has the Unix time, in seconds, at which that began."""
_LEFT_AFTER_S = 24 * 3600.0
"""A folder that is older than that is of no check that goes on, however much the clocks of submitters differ."""


def inspect_cluster(scheduler: Scheduler, store: Store, variables: tuple[str, ...]) -> ClusterReport:
    """Inspects a cluster for a run, and completes the report with what only both sides together can tell.

    Args:
        scheduler: The cluster.
        store: Where the run will lie; nothing of the check stays there.
        variables: The names of environment variables that each node must have.

    Raises:
        ClusterError: As ``Scheduler.inspect``.
        StorageError: This process cannot use the store.
    """
    with open_check(store) as check:
        return check.completed(scheduler.inspect(check.needs(variables)))


class StoreCheck:
    """A check that goes on, on the side of the submitter.

    Args:
        store: Where the run will lie.
        folder: Of the check, in the store.
        text: What the submitter has written there.
    """

    def __init__(self, store: Store, folder: str, text: str) -> None:
        self._store, self._folder, self._text = store, folder, text

    def needs(self, variables: tuple[str, ...], modules: tuple[str, ...] = ()) -> Needs:
        """What the nodes are to be inspected for: the store, and these environment variables; see ``Needs``."""
        return Needs(store=self._store.url, variables=variables, check=self._folder, modules=modules)

    def completed(self, report: ClusterReport) -> ClusterReport:
        """A report of the nodes, with what only both sides together can tell."""
        with ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="store-check") as pool:
            errors = list(pool.map(self._answer_error, report.nodes))
        nodes = tuple(replace(node, store_error=error) for node, error in zip(report.nodes, errors))
        return replace(report, nodes=nodes)

    def _answer_error(self, node: NodeReport) -> str:
        """Why a node cannot use this store, or has not proved that it does, in one line; empty if it has."""
        if node.store_error:
            return node.store_error
        try:
            found = self._store.read(f"{self._folder}/{node.id}")
        except MissingObject:
            return _another_store(self._store)
        except StorageError as error:
            return one_line(error)
        return "" if found == self._text.encode() else _another_store(self._store)


@contextmanager
def open_check(store: Store) -> Iterator[StoreCheck]:
    """A check that the nodes of a cluster take part in, as long as the context lasts; nothing of it stays.

    Args:
        store: Where the run will lie.

    Raises:
        StorageError: This process cannot use the store.
    """
    text = secrets.token_hex(16)
    with _temporary_folder(store) as folder:
        store.write(f"{folder}/{_SUBMITTER}", text.encode())
        yield StoreCheck(store, folder, text)


def answer(store: Store, folder: str, node_id: str) -> None:
    """The part of a node: shows that it can read, write and delete in the submitter's store.

    Raises:
        StorageError: It cannot, or this is another store.
    """
    try:
        text = store.read(f"{folder}/{_SUBMITTER}")
    except MissingObject:
        raise StorageError(_another_store(store)) from None
    store.at(folder).probe()
    store.write(f"{folder}/{node_id}", text)
    if not store.exists(f"{folder}/{_SUBMITTER}"):  # the check has ended meanwhile, and nobody sweeps any more
        store.delete([f"{folder}/{node_id}"])


def _another_store(store: Store) -> str:
    what = "is another store there than here"
    if "://" not in store.url:
        what = "is a folder of its own there, not the one here"
    return f"{store.url}: {what}"


@contextmanager
def _temporary_folder(store: Store) -> Iterator[str]:
    """The name of a new folder in a store, deleted at the end with all in it, and with what others have left."""
    folder = f"launcher-check-{int(time.time())}-{secrets.token_hex(8)}"
    with store.without_traces():
        try:
            yield folder
        except BaseException:  # also Ctrl-C; what happened is to be told, not that a folder stays
            with suppress(StorageError):
                _delete(store, folder)
            raise
        _delete(store, folder)
        _sweep(store)


def _sweep(store: Store) -> None:
    """Deletes the folders of checks that have ended long ago. Never raises: tidiness is no reason to fail."""
    with suppress(StorageError):
        for name in store.folders():
            match = _FOLDER.fullmatch(name)
            if match and time.time() - int(match[1]) > _LEFT_AFTER_S:
                with suppress(StorageError):  # it may belong to another user
                    _delete(store, name)


def _delete(store: Store, folder: str) -> None:
    store.delete(store.names(folder), CONCURRENT_REQUESTS)
