"""Calls with a deadline for their caller, even if they block in C or on a file system that hangs.

A thread cannot be stopped from outside. So a pool thread makes the call, and the caller waits no longer than its time
limit. A thread whose call hangs is missing from the pool until that call ends, if ever.
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

# Last in, first out: the thread used last has the freshest state, such as a connection, and a caller that makes call
# after call gets the same thread each time.
_idle: collections.deque[_Inbox] = collections.deque()
# A forked child has none of the parent's threads.
os.register_at_fork(after_in_child=_idle.clear)

_current = threading.local()
"""In a pool thread: ``started``, the call that the thread makes."""


class OverrunError(Exception):
    """A call was given up; it may still run to its end and have its effect."""


class Started(Future[T]):
    """A call in progress."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.monotonic()
        self.is_awaited = True
        """Whether its caller waits for it, or is about to. If not, it has ended or was given up."""


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
    """Returns or raises what a call does, if it ends within ``seconds`` of its start.

    Raises:
        OverrunError: It does not end in time.
    """
    started.is_awaited = True
    try:
        return started.result(max(0.0, started.began + seconds - time.monotonic()))
    except TimeoutError:
        if started.done():  # the call itself raised TimeoutError, or has just ended
            return started.result()
        raise OverrunError(f"no answer within {in_seconds(seconds)}") from None
    finally:
        started.is_awaited = False


def in_seconds(duration: float) -> str:
    """Returns a duration for people, with three digits and no exponent: ``0.25 s``, ``1230 s``."""
    return f"{float(f'{duration:.3g}'):g} s"


def is_awaited() -> bool:
    """Returns whether a caller still waits for the call that this thread makes; False once the call was given up.

    A call asks this before a step that would do harm if it came late.

    Thread: called in the thread that makes the call.
    """
    started: Started[Any] | None = getattr(_current, "started", None)
    return started is None or started.is_awaited


def _serve(inbox: _Inbox) -> None:
    while True:
        future, function = inbox.get()
        _current.started = future
        try:
            result, error = function(), None
        except BaseException as raised:  # re-raised in the caller
            result, error = None, raised
        # Before the result is set, so that the caller's next call finds this thread.
        _idle.append(inbox)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
        del future, function, result, error, _current.started  # keep no reference to a call while waiting for the next
