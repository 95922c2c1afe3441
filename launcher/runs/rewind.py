"""The past of a run, changed before it goes on: going back to a step, and branching at one.

Both are prepared here, in the store alone. Whether the run may go on at all is decided before, by
``launcher.runs.start``: what is wrong must not cost anything.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cluster.errors import CheckpointError, DescriptionError, listed
from cluster.run.manifest import Manifest
from cluster.run.run_directory import RunDirectory
from launcher.driver.run_log import event_row


def checkpoint_at(run: RunDirectory, step: int, steps: Sequence[int]) -> Manifest:
    """The manifest of one of a run's checkpoints.

    Args:
        run: Whose it is.
        step: Of the checkpoint.
        steps: Those that the run has checkpoints of.

    Raises:
        CheckpointError: There is none, or its manifest is bad.
    """
    if step not in steps:
        there = f"there are those of steps {listed(steps, most=20)}" if steps else "there is none yet"
        raise CheckpointError(f"{run.url}: has no checkpoint of step {step}; {there}")
    try:
        return run.checkpoints.manifest(step)
    except CheckpointError as error:
        raise _with_steps(error, steps) from error


def good_checkpoint_at(run: RunDirectory, step: int, steps: Sequence[int]) -> Manifest:
    """The same, after the whole checkpoint was read and verified."""
    manifest = checkpoint_at(run, step, steps)
    try:
        run.checkpoints.verify(manifest)
    except CheckpointError as error:
        raise _with_steps(error, steps) from error
    return manifest


def go_back(run: RunDirectory, to: Manifest) -> None:
    """Makes a checkpoint the newest, and its step the last that was trained; what lies beyond counts no more.

    Nothing is deleted, for a driver that takes over meanwhile may build on it: retention does that as the run passes.
    This process has claimed the run, which so is no longer complete. A kill before the fence leaves a run that goes on
    from its newest checkpoint; from the fence on, it goes on from this one.

    Raises:
        CheckpointError: It is no longer there: another driver went on before this one claimed the run.
    """
    if run.checkpoints.manifest(to.step) != to:
        raise CheckpointError(f"{run.checkpoints.url(to.step)}: was written anew meanwhile; look again, then go back")
    beyond = [step for step in run.checkpoints.steps() if step > to.step]
    status, metrics = run.read_status() or {}, run.metrics()
    best = status.get("best")
    kept = best if best is not None and best["step"] <= to.step else None
    run.write_status(status | {"step": to.step, "state_sha256": to.state_sha256, "best": kept, "error": None})
    _note(run, "went_back", step=to.step, state_sha256=to.state_sha256, discarded=beyond)
    run.check_lease()
    run.checkpoints.fence(to.step)
    metrics.cut(to.step + 1)
    metrics.flush()


def branch_directory(run: RunDirectory, new: str) -> RunDirectory:
    """Where a branch of a run is to lie, where nothing may lie yet.

    Args:
        run: What is branched.
        new: A name, for a run beside it; or a URL or a path, which has a ``/``.

    Raises:
        DescriptionError: Something is there.
    """
    branch = RunDirectory(new if "/" in new else f"{run.url.rpartition('/')[0]}/{new}")
    if branch.is_known():
        raise DescriptionError(f"{branch.url}: is a run already; give the branch another name")
    if names := branch.store.names():
        raise DescriptionError(f"{branch.url}: is not empty, it holds {names[0]}; give the branch another name")
    return branch


def copy_run(
    run: RunDirectory,
    branch: RunDirectory,
    job: str,
    steps: Sequence[int],
    code: str | None,
    warn: Callable[[str], None],
) -> Manifest:
    """Makes a run of another one's checkpoint, and of its rows up to there; the other is only read.

    Args:
        run: What is branched.
        branch: An empty directory.
        job: The description of the branch.
        steps: Of the checkpoints to begin at: the last one that is good is taken.
        code: The digest of the bundle that the branch takes along; none: there is no bundle.
        warn: Told of those that are bad.

    Returns:
        The manifest of the checkpoint taken.

    Raises:
        CheckpointError: None is good; there is no branch, then.
    """
    branch.take_lease()
    manifest = _copy_newest(run, branch, steps, warn)
    metrics = branch.metrics()
    for row in run.metrics().read():
        if row["step"] <= manifest.step:
            metrics.append(row)
    metrics.flush()
    # Also what it began with, and on which workers: the bits of this state depend on it.
    branch.write_environment(run.read_environment() | ({} if code is None else {"code": code}))
    if code is not None:
        branch.write_code(code, run.read_code(code))
    workers = first_workers(run.events().read())
    if workers is not None:
        _note(branch, "environment", workers=workers)
    _note(branch, "branched", source=run.url, step=manifest.step, state_sha256=manifest.state_sha256)
    branch.write_job(job)  # last: it makes it a run, which would begin anew if it had no checkpoint
    return manifest


def first_workers(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The environments of the workers that a run began on, from its events; none: they have not told of them."""
    return next((event["workers"] for event in events if event["kind"] == "environment" and "workers" in event), None)


def _copy_newest(
    run: RunDirectory, branch: RunDirectory, steps: Sequence[int], warn: Callable[[str], None]
) -> Manifest:
    for step in reversed(steps):
        try:
            manifest = run.checkpoints.manifest(step)
            run.checkpoints.copy_to(branch.checkpoints, manifest)
        except CheckpointError as error:
            branch.checkpoints.discard_after(-1)  # as far as it was copied
            if len(steps) == 1:
                raise
            warn(f"{error}; the checkpoint before it is used")
        else:
            return manifest
    raise CheckpointError(f"{run.url}: has no good checkpoint to branch from; train it first, or restore one")


def _note(run: RunDirectory, kind: str, **content: Any) -> None:
    events = run.events()
    events.append(event_row(kind, content))
    events.flush()


def _with_steps(error: CheckpointError, steps: Sequence[int]) -> CheckpointError:
    return CheckpointError(f"{error}; there are those of steps {listed(steps, most=20)}")
