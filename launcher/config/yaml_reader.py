"""Reads YAML into plain data and writes it, keeping interpolations; refuses scalars that YAML misreads, such as ``no``.

This module knows nothing of the keys of a description.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.errors import FieldError
from launcher.config.interpolation import field_error
from launcher.config.keys import clipped, join

FLOAT = r"(?i:[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan)"
"""What YAML reads as a number."""

_TYPE = "tag:yaml.org,2002:"
_BASE_10 = "in another base than 10; write it in decimal"

# The spellings of each type that people and YAML 1.1 read alike; YAML also reads 010 as 8, 1:30 as 90, no as false.
_UNAMBIGUOUS: Mapping[str, tuple[str, str]] = {
    f"{_TYPE}bool": (r"(?i:true|false)", "as true or false; write that"),
    f"{_TYPE}int": (r"[-+]?(0|[1-9][0-9_]{0,999}|0x[0-9a-fA-F]{1,999})", _BASE_10),
    f"{_TYPE}float": (FLOAT, _BASE_10),
}


def read_yaml(text: str) -> Any:
    """Return plain data, with interpolations unresolved.

    Raises:
        FieldError: OmegaConf refuses a value, or YAML reads a scalar differently than a person does.
        yaml.YAMLError: The text is not YAML.
    """
    try:
        # The pure Python loader goes first: the C loader ends the process on deeply nested brackets.
        _refuse_tags(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_ambiguous_scalars(root, "", set())
        if not isinstance(root, yaml.CollectionNode):
            return root and root.value  # OmegaConf would make the mapping {word: null} of a bare word
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except OmegaConfBaseException as error:
        raise field_error(error, {}) from error
    except RecursionError:
        raise yaml.YAMLError("lists or mappings are nested too deeply") from None


def to_yaml(written: dict[str, Any]) -> str:
    """Return YAML that reads back as the same plain data."""
    return OmegaConf.to_yaml(OmegaConf.create(written))


def _refuse_tags(text: str) -> None:
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if tag := getattr(event, "tag", None):
            name = tag.replace(_TYPE, "!!")
            raise yaml.MarkedYAMLError(problem=f"the tag {name} is not supported", problem_mark=event.start_mark)


def _refuse_ambiguous_scalars(node: yaml.Node | None, key: str, seen: set[yaml.Node | None]) -> None:
    if node in seen:  # an alias, which may lead back to its own parent
        return
    seen.add(node)
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            for part in (name, value):
                _refuse_ambiguous_scalars(part, join(key, str(name.value)), seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _refuse_ambiguous_scalars(item, f"{key}[{index}]", seen)
    elif isinstance(node, yaml.ScalarNode) and node.tag in _UNAMBIGUOUS:
        looks_like, reads = _UNAMBIGUOUS[node.tag]
        if not re.fullmatch(looks_like, node.value):
            problem = f"is written {clipped(node.value)}, which YAML reads {reads}"
            raise FieldError(key or "value", f"{problem}, or quote it if it is text")


def syntax_problem(error: yaml.YAMLError, text: str) -> str:
    """Return what is wrong with a text, with line and column."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"is not text at character {error.position}: {error.reason}"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark, problem = error.problem_mark, error.problem or "is not YAML"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    advice = ""
    if "another document" in problem:
        problem, advice = "a second document begins", "; a job file holds one"
    elif "duplicate key" in problem:
        advice = "; keep one of them"
    elif "\t" in line:
        advice = "; indent with spaces, not tabs"
    elif "${" in line:
        advice = '; between braces or brackets, quote an interpolation: "${...}"'
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}{advice}"
