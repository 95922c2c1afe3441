"""What the order of samples costs: ``python -m tests.benchmarks.order``.

Each arm is a fresh process that asks for the micro-batches of one shard from the middle of an epoch on. ``full`` is the
product's order without ``data.shuffle``, ``block`` with ``--block`` and ``--buffer``; ``numpy`` is
``numpy.random.permutation``, which is the whole order of an epoch before its first sample. ``numpy`` has 10**7 samples,
for at 10**9 it would take 8 GB.

Reported for each arm, as the median over ``--rounds``: the milliseconds from the seed to the first micro-batch, the
microseconds for each sample of the micro-batches after that, and the MiB by which the peak of the process has grown
(VmHWM) since it had imported what it needs. The last line is JSON.

Results: numpy 2.4, 2 slow cores, micro-batches of 64, blocks of 100 in buffers of 10,000, n=5: ``full`` 0.40 ms, 2.6 us
a sample, 0.5 MiB; ``block`` 2.2 ms, 22 us, 0.6 MiB; ``numpy`` 430 ms, 0.02 us, 79 MiB.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from jobs.sampling import StepPlan
from jobs.spec import ShuffleSpec

_SHARDS = 8
_ARMS = {"full": 10**9, "block": 10**9, "numpy": 10**7}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--block", type=int, default=100)
    parser.add_argument("--buffer", type=int, default=10_000)
    parser.add_argument("--batches", type=int, default=300, help="micro-batches after the first one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arm", choices=list(_ARMS), help="measure this arm once, in this process")
    options = parser.parse_args()
    if options.arm is not None:
        print(json.dumps(_measure(options)))
        return
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in _ARMS}
    for _ in range(options.rounds):
        for arm, measured in found.items():
            command = [sys.executable, "-m", "tests.benchmarks.order", *sys.argv[1:], "--arm", arm]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
            measured.append(json.loads(done.stdout))
    medians = {
        arm: {name: statistics.median(each[name] for each in measured) for name in measured[0]}
        for arm, measured in found.items()
    }
    for arm, each in medians.items():
        print(
            f"{arm:6} {_ARMS[arm]:>13,} samples: first micro-batch {each['first_ms']:.2f} ms, then "
            f"{each['sample_us']:.2f} us a sample, {each['mib']:.1f} MiB"
        )
    print(json.dumps(medians))


def _measure(options: argparse.Namespace) -> dict[str, float]:
    num_samples, size = _ARMS[options.arm], options.micro_batch
    before, begun = _peak_kib(), time.perf_counter()
    if options.arm == "numpy":
        order = np.random.default_rng(0).permutation(num_samples)
        middle = len(order) // size // 2

        def batch(number: int) -> list[int]:
            begin = (middle + number) * size
            found: list[int] = order[begin : begin + size].tolist()
            return found
    else:
        shuffle = ShuffleSpec(block=options.block, buffer=options.buffer) if options.arm == "block" else None
        steps = StepPlan(num_samples, size * _SHARDS, _SHARDS, 1, shuffle)
        middle = steps.steps_per_epoch // 2

        def batch(number: int) -> list[int]:
            found: list[int] = steps.samples(0, middle + number, shard=0).tolist()
            return found

    batch(0)
    first = time.perf_counter()
    for number in range(1, options.batches + 1):
        batch(number)
    ended = time.perf_counter()
    return {
        "first_ms": 1e3 * (first - begun),
        "sample_us": 1e6 * (ended - first) / (options.batches * size),
        "mib": (_peak_kib() - before) / 1024,
    }


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
