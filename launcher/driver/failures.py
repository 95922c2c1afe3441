"""Failure policy: turn the reports of failed workers into one verdict: cause, responsible party, restart or stop.

One failure causes many reports: workers that lose a peer fail too, and workers that wait for a hung one make no
progress either. This module has no side effects, and gets the time as a number.
"""

import signal
from collections.abc import Collection, Mapping
from dataclasses import replace

from cluster.errors import (
    Cause,
    ClusterError,
    listed,
)
from cluster.gpu_errors import gpu_error
from cluster.process.messages import DOING, Exited, Failed, Hung, Unkillable
from jobs.spec import MaxFailuresSpec
from launcher.driver.ended_processes import NCCL, gpu_error_of_abort, innermost, of_exit, of_unkillable, with_assertion
from launcher.driver.verdicts import Failure, GiveUp, Kind, TryAgain

_LONGEST_BACK_OFF_S = 60
"""Longest pause between consecutive failed starts of agents, or lost GPUs; the first is one second, then it doubles."""
_LAST_WORDS_S = 5.0
"""How long to wait for the other workers' reports after a failure: for its cause, if a peer was lost, or for a save."""
_CONSEQUENCES: tuple[Cause, ...] = ("exchange_timeout", "connection_lost")
"""Causes that follow from another worker's loss or hang; they count only if no worker reports another cause."""
_IN_FIRST_STEP = {
    "start": "importing, or building model and data sets",
    "restore": "reading the checkpoint",
    "data": "reading the first batch",
    "forward": "in the first forward pass, where torch.compile compiles",
    "backward": "in the first backward pass, where torch.compile compiles",
    "exchange": "waiting for the others",
}
"""What a process does that has not completed its first step, by progress mark."""
_EXCHANGING = ("backward", "exchange")
"""Progress marks at which workers communicate."""
_WITH_KERNELS = ("forward", *_EXCHANGING)
"""Progress marks at which GPUs compute and communicate."""
_WHOSE_KERNEL = ": on GPUs, one whose kernel hangs looks like those that wait for it, so another may be the cause"
_FIND_KERNEL = (
    "look for Xid in dmesg on every node; to find the worker, set TORCH_NCCL_DUMP_ON_TIMEOUT=1 and workers.timeout_s "
    "below workers.hang_timeout_s, then NCCL's flight recorder shows who did not join in; if all were at work, raise "
    "workers.hang_timeout_s; then resume"
)
"""Advice for a hang of GPUs that stand alike."""
_SIGNS_OF_LOSS: dict[str, Cause] = {
    "running low on memory": "out_of_memory",  # Ray's memory monitor
    "node was preempted": "preempted",
    "by node preemption": "preempted",
    "node was terminated expectedly": "preempted",
    "node was terminated": "node_lost",
    "node has died": "node_lost",
    "is unavailable": "node_lost",  # alive according to Ray, and unreachable
    "No module named": "environment",
    "cannot import name": "environment",
    "Can't get attribute": "environment",  # of a module in another version
    "TMPDIR: ": "environment",  # of an agent that cannot make files or sockets in its temporary folder
    "has said nothing": "hung",  # stopped or disconnected, and Ray has not noticed
    "has been hanging": "hung",  # from Ray Train's health check
}
"""Phrases in Ray's reasons for a lost agent, the most specific first; without one of them its process died."""
_KINDS_OF_LOSS: dict[Cause, Kind | None] = {"preempted": "preemption", "environment": None}
"""Who is responsible for the loss of an agent; for causes not listed, the machine."""
_TAKEN_AWAY: tuple[Cause, ...] = ("killed", "gpu_lost", "node_lost", "fork_server_lost", "hung", *_CONSEQUENCES)
"""Causes that count as preemption while the worker's node is being drained."""


