"""The stores that samples are read from, and how long they may not answer.

The workers set the patience, because a worker that waits for its data must fail, and name the store, before it counts
as hung.
"""

from cluster.storage.store import Store

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
    return Store(url, _patience_s)
