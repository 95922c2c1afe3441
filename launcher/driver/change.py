"""A reason to replace the workers of a run by others."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """The workers should be replaced by others.

    Attributes:
        reason: Why, for messages.
        leave_by: The Unix time by which some workers will be gone; infinity: none will, or it is not known when.
        ends_here: Whether the driver's own node is being drained, which ends the run here.
        leaving: The ranks of workers whose nodes are being drained.
    """

    reason: str
    leave_by: float = math.inf
    ends_here: bool = False
    leaving: frozenset[int] = frozenset()
