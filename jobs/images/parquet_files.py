"""Which Parquet files URLs name: a file, a folder, or a pattern; and which of them are the splits of a dataset."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from cluster.storage.store import Store, StoredObject
from jobs.images.class_folders import check_parts
from jobs.images.shard_urls import expand_braces

_SUFFIXES = (".parquet", ".pq")

_HIDDEN = (".", "_")
"""What the names of files and folders begin with that are no data, as Spark and pyarrow have it."""

_WORDS: dict[str, Literal["train", "val", "test"]] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""How names of files and folders say which split they hold, as Hugging Face's ``datasets`` reads them."""


@dataclass(frozen=True, slots=True)
class FilePatterns:
    """Files in a store."""

    url: str
    """Of the folder that holds all of them."""
    patterns: tuple[str, ...]
    """Relative to it; each names a file, a folder, or files by ``*``, ``?``, ``[abc]``, or ``**`` for any folders.
    Empty: the folder itself."""


def file_patterns(urls: str | os.PathLike[str] | Sequence[str]) -> FilePatterns:
    """Returns what URLs name, without looking at the store.

    Raises:
        ValueError: There is no URL, or they name several stores.
        StorageError: A URL is not valid here, or holds a secret.
    """
    texts = [os.fspath(urls)] if isinstance(urls, str | os.PathLike) else list(urls)
    if not texts:
        raise ValueError("urls must name a file, a folder or a pattern, got none; name one")
    texts = [name for text in texts for name in expand_braces(text)]
    named = [_folder_and_pattern(text) for text in texts]
    stores = [store for store, _, _ in named]
    for text, store in zip(texts, stores):
        if store != stores[0]:
            raise ValueError(f"urls must lie in one store, got {texts[0]} and {text}; copy them into one")
    shared = os.path.commonprefix([folders for _, folders, _ in named])
    patterns = ["/".join([*folders[len(shared) :], *pattern]) for _, folders, pattern in named]
    return FilePatterns("/".join([stores[0], *shared]) or "/", tuple(patterns))


def find_files(store: Store, patterns: Sequence[str]) -> tuple[list[StoredObject], list[str]]:
    """Returns the files that patterns name, and what else lies in folders and was passed over.

    Those of a pattern are sorted by name. Listings are concurrent.

    Raises:
        ValueError: A pattern names nothing, or two name the same file.
        StorageError: The store cannot be listed.
    """
    listings = _Listings(store)
    found: dict[str, StoredObject] = {}
    passed_over: list[str] = []
    for pattern in patterns:
        files, others = listings.files(pattern.split("/") if pattern else [])
        if not files:
            raise ValueError(f"{store.url}/{pattern}: holds no Parquet file; correct the URL, or name its files")
        for file in files:
            if file.name in found:
                raise ValueError(f"{store.url}/{file.name}: is named twice in urls; name it once")
            found[file.name] = file
        passed_over += others
    return list(found.values()), passed_over


def split_of(name: str) -> Literal["train", "val", "test"] | None:
    """Returns the split that the name of a file, or else that of a folder around it, says."""
    for part in reversed(name.lower().split("/")):
        for word in re.split(r"[^a-z]+", part):
            if word in _WORDS:
                return _WORDS[word]
    return None


class _Listings:
    """What lies in the folders of a store; each is listed once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folders: dict[str, tuple[list[str], list[StoredObject]]] = {}

    def files(self, pattern: list[str]) -> tuple[list[StoredObject], list[str]]:
        """Returns the files that a pattern names, and what was passed over in its folders; each sorted by name."""
        files: dict[str, StoredObject] = {}
        others: list[str] = []
        level = [("", pattern)]
        while level:
            self._list({folder for folder, _ in level})
            below: list[tuple[str, list[str]]] = []
            for folder, parts in level:
                folders, objects = self._folders[folder]
                below += [(_join(folder, name), rest) for name in folders for rest in _rests(name, parts)]
                for each in objects:
                    name = _join(folder, each.name)
                    if _is_named(each.name, parts):
                        files[name] = StoredObject(name, each.size, each.version)
                    elif not parts:
                        others.append(name)
            level = below
        return [files[name] for name in sorted(files)], sorted(others)

    def _list(self, folders: set[str]) -> None:
        new = sorted(folders - self._folders.keys())
        self._folders |= {folder: ([], []) for folder in new}
        for folder, page in self._store.pages(new):
            check_parts(self._store.url, folder, page.folders)
            self._folders[folder][0].extend(page.folders)
            self._folders[folder][1].extend(page.objects)


def _is_named(name: str, parts: list[str]) -> bool:
    """Returns whether an object of a folder is named by what is left of a pattern."""
    if not parts:
        return name.lower().endswith(_SUFFIXES) and not name.startswith(_HIDDEN)
    left = parts[1:] if parts[0] == "**" else parts
    return len(left) == 1 and _matches(name, left[0])


def _rests(name: str, parts: list[str]) -> list[list[str]]:
    """Returns what is left of a pattern below a folder; nothing: the folder is not named. An empty rest: all in it."""
    if not parts:
        return [] if name.startswith(_HIDDEN) else [[]]
    if parts[0] == "**":
        return [] if name.startswith(_HIDDEN) else [parts, *_rests(name, parts[1:])]
    names_files = len(parts) == 1 and _is_wild(parts[0])
    return [parts[1:]] if not names_files and _matches(name, parts[0]) else []


def _matches(name: str, part: str) -> bool:
    """Returns whether a part of a pattern names this; hidden names only if it begins as they do."""
    if not _is_wild(part):
        return name == part
    return fnmatchcase(name, part) and (not name.startswith(_HIDDEN) or name[0] == part[0])


def _is_wild(part: str) -> bool:
    return re.search(r"[*?[]", part) is not None


def _folder_and_pattern(text: str) -> tuple[str, list[str], list[str]]:
    """Returns the store of a URL, its folders up to the first that is a pattern, and the pattern."""
    protocol, is_url, path = text.rpartition("://")
    parts = path.split("/")
    wild = next((number for number, part in enumerate(parts) if _is_wild(part)), None)
    if wild is None:
        wild = len(parts) - 1 if path.lower().endswith(_SUFFIXES) else len(parts)
    folder, pattern = "/".join(parts[:wild]) or ("/" if path.startswith("/") else "" if is_url else "."), parts[wild:]
    if wild < len(parts) and parts[-1] == "**":
        raise ValueError(f"{text}: ends in **, which names folders; write **/*.parquet")
    url = Store(f"{protocol}{is_url}{folder}").url
    protocol, is_url, path = url.rpartition("://")
    store, *folders = path.rstrip("/").split("/")
    return f"{protocol}{is_url}{store}", folders, pattern


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
