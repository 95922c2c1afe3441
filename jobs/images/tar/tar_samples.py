"""The samples of a tar shard, as WebDataset groups members: those that follow each other and share a key."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.storage.stored_objects import StoredObject
from jobs.images.tar.tar_members import Reads, TarMember, TarReader

_META = re.compile(r"__[^/]*__(/|$)|(.*/)?__MACOSX/")
"""Members that describe a shard, and what macOS adds to archives."""
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.S)
_MOST = 2**24
"""Bytes of a label's member."""
_IN_ORDER = "write all members of a sample next to each other, and no links (tar --sort=name --hard-dereference)"


@dataclass(frozen=True, slots=True)
class Layout:
    """Which members of a sample hold what."""

    images: Sequence[str]
    """Extensions in lower case, without the first dot; a sample's image is the first one that it has."""
    keys: Sequence[str] = ()
    """Of the ``.json``, that hold the label; empty: the ``.cls`` holds it."""

    @property
    def label(self) -> str:
        """The extension of the member that holds the label."""
        return "json" if self.keys else "cls"


@dataclass(slots=True)
class ShardSamples:
    """The samples of a shard."""

    shard: StoredObject
    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    values: list[list[Any]] = field(default_factory=list)
    """Of each sample: the integer of its ``.cls``, or what its ``.json`` has for each key."""
    passed_over: list[tuple[str, str]] = field(default_factory=list)
    """Why, and the name of the member."""


def read_samples(store_url: str, shard: StoredObject, layout: Layout) -> Reads[ShardSamples]:
    """Reads the headers of a shard, and its labels.

    Raises:
        ValueError: The shard is damaged, or a sample lacks its image or its label, or there are two of one key.
    """
    url = f"{store_url}/{shard.name}"
    tar, found = TarReader(url, shard), _Grouping(url, layout, ShardSamples(shard))
    while (member := (yield from tar.next_member())) is not None:
        reason, matched = _reason_to_pass_over(member), _KEY.fullmatch(member.name)
        if reason or matched is None:
            found.samples.passed_over.append((reason or "member without an extension", f"{shard.name}#{member.name}"))
            continue
        key, extension = matched[1], matched[2].lower()
        found.begin(key)
        if extension == layout.label:
            if member.size > _MOST:
                raise ValueError(f"{url}#{key}: its .{extension} has {member.size} bytes; name other members")
            content = yield from tar.content(member)
            found.values = _values(f"{url}#{key}", content, layout)
        found.add(extension, member)
    found.begin("")
    return found.samples


def _reason_to_pass_over(member: TarMember) -> str:
    if member.kind != "file":
        return f"{member.kind} in a shard"
    if _META.match(member.name):
        return "member that is no sample"
    return "hidden member" if member.name.rpartition("/")[2].startswith(".") else ""


class _Grouping:
    """Groups the members of a shard."""

    def __init__(self, url: str, layout: Layout, samples: ShardSamples) -> None:
        self.samples = samples
        self.values: list[Any] | None = None
        """What the label's member of the current sample holds."""
        self._url, self._layout = url, layout
        self._key = ""
        self._members: dict[str, TarMember] = {}
        self._seen: set[str] = set()

    def begin(self, key: str) -> None:
        """Ends the current sample, if the next member has another key."""
        if key == self._key:
            return
        if self._members:
            self._end()
        self._key, self._members, self.values = key, {}, None

    def add(self, extension: str, member: TarMember) -> None:
        """Adds a member to the current sample."""
        if extension in self._members:
            raise ValueError(f"{self._url}#{self._key}: has two members .{extension}; remove one")
        self._members[extension] = member

    def _end(self) -> None:
        layout, samples = self._layout, self.samples
        image = next((self._members[each] for each in layout.images if each in self._members), None)
        if image is None and self.values is None:
            samples.passed_over.append(("sample without image and label", f"{samples.shard.name}#{self._key}"))
            return
        if image is None or self.values is None:
            lacks = f"image (.{', .'.join(layout.images)})" if image is None else f"label (.{layout.label})"
            has = ", ".join(f".{extension}" for extension in self._members)
            raise ValueError(f"{self._url}#{self._key}: has no {lacks}, but {has}; {_IN_ORDER}")
        if self._key in self._seen:
            raise ValueError(f"{self._url}#{self._key}: occurs twice in the shard; remove one, or rename it")
        self._seen.add(self._key)
        samples.keys.append(self._key)
        samples.offsets.append(image.offset)
        samples.lengths.append(image.size)
        samples.values.append(self.values)


def _values(url: str, content: bytes, layout: Layout) -> list[Any]:
    """Returns what the label's member of a sample holds."""
    if not layout.keys:
        digits = content.strip()
        if not re.fullmatch(rb"[+-]?\d{1,18}", digits):
            raise ValueError(f"{url}: its .cls must hold an integer, got {digits[:40]!r}; correct it")
        return [int(digits)]
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{url}: its .json is not valid, {error}; correct it") from error
    if not isinstance(document, dict):
        raise ValueError(
            f"{url}: its .json must hold an object with {layout.keys[0]!r}; correct it, or name other keys"
        )
    for key in layout.keys:
        if key not in document:
            raise ValueError(
                f"{url}: its .json has no {key!r}, but {', '.join(document) or 'nothing'}; name another key"
            )
    return [document[key] for key in layout.keys]
