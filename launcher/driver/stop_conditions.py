"""When a run should stop: on a signal, on a request in its directory, or at a limit of its description."""

from jobs.spec import JobSpec
from launcher.driver.run_log import RunLog
from launcher.driver.stop_signals import StopSignals


class StopConditions:
    """Checks signals, requests and limits."""

    def __init__(self, spec: JobSpec, run_log: RunLog, signals: StopSignals, started_at: float) -> None:
        """Only assigns. ``started_at``: when this driver began, by the clock of ``reason``'s ``now``."""
        self._spec = spec
        self._run_log = run_log
        self._signals = signals
        self._started_at = started_at
        self._is_first_start = True

    def first_start_is_over(self) -> None:
        """Have every limit count from now on: workers have trained, or failed."""
        self._is_first_start = False

    def reason(self, now: float, *, waits_for_room: bool) -> str | None:
        """Return why the run should stop; None: it should go on.

        A limit that is reached during the first start takes effect after the workers' first step: otherwise a limit
        shorter than a start would keep every ``resume`` from making progress. The start has timeouts of its own; if it
        fails, or while there is no room for workers, the limit ends the run without a step.
        """
        if self._signals.first is not None:
            return f"stopping on {self._signals.first.name}"
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
