"""How fast images are read: ``python -m tests.benchmarks.data``.

The same JPEGs, 500 x 375 and about 100 kB, lie in an image folder, in tar shards and in Parquet files. An arm is a
loader with two processes that decode, crop at random and resize to 224; the clock runs between two batches, once the
loader has used up what it made ready at its start. All arms take turns in another order in every round.

*stock*: torchvision's ``ImageFolder`` in a ``DataLoader``, with torchvision's transforms on Pillow's images, as its own
scripts have them; *stock, tensors*: the same transforms on tensors. *launcher*: ``training_batches`` over
``jobs.data.image_folder``, ``tar_shards`` and ``parquet_images``, the same transform on tensors.

*S3*: a real server on this machine behind a proxy that hands on each request 20 ms late. Stock is a dataset over
fsspec's ``cat_file``, one request for each sample, with a ``DataLoader`` of two processes. Tar shards and Parquet are
read in the order of blocks where it says so.

*first batch*: the seconds from nothing to the first batch for a folder of many images (hard links of one): with a
listing, as the first attempt of a run, and with the index that the run has, as all later ones.

Reported: images per second, medians with quartiles, and n; ratios are of the same round. The last line is JSON.
"""

import argparse
import io
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from cluster.process import fork_server
from tests.benchmarks.arms import Quartiles
from tests.stores import Proxy, s3_server

_CLASSES, _PER_CLASS = 4, 192
_BATCH, _SHARDS, _LOADERS = 32, 1, 2
_SKIPPED = 2 * _LOADERS + 1
"""Batches before the clock runs: as many as a loader makes ready."""
_MEASURED = 8
_LATENCY_S = 0.02
_ROWS_PER_GROUP = 100
"""What ``datasets`` writes for images."""
_CROP = v2.RandomResizedCrop(224, antialias=True)


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
    return random.Random(0).sample(sorted(source.glob("*/*.jpg")), _CLASSES * _PER_CLASS)


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
        return _CROP(image).float() / 255, int(self.names[number].split("class_")[1][0])


def stock(dataset: Any) -> Iterator[Any]:
    """Batches for ever."""
    context = "forkserver" if isinstance(dataset, OfFsspec) else "fork"
    loader = DataLoader(dataset, _BATCH, shuffle=True, num_workers=_LOADERS, multiprocessing_context=context)
    while True:
        yield from loader


def launched(dataset: Any) -> Iterator[Any]:
    """Batches for ever, as a worker with a CPU gets them."""
    from jobs.data.loader import training_batches
    from jobs.sampling import StepPlan

    steps = StepPlan(len(dataset), _BATCH * _SHARDS, _SHARDS, epochs=10**6)
    return training_batches(
        dataset, steps=steps, seed=0, block=range(_SHARDS), start=0, end=steps.total_steps, loaders=_LOADERS,
        device=torch.device("cpu"),
    )  # fmt: skip


def images_per_s(batches: Iterator[Any]) -> float:
    for _ in range(_SKIPPED):
        next(batches)
    began = time.perf_counter()
    for _ in range(_MEASURED):
        next(batches)
    return _MEASURED * _BATCH / (time.perf_counter() - began)


