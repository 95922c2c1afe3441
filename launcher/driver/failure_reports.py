"""What a person and the run directory are told of a failure."""

from cluster.errors import LauncherError
from launcher.driver.attempt import NONE
from launcher.driver.membership import Membership
from launcher.driver.run_log import RunLog
from launcher.driver.verdicts import Failure, GiveUp


class FailureReports:
    """Says where, what and when of a failure."""

    def __init__(self, run_url: str, membership: Membership, run_log: RunLog) -> None:
        """Only assigns."""
        self._run_url = run_url
        self._membership = membership
        self._run_log = run_log

    def note(self, failure: Failure) -> None:
        """Writes a failure down."""
        node, address = (None, None) if failure.rank is None else self._membership.place_of(failure.rank)
        told = {
            "cause": failure.cause,
            "rank": failure.rank,
            "node": node,
            "address": address,
            "step": self._step_of(failure),
        }
        self._run_log.state.failure = told | {"message": failure.message}
        if failure.hang is not None:
            self._run_log.event("worker_hung", **failure.hang)
        if failure.rank is not None:
            last = {"log_tail": failure.log_tail} if failure.log_tail else {}
            self._run_log.event("worker_lost", **told, reason=failure.message, **last)

    def line(self, failure: Failure) -> str:
        """A failure in a line: where, what, when."""
        if failure.rank is None:
            return failure.message
        return f"{self._membership.where(failure.rank)}: {failure.message} at step {self._step_of(failure)}"

    def final_error(self, verdict: GiveUp, attempt: int) -> LauncherError:
        """What the run ends with: what happened, what to do, where more is told, and what is left."""
        failure, step = verdict.failure, self._run_log.saved_step
        what = f"{self.line(failure)}, {verdict.why}" if verdict.why else self.line(failure)
        has_log = failure.rank is not None and attempt != NONE and not failure.traceback
        log = f"see {self._run_url}/logs, attempt {attempt}, worker {failure.rank}" if has_log else ""
        saved = f"the newest checkpoint is of step {step}" if step else "there is no checkpoint yet"
        line = "; ".join(part for part in (what, verdict.advice, log, saved) if part)
        return failure.error(line, traceback=failure.traceback or failure.log_tail)

    def _step_of(self, failure: Failure) -> int:
        """The steps completed by then, as the later of two says: what an agent knows is a second old."""
        return max(self._run_log.state.step, failure.step or 0)
