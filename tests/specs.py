"""A description for tests of what does not train."""

from typing import Any

from jobs.spec import DataSpec, JobSpec, LossSpec, OptimizerSpec, Target


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
