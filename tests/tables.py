"""Images, and the Parquet files that others write of them, for tests of image tables."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.images.indexed_images import IndexedImages


def shade(number: int) -> Image.Image:
    """An image of one colour that its number tells; PNG keeps it exactly."""
    return Image.new("RGB", (6, 4), (number % 256, number // 256, 7))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    shade(number).save(buffer, "PNG")
    return buffer.getvalue()


def noise(number: int, size: int = 64) -> bytes:
    """A PNG of several KB, so that images and labels can be told apart by what is read."""
    buffer = io.BytesIO()
    random = np.random.default_rng(number)
    Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(image_3HW) -> int:
    """The number of a shade, from its pixels in [0, 1]."""
    red, green, _ = (round(float(value) * 255) for value in image_3HW[:, 0, 0])
    return red + 256 * green


def numbers_of(dataset: IndexedImages) -> list[int]:
    """The numbers of all images of a dataset, which are shades."""
    return [number_of(dataset[index][0]) for index in range(len(dataset))]


def error_of(build: Callable[..., IndexedImages], *args, **options) -> str:
    """The error of a dataset that cannot be built, in one line."""
    with pytest.raises(ValueError, match=r"[:;]") as caught:
        build(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write_parquet(path: Path, images: Sequence[bytes | None], rows_per_group: int = 1000, **columns) -> Path:
    """A file with a plain column of bytes and others, as pyarrow writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": pa.array(images, pa.binary()), **columns})
    pq.write_table(table, path, row_group_size=rows_per_group, compression="zstd")
    return path
