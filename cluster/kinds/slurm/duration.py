"""Durations as Slurm writes them and ``sbatch --time`` takes them."""

import math

_UNLIMITED = ("UNLIMITED", "INFINITE")


def seconds_from(duration: str) -> float:
    """Return the seconds in ``30``, ``30:00``, ``4:00:00``, ``1-12`` or ``1-12:00:00``; infinity for no limit.

    Raises:
        ValueError: It has another form.
    """
    if duration.upper() in _UNLIMITED:
        return math.inf
    days, dash, rest = duration.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 1:
        hours, minutes, seconds = 0, numbers[0], 0
    else:  # [hours:]minutes:seconds
        hours, minutes, seconds = [0, *numbers][-3:]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds
