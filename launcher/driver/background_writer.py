"""Background writer: retries store writes in a thread of its own, so that the driver loop never blocks.

The thread calls one function: when asked, every few seconds, and again while the store fails. The function must be safe
to call again after a failure at any point. It yields after each finished step, because then the store has answered:
that tells slow work from a store that is away.

A store may fail one operation and answer others: a full disk can still be listed. So the store counts as failing from
the last finished step before the failure until a step finishes that no try since then has finished.
"""

import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Self

from cluster.errors import StorageError

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 5.0
HANGS_S = 15.0
"""A step that takes longer counts as a failure of the store."""
_LEFT_S = 5.0
"""How long the last writes may take once the user abandons the run."""


class BackgroundWriter:
    """Calls ``work`` in a thread between ``__enter__`` and ``__exit__``.

    Thread: ``work`` runs in the background thread; the public methods are for the owner's thread.

    Args:
        work: The function to call. After each step it yields the step's name, the same in each call; or None after one
            of many similar steps, each of which is progress. After a ``StorageError`` it is called again.
        interval_s: Seconds after which ``work`` is called without being asked.
        patience_s: Seconds for which the store may fail before that is an error.
        clock: A monotonic clock in seconds.
    """

    def __init__(
        self,
        work: Callable[[], Iterable[str | None]],
        interval_s: float,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._interval_s = interval_s
        self._patience_s = patience_s
        self._clock = clock
        self._news = threading.Condition()
        self._asked = self._done = 0
        self._is_left = False
        self._since: float | None = None  # when the current or failing step was tried first; None while idle
        self._answered_at = 0.0  # when the last step finished, or the newest try began
        self._last_error: StorageError | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)  # a call may never return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        self._thread.join(_LEFT_S)  # so that the end of the process tears no write, unless the write hangs

    def ask(self) -> None:
        """Have ``work`` called soon, after everything that has been added by now."""
        with self._news:
            self._asked += 1
            self._news.notify_all()

    @property
    def failing(self) -> tuple[float, str] | None:
        """When the store began to fail, by the clock, and the error; None while it answers."""
        since, error, silent_s = self._since, self._last_error, self._clock() - self._answered_at
        if since is None or (error is None and silent_s < HANGS_S):
            return None
        return since, str(error) if error else f"a call has not come back for {silent_s:.0f} s"

    def check(self) -> None:
        """Raise the error that ended the thread, if there is one.

        Raises:
            StorageError: The store has failed for longer than ``patience_s``.
        """
        failing, now = self.failing, self._clock()
        # The thread judges calls that return; a call that does not return is judged here.
        if failing is not None and now - failing[0] > self._patience_s and now - self._answered_at > HANGS_S:
            self._give_up(failing[1])
        if self._error is not None:
            raise self._error

    def finish(self, is_abandoned: Callable[[], bool] = lambda: False) -> None:
        """Wait until everything added by now is written; only ``_LEFT_S`` once the user abandons it.

        Raises:
            LauncherError: It could not be written.
        """
        self.ask()
        asked, began_at = self._asked, self._clock()
        while True:
            with self._news:
                if self._news.wait_for(lambda: self._done >= asked or self._error is not None, timeout=0.1):
                    break
            self.check()
            if is_abandoned() and self._clock() - began_at > _LEFT_S:
                raise StorageError("what was not yet written is given up, as the run is")
        self.check()

    def _leave(self) -> None:
        with self._news:
            self._is_left = True
            self._news.notify_all()

    def _give_up(self, why: str) -> None:
        what = f"the store has been away for {self._patience_s:g} s (checkpoint.patience_s)"
        with self._news:
            self._error = self._error or StorageError(f"{what}: {why}")
        self._leave()

    def _run(self) -> None:
        failures, known = 0, set[str]()  # consecutive failed tries, and the steps that they finished
        while not self._is_left:
            with self._news:
                if not failures:
                    self._news.wait_for(lambda: self._is_left or self._asked > self._done, self._interval_s)
                asked = self._asked
            self._answered_at = self._clock()
            self._since = since = self._answered_at if self._since is None else self._since
            done = set[str]()
            try:
                for step in self._work():
                    self._answered_at = self._clock()
                    if step is not None:
                        done.add(step)
                    if step not in known:
                        failures, known = 0, set()
                        self._since = since = self._answered_at
                        self._last_error = None
            except StorageError as error:
                known |= done
                self._last_error = error
                if self._answered_at - since >= self._patience_s:
                    self._give_up(str(error))
                    return
                pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0)
                # Make the last try when patience ends, not before.
                pause_s = max(0.0, min(pause_s, since + self._patience_s - self._clock()))
                failures += 1
                with self._news:
                    self._news.wait_for(lambda: self._is_left, pause_s)
                continue
            except Exception as error:  # the outermost border of a thread; ``check`` raises it
                with self._news:
                    self._error = error
                    self._news.notify_all()
                return
            failures, known = 0, set()
            self._since = self._last_error = None
            with self._news:
                self._done = asked
                self._news.notify_all()
