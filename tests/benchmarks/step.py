"""The step time of the launched loop against a hand-written DDP loop: ``python -m tests.benchmarks.step``.

Every worker process holds four arms: the product's ``jobs.loop.Loop`` with ``train.exact`` on and off, a bare DDP loop
as one would write it by hand, and that bare loop once more (A/A), which shows what of a difference is noise. The arms
take turns in short blocks of steps, in another order in every round, so that a machine whose speed drifts hurts all
alike. All see the same samples in the same micro-batches, through a torch ``DataLoader`` of their own over the same
dataset, and start from the same weights.

How single steps are timed without touching the product: ``Loop`` asks ``stop_wanted()`` exactly once in every step,
and the bare loop calls the same function at the end of its own. So each arm runs in a thread of its own, and that
call is the gate at which the clock is read and, after a block, the thread waits while the other arms have their
turn. From gate to gate lies one whole step, with its batch, messages, rows and logging: nothing is left out, nothing
but the gate is added. A barrier before every block, outside the clock, lines the workers up; a block takes as long
as its slowest worker. What switches globally (deterministic algorithms) is switched with the arm.

Reported for each arm: the median and the quartiles of its step times, and the median and quartiles over rounds of
(its block / the bare arm's block of the same round), of wall time and of the CPU time of all workers' threads, which
tells of added work even where neighbours disturb the wall clock, but not of added waiting. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

_JOB = """
name: step
model: {{_target_: torchvision.models.resnet18, num_classes: 100}}
data:
  train: {{_target_: jobs.data.synthetic_images, length: {length}, num_classes: 100, image_size: 64}}
loss: {{_target_: CrossEntropyLoss}}
optimizer: {{_target_: SGD, lr: 0.01, momentum: 0.9}}
train: {{global_batch: {global_batch}, shards: {workers}, exact: {exact}}}
workers: {{num: {workers}}}
"""
_PER_WORKER = 32
_ARMS = ("bare", "exact", "inexact", "aa")


class Gate:
    """Where the thread of an arm stops between blocks, and reads the clock in each step."""

    def __init__(self, train: "Callable[[Gate], None]") -> None:
        self.step_times: list[float] = []
        self.cpu_time = 0.0
        """Of the newest block, in all threads of the process."""
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._left = 0
        self._over = False
        self._since = self._cpu_since = 0.0
        self._error: Exception | None = None
        threading.Thread(target=self._run, args=(train,), daemon=True).start()

    def run_block(self, steps: int) -> list[float]:
        """Lets the arm go on for some steps; their times."""
        self.step_times, self._left = [], steps
        self._hand_over()
        return self.step_times

    def end(self) -> None:
        """Lets the arm run to its end."""
        self._over = True
        self._hand_over()

    def __call__(self) -> bool:
        """The end of a step; whether the arm is to stop."""
        now = time.perf_counter()
        self.step_times.append(now - self._since)
        self._since = now
        self._left -= 1
        if self._left == 0:
            self.cpu_time = time.process_time() - self._cpu_since
            self._done.release()
            self._wait()
        return self._over

    def _hand_over(self) -> None:
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def _wait(self) -> None:
        self._go.acquire()
        self._cpu_since = time.process_time()
        self._since = time.perf_counter()

    def _run(self, train: "Callable[[Gate], None]") -> None:
        self._wait()
        try:
            train(self)
        except Exception as error:  # the main thread raises it as its own
            self._error = error
        self._done.release()


@dataclass(frozen=True, slots=True)
class Block:
    """Some steps of one arm in a row, in seconds."""

    arm: str
    times: list[float]
    cpu_time: float


@dataclass(frozen=True, slots=True)
class _Settings:
    workers: int
    block: int
    rounds: int
    warm_up: int

    @property
    def steps(self) -> int:
        """Of each arm, and one more in which a stopping loop leaves."""
        return self.warm_up + self.block * self.rounds + 4

    def job(self, exact: bool) -> Any:
        """The description that the product's arms run, parsed."""
        from launcher.description import parse

        global_batch = _PER_WORKER * self.workers
        text = _JOB.format(
            length=global_batch * self.steps, global_batch=global_batch, workers=self.workers, exact=str(exact).lower()
        )
        return parse(text, "step.yaml").spec


