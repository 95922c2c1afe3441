"""The life of a run: gather workers, listen to them, decide what their failures come to, finish.

The driver trains nothing. With its record it owns what must be one: the tracker, the display, the events, the metrics
and the moment at which a checkpoint becomes one. Workers send it small messages and never wait for it.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.errors import (
    ClusterError,
    Interrupted,
    LauncherError,
    listed,
)
from cluster.process.messages import (
    AgentsLost,
    AgentsPlaced,
    AgentsUnplaced,
    EnvironmentsCompared,
    Exited,
    Failed,
    FellBack,
    Finished,
    FromWorker,
    GoesOn,
    Hello,
    Hung,
    LogNotKept,
    MatrixMeasured,
    MeetingPlace,
    Report,
    RowLogged,
    SaveSkipped,
    ShareWritten,
    StepEvent,
    StillHere,
    TimeSpent,
    ToDriver,
    TrainingStarted,
)
from cluster.process.orders import Task
from cluster.run.lease import STATUS_INTERVAL_S
from cluster.run.run_directory import RunDirectory
from jobs.environment import changes, unlike
from jobs.sampling import shard_block
from jobs.spec import JobSpec
from launcher.code.user_code import UserCode
from launcher.driver.failures import Failures
from launcher.driver.goodput import Ledger
from launcher.driver.membership import Change, Crew
from launcher.driver.pending_checkpoints import Saves
from launcher.driver.run_log import Record
from launcher.driver.stragglers import Pace
from launcher.driver.verdicts import Failure, GiveUp
from launcher.planning.plan import ENTRY

_RATE_WINDOW_S = 20.0
_ASK_AFTER_S = 10.0
"""How long there is too little room before Ray is asked for it all the same.

