"""Reads YAML and ``key=value`` overrides into a spec; every error names the file and the full key.

The rest of the code sees dataclasses, and neither YAML nor OmegaConf. This room imports neither torch nor Ray, so that
mistakes are reported at once.
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
from launcher.config.interpolation import resolve
from launcher.config.keys import is_within, show
from launcher.config.overrides import key_of, refuse_python_in, set_override
from launcher.config.sections import build_section, with_defaults
from launcher.config.yaml_reader import read_yaml, refuse_python, syntax_problem, to_yaml

__all__ = [
    "JOBS", "MISSING", "ClusterOverride", "Description", "Difference", "Language", "differences", "flatten", "load",
    "named_errors", "parse", "read", "read_text",
]  # fmt: skip

_COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Language:
    """One kind of description file, such as jobs or clusters."""

    section_of: Callable[[Mapping[str, Any]], type]
    """Returns the dataclass for the top level of a file; raises ``FieldError`` if the file does not determine it."""
    needs: str
    """The keys that every file must have, in words for an error text."""


JOBS: Final = Language(lambda _: JobSpec, "model, data.train, loss and optimizer")


@dataclass(frozen=True, slots=True)
class Description:
    """A job description that was read and checked."""

    spec: JobSpec
    """The job, with every interpolation resolved."""
    text: str
    """YAML of the defaults, the file and the overrides. Interpolations are kept, so that no secret is written. The
    cluster's worker settings are left out, since they hold on that cluster alone."""
    source: str
    """The name of the description in errors, such as ``digits.yaml``."""
    of_cluster: tuple["ClusterOverride", ...] = ()
    """The cluster's worker settings that no override replaced."""

    @property
    def document(self) -> dict[str, Any]:
        """``text`` as plain values. Interpolations are kept, so that it may be shown anywhere."""
        document: dict[str, Any] = yaml.safe_load(self.text)
        return document

    def variables(self) -> tuple[str, ...]:
        """Return the environment variables that ``spec`` took values from; not those that fell back to a default."""
        return resolve(self.document)[1]


class ClusterOverride(str):
    """An override from the description of a cluster; it holds for a run only while the run is on that cluster."""

    __slots__ = ()


def load(path: str | Path, overrides: Sequence[str] = ()) -> Description:
    """Read a job file.

    Raises:
        DescriptionError: The description has a mistake; the text is one line.
    """
    path = Path(path)
    return parse(read_text(path), path.name, overrides, default_name=path.stem)


def read_text(path: Path) -> str:
    """Return the text of a description file.

    Raises:
        DescriptionError: The file cannot be read; the text is one line.
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
    """Read a job description from text, such as a run's ``job.yaml``.

    An override sets the whole value of its key; the keys beside it stay.

    Raises:
        DescriptionError: The description has a mistake; the text is one line.
    """
    defaults = {} if default_name is None else {"name": default_name}
    spec, written = read(JOBS, text, source, overrides, defaults)
    of_cluster = [override for override in overrides if isinstance(override, ClusterOverride)]
    if of_cluster:
        of_user = [override for override in overrides if not isinstance(override, ClusterOverride)]
        written = read(JOBS, text, source, of_user, defaults)[1]
        replaced = [key_of(override) for override in of_user]
        of_cluster = [
            override for override in of_cluster if not any(is_within(key_of(override), key) for key in replaced)
        ]
    return Description(spec, written, source, tuple(of_cluster))


def read(
    language: Language, text: str, source: str, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> tuple[Any, str]:
    """Read a description in any language.

    Args:
        language: The kind of description.
        text: YAML.
        source: The name of the description in errors.
        overrides: ``key=value``; each sets the whole value of its key.
        defaults: Values of top-level keys that the text may leave out.

    Returns:
        The spec with every interpolation resolved; and YAML of the defaults, the text and the overrides, with its
        interpolations.

    Raises:
        DescriptionError: The description has a mistake; the text is one line.
    """
    written = _read_document(language, text, source, defaults or {})
    try:
        overridden = [set_override(written, override) for override in overrides]
    except FieldError as error:
        raise _error(_COMMAND_LINE, error) from error
    try:
        spec, written = _build_spec(language, written)
    except FieldError as error:
        by_override = overridden and (
            any(is_within(error.key, key) for key in overridden)
            or _is_valid(language, _read_document(language, text, source, defaults or {}))
        )
        raise _error(_COMMAND_LINE if by_override else source, error) from error
    _refuse_python(text, source, overrides)  # last, since the language says what a key of its own needs
    return spec, to_yaml(written)


@contextmanager
def named_errors(source: str) -> Iterator[None]:
    """Put the name of the job file before errors whose text begins with a key of the file."""
    try:
        yield
    except DescriptionError as error:
        raise DescriptionError(f"{source}: {error}", error.traceback) from error


def _read_document(language: Language, text: str, source: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Read the YAML and fill in the defaults."""
    try:
        written = read_yaml(text)
        if not isinstance(written, dict) or not written:
            problem = "is empty" if written in (None, {}) else f"must be a mapping, got {show(written)}"
            raise _error(source, f"{problem}; it needs {language.needs}")
        document: dict[str, Any] = with_defaults(language.section_of(written), {**defaults, **written})
        return document
    except yaml.YAMLError as error:
        raise _error(source, syntax_problem(error, text)) from error
    except FieldError as error:
        raise _error(source, error) from error


def _build_spec(language: Language, written: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the spec, and the document with the defaults of sections that an override has added."""
    section = language.section_of(written)
    written = with_defaults(section, written)
    return build_section(section, resolve(written)[0], ""), written


def _refuse_python(text: str, source: str, overrides: Sequence[str]) -> None:
    """Refuse values of Python, such as ``None``, that YAML reads as text."""
    try:
        refuse_python(text)
    except FieldError as error:
        raise _error(source, error) from error
    try:
        for override in overrides:
            refuse_python_in(override)
    except FieldError as error:
        raise _error(_COMMAND_LINE, error) from error


def _is_valid(language: Language, written: dict[str, Any]) -> bool:
    try:
        _build_spec(language, written)
    except FieldError:
        return False
    return True


def _error(where: str, problem: object) -> DescriptionError:
    """Return an error of one line: line breaks in quoted text become spaces."""
    return DescriptionError(" ".join(f"{where}: {problem}".split()))
