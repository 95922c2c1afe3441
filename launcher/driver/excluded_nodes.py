"""Nodes that the next try of a batch job should do without: the driver tells its scheduler which ones."""

from cluster.errors import Cause, listed
from cluster.host.batch_job import BatchJob
from launcher.driver.membership import Membership
from launcher.driver.run_log import RunLog
from launcher.driver.stop_conditions import Stop
from launcher.driver.verdicts import Failure

_OF_NODES: tuple[Cause, ...] = ("gpu_lost", "node_lost")
"""Causes for which the node of a worker is held responsible, as it is for a worker that does not respond or end."""


class ExcludedNodes:
    """The nodes that this driver holds responsible for failures of its batch job."""

    def __init__(self, job: BatchJob, membership: Membership, run_log: RunLog) -> None:
        """Only assigns."""
        self._job = job
        self._membership = membership
        self._run_log = run_log
        self._told: set[str] = set()
        """The addresses that the scheduler was told."""
        self._hangs: set[tuple[int | None, str]] = set()
        """At which step and in which phase workers that do not respond hung."""
        self.attempt_started()

    def attempt_started(self) -> None:
        """Forget the failures before: there is room for workers without the nodes that were lost."""
        self._addresses: list[str] = []
        """The addresses of the nodes that are responsible for the failure for which there are no workers."""
        self._failure: Failure | None = None

    def note(self, failure: Failure) -> None:
        """Tell the scheduler which nodes are responsible for a failure, if any are, each once."""
        path = self._job.lost_nodes_path
        if path is None:
            return
        for node, address in self._responsible(failure).items():
            if address is None:
                continue
            if address not in self._told:
                try:
                    self._job.exclude(address)
                except OSError as error:
                    self._run_log.display.warn(
                        f"{path}: {error.strerror}; the next try of this job may get node {address} again"
                    )
                    continue
                self._told.add(address)
                self._run_log.event(
                    "excluded", step=self._run_log.state.step, address=address, node=node, cause=failure.cause
                )
            self._addresses.append(address)
            self._failure = failure

    def stop_after(self, failure: Failure) -> Stop | None:
        """Return how the run stops at a failure that would end it; None: it ends with the failure."""
        return self.stop_for_others() if failure is self._failure or failure.cause == "not_started" else None

    def stop_for_others(self) -> Stop | None:
        """Return how the run stops if it cannot go on with the nodes that it has; None: the next try would get these.

        The nodes of a batch job are fixed, so nodes that are lost come back only in its next try.
        """
        if not self._addresses or not self._job.requeues:
            return None
        why = f"to go on without node{'s' * (len(self._addresses) > 1)} {listed(self._addresses)}"
        return Stop(f"stopping {why}", requeued=why)

    def _responsible(self, failure: Failure) -> dict[str | None, str | None]:
        """Return the addresses of the nodes that are responsible for a failure, by node id.

        If all nodes are concerned at once, none is; nor is one on which a worker does not respond at a place at which
        one did not before, because code that keeps Python's lock looks the same. If several nodes are lost at once, and
        they are all but the driver's own, that one may be cut off.
        """
        if failure.rank is None or failure.is_common or not self._is_of_nodes(failure):
            return {}
        membership = self._membership
        places = dict(membership.place_of(rank) for rank in failure.ranks or [failure.rank])
        nodes = membership.nodes_of(range(membership.num_workers))
        if len(places) == 1:
            return {} if failure.is_silent and len(nodes) <= 1 else places
        node = membership.own_node()
        own: dict[str | None, str | None] = {node.id: node.address} if node else {}
        if nodes - own.keys() - places.keys():
            return places
        return own if failure.cause == "node_lost" and not own.keys() & places.keys() else {}

    def _is_of_nodes(self, failure: Failure) -> bool:
        if failure.is_silent and failure.hang is not None:
            where = (failure.hang["step"], failure.hang["doing"])
            if where in self._hangs:
                return False
            self._hangs.add(where)
        return failure.cause in _OF_NODES or failure.is_silent or failure.is_unkillable
