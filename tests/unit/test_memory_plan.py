"""The memory of a worker follows from what one with a single shard was measured to take."""

import math
from typing import Any

import pytest
import torch

from cluster.collectives.summation_tree import Fold, complete_subtrees
from jobs.shard_blocks import shard_blocks
from jobs.spec import TrainSpec, WorkersSpec
from launcher.planning.memory import MemoryPlan, StateBytes, plan_memory
from tests.specs import bare_job

G = 40 * 2**20
STATE = StateBytes(
    weights=G, buffers=7, gradients=G, aligned=0, optimizer=2 * G, average=G + 7, checkpoint=4 * G, activations=None
)  # fmt: skip


def planned(shards: int, num: int | tuple[int, int], state: StateBytes = STATE, **train: Any) -> MemoryPlan:
    spec = bare_job(
        train=TrainSpec(global_batch=shards, shards=shards, **train), workers=WorkersSpec(num=num)
    )  # fmt: skip
    return plan_memory(state, spec, copy_slack=100)


def sets_by_folding(shards: int, num_workers: int) -> int:
    """The most sets of gradients that a worker has set aside, with those of a shard that has just been computed."""
    most = 0
    for block in shard_blocks(shards, [num_workers]):
        fold = Fold(shards)
        for shard in block:
            most = max(most, len(fold.nodes) + (shard != block[-1]))
            fold.push((shard, shard + 1), torch.empty(0))
    return most


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8, 12, 64])
def test_sets_set_aside_are_those_of_the_fold(shards: int) -> None:
    for num_workers in range(1, shards + 1):
        assert planned(shards, num_workers).set_aside == sets_by_folding(shards, num_workers) * G


@pytest.mark.parametrize(("num", "received"), [(2, 1 / 2), (4, 3 / 4), (8, 7 / 8)])
def test_workers_receive_partial_sums_into_four_buffers(num: int, received: float) -> None:
    assert planned(8, num, bucket_mb=20.0).exchange == 4 * 20 * 2**20 * received
    assert planned(8, num, bucket_mb=2.0).exchange == G, "what the first steps take is more"


def test_blocks_that_are_no_subtree_send_copies_of_sums() -> None:
    """In the first step, of all gradients at once."""
    most_sums = max(len(complete_subtrees(block, 9)) for block in shard_blocks(9, [3]))
    assert most_sums == 2
    assert planned(9, 3, bucket_mb=0.1).exchange == math.ceil((1 + 2 * 2 / 3) * G)


def test_a_sum_in_any_order_accumulates_in_one_set() -> None:
    assert planned(8, 1, exact=False).set_aside == G
    assert planned(8, 8, exact=False).set_aside == 0
    assert planned(8, 2, exact=False).exchange == G


def test_an_elastic_run_is_planned_for_the_fewest_workers() -> None:
    memory = planned(8, (2, 8))
    assert memory == planned(8, 2)
    assert memory.num_workers == 2


def test_totals() -> None:
    memory = planned(4, 2)
    parts = (memory.weights, memory.buffers, memory.gradients, memory.optimizer, memory.average)
    assert memory.total == sum(parts) + memory.set_aside + memory.exchange
    assert memory.restore == G + 7 + G + 7 + 4 * G
    assert memory.copy == 2 * G + 100
