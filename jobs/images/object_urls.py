"""From URLs with braces, patterns, or the name of a folder to the objects that a store holds."""

import os
import posixpath
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from cluster.storage.store import Store
from cluster.storage.stored_objects import StoredObject
from jobs.images.indexing.index import IndexBuilder

_WILD = re.compile(r"[*?\[]")
_SPECIAL = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")
_MOST = 1_000_000
"""Names that a text with braces stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectKind:
    """What is looked for."""

    name: str
    """For people: ``tar file``."""
    suffixes: tuple[str, ...]
    """How names end, in lower case; without a pattern, a URL that ends otherwise is a folder."""
    hidden: tuple[str, ...]
    """What the names of files and folders begin with that count only where a URL names them."""
    is_below: bool
    """A folder stands for all objects below it, not only for those directly in it."""

    def is_one(self, name: str) -> bool:
        """Returns whether this is the name of one."""
        return name.lower().endswith(self.suffixes)


def split_urls(urls: str | os.PathLike[str] | Sequence[str], kind: ObjectKind) -> tuple[str, list[str]]:
    """Returns the URL of the folder that holds all objects, and what each URL names below it; empty: all in it.

    Raises:
        ValueError: The URLs have no folder in common, or are no URLs of objects.
        StorageError: A URL is not valid here, or holds a secret.
    """
    given = [urls] if isinstance(urls, str | os.PathLike) else list(urls)
    each = [os.fspath(url) for url in given if isinstance(url, str | os.PathLike)]
    if not each or len(each) < len(given) or not all(each):
        raise ValueError(
            f"urls must be a URL or a list of URLs, got {urls!r}; write s3://bucket/part-{{000..146}}{kind.suffixes[0]}"
        )
    folders, rests = zip(*(_split(url, kind) for url in each))
    parts = [folder.rstrip("/").split("/") for folder in folders]
    common = os.path.commonprefix(parts)
    if len(common) < (3 if "://" in folders[0] else 1):
        raise ValueError(f"urls must lie in one bucket, got {folders[0]} and others; copy them to one")
    below = ["/".join(filter(None, [*own[len(common) :], rest])) for own, rest in zip(parts, rests)]
    return "/".join(common) or "/", below


def _split(url: str, kind: ObjectKind) -> tuple[str, str]:
    """Returns the canonical URL of a folder, and the rest, which has braces, patterns or the name of an object."""
    if url.startswith("pipe:") or "::" in url:
        raise ValueError(
            f"urls must hold URLs alone, got {url!r}; write s3://bucket/name{kind.suffixes[0]}, and several as a list"
        )
    special = _SPECIAL.search(url)
    if special is None and not kind.is_one(url):
        return Store(url).url, ""
    begin = url.rfind("/", 0, special.start() if special else None)
    folder = url[: begin + 1] if begin >= 0 else "."
    if folder.endswith("://"):
        raise ValueError(f"urls must name one bucket, got {url!r}; write it without braces and patterns")
    return Store(folder).url, url[begin + 1 :]


def expand_braces(text: str) -> list[str]:
    """Returns what a text with braces stands for, as in a shell: ``{000..146}``, ``{a,b}``, one within another.

    Raises:
        ValueError: The braces are wrong, or stand for more than a million names.
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
    if len(options) * len(ends) > _MOST:
        raise ValueError(f"urls must name at most {_MOST} files, got {text!r}; correct the braces")
    return [text[:begin] + option + tail for option in options for tail in ends]


def _range(text: str) -> list[str]:
    found = _RANGE.fullmatch(text)
    if found is None:
        raise ValueError(f"urls must have a range or a list in braces, got {{{text}}}; write {{000..146}} or {{a,b}}")
    first, last, step = int(found[1]), int(found[2]), int(found[3] or 1) or 1
    if abs(last - first) // step >= _MOST:
        raise ValueError(f"urls must name at most {_MOST} files, got {{{text}}}; correct the range")
    is_padded = any(re.match(r"-?0\d", bound) for bound in (found[1], found[2]))
    width = max(len(found[1]), len(found[2])) if is_padded else 0
    up = last >= first
    return [f"{number:0{width}d}" for number in range(first, last + (1 if up else -1), step if up else -step)]


