"""Training loops that the GPU benchmark compares: the product's, and two written by hand.

All train the same network on the same images, which are made without a disk and arrive as uint8, as decoders give them.
"""

import io
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cluster.collectives.groups import open_default_group
from cluster.process import loader_processes
from cluster.process.messages import Doing
from jobs.checkpoint.loop_state import LoopState
from jobs.components.build import Components, build_parts
from jobs.parallel.worker_team import Team
from jobs.spec import CheckpointSpec, DataSpec, JobSpec, LossSpec, OptimizerSpec, Target, TrainSpec
from jobs.training.loop import Loop
from tests.benchmarks.arms import Gate, Quartiles

_LEAST_ROUNDS = 3
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LENGTH = 1_281_167
"""Of ImageNet."""
_NEVER = 10**9


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is: for a GPU, or so small that a CPU runs the same script in minutes."""

    device: torch.device
    network: str
    batch: int
    image_size: int
    num_classes: int
    block: int
    """Steps of an arm in a row."""
    warm_up: int
    loaders: int
    """Loader processes of every arm: as many as never let a GPU wait for samples that need no decoding."""
    decoders: tuple[int, ...]
    """Numbers of loader processes to measure with samples that are decoded."""
    optimizer: Mapping[str, Any]

    @classmethod
    def of(cls, device: str) -> "Scale":
        sgd = {"lr": 0.01, "momentum": 0.9, "fused": True}
        if device == "cpu":
            return cls(torch.device("cpu"), "tiny", 8, 32, 10, 2, 1, 1, (1, 2), sgd)
        return cls(torch.device("cuda", 0), "resnet50", 256, 224, 1000, 10, 10, 4, (4, 8, 15), sgd)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def job(
        self,
        *,
        store: str = "runs",
        images: str = "Pictures",
        optimizer: Target | None = None,
        loaders: int | None = None,
        every_steps: int = _NEVER,
        max_steps: int | None = None,
        **train: Any,
    ) -> JobSpec:
        """The description of an arm: bf16, channels_last and a fused optimizer unless ``train`` says otherwise."""
        tuned = {"precision": "bf16", "channels_last": True, "shards": 1}
        here = __name__
        return JobSpec(
            name="gpu",
            store=store,
            model=Target(f"{here}.Classifier", {"network": self.network, "num_classes": self.num_classes}),
            data=DataSpec(
                train=Target(f"{here}.{images}", {"image_size": self.image_size, "num_classes": self.num_classes}),
                loaders=self.loaders if loaders is None else loaders,
            ),
            loss=LossSpec(factory=Target("CrossEntropyLoss")),
            optimizer=OptimizerSpec(factory=optimizer or Target("SGD", dict(self.optimizer))),
            train=TrainSpec(**{**tuned, "global_batch": self.batch, "max_steps": max_steps, **train}),
            checkpoint=CheckpointSpec(every_steps=every_steps),
        )


class Classifier(nn.Module):
    """A network that takes images as decoders give them, and normalises them on its device.

    Shapes:
        images_NCHW, uint8 -> logits_NK.
    """

    def __init__(self, network: str, num_classes: int) -> None:
        super().__init__()
        self.network = _tiny(num_classes) if network == "tiny" else _resnet50(num_classes)
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", (1 / torch.tensor(_IMAGENET_STD)).view(3, 1, 1), persistent=False)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        logits_NK: Tensor = self.network((images_NCHW.float() / 255 - self.mean) * self.scale)
        return logits_NK


def _resnet50(num_classes: int) -> nn.Module:
    network: nn.Module = torchvision.models.resnet50(num_classes=num_classes)
    return network


def _tiny(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    )  # fmt: skip


class Pictures(Dataset[tuple[Tensor, int]]):
    """Windows of one noise: images that cost next to nothing."""

    def __init__(self, image_size: int, num_classes: int) -> None:
        side = image_size + 64
        self.noise_CHW = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8))
        self.image_size, self.num_classes = image_size, num_classes

    def __len__(self) -> int:
        return _LENGTH

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        top, left = number % 64, number // 64 % 64
        window_CHW = self.noise_CHW[:, top : top + self.image_size, left : left + self.image_size]
        return window_CHW, number % self.num_classes


class Photographs(Dataset[tuple[Tensor, int]]):
    """A JPEG of 500 x 375 and about 110 kB, as ImageNet's are on average.

    Each access decodes it, crops at random and resizes.
    """

    def __init__(self, image_size: int, num_classes: int) -> None:
        generator = np.random.default_rng(0)
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + generator.normal(0, 18, smooth.shape)  # grain, of which most bytes of a photograph consist
        encoded = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(encoded, "jpeg", quality=90)
        self.encoded = encoded.getvalue()
        self.image_size, self.num_classes = image_size, num_classes

    def __len__(self) -> int:
        return _LENGTH

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        image = Image.open(io.BytesIO(self.encoded)).convert("RGB")
        side = random.randint(200, 375)
        left, top = random.randint(0, image.width - side), random.randint(0, image.height - side)
        crop = image.resize((self.image_size,) * 2, Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1), number % self.num_classes


@dataclass(frozen=True, slots=True)
class Arm:
    """A loop, and what of torch's settings is global and has to be set whenever it goes on."""

    train: Callable[[Gate], None]
    deterministic: bool = True
    cudnn_benchmark: bool = False
    tf32: bool = False

    def take_over(self) -> None:
        torch.use_deterministic_algorithms(self.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic = self.deterministic
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.backends.cudnn.allow_tf32 = self.tf32


def open_team(scale: Scale) -> Callable[[JobSpec], Team]:
    """Begins a process group of this process alone; returns what opens a team in it."""
    open_default_group(dist.HashStore(), rank=0, world_size=1, on_gpu=scale.on_gpu)

    def team_of(spec: JobSpec) -> Team:
        return Team(rank=0, world_size=1, shards=spec.train.shards, exact=spec.train.exact, device=scale.device)

    return team_of


def launched(
    scale: Scale, team_of: Callable[[JobSpec], Team], mark: Callable[[Doing, int], None] | None = None, **job: Any
) -> Arm:
    """The product's loop, put together as ``jobs.training.worker.train`` does."""
    spec = scale.job(**job)
    components = build_parts(spec, scale.device)
    if spec.train.compile:
        components.model.compile()

    def train(gate: Gate) -> None:
        loop_of(spec, components, team_of(spec), stop_wanted=gate, **({} if mark is None else {"mark": mark})).run()

    train_spec = spec.train
    return Arm(train, train_spec.deterministic, train_spec.cudnn_benchmark, train_spec.tf32)


def loop_of(spec: JobSpec, components: Components, team: Team, **replaced: Any) -> Loop:
    """A loop that tells nobody anything and saves nothing, unless it is told otherwise."""
    silent = {
        "metrics": {},
        "log": lambda _: None,
        "tell": lambda _: None,
        "save": lambda *_, **__: None,
        "stop_wanted": lambda: False,
    }
    return Loop(spec, components, replaced.pop("state", LoopState()), team, **(silent | replaced))


def naive(scale: Scale, *, tf32: bool = True) -> Arm:
    """A first script: fp32, torch's memory order, copies that wait, and ``.item()`` in every step.

    ``tf32``: whether convolutions use TensorFloat-32, as torch lets them by default.
    """

    def train(gate: Gate) -> None:
        model = Classifier(scale.network, scale.num_classes).to(scale.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=scale.optimizer["lr"], momentum=0.9)
        criterion, total = nn.CrossEntropyLoss(), 0.0
        for images_NCHW, labels_N in _loader(scale, pin_memory=False):
            optimizer.zero_grad()
            loss = criterion(model(images_NCHW.to(scale.device)), labels_N.to(scale.device))
            loss.backward()
            optimizer.step()
            total += loss.item()
            if gate():
                return

    return Arm(train, deterministic=False, tf32=tf32)


def tuned(scale: Scale) -> Arm:
    """All that the product's loop does for speed, by hand: and none of reports, seeds, exact sums and stops."""

    def train(gate: Gate) -> None:
        torch.manual_seed(0)
        model = Classifier(scale.network, scale.num_classes).to(scale.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), **scale.optimizer)
        criterion = nn.CrossEntropyLoss()
        for images_NCHW, labels_N in _prefetched(scale, iter(_loader(scale, pin_memory=scale.on_gpu))):
            images_NHWC = images_NCHW.contiguous(memory_format=torch.channels_last)
            with torch.autocast(scale.device.type, torch.bfloat16):
                loss = criterion(model(images_NHWC), labels_N)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if gate():
                return

    return Arm(train)


