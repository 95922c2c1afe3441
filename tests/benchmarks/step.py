"""The step time of the launched loop against a hand-written DDP loop: ``python -m tests.benchmarks.step``.

Every worker process holds four arms: the product's ``jobs.training.loop.Loop`` with ``train.exact`` on and off, a bare
DDP loop as one would write it by hand, and that bare loop once more (A/A), which shows what of a difference is noise.
The arms take turns in short blocks of steps, in another order in every round, so that a machine whose speed drifts
hurts all alike. All see the same samples in the same micro-batches, through a torch ``DataLoader`` of their own over
the same dataset, and start from the same weights.

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
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from tests.benchmarks.arms import Gate, Quartiles, join_team, side_by_side

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


@dataclass(frozen=True, slots=True)
class _Block:
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
        from launcher.config.description import parse

        global_batch = _PER_WORKER * self.workers
        text = _JOB.format(
            length=global_batch * self.steps, global_batch=global_batch, workers=self.workers, exact=str(exact).lower()
        )
        return parse(text, "step.yaml").spec


def _work(settings: _Settings, rank: int, folder: str, results: Connection, messages: Connection) -> None:
    """One worker: all arms, block by block."""
    import torch
    import torch.distributed as dist

    join_team(rank, settings.workers, folder)
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
            results.send(_Block(arm, times, gates[arm].cpu_time))
    for arm in _ARMS:
        gates[arm].end()
    results.close()
    dist.destroy_process_group()


def _launched(settings: _Settings, rank: int, messages: Connection, *, exact: bool) -> Callable[[Gate], None]:
    """The product's loop, put together as ``jobs.training.worker.train`` does."""
    import torch

    from cluster.process.activity import Activity
    from cluster.process.agent_link import AgentLink
    from cluster.process.messages import RowLogged
    from jobs.checkpoint.loop_state import LoopState
    from jobs.components.build import build_parts
    from jobs.parallel.worker_team import Team
    from jobs.training.loop import Loop

    spec, device = settings.job(exact), torch.device("cpu")
    team = Team(
        rank=rank, world_size=settings.workers, shards=spec.train.shards, exact=exact, device=device,
        bucket_mb=spec.train.bucket_mb,
    )  # fmt: skip
    parts = build_parts(spec, device)
    link = AgentLink(messages, Activity())

    def log(row: Mapping[str, float]) -> None:
        if rank == 0:
            link.send(RowLogged(row=row, time=time.time(), spent=link.activity.spent()))

    def train(gate: Gate) -> None:
        loop = Loop(
            spec, parts, LoopState(), team,
            metrics={}, log=log, tell=link.send, save=lambda _, **__: None, stop_wanted=gate,
        )  # fmt: skip
        loop.run()

    return train


def _bare(settings: _Settings, rank: int) -> Callable[[Gate], None]:
    """What one would write by hand: DDP with its defaults, cross-entropy, SGD."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader

    from jobs.components.build import build_parts

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


def measure(settings: _Settings) -> Iterator[_Block]:
    """Runs the workers; yields every block, with the wall time of its slowest worker and the CPU time of all."""
    for told in side_by_side(partial(_work, settings), settings.workers, settings.rounds * len(_ARMS)):
        slowest: _Block = max(told, key=lambda block: sum(block.times))
        yield replace(slowest, cpu_time=sum(block.cpu_time for block in told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--block", type=int, default=2, help="steps of an arm in a row")
    parser.add_argument("--rounds", type=int, default=30, help="blocks of each arm")
    parser.add_argument("--warm-up", type=int, default=5, help="steps of each arm that are not counted")
    arguments = parser.parse_args()
    settings = _Settings(arguments.workers, arguments.block, arguments.rounds, arguments.warm_up)
    blocks: dict[str, list[_Block]] = {arm: [] for arm in _ARMS}
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
