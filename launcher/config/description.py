"""From YAML and ``key=value`` overrides to a spec, of a job mostly, with the file and the full key in every error.

OmegaConf stops here, and so does YAML: the rest of the code sees dataclasses. OmegaConf reads, interpolates and
writes; what a value may be is judged here against the dataclasses' own types, more strictly than OmegaConf would:
nothing is converted except a whole number to a number. Imports neither torch nor Ray, so that a mistake is told
at once.
"""

import dataclasses
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from omegaconf.resolvers import oc

from cluster.errors import DescriptionError, FieldError, nearest
from jobs.spec import NUMBER_FROM_TEXT, JobSpec, PlanValue, Target
from launcher.config.reference import (
    default_of,
    has_target,
    is_required,
    is_section,
    own_fields,
    shorthand_of,
    type_words,
    union_members,
)

_COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Language:
    """What can be described, beside others, in a file of its own."""

    section_of: Callable[[Mapping[str, Any]], type]
    """The dataclass for what is written; raises ``FieldError`` if that cannot be told."""
    needs: str
    """The keys that nothing of it can do without, in words."""


JOBS: Final = Language(lambda _: JobSpec, "model, data.train, loss and optimizer")


@dataclass(frozen=True, slots=True)
class Description:
    """A job description, read and checked."""

    spec: JobSpec
    """Everything resolved."""
    text: str
    """YAML of the defaults, the file and the overrides, its interpolations kept, so that no secret is written; without
    what the cluster says of workers, which holds there alone."""
    source: str
    """What to call it in errors, such as ``digits.yaml``."""
    of_cluster: tuple["OfCluster", ...] = ()
    """What the cluster says of workers, as far as nobody has overridden it."""

    @property
    def document(self) -> dict[str, Any]:
        """``text`` as plain values, its interpolations kept: fit to be shown anywhere."""
        return yaml.safe_load(self.text)

    def variables(self) -> tuple[str, ...]:
        """The environment variables that ``spec`` has values of; one that is not set, but has a default, is none."""
        return _resolved(self.document)[1]


class OfCluster(str):
    """An override that comes from the description of a cluster: a run keeps it only for as long as it is there."""

    __slots__ = ()


class _Missing:
    def __repr__(self) -> str:
        return "(absent)"


MISSING: Final = _Missing()
"""Stands in a ``Difference`` where one side has no such key."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A key that two specs do not agree on."""

    key: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.key}: {_show(self.old)} -> {_show(self.new)}"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Description:
    """Reads a job file.

    Raises:
        DescriptionError: For every mistake in it, in one line.
    """
    path = Path(path)
    return parse(read_text(path), path.name, overrides, default_name=path.stem)