def find_objects(store: Store, names: Sequence[str], kind: ObjectKind, builder: IndexBuilder) -> list[StoredObject]:
    """Returns the objects that a store holds, in the order of their URLs; those of a folder or pattern by name.

    Notes in the builder which objects of a folder are passed over. Folders are listed once, and for all names those of
    a depth concurrently.

    Args:
        store: The folder that holds all of them.
        names: What URLs name below it, see ``split_urls``.
        kind: What they are.
        builder: Of the index that they are for.

    Raises:
        ValueError: A name stands for no object, or two for the same.
        StorageError: The store cannot be listed.
    """
    expanded = [each for name in names for each in expand_braces(name)]
    for name in expanded:
        if name == "**" or name.endswith("/**"):
            raise ValueError(f"{store.url}/{name}: ends in **, which names folders; write **/*{kind.suffixes[0]}")
    named, others = _Folders(store, kind).objects([name.split("/") if name else [] for name in expanded])
    found: dict[str, StoredObject] = {}
    for _, each in named:
        if each.name in found:
            raise ValueError(f"{store.url}/{each.name}: is named twice in urls; name it once")
        found[each.name] = each
    for other in others:
        is_hidden = other.rpartition("/")[2].startswith(kind.hidden)
        builder.pass_over("hidden" if is_hidden else f"no {kind.name}", other)
    present = {number for number, _ in named}
    missing = [f"{store.url}/{name}".rstrip("/") for number, name in enumerate(expanded) if number not in present]
    if missing:
        others_too = f", nor do {len(missing) - 1} others of {len(expanded)}" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]}: names no {kind.name}{others_too}; restore what is gone, or correct urls")
    return list(found.values())


def check_parts(url: str, folder: str, names: Collection[str]) -> None:
    """Raises a ValueError if a folder of a store holds objects like ``FOLDER//NAME``, see ``ListedPage``."""
    if "" in names:
        where = f"{url.rstrip('/')}/{folder}".rstrip("/")
        raise ValueError(f"{where}//: no name of an object may have an empty part; write those again without it")


class _Folders:
    """The folders of a store; each is listed once."""

    def __init__(self, store: Store, kind: ObjectKind) -> None:
        self._store, self._kind = store, kind
        self._listed: dict[str, tuple[set[str], dict[str, StoredObject]]] = {}

    def objects(self, names: Sequence[Sequence[str]]) -> tuple[list[tuple[int, StoredObject]], list[str]]:
        """Returns the objects that names, given by their parts, stand for, and what was passed over.

        Objects have the number of their name, and come in the order of these numbers, then by name; others by name.
        """
        found: set[tuple[int, str, str]] = set()
        others: set[str] = set()
        level: list[tuple[int, str, Sequence[str]]] = [(number, "", parts) for number, parts in enumerate(names)]
        while level:
            self._list({folder for _, folder, _ in level})
            below: list[tuple[int, str, Sequence[str]]] = []
            for number, folder, left in level:
                folders, objects = self._listed[folder]
                below += [(number, _join(folder, name), rest) for name, rest in self._below(folders, left)]
                for name in self._named(objects, left):
                    full = _join(folder, name)
                    if self._kind.is_one(name) and (left or not self._is_hidden(name)):
                        found.add((number, full, folder))
                    else:
                        others.add(full)
            level = below
        return [
            (number, replace(self._listed[folder][1][posixpath.basename(full)], name=full))
            for number, full, folder in sorted(found)
        ], sorted(others)

    def _list(self, folders: set[str]) -> None:
        new = sorted(folders - self._listed.keys())
        self._listed |= {folder: (set(), {}) for folder in new}
        for folder, page in self._store.pages(new):
            check_parts(self._store.url, folder, page.folders)
            self._listed[folder][0].update(page.folders)
            self._listed[folder][1].update((each.name, each) for each in page.objects)

    def _below(self, folders: Collection[str], parts: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
        """Yields folders in a folder that may hold what is named, and what is left of its parts there."""
        if not parts:
            yield from ((name, parts) for name in folders if self._kind.is_below and not self._is_hidden(name))
        elif parts[0] == "**":
            yield from ((name, parts) for name in folders if not self._is_hidden(name))
            yield from self._below(folders, parts[1:])
        else:
            yield from ((name, parts[1:]) for name in self._fitting(folders, parts[0]))

    def _named(self, objects: Collection[str], parts: Sequence[str]) -> Collection[str]:
        """Returns the objects of a folder that are named; without parts, all."""
        own = parts[1:] if parts and parts[0] == "**" else parts
        if not own:
            return objects
        return self._fitting(objects, own[0]) if len(own) == 1 else ()

    def _fitting(self, names: Collection[str], part: str) -> list[str]:
        """Returns the names that a part stands for; as in a shell, a pattern stands for no hidden ones."""
        if not _WILD.search(part):
            return [part] if part in names else []
        return [name for name in names if fnmatchcase(name, part) and (not self._is_hidden(name) or name[0] == part[0])]

    def _is_hidden(self, name: str) -> bool:
        return name.startswith(self._kind.hidden)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
