"""A log of JSON rows on a store that cannot append.

Rows lie in ``<name>.jsonl`` and in newer parts ``<name>/part-00000042.jsonl``, all of them plain JSON lines.
Every row has a key, an integer: where a key occurs twice the newest row counts. So a crash between writing a
thing and deleting what it replaces shows the same rows as no crash, and a row that is logged again after a
restart replaces its first self. This module knows no kind of row.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.storage import MissingObject, Store

Row = dict[str, Any]

_PART = re.compile(r"part-([0-9]{8,})\.jsonl")

# A part is written again, longer, until it has this size: few objects to read, and little to write at each flush.
_PART_BYTES = 256 * 1024


class RowLog:
    """The rows of one name in a store; it has one writer, and any number of readers.

    Args:
        store: Where the rows lie.
        name: The log's name there.
        key: The integer field that names a row and orders them. ``seq`` is given by the log itself, one number
            per row; any other the rows bring along.
    """

    def __init__(self, store: Store, name: str, *, key: str = "seq") -> None:
        self._store = store
        self._name = name
        self._key = key
        self._unsaved: list[Row] = []
        self._newest_text = ""  # what the newest part holds; empty when that part is full, or another's
        self._newest_part: int | None = None  # not looked for yet
        self._next_seq = 0

    def append(self, row: Mapping[str, Any]) -> None:
        """Takes a row, to be written by the next ``flush``."""
        assert self._key == "seq" or type(row[self._key]) is int
        self._unsaved.append(dict(row))

    def flush(self) -> None:
        """Writes the rows taken so far.

        Raises:
            StorageError: Nothing is lost: the rows stay, for the next call to write.
        """
        if not self._unsaved:
            return
        previous = self._continue()
        rows = self._numbered(list(self._unsaved))
        replaced = [self._part(previous)] if self._newest_text else []
        text = self._newest_text + _to_text(rows)
        self._store.write(self._part(previous + 1), text.encode())
        self._newest_part = previous + 1
        self._newest_text = text if len(text) < _PART_BYTES else ""
        self._next_seq += len(rows)
        del self._unsaved[: len(rows)]  # not clear(): another thread may have appended meanwhile
        self._store.delete(replaced)

    def read(self) -> list[Row]:
        """The rows in the store, in the order of their key; what a crash has torn is left out."""
        # Parts first: a compaction that runs meanwhile writes the whole file before it deletes a part.
        newer = [row for number in self._parts() for row in self._rows(self._part(number))]
        rows = self._rows(f"{self._name}.jsonl") + newer
        newest = {row[self._key]: row for row in rows}
        return [newest[key] for key in sorted(newest)]

    def compact(self, rows: Iterable[Row] | None = None) -> None:
        """Rewrites the log as one object.

        Rows not flushed yet are not touched.

        Args:
            rows: All that the log shall hold, of the rows that ``read`` gave; by default every one.
        """
        text = _to_text(self.read() if rows is None else rows)
        copy = self._continue() + 1
        parts = self._parts()
        # On a store with folders a kill can tear the whole file while it is written; so a copy lies beside it, in a
        # part newer than all the others, until it is safe. Deleted oldest first: a part left over never overrules.
        self._store.write(self._part(copy), text.encode())
        self._newest_part = copy
        self._newest_text = ""
        self._store.write(f"{self._name}.jsonl", text.encode())
        self._store.delete(self._part(number) for number in [*parts, copy])

    def _continue(self) -> int:
        """The newest part's number (-1: none), found once; so is the number of the next row."""
        if self._newest_part is None:
            if self._key == "seq":
                self._next_seq = 1 + max((row["seq"] for row in self.read()), default=-1)
            self._newest_part = max(self._parts(), default=-1)
        return self._newest_part

    def _numbered(self, rows: list[Row]) -> list[Row]:
        if self._key != "seq":
            return rows
        return [{"seq": seq, **row} for seq, row in enumerate(rows, self._next_seq)]

    def _part(self, number: int) -> str:
        return f"{self._name}/part-{number:08d}.jsonl"

    def _parts(self) -> list[int]:
        names = (name.removeprefix(f"{self._name}/") for name in self._store.names(self._name))
        return sorted(int(match[1]) for match in map(_PART.fullmatch, names) if match)

    def _rows(self, object_name: str) -> list[Row]:
        try:
            text = self._store.read(object_name).decode(errors="replace")
        except MissingObject:
            return []
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
