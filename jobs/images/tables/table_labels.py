"""From columns of tables to labels: classes by number or by name, or numbers to predict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cluster.errors import listed, nearest
from jobs.images.sample_labels import MOST_CLASSES, given_classes

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class LabelColumns:
    """The label columns of a file."""

    file: str
    """Its URL."""
    table: "pa.Table"
    where: Callable[[int], str]
    """Names a row, by its number in the table, for errors."""
    class_names: Sequence[str] | None = None
    """The names of the classes that the file itself holds."""


def labels_of(
    files: Sequence[LabelColumns], label: str | Sequence[str], classes: int | Sequence[str] | None
) -> tuple[Sequence[str], list[np.ndarray]]:
    """Returns the classes and the labels of each file.

    One column of whole numbers holds classes by number, one of text holds them by name; everything else is numbers to
    predict, and there are no classes then.

    Args:
        files: At least one.
        label: A column; or several, which hold numbers to predict.
        classes: The names of the classes, or their number; None: those that the files hold, else the sorted names that
            occur, else ``0`` to the largest number. If the files hold names too, these say which class a number is.

    Shapes: labels int64 [rows], or float32 [rows, targets].

    Raises:
        ValueError: A label is missing, or outside the classes; a number is not finite; or a column holds something
            else, or not the same in all files.
    """
    import pyarrow as pa

    columns = [label] if isinstance(label, str) else list(label)
    classes = given_classes(classes)
    for file in files:
        for column in columns:
            _check_column(file, column, files[0])
    kind = _value_type(files[0].table.schema.field(columns[0]).type)
    is_class = isinstance(label, str) and not (pa.types.is_floating(kind) or _is_list(kind))
    if not is_class:
        if classes is not None:
            raise ValueError(
                f"{files[0].file}: holds numbers to predict in {listed(columns)}, not classes; leave out classes"
            )
        return (), _same_width(files, [_targets(file, columns) for file in files])
    names = [file.table.column(columns[0]) for file in files]
    if _is_text(kind):
        chosen = classes or sorted(set().union(*(column.unique().to_pylist() for column in names)))
        return chosen, [_numbers_of_names(file, column, chosen) for file, column in zip(files, names)]
    numbers = [column.to_numpy().astype(np.int64) for column in names]  # of a bool too
    named = files[0].class_names
    numbered = named or classes or list(map(str, range(_num_classes(files, numbers))))
    for file, values in zip(files, numbers):
        what = f"has label {{}}, which is no number of the {len(numbered)} classes; correct it"
        _refuse(file, (values < 0) | (values >= len(numbered)), what, values)
    if named is None or classes is None:
        return list(numbered), numbers
    names = [pa.chunked_array([pa.array(named).take(pa.array(values))]) for values in numbers]
    return classes, [_numbers_of_names(file, column, classes) for file, column in zip(files, names)]


def _check_column(file: LabelColumns, column: str, first: LabelColumns) -> None:
    """Raises a ValueError unless a column holds labels as that of the first file does, in every row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, first_kind = file.table.schema.field(column).type, first.table.schema.field(column).type
    value = _value_type(kind)
    of_list = value.value_type if _is_list(value) else value
    is_number = pa.types.is_integer(of_list) or pa.types.is_floating(of_list) or pa.types.is_boolean(of_list)
    if not (is_number or _is_text(value)):
        raise ValueError(f"{file.file}: column {column!r} must hold numbers or text, got {kind}; name another one")
    if _value_type(first_kind) != value:
        raise ValueError(
            f"{file.file}: column {column!r} holds {kind}, but {first_kind} in {first.file}; write all files "
            "with one schema"
        )
    if file.class_names != first.class_names:
        raise ValueError(f"{file.file}: names other classes than {first.file}; write all files with one schema")
    values = file.table.column(column)
    if values.null_count:
        raise ValueError(
            f"{file.where(pc.index(pc.is_null(values), True).as_py())}: has no {column}; fill it in, or remove the row"
        )


def _targets(file: LabelColumns, columns: Sequence[str]) -> np.ndarray:
    """Returns numbers to predict. Shapes: float32 [rows, targets]."""
    import pyarrow as pa

    parts = []
    for column in columns:
        values = file.table.column(column).combine_chunks()
        kind = _value_type(values.type)
        if _is_text(kind):
            raise ValueError(f"{file.file}: column {column!r} must hold numbers to predict, got {kind}; name others")
        width = 1
        if _is_list(kind):
            sizes = values.value_lengths().to_numpy(zero_copy_only=False)
            width = int(sizes[0]) if len(sizes) else 0
            what = f"has {{}} numbers in {column}, but {width} in the first row; write as many in all"
            _refuse(file, sizes != width, what, sizes)
            values = values.flatten()
        parts.append(values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False).reshape(-1, width))
    targets = np.concatenate(parts, axis=1, dtype=np.float32)
    is_wrong_N = np.any(~np.isfinite(targets), axis=1)
    _refuse(file, is_wrong_N, f"has {{}} in {listed(columns)}, where all must be finite; correct it", targets)
    return targets


def _same_width(files: Sequence[LabelColumns], targets: list[np.ndarray]) -> list[np.ndarray]:
    with_rows = [number for number, own in enumerate(targets) if len(own)]
    for number in with_rows:
        own, first = targets[number].shape[1], targets[with_rows[0]].shape[1]
        if own != first:
            raise ValueError(
                f"{files[number].file}: has {own} numbers to predict, but {first} in "
                f"{files[with_rows[0]].file}; write as many in all files"
            )
    return targets


def _numbers_of_names(file: LabelColumns, column: "pa.ChunkedArray", classes: Sequence[str]) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    text = column.cast(pa.large_string())
    numbers: np.ndarray = pc.index_in(text, value_set=pa.array(classes, pa.large_string())).fill_null(-1).to_numpy()
    if (numbers < 0).any():
        row = int((numbers < 0).argmax())
        name = text[row].as_py()
        raise ValueError(
            f"{file.where(row)}: has label {name!r}, which is not in classes{nearest(name, classes)}; correct it, or "
            "add it there"
        )
    return numbers.astype(np.int64)


def _num_classes(files: Sequence[LabelColumns], numbers: Sequence[np.ndarray]) -> int:
    for file, values in zip(files, numbers):
        what = "has label {}, which is no number of a class; write labels as text, or name their column as a list"
        _refuse(file, values >= MOST_CLASSES, what, values)
    return max((int(values.max()) + 1 for values in numbers if len(values)), default=0)


def _refuse(file: LabelColumns, is_wrong_N: np.ndarray, what: str, values: np.ndarray) -> None:
    """Raises a ValueError that names the first wrong row and its value, if there is one."""
    if is_wrong_N.any():
        row = int(is_wrong_N.argmax())
        raise ValueError(f"{file.where(row)}: {what.format(values[row].tolist())}")


def _value_type(kind: "pa.DataType") -> "pa.DataType":
    """Returns the type of the values; a categorical column has that of its categories."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
