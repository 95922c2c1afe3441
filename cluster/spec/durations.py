"""Durations as Slurm writes them and ``sbatch --time`` takes them."""

import math
import re

_UNLIMITED = ("UNLIMITED", "INFINITE")
_DURATION = re.compile(r"(?:(?P<days>[0-9]+)-)?(?P<rest>[0-9]+(?::[0-9]{1,2}){0,2})")


def seconds_from(duration: str) -> float:
    """Return the seconds in ``30``, ``30:00``, ``4:00:00``, ``1-12`` or ``1-12:00:00``; infinity for no limit.

    Raises:
        ValueError: It has another form.

    Source: sbatch(1), ``--time``.
    """
    if duration.upper() in _UNLIMITED:
        return math.inf
    found = _DURATION.fullmatch(duration)
    if found is None:
        raise ValueError(f"{duration!r} is no duration")
    numbers = [int(number) for number in found["rest"].split(":")]
    if found["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 1:
        hours, minutes, seconds = 0, numbers[0], 0
    else:  # [hours:]minutes:seconds
        hours, minutes, seconds = [0, *numbers][-3:]
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds
