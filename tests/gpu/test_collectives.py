"""The groups, collectives and clocks of an exchange, with NCCL where there are GPUs."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.collectives.exchange_waits import ExchangeWaits
from cluster.collectives.groups import all_gather_flat, all_to_all, new_group
from cluster.process.activity import Activity
from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from tests.distributed.small_job import full_job
from tests.gpu.workers import join, run_here, saved_files, train

pytestmark = pytest.mark.gpu

SLEEP_CYCLES = 1_000_000_000
"""Of a GPU's clock: about half a second."""


def exchange(link: AgentLink, task: Task) -> dict[str, list[float]]:
    """What this rank receives in each collective that the product uses."""
    team, device = join(link, task)
    rank, others = task.rank, range(task.world_size)
    group = new_group(600.0, ranks=list(others))
    own = torch.tensor([rank + 1.0, rank + 0.5], device=device)
    broadcast = own.clone()
    dist.broadcast(broadcast, src=0)
    gathered = own.new_empty(2 * task.world_size)
    all_gather_flat(gathered, own, group)
    received = own.new_zeros(2 * task.world_size)
    all_to_all(received.split(2), [own + 10 * other for other in others], group)
    summed = own.clone()
    dist.all_reduce(summed)
    later = team.gather_later(own.double())
    found = {"broadcast": broadcast, "gathered": gathered, "received": received, "summed": summed, "later": later()}
    assert dist.get_backend() == ("nccl" if task.on_gpu else "gloo")
    team.barrier()
    team.close()
    return {name: value.flatten().tolist() for name, value in found.items()}


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_collectives(device: torch.device, num_devices: int, tmp_path: Path, num_workers: int) -> None:
    need(num_workers, num_devices)
    results = run_here(exchange, full_job(tmp_path, "run"), device, num_workers).results

    values = [[rank + 1.0, rank + 0.5] for rank in range(num_workers)]
    for rank in range(num_workers):
        found = results[rank]
        assert found["broadcast"] == values[0]
        assert found["gathered"] == found["later"] == sum(values, [])
        assert found["summed"] == [sum(column) for column in zip(*values)]
        sent = [
            [0.0, 0.0] if other == rank else [each + 10 * rank for each in values[other]]
            for other in range(num_workers)
        ]
        assert found["received"] == sum(sent, [])


def measure_wait(link: AgentLink, task: Task) -> tuple[bool, float]:  # noqa: ARG001
    """Whether the CPU went on while the GPU waited, and the seconds that count as exchange."""
    device, activity = torch.device("cuda" if task.on_gpu else "cpu"), Activity()
    waits, went_on = ExchangeWaits(activity, device), True
    for step in range(2):  # the time of a GPU's first wait is read when the second ends
        activity.mark("backward", step)
        waits.begin()
        if task.on_gpu:
            torch.cuda._sleep(SLEEP_CYCLES)
        else:
            time.sleep(0.3)
        waits.end()
        if task.on_gpu:
            went_on &= not torch.cuda.current_stream().query()
            torch.cuda.synchronize()
        activity.mark("forward", step + 1)
    return went_on, activity.spent()["exchange"]


def test_an_exchange_is_measured_where_it_is_waited_for(device: torch.device, tmp_path: Path) -> None:
    went_on, exchange_s = run_here(measure_wait, full_job(tmp_path, "run"), device).results[0]

    assert went_on
    assert exchange_s > 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("num_workers", [2, 3, 4])
def test_any_number_of_workers_gives_the_same_bits(
    device: torch.device, num_devices: int, tmp_path: Path, num_workers: int, precision: str
) -> None:
    need(num_workers, num_devices)
    alone, together = (full_job(tmp_path, f"run-{workers}", precision=precision) for workers in (1, num_workers))

    outcome, other = run_here(train, alone, device), run_here(train, together, device, num_workers)

    assert other.rows == outcome.rows
    assert other.digests == outcome.digests
    assert saved_files(together) == saved_files(alone)


def need(num_workers: int, num_devices: int) -> None:
    if num_workers > num_devices:
        pytest.skip(f"needs {num_workers} GPUs, one a worker, and there are {num_devices}")