def read_text(path: Path) -> str:
    """What a description file holds.

    Raises:
        DescriptionError: It cannot be read, in one line.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DescriptionError(f"{path.name}: there is no such file, looked at {path.absolute()}") from None
    except IsADirectoryError:
        raise DescriptionError(f"{path.name}: is a directory, {path.absolute()}; name a YAML file in it") from None
    except UnicodeDecodeError as error:
        raise DescriptionError(f"{path.name}: is not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise DescriptionError(f"{path.name}: cannot be read, {error.strerror}: {path.absolute()}") from error


def parse(text: str, source: str, overrides: Sequence[str] = (), default_name: str | None = None) -> Description:
    """Reads a job description from text, such as a run's ``job.yaml``.

    An override sets the whole value of its key; the keys beside it stay.

    Raises:
        DescriptionError: For every mistake in it, in one line.
    """
    defaults = {} if default_name is None else {"name": default_name}
    spec, written = read(JOBS, text, source, overrides, defaults)
    of_cluster = [change for change in overrides if isinstance(change, OfCluster)]
    if of_cluster:
        own = [change for change in overrides if not isinstance(change, OfCluster)]
        written = read(JOBS, text, source, own, defaults)[1]
        of_cluster = [change for change in of_cluster if not any(_is_within(_key(change), _key(each)) for each in own)]
    return Description(spec, written, source, tuple(of_cluster))


def read(
    language: Language, text: str, source: str, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> tuple[Any, str]:
    """Reads a description of any language.

    Args:
        language: What it describes.
        text: YAML.
        source: What to call it in errors.
        overrides: Changes, each the whole value of a key.
        defaults: Keys that are there unless they are written.

    Returns:
        The spec, everything resolved; and YAML of the defaults, the text and the overrides, its interpolations kept.

    Raises:
        DescriptionError: For every mistake in it, in one line.
    """
    written = _read_written(language, text, source, defaults or {})
    try:
        overridden = [_override(written, override) for override in overrides]
    except FieldError as error:
        raise _error(_COMMAND_LINE, error) from error
    try:
        spec, written = _checked(language, written)
    except FieldError as error:
        by_override = overridden and (
            any(_is_within(error.key, key) for key in overridden)
            or _is_sound(language, _read_written(language, text, source, defaults or {}))
        )
        raise _error(_COMMAND_LINE if by_override else source, error) from error
    return spec, OmegaConf.to_yaml(OmegaConf.create(written))


def flatten(spec: JobSpec) -> dict[str, object]:
    """Dotted key -> plain value: ``optimizer.lr``, ``model._target_``, ``optimizer.groups[0].match``."""
    return dict(_leaves(_plain(spec), ""))


def differences(old: JobSpec, new: JobSpec) -> list[Difference]:
    """The keys whose values differ, in the order of the job language."""
    before, after = flatten(old), flatten(new)
    pairs = ((key, before.get(key, MISSING), after.get(key, MISSING)) for key in {**before, **after})
    return [Difference(key, was, now) for key, was, now in pairs if was != now]


@contextmanager
def named_errors(source: str) -> Iterator[None]:
    """Puts the name of the job file before errors that begin with a key of it."""
    try:
        yield
    except DescriptionError as error:
        raise DescriptionError(f"{source}: {error}") from error


def _error(where: str, problem: object) -> DescriptionError:
    """One line, whatever was in the text that it quotes."""
    return DescriptionError(" ".join(f"{where}: {problem}".split()))


# --- YAML ---


def _read_written(language: Language, text: str, source: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What is written, and the defaults beside it."""
    try:
        written = _read_yaml(text)
        if not isinstance(written, dict) or not written:
            problem = "is empty" if written in (None, {}) else f"must be a mapping, got {_show(written)}"
            raise _error(source, f"{problem}; it needs {language.needs}")
        return _completed(language.section_of(written), {**defaults, **written})
    except yaml.YAMLError as error:
        raise _error(source, _syntax_problem(error, text)) from error
    except FieldError as error:
        raise _error(source, error) from error


