"""What the dry run on a CPU finds out about workers on GPUs: operators that would raise there, and waits for nothing.

Each runs in a process of its own, as in the product.
"""

from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from cluster.errors import DescriptionError
from cluster.process import fork_server
from jobs.spec import DataSpec, JobSpec, LossSpec, OptimizerSpec, Target, TrainSpec
from tests.distributed.dry_runs import dry_run

HERE = __name__
CLASSES, SAMPLES = 3, 16
POOL = "_adaptive_avg_pool2d_backward in model.pool (instead: adaptive pooling to size 1, or average pooling with a fixed kernel)"  # noqa: E501
MEDIAN = "median{} (instead: sort)"


class Net(nn.Module):
    """Classifies pictures of 4 x 4; ``uses`` tells what else it does."""

    def __init__(self, uses: str = "") -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2 if uses == "pool" else 1)
        self.unpool = nn.MaxUnpool2d(2)
        self.head = nn.Linear(4 if uses == "pool" else 1, CLASSES)
        self.uses = uses

    def forward(self, x_N1HW: Tensor) -> Tensor:
        if self.uses == "unpool":
            pooled, indices = nn.functional.max_pool2d(x_N1HW, 2, return_indices=True)
            x_N1HW = self.unpool(pooled, indices)
        if self.uses == "median" or (self.uses == "median in evaluation" and not self.training):
            x_N1HW.median(0)
        if self.uses == "pool of no gradient":
            nn.functional.adaptive_avg_pool2d(x_N1HW, 3)
        scale = self.head.weight.mean()
        output: Tensor = self.head(self.pool(x_N1HW * scale).flatten(1))
        return output


class Pixels(nn.Module):
    """Classifies each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv2d(1, CLASSES, 1)

    def forward(self, x_N1HW: Tensor) -> Tensor:
        output: Tensor = self.line(x_N1HW)
        return output


def pictures() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(SAMPLES, 1, 4, 4, generator=generator), torch.arange(SAMPLES) % CLASSES)


def masks() -> TensorDataset:
    x_N1HW = pictures().tensors[0]
    return TensorDataset(x_N1HW, (x_N1HW[:, 0] * CLASSES).long())


class Normalised(Dataset[Any]):
    """Its samples are made on the CPU, in a worker, too."""

    def __getitem__(self, number: int) -> Any:
        x_1HW, target = pictures()[number]
        return x_1HW - x_1HW.median(dim=1, keepdim=True).values, target

    def __len__(self) -> int:
        return SAMPLES


def pixel_loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


class Centre(torchmetrics.Metric):
    """A metric whose update, on the device of a worker, or result, always on the CPU, takes a median."""

    full_state_update = False

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.add_state("total", torch.zeros(CLASSES), dist_reduce_fx="sum")

    def update(self, output_NK: Tensor, _: Tensor) -> None:
        self.total += output_NK.median(0).values if self.where == "update" else output_NK.sum(0)

    def compute(self) -> Tensor:
        return self.total.median(0).values


class MedianSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.sub_(parameter.grad.median(0).values)
        return super().step(closure)


def job(
    *,
    uses: str = "",
    model: str = "Net",
    data: str = "pictures",
    loss: Target | None = None,
    optimizer: Target | None = None,
    metrics: dict[str, Target] | None = None,
    **train: Any,
) -> JobSpec:
    data_set = Target(f"{HERE}.{data}")
    return JobSpec(
        name="run",
        model=Target(f"{HERE}.{model}", {"uses": uses} if model == "Net" else {}),
        data=DataSpec(train=data_set, val=data_set),
        loss=LossSpec(factory=loss or Target("CrossEntropyLoss")),
        optimizer=OptimizerSpec(factory=optimizer or Target("SGD", {"lr": 0.1})),
        metrics=metrics or {},
        train=TrainSpec(global_batch=8, shards=2, **train),
    )


@pytest.fixture(autouse=True)
def server() -> None:
    fork_server.start(["launcher.planning.dry_run", HERE])


def sgd(**args: Any) -> Target:
    return Target("SGD", {"lr": 0.1, **args})


FINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing": ({}, ()),
    "the backward pass": ({"uses": "pool"}, (POOL,)),
    "the average that is validated": ({"uses": "pool", "ema_decay": 0.9, "precision": "bf16"}, (POOL,)),
    "a compiled model": ({"uses": "pool", "compile": True}, (POOL,)),
    "a pass that nothing differentiates": ({"uses": "pool of no gradient"}, ()),
    "the forward pass": ({"uses": "median"}, (MEDIAN.format(" in model"),)),
    "the forward pass of a validation": ({"uses": "median in evaluation"}, (MEDIAN.format(" in model"),)),
    "the update of a metric": (
        {"metrics": {"a": Target(f"{HERE}.Centre", {"where": "update"})}},
        (MEDIAN.format(" in metrics"),),
    ),
    "the result of a metric": ({"metrics": {"a": Target(f"{HERE}.Centre", {"where": "compute"})}}, ()),
    "the optimizer": ({"optimizer": Target(f"{HERE}.MedianSGD", {"lr": 0.1})}, (MEDIAN.format(""),)),
    "the data": ({"data": "Normalised"}, ()),
    "a loss by terms": ({"model": "Pixels", "data": "masks"}, ()),
    "a loss function that takes the mean": (
        {"model": "Pixels", "data": "masks", "loss": Target(f"{HERE}.pixel_loss")},
        ("nll_loss2d_forward in loss (instead: reduction none, and then the mean)",),
    ),
    "what may differ": ({"uses": "pool", "deterministic": False}, ()),
}


@pytest.mark.parametrize("what", FINDS)
def test_what_would_raise_on_a_gpu_is_found_in(what: str) -> None:
    parts, found = FINDS[what]

    assert dry_run(job(**parts)).would_raise_on_gpu == found


def test_what_raises_on_this_device_is_told_alike() -> None:
    with pytest.raises(DescriptionError) as caught:
        dry_run(job(uses="unpool"))

    assert str(caught.value) == (
        "train.deterministic: torch has no deterministic implementation of max_unpool2d in model.unpool (instead: a "
        "transposed convolution); replace it, or give up equal bits in every run with train.deterministic: false"
    )


@pytest.mark.parametrize(
    ("optimizer", "precision", "could"),
    [
        (sgd(), "fp16", True),
        (sgd(fused=False), "fp16", True),
        (sgd(fused=True), "fp16", False),
        (Target("Adam", {"fused": True}), "fp16", False),
        (Target("Rprop", {}), "fp16", False),
        (sgd(), "bf16", False),
    ],
    ids=str,
)
def test_whether_the_optimizer_could_be_fused(optimizer: Target, precision: str, could: bool) -> None:
    assert dry_run(job(optimizer=optimizer, precision=precision)).could_fuse == could
