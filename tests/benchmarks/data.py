"""How fast images are read: ``python -m tests.benchmarks.data``.

The same JPEGs, 500 x 375 and about 100 kB, lie in an image folder, in tar shards and in Parquet files. An arm is a
loader with two processes that decode, crop at random and resize to 224; the clock runs between two batches, once the
loader has used up what it made ready at its start. All arms take turns in another order in every round.

*stock*: torchvision's ``ImageFolder`` in a ``DataLoader``, with torchvision's transforms on Pillow's images, as its own
scripts have them; *stock, tensors*: the same transforms on tensors. *launcher*: ``training_batches`` over
``jobs.data.image_folder``, ``tar_shards`` and ``parquet_images``, the same transform on tensors.

*S3*: a real server on this machine behind a proxy that hands on each request 20 ms late. Stock is a dataset over
fsspec's ``cat_file``, which asks for the size of each sample and then for its bytes, with a ``DataLoader`` of two
processes. *in blocks*: tar shards and Parquet in the order of ``data.shuffle``, blocks of 32 in buffers of 128; else
all arms read in the order of a full shuffle.

*first batch*: the seconds from nothing to the first batch for a folder of many images (hard links of few): with a
listing, as the dry run of the first attempt; and with the index that the run has, as all workers and later attempts.

Reported: images per second, medians with quartiles, and n; ratios are of the same round. The last line is JSON.

Results: 2 slow cores beside other work, torch 2.14, n=9, as ratios to *stock*. From a disk: 1.03 (0.96-1.11) folder,
1.12 (1.02-1.27) tar shards, 1.21 (1.15-1.32) Parquet. From S3 (stock: 37 images/s): 8.0, 7.4, 15.8; in blocks 13.3 and
15.9. First batch of 200,000 files: 2.7 s with the listing, 0.9 s and 0.7 s with an index, 0.7 s ``ImageFolder``.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from cluster.process import fork_server
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from jobs.data import image_folder, parquet_images, tar_shards
from jobs.images.indexing import index_files
from jobs.spec.job import ShuffleSpec
from tests.benchmarks import image_arms
from tests.benchmarks.arms import Quartiles
from tests.benchmarks.image_arms import BATCH, COUNT, CROP, LOADERS, OfFsspec, launched, stock
from tests.stores import Proxy, S3Server, s3_server

_PARTS = ("disk", "s3", "first")
_SKIPPED = 2 * LOADERS + 1
"""Batches before the clock runs: as many as a loader makes ready."""
_MEASURED = 8
_LATENCY_S = 0.02
_BLOCKS = ShuffleSpec(block=32, buffer=128, streams=LOADERS)
_ON_PILLOW = v2.Compose([CROP, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
_ON_TENSORS = v2.Compose([v2.ToImage(), CROP, v2.ToDtype(torch.float32, scale=True)])


def images_per_s(batches: Iterator[Any]) -> float:
    for _ in range(_SKIPPED):
        next(batches)
    began = time.perf_counter()
    for _ in range(_MEASURED):
        next(batches)
    return _MEASURED * BATCH / (time.perf_counter() - began)


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
        found[name] = {
            "images_per_s": round(rate.median),
            "ratio": [round(x, 3) for x in (ratio.low, ratio.median, ratio.high)],
        }
    return found | {"n": rounds}


def from_disk(folder: Path, rounds: int) -> dict[str, Any]:
    images, shards, parquet = (str(folder / name) for name in ("images", "shards", "parquet"))
    arms = {
        "stock": lambda: stock(ImageFolder(images, _ON_PILLOW)),
        "stock, tensors": lambda: stock(ImageFolder(images, _ON_TENSORS)),
        "launcher, folder": lambda: launched(image_folder(images, transform=CROP)),
        "launcher, tar shards": lambda: launched(tar_shards(shards, transform=CROP)),
        "launcher, Parquet": lambda: launched(parquet_images(parquet, transform=CROP)),
    }
    return compare(arms, "stock", rounds)


def from_s3(bucket: str, rounds: int) -> dict[str, Any]:
    images, shards, parquet = (f"s3://{bucket}/{name}" for name in ("images", "shards", "parquet"))
    arms = {
        "stock": lambda: stock(OfFsspec(images)),
        "launcher, folder": lambda: launched(image_folder(images, transform=CROP)),
        "launcher, tar shards": lambda: launched(tar_shards(shards, transform=CROP)),
        "launcher, Parquet": lambda: launched(parquet_images(parquet, transform=CROP)),
        "launcher, tar shards in blocks": lambda: launched(tar_shards(shards, transform=CROP), _BLOCKS),
        "launcher, Parquet in blocks": lambda: launched(parquet_images(parquet, transform=CROP), _BLOCKS),
    }
    return compare(arms, "stock", rounds)


def first_batches(folder: Path, count: int) -> dict[str, Any]:
    """The seconds to the first batch over many files, of a first attempt and of later ones."""
    root = folder / "many"
    for label in range(200):
        own = root / f"class_{label:03}"
        own.mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(own / "00000.jpg")
        for number in range(1, count // 200):
            os.link(own / "00000.jpg", own / f"{number:05}.jpg")
    built = index_files.IndexFiles()
    index_files.use_index_files(built)
    found = {"first attempt": seconds_to_batch(lambda: launched(image_folder(str(root), transform=CROP)))}
    run, known = RunDirectory(Store(str(folder / "run"))), {}
    for source, index in built.opened.items():
        run.write_index(index.digest, index_files.pack_index(index))
        known[source] = index.digest
    for attempt in ("later, on the same host", "later, on another host"):
        index_files.use_index_files(index_files.IndexFiles(run, known))
        found[attempt] = seconds_to_batch(lambda: launched(image_folder(str(root), transform=CROP)))
        shutil.rmtree(folder / "cache")
    found["ImageFolder"] = seconds_to_batch(lambda: stock(ImageFolder(str(root), _ON_TENSORS)))
    for name, seconds in found.items():
        print(f"  {name:34} {seconds:6.2f} s")
    return {name: round(seconds, 2) for name, seconds in found.items()} | {"objects": count}


def seconds_to_batch(arm: Callable[[], Iterator[Any]]) -> float:
    began = time.perf_counter()
    batches = arm()
    next(batches)
    return time.perf_counter() - began  # before its processes end, for which the end of the iterator waits


def upload(folder: Path, server: S3Server) -> None:
    import s3fs

    environment = server.environment
    fs = s3fs.S3FileSystem(
        key=environment["AWS_ACCESS_KEY_ID"], secret=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
    )  # fmt: skip
    for name in ("images", "shards", "parquet"):
        fs.put(str(folder / name), f"{server.bucket}/{name}", recursive=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="times of each arm, at least 2")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS, help="what to measure")
    parser.add_argument("--objects", type=int, default=200_000, help="files of the folder for the first batch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="launcher-benchmark-")))
        os.environ |= {"HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        image_arms.write_folder(folder / "images")
        image_arms.write_shards(folder / "images", folder / "shards")
        image_arms.write_parquet(folder / "images", folder / "parquet")
        server = stack.enter_context(s3_server(folder / "server"))
        upload(folder, server)
        proxy = stack.enter_context(Proxy(server.port, _LATENCY_S))
        # Before the fork server starts, whose environment the loader processes of stock have.
        os.environ |= server.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        fork_server.start([image_arms.__name__])
        size = sum(path.stat().st_size for path in (folder / "images").glob("*/*.jpg")) / COUNT
        print(f"{COUNT} JPEGs, {size / 1e3:.0f} kB each; n = {arguments.rounds}")
        document: dict[str, Any] = {}
        if "disk" in arguments.parts:
            print("from a local disk")
            document["disk"] = from_disk(folder, arguments.rounds)
        if "s3" in arguments.parts:
            print(f"from S3, each request {1000 * _LATENCY_S:.0f} ms late")
            document["s3"] = from_s3(server.bucket, arguments.rounds)
        if "first" in arguments.parts:
            print(f"the first batch of {arguments.objects} files in a local folder")
            document["first"] = first_batches(folder, arguments.objects)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
