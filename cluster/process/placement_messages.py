"""Messages from Ray Train's controller to the driver, about the places of agents. ``messages`` has all others.

They may arrive late, so each has the generation that it is about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentsPlaced:
    """Ray has reserved resources for each agent of a generation, or has released them."""

    generation: int
    """The generation of the agents."""
    nodes: Sequence[str]
    """The ids of the nodes, by rank; empty: the resources are released."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentsUnplaced:
    """Ray found no room for all agents, and has started none."""

    generation: int
    """The generation of the agents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentsLost:
    """Ray lost agents or could not start them. The other agents live until the next start."""

    generation: int
    """The generation of the agents."""
    lost: Mapping[int, str]
    """Ray's reason for each lost agent, by rank; empty: all are lost, or none was started."""
    reason: str
    """Ray's reason if ``lost`` is empty."""
