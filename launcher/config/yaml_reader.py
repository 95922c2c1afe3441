"""Reads YAML into plain data and writes it, keeping interpolations; refuses scalars that YAML misreads, such as ``no``.

YAML reads some of what Python writes as text, ``None`` or ``(1, 2)``, and between braces it splits the latter in two.
Quotes mark what is meant as text.

This module knows nothing of the keys of a description.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.errors import FieldError
from jobs.spec import NUMBER, list_in
from launcher.config.interpolation import field_error
from launcher.config.keys import clipped, join

FLOAT = rf"{NUMBER}|(?i:[-+]?\.inf|\.nan)"
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
        _refuse_misread(root)
        if not isinstance(root, yaml.CollectionNode):
            return root and root.value  # OmegaConf would make the mapping {word: null} of a bare word
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except OmegaConfBaseException as error:
        raise field_error(error, {}) from error
    except RecursionError:
        raise yaml.YAMLError("lists or mappings are nested too deeply") from None


def to_yaml(written: dict[str, Any]) -> str:
    """Return YAML that reads back as the same plain data."""
    text: str = yaml.dump(written, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes text that ``read_yaml`` would not read as text, or ``refuse_python`` would refuse."""

    def ignore_aliases(self, _: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        misread = re.fullmatch(FLOAT, text) or _of_python(text)
        return self.represent_scalar(f"{_TYPE}str", text, style="'" if misread else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def _refuse_tags(text: str) -> None:
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if tag := getattr(event, "tag", None):
            name = tag.replace(_TYPE, "!!")
            raise yaml.MarkedYAMLError(problem=f"the tag {name} is not supported", problem_mark=event.start_mark)


def refuse_python(text: str) -> None:
    """Refuse what is no text in Python, such as ``None`` and ``(1, 2)``, where YAML reads it as text.

    Args:
        text: YAML that ``read_yaml`` has read.

    Raises:
        FieldError: A value without quotes is of Python.
    """
    for key, node in _nodes(yaml.compose(text, Loader=yaml.SafeLoader), "", set()):
        if _is_plain_text(node) and (meant := _of_python(node.value)):
            problem = f"is written {clipped(node.value)}, which YAML reads as text"
            raise FieldError(key or "value", f"{problem}; write {meant}, or quote it if it is text")


def _nodes(node: yaml.Node | None, key: str, seen: set[yaml.Node | None]) -> Iterator[tuple[str, Any]]:
    """Yield each node of a document with its full key, except keys of mappings."""
    if node in seen:  # an alias, which may lead back to its own parent
        return
    seen.add(node)
    yield key, node
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _nodes(value, join(key, str(name.value)), seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _nodes(item, f"{key}[{index}]", seen)


def _refuse_misread(root: yaml.Node | None) -> None:
    """Refuse scalars that YAML reads differently than a person does, and text that it splits at commas."""
    for key, node in _nodes(root, "", set()):
        _refuse_ambiguous(node, key)
        if isinstance(node, yaml.MappingNode):
            for number, (name, value) in enumerate(node.value):
                at = join(key, str(name.value))
                _refuse_ambiguous(name, at)
                rest = (_bare_key(*pair) for pair in node.value[number + 1 :])
                _refuse_split(value, rest, at, is_certain=True)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                rest = (other.value if _is_plain(other) else None for other in node.value[index + 1 :])
                _refuse_split(item, rest, f"{key}[{index}]", is_certain=False)


def _refuse_ambiguous(node: yaml.Node, key: str) -> None:
    if isinstance(node, yaml.ScalarNode) and node.tag in _UNAMBIGUOUS:
        looks_like, reads = _UNAMBIGUOUS[node.tag]
        if not re.fullmatch(looks_like, node.value):
            problem = f"is written {clipped(node.value)}, which YAML reads {reads}"
            raise FieldError(key or "value", f"{problem}, or quote it if it is text")


def _refuse_split(node: yaml.Node, rest: Iterable[str | None], key: str, *, is_certain: bool) -> None:
    """Refuse text in parentheses that YAML has split at its commas, as in ``{betas: (0.9, 0.95)}``.

    Args:
        node: The value that may begin with the text up to the first comma.
        rest: What follows it; None for what cannot be a part of the text.
        key: The full key of the value.
        is_certain: Whether the parts cannot be meant one by one.
    """
    if not _is_plain(node):
        return
    text, left = node.value, iter(rest)
    while text.count("(") > text.count(")"):
        part = next(left, None)
        if part is None:
            return
        text += f", {part}"
    written = list_in(text)
    if text != node.value and (written or is_certain):
        advice = f"write a list, {written}" if written else "write a list or a mapping, or quote it if it is text"
        raise FieldError(key, f"is written {clipped(text)}, which YAML splits at its commas; {advice}")


def _bare_key(name: yaml.Node, value: yaml.Node) -> str | None:
    """Return a key that stands alone, without colon and value; None for any other key."""
    stands_alone = _is_plain(name) and _is_plain(value) and value.start_mark.index == value.end_mark.index
    return name.value if stands_alone else None


def _is_plain(node: yaml.Node) -> bool:
    """Return whether a node is a scalar without quotes, on one line or several."""
    return isinstance(node, yaml.ScalarNode) and node.style is None


def _is_plain_text(node: yaml.Node) -> bool:
    return _is_plain(node) and node.tag == f"{_TYPE}str"


def _of_python(text: str) -> str | None:
    """Return the YAML for what Python reads in a text without quotes, while YAML reads text; None if there is none."""
    if text == "None":
        return "null"
    if re.fullmatch("[-+]?inf|nan", text):
        return f"-.{text[1:]}" if text[0] == "-" else f".{text.removeprefix('+')}"
    if re.fullmatch(rf"[-+](?=\.){NUMBER}", text):  # YAML wants a digit between sign and point
        return str(float(text))
    if re.fullmatch("[-+]?0o[0-7]+", text):
        return str(int(text, 8))
    written = list_in(text)
    return written and f"a list, {written}"


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