class Failures:
    """Collects the reports of the current attempt, and counts the failures of all attempts."""

    def __init__(self, max_failures: MaxFailuresSpec) -> None:
        self._max_failures = max_failures
        self.counts: dict[Kind, int] = {"machine": 0, "preemption": 0, "code": 0}
        """Number of failures so far, by responsible party."""
        self._places: set[str] = set()
        """Steps and lines at which the code has failed."""
        self._failed_starts = 0
        """Consecutive failed starts of agents."""
        self._lost_gpus = 0
        """Consecutive failures of GPUs, without one of another cause between them."""
        self.attempt_started(0)

    def attempt_started(self, num_workers: int) -> None:
        """Forget the reports of earlier processes; there are ``num_workers`` now, 0 while agents start."""
        self._num_workers = num_workers
        if num_workers:
            self._failed_starts = 0
        self._fatal: tuple[int, Failed] | None = None
        self._broken: dict[int, Failed] = {}
        self._exits: dict[int, Exited] = {}
        self._lost: dict[int, str] = {}
        self._all_lost = ""
        self._hung: dict[int, Hung] = {}
        self._unkillable: dict[int, Unkillable] = {}
        self._finished: set[int] = set()
        self._draining: set[int] = set()
        self._waits_since: float | None = None

    def failed(self, rank: int, failed: Failed) -> None:
        """Take a worker's report why it ends. If that is a lost peer, wait for a report of the cause."""
        if failed.cause in _CONSEQUENCES:
            self._broken[rank] = failed
        elif self._fatal is None:
            self._fatal, self._waits_since = (rank, failed), None

    def exited(self, rank: int, exited: Exited) -> None:
        """Take an agent's report how its training process ended."""
        self._exits[rank] = exited
        if exited.exit_code is None:  # its other reports follow from that, such as lost loader processes
            self._broken.pop(rank, None)
            if self._fatal is not None and self._fatal[0] == rank:
                self._fatal = None
        elif gpu_error_of_abort(exited) is not None:
            self._broken.pop(rank, None)  # it reported what followed from the error of its GPU
        elif exited.exit_code == -signal.SIGABRT and NCCL in exited.log_tail:
            self._broken[rank] = Failed(
                error=ClusterError,
                cause="exchange_timeout" if "operation timeout" in exited.log_tail else "connection_lost",
                message="NCCL aborted it",
                step=exited.step,
                place="",
                traceback="",
            )

    def hung(self, rank: int, hung: Hung) -> None:
        """Take the report that a worker makes no progress; the workers that wait for it report the same."""
        self._hung[rank] = hung

    def recovered(self, rank: int) -> None:
        """Take the report that a hung worker makes progress again."""
        self._hung.pop(rank, None)

    def unkillable(self, report: Unkillable) -> None:
        """Take an agent's report that it cannot start its training process, because the one before does not end."""
        self._unkillable[report.rank] = report

    def finished(self, rank: int) -> None:
        """Take the report that a worker has finished; the end of its process is no failure then."""
        self._finished.add(rank)

    def lost(self, lost: Mapping[int, str], reason: str) -> None:
        """Record lost agents, whose training processes are lost too.

        Args:
            lost: The reason for each, by rank; empty: all agents are lost, or did not start.
            reason: The reason, if ``lost`` is empty.
        """
        self._lost |= lost
        if not lost:
            self._all_lost = reason or "Ray does not say why"

    def draining(self, ranks: Collection[int]) -> None:
        """Record that the nodes of these workers are being drained, so that their loss counts as preemption."""
        self._draining.update(ranks)

    def verdict(self, now: float) -> TryAgain | GiveUp | None:
        """Return what to do; None: nothing, or more reports are awaited.

        Counts the failure each time: act on a verdict before asking for the next.
        """
        failure = self._first_failure(now)
        if failure is None:
            return None
        is_gpu_lost = failure.cause == "gpu_lost"
        if failure.rank in self._draining and failure.cause in _TAKEN_AWAY:
            message = f"its node was being drained: {failure.message}"
            failure = replace(failure, cause="preempted", kind="preemption", message=message, place="")
        if failure.kind is None:
            return GiveUp(failure)
        self.counts[failure.kind] += 1
        if failure.place in self._places:
            return GiveUp(failure, "for the second time")
        limit: int | None = getattr(self._max_failures, failure.kind)
        if limit is not None and self.counts[failure.kind] > limit:
            return GiveUp(failure, f"and workers.max_failures.{failure.kind}={limit} is used up")
        if failure.place:
            self._places.add(failure.place)
        # Ray gives an agent its GPU, so only another agent may get another one.
        needs_agents, wait_s = is_gpu_lost or bool(self._lost or self._all_lost or self._unkillable), 0
        if needs_agents and not self._num_workers:
            wait_s = min(2**self._failed_starts, _LONGEST_BACK_OFF_S)
            self._failed_starts += 1
        elif is_gpu_lost:  # it may be the same GPU, which another process uses, or whose driver is still starting
            wait_s = min(2**self._lost_gpus, _LONGEST_BACK_OFF_S)
        self._lost_gpus = self._lost_gpus + 1 if is_gpu_lost else 0
        return TryAgain(failure, needs_agents, wait_s)

    def _first_failure(self, now: float) -> Failure | None:
        if self._waits_since is None and (self._fatal or self._broken):
            self._waits_since = now
        has_waited = self._waits_since is not None and now - self._waits_since > _LAST_WORDS_S
        if self._fatal is not None:
            all_ended = len(self._exits.keys() | self._lost.keys()) == self._num_workers
            return self._of_exception(*self._fatal) if all_ended or has_waited else None
        if self._lost:
            return self._of_agents()
        if self._all_lost:
            return self._of_all_agents(self._all_lost)
        if self._unkillable:
            return of_unkillable(*next(iter(self._unkillable.items())))
        for rank, exited in self._exits.items():
            if rank not in self._finished | self._broken.keys():
                return of_exit(rank, exited)
        if any(hung.is_silent for hung in self._hung.values()) or 0 < self._num_workers == len(self._hung):
            return self._of_hang()  # a worker that does not report a hang works, and the others wait for it
        return self._of_exchange() if self._broken and has_waited else None

    def _of_exception(self, rank: int, failed: Failed) -> Failure:
        """Return the failure that a worker reports of itself; the code is at fault if a place in it is named."""
        cause, place = failed.cause, failed.place
        kind: Kind | None = "code" if place else None
        if cause == "gpu_lost":
            kind = "machine"
        elif cause == "crash" and rank in self._exits and self._exits[rank].oom_kill:
            cause, kind, place = "out_of_memory", "machine", ""  # of a loader process
        broken = gpu_error(failed.message)
        log = self._exits[rank].log_tail if rank in self._exits and broken is not None else ""
        return Failure(
            cause=cause,
            message=with_assertion(failed.message, log),
            kind=kind,
            rank=None if failed.step is None else rank,
            step=failed.step,
            error=failed.error,
            place=place,
            traceback=failed.traceback,
            advice="" if broken is None else broken.advice,
        )

    def _of_agents(self) -> Failure:
        """Return the failure of the lost agent whose reason is the most specific."""
        otherwise: Cause = "killed" if self._num_workers else "not_started"
        causes = {rank: _cause_of_loss(reason, otherwise) for rank, reason in self._lost.items()}
        telling = [*_SIGNS_OF_LOSS.values(), otherwise]
        rank = min(causes, key=lambda rank: (telling.index(causes[rank]), rank))
        kind = _KINDS_OF_LOSS.get(causes[rank], "machine")
        ranks = frozenset(other for other, cause in causes.items() if cause == causes[rank])
        cause = causes[rank]
        return Failure(
            cause=cause, message=self._lost[rank], kind=kind, rank=rank, ranks=ranks, is_silent=cause == "hung"
        )

    def _of_all_agents(self, reason: str) -> Failure:
        """Return the failure of agents that did not start, or that Ray ended together."""
        cause = _cause_of_loss(reason, "killed" if self._num_workers else "not_started")
        what = "the workers were lost" if self._num_workers else "the workers did not start"
        return Failure(cause=cause, message=f"{what}: {reason}", kind=_KINDS_OF_LOSS.get(cause, "machine"), rank=None)

    def _of_hang(self) -> Failure:
        """Return the failure of the worker that the others wait for: a silent one, or else the one furthest behind."""
        ranks = sorted(self._hung, key=lambda rank: (self._hung[rank].step, DOING.index(self._hung[rank].doing)))
        silent = [rank for rank in ranks if self._hung[rank].is_silent]
        rank = (silent or ranks)[0]
        found = self._hung[rank]
        step, doing, line = found.step, found.doing, innermost(found.stack)
        what = f"no progress for {found.for_s:.0f} s in {doing}"
        if found.is_first_step:
            what = f"has not done its first step after {found.for_s:.0f} s, {_IN_FIRST_STEP.get(doing, doing)}"
        places = {(hung.step, hung.doing) for hung in self._hung.values()}
        are_alike = not silent and len(ranks) > 1 and len(places) == 1
        may_wait = are_alike and not found.is_first_step
        # The host waits at any line for its GPU, and the kernels there for those of the others, or for a hung one.
        is_blurred = may_wait and found.on_gpu and doing in _WITH_KERNELS
        is_stuck = may_wait and doing in _EXCHANGING and not is_blurred
        if line:
            what += f", {line}"
        if are_alike:
            what += ", and so for all" + ": what they exchange is stuck" * is_stuck + _WHOSE_KERNEL * is_blurred
        if found.data_delay:
            what += f"; it waits for data: {found.data_delay}"
        return Failure(
            cause="exchange_timeout" if is_stuck else "hung",
            message=what,
            rank=rank,
            ranks=frozenset(silent),
            is_common=are_alike,
            is_silent=bool(silent) and not found.data_delay,
            step=step,
            # Two first steps that hang at the same line are no accident: the second one ends the run.
            place=f"first step after {step}, {doing}, {line}" if found.is_first_step and line and not silent else "",
            limit="workers.first_step_timeout_s" if found.is_first_step else "workers.hang_timeout_s",
            advice=_FIND_KERNEL if is_blurred else "",
            hang={
                "rank": rank,
                "step": step,
                "doing": doing,
                "is_first_step": found.is_first_step,
                "for_s": found.for_s,
                "stack": found.stack,
                "waiting": sorted(self._hung.keys() - {rank}),
            },
        )

    def _of_exchange(self) -> Failure:
        """Return the failure of a broken exchange without a reported cause.

        If every other worker timed out waiting for one that is silent, that one hangs.
        """
        rank, first = next(iter(self._broken.items()))
        silent = sorted(set(range(self._num_workers)) - self._broken.keys() - self._exits.keys())
        if silent and all(failed.cause == "exchange_timeout" for failed in self._broken.values()):
            others = f"worker{'s' * (len(self._broken) > 1)} {listed(sorted(self._broken))}"
            what = f"says nothing, and {others} waited for it in vain: {first.message}"
            return Failure(
                cause="hung",
                message=what,
                rank=silent[0],
                is_common=len(silent) > 1,
                step=first.step,
                limit="workers.timeout_s",
            )
        what = f"no worker says more than: {first.message}"
        return Failure(cause=first.cause, message=what, rank=rank, step=first.step)


def _cause_of_loss(reason: str, otherwise: Cause) -> Cause:
    return next((cause for sign, cause in _SIGNS_OF_LOSS.items() if sign in reason), otherwise)
