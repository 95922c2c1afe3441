"""From YAML and ``key=value`` overrides to a spec, of a job mostly, with the file and the full key in every error.

The rest of the code sees dataclasses, and neither YAML nor OmegaConf. Imports neither torch nor Ray, so that a mistake
is told at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from cluster.errors import DescriptionError, FieldError
from jobs.spec import JobSpec
from launcher.config.differences import MISSING, Difference, differences, flatten
from launcher.config.interpolation import resolved
from launcher.config.keys import is_within, show
from launcher.config.overrides import key_of, set_override
from launcher.config.sections import build_section, completed
from launcher.config.yaml_reader import read_yaml, syntax_problem, to_yaml

__all__ = [
    "JOBS", "MISSING", "Description", "Difference", "Language", "OfCluster", "differences", "flatten", "load",
    "named_errors", "parse", "read", "read_text",
]  # fmt: skip

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
        return resolved(self.document)[1]


class OfCluster(str):
    """An override that comes from the description of a cluster: a run keeps it only for as long as it is there."""

    __slots__ = ()


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
        of_cluster = [
            change for change in of_cluster if not any(is_within(key_of(change), key_of(each)) for each in own)
        ]
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
        overridden = [set_override(written, override) for override in overrides]
    except FieldError as error:
        raise _error(_COMMAND_LINE, error) from error
    try:
        spec, written = _checked(language, written)
    except FieldError as error:
        by_override = overridden and (
            any(is_within(error.key, key) for key in overridden)
            or _is_sound(language, _read_written(language, text, source, defaults or {}))
        )
        raise _error(_COMMAND_LINE if by_override else source, error) from error
    return spec, to_yaml(written)


@contextmanager
def named_errors(source: str) -> Iterator[None]:
    """Puts the name of the job file before errors that begin with a key of it."""
    try:
        yield
    except DescriptionError as error:
        raise DescriptionError(f"{source}: {error}") from error


def _read_written(language: Language, text: str, source: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What is written, and the defaults beside it."""
    try:
        written = read_yaml(text)
        if not isinstance(written, dict) or not written:
            problem = "is empty" if written in (None, {}) else f"must be a mapping, got {show(written)}"
            raise _error(source, f"{problem}; it needs {language.needs}")
        return completed(language.section_of(written), {**defaults, **written})
    except yaml.YAMLError as error:
        raise _error(source, syntax_problem(error, text)) from error
    except FieldError as error:
        raise _error(source, error) from error


def _checked(language: Language, written: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The spec of what is written, and that with its defaults: an override may have begun a section."""
    section = language.section_of(written)
    written = completed(section, written)
    return build_section(section, resolved(written)[0], ""), written


def _is_sound(language: Language, written: dict[str, Any]) -> bool:
    try:
        _checked(language, written)
    except FieldError:
        return False
    return True


def _error(where: str, problem: object) -> DescriptionError:
    """One line, whatever was in the text that it quotes."""
    return DescriptionError(" ".join(f"{where}: {problem}".split()))
