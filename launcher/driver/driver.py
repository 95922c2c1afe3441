"""The driver's loop: gather workers, handle their messages, turn failures into another attempt or the end, and finish.

The driver trains nothing. With its run log it owns what a run has one of: tracker, display, events, metrics, and the
commit of a checkpoint. Workers send it small messages and never wait for it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.collectives.topology import workers_by_host
from cluster.errors import Interrupted, LauncherError
from cluster.process import messages
from cluster.process.placement_messages import AgentsLost, AgentsPlaced, AgentsUnplaced
from cluster.run.lease import STATUS_INTERVAL_S
from jobs.shard_blocks import shard_blocks
from jobs.spec import JobSpec
from launcher.driver.attempt import NONE, Attempt
from launcher.driver.change import Change
from launcher.driver.environments import Environments
from launcher.driver.excluded_nodes import ExcludedNodes
from launcher.driver.failure_reports import FailureReports
from launcher.driver.failures import Failures
from launcher.driver.gathering import Gathering
from launcher.driver.goodput import Ledger
from launcher.driver.lost_gpus import LostGpus
from launcher.driver.membership import Membership
from launcher.driver.reports import Reports
from launcher.driver.run_log import RunLog
from launcher.driver.stop_conditions import Stop, StopConditions
from launcher.driver.verdicts import GiveUp


class Driver:
    """Runs one job to its end, on workers that it starts."""

    def __init__(
        self,
        *,
        spec: JobSpec,
        run_url: str,
        run_log: RunLog,
        stop: StopConditions,
        first_workers: Sequence[Mapping[str, Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Only assigns.

        Args:
            spec: The job.
            run_url: The run, for messages.
            run_log: Records what happens.
            stop: Decides when the run stops.
            first_workers: The environments of the workers that the run began on; None: not known yet.
            clock: A monotonic clock in seconds.
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
        self._stop = stop
        self._attempt = Attempt()
        self._change: Change | None = None
        """The change in progress: the current workers save, then others replace them."""

    def drive(self, make_membership: Callable[[], Membership]) -> None:
        """Run until the workers have finished; the state then has the result.

        Args:
            make_membership: Returns the membership, without any workers.

        Raises:
            LauncherError: The run failed, or was interrupted twice; committed checkpoints are intact.
        """
        try:
            self._wire(make_membership())
            self._ledger.waiting(self._clock())
            try:
                self._listen()
            finally:
                self._membership.group.close()
        except LauncherError as error:
            self._end(error)
            raise
        self._end()

    def _wire(self, membership: Membership) -> None:
        """Make the parts that need the workers' group."""
        spec, run_log = self._spec, self._run_log
        self._membership = membership
        self._gathering = Gathering(spec.workers, self._run_url, membership, run_log, self._stop.job)
        self._environments = Environments(self._run_url, membership, run_log, self._first_workers)
        self._failure_reports = FailureReports(self._run_url, membership, run_log)
        self._lost_gpus = LostGpus(spec.workers, membership, run_log)
        self._excluded = ExcludedNodes(self._stop.job, membership, run_log)
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
        """Whether the run ends: all workers have finished and no others follow, or none are left or wanted."""
        if not self._have_finished:
            return False
        has_ended = self._attempt.completed or self._stop.accepted is not None
        return has_ended or (self._membership.is_complete and self._change is None)

    @property
    def _have_finished(self) -> bool:
        """Whether no worker is left that trains."""
        return len(self._attempt.finished) >= self._membership.num_workers

    def _hear(self, message: messages.ToDriver) -> None:
        membership = self._membership
        match message:
            case messages.FromWorker(rank, attempt, report):
                if attempt == self._attempt.number:  # else it comes from a process of an earlier attempt
                    self._reports.handle(rank, report)
            case messages.StillHere():
                membership.heartbeat(message, self._clock())
            case messages.LogNotKept(rank, reason):
                self._display.warn(f"worker {rank}: log not kept: {reason}")
            case _ if message.generation != membership.generation:
                pass  # it is about agents that have been replaced
            case messages.Unkillable():
                self._failures.unkillable(message)
            case messages.Hello():
                membership.joined(message, self._clock())
                if membership.is_complete:
                    hosts = workers_by_host([agent.address for _, agent in sorted(membership.agents.items())])
                    self._reports.agents_complete(list(map(len, shard_blocks(self._spec.train.shards, hosts))))
            case AgentsPlaced(nodes=nodes):
                self._gathering.placed(nodes, self._clock())
            case AgentsUnplaced():
                membership.unplaced()
            case AgentsLost(lost=lost, reason=reason):
                self._on_agents_lost(lost, reason)

    # Attempts.

    def _start_attempt(self) -> None:
        """Have all agents start their training processes."""
        membership, state = self._membership, self._run_log.state
        self._attempt = Attempt(state.attempts, began_at=self._attempt.began_at)
        state.attempts += 1
        self._reports.attempt_started(self._attempt)
        self._environments.attempt_ended()
        self._excluded.attempt_started()
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
            stop=self._stop.accepted is not None,
        )
        self._display.phase("building the model on the workers")

    def _regroup(self) -> None:
        """Drop the agents; others start from the newest checkpoint as soon as there is room for them."""
        self._membership.disband()
        self._ledger.waiting(self._clock())
        self._failures.attempt_started(0)
        self._environments.attempt_ended()
        # Some workers may have finished, but the last checkpoint is not whole without the others' shares.
        self._attempt, self._change = Attempt(began_at=self._attempt.began_at), None
        self._run_log.reached(self._run_log.saved_step)

    def _plan_change(self, change: Change) -> None:
        """Have the workers save and leave, so that no step is lost; if there is no time for that, regroup at once."""
        step = self._run_log.state.step
        self._failures.draining(change.leaving)
        if change.ends_here:
            self._ask_to_stop(Stop(f"{change.reason}, and the driver runs on it"))
            return
        self._change = change
        left_s, save_s = change.leave_by - time.time(), self._run_log.last_save_s
        if left_s < save_s:
            reason = (
                f"{change.reason}: {max(0.0, left_s):.1f} s are left, and a save takes {save_s:.1f} s, "
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
        """Handle agents that Ray has lost or could not start; Ray can only replace the whole group."""
        if self._have_finished:  # they have finished, or were dropped
            return
        self._ledger.failed(self._clock())
        self._run_log.event("agents_lost", step=self._run_log.state.step, lost=lost, reason=reason)
        if self._change is None:
            self._failures.lost(lost, reason)
        else:
            self._regroup()

    def _judge(self, now: float) -> None:
        """Act on the verdict on failures of workers: start another attempt, regroup, or end the run.

        Raises:
            LauncherError: The failure ends the run.
        """
        verdict = self._failures.verdict(now)
        if verdict is None:
            return
        self._ledger.failed(now)
        self._failure_reports.note(verdict.failure)
        self._excluded.note(verdict.failure)
        what = self._failure_reports.line(verdict.failure)
        if isinstance(verdict, GiveUp):
            if self._environments.leave_out_unfit(verdict.failure):
                self._regroup()
            elif (stop := self._excluded.stop_after(verdict.failure)) is None:
                raise self._failure_reports.final_error(verdict, self._attempt.number)
            else:
                self._display.warn(f"{what}, {verdict.why}")
                self._attempt.trains = False
                self._ask_to_stop(stop)
            return
        later = f" in {verdict.wait_s} s" if verdict.wait_s else ""
        self._attempt.trains = False
        self._stop.first_start_is_over()
        if self._stop.accepted is not None or self._why_stop(now) is not None:  # new workers would only start to stop
            self._display.warn(f"{what}; the run stops at the newest checkpoint")
            self._regroup()
            return
        places = self._lost_gpus.leave_out_node(verdict.failure)
        self._display.warn(f"{what}; restarting from the newest checkpoint{later}{places}")
        if verdict.needs_agents or self._change is not None:
            self._regroup()
            self._gathering.start_at = now + verdict.wait_s
        else:
            self._start_attempt()

    # Time.

    def _check_time(self) -> None:
        """Do everything that depends on time; called several times a second.

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
        if self._stop.is_abandoned:
            raise Interrupted(f"abandoned at step {self._run_log.state.step}; launcher resume {self._run_url}")
        if self._stop.accepted is None and (stop := self._why_stop(now)) is not None:
            self._ask_to_stop(stop)
        self._see_to_workers(now)

    def _account(self, now: float) -> None:
        """Update the counts of time and failures in the state."""
        state = self._run_log.state
        state.seconds = self._seconds_before + now - self._started_at
        state.time, state.unsaved = self._ledger.parts(now), self._ledger.unsaved()
        state.failures = {str(kind): count for kind, count in self._failures.counts.items()}

    def _see_to_workers(self, now: float) -> None:
        """Start workers if there are none, notice late and silent agents, and begin a change of workers."""
        membership, is_settled = self._membership, self._run_log.is_settled
        if self._change is not None and self._have_finished and is_settled:
            self._ledger.parked(now)
            self._regroup()  # all workers have saved
        if not membership.num_workers:
            if self._stop.accepted is None and (error := self._gathering.gather(now)) is not None:
                if (stop := self._excluded.stop_for_others()) is None:
                    raise error
                self._ask_to_stop(stop)
        elif not membership.is_complete:
            late = membership.late(now)
            if late and is_settled:  # else ``_judge`` waits for the store, and they may join meanwhile
                self._on_agents_lost({}, late)
        elif is_settled and (silent := membership.silent(now)):
            self._on_agents_lost(silent, "")
        elif self._attempt.number == NONE and is_settled:
            self._start_attempt()
        elif self._attempt.trains and self._change is None and self._stop.accepted is None:
            change = membership.change(now)
            if change is not None:
                self._plan_change(change)

    def _ask_to_stop(self, stop: Stop) -> None:
        """Have the workers save and end; if none trains, there is nothing to save, and the run ends at once."""
        stop = self._stop.accept(stop)
        if self._attempt.trains:
            self._display.message(f"{stop.text}: the workers finish their step and save; Ctrl-C twice abandons that")
            self._membership.group.order(stop=True)
        else:
            self._display.message(f"{stop.text}: no worker trains, the run stops at the newest checkpoint")
            self._regroup()

    def _why_stop(self, now: float) -> Stop | None:
        return self._stop.reason(now, waits_for_room=self._gathering.waits)

    def _end(self, error: LauncherError | None = None) -> None:
        now, completed, written = self._clock(), self._attempt.completed, None
        self._ledger.ended(now, kept=error is None)
        self._account(now)
        while (status := self._stop.outcome(error, completed=completed)) != written:  # a signal may change it meanwhile
            self._run_log.state.interrupted = status == "stopped" and self._stop.is_cut_short
            self._run_log.close(status, error, lambda: self._stop.is_abandoned)
            written = status
