"""Runs whose samples come in blocks: the same bits for any workers and loaders, also if they resume in a lane."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.sampling import StepPlan
from jobs.spec import JobSpec, ShuffleSpec
from tests.distributed.small_job import SAMPLES, Images, full_job, target
from tests.distributed.team_process import Outcome, run_job

SHUFFLE = ShuffleSpec(block=2, buffer=4)
RESUMED_AT = 6
"""The middle of an epoch, and of the blocks of every lane."""


class InBlocks(Images):
    """Images that are read in blocks only."""

    def in_blocks(self, block: int, most: int) -> Images:
        assert block == SHUFFLE.block
        assert most == 2 * SHUFFLE.kept_samples  # each of two workers has two of the four shards
        return Images(SAMPLES, augment=True)

    def __getitem__(self, number: int) -> tuple:
        raise AssertionError(f"sample {number} is read by itself")


def shuffled_job(store: Path, name: str, loaders: int = 0) -> JobSpec:
    job = full_job(store, name)
    return replace(job, data=replace(job.data, shuffle=SHUFFLE, loaders=loaders))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_job(shuffled_job(tmp_path_factory.mktemp("alone"), "run"), world_size=1)


@pytest.mark.parametrize(("workers", "loaders"), [(2, 0), (4, 0), (1, 2), (4, 2)])
def test_any_workers_and_loaders_give_the_same_bits(alone: Outcome, tmp_path: Path, workers: int, loaders: int) -> None:
    outcome = run_job(shuffled_job(tmp_path, "run", loaders), workers)

    assert outcome.rows == alone.rows
    assert outcome.digest == alone.digest


def test_a_resume_in_the_middle_of_blocks_gives_the_same_bits(alone: Outcome, tmp_path: Path) -> None:
    job = shuffled_job(tmp_path, "run")
    stream, place = StepPlan(SAMPLES, 12, 4, 3, SHUFFLE).stream(RESUMED_AT % 4, 0)
    assert stream.rounds
    assert place % (stream.lanes * stream.block)

    run_job(replace(job, train=replace(job.train, max_steps=RESUMED_AT)), 2)
    resumed = run_job(job, 4)

    assert resumed.started == RESUMED_AT
    assert resumed.rows == alone.rows[RESUMED_AT:]
    assert resumed.digest == alone.digest


def test_its_order_is_another_one(alone: Outcome, undisturbed: Outcome) -> None:
    assert alone.digest != undisturbed.digest


def test_a_dataset_that_can_reads_blocks(alone: Outcome, tmp_path: Path) -> None:
    job = shuffled_job(tmp_path, "run")
    in_blocks = replace(target("Images", length=SAMPLES, augment=True), path=f"{__name__}.InBlocks")

    outcome = run_job(replace(job, data=replace(job.data, train=in_blocks)), 2)

    assert outcome.digest == alone.digest
