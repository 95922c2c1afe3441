"""Go back to a checkpoint of a run, or copy one into a branch.

This module only changes the store. ``launcher.runs.resume`` checks first whether the run may go on, so that a command
that is refused changes nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cluster.errors import CheckpointError, DescriptionError, StorageError, listed
from cluster.run.lease import SupersededError
from cluster.run.manifest import Manifest
from cluster.run.run_directory import RunDirectory
from launcher.driver.pending_writes import event_row


def checkpoint_at(run: RunDirectory, step: int, steps: Sequence[int]) -> Manifest:
    """Return the manifest of a checkpoint of a run.

    Args:
        run: The run.
        step: The step of the checkpoint.
        steps: The steps of all checkpoints of the run.

    Raises:
        CheckpointError: There is no such checkpoint, or its manifest is bad.
    """
    if step not in steps:
        there = f"there are those of steps {listed(steps, most=20)}" if steps else "there is none yet"
        raise CheckpointError(f"{run.url}: has no checkpoint of step {step}; {there}")
    try:
        return run.checkpoints.manifest(step)
    except CheckpointError as error:
        raise _with_steps(error, steps) from error


def good_checkpoint_at(run: RunDirectory, step: int, steps: Sequence[int]) -> Manifest:
    """Return the same after reading and verifying the whole checkpoint.

    Raises:
        CheckpointError: There is no such checkpoint, or it is bad.
    """
    manifest = checkpoint_at(run, step, steps)
    try:
        run.checkpoints.verify(manifest)
    except CheckpointError as error:
        raise _with_steps(error, steps) from error
    return manifest


def go_back(run: RunDirectory, to: Manifest) -> None:
    """Make a checkpoint the newest one of the run, so that later checkpoints and rows no longer count.

    Nothing is deleted, because a driver that takes over meanwhile may build on it; retention deletes later checkpoints
    when the run passes their steps. The caller holds the lease, so the run's status is no longer ``completed``. If this
    process is killed before the fence is written, the run goes on from its newest checkpoint; after that, from ``to``.

    Args:
        run: The run.
        to: The manifest of the checkpoint.

    Raises:
        CheckpointError: The checkpoint has been replaced: another driver went on before this one took the lease.
    """
    if run.checkpoints.manifest(to.step) != to:
        raise CheckpointError(f"{run.checkpoints.url(to.step)}: was rewritten meanwhile; look again, then go back")
    beyond = [step for step in run.checkpoints.steps() if step > to.step]
    status, metrics = run.read_status() or {}, run.metrics()
    best = status.get("best")
    kept = best if best is not None and best["step"] <= to.step else None
    at = {"step": to.step, "saved_step": to.step, "state_sha256": to.state_sha256}
    run.write_status(status | at | {"best": kept, "error": None})
    _write_event(run, "went_back", step=to.step, state_sha256=to.state_sha256, discarded=beyond)
    run.check_lease()
    run.checkpoints.fence(to.step)
    metrics.cut(to.step + 1)
    metrics.flush()


def branch_directory(run: RunDirectory, new: str) -> RunDirectory:
    """Return the run directory for a branch, after checking that it is empty.

    Args:
        run: The run to branch from.
        new: A name, for a run beside it; or a URL or a path, which contains a ``/``.

    Raises:
        DescriptionError: The directory is a run, or is not empty.
    """
    branch = RunDirectory(new if "/" in new else f"{run.url.rpartition('/')[0]}/{new}")
    _check_empty(branch)
    return branch


def copy_run(
    run: RunDirectory,
    branch: RunDirectory,
    job: str,
    steps: Sequence[int],
    code: str | None,
    warn: Callable[[str], None],
) -> Manifest:
    """Copy a checkpoint of a run, and its rows up to that step, into a new run; the old run is only read.

    Args:
        run: The run to branch from.
        branch: An empty run directory.
        job: The description of the branch.
        steps: The steps of the checkpoints that may be copied; the last good one is.
        code: The digest of the code bundle to copy; None: there is no bundle.
        warn: Called with a line for each bad checkpoint, and for a copy that could not be deleted.

    Returns:
        The manifest of the copied checkpoint.

    Raises:
        CheckpointError: No checkpoint is good; then there is no branch.
        DescriptionError: The directory is no longer empty; it is left as it is.
    """
    _check_empty(branch)  # again: planning may have waited an hour for room
    branch.take_lease()
    try:
        return _copy_all(run, branch, job, steps, code, warn)
    except BaseException:  # also Ctrl-C: half a branch would keep others from using its name
        _delete_copy(branch, code, warn)
        raise


def first_workers(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the environments of the workers on which a run began; None: no event records them."""
    return next((event["workers"] for event in events if event["kind"] == "environment" and "workers" in event), None)


def _check_empty(branch: RunDirectory) -> None:
    if branch.is_known():
        raise DescriptionError(f"{branch.url}: is a run already; give the branch another name")
    if names := branch.store.names():
        raise DescriptionError(f"{branch.url}: is not empty, it holds {names[0]}; give the branch another name")


def _delete_copy(branch: RunDirectory, code: str | None, warn: Callable[[str], None]) -> None:
    try:
        branch.check_lease()
        branch.delete_begun(code)
    except SupersededError as error:
        warn(f"{error}; what was copied is left to that driver")
    except StorageError as error:
        warn(f"{error}; delete what is left of the branch, {branch.url}, or give the next one another name")


def _copy_all(
    run: RunDirectory,
    branch: RunDirectory,
    job: str,
    steps: Sequence[int],
    code: str | None,
    warn: Callable[[str], None],
) -> Manifest:
    """Copy as ``copy_run`` does; what a failure leaves is no run."""
    manifest = _copy_newest(run, branch, steps, warn)
    metrics = branch.metrics()
    for row in run.metrics().read():
        if row["step"] <= manifest.step:
            metrics.append(row)
    metrics.flush()
    # Copy also with what and on which workers the run began: the bits of the copied state depend on it.
    branch.write_environment(run.read_environment() | ({} if code is None else {"code": code}))
    if code is not None:
        branch.write_code(code, run.read_code(code))
    workers = first_workers(run.events().read())
    if workers is not None:
        _write_event(branch, "environment", workers=workers)
    _write_event(branch, "branched", source=run.url, step=manifest.step, state_sha256=manifest.state_sha256)
    branch.write_job(job)  # last: with job.yaml it is a run, which would begin at step 0 if it had no checkpoint
    return manifest


def _copy_newest(
    run: RunDirectory, branch: RunDirectory, steps: Sequence[int], warn: Callable[[str], None]
) -> Manifest:
    """Copy the last good checkpoint of ``steps``; return its manifest."""
    for step in reversed(steps):
        try:
            manifest = run.checkpoints.manifest(step)
            run.checkpoints.copy_to(branch.checkpoints, manifest)
        except CheckpointError as error:
            branch.checkpoints.discard_after(-1)  # delete the partial copy
            if len(steps) == 1:
                raise
            warn(f"{error}; the checkpoint before it is used")
        else:
            return manifest
    raise CheckpointError(f"{run.url}: has no good checkpoint to branch from; train it first, or restore one")


def _write_event(run: RunDirectory, kind: str, **content: Any) -> None:
    events = run.events()
    events.append(event_row(kind, content))
    events.flush()


def _with_steps(error: CheckpointError, steps: Sequence[int]) -> CheckpointError:
    return CheckpointError(f"{error}; there are those of steps {listed(steps, most=20)}")
