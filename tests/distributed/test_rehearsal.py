"""The rehearsal in the dry run: what a worker would refuse, or would not repeat after a resume, is one line.

Each dry run is a process of its own, as in the product, because it sets much of torch.
"""

import itertools
import threading
from collections import UserDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, random_split

from cluster.errors import DescriptionError, StorageError
from cluster.process import fork_server
from jobs.components.build import build_parts
from jobs.data import BadSample
from jobs.sampling import StepPlan
from jobs.spec import DataSpec, GroupSpec, JobSpec, LossSpec, OptimizerSpec, Target, TrainSpec
from tests.distributed.dry_runs import dry_run

HERE = __name__
SAMPLES, FEATURES, CLASSES = 64, 6, 3
FIRST_READ = int(StepPlan(SAMPLES, 32, 2, 1).samples(0, 0, 0)[0])
"""Of the seed and the batch of ``job``."""


def points(length: int = SAMPLES) -> TensorDataset:
    x_NF = torch.rand(length, FEATURES, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x_NF, (x_NF.sum(1) * CLASSES / FEATURES).long().clamp(max=CLASSES - 1))


class Transformed(Dataset[Any]):
    """Points whose inputs go through a function."""

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.points, self.transform = points(), transform

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, number: int) -> Any:
        x, target = self.points[number]
        return self.transform(x), target


class Noise:
    def __init__(self, draw: Callable[[int], Any]) -> None:
        self.draw = draw

    def __call__(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.draw(FEATURES)).float()


class Damaged(Transformed):
    """Points of which the first one that a worker reads is bad, and so are the first of a validation."""

    def __init__(self) -> None:
        super().__init__(abs)

    def __getitem__(self, number: int) -> Any:
        if number in (0, 1, FIRST_READ):
            raise BadSample(f"s3://bucket/{number}.jpg: is gone; restore it")
        return super().__getitem__(number)


class Away(Transformed):
    def __init__(self) -> None:
        super().__init__(abs)

    def __getitem__(self, number: int) -> Any:
        raise StorageError(f"s3://bucket: cannot read {number}.jpg: reset; check the network")


def with_own_generator() -> Transformed:
    return Transformed(Noise(np.random.default_rng(0).random))


def with_seeded_generators() -> Transformed:
    return Transformed(Noise(lambda length: torch.rand(length) + torch.as_tensor(np.random.rand(length))))  # noqa: NPY002


def with_lambda() -> Transformed:
    return Transformed(lambda x: x * 2)


class Records(Dataset[Any]):
    """Samples behind one open file."""

    def __init__(self) -> None:
        self.file = Path(__file__).open("rb")  # noqa: SIM115

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> Any:
        self.file.seek(number)
        return torch.full((FEATURES,), self.file.read(1)[0] / 256), number % CLASSES


class LazyRecords(Records):
    """Opens its file in the process that reads, as those of h5py and LMDB do."""

    def __init__(self) -> None:
        self.file = None

    def __getitem__(self, number: int) -> Any:
        self.file = self.file or Path(__file__).open("rb")  # noqa: SIM115
        return super().__getitem__(number)


class Mappings(Transformed):
    """Samples whose input is a mapping and no dict."""

    def __init__(self) -> None:
        super().__init__(lambda x: x)

    def __getitem__(self, number: int) -> Any:
        x, target = super().__getitem__(number)
        return UserDict(x=x), target


class InPlace(Transformed):
    """Changes its own tensors, and returns views of them."""

    def __init__(self) -> None:
        super().__init__(lambda x: x.add_(torch.rand(FEATURES)))


class Pictures(Transformed):
    """Samples that nobody has made tensors of, and that no process can send to another."""

    def __init__(self) -> None:
        super().__init__(picture)


def picture(_: Tensor) -> Any:
    return threading.Lock()


def standardised() -> Transformed:
    return Transformed(standardise)


def standardise(x: Tensor) -> Tensor:
    wide = x.repeat(20_000)
    return (x - wide.mean()) / wide.std()


def part(which: int) -> Any:
    return random_split(points(), [48, 16])[which]


def line() -> nn.Linear:
    return nn.Linear(FEATURES, CLASSES)


