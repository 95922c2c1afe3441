"""From URLs of shards, with WebDataset's braces and with patterns, to the shards that a store holds."""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from cluster.storage.store import Store, StoredObject
from jobs.images.index import IndexBuilder
from jobs.images.tar_members import UNPACK

_SUFFIX = ".tar"
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.\w+)$", re.I)
_PATTERN = re.compile(r"[*?\[]")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")
_MOST = 1_000_000
"""Shards of a range."""


def split_urls(urls: str | Sequence[str]) -> tuple[str, list[str]]:
    """Returns the URL of the folder that holds all shards, and what each URL names below it.

    Raises:
        ValueError: The URLs have no folder in common, or are no URLs of shards.
        StorageError: A URL is not valid here.
    """
    each = [urls] if isinstance(urls, str) else list(urls)
    if not each or not all(isinstance(url, str) and url for url in each):
        raise ValueError(
            f"urls must be a URL or a list of URLs, got {urls!r}; write s3://bucket/shard-{{000..146}}.tar"
        )
    folders, rests = zip(*map(_split, each))
    parts = [folder.split("/") for folder in folders]
    common = os.path.commonprefix(parts)
    if len(common) < (3 if "://" in folders[0] else 1):
        raise ValueError(f"urls must lie in one bucket, got {folders[0]} and others; copy them to one")
    below = ["/".join(filter(None, [*own[len(common) :], rest])) for own, rest in zip(parts, rests)]
    return "/".join(common) or "/", below


def _split(url: str) -> tuple[str, str]:
    """Returns the canonical URL of a folder, and the rest, which has braces, patterns or the name of a shard."""
    if url.startswith("pipe:") or "::" in url:
        raise ValueError(f"urls must hold URLs alone, got {url!r}; write s3://bucket/name.tar, and several as a list")
    special = re.search(r"[*?\[{]", url)
    if special is None and not url.lower().endswith(_SUFFIX) and not _COMPRESSED.search(url):
        return Store(url).url, ""
    begin = url.rfind("/", 0, special.start() if special else None)
    folder = url[: begin + 1] if begin >= 0 else "."
    if folder.endswith("://"):
        raise ValueError(f"urls must name one bucket, got {url!r}; write it without braces and patterns")
    return Store(folder).url, url[begin + 1 :]


def expand_braces(text: str) -> list[str]:
    """Returns what a text with braces stands for, as in a shell: ``{000..146}``, ``{a,b}``, one within another.

    Raises:
        ValueError: The braces are wrong.
    """
    begin = text.find("{")
    if begin < 0 and "}" not in text:
        return [text]
    commas, depth, end = [begin], 0, begin
    for end in range(max(begin, 0), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth <= 0:
            break
        if depth == 1 and text[end] == ",":
            commas.append(end)
    if begin < 0 or depth != 0 or "}" in text[:begin]:
        raise ValueError(f"urls must have a closing brace for each opening one, got {text!r}; correct it")
    if len(commas) == 1:
        options = _range(text[begin + 1 : end])
    else:
        options = [
            option
            for left, right in zip(commas, [*commas[1:], end])
            for option in expand_braces(text[left + 1 : right])
        ]
    ends = expand_braces(text[end + 1 :])
    return [text[:begin] + option + tail for option in options for tail in ends]


def _range(text: str) -> list[str]:
    found = _RANGE.fullmatch(text)
    if found is None:
        raise ValueError(f"urls must have a range or a list in braces, got {{{text}}}; write {{000..146}} or {{a,b}}")
    first, last, step = int(found[1]), int(found[2]), int(found[3] or 1) or 1
    if abs(last - first) // step >= _MOST:
        raise ValueError(f"urls must name at most {_MOST} shards, got {{{text}}}; correct the range")
    is_padded = any(re.match(r"-?0\d", bound) for bound in (found[1], found[2]))
    width = max(len(found[1]), len(found[2])) if is_padded else 0
    up = last >= first
    return [f"{number:0{width}d}" for number in range(first, last + (1 if up else -1), step if up else -step)]


def find_shards(store: Store, rests: Sequence[str], builder: IndexBuilder) -> list[StoredObject]:
    """Returns the shards that a store holds, in the order of their URLs; those of a folder or pattern by name.

    Notes in the builder which files of a folder are passed over.

    Raises:
        ValueError: A shard is missing, compressed or named twice.
    """
    names = [name for rest in rests for name in expand_braces(rest)]
    folders = _Folders(store, builder)
    found: dict[str, StoredObject] = {}
    missing: list[str] = []
    for name in names:
        shards = list(folders.shards(name.split("/")))
        if not shards:
            missing.append(name)
        for shard in shards:
            if shard.name in found:
                raise ValueError(f"{store.url}/{shard.name}: is named twice in urls; name it once")
            found[shard.name] = shard
    if missing and not found:
        raise ValueError(f"{store.url}: holds no {missing[0] or '.tar files'}; correct urls")
    if missing:
        raise ValueError(
            f"{store.url}: lacks {len(missing):,} of {len(names):,} shards, first {missing[0]}; restore them, or "
            "correct urls"
        )
    return list(found.values())


class _Folders:
    """The folders of a store; each is listed once."""

    def __init__(self, store: Store, builder: IndexBuilder) -> None:
        self._store, self._builder = store, builder
        self._listed: dict[str, tuple[list[str], dict[str, StoredObject]]] = {}

    def shards(self, parts: Sequence[str], folder: str = "") -> Iterator[StoredObject]:
        """Yields the shards that a name, given by its parts, stands for below a folder."""
        head, rest = parts[0], parts[1:]
        folders, objects = self._list(folder)
        if not head:
            yield from self._all(folder)
        elif not rest and (head.lower().endswith(_SUFFIX) or _COMPRESSED.search(head)):
            for name in _fitting(head, objects):
                yield self._shard(folder, name)
        else:
            for name in _fitting(head, folders):
                yield from self.shards(rest or [""], _join(folder, name))

    def _all(self, folder: str) -> Iterator[StoredObject]:
        for name in self._list(folder)[1]:
            if name.startswith("."):
                self._builder.pass_over("hidden file", _join(folder, name))
            elif name.lower().endswith(_SUFFIX) or _COMPRESSED.search(name):
                yield self._shard(folder, name)
            else:
                self._builder.pass_over("file other than .tar", _join(folder, name))

    def _list(self, folder: str) -> tuple[list[str], dict[str, StoredObject]]:
        if folder not in self._listed:
            folders, objects = self._store.listing(folder)
            self._listed[folder] = folders, {each.name: each for each in objects}
        return self._listed[folder]

    def _shard(self, folder: str, name: str) -> StoredObject:
        full = _join(folder, name)
        if _COMPRESSED.search(name):
            raise ValueError(f"{self._store.url}/{full}: is compressed; {UNPACK}")
        return replace(self._list(folder)[1][name], name=full)


def _fitting(pattern: str, names: Collection[str]) -> list[str]:
    """Returns the names that are wanted; as in a shell, a pattern does not fit hidden ones."""
    if not _PATTERN.search(pattern):
        return [pattern] if pattern in names else []
    return [name for name in names if fnmatchcase(name, pattern) and name.startswith(".") <= pattern.startswith(".")]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
