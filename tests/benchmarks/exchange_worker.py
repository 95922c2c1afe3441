"""A worker of ``tests.benchmarks.exchange``: it holds all arms, and runs the steps that it is told to over a pipe."""

import hashlib
import os
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18

from jobs.parallel.worker_team import Team

TIMEOUT_S = 180.0
"""The longest that workers may take to meet, to exchange gradients, or to run a block of steps."""
_PORT = 29500


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which worker a process is: the first message to it."""

    rank: int
    world_size: int
    shards: int
    meeting_address: str
    """The address of rank 0."""
    address: str
    """The address of this worker's host."""
    sizes: tuple[int, ...]
    """The numbers in each parameter."""
    bucket_mb: float | None
    """The size of a bucket in MiB; None: the default of each arm."""


@dataclass(frozen=True, slots=True)
class Block:
    """Steps of an arm in a row: the order to run them."""

    arm: str
    steps: int
    is_checked: bool
    """Compares the gradients of the last step with the sum over all shards, and tells their digest."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The answer to a ``Block``."""

    step_s: float
    """Seconds of a step, the mean."""
    tail_s: float
    """Seconds of a step after this worker has computed its last gradient, the mean."""
    sha256: str | None
    """The digest of the gradients of the last step, if they were checked."""


def sizes_of(megabytes: float) -> tuple[int, ...]:
    """The numbers in each parameter of a ResNet-18 that is scaled to so many megabytes of gradients in float32.

    They are odd, so that no bucket divides by a number of workers.
    """
    with torch.device("meta"):
        numbers = [parameter.numel() for parameter in resnet18().parameters()]
    return tuple(int(number * megabytes * 10**6 / 4 / sum(numbers)) | 1 for number in numbers)


def work(pipe: int) -> None:
    """Runs blocks of steps until the other end of the pipe, a file descriptor, is closed."""
    try:
        _work(Connection(pipe))
    except Exception:  # the outermost border of the process; its log is read when the pipe is closed
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # no rank waits for the others, which may have failed


def _work(pipe: Connection) -> None:
    place: Place = pipe.recv()
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_S)
    store = dist.TCPStore(
        place.meeting_address, _PORT, is_master=place.rank == 0, wait_for_workers=False, timeout=timeout
    )
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
    team = Team(
        rank=place.rank,
        world_size=place.world_size,
        shards=place.shards,
        exact=True,
        device=torch.device("cpu"),
        bucket_mb=place.bucket_mb,
        timeout_s=TIMEOUT_S,
        address=place.address,
    )
    expected = [torch.zeros(size) for size in place.sizes]
    for shard in range(place.shards):
        torch._foreach_add_(expected, _gradients(shard, place.sizes, 1 / place.shards))
    arms = {
        "exact": _Arm(place, lambda model: _exact(team, model, place)),
        "ddp": _Arm(place, lambda model: _plain(team.block, model, place)),
        "ddp again": _Arm(place, lambda model: _plain(team.block, model, place)),
    }
    while True:
        try:
            block: Block = pipe.recv()
        except EOFError:
            return
        dist.barrier()
        pipe.send(arms[block.arm].run(block, expected))


class _Arm:
    """A model of its own, and a way to get its gradients summed over all shards."""

    def __init__(self, place: Place, make_step: "Callable[[_Model], Callable[[], None]]") -> None:
        """``make_step``: returns what runs the passes of a step, and leaves the gradients in ``.grad``."""
        self._model = _Model(place.sizes)
        self._computed = 0.0
        for parameter in self._model.parameters():
            parameter.register_post_accumulate_grad_hook(self._note_gradient)
        self._step = make_step(self._model)

    def run(self, block: Block, expected: Sequence[Tensor]) -> Measured:
        """Runs steps one after another, and checks the gradients of the last one outside the clock."""
        tail_s, begin = 0.0, time.perf_counter()
        for _ in range(block.steps):
            self._model.zero_grad()
            self._step()
            tail_s += time.perf_counter() - self._computed
        step_s = (time.perf_counter() - begin) / block.steps
        return Measured(step_s, tail_s / block.steps, self._checked(expected) if block.is_checked else None)

    def _checked(self, expected: Sequence[Tensor]) -> str:
        digest = hashlib.sha256()
        for parameter, gradient in zip(self._model.parameters(), expected):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)  # float32, in any order
            assert parameter.grad is not None
            digest.update(parameter.grad.numpy())
        return digest.hexdigest()

    def _note_gradient(self, _: Tensor) -> None:
        """Torch calls it when a gradient is computed, before DDP takes it into a bucket."""
        self._computed = time.perf_counter()


class _Model(nn.Module):
    """Parameters whose gradients are given: nothing to compute, and everything to send."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(size) for size in sizes)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        outputs: list[Tensor] = [_Given.apply(*pair) for pair in zip(self.weights, gradients)]
        return torch.stack(outputs).sum()


class _Given(torch.autograd.Function):
    """A scalar whose gradient by the weight is given."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


def _gradients(shard: int, sizes: Sequence[int], factor: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(shard)
    return [torch.randn(size, generator=generator) * factor for size in sizes]


def _exact(team: Team, model: _Model, place: Place) -> Callable[[], None]:
    """The exchange of the product, used as in ``jobs.training.step``."""
    by_shard = [_gradients(shard, place.sizes, 1 / place.shards) for shard in team.block]
    replica, parameters = team.replicate(model), list(model.parameters())

    def step() -> None:
        for shard, gradients in zip(team.block, by_shard):
            is_last = shard == team.block[-1]
            with nullcontext() if is_last else replica.no_sync():
                replica(gradients).backward()
            if is_last:
                team.step_done()
            else:
                team.set_aside_gradients(shard, parameters)

    return step


def _plain(block: range, model: _Model, place: Place) -> Callable[[], None]:
    """What one would write by hand: DDP, which averages over the workers."""
    by_shard = [_gradients(shard, place.sizes, place.world_size / place.shards) for shard in block]
    replica = DistributedDataParallel(model, bucket_cap_mb=place.bucket_mb)

    def step() -> None:
        for number, gradients in enumerate(by_shard, start=1):
            with nullcontext() if number == len(by_shard) else replica.no_sync():
                replica(gradients).backward()

    return step
