"""Calls of a file system with a time limit and retries.

A call that fails for a transient reason is retried after pauses until patience ends. A call that does not return is
given up; it may still have its effect later. This module does not know what the calls do.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import fsspec

from cluster.errors import StorageError
from cluster.storage.deadline import OverrunError, Started, in_seconds, result_within, start
from cluster.storage.file_systems import Location
from cluster.storage.store_errors import advice, cause, is_permanent, reason

T = TypeVar("T")
FileSystemCall = Callable[[fsspec.AbstractFileSystem, str], T]
"""Does something with a file system and a path on it."""

_CALL_S = 60.0
"""Usual time limit of a file system call, on top of the time for its bytes."""
_SLOWEST_BYTES_PER_S = 1e6
"""A store with a lower transfer rate counts as hanging."""

_PAUSES_S = (0.2, 0.4, 0.8, 1.6, 3.2, 5.0)
"""Upper limits of the random pauses between retries; random so that many failed calls do not return together."""
_random = random.SystemRandom()
"""Not Python's own generator: the training code draws from that, and a retry must not change what it draws."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a call has not succeeded yet; it is being retried."""

    since: float
    """When the call began, by ``time.monotonic``."""
    reason: str
    """One line, for people to read."""


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A call that has not returned yet."""

    since: float
    """When it began, by ``time.monotonic``."""
    action: str
    """What it does: ``write NAME``."""


class RetryingCalls:
    """Makes calls of the file system of one location.

    Thread: Any number of threads may make calls at once.

    Attributes:
        troubles: By thread, because each makes one call at a time: why its call is being retried.
        under_way: By thread: the call that it waits for.
    """

    def __init__(self, location: Location, patience_s: float, most_s: float) -> None:
        """``most_s``: time limit of a try, on top of the time for its bytes, if it is below the usual one."""
        self._location = location
        self._patience_s = patience_s
        self._most_s = most_s
        self.troubles: dict[int, Trouble] = {}
        self.under_way: dict[int, UnderWay] = {}

    def call(
        self,
        action: str,
        call: FileSystemCall[T],
        name: str = "",
        size: int | None = 0,
        extra_s: float = 0.0,
        started: Started[T] | None = None,
    ) -> T:
        """Makes a call, with retries, and returns its result.

        Args:
            action: What the call does, for the error: ``write NAME``.
            call: The call.
            name: Of the object or folder that it gets the path of.
            size: Of the object, in bytes; None: unknown.
            extra_s: Extra time on top of the usual limit.
            started: The first try, if it is in progress already.

        Raises:
            StorageError: The call failed for good, or until patience ended.
        """
        began, thread, attempt, is_last = time.monotonic(), threading.get_ident(), 0, False
        self.under_way[thread] = UnderWay(began, action)
        try:
            while True:
                try:
                    return self._try_once(call, name, size, extra_s, started)
                except StorageError:
                    raise
                except Exception as error:  # the border to fsspec: every vendor raises its own errors
                    waited_s = time.monotonic() - began
                    if is_permanent(error) or is_last or waited_s >= self._patience_s:
                        raise self._failure(action, error, waited_s if attempt else 0) from cause(error)
                    self.troubles[thread] = Trouble(began, reason(error))
                pause_s = _random.uniform(0, _PAUSES_S[min(attempt, len(_PAUSES_S) - 1)])
                # The last try is made when patience ends, not before. A flag says that it was the last, because the
                # remaining time may be too short for the clock to advance.
                left_s = self._patience_s - waited_s
                is_last = pause_s >= left_s
                time.sleep(min(pause_s, left_s))
                attempt, started = attempt + 1, None
        finally:
            self.troubles.pop(thread, None)
            self.under_way.pop(thread, None)

    def _try_once(
        self, call: FileSystemCall[T], name: str, size: int | None, extra_s: float, started: Started[T] | None
    ) -> T:
        if started is None:
            started = self.start(call, name)
        within_s = min(_CALL_S, self._most_s) + extra_s
        if size is None:
            # Only a slow read is worth a request for the object's size, and both have the time of one try.
            with contextlib.suppress(OverrunError):
                return result_within(within_s / 2, started)
            asked = self.start(lambda fs, path: fs.info(path)["size"], name)
            with contextlib.suppress(OverrunError):
                size = result_within(within_s / 2, asked)
        return result_within(within_s + (size or 0) / _SLOWEST_BYTES_PER_S, started)

    def start(self, call: FileSystemCall[T], name: str) -> Started[T]:
        """Begins the first try of a call, for ``call``."""
        return start(lambda: self._run(call, name))

    def _run(self, call: FileSystemCall[T], name: str) -> T:
        """Makes a call in this thread."""
        fs = self._location.file_system()
        try:
            return call(fs, self._location.path(name))
        except Exception as error:
            if not is_permanent(error):
                self._location.forget(fs)
            raise

    def _failure(self, action: str, error: Exception, waited_s: float) -> StorageError:
        tried = f", tried for {in_seconds(waited_s)}" if waited_s else ""
        return StorageError(f"{self._location.url}: cannot {action}: {reason(error)}{tried}; {advice(error)}")
