"""The workers of a run: who is there, where, and how many there should be.

How many there should be follows from what is written and what the cluster has room for. Time comes in as a
number: nothing here looks at a clock.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.capacity import Node
from cluster.errors import listed
from cluster.process.agent import HERE_INTERVAL_S
from cluster.process.messages import Hello, StillHere
from cluster.process.orders import LOOPBACK
from cluster.ray.cluster import PLACEMENT_TIMEOUT_S
from cluster.ray.worker_group import WorkerGroup
from jobs.spec import WorkersSpec

_LOOK_INTERVAL_S = 1.0
_SETTLE_S = 5.0
"""How long there must be room for more workers before they are taken: each change costs a few seconds."""
_LAG_S = 0.5
"""How late Ray may tell of what has become free; on an overloaded machine it was 0.13 s."""
_UNSTEADY_S = 5.0
"""How long room that does not stay the same is looked at, before the least of it is believed."""
_PLACEMENT_S = 2 * PLACEMENT_TIMEOUT_S
"""How long Ray may take to say whether it has room for agents, with the start or the change of its controller."""
_LEAST_SILENCE_S = 4 * HERE_INTERVAL_S
MOST_MISFITS = 10
"""How often nodes that join may turn out not to fit before no others are taken: each costs a save and two starts."""


@dataclass(frozen=True, slots=True)
class Change:
    """Other workers are wanted than those there are.

    Attributes:
        reason: Why, for people.
        leave_by: The Unix time by which some of them will be gone; infinity: no matter when, or nobody knows.
        ends_here: The driver's own host is one that goes, and no other can take its place.
        leaving: The workers, by rank, whose nodes are taken away.
    """

    reason: str
    leave_by: float = math.inf
    ends_here: bool = False
    leaving: frozenset[int] = frozenset()


class Membership:
    """The agents of a run, which the driver replaces as a group."""

    def __init__(self, group: WorkerGroup, workers: WorkersSpec, look: Callable[[], Sequence[Node]]) -> None:
        """Only assigns. ``look``: the nodes of the cluster that are alive."""
        self.group = group
        self.num_workers = 0
        """Those that were asked for; 0: none."""
        self.generation = 0
        """Of the agents that were started last."""
        self.agents: dict[int, Hello] = {}
        """What each said when it came, by rank."""
        self._workers = workers
        self._look = look
        self._starting_since = -math.inf
        """When the agents were asked for; once they hold places, when those were told of."""
        self._heard_at: dict[int, float] = {}
        self._held: Counter[str] = Counter()
        self._unplaced = 0
        """How many agents Ray did not find room for, the last time; 0: it did."""
        self._placed: Sequence[str] = ()
        """The nodes of those that were started last, by rank, as far as that is known."""
        self._proven: set[str] = set()
        """The nodes, by id, that those who train now have trained on; others are newcomers."""
        self._left_out: dict[str, str] = {}
        """The nodes, by id, that are not used, and why."""
        self._num_misfits = 0
        """How often nodes were left out."""
        self._addresses: dict[str, str] = {}
        """Of all nodes that were ever seen, by id."""
        self._known_hosts: set[str] = set()
        """The addresses of the hosts that any workers of this run have trained on; ``forget`` leaves them."""
        self._looked_at = -math.inf
        self._room_since = math.inf
        self._seen: tuple[int, float] | None = None
        """The room while no agents are there, and since when it has been that."""
        self._least: tuple[int, float] | None = None
        """The least room of the looks that have not told it yet, and the time of the first of them."""

    @property
    def num_placed(self) -> int:
        """Those of them that hold a place: all, or none yet."""
        return self._held.total() if self.num_workers else 0

    @property
    def holds_room(self) -> bool:
        """Agents hold places, also if they are no longer counted on."""
        return bool(self._held)

    @property
    def is_complete(self) -> bool:
        """All are there."""
        return 0 < self.num_workers == len(self.agents)

    @property
    def host(self) -> str:
        """The address of rank 0 for the others."""
        is_one_node = len({agent.node for agent in self.agents.values()}) == 1
        return LOOPBACK if is_one_node else self.agents[0].address

    def where(self, rank: int) -> str:
        """A worker, for people."""
        _, address = self.place_of(rank)
        return f"worker {rank}" if address is None else f"worker {rank} on node {address}"

    def place_of(self, rank: int) -> tuple[str | None, str | None]:
        """The node of a worker, by id, and its address, as far as they are known; it may not have said a word yet."""
        if agent := self.agents.get(rank):
            return agent.node, agent.address
        node = self._node_of(rank)
        return node, None if node is None else self._addresses.get(node)

    def joined(self, hello: Hello, now: float) -> None:
        """An agent is there."""
        self.agents[hello.rank] = hello
        self._heard_at[hello.rank] = now

    def heard(self, here: StillHere, now: float) -> None:
        """An agent says that it is there still, as all do every few seconds; also one that is no longer counted."""
        agent = self.agents.get(here.rank)
        if agent is not None and agent.id == here.id:
            self._heard_at[here.rank] = now

    def silent(self, now: float) -> dict[int, str]:
        """The agents that say nothing any more, though Ray has not lost them: stopped, or cut off."""
        # A limit as short as the time between two words of an agent would find all of them silent.
        limit_s = max(self._workers.hang_timeout_s, _LEAST_SILENCE_S)
        return {
            rank: f"its agent has said nothing for {now - self._heard_at[rank]:.0f} s"
            for rank in self.agents
            if now - self._heard_at[rank] > limit_s
        }

    def placed(self, nodes: Sequence[str], now: float) -> None:
        """The nodes, by id, that hold a place for an agent of this run, by its rank; none: they have let go of them."""
        self._held = Counter(nodes)
        self._placed = nodes or self._placed
        if nodes:
            self._unplaced, self._starting_since = 0, now
            self.group.release(frozenset(nodes))

    def unplaced(self) -> None:
        """Ray has not found room for all the agents that were to start: none of them is there."""
        self._unplaced = self.num_workers
        self.disband()

    @property
    def is_unplaced(self) -> bool:
        """The agents that were to start last found no room."""
        return self._unplaced > 0

    def trains(self) -> None:
        """The agents that are there have done a step: their nodes are fit for this run."""
        for agent in self.agents.values():
            self._proven.add(agent.node)
            self._known_hosts.add(agent.address)
            self._left_out.pop(agent.node, None)  # it may have joined just as no others were to be taken

    def forget(self) -> None:
        """Others than before train now: the nodes that were fit for those are newcomers again."""
        self._proven.clear()

    def newcomers(self) -> frozenset[str]:
        """The nodes of the last start, by id, that have joined a run that has trained without them."""
        return frozenset(self._placed) - self._proven if self._proven else frozenset()

    def nodes_of(self, ranks: Iterable[int]) -> frozenset[str]:
        """The nodes of workers of the last start, by id, as far as they are known."""
        return frozenset(node for rank in ranks if (node := self._node_of(rank)) is not None)

    def goes_on_without(self, nodes: frozenset[str]) -> bool:
        """Whether other nodes are there that could hold workers; after too many misfits, that have held some."""
        others = [node for node in self._nodes() if node.id not in nodes | self._left_out.keys()]
        if self._num_misfits + 1 >= MOST_MISFITS:
            others = [node for node in others if self._is_known(node)]
        return any(node.most(self.group.resources) for node in others)

    def leave_out(self, nodes: frozenset[str], why: str) -> str:
        """Starts no agent on these nodes any more; returns which they are, for people."""
        self._num_misfits += 1
        if self.takes_no_others:  # what runs on these hosts has changed
            self._known_hosts -= {self._addresses.get(node, "") for node in nodes}
        self._left_out |= dict.fromkeys(nodes, why)
        return _named([self._addresses.get(node, node) for node in sorted(nodes)])

    @property
    def takes_no_others(self) -> bool:
        """Too many have not fitted: agents are started only on hosts that workers of this run have trained on."""
        return self._num_misfits >= MOST_MISFITS

    def disband(self) -> None:
        """The agents are no longer counted on; others will be started as soon as there is room."""
        self.num_workers, self.agents = 0, {}
        self._looked_at, self._room_since = -math.inf, math.inf
        self._seen = self._least = None

    def start(self, num_workers: int, now: float) -> None:
        """Starts so many agents in place of those there are; 0: those end."""
        self.disband()
        self.num_workers, self._starting_since = num_workers, now
        self._held = Counter()  # the former agents let go of their places, and what is said of them counts no more
        self._placed = ()
        if num_workers:
            self._nodes()  # where they may come to be
        self.generation = self.group.start(num_workers, frozenset(self._left_out))

    def late(self, now: float) -> str:
        """What to say of agents that have not started in time, and of their nodes; nothing if there are none.

        Their time begins when they hold places. Until Ray tells of those, they have the time that it may take to find
        them in addition.
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
        """The workers to start now, if none are there: as many as fit and are wanted; 0 if that is too few.

        None: it is too early to tell, for what former agents have held may become free yet.

        Room that others take and free all the time never stays the same. Of that the least is told, every few seconds.

        Args:
            now: Seconds that only grow.
        """
        room = self._fitting(self._nodes())
        if self._seen is None or self._seen[0] != room:
            self._seen = room, now
        least, since = self._least or (room, now)
        least = min(least, room)
        self._least = None
        if room == self._workers.most or now - self._seen[1] >= _LAG_S:
            return room
        if now - since >= _UNSTEADY_S:
            return least
        self._least = least, since
        return None

    def change(self, now: float) -> Change | None:
        """What should change about workers that are all there; looks at the cluster every second.

        Args:
            now: Seconds that only grow.
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
        """What there is, beside what is needed, where workers have to be waited for."""
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
        nodes = self._look()
        self._addresses |= {node.id: node.address for node in nodes}
        if self.takes_no_others:
            why = f"nodes that joined have not fitted {MOST_MISFITS} times"
            others = (node.id for node in nodes if not self._is_known(node) and node.id not in self._left_out)
            self._left_out |= dict.fromkeys(others, why)
        self.group.prepare([node for node in nodes if self._is_prepared(node)])
        return nodes

    def _is_prepared(self, node: Node) -> bool:
        """Where an autoscaler takes idle nodes away, none is kept from it by what is prepared there for nobody."""
        if node.is_here or self._held[node.id] or not self.group.may_grow:
            return True
        is_starting = self.num_workers > 0 and not self._held
        return is_starting and self._room_on(node) > 0

    def _is_known(self, node: Node) -> bool:
        """Whether workers of this run have trained on its host; where Ray is started anew, the node is another."""
        return node.address in self._known_hosts

    def _node_of(self, rank: int) -> str | None:
        return self._placed[rank] if rank < len(self._placed) else None

    def _fitting(self, nodes: Sequence[Node]) -> int:
        fits = min(self._workers.most, sum(map(self._room_on, nodes)))
        return fits if fits >= self._workers.least else 0

    def _room_on(self, node: Node) -> int:
        is_taken = node.drains_at is None and node.id not in self._left_out
        return node.room(self.group.resources, self._held[node.id]) if is_taken else 0


def _named(nodes: Sequence[str]) -> str:
    return f"node{'s' * (len(nodes) != 1)} {listed(nodes)}"
