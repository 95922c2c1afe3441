"""When a run should stop: on a signal, on a request in its directory, or at a limit of its description."""

import contextlib
import signal
from collections.abc import Iterator

from jobs.spec import JobSpec
from launcher.driver.run_log import RunLog


class StopConditions:
    """Counts signals, and checks requests and limits."""

    def __init__(self, spec: JobSpec, run_log: RunLog, started_at: float) -> None:
        """Only assigns. ``started_at``: when this driver began, by the clock of ``reason``'s ``now``."""
        self._spec = spec
        self._run_log = run_log
        self._started_at = started_at
        self._is_first_start = True
        self.num_signals = 0
        """SIGINT and SIGTERM since ``catching_signals`` was entered."""

    def first_start_is_over(self) -> None:
        """Have every limit count from now on: workers have trained, or failed."""
        self._is_first_start = False

    def reason(self, now: float, *, waits_for_room: bool) -> str | None:
        """Return why the run should stop; None: it should go on.

        A limit that is reached during the first start takes effect after the workers' first step: otherwise a limit
        shorter than a start would keep every ``resume`` from making progress. The start has timeouts of its own; if it
        fails, or while there is no room for workers, the limit ends the run without a step.
        """
        if self.num_signals:
            return "stopping on a signal"
        if self._run_log.is_stop_requested:
            return "stopping as asked by launcher stop"
        if self._is_first_start and not waits_for_room:
            return None
        limit = self._spec.train.max_seconds
        if limit is not None and now - self._started_at > limit:
            return f"stopping at train.max_seconds={limit:g}"
        budget = self._spec.workers.max_worker_hours
        if budget is not None and self._run_log.state.worker_hours > budget:
            return f"stopping at workers.max_worker_hours={budget:g}"
        return None

    @contextlib.contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Count SIGINT and SIGTERM inside the block: the first one asks for a stop, the second one abandons the run.

        Thread: the main thread, as for every change of a signal handler.
        """

        def count(*_: object) -> None:
            self.num_signals += 1

        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
