"""The memory that a plan names is what a worker takes on a GPU, as torch's allocator counts it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.checkpoint.loop_state import LoopState
from jobs.components.build import build_parts
from jobs.spec import DataSpec, JobSpec, OptimizerSpec, Target
from jobs.training.loop import Loop
from launcher.planning.dry_run import try_out
from launcher.planning.memory import MemoryPlan
from tests.distributed.small_job import plain_job
from tests.gpu.workers import join, run_here
from tests.memory import Memory, free_in_this_thread, measured_memory

pytestmark = pytest.mark.gpu

STEPS = 4
SPARE = 96 * 2**20
"""Bytes that no plan counts: workspaces of cuBLAS and cuDNN, which torch allocates once, and the next batch."""
CASES = {
    "one shard": {"shards": 1},
    "four shards, AdamW and an average": {"shards": 4, "ema_decay": 0.9},
    "bf16, channels_last": {"shards": 2, "precision": "bf16", "channels_last": True},
}


def job_of(store: Path, *, on_gpu: bool, **train: object) -> JobSpec:
    """A ResNet-18, on a GPU with batches whose activations take more memory than the weights."""
    size, batch = (128, 128) if on_gpu else (32, 8)
    job = plain_job(store, "run", global_batch=batch, epochs=1, max_steps=STEPS, **train)
    return replace(
        job,
        model=Target("torchvision.models.resnet18", {"num_classes": 10}),
        data=DataSpec(
            train=Target(
                "jobs.data.synthetic_images", {"length": batch * (STEPS + 1), "num_classes": 10, "image_size": size}
            )
        ),
        optimizer=OptimizerSpec(factory=Target("AdamW" if "ema_decay" in train else "SGD", {"lr": 1e-3})),
    )


def plan(link: AgentLink, task: Task) -> MemoryPlan:  # noqa: ARG001
    return try_out(task).memory


def train(link: AgentLink, task: Task) -> Memory:
    """Takes steps; returns what torch has allocated from the building of the components on."""
    if not task.on_gpu:
        free_in_this_thread()
    team, device = join(link, task)

    def run() -> None:
        components = build_parts(task.content, device)
        Loop(
            task.content, components, LoopState(), team, metrics={}, log=lambda _: None, tell=lambda _: None,
            save=lambda *_, **__: None, stop_wanted=lambda: False,
        ).run()  # fmt: skip

    if not task.on_gpu:
        with measured_memory() as memory:
            run()
        return memory
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return Memory(peak=torch.cuda.max_memory_allocated() - before)


@pytest.mark.parametrize("name", CASES)
def test_a_plan_names_what_a_worker_takes(device: torch.device, on_gpu: bool, tmp_path: Path, name: str) -> None:
    job = job_of(tmp_path, on_gpu=on_gpu, **CASES[name])

    planned: MemoryPlan = run_here(plan, job, device).results[0]
    taken: Memory = run_here(train, job, device).results[0]

    print(f"planned {planned.total / 2**20:,.0f} MiB, taken {taken.peak / 2**20:,.0f} MiB: {planned}")
    lasting = planned.weights + planned.gradients + planned.optimizer + planned.average
    assert lasting < taken.peak
    assert (planned.activations is not None) == on_gpu
    if on_gpu:
        assert 0.8 * planned.total < taken.peak < planned.total + SPARE
