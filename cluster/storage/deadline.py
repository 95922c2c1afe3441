"""Calls that end in time for their caller, whatever they wait for: also in C, also on a file system that hangs.

A thread cannot be stopped from outside. So a call is made by a thread of a small stock, and its caller waits no
longer than it wants to; a thread whose call hangs is missing from the stock until that call ends, if ever.
"""

import collections
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
_Inbox = queue.SimpleQueue[tuple["Started[Any]", Callable[[], Any]]]

# The last one to become idle is the first to be used: what it keeps for itself, such as a connection, is the freshest,
# and a caller with one call after another meets the same thread each time.
_idle: collections.deque[_Inbox] = collections.deque()
# The threads stay with the parent.
os.register_at_fork(after_in_child=_idle.clear)

_own = threading.local()
"""In a thread of the stock: ``started``, the call that it makes."""


class OverrunError(Exception):
    """A call was given up; it may still come to its end, and do what it was to do."""


class Started(Future[T]):
    """A call under way."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.monotonic()
        self.is_awaited = True
        """Whether its caller waits for it, or is about to; if not, it has ended or was given up."""


def start(function: Callable[[], T]) -> Started[T]:
    """Calls a function in another thread."""
    try:
        inbox = _idle.pop()
    except IndexError:
        inbox = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(inbox,), name="store", daemon=True).start()
    started: Started[T] = Started()
    inbox.put((started, function))
    return started


def result_within(seconds: float, started: Started[T]) -> T:
    """What a call returns or raises, if it does so in so many seconds since it was started.

    Raises:
        OverrunError: It does not.
    """
    started.is_awaited = True
    try:
        return started.result(max(0.0, started.began + seconds - time.monotonic()))
    except TimeoutError:
        if started.done():  # it is the call's own
            return started.result()
        raise OverrunError(f"no answer within {seconds:.3g} s") from None
    finally:
        started.is_awaited = False


def is_awaited() -> bool:
    """Whether somebody waits for the call that this thread makes; False once it was given up.

    A call asks that before a step that would do harm if it came late.
    """
    started: Started[Any] | None = getattr(_own, "started", None)
    return started is None or started.is_awaited


def _serve(inbox: _Inbox) -> None:
    while True:
        future, function = inbox.get()
        _own.started = future
        try:
            result, error = function(), None
        except BaseException as raised:  # it is the caller's, whatever it is
            result, error = None, raised
        # First, so that the caller's next call finds this thread.
        _idle.append(inbox)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
        del future, function, result, error, _own.started  # nothing of a call is kept until the next
