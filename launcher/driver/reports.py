"""Dispatch the reports of training processes to the parts of the driver."""

import math
from collections.abc import Callable

from cluster.errors import listed
from cluster.process import messages
from cluster.process.data_messages import DataDelayed, SampleSkipped
from launcher.driver.attempt import Attempt
from launcher.driver.environments import Environments
from launcher.driver.failures import Failures
from launcher.driver.goodput import Ledger
from launcher.driver.membership import Membership
from launcher.driver.pending_checkpoints import PendingCheckpoints
from launcher.driver.run_log import RunLog
from launcher.driver.stop_conditions import StopConditions
from launcher.driver.stragglers import Stragglers

_DELAY_INTERVAL_S = 60.0
"""Shortest time between two warnings that data does not come."""


class Reports:
    """Handles the reports of training processes, attempt after attempt."""

    def __init__(
        self,
        *,
        run_log: RunLog,
        membership: Membership,
        environments: Environments,
        failures: Failures,
        stop: StopConditions,
        ledger: Ledger,
        clock: Callable[[], float],
    ) -> None:
        """Only assigns."""
        self._run_log = run_log
        self._membership = membership
        self._environments = environments
        self._failures = failures
        self._stop = stop
        self._ledger = ledger
        self._clock = clock
        self._pending = PendingCheckpoints(run_log.save_interval)
        self._stragglers = Stragglers([])
        self._attempt = Attempt()
        self._delay_told_at = -math.inf

    def agents_complete(self, shards: list[int]) -> None:
        """Begin to compare workers for stragglers; ``shards``: the number of shards of each rank."""
        self._stragglers = Stragglers(shards)

    def attempt_started(self, attempt: Attempt) -> None:
        """Forget the reports of earlier processes."""
        self._attempt = attempt
        self._pending.attempt_started(self._membership.num_workers)
        self._stragglers.restart()
        self._stop.pace.attempt_started()

    def handle(self, rank: int, report: messages.Report) -> None:
        """Handle a report of the current attempt."""
        match report:
            case messages.MeetingPlace(port=port):
                self._membership.group.order(meeting_port=port)
            case messages.EnvironmentsCompared():
                self._environments.compared(report)
            case messages.TrainingStarted():
                self._on_started(rank, report)
            case messages.FellBack(step=step, defect=defect):
                self._run_log.fell_back(step, defect)
                self._run_log.display.warn(f"{defect}; the checkpoint before it is used")
            case messages.RowLogged():
                self._environments.step_done()
                self._ledger.reported(report.spent)
                self._stop.pace.row_logged(report.row["step"], report.time, report.spent)
                self._run_log.row(report.row, report.time)
            case messages.MatrixMeasured():
                self._run_log.matrix(report)
            case messages.TimeSpent():
                self._on_time_spent(rank, report)
            case messages.StepEvent(kind=kind, step=step, reason=reason):
                self._run_log.event(kind, step=step, reason=reason)
                self._run_log.display.message(f"step {step}: {kind.replace('_', ' ')}: {reason}")
            case SampleSkipped():
                self._run_log.sample_skipped(report)
            case DataDelayed(reason=reason):
                self._on_data_delayed(rank, reason)
            case messages.SaveSkipped():
                self._on_save_skipped(rank, report)
            case messages.ShareWritten():
                self._on_share(rank, report)
            case messages.Finished():
                self._on_finished(rank, report)
            case messages.Failed():
                self._ledger.failed(self._clock())
                self._failures.failed(rank, report)
            case messages.Exited():
                self._failures.exited(rank, report)
            case messages.Hung():
                self._failures.hung(rank, report)
            case messages.GoesOn():
                self._failures.recovered(rank)

    def warn_if_overdue(self, now: float) -> None:
        """Warn once if a checkpoint is overdue, and name the workers that delay it."""
        step, saved_step = self._run_log.state.step, self._run_log.saved_step
        overdue = self._pending.overdue(now, step=step, saved_step=saved_step)
        if overdue is None:
            return
        self._run_log.event(
            "checkpoint_overdue", step=step, saved_step=saved_step, ranks=overdue.ranks, reason=overdue.reason
        )
        who = listed([self._membership.where(rank) for rank in overdue.ranks])
        what = f"{who}: {overdue.reason}" if who else overdue.reason
        self._run_log.display.warn(
            f"step {step}: no checkpoint has come since step {saved_step}: {what}; check the connection to the store, "
            "or raise checkpoint.every_steps"
        )

    def _on_started(self, rank: int, started: messages.TrainingStarted) -> None:
        if rank == 0:
            self._attempt.trains, self._attempt.began_at = True, started.step
            self._stop.first_start_is_over()
            self._ledger.training_began(self._clock(), started.spent)
            self._run_log.begins_at(started.step)
            self._pending.training_began(self._clock())

    def _on_time_spent(self, rank: int, report: messages.TimeSpent) -> None:
        self._environments.step_done()
        for news in self._stragglers.add_report(rank, report.step, report.spent):
            kind = "worker_recovered" if news.what is None else "worker_slow"
            node = self._membership.agents[news.rank].address
            self._run_log.event(kind, step=report.step, rank=news.rank, node=node, what=news.what, factor=news.factor)
            tell = self._run_log.display.message if news.what is None else self._run_log.display.warn
            tell(f"{self._membership.where(news.rank)} {news.text}")

    def _on_data_delayed(self, rank: int, reason: str) -> None:
        """Record that a store of data does not answer; many workers may say so at once."""
        now = self._clock()
        if now - self._delay_told_at < _DELAY_INTERVAL_S:
            return
        self._delay_told_at = now
        self._run_log.event("data_delayed", step=self._run_log.state.step, rank=rank, reason=reason)
        self._run_log.display.warn(f"{self._membership.where(rank)} waits for data: {reason}; it goes on trying")

    def _on_save_skipped(self, rank: int, skipped: messages.SaveSkipped) -> None:
        """Record that all workers skip a checkpoint because one is not ready."""
        step, reason = skipped.step, skipped.reason
        self._pending.left_out(rank, reason)
        self._run_log.event("checkpoint_left_out", step=step, rank=rank, reason=reason)
        self._run_log.display.message(f"step {step}: checkpoint left out: {self._membership.where(rank)}: {reason}")

    def _on_share(self, rank: int, written: messages.ShareWritten) -> None:
        """Take a worker's share of a checkpoint; with the last share, have the checkpoint committed."""
        whole = self._pending.share(rank, written)
        if whole is None:
            return
        manifest, shares = whole
        best = (written.best_step, written.best_metric)
        seconds, spent = max(other.seconds for other in shares.values()), shares[0].spent
        self._run_log.checkpoint(manifest, best, seconds, lambda: self._ledger.saved(spent))

    def _on_finished(self, rank: int, finished: messages.Finished) -> None:
        attempt = self._attempt
        self._failures.finished(rank)
        attempt.finished.add(rank)
        attempt.completed = finished.completed
        if finished.step > attempt.began_at:
            self._environments.step_done()
        if rank == 0:
            self._ledger.reported(finished.spent)
        self._run_log.reached(finished.step)
