"""The images that ``tests.benchmarks.data`` reads, and its loaders; loader processes import this module."""

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from jobs.data.loader import training_batches
from jobs.sampling import StepPlan
from jobs.spec.job import ShuffleSpec

_CLASSES, _PER_CLASS = 4, 192
COUNT = _CLASSES * _PER_CLASS
BATCH, LOADERS = 32, 2
_ROWS_PER_GROUP = 100
"""What ``datasets`` writes for images."""
CROP = v2.RandomResizedCrop(224, antialias=True)


def write_folder(root: Path) -> None:
    """Photographs of noise with a grain, in a folder per class."""
    generator = np.random.default_rng(0)
    for label in range(_CLASSES):
        folder = root / f"class_{label}"
        folder.mkdir(parents=True)
        for number in range(_PER_CLASS):
            coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
            grain = generator.normal(0, 18, smooth.shape)
            image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
            image.save(folder / f"{number:04}.jpg", quality=90)


def write_shards(source: Path, target: Path) -> None:
    """Tar shards, as webdataset writes them, of the images of a folder in an order of no class."""
    import webdataset

    target.mkdir()
    with webdataset.ShardWriter(str(target / "shard-%06d.tar"), maxcount=256, verbose=0) as writer:
        for number, path in enumerate(_mixed(source)):
            label = int(path.parent.name[-1])
            writer.write({"__key__": f"{number:06}", "jpg": path.read_bytes(), "cls": label})


def write_parquet(source: Path, target: Path) -> None:
    """Parquet, as Hugging Face's datasets writes it, of the same images in the same order."""
    import datasets

    target.mkdir()
    paths = _mixed(source)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=_CLASSES)})
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [int(path.parent.name[-1]) for path in paths],
    }
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.to_parquet(str(target / "train-00000-of-00001.parquet"), batch_size=_ROWS_PER_GROUP)


def _mixed(source: Path) -> list[Path]:
    return random.Random(0).sample(sorted(source.glob("*/*.jpg")), COUNT)


class OfFsspec(Dataset[Any]):
    """What one writes by hand for images in a bucket."""

    def __init__(self, root: str) -> None:
        import fsspec

        fs, path = fsspec.core.url_to_fs(root)
        self.root, self.names = root, sorted(fs.find(path))
        self.fs: Any = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> Any:
        import fsspec

        if self.fs is None:
            self.fs, _ = fsspec.core.url_to_fs(self.root)
        content = self.fs.cat_file(self.names[number])
        image = v2.functional.pil_to_tensor(Image.open(io.BytesIO(content)).convert("RGB"))
        return CROP(image).float() / 255, int(self.names[number].split("class_")[1][0])


def stock(dataset: Dataset[Any]) -> Iterator[Any]:
    """Batches for ever."""
    # A forked process cannot use its parent's connections; else torch's default before Python 3.14 serves best.
    context = "forkserver" if isinstance(dataset, OfFsspec) else "fork"
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=LOADERS, multiprocessing_context=context)
    while True:
        yield from loader


def launched(dataset: Any, shuffle: ShuffleSpec | None = None) -> Iterator[Any]:
    """Batches for ever, as a worker with a CPU and one shard gets them."""
    steps = StepPlan(len(dataset), BATCH, shards=1, epochs=10**6, shuffle=shuffle)
    if shuffle is not None:
        dataset = dataset.in_blocks(shuffle.block, shuffle.kept_blocks)
    return training_batches(
        dataset, steps=steps, seed=0, block=range(1), start=0, end=steps.total_steps, loaders=LOADERS,
        device=torch.device("cpu"),
    )  # fmt: skip
