"""The attempt under way: the training processes that were started together."""

from dataclasses import dataclass, field

NONE = -1
"""The number of an attempt that has not started."""


@dataclass(slots=True)
class Attempt:
    """What is known of the training processes that were started last.

    Attributes:
        number: Counts attempts from 0; ``NONE``: none is under way.
        began_at: The step at which these began, or those before them while they have not said so.
        trains: Rank 0 has restored the state.
        finished: The workers, by rank, that have done their work.
        completed: No step is left in the run.
    """

    number: int = NONE
    began_at: int = 0
    trains: bool = False
    finished: set[int] = field(default_factory=set)
    completed: bool = False
