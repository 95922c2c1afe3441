"""Runs over data of which some is bad, or whose store does not answer: the same bits for any workers and loaders."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from cluster.errors import LauncherError, StorageError, TrainingError, class_in_tree
from cluster.process.agent_link import AgentLink
from cluster.process.data_messages import SampleSkipped
from cluster.process.orders import Task
from jobs.data import BadSample
from jobs.sampling import StepPlan
from jobs.spec import DataSpec, JobSpec, LossSpec, Target
from jobs.training.worker import main
from tests.distributed.small_job import CLASSES, SAMPLES, STEPS, VAL_SAMPLES, Images, full_job, plain_job, target
from tests.distributed.team_process import Outcome, run_job, run_processes

BAD, BAD_VAL = (3, 11, 12, 40), (0, 1, 2, 7)
"""The first three of the validation are a micro-batch."""


class Away(Images):
    """Images in a store that does not answer."""

    def fetch(self, numbers: Sequence[int]) -> list[bytes | BadSample]:
        raise StorageError(f"s3://bucket/data: cannot read {numbers[0]}.jpg: reset, tried for 100 s; check the network")

    def fetch_alone(self, number: int) -> bytes | BadSample:
        raise AssertionError(f"{number} was never read")

    def decoded(self, number: int, content: bytes | BadSample) -> tuple[Tensor, int]:
        raise AssertionError(f"{number} was never read: {content!r}")


def skipping_job(store: Path, name: str, loaders: int = 0) -> JobSpec:
    """A job with everything in it, whose loss weighs targets in the loader."""
    job = full_job(store, name)
    data = DataSpec(
        train=target("Images", length=SAMPLES, augment=True, bad=BAD),
        val=target("Images", length=VAL_SAMPLES, bad=BAD_VAL),
        loaders=loaders,
        on_bad_sample="skip",
    )
    loss = LossSpec(factory=Target("CrossEntropyLoss", {"weight": [1.0, 2.0, 0.5, 3.0, 1.5][:CLASSES]}))
    return replace(job, data=data, loss=loss)


def told(outcome: Outcome) -> list[SampleSkipped]:
    """The bad samples that were told of, each once: a validation tells of its own every time."""
    return sorted(set(outcome.skipped), key=lambda each: (each.split, each.epoch, each.number))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_job(skipping_job(tmp_path_factory.mktemp("alone"), "run"), world_size=1)


@pytest.mark.parametrize(("workers", "loaders"), [(2, 0), (4, 0), (1, 2), (2, 2)])
def test_any_workers_and_loaders_skip_the_same_and_give_the_same_bits(
    alone: Outcome, tmp_path: Path, workers: int, loaders: int
) -> None:
    outcome = run_job(skipping_job(tmp_path, "run", loaders), workers)
    assert (outcome.rows, outcome.digests) == (alone.rows, alone.digests)
    assert told(outcome) == told(alone)


def test_every_bad_sample_of_every_epoch_is_told(alone: Outcome) -> None:
    plan = StepPlan(SAMPLES, 12, 4, 3)
    read = {
        (plan.epoch_of(step), int(number))
        for step in range(STEPS)
        for shard in range(4)
        for number in plan.samples(7, step, shard)
    }
    found = {(each.epoch, each.number) for each in told(alone) if each.split == "train"}
    assert {(epoch, number) for epoch, number in read if number in BAD} <= found  # others replaced a bad one
    assert {number for _, number in found} <= {*BAD}
    assert [each.number for each in told(alone) if each.split == "val"] == [*BAD_VAL]
    assert {each.reason for each in alone.skipped if each.number == 40} == {
        "s3://bucket/40.jpg: cannot be decoded; repair or remove the file"
    }


def test_a_resumed_run_replaces_the_same(alone: Outcome, tmp_path: Path) -> None:
    job = skipping_job(tmp_path, "run")
    first = run_job(replace(job, train=replace(job.train, max_steps=5)), world_size=3)
    second = run_job(replace(job, data=replace(job.data, loaders=2)), world_size=2)
    assert first.rows + second.rows == alone.rows
    assert second.digest == alone.digest
    assert sorted({*told(first), *told(second)}, key=str) == sorted(told(alone), key=str)


def failure(link: AgentLink, task: Task) -> tuple[type[LauncherError], str, int | None, str, str]:
    """How the worker's process fails."""
    try:
        main(link, task)
    except LauncherError as error:
        return class_in_tree(error), error.cause, error.step, error.place, str(error)
    raise AssertionError("it does not fail")


@pytest.mark.parametrize("loaders", [0, 2])
def test_a_bad_sample_ends_the_run_with_a_line_that_names_it(tmp_path: Path, loaders: int) -> None:
    job = plain_job(tmp_path, "run")
    bad = int(StepPlan(SAMPLES, 12, 4, 1).samples(job.seed, batch=0, shard=1)[0])
    job = replace(job, data=DataSpec(train=target("Images", length=SAMPLES, bad=(bad,)), loaders=loaders))
    outcome = run_processes(failure, job, 1)
    kind, cause, step, place, message = outcome.results[0]
    assert (kind, cause, step) == (TrainingError, "code", 0)
    assert place.startswith("step 0, ")
    assert message == (
        f"BadSample: data.train: sample {bad}: s3://bucket/{bad}.jpg: cannot be decoded; repair or remove the file; "
        "or data.on_bad_sample: skip replaces it by another one"
    )


@pytest.mark.parametrize("loaders", [0, 2])
def test_a_store_that_does_not_answer_ends_the_run_as_a_failure_of_the_store(tmp_path: Path, loaders: int) -> None:
    """The driver gives up a failure with this cause and no place at once, with exit code 4."""
    job = plain_job(tmp_path, "run")
    train = Target(f"{__name__}.Away", {"length": SAMPLES})
    job = replace(job, data=DataSpec(train=train, loaders=loaders, on_bad_sample="skip"))
    kind, cause, step, place, message = run_processes(failure, job, 1).results[0]
    assert (kind, cause, step, place, kind.exit_code) == (StorageError, "storage", None, "", 4)
    assert message.startswith("s3://bucket/data: cannot read ")
    assert message.endswith(".jpg: reset, tried for 100 s; check the network")
