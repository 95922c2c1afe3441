"""Checks that several sections of the job language share."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from cluster.errors import FieldError
from jobs.spec.target import Target

DECODE: Final = "${oc.decode:${oc.env:NAME}}"
"""How a value from the environment is written that is not to be text: a variable is text until it is decoded."""
NUMBER: Final = r"(?i:([-+]?[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(e[-+]?[0-9]+)?)"
"""A decimal number in YAML, which has none with a sign and nothing between that and the point."""
NUMBER_FROM_TEXT: Final = f"remove the quotes, or write {DECODE} for a number from the environment"
"""What to do about text in place of a number."""


def at_least(spec: object, lowest: int, *names: str) -> None:
    """Refuses fields below ``lowest``; None is allowed."""
    for name in names:
        value = getattr(spec, name)
        if value is not None and value < lowest:
            raise FieldError(name, f"must be at least {lowest}, got {value}")


def learning_rate(args: Mapping[str, Any]) -> None:
    """Refuses a learning rate that is text, not finite or not above 0."""
    lr = args.get("lr")
    if isinstance(lr, str):
        advice = NUMBER_FROM_TEXT if re.fullmatch(NUMBER, lr) else "write a learning rate such as 0.1"
        raise FieldError("lr", f"must be a number, got {lr!r}; {advice}")
    if lr is not None and not (_is_number(lr) and 0 < lr < math.inf):
        raise FieldError("lr", f"must be finite and above 0, got {lr}; write a learning rate such as 0.1")


def finite_numbers(args: Mapping[str, Any]) -> None:
    """Refuses NaN and infinity anywhere in the arguments of a target."""
    for key, value in _numbers(args, ""):
        if isinstance(value, float) and not math.isfinite(value):  # isfinite overflows on a huge int
            raise FieldError(key, f"must be a finite number, got {value}")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Yields every number in a value, with its key."""
    if isinstance(value, Target):
        yield from _numbers(value.args, key)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{key}[{index}]")
    elif _is_number(value):
        yield key, value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