def _work(settings: _Settings, rank: int, store_path: str, results: Connection, messages: Connection) -> None:
    """One worker: all arms, block by block."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    store = dist.FileStore(store_path, settings.workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=settings.workers)
    gates = {
        "bare": Gate(_bare(settings, rank)),
        "exact": Gate(_launched(settings, rank, messages, exact=True)),
        "inexact": Gate(_launched(settings, rank, messages, exact=False)),
        "aa": Gate(_bare(settings, rank)),
    }

    def run_block(arm: str, steps: int) -> list[float]:
        torch.use_deterministic_algorithms(arm in ("exact", "inexact"))  # the product's default, not torch's
        torch.utils.deterministic.fill_uninitialized_memory = False
        dist.barrier()
        return gates[arm].run_block(steps)

    for arm in _ARMS:
        run_block(arm, settings.warm_up)
    for number in range(settings.rounds):
        for arm in random.Random(number).sample(_ARMS, len(_ARMS)):
            times = run_block(arm, settings.block)
            results.send(Block(arm, times, gates[arm].cpu_time))
    for arm in _ARMS:
        gates[arm].end()
    results.close()
    dist.destroy_process_group()


def _launched(settings: _Settings, rank: int, messages: Connection, *, exact: bool) -> Callable[[Gate], None]:
    """The product's loop, put together as ``jobs.worker.train`` does."""
    import torch

    from cluster.link import Activity, Link
    from jobs.loop import Loop, Progress
    from jobs.parts import build_parts
    from jobs.team import Team

    spec, device = settings.job(exact), torch.device("cpu")
    team = Team(rank=rank, world_size=settings.workers, shards=spec.train.shards, exact=exact, device=device)
    parts = build_parts(spec, device)
    link = Link(messages, Activity())

    def tell(kind: str, **content: Any) -> None:
        if rank == 0:
            link.send(kind, time=time.time(), **content)

    def train(gate: Gate) -> None:
        loop = Loop(
            spec, parts, Progress(), team,
            metrics={}, tell=tell, save=lambda _, **__: None, stop_wanted=gate,
        )  # fmt: skip
        loop.run()

    return train


def _bare(settings: _Settings, rank: int) -> Callable[[Gate], None]:
    """What one would write by hand: DDP with its defaults, cross-entropy, SGD."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader

    from jobs.parts import build_parts

    parts = build_parts(settings.job(exact=True), torch.device("cpu"))  # the same weights, and the same data
    torch.set_num_threads(1)
    batches = [parts.steps.samples(0, step, rank).tolist() for step in range(settings.steps)]
    loader = DataLoader(parts.train_set, batch_sampler=batches)
    model, loss = DistributedDataParallel(parts.model), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def train(gate: Gate) -> None:
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            optimizer.step()
            if gate():
                break

    return train


def measure(settings: _Settings) -> Iterator[Block]:
    """Runs the workers; yields every block, with the wall time of its slowest worker and the CPU time of all."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="launcher-benchmark-") as folder:
        workers, pipes = [], []
        messages, their_messages = context.Pipe()
        for rank in range(settings.workers):
            results, theirs = context.Pipe(duplex=False)
            arguments = (settings, rank, os.path.join(folder, "store"), theirs, their_messages)
            workers.append(context.Process(target=_work, args=arguments, daemon=True))
            workers[-1].start()
            theirs.close()
            pipes.append(results)
        their_messages.close()
        threading.Thread(target=drain, args=(messages,), daemon=True).start()
        for _ in range(settings.rounds * len(_ARMS)):
            of_workers: list[Block] = [pipe.recv() for pipe in pipes]
            slowest = max(of_workers, key=lambda block: sum(block.times))
            yield replace(slowest, cpu_time=sum(block.cpu_time for block in of_workers))
        for worker in workers:
            worker.join()


def drain(messages: Connection) -> None:
    """Reads what the loops send, as an agent would."""
    try:
        while True:
            messages.recv()
    except (EOFError, OSError):
        return


@dataclass(frozen=True, slots=True)
class Quartiles:
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Quartiles":
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} {self.low:{spec}}-{self.high:{spec}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--block", type=int, default=2, help="steps of an arm in a row")
    parser.add_argument("--rounds", type=int, default=30, help="blocks of each arm")
    parser.add_argument("--warm-up", type=int, default=5, help="steps of each arm that are not counted")
    arguments = parser.parse_args()
    settings = _Settings(arguments.workers, arguments.block, arguments.rounds, arguments.warm_up)
    blocks: dict[str, list[Block]] = {arm: [] for arm in _ARMS}
    for block in measure(settings):
        blocks[block.arm].append(block)
    document: dict[str, Any] = {}
    print(f"ResNet-18, 64x64, {_PER_WORKER} a worker, {settings.workers} gloo workers of 1 thread; ratios are to bare")
    columns = "".join(f" {name:>7} {'quartiles':>15}" for name in ("step ms", "ratio", "cpu"))
    print(f"{'arm':8} {'steps':>5}{columns}")
    for arm, own in blocks.items():
        step_ms = Quartiles.of([1000 * seconds for block in own for seconds in block.times])
        ratio = Quartiles.of([sum(a.times) / sum(b.times) for a, b in zip(own, blocks["bare"])])
        cpu = Quartiles.of([a.cpu_time / b.cpu_time for a, b in zip(own, blocks["bare"])])
        steps = settings.block * settings.rounds
        print(f"{arm:8} {steps:5} {step_ms:7.1f} {ratio:7.4f} {cpu:7.4f}")
        document[f"{arm}_ms"] = round(step_ms.median, 2)
        if arm != "bare":
            document[arm] = round(ratio.median, 4)
            document[f"{arm}_quartiles"] = [round(ratio.low, 4), round(ratio.high, 4)]
            document[f"{arm}_cpu"] = round(cpu.median, 4)
    document |= {"n": settings.block * settings.rounds, "rounds": settings.rounds, "workers": settings.workers}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
