"""What the exact exchange costs between hosts, beside plain DDP: ``python -m tests.benchmarks.exchange``; needs root.

Each layout has hosts of its own, which are namespaces on this machine, wired to one switch (``tests/faults/hosts.py``).
``3+2+1:8`` is three hosts with three, two and one worker, and eight shards in a step; without a number there is one
shard for each worker. A worker is a process of one thread that speaks gloo. It holds three arms: the product's
exchange (``exact``), DDP with its defaults (``ddp``), and that once more (``ddp again``, A/A), which shows what of a
difference is noise. They take turns in short blocks of steps, in another order in every round, so that a machine whose
speed drifts hurts all alike.

A step is a backward pass for each shard of the worker. The model has the parameters of a ResNet-18, scaled to the
megabytes wanted, and computes next to nothing, so a step is little but the exchange; in training that computes, a part
of it is hidden behind the backward pass. Without ``--bucket-mb``, which is for all arms, each arm has the buckets of
its defaults: at 20 MB, two of 5 and 15 MB for DDP, five of 3 to 5 MB for ``exact``. Before anything counts, and once at
each rate, the gradients of all arms are compared with the sum over all shards, and the SHA-256 of those of ``exact``
must be the same on every worker, and the same for all layouts with as many shards.

Measured for each layout, rate and arm:
- *bytes*: those that leave a host through its interface, headers and acknowledgements included, in a step, divided by
  the bytes of the gradients; of the host that sends most. Beside it the least that an all-reduce between hosts can do
  with: 2(H-1)/H.
- *step*: the median and the quartiles over rounds of the time of a step. A barrier before every block, outside the
  clock, lines the workers up; a block takes as long as its slowest worker.
- *ratio*: the same of (its block / the block of ``ddp`` in the same round).
- *tail*: the median over rounds of the time from the last gradient that a worker has computed to the end of its
  step, the mean over workers.
- *model*: the step that the cost model predicts (``exchange_model.py``), for hosts with the same number of workers at a
  limited rate. It has the speed of the machine from the steps of ``ddp`` without a limit, so those come first.

A rate limits the interface of each host in both directions, in Mbit/s of packets: a plain socket gets 957 of 1000 and
287 of 300. The machine has fewer cores than there are workers, and all hosts share them: without a limit on the rate,
the times are those of its memory and its kernel. A layout of one host has no link, and is measured without a limit
alone. The last line is JSON.

Results: torch 2.14, 2 cores, 20 MB; ``exact`` beside ``ddp``. 2x4, n=12 blocks of 2 steps: 1.00 B beside 1.75 B; 615 ms
beside 1,017 (0.61) at 300 Mbit/s, 223 beside 319 (0.70) at 1 Gbit/s, 151 beside 116 (1.31) without a limit; when every
worker exchanged slices with every other, 4.01 B and 2.29 at 300 Mbit/s. Without a limit, n=6: 1x4 0.99, 2x1 0.93.
Bytes: 3x2 1.34 beside 1.67, 4x2 1.50 beside 1.75, 3+2+1:8 1.34 beside 1.67. With 6 shards, 3+2+1 cuts across subtrees:
2.00; no order of the same sums sends less than 1.67 on average.
"""

import argparse
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from jobs.parallel.worker_team import BUCKET_MB_BETWEEN_CPU_HOSTS
from tests.benchmarks.arms import Quartiles
from tests.benchmarks.exchange_model import moving_rate, on_one_machine, predicted_step_s, ring
from tests.benchmarks.exchange_worker import TIMEOUT_S, Block, Measured, Place, sizes_of, work
from tests.faults.hosts import CHECKOUT, NETWORK_INTERFACE, Host, hosts, why_there_can_be_none

