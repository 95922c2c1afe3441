"""Dry runs of small jobs, each in a process of its own, as in the product."""

from cluster.process import fork_server
from cluster.process.orders import Task
from jobs.spec import JobSpec
from launcher.planning.plan import DryRunResult

_DRY_RUN = "launcher.planning.dry_run:try_out"


def task_of(spec: JobSpec, *, on_gpu: bool = False) -> Task:
    """The task of the dry run of a job whose parts can be imported from here."""
    return Task(entry=_DRY_RUN, run_url="", import_paths=(), working_directory=".", content=spec, on_gpu=on_gpu)


def dry_run(spec: JobSpec) -> DryRunResult:
    """What the dry run of a job on the CPU finds out; the server it is forked from must run."""
    result: DryRunResult = fork_server.call(_DRY_RUN, task_of(spec))
    return result
