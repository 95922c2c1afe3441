"""Small tar shards, made on the spot by WebDataset's own writers, and what WebDataset reads from them."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image


def jpeg(number: int, size: int = 16) -> bytes:
    """The file of an image of noise; the same number gives the same bytes."""
    pixels_HW3 = np.random.default_rng(number).integers(0, 256, (size, size + size // 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels_HW3).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_shards(folder: Path, num_shards: int = 3, per_shard: int = 5, classes: int = 4, size: int = 16) -> list[Path]:
    """Writes ``shard-KKKKKK.tar`` with images and labels, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pattern = str(folder / "shard-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0) as writer:
        for number in range(num_shards * per_shard):
            writer.write({"__key__": f"{number:05d}", "jpg": jpeg(number, size), "cls": number % classes})
    return [folder / f"shard-{shard:06d}.tar" for shard in range(num_shards)]


def as_webdataset_reads(shards: Sequence[Path], decode: str | None = None) -> list[dict[str, Any]]:
    """The samples of shards in their order."""
    samples = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it closes no shard
        return list(samples if decode is None else samples.decode(decode))
