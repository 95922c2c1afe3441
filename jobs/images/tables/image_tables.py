"""Tables of image paths and labels: CSV, TSV or Parquet."""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cluster.errors import one_line
from cluster.storage.store import Store
from jobs.images.indexed_images import IndexedImages, read_ranges
from jobs.images.indexing.index import IndexBuilder, Source
from jobs.images.indexing.index_files import open_index
from jobs.images.indexing.listing_progress import ListingProgress
from jobs.images.labelled_images import Split, Transform, check_per_channel, check_split
from jobs.images.splits import check_val_fraction, drawn
from jobs.images.tables.parquet_columns import check_columns, read_columns, read_footers
from jobs.images.tables.table_labels import LabelColumns, labels_of

if TYPE_CHECKING:
    import pyarrow as pa

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_PARQUET = (".parquet", ".pq")
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_HEADER_ROWS = 2
"""The number of the first row below the header, as a spreadsheet shows it."""


def image_table(
    table: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    split: Split | None = None,
    transform: Transform | None = None,
    *,
    path: str = "path",
    label: str | Sequence[str] = "label",
    classes: int | Sequence[str] | None = None,
    split_column: str | None = None,
    delimiter: str | None = None,
    val_fraction: float = 0.1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> IndexedImages:
    """The images that a table lists, with their labels; the table and the images lie at any URL.

    Each row is a sample, in the order of the table; a row that is written twice counts twice. Without ``split_column``,
    the SHA-256 of a path decides the split of an image. Nothing is listed: an image that does not exist is an error
    when it is read.

    Args:
        table: A ``.csv`` or ``.tsv`` file in UTF-8 with a header, or a ``.parquet`` file.
        root: The folder that paths are relative to; None: that of the table.
        split: ``train`` or ``val``; None takes all rows.
        transform: Applied to a uint8 image_3HW.
        path: The column of paths. A URL or an absolute path must lie below ``root``.
        label: The column of labels: whole numbers or names of classes, or numbers to predict. A list of columns holds
            numbers to predict.
        classes: The names of the classes, or their number; None: the sorted names that occur in the table, or ``0`` to
            the largest number. In a text table, cells are names if all are in ``classes``, else numbers.
        split_column: The column that says ``train`` or ``val``; rows that say something else are passed over.
        delimiter: Between the cells of a text table; None: a comma in ``.csv``, else a tab.
        val_fraction: The fraction of images in ``val``, in (0, 1); ignored if there is a ``split_column``.
        mean: One number for each of the three channels, subtracted from the image in [0, 1].
        std: One number for each of the three channels, which divides the difference.

    Shapes:
        A sample is (image_3HW, label), float32; a label is an int, or float32 [targets].

    Raises:
        ValueError: A column is missing; a cell is empty, or holds something else; a path leaves ``root``; rows of one
            path disagree; or an argument is wrong.
        StorageError: The store does not answer, or has no such table.
    """
    check_split(split, None)
    check_per_channel(3, mean=mean, std=std)
    check_val_fraction(val_fraction)
    text = os.fspath(table)
    folder, _, name = text.rpartition("/")
    suffix = posixpath.splitext(name)[1].lower()
    if suffix not in (*_DELIMITERS, *_PARQUET):
        raise ValueError(f"table must end in .csv, .tsv or .parquet, got {text}; rename it")
    if delimiter is not None and (len(delimiter) != 1 or suffix in _PARQUET):
        raise ValueError(
            f"delimiter must be one character between the cells of a text, got {delimiter!r}; leave it out"
        )
    tables = Store(folder or ("/" if text.startswith("/") else "."))
    images = tables if root is None else Store(os.fspath(root))
    columns = label if isinstance(label, str) else list(label)
    names = classes if classes is None or isinstance(classes, int) else list(classes)
    # Rows of both splits give the classes, and each split is an index of its own.
    own_split = None if split_column is None else split
    options = {
        "table": f"{tables.url.rstrip('/')}/{name}",
        "path": path,
        "label": columns,
        "classes": names,
        "split_column": split_column,
        "split": own_split,
        "delimiter": delimiter,
    }
    rows = _TableFile(tables, name, delimiter or _DELIMITERS.get(suffix), path, columns, names, split_column)
    index = open_index(Source("table", images.url, options), partial(_build, rows, own_split))
    chosen = None if split is None or split_column is not None else drawn(index, split, val_fraction)
    return IndexedImages(index, read_ranges, chosen, transform, mean, std)


@dataclass(frozen=True, slots=True)
class _TableFile:
    """Where the rows are, and what their columns mean; see ``image_table``."""

    store: Store
    name: str
    delimiter: str | None
    """None: it is a Parquet file."""
    path: str
    label: str | list[str]
    classes: int | list[str] | None
    split_column: str | None

    @property
    def url(self) -> str:
        return f"{self.store.url.rstrip('/')}/{self.name}"

    @property
    def labels(self) -> list[str]:
        return [self.label] if isinstance(self.label, str) else self.label

    @property
    def texts(self) -> list[str]:
        return [self.path] if self.split_column is None else [self.path, self.split_column]

    def where(self, row: int) -> str:
        """Names a row as a spreadsheet does, or pandas."""
        return f"{self.url}: row {row if self.delimiter is None else row + _HEADER_ROWS}"


def _build(file: _TableFile, split: Split | None, store: Store, builder: IndexBuilder) -> None:
    """Adds the rows of a table to an index."""
    import pyarrow.compute as pc

    if file.delimiter is None:
        rows, class_names = _parquet_rows(file, builder.progress)
    else:
        rows, class_names = _text_rows(file), None
    if not rows.num_rows:
        raise ValueError(f"{file.url}: has no rows; write one for each image")
    for column in file.texts:
        is_empty = pc.equal(pc.utf8_trim_whitespace(rows.column(column)), "").fill_null(True)
        if (row := pc.index(is_empty, True).as_py()) >= 0:
            raise ValueError(f"{file.where(row)}: has no {column}; fill it in, or remove the row")
    labelled = [LabelColumns(file.url, rows, file.where, class_names)]
    builder.classes, (labels,) = labels_of(labelled, file.label, file.classes)
    names = [
        _name_below(store.url, cell, partial(file.where, row))
        for row, cell in enumerate(rows.column(file.path).to_pylist())
    ]
    splits = [None] * len(names) if file.split_column is None else rows.column(file.split_column).to_pylist()
    _check_same(file, "split", names, splits)
    if builder.classes:
        _check_same(file, "label", names, [builder.classes[label] for label in labels.tolist()])
    chosen = []
    for row, own in enumerate(splits):
        if own not in (None, "train", "val"):
            builder.pass_over(f"{file.split_column} is neither train nor val", names[row])
        elif own == split or split is None:
            chosen.append(row)
    if not chosen:
        found = ", ".join(f"{own!r} in {count} rows" for own, count in Counter(splits).most_common(5))
        raise ValueError(
            f"{file.url}: column {file.split_column!r} must say {split or 'train or val'} in a row, got {found}; "
            "correct it, or name another column in split_column"
        )
    unknown = len(chosen)
    builder.progress.listed(unknown)
    builder.add_files([names[row] for row in chosen], [-1] * unknown, [""] * unknown, labels[chosen])


def _check_same(file: _TableFile, what: str, names: Sequence[str], values: Sequence[str | None]) -> None:
    """Raises a ValueError if two rows of one path disagree."""
    first: dict[str, int] = {}
    for row, name in enumerate(names):
        other = first.setdefault(name, row)
        if values[other] != values[row]:
            raise ValueError(
                f"{file.where(row)}: has {what} {values[row]!r} for {name}, but {values[other]!r} in "
                f"{file.where(other).rpartition(': ')[2]}; correct one of them, or remove it"
            )


def _name_below(root: str, cell: str, where: Callable[[], str]) -> str:
    """Returns the path in a cell, relative to the root."""
    name = cell
    if "://" in cell or cell.startswith("/"):
        below = f"{root.rstrip('/')}/"
        name = cell.removeprefix("file://") if "://" not in root else cell
        if not name.startswith(below):
            raise ValueError(f"{where()}: {cell} must lie below {root}; correct it, or set root")
        name = name.removeprefix(below)
    name = posixpath.normpath(name)
    if name.split("/")[0] in ("", ".", ".."):
        raise ValueError(f"{where()}: {cell} must lie below {root}; correct it, or set root")
    if re.search(r"[\x00-\x1f\x7f]", name):
        raise ValueError(f"{where()}: {cell!r} is no path of a file; correct it")
    return name


def _parquet_rows(file: _TableFile, progress: ListingProgress) -> "tuple[pa.Table, list[str] | None]":
    """Returns the columns that are asked for, and the names of classes that the file holds."""
    import pyarrow as pa

    found = file.store.look_up(file.name)
    if found is None:
        raise ValueError(f"{file.url}: does not exist; correct the URL")
    (footer,) = read_footers(file.store, {file.name: found.size})
    if isinstance(footer, str):
        raise ValueError(f"{file.url}: {footer}")
    progress.expect(footer.num_rows, "rows")
    columns = list(dict.fromkeys([*file.texts, *file.labels]))
    rows = read_columns(file.store, [footer], columns, lambda num_rows: progress.listed(0, num_rows))[0]
    for column in file.texts:
        kind = rows.schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            if not (pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type)):
                raise ValueError(f"{file.url}: column {column!r} must hold text, got {kind}; name another one")
            number = rows.schema.get_field_index(column)
            rows = rows.set_column(number, column, rows.column(column).cast(pa.string()))
    return rows, footer.class_names(file.label) if isinstance(file.label, str) else None


