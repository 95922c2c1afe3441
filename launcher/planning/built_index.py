"""An index of data that the dry run has made, on its way to the driver, which may be on another host."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.errors import listed

if TYPE_CHECKING:
    from jobs.images.indexing.index import Index, Source


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltIndex:
    """An index, see ``jobs.images.indexing.index``."""

    source: str
    """The id of the source that it lists."""
    url: str
    """Where the data lies."""
    place: str
    """The same for people, with the names or patterns of objects that the description has."""
    digest: str
    num_samples: int
    num_objects: int
    """The objects that hold the samples."""
    num_classes: int
    """0: labels are numbers to predict."""
    passed_over: Mapping[str, tuple[int, str]]
    """By reason: how many names are no samples, and the first of them."""
    content: bytes = field(repr=False)
    """The file, packed."""

    def as_dict(self) -> dict[str, Any]:
        """Return the index as plain values, without its content, for ``--json``."""
        values = asdict(self)
        del values["content"]
        return values


def built_indexes(opened: Mapping[str, "Index"]) -> tuple[BuiltIndex, ...]:
    """Return the indexes that a process has opened, by the ids of their sources, to send them to another one."""
    from jobs.images.indexing.index_files import pack_index  # not in the driver, which only receives them

    return tuple(
        BuiltIndex(
            source=source,
            url=index.source.url,
            place=place_of(index.source),
            digest=index.digest,
            num_samples=len(index),
            num_objects=index.num_objects,
            num_classes=len(index.classes),
            passed_over=index.passed_over,
            content=pack_index(index),
        )
        for source, index in opened.items()
    )


def place_of(source: "Source") -> str:
    """Return where data lies, for people: its URL, and the names or patterns below it that the description has."""
    names = [name for name in source.options.get("urls", ()) if name]
    return f"{source.url.rstrip('/')}/{listed(names, most=2)}" if names else source.url


def digests_of(indexes: Iterable[BuiltIndex]) -> dict[str, str]:
    """Return the digest of each index by the id of its source."""
    return {index.source: index.digest for index in indexes}
