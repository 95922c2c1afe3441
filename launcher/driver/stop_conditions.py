"""When a run should stop: at a signal, at a person's request, or at a limit of its description."""

import contextlib
import signal
from collections.abc import Iterator

from jobs.spec import JobSpec
from launcher.driver.run_log import RunLog


class StopConditions:
    """Notices signals, and looks at requests and limits."""

    def __init__(self, spec: JobSpec, run_log: RunLog, started_at: float) -> None:
        """Only assigns. ``started_at``: when this driver began, by the clock that ``reason`` is given the time of."""
        self._spec = spec
        self._run_log = run_log
        self._started_at = started_at
        self._is_first_start = True
        self.num_signals = 0
        """SIGINT and SIGTERM since ``catching_signals`` was entered."""

    def first_start_is_over(self) -> None:
        """Workers have trained, or failed: from now on every limit counts."""
        self._is_first_start = False

    def reason(self, now: float, *, waits_for_room: bool) -> str | None:
        """Why the run should stop; None: it should go on.

        A limit that passes during the first start waits for the workers' first step: one that is shorter than a start
        would otherwise let no ``resume`` get anywhere. That start has limits of its own; where it fails, or while there
        is no room for workers, nobody makes progress, and the limit ends the run without a step.
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
        """Within it, SIGINT and SIGTERM ask for a stop; the second one does not wait for it.

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
