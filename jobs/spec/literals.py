"""Text that Python reads as a list or a tuple, while YAML, which has no tuples, keeps it as text."""

import ast
import json
import warnings
from typing import Any


def list_in(text: str) -> str | None:
    """Returns how YAML writes the list or mapping that Python reads in a text; None if there is none.

    None, too, for what may be meant as text: JSON with text in it, names in parentheses, or nothing in brackets.
    """
    if not text.lstrip().startswith(("(", "[", "{")):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # Python warns of escapes that it does not know
            value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not isinstance(value, (tuple, list, dict)) or not value:
        return None
    known = {bool, int, float, type(None), *([str] if _holds_tuple(value) else [])}
    return _yaml(value) if all(type(scalar) in known for scalar in _scalars(value)) else None


def _holds_tuple(value: Any) -> bool:
    """Returns whether a value is a tuple or holds one, which neither YAML nor JSON can write."""
    return isinstance(value, tuple) or any(map(_holds_tuple, _items(value)))


def _scalars(value: Any) -> list[Any]:
    """Returns every scalar in a value, also the keys of mappings."""
    is_scalar = not isinstance(value, (tuple, list, dict))
    return [value] if is_scalar else [scalar for item in _items(value) for scalar in _scalars(item)]


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, (tuple, list)) else []


def _yaml(value: Any) -> str:
    """Returns a value as YAML in one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_yaml(name)}: {_yaml(item)}' for name, item in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_yaml, value))}]"
    return repr(value).replace("inf", ".inf") if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