def _text_rows(file: _TableFile) -> "pa.Table":
    """Returns the columns that are asked for; labels are numbers if all cells of a column are."""
    import pyarrow as pa
    from pyarrow import csv

    content = file.store.read(file.name)
    columns = list(dict.fromkeys([*file.texts, *file.labels]))
    parse = csv.ParseOptions(delimiter=file.delimiter, newlines_in_values=True)
    read = csv.ReadOptions(use_threads=False)
    try:
        # First the header alone, because a wrong delimiter shows there.
        lenient = csv.ParseOptions(
            delimiter=file.delimiter, newlines_in_values=True, invalid_row_handler=lambda _: "skip"
        )
        names = csv.open_csv(pa.BufferReader(content), read, lenient).schema.names
        check_columns(file.url, columns, names)
        # Each as it is written: a guess from the first rows could be wrong for the others.
        convert = csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), include_columns=columns)
        rows = csv.read_csv(pa.BufferReader(content), read, parse, convert)
    except pa.ArrowException as error:
        raise ValueError(
            f"{file.url}: cannot be read as text with a header and {file.delimiter!r} between cells, {one_line(error)}"
            "; save it as UTF-8, or set delimiter"
        ) from error
    for column in file.labels:
        rows = rows.set_column(rows.schema.get_field_index(column), column, _label_cells(file, rows.column(column)))
    return rows


def _label_cells(file: _TableFile, cells: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Returns labels as numbers, or as the names of classes; null where a cell is empty."""
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = pc.if_else(pc.equal(pc.utf8_trim_whitespace(cells), ""), None, cells)
    is_number = pc.match_substring_regex(cells, _NUMBER)
    is_class = isinstance(file.label, str)
    has_names = isinstance(file.classes, list)
    if is_class and has_names and pc.all(pc.is_in(cells.drop_null(), pa.array(file.classes))).as_py():
        return cells
    for kind in (pa.int64(), pa.float64()):
        try:
            return pc.utf8_trim_whitespace(cells).cast(kind)
        except pa.ArrowInvalid:
            continue
    if not is_class or (file.classes is None and pc.any(is_number).as_py()):
        row = pc.index(pc.invert(is_number), True).as_py()
        raise ValueError(
            f"{file.where(row)}: has label {cells[row].as_py()!r}, but other rows have numbers; correct it, or name "
            "all labels in classes"
        )
    return cells
