"""The stores that samples are read from, and how long they may not answer.

The workers set the patience, because a worker that waits for its data must fail, and name the store, before it counts
as hung.
"""

import time
from dataclasses import dataclass

from cluster.storage.store import Store

_stores: dict[str, Store] = {}  # those of this process, by URL
_patience_s = 100.0  # for the default of ``workers.hang_timeout_s``


def patience_below(hang_timeout_s: float) -> float:
    """Returns how long to retry a read, in seconds, so that it fails before a worker that waits for it counts as hung.

    It is a third, and as long may the last try take, and a second longer for each MB that it reads.
    """
    return hang_timeout_s / 3


def use_patience(seconds: float) -> None:
    """Sets how long the reads of this process are retried from now on."""
    global _patience_s
    _patience_s = seconds


def patience_s() -> float:
    """Returns how long the reads of this process are retried, in seconds."""
    return _patience_s


def data_store(url: str) -> Store:
    """Returns the store at a URL of data, to read samples."""
    store = _stores.get(url)
    if store is None or store.patience_s != _patience_s:
        store = _stores[url] = Store(url, _patience_s, most_s=_patience_s)
    return store


@dataclass(frozen=True, slots=True)
class LateRead:
    """A read of a store of data that has not succeeded yet."""

    since: float
    """When it began, by ``time.monotonic``."""
    text: str
    """The store's URL, and what it answers or does not, in one line."""


def oldest_read() -> LateRead | None:
    """Returns the read of this process that has been waited for longest; None: nothing is being read.

    Thread: Any.
    """
    reads, now = list[LateRead](), time.monotonic()
    for store in list(_stores.values()):
        trouble, call = store.trouble, store.under_way
        if trouble is not None:
            text = f"{store.url}: does not answer for {now - trouble.since:.0f} s: {trouble.reason}"
            reads.append(LateRead(trouble.since, text))
        elif call is not None:
            text = f"{store.url}: the call to {call.action} has not returned for {now - call.since:.0f} s"
            reads.append(LateRead(call.since, text))
    return min(reads, key=lambda read: read.since, default=None)
