"""Checks arguments for text that reads as a list, a number, true or false, where a parameter takes no text.

Python would pass it on, to fail far from its cause or, as with the text ``false``, which counts as true, not at all.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cluster.errors import DescriptionError
from jobs.spec import DECODE, NUMBER, NUMBER_FROM_TEXT, list_in

_NUMBERS = {"int", "float", "bool", "complex", "Number", "Tensor", "ndarray"}
_OTHERS = {
    "tuple", "Tuple", "list", "List", "Sequence", "MutableSequence", "Iterable", "Collection", "dict", "Dict",
    "Mapping", "Optional", "Union", "None", "NoneType", "builtins", "typing", "collections", "abc", "numbers", "numpy",
    "torch",
}  # fmt: skip
"""With ``_NUMBERS``, the words of annotations that name no type of text."""


def check_texts(function: Callable[..., Any], args: Mapping[str, Any], key: str) -> None:
    """Checks that no argument of a callable is text where the callable wants another type, as far as it says.

    Text that reads as a list, a number, true or false must not meet a parameter whose annotation names other types
    alone or, without an annotation, whose default is of another type.

    Raises:
        DescriptionError: An argument, or an item of one, is such a text.
    """
    parameters = _parameters(function)
    for name, value in args.items():
        parameter = parameters.get(name)
        if parameter is None:
            continue
        takes_no_text = _takes_no_text(parameter) if isinstance(value, str) else _has_no_text(parameter)
        for where, text in _texts(value, f"{key}.{name}") if takes_no_text else ():
            if advice := _advice(parameter, text):
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


def _advice(parameter: inspect.Parameter, text: str) -> str | None:
    """Returns what to write in place of a text; None if it reads as nothing else that the parameter takes."""
    if written := list_in(text):
        return f"write a {'mapping' if written[0] == '{' else 'list'}, {written}, without quotes"
    if text.lower() in ("true", "false") and (isinstance(parameter.default, bool) or "bool" in _words(parameter)):
        return f"write {text.lower()} without quotes, or {DECODE} for a value from the environment"
    if re.fullmatch(NUMBER, text.lstrip("+-")):
        return NUMBER_FROM_TEXT
    return None


def _takes_no_text(parameter: inspect.Parameter) -> bool:
    """Returns whether the annotation of a parameter, or else its default, says that it is no text."""
    words = _words(parameter)
    if words:
        return words <= _NUMBERS | _OTHERS
    return isinstance(parameter.default, (bool, int, float, tuple, list, dict))


def _has_no_text(parameter: inspect.Parameter) -> bool:
    """Returns whether the annotation of a parameter, or else its default, says that its items are no text."""
    words = _words(parameter)
    if words:
        return words <= _NUMBERS | _OTHERS and not words.isdisjoint(_NUMBERS)
    default = parameter.default
    return (
        isinstance(default, (tuple, list)) and bool(default) and all(isinstance(item, (int, float)) for item in default)
    )


def _words(parameter: inspect.Parameter) -> set[str]:
    """Returns the words of an annotation; empty if there is none."""
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty:
        return set()
    return set(re.findall(r"\w+", annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)))
