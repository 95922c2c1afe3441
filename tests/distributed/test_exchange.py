"""What an exchange of gradients sends, to whom, and that its sums are those of the tree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.collectives import slice_exchange
from cluster.collectives.buffer_pool import BufferPool
from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.parallel.worker_team import Team
from jobs.training.worker import meet
from tests.distributed.small_job import full_job
from tests.distributed.team_process import TIMEOUT_S, run_processes

LENGTHS = (40_320, 40_321, 77, 3)
"""Of buckets: the first divides by every number of slices, the last has fewer numbers than there are workers."""
WHOLE_SUBTREES = (
    ((1,), 8), ((4,), 8), ((1, 1), 2), ((2, 2), 8), ((4, 4), 8), ((2, 2, 2), 6), ((3, 2, 1), 8), ((2, 2, 2, 2), 8),
    ((4, 1), 5),
)  # fmt: skip
"""The number of workers on each host, and a number of shards of which each host has one subtree."""


@dataclass(kw_only=True)
class Sent:
    """What one rank has sent for one bucket, and what has become of the bucket."""

    total: list[float] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)
    """The messages that each call has sent."""
    leaving: int = 0
    """Bytes for other hosts."""


class _Counting:
    """Counts what this rank sends."""

    def __init__(self, host_of: Sequence[int], rank: int) -> None:
        self._host_of, self._rank = host_of, rank
        self._all_to_all = slice_exchange.all_to_all
        self.sent = Sent()
        slice_exchange.all_to_all = self.all_to_all

    def all_to_all(self, received: Sequence[Tensor], sent: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        others = [
            (peer, each.nbytes)
            for peer, each in zip(dist.get_process_group_ranks(group), sent)
            if peer != self._rank and each.numel()
        ]
        self.sent.messages.append(len(others))
        self.sent.leaving += sum(size for peer, size in others if self._host_of[peer] != self._host_of[self._rank])
        self._all_to_all(received, sent, group)


def halves(messages: list[int]) -> tuple[list[int], list[int]]:
    """Every level scatters, and then every level gathers."""
    return messages[: len(messages) // 2], messages[len(messages) // 2 :]


def gradient(shard: int, length: int, dtype: torch.dtype) -> Tensor:
    """Of very different sizes, so that every order of a sum has its own last bits."""
    generator = torch.Generator().manual_seed(shard)
    return (torch.randn(length, generator=generator) * 10 ** (shard % 3)).to(dtype)


def sum_along_the_tree(shards: range, length: int, dtype: torch.dtype) -> Tensor:
    """The definition: a range splits at the largest power of two below its size."""
    if len(shards) == 1:
        return gradient(shards[0], length, dtype)
    split = 1 << (len(shards) - 1).bit_length() - 1
    return sum_along_the_tree(shards[:split], length, dtype) + sum_along_the_tree(shards[split:], length, dtype)


class _Model(nn.Module):
    """Its gradient is what it is called with."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(length, dtype=dtype))

    def forward(self, wanted: Tensor) -> Tensor:
        return (self.weight * wanted).sum()


def sum_gradients(link: AgentLink, task: Task, hosts: Sequence[int], dtype: torch.dtype) -> list[Sent]:
    """Sums the gradients of all shards, once for each length of a bucket, as a training step does."""
    meet(link, task, TIMEOUT_S)
    host_of = [number for number, count in enumerate(hosts) for _ in range(count)]
    team = Team(
        rank=task.rank,
        world_size=task.world_size,
        shards=task.content.train.shards,
        exact=True,
        device=torch.device("cpu"),
        address=f"host-{host_of[task.rank]}",
    )
    found = []
    counting = _Counting(host_of, task.rank)
    for length in LENGTHS:
        model = _Model(length, dtype)
        replica = team.replicate(model)
        counting.sent = Sent()
        for shard in team.block[:-1]:
            with replica.no_sync():
                replica(gradient(shard, length, dtype)).backward()
            team.set_aside_gradients(shard, [model.weight])
        replica(gradient(team.block[-1], length, dtype)).backward()
        team.step_done()
        assert model.weight.grad is not None
        counting.sent.total = model.weight.grad.tolist()
        found.append(counting.sent)
    team.barrier()
    team.close()
    return found