def _loader(scale: Scale, *, pin_memory: bool) -> DataLoader[Any]:
    return DataLoader(
        Pictures(scale.image_size, scale.num_classes), scale.batch, shuffle=True, num_workers=scale.loaders,
        pin_memory=pin_memory, multiprocessing_context=loader_processes.CONTEXT, drop_last=True,
    )  # fmt: skip


def _prefetched(scale: Scale, batches: Iterator[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
    """Copies each batch on a stream of its own, while the one before is computed with."""
    if not scale.on_gpu:
        yield from map(list, batches)
        return
    stream = torch.cuda.Stream()

    def begin() -> list[Tensor]:
        with torch.cuda.stream(stream):
            return [tensor.to(scale.device, non_blocking=True) for tensor in next(batches)]

    following = begin()
    while True:
        torch.cuda.current_stream().wait_stream(stream)
        batch = following
        for tensor in batch:
            tensor.record_stream(torch.cuda.current_stream())
        following = begin()
        yield batch


@dataclass(frozen=True, slots=True)
class Times:
    """Of an arm: the seconds of a step, as the mean of each block, round by round; and those of its first step."""

    steps: list[float]
    first: float

    def over(self, other: "Times") -> Quartiles:
        """How many times as long as another arm it takes, by rounds."""
        return Quartiles.of([own / others for own, others in zip(self.steps, other.steps)])

    @property
    def median(self) -> float:
        return median(self.steps)


def measure(scale: Scale, arms: Mapping[str, Arm], deadline: float) -> dict[str, Times]:
    """Lets arms take turns in blocks, in another order in every round, up to a deadline of ``time.monotonic``.

    The clock is read when the GPU has done all that a block has enqueued.
    """
    gates = {name: Gate(arm.train) for name, arm in arms.items()}

    def run_block(name: str, steps: int) -> float:
        arms[name].take_over()
        scale.synchronize()
        began = time.perf_counter()
        gates[name].run_block(steps)
        scale.synchronize()
        return (time.perf_counter() - began) / steps

    first = {}
    for name in arms:
        first[name] = run_block(name, 1)
        run_block(name, scale.warm_up)
    steps: dict[str, list[float]] = {name: [] for name in arms}
    longest, number = 0.0, 0
    while number < _LEAST_ROUNDS or time.monotonic() + longest < deadline:
        began = time.monotonic()
        for name in random.Random(number).sample(list(arms), len(arms)):
            steps[name].append(run_block(name, scale.block))
        longest = max(longest, time.monotonic() - began)
        number += 1
    for name, gate in gates.items():
        arms[name].take_over()
        gate.end()
    return {name: Times(steps[name], first[name]) for name in arms}