def _read_yaml(text: str) -> Any:
    """Plain data with its interpolations unresolved.

    Raises:
        FieldError: For a value that OmegaConf refuses, or that YAML reads otherwise than it looks.
        yaml.YAMLError: For what is not YAML.
    """
    try:
        # The pure Python loader goes first: on brackets nested without end, the C loader ends the process.
        _refuse_tags(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_ambiguous_scalars(root, "", set())
        if not isinstance(root, yaml.CollectionNode):
            return root and root.value  # OmegaConf would make the mapping {word: null} of a bare word
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except OmegaConfBaseException as error:
        raise _field_error(error, {}) from error
    except RecursionError:
        raise yaml.YAMLError("lists or mappings are nested too deeply") from None


def _refuse_tags(text: str) -> None:
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if tag := getattr(event, "tag", None):
            name = tag.replace(_TYPE, "!!")
            raise yaml.MarkedYAMLError(problem=f"the tag {name} is not supported", problem_mark=event.start_mark)


_FLOAT = r"(?i:[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan)"

_TYPE = "tag:yaml.org,2002:"
_BASE_10 = "in another base than 10; write it in decimal"

# What YAML 1.1 reads as these types, as far as a reader takes it for the same; but 010 is 8, 1:30 is 90, no is false.
_UNAMBIGUOUS: Mapping[str, tuple[str, str]] = {
    f"{_TYPE}bool": (r"(?i:true|false)", "as true or false; write that"),
    f"{_TYPE}int": (r"[-+]?(0|[1-9][0-9_]{0,999}|0x[0-9a-fA-F]{1,999})", _BASE_10),
    f"{_TYPE}float": (_FLOAT, _BASE_10),
}


def _refuse_ambiguous_scalars(node: yaml.Node | None, key: str, seen: set[yaml.Node | None]) -> None:
    if node in seen:  # an alias, which may lead back to its own parent
        return
    seen.add(node)
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            for part in (name, value):
                _refuse_ambiguous_scalars(part, _join(key, str(name.value)), seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _refuse_ambiguous_scalars(item, f"{key}[{index}]", seen)
    elif isinstance(node, yaml.ScalarNode) and node.tag in _UNAMBIGUOUS:
        looks_like, reads = _UNAMBIGUOUS[node.tag]
        if not re.fullmatch(looks_like, node.value):
            problem = f"is written {_clipped(node.value)}, which YAML reads {reads}"
            raise FieldError(key or "value", f"{problem}, or quote it if it is text")


def _syntax_problem(error: yaml.YAMLError, text: str) -> str:
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


# --- Overrides ---


def _key(override: str) -> str:
    return override.partition("=")[0]


def _override(job: dict[str, Any], override: str) -> str:
    """Sets one ``key=value`` in the job, and returns the key in its full form."""
    key, equals, text = override.partition("=")
    path = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    if not equals or not all(part and part == part.strip() for part in path):
        raise FieldError("an override", f"must be key=value, got {override!r}")
    return _set(job, path, _override_value(key, text), "")


def _override_value(key: str, text: str) -> Any:
    if not text.strip():
        raise FieldError(key, f"has no value; write {key}=null for none")
    if text.startswith("*"):  # a pattern: within one value there is nothing that a YAML alias could refer to
        return text
    name = "value"
    line = f"{name}: {text}".rstrip()
    try:
        value = _read_yaml(line)[name]
        end = yaml.compose(line, Loader=yaml.SafeLoader).value[0][1].end_mark.index
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise FieldError(key, f"must be a YAML value, got {_clipped(repr(text))}: {problem}; quote it") from error
    except FieldError as error:
        raise FieldError(key + error.key.removeprefix(name), error.problem) from error
    if end != len(line):  # what follows a # or a line break would be lost
        raise FieldError(key, f"must be one YAML value, got {_clipped(repr(text))}; quote it")
    return value


def _set(parent: Any, path: Sequence[str], value: Any, at: str) -> str:
    name, *rest = path
    index: str | int = name
    if isinstance(parent, list):
        key = f"{at}[{name}]"
        if not name.isdecimal() or int(name) >= len(parent):
            raise FieldError(key, f"does not exist, {at} has {len(parent)} items; write the whole list")
        index = int(name)
    elif isinstance(parent, dict):
        key = _join(at, name)
        if rest and parent.get(name) is None:
            parent[name] = {}
    else:
        raise FieldError(at, f"is {_show(parent)}, which has nothing in it to set; write the whole of {at}")
    if rest:
        return _set(parent[index], rest, value, key)
    parent[index] = value
    return key


# --- Defaults ---


def _completed(hint: Any, value: Any) -> Any:
    """What is written for a type, each section with its defaults, in the order of the dataclass, before unknown keys.

    A value of a wrong type is left for the check to refuse.
    """
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return [_completed(typing.get_args(hint)[0], item) for item in value]
    section = next((member for member in union_members(hint) if dataclasses.is_dataclass(member)), None)
    shorthand = shorthand_of(section)
    if isinstance(value, str) and shorthand and ("${" not in value or shorthand != "_target_"):
        value = {shorthand: value}
    if not is_section(section) or not isinstance(value, dict):
        return value
    hints = typing.get_type_hints(section)
    complete: dict[str, Any] = {}
    for field in own_fields(section):
        item = value.get(field.name, default_of(field))
        if item is NO_DEFAULT and is_section(hints[field.name]) and not has_target(hints[field.name]):
            item = {}  # its own defaults, or its own missing keys
        if item is not NO_DEFAULT:
            complete[field.name] = _completed(hints[field.name], item)
    rest = {name: item for name, item in value.items() if name not in complete}
    return {**rest, **complete} if has_target(section) else {**complete, **rest}


# --- Interpolations ---


_PLAN = {name: f"${{plan.steps:{name}}}" for name in ("total_steps", "steps_per_epoch")}
"""Stands in the job as ``plan`` while it is resolved, so that ``${plan.total_steps}`` finds something there."""


def _plan_steps(epochs: Any) -> PlanValue:
    if isinstance(epochs, str) and epochs in _PLAN:
        return PlanValue(epochs)
    if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not 0 <= epochs < float("inf"):
        raise ValueError(f"plan.steps takes a number of epochs, got {epochs}")
    return PlanValue("steps", epochs)


def _environment_variable(name: str, *default: Any, _root_: DictConfig) -> str | None:
    """``oc.env``, which notes the names of the variables that it reads in the cache of the whole description."""
    if name in os.environ:
        OmegaConf.get_cache(_root_)["oc.env"][name] = None
    return oc.env(name, *default)


OmegaConf.register_resolver("oc.env", _environment_variable, replace=True)
OmegaConf.register_resolver("plan.steps", _plan_steps, replace=True)  # replace: a module may be imported anew


def _resolved(job: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The job with every interpolation replaced by its value or a ``PlanValue``, and the variables that it reads."""
    try:
        config = OmegaConf.create({"plan": _PLAN, **job})
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _field_error(error, job) from error
    assert isinstance(resolved, dict)
    return {str(name): resolved[name] for name in job}, tuple(OmegaConf.get_cache(config)["oc.env"])


def _field_error(error: OmegaConfBaseException, job: dict[str, Any]) -> FieldError:
    """What OmegaConf found wrong, in our words."""
    key = error.full_key or "a key"
    written = next((str(value) for name, value in _leaves(job, "") if name == key), "an interpolation")
    reason = str(error).splitlines()[0]
    if isinstance(error, MissingMandatoryValue):
        return FieldError(key, "is still '???'; write its value")
    if isinstance(error, InterpolationKeyError) and (missing := re.match("Interpolation key '(.*?)'", reason)):
        known = [name for name, _ in _leaves(job, "")] + [f"plan.{name}" for name in (*_PLAN, "steps:EPOCHS")]
        suggestion = nearest(missing[1], known) or "; write one of the keys of this file"
        return FieldError(key, f"is {written}, but there is no key {missing[1]!r}{suggestion}")
    if variable := re.search("Environment variable '(.*)' not found", reason):
        name = variable[1]
        return FieldError(key, f"is {written}, but {name} is not set; set it, or write ${{oc.env:{name},DEFAULT}}")
    if isinstance(error, UnsupportedInterpolationType):
        resolver = reason.rpartition(" ")[2]
        known = ["oc.env", "oc.decode", "oc.select", "plan.steps"]
        return FieldError(key, f"is {written}, but there is no resolver {resolver!r}{nearest(resolver, known)}")
    if isinstance(error, GrammarParseError):
        return FieldError(key, f"is not a well-formed interpolation: {reason}; write ${{key}} or ${{oc.env:NAME}}")
    if "ecursive interpolation" in reason or "parent node" in reason:
        return FieldError(key, f"is {written}, which leads back to itself; write the value in one place")
    if isinstance(error, InterpolationResolutionError):
        return FieldError(key, f"is {written}: {reason.rpartition(' while resolving interpolation: ')[2]}")
    return FieldError(key, f"cannot be read: {reason}")


# --- From plain data to dataclasses ---


def _checked(language: Language, written: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The spec of what is written, and that with its defaults: an override may have begun a section."""
    section = language.section_of(written)
    written = _completed(section, written)
    return _section(section, _resolved(written)[0], ""), written


def _is_sound(language: Language, written: dict[str, Any]) -> bool:
    try:
        _checked(language, written)
    except FieldError:
        return False
    return True


def _section(section: Any, value: dict[Any, Any], key: str) -> Any:
    """Builds a dataclass; what its fields do not name goes to its target or its args, if it has such."""
    hints = typing.get_type_hints(section)
    own = {field.name: field for field in own_fields(section)}
    rest = {name: item for name, item in value.items() if name not in own}
    values: dict[str, Any] = {}
    if "factory" in hints:
        values["factory"] = _target(rest, key)
    elif "args" in hints:
        values["args"] = _arguments(rest, key)
    elif rest:
        name = next(iter(rest))
        suggestion = nearest(str(name), own) or f"; the keys here are {', '.join(own)}"
        raise FieldError(_join(key, str(name) or "''"), f"is not a known key{suggestion}")
    for name, field in own.items():
        if name in value:
            values[name] = _value(hints[name], value[name], _join(key, name))
        elif is_required(field):
            raise FieldError(_join(key, name), f"is missing; write {type_words(hints[name])}")
    try:
        return section(**values)
    except FieldError as error:
        raise FieldError(_join(key, error.key), error.problem) from error


def _value(hint: Any, value: Any, key: str) -> Any:
    """The value as the type asks for it; its type must fit as it is, but for a whole number that is a number."""
    for member in union_members(hint):
        origin, items = typing.get_origin(member), typing.get_args(member)
        shorthand = shorthand_of(member)
        written = {shorthand: value} if shorthand and isinstance(value, str) else value
        if dataclasses.is_dataclass(member) and isinstance(written, dict):
            return _target(written, key) if member is Target else _section(member, written, key)
        if origin is Mapping and isinstance(value, dict):
            return {str(name): _value(items[1], item, _join(key, str(name))) for name, item in value.items()}
        if origin is tuple and isinstance(value, list):
            return tuple(_value(items[0], item, f"{key}[{index}]") for index, item in enumerate(value))
        if origin is Literal and value in items:
            return value
        if member is float and type(value) is int and abs(value) < 2**1000:  # a float can be no larger
            return float(value)
        if type(value) is member:
            return _text(value, key) if member is str else value
    raise FieldError(key, f"must be {type_words(hint)}, got {_show(value)}{_advice(hint, value)}")


def _advice(hint: Any, value: Any) -> str:
    """What to do about a value of the wrong type."""
    members = union_members(hint)
    if isinstance(value, PlanValue):
        return "; only arguments of model, data, loss, optimizer and scheduler can wait for the plan"
    if str in members and isinstance(value, (bool, int, float)):
        return "; quote it"
    literals = [member for member in members if typing.get_origin(member) is Literal]
    choices = [choice for literal in literals for choice in typing.get_args(literal)]
    if isinstance(value, str) and (suggestion := nearest(value, choices)):
        return suggestion
    if int in members and isinstance(value, float):
        return f"; write {int(value)}" if value.is_integer() else "; write a whole number"
    if (int in members or float in members) and isinstance(value, str) and re.fullmatch(_FLOAT, value):
        return f"; {NUMBER_FROM_TEXT}"
    if value is None:
        return "; write it, or remove the key"
    return ""


def _target(value: dict[Any, Any], key: str) -> Target:
    written = dict(value)
    if "_target_" not in written:
        _arguments(written, key)  # a misspelt _target_ is told as such
        raise FieldError(key, "has no _target_; write what to build, an import path such as package.Name")
    path, partial = written.pop("_target_"), written.pop("_partial_", False)
    if not isinstance(path, str) or not all(part.isidentifier() and not iskeyword(part) for part in path.split(".")):
        raise FieldError(_join(key, "_target_"), f"must be an import path such as package.Name, got {_show(path)}")
    if not isinstance(partial, bool):
        raise FieldError(_join(key, "_partial_"), f"must be true or false, got {_show(partial)}")
    return Target(path, _arguments(written, key), partial)


def _arguments(args: dict[Any, Any], key: str) -> dict[str, Any]:
    for name in [*_special(args), *args]:
        if name == "_args_":
            raise FieldError(_join(key, name), "is not supported; write every argument by its name")
        if name in _special(args):
            raise FieldError(_join(key, name), f"is not a known key{nearest(name, ['_target_', '_partial_'])}")
        if not isinstance(name, str) or not name.isidentifier() or iskeyword(name):
            raise FieldError(_join(key, str(name)), f"cannot be an argument, got {name!r}; write a Python name")
    return {name: _argument(item, _join(key, name)) for name, item in args.items()}


def _argument(value: Any, key: str) -> Any:
    """The value of an argument: a scalar, a list, a mapping, a target, or what only the plan knows."""
    if isinstance(value, dict):
        if "_target_" in value:
            return _target(value, key)
        if special := _special(value):
            suggestion = nearest(special[0], ["_target_"])
            raise FieldError(_join(key, special[0]), f"stands in a mapping without _target_{suggestion}")
        return {name: _argument(item, _join(key, str(name))) for name, item in value.items()}
    if isinstance(value, list):
        return [_argument(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, str):
        return _text(value, key)
    if value is None or isinstance(value, (bool, int, float, PlanValue)):
        return value
    raise FieldError(key, f"must be text, a number, true, false, null, a list or a mapping, got {_show(value)}")


def _text(value: str, key: str) -> str:
    if "${plan." in value:
        raise FieldError(key, f"cannot be part of a text, got {value!r}; write ${{plan...}} alone")
    return value


def _special(mapping: dict[Any, Any]) -> list[str]:
    """The keys that look like ``_target_``."""
    return [name for name in mapping if isinstance(name, str) and re.fullmatch(r"_[a-z]+_", name)]


# --- Keys and values ---


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key and name else key or name


def _is_within(key: str, outer: str) -> bool:
    return key == outer or key.startswith((f"{outer}.", f"{outer}["))


def _plain(value: Any) -> Any:
    """Dataclasses as the plain data that they are written as."""
    if isinstance(value, PlanValue):
        return str(value)
    if isinstance(value, Target):
        partial = {"_partial_": True} if value.partial else {}
        return {"_target_": value.path, **partial, **_plain(value.args)}
    if dataclasses.is_dataclass(value):
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            item = _plain(getattr(value, field.name))
            plain.update(item if field.name in ("factory", "args") else {field.name: item})
        return plain
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value with its key; a list of scalars is one value."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, _join(key, str(name)))
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{key}[{index}]")
    else:
        yield key, value


def _show(value: object) -> str:
    """A value as it looks in YAML, in a few words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, PlanValue):
        return str(value)
    return _clipped(repr(value))


def _clipped(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
