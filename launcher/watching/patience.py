"""Reading again while a store is away, for a person who follows a run from elsewhere."""

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
    """Reads from a store, and again for as long as the store fails it, ten minutes at most.

    Args:
        read: May be called any number of times.
        warn: Says, once, that the store does not answer.
        clock, sleep: Seconds that only grow, and waiting for some.

    Returns:
        What the first read gives that succeeds.

    Raises:
        MissingObject: The store answers, and lacks what is read.
        StorageError: It still fails after that time.
    """
    began_at, is_told = clock(), False
    while True:
        try:
            return read()
        except MissingObject:
            raise
        except StorageError as error:
            if clock() - began_at > _PATIENCE_S:
                raise StorageError(f"{error}; the run may go on, look at `launcher status`") from error
            if not is_told:
                warn(f"{error}; trying again for {_PATIENCE_S / 60:.0f} minutes")
            is_told = True
        sleep(_INTERVAL_S)
