"""A description for tests of what does not train, and what a trial may tell of one."""

from typing import Any

from jobs.sampling import StepPlan
from jobs.spec import DataSpec, JobSpec, LossSpec, OptimizerSpec, Target
from launcher.planning.memory import MemoryPlan
from launcher.planning.plan import DryRunResult


def bare_job(**sections: Any) -> JobSpec:
    """The least there can be, with these sections; nothing that it names exists."""
    return JobSpec(
        name="run",
        model=Target("a.Model"),
        data=DataSpec(train=Target("a.data")),
        loss=LossSpec(factory=Target("MSELoss")),
        optimizer=OptimizerSpec(factory=Target("SGD")),
        **sections,
    )


MEMORY = MemoryPlan(
    num_workers=2, weights=5 * 2**20, buffers=0, gradients=5 * 2**20, aligned=0, optimizer=10 * 2**20, average=0,
    set_aside=5 * 2**20, exchange=5 * 2**20, activations=None, total=30 * 2**20, copy=2**20, restore=20 * 2**20,
)  # fmt: skip
TRIED = DryRunResult(
    steps=StepPlan(num_samples=640, global_batch=64, shards=4, epochs=1),
    num_val_samples=0,
    gpus_here=0,
    accelerator_here=None,
    groups=[],
    parameters=10,
    checkpoint_bytes=100,
    memory=MEMORY,
    trial_samples=16,
    trial_loss=1.0,
    data_fingerprint="ab",
    modules=(),
    rates=(),
    init_from=None,
    would_raise_on_gpu=(),
    could_fuse=False,
)
