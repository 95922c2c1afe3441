"""Decoding of untrusted JSON to a dataclass: its types are checked strictly, and nothing is converted.

A dataclass may constrain its fields with pydantic's annotations.
"""

import functools
import json
import math
import re
from collections.abc import Hashable
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

T = TypeVar("T")

_MOST_SHOWN = 60
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLAIN_WORDS = {"unexpected_keyword_argument": "unknown key", "string_pattern_mismatch": "has the wrong form"}
"""In place of what pydantic says."""


def _refuse_nan(value: float) -> float:
    if math.isnan(value):
        raise PydanticCustomError("nan", "Input should be a number")
    return value


Number = Annotated[float, AfterValidator(_refuse_nan)]
"""A float that is not NaN."""


def from_json(hint: type[T], text: str | bytes, *, ignores_unknown: bool = False) -> T:
    """Decodes JSON to a dataclass: an object with its fields and no others, a list to a tuple, an int to a float.

    Args:
        hint: The dataclass.
        text: Untrusted. If a key occurs twice, the last value counts.
        ignores_unknown: Whether the object may have other fields too.

    Raises:
        ValueError: Where the text does not fit the type, what is expected and what it got, in one line.
    """
    adapter: TypeAdapter[T] = _adapter(cast(Hashable, hint))
    try:
        readable = _without_surrogates(text if isinstance(text, str) else text.decode())
        return adapter.validate_json(readable, strict=True, extra="ignore" if ignores_unknown else "forbid")
    except RecursionError as error:
        raise ValueError("it: is nested too deeply") from error
    except ValidationError as error:
        raise ValueError(_as_line(error.errors(include_url=False, include_context=False)[0])) from error


def _without_surrogates(text: str) -> str:
    """Escapes lone surrogates once more: names of files that are not UTF-8 hold them, and pydantic takes none.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply.
    """
    if "\\ud" not in text and "\\uD" not in text:
        return text
    written = json.dumps(json.loads(text), ensure_ascii=False)
    return _SURROGATE.sub(lambda found: f"\\\\u{ord(found[0]):x}", written)


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
    return f"{where.removeprefix('.') or 'it'}: {_PLAIN_WORDS.get(error['type'], error['msg'])}{got}"