@pytest.fixture
def exchanged(tmp_path: Path) -> Callable[..., list[list[Sent]]]:
    """What each rank has sent, for each length of a bucket."""

    def run(hosts: Sequence[int], shards: int, dtype: torch.dtype = torch.float32) -> list[list[Sent]]:
        job = full_job(tmp_path, "run", shards=shards, global_batch=shards)
        outcome = run_processes(sum_gradients, job, sum(hosts), hosts=hosts, dtype=dtype)
        assert not outcome.failures, "\n".join(outcome.failures.values())
        by_rank = [outcome.results[rank] for rank in range(sum(hosts))]
        return [list(of_length) for of_length in zip(*by_rank)]

    return run


@pytest.mark.parametrize(("hosts", "shards"), WHOLE_SUBTREES, ids=str)
def test_a_host_sends_no_more_than_it_must(
    exchanged: Callable[..., list[list[Sent]]], hosts: tuple[int, ...], shards: int
) -> None:
    num_hosts, most = len(hosts), max(hosts)
    host_of = [number for number, count in enumerate(hosts) for _ in range(count)]

    for length, by_rank in zip(LENGTHS, exchanged(hosts, shards)):
        expected = sum_along_the_tree(range(shards), length, torch.float32).tolist()
        padding = 16 * min(hosts) * num_hosts
        for host in range(num_hosts):
            leaving = sum(sent.leaving for sent, of in zip(by_rank, host_of) if of == host)
            assert leaving <= 2 * (4 * length + padding) * (num_hosts - 1) / num_hosts
        for sent in by_rank:
            assert sent.total == expected
            scattered, gathered = (sum(half) for half in halves(sent.messages))
            assert max(scattered, gathered) <= (most - 1) + (num_hosts - 1)


@pytest.mark.parametrize(
    ("hosts", "shards"),
    [((3, 2, 1), 6), ((3, 2, 1), 12), ((2, 2, 2), 18), ((1, 2), 6), ((1, 2), 9), ((3,), 9)],
    ids=str,
)
def test_blocks_that_cut_across_subtrees_are_summed_along_the_tree(
    exchanged: Callable[..., list[list[Sent]]], hosts: tuple[int, ...], shards: int
) -> None:
    for length, by_rank in zip(LENGTHS, exchanged(hosts, shards)):
        expected = sum_along_the_tree(range(shards), length, torch.float32).tolist()
        assert all(sent.total == expected for sent in by_rank)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_type_of_gradient_is_summed_along_the_tree(
    exchanged: Callable[..., list[list[Sent]]], dtype: torch.dtype
) -> None:
    for length, by_rank in zip(LENGTHS, exchanged((2, 2), 12, dtype)):
        expected = sum_along_the_tree(range(12), length, dtype).tolist()
        assert all(sent.total == expected for sent in by_rank)


def test_the_number_of_calls_does_not_depend_on_the_number_of_workers(
    exchanged: Callable[..., list[list[Sent]]],
) -> None:
    for hosts in ((2, 2), (4, 4), (2, 2, 2)):
        for by_rank in exchanged(hosts, shards=12):
            for sent in by_rank:
                assert len(sent.messages) == 4


def fail_in_one_bucket(link: AgentLink, task: Task) -> str:
    """Takes a step of many buckets, of which rank 1 cannot exchange the third; returns the error that it gets."""
    meet(link, task, TIMEOUT_S)
    team = Team(
        rank=task.rank,
        world_size=task.world_size,
        shards=4,
        exact=True,
        device=torch.device("cpu"),
        address=f"host-{task.rank // 2}",
        bucket_mb=0.001,
        timeout_s=20.0,
    )
    widths = range(10, 50, 2)
    replica = team.replicate(nn.Sequential(*(nn.Linear(width, width + 2) for width in widths)))
    replica(torch.ones(1, widths[0])).sum().backward()  # a first step, after which DDP has many buckets
    team.step_done()
    lend, lent = BufferPool.lend, 0

    def fail_once(pool: BufferPool, like: Tensor, length: int) -> Any:
        nonlocal lent
        lent += 1
        if task.rank == 1 and lent == 3:
            raise MemoryError("no memory for a bucket")
        return lend(pool, like, length)

    BufferPool.lend = fail_once  # type: ignore[assignment, method-assign]
    try:
        replica(torch.ones(1, widths[0])).sum().backward()
    except Exception as error:  # a peer of the rank that failed gets another one
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_failure_in_one_bucket_is_the_error_of_the_step(tmp_path: Path) -> None:
    """A bucket that follows must not meet the messages of the one that failed: gloo would end the process."""
    job = full_job(tmp_path, "run", shards=4, global_batch=4)
    outcome = run_processes(fail_in_one_bucket, job, 4)

    assert "no memory for a bucket" in outcome.results[1], outcome
    assert all("no error" not in outcome.results[rank] for rank in (0, 2, 3)), outcome
