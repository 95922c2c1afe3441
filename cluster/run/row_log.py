"""A log of JSON rows on a store that cannot append.

Rows are plain JSON lines in parts, ``<name>/<writer>-00000042.jsonl``. Every row has a key, an integer: where a key
occurs twice the newest row counts, by writer and part. A cut, ``<name>/<writer>-00000043-from-00000051.jsonl``, is an
empty part: of all that is older, rows from that key on count no more. A new writer first copies what there is into a
part of its own, and cuts off all older ones. So nobody writes over what another has written, and what a writer adds
that does not know yet that another has taken its place counts for nothing; a crash changes no row either.

Each try of a write has a number of its own, for one that was given up may still arrive, after later ones. Then it
changes no row: the part of the next try has all rows of the part that failed, and so has every part that replaces that
one; and a cut is tried again before anything that comes after it is written.

``<name>.jsonl`` is a copy of all rows for people and other programs, older than every part. This module knows no kind
of row.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cluster.storage.store import MissingObject, Store

Row = dict[str, Any]

_PART = re.compile(r"([0-9]{8}-[0-9a-f]{8}|part)-([0-9]{8,})(?:-from-([0-9]{8,}))?\.jsonl")
_UNCLAIMED = "part"
"""Stands for the writer in the names of parts from before writers had names."""

# A part is written again, longer, until it has this size: few objects to read, and little to write at each flush.
_PART_BYTES = 256 * 1024


class _LogPart(NamedTuple):
    """An object of the log; they are ordered as their rows are."""

    writer: str
    number: int
    cut: int | None
    name: str


class RowLog:
    """The rows of one name in a store, for one of its writers, or for a reader.

    Args:
        store: Where the rows lie.
        name: The log's name there.
        key: The integer field that names a row and orders them. ``seq`` is given by the log itself, one number
            per row; any other the rows bring along.
        writer: The claim of the one that writes; a later writer's is greater.
    """

    def __init__(self, store: Store, name: str, *, key: str = "seq", writer: str | None = None) -> None:
        self._store = store
        self._name = name
        self._key = key
        self._writer = writer
        self._unsaved: list[Row | int] = []  # rows, and the keys of cuts
        self._last_number = -1  # that a part or a cut has got, whether it was written or not
        self._newest_text = ""  # what the newest part holds; empty when that part is full, or a cut
        self._replaced: list[str] = []  # by the next part: the newest one, and those that have failed since
        self._next_seq = 0
        self._is_own = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Takes a row, to be written by the next ``flush``."""
        assert self._key == "seq" or type(row[self._key]) is int
        self._unsaved.append(dict(row))

    def cut(self, key: int) -> None:
        """Drops all rows so far from this key on, with the next ``flush``; they will be made anew."""
        self._unsaved.append(key)

    @property
    def is_flushed(self) -> bool:
        """Whether all rows and cuts taken so far are written."""
        return not self._unsaved

    def flush(self) -> None:
        """Writes the rows and the cuts taken so far.

        Raises:
            StorageError: Nothing is lost: they stay, for the next call to write.
        """
        entries = list(self._unsaved)  # another thread may append meanwhile
        if entries and not self._is_own:
            self._adopt()
        rows: list[Row] = []
        for entry in entries:
            if isinstance(entry, dict):
                rows.append(entry)
                continue
            self._write_rows(rows)
            rows = []
            self._write_cut(self._new_number(), entry)
            self._newest_text, self._replaced = "", []
            del self._unsaved[:1]
        self._write_rows(rows)

    def read(self) -> list[Row]:
        """The rows in the store, in the order of their key; what a crash has torn is left out."""
        known: dict[_LogPart, list[Row]] = {}
        before: list[_LogPart] = []
        while (parts := self._counting()) != before:
            before = parts
            for part in parts:
                rows = self._rows(part) if part not in known else None
                if rows is not None:
                    known[part] = rows
            if all(part in known for part in parts):
                break  # else one went meanwhile: its rows are in a newer one
        newest: dict[int, Row] = {}
        for part in parts:
            if part.cut is not None:
                newest = {key: row for key, row in newest.items() if key < part.cut}
            newest |= {row[self._key]: row for row in known.get(part, [])}
        return [newest[key] for key in sorted(newest)]

    def newest_writer(self) -> str:
        """The claim of the last that wrote here; empty if nobody did."""
        return max((part.writer for part in self._parts()), default="")

    def publish(self) -> None:
        """Writes a copy of all rows as one object, for people and other programs."""
        self._store.write(f"{self._name}.jsonl", _to_text(self.read()).encode())

    def _adopt(self) -> None:
        """Makes the log this writer's own. Never writes over what it has written, also in a call that failed."""
        assert self._writer is not None
        # Not a later writer's: this one may not know yet that there is one.
        older, rows = [part for part in self._parts() if part.writer <= self._writer], self.read()
        self._last_number = max([self._last_number, *(part.number for part in older if part.writer == self._writer)])
        cut, copy = self._new_number(), self._new_number()
        if rows:
            self._write_part(copy, _to_text(rows))
        self._write_cut(cut, 0)  # the copy is safe by now
        self._is_own = True
        if self._key == "seq":
            self._next_seq = 1 + max((row["seq"] for row in rows), default=-1)
        self._store.delete(part.name for part in older)

    def _new_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def _write_cut(self, number: int, key: int) -> None:
        self._store.write(f"{self._own(number)}-from-{key:08d}.jsonl", b"")

    def _write_part(self, number: int, text: str) -> None:
        name = f"{self._own(number)}.jsonl"
        self._replaced = [*self._replaced, name]  # also if it fails, for it may be there
        self._store.write(name, text.encode())
        self._newest_text, self._replaced = (text, [name]) if len(text) < _PART_BYTES else ("", [])

    def _write_rows(self, rows: list[Row]) -> None:
        if not rows:
            return
        numbered = rows
        if self._key == "seq":
            numbered = [{"seq": seq, **row} for seq, row in enumerate(rows, self._next_seq)]
        replaced = self._replaced
        self._write_part(self._new_number(), self._newest_text + _to_text(numbered))
        self._next_seq += len(rows)
        del self._unsaved[: len(rows)]
        self._store.delete(replaced)

    def _own(self, number: int) -> str:
        assert self._writer is not None, "only the one that has claimed the run writes to its logs"
        return f"{self._name}/{self._writer}-{number:08d}"

    def _parts(self) -> list[_LogPart]:
        found = []
        for name in self._store.names(self._name):
            match = _PART.fullmatch(name.removeprefix(f"{self._name}/"))
            if match:
                writer = "" if match[1] == _UNCLAIMED else match[1]
                found.append(_LogPart(writer, int(match[2]), None if match[3] is None else int(match[3]), name))
        return sorted(found, key=lambda part: part[:2])

    def _counting(self) -> list[_LogPart]:
        """The parts that count: from the newest on that cuts off all before it."""
        parts = [_LogPart("", -1, None, f"{self._name}.jsonl"), *self._parts()]
        return parts[max((number for number, part in enumerate(parts) if part.cut == 0), default=0) :]

    def _rows(self, part: _LogPart) -> list[Row] | None:
        if part.cut is not None:
            return []
        try:
            text = self._store.read(part.name).decode(errors="replace")
        except MissingObject:
            return None
        rows = map(_from_line, text.split("\n"))
        return [row for row in rows if row is not None and type(row.get(self._key)) is int]


def _to_text(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _from_line(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
