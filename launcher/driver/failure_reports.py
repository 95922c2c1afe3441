"""Report a failure to the user and in the run directory."""

from cluster.errors import LauncherError
from launcher.driver.attempt import NONE
from launcher.driver.membership import Membership
from launcher.driver.run_log import RunLog
from launcher.driver.verdicts import Failure, GiveUp


class FailureReports:
    """Describes failures: which worker, what happened, at which step."""

    def __init__(self, run_url: str, membership: Membership, run_log: RunLog) -> None:
        """Only assigns."""
        self._run_url = run_url
        self._membership = membership
        self._run_log = run_log

    def note(self, failure: Failure) -> None:
        """Record a failure in the status and in the events."""
        node, address = (None, None) if failure.rank is None else self._membership.place_of(failure.rank)
        told = {
            "cause": failure.cause,
            "rank": failure.rank,
            "node": node,
            "address": address,
            "step": self._step_of(failure),
        }
        if failure.cause == "gpu_lost" and failure.rank is not None:
            told["gpu"] = self._membership.gpu_of(failure.rank)
        self._run_log.state.failure = told | {"message": failure.message}
        if failure.hang is not None:
            self._run_log.event("worker_hung", **failure.hang)
        if failure.rank is not None:
            last = {"log_tail": failure.log_tail} if failure.log_tail else {}
            self._run_log.event("worker_lost", **told, reason=failure.message, **last)

    def line(self, failure: Failure) -> str:
        """Return a failure in one line: which worker, what happened, at which step."""
        if failure.rank is None:
            return failure.message
        where = self._membership.where(failure.rank)
        if failure.cause == "gpu_lost" and (gpu := self._membership.gpu_of(failure.rank)):
            where += f", GPU {gpu}"
        return f"{where}: {failure.message} at step {self._step_of(failure)}"

    def final_error(self, verdict: GiveUp, attempt: int) -> LauncherError:
        """Return the error that ends the run: what happened, what to do, where the log is, the newest checkpoint."""
        failure, step = verdict.failure, self._run_log.saved_step
        what = f"{self.line(failure)}, {verdict.why}" if verdict.why else self.line(failure)
        has_log = failure.rank is not None and attempt != NONE and not failure.traceback
        log = f"see {self._run_url}/logs, attempt {attempt}, worker {failure.rank}" if has_log else ""
        saved = f"the newest checkpoint is of step {step}" if step else "there is no checkpoint yet"
        line = "; ".join(part for part in (what, verdict.advice, log, saved) if part)
        return failure.error(line, traceback=failure.traceback or failure.log_tail)

    def _step_of(self, failure: Failure) -> int:
        """Return the steps completed at the failure: the later of two reports, as that of an agent is a second old."""
        return max(self._run_log.state.step, failure.step or 0)
