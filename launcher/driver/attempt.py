"""The current attempt: the training processes that were started together."""

from dataclasses import dataclass, field

NONE = -1
"""The attempt number while no attempt is running."""


@dataclass(slots=True)
class Attempt:
    """State of the training processes that were started last.

    Attributes:
        number: The attempt number, from 0; ``NONE`` while no attempt is running.
        began_at: The step from which this attempt trains; until it is known, that of the attempt before.
        trains: Whether rank 0 has restored the state.
        finished: The ranks whose workers have finished.
        completed: Whether no step of the run is left.
    """

    number: int = NONE
    began_at: int = 0
    trains: bool = False
    finished: set[int] = field(default_factory=set)
    completed: bool = False
