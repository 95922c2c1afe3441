"""Keep a restart off a lost GPU: leave out its node if the run can do without it."""

from collections import Counter

from jobs.spec import WorkersSpec
from launcher.driver.membership import Membership
from launcher.driver.run_log import RunLog
from launcher.driver.verdicts import Failure


class LostGpus:
    """Counts the GPUs that were lost by node.

    Ray cannot be told which GPU of a node to give to an agent, so only the whole node can be left out.
    """

    def __init__(self, workers: WorkersSpec, membership: Membership, run_log: RunLog) -> None:
        """Only assigns."""
        self._workers = workers
        self._membership = membership
        self._run_log = run_log
        self._losses: Counter[str] = Counter()

    def leave_out_node(self, failure: Failure) -> str:
        """Leave out the node of a lost GPU if the others have room; return what is done, for a message.

        The first loss leaves a node out if the run keeps its size, as the other GPUs of the node still work; the second
        one if the run can go on at all.
        """
        if failure.cause != "gpu_lost" or failure.rank is None:
            return ""
        membership = self._membership
        node, address = membership.place_of(failure.rank)
        if node is None:
            return ""
        self._losses[node] += 1
        needed = membership.num_workers if self._losses[node] == 1 else self._workers.least
        room = membership.room_without(node)
        if room < needed:
            return (
                f", where Ray may give out the same GPU again: the other nodes have room for {room} of {needed} workers"
            )
        membership.avoid(node, failure.message)
        self._run_log.event(
            "nodes_left_out", step=self._run_log.state.step, nodes=[node], reason=f"GPU lost: {failure.message}"
        )
        return f", without node {address or node} until Ray is started there anew or the run is resumed"
