"""Decoding of untrusted JSON to a dataclass: its types are checked strictly, and nothing is converted.

A dataclass may constrain its fields with pydantic's annotations.
"""

import functools
import math
from collections.abc import Hashable
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

T = TypeVar("T")

_MOST_SHOWN = 60


def _refuse_nan(value: float) -> float:
    if math.isnan(value):
        raise PydanticCustomError("nan", "Input should be a number")
    return value


Number = Annotated[float, AfterValidator(_refuse_nan)]
"""A float that is not NaN."""


def from_json(hint: type[T], text: str | bytes, *, ignores_unknown: bool = False) -> T:
    """Decodes JSON to a dataclass: an object with exactly its fields, a list to a tuple, an int to a float.

    Args:
        hint: The dataclass.
        text: Untrusted. If a key occurs twice, the last value counts.
        ignores_unknown: Whether the object may have other fields too.

    Raises:
        ValueError: Where the text does not fit the type, what is expected and what it got, in one line.
    """
    adapter: TypeAdapter[T] = _adapter(cast(Hashable, hint))
    try:
        return adapter.validate_json(text, strict=True, extra="ignore" if ignores_unknown else "forbid")
    except ValidationError as error:
        raise ValueError(_as_line(error.errors(include_url=False, include_context=False)[0])) from error


def short(value: object) -> str:
    """Returns a value on one line, cut: a hostile one may be long or hold line ends."""
    text = ascii(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def _as_line(error: ErrorDetails) -> str:
    where = "".join(f"[{each}]" if isinstance(each, int) else f".{short(each)[1:-1]}" for each in error["loc"])
    got = "" if error["type"] in ("missing", "json_invalid") else f", got {short(error['input'])}"
    return f"{where.removeprefix('.') or 'it'}: {error['msg']}{got}"