def compare(arms: Mapping[str, Callable[[], Iterator[Any]]], to: str, rounds: int) -> dict[str, Any]:
    """Prints and returns images per second of each arm, and the ratio to one of them."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in random.Random(number).sample(list(arms), len(arms)):
            rates[name].append(images_per_s(arms[name]()))
    found: dict[str, Any] = {}
    for name, values in rates.items():
        rate, ratio = Quartiles.of(values), Quartiles.of([own / base for own, base in zip(values, rates[to])])
        print(f"  {name:34} {rate:6.0f} images/s, {ratio:.2f} of {to}", flush=True)
        found[name] = {"images_per_s": round(rate.median), "ratio": [round(x, 3) for x in (ratio.low, ratio.median, ratio.high)]}
    return found | {"n": rounds}


def first_batches(folder: Path, count: int) -> dict[str, Any]:
    """The seconds to the first batch over many files, of a first attempt and of later ones."""
    from jobs.data import image_folder
    from jobs.images import index_files

    root, one = folder / "many", folder / "one.jpg"
    Image.new("RGB", (64, 64)).save(one)
    for label in range(200):
        (root / f"class_{label:03}").mkdir(parents=True)
        for number in range(count // 200):
            os.link(one, root / f"class_{label:03}" / f"{number:05}.jpg")
    found = {}

    def first_batch() -> float:
        began = time.perf_counter()
        next(launched(image_folder(str(root), transform=_CROP)))
        return time.perf_counter() - began

    files = index_files.IndexFiles()
    index_files.use_index_files(files)
    found["first attempt"] = first_batch()
    known = {source: index.digest for source, index in files.opened.items()}
    index_files.use_index_files(index_files.IndexFiles(known=known))
    found["later attempts"] = first_batch()
    began = time.perf_counter()
    next(stock(ImageFolder(str(root), v2.Compose([_CROP, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]))))
    found["ImageFolder"] = time.perf_counter() - began
    for name, seconds in found.items():
        print(f"  {name:34} {seconds:6.2f} s")
    return {name: round(seconds, 2) for name, seconds in found.items()} | {"objects": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="times of each arm")
    parser.add_argument("--objects", type=int, default=200_000, help="files of the folder for the first batch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    fork_server.start(["tests.benchmarks.data"])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="launcher-benchmark-")))
        os.environ |= {"HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache")}
        from jobs.data import image_folder, parquet_images, tar_shards

        images, shards, parquet = folder / "images", folder / "shards", folder / "parquet"
        write_folder(images)
        write_shards(images, shards)
        write_parquet(images, parquet)
        size = sum(path.stat().st_size for path in images.glob("*/*.jpg"))
        print(f"{_CLASSES * _PER_CLASS} JPEGs, {size / _CLASSES / _PER_CLASS / 1e3:.0f} kB each; n = {arguments.rounds}")
        scaled = v2.Compose([_CROP, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
        on_tensors = v2.Compose([v2.ToImage(), _CROP, v2.ToDtype(torch.float32, scale=True)])
        document: dict[str, Any] = {}
        print("from a local disk")
        document["local"] = compare(
            {
                "stock": lambda: stock(ImageFolder(str(images), scaled)),
                "stock, tensors": lambda: stock(ImageFolder(str(images), on_tensors)),
                "launcher, folder": lambda: launched(image_folder(str(images), transform=_CROP)),
                "launcher, tar shards": lambda: launched(tar_shards(str(shards), transform=_CROP)),
                "launcher, Parquet": lambda: launched(parquet_images(str(parquet), transform=_CROP)),
            },
            "stock",
            arguments.rounds,
        )
        server = stack.enter_context(s3_server(folder / "server"))
        os.environ |= server.environment
        import s3fs

        fs = s3fs.S3FileSystem()
        for path in (images, shards, parquet):
            fs.put(str(path), f"{server.bucket}/{path.name}", recursive=True)
        proxy = stack.enter_context(Proxy(server.port, _LATENCY_S))
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.port}"
        s3fs.S3FileSystem.clear_instance_cache()
        bucket = f"s3://{server.bucket}"
        fork_server.start(["tests.benchmarks.data"])
        print(f"from S3, each request {1000 * _LATENCY_S:.0f} ms late")
        document["s3"] = compare(
            {
                "stock": lambda: stock(OfFsspec(f"{bucket}/images")),
                "launcher, folder": lambda: launched(image_folder(f"{bucket}/images", transform=_CROP)),
                "launcher, tar shards": lambda: launched(tar_shards(f"{bucket}/shards", transform=_CROP)),
                "launcher, Parquet": lambda: launched(parquet_images(f"{bucket}/parquet", transform=_CROP)),
            },
            "stock",
            arguments.rounds,
        )
        print(f"the first batch of {arguments.objects} files in a local folder")
        document["first batch"] = first_batches(folder, arguments.objects)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