Then the run stands in line, and an autoscaler brings nodes for what Ray has no room for. What Ray Train asks of an
autoscaler is not enough: nodes that others use meet it, and more than there may be, with what others ask, brings none.
"""
_NONE = -1
"""The attempt while there is none."""


class Driver:
    """Runs one job on workers that it starts, to its end."""

    def __init__(
        self,
        *,
        spec: JobSpec,
        run_url: str,
        record: Record,
        first_workers: Sequence[Mapping[str, Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Only assigns.

        Args:
            spec: The job.
            run_url: What to call the run.
            record: Where it is written what happens.
            first_workers: The environments of those that the run began with; none: nobody has told of them yet.
            clock: Seconds that only grow.
        """
        self._spec = spec
        self._run_url = run_url
        self._record = record
        self._display = record.display
        self._clock = clock
        self._first_workers = first_workers
        self._last_workers: Sequence[Mapping[str, Any]] = ()
        """The environments of the workers that did a step last."""
        self._workers: Sequence[Mapping[str, Any]] = ()
        """Those of the present attempt's workers."""
        self._refused: EnvironmentsCompared | None = None
        """What was told of the workers of the present attempt, if they differ so that they do not train."""
        self._warned_of: set[str] = set()
        """The differences between workers that a person knows of."""
        self._crew: Crew
        self._pace: Pace
        self._attempt = _NONE
        self._failures = Failures(spec.workers.max_failures)
        self._finished: set[int] = set()
        self._saves = Saves(record.save_interval)
        self._completed = False
        self._interrupts = 0
        self._stop_reason: str | None = None
        self._change: Change | None = None
        """Under way: the workers save, and others take their place."""
        self._flushed_at = self._started_at = self._checked_at = clock()
        self._start_at = self._started_at
        """Workers are not started before."""
        self._waiting_since: float | None = None
        self._trains = False
        self._is_first_start = True
        """No worker has trained yet, and none has failed."""
        self._began_at = 0
        """The step that the workers which train now, or did last, began at."""
        self._seconds_before = record.state.seconds
        self._ledger = Ledger(begun_at=self._started_at, booked=dict(record.state.time))

    def drive(self, make_crew: Callable[[], Crew]) -> None:
        """Runs until the workers have finished; the state then tells how.

        Args:
            make_crew: Opens the way to workers, of which none is there yet.

        Raises:
            LauncherError: The run failed, or was interrupted twice; what was committed is intact.
        """
        with self._catching_signals():
            try:
                self._crew = make_crew()
                self._ledger.waiting(self._clock())
                try:
                    self._listen()
                finally:
                    self._crew.group.close()
            except LauncherError as error:
                self._end("stopped" if isinstance(error, Interrupted) else "failed", error)
                raise
            self._end("completed" if self._completed else "stopped")

    @property
    def interrupted(self) -> bool:
        """A signal asked the run to stop."""
        return self._interrupts > 0

    # Listening.

    def _listen(self) -> None:
        while not self._is_over:
            self._check_time()
            for message in self._crew.group.messages(timeout_s=0.25):
                self._hear(message)

    @property
    def _is_over(self) -> bool:
        """All workers have finished, and no others are to go on; or none are there, and none are wanted any more."""
        if len(self._finished) < self._crew.num_workers:
            return False
        return self._completed or self._stop_reason is not None or (self._crew.is_complete and self._change is None)

    def _hear(self, message: ToDriver) -> None:
        generation = self._crew.generation
        match message:
            case FromWorker(rank, attempt, report):
                if attempt == self._attempt:  # else it is from a process of an earlier attempt
                    self._hear_report(rank, report)
            case StillHere():
                self._crew.heard(message, self._clock())
            case LogNotKept(rank, reason):
                self._display.warn(f"worker {rank}: log not kept: {reason}")
            case Hello() | AgentsPlaced() | AgentsUnplaced() | AgentsLost() if message.generation != generation:
                pass  # about agents that others have replaced
            case Hello():
                self._on_hello(message)
            case AgentsPlaced(nodes=nodes):
                self._on_agents_placed(nodes)
            case AgentsUnplaced():
                self._crew.unplaced()
            case AgentsLost(lost=lost, reason=reason):
                self._on_agents_lost(lost, reason)

    def _hear_report(self, rank: int, report: Report) -> None:
        match report:
            case MeetingPlace(port=port):
                self._crew.group.order(meeting_port=port)
            case EnvironmentsCompared():
                self._on_environments(report)
            case TrainingStarted():
                self._on_started(rank, report)
            case FellBack():
                self._on_fell_back(report)
            case RowLogged():
                self._on_row(report)
            case MatrixMeasured():
                self._record.matrix(report)
            case TimeSpent():
                self._on_time_spent(rank, report)
            case StepEvent():
                self._on_step_event(report)
            case SaveSkipped():
                self._on_save_skipped(rank, report)
            case ShareWritten():
                self._on_share(rank, report)
            case Finished():
                self._on_finished(rank, report)
            case Failed():
                self._ledger.failed(self._clock())
                self._failures.failed(rank, report)
            case Exited():
                self._failures.exited(rank, report)
            case Hung():
                self._failures.hung(rank, report)
            case GoesOn():
                self._failures.goes_on(rank)

    def _on_hello(self, hello: Hello) -> None:
        """An agent is there. When all are, an attempt can start."""
        self._crew.joined(hello, self._clock())
        if self._crew.is_complete:
            shards, num_workers = self._spec.train.shards, self._crew.num_workers
            self._pace = Pace([len(shard_block(shards, num_workers, rank)) for rank in range(num_workers)])

    def _start_attempt(self) -> None:
        self._attempt = self._record.state.attempts
        self._record.state.attempts += 1
        self._finished, self._trains, self._refused = set(), False, None
        self._saves.attempt_started(self._crew.num_workers)
        self._failures.attempt_started(self._crew.num_workers)
        self._ledger.workers_there(self._clock())
        self._pace.restarted()
        self._record.event(
            "attempt_started",
            attempt=self._attempt,
            workers=[
                {"rank": rank, "node": agent.node, "address": agent.address, "pid": agent.pid}
                for rank, agent in sorted(self._crew.agents.items())
            ],
        )
        self._crew.group.order(
            attempt=self._attempt,
            agents=frozenset(agent.id for agent in self._crew.agents.values()),
            host=self._crew.host,
            meeting_port=None,
            stop=self._stop_reason is not None,
        )
        self._display.phase("building the model on the workers")

    def _on_environments(self, compared: EnvironmentsCompared) -> None:
        """Records what the bits of this attempt depend on, and warns, once, of differences that may change them."""
        workers = compared.workers
        if compared.is_refused:  # they end, and say why
            self._refused = compared
            return
        self._workers = workers
        self._record.event("environment", workers=workers)
        if self._first_workers is None:
            self._first_workers = workers
        news = {
            "workers differ": compared.differences,
            "the run began on other workers": changes(self._first_workers, workers),
        }
        for what, how in news.items():
            if how and how not in self._warned_of:
                self._warned_of.add(how)
                self._display.warn(f"{what}: {how}; the bits may differ from an undisturbed run's")

    def _on_started(self, rank: int, started: TrainingStarted) -> None:
        if rank == 0:
            self._trains, self._is_first_start = True, False
            self._began_at = started.step
            self._ledger.training_began(self._clock(), started.spent)
            self._record.begins_at(started.step)
            self._saves.training_began(self._clock())

    def _on_fell_back(self, fell_back: FellBack) -> None:
        self._record.fell_back(fell_back.step, fell_back.defect)
        self._display.warn(f"{fell_back.defect}; the checkpoint before it is used")

    def _on_row(self, logged: RowLogged) -> None:
        self._note_step()
        self._ledger.told(logged.spent)
        self._record.row(logged.row, logged.time)

    def _on_time_spent(self, rank: int, told: TimeSpent) -> None:
        self._note_step()
        for news in self._pace.heard(rank, told.step, told.spent):
            kind = "worker_recovered" if news.what is None else "worker_slow"
            node = self._crew.agents[news.rank].address
            self._record.event(kind, step=told.step, rank=news.rank, node=node, what=news.what, factor=news.factor)
            tell = self._display.message if news.what is None else self._display.warn
            tell(f"{self._crew.where(news.rank)} {news.text}")

    def _note_step(self) -> None:
        """The workers that are there have done a step: they are what others have to be like."""
        if self._workers is not self._last_workers and changes(self._last_workers, self._workers):
            self._crew.forget()
        self._crew.trains()
        self._last_workers = self._workers

    def _on_step_event(self, event: StepEvent) -> None:
        self._record.event(event.kind, step=event.step, reason=event.reason)
        self._display.message(f"step {event.step}: {event.kind.replace('_', ' ')}: {event.reason}")

    def _on_save_skipped(self, rank: int, skipped: SaveSkipped) -> None:
        """A worker is not ready for a checkpoint, so that all leave it out."""
        step, reason = skipped.step, skipped.reason
        self._saves.left_out(rank, reason)
        self._record.event("checkpoint_left_out", step=step, rank=rank, reason=reason)
        self._display.message(f"step {step}: checkpoint left out: {self._crew.where(rank)}: {reason}")

    def _on_share(self, rank: int, written: ShareWritten) -> None:
        """A worker has written its share of a checkpoint. With the last share it becomes one."""
        whole = self._saves.share(rank, written)
        if whole is None:
            return
        manifest, shares = whole
        best = (written.best_step, written.best_metric)
        spent = shares[0].spent
        seconds = max(other.seconds for other in shares.values())
        self._record.checkpoint(manifest, best, seconds, lambda: self._ledger.saved(spent))

    def _on_finished(self, rank: int, finished: Finished) -> None:
        self._failures.finished(rank)
        self._finished.add(rank)
        self._completed = finished.completed
        if finished.step > self._began_at:
            self._note_step()
        if rank == 0:
            self._ledger.told(finished.spent)
        self._record.reached(finished.step)

    # Workers.

    def _gather(self, now: float) -> None:
        """Starts workers as soon as there is room for them, unless it is too early to try again."""
        if now < self._start_at:
            return
        room = self._crew.room(now)
        if room is None:
            return
        waited_s = 0.0 if room and not self._crew.is_unplaced else self._note_wait(now)
        if room:
            if self._waiting_since is None:
                self._display.phase(_starting(room))
            self._crew.start(room, now)
        elif self._crew.holds_room:
            # While this run waits for more, others may need what its former agents hold. Two runs that each held what
            # the other one waits for would wait for ever.
            self._crew.start(0, now)
        elif self._crew.group.is_shared and waited_s >= _ASK_AFTER_S:
            self._crew.start(self._spec.workers.least, now)

    def _note_wait(self, now: float) -> float:
        """Makes known that room is waited for, and for what; returns for how many seconds by now.

        Raises:
            ClusterError: Longer than that is wanted.
        """
        shortage, limit_s = self._crew.shortage(), self._spec.workers.wait_s
        self._record.state.waits_for = shortage
        if self._waiting_since is None:
            self._waiting_since = now
            self._record.flush()
            self._record.event("waiting", step=self._record.state.step, reason=shortage)
            asked = "; an autoscaler, if there is one, is asked for them" if self._crew.group.is_shared else ""
            self._display.message(f"waiting for workers, for up to {limit_s:g} s: {shortage}{asked}")
        waited_s = now - self._waiting_since
        if waited_s > limit_s:
            raise ClusterError(
                f"{shortage}, after {limit_s:.0f} s of waiting (workers.wait_s); free or add nodes, "
                f"or lower workers.num, then launcher resume {self._run_url}"
            )
        return waited_s

    def _on_agents_placed(self, nodes: Sequence[str]) -> None:
        """Ray has room for the agents that were to start, on these nodes by rank; none: the room is let go of."""
        self._crew.placed(nodes, self._clock())
        if not nodes:
            return
        state, count = self._record.state, len(nodes)
        if state.workers not in (0, count):
            self._record.event("resized", step=state.step, workers=count, before=state.workers)
            self._display.message(f"step {state.step}: going on with {count} workers")
        if self._waiting_since is not None:
            self._display.phase(_starting(count))
        state.workers, state.waits_for, self._waiting_since = count, None, None

    def _regroup(self) -> None:
        """Lets go of the agents; others start as soon as there is room for them, from the newest checkpoint."""
        self._crew.disband()
        self._ledger.waiting(self._clock())
        self._failures.attempt_started(0)
        self._attempt, self._change, self._finished, self._trains, self._refused = _NONE, None, set(), False, None
        self._completed = False  # some may have finished, but the last checkpoint is not whole without the others
        self._record.reached(self._record.saved_step)

    def _plan_change(self, change: Change) -> None:
        """Has the workers save and leave, so that others go on without a step lost; or without, if there is no time."""
        step = self._record.state.step
        self._failures.draining(change.leaving)
        if change.ends_here:
            self._ask_to_stop(f"{change.reason}, and the driver runs on it")
            return
        self._change = change
        left_s = change.leave_by - time.time()
        if left_s < self._record.save_s:
            reason = (
                f"{change.reason}: {max(0.0, left_s):.1f} s are left, and a save takes {self._record.save_s:.1f} s, "
                f"so the checkpoint of step {self._record.saved_step} is relied upon"
            )
            self._record.event("leaving", step=step, reason=reason)
            self._display.warn(reason)
            self._ledger.failed(self._clock())
            self._regroup()
            return
        self._record.event("leaving", step=step, reason=change.reason)
        self._display.message(f"step {step}: {change.reason}: the workers save, then others go on")
        self._crew.group.order(stop=True)

    def _on_agents_lost(self, lost: Mapping[int, str], reason: str) -> None:
        """Ray has lost agents, or could not start them. The others can only be replaced with them."""
        if len(self._finished) == self._crew.num_workers:  # they have done their work, or been let go of
            return
        self._ledger.failed(self._clock())
        self._record.event("agents_lost", step=self._record.state.step, lost=lost, reason=reason)
        if self._change is None:
            self._failures.lost(lost, reason)
        else:
            self._regroup()

    # Failures.

    def _judge(self, now: float) -> None:
        """Does what the failures of workers ask for."""
        verdict = self._failures.verdict(now)
        if verdict is None:
            return
        self._ledger.failed(now)
        self._note_failure(verdict.failure)
        if isinstance(verdict, GiveUp):
            unfit = self._unfit_newcomers(verdict.failure)
            if not unfit:
                raise self._final_error(verdict)
            self._leave_out(unfit, verdict.failure)
            self._regroup()
            return
        what, later = self._described(verdict.failure), f" in {verdict.wait_s} s" if verdict.wait_s else ""
        self._trains = self._is_first_start = False
        if self._stop_reason is not None or self._why_stop(now) is not None:  # others would only be started to stop
            self._display.warn(f"{what}; the run stops at the newest checkpoint")
            self._regroup()
            return
        self._display.warn(f"{what}; starting anew from the newest checkpoint{later}")
        if verdict.needs_agents or self._change is not None:
            self._regroup()
            self._start_at = now + verdict.wait_s
        else:
            self._start_attempt()

    def _unfit_newcomers(self, failure: Failure) -> frozenset[str]:
        """The nodes, by id, that have joined a run that trained without them, and on which it does not train.

        None if others are in the way too, or if nobody is left without them: then the run is to end, and to say why.
        """
        newcomers = self._crew.newcomers()
        if failure.cause != "environment":
            return frozenset()
        if self._refused is not None:
            groups = self._refused.workers
            odd = unlike(self._last_workers, groups)
            if odd or len(groups) == 1:  # all are alike, and have other data than was planned with
                unfit = self._crew.nodes_of(rank for group in odd or groups for rank in group["ranks"])
            else:  # they differ in what those before did not have, such as a module that prepares data
                unfit = newcomers
        elif failure.rank is not None:
            unfit = self._crew.nodes_of(failure.ranks or [failure.rank])
        else:  # Ray does not say which it was
            unfit = newcomers if len(newcomers) == 1 else frozenset()
        return unfit if unfit <= newcomers and self._crew.goes_on_without(unfit) else frozenset()

    def _leave_out(self, nodes: frozenset[str], failure: Failure) -> None:
        """From now on the run does without these nodes."""
        why = failure.message if self._refused is None else f"workers differ: {self._refused.differences}"
        step, named = self._record.state.step, self._crew.leave_out(nodes, why)
        self._record.event("nodes_left_out", step=step, nodes=sorted(nodes), reason=why)
        self._display.warn(
            f"step {step}: going on without {named}, which cannot be used until Ray is started there anew: {why}"
        )
        if self._crew.takes_no_others:
            self._display.warn(
                f"too many nodes have not fitted: no others are taken until launcher resume {self._run_url}"
            )

    def _note_failure(self, failure: Failure) -> None:
        node, address = (None, None) if failure.rank is None else self._crew.place_of(failure.rank)
        told = {
            "cause": failure.cause,
            "rank": failure.rank,
            "node": node,
            "address": address,
            "step": self._step_of(failure),
        }
        self._record.state.failure = told | {"message": failure.message}
        if failure.hang is not None:
            self._record.event("worker_hung", **failure.hang)
        if failure.rank is not None:
            last = {"log_tail": failure.log_tail} if failure.log_tail else {}
            self._record.event("worker_lost", **told, reason=failure.message, **last)

    def _described(self, failure: Failure) -> str:
        """A failure in a line: where, what, when."""
        if failure.rank is None:
            return failure.message
        return f"{self._crew.where(failure.rank)}: {failure.message} at step {self._step_of(failure)}"

    def _step_of(self, failure: Failure) -> int:
        """The steps completed by then, as the later of two says: what an agent knows is a second old."""
        return max(self._record.state.step, failure.step or 0)

    def _final_error(self, verdict: GiveUp) -> LauncherError:
        """What the run ends with: what happened, what to do, where more is told, and what is left."""
        failure, step = verdict.failure, self._record.saved_step
        what = f"{self._described(failure)}, {verdict.why}" if verdict.why else self._described(failure)
        has_log = failure.rank is not None and self._attempt != _NONE and not failure.traceback
        log = f"see {self._run_url}/logs, attempt {self._attempt}, worker {failure.rank}" if has_log else ""
        saved = f"the newest checkpoint is of step {step}" if step else "there is no checkpoint yet"
        line = "; ".join(part for part in (what, verdict.advice, log, saved) if part)
        return failure.error(line, traceback=failure.traceback or failure.log_tail)

    # Time.

    def _check_time(self) -> None:
        now = self._clock()
        self._record.tend()
        self._record.state.worker_hours += self._crew.num_placed * (now - self._checked_at) / 3600
        self._checked_at = now
        self._account(now)
        self._warn_if_overdue(now)
        if now - self._flushed_at > STATUS_INTERVAL_S:
            self._flushed_at = now
            self._record.flush()
        if self._record.is_settled:
            self._judge(now)
        if self._interrupts > 1:
            raise Interrupted(f"abandoned at step {self._record.state.step}; launcher resume {self._run_url}")
        reason = self._why_stop(now)
        if reason is not None and self._stop_reason is None:
            self._ask_to_stop(reason)
        self._see_to_workers(now)

    def _warn_if_overdue(self, now: float) -> None:
        """Says once that no checkpoint comes, and who holds it up."""
        step, saved_step = self._record.state.step, self._record.saved_step
        overdue = self._saves.overdue(now, step=step, saved_step=saved_step)
        if overdue is None:
            return
        self._record.event(
            "checkpoint_overdue", step=step, saved_step=saved_step, ranks=overdue.ranks, reason=overdue.reason
        )
        who = listed([self._crew.where(rank) for rank in overdue.ranks])
        what = f"{who}: {overdue.reason}" if who else overdue.reason
        self._display.warn(
            f"step {step}: no checkpoint has come since step {saved_step}: {what}; check the connection to the store, "
            "or raise checkpoint.every_steps"
        )

    def _account(self, now: float) -> None:
        """Brings up to date what is counted in time."""
        state = self._record.state
        state.seconds = self._seconds_before + now - self._started_at
        state.time, state.unsaved = self._ledger.parts(now), self._ledger.unsaved()
        state.failures = {str(kind): count for kind, count in self._failures.counts.items()}

    def _see_to_workers(self, now: float) -> None:
        """Starts workers where there are none, and sees whether others would be better than those that train."""
        have_left = self._change is not None and len(self._finished) == self._crew.num_workers
        if have_left and self._record.is_settled:
            self._ledger.parked(now)
            self._regroup()  # all have saved
        if not self._crew.num_workers:
            if self._stop_reason is None:
                self._gather(now)
        elif not self._crew.is_complete:
            late = self._crew.late(now)
            if late and self._record.is_settled:  # else it cannot be judged yet, and they may come
                self._on_agents_lost({}, late)
        elif self._record.is_settled and (silent := self._crew.silent(now)):
            self._on_agents_lost(silent, "")
        elif self._attempt == _NONE and self._record.is_settled:
            self._start_attempt()
        elif self._trains and self._change is None and self._stop_reason is None:
            change = self._crew.change(now)
            if change is not None:
                self._plan_change(change)

    def _ask_to_stop(self, reason: str) -> None:
        """Has the workers save and end; if none trains there is nothing to save, and the run ends at once."""
        self._stop_reason = reason
        self._record.event("stop_requested", step=self._record.state.step, reason=reason)
        if self._trains:
            self._display.message(f"{reason}: the workers finish their step and save; Ctrl-C twice abandons that")
            self._crew.group.order(stop=True)
        else:
            self._display.message(f"{reason}: no worker trains, the run stops at the newest checkpoint")
            self._regroup()

    def _why_stop(self, now: float) -> str | None:
        """Why the run should stop, if it should.

        A limit that passes during the first start waits for the workers' first step: one that is shorter than a start
        would otherwise let no ``resume`` get anywhere. That start has limits of its own; where it fails, or while there
        is no room for workers, nobody makes progress, and the limit ends the run without a step.
        """
        limit = self._spec.train.max_seconds
        if self._interrupts:
            return "stopping on a signal"
        if self._record.is_stop_requested:
            return "stopping as asked by launcher stop"
        if self._is_first_start and self._waiting_since is None:
            return None
        if limit is not None and now - self._started_at > limit:
            return f"stopping at train.max_seconds={limit:g}"
        budget = self._spec.workers.max_worker_hours
        if budget is not None and self._record.state.worker_hours > budget:
            return f"stopping at workers.max_worker_hours={budget:g}"
        return None

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a stop; the second one does not wait for it."""

        def count(*_: object) -> None:
            self._interrupts += 1

        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, status: str, error: LauncherError | None = None) -> None:
        now = self._clock()
        self._ledger.ended(now, kept=error is None)
        self._account(now)
        self._record.close(status, error, lambda: self._interrupts > 1)


def _starting(num_workers: int) -> str:
    return f"starting {num_workers} worker{'s' * (num_workers > 1)}"


def make_task(spec: JobSpec, run: RunDirectory, code: UserCode, *, data_fingerprint: str, may_differ: bool) -> Task:
    """What every training process of the run is told."""
    return replace(
        code.task(ENTRY, run.url, spec),
        hang_timeout_s=spec.workers.hang_timeout_s,
        first_step_timeout_s=spec.workers.first_step_timeout_s or math.inf,
        data_fingerprint=data_fingerprint,
        may_differ=may_differ or not spec.train.exact,
    )
