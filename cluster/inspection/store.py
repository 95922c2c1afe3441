"""Check that all nodes of a cluster use the submitter's store, and not another store with the same URL.

A local path may name a different folder on each host. So the submitter writes an object with a random text, each node
reads it and writes the text to an object of its own, and the submitter reads those. All objects are in one folder of
the store, which is deleted at the end. A node writes only after it has found the submitter's object, so it creates no
new store. A later check deletes what a killed submitter, or a node that wrote after the end, left behind.

Cost for the submitter: one write, two listings, one read for each node, one deletion for each object. Cost for each
node: six requests.
"""

import re
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Protocol

from cluster.errors import StorageError, one_line
from cluster.run.checkpoints import CONCURRENT_REQUESTS
from cluster.scheduler import ClusterReport, Needs, NodeReport
from cluster.storage.store import MissingObject, Store

_SUBMITTER = "submitter"
_FOLDER = re.compile("launcher-check-([0-9]+)-[0-9a-f]{16}")
"""The name of a check's folder, with the Unix time in seconds at which the check began."""
_LEFT_AFTER_S = 24 * 3600.0
"""Age of a folder whose check has surely ended, even if the clocks of submitters differ by hours."""


class Inspectable(Protocol):
    """A cluster whose nodes inspect themselves: a ``Scheduler``, or a ``Cluster`` that this process has joined."""

    def inspect(self, needs: Needs) -> ClusterReport:
        """Have each node inspect itself, and return the report."""


def inspect_cluster(cluster: Inspectable, store: Store, variables: tuple[str, ...]) -> ClusterReport:
    """Inspect a cluster for a run, check the nodes' stores, and return the report.

    Args:
        cluster: The cluster.
        store: The store of the run; the check leaves nothing there.
        variables: The names of environment variables that each node must have.

    Raises:
        ClusterError: As ``inspect`` of the cluster.
        StorageError: This process cannot use the store.
    """
    with open_check(store) as check:
        return check.completed(cluster.inspect(check.needs(variables)))


class StoreCheck:
    """The submitter's side of a running check.

    Args:
        store: The store of the run.
        folder: The folder of the check in the store.
        text: The text that the submitter wrote there.
    """

    def __init__(self, store: Store, folder: str, text: str) -> None:
        self._store, self._folder, self._text = store, folder, text

    def needs(self, variables: tuple[str, ...], modules: tuple[str, ...] = ()) -> Needs:
        """Return the needs to inspect the nodes for: this store and check, these environment variables and modules."""
        return Needs(store=self._store.url, variables=variables, check=self._folder, modules=modules)

    def completed(self, report: ClusterReport) -> ClusterReport:
        """Return the report with each node's store error set by comparing what the node wrote."""
        with ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="store-check") as pool:
            errors = list(pool.map(self._answer_error, report.nodes))
        nodes = tuple(replace(node, store_error=error) for node, error in zip(report.nodes, errors))
        return replace(report, nodes=nodes)

    def _answer_error(self, node: NodeReport) -> str:
        """Return why a node cannot use this store, or has not proved that it does, in one line; empty if it has."""
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
    """Open a check in which nodes can take part while the context lasts; delete its folder at the end.

    Args:
        store: The store of the run.

    Raises:
        StorageError: This process cannot use the store.
    """
    text = secrets.token_hex(16)
    with _temporary_folder(store) as folder:
        store.write(f"{folder}/{_SUBMITTER}", text.encode())
        yield StoreCheck(store, folder, text)


def answer(store: Store, folder: str, node_id: str) -> None:
    """Prove, on a node, that it can read, write and delete in the submitter's store.

    Raises:
        StorageError: It cannot, or this is another store.
    """
    try:
        text = store.read(f"{folder}/{_SUBMITTER}")
    except MissingObject:
        raise StorageError(_another_store(store)) from None
    store.at(folder).probe()
    store.write(f"{folder}/{node_id}", text)
    if not store.exists(f"{folder}/{_SUBMITTER}"):  # the check has just ended, so nothing else deletes the answer
        store.delete([f"{folder}/{node_id}"])


def _another_store(store: Store) -> str:
    what = "is another store there than here"
    if "://" not in store.url:
        what = "is a folder of its own there, not the one here"
    return f"{store.url}: {what}"


@contextmanager
def _temporary_folder(store: Store) -> Iterator[str]:
    """Yield the name of a new folder in a store; at the end, delete it with its content, and those of old checks."""
    folder = f"launcher-check-{int(time.time())}-{secrets.token_hex(8)}"
    with store.without_traces():
        try:
            yield folder
        except BaseException:  # also Ctrl-C; that error is reported, not one of the clean-up
            with suppress(StorageError):
                _delete(store, folder)
            raise
        _delete(store, folder)
        _sweep(store)


def _sweep(store: Store) -> None:
    """Delete the folders of old checks. Never raise: a failed clean-up is no reason to fail."""
    with suppress(StorageError):
        for name in store.folders():
            match = _FOLDER.fullmatch(name)
            if match and time.time() - int(match[1]) > _LEFT_AFTER_S:
                with suppress(StorageError):  # it may belong to another user
                    _delete(store, name)


def _delete(store: Store, folder: str) -> None:
    store.delete(store.names(folder), CONCURRENT_REQUESTS)
