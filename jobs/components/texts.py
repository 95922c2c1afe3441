"""Checks arguments for text that reads as a list, a number, true or false, where a parameter takes no text.

Python would pass it on, to fail far from its cause or, as with the text ``false``, which counts as true, not at all.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cluster.errors import DescriptionError
from jobs.spec import DECODE, NUMBER, NUMBER_FROM_TEXT, list_in

_TEXT = r"\b(str|bytes|AnyStr|Literal|PathLike|\w*Path)\b"
"""What annotations of parameters that take text hold."""


def check_texts(function: Callable[..., Any], args: Mapping[str, Any], key: str) -> None:
    """Checks that no argument of a callable is text where the callable wants another type, as far as it says.

    Text that reads as a list of numbers must not meet a parameter unless its annotation or its default is text. Text
    that reads as a number, or as true or false, must not meet one whose annotation or default is of that type.

    Raises:
        DescriptionError: An argument, or an item of one, is such a text.
    """
    parameters = _parameters(function)
    for name, value in args.items():
        parameter = parameters.get(name)
        for where, text in _texts(value, f"{key}.{name}"):
            if (parameter is None or not _takes(parameter, str, _TEXT)) and (advice := _advice(parameter, text)):
                raise DescriptionError(f"{where} is text, got {text!r}; {advice}")


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}  # some C functions have no signature


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yields every text in an argument with its key; not those in targets, whose parameters are others."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _texts(item, f"{key}[{number}]")


def _advice(parameter: inspect.Parameter | None, text: str) -> str | None:
    """Returns what to write in place of a text; None if a parameter that takes no text may want it all the same."""
    if written := list_in(text):
        return f"write a {'mapping' if written[0] == '{' else 'list'}, {written}, without quotes"
    if parameter is None:
        return None
    if text.lower() in ("true", "false") and _takes(parameter, bool, r"\bbool\b"):
        return f"write {text.lower()} without quotes, or {DECODE} for a value from the environment"
    if re.fullmatch(NUMBER, text.lstrip("+-")) and _takes(parameter, (int, float), r"\b(int|float)\b"):
        return NUMBER_FROM_TEXT
    return None


def _takes(parameter: inspect.Parameter, types: type | tuple[type, ...], annotated: str) -> bool:
    """Returns whether a parameter's default is of a type, or its annotation names it."""
    annotation = parameter.annotation
    words = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return isinstance(parameter.default, types) or re.search(annotated, words) is not None
