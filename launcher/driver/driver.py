"""The life of a run: gather workers, listen to them, turn their failures into another attempt or the end, finish.

The driver trains nothing. With its run log it owns what must be one: the tracker, the display, the events, the metrics
and the moment at which a checkpoint becomes one. Workers send it small messages and never wait for it.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.errors import Interrupted, LauncherError
from cluster.process import messages
from cluster.process.orders import Task
from cluster.run.lease import STATUS_INTERVAL_S
from cluster.run.run_directory import RunDirectory
from jobs.sampling import shard_block
from jobs.spec import JobSpec
from launcher.code.user_code import UserCode
from launcher.driver.attempt import NONE, Attempt
from launcher.driver.environments import Environments
from launcher.driver.failure_reports import FailureReports
from launcher.driver.failures import Failures
from launcher.driver.gathering import Gathering
from launcher.driver.goodput import Ledger
from launcher.driver.membership import Change, Membership
from launcher.driver.reports import Reports
from launcher.driver.run_log import RunLog
from launcher.driver.stop_conditions import StopConditions
from launcher.driver.verdicts import GiveUp
from launcher.planning.plan import ENTRY


class Driver:
    """Runs one job on workers that it starts, to its end."""

    def __init__(
        self,
        *,
        spec: JobSpec,
        run_url: str,
        run_log: RunLog,
        first_workers: Sequence[Mapping[str, Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Only assigns.

        Args:
            spec: The job.
            run_url: What to call the run.
            run_log: Where it is written what happens.
            first_workers: The environments of those that the run began with; None: nobody has told of them yet.
            clock: Seconds that only grow.
        """
        self._spec = spec
        self._run_url = run_url
        self._run_log = run_log
        self._display = run_log.display
        self._first_workers = first_workers
        self._clock = clock
        self._flushed_at = self._started_at = self._checked_at = clock()
        self._seconds_before = run_log.state.seconds
        self._ledger = Ledger(begun_at=self._started_at, booked=dict(run_log.state.time))
        self._failures = Failures(spec.workers.max_failures)
        self._stop = StopConditions(spec, run_log, self._started_at)
        self._stop_reason: str | None = None
        self._attempt = Attempt()
        self._change: Change | None = None
        """Under way: the workers save, and others take their place."""

    def drive(self, make_membership: Callable[[], Membership]) -> None:
        """Runs until the workers have finished; the state then tells how.

        Args:
            make_membership: Opens the way to workers, of which none is there yet.

        Raises:
            LauncherError: The run failed, or was interrupted twice; what was committed is intact.
        """
        with self._stop.catching_signals():
            try:
                self._wire(make_membership())
                self._ledger.waiting(self._clock())
                try:
                    self._listen()
                finally:
                    self._membership.group.close()
            except LauncherError as error:
                self._end("stopped" if isinstance(error, Interrupted) else "failed", error)
                raise
            self._end("completed" if self._attempt.completed else "stopped")

    @property
    def interrupted(self) -> bool:
        """A signal asked the run to stop."""
        return self._stop.num_signals > 0

    def _wire(self, membership: Membership) -> None:
        """Makes the parts that need the workers' group."""
        spec, run_log = self._spec, self._run_log
        self._membership = membership
        self._gathering = Gathering(spec.workers, self._run_url, membership, run_log)
        self._environments = Environments(self._run_url, membership, run_log, self._first_workers)
        self._failure_reports = FailureReports(self._run_url, membership, run_log)
        self._reports = Reports(
            run_log=run_log,
            membership=membership,
            environments=self._environments,
            failures=self._failures,
            stop=self._stop,
            ledger=self._ledger,
            clock=self._clock,
        )

    # Listening.

    def _listen(self) -> None:
        while not self._is_over:
            self._check_time()
            for message in self._membership.group.messages(timeout_s=0.25):
                self._hear(message)

    @property
    def _is_over(self) -> bool:
        """All workers have finished, and no others are to go on; or none are there, and none are wanted any more."""
        if not self._have_finished:
            return False
        has_ended = self._attempt.completed or self._stop_reason is not None
        return has_ended or (self._membership.is_complete and self._change is None)

    @property
    def _have_finished(self) -> bool:
        """No worker is left that has work to do."""
        return len(self._attempt.finished) >= self._membership.num_workers

    def _hear(self, message: messages.ToDriver) -> None:
        membership = self._membership
        match message:
            case messages.FromWorker(rank, attempt, report):
                if attempt == self._attempt.number:  # else it is from a process of an earlier attempt
                    self._reports.hear(rank, report)
            case messages.StillHere():
                membership.heard(message, self._clock())
            case messages.LogNotKept(rank, reason):
                self._display.warn(f"worker {rank}: log not kept: {reason}")
            case _ if message.generation != membership.generation:
                pass  # it is about agents that others have replaced
            case messages.Hello():
                membership.joined(message, self._clock())
                if membership.is_complete:
                    shards, count = self._spec.train.shards, membership.num_workers
                    self._reports.agents_complete([len(shard_block(shards, count, rank)) for rank in range(count)])
            case messages.AgentsPlaced(nodes=nodes):
                self._gathering.placed(nodes, self._clock())
            case messages.AgentsUnplaced():
                membership.unplaced()
            case messages.AgentsLost(lost=lost, reason=reason):
                self._on_agents_lost(lost, reason)

    # Attempts.

    def _start_attempt(self) -> None:
        """Has the agents, which are all there, start their training processes."""
        membership, state = self._membership, self._run_log.state
        self._attempt = Attempt(state.attempts, began_at=self._attempt.began_at)
        state.attempts += 1
        self._reports.attempt_started(self._attempt)
        self._environments.attempt_ended()
        self._failures.attempt_started(membership.num_workers)
        self._ledger.workers_there(self._clock())
        self._run_log.event(
            "attempt_started",
            attempt=self._attempt.number,
            workers=[
                {"rank": rank, "node": agent.node, "address": agent.address, "pid": agent.pid}
                for rank, agent in sorted(membership.agents.items())
            ],
        )
        membership.group.order(
            attempt=self._attempt.number,
            agents=frozenset(agent.id for agent in membership.agents.values()),
            host=membership.host,
            meeting_port=None,
            stop=self._stop_reason is not None,
        )
        self._display.phase("building the model on the workers")

    def _regroup(self) -> None:
        """Lets go of the agents; others start as soon as there is room for them, from the newest checkpoint."""
        self._membership.disband()
        self._ledger.waiting(self._clock())
        self._failures.attempt_started(0)
        self._environments.attempt_ended()
        # Some may have finished, but the last checkpoint is not whole without the others.
        self._attempt, self._change = Attempt(began_at=self._attempt.began_at), None
        self._run_log.reached(self._run_log.saved_step)

    def _plan_change(self, change: Change) -> None:
        """Has the workers save and leave, so that others go on without a step lost; or without, if there is no time."""
        step = self._run_log.state.step
        self._failures.draining(change.leaving)
        if change.ends_here:
            self._ask_to_stop(f"{change.reason}, and the driver runs on it")
            return
        self._change = change
        left_s = change.leave_by - time.time()
        if left_s < self._run_log.save_s:
            reason = (
                f"{change.reason}: {max(0.0, left_s):.1f} s are left, and a save takes {self._run_log.save_s:.1f} s, "
                f"so the checkpoint of step {self._run_log.saved_step} is relied upon"
            )
            self._run_log.event("leaving", step=step, reason=reason)
            self._display.warn(reason)
            self._ledger.failed(self._clock())
            self._regroup()
            return
        self._run_log.event("leaving", step=step, reason=change.reason)
        self._display.message(f"step {step}: {change.reason}: the workers save, then others go on")
        self._membership.group.order(stop=True)

    def _on_agents_lost(self, lost: Mapping[int, str], reason: str) -> None:
        """Ray has lost agents, or could not start them. The others can only be replaced with them."""
        if self._have_finished:  # they have done their work, or been let go of
            return
        self._ledger.failed(self._clock())
        self._run_log.event("agents_lost", step=self._run_log.state.step, lost=lost, reason=reason)
        if self._change is None:
            self._failures.lost(lost, reason)
        else:
            self._regroup()

    def _judge(self, now: float) -> None:
        """Does what the failures of workers ask for.

        Raises:
            LauncherError: They end the run.
        """
        verdict = self._failures.verdict(now)
        if verdict is None:
            return
        self._ledger.failed(now)
        self._failure_reports.note(verdict.failure)
        if isinstance(verdict, GiveUp):
            if not self._environments.leave_out_unfit(verdict.failure):
                raise self._failure_reports.final_error(verdict, self._attempt.number)
            self._regroup()
            return
        what = self._failure_reports.line(verdict.failure)
        later = f" in {verdict.wait_s} s" if verdict.wait_s else ""
        self._attempt.trains = False
        self._stop.first_start_is_over()
        if self._stop_reason is not None or self._why_stop(now) is not None:  # others would only be started to stop
            self._display.warn(f"{what}; the run stops at the newest checkpoint")
            self._regroup()
            return
        self._display.warn(f"{what}; starting anew from the newest checkpoint{later}")
        if verdict.needs_agents or self._change is not None:
            self._regroup()
            self._gathering.start_at = now + verdict.wait_s
        else:
            self._start_attempt()

    # Time.

    def _check_time(self) -> None:
        """Does what is to be done every moment.

        Raises:
            LauncherError: The run ends.
        """
        now = self._clock()
        self._run_log.tend()
        self._run_log.state.worker_hours += self._membership.num_placed * (now - self._checked_at) / 3600
        self._checked_at = now
        self._account(now)
        self._reports.warn_if_overdue(now)
        if now - self._flushed_at > STATUS_INTERVAL_S:
            self._flushed_at = now
            self._run_log.flush()
        if self._run_log.is_settled:
            self._judge(now)
        if self._stop.num_signals > 1:
            raise Interrupted(f"abandoned at step {self._run_log.state.step}; launcher resume {self._run_url}")
        reason = self._why_stop(now)
        if reason is not None and self._stop_reason is None:
            self._ask_to_stop(reason)
        self._see_to_workers(now)

    def _account(self, now: float) -> None:
        """Brings up to date what is counted in time."""
        state = self._run_log.state
        state.seconds = self._seconds_before + now - self._started_at
        state.time, state.unsaved = self._ledger.parts(now), self._ledger.unsaved()
        state.failures = {str(kind): count for kind, count in self._failures.counts.items()}

    def _see_to_workers(self, now: float) -> None:
        """Starts workers where there are none, and sees whether others would be better than those that train."""
        membership, is_settled = self._membership, self._run_log.is_settled
        if self._change is not None and self._have_finished and is_settled:
            self._ledger.parked(now)
            self._regroup()  # all have saved
        if not membership.num_workers:
            if self._stop_reason is None:
                self._gathering.gather(now)
        elif not membership.is_complete:
            late = membership.late(now)
            if late and is_settled:  # else it cannot be judged yet, and they may come
                self._on_agents_lost({}, late)
        elif is_settled and (silent := membership.silent(now)):
            self._on_agents_lost(silent, "")
        elif self._attempt.number == NONE and is_settled:
            self._start_attempt()
        elif self._attempt.trains and self._change is None and self._stop_reason is None:
            change = membership.change(now)
            if change is not None:
                self._plan_change(change)

    def _ask_to_stop(self, reason: str) -> None:
        """Has the workers save and end; if none trains there is nothing to save, and the run ends at once."""
        self._stop_reason = reason
        self._run_log.event("stop_requested", step=self._run_log.state.step, reason=reason)
        if self._attempt.trains:
            self._display.message(f"{reason}: the workers finish their step and save; Ctrl-C twice abandons that")
            self._membership.group.order(stop=True)
        else:
            self._display.message(f"{reason}: no worker trains, the run stops at the newest checkpoint")
            self._regroup()

    def _why_stop(self, now: float) -> str | None:
        return self._stop.reason(now, waits_for_room=self._gathering.waits)

    def _end(self, status: str, error: LauncherError | None = None) -> None:
        now = self._clock()
        self._ledger.ended(now, kept=error is None)
        self._account(now)
        self._run_log.close(status, error, lambda: self._stop.num_signals > 1)


def make_task(spec: JobSpec, run: RunDirectory, code: UserCode, *, data_fingerprint: str, may_differ: bool) -> Task:
    """What every training process of the run is told."""
    return replace(
        code.task(ENTRY, run.url, spec),
        hang_timeout_s=spec.workers.hang_timeout_s,
        first_step_timeout_s=spec.workers.first_step_timeout_s or math.inf,
        data_fingerprint=data_fingerprint,
        may_differ=may_differ or not spec.train.exact,
    )
