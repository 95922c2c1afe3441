"""Buffers that forward changes: the same bits on any number of workers, and after a resume."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.parallel.worker_team import Team
from jobs.spec import CheckpointSpec, JobSpec, LossSpec, Target
from jobs.training.worker import meet
from tests.distributed.small_job import CLASSES, full_job, images, target
from tests.distributed.team_process import TIMEOUT_S, newest_state, run_job, run_processes, train_job

STEPS, RESUMED_AT = 6, 3


class Counting(nn.Module):
    """Its output depends on what its buffers have seen; ``how`` they change is one of the functions below.

    Args:
        how: The name of the function.
        declared: Whether the buffer is a tensor, None, or not there before forward.
        persistent: Whether it is in the state dict.
        always: Whether it changes in evaluation too.
    """

    def __init__(self, how: str, declared: str = "tensor", persistent: bool = False, always: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
        if declared != "absent":
            value = torch.zeros(CLASSES) if declared == "tensor" else None
            self.register_buffer("seen", value, persistent=persistent)
        self.register_buffer("table", torch.ones(1).expand(CLASSES), persistent=False)  # constant
        self.change, self.persistent, self.always = HOW[how], persistent, always

    def forward(self, images_N188: Tensor) -> Tensor:
        logits_NK = self.net(images_N188)
        if self.training or self.always:
            self.change(self, logits_NK)
        return logits_NK - 0.1 * self.seen * self.table


def in_place(model: Any, logits_NK: Tensor) -> None:
    with torch.no_grad():
        model.seen.lerp_(logits_NK.mean(0), 0.1)


def by_data(model: Any, logits_NK: Tensor) -> None:
    model.seen.data.mul_(0.9).add_(logits_NK.data.mean(0), alpha=0.1)


def other_tensor(model: Any, logits_NK: Tensor) -> None:
    model.seen = 0.9 * model.seen + 0.1 * logits_NK.mean(0).detach()


def with_gradient(model: Any, logits_NK: Tensor) -> None:
    model.seen = 0.9 * model.seen + 0.1 * logits_NK.mean(0)


def late(model: Any, logits_NK: Tensor) -> None:
    if model.seen is None:
        model.seen = torch.zeros(CLASSES)
    other_tensor(model, logits_NK)


def registered(model: Any, logits_NK: Tensor) -> None:
    if not hasattr(model, "seen"):
        model.register_buffer("seen", torch.zeros(CLASSES), persistent=model.persistent)
    in_place(model, logits_NK)


def shrinking(model: Any, logits_NK: Tensor) -> None:
    model.seen = logits_NK.detach().mean(dim=1, keepdim=True)


HOW: dict[str, Callable[[Any, Tensor], None]] = {
    how.__name__: how for how in (in_place, by_data, other_tensor, with_gradient, late, registered, shrinking)
}

CASES: dict[str, dict[str, Any]] = {
    "in place": {"how": "in_place"},
    "in place, persistent": {"how": "in_place", "persistent": True},
    "behind the version counter": {"how": "by_data"},
    "another tensor": {"how": "other_tensor"},
    "another tensor, persistent": {"how": "other_tensor", "persistent": True},
    "another tensor, with its graph": {"how": "with_gradient"},
    "None at first": {"how": "late", "declared": "None"},
    "None at first, persistent": {"how": "late", "declared": "None", "persistent": True},
    "registered in forward": {"how": "registered", "declared": "absent"},
    "registered in forward, persistent": {"how": "registered", "declared": "absent", "persistent": True},
    "in evaluation too": {"how": "other_tensor", "always": True},
}


class Balanced(nn.Module):
    """A loss that weighs classes by a running mean of how often they come."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("share", torch.full((CLASSES,), 1 / CLASSES))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, logits_NK: Tensor, labels_N: Tensor) -> Tensor:
        counted_K = torch.bincount(labels_N, minlength=CLASSES) / len(labels_N)
        self.share = 0.9 * self.share + 0.1 * counted_K
        self.calls += 1
        return cross_entropy(logits_NK, labels_N, weight=1 / (self.share + 0.1))


def balanced_by(logits_NK: Tensor, labels_N: Tensor, balanced: Balanced) -> Tensor:
    return balanced(logits_NK, labels_N)


class Reweighing(nn.CrossEntropyLoss):
    """Changes the class weights that its mean divides by."""

    def forward(self, logits_NK: Tensor, labels_N: Tensor) -> Tensor:
        assert self.weight is not None
        self.weight.mul_(1.1)
        return super().forward(logits_NK, labels_N)


def job_with(store: Path, model: Target, *, ema_decay: float | None = None) -> JobSpec:
    job = full_job(store, "run", ema_decay=ema_decay, max_steps=STEPS, validate_every_steps=1)
    return replace(
        job,
        model=model,
        data=replace(images(), val=target("Images", length=11)),
        optimizer=replace(job.optimizer, groups=()),
        checkpoint=CheckpointSpec(every_steps=1, keep=9),
    )


def here(name: str, **args: Any) -> Target:
    return Target(f"{__name__}.{name}", args)


