"""The stores that samples are read from, and how long they may not answer.

The workers set the patience, because a worker that waits for its data must fail, and name the store, before it counts
as hung.
"""

from cluster.storage.retrying_calls import Trouble
from cluster.storage.store import Store

_stores: dict[str, Store] = {}  # those of this process, by URL
_patience_s = 100.0  # for the default of ``workers.hang_timeout_s``


def patience_below(hang_timeout_s: float) -> float:
    """Returns how long to retry a read, in seconds, so that it fails before a worker that waits for it counts as hung.

    It is a third: the last try may itself take a minute or two, as a store that hangs is given up after that.
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
        store = _stores[url] = Store(url, _patience_s)
    return store


def trouble() -> tuple[str, Trouble] | None:
    """Returns the URL of a store of data and why a read of it is being retried; None: no read of this process is.

    Thread: Any.
    """
    found = ((store.url, store.trouble) for store in list(_stores.values()))
    return next(((url, trouble) for url, trouble in found if trouble is not None), None)
