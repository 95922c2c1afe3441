"""What the index of images in a bucket costs: ``python -m tests.benchmarks.listing``.

Each arm is a fresh process that builds the index of 10**6 images, in one folder (``flat``) or in 1,000 (``classes``),
from a server in another process that answers S3's listings and holds no images. Reported for each: the seconds until
the index is open, the MiB by which the peak of the process has grown (VmHWM) since it had imported what it needs, and
the MiB of the index. The last line is JSON.

Results: s3fs 2026.9, Arrow's mimalloc, 2 slow cores that the server shares, answers of 20 ms, n=1: ``flat`` 70 s and
383 MiB, ``classes`` 43 s and 392 MiB, for an index of 121 MiB. With ``ls`` of s3fs it was 185 s and 1,494 MiB, and
175 s and 522 MiB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.listed_bucket import BUCKET, ENVIRONMENT, ListedBucket

_ARMS = {"flat": 1, "classes": 1000}
"""The number of classes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=10**6)
    parser.add_argument("--latency-ms", type=float, default=20.0, help="of each answer of the server")
    parser.add_argument("--arm", choices=list(_ARMS), help="measure this arm once, in this process")
    parser.add_argument("--serve", choices=list(_ARMS), help="serve the keys of this arm, and print where")
    options = parser.parse_args()
    if options.serve is not None:
        server = ListedBucket(_keys(options.images, _ARMS[options.serve]), options.latency_ms / 1e3)
        print(server.url, flush=True)
        server.serve_forever()
    if options.arm is not None:
        print(json.dumps(_measure()))
        return
    found = {}
    for arm in _ARMS:
        command = [sys.executable, "-m", "tests.benchmarks.listing", *sys.argv[1:]]
        with (
            tempfile.TemporaryDirectory() as cache,
            subprocess.Popen([*command, "--serve", arm], stdout=subprocess.PIPE, text=True) as server,
        ):
            assert server.stdout is not None
            variables = ENVIRONMENT | {"AWS_ENDPOINT_URL": server.stdout.readline().strip(), "XDG_CACHE_HOME": cache}
            try:
                done = subprocess.run(
                    [*command, "--arm", arm],
                    env=os.environ | variables,
                    stdout=subprocess.PIPE,
                    check=True,
                    timeout=900,
                )
            finally:
                server.kill()
        found[arm] = json.loads(done.stdout)
        print(f"{arm:7} " + ", ".join(f"{value:,.1f} {unit}" for unit, value in found[arm].items()), flush=True)
    print(json.dumps(found))


def _keys(num_images: int, num_classes: int) -> list[str]:
    return [f"images/class_{number * num_classes // num_images:03d}/{number:07d}.jpg" for number in range(num_images)]


def _measure() -> dict[str, float]:
    from jobs.data import image_folder
    from jobs.images.indexing.index_files import IndexFiles, use_index_files

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    __import__("pyarrow.compute"), __import__("s3fs")
    use_index_files(IndexFiles(tell=tell))
    before, begun = _peak_mib(), time.perf_counter()
    index = image_folder(f"s3://{BUCKET}/images").index
    return {
        "s": time.perf_counter() - begun,
        "MiB": _peak_mib() - before,
        "MiB in the index": index.path.stat().st_size / 2**20,
    }


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
