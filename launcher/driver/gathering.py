"""Start workers as soon as there is room for them, and report what is missing until then."""

from collections.abc import Sequence

from cluster.errors import ClusterError
from cluster.host.batch_job import BatchJob
from jobs.spec import WorkersSpec
from launcher.driver.membership import Membership
from launcher.driver.run_log import RunLog

_ASK_AFTER_S = 10.0
"""How long there is too little room before Ray is asked to place the workers anyway.

Then the run waits in Ray's queue, and an autoscaler starts nodes for what Ray cannot place. Ray Train's own request to
the autoscaler is not enough: nodes that other jobs use satisfy it, and a request that exceeds the limit together with
those of others starts no node.
"""
_PLACED_AFTER_S = 300.0
"""How long Ray may find no room on nodes that are fixed though there is some, such as while former processes end."""


class Gathering:
    """Waits for room for the workers of a run. Times are passed in, in seconds of a monotonic clock."""

    def __init__(
        self, workers: WorkersSpec, run_url: str, membership: Membership, run_log: RunLog, job: BatchJob
    ) -> None:
        """Only assigns."""
        self._workers = workers
        self._run_url = run_url
        self._membership = membership
        self._run_log = run_log
        self._are_nodes_fixed = job.lost_nodes_path is not None
        self._waiting_since: float | None = None
        self.start_at = 0.0
        """Start no workers before this time."""

    @property
    def waits(self) -> bool:
        """Whether the run waits for room."""
        return self._waiting_since is not None

    @property
    def _limit_s(self) -> float:
        """How long to wait for room; it gets longer once Ray could not place workers for which there is some."""
        if not self._are_nodes_fixed:
            return self._workers.wait_s
        return min(_PLACED_AFTER_S if self._membership.is_unplaced else _ASK_AFTER_S, self._workers.wait_s)

    def gather(self, now: float) -> ClusterError | None:
        """Start workers if there is room for them, unless it is too early to try again.

        Returns:
            What is missing, if there has been no room for longer than ``workers.wait_s``, or so long that no more comes
            because the nodes are fixed. None: it is not known yet whether there is room.
        """
        if now < self.start_at:
            return None
        membership = self._membership
        room = membership.room(now)
        if room is None:
            return None
        waited_s = 0.0 if room and not membership.is_unplaced else self._note_wait(now)
        if waited_s > self._limit_s:
            return self._shortage_error()
        if room:
            if not self.waits:
                self._run_log.display.phase(_starting(room))
            membership.start(room, now)
        elif membership.holds_room:
            # Release the places of former agents while waiting for more: two runs that each hold what the other one
            # waits for would be deadlocked.
            membership.start(0, now)
        elif membership.group.is_shared and waited_s >= _ASK_AFTER_S:
            membership.start(self._workers.least, now)
        return None

    def placed(self, nodes: Sequence[str], now: float) -> None:
        """Record the nodes, by rank, on which Ray has placed the agents; empty: they have released their places."""
        self._membership.placed(nodes, now)
        if not nodes:
            return
        state, count = self._run_log.state, len(nodes)
        if state.workers not in (0, count):
            self._run_log.event("resized", step=state.step, workers=count, before=state.workers)
            self._run_log.display.message(f"step {state.step}: going on with {count} workers")
        if self.waits:
            self._run_log.display.phase(_starting(count))
        state.workers, state.waits_for, self._waiting_since = count, None, None

    def _note_wait(self, now: float) -> float:
        """Report that the run waits for room, and for what; return how long it has waited, in seconds."""
        shortage, limit_s = self._membership.shortage(), self._limit_s
        run_log = self._run_log
        run_log.state.waits_for = shortage
        if self._waiting_since is None:
            self._waiting_since = now
            run_log.flush()
            run_log.event("waiting", step=run_log.state.step, reason=shortage)
            grows = self._membership.group.is_shared and not self._are_nodes_fixed
            asked = "; an autoscaler, if there is one, is asked for them" if grows else ""
            run_log.display.message(f"waiting for workers, for up to {limit_s:g} s: {shortage}{asked}")
        return now - self._waiting_since

    def _shortage_error(self) -> ClusterError:
        shortage = self._membership.shortage()
        if self._are_nodes_fixed:
            return ClusterError(
                f"{shortage}, and a batch job gets no other nodes; submit it again, or with a lower workers.num"
            )
        return ClusterError(
            f"{shortage}, after {self._limit_s:.0f} s of waiting (workers.wait_s); free or add nodes, "
            f"or lower workers.num, then launcher resume {self._run_url}"
        )


def _starting(num_workers: int) -> str:
    return f"starting {num_workers} worker{'s' * (num_workers > 1)}"
