"""Membership: which workers a run has, on which nodes, and how many it should have.

How many it should have follows from ``workers.num`` and from the room in the cluster. Times are passed in: nothing here
reads a clock.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from cluster.capacity import Node
from cluster.errors import listed
from cluster.process.agent import HERE_INTERVAL_S
from cluster.process.messages import Hello, StillHere
from cluster.process.orders import LOOPBACK
from cluster.ray.cluster import PLACEMENT_TIMEOUT_S
from cluster.ray.worker_group import WorkerGroup
from jobs.spec import WorkersSpec
from launcher.driver.change import Change
from launcher.driver.steady_room import SteadyRoom

_LOOK_INTERVAL_S = 1.0
"""How often to look for more room, and for nodes that are drained."""
_SETTLE_S = 5.0
"""How long there must be room for more workers before they are started: each change costs a few seconds."""
_PLACEMENT_S = 2 * PLACEMENT_TIMEOUT_S
"""How long Ray may take to place agents or fail to, with the start or the replacement of its controller."""
_LEAST_SILENCE_S = 4 * HERE_INTERVAL_S
"""An agent is silent after this time at the earliest: a limit near its heartbeat interval would find all silent."""
MOST_MISFITS = 10
"""How many joining nodes may turn out unfit before no new ones are used: each costs a save and two starts."""


class Membership:
    """The agents of a run, which the driver starts and replaces as a group."""

    def __init__(self, group: WorkerGroup, workers: WorkersSpec, look: Callable[[], Sequence[Node]]) -> None:
        """Only assigns.

        Args:
            group: Starts and stops the agents.
            workers: The ``workers`` section of the job.
            look: Returns the nodes of the cluster that are alive.
        """
        self.group = group
        self.num_workers = 0
        """The number of agents that were started; 0: none."""
        self.generation = 0
        """The number of the last start; messages of agents of an earlier one are ignored."""
        self.agents: dict[int, Hello] = {}
        """The agents that have joined, by rank, each with its first message."""
        self._workers = workers
        self._look = look
        self._starting_since = -math.inf
        """When the agents were started; once Ray has placed them, when it said so."""
        self._heard_at: dict[int, float] = {}
        """The time of the last heartbeat, by rank."""
        self._held: Counter[str] = Counter()
        """The number of places that agents of this run hold, by node."""
        self._unplaced = 0
        """The number of agents that Ray could not place at the last start; 0: it placed them."""
        self._placed: Sequence[str] = ()
        """The nodes of the last start, by rank, as far as they are known."""
        self._proven: set[str] = set()
        """The ids of nodes on which the current workers have trained; other nodes are newcomers."""
        self._left_out: dict[str, str] = {}
        """Why nodes are not used, by node id."""
        self._num_misfits = 0
        """How many times nodes were left out."""
        self._addresses: dict[str, str] = {}
        """The addresses of all nodes that were ever seen, by node id."""
        self._known_hosts: set[str] = set()
        """The addresses of hosts on which any workers of this run have trained; ``clear_proven`` keeps them."""
        self._looked_at = -math.inf
        self._room_since = math.inf
        """Since when there has been room for more workers."""
        self._steady_room = SteadyRoom()
        """Observed while there are no agents."""

    @property
    def num_placed(self) -> int:
        """The number of current agents that hold a place: all, or 0."""
        return self._held.total() if self.num_workers else 0

    @property
    def holds_room(self) -> bool:
        """Whether agents hold places, including former agents."""
        return bool(self._held)

    @property
    def is_complete(self) -> bool:
        """Whether all agents have joined."""
        return 0 < self.num_workers == len(self.agents)

    @property
    def host(self) -> str:
        """The address at which the other workers reach rank 0."""
        is_one_node = len({agent.node for agent in self.agents.values()}) == 1
        return LOOPBACK if is_one_node else self.agents[0].address

    def where(self, rank: int) -> str:
        """Return the name of a worker for messages, with its node if that is known."""
        _, address = self.place_of(rank)
        return f"worker {rank}" if address is None else f"worker {rank} on node {address}"

    def place_of(self, rank: int) -> tuple[str | None, str | None]:
        """Return the node id and the address of a worker, None if unknown; the agent may not have joined yet."""
        if agent := self.agents.get(rank):
            return agent.node, agent.address
        node = self._node_of(rank)
        return node, None if node is None else self._addresses.get(node)

    def gpu_of(self, rank: int) -> str | None:
        """Return the GPU of a worker, as in CUDA_VISIBLE_DEVICES; None: it has none, or its agent has not joined."""
        return (self.agents[rank].gpu or None) if rank in self.agents else None

    def own_node(self) -> Node | None:
        """Return the node of the driver; None: it is not known."""
        return next((node for node in self._look() if node.is_here), None)

    def joined(self, hello: Hello, now: float) -> None:
        """Record that an agent has joined."""
        self.agents[hello.rank] = hello
        self._heard_at[hello.rank] = now

    def heartbeat(self, here: StillHere, now: float) -> None:
        """Record the heartbeat of an agent; one of a former agent is ignored."""
        agent = self.agents.get(here.rank)
        if agent is not None and agent.id == here.id:
            self._heard_at[here.rank] = now

    def silent(self, now: float) -> dict[int, str]:
        """Return the agents whose heartbeats stopped though Ray has not lost them: suspended, or disconnected.

        Returns:
            What to report of each, by rank.
        """
        limit_s = max(self._workers.hang_timeout_s, _LEAST_SILENCE_S)
        return {
            rank: f"its agent has said nothing for {now - self._heard_at[rank]:.0f} s"
            for rank in self.agents
            if now - self._heard_at[rank] > limit_s
        }

    def placed(self, nodes: Sequence[str], now: float) -> None:
        """Record the node ids on which Ray has placed the agents, by rank; empty: the places are released."""
        self._held = Counter(nodes)
        self._placed = nodes or self._placed
        if nodes:
            self._unplaced, self._starting_since = 0, now
            self.group.release(frozenset(nodes))

    def unplaced(self) -> None:
        """Record that Ray could not place all agents, so that none was started."""
        self._unplaced = self.num_workers
        self.disband()

    @property
    def is_unplaced(self) -> bool:
        """Whether Ray could not place the agents of the last start."""
        return self._unplaced > 0

    def mark_proven(self) -> None:
        """Record that the current agents have completed a step, so that their nodes fit this run."""
        for agent in self.agents.values():
            self._proven.add(agent.node)
            self._known_hosts.add(agent.address)
            self._left_out.pop(agent.node, None)  # it may have joined just as no new nodes were to be used

    def clear_proven(self) -> None:
        """Count all nodes as newcomers again, because workers with another environment train now."""
        self._proven.clear()

    def newcomers(self) -> frozenset[str]:
        """Return the ids of nodes of the last start that joined after the run had trained without them."""
        return frozenset(self._placed) - self._proven if self._proven else frozenset()

    def nodes_of(self, ranks: Iterable[int]) -> frozenset[str]:
        """Return the ids of the nodes of workers of the last start, as far as they are known."""
        return frozenset(node for rank in ranks if (node := self._node_of(rank)) is not None)

    def goes_on_without(self, nodes: frozenset[str]) -> bool:
        """Return whether workers could run without these nodes; after too many misfits only on known hosts."""
        others = [node for node in self._nodes() if node.id not in nodes | self._left_out.keys()]
        if self._num_misfits + 1 >= MOST_MISFITS:
            others = [node for node in others if self._is_known(node)]
        return any(node.most(self.group.resources) for node in others)

    def leave_out(self, nodes: frozenset[str], why: str) -> str:
        """Start no more agents on these nodes; return their names for messages."""
        self._num_misfits += 1
        if self.takes_no_others:  # the software on these hosts has changed
            self._known_hosts -= {self._addresses.get(node, "") for node in nodes}
        self._left_out |= dict.fromkeys(nodes, why)
        return _named([self._addresses.get(node, node) for node in sorted(nodes)])

    def room_without(self, node: str) -> int:
        """Return how many workers fit on the other nodes, including those that they hold."""
        return sum(self._room_on(other) for other in self._nodes() if other.id != node)

    def avoid(self, node: str, why: str) -> None:
        """Start no more agents on a node that has fitted."""
        self._left_out[node] = why

    @property
    def takes_no_others(self) -> bool:
        """Whether agents start only on hosts on which this run has trained, because too many new nodes were unfit."""
        return self._num_misfits >= MOST_MISFITS

    def disband(self) -> None:
        """Forget the agents; others will be started as soon as there is room."""
        self.num_workers, self.agents = 0, {}
        self._looked_at, self._room_since = -math.inf, math.inf
        self._steady_room = SteadyRoom()

    def start(self, num_workers: int, now: float) -> None:
        """Start ``num_workers`` agents in place of the current ones; 0: only end those."""
        self.disband()
        self.num_workers, self._starting_since = num_workers, now
        self._held = Counter()  # former agents release their places, and messages about them are ignored
        self._placed = ()
        if num_workers:
            self._nodes()  # prepare the nodes on which they may be placed
        self.generation = self.group.start(num_workers, frozenset(self._left_out))

    def late(self, now: float) -> str:
        """Return a message about agents that have not joined in time, with their nodes; empty: none is late.

        ``workers.start_timeout_s`` counts from their placement. Until Ray has placed them they also have the time that
        placement may take.
        """
        limit_s = self._workers.start_timeout_s
        if self.is_complete or now - self._starting_since <= limit_s + (0.0 if self._held else _PLACEMENT_S):
            return ""
        if not self._held:
            return (
                f"Ray has placed none of {self.num_workers} agents after {limit_s + _PLACEMENT_S:g} s "
                f"(workers.start_timeout_s and {_PLACEMENT_S:g} s to find room)"
            )
        missing = self._held - Counter(agent.node for agent in self.agents.values())
        addresses = [node.address for node in self._look() if missing[node.id]]
        where = f"; late: {_named(addresses)}" if addresses else ""
        return (
            f"{len(self.agents)} of {self.num_workers} agents were there after {limit_s:g} s "
            f"(workers.start_timeout_s){where}"
        )

    def room(self, now: float) -> int | None:
        """Return how many workers to start now, while there are none: as many as fit and are wanted.

        Args:
            now: The time, in seconds of a monotonic clock.

        Returns:
            0: there is room for fewer than ``workers.num`` allows. None: it is too early to tell, because former agents
            may still release places.
        """
        return self._steady_room.observe(self._fitting(self._nodes()), self._workers.most, now)

    def change(self, now: float) -> Change | None:
        """Return why the current workers should be replaced; None: they should not. Looks every second.

        Args:
            now: The time, in seconds of a monotonic clock.
        """
        if now - self._looked_at < _LOOK_INTERVAL_S:
            return None
        self._looked_at = now
        nodes = self._nodes()
        fitting = self._fitting(nodes)
        leaving = [node for node in nodes if node.drains_at is not None and self._held[node.id]]
        if leaving:
            ids = {node.id for node in leaving}
            return Change(
                " and ".join(f"node {node.address} is being drained" for node in leaving),
                min(node.drains_at for node in leaving if node.drains_at is not None),
                any(node.is_here for node in leaving),
                frozenset(rank for rank, agent in self.agents.items() if agent.node in ids),
            )
        if fitting <= self.num_workers:
            self._room_since = math.inf
            return None
        self._room_since = min(self._room_since, now)
        if now - self._room_since < _SETTLE_S:
            return None
        return Change(f"there is room for {fitting} workers")

    def shortage(self) -> str:
        """Return a message with the room that there is and the room that is needed."""
        nodes = self._nodes()
        if self._unplaced and self._fitting(nodes):
            return (
                f"Ray finds no room for {self._unplaced} workers of {self.group.resources} each, though there is some "
                f"for {sum(map(self._room_on, nodes))}"
            )
        unfit = [node for node in nodes if node.id in self._left_out]
        reasons = "; ".join(dict.fromkeys(self._left_out[node.id] for node in unfit))
        named = _named([node.address for node in unfit])
        without = f", of which {named} cannot be used ({reasons})" if unfit else ""
        return (
            f"there is room for {sum(map(self._room_on, nodes))} of at least {self._workers.least} workers of "
            f"{self.group.resources} each, on {len(nodes)} node{'s' * (len(nodes) != 1)}{without}"
        )

    def _nodes(self) -> Sequence[Node]:
        """Return the nodes that are alive, after preparing those that may get workers."""
        nodes = self._look()
        self._addresses |= {node.id: node.address for node in nodes}
        if self.takes_no_others:
            why = f"nodes that joined have not fitted {MOST_MISFITS} times"
            others = (node.id for node in nodes if not self._is_known(node) and node.id not in self._left_out)
            self._left_out |= dict.fromkeys(others, why)
        self.group.prepare([node for node in nodes if self._is_prepared(node)])
        return nodes

    def _is_prepared(self, node: Node) -> bool:
        """Return whether to prepare a node for workers.

        In a cluster with an autoscaler only nodes that will get workers are prepared: a node with something on it would
        not be idle, so the autoscaler would keep it.
        """
        if node.is_here or self._held[node.id] or not self.group.may_grow:
            return True
        is_starting = self.num_workers > 0 and not self._held
        return is_starting and self._room_on(node) > 0

    def _is_known(self, node: Node) -> bool:
        """Return whether this run has trained on the node's host; a restart of Ray gives the host another node id."""
        return node.address in self._known_hosts

    def _node_of(self, rank: int) -> str | None:
        return self._placed[rank] if rank < len(self._placed) else None

    def _fitting(self, nodes: Sequence[Node]) -> int:
        """Return how many workers fit, at most the wanted number; 0 if that is too few."""
        fits = min(self._workers.most, sum(map(self._room_on, nodes)))
        return fits if fits >= self._workers.least else 0

    def _room_on(self, node: Node) -> int:
        """Return how many workers fit on a node, including those that it holds."""
        is_usable = node.drains_at is None and node.id not in self._left_out
        return node.room(self.group.resources, self._held[node.id]) if is_usable else 0


def _named(nodes: Sequence[str]) -> str:
    return f"node{'s' * (len(nodes) != 1)} {listed(nodes)}"
