"""The state at step n and every row up to it are functions of the description, not of the workers."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.spec import JobSpec
from tests.distributed.small_job import STEPS, STEPS_PER_EPOCH, full_job
from tests.distributed.team_process import Outcome, run_job


def assert_same(outcome: Outcome, other: Outcome) -> None:
    assert outcome.rows == other.rows
    assert outcome.digests == other.digests
    assert outcome.digest == other.digest


@pytest.fixture(scope="module")
def six_shards(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The full job with 6 shards on one worker."""
    return run_job(full_job(tmp_path_factory.mktemp("six"), "run", shards=6), world_size=1)


@pytest.fixture(scope="module")
def twelve_shards(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The full job with 12 shards on one worker."""
    return run_job(job_of_12_shards(tmp_path_factory.mktemp("twelve")), world_size=1)


def job_of_12_shards(store: Path) -> JobSpec:
    return full_job(store, "run", shards=12, global_batch=24, epochs=2)


def test_the_full_job_trains(undisturbed: Outcome) -> None:
    """What the tests below compare is worth it: the run learns, and its state changes all the time."""
    assert [row["step"] for row in undisturbed.rows] == list(range(1, STEPS + 1))
    assert undisturbed.rows[-1]["val/loss"] < undisturbed.rows[3]["val/loss"]
    assert len(set(undisturbed.digests.values())) == len(undisturbed.digests) == 4


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_number_of_workers_gives_the_same_bits(undisturbed: Outcome, tmp_path: Path, world_size: int) -> None:
    assert_same(run_job(full_job(tmp_path, "run"), world_size), undisturbed)


@pytest.mark.parametrize("hosts", [(1, 1, 1, 1), (2, 2), (3, 1), (1, 3), (1, 2, 1), (2, 1)], ids=str)
def test_any_hosts_give_the_same_bits(undisturbed: Outcome, tmp_path: Path, hosts: tuple[int, ...]) -> None:
    assert_same(run_job(full_job(tmp_path, "run"), sum(hosts), hosts=hosts), undisturbed)


@pytest.mark.parametrize("hosts", [(2,), (3,), (4,), (1, 2), (2, 2), (3, 2, 1), (4, 2)], ids=str)
def test_any_hosts_of_uneven_blocks_give_the_same_bits(
    six_shards: Outcome, tmp_path: Path, hosts: tuple[int, ...]
) -> None:
    """Of 6 shards summed as (0-3) + (4-5), 2 workers have 3 each, 3 have 2 each, and 4 have 2 or 1."""
    assert_same(run_job(full_job(tmp_path, "run", shards=6), sum(hosts), hosts=hosts), six_shards)


@pytest.mark.parametrize("hosts", [(4,), (1, 3), (2, 2), (1, 2, 1)], ids=str)
def test_blocks_that_cut_across_the_tree_give_the_same_bits(
    twelve_shards: Outcome, tmp_path: Path, hosts: tuple[int, ...]
) -> None:
    """Of 12 shards summed as (0-7) + (8-11), 4 workers have 3 each: no other blocks are as short."""
    assert_same(run_job(job_of_12_shards(tmp_path), sum(hosts), hosts=hosts), twelve_shards)


def test_bfloat16_gives_the_same_bits(tmp_path: Path) -> None:
    alone, together = (
        run_job(full_job(tmp_path, f"run-{n}", precision="bf16", epochs=1), world_size=n) for n in (1, 3)
    )

    assert_same(together, alone)


def test_loader_processes_give_the_same_bits(undisturbed: Outcome, tmp_path: Path) -> None:
    job = full_job(tmp_path, "run", max_steps=STEPS_PER_EPOCH)

    outcome = run_job(replace(job, data=replace(job.data, loaders=2)), world_size=2)

    assert outcome.rows == undisturbed.rows[:STEPS_PER_EPOCH]
    assert "val/loss" in outcome.rows[-1]
    assert outcome.digests[3] == undisturbed.digests[3]


@pytest.mark.parametrize("change", [{"shards": 6}, {"precision": "bf16"}, {"clip_norm": None}], ids=str)
def test_another_description_gives_other_bits(undisturbed: Outcome, tmp_path: Path, change: dict[str, object]) -> None:
    outcome = run_job(full_job(tmp_path, "run", **change, max_steps=3), world_size=1)

    assert outcome.digests[3] != undisturbed.digests[3]
