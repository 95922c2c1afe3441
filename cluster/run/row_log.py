"""A log of JSON rows on a store that cannot append.

Rows are JSON lines in parts, ``<name>/<writer>-00000042.jsonl``; the writer is a fencing token. Every row has an
integer key. Where a key occurs twice the newest row counts, by writer and then by part. A cut,
``<name>/<writer>-00000043-from-00000051.jsonl``, is an empty part: it drops all older rows from that key on. A new
writer first copies the existing rows into a part of its own, then cuts off all older parts. So no writer overwrites
what another has written, rows that a superseded writer adds later do not count, and a crash changes no row.

Each try of a write gets a new number, because a write that was given up may still arrive after later ones. It then
changes no row: the part of the next try, and every part that replaces that one, has all rows of the failed part; and a
failed cut is tried again before anything after it is written.

``<name>.jsonl`` is a copy of all rows for people and other programs; it is older than every part. This module knows no
kind of row.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cluster.storage.store import MissingObject, Store

Row = dict[str, Any]

_PART = re.compile(r"([0-9]{8}-[0-9a-f]{8}|part)-([0-9]{8,})(?:-from-([0-9]{8,}))?\.jsonl")
_NO_WRITER = "part"
"""In the name of a part: written before names held a fencing token."""

# Each flush rewrites the newest part with more rows until it has this size: few objects to read, little to write.
_PART_BYTES = 256 * 1024


class _LogPart(NamedTuple):
    """An object of the log, ordered by (writer, number)."""

    writer: str
    number: int
    cut: int | None
    name: str


class RowLog:
    """The rows of one log in a store, for one of its writers or for a reader.

    Args:
        store: Where the rows lie.
        name: The log's name in the store.
        key: The integer field that names a row and orders the rows. The log itself numbers rows with ``seq``; rows
            bring any other key along.
        writer: The writer's fencing token; a later writer's is greater. None for a reader.
    """

    def __init__(self, store: Store, name: str, *, key: str = "seq", writer: str | None = None) -> None:
        self._store = store
        self._name = name
        self._key = key
        self._writer = writer
        self._unsaved: list[Row | int] = []  # rows, and keys of cuts
        self._last_number = -1  # of a part or cut, also if its write failed
        self._newest_text = ""  # content of the newest part; empty when that part is full, or a cut
        self._obsolete: list[str] = []  # once the next part is written: the newest part, and later ones that failed
        self._next_seq = 0
        self._is_taken_over = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Takes a row; the next ``flush`` writes it.

        Thread: Any; another one may be in ``flush``.
        """
        assert self._key == "seq" or type(row[self._key]) is int
        self._unsaved.append(dict(row))

    def cut(self, key: int) -> None:
        """Drops all rows so far from this key on, at the next ``flush``; they will be recomputed."""
        self._unsaved.append(key)

    @property
    def is_flushed(self) -> bool:
        """Whether all rows and cuts taken so far are written."""
        return not self._unsaved

    def flush(self) -> None:
        """Writes the rows and cuts taken so far.

        Raises:
            StorageError: A write failed. No row or cut is lost: the next call writes them.
        """
        entries = list(self._unsaved)  # a copy: another thread may append meanwhile
        if entries and not self._is_taken_over:
            self._take_over()
        rows: list[Row] = []
        for entry in entries:
            if isinstance(entry, dict):
                rows.append(entry)
                continue
            self._write_rows(rows)
            rows = []
            self._write_cut(self._new_number(), entry)
            self._newest_text, self._obsolete = "", []
            del self._unsaved[:1]
        self._write_rows(rows)

    def read(self) -> list[Row]:
        """Returns the rows in the store, ordered by key, without lines that a crash has torn."""
        known: dict[_LogPart, list[Row]] = {}
        before: list[_LogPart] = []
        while (parts := self._list_live_parts()) != before:
            before = parts
            for part in parts:
                rows = self._read_rows(part) if part not in known else None
                if rows is not None:
                    known[part] = rows
            if all(part in known for part in parts):
                break  # else a part was deleted meanwhile: its rows are in a newer one
        newest: dict[int, Row] = {}
        for part in parts:
            if part.cut is not None:
                newest = {key: row for key, row in newest.items() if key < part.cut}
            newest |= {row[self._key]: row for row in known.get(part, [])}
        return [newest[key] for key in sorted(newest)]

    def newest_writer(self) -> str:
        """Returns the greatest fencing token that wrote here, or ''."""
        return max((part.writer for part in self._list_parts()), default="")

    def publish(self) -> None:
        """Writes a copy of all rows as one object, for people and other programs."""
        self._store.write(f"{self._name}.jsonl", _to_text(self.read()).encode())

    def _take_over(self) -> None:
        """Makes this writer the log's only one. A repeated call never overwrites what a failed call has written."""
        assert self._writer is not None
        # Leave a later writer's parts: this writer may not know yet that it is superseded.
        older, rows = [part for part in self._list_parts() if part.writer <= self._writer], self.read()
        self._last_number = max([self._last_number, *(part.number for part in older if part.writer == self._writer)])
        cut, copy = self._new_number(), self._new_number()
        if rows:
            self._write_part(copy, _to_text(rows))
        self._write_cut(cut, 0)  # only now: the copy is safe
        self._is_taken_over = True
        if self._key == "seq":
            self._next_seq = 1 + max((row["seq"] for row in rows), default=-1)
        self._store.delete(part.name for part in older)

    def _new_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def _write_cut(self, number: int, key: int) -> None:
        self._store.write(f"{self._object_prefix(number)}-from-{key:08d}.jsonl", b"")

    def _write_part(self, number: int, text: str) -> None:
        name = f"{self._object_prefix(number)}.jsonl"
        self._obsolete = [*self._obsolete, name]  # before the write: a failed one may have left the object
        self._store.write(name, text.encode())
        self._newest_text, self._obsolete = (text, [name]) if len(text) < _PART_BYTES else ("", [])

    def _write_rows(self, rows: list[Row]) -> None:
        if not rows:
            return
        numbered = rows
        if self._key == "seq":
            numbered = [{"seq": seq, **row} for seq, row in enumerate(rows, self._next_seq)]
        obsolete = self._obsolete
        self._write_part(self._new_number(), self._newest_text + _to_text(numbered))
        self._next_seq += len(rows)
        del self._unsaved[: len(rows)]
        self._store.delete(obsolete)

    def _object_prefix(self, number: int) -> str:
        assert self._writer is not None, "only the driver that holds the lease writes to the logs"
        return f"{self._name}/{self._writer}-{number:08d}"

    def _list_parts(self) -> list[_LogPart]:
        found = []
        for name in self._store.names(self._name):
            match = _PART.fullmatch(name.removeprefix(f"{self._name}/"))
            if match:
                writer = "" if match[1] == _NO_WRITER else match[1]
                found.append(_LogPart(writer, int(match[2]), None if match[3] is None else int(match[3]), name))
        return sorted(found, key=lambda part: part[:2])

    def _list_live_parts(self) -> list[_LogPart]:
        """Returns all parts from the newest one on that cuts off everything before it."""
        parts = [_LogPart("", -1, None, f"{self._name}.jsonl"), *self._list_parts()]
        return parts[max((number for number, part in enumerate(parts) if part.cut == 0), default=0) :]

    def _read_rows(self, part: _LogPart) -> list[Row] | None:
        if part.cut is not None:
            return []
        try:
            text = self._store.read(part.name).decode(errors="replace")
        except MissingObject:
            return None
        rows = map(_parse_row, text.split("\n"))
        return [row for row in rows if row is not None and type(row.get(self._key)) is int]


def _to_text(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _parse_row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
