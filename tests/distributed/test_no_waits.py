"""A step waits for no GPU, and for no other worker's CPU: but for the waits that are declared, here and in the spec.

Nobody here has a GPU, so a watch tells what would wait for one. Every case runs the loop of the product.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from torch import Tensor

from cluster.collectives.exchange import TreeExchange
from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.checkpoint.loop_state import LoopState
from jobs.components.build import Components, build_parts
from jobs.components.losses import build_loss
from jobs.components.metrics import build_metrics
from jobs.components.targets import Builder
from jobs.data.loader import validation_batches
from jobs.parallel import worker_team
from jobs.parallel.worker_team import Team
from jobs.spec import CheckpointSpec, GroupSpec, JobSpec, LossSpec, OptimizerSpec, SchedulerSpec, Target
from jobs.training import step_batches
from jobs.training.evaluation import evaluate
from jobs.training.loop import Loop
from jobs.training.worker import meet
from tests.device_watch import DeviceWatch
from tests.distributed.small_job import Images, OddNet, images, plain_job
from tests.distributed.team_process import TIMEOUT_S, run_processes

SHARDS = 4
STEPS = 7
WATCHED = range(2, STEPS - 1)
"""The steps that are like all others: the first makes DDP, the last ones end the run."""
WEIGHTS = {"weight": [0.2, 3.0, 1.0, 0.5, 2.0], "ignore_index": 0}
SGD = Target("SGD", {"lr": 0.05, "momentum": 0.9})


class Narrow(OddNet):
    """A model of 16-bit weights."""

    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()

    def forward(self, images_N188: Tensor) -> Tensor:
        return super().forward(images_N188.bfloat16())


@dataclass(frozen=True)
class Case:
    """A job, and what it waits for in each step."""

    train: Mapping[str, Any] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)
    waits: int = 0
    """How often the CPU waits for the GPU."""
    gathers: int = 1
    """The report's, and those of the sums over shards."""
    buckets: int = 2
    """Of gradients."""

    def collectives(self, world_size: int) -> Counter[str]:
        """The collectives of a step: the gathers, one broadcast of all buffers, and for each bucket a sum, or a message
        to and from the other worker on the way there and on the way back."""
        exact, together = self.train.get("exact", True), world_size > 1
        counts = Counter(_allgather_base_=self.gathers, broadcast_=int(together))
        if not exact:
            counts["allreduce_"] = self.buckets
        elif together:
            counts["send"] = counts["recv_"] = 2 * self.buckets
        return +counts


CASES = {
    "plain": Case(),
    "the sum of the backend": Case({"exact": False}),
    "the loop's own work": Case({"clip_value": 0.1, "ema_decay": 0.9, "channels_last": True}),
    "bf16": Case({"precision": "bf16", "clip_norm": 0.5}),
    "16-bit weights": Case({"clip_norm": 0.5, "ema_decay": 0.9}, {"model": Target(f"{__name__}.Narrow")}, buckets=1),
    "AdamW in groups, with a schedule": Case(
        job={
            "optimizer": OptimizerSpec(
                factory=Target("AdamW", {"lr": 1e-3}), groups=(GroupSpec(match="*.bias", args={"weight_decay": 0.0}),)
            ),
            "scheduler": SchedulerSpec(
                factory=Target("OneCycleLR", {"max_lr": 0.1, "total_steps": STEPS + 1}), interval="step"
            ),
        }
    ),
    "weights of targets": Case(job={"loss": LossSpec(factory=Target("CrossEntropyLoss", WEIGHTS))}, gathers=2),
    "on_nonfinite: skip": Case({"on_nonfinite": "skip"}, waits=1, gathers=2),
    "fp16": Case({"precision": "fp16"}, waits=1),
    "fp16, fused": Case(
        {"precision": "fp16"}, {"optimizer": OptimizerSpec(factory=Target("SGD", {**SGD.args, "fused": True}))}
    ),
}


def job_of(case: Case) -> JobSpec:
    job = plain_job("runs", "run", **{"epochs": 1, "max_steps": STEPS, "shards": SHARDS} | dict(case.train))
    job = replace(job, data=images(length=12 * (STEPS + 1)), checkpoint=CheckpointSpec(every_steps=STEPS))
    return replace(job, **dict(case.job))


def watched_steps(link: AgentLink, task: Task) -> dict[str, tuple[list[list[str]], list[Counter[str]]]]:
    """For each case, what would wait in each step, and its collectives."""
    meet(link, task, TIMEOUT_S)
    return {name: watch_job(job_of(case), task) for name, case in CASES.items()}