_ARMS = ("exact", "ddp", "ddp again")
_MODELLED = {"exact": ("overlap", BUCKET_MB_BETWEEN_CPU_HOSTS), "ddp": ("ring", None)}
"""What the cost model calls the exchange of an arm, and the buckets of its defaults."""
_LAYOUTS = ("1x4", "2x1", "2x4", "3x2", "3+2+1", "3+2+1:8", "4x2")
_RATES = (None, 1000.0, 300.0)
_WARM_UP_STEPS = 2
"""Of each arm, at each rate; DDP chooses its buckets after the first of all."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """The number of workers on each host, and of shards."""

    name: str
    workers: tuple[int, ...]
    shards: int

    @classmethod
    def parse(cls, name: str) -> "_Layout":
        parts = re.fullmatch(r"(?:(\d+)x(\d+)|(\d+(?:\+\d+)*))(?::(\d+))?", name)
        if parts is None:
            raise argparse.ArgumentTypeError(f"write it as 2x4 or 3+2+1:8, got {name}")
        num_hosts, per_host, uneven, shards = parts.groups()
        workers = tuple(map(int, uneven.split("+"))) if uneven else int(num_hosts) * (int(per_host),)
        layout = cls(name, workers, int(shards or sum(workers)))
        if min(workers, default=0) < 1 or layout.shards < sum(workers):
            raise argparse.ArgumentTypeError(f"a host has at least one worker, a worker at least one shard: {name}")
        return layout

    @property
    def least(self) -> float:
        """What an all-reduce must send from some host, in multiples of what it sums."""
        return 2 * (len(self.workers) - 1) / len(self.workers)


def _rate(text: str) -> float | None:
    return None if text == "unlimited" else _above_0(text)


def _above_0(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and above 0, got {text}")
    return number


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return number


@dataclass(slots=True)
class _Blocks:
    """All blocks of an arm in a layout at a rate."""

    step_s: list[float] = field(default_factory=list)
    tail_s: list[float] = field(default_factory=list)
    bytes_sent: list[list[int]] = field(default_factory=list)
    """For each block, of each host."""


class _Workers:
    """The workers of a layout, on hosts of their own."""

    def __init__(
        self,
        layout: _Layout,
        machines: Sequence[Host],
        sizes: tuple[int, ...],
        bucket_mb: float | None,
        folder: Path,
    ) -> None:
        self.hosts = machines
        self._layout = layout
        self._sizes = sizes
        self._bucket_mb = bucket_mb
        self._folder = folder
        self._pipes: list[Connection] = []
        self._parents: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for number, host in zip(self._layout.workers, self.hosts):
            for _ in range(number):
                self._start(host)

    def run(self, block: Block) -> list[Measured]:
        """Runs steps of an arm; what each worker measures, by rank.

        Raises:
            SystemExit: A worker has ended, or has not answered in time.
        """
        for rank, pipe in enumerate(self._pipes):
            self._send(rank, pipe, block)
        answers: dict[int, Measured] = {}
        deadline = time.monotonic() + TIMEOUT_S
        waited_for = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waited_for:
            ready = wait(waited_for, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(waited_for.values())
                self._fail(late[0], f"has not answered for {TIMEOUT_S:.0f} s, one of the late ones {late}")
            for pipe in ready:
                rank = waited_for.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    self._fail(rank, f"has ended with status {self._parents[rank].wait(TIMEOUT_S)}")
        return [answer for _, answer in sorted(answers.items())]

    def end(self) -> None:
        """Lets go of the workers, which end with their hosts.

        The parent of each, outside of its host, stops when it is stopped. Nobody would then collect what is left of the
        worker, and its host would not end.
        """
        for pipe in self._pipes:
            pipe.close()
        for parent in self._parents:
            parent.kill()
            parent.wait()

    def _start(self, host: Host) -> None:
        rank = len(self._pipes)
        ours, theirs = Pipe()
        self._pipes.append(ours)
        code = f"from {work.__module__} import work; work({theirs.fileno()})"
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": NETWORK_INTERFACE}
        with theirs, open(self._log(rank), "wb") as log:
            self._parents.append(
                subprocess.Popen(
                    host.command([sys.executable, "-c", code], CHECKOUT, environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs.fileno(),),
                )
            )
        place = Place(
            rank=rank,
            world_size=sum(self._layout.workers),
            shards=self._layout.shards,
            meeting_address=self.hosts[0].address,
            address=host.address,
            sizes=self._sizes,
            bucket_mb=self._bucket_mb,
        )
        self._send(rank, ours, place)

    def _send(self, rank: int, pipe: Connection, message: Place | Block) -> None:
        try:
            pipe.send(message)
        except BrokenPipeError:
            self._fail(rank, f"has ended with status {self._parents[rank].wait(TIMEOUT_S)}")

    def _fail(self, rank: int, how: str) -> NoReturn:
        raise SystemExit(f"{self._layout.name}: worker {rank} {how}; its log:\n{self._log(rank).read_text()}")

    def _log(self, rank: int) -> Path:
        return self._folder / f"{rank}.log"


@contextmanager
def _workers(layout: _Layout, sizes: tuple[int, ...], bucket_mb: float | None) -> Iterator[_Workers]:
    """The workers of a layout for as long as the context lasts."""
    names = [f"host-{number}" for number, _ in enumerate(layout.workers, start=1)]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="launcher-benchmark-"))
        machines = stack.enter_context(hosts(*names))
        workers = _Workers(layout, machines, sizes, bucket_mb, Path(folder))
        stack.callback(workers.end)
        workers.start()
        yield workers


def _digest(told: Sequence[Measured], layout: _Layout) -> str:
    digests = {measured.sha256 for measured in told}
    if len(digests) > 1:
        raise SystemExit(f"{layout.name}: workers have different gradients: {digests}")
    (digest,) = digests
    assert digest is not None, "it was asked for"
    return digest


def _measure(workers: _Workers, num_rounds: int, steps: int) -> dict[str, _Blocks]:
    """Runs all blocks of all arms at the rate that the hosts have now."""
    blocks: dict[str, _Blocks] = {arm: _Blocks() for arm in _ARMS}
    for number in range(num_rounds):
        for arm in random.Random(number).sample(_ARMS, len(_ARMS)):
            before = [host.bytes_sent for host in workers.hosts]
            told = workers.run(Block(arm, steps, is_checked=False))
            blocks[arm].bytes_sent.append([host.bytes_sent - sent for host, sent in zip(workers.hosts, before)])
            blocks[arm].step_s.append(max(measured.step_s for measured in told))
            blocks[arm].tail_s.append(statistics.fmean(measured.tail_s for measured in told))
    return blocks


def _model_ms(
    arm: str, layout: _Layout, rate: float | None, num_bytes: int, bucket_mb: float | None, unlimited: _Blocks | None
) -> float | None:
    """Returns what the cost model predicts for a step; None if it has no formula for it.

    Args:
        unlimited: The blocks of ``ddp`` in the layout without a limit, if they are measured.
    """
    if arm not in _MODELLED or rate is None or unlimited is None or len(set(layout.workers)) > 1:
        return None
    exchange, default_mb = _MODELLED[arm]
    num_hosts, per_host = len(layout.workers), layout.workers[0]
    exchange_s = statistics.median(unlimited.tail_s)
    computed_s = statistics.median(unlimited.step_s) - exchange_s
    moved_bytes_per_s = moving_rate(ring, num_hosts, per_host, num_bytes, exchange_s)
    machine = on_one_machine(num_hosts, per_host, rate, moved_bytes_per_s)
    used_mb = default_mb if bucket_mb is None else bucket_mb
    return 1000 * predicted_step_s(machine, num_bytes, used_mb, computed_s)[exchange]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    layout_help = "hosts x workers, or workers + workers, and : shards"
    parser.add_argument(
        "--layouts", type=_Layout.parse, nargs="+", default=list(map(_Layout.parse, _LAYOUTS)), help=layout_help
    )
    parser.add_argument("--rates", type=_rate, nargs="+", default=_RATES, help="Mbit/s of each host; unlimited first")
    parser.add_argument("--rounds", type=_at_least(2), default=5, help="blocks of each arm; two have quartiles")
    parser.add_argument("--block", type=_at_least(1), default=2, help="steps of an arm in a row")
    parser.add_argument("--mb", type=_above_0, default=20.0, help="megabytes of gradients in float32")
    parser.add_argument("--bucket-mb", type=_above_0, help="MiB of a bucket, for all arms; their defaults if not given")
    arguments = parser.parse_args()
    if (lack := why_there_can_be_none()) is not None:
        raise SystemExit(lack)

    sizes = sizes_of(arguments.mb)
    num_bytes = 4 * sum(sizes)
    print(f"{num_bytes / 1e6:.1f} MB of gradients, gloo workers of 1 thread; n={arguments.rounds} blocks of", end=" ")
    print(f"{arguments.block} steps; median (quartiles); ratios are to ddp")
    head = f"{'layout':8} {'shards':>6} {'Mbit/s':>9} {'arm':9} {'bytes':>5} {'least':>5}"
    print(f"{head} {'step ms':>8} {'quartiles':>15} {'ratio':>6} {'quartiles':>11} {'tail ms':>8} {'model ms':>8}")
    rows: list[dict[str, Any]] = []
    digests: defaultdict[int, set[str]] = defaultdict(set)
    for layout in arguments.layouts:
        unlimited: _Blocks | None = None
        with _workers(layout, sizes, arguments.bucket_mb) as workers:
            for rate in arguments.rates if len(layout.workers) > 1 else [None]:
                for host in workers.hosts:
                    host.limit(rate)
                told_rate = "unlimited" if rate is None else f"{rate:g}"
                for arm in _ARMS:
                    told = workers.run(Block(arm, _WARM_UP_STEPS, is_checked=True))
                    if arm == "exact":
                        digests[layout.shards].add(_digest(told, layout))
                if len(digests[layout.shards]) > 1:
                    raise SystemExit(f"{layout.name}: exact has other gradients than with other workers")
                blocks = _measure(workers, arguments.rounds, arguments.block)
                if rate is None:
                    unlimited = blocks["ddp"]
                for arm, own in blocks.items():
                    by_host = [sum(of_blocks) for of_blocks in zip(*own.bytes_sent)]
                    sent = max(by_host) / (arguments.rounds * arguments.block * num_bytes)
                    step_ms = Quartiles.of([1000 * seconds for seconds in own.step_s])
                    ratio = Quartiles.of([a / b for a, b in zip(own.step_s, blocks["ddp"].step_s)])
                    tail_ms = 1000 * statistics.median(own.tail_s)
                    model_ms = _model_ms(arm, layout, rate, num_bytes, arguments.bucket_mb, unlimited)
                    told_model = "-" if model_ms is None else f"{model_ms:.1f}"
                    print(f"{layout.name:8} {layout.shards:6} {told_rate:>9} {arm:9}", end=" ")
                    print(f"{sent:5.2f} {layout.least:5.2f} {step_ms:8.1f} {ratio:6.3f} {tail_ms:8.1f}", end=" ")
                    print(f"{told_model:>8}", flush=True)
                    rows.append({
                        "layout": layout.name, "shards": layout.shards, "mbit_per_s": rate, "arm": arm,
                        "bytes": round(sent, 3), "least": round(layout.least, 3),
                        "step_ms": [round(value, 1) for value in (step_ms.low, step_ms.median, step_ms.high)],
                        "ratio": [round(value, 3) for value in (ratio.low, ratio.median, ratio.high)],
                        "tail_ms": round(tail_ms, 1), "model_ms": None if model_ms is None else round(model_ms, 1),
                    })  # fmt: skip
    print(json.dumps({
        "rows": rows, "gradient_bytes": num_bytes, "rounds": arguments.rounds, "block": arguments.block,
        "bucket_mb": arguments.bucket_mb,
        "exact_sha256": {shards: next(iter(digest)) for shards, digest in digests.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
