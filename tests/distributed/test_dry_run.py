"""The trial: how much of a micro-batch, on which device, and what becomes of one that is too large for it.

Each runs in a process of its own, as in the product, for it sets much of torch. Nobody here has a GPU: the device is
put in its place.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cluster.errors import ClusterError, DescriptionError, LauncherError
from cluster.process import fork_server
from cluster.process.orders import Task
from jobs.spec import DataSpec, JobSpec, LossSpec, OptimizerSpec, Target, TrainSpec
from launcher.planning.plan import DryRunResult
from tests.distributed import dry_runs

HERE = __name__
OUT_OF_MEMORY = "CUDA out of memory. DryRunResult to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
MICRO_BATCH, VAL_SAMPLES = 48, 40


class Net(nn.Module):
    """A line that fails as on a GPU where it is told to; without a text, the GPU has no memory left."""

    def __init__(self, fails: str = "", text: str = "") -> None:
        super().__init__()
        self.line = nn.Linear(2, 2)
        self.fails = fails
        self.text = text
        self._fail("build")

    def forward(self, x_N2: Tensor) -> Tensor:
        self._fail("forward")
        y_N2 = self.line(x_N2)
        if y_N2.requires_grad:
            y_N2.register_hook(lambda _: self._fail("backward"))
        return y_N2

    def _fail(self, where: str) -> None:
        if self.fails == where and self.text:
            raise torch.AcceleratorError(self.text)
        if self.fails == where:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def points(length: int) -> TensorDataset:
    x_N2 = torch.rand(length, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x_N2, (x_N2.sum(1) > 1).long())


def task_of(*, on_gpu: bool, fails: str = "", text: str = "") -> Task:
    job = JobSpec(
        name="run",
        model=Target(f"{HERE}.Net", {"fails": fails, "text": text}),
        data=DataSpec(
            train=Target(f"{HERE}.points", {"length": 4 * MICRO_BATCH}),
            val=Target(f"{HERE}.points", {"length": VAL_SAMPLES}),
        ),
        loss=LossSpec(factory=Target("CrossEntropyLoss")),
        optimizer=OptimizerSpec(factory=Target("SGD", {"lr": 0.1})),
        train=TrainSpec(global_batch=2 * MICRO_BATCH, shards=2),
    )
    return dry_runs.task_of(job, on_gpu=on_gpu)


def try_with_gpu(task: Task) -> tuple[DryRunResult, list[tuple[str, int]]]:
    """What the trial tells, and which batches it moved to the device."""
    from launcher.planning import dry_run

    device, moved = torch.device("cpu", 0), list[tuple[str, int]]()
    to_device = dry_run.to_device

    def move(batch: Any, to: torch.device) -> Any:
        moved.append((str(to), len(batch[0])))
        return to_device(batch, to)

    def worker_device(*, on_gpu: bool) -> torch.device:
        assert on_gpu == task.on_gpu
        return device

    replaced: Any = dry_run
    replaced.to_device, replaced.worker_device = move, worker_device
    return dry_run.try_out(task), moved


@pytest.fixture(autouse=True)
def server() -> None:
    fork_server.start(["launcher.planning.dry_run", HERE])


def test_on_a_cpu_it_is_part_of_a_micro_batch() -> None:
    tried, moved = fork_server.call(f"{HERE}:try_with_gpu", task_of(on_gpu=False))

    assert tried.trial_samples == 32
    assert moved == [("cpu:0", 32), ("cpu:0", 2), ("cpu:0", 32), ("cpu:0", 32), ("cpu:0", 2)]


def test_on_a_gpu_it_is_a_whole_one() -> None:
    tried, moved = fork_server.call(f"{HERE}:try_with_gpu", task_of(on_gpu=True))

    assert tried.trial_samples == MICRO_BATCH
    assert moved == [("cpu:0", MICRO_BATCH), ("cpu:0", 2), ("cpu:0", VAL_SAMPLES), ("cpu:0", VAL_SAMPLES), ("cpu:0", 2)]


@pytest.mark.parametrize("where", ["build", "forward", "backward"])
def test_one_that_does_not_fit_into_the_gpu_is_one_line(where: str) -> None:
    with pytest.raises(DescriptionError) as caught:
        fork_server.call(f"{HERE}:try_with_gpu", task_of(on_gpu=True, fails=where))

    assert str(caught.value) == (
        f"train.global_batch: a micro-batch of 48 samples, 1 of 2 shards, does not fit into the GPU: {OUT_OF_MEMORY}; "
        "lower train.global_batch, raise train.shards, or take GPUs with more memory"
    )


@pytest.mark.parametrize("where", ["build", "forward", "backward"])
@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("CUDA error: device-side assert triggered\nCUDA kernel errors might be", DescriptionError,
         "model: a micro-batch fails on the GPU with CUDA error: device-side assert triggered; the usual reason is a "
         "label that is not below the number of classes"),
        ("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be", ClusterError,
         "the GPU failed: CUDA error: uncorrectable ECC error encountered"),
        ("CUDA error: no kernel image is available for execution on the device\nCUDA", ClusterError,
         "the GPU failed: CUDA error: no kernel image is available for execution on the device"),
    ],
    ids=["of the code", "lost", "of another kind than torch was built for"],
)  # fmt: skip
def test_an_error_of_the_gpu_is_told_as_what_it_is(
    where: str, text: str, kind: type[LauncherError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        fork_server.call(f"{HERE}:try_with_gpu", task_of(on_gpu=True, fails=where, text=text))

    assert type(caught.value) is kind
    assert str(caught.value).startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_a_gpu_that_torch_does_not_see_is_the_hosts() -> None:
    with pytest.raises(ClusterError, match="a worker has a GPU here, and torch .* cannot use it") as caught:
        fork_server.call("launcher.planning.dry_run:try_out", task_of(on_gpu=True))

    assert caught.value.cause == "environment"


def try_beside_gpus(task: Task) -> tuple[int, str | None]:
    """What a dry run on the CPU tells of GPUs beside it, and what the user's code would see of them."""
    torch.cuda.device_count = lambda: 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else 2
    tried = fork_server.resolve(task.entry)(task)
    return tried.gpus_here, os.environ.get("CUDA_VISIBLE_DEVICES")


def test_on_a_cpu_the_gpus_of_the_machine_are_counted_and_then_hidden() -> None:
    assert fork_server.call(f"{HERE}:try_beside_gpus", task_of(on_gpu=False)) == (2, "")


def test_an_interface_that_the_user_has_named_and_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    with pytest.raises(ClusterError) as caught:
        fork_server.call("launcher.planning.dry_run:try_out", task_of(on_gpu=False))

    assert caught.value.cause == "environment"
    assert str(caught.value).startswith("a worker cannot open its process group here: ")
    assert str(caught.value).endswith(
        "find address for: none0; check GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME on this host"
    )