def assert_exact(job: JobSpec) -> dict[str, Any]:
    """Trains on 1, 2 and 4 workers, and on 4 then 1; returns the last state."""
    alone, *together = (run_job(replace(job, name=f"on-{workers}"), workers) for workers in (1, 2, 4))
    for outcome in together:
        assert outcome.rows == alone.rows
        assert outcome.digests == alone.digests
    first = run_job(replace(job, train=replace(job.train, max_steps=RESUMED_AT)), 4)
    second = run_job(job, 1)
    assert (second.started, first.rows + second.rows) == (RESUMED_AT, alone.rows)
    assert second.digest == alone.digest
    return newest_state(job)


QUICK = ("another tensor", "behind the version counter", "None at first, persistent")
"""The cases in the default tier."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name not in QUICK)) for name, case in CASES.items()],
)
def test_a_buffer_of_the_model(case: dict[str, Any], tmp_path: Path) -> None:
    state = assert_exact(job_with(tmp_path, here("Counting", **case)))
    is_plain = case.get("persistent", False) and case.get("declared", "tensor") == "tensor"
    assert state.get("buffers", {}).get("model", {}).keys() == (set() if is_plain else {"seen"}), "a table is not saved"


@pytest.mark.parametrize("case", ["another tensor", "None at first, persistent"])
def test_a_buffer_of_the_averaged_model(case: str, tmp_path: Path) -> None:
    assert_exact(job_with(tmp_path, here("Counting", **CASES[case]), ema_decay=0.9))


@pytest.mark.parametrize(
    ("loss", "root"),
    [(here("Balanced"), "loss"), (here("balanced_by", balanced=here("Balanced")), "loss.balanced")],
    ids=["module", "argument of a function"],
)
def test_buffers_of_a_loss(loss: Target, root: str, tmp_path: Path) -> None:
    job = replace(job_with(tmp_path, target("Net")), loss=LossSpec(factory=loss))
    state = assert_exact(job)
    assert state["buffers"].keys() == {root}
    assert state["buffers"][root]["calls"].item() == STEPS, "one shard counts"


def test_a_loss_that_changes_the_weights_of_its_mean_is_refused(tmp_path: Path) -> None:
    loss = here("Reweighing", weight=[1.0] * CLASSES)
    job = replace(job_with(tmp_path, target("Net")), loss=LossSpec(factory=loss))
    outcome = run_processes(train_job, job, 1)
    assert f"loss: {__name__}.Reweighing changes its weight in forward" in outcome.failures[0]


def test_a_buffer_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    outcome = run_processes(train_job, job_with(tmp_path, here("Counting", how="shrinking")), 1)
    assert outcome.failures[0] == (
        "step 1: model: buffer seen changes from float32 [5] on cpu to float32 [3, 1] on cpu in forward; keep its "
        "shape and type, or hold what has no fixed shape outside of buffers"
    )


BUFFERS: dict[str, Callable[[int], Tensor]] = {
    "flags": lambda rank: torch.tensor([True, rank > 0, False]),
    "one number": lambda rank: torch.tensor(7 + rank),
    "nothing": lambda _: torch.zeros(0, 3),
    "images": lambda rank: (torch.rand(2, 3, 4, 5) + rank).contiguous(memory_format=torch.channels_last),
    "a view": lambda rank: (torch.rand(5, 4, dtype=torch.float64) + rank)[:, 1:3],
    "complex": lambda rank: torch.rand(3, dtype=torch.complex128) + rank,
    "narrow": lambda rank: (torch.rand(3) + rank).bfloat16(),
    "bytes": lambda rank: torch.arange(5, dtype=torch.uint8) + rank,
}


def shared(link: AgentLink, task: Task) -> list[tuple[str, tuple[int, ...], tuple[int, ...], list[int]]]:
    """Buffers of every kind, which rank 0 shares."""
    meet(link, task, TIMEOUT_S)
    team = Team(rank=task.rank, world_size=task.world_size, shards=2, exact=True, device=torch.device("cpu"))
    buffers = made(task.rank)
    team.share_buffers(buffers)
    team.share_buffers([])
    team.barrier()
    return list(map(described, buffers))


def made(rank: int) -> list[Tensor]:
    torch.manual_seed(rank)
    return [make(rank) for make in BUFFERS.values()]


def described(buffer: Tensor) -> tuple[str, tuple[int, ...], tuple[int, ...], list[int]]:
    """Type, shape, strides and bytes."""
    values = buffer.reshape(-1).view(torch.uint8).tolist()
    return str(buffer.dtype), tuple(buffer.shape), buffer.stride(), values


def test_buffers_of_any_type_and_shape_are_those_of_rank_0(tmp_path: Path) -> None:
    outcome = run_processes(shared, job_with(tmp_path, target("Net")), 2)
    assert not outcome.failures, "\n".join(outcome.failures.values())
    sent, others = (list(map(described, made(rank))) for rank in (0, 1))
    assert [name for name, own, other in zip(BUFFERS, sent, others) if own == other] == ["nothing"]
    assert outcome.results == {0: sent, 1: sent}