def watch_job(spec: JobSpec, task: Task) -> tuple[list[list[str]], list[Counter[str]]]:
    watch = DeviceWatch()
    team = Team(
        rank=task.rank, world_size=task.world_size, shards=SHARDS, exact=spec.train.exact, device=watch.device
    )  # fmt: skip
    components = build_parts(spec, watch.device)
    watch.mark(tensors_of(components))
    instead_of_a_gpu(watch)
    own_loop = Loop(
        spec, components, LoopState(), team, metrics={}, log=lambda _: None, tell=lambda _: None,
        save=lambda *_, **__: None, stop_wanted=lambda: False, after_step=watch.next_step,
    )  # fmt: skip
    with watch.here():
        own_loop.run()
    assert own_loop.state.step == STEPS
    return watch.waits, watch.collectives


def instead_of_a_gpu(watch: DeviceWatch) -> None:
    """Replaces the copies that do not wait, to and from a GPU; watches the threads of the exchange."""

    def to_host_later(values: Tensor, work: dist.Work) -> Callable[[], Tensor]:
        def wait() -> Tensor:
            work.wait()
            return watch.copy_to_host(values)

        return wait

    def run(self: TreeExchange, *args: Any) -> None:
        with watch.here():
            _run(self, *args)

    replaced: Any = step_batches
    replaced.copied_ahead = lambda batches, _: map(watch.copy_to_device, batches)
    replaced = worker_team
    replaced.to_host_later = to_host_later
    replaced = TreeExchange
    replaced._run = run


_run = TreeExchange._run


def tensors_of(components: Components) -> Iterator[Tensor]:
    """Everything that is built on the device."""
    modules = [components.model, *components.loss.modules().values()]
    if components.ema is not None:
        modules.append(components.ema.module)
        yield from components.ema.state_dict().values()
    for module in modules:
        yield from (*module.parameters(), *module.buffers())


@pytest.fixture(scope="module", params=[1, 2])
def by_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The number of workers, and what each saw."""
    outcome = run_processes(watched_steps, plain_job(tmp_path_factory.mktemp("run"), "run"), request.param)
    assert not outcome.failures, "\n".join(outcome.failures.values())
    return request.param, outcome.results


@pytest.mark.parametrize("name", CASES)
def test_what_a_step_waits_for(by_case: Any, name: str) -> None:
    world_size, by_rank = by_case
    case = CASES[name]
    for rank in range(world_size):
        waits, collectives = by_rank[rank][name]
        assert [len(waits[step]) for step in WATCHED] == [case.waits] * len(WATCHED), waits
        assert [collectives[step] for step in WATCHED] == [case.collectives(world_size)] * len(WATCHED)


class Measured(torchmetrics.Metric):
    """Each kind of state: one that grows with the samples, one that is a float, and one that is an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("outputs", [], dist_reduce_fx="cat")
        self.add_state("largest", torch.zeros(()), dist_reduce_fx="max")
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        self.outputs.append(output)
        self.largest, self.correct = output.max(), (output.argmax(1) == target).sum()

    def compute(self) -> dict[str, Tensor]:
        return {"mean": self.outputs.mean(), "largest": self.largest, "correct": self.correct}


def watched_validations(link: AgentLink, task: Task) -> dict[int, list[str]]:
    """What would wait in a validation, by its number of batches."""
    meet(link, task, TIMEOUT_S)
    watch = DeviceWatch()
    team = Team(rank=task.rank, world_size=task.world_size, shards=SHARDS, exact=True, device=watch.device)
    waits = {}
    for num_batches in (3, 6):
        model = OddNet()
        loss = build_loss(LossSpec(factory=Target("CrossEntropyLoss", WEIGHTS)), Builder()).to(watch.device)
        metrics = build_metrics({"measured": Target(f"{__name__}.Measured")}, Builder()).to(watch.device)
        loaded = validation_batches(
            Images(2 * num_batches), batch_size=2, seed=0, rank=0, world_size=1, loaders=0, device=watch.device,
            weigh=loss.target_weights(),
        )  # fmt: skip
        batches = map(watch.copy_to_device, loaded)
        watch.mark([*model.parameters(), *model.buffers(), *loss.modules()["loss"].buffers()])
        watch.next_step()
        with watch.here():
            evaluate(model, loss, metrics, batches, team, seed=0)
        waits[num_batches] = watch.waits[-1]
    return waits


def test_a_validation_waits_at_its_end_alone(tmp_path: Path) -> None:
    """Once for the loss, and for what metrics compute then; however many batches there are."""
    outcome = run_processes(watched_validations, plain_job(tmp_path, "run"), 1)
    assert not outcome.failures, "\n".join(outcome.failures.values())
    waits = outcome.results[0]
    assert waits[3] == waits[6]
    assert len(waits[3]) >= 1
