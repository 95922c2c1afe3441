"""Workers that differ in what may change bits: refused by all of them, or told, if they may differ."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from cluster.versions import versions
from jobs.environment import make_environment
from jobs.spec import DataSpec, Target
from jobs.training import worker
from tests.distributed.small_job import full_job, plain_job
from tests.distributed.team_process import run_processes

IMAGES = """\
from tests.distributed import small_job


def images(length):
    return small_job.Images(length)
"""
WHERE = r"[0-9a-f]{12} on node 10\.0\.0\.1 \(worker 0\), [0-9a-f]{12} on node 10\.0\.0\.2 \(worker 1\)"


def work(
    link: AgentLink,
    task: Task,
    other_gpu: str = "",
    other_python: str = "",
    import_paths: tuple[tuple[str, ...], ...] = ((), (), ()),
    **changes: Any,
) -> None:
    """``jobs.training.worker.main`` as if each rank were on a node of its own.

    Args:
        link, task: As ``main`` takes them.
        other_gpu, other_python: What rank 1 believes to be its GPU, and the version of its Python.
        import_paths: By rank.
        changes: Of the task.
    """
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # no interface has those nodes' addresses
    sys.path[:0] = import_paths[task.rank]
    if task.rank == 1 and other_gpu:
        replaced: Any = worker
        replaced.make_environment = lambda *known, **told: replace(make_environment(*known, **told), gpu=other_gpu)
    if task.rank == 1 and other_python:
        replaced = worker
        replaced.versions = lambda: versions() | {"python": other_python}
    address = f"10.0.0.{task.rank + 1}"
    worker.main(link, replace(task, address=address, import_paths=import_paths[task.rank], **changes))


def test_other_versions_are_refused_by_all(tmp_path: Path) -> None:
    outcome = run_processes(work, full_job(tmp_path, "run"), world_size=3, other_python="3.9")

    assert len(set(outcome.failures.values())) == 1
    assert re.fullmatch(
        r"workers differ: Python 3\.\d+ on node 10\.0\.0\.1 \(worker 0\), node 10\.0\.0\.3 \(worker 2\), "
        r"3\.9 on node 10\.0\.0\.2 \(worker 1\); give every node the same versions",
        outcome.failures[2],
    ), outcome.failures[2]
    (told,) = outcome.environments
    assert told.is_refused
    assert [(group["ranks"], group["python"]) for group in told.workers][1:] == [([1], "3.9")]


def test_another_gpu_is_refused_by_all(tmp_path: Path) -> None:
    outcome = run_processes(work, full_job(tmp_path, "run"), world_size=2, other_gpu="NVIDIA A100")

    assert outcome.failures == dict.fromkeys(
        range(2),
        "workers differ: GPU none on node 10.0.0.1 (worker 0), NVIDIA A100 on node 10.0.0.2 (worker 1); "
        "choose one kind of GPU with workers.accelerator, or accept other bits with "
        f"launcher resume {tmp_path}/run --force",
    )
    assert outcome.rows == []
    (told,) = outcome.environments
    assert told.is_refused
    assert [(group["ranks"], group["gpu"]) for group in told.workers] == [([0], "none"), ([1], "NVIDIA A100")]


def test_or_told_if_it_may_be(tmp_path: Path) -> None:
    job = full_job(tmp_path, "run", max_steps=2)
    outcome = run_processes(work, job, world_size=2, other_gpu="NVIDIA A100", may_differ=True)

    assert not outcome.failures, "\n".join(outcome.failures.values())
    assert [row["step"] for row in outcome.rows] == [1, 2]
    (told,) = outcome.environments
    assert not told.is_refused
    assert told.differences == "GPU none on node 10.0.0.1 (worker 0), NVIDIA A100 on node 10.0.0.2 (worker 1)"
    assert [(group["ranks"], group["gpu"]) for group in told.workers] == [([0], "none"), ([1], "NVIDIA A100")]


def test_alike_they_are_told_once(tmp_path: Path) -> None:
    outcome = run_processes(work, full_job(tmp_path, "run", max_steps=1), world_size=2)

    assert not outcome.failures, "\n".join(outcome.failures.values())
    (told,) = outcome.environments
    assert told.differences == ""
    assert [group["ranks"] for group in told.workers] == [[0, 1]]


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ((IMAGES, IMAGES), ""),
        (
            (IMAGES, IMAGES + "# one more line\n"),
            f"^workers differ: code of own_images {WHERE}; accept other bits with",
        ),
        (
            (IMAGES, IMAGES.replace("length)\n", "length + 1)\n")),
            f"^workers differ: data {WHERE}; code of own_images {WHERE}; give every node the same data$",
        ),
    ],
    ids=["alike", "other code", "other data"],
)
def test_the_users_code_and_data_are_compared_wherever_they_lie(
    tmp_path: Path, texts: tuple[str, str], found: str
) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder, text in zip(folders, texts):
        folder.mkdir()
        (folder / "own_images.py").write_text(text)
    data = DataSpec(train=Target("own_images.images", {"length": 24}))
    job = replace(plain_job(tmp_path / "runs", "run", max_steps=1), data=data)
    outcome = run_processes(work, job, world_size=2, import_paths=tuple((str(folder),) for folder in folders))

    assert set(outcome.failures) == (set(range(2)) if found else set()), outcome.failures
    for failure in outcome.failures.values():
        assert re.match(found, failure), failure


@pytest.mark.parametrize("may_differ", [False, True])
def test_data_that_the_plan_did_not_find_is_refused(tmp_path: Path, may_differ: bool) -> None:
    job = full_job(tmp_path, "run")
    outcome = run_processes(work, job, world_size=2, data_fingerprint="e" * 64, may_differ=may_differ)

    assert set(outcome.failures) == {0, 1}
    (told,) = outcome.environments
    (group,) = told.workers
    assert group["ranks"] == [0, 1]
    assert (group.keys() == {"ranks", "data"}) == may_differ, "what may differ is in nobody's way"
    for failure in outcome.failures.values():
        assert failure.endswith(", eeeeeeeeeeee on the driver's host; give every node the same data")
