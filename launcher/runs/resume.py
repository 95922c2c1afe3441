"""Resume a run, go back in it, or branch from it, given its run directory alone.

The cluster is chosen by the caller, and may be another one each time.
"""

import json
from collections.abc import Sequence
from typing import Any

from cluster.errors import ClusterError, DescriptionError
from cluster.kinds.cluster import Cluster
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from launcher.code.user_code import UserCode, find_code
from launcher.config.description import Description
from launcher.display.progress import Progress
from launcher.planning.nodes import inspect_nodes
from launcher.runs.changes import changes_of, compare, unsafe_changes
from launcher.runs.driving import drive_run, ready_to_drive
from launcher.runs.found_description import find_description
from launcher.runs.next_try import bounded_tries, planned_elsewhere, stopped
from launcher.runs.planning_sign import planning_sign
from launcher.runs.resumed_plan import placed_at, plan_to_resume
from launcher.runs.rewind import branch_directory, checkpoint_at, copy_run, good_checkpoint_at
from launcher.runs.takeover import ObservedRun, check_not_driven_since, meet_other_driver, observe
from launcher.watching.requeued import end_requeued, warn_of_next_try
from launcher.watching.status import LONG_SILENCE_S, read_without_checkpoints, without_driver


def resume(
    run: RunDirectory,
    overrides: Sequence[str],
    cluster: Cluster,
    display: Progress,
    *,
    force: bool = False,
    take_over: bool = False,
    at: int | None = None,
    new: str | None = None,
    submission_id: str | None = None,
    inspects: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Resume a run from a checkpoint, given its directory alone.

    Args:
        run: The run.
        overrides: Changes of its description, ``key=value``.
        cluster: Where to run; this process has joined it.
        display: Shows progress.
        force: Go on even with another description, other data, or workers that differ.
        take_over: Take the run even from a live driver, which then ends.
        at: The step of the checkpoint to go back to; None: the newest good one.
        new: The name or the URL of a branch, which goes on in place of the run; None: no branch.
        submission_id: The submission for which this process was started. The run takes its description and its code,
            unless the run has already taken this submission or a later one.
        inspects: The names of the environment variables that the nodes of the cluster are inspected for before workers
            start. None: the nodes are not inspected.

    Returns:
        The ``--json`` document.

    Raises:
        LauncherError: See the tree in ``cluster.errors``.
    """

    def drive() -> dict[str, Any]:
        return _resume(
            run, overrides, cluster, display, force=force, take_over=take_over, at=at, new=new,
            submission_id=submission_id, inspects=inspects,
        )  # fmt: skip

    return bounded_tries(run, submission_id, drive)


def _resume(
    run: RunDirectory,
    overrides: Sequence[str],
    cluster: Cluster,
    display: Progress,
    *,
    force: bool,
    take_over: bool,
    at: int | None,
    new: str | None,
    submission_id: str | None,
    inspects: tuple[str, ...] | None,
) -> dict[str, Any]:
    observed = observe(run)
    found = find_description(run, submission_id)
    stored = found.stored
    branch = None if new is None else branch_directory(run, new)
    if take_over and at is not None:
        raise DescriptionError(
            f"{run.url}: --at goes back in a run that nobody drives; launcher stop it, and leave out --take-over"
        )
    code = find_code(run, found.submission_id)
    steps = run.checkpoints.steps()
    reached = max(steps, default=0) if at is None else at
    if branch is not None:
        overrides = [*overrides, *_branch_overrides(branch, stored, overrides)]
    wanted = found.changed(overrides) if submission_id else found.continued(overrides, reached)
    if branch is None:
        if submission_id is None:
            warn_of_next_try(run, observed.status, display.warn)
        return continue_run(
            run, observed, stored, wanted, code, cluster, display, force=force, take_over=take_over, at=at,
            to_take=found.submission_id if submission_id else None, inspects=inspects,
            is_next_try=submission_id is not None and found.submission_id is None,
        )  # fmt: skip
    if at is not None:
        steps = [checkpoint_at(run, at, steps).step]
    return _branch(run, branch, steps, stored, wanted, code, cluster, display, force=force)


def continue_run(
    run: RunDirectory,
    observed: ObservedRun,
    stored: Description,
    wanted: Description,
    code: UserCode,
    cluster: Cluster,
    display: Progress,
    *,
    force: bool,
    take_over: bool,
    at: int | None = None,
    to_take: str | None = None,
    inspects: tuple[str, ...] | None = None,
    is_next_try: bool = False,
) -> dict[str, Any]:
    """Continue an existing run, after checking that ``wanted`` describes that run.

    Args:
        observed: The run as ``observe`` saw it before anything else of it was read.
        stored: The run's description.
        wanted: The description to go on with.
        code: The user's code.
        to_take: The submission for which this process was started, if the run has yet to take it.
        is_next_try: Whether the run took it in an earlier try of the batch job of this process.
        run, cluster, display, force, take_over, at, inspects: See ``resume``.
    """
    changes, is_same = compare(run, stored, wanted, force=force)
    meet_other_driver(run, display, take_over=take_over)
    status = run.read_status()
    steps = run.checkpoints.steps()
    back_to = None if at is None else good_checkpoint_at(run, at, steps)
    goes_back = status is not None and at is not None and at < status.get("step", 0)
    if status is not None and status["status"] == "completed" and is_same and not goes_back:
        display.message(f"{run.url} is complete; nothing to do (another name starts another run)")
        return without_driver(status)
    if is_next_try and (document := stopped(run)) is not None:
        display.message(f"{run.url} was stopped; nothing is left to do for this job (launcher resume goes on)")
        return document
    for change in changes:
        display.message(f"changed {change}")
    reached = max(steps, default=0) if at is None else at
    placed = placed_at(run, wanted) if wanted.spec.store == stored.spec.store else wanted
    # Do not wait for room with --take-over: the live driver holds it.
    with planned_elsewhere(), planning_sign(run, to_take, display.phase) as tell:
        if inspects is not None:
            tell("inspecting the nodes")
            inspect_nodes(cluster, placed, inspects, display.warn)
        plan = plan_to_resume(run, placed, reached, code, cluster, tell, force=force, may_wait=not take_over)
    if status is not None and reached >= plan.end_step < plan.total_steps:
        display.message(f"{run.url} has reached train.max_steps={plan.end_step}; raise it to go on")
        if to_take is not None:  # else the run counts as submitted, for the job of this process
            run.submissions.mark_done(to_take)
        end_requeued(run)
        return read_without_checkpoints(run, LONG_SILENCE_S) | {"interrupted": False}
    if back_to is None:
        display.message(f"resuming {run.url}")
    else:
        display.message(f"going back to step {at} of {run.url}")
    with ready_to_drive(cluster, display) as signals:
        check_not_driven_since(run, observed, take_over=take_over)
        if to_take is not None and not run.submissions.is_there(to_take):
            raise ClusterError(f"{run.url}: submission {to_take} was withdrawn; nothing is left to do for this job")
        return drive_run(
            run, wanted, plan, code, cluster, display, signals, back_to, may_differ=force, keeps_stop=is_next_try
        )


def _branch(
    run: RunDirectory,
    branch: RunDirectory,
    steps: Sequence[int],
    stored: Description,
    wanted: Description,
    code: UserCode,
    cluster: Cluster,
    display: Progress,
    *,
    force: bool,
) -> dict[str, Any]:
    """Copy the newest good checkpoint of ``steps`` into a new run, and drive that run."""
    changes = changes_of(stored.text, wanted)
    unsafe = unsafe_changes(changes, wanted)
    if unsafe and not force:
        raise DescriptionError(
            f"{wanted.source}: the branch has another description: {'; '.join(map(str, unsafe))}; "
            "leave that as it is, or branch with --force"
        )
    for change in changes:
        display.message(f"changed {change}")
    reached = max(steps, default=0)
    plan = plan_to_resume(run, wanted, reached, code, cluster, display.phase, force=force, may_wait=True)
    with ready_to_drive(cluster, display) as signals:
        manifest = copy_run(run, branch, wanted.text, steps, code.sha256, display.warn)
        display.message(f"branching from step {manifest.step} of {run.url}")
        return drive_run(branch, wanted, plan, code, cluster, display, signals, may_differ=force)


def _branch_overrides(branch: RunDirectory, stored: Description, overrides: Sequence[str]) -> list[str]:
    """Return the overrides of ``name`` and ``store`` that place a run in the branch's directory."""
    if any(override.startswith(("name=", "store=")) for override in overrides):
        raise DescriptionError(
            f"{stored.source}: a branch has its name and its store from --as; leave out name and store"
        )
    store = branch.url.rpartition("/")[0]
    is_beside = Store(stored.spec.store).url == store  # then a relative store may stay relative
    return [f"name={json.dumps(branch.name)}", *([] if is_beside else [f"store={json.dumps(store)}"])]
