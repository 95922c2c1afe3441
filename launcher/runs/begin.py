"""Begin a run from a job description, or continue it if its run directory already holds the same run."""

from pathlib import Path
from typing import Any

from cluster.errors import DescriptionError, StorageError
from cluster.kinds.cluster import Cluster
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from jobs.spec import JobSpec
from launcher.code.user_code import UserCode, code_folder, find_code, has_bundle, make_import_paths
from launcher.config.description import Description, parse
from launcher.display.progress import Progress
from launcher.planning.plan import Plan, make_plan
from launcher.runs.driving import drive_run, ready_to_drive
from launcher.runs.resume import continue_run
from launcher.runs.takeover import check_not_driven_since, meet_other_driver, observe
from launcher.watching.requeued import warn_of_next_try


def begin(
    description: Description, folder: Path, cluster: Cluster, display: Progress, *, take_over: bool = False
) -> dict[str, Any]:
    """Run a job from its description. If the run exists and is the same one, continue it.

    Args:
        description: The job.
        folder: The folder of the job file, which is searched for the user's own modules.
        cluster: Where to run the job; this process has joined it.
        display: Shows progress.
        take_over: Take the run even from a live driver, which then ends.

    Returns:
        The ``--json`` document.

    Raises:
        LauncherError: See the tree in ``cluster.errors``.
    """
    code = UserCode(folders=make_import_paths(folder))
    run = run_directory(description)
    observed = observe(run)
    if run.exists():
        stored = parse(run.read_job(), f"{run.url}/job.yaml")
        if has_bundle(run):
            code = find_code(run)
            display.message(f"running with the code that was submitted, not with {code_folder(folder)}")
        warn_of_next_try(run, observed.status, display.warn)
        return continue_run(
            run, observed, stored, description, code, cluster, display, force=False, take_over=take_over
        )
    meet_other_driver(run, display, take_over=take_over)  # a driver may hold the lease and not have written job.yaml
    cluster.import_ahead()
    plan = make_plan(description, run.url, code, cluster, display.phase, may_wait=not take_over)
    display.message(one_line(description.spec, plan))
    with ready_to_drive(cluster, display) as signals:
        check_not_driven_since(run, observed, take_over=take_over)
        return drive_run(run, description, plan, code, cluster, display, signals, may_differ=False)


def plan_only(description: Description, folder: Path, cluster: Cluster, display: Progress) -> Plan:
    """Make the plan of a job and check it, without starting a worker.

    Raises:
        DescriptionError: The description cannot run there as written.
        ClusterError: The cluster is not fit for the job.
    """
    code = UserCode(folders=make_import_paths(folder))
    return make_plan(description, run_directory(description).url, code, cluster, display.phase, may_wait=False)


def one_line(spec: JobSpec, plan: Plan) -> str:
    """Return the plan in one line, for the person who started the run."""
    device = "GPU" if plan.gpus else "CPU"
    shards = f"{spec.train.shards} shards on {plan.num_workers} worker{'s' * (plan.num_workers > 1)} ({device})"
    return (
        f"{spec.name}: {plan.end_step:,} steps of {spec.train.global_batch} samples, "
        f"{plan.steps_per_epoch:,} an epoch; "
        f"{plan.parameters:,} parameters; {shards}; {plan.run}"
    )


def run_directory(description: Description) -> RunDirectory:
    """Return the run directory of a description, whether or not it exists.

    Raises:
        DescriptionError: The store's URL is not valid here.
    """
    try:
        return RunDirectory(Store(description.spec.store).at(description.spec.name))
    except StorageError as error:
        raise DescriptionError(f"{description.source}: store: {error}") from error
