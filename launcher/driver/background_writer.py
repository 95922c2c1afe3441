"""Work that must be done in the end, behind the back of a loop that must not wait for it.

One function is called in a thread of its own: when asked, every few seconds, and again for as long as the store fails
it. It has to bear being called again wherever it was when it failed. What it does is its owner's business; it only says
when a step of it is done, for then the store has answered. So work that takes long is told from a store that is away.

A store may fail one thing and answer others: a full disk still lists. So it fails from the last step before the failure
until a step is done that no try has done since.
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
"""A step that takes so long counts as one that the store has failed."""
_LEFT_S = 5.0
"""How long a person who abandons a run still waits for its last words."""


class BackgroundWriter:
    """Calls ``work`` in a thread, between entering and leaving.

    Args:
        work: What to do. After each step it yields the step's name, the same in each call; or None after one of many
            steps alike, each of which is progress. A ``StorageError`` is tried again.
        interval_s: Seconds after which it is called without being asked.
        patience_s: Seconds that the store may fail it, before that is an error.
        clock: Seconds that only grow.
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
        self._since: float | None = None  # when the step that is being done, or fails, was tried first; none while idle
        self._answered_at = 0.0  # when a step was done last, or the newest try began
        self._last_error: StorageError | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)  # a call may never come back

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        self._thread.join(_LEFT_S)  # so that nothing is torn by the end of the process, unless it hangs

    def ask(self) -> None:
        """Has the work done soon, with all that there is to do by now."""
        with self._news:
            self._asked += 1
            self._news.notify_all()

    @property
    def failing(self) -> tuple[float, str] | None:
        """Since when the store fails the work, by the clock, and how; none while it answers."""
        since, error, silent_s = self._since, self._last_error, self._clock() - self._answered_at
        if since is None or (error is None and silent_s < HANGS_S):
            return None
        return since, str(error) if error else f"a call has not come back for {silent_s:.0f} s"

    def check(self) -> None:
        """Raises what has ended the work, if something has.

        Raises:
            StorageError: The store has failed it for longer than patience lasts.
        """
        failing, now = self.failing, self._clock()
        # A call that comes back is judged by the thread; one that does not, here.
        if failing is not None and now - failing[0] > self._patience_s and now - self._answered_at > HANGS_S:
            self._give_up(failing[1])
        if self._error is not None:
            raise self._error

    def finish(self, is_abandoned: Callable[[], bool] = lambda: False) -> None:
        """Waits until all that there is to do by now is done; a moment only, once that is abandoned.

        Raises:
            LauncherError: It could not be done.
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
        failures, known = 0, set[str]()  # tries that have failed in a row, and the steps that they have done
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
                # The last try is made when patience ends, not before.
                pause_s = max(0.0, min(pause_s, since + self._patience_s - self._clock()))
                failures += 1
                with self._news:
                    self._news.wait_for(lambda: self._is_left, pause_s)
                continue
            except Exception as error:  # the border of a thread: told by ``check``
                with self._news:
                    self._error = error
                    self._news.notify_all()
                return
            failures, known = 0, set()
            self._since = self._last_error = None
            with self._news:
                self._done = asked
                self._news.notify_all()
