"""Nodes that the next try of a batch job should do without: the driver tells its scheduler which ones."""

from cluster.errors import Cause, listed
from cluster.host.batch_job import BatchJob
from launcher.driver.membership import Membership
from launcher.driver.run_log import RunLog
from launcher.driver.stop_conditions import Stop
from launcher.driver.verdicts import Failure

_OF_NODES: tuple[Cause, ...] = ("gpu_lost", "node_lost", "hung")
"""Causes for which the node of a worker is held responsible."""
_FOR_WANT_OF_NODES: tuple[Cause, ...] = (*_OF_NODES, "not_started")
"""Causes of which a job on other nodes may be free."""


class ExcludedNodes:
    """The nodes that this driver holds responsible for failures of its batch job."""

    def __init__(self, job: BatchJob, membership: Membership, run_log: RunLog) -> None:
        """Only assigns."""
        self._job = job
        self._membership = membership
        self._run_log = run_log
        self._addresses: list[str] = []

    def note(self, failure: Failure) -> None:
        """Tell the scheduler which nodes are responsible for a failure, if any are, each once.

        The user's code is responsible for a failure at a place in it, and if all nodes are concerned at once, none is.
        """
        path = self._job.lost_nodes_path
        if path is None or failure.cause not in _OF_NODES or failure.rank is None or failure.place or failure.is_common:
            return
        membership = self._membership
        places = dict(membership.place_of(rank) for rank in failure.ranks or [failure.rank])
        if 1 < len(places) >= len({agent.node for agent in membership.agents.values()}):
            return
        for node, address in places.items():
            if address is None or address in self._addresses:
                continue
            try:
                with path.open("a") as file:
                    file.write(f"{address}\n")
            except OSError as error:
                self._run_log.display.warn(
                    f"{path}: {error.strerror}; the next try of this job may get node {address} again"
                )
                continue
            self._addresses.append(address)
            self._run_log.event(
                "excluded", step=self._run_log.state.step, address=address, node=node, cause=failure.cause
            )

    def stop_after(self, failure: Failure) -> Stop | None:
        """Return how the run stops at a failure that would end it; None: it ends with the failure."""
        is_of_nodes = failure.cause in _FOR_WANT_OF_NODES and not failure.place and not failure.is_common
        return self.stop_for_others() if is_of_nodes else None

    def stop_for_others(self) -> Stop | None:
        """Return how the run stops if it cannot go on with the nodes that it has; None: the next try would get these.

        The nodes of a batch job are fixed, so nodes that are lost come back only in its next try.
        """
        if not self._addresses or not self._job.requeues:
            return None
        why = f"to go on without node{'s' * (len(self._addresses) > 1)} {listed(self._addresses)}"
        return Stop(f"stopping {why}", requeued=why)
