"""When a run should stop: on a signal, on a request in its directory, or at a limit of its description or its job."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import ClusterError, Interrupted, LauncherError
from cluster.host.batch_job import BatchJob
from cluster.process.messages import Spent
from jobs.spec import JobSpec
from launcher.driver.run_log import RunLog
from launcher.driver.run_state import RunState
from launcher.driver.stop_signals import StopSignals

_CLOSING_S = 30.0
"""What the end of a run may take besides its last save: the manifest, the status, the end of all processes."""
_FIRST_STEPS_S = 30.0
"""What the workers may take to stop before it is known how long a step takes."""
_STEPS_TO_STOP = 3
"""How many steps the workers begin at most before they save: that many are under way when they agree to stop."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A reason to stop a run.

    Attributes:
        text: The reason, for messages.
        requeued: Why the scheduler starts the run again, as the end of a sentence, such as ``on SIGUSR1``; None: the
            run does not go on by itself.
        is_cut_short: Whether a signal or the time limit of the job interrupts the run.
    """

    text: str
    requeued: str | None = None
    is_cut_short: bool = False


class Pace:
    """How long the workers take to stop, by what rank 0 reports of its steps."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._last: tuple[int, float] | None = None
        """Step and time of the last row of this attempt, by the worker's clock."""
        self._validating_s = 0.0
        """What this attempt has spent in validations so far."""
        self._step_s: float | None = None
        self._validation_s = 0.0
        """The longest validation of this driver."""

    def attempt_started(self) -> None:
        """Forget the times of earlier processes, which may have had another clock."""
        self._last, self._validating_s = None, 0.0

    def row_logged(self, step: int, sent_at: float, spent: Spent) -> None:
        """Take the report of a row: its step, when it was sent, and the seconds spent so far, by progress mark."""
        validation_s, self._validating_s = spent["validation"] - self._validating_s, spent["validation"]
        if validation_s > self._validation_s:
            self._validation_s = self._state.validation_s = validation_s
        if self._last is not None and step > self._last[0]:
            self._step_s = max(0.0, sent_at - self._last[1] - validation_s) / (step - self._last[0])
        self._last = step, sent_at

    @property
    def stop_s(self) -> float:
        """The seconds from a request to stop to the beginning of the last save."""
        steps_s = _FIRST_STEPS_S if self._step_s is None else _STEPS_TO_STOP * self._step_s
        return steps_s + self._state.validation_s


class StopConditions:
    """Checks signals, requests and limits."""

    def __init__(
        self,
        spec: JobSpec,
        run_log: RunLog,
        signals: StopSignals,
        job: BatchJob,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        """Only assigns.

        Args:
            spec: The job.
            run_log: Records what happens.
            signals: Counts the signals that ask the run to stop.
            job: The batch job that the driver runs in.
            clock: The clock of the driver, in seconds.
            unix_clock: Unix time, which is read once.
        """
        self.job = job
        self.pace = Pace(run_log.state)
        self.accepted: Stop | None = None
        """Why the run stops; None: it goes on."""
        self._spec = spec
        self._run_log = run_log
        self._signals = signals
        self._started_at = clock()
        self._job_ends_at = math.inf if job.ends_at is None else self._started_at + job.ends_at - unix_clock()
        self._is_first_start = True
        self._has_waited = False

    @property
    def is_abandoned(self) -> bool:
        """Whether somebody does not want to wait for the last save."""
        return self._signals.is_abandoned

    @property
    def is_cut_short(self) -> bool:
        """Whether a signal or the time limit of the job has interrupted the run before its last step."""
        if self._run_log.has_reached_end:
            return False
        return self._signals.first is not None or (self.accepted is not None and self.accepted.is_cut_short)

    def first_start_is_over(self) -> None:
        """Have every limit count from now on: workers have trained, or failed."""
        self._is_first_start = False

    def reason(self, now: float, *, waits_for_room: bool) -> Stop | None:
        """Return why the run should stop; None: it should go on.

        A limit of the description that is reached during the first start takes effect after the workers' first step:
        otherwise a limit shorter than a start would keep every ``resume`` from making progress. The start has timeouts
        of its own; if it fails, or while there is no room for workers, the limit ends the run without a step. The time
        limit of the batch job ends all processes, so the first start is given up for it.

        Raises:
            ClusterError: The time limit of the batch job is too short for a start.
        """
        self._has_waited |= waits_for_room
        if self._signals.first is not None:
            return self._stop_of_job(f"on {self._signals.first.name}")
        if self._run_log.is_stop_requested:
            return Stop("stopping as asked by launcher stop")
        is_starting = self._is_first_start and not waits_for_room
        limit_s, budget = self._spec.train.max_seconds, self._spec.workers.max_worker_hours
        limit = math.inf if limit_s is None or is_starting else self._started_at + limit_s
        # During the first start there is nothing to save, and all times are of drivers before.
        stop_s = _FIRST_STEPS_S if self._is_first_start else self.pace.stop_s + self._run_log.save_s
        job_limit = self._job_ends_at - stop_s - _CLOSING_S
        if now > min(limit, job_limit):
            if limit <= job_limit:
                return Stop(f"stopping at train.max_seconds={limit_s:g}")
            if self._is_first_start and not self._has_waited:
                raise self._too_short(f"{self._job_ends_at - now:.0f} s before it, the workers have yet to train")
            return self._stop_of_job("at the time limit of its job")
        if budget is not None and self._run_log.state.worker_hours > budget and not is_starting:
            return Stop(f"stopping at workers.max_worker_hours={budget:g}")
        return None

    def accept(self, stop: Stop) -> Stop:
        """Record why the run stops, unless it stops already; return why it does."""
        if self.accepted is None:
            self.accepted, state = stop, self._run_log.state
            self._run_log.event("stop_requested", step=state.step, reason=stop.text)
            state.requeued = stop.requeued
        return self.accepted

    def outcome(self, error: LauncherError | None, *, completed: bool) -> str:
        """Return the status with which the run ends now; it may change until that is written.

        A run whose batch job ends early does not go on if somebody wants it to stop, too, or if it has reached the last
        step that it is to train.

        Args:
            error: What ends the run; None: it ends in order.
            completed: Whether no step is left, if it ends in order.
        """
        if error is not None:
            return "stopped" if isinstance(error, Interrupted) else "failed"
        if completed:
            return "completed"
        is_requeued = self.accepted is not None and self.accepted.requeued is not None
        is_unwanted = self._signals.is_on_purpose or self._run_log.is_stop_requested
        is_over = self._run_log.has_reached_end
        return "requeued" if is_requeued and not is_unwanted and not is_over else "stopped"

    def _stop_of_job(self, why: str) -> Stop:
        """Return the stop for a signal, or for the time limit of the job."""
        goes_on = self.job.requeues and not self._signals.is_on_purpose
        return Stop(f"stopping {why}", requeued=why if goes_on else None, is_cut_short=True)

    def _too_short(self, what: str) -> ClusterError:
        saved = self._run_log.saved_step
        newest = f"the newest checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
        return ClusterError(
            f"the time limit of the batch job is too short for a start: {what}; give the job more time; {newest}"
        )
