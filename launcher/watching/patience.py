"""Retries reads from a store that does not answer, for commands that follow a run."""

from collections.abc import Callable
from typing import TypeVar

from cluster.errors import StorageError
from cluster.storage.store import MissingObject

_INTERVAL_S = 2.0
_PATIENCE_S = 600.0

T = TypeVar("T")


def read_patiently(
    read: Callable[[], T], warn: Callable[[str], None], clock: Callable[[], float], sleep: Callable[[float], None]
) -> T:
    """Read from a store, and retry for up to ten minutes while the store fails.

    Args:
        read: The read; it may be called any number of times.
        warn: Receives one warning that the store does not answer.
        clock: Monotonic seconds.
        sleep: Waits for some seconds.

    Returns:
        The result of the first read that succeeds.

    Raises:
        MissingObject: The store answers that the object does not exist.
        StorageError: The store still fails after ten minutes.
    """
    began_at, has_warned = clock(), False
    while True:
        try:
            return read()
        except MissingObject:
            raise
        except StorageError as error:
            if clock() - began_at > _PATIENCE_S:
                raise StorageError(f"{error}; the run may go on, look at `launcher status`") from error
            if not has_warned:
                warn(f"{error}; trying again for {_PATIENCE_S / 60:.0f} minutes")
            has_warned = True
        sleep(_INTERVAL_S)
