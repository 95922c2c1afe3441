"""A job of a second that has everything in it that could tell workers apart, and its parts."""

import random
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, max_pool2d, relu

from jobs.data import BadSample
from jobs.spec import (
    CheckpointSpec,
    DataSpec,
    GroupSpec,
    JobSpec,
    LossSpec,
    OptimizerSpec,
    SchedulerSpec,
    Target,
    TrainSpec,
)

SAMPLES, VAL_SAMPLES, CLASSES = 50, 17, 5
STEPS_PER_EPOCH, STEPS = 4, 12
UNFROZEN_FROM_STEP = 5


class Centre(nn.Module):
    """Subtracts a running mean; unlike BatchNorm's, its buffer is read in training too."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, features_NK: Tensor) -> Tensor:
        centred_NK = features_NK - self.mean
        if self.training:
            self.mean.lerp_(features_NK.detach().float().mean(dim=0), 0.5)
        return centred_NK


class Net(nn.Module):
    """Buffers of two kinds, dropout, and weights for more than one bucket of DDP, the first of which holds 1 MiB.

    Shapes:
        images_N188 -> logits_NK
    """

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, kernel_size=3)
        self.norm = nn.BatchNorm2d(6)
        self.centre = Centre(54)
        self.fc1 = nn.Linear(54, 511)
        self.fc2 = nn.Linear(511, 517)
        self.fc3 = nn.Linear(517, CLASSES)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images_N188: Tensor) -> Tensor:
        features_N633 = max_pool2d(relu(self.norm(self.conv(images_N188))), 2)
        hidden_NK = relu(self.fc1(self.dropout(self.centre(features_N633.flatten(start_dim=1)))))
        return self.fc3(self.dropout(relu(self.fc2(hidden_NK))))


class OddNet(nn.Module):
    """Parameters as they can lie in memory: images that can be channels-last, transposed, sliced, no dimension, shared.

    Args:
        dropout: The probability.
        norm: Whether there is BatchNorm.

    Shapes:
        images_N188 -> logits_NK
    """

    def __init__(self, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, kernel_size=3)
        self.conv2 = nn.Conv2d(4, 6, kernel_size=3, bias=not norm)  # of a bias, BatchNorm would leave only rounding
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.transposed = nn.Parameter(torch.randn(96, 24).t() / 10)
        self.sliced = nn.Parameter(torch.randn(24, 48)[:, ::2] / 5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.wide = nn.Sequential(nn.Linear(24, 700), nn.ReLU(), nn.Linear(700, 400))  # more than one bucket of DDP
        self.narrow = nn.Linear(400, 24)
        self.shared = self.shared_again = nn.Linear(24, 24)
        self.head = nn.Linear(24, CLASSES)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images_N188: Tensor) -> Tensor:
        features_N644 = relu(self.norm(self.conv2(relu(self.conv1(images_N188)))))
        hidden_NK = relu(linear(features_N644.flatten(start_dim=1), self.transposed))
        hidden_NK = self.dropout(relu(linear(hidden_NK, self.sliced))) * self.scale
        hidden_NK = self.narrow(relu(self.wide(hidden_NK)))
        return self.head(relu(self.shared_again(relu(self.shared(hidden_NK)))))


class RowSums(torch.optim.Optimizer):
    """Multiplies gradients by a vector: a product that rounds by the addresses of its factors."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.dim() == 2:
                    sums_N1 = (parameter.grad @ torch.ones(parameter.shape[1])).unsqueeze(1)
                    parameter.sub_(parameter.grad / (1 + sums_N1.abs()), alpha=group["lr"])


class Images:
    """A pattern per class, in noise.

    Args:
        length: Samples.
        augment: Draw from all three generators in every access.
        ignored: Every so many-th label is -100; 0: none.
        broken: The number of a sample that holds a NaN.
        bad: The numbers of samples that are bad.
    """

    def __init__(
        self,
        length: int,
        augment: bool = False,
        ignored: int = 0,
        broken: int | None = None,
        bad: Collection[int] = (),
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        patterns_K188 = torch.randn(CLASSES, 1, 8, 8, generator=generator)
        self.labels_N = torch.randint(CLASSES, (length,), generator=generator)
        self.images_N188 = patterns_K188[self.labels_N] + torch.randn(length, 1, 8, 8, generator=generator)
        if ignored:
            self.labels_N[::ignored] = -100
        if broken is not None:
            self.images_N188[broken, 0, 0, 0] = torch.nan
        self.augment = augment
        self.bad = bad

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        image_188 = self.images_N188[number]
        if self.augment:
            image_188 = image_188.roll(random.randrange(8), dims=random.choice([1, 2]))
            image_188 = image_188 * float(np.random.uniform(0.5, 2)) + 0.1 * torch.randn(image_188.shape)
        if number in self.bad:
            raise BadSample(f"s3://bucket/{number}.jpg: cannot be decoded; repair or remove the file")
        return image_188, int(self.labels_N[number])


def full_job(store: object, name: str, **train: Any) -> JobSpec:
    """Everything at once: 12 steps in 3 epochs, and the convolution trains from the middle of the second."""
    return JobSpec(
        name=name,
        store=str(store),
        seed=7,
        model=target("Net"),
        data=DataSpec(train=target("Images", length=SAMPLES, augment=True), val=target("Images", length=VAL_SAMPLES)),
        loss=LossSpec(factory=Target("CrossEntropyLoss", {"label_smoothing": 0.1})),
        optimizer=OptimizerSpec(
            factory=Target("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
            groups=(
                GroupSpec(match="conv.*", lr_scale=0.5, from_step=UNFROZEN_FROM_STEP),
                GroupSpec(match="*.bias", args={"weight_decay": 0.0}),
            ),
        ),
        scheduler=SchedulerSpec(factory=Target("StepLR", {"step_size": 5, "gamma": 0.5}), interval="step"),
        train=TrainSpec(**{"epochs": 3, "global_batch": 12, "shards": 4, "clip_norm": 0.5, "ema_decay": 0.9} | train),
        checkpoint=CheckpointSpec(every_steps=3),
    )


def plain_job(store: object, name: str, **train: Any) -> JobSpec:
    """What a plain loop does as well: no dropout, no augmentation, nothing but momentum."""
    job = full_job(store, name)
    return replace(
        job,
        model=target("Net", dropout=0.0),
        data=DataSpec(train=target("Images", length=SAMPLES)),
        loss=LossSpec(factory=Target("CrossEntropyLoss")),
        optimizer=OptimizerSpec(factory=Target("SGD", {"lr": 0.05, "momentum": 0.9})),
        scheduler=None,
        train=TrainSpec(**{"epochs": 2, "global_batch": 12, "shards": 4} | train),
    )


def images(**args: Any) -> DataSpec:
    """Other training data, and no validation."""
    return DataSpec(train=target("Images", **{"length": SAMPLES} | args))


def target(name: str, **args: Any) -> Target:
    return Target(f"{__name__}.{name}", args)