class Counting(nn.Module):
    """Its output depends on how often it was called."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.line = line()
        self.calls = 0
        self.generator = torch.Generator().manual_seed(1)
        self.where = where
        if where in ("buffer", "buffer in no state dict"):
            self.register_buffer("seen", torch.zeros(()), persistent=where == "buffer")
        else:
            self.seen = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "generator":
            return self.line(x) * torch.rand((), generator=self.generator)
        if self.training:
            self.calls += 1
            self.seen += 1
        return self.line(x) * (self.calls if self.where == "attribute" else self.seen)


class MakingBuffers(nn.Module):
    """One buffer is None until forward makes it, and another is not even declared."""

    def __init__(self) -> None:
        super().__init__()
        self.line = line()
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        self.late = torch.zeros(()) if self.late is None else self.late + 1
        if not hasattr(self, "later"):
            self.register_buffer("later", torch.zeros(()), persistent=False)
        self.later = self.later + 1
        output: Tensor = self.line(x)
        return output * (1 + self.late + self.later)


class Shrinking(torch.autograd.Function):
    """A backward pass that gives less every time."""

    scale = itertools.count(1)

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] / next(Shrinking.scale)


class ShrinkingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = line()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = Shrinking.apply(self.line(x))
        return output


class Keeping(nn.Module):
    """Keeps its last output, as some do to draw it."""

    def __init__(self) -> None:
        super().__init__()
        self.line = line()

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.line(x)
        return self.last


class Squeezing(nn.Module):
    """Loses the axis of a batch of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.line = line()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.line(x.squeeze(0).flatten(1))
        return output


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(2, CLASSES, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.words((x[:, 0] > 0.5).long())
        return output


class OfMappings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = line()

    def forward(self, inputs: Any) -> Tensor:
        output: Tensor = self.line(inputs["x"])
        return output


class Selecting(nn.Module):
    """Takes the eight largest values of a batch, which must have them, in validation too."""

    def __init__(self) -> None:
        super().__init__()
        self.line = line()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.line(x)
        return output + output.sum(1).topk(8).values.mean()


class Experts(nn.Module):
    """Uses its second expert in batches of more than a few samples alone."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([line(), line()])

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.experts[0](x)
        return output + self.experts[1](x) if len(x) > 4 or not self.training else output


class Renormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(2, CLASSES, max_norm=0.1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.words((x[:, 0] > 0.5).long())
        return output


class MadeLate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.head = line(), None

    def forward(self, x: Tensor) -> Tensor:
        self.head = self.head or nn.Linear(CLASSES, CLASSES)
        output: Tensor = self.head(self.line(x))
        return output


def half_headed() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), line().half())


def synced() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(line(), nn.BatchNorm1d(CLASSES)))


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES))


def wrapped() -> nn.Module:
    return nn.DataParallel(line())


def without_values() -> nn.Module:
    return line().to("meta")


class CountingLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(output, target) * self.calls


class BufferedLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(output, target) * self.calls


def loss_of_many(output: Tensor, target: Tensor) -> Tensor:
    """Has nothing to compare in a few samples."""
    loss = nn.functional.cross_entropy(output, target)
    return loss if len(target) > 8 else torch.zeros(())


class FailingOnFew(nn.Module):
    """Its second forward pass fails on a few samples, when the gradients of a first shard have been set aside."""

    def __init__(self) -> None:
        super().__init__()
        self.line = line()
        self.few = 0

    def forward(self, x: Tensor) -> Tensor:
        self.few += len(x) < 8 and self.training
        assert self.few < 2 or len(x) > 8
        output: Tensor = self.line(x)
        return output


class CountingSGD(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.steps
        return super().step(closure)


class OfNarrowMoments(torch.optim.SGD):
    """Its moments are wider than the weights, and torch narrows what it loads."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                moment = self.state[parameter].setdefault("moment", torch.zeros(parameter.shape))
                moment.mul_(0.9).add_(parameter.grad.float())
        return super().step(closure)


def narrow() -> nn.Module:
    return Narrow()


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = line().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.line(x.bfloat16())
        return output.float()


class WantsEveryGradient(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.abs()
        return super().step(closure)


class NotLoading(torch.optim.SGD):
    def load_state_dict(self, state_dict: Any) -> None:
        raise KeyError("moments" if "state" in state_dict else "")


def job(**parts: Any) -> JobSpec:
    """A small job; ``model``, ``train_set``, ``val_set``, ``loss`` and ``optimizer`` are names in this module."""
    names = {"model": "line", "train_set": "points", "val_set": "points", **parts}
    return JobSpec(
        name="run",
        model=Target(f"{HERE}.{names['model']}", parts.get("model_args", {})),
        data=DataSpec(
            train=Target(f"{HERE}.{names['train_set']}", {}),
            val=Target(f"{HERE}.{names['val_set']}", parts.get("val_args", {})),
            loaders=parts.get("loaders", 0),
            on_bad_sample=parts.get("on_bad_sample", "error"),
        ),
        loss=LossSpec(factory=Target(f"{HERE}.{parts['loss']}" if "loss" in parts else "CrossEntropyLoss")),
        optimizer=OptimizerSpec(
            factory=Target(f"{HERE}.{parts['optimizer']}" if "optimizer" in parts else "SGD", {"lr": 0.1}),
            groups=parts.get("groups", ()),
        ),
        train=TrainSpec(global_batch=32, shards=parts.get("shards", 2), **parts.get("train", {})),
    )


@pytest.fixture(autouse=True)
def server() -> None:
    fork_server.start(["launcher.planning.dry_run", HERE])


BAD_SAMPLE = (
    rf"^data.train: sample {FIRST_READ}: s3://bucket/{FIRST_READ}.jpg: is gone; restore it; "
    "or data.on_bad_sample: skip replaces it by another one$"
)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": "lazy"}, "^model: 1 is a LazyLinear, whose shape is unknown"),
        ({"model": "synced"}, "^model: 1 is a SyncBatchNorm, whose result depends on the number of workers; take"),
        ({"model": "wrapped"}, "^model: DataParallel is a DataParallel; return the module inside"),
        ({"model": "without_values"}, "^model: weight is on the device meta and has no values; build it on the CPU$"),
        ({"model": "half_headed", "train": {"precision": "fp16"}}, "^model: 1.weight is float16, and train.precision"),
        ({"model": "Words"}, "^model: words.weight gets a sparse gradient, .*; write sparse=False in its layer$"),
        (
            {"model": "Squeezing", "val_args": {"length": 33}},
            "^the last batch of data.val, of 1 sample: model",
        ),
        ({"train_set": "with_lambda", "loaders": 1}, "^data.train: handing it to a loader process raised .*lambda"),
        (
            {"val_set": "with_lambda", "loaders": 1},
            "^data.val: handing it to a loader process raised .*data.loaders: 0$",
        ),
        ({"train_set": "Records", "loaders": 1}, "^data.train: handing it to a .* cannot pickle '(_io.)?Buff"),
        ({"train_set": "Pictures"}, "^data.train: samples cannot be stacked to a batch: "),
        ({"train_set": "Pictures", "loaders": 1}, "^data.train: sample .* raised TypeError: .*found <class '_thread"),
        ({"train_set": "Damaged"}, BAD_SAMPLE),
        ({"train_set": "Damaged", "loaders": 1}, BAD_SAMPLE),
        (
            {"model": "Renormed"},
            "^model: forward changes the parameter words.weight, on each worker by its own samples",
        ),
        ({"model": "MadeLate"}, "^model: forward makes the parameter head.weight, .*; make it in __init__$"),
        (
            {"model": "narrow", "optimizer": "OfNarrowMoments"},
            "^checkpoint: optimizer.state.0.moment differs after it ",
        ),
        ({"optimizer": "NotLoading"}, "^checkpoint: loading the state that was just saved raised KeyError: 'moments'"),
        (
            {"optimizer": "WantsEveryGradient", "groups": (GroupSpec(match="bias", from_epoch=1),)},
            "^optimizer: step raised AttributeError in a worker's step: 'NoneType' object has no attribute 'abs'$",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_a_worker_would_refuse(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(DescriptionError, match=message):
        dry_run(job(**parts))


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_store_that_does_not_answer_is_no_fault_of_the_description(loaders: int) -> None:
    with pytest.raises(StorageError, match=f"^s3://bucket: cannot read {FIRST_READ}.jpg: reset; check the network"):
        dry_run(job(train_set="Away", loaders=loaders, on_bad_sample="skip"))


UNREPEATABLE = {
    "a counter of the model": ({"model": "Counting", "model_args": {"where": "attribute"}}, "model: the output"),
    "a tensor of the model": ({"model": "Counting", "model_args": {"where": "tensor"}}, "model: the output"),
    "a generator of the model": ({"model": "Counting", "model_args": {"where": "generator"}}, "model: the output"),
    "a counter in the backward pass": ({"model": "ShrinkingNet"}, "model: the gradient"),
    "a counter of the loss": ({"loss": "CountingLoss"}, "loss: its value"),
    "a counter of the optimizer": ({"optimizer": "CountingSGD"}, "optimizer: its update"),
    "a generator of the data": ({"train_set": "with_own_generator"}, "data.train: sample"),
    "a generator of the data in a loader": ({"train_set": "with_own_generator", "loaders": 2}, "data.train: sample"),
    "tensors that the data changes": ({"train_set": "InPlace"}, "data.train: sample"),
    "a generator of the validation data": ({"val_set": "with_own_generator"}, "data.val: sample"),
}


@pytest.mark.parametrize("what", UNREPEATABLE)
def test_what_no_resume_would_repeat(what: str) -> None:
    parts, part_at_fault = UNREPEATABLE[what]

    with pytest.raises(DescriptionError, match=f"^{part_at_fault}.* write train.exact: false$"):
        dry_run(job(**parts))

    dry_run(job(**parts, train={"exact": False}))


@pytest.mark.parametrize(
    "parts",
    [
        {"model": "Counting", "model_args": {"where": "buffer"}},
        {"model": "Counting", "model_args": {"where": "buffer in no state dict"}},
        {"model": "MakingBuffers"},
        {"loss": "BufferedLoss"},
        {"model": "Keeping"},
        {"model": "Squeezing", "val_args": {"length": 34}},
        {"train_set": "with_seeded_generators"},
        {"train_set": "with_lambda"},
        {"train_set": "Records"},
        {"loaders": 1},
        {"loss": "loss_of_many"},
        {"model": "FailingOnFew"},
        {"model": "Experts", "shards": 1},
        {"model": "Selecting"},
        {"model": "OfMappings", "train_set": "Mappings", "val_set": "Mappings"},
        {"train_set": "LazyRecords", "loaders": 1},
        {"train_set": "Damaged", "val_set": "Damaged", "on_bad_sample": "skip"},
        {"train_set": "Damaged", "val_set": "Damaged", "on_bad_sample": "skip", "loaders": 1},
        {"train_set": "standardised", "loaders": 1},
        {"train": {"precision": "fp16"}},
        {"train": {"precision": "bf16", "ema_decay": 0.9, "clip_norm": 1.0}},
        {"optimizer": "CountingSGD", "train": {"deterministic": False}},
        {"groups": (GroupSpec(match="bias", from_epoch=1),)},
    ],
    ids=str,
)
def test_what_runs_is_accepted(parts: dict[str, Any]) -> None:
    tried = dry_run(job(**parts))

    micro_batch = 32 // parts.get("shards", 2)
    assert (tried.trial_samples, tried.num_val_samples) == (
        micro_batch,
        parts.get("val_args", {}).get("length", SAMPLES),
    )


def test_it_does_not_change_the_plan() -> None:
    """The rehearsal's steps advance optimizer and schedule; the plan shows them as they are at the beginning."""
    tried = dry_run(job(groups=(GroupSpec(match="bias", args={"lr": 0.3}, from_epoch=1),)))

    assert [(group.pattern, group.lr) for group in tried.groups] == [("bias", 0.3), ("(rest)", 0.1)]


def test_each_data_set_is_built_from_the_same_seed() -> None:
    spec = job()
    split = replace(
        spec, data=DataSpec(train=Target(f"{HERE}.part", {"which": 0}), val=Target(f"{HERE}.part", {"which": 1}))
    )

    parts = build_parts(split, torch.device("cpu"))

    assert sorted([*parts.train_set.indices, *parts.val_set.indices]) == list(range(SAMPLES))
